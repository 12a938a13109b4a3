"""Token Recycling: matrix and drafts against a plain form, pass by pass; the text with it; what it keeps."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from dparallel import registry
from dparallel.toy import tasks
from drafters import MODEL, Noted, model_of
from test_speculate import PROMPTS, plain
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext.cache import Span
from dparallel_ext.decoding.config import DecodeConfig
from dparallel_ext.decoding.graphs import Graphs
from dparallel_ext.decoding.settings import make_settings
from dparallel_ext.models import Model
from dparallel_ext.speculation import CausalBatch, Recycling
from dparallel_ext.speculation.drafter import PredictsAcceptance
from dparallel_ext.speculation.recycling import DEPTH, RANKS
from dparallel_ext.speculation.sizing import Fixed

pytest_plugins = ["taping"]


class Heard(Noted, Recycling):
    """Recycling, whose sessions and drafts are noted."""


def test_the_tree_of_each_size_is_the_best() -> None:
    """Of all nodes that could be there: none outside is worth more; the larger tree begins with it."""
    nodes = Recycling().nodes
    assert len(nodes) == Recycling.most == 64
    values, paths = [1.0], [()]
    for node in nodes:
        assert node.depth == len(paths[node.parent]) < DEPTH
        paths.append((*paths[node.parent], node.rank))
        values.append(values[node.parent] * RANKS[node.rank])
        assert node.value == pytest.approx(values[-1])
    assert len({*paths}) == len(paths)
    assert values == sorted(values, reverse=True)
    outside = [
        value * share
        for value, path in zip(values, paths, strict=True)
        for rank, share in enumerate(RANKS)
        if len(path) < DEPTH and (*path, rank) not in paths
    ]
    assert max(outside) <= values[-1] * (1 + 1e-9)


class Reference:
    """Matrix, trees and passes in plain Python; the logits of every row are those of its text alone."""

    def __init__(self, model: Model, size: int, suppress: Sequence[int] = ()) -> None:
        self.model, self.size, self.suppress = model, size, suppress
        self.matrix: dict[int, list[int]] = {}
        self.seen: dict[tuple[int, ...], list[int]] = {}

    def likeliest(self, text: tuple[int, ...]) -> list[int]:
        """The tokens with the highest logits behind a text."""
        if text not in self.seen:
            cache = self.model.new_cache(1, len(text))
            metadata = cache.metadata([Span(0, 0, len(text), len(text))], causal=True)
            with torch.inference_mode():
                logits = self.model.head(self.model.step(torch.tensor(text), cache, metadata)[-1:])[0]
            self.seen[text] = logits.topk(len(RANKS)).indices.tolist()
        return self.seen[text]

    def draft(self, root: int, most: int) -> tuple[list[int], list[int]]:
        """Tokens and parents: the best paths of ranks whose tokens are there, level by level."""
        ranks: list[tuple[int, ...]] = [()]
        for node in Recycling().nodes:
            ranks.append((*ranks[node.parent], node.rank))
        level, found = [((), root)], {(): root}
        for _ in range(DEPTH):
            level = [
                ((*path, rank), token)
                for path, before in level
                for rank, token in enumerate(self.matrix.get(before, []))
                if token not in self.suppress and (*path, rank) in ranks
            ]
            found |= dict(level)
        drafted = [path for path in ranks[1:] if path in found][:most]
        order = {(): 0} | {path: number for number, path in enumerate(drafted, 1)}
        return [found[path] for path in drafted], [order[path[:-1]] for path in drafted]

    def run(self, texts: Sequence[Sequence[int]], prompts: Sequence[int]) -> tuple[list[Any], list[int]]:
        """The drafts of each step, and each sequence's passes. texts: with the responses of plain decoding;
        prompts: how much of each is the prompt."""
        known, nfe, steps = [*prompts], [0 for _ in prompts], list[Any]()
        while live := [b for b, text in enumerate(texts) if known[b] < len(text)]:
            asked: dict[int, int] = {}
            for b in live:
                if nfe[b] or prompts[b] == 1:  # else its prompt is not computed
                    asked[b] = min(self.size, len(texts[b]) - known[b] - 1)
            asked = {b: most for b, most in asked.items() if most > 0}
            drafts = {b: self.draft(texts[b][known[b] - 1], most) for b, most in asked.items()}
            if drafts:
                steps.append([*drafts.values()])
            new: list[tuple[int, list[int]]] = []
            for b in live:
                text = tuple(texts[b][: known[b]])
                tokens, parents = drafts.get(b, ([], []))
                ways = [text]
                for token, parent in zip(tokens, parents, strict=True):
                    ways.append((*ways[parent], token))
                new += [(way[-1], self.likeliest(way)) for way in ways]
                longest = max(len(way) for way in ways if way == tuple(texts[b][: len(way)]))
                nfe[b] += 1
                known[b] = longest + 1
            self.matrix |= dict(new)  # of rows with one token the last counts
        return steps, nfe


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_drafts_and_passes_are_those_of_the_plain_form(family: str, temperature: float) -> None:
    """In ragged batches, pass by pass, with and without suppressed ids; and so is the matrix at the end."""
    rng = random.Random(f"{family} {temperature}")
    model, drafted, accepted = model_of(family), 0, 0
    for _ in range(4):
        lanes = rng.randint(2, 3)
        prompts = [torch.randint(10, 61, (rng.choice([1, 2, 9]),)) for _ in range(lanes)]
        suppress = rng.choice([None, [3, 17, 25, 40]])
        settings: dict[str, Any] = {
            "gen_length": [rng.randint(1, 24) for _ in prompts],
            "temperature": temperature,
            "seed": rng.randrange(100),
            "suppress": suppress,
        }
        expected = plain(model, prompts, **settings)
        size, heard = rng.choice([2, 5, 16]), Heard()
        found = plain(model, prompts, drafter=heard, draft_size=size, **settings)
        assert torch.equal(found.sequences, expected.sequences)
        reference = Reference(model, size, suppress or ())
        texts = [row[:length].tolist() for row, length in zip(found.sequences, found.lengths, strict=True)]
        drafts, nfe = reference.run(texts, [len(prompt) for prompt in prompts])
        own = [[([*each.tokens], [*each.verified_rows[1:]]) for each in step] for step in heard.drafts]
        assert own == drafts
        assert found.nfe.tolist() == nfe
        (session,) = heard.sessions
        matrix = {token: row for token, row in enumerate(session.matrix.tolist()) if row[0] >= 0}
        assert matrix == reference.matrix
        drafted += sum(len(tokens) for step in drafts for tokens, _ in step)
        accepted += int(found.accepted.sum())
    assert drafted > 50
    assert accepted > 0 or temperature


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_it_changes_no_token(family: str, temperature: float) -> None:
    model = MODEL if family == "qwen3" else model_of(family)
    settings: dict[str, Any] = {"temperature": temperature, "seed": 7, "gen_length": [24, 30, 1, 11]}
    expected = plain(model, **settings)
    for more in ({}, {"draft_size": 1}, {"draft_size": 16}, {"draft_size": 99}, {"batch_invariant": True}):
        found = plain(model, drafter="recycling", **more, **settings)
        assert torch.equal(found.sequences, expected.sequences), more
        assert torch.equal(found.kept, expected.kept)
    assert int(found.draft_forwards) > 0


def test_random_cases_with_ends() -> None:
    rng = random.Random(0)
    for _ in range(25):
        prompts = [torch.randint(10, 61, (rng.choice([1, 2, 7, 33]),)) for _ in range(rng.randint(1, 4))]
        settings: dict[str, Any] = {
            "gen_length": [rng.randint(0, 20) for _ in prompts],
            "temperature": rng.choice([0.0, 0.7, 1.5]),
            "seed": rng.randrange(10**6),
            "top_k": rng.choice([None, 5]),
            "eos_id": rng.choice([-1, None, rng.randrange(61)]),
            "suppress": rng.choice([None, [3, 17]]),
            "stop": rng.choice([(), [[rng.randrange(61)]], [[rng.randrange(61), rng.randrange(61)], [4]]]),
        }
        expected = dx.speculate(MODEL, prompts, **settings)
        size = rng.choice([2, 8, 64])
        found = dx.speculate(MODEL, prompts, drafter="recycling", draft_size=size, **settings)
        for name in ("sequences", "kept", "generated"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), settings


def test_a_batch_of_several_groups_suppresses_what_each_does() -> None:
    """One matrix serves them all, and no lane has a draft with an id that it suppresses."""
    heard, expected = Heard(), dict[int, Tensor]()
    out = [[3, 17], [], list(range(20, 40)), [3, 17]]
    with torch.inference_mode():
        batch = CausalBatch(MODEL, 4, 100, drafter=heard, sizer=Fixed(16))
        for lane, (prompt, suppress) in enumerate(zip(PROMPTS, out, strict=True)):
            own = make_settings(DecodeConfig(suppress=suppress or None), MODEL, "none", 1)[0]
            batch.admit(lane, prompt, 24, own)
            expected[lane] = plain(prompts=[prompt], suppress=suppress or None).responses[0]
        while batch.live:
            batch.step()
    drafts = [draft for step in heard.drafts[1:] if len(step) == 4 for draft in step]
    for lane, (prompt, suppress) in enumerate(zip(PROMPTS, out, strict=True)):
        assert torch.equal(batch.tokens[lane, len(prompt) : len(prompt) + 24], expected[lane])
        drafted = {token for draft in drafts[lane::4] for token in draft.tokens}
        assert len(drafted) > 5
        assert not drafted & {*suppress}
    assert any({*range(20, 40)} & {*draft.tokens} for draft in drafts)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_engines_texts_are_the_same(temperature: float) -> None:
    settings: dict[str, Any] = {"gen_length": 20, "temperature": temperature}
    expected = [plain(prompts=[p], seed=n, **settings).responses[0].tolist() for n, p in enumerate(PROMPTS)]
    sizes: dict[str, Any] = {"lanes": 2, "max_length": 96, "page_size": 8, "draft_size": 32}
    with dx.Engine(MODEL, drafter="recycling", **sizes) as engine:
        for _ in range(2):
            handles = [engine.submit(p, seed=n, eos_id=-1, **settings) for n, p in enumerate(PROMPTS)]
            assert [handle.result(60).tokens for handle in handles] == expected


def test_an_engine_keeps_its_matrix_and_speculate_begins_with_an_empty_one() -> None:
    """So requests take fewer passes where others were before, and each call of `speculate` takes the same."""
    model, tokenizer = registry.load("builtin:causal")
    problems = itertools.islice(tasks.problems("held_out"), 5)
    prompts = [torch.tensor(tokenizer.encode(problem.prompt).ids) for problem in problems]
    drafter = Recycling()

    def alone(prompt: Tensor) -> tuple[list[int], int]:
        found = dx.speculate(model, [prompt], gen_length=64, drafter=drafter, draft_size=16)
        return found.responses[0][: int(found.kept)].tolist(), int(found.nfe)

    cold = [alone(prompt) for prompt in prompts]
    assert [alone(prompt) for prompt in prompts[:2]] == cold[:2]
    with dx.Engine(model, drafter=drafter, draft_size=16, lanes=1, max_length=160) as engine:
        hot = [engine.submit(prompt, gen_length=64).result(60) for prompt in prompts]
    assert [done.tokens for done in hot] == [tokens for tokens, _ in cold]
    assert hot[0].nfe == cold[0][1]
    assert sum(done.nfe for done in hot) < 0.9 * sum(nfe for _, nfe in cold)


def test_recorded_passes_are_the_same(request: pytest.FixtureRequest) -> None:
    """On a tape in place of a GPU: the matrix is updated, and drafts are made, without the host. The next
    call with the same object, or with the name, replays, and begins with an empty matrix all the same."""
    settings: dict[str, Any] = {"draft_size": 8, "gen_length": 24, "suppress": [3]}
    expected = plain(prompts=PROMPTS[:3:2], drafter="recycling", **settings)
    taped: list[Graphs] = request.getfixturevalue("taped")
    for drafter in (Recycling(), "recycling"):
        made = len(taped)
        for _ in range(3):
            found = plain(prompts=PROMPTS[:3:2], drafter=drafter, **settings)
            for name in ("sequences", "nfe", "drafted", "accepted"):
                assert torch.equal(getattr(found, name), getattr(expected, name)), name
        assert all(graphs.recorder is not None for graphs in taped), "a recording failed"
        assert all(graphs.replays > 5 for graphs in taped[made:])


def test_what_it_says_of_itself() -> None:
    drafter = dx.speculation.drafter_of("recycling")
    assert isinstance(drafter, Recycling)
    assert isinstance(drafter, PredictsAcceptance)
    assert repr(drafter) == "Recycling()"
    expected = [drafter.expected(size) for size in (0, 1, 2, 64, 99)]
    assert expected[:3] == pytest.approx([1.0, 1.5, 1.75])
    assert expected[3] == expected[4] < 3.5
