"""block_attention against torch's attention with an explicit mask, in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import STAND_IN, every_level, everywhere
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def tolerance_of(q: Tensor, k: Tensor, scale: float) -> float:
    """A score is off by its sum's rounding, and a weight by as much of itself."""
    largest = q.double().norm(dim=-1).max() * k.double().nan_to_num(0, 0, 0).norm(dim=-1).max() * scale
    return TOLERANCE[q.dtype] + 4e-7 * float(largest)


def oracle(q: Tensor, k: Tensor, v: Tensor, arguments: dict, scale: float) -> Tensor:
    """All segments at once: one attention over every slot of the cache under a mask, in float64."""
    size, group = k.shape[2], q.shape[1] // k.shape[1]
    flat = [t.transpose(1, 2).flatten(0, 1).double().nan_to_num(0, 0, 0) for t in (k, v)]  # (slots, Hkv, D)
    keys, values = (t.repeat_interleave(group, 1).transpose(0, 1) for t in flat)
    mask = torch.zeros(len(q), keys.shape[1], dtype=torch.bool)
    for b, e, n, table in zip(
        *(arguments[x] for x in ("q_start", "q_end", "kv_lens", "block_table")), strict=True
    ):
        slot = torch.arange(int(n))
        mask[b:e, table[slot // size] * size + slot % size] = True
    y = F.scaled_dot_product_attention(q.transpose(0, 1).double(), keys, values, attn_mask=mask, scale=scale)
    return torch.where(mask.any(1)[:, None, None], y.transpose(0, 1), 0.0)


def case(seed: int, dtype: torch.dtype, lengths: list[int], heads: int, group: int, dim: int, page: int):
    """Segments with gaps between them, pages in random order, NaN in every slot that none may see."""
    g = torch.Generator().manual_seed(seed)
    segments, width = len(lengths), max(1, -(-max(lengths, default=0) // page))
    pages = torch.randperm(segments * width + 1, generator=g)[: segments * width].view(segments, width)
    k, v = (
        torch.full((segments * width + 1, page, heads, dim), math.nan, dtype=dtype).transpose(1, 2)
        for _ in "kv"
    )
    for s, n in enumerate(lengths):
        for j in range(n):
            at = (pages[s, j // page], slice(None), j % page)
            k[at] = torch.randn(heads, dim, generator=g).to(dtype)
            v[at] = torch.randn(heads, dim, generator=g).to(dtype)
    queries = torch.randint(0, 40, (segments,), generator=g)
    gaps = torch.randint(0, 3, (segments,), generator=g)
    begin = (queries + gaps).cumsum(0) - queries
    end = begin + queries
    rows = int(end[-1]) + 2 if segments else 2
    q = torch.randn(rows, 2 * group * heads, dim, generator=g).to(dtype)[:, : group * heads]
    arguments = {"kv_lens": torch.tensor(lengths), "block_table": pages, "q_start": begin, "q_end": end}
    return q, k, v, arguments


@given(
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from(DTYPES),
    lengths=st.lists(st.integers(0, 200), min_size=1, max_size=5),
    heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3, 8]),
    dim=st.sampled_from([2, 16, 40, 64, 128]),
    page=st.sampled_from([1, 7, 16, 64, 200]),
    scale=st.sampled_from([None, 0.3, 2.0]),
)
@every_level
def test_it_is_attention_with_a_mask(seed, dtype, lengths, heads, group, dim, page, scale) -> None:
    q, k, v, arguments = case(seed, dtype, lengths, heads, group, dim, page)
    found = dx.block_attention(q, k, v, **arguments, scale=scale)
    factor = dim**-0.5 if scale is None else scale
    expected, tolerance = oracle(q, k, v, arguments, factor), tolerance_of(q, k, factor)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    twin = reference.block_attention(q, k, v, **arguments, scale=scale)
    torch.testing.assert_close(twin.double(), expected, rtol=tolerance, atol=tolerance)
    for s in range(len(lengths)):  # to the bit as the segment alone
        alone = {name: value[s : s + 1] for name, value in arguments.items()}
        at = slice(int(alone["q_start"]), int(alone["q_end"]))
        assert torch.equal(dx.block_attention(q, k, v, **alone, scale=scale)[at], found[at])


@pytest.mark.parametrize("length", [1, 4096 if STAND_IN else 32768])
@pytest.mark.parametrize("dtype", DTYPES)
@everywhere
def test_extremes_of_length_and_size(length: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(length)
    q = (30 * torch.randn(1, 32, 4, 64, generator=g)).to(dtype)
    k, v = (torch.randn(1, 2, length, 64, generator=g).to(dtype) for _ in "kv")
    found = dx.block_attention(q, k, v, torch.tensor([length]))
    keys, values = (t.double().repeat_interleave(2, 1) for t in (k, v))
    expected = F.scaled_dot_product_attention(q.double().transpose(1, 2), keys, values).transpose(1, 2)
    tolerance = tolerance_of(q, k, 64**-0.5)
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@everywhere
def test_a_nan_that_is_seen_is_not_hidden() -> None:
    q, k, v = (torch.randn(1, 3, 2, 8), *(torch.randn(1, 2, 5, 8) for _ in "kv"))
    k[0, 0, 4] = math.nan
    found = dx.block_attention(q, k, v, torch.tensor([5]))
    assert found[:, :, 0].isnan().all()
    assert not found[:, :, 1].isnan().any()
    assert not dx.block_attention(q, k, v, torch.tensor([4])).isnan().any()


@pytest.mark.parametrize("shape", [(0, 4, 2, 8), (3, 0, 2, 8)])
@everywhere
def test_nothing_to_do(shape: tuple[int, ...]) -> None:
    k = torch.randn(3, 2, 5, 8)
    found = dx.block_attention(torch.randn(shape), k, k, torch.full((shape[0],), 5))
    assert found.shape == shape


@everywhere
def test_opcheck() -> None:
    q, k, v, a = case(1, torch.float32, [5, 30], 2, 2, 16, 8)
    ragged = (a["q_start"], a["q_end"], a["kv_lens"], a["block_table"], len(q), 64)
    given = (q.contiguous(), k, v, *ragged, 0.25)
    torch.library.opcheck(torch.ops.dparallel.block_attention, given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"q": torch.zeros(9, 5, 16)},
            r"k_cache: expected \(pages, Hkv, page_size, D\) with Hkv dividing the 5",
        ),
        ({"q": torch.zeros(9, 4, 16).half()}, "k_cache: expected torch.float16 as q"),
        ({"kv_lens": torch.tensor([5, 33])}, r"kv_lens: expected in \[0, 33\), got 33 at 1"),
        ({"kv_lens": torch.tensor([5])}, r"kv_lens: expected torch.int64 \(2,\)"),
        ({"q_start": None}, "q_start: needed"),
        ({"q_end": torch.tensor([1, 10**6])}, "q_end: expected in"),
        ({"block_table": torch.zeros(2, dtype=torch.int64)}, r"block_table: expected int64 \(S, P\)"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    q, k, v, arguments = case(1, torch.float32, [5, 30], 2, 2, 16, 8)
    with pytest.raises(ValueError, match=message):
        dx.block_attention(**{"q": q, "k_cache": k, "v_cache": v, **arguments, **change})


def test_pages_out_of_bounds_are_refused() -> None:
    q, k, v, arguments = case(1, torch.float32, [5, 30], 2, 2, 16, 8)
    for page in (-1, len(k)):
        arguments["block_table"] = torch.full_like(arguments["block_table"], page)
        with pytest.raises(ValueError, match=rf"block_table: expected in \[0, {len(k)}\), got {page} at 0"):
            dx.block_attention(q, k, v, **arguments)
