"""fp8_linear against the product it stands for, at the shapes of LLaDA-8B's layers: (4096 -> 12288).

Floor: the weights read once, a byte each. Baselines: the same weights in 16 bits, by the matrix library; and
those in 8 bits widened and multiplied, call by call. `error`: root mean square, as a share of the output's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dparallel_ext as dx

WIDTH, OUT = 4096, 12288


class Weights:
    """One matrix (out, in), in 16 bits and in 8."""

    def __init__(self, out: int, width: int, device: torch.device | str = "cpu") -> None:
        drawn = torch.randn(out, width, generator=torch.Generator().manual_seed(0)) * width**-0.5
        self.full = drawn.to(device, torch.bfloat16)
        self.weight, self.scale = dx.quantize_fp8(self.full)
        self.contenders: dict[str, Callable[[Tensor], Tensor]] = {
            "bfloat16 weights": lambda x: F.linear(x, self.full),
            "widened": lambda x: (F.linear(x, self.weight.to(x.dtype)) * self.scale).to(x.dtype),
            "dparallel_ext": lambda x: dx.fp8_linear(x, self.weight, self.scale),
        }


@pytest.fixture(scope="module")
def weights() -> Weights:
    return Weights(OUT, WIDTH)


@pytest.mark.parametrize("contender", ["bfloat16 weights", "widened", "dparallel_ext"])
@pytest.mark.parametrize("rows", [1, 32], ids=lambda rows: f"{rows}_rows")
@torch.inference_mode()
def test_fp8_linear(
    benchmark: Any, read_bandwidth: float, weights: Weights, rows: int, contender: str
) -> None:
    x = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(1)).bfloat16()
    run = weights.contenders[contender]
    found, expected = run(x).double(), F.linear(x.double(), weights.full.double())
    error = float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())
    assert error < 0.03
    benchmark.group = f"fp8_linear, {rows} rows, {WIDTH} to {OUT}, bfloat16"
    benchmark.extra_info.update(
        contender=contender, floor=weights.weight.numel() / read_bandwidth, error=error
    )
    benchmark.pedantic(run, args=(x,), rounds=15, warmup_rounds=2)
