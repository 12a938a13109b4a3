"""swiglu against its float64 reference and torch's two operations: dtypes, strides, extremes, bad input."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import OF_AN_OP, every_level, everywhere
from hypothesis import given
from hypothesis import strategies as st

import dparallel_ext as dx
from dparallel_ext import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@every_level
@given(
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from(DTYPES),
    leading=st.sampled_from([(), (0,), (1,), (7,), (3, 0), (2, 5), (2, 3, 2)]),
    width=st.sampled_from([1, 3, 16, 31, 512, 1536, 12288]),
    spread=st.sampled_from([0.1, 3.0, 40.0]),
    fused=st.booleans(),
)
def test_it_does_what_its_reference_does(seed, dtype, leading, width, spread, fused) -> None:
    g = torch.Generator().manual_seed(seed)
    both = (torch.randn(*leading, 2 * width, generator=g) * spread).to(dtype)
    gate, up = both.chunk(2, -1)
    before = both.clone()
    ours = dx.swiglu(both) if fused else dx.swiglu(gate, up)
    assert torch.equal(both, before)
    assert ours.is_contiguous()
    assert (ours.dtype, ours.shape) == (dtype, gate.shape)
    by_reference = reference.swiglu(both)
    assert torch.equal(by_reference, reference.swiglu(gate, up))
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    torch.testing.assert_close(
        ours, by_reference, rtol=tolerance, atol=1e-7 if dtype != torch.float16 else 1e-6
    )


@every_level
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_rounds_where_torch_does(dtype: torch.dtype) -> None:
    """In 16 bits the same numbers, save where an exponential's last bit tips a rounding."""
    both = (torch.randn(200, 8192) * 3).to(dtype)
    gate, up = both.chunk(2, -1)
    ours, expected = dx.swiglu(both), F.silu(gate) * up
    torch.testing.assert_close(ours, expected, rtol=2e-2 if dtype != torch.float32 else 2e-6, atol=1e-6)
    if dtype != torch.float32:
        assert (ours != expected).float().mean() < 1e-3
        once = (F.silu(gate.double()) * up.double()).to(dtype)  # silu not rounded by itself
        assert (expected != once).float().mean() > 0.05


@every_level
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_gate(dtype: torch.dtype) -> None:
    """All bfloat16 numbers (of float32 and float16 those that are), infinities and NaN as F.silu."""
    gate = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).to(dtype)
    ours, expected = dx.swiglu(gate, torch.ones_like(gate)), F.silu(gate)
    assert torch.equal(ours.isnan(), expected.isnan())
    kept = ~expected.isnan()
    step = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-9}[dtype]
    torch.testing.assert_close(
        ours[kept], expected[kept], rtol=step, atol=1e-34 if dtype != DTYPES[2] else 1e-7
    )
    assert dx.swiglu(torch.tensor([math.inf, 5.0]), torch.tensor([1.0, -math.inf])).tolist() == [
        math.inf,
        -math.inf,
    ]


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    both = torch.randn(300, 640).to(dtype)
    together = dx.swiglu(both)
    for rows in (slice(0, 1), slice(17, 18), slice(100, 290)):
        assert torch.equal(dx.swiglu(both[rows]), together[rows])


@everywhere
def test_opcheck() -> None:
    gate, up = torch.randn(2, 9, 30)[..., :24]
    torch.library.opcheck(torch.ops.dparallel.swiglu, (gate, up))
    torch.library.opcheck(torch.ops.dparallel.swiglu, tuple(torch.randn(3, 4, 24).chunk(2, -1)))


@pytest.mark.parametrize(
    ("gate", "up", "message"),
    [
        (torch.zeros(9, 15), None, "gate: expected an even size, two halves, without up, got 15"),
        (torch.zeros(9, 16, dtype=torch.int64), None, "gate: expected float32, bfloat16 or float16"),
        (torch.zeros(9, 0), None, r"gate: expected \(\.\.\., width\) with width >= 1, got \(9, 0\)"),
        (torch.zeros(9, 16), torch.zeros(9, 8), r"up: expected torch.float32 \(9, 16\) on cpu"),
        (torch.zeros(9, 16), torch.zeros(9, 16).half(), "up: expected torch.float32 .*got torch.float16"),
        (torch.zeros(9, 16, requires_grad=True), None, "gate: requires a gradient"),
        (torch.zeros(9, 16), torch.zeros(9, 16, requires_grad=True), "up: requires a gradient"),
    ],
)
def test_bad_arguments_are_named(gate, up, message) -> None:
    with pytest.raises(ValueError, match=message):
        dx.swiglu(gate, up)
    with pytest.raises(TypeError, match="gate: expected a Tensor, got list"):
        dx.swiglu([1.0, 2.0])  # type: ignore[arg-type]


def test_a_direct_call_out_of_bounds_is_refused() -> None:
    """torch.ops keeps memory safe whoever calls."""
    with pytest.raises(OF_AN_OP, match=r"up: expected float32 \(9, 16\), got float32 \(8, 16\)"):
        torch.ops.dparallel.swiglu(torch.zeros(9, 16), torch.zeros(8, 16))
    with pytest.raises(OF_AN_OP, match="gate: expected float32, bfloat16 or float16"):
        torch.ops.dparallel.swiglu(torch.zeros(9, 16).double(), torch.zeros(9, 16).double())
