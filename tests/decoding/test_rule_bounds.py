"""What no rule can do: commit what is no token or impossible, read rows that it did not ask for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import golden
from test_rules import MASK, PROMPTS, Sharp
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext import compat, models
from dparallel_ext.rules import Decision, Rule, Where
from dparallel_ext.rules.protocol import Cells


@pytest.fixture(scope="module")
def llada() -> models.Model:
    return golden.model("llada_tiny_a")


def test_only_cells_with_statistics_are_remembered() -> None:
    """Not column 0 in place of the others, where a response without a prompt begins."""
    fields = dict.fromkeys(Where.__dataclass_fields__)
    read = torch.tensor([[True, False, True], [False, True, True]])
    places = {"lane": torch.tensor([0, 2]), "start": torch.tensor([0, 3]), "read": read}
    where = Where(**{**fields, **places, "cells": Cells(torch.zeros(4), 2, 3)})  # type: ignore[arg-type]
    state = torch.full((3, 8), 5)  # no window reaches the last column
    where.remember(state, torch.tensor([[10.0, 11.0, 12.0], [13.0, 14.0, 15.0]]))
    assert state[:, :-1].tolist() == [[10, 5, 12, 5, 5, 5, 5], [5] * 7, [5, 5, 5, 5, 14, 15, 5]]
    assert torch.equal(where.recall(state), torch.tensor([[10, 5, 12], [5, 14, 15]]))


class Greedy(Rule):
    """Says what no rule may: the mask token, ids that are none, tokens for given positions."""

    reads = "response"

    def __init__(self, token: int) -> None:
        self.says = token

    def decide(self, stats: dx.RowStats, where: Where, state: tuple[Tensor, ...]) -> Decision:
        return Decision(torch.ones_like(where.open), torch.full_like(stats.token, self.says))


@pytest.mark.parametrize("token", [MASK, -1, 512, 2**40])
def test_no_rule_commits_what_is_no_token(llada: models.Model, token: int) -> None:
    one = dx.decode(llada, PROMPTS, gen_length=8, block_length=8)
    out = dx.decode(llada, PROMPTS, gen_length=8, block_length=8, rule=Greedy(token))
    assert torch.equal(out.sequences, one.sequences)
    assert torch.equal(out.nfe, one.nfe)


def test_a_rule_may_fill_all_blocks_at_once(llada: models.Model) -> None:
    out = dx.decode(llada, PROMPTS, gen_length=24, block_length=8, rule=Greedy(9), record=True, logprobs=True)
    assert out.forwards == 1
    assert all(response.tolist() == [9] * 24 for response in out.responses)
    assert torch.equal(out.generated, torch.tensor([24] * 3))
    x = torch.cat((PROMPTS[0], torch.full((24,), MASK)))
    logprob = llada(x[None]).logits[0, len(PROMPTS[0]) :].log_softmax(1)[:, 9]
    torch.testing.assert_close(out.logprobs[0], logprob, rtol=1e-4, atol=1e-4)
    ended = dx.decode(llada, PROMPTS[0], gen_length=24, block_length=8, rule=Greedy(9), eos_id=9)
    assert int(ended.kept) == 0


def test_a_rule_commits_masks_alone(llada: models.Model) -> None:
    """Neither tokens that are given nor those of the passes before."""

    class Numbered(Greedy):
        def decide(self, stats: dx.RowStats, where: Where, state: tuple[Tensor, ...]) -> Decision:
            number = where.step[:, None].expand_as(where.open)
            return Decision((number > 1) | (torch.arange(number.shape[1]) < 3), number)

    prompt = torch.cat((PROMPTS[0], torch.tensor([MASK, 30, MASK, 31])))
    out = dx.decode(llada, prompt, gen_length=4, block_length=8, infill=True, rule=Numbered(0))
    assert out.sequences[0, len(PROMPTS[0]) :].tolist() == [1, 30, 1, 31, 2, 2, 2, 2]


def test_a_bad_row_is_named(llada: models.Model) -> None:
    class Bad:
        config = None

        def __call__(self, input_ids: Tensor) -> SimpleNamespace:
            logits = llada(input_ids).logits
            logits[1, 13, 5] = math.nan
            return SimpleNamespace(logits=logits)

    prompts = torch.stack([PROMPTS[0], PROMPTS[0]])
    for rule in ("credit", "sched:7.5", lambda stats, masked, step: masked):
        with pytest.raises(ValueError, match="logits: sequence 1 at position 13 holds NaN"):
            dx.decode(Bad(), prompts, gen_length=8, block_length=8, rule=rule, mask_id=MASK)


@dataclass(frozen=True)
class ReadsBlock(Rule):
    """The policy row alone."""

    reads = "block"
    row = "entropy:3"

    def decide(self, stats: dx.RowStats, where: Where, state: tuple[Tensor, ...]) -> Decision:
        return Decision()


@pytest.mark.parametrize(
    ("rule", "reads"),
    [
        ("entropy:3", "masked"),
        ("credit+entropy:3", "masked"),
        (lambda stats, masked, step: stats.entropy < 3, "masked"),
        (ReadsBlock(), "block"),
        ("sched:0.3,0.05", "response"),
    ],
)
def test_rows_that_no_rule_asks_for_are_not_read(llada: models.Model, rule: Any, reads: str) -> None:
    """They may hold NaN."""
    prompts, block = torch.stack([PROMPTS[0], PROMPTS[0].flip(0)]), 8
    first = prompts.shape[1]

    class Poisoned:
        config = None

        def __call__(self, input_ids: Tensor) -> SimpleNamespace:
            logits = llada(input_ids).logits
            for row, ids in zip(logits, input_ids, strict=True):
                asked = torch.zeros(len(ids), dtype=torch.bool)
                start = int((ids == MASK).int().argmax())
                start -= (start - first) % block
                asked[slice(first, None) if reads == "response" else slice(start, start + block)] = True
                row[~asked | ((ids != MASK) if reads == "masked" else False)] = math.nan
            return SimpleNamespace(logits=logits)

    settings: dict[str, Any] = {"gen_length": 24, "block_length": block, "rule": rule, "mask_id": MASK}
    found, expected = (dx.decode(model, prompts, **settings) for model in (Poisoned(), Sharp(llada, 1.0)))
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(found.nfe, expected.nfe)


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_a_pass_from_a_block_on_has_no_shifted_logits_for_its_first_column(cache: str) -> None:
    """The position in front of it is not computed; the full pass at the block's beginning has it."""
    seen: list[tuple[int, list[int]]] = []

    class Looking(ReadsBlock):
        def decide(self, stats: dx.RowStats, where: Where, state: tuple[Tensor, ...]) -> Decision:
            columns = where.start[0] + where.read[0].nonzero()[:, 0]
            seen.append((int(where.turn), columns.tolist()))
            return Decision()

    settings: dict[str, Any] = {"gen_length": 8, "block_length": 4, "threshold": 0.0, "cache": cache}
    dx.decode(golden.model("dream_tiny_a"), PROMPTS[0], rule=Looking(), **settings)
    first = len(PROMPTS[0])
    expected = [(turn, start + (turn > 0)) for start in (first, first + 4) for turn in range(4)]
    assert seen == [(turn, [*range(start, start + 4 - (turn > 0))]) for turn, start in expected]


def test_a_rule_that_changes_what_it_is_given_ends_all_the_same(llada: models.Model) -> None:
    @dataclass(frozen=True)
    class Spoiling(Rule):
        def decide(self, stats: Any, where: Where, state: Any) -> Decision:
            stats.confidence.fill_(math.nan)
            return Decision(where.masked.fill_(False))

    settings: dict[str, Any] = {"gen_length": 16, "block_length": 8}
    expected = dx.decode(llada, PROMPTS, rule=lambda s, m, n: m & False, **settings)
    found = dx.decode(llada, PROMPTS, rule=Spoiling(), **settings)
    assert found.forwards == expected.forwards == 16
    assert torch.equal(found.sequences, expected.sequences)


@pytest.mark.parametrize("logits", [None, [[1.0]], torch.zeros(1, 14, 8).to_sparse()], ids=str)
def test_logits_that_are_none_are_named(logits: Any) -> None:
    def model(input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=logits)

    prompt = torch.zeros(1, 6, dtype=torch.int64)
    for call in (
        lambda: dx.decode(model, prompt, gen_length=8, mask_id=7),
        lambda: compat.generate(model, prompt, gen_length=8, block_length=8, steps=8, mask_id=7),
        lambda: compat.diffusion_generate(model, prompt, max_new_tokens=8, mask_token_id=7),
    ):
        with pytest.raises((TypeError, ValueError), match="model: its logits: expected a"):
            call()


def test_no_rule_commits_what_is_suppressed(llada: models.Model) -> None:
    one = dx.decode(llada, PROMPTS, gen_length=8, block_length=8, suppress=[7, 9])
    out = dx.decode(llada, PROMPTS, gen_length=8, block_length=8, suppress=[7, 9], rule=Greedy(9))
    assert torch.equal(out.sequences, one.sequences)


@dataclass
class Table:
    """A 'model' whose logits (L, V) are the same whatever the tokens."""

    logits: Tensor
    config: Any = None

    def __call__(self, input_ids: Tensor) -> SimpleNamespace:
        count, length = input_ids.shape
        return SimpleNamespace(logits=self.logits[:length].expand(count, length, -1).clone())


@dataclass(frozen=True)
class Says(Rule):
    """The policy row, with tokens of its own: those that would be written anyway, or one for all."""

    token: int | None = None

    def decide(self, stats: dx.RowStats, where: Where, state: tuple[Tensor, ...]) -> Decision:
        token = stats.sample if self.token is None else torch.full_like(stats.sample, self.token)
        return Decision(where.by_policy(stats), token)


def table(**columns: float) -> Table:
    logits = torch.randn((16, 32), generator=torch.Generator().manual_seed(0))
    for name, value in columns.items():
        logits[5:, int(name[1:])] = value
    return Table(logits)


SHARED: dict[str, Any] = {"gen_length": 8, "block_length": 4, "mask_id": 31, "record": True, "logprobs": True}


@pytest.mark.parametrize("rule", ["credit", "credit+entropy:1", "eot:4", "sched:1", "prophet:0"])
@pytest.mark.parametrize("ids", [(4,), (4, 9)])
def test_infinite_logits_share_the_probability_under_every_rule(rule: str, ids: tuple[int, ...]) -> None:
    model = table(**{f"v{at}": math.inf for at in ids})
    out = dx.decode(model, [1, 2, 3, 7, 8], **SHARED, rule=rule)
    assert out.responses[0].tolist() == [4] * 8
    expected = torch.full((1, 8), 1 / len(ids))
    torch.testing.assert_close(out.trajectory.confidence, expected)
    torch.testing.assert_close(out.logprobs, expected.log())


def test_gaps_of_infinite_logits_are_none() -> None:
    """Of two +inf the gap is 0, which does not hide the gaps of the other rows."""
    model = table()
    model.logits[5, [4, 9]] = math.inf
    model.logits[6:, 3] = 100.0
    assert dx.decode(model, [1, 2, 3, 7, 8], **SHARED, rule="prophet:0,8").forwards == 1


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.3}, {"temperature": 2.0, "top_p": 0.8}])
def test_tokens_of_a_rule_have_the_log_probabilities_of_samples(sampling: dict[str, Any]) -> None:
    """log softmax(logits / T), over the ids that could be drawn; the confidence is softmax(logits)."""
    model, prompts = table(), [[1, 2, 3, 7, 8]] * 2  # which draw apart
    drawn = dx.decode(model, prompts, **SHARED, **sampling, seed=3)
    said = dx.decode(model, prompts, **SHARED, **sampling, seed=3, rule=Says())
    assert torch.equal(drawn.sequences, said.sequences)
    torch.testing.assert_close(drawn.logprobs, said.logprobs)
    torch.testing.assert_close(drawn.trajectory.confidence, said.trajectory.confidence)
    if "top_p" not in sampling:
        nine = dx.decode(model, prompts, **SHARED, **sampling, seed=3, rule=Says(9))
        z = model.logits[5:13].double()
        torch.testing.assert_close(nine.trajectory.confidence[0], z.softmax(1)[:, 9].float())
        if temperature := sampling.get("temperature"):  # the mask token can not be drawn
            z = z.index_fill(1, torch.tensor([31]), -math.inf) / temperature
        torch.testing.assert_close(nine.logprobs[0], z.log_softmax(1)[:, 9].float())


def test_no_rule_commits_what_is_impossible() -> None:
    """An id whose logit is -inf."""
    model = table(v4=-math.inf)
    model.logits[5, 4] = 30.0  # the end of text, with masks behind it
    plain = dx.decode(model, [1, 2, 3, 7, 8], **SHARED)
    for rule in ("eot:4", Says(4)):
        out = dx.decode(model, [1, 2, 3, 7, 8], **SHARED, rule=rule)
        assert out.responses[0][0] == 4
        assert torch.equal(out.sequences, plain.sequences)
        assert bool(out.logprobs.isfinite().all())


@dataclass(frozen=True)
class Stuck(Rule):
    """Decides in order, and on nothing from column `at` of the sequence on."""

    at: int
    in_order = True

    def decide(self, stats: dx.RowStats, where: Where, state: tuple[Tensor, ...]) -> Decision:
        return Decision(impossible=(where.masked & (where.column >= self.at)).any(1))


def test_a_rule_may_find_no_decision(llada: models.Model) -> None:
    """The error names the first mask of the window; the other sequences have not reached it."""
    settings: dict[str, Any] = {"gen_length": 16, "block_length": 4}
    out = dx.decode(llada, PROMPTS[0], rule=Stuck(100), **settings)
    assert torch.equal(out.sequences, dx.decode(llada, PROMPTS[0], **settings).sequences)
    with pytest.raises(ValueError, match="sequence 1 at position 7 leaves no token to choose"):
        dx.decode(llada, PROMPTS[:2], rule=Stuck(10), **{**settings, "gen_length": [0, 16]})
    with dx.Engine(llada, block_length=4, lanes=2) as engine:
        stuck = engine.submit(PROMPTS[1], gen_length=16, rule=Stuck(20))
        with pytest.raises(ValueError, match="at position 19 leaves no token to choose"):
            stuck.result()
        assert len(engine.submit(PROMPTS[1], gen_length=8).result().tokens) == 8
    for wrong in ({"infill": True}, {"active_blocks": 2, "threshold": 0.5}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            dx.decode(llada, PROMPTS[0], rule=Stuck(100), **{**settings, **wrong})
