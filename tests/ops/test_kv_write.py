"""kv_write against its float64 reference: dtypes, rotary variants, strides, pages, bad input."""

from __future__ import annotations

import pytest
import torch
from conftest import EMULATED, OF_AN_OP, every_level, everywhere
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def case(
    seed: int,
    dtype: torch.dtype,
    count: int,
    heads: int,
    group: int,
    dim: int,
    page: int,
    rotary: int | None = None,
    norms: bool = False,
) -> dict:
    """Arguments of kv_write: rows of one fused buffer, caches of any layout, some rows written nowhere."""
    g = torch.Generator().manual_seed(seed)
    fused = torch.randn(count, (group + 2) * heads * dim, generator=g).to(dtype)
    q, k, v = fused.split([group * heads * dim, heads * dim, heads * dim], 1)
    pages = -(-count // page) + 2
    caches = [torch.randn(pages, page, heads, dim, generator=g).to(dtype).transpose(1, 2) for _ in "kv"]
    slots = torch.randperm(pages * page, generator=g)[:count]
    slots[torch.rand(count, generator=g) < 0.2] = -1
    cos, sin = dx.rope_table(50, rotary or dim, 500.0, device=slots.device)
    weights = torch.randn(2, dim, generator=g).to(dtype)
    of_norms = {"q_norm": weights[0], "k_norm": weights[1], "eps": 1e-3} if norms else {}
    return {
        "q": q.unflatten(1, (-1, dim)),
        "k": k.unflatten(1, (-1, dim)),
        "v": v.unflatten(1, (-1, dim)),
        "k_cache": caches[0],
        "v_cache": caches[1],
        "positions": torch.randint(50, (count,), generator=g),
        "slot_mapping": slots,
        "cos": cos,
        "sin": sin,
        **of_norms,
    }


def copied(arguments: dict) -> dict:
    return {name: t.clone() if isinstance(t, torch.Tensor) else t for name, t in arguments.items()}


@given(
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from(DTYPES),
    count=st.integers(0, 40),
    heads=st.integers(1, 3),
    group=st.integers(1, 4),
    dim=st.sampled_from([2, 6, 16, 64, 80]),
    page=st.sampled_from([1, 5, 16, 64]),
    part=st.sampled_from([1, 1, 2, 4]),
    norms=st.booleans(),
)
@everywhere
def test_it_does_what_its_reference_does(seed, dtype, count, heads, group, dim, page, part, norms) -> None:
    rotary = max(2, dim // part // 2 * 2)
    ours = case(seed, dtype, count, heads, group, dim, page, rotary, norms)
    by_reference = copied(ours)
    dx.kv_write(**ours)
    reference.kv_write(**by_reference)
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    tolerance *= 4 if norms else 1  # a number at a tie is rounded either way, twice, and multiplied
    for name in ("q", "k_cache"):
        torch.testing.assert_close(ours[name], by_reference[name], rtol=tolerance, atol=tolerance)
    assert torch.equal(ours["v_cache"], by_reference["v_cache"])  # and what was not written is as it was
    assert torch.equal(ours["k"], by_reference["k"])
    assert torch.equal(ours["v"], by_reference["v"])


@pytest.mark.parametrize("dtype", DTYPES)
@everywhere
def test_one_rounding(dtype: torch.dtype) -> None:
    """In 16 bits the result is the rounded float32 one, save where that lies at a tie."""
    ours = case(3, dtype, 64, 2, 1, 64, 16)
    by_reference = copied(ours)
    dx.kv_write(**ours)
    reference.kv_write(**by_reference)
    differing = (ours["k_cache"] != by_reference["k_cache"]).float().mean()
    assert differing < (0.6 if dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize(
    ("dim", "rotary"), [(90, 0), (90, 2), (90, 22), (90, 64), (90, 90), (64, 64), (64, 32)]
)
@every_level
def test_which_products_are_rounded(dim: int, rotary: int) -> None:
    """To the bit: on a CPU each, as by torch one operation after another; a GPU fuses the first number's with
    the sum, with vectors and without."""
    for dtype in DTYPES:
        q, k = torch.randn(7, 3, dim).to(dtype), torch.randn(7, 1, dim).to(dtype)
        half, positions = rotary // 2, torch.randint(40, (7,))
        tables = dx.rope_table(40, rotary, device=q.device) if rotary else torch.ones(2, 40, 0)
        cos, sin = (table[positions][:, None] for table in tables)
        caches = torch.zeros(2, 1, 1, 16, dim, dtype=dtype)

        def rotated(x: Tensor, cos: Tensor = cos, sin: Tensor = sin, half: int = half) -> Tensor:
            a, b, rest = x.float().split((half, half, dim - rotary), -1)
            if x.is_cuda or EMULATED:  # of float32 numbers a product is exact in float64
                first = (a.double() * cos - (b * sin).double()).float()
                second = (a.double() * sin + (b * cos).double()).float()
            else:
                first, second = a * cos - b * sin, b * cos + a * sin
            return torch.cat((first, second, rest), -1).to(x.dtype)

        expected_q, expected_k = rotated(q), rotated(k)
        where = {"positions": positions, "slot_mapping": torch.arange(7), "cos": tables[0], "sin": tables[1]}
        dx.kv_write(q, k, k, *caches, **where)
        assert torch.equal(q, expected_q)
        assert torch.equal(caches[0, 0, 0, :7], expected_k[:, 0])
        assert torch.equal(caches[1, 0, 0, :7], k[:, 0])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@everywhere
def test_norms_round_as_rms_norm(dtype: torch.dtype) -> None:
    """And a row is to the bit what it is alone."""
    of_rms = dx.rms_norm if dtype in DTYPES else reference.rms_norm
    for dim, rotary in ((128, 128), (80, 80), (64, 16), (6, 4)):
        ours = case(3, dtype, 33, 2, 2, dim, 16, rotary, norms=True)
        first, one_by_one = copied(ours), copied(ours)
        eps = one_by_one.pop("eps")
        for name in ("q", "k"):
            one_by_one[name] = of_rms(one_by_one[name], one_by_one.pop(f"{name}_norm"), eps=eps)
        dx.kv_write(**ours)
        dx.kv_write(**one_by_one)
        for name in ("q", "k_cache"):  # but for sums of another order, on a GPU
            differing = (ours[name] != one_by_one[name]).float().mean()
            assert differing < (0.01 if dtype in (torch.bfloat16, torch.float16) else 1)
            torch.testing.assert_close(ours[name], one_by_one[name], rtol=2e-2, atol=1e-6)
        alone = copied(first)
        rows = ("q", "k", "v", "positions", "slot_mapping")
        for row in range(33):
            dx.kv_write(**alone | {name: alone[name][row : row + 1] for name in rows})
        for name in ("q", "k", "k_cache", "v_cache"):
            assert torch.equal(alone[name], ours[name])


@everywhere
def test_opcheck() -> None:
    arguments = case(1, torch.float32, 9, 2, 2, 16, 8)
    names = ("q", "k", "v", "k_cache", "v_cache", "positions", "slot_mapping", "cos", "sin")
    torch.library.opcheck(torch.ops.dparallel.kv_write, tuple(arguments[n] for n in names))
    arguments |= case(1, torch.float32, 9, 2, 2, 16, 8, norms=True)
    names += ("q_norm", "k_norm", "eps")
    torch.library.opcheck(torch.ops.dparallel.kv_write, tuple(arguments[n] for n in names))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(9, 4)}, "q: expected 3 dimensions"),
        ({"q": torch.zeros(9, 4, 16, dtype=torch.int64)}, "q: expected float32, bfloat16 or float16"),
        ({"k": torch.zeros(9, 2, 16, dtype=torch.bfloat16)}, "k: expected torch.float32 as q"),
        ({"v": torch.zeros(8, 2, 16)}, r"v: expected torch.float32 \(9, 2, 16\)"),
        ({"v_cache": torch.zeros(4, 2, 7, 16)}, r"v_cache: expected \(4, 2, 8, 16\) as k_cache"),
        ({"positions": torch.full((9,), 50)}, r"positions: expected in \[0, 50\), got 50"),
        ({"positions": torch.full((9,), -1)}, r"positions: expected in \[0, 50\), got -1"),
        ({"slot_mapping": torch.full((9,), 32)}, r"slot_mapping: expected in \[0, 32\), got 32"),
        ({"slot_mapping": torch.zeros(9)}, r"slot_mapping: expected torch.int64 \(9,\)"),
        (
            {"cos": torch.zeros(50, 16)},
            r"cos: expected float32 \(positions, R / 2\) with R <= 16, got torch.float32 \(50, 16\)",
        ),
        ({"sin": torch.zeros(50, 7)}, r"sin: expected torch.float32 \(50, 8\)"),
        ({"q_norm": torch.ones(16)}, "k_norm: expected a norm for both or neither of q and k, got None"),
        ({"k_norm": torch.ones(16)}, "q_norm: expected a norm for both or neither of q and k, got None"),
        (
            {"q_norm": torch.ones(16), "k_norm": torch.ones(8)},
            r"k_norm: expected torch.float32 \(16,\) on cpu, got torch.float32 \(8,\)",
        ),
        ({"q_norm": torch.ones(16).half(), "k_norm": torch.ones(16)}, r"q_norm: expected torch.float32"),
        ({"eps": "no"}, "eps: expected a finite number >= 0, got 'no'"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dx.kv_write(**{**case(1, torch.float32, 9, 2, 2, 16, 8), **change})


def test_a_direct_call_out_of_bounds_is_refused() -> None:
    """torch.ops keeps memory safe whoever calls."""
    arguments = case(1, torch.float32, 9, 2, 2, 16, 8)
    names = ("q", "k", "v", "k_cache", "v_cache", "positions", "slot_mapping", "cos", "sin")
    for name, value in (("positions", 50), ("positions", -1), ("slot_mapping", 10**6)):
        changed = {**arguments, name: torch.full((9,), value)}
        with pytest.raises(OF_AN_OP, match=rf"{name}: expected in \[0, .*got {value} at 0"):
            torch.ops.dparallel.kv_write(*(changed[n] for n in names))


def test_the_rotary_table() -> None:
    cos, sin = dx.rope_table(7, 8, 100.0)
    angle = torch.arange(7.0)[:, None] * 100.0 ** (-torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(cos, angle.cos())
    torch.testing.assert_close(sin, angle.sin())
    with pytest.raises(ValueError, match="head_dim: expected an even number"):
        dx.rope_table(7, 9)
