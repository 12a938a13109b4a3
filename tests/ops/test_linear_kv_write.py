"""linear_kv_write against its two steps, to the bit: the op on every device, and `dx.linear_kv_write`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import EMULATED, every_level, everywhere
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext import reference

ops = torch.ops.dparallel
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PAGES, PAGE = 9, 16


class Given:
    """A cache, and factors of a product: with norms whole numbers, whose sums are exact in any order."""

    def __init__(
        self,
        rows: int,
        width: int,
        heads: int,
        kv_heads: int,
        dim: int,
        dtype: torch.dtype,
        bytewise: bool,
        norms: bool = False,
    ) -> None:
        numbers = (lambda *shape: torch.randint(-2, 3, shape).float()) if norms else torch.randn
        full = numbers((heads + 2 * kv_heads) * dim, width) / (1 if norms else width**0.5)
        self.weight, self.scale = dx.quantize_fp8(full) if bytewise else (full.to(dtype), None)
        self.bias = numbers(len(full)).to(dtype)
        self.x, self.heads = numbers(rows, width).to(dtype), heads
        self.caches = torch.randn(2, PAGES, kv_heads, PAGE, dim).to(dtype)
        slots = torch.randperm(PAGES * PAGE)[:rows]
        slots[1::5] = -1
        cos, sin = dx.rope_table(40, dim, device=self.x.device)
        self.where: dict[str, Any] = {"positions": torch.randint(40, (rows,)), "slot_mapping": slots}
        self.where |= {"cos": cos, "sin": sin, "q_norm": None, "k_norm": None, "eps": 1e-5}
        if norms:
            self.where |= dict(zip(("q_norm", "k_norm"), torch.randn(2, dim).to(dtype), strict=True))

    def op(self, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        caches, where = self.caches.clone(), dict(self.where)
        for name in ("positions", "slot_mapping"):
            where[name] = where[name][rows]
        factors = self.x[rows], self.weight, self.scale, self.bias
        return ops.linear_kv_write(*factors, *caches, *where.values(), False), caches

    def door(self) -> tuple[Tensor, Tensor]:
        caches = self.caches.clone()
        with torch.no_grad():
            q = dx.linear_kv_write(self.x, self.weight, self.bias, *caches, **self.where, scale=self.scale)
        return q, caches

    def in_steps(self) -> tuple[Tensor, Tensor]:
        caches, kv_heads = self.caches.clone(), self.caches.shape[2]
        if self.scale is None:
            product = ops.linear(self.x, self.weight, self.bias, False)
        else:
            product = ops.fp8_linear(self.x, self.weight, self.scale, self.bias, False)
        heads = product.unflatten(1, (-1, self.caches.shape[4]))
        q, k, v = heads.split((self.heads, kv_heads, kv_heads), 1)
        dx.kv_write(q, k, v, *caches, **self.where)
        return q, caches


@every_level
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bytewise", [False, True])
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize(
    ("rows", "width", "heads", "kv_heads", "dim"),
    [(1, 64, 1, 1, 64), (5, 128, 4, 2, 128), (33, 1088, 3, 1, 64), (64, 128, 4, 4, 128), (70, 64, 2, 1, 192),
     (3, 7, 2, 1, 6), (9, 192, 2, 2, 80)],
)  # fmt: skip
def test_it_is_its_steps(
    rows: int,
    width: int,
    heads: int,
    kv_heads: int,
    dim: int,
    norms: bool,
    bytewise: bool,
    dtype: torch.dtype,
) -> None:
    given = Given(rows, width, heads, kv_heads, dim, dtype, bytewise, norms)
    q, caches = given.op()
    expected_q, expected = given.in_steps()
    one_product = width % 64 == 0 and (dim == 128 if norms else dim % 64 == 0) and dtype == torch.bfloat16
    if one_product or not (q.is_cuda or EMULATED):
        assert torch.equal(q, expected_q)
        assert torch.equal(caches, expected)
    else:  # two products, which a GPU may sum in another order than one
        torch.testing.assert_close(q, expected_q, rtol=0.02, atol=0.02)
        torch.testing.assert_close(caches, expected, rtol=0.02, atol=0.02)
    some, _ = given.op(slice(rows - 1, None))
    assert torch.equal(some, q[rows - 1 :])
    q, caches = given.door()
    expected = given.caches.clone()
    factors = given.x, given.weight, given.bias, *expected
    expected_q = reference.linear_kv_write(*factors, **given.where, scale=given.scale)
    torch.testing.assert_close(q, expected_q, rtol=0.04, atol=0.04)
    torch.testing.assert_close(caches, expected, rtol=0.04, atol=0.04)


@everywhere
def test_empty_and_strided() -> None:
    given = Given(6, 64, 2, 1, 64, torch.bfloat16, False)
    given.caches = torch.randn(2, PAGES, PAGE, 1, 64).bfloat16().transpose(2, 3)
    wide = torch.zeros(6, 131).bfloat16()
    wide[:, 3:67] = given.x
    given.x = wide[:, 3:67]  # a GPU sums rows that are not aligned in another order
    expected_q, expected = given.in_steps()
    q, caches = given.op()
    assert torch.equal(q, expected_q)
    assert torch.equal(caches, expected)
    q, caches = given.op(slice(0, 0))
    assert q.shape == (0, 2, 64)
    assert torch.equal(caches, given.caches)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x": torch.zeros(6, 32)}, r"weight: expected torch.float32 \(out, 32\)"),
        ({"x": torch.zeros(2, 3, 64)}, "x: expected 2 dimensions"),
        ({"weight": torch.zeros(130, 64), "bias": None},
         r"weight: expected \(\(H \+ 2 \* 1\) \* 64, in\) for the heads of k_cache, got \(130, 64\)"),
        ({"weight": torch.zeros(128, 64), "bias": None}, r"weight: expected \(\(H \+ 2"),
        ({"weight": torch.zeros(64)}, r"weight: expected \(\(H \+ 2"),
        ({"weight": torch.zeros(256, 64).half()}, r"weight: expected torch.float32 .*, got torch.float16"),
        ({"bias": torch.zeros(7)}, r"bias: expected torch.float32 \(256,\)"),
        ({"k_cache": torch.zeros(9, 1, 16, 64).half()}, "k_cache: expected torch.float32"),
        ({"v_cache": torch.zeros(8, 1, 16, 64)}, "v_cache: expected"),
        ({"positions": torch.zeros(5, dtype=torch.int64)}, "positions: expected"),
        ({"positions": torch.full((6,), 40)}, r"positions: expected in \[0, 40\), got 40"),
        ({"slot_mapping": torch.full((6,), 144)}, r"slot_mapping: expected in \[0, 144\), got 144"),
        ({"q_norm": torch.ones(63), "k_norm": torch.ones(64)}, r"q_norm: expected torch.float32 \(64,\)"),
        ({"k_norm": torch.ones(64)}, "q_norm: expected a norm for both or neither of q and k, got None"),
        ({"eps": -1.0}, "eps: expected"),
    ],
)  # fmt: skip
def test_bad_arguments(change: dict[str, Any], said: str) -> None:
    given = Given(6, 64, 2, 1, 64, torch.float32, False)
    k_cache, v_cache = given.caches
    named: dict[str, Any] = {"x": given.x, "weight": given.weight, "bias": given.bias, "k_cache": k_cache}
    with pytest.raises(ValueError, match=said), torch.no_grad():
        dx.linear_kv_write(**{**named, "v_cache": v_cache, **given.where, **change})


@pytest.mark.parametrize("name", ["x", "weight", "bias", "scale", "k_cache", "q_norm"])
def test_an_input_that_requires_a_gradient_is_named(name: str) -> None:
    given = Given(6, 64, 2, 1, 64, torch.float32, name == "scale", norms=True)
    where = {name: value for name, value in given.where.items() if isinstance(value, Tensor)}
    named = {"x": given.x, "weight": given.weight, "bias": given.bias, "scale": given.scale, **where}
    named |= dict(zip(("k_cache", "v_cache"), given.caches.clone(), strict=True))
    named[name].requires_grad_()
    with pytest.raises(ValueError, match=f"^{name}: requires a gradient, which this op does not have"):
        dx.linear_kv_write(**named)


@everywhere
def test_opcheck() -> None:
    given = Given(5, 64, 4, 2, 64, torch.float32, False, norms=True)
    factors = given.x, given.weight, given.scale, given.bias
    torch.library.opcheck(ops.linear_kv_write, (*factors, *given.caches.unbind(), *given.where.values()))
