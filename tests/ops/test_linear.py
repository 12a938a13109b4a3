"""linear against its float64 reference: the kernel, and what is torch's product."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import EMULATED, every_level, everywhere, golden
from torch import Tensor
from torch.autograd import forward_ad

import dparallel_ext as dx
from dparallel_ext import reference
from dparallel_ext.ops.linear import FEW, LARGE

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
op = torch.ops.dparallel.linear


def near(found: Tensor, expected: Tensor, sums: Tensor) -> None:
    """The next number of the dtype at most, beside float32's roundings of a sum of these magnitudes."""
    ulp = {torch.float32: 2**-23, torch.bfloat16: 2**-7, torch.float16: 2**-10}[found.dtype]
    assert found.dtype == expected.dtype
    bound = ulp * expected.double().abs() + 2**-19 * sums.double()
    assert bool(((found.double() - expected.double()).abs() <= bound).all())


@every_level
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "width", "out"),
    [
        (1, 64, 16), (5, 64, 70), (9, 192, 33), (32, 1024, 512), (33, 1088, 130), (64, 128, 8), (3, 7, 5),
        (2, 1, 1), (70, 96, 40), (200, 128, 300),
    ],
)  # fmt: skip
@pytest.mark.parametrize("biased", [False, True])
def test_the_reference(rows: int, width: int, out: int, dtype: torch.dtype, biased: bool) -> None:
    """The op takes any number of rows, and of columns, which `dx.linear` leaves to torch."""
    x, weight = torch.randn(rows, width).to(dtype), (torch.randn(out, width) / width**0.5).to(dtype)
    bias = torch.randn(out).to(dtype) if biased else None
    expected = reference.linear(x, weight, bias)
    sums = reference.linear(x.double().abs(), weight.double().abs()) + (0 if bias is None else bias.abs())
    near(op(x, weight, bias, False), expected, sums)
    with torch.no_grad():
        near(dx.linear(x, weight, bias, constant=True), expected, sums)


@every_level
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_a_row_is_what_it_is_alone(dtype: torch.dtype) -> None:
    x, weight = torch.randn(FEW, 1088).to(dtype), torch.randn(96, 1088).to(dtype)
    together = op(x, weight, None, False)
    for count in (1, 7, 9, 33, 59):
        assert torch.equal(op(x[:count], weight, None, False), together[:count])
        with torch.no_grad():
            if x.is_cuda and torch.cuda.get_device_capability()[0] in (9, 10):  # others take torch's product
                assert torch.equal(dx.linear(x[:count], weight), together[:count])
    assert torch.equal(op(x[40:41], weight, None, False), together[40:41])


@every_level
def test_strides_and_shapes() -> None:
    wide, weight = torch.randn(6, 200).bfloat16(), torch.randn(24, 64).bfloat16()
    expected = op(wide[:, :64].contiguous(), weight, None, False)
    assert torch.equal(op(wide[:, :64], weight, None, False), expected)
    near(op(wide[:, 3:67], weight, None, False), reference.linear(wide[:, 3:67], weight), 64 * torch.ones(24))
    assert op(wide[:0, :64], weight, None, False).shape == (0, 24)
    assert op(wide[:2, :64], weight[:0], None, False).shape == (2, 0)
    with torch.no_grad():
        assert dx.linear(wide[:, :64].view(2, 3, 64), weight).shape == (2, 3, 24)
        assert dx.linear(wide[0, :64], weight).shape == (24,)
        assert dx.linear(wide[:0, :64], weight).shape == (0, 24)
    bad = wide[:2, :64].clone()
    bad[1, 5] = torch.nan
    found = op(bad, weight, None, False)
    assert torch.equal(found[0], expected[0])
    assert bool(found[1].isnan().all())


def test_bfloat16_on_a_cpu_is_the_kernels_where_there_are_no_instructions_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, weight = torch.randn(70, 200).bfloat16(), torch.randn(33, 200).bfloat16()
    module = importlib.import_module("dparallel_ext.ops.linear")
    with torch.no_grad():
        for fast in (False, True):
            monkeypatch.setattr(module, "fast_bfloat16", lambda device, fast=fast: fast)
            expected = F.linear(x, weight) if fast else op(x, weight, None, False)
            assert torch.equal(dx.linear(x, weight), expected)
            assert torch.equal(dx.linear(x.half(), weight.half()), F.linear(x.half(), weight.half()))


@every_level
def test_float32_on_a_cpu_is_the_kernels_for_few_rows_of_large_weights() -> None:
    """Each row then has the bits that it has alone, where torch's are other ones."""
    x, weight, bias = torch.randn(FEW + 1, 1024), torch.randn(LARGE // 1024, 1024), torch.randn(LARGE // 1024)
    if x.is_cuda or dx.simd_level() == "portable":  # it is torch's
        with torch.no_grad():
            assert torch.equal(dx.linear(x[:2], weight, bias), F.linear(x[:2], weight, bias))
        return
    alone = torch.cat([op(row[None], weight, bias, False) for row in x])
    with torch.no_grad():
        for count in (1, 2, 3, 9, FEW):
            assert torch.equal(dx.linear(x[:count], weight, bias), alone[:count])
            assert not torch.equal(F.linear(x[:count], weight, bias), alone[:count])
        assert torch.equal(dx.linear(x[:6].view(2, 3, -1), weight, bias).flatten(0, 1), alone[:6])
        assert torch.equal(dx.linear(x, weight, bias), F.linear(x, weight, bias))
        small = weight[:-1]
        assert torch.equal(dx.linear(x[:2], small), F.linear(x[:2], small))
        with forward_ad.dual_level():  # which has a derivative of torch's product alone
            y = dx.linear(forward_ad.make_dual(x[:2], x[1:3]), weight)
            torch.testing.assert_close(forward_ad.unpack_dual(y).tangent, F.linear(x[1:3], weight))
    assert torch.equal(dx.linear(x[:2], weight, bias), F.linear(x[:2], weight, bias))  # with a gradient


@everywhere
def test_where_a_gradient_or_autocast_is_wanted_it_is_torchs() -> None:
    x, weight = torch.randn(3, 64).bfloat16(), torch.randn(8, 64).bfloat16().requires_grad_()
    y = dx.linear(x, weight)
    assert torch.equal(y, F.linear(x, weight))
    y.sum().backward()
    assert weight.grad is not None
    with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16):
        assert dx.linear(x.float(), weight.detach()).dtype == torch.bfloat16


@everywhere
def test_a_tensor_that_is_more_than_its_numbers_is_torchs() -> None:
    """As a sharded or a quantised weight is."""

    class Special(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is F.linear:
                return torch.full((3, 8), 5.0)
            return super().__torch_function__(func, types, args, kwargs or {})

    x, weight = torch.randn(3, 64).bfloat16(), torch.randn(8, 64).bfloat16().as_subclass(Special)
    with torch.no_grad():
        assert float(dx.linear(x, weight)[0, 0]) == 5.0


@pytest.mark.skipif(EMULATED, reason="models are not there")
def test_layers_of_a_model_go_through_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four products a layer and, on a CPU, the head; what a hook or an adapter changes is left alone."""
    model, widths = golden.model("llada_tiny_a"), []

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, constant: bool) -> Tensor:
        assert constant
        widths.append(len(weight))
        return dx.linear(x, weight, bias, constant=constant)

    for name in ("models.fused_weights", "ops.linear_swiglu", "ops.linear_kv_write"):
        monkeypatch.setattr(importlib.import_module(f"dparallel_ext.{name}"), "linear", counted)
    model.fuse()
    settings: dict[str, Any] = {"gen_length": 4, "block_length": 4, "steps": 1}
    before = dx.decode(model, torch.arange(5), **settings).sequences
    s = model.shape
    qkv, gate_up = (s.heads + 2 * s.kv_heads) * s.head_dim, 2 * s.mlp_width
    assert widths == [*s.layers * [qkv, s.width, gate_up, s.width], s.embedding_size]
    widths.clear()
    model.blocks[0].down.register_forward_hook(lambda *_: None)
    assert torch.equal(dx.decode(model, torch.arange(5), **settings).sequences, before)
    assert len(widths) == 4 * s.layers  # of 4 a layer and the head, all but that


@pytest.mark.parametrize(
    ("weight", "bias", "said"),
    [
        (
            torch.zeros(8, 32),
            None,
            r"weight: expected torch.float32 \(out, 64\), got torch.float32 \(8, 32\)",
        ),
        (torch.zeros(64), None, r"weight: expected torch.float32 \(out, 64\), got torch.float32 \(64,\)"),
        (torch.zeros(8, 64).half(), None, r"weight: expected torch.float32 .*, got torch.float16 \(8, 64\)"),
        (
            torch.zeros(8, 64),
            torch.zeros(8).half(),
            r"bias: expected torch.float32 \(8,\), got torch.float16",
        ),
        (
            torch.zeros(8, 64),
            torch.zeros(7),
            r"bias: expected torch.float32 \(8,\), got torch.float32 \(7,\)",
        ),
    ],
)
def test_bad_arguments(weight: Tensor, bias: Tensor | None, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        dx.linear(torch.zeros(2, 64), weight, bias)


@everywhere
def test_opcheck() -> None:
    x, weight, bias = torch.randn(5, 64), torch.randn(24, 64), torch.randn(24)
    torch.library.opcheck(op, (x, weight, bias))
    torch.library.opcheck(op, (x.bfloat16(), weight.bfloat16(), None))
