"""What unmask_ refuses, names, or survives past its checks."""

from __future__ import annotations

import math
import random

import pytest
import torch
from conftest import (
    OF_AN_OP,
    counters,
    everywhere,
    goes_on,
    refused,
)
from test_unmask import MASK, followed, rows_of

import dparallel_ext as dx
from dparallel_ext import policies


def test_windows_that_overlap_are_refused() -> None:
    tokens = torch.full((2, 6), MASK)
    lane, end = torch.tensor([1, 0, 1]), torch.tensor([4, 6, 6])
    with pytest.raises(
        ValueError, match=r"do not overlap, got \[0, 4\) and \[3, 6\), windows 0 and 2 of sequence 1"
    ):
        dx.unmask_(
            tokens, torch.randn(2, 6, 9), mask_id=MASK, lane=lane, start=torch.tensor([0, 0, 3]), end=end
        )
    assert bool((tokens == MASK).all())


@everywhere
def test_past_the_checks_a_position_belongs_to_the_first_of_its_windows() -> None:
    """On a GPU nobody has looked at the windows; whatever they are, the result is one."""
    if not goes_on(torch.zeros(1)):
        pytest.skip("the CPU refuses them")
    rng = random.Random(3)
    for _ in range(6):
        batch, length, windows = rng.randint(1, 3), rng.randint(1, 40), rng.randint(0, 9)
        logits, tokens = torch.randn(batch, length, 30), torch.full((batch, length), MASK)
        lane = torch.tensor([rng.choice([-1, batch, 2**62, *range(batch)]) for _ in range(windows)]).long()
        start = torch.tensor([rng.choice([-(2**62), *range(-2, length)]) for _ in range(windows)]).long()
        end = torch.tensor([rng.choice([2**62, *range(length + 2)]) for _ in range(windows)]).long()
        policy = rows_of(rng, windows, length).reshape(-1, 5)
        columns, free = torch.arange(length), torch.ones(batch, length, dtype=torch.bool)
        expected = tokens.clone()
        committed = []
        for w, b in enumerate(lane.tolist()):
            if not 0 <= b < batch:
                committed.append(0)
                continue
            own = free[b] & (columns >= start[w]) & (columns < end[w])
            free[b] &= ~own
            alone = torch.where(own, MASK, 0)[None]
            one = dx.unmask_(alone, logits[b][None], mask_id=MASK, policy=policy[w : w + 1])
            expected[b] = torch.where(own, alone[0], expected[b])
            committed.append(int(one.committed[0]))
        out = dx.unmask_(tokens, logits, mask_id=MASK, lane=lane, start=start, end=end, policy=policy)
        assert torch.equal(tokens, expected)
        assert out.committed.tolist() == committed


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
@pytest.mark.parametrize("packed", [False, True])
@everywhere
def test_bad_rows_are_named_and_nothing_is_committed(bad: float, packed: bool) -> None:
    logits = torch.randn(3, 5, 600)
    logits[1, 3], logits[2, 0] = bad, bad
    tokens = torch.full((3, 5), MASK)
    kwargs: dict = {}
    if packed:
        kwargs["positions"] = torch.arange(15)
        logits = logits.view(15, 600)
    spared = slice(1 if goes_on(tokens) else 0, None)
    with refused("sequence 1 at position 3"):
        dx.unmask_(tokens, logits, mask_id=MASK, **kwargs)
    assert bool((tokens[spared] == MASK).all())
    view = torch.full((3, 7), MASK)
    with refused("sequence 1 at position 5"):
        dx.unmask_(view[:, 2:], logits, mask_id=MASK, position_offset=2, **kwargs)
    assert bool((view[spared] == MASK).all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.zeros(2, 3)}, "tokens: expected int64"),
        ({"logits": torch.zeros(2, 4, 9)}, r"logits: expected \(2, 3, V\)"),
        ({"logits": torch.zeros(2, 3, 9, dtype=torch.float64)}, "logits: expected float32"),
        ({"mask_id": -2}, "mask_id"),
        ({"selector": "best"}, "selector: expected one of"),
        ({"threshold": math.nan}, "threshold: expected a number"),
        ({"threshold": torch.zeros(3)}, r"threshold: expected a number or shape \(2,\)"),
        ({"selector": "quota", "threshold": 0}, "threshold: expected a whole number >= 1"),
        ({"selector": "confidence", "threshold": 90}, r"threshold: expected a number >= 0 and <= 1 \(p1 >="),
        ({"selector": "confidence", "threshold": -3}, "threshold: expected a number >= 0 and <= 1"),
        ({"selector": "margin", "threshold": [0.5, 1.1]}, "<= 1 .*got 1.1 in policy row 1"),
        ({"selector": "entropy", "threshold": -0.5}, "threshold: expected a number >= 0 "),
        ({"selector": "factor", "threshold": -1}, "threshold: expected a number >= 0 "),
        ({"selector": "entropy_bound", "threshold": -1}, "threshold: expected a number >= 0 "),
        ({"selector": "quota", "threshold": 1.5}, "threshold: expected a whole number >= 1 "),
        ({"policy": torch.tensor([[0, 1.5, 1, 9, 0]] * 2)}, "threshold: expected a number >= 0 and <= 1"),
        ({"min_commit": -1}, "min_commit: expected a whole number >= 0"),
        ({"min_commit": math.inf}, "min_commit: expected a whole number >= 0 and <= 16777216"),
        ({"min_commit": 1e19}, "min_commit: expected a whole number"),
        ({"max_commit": 1.5}, "max_commit: expected a whole number"),
        ({"min_commit": 3, "max_commit": 2}, "max_commit: expected at least min_commit"),
        ({"score": "margin"}, "score: only 'quota' chooses"),
        ({"start": 0.5}, "start: expected an integer"),
        ({"end": torch.zeros(3, dtype=torch.int64)}, "end: expected an integer"),
        ({"policy": torch.zeros(2, 4)}, r"policy: expected float32 \(2, 5\)"),
        ({"policy": torch.full((2, 5), 9.0)}, "selector: expected ids 0..6"),
        ({"positions": torch.tensor([1, 0])}, r"logits: expected \(2, V\), a row for each of positions"),
        ({"suppress": [9]}, "suppress: expected ids"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    good = {"tokens": torch.full((2, 3), MASK), "logits": torch.randn(2, 3, 9), "mask_id": MASK}
    call = {**good, **change}
    with pytest.raises(ValueError, match=message):
        dx.unmask_(call.pop("tokens"), call.pop("logits"), **call)


@everywhere
def test_a_masked_position_that_is_not_listed_is_an_error() -> None:
    for missing in (2, 1):  # in the second sequence
        tokens = torch.full((2, 3), MASK)
        listed = torch.tensor([at for at in range(6) if at != 3 + missing])
        with refused(f"sequence 1 at position {missing} is masked"):
            dx.unmask_(tokens, torch.randn(5, 9), mask_id=MASK, positions=listed)
        assert bool((tokens[1] == MASK).all())
        assert goes_on(tokens) or bool((tokens == MASK).all())


JUNK = [math.nan, math.inf, -math.inf, 1e19, -1.0, 2.5]


@everywhere
def test_rows_past_the_checks_are_refused_or_within_their_bounds() -> None:
    """The host's rows are refused by the op itself. Those of a device mean the same to kernels and reference,
    and at least one position commits."""
    scores, eligible = torch.rand(3, 1, 9), torch.ones(1, 9, dtype=torch.bool)
    logits, all_ = torch.randn(1, 9, 40), torch.tensor([9])
    for selector in policies.SELECTORS.values():
        for at in range(len(policies.FIELDS)):
            for junk in JUNK:
                given = [selector, 2.0 if selector == 3 else 0.5, 2.0, 6.0, 1.0]
                given[at] = junk
                row = torch.tensor([given], dtype=torch.float32)
                tokens = torch.full((1, 9), MASK)
                args = tokens, logits, None, None, all_ - 9, all_, row, MASK, None, 0.0, 1.0, 0, None, 0
                try:
                    policies.check(row.cpu(), 1)
                except ValueError as error:
                    if not goes_on(tokens):
                        said = f"{str(error).split(':')[0]}: expected .* in policy row 0"
                        with pytest.raises(OF_AN_OP, match=said):
                            torch.ops.dparallel.select(*scores, eligible, row)
                        with pytest.raises(OF_AN_OP, match=said):
                            torch.ops.dparallel.unmask_(*args, None)
                        continue
                commit = torch.ops.dparallel.select(*scores, eligible, row)
                committed = torch.ops.dparallel.unmask_(*args, counters(logits, 13))[0]
                low, high = policies.in_force(given)[2:4]
                assert torch.equal(commit.cpu(), followed(*scores.cpu(), eligible.cpu(), row.cpu()))
                assert min(low, high, 9) <= int(commit.sum()) <= high
                assert min(low, high, 9) <= int(committed) <= high
