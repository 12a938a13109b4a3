"""Trees of a block's likeliest paths: against a plain form, the text with them, what is asked and refused."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from dparallel import registry
from dparallel.toy import tasks
from drafters import KINDS, MODEL, drafter_with, model_of
from test_dflash import Heard, guessed
from test_speculate import PROMPTS, plain

import dparallel_ext as dx
from dparallel_ext import _C
from dparallel_ext.models import Model
from dparallel_ext.speculation import (
    AdaDecode,
    DFlashDrafter,
    Measured,
    RiderDrafter,
    TreeDrafter,
    drafter_of,
)
from dparallel_ext.speculation.drafter import PredictsAcceptance
from dparallel_ext.speculation.sizing import sizer_for

pytest_plugins = ["taping"]


def tree_of(kind: str, target: Model = MODEL, width: int = 4, **changes: Any) -> TreeDrafter:
    return TreeDrafter(drafter_with(kind, target, **changes), width=width)


# --- the tree -------------------------------------------------------------------------------------

Rows = Sequence[Sequence[float]]


def best_paths(rows: Rows, most: int) -> list[tuple[int, int, int, float]]:
    """(parent, depth, rank, score) of the best nodes, best first: of all that are behind the root or a node
    of the tree, the one of the highest score, nearest the root, behind the earliest parent, of the lowest
    rank; over and over."""
    found: list[tuple[int, int, int, float]] = []
    while len(found) < most:
        possible = []
        for parent, (depth, above) in enumerate([(-1, 0.0), *((node[1], node[3]) for node in found)]):
            taken = {node[2] for node in found if node[0] == parent}
            guesses = rows[depth + 1] if depth + 1 < len(rows) else ()
            for rank, score in enumerate(guesses):
                if rank not in taken and above + score > -math.inf:
                    possible.append((-(above + score), depth + 1, parent, rank))
        if not possible:
            break
        score, depth, parent, rank = min(possible)
        found.append((parent, depth, rank, -score))
    return found


def test_the_tree_is_that_of_the_plain_form() -> None:
    """Of random rows and of rows full of ties, of bad rows, of several trees at once, of none."""
    rng = random.Random(0)
    for case in range(400):
        width, count = rng.randint(1, 5), rng.randint(0, 4)
        depths = [rng.randint(0, 6) for _ in range(count)]
        sizes = [rng.choice([0, 1, 3, 16, 40]) for _ in range(count)]
        rows: list[list[float]] = []
        for _ in range(sum(depths)):
            scores = [-rng.expovariate(1) if case % 2 else -0.5 * rng.randint(0, 3) for _ in range(width)]
            scores.sort(reverse=True)
            bad = rng.randint(0, width) if rng.random() < 0.2 else width
            rows.append(scores[:bad] + [rng.choice([-math.inf, math.nan])] * (width - bad))
        trees = _C.draft_trees([*itertools.chain(*rows)], width, depths, sizes)
        assert len(trees) == count
        first = 0
        for tree, depth, most in zip(trees, depths, sizes, strict=True):
            expected = best_paths(rows[first : first + depth], most)
            assert tree.parents == [parent for parent, *_ in expected]
            assert tree.cells == [(first + at) * width + rank for _, at, rank, _ in expected]
            assert tree.chances == pytest.approx([math.exp(score) for *_, score in expected])
            first += depth


def test_the_first_nodes_are_the_smaller_tree() -> None:
    rows = [sorted((-random.Random(at).expovariate(1) for _ in range(3)), reverse=True) for at in range(4)]
    scores = [score for row in rows for score in row]
    (whole,) = _C.draft_trees(scores, 3, [4], [1000])
    assert len(whole.parents) == 3 + 9 + 27 + 81
    for size in range(30):
        (tree,) = _C.draft_trees(scores, 3, [4], [size])
        assert tree.parents == whole.parents[:size]
        assert tree.cells == whole.cells[:size]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 0}, "width: expected >= 1, got 0"),
        ({"sizes": [1]}, "sizes: expected 2, one for each of depths, got 1"),
        ({"depths": [2, 2]}, "depths: expected from 0 to the 1 rows that are left, got 2"),
        ({"depths": [-1, 2]}, "depths: expected from 0 to the 3 rows that are left, got -1"),
    ],
)
def test_rows_that_are_not_there_are_refused(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"scores": [-1.0] * 6, "width": 2, "depths": [2, 1], "sizes": [3, 3]}
    with pytest.raises(ValueError, match=message):
        _C.draft_trees(**given | change)


class Grown(Heard):
    """Notes the trees that are drafted."""

    def compare(self, target: Model) -> int:
        """Nodes: each tree has the best scores that the plain computation gives any tree of its size."""
        count = 0
        for tokens, size, length, draft in self.heard:
            blocks = self.inner.blocks
            rows = min(blocks.options.block, length - len(tokens) + 1)
            scores = guessed(blocks, target, tokens, rows).log_softmax(-1)
            scores[:, blocks.options.mask_id] = -math.inf
            best = scores.topk(self.inner.width).values.tolist()
            expected = [score for *_, score in best_paths(best, size)]
            assert draft.parents is not None
            own, depths = [0.0], [0]
            for token, parent in zip(draft.tokens, draft.parents, strict=True):
                own.append(own[parent] + float(scores[depths[parent], token]))
                depths.append(depths[parent] + 1)
            assert own[1:] == pytest.approx(expected, abs=1e-3)
            places = [*zip(draft.parents, draft.tokens, strict=True)]
            assert len({*places}) == len(places)  # no guess twice behind one parent
            count += len(draft.tokens)
        return count


@pytest.mark.parametrize("kind", KINDS)
def test_drafts_are_the_trees_of_the_plain_computation(kind: str) -> None:
    """Ragged, up to each sequence's end: no tree is larger than the slots that are left."""
    grown = Grown(tree_of(kind))
    for size in (3, 16, 40):
        lengths = [24, 30, 1, 11]
        found = plain(drafter=grown, draft_size=size, gen_length=lengths)
        assert torch.equal(found.sequences, plain(gen_length=lengths).sequences)
    assert grown.compare(MODEL) > 1000
    assert min(length - len(tokens) for tokens, _, length, _ in grown.heard) < 4
    assert all(len(draft.tokens) < length - len(tokens) for tokens, _, length, draft in grown.heard)


@pytest.mark.parametrize("kind", KINDS)
def test_the_tree_of_width_one_is_the_chain(kind: str) -> None:
    chain, tree = Heard(drafter_with(kind)), Heard(tree_of(kind, width=1))
    for size in (2, chain.most):
        for drafter in (chain, tree):
            drafter.heard.clear()
            plain(drafter=drafter, draft_size=size)
        assert [draft.tokens for *_, draft in tree.heard] == [draft.tokens for *_, draft in chain.heard]
        assert all(draft.is_chain for *_, draft in tree.heard)


# --- the text -------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_it_changes_no_token(kind: str, temperature: float) -> None:
    settings: dict[str, Any] = {"temperature": temperature, "seed": 7, "gen_length": [24, 30, 1, 11]}
    expected = plain(**settings)
    drafter = tree_of(kind)
    for more in ({}, {"draft_size": 1}, {"draft_size": 16}, {"draft_size": 64}, {"batch_invariant": True}):
        found = plain(drafter=drafter, **more, **settings)
        assert torch.equal(found.sequences, expected.sequences), more
        assert torch.equal(found.kept, expected.kept)
    assert int(found.accepted.sum()) > 0
    without = plain(suppress=[3, 17], **settings)
    assert torch.equal(plain(drafter=drafter, suppress=[3, 17], **settings).sequences, without.sequences)
    both = [settings | {"prompts": [prompt], "gen_length": 9} for prompt in PROMPTS]
    for alone in both:
        assert torch.equal(plain(drafter=drafter, **alone).sequences, plain(**alone).sequences)
    assert plain(prompts=[], drafter=drafter, temperature=temperature).sequences.shape[0] == 0


def test_what_is_suppressed_is_in_no_tree() -> None:
    grown = Grown(tree_of("dflash"))
    plain(drafter=grown, draft_size=16)
    often = [token for token in range(60) if any(token in draft.tokens for *_, draft in grown.heard)][:20]
    grown.heard.clear()
    plain(drafter=grown, draft_size=16, suppress=often)
    assert len(often) == 20
    assert all(not {*often, 60} & {*draft.tokens} for *_, draft in grown.heard)
    assert sum(len(draft.tokens) for *_, draft in grown.heard) > 200


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_engines_texts_are_the_same(temperature: float) -> None:
    """In shared pages, evicted and used again; requests come and go."""
    common = torch.randint(10, 60, (24,), generator=torch.Generator().manual_seed(0))
    prompts = [torch.cat((common, PROMPTS[2][:n])) for n in range(1, 7)]
    settings: dict[str, Any] = {"gen_length": 20, "temperature": temperature}
    expected = [
        plain(prompts=[prompt], seed=number, **settings).responses[0].tolist()
        for number, prompt in enumerate(prompts)
    ]
    grown = Grown(tree_of("dflash"))
    sizes: dict[str, Any] = {"lanes": 2, "max_length": 64, "page_size": 8, "pages": 14, "draft_size": 16}
    with dx.Engine(MODEL, drafter=grown, **sizes) as engine:
        handles = [engine.submit(p, seed=n, eos_id=-1, **settings) for n, p in enumerate(prompts)]
        assert [handle.result(60).tokens for handle in handles] == expected
    assert grown.compare(MODEL) > 500


def test_recorded_drafts_are_the_same(request: pytest.FixtureRequest) -> None:
    """On a tape in place of a GPU: drafts wait for nothing, and read nothing from the host."""
    settings: dict[str, Any] = {"drafter": tree_of("dflash"), "draft_size": 16, "gen_length": 40}
    expected = plain(prompts=PROMPTS[:3:2], suppress=[3], **settings)
    taped = request.getfixturevalue("taped")
    found = plain(prompts=PROMPTS[:3:2], suppress=[3], **settings)
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(found.accepted, expected.accepted)
    assert all(graphs.replays > 5 for graphs in taped)
    assert len(taped) == 2


def test_trees_of_the_drafter_that_ships_bring_more_tokens_a_pass() -> None:
    """Than its chain; and the text of each answer is that of plain decoding."""
    model, tokenizer = registry.load("builtin:causal")
    problems = itertools.islice(tasks.problems("held_out"), 24)
    prompts = [tokenizer.encode(problem.prompt).ids for problem in problems]
    expected = dx.speculate(model, prompts, gen_length=64)

    def with_drafter(name: str, size: int) -> dx.SpeculateOutput:
        found = dx.speculate(model, prompts, gen_length=64, drafter=name, draft_size=size)
        assert [r[:n].tolist() for r, n in zip(found.responses, found.kept, strict=True)] == [
            r[:n].tolist() for r, n in zip(expected.responses, expected.kept, strict=True)
        ]
        return found

    for kind in KINDS:
        chain = with_drafter(f"builtin:{kind}", 15)
        tree = with_drafter(f"tree:builtin:{kind}", 64)
        assert tree.accepted_per_draft > chain.accepted_per_draft
        assert int(tree.nfe.sum()) < int(chain.nfe.sum())


# --- what is asked, and refused -------------------------------------------------------------------


def test_a_name_or_a_path_behind_tree(tmp_path: Path) -> None:
    drafter_with("dflash").save(tmp_path / "drafter.safetensors", torch.float32)
    for path in (tmp_path, tmp_path / "drafter.safetensors"):
        if path == tmp_path:
            drafter_with("dflash").save(tmp_path, torch.float32)
        found = drafter_of(f"tree:{path}")
        assert isinstance(found, TreeDrafter)
        assert (found.most, found.width) == (64, 8)
        assert "TreeDrafter(DFlashDrafter(dflash, block=9" in repr(found)
        asked = plain(drafter=f"tree:{path}", draft_size=16)
        assert torch.equal(asked.accepted, plain(drafter=tree_of("dflash", width=8), draft_size=16).accepted)
    for given, message in (
        ("tree:ngram", "expected a drafter of blocks behind \"tree:\", got 'ngram'"),
        ("tree:nothing", "drafter: expected a Drafter, a name .* got 'nothing'"),
        ("tree:", "drafter: expected a Drafter, a name"),
        ("tree", "drafter: expected a Drafter, a name"),
        (f"tree:{tmp_path}/none", "drafter: no directory"),
    ):
        with pytest.raises(ValueError, match=message):
            drafter_of(given)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (DFlashDrafter, "model: expected DFlashModel"),
        (TreeDrafter, "blocks: expected BlockDrafter"),
        (RiderDrafter, "model: expected RiderModel"),
        (AdaDecode, "heads: expected ExitHeads"),
    ],
)
def test_a_drafter_is_made_of_its_own_weights(kind: Any, expected: str) -> None:
    """And not of the model that it drafts for, nor of a drafter."""
    for given in (model_of(), tree_of("dflash"), "builtin:dflash"):
        with pytest.raises(ValueError, match=f"^{expected}, got {type(given).__name__}$"):
            kind(given, {}) if kind is RiderDrafter else kind(given)


def test_a_width_that_does_not_fit_is_named() -> None:
    for width, message in (
        (0, "width: expected a whole number >= 1, got 0"),
        (17, "width: expected a whole number <= 16, got 17"),
        (2.5, "width: expected a whole number >= 1, got 2.5"),
    ):
        with pytest.raises(ValueError, match=message):
            tree_of("dflash", width=width)  # type: ignore[arg-type]
    small = model_of(vocab_size=12)
    said = {"mask_token_id": 11, "target_layer_ids": [0, 1]}
    with pytest.raises(ValueError, match="width: expected a whole number <= 12, got 13"):
        tree_of("dflash", small, 13, dflash_config=said)
    prompts = [torch.tensor([1, 2, 3]), torch.tensor([4])]
    found = plain(small, prompts, drafter=tree_of("dflash", small, 12, dflash_config=said), draft_size=64)
    assert torch.equal(found.sequences, plain(small, prompts).sequences)


def test_sizes_go_by_what_the_trees_promise() -> None:
    """Of trees the sizer knows what each number of nodes is worth; chains are measured depth by depth."""
    assert not isinstance(drafter_with("dflash"), PredictsAcceptance)
    drafter = tree_of("dflash")
    assert [drafter.expected(size) for size in (0, 64)] == [1.0, 1.0]  # nothing is known yet
    scores = [math.log(share) for share in (0.5, 0.25, 0.8, 0.125)]
    for tree in _C.draft_trees([*scores, *scores], 2, [2, 2], [3, 1]):  # 0.5, 0.4, 0.25; and 0.5
        drafter.draft(range(len(tree.cells)), tree.parents, tree.chances)
    assert [drafter.expected(size) for size in range(5)] == pytest.approx([1.0, 1.5, 1.9, 2.15, 2.15])
    sizer = sizer_for(drafter)
    assert isinstance(sizer, Measured)
    assert sizer.sizes == [0, 1, 2, 4, 8, 16, 32, 64]
    assert sizer.tokens(2) == pytest.approx(1.9)
