"""Trees of EAGLE-3's guesses, against a plain form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from drafters import Knowing
from test_dflash import Heard
from test_eagle import KINDS, TARGET, guessed
from test_speculate import PROMPTS, plain
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext.decoding.graphs import Graphs
from dparallel_ext.speculation import TreeDrafter

pytest_plugins = ["taping"]

Tree = dict[tuple[int, ...], float]
"""The path of each node from the root, and its score."""


def grown(kind: str, tokens: Tensor, width: int, depth: int) -> Tree:
    """All nodes that EAGLE-2 makes behind tokens (n,), each level in plain torch, path by path."""
    made: Tree = {}
    level: Tree = {(): 0.0}
    for _ in range(depth):
        new: Tree = {}
        for path, score in level.items():
            best = guessed(KINDS[kind], TARGET, tokens, (*path, 0))[-1].log_softmax(-1).topk(width)
            for token, logprob in zip(best.indices.tolist(), best.values.tolist(), strict=True):
                new[*path, token] = score + logprob
        made |= new
        level = dict(sorted(new.items(), key=lambda node: -node[1])[:width])
    return made


@pytest.mark.parametrize(("kind", "width", "size"), [("eagle3", 3, 4), ("speculators-eagle3", 2, 12)])
def test_a_draft_is_the_tree_of_the_plain_form(tmp_path: Path, kind: str, width: int, size: int) -> None:
    """Whatever was refused, and wherever a tree's accepted tokens were; up to the end of each text."""
    drafter = TreeDrafter(dx.speculation.load(KINDS[kind].write(tmp_path)), width=width)  # type: ignore[arg-type]
    settings: dict[str, Any] = {"prompts": [PROMPTS[0], PROMPTS[2]], "gen_length": [14, 11]}
    expected = plain(TARGET, **settings)
    heard = Heard(drafter, Knowing(list(expected.sequences), tree=True, right=0.5))  # type: ignore[arg-type]
    found = plain(TARGET, drafter=heard, draft_size=size, **settings)
    assert torch.equal(found.sequences, expected.sequences)
    nodes = 0
    for tokens, most, _, draft in heard.heard:
        if len(tokens) == 1:
            assert not draft.tokens
            continue
        made = grown(kind, tokens, width, min(most, drafter.blocks.most))
        assert draft.parents is not None
        paths: list[tuple[int, ...]] = [()]
        for token, parent in zip(draft.tokens, draft.parents, strict=True):
            paths.append((*paths[parent], token))
        assert len(draft.tokens) == min(most, len(made))
        assert len({*paths}) == len(paths)
        scores = [made[path] for path in paths[1:]]
        assert scores == pytest.approx(sorted(made.values(), reverse=True)[: len(scores)], abs=1e-3)
        nodes += len(scores)
    assert nodes > 40


def test_a_draft_with_a_large_pass_is_not_recorded(
    tmp_path: Path, taped: list[Graphs], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first pass of a draft is small; the last has 7 levels of 8 nodes of each of two sequences, but
    fewer at a text's end."""
    monkeypatch.setattr("dparallel_ext.speculation.drafter.recorded_rows", lambda model: 64)
    path = KINDS["eagle3"].write(tmp_path)
    plain(TARGET, [PROMPTS[0]] * 2, drafter=f"tree:{path}", draft_size=8, gen_length=16)
    drafting: Any = taped[1].recordings
    assert 32 < max(shape[0] for shapes, *_ in drafting for shape in shapes) <= 64
