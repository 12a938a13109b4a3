"""select against its oracle, for every policy, by hand, and with scores that nobody has checked."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import OF_AN_OP, everywhere, goes_on
from hypothesis import given
from hypothesis import strategies as st
from test_unmask import rows_of

import dparallel_ext as dx
from dparallel_ext import policies, reference


@given(st.integers(1, 3), st.integers(1, 40), st.randoms(use_true_random=False))
@everywhere
def test_select_against_the_oracle_exactly(batch, length, rng) -> None:
    """Given the same float32 statistics the two must agree to the bit, ties included."""
    torch.manual_seed(rng.randrange(2**31))
    grid = rng.choice([3, 1000])  # coarse: many ties
    confidence, margin = ((torch.rand(batch, length) * grid).round() / grid for _ in range(2))
    entropy = (torch.rand(batch, length) * grid).round() / grid * 4
    eligible = torch.rand(batch, length) < 0.6
    stats = dx.RowStats(*[confidence] * 4, confidence, margin, entropy, *[confidence] * 2)
    policy = rows_of(rng, batch, length)
    actual = dx.select(stats, eligible, policy)
    expected = reference.select(confidence, margin, entropy, eligible, policy)
    assert torch.equal(actual, expected)
    assert not bool((actual & ~eligible).any())
    moves = policy[:, 2] > 0
    assert torch.equal(actual.any(1)[moves], eligible.any(1)[moves])  # at least one commits


def stats_of(p: list[float], entropy: list[float] | None = None) -> dx.RowStats:
    c = torch.tensor([p])
    h = torch.tensor([entropy]) if entropy else c
    return dx.RowStats(*[c] * 4, c, c, h, *[c] * 2)


@pytest.mark.parametrize(
    ("selector", "threshold", "bounds", "values", "expected"),
    [
        ("confidence", 0.9, {}, [0.9, 0.95, 0.89, 0.1], [1, 1, 0, 0]),
        (
            "confidence",
            0.99,
            {},
            [0.5, 0.9, 0.9, 0.1],
            [0, 1, 0, 0],
        ),  # none passes: the best, lowest
        ("confidence", 0.0, {"max_commit": 2}, [0.5, 0.9, 0.8, 0.9], [0, 1, 0, 1]),
        ("confidence", 0.99, {"min_commit": 3}, [0.5, 0.9, 0.8, 0.9], [0, 1, 1, 1]),
        ("confidence", 0.85, {"min_commit": 3}, [0.5, 0.9, 0.8, 0.9], [0, 1, 1, 1]),
        ("entropy", 0.5, {}, [0.5, 0.6, 0.1, 2.0], [1, 0, 1, 0]),
        ("entropy", 0.05, {}, [0.5, 0.6, 0.1, 0.1], [0, 0, 1, 0]),
        ("entropy", 0.05, {"min_commit": 0}, [0.5, 0.6, 0.1, 0.1], [0, 0, 0, 0]),
        ("entropy", 0.5, {"min_commit": 0}, [0.5, 0.6, 0.1, 0.1], [1, 0, 1, 1]),
        ("margin", 0.3, {}, [0.3, 0.2, 0.9, 0.1], [1, 0, 1, 0]),
        ("quota", 2, {}, [0.3, 0.2, 0.9, 0.3], [1, 0, 1, 0]),
        ("quota", 9, {}, [0.3, 0.2, 0.9, 0.3], [1, 1, 1, 1]),
        ("quota", 2, {"score": "entropy"}, [0.3, 0.2, 0.9, 0.3], [1, 1, 0, 0]),
        # 1 - f/(n+1), f = 1: .5, .667, .75, .8; sorted .9 .7 .6 .5: n = 2
        ("factor", 1.0, {}, [0.5, 0.9, 0.6, 0.7], [0, 1, 0, 1]),
        # the largest n holds though a smaller one fails: .5 (.5) fails no, .66 ...
        ("factor", 1.0, {}, [0.8, 0.8, 0.8, 0.8], [1, 1, 1, 1]),
        ("entropy_bound", 0.1, {}, [0.05, 0.04, 0.5, 0.02], [1, 1, 0, 1]),
        ("entropy_bound", 0.12, {}, [0.05, 0.04, 0.5, 0.02], [1, 1, 1, 1]),
        ("factor", 0.2, {"min_commit": 0}, [0.5, 0.9, 0.6, 0.7], [0, 1, 0, 0]),
        ("factor", 0.1, {"min_commit": 0}, [0.5, 0.9, 0.6, 0.7], [0, 0, 0, 0]),
        ("entropy_bound", 0.0, {}, [0.05, 0.04, 0.5, 0.02], [0, 0, 0, 1]),
        # sorted .95 .9 .9 .5: .95 - .05, .9 - .15, .9 - .25, .5 - .75
        ("frechet", 0.25, {}, [0.9, 0.5, 0.95, 0.9], [1, 0, 1, 1]),
        ("frechet", 0.7, {}, [0.9, 0.5, 0.95, 0.9], [1, 0, 1, 0]),
        ("frechet", 0.95, {}, [0.9, 0.5, 0.95, 0.9], [0, 0, 1, 0]),
        ("frechet", 0.95, {"min_commit": 0}, [0.9, 0.5, 0.95, 0.9], [0, 0, 0, 0]),
    ],
)
@everywhere
def test_rules_by_hand(selector, threshold, bounds, values, expected) -> None:
    eligible = torch.ones(1, 4, dtype=torch.bool)
    policy = policies.make(selector, threshold, **bounds)
    assert dx.select(stats_of(values), eligible, policy).int().tolist() == [expected]


@everywhere
def test_frechet_with_equal_confidences_is_factor() -> None:
    """At f = 1 - delta: n p - (n - 1) - (1 - p) > delta where p > 1 - (1 - delta) / (n + 1)."""
    for delta in (0.02, 0.25, 0.6):
        for p in torch.linspace(0.3, 0.999, 97).tolist():
            stats, eligible = stats_of([p] * 24), torch.ones(1, 24, dtype=torch.bool)
            one = dx.select(stats, eligible, policies.make("frechet", delta))
            other = dx.select(stats, eligible, policies.make("factor", 1 - delta))
            assert torch.equal(one, other)


@everywhere
def test_scores_of_nan_past_the_checks_are_never_selected() -> None:
    for selector in policies.SELECTORS:
        scores = torch.rand(3, 2, 300)
        scores[:, 0, ::3] = math.nan
        scores[:, 1] = math.nan
        eligible = torch.ones(2, 300, dtype=torch.bool)
        row = policies.make(selector, 1, min_commit=250, batch=2, device=scores.device)
        if not goes_on(scores):
            with pytest.raises(OF_AN_OP, match="confidence: NaN at eligible position 0 of sequence 0"):
                torch.ops.dparallel.select(*scores, eligible, row)
            continue
        commit = torch.ops.dparallel.select(*scores, eligible, row)
        assert torch.equal(commit, reference.select(*scores, eligible, row))
        assert commit.sum(1).tolist() == [200, 0]
        assert not bool((commit & scores[0].isnan()).any())


def test_select_refuses_nan_scores() -> None:
    with pytest.raises(ValueError, match="NaN at eligible position 1 of sequence 0"):
        dx.select(stats_of([0.1, math.nan]), torch.tensor([[True, True]]), policies.make())


@everywhere
def test_opcheck() -> None:
    score = torch.rand(2, 4)
    args = (score, score, score, score > 0.3, policies.make(batch=2, device=score.device))
    torch.library.opcheck(torch.ops.dparallel.select.default, args)
