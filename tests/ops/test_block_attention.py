"""block_attention against torch's attention with an explicit mask, in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import EMULATED, every_level, everywhere
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
        seen = torch.ones(int(e - b), int(n), dtype=torch.bool)
        base = int(n - (e - b))
        if arguments.get("causal"):
            seen = torch.ones_like(seen).tril(base)
        elif arguments.get("ancestors") is not None:
            for row, words in enumerate(arguments["ancestors"][b:e].tolist()):
                bits = "".join(f"{word % 2**64:064b}"[::-1] for word in words)
                seen[row, base:] = torch.tensor([bit == "1" for bit in bits[: int(e - b)]], dtype=torch.bool)
        mask[b:e, table[slot // size] * size + slot % size] = seen
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
    by_reference = reference.block_attention(q, k, v, **arguments, scale=scale)
    torch.testing.assert_close(by_reference.double(), expected, rtol=tolerance, atol=tolerance)
    for s in range(len(lengths)):  # to the bit as the segment alone
        alone = {name: value[s : s + 1] for name, value in arguments.items()}
        at = slice(int(alone["q_start"]), int(alone["q_end"]))
        assert torch.equal(dx.block_attention(q, k, v, **alone, scale=scale)[at], found[at])


def restricted(kind: str, seed: int, arguments: dict) -> dict:
    """The same arguments, segments shortened to their slots, under a causal or a tree's visibility."""
    g = torch.Generator().manual_seed(seed)
    begin, lengths = arguments["q_start"], arguments["kv_lens"]
    found = {**arguments, "q_end": torch.minimum(arguments["q_end"], begin + lengths)}
    if kind == "causal":
        return {**found, "causal": True}
    rows, words = int(arguments["q_end"][-1]) + 2, 2
    ancestors = torch.randint(-(2**63), 2**63 - 1, (rows, words), generator=g)  # bits of no row, too
    ancestors[torch.rand(rows, generator=g) < 0.1] = 0
    for first, last in zip(begin.tolist(), found["q_end"].tolist(), strict=True):
        for row in range(first + 1, last):  # trees, and rows that see anything
            if torch.rand((), generator=g) < 0.7:
                parent = int(torch.randint(first, row, (), generator=g))
                ancestors[row] = ancestors[parent]
                bit = row - first
                ancestors[row, bit // 64] |= (1 << bit % 64) - (2**64 if bit % 64 == 63 else 0)
    return {**found, "ancestors": ancestors}


@given(
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(["causal", "tree"]),
    dtype=st.sampled_from([*DTYPES, torch.float64]),
    lengths=st.lists(st.integers(0, 200), min_size=1, max_size=4),
    heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3, 8]),
    dim=st.sampled_from([2, 16, 40, 64, 128]),
    page=st.sampled_from([1, 7, 16, 64, 200]),
)
@every_level
def test_rows_see_what_is_before_them_or_their_ancestors(
    seed, kind, dtype, lengths, heads, group, dim, page
) -> None:
    q, k, v, arguments = case(seed, dtype, lengths, heads, group, dim, page)
    arguments = restricted(kind, seed, arguments)
    found, factor = dx.block_attention(q, k, v, **arguments), dim**-0.5
    expected = oracle(q, k, v, arguments, factor)
    tolerance = 1e-12 if dtype == torch.float64 else tolerance_of(q, k, factor)
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    by_reference = reference.block_attention(q, k, v, **arguments)
    torch.testing.assert_close(by_reference.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@everywhere
def test_a_causal_row_is_to_the_bit_what_it_is_alone(dtype: torch.dtype) -> None:
    """Also beside NaN in slots that the others alone see."""
    q, k, v, arguments = case(5, dtype, [150, 70, 3], 2, 2, 16, 16)
    arguments = restricted("causal", 5, arguments)
    found = dx.block_attention(q, k, v, **arguments)
    for s, (first, last) in enumerate(zip(arguments["q_start"], arguments["q_end"], strict=True)):
        for row in range(int(first), int(last)):
            seen = int(arguments["kv_lens"][s]) - int(last) + row + 1
            one = {"q_start": torch.tensor([row]), "q_end": torch.tensor([row + 1])}
            of_one = {"kv_lens": torch.tensor([seen]), "block_table": arguments["block_table"][s : s + 1]}
            alone = dx.block_attention(q, k, v, **one, **of_one)[row]
            if EMULATED or q.device.type == "cpu":
                assert torch.equal(alone, found[row]), (s, row)
            else:  # a tile's rows take its slots together
                torch.testing.assert_close(alone, found[row], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("kind", ["causal", "tree"])
@pytest.mark.parametrize("dtype", DTYPES)
@everywhere
def test_what_a_row_does_not_see_may_hold_anything(dtype: torch.dtype, kind: str) -> None:
    """NaN and infinity in the slots of the later rows, or of other branches."""
    q, k, v, arguments = case(6, dtype, [150, 30, 64], 2, 2, 16, 16)
    arguments = restricted(kind, 6, arguments)
    before = dx.block_attention(q, k, v, **arguments)
    s, size = 0, k.shape[2]
    first, last, length = (int(arguments[name][s]) for name in ("q_start", "q_end", "kv_lens"))
    for bad in (math.nan, math.inf, -math.inf):
        for row in range(first, last, 9 if EMULATED else 3):
            slot = length - last + row
            page = int(arguments["block_table"][s, slot // size])
            keys, values = k.clone(), v.clone()
            keys[page, :, slot % size] = values[page, :, slot % size] = bad
            after = dx.block_attention(q, keys, values, **arguments)
            bit = row - first
            for other in range(first, last):
                sees = other >= row
                if kind == "tree":
                    sees = bool(arguments["ancestors"][other, bit // 64].item() >> bit % 64 & 1)
                if sees:
                    assert not after[other].isfinite().any(), (row, other)
                else:
                    assert torch.equal(after[other], before[other]), (row, other)


@pytest.mark.parametrize("length", [1, 4096 if EMULATED else 32768])
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
    a = restricted("tree", 1, a)
    ragged = (a["q_start"], a["q_end"], a["kv_lens"], a["block_table"], len(q), 64)
    for restriction in ((False, None), (False, a["ancestors"]), (True, None)):
        given = (q.contiguous(), k, v, *ragged, 0.25, *restriction)
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
        ({"q_start": None}, r"q_start: expected int64 \(S,\) with q of \(N, H, D\), got None"),
        (
            {"causal": True, "q_start": torch.tensor([0, 0]), "q_end": torch.tensor([6, 0])},
            "kv_lens: expected a slot for each of the segment's 6 rows, got 5 at 0",
        ),
        ({"ancestors": torch.zeros(0, 1)}, r"ancestors: expected torch.int64 \(\d+, 1\)"),
        ({"ancestors": 3}, r"ancestors: expected int64 \(\d+, W\), got int"),
        ({"ancestors": torch.zeros(0, 1), "causal": True}, "ancestors: expected instead of causal"),
        ({"q_end": torch.tensor([1, 10**6])}, "q_end: expected in"),
        ({"block_table": torch.zeros(2, dtype=torch.int64)}, r"block_table: expected int64 \(S, P\)"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    q, k, v, arguments = case(1, torch.float32, [5, 30], 2, 2, 16, 8)
    with pytest.raises(ValueError, match=message):
        dx.block_attention(**{"q": q, "k_cache": k, "v_cache": v, **arguments, **change})


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_slots_that_a_row_does_not_see_may_hold_nan(dtype: torch.dtype) -> None:
    segment = {"q_start": torch.tensor([0]), "q_end": torch.tensor([3]), "kv_lens": torch.tensor([5])}
    segment["block_table"] = torch.tensor([[0]])
    q, (k, v) = torch.randn(3, 2, 8).to(dtype), torch.randn(2, 1, 2, 8, 8).to(dtype)
    v[0, :, 4] = torch.nan  # the last row's own
    for seen in ({"causal": True}, {"ancestors": torch.tensor([[1], [3], [7]])}):
        found = dx.block_attention(q, k, v, **segment, **seen)
        assert found.isnan().flatten(1).any(1).tolist() == [False, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_word_too_few_is_refused(dtype: torch.dtype) -> None:
    q, k, v, _ = case(1, dtype, [5, 70], 2, 2, 16, 8)
    segment = {"q_start": torch.tensor([0]), "q_end": torch.tensor([65]), "kv_lens": torch.tensor([66])}
    segment["block_table"] = torch.zeros(1, 9, dtype=torch.int64)
    q = torch.zeros(65, *q.shape[1:], dtype=dtype)
    with pytest.raises(ValueError, match="ancestors: expected"):
        dx.block_attention(q, k, v, **segment, ancestors=torch.ones(65, 1, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_indices_out_of_bounds_are_refused(dtype: torch.dtype) -> None:
    q, k, v, arguments = case(1, dtype, [5, 30], 2, 2, 16, 8)
    for page in (-1, len(k)):
        table = {"block_table": torch.full_like(arguments["block_table"], page)}
        with pytest.raises(ValueError, match=rf"block_table: expected in \[0, {len(k)}\), got {page} "):
            dx.block_attention(q, k, v, **{**arguments, **table})
    for start, end, message in (
        ([2, 0], [1, 1], "q_start: expected no larger than q_end, got 2 above 1 at 0"),
        ([1, 0], [3, 2], r"q_start: expected segments that do not overlap, got \["),
        ([0, 1], [1, len(q) + 1], r"q_end: expected in \[0, "),
    ):
        rows = {"q_start": torch.tensor(start), "q_end": torch.tensor(end)}
        with pytest.raises(ValueError, match=message):
            dx.block_attention(q, k, v, **{**arguments, **rows})
    touching = {"q_start": torch.tensor([1, 0]), "q_end": torch.tensor([3, 1])}
    assert dx.block_attention(q, k, v, **{**arguments, **touching})[:3].any(-1).all()
