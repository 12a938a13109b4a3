"""fp8_linear against the matrix product that it replaces, at a shape of LLaDA-8B's layers: 4096 to 12288.

Floor: the weights read once, a byte each. Baselines: the same weights in 16 bits, by the matrix library; and
the 8-bit weights widened and multiplied in each call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dparallel_ext as dx

from .harness import CPU, OURS, Case, Work, on_cpu, sets_of

WIDTH = 4096


class Weights:
    """One matrix (out, width), in 16 bits and in 8, and each contender's product by it."""

    def __init__(self, out: int, width: int, device: torch.device | str = "cpu") -> None:
        drawn = torch.randn(out, width, generator=torch.Generator().manual_seed(0)) * width**-0.5
        self.full = drawn.to(device, torch.bfloat16)
        self.weight, self.scale = dx.quantize_fp8(self.full)
        self.contenders: dict[str, Callable[[Tensor], Tensor]] = {
            "bfloat16 weights": lambda x: F.linear(x, self.full),
            "widened": lambda x: (F.linear(x, self.weight.to(x.dtype)) * self.scale).to(x.dtype),
            OURS: lambda x: dx.fp8_linear(x, self.weight, self.scale),
        }


def error_of(result: Tensor, expected: Tensor) -> float:
    """The root mean square of the difference, as a share of that of `expected`."""
    gap, whole = (result.double() - expected.double()).square().mean(), expected.double().square().mean()
    return float((gap / whole).sqrt())


def work(device: torch.device, small: bool, tokens: int, inner: int) -> Work:
    """A product to three times the inner dimension, as gate or up is; several matrices, so that none is in a
    GPU's L2 cache.
    """
    out = 3 * inner
    sets = sets_of(out * inner, device, small)
    weights = [Weights(out, inner, device) for _ in range(sets)]
    x = torch.randn(tokens, inner, generator=torch.Generator().manual_seed(1)).to(device, torch.bfloat16)

    def step(name: str) -> Callable[[int, int], Tensor]:
        return lambda turn, at: weights[at].contenders[name](x)

    return Work(
        {name: step(name) for name in weights[0].contenders},
        [(out * inner, 2 * tokens * out * inner, 1)],
        sets=sets,
        graphs=tuple(weights[0].contenders),
        under=torch.inference_mode,
        agree=lambda result, expected: error_of(result, expected) < 0.03,  # the error of 8 bits
    )


def case(tokens: int) -> Case:
    name = f"fp8_linear, {tokens} rows of {WIDTH}"
    return Case(name, "fp8_linear", work, {"tokens": tokens, "inner": WIDTH})


@pytest.mark.parametrize("contender", ["bfloat16 weights", "widened", OURS])
@pytest.mark.parametrize("rows", [1, 32], ids=lambda rows: f"{rows}_rows")
def test_fp8_linear(benchmark: Any, read_bandwidth: float, rows: int, contender: str) -> None:
    step = work(CPU, False, rows, WIDTH)
    group = f"fp8_linear, {rows} rows, {WIDTH} to {3 * WIDTH}, bfloat16"
    on_cpu(benchmark, group, step, contender, read_bandwidth, rounds=15)
