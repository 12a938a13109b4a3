"""fp8_linear against its float64 reference, quantisation against its bounds, and models on 8-bit weights."""

from __future__ import annotations

import copy
import importlib
import io
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import OF_AN_OP, every_level, everywhere, golden
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import dparallel_ext as dx
from dparallel_ext import models, reference
from dparallel_ext.models.fp8 import Fp8Linear
from dparallel_ext.ops.linear import FEW, FEW_ON_TENSOR_CORES

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ["llada_tiny_a", "dream_tiny_a", "sdar_tiny_a"]
EVERY = torch.arange(256).to(torch.uint8)
EVERY = EVERY[EVERY % 128 != 127]  # without NaN


def near(found: Tensor, expected: Tensor, sums: Tensor) -> None:
    """The next number of the dtype at most, beside float32's roundings of a sum of these magnitudes."""
    ulp = {torch.float32: 2**-23, torch.bfloat16: 2**-7, torch.float16: 2**-10}[found.dtype]
    assert found.dtype == expected.dtype
    bound = ulp * expected.double().abs() + 2**-19 * sums
    assert bool(((found.double() - expected.double()).abs() <= bound).all())


@every_level
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "width", "out"),
    [
        (1, 64, 16),
        (5, 64, 70),
        (9, 192, 33),
        (32, 1024, 512),
        (64, 128, 8),
        (3, 7, 5),
        (2, 1, 1),
        (70, 96, 40),
        (200, 1024, 300),
    ],
)
@pytest.mark.parametrize("biased", [False, True])
def test_the_reference(rows: int, width: int, out: int, dtype: torch.dtype, biased: bool) -> None:
    x = torch.randn(rows, width).to(dtype)
    weight, scale = dx.quantize_fp8(torch.randn(out, width))
    bias = torch.randn(out).to(dtype) if biased else None
    found = dx.fp8_linear(x, weight, scale, bias)
    expected = reference.fp8_linear(x, weight, scale, bias)
    sums = reference.fp8_linear(x.double().abs(), weight.to(torch.float32).abs(), scale)
    if rows <= FEW or x.is_cpu:
        near(found, expected, sums)
    else:  # of rounded weights
        ulp = {torch.float32: 2**-23, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
        bound = ulp * expected.double().abs() + (ulp / 2 + 2**-19) * sums
        assert bool(((found.double() - expected.double()).abs() <= bound).all())


@every_level
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_weight_there_is(dtype: torch.dtype) -> None:
    """Each of the 254 numbers times 1, exactly, in every place of a vector."""
    values = torch.as_tensor(EVERY).view(torch.float8_e4m3fn)
    weight = torch.zeros(len(values), 64).to(torch.float8_e4m3fn)
    places = torch.arange(len(values)) % 64
    weight.view(torch.uint8)[torch.arange(len(values)), places] = values.view(torch.uint8)
    found = dx.fp8_linear(torch.ones(3, 64).to(dtype), weight, torch.ones(len(values)))
    expected = values.to(torch.float32).to(dtype)
    for row in found:
        assert torch.equal(row, expected)
    identity = torch.eye(64).to(dtype)
    for place, row in enumerate(dx.fp8_linear(identity, weight, torch.ones(len(values)))):
        assert torch.equal(row, torch.where(places == place, expected, torch.zeros_like(expected)))


@every_level
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [4096, 1072])
def test_a_row_is_what_it_is_alone(width: int, dtype: torch.dtype) -> None:
    x = torch.randn(FEW_ON_TENSOR_CORES, width).to(dtype)
    x = x[: FEW if x.is_cuda and dtype == torch.float32 else FEW_ON_TENSOR_CORES]
    weight, scale = dx.quantize_fp8(torch.randn(96, width))
    together = dx.fp8_linear(x, weight, scale)
    for count in (1, 5, 7, 9, 11, 33, 64, len(x) - 5):
        assert torch.equal(dx.fp8_linear(x[:count], weight, scale), together[:count])
    assert torch.equal(dx.fp8_linear(x[40], weight, scale), together[40])


@every_level
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_weight_that_is_no_number_is_not_lost(dtype: torch.dtype) -> None:
    for rows, width in ((1, 64), (3, 65), (40, 64), (40, 130)):
        x = torch.randn(rows, width).to(dtype)
        weight, scale = dx.quantize_fp8(torch.randn(9, width))
        expected = dx.fp8_linear(x, weight, scale)
        for bits in (127, 255):
            weight.view(torch.uint8)[4, width - 1] = bits
            found = dx.fp8_linear(x, weight, scale)
            assert bool(found[:, 4].isnan().all())
            assert torch.equal(found[:, [0, 3, 5, 8]], expected[:, [0, 3, 5, 8]])


@every_level
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [3, FEW, FEW + 1, 300])
def test_sums_that_overflow_before_the_scale(rows: int, dtype: torch.dtype) -> None:
    """In float16 they exceed 65504, and infinities became NaN logits."""
    x = (30 * torch.randn(rows, 1024)).to(dtype)
    weight, scale = dx.quantize_fp8(0.02 * torch.randn(48, 1024))
    bias = torch.randn(48).to(dtype)
    unscaled = reference.fp8_linear(x.float(), weight, torch.ones(48))
    assert float(unscaled.abs().max()) > 65504
    found, expected = (of(x, weight, scale, bias).double() for of in (dx.fp8_linear, reference.fp8_linear))
    error = (found - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert float(error) < {torch.float32: 2**-20, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]


@every_level
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 30, 64, 1040])
def test_widened_weights(width: int, dtype: torch.dtype) -> None:
    weight = torch.as_tensor(EVERY)[torch.randint(len(EVERY), (9, width))].view(torch.float8_e4m3fn)
    scale = torch.rand(9) / 100
    found = torch.ops.dparallel.fp8_widen(weight, scale, torch.zeros(0, dtype=dtype))
    assert torch.equal(found, (weight.to(torch.float32) * scale[:, None]).to(dtype))


@everywhere
def test_strides_and_shapes() -> None:
    weight, scale = dx.quantize_fp8(torch.randn(24, 64))
    wide = torch.randn(6, 200).bfloat16()
    expected = dx.fp8_linear(wide[:, :64].contiguous(), weight, scale)
    assert torch.equal(dx.fp8_linear(wide[:, :64], weight, scale), expected)
    assert torch.equal(
        dx.fp8_linear(wide[:, 8:72], weight, scale), dx.fp8_linear(wide[:, 8:72].clone(), weight, scale)
    )
    assert torch.equal(
        dx.fp8_linear(wide[:, 3:67], weight, scale)[:, 5],
        dx.fp8_linear(wide[:, 3:67].clone(), weight, scale)[:, 5],
    )
    assert torch.equal(dx.fp8_linear(wide[:, :64].view(2, 3, 64), weight, scale).view(6, 24), expected)
    assert dx.fp8_linear(wide[:0, :64], weight, scale).shape == (0, 24)
    assert dx.fp8_linear(wide[:2, :64], weight[:0], scale[:0]).shape == (2, 0)
    gaps = torch.full((70, 69), torch.nan).bfloat16()
    rows = gaps[:, 1:34].copy_(torch.randn(70, 33))
    weight_33, scale_33 = dx.quantize_fp8(torch.randn(24, 33))
    assert bool(dx.fp8_linear(rows, weight_33, scale_33).isfinite().all())
    with torch.no_grad():
        assert bool(dx.linear(rows, weight_33.bfloat16()).isfinite().all())
    bad = wide[:2, :64].clone()
    bad[1, 5] = torch.nan
    found = dx.fp8_linear(bad, weight, scale)
    assert torch.equal(found[0], expected[0])
    assert bool(found[1].isnan().all())


@given(st.integers(0, 2**31), st.sampled_from([1e-30, 1e-6, 1.0, 1e6, 1e30]))
def test_quantisation_is_within_its_bounds(seed: int, size: float) -> None:
    weight = torch.randn(5, 33, generator=torch.Generator().manual_seed(seed)) * size
    weight[2] = 0.0
    quantised, scale = dx.quantize_fp8(weight)
    back = quantised.to(torch.float32) * scale[:, None]
    assert bool(((back - weight).abs() <= weight.abs() / 16 * 1.001 + scale[:, None] * 2**-10).all())
    assert bool((back[2] == 0).all())
    assert bool((quantised.to(torch.float32).abs().amax(1)[[0, 1, 3, 4]] == 448).all())


@pytest.mark.parametrize("name", NAMES)
def test_a_quantised_model_computes_what_its_weights_say(name: str) -> None:
    """As the model whose weights are the quantised ones in full: the layers round nothing else."""
    model = golden.model(name, dtype=torch.float32)
    full = copy.deepcopy(model)
    for block in full.blocks:
        for layer in block.modules():
            if isinstance(layer, nn.Linear):
                weight, scale = dx.quantize_fp8(layer.weight)
                layer.weight.data = weight.to(torch.float32) * scale[:, None]
    assert model.quantize() is model
    assert model.quantized
    assert sum(isinstance(m, Fp8Linear) for m in model.modules()) == 7 * len(model.blocks)
    ids = torch.randint(0, model.shape.vocab_size, (2, 24))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, full(ids).logits, rtol=1e-4, atol=1e-4)
    settings: dict[str, Any] = {"gen_length": 24, "threshold": 1.0}
    settings |= {"cache": "block"} if model.block_length else {"cache": "dual", "block_length": 8}
    a, b = (dx.decode(m, ids[:, :9], **settings).sequences for m in (model, full))
    assert torch.equal(a, b)


@everywhere
@pytest.mark.parametrize("name", NAMES)
def test_error_against_bfloat16(name: str, device: str, record_property: Any) -> None:
    """Of the logits, as a share of their spread; e4m3 has 3 bits of mantissa: 2^-4 / sqrt(3) a weight."""
    model = golden.model(name, dtype=torch.bfloat16, device=device)
    ids = torch.randint(0, model.shape.vocab_size, (4, 32))
    with torch.no_grad():
        before = model(ids).logits.double()
        after = model.quantize()(ids).logits.double()
    error = float((after - before).square().mean().sqrt() / before.std())
    record_property("error", error)
    assert 1e-3 < error < 0.2  # of random weights, which add up nothing but noise


def test_one_product_for_layers_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(x: Tensor, weight: Tensor, *more: Any, **how: Any) -> Tensor:
        calls.append(tuple(weight.shape))
        return dx.fp8_linear(x, weight, *more, **how)

    model = golden.model("llada_tiny_a").quantize()
    s = model.shape
    for module in ("models.fused_weights", "ops.linear_swiglu", "ops.linear_kv_write"):
        monkeypatch.setattr(importlib.import_module(f"dparallel_ext.{module}"), "fp8_linear", counted)
    for moved in (model, model.to("cpu"), model.to(torch.bfloat16), model.to(torch.float32)):
        calls.clear()
        dx.decode(moved, torch.arange(5), gen_length=4, block_length=4, steps=1)
        qkv, gate_up = (s.heads + 2 * s.kv_heads) * s.head_dim, 2 * s.mlp_width
        assert calls == s.layers * [(qkv, s.width), (gate_up, s.width)]
    assert model.blocks[0].q.weight.dtype == torch.float8_e4m3fn  # through all of it
    assert model.blocks[0].q.scale.dtype == torch.float32


def test_memory_is_halved() -> None:
    model = golden.model("llada_tiny_a", dtype=torch.bfloat16)

    def held(blocks: nn.Module) -> int:
        return sum(t.nbytes for t in (*blocks.parameters(), *blocks.buffers()))

    before = held(model.blocks)
    assert held(model.quantize().blocks) < 0.6 * before  # the tiny model's norms and scales weigh


def saved(model: models.Model) -> models.Model:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: models.Model = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved],
    ids=["copy", "pickle", "save"],
)
def test_copies_of_a_quantised_model_decode_as_it_does(
    copied: Callable[[models.Model], models.Model],
) -> None:
    model = golden.model("llada_tiny_a").quantize()
    copy_ = copied(model)
    assert copy_.quantized
    assert not copy_.training
    for one, other in zip(model.buffers(), copy_.buffers(), strict=True):
        assert one.dtype == other.dtype
        assert one.data_ptr() != other.data_ptr()
        assert torch.equal(one.float(), other.float())
    first, second = (
        dx.decode(each, torch.arange(5), gen_length=8, block_length=4) for each in (model, copy_)
    )
    assert torch.equal(first.sequences, second.sequences)


def test_what_a_quantised_model_refuses(tmp_path: Path) -> None:
    model = golden.model("llada_tiny_a").quantize()
    with pytest.raises(ValueError, match="it is quantised"):
        models.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"expected a plain nn\.Linear layer q to quantise, got Fp8Linear"):
        model.quantize()
    with pytest.raises(ValueError, match="x: requires a gradient"):
        model(torch.arange(4)[None])
    broken = golden.model("llada_tiny_a")
    broken.blocks[1].down.weight.data[3, 1] = math.nan
    with pytest.raises(ValueError, match="weight: row 3 holds a number that is not finite"):
        broken.quantize()
    assert not broken.quantized  # nor the layers before


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
def test_quantised_weights_that_cannot_move_stay(bias: bool) -> None:
    """Without a GPU, or without this many."""
    layer, x = Fp8Linear(nn.Linear(64, 16, bias=bias)), torch.randn(2, 64)
    before = layer(x)
    with pytest.raises((RuntimeError, AssertionError)):
        layer.to("cuda:99")
    assert torch.equal(layer(x), before)


def test_moving_quantised_weights_takes_no_memory_of_wider_ones() -> None:
    layer = Fp8Linear(nn.Linear(64, 64))
    sizes: list[int] = []

    class Counts(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            if isinstance(made, Tensor):
                sizes.append(made.nbytes)
            return made

    with Counts():
        layer.to(torch.bfloat16)
    assert max(sizes) <= layer.weight.nbytes


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x": torch.zeros(2, 64, dtype=torch.int64)}, "x: expected float32, bfloat16 or float16"),
        ({"x": torch.zeros(2, 32)}, r"weight: expected torch.float8_e4m3fn \(out, 32\)"),
        ({"weight": torch.zeros(8, 64)}, "weight: expected torch.float8_e4m3fn .* got torch.float32"),
        ({"scale": torch.ones(7)}, r"scale: expected float32 \(8,\), got .* \(7,\)"),
        ({"scale": torch.ones(8).double()}, "scale: expected float32"),
        ({"scale": torch.ones(8, device="meta")}, "scale: expected on cpu as x, got meta"),
        ({"bias": torch.zeros(7)}, r"bias: expected torch.float32 \(8,\)"),
        ({"bias": torch.zeros(8).bfloat16()}, "bias: expected torch.float32"),
        ({"x": torch.zeros(2, 64, requires_grad=True)}, "x: requires a gradient"),
    ],
)
def test_bad_arguments(change: dict[str, Any], said: str) -> None:
    weight, scale = dx.quantize_fp8(torch.randn(8, 64))
    given: dict[str, Any] = {"x": torch.zeros(2, 64), "weight": weight, "scale": scale, "bias": None}
    with pytest.raises(ValueError, match=said):
        dx.fp8_linear(**{**given, **change})


def test_bad_weights() -> None:
    with pytest.raises(ValueError, match=r"weight: expected floats \(out, in\), got .* \(3,\)"):
        dx.quantize_fp8(torch.zeros(3))
    with pytest.raises(ValueError, match="weight: row 1 holds a number that is not finite in float32"):
        dx.quantize_fp8(torch.tensor([[1.0], [1e300]], dtype=torch.float64))
    with pytest.raises(OF_AN_OP, match=r"weight: expected .*, 9\), got "):
        torch.ops.dparallel.fp8_linear(
            torch.zeros(2, 9), torch.zeros(3, 8).to(torch.float8_e4m3fn), torch.ones(3), None
        )


@everywhere
def test_opcheck() -> None:
    weight, scale = dx.quantize_fp8(torch.randn(24, 64))
    x = torch.randn(5, 64)
    tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    # not test_schema, which multiplies what it is given, and float8 cannot be multiplied
    torch.library.opcheck(torch.ops.dparallel.fp8_linear, (x, weight, scale, None), test_utils=tests)
    torch.library.opcheck(torch.ops.dparallel.fp8_widen, (weight, scale, x), test_utils=tests)
