"""rms_norm against its float64 reference and a module: dtypes, strides, residual, bad input."""

from __future__ import annotations

import pytest
import torch
from conftest import OF_AN_OP, every_level, everywhere
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def case(seed: int, dtype: torch.dtype, shape: tuple[int, ...], gap: int) -> dict[str, Tensor]:
    """x and delta with rows `gap` numbers apart, weight and bias."""
    g = torch.Generator().manual_seed(seed)

    def rows() -> Tensor:
        wide = torch.randn(*shape[:-1], shape[-1] + gap, generator=g) * 3
        return wide.to(dtype)[..., : shape[-1]]

    weight, bias = (torch.randn(shape[-1], generator=g).to(dtype) for _ in "wb")
    return {"x": rows(), "delta": rows(), "weight": weight, "bias": bias}


def module(
    x: Tensor, weight: Tensor, eps: float, bias: Tensor | None, delta: Tensor
) -> tuple[Tensor, Tensor]:
    """As the published models: each operation in torch, one after another."""
    x = x + delta
    y = x.float()
    y = weight * (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return (y if bias is None else y + bias), x


@every_level
@given(
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from(DTYPES),
    leading=st.sampled_from([(), (0,), (1,), (7,), (3, 0), (2, 5), (2, 3, 2)]),
    width=st.sampled_from([1, 3, 16, 31, 64, 128, 192, 4096]),
    gap=st.sampled_from([0, 0, 1, 8]),
    eps=st.sampled_from([1e-5, 1e-6, 0.3]),
    biased=st.booleans(),
    adds=st.booleans(),
)
def test_it_does_what_its_reference_does(seed, dtype, leading, width, gap, eps, biased, adds) -> None:
    given = case(seed, dtype, (*leading, width), gap)
    if not biased:
        del given["bias"]
    if not adds:
        del given["delta"]
    before = {name: t.clone() for name, t in given.items()}
    ours, by_reference = dx.rms_norm(**given, eps=eps), reference.rms_norm(**given, eps=eps)
    for name, t in given.items():
        assert torch.equal(t, before[name])
    if adds:
        assert torch.equal(ours[1], by_reference[1])
        ours, by_reference = ours[0], by_reference[0]
    assert ours.is_contiguous()
    assert (ours.dtype, ours.shape) == (dtype, before["x"].shape)
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    torch.testing.assert_close(ours, by_reference, rtol=tolerance, atol=tolerance)


@every_level
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
def test_it_rounds_where_the_module_does(dtype: torch.dtype, biased: bool) -> None:
    """In 16 bits the same numbers, save where float32 sums in another order tip a rounding."""
    given = case(0, dtype, (200, 4096), 0)
    if not biased:
        given["bias"] = None
    y, s = dx.rms_norm(**given, eps=1e-5)
    expected, stream = module(**given, eps=1e-5)
    assert torch.equal(s, stream)
    torch.testing.assert_close(y, expected, rtol=2e-2 if dtype != torch.float32 else 2e-6, atol=1e-2)
    if dtype != torch.float32:
        assert (y != expected).float().mean() < 1e-3
        # Were the product with the weight not rounded by itself, a good part would differ.
        x = stream.double()
        once = given["weight"].double() * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)
        once = (once if not biased else once + given["bias"].double()).to(dtype)
        assert (expected != once).float().mean() > 0.05


@everywhere
def test_heads_of_a_fused_projection() -> None:
    """Per-head norms (Qwen3): rows in two strides, without a copy."""
    fused = torch.randn(5, (4 + 2 * 2) * 16)
    q = fused[:, : 4 * 16].unflatten(-1, (4, 16))
    weight = torch.rand(16)
    torch.testing.assert_close(dx.rms_norm(q, weight, eps=1e-6), reference.rms_norm(q, weight, eps=1e-6))
    assert torch.equal(dx.rms_norm(q, weight, eps=1e-6), dx.rms_norm(q.contiguous(), weight, eps=1e-6))


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    given = case(1, dtype, (300, 640), 0)
    y, s = dx.rms_norm(**given, eps=1e-5)
    for rows in (slice(0, 1), slice(17, 18), slice(100, 290)):
        part = {n: t[rows] if t.ndim == 2 else t for n, t in given.items()}
        alone, stream = dx.rms_norm(**part, eps=1e-5)
        assert torch.equal(alone, y[rows])
        assert torch.equal(stream, s[rows])


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_pass_through(dtype: torch.dtype) -> None:
    x = torch.randn(3, 40).to(dtype)
    x[0, 33], x[1, 2] = torch.nan, torch.inf
    weight = torch.ones(40, dtype=dtype)
    y = dx.rms_norm(x, weight, eps=1e-5)
    expected = module(x, weight, 1e-5, None, torch.zeros_like(x))[0]
    assert torch.equal(y.isnan(), expected.isnan())
    assert y[0].isnan().all()
    assert y[1, 2].isnan()
    assert torch.isfinite(y[2]).all()
    assert torch.equal(dx.rms_norm(torch.zeros_like(x), weight, eps=1e-5), torch.zeros_like(x))


@everywhere
def test_opcheck() -> None:
    given = case(1, torch.float32, (9, 24), 3)
    x, delta, weight, bias = (given[n] for n in ("x", "delta", "weight", "bias"))
    torch.library.opcheck(torch.ops.dparallel.rms_norm, (x, delta, weight, bias, 1e-5))
    torch.library.opcheck(torch.ops.dparallel.rms_norm, (x.unflatten(0, (3, 3)), None, weight, None, 1e-5))


@everywhere
def test_compiled() -> None:
    given = case(1, torch.bfloat16, (9, 24), 0)
    run = torch.compile(lambda x, d, w: dx.rms_norm(x, w, eps=1e-5, delta=d), fullgraph=True, backend="eager")
    y, s = run(given["x"], given["delta"], given["weight"])
    expected, stream = dx.rms_norm(given["x"], given["weight"], eps=1e-5, delta=given["delta"])
    assert torch.equal(y, expected)
    assert torch.equal(s, stream)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(9, 16, dtype=torch.float64)}, "x: expected float32, bfloat16 or float16"),
        ({"x": torch.zeros(())}, r"x: expected \(\.\.\., width\) with width >= 1, got \(\)"),
        ({"x": torch.zeros(9, 0)}, r"x: expected \(\.\.\., width\) with width >= 1, got \(9, 0\)"),
        ({"weight": torch.zeros(15)}, r"weight: expected torch.float32 \(16,\) on cpu, got .* \(15,\)"),
        ({"weight": torch.zeros(16).bfloat16()}, "weight: expected torch.float32"),
        ({"bias": torch.zeros(1, 16)}, r"bias: expected torch.float32 \(16,\)"),
        ({"delta": torch.zeros(8, 16)}, r"delta: expected torch.float32 \(9, 16\) on cpu"),
        ({"delta": torch.zeros(9, 16, device="meta")}, "delta: expected .* on cpu, got .* on meta"),
        ({"weight": torch.zeros(16, requires_grad=True)}, "weight: requires a gradient"),
        ({"x": torch.zeros(9, 16, requires_grad=True)}, "x: requires a gradient"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    given = {"x": torch.zeros(9, 16), "weight": torch.zeros(16), **change}
    with pytest.raises(ValueError, match=message):
        dx.rms_norm(**given, eps=1e-5)
    with pytest.raises(TypeError, match="x: expected a Tensor, got list"):
        dx.rms_norm([1.0], torch.zeros(1), eps=1e-5)  # type: ignore[call-overload]


def test_a_direct_call_out_of_bounds_is_refused() -> None:
    """torch.ops keeps memory safe whoever calls."""
    x, weight = torch.zeros(9, 16), torch.zeros(16)
    for delta, w, bias, message in (
        (torch.zeros(8, 16), weight, None, "delta"),
        (None, torch.zeros(15), None, "weight"),
        (None, weight, torch.zeros(16).half(), "bias"),
    ):
        with pytest.raises(OF_AN_OP, match=message):
            torch.ops.dparallel.rms_norm(x, delta, w, bias, 1e-5)
    with pytest.raises(OF_AN_OP, match="x: expected float32"):
        torch.ops.dparallel.rms_norm(x.double(), None, weight.double(), None, 1e-5)
