"""linear, the product of few 16-bit rows, against float64; and where it is taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import STAND_IN
from torch import Tensor

from dparallel_ext import layers
from dparallel_ext.models import side_by_side

DTYPES = [torch.bfloat16, torch.float16]
DEVICE = "cpu" if STAND_IN else "cuda"


@pytest.fixture
def on_gpu(device: str) -> None:
    """The kernel is for GPUs, and for what stands in for one."""
    if device == "cpu" and not STAND_IN:
        pytest.skip("the kernel is for GPUs")


kernel = pytest.mark.usefixtures("on_gpu")


def own(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    found: Tensor = torch.ops.dparallel.linear(x, weight, bias)
    return found


def numbers(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


@kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("rows", "width", "out"),
    [(1, 64, 1), (8, 128, 33), (9, 640, 130), (33, 192, 700), (64, 2560, 96), (32, 1088, 320), (5, 64, 1500)],
)
def test_the_sum_in_float64(rows: int, width: int, out: int, biased: bool, dtype: torch.dtype) -> None:
    x, weight, bias = numbers(rows, width, dtype=dtype), numbers(out, width, dtype=dtype), None
    expected, sums = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    if biased:
        bias = numbers(out, dtype=dtype)
        expected, sums = expected + bias.double(), sums + bias.double().abs()
    found = own(x, weight, bias)
    assert (found.dtype, found.shape) == (dtype, expected.shape)
    ulp = 2**-8 if dtype == torch.bfloat16 else 2**-11
    bound = ulp * expected.abs() + 2**-20 * sums
    assert bool(((found.double() - expected).abs() <= bound).all())


@kernel
@pytest.mark.parametrize(("width", "out"), [(4096, 96), (2560, 200), (128, 800)])
def test_a_row_is_what_it_is_alone(width: int, out: int) -> None:
    x, weight = numbers(64, width), numbers(out, width)
    together = own(x, weight)
    for count in (1, 7, 9, 32, 33):
        assert torch.equal(own(x[:count], weight), together[:count])
    assert torch.equal(own(x[40:41], weight)[0], together[40])


@kernel
def test_strides_and_bad_rows() -> None:
    weight, wide = numbers(24, 64), numbers(6, 200)
    expected = own(wide[:, :64].contiguous(), weight)
    assert torch.equal(own(wide[:, :64], weight), expected)
    assert own(wide[:0, :64], weight).shape == (0, 24)
    assert own(wide[:2, :64], weight[:0]).shape == (2, 0)
    bad = wide[:2, :64].clone()
    bad[1, 5] = torch.nan
    found = own(bad, weight)
    assert torch.equal(found[0], expected[0])
    assert bool(found[1].isnan().all())
    bad_weight = weight.clone()
    bad_weight[3, 7] = torch.inf
    found = own(wide[:, :64], bad_weight)
    assert bool(found[:, 3].isinf().all())
    kept = [i for i in range(24) if i != 3]
    assert torch.equal(found[:, kept], expected[:, kept])


@kernel
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x": torch.zeros(65, 64)}, "x: expected at most 64 rows, got 65"),
        ({"x": torch.zeros(2, 96), "weight": torch.zeros(8, 96)}, "a multiple of 64 numbers, got 96"),
        ({"x": torch.zeros(2, 200)[:, 1:65]}, "at multiples of 16 bytes"),
        ({"x": torch.zeros(2, 68)[:, :64]}, "at multiples of 16 bytes"),
        ({"weight": torch.zeros(8, 128)}, "weight: expected size 64"),
        ({"bias": torch.zeros(7)}, "bias: expected size 8"),
    ],
)
def test_bad_arguments(change: dict[str, Any], said: str) -> None:
    given: dict[str, Any] = {"x": torch.zeros(2, 64), "weight": torch.zeros(8, 64), "bias": None, **change}
    with pytest.raises(RuntimeError, match=said):
        own(*(t if t is None else cast_in_place(t) for t in given.values()))


def cast_in_place(t: Tensor) -> Tensor:
    """In bfloat16, with the strides and the offset that it has."""
    whole = torch.zeros(t.untyped_storage().nbytes() // 4, device=DEVICE, dtype=torch.bfloat16)
    return whole.as_strided(t.shape, t.stride(), t.storage_offset())


@kernel
def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.dparallel.linear, (numbers(5, 64), numbers(24, 64), numbers(24)))


def test_all_else_is_the_product_of_torch() -> None:
    x, weight, bias = torch.randn(3, 64), torch.randn(8, 64), torch.randn(8)
    with torch.no_grad():
        assert torch.equal(layers.linear(x, weight, bias), F.linear(x, weight, bias))
    weight.requires_grad_()
    layers.linear(x, weight, bias).sum().backward()
    assert weight.grad is not None


@kernel
def test_where_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    if STAND_IN:
        pytest.skip("models take the kernel on GPUs alone")
    capability = torch.cuda.get_device_capability()
    monkeypatch.setattr(layers, "OWN_PRODUCTS", {capability: (64 * 64, 2**28)})
    x, weight = numbers(2, 5, 128), numbers(64, 128)
    layer = torch.nn.Linear(128, 64, bias=False, device=DEVICE, dtype=torch.bfloat16)
    layer.weight.data.copy_(weight)
    with torch.no_grad():
        assert layers._own_product(x, weight, None)
        expected = own(x.view(10, 128), weight).view(2, 5, 64)
        assert torch.equal(layers.linear(x, weight), expected)
        assert torch.equal(side_by_side.call(layer, x), expected)
        assert torch.equal(side_by_side.project(x, [layer])[0], expected)
        for other in (x.expand(9, 2, 5, 128), x[..., ::2].repeat(1, 1, 2), x.float()):
            if other.dtype == weight.dtype:
                assert torch.equal(layers.linear(other, weight), F.linear(other, weight))
    monkeypatch.setattr(layers, "OWN_PRODUCTS", {})
    with torch.no_grad():
        assert torch.equal(layers.linear(x, weight), F.linear(x, weight))
