"""row_topk against its float64 reference, against torch.topk, and on the rows that break others."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import OF_AN_OP, assert_stats_close, counters, every_level, everywhere, refused
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(logits: Tensor, k: int, **settings: object) -> dx.RowTopK:
    actual, expected = dx.row_topk(logits, k, **settings), reference.row_topk(logits, k, **settings)
    for name, a, e in zip(actual._fields, actual, expected, strict=True):
        assert_stats_close(a, e, name)
    return actual


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 2, 31, 33, 2047, 16385, 126464])
@every_level
def test_vocabulary_sizes(dtype: torch.dtype, vocab: int) -> None:
    for k, scale in ((1, 0.1), (7, 1.0), (32, 6.0)):
        logits = (torch.randn(1 if vocab > 20000 else 9, vocab) * scale).to(dtype)
        check(logits, k)
        if vocab > 3:
            check(logits, k, mask_id=vocab - 1, suppress=[0, vocab // 2])


@given(
    st.sampled_from(DTYPES),
    st.integers(1, 32),
    st.integers(1, 5),
    st.integers(2, 3000),
    st.sampled_from([0.0, 0.5, 3.0, 30.0]),
    st.booleans(),
    st.sampled_from([0.0, 0.5, 0.99]),
    st.randoms(use_true_random=False),
)
@every_level
def test_random_rows_and_exclusions(dtype, k, length, vocab, scale, coarse, absent, rng) -> None:
    torch.manual_seed(rng.randrange(2**31))
    padded = torch.randn(length + 2, vocab + rng.randrange(9)) * scale + rng.choice([0.0, -200.0, 50.0])
    padded = padded.round() if coarse else padded  # many ties
    padded[torch.rand(padded.shape) < absent] = -math.inf
    suppress = rng.sample(range(vocab), k=rng.randrange(min(4, vocab - 1)))
    free = [i for i in range(vocab) if i not in suppress]
    mask_id = rng.choice(free) if len(free) > 1 and rng.random() < 0.7 else None
    padded[:, next(i for i in free if i != mask_id)] = 1.0  # something to choose
    logits = padded.to(dtype)[1 : 1 + length, :vocab]  # strided rows, odd alignment
    check(logits, k, suppress=suppress or None, mask_id=mask_id)


@pytest.mark.parametrize("dtype", DTYPES)
@every_level
def test_it_is_torch_topk(dtype: torch.dtype) -> None:
    """Of LLaDA's vocabulary; of equal logits torch picks any."""
    logits = (torch.randn(2, 1, 126464) * 3).to(dtype)
    found, best = dx.row_topk(logits, 32), logits.topk(32, dim=-1)
    assert torch.equal(logits.gather(-1, found.token), best.values)
    assert_stats_close(
        found.logprob, logits.double().log_softmax(-1).gather(-1, found.token).float(), "logprob"
    )
    stats = dx.row_stats(logits)
    assert torch.equal(found.token[..., 0], stats.token)
    assert torch.equal(found.logprob[..., 0], stats.sample_logprob)
    fewer = dx.row_topk(logits, 5)
    assert all(torch.equal(a, b[..., :5]) for a, b in zip(fewer, found, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [100, 16385, 40001])
@every_level
def test_orders_that_fill_what_a_thread_or_a_block_holds(dtype: torch.dtype, vocab: int) -> None:
    rows = torch.full((6, vocab), -3.0)
    rows[0] = torch.arange(vocab) / 64  # each better than all before it
    rows[1] = rows[0].flip(0)
    rows[3, vocab // 2 :] = 1.0  # a tie of half of the row
    at = torch.arange(vocab)
    rows[4, at // 8 % 128 == 5] = torch.randn(vocab)[at // 8 % 128 == 5] + 9  # vectors of one thread
    rows[5] = -math.inf
    rows[5, [0, vocab - 1]] = 2.0
    for k in (1, 3, 16, 32):
        found = check(rows.to(dtype), k, mask_id=1, suppress=[3])
        tied = [0, 2, *range(4, 34)][:k]
        assert found.token[2].tolist() == tied
        assert found.token[5].tolist() == [0, vocab - 1, *[-1] * 30][:k]
        assert bool((found.logprob[5, 2:] == -math.inf).all())
    assert dx.row_topk(rows.to(dtype), 32).token[3].tolist() == [vocab // 2 + i for i in range(32)]


@every_level
def test_a_row_is_the_same_among_others() -> None:
    logits = torch.randn(7, 20001).bfloat16()
    logits[3] = 1.0
    whole = dx.row_topk(logits, 9, mask_id=4)
    for rows in ([3], [6, 0, 6], [2, 3, 1, 4]):
        part = dx.row_topk(logits, 9, rows=torch.tensor(rows), mask_id=4)
        assert all(torch.equal(a, b[rows]) for a, b in zip(part, whole, strict=True))


def test_threads_share_what_they_know_of_a_row() -> None:
    """Of a tie that several of them meet, the lowest ids: here the first chunk of row 1 is read last."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        for _ in range(20):
            assert dx.row_topk(torch.ones(2, 70000), 32).token.tolist() == [list(range(32))] * 2
    finally:
        torch.set_num_threads(threads)


@everywhere
def test_rows_are_picked_and_others_never_read() -> None:
    logits = torch.full((2, 3, 1000), math.nan)
    logits[1, 0] = torch.randn(1000)
    found = dx.row_topk(logits, 4, rows=torch.tensor([3]))
    assert all(torch.equal(a, b) for a, b in zip(found, dx.row_topk(logits[1, :1], 4), strict=True))
    assert dx.row_topk(logits, 4, rows=torch.tensor([], dtype=torch.int64)).token.shape == (0, 4)


@everywhere
def test_any_leading_shape() -> None:
    for shape in ((9,), (4, 9), (2, 3, 9), (2, 1, 3, 9), (0, 9), (2, 0, 9)):
        found = dx.row_topk(torch.randn(shape), 2)
        assert found.token.shape == found.logprob.shape == (*shape[:-1], 2)
        assert (found.token.dtype, found.logprob.dtype) == (torch.int64, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@every_level
def test_infinities_are_the_largest_number(dtype: torch.dtype) -> None:
    logits = torch.randn(2, 5000).to(dtype)
    logits[0, [4000, 17, 900]] = math.inf
    logits[1, :] = -math.inf
    logits[1, 77] = math.inf
    found = check(logits, 4)
    assert found.token[0, :3].tolist() == [17, 900, 4000]
    torch.testing.assert_close(found.logprob[0, :3].exp(), torch.full((3,), 1 / 3))
    assert found.token[1].tolist() == [77, -1, -1, -1]
    assert found.logprob[1].tolist() == [0.0, *[-math.inf] * 3]


@pytest.mark.parametrize("dtype", DTYPES)
@every_level
def test_a_bad_row_is_named(dtype: torch.dtype) -> None:
    for at in (0, 4099, 20000):
        logits = torch.randn(4, 20001).to(dtype)
        logits[2, at] = math.nan
        with refused("row 2 holds NaN"):
            dx.row_topk(logits, 3)
        with refused("row 2 holds NaN"):
            dx.row_topk(logits, 3, mask_id=at)
        found, logits[2, at] = dx.row_topk(logits, 3, suppress=[at]), 5.0  # left out altogether
        assert torch.equal(found.token, dx.row_topk(logits, 3, suppress=[at]).token)
    logits[1] = -math.inf
    logits[1, 9] = 0.0
    with refused("row 1 leaves no token to choose"):
        dx.row_topk(logits, 3, mask_id=9)


@everywhere
def test_opcheck_and_compile() -> None:
    logits, ids = torch.randn(2, 3, 40), torch.tensor([1, 2])
    for args in (
        (logits, 3, None, 5, ids, counters(logits, 6)),
        (logits, 16, torch.tensor([4, 1]), -1, None, counters(logits, 2)),
    ):
        torch.library.opcheck(torch.ops.dparallel.row_topk.default, args)
    compiled = torch.compile(lambda x: dx.row_topk(x, 3).logprob * 2, fullgraph=True, backend="eager")
    assert torch.equal(compiled(logits), dx.row_topk(logits, 3).logprob * 2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": 0}, ValueError, "k: expected a whole number >= 1, got 0"),
        ({"k": 33}, ValueError, "k: expected a whole number <= 32, got 33"),
        ({"k": 2.0}, ValueError, "k: expected a whole number"),
        ({"logits": [1.0]}, TypeError, "logits: expected a Tensor, got list"),
        ({"logits": torch.zeros(3, 9).double()}, ValueError, "logits: expected float32, bfloat16 or float16"),
        ({"logits": torch.zeros(3, 0)}, ValueError, "logits: expected .* V >= 1"),
        ({"rows": torch.tensor([3])}, ValueError, r"rows: expected in \[0, 3\), got 3 at 0"),
        ({"rows": [1]}, TypeError, "rows: expected a Tensor"),
        ({"mask_id": 9}, ValueError, "mask_id: expected an id below 9, got 9"),
        ({"suppress": [-1]}, ValueError, r"suppress: expected ids in \[0, 9\), got -1"),
    ],
)
def test_bad_arguments_are_named(change: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        dx.row_topk(**{"logits": torch.randn(3, 9), "k": 2, **change})


def test_a_direct_call_is_checked_too() -> None:
    for k in (0, 33, -1, 2**40):
        with pytest.raises(OF_AN_OP, match=f"k: expected 1 to 32, got {k}"):
            torch.ops.dparallel.row_topk(torch.randn(3, 9), k, None, -1, None, counters(torch.ones(1), 3))
