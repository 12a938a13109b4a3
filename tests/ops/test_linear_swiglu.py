"""linear_swiglu against its two steps, to the bit: the op on every device, and `dx.linear_swiglu`."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from conftest import EMULATED, every_level, everywhere, golden
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext import reference

ops = torch.ops.dparallel
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def factors(rows: int, width: int, out: int, dtype: torch.dtype, bytewise: bool) -> dict[str, Any]:
    full = torch.randn(2 * out, width) / width**0.5
    weight, scale = dx.quantize_fp8(full) if bytewise else (full.to(dtype), None)
    bias = torch.randn(2 * out).to(dtype)
    return {"x": torch.randn(rows, width).to(dtype), "weight": weight, "bias": bias, "scale": scale}


def in_steps(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    if scale is None:
        return dx.swiglu(ops.linear(x, weight, bias, False))
    return dx.swiglu(ops.fp8_linear(x, weight, scale, bias, False))


@every_level
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bytewise", [False, True])
@pytest.mark.parametrize(
    ("rows", "width", "out"),
    [(1, 64, 32), (5, 128, 96), (33, 1088, 160), (64, 128, 512), (3, 7, 5), (70, 64, 64), (9, 192, 1),
     (4, 64, 33)],
)  # fmt: skip
def test_it_is_its_steps(rows: int, width: int, out: int, bytewise: bool, dtype: torch.dtype) -> None:
    given = factors(rows, width, out, dtype, bytewise)
    x, weight, bias, scale = given.values()
    for added in (bias, None):
        found = ops.linear_swiglu(x, weight, scale, added, False)
        assert torch.equal(found, in_steps(x, weight, scale, added))
    together = ops.linear_swiglu(x, weight, scale, bias, False)
    assert torch.equal(ops.linear_swiglu(x[-1:], weight, scale, bias, False), together[-1:])
    expected = reference.linear_swiglu(x, weight, bias, scale=scale)
    with torch.no_grad():
        found = dx.linear_swiglu(x, weight, bias, scale=scale, constant=True)
    torch.testing.assert_close(found, expected, rtol=0.04, atol=0.04)


@pytest.mark.parametrize("bytewise", [False, True])
def test_shapes_where_the_product_ends_in_more(monkeypatch: pytest.MonkeyPatch, bytewise: bool) -> None:
    """As on a GPU, which has weights of 8 bits for no rows, too."""
    given = factors(6, 64, 32, torch.bfloat16, bytewise)
    expected = in_steps(*(given[name] for name in ("x", "weight", "scale", "bias")))
    module = importlib.import_module("dparallel_ext.ops.linear_swiglu")
    monkeypatch.setattr(module, "fuses_epilogue", lambda *_: True)
    for shape in ((6,), (2, 3)):
        x = given["x"].view(*shape, 64)
        assert torch.equal(dx.linear_swiglu(**{**given, "x": x}), expected.view(*shape, 32))
    assert torch.equal(dx.linear_swiglu(**{**given, "x": given["x"][2]}), expected[2])
    for shape in ((0,), (2, 0)):
        assert dx.linear_swiglu(**{**given, "x": given["x"][:0].view(*shape, 64)}).shape == (*shape, 32)


@everywhere
@pytest.mark.parametrize("bytewise", [False, True])
def test_strides_and_shapes(bytewise: bool) -> None:
    given = factors(6, 200, 32, torch.bfloat16, bytewise)
    expected = dx.linear_swiglu(**given)
    wide = torch.randn(6, 300).bfloat16()
    wide[:, 3:203] = given["x"]
    assert torch.equal(dx.linear_swiglu(**{**given, "x": wide[:, 3:203]}), expected)
    assert torch.equal(
        dx.linear_swiglu(**{**given, "x": given["x"].view(2, 3, 200)}), expected.view(2, 3, 32)
    )
    assert dx.linear_swiglu(**{**given, "x": given["x"][:0]}).shape == (0, 32)
    assert dx.linear_swiglu(**{**given, "x": given["x"][0]}).shape == (32,)


@pytest.mark.skipif(EMULATED, reason="models are not there")
@pytest.mark.parametrize("name", ["llada_tiny_a", "dream_tiny_a"])
@pytest.mark.parametrize("bytewise", [False, True])
def test_a_model_whose_products_end_in_more_decodes_the_same(
    monkeypatch: pytest.MonkeyPatch, name: str, bytewise: bool
) -> None:
    """As on a GPU; also where a pass needs keys themselves."""
    model = golden.model(name, dtype=torch.bfloat16).fuse()
    if bytewise:
        model.quantize()
    settings: dict[str, Any] = {"gen_length": 16, "block_length": 8, "cache": "dual", "threshold": 0.5}
    monkeypatch.setattr("dparallel_ext.models.fused_weights.linear", product)
    for op in ("linear_swiglu", "linear_kv_write"):
        monkeypatch.setattr(importlib.import_module(f"dparallel_ext.ops.{op}"), "linear", product)
    expected = dx.decode(model, torch.arange(9), **settings)
    for op in ("linear_swiglu", "linear_kv_write"):
        module = importlib.import_module(f"dparallel_ext.ops.{op}")
        monkeypatch.setattr(module, "fuses_epilogue", lambda *_: True)
    found = dx.decode(model, torch.arange(9), **settings)
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(found.nfe, expected.nfe)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, constant: bool = False) -> Tensor:
    out: Tensor = ops.linear(x.reshape(-1, x.shape[-1]), weight, bias, constant)
    return out.view(*x.shape[:-1], -1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x": torch.zeros(2, 64, dtype=torch.int64)}, "x: expected float32, bfloat16 or float16"),
        ({"x": torch.zeros(2, 64, requires_grad=True)}, "x: requires a gradient"),
        ({"weight": torch.zeros(8, 32)}, r"weight: expected torch.float32 \(out, 64\), got .* \(8, 32\)"),
        ({"weight": torch.zeros(7, 64), "bias": None}, "the gate's rows and as many of up, got"),
        ({"bias": torch.zeros(7)}, r"bias: expected torch.float32 \(8,\)"),
        ({"scale": torch.ones(8)}, r"weight: expected torch.float8_e4m3fn \(out, 64\), got torch.float32"),
        ({"weight": torch.zeros(8, 64).half()}, r"weight: expected torch.float32 .*, got torch.float16"),
        ({"weight": torch.zeros(8, 64, requires_grad=True)}, "weight: requires a gradient"),
    ],
)  # fmt: skip
def test_bad_arguments(change: dict[str, Any], said: str) -> None:
    given: dict[str, Any] = {"x": torch.zeros(2, 64), "weight": torch.zeros(8, 64), "bias": torch.zeros(8)}
    with pytest.raises(ValueError, match=said):
        dx.linear_swiglu(**{**given, **change})


@everywhere
def test_opcheck() -> None:
    x, weight, bias, _ = factors(5, 64, 32, torch.float32, False).values()
    torch.library.opcheck(ops.linear_swiglu, (x, weight, None, bias))
    torch.library.opcheck(ops.linear_swiglu, (x.bfloat16(), weight.bfloat16(), None, None))
