"""rms_norm with its residual, against torch's operations one after another, on rows of LLaDA-8B's width.

Floor: x and delta read, their sum and its norm written, all in memory: 4 * rows * width * bytes of an
element. With few rows the inputs are still in a cache, as they are in a model that has just written them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import dparallel_ext as dx

from . import baselines
from .harness import CPU, OURS, Case, Work, close, on_cpu, random

WIDTH, EPS = 4096, 1e-5


def eager(x: Tensor, delta: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The norm of x + delta, and x + delta, as the published models compute them."""
    x = x + delta
    return baselines.rms_norm(x, weight, EPS), x


def ours(x: Tensor, delta: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return dx.rms_norm(x, weight, eps=EPS, delta=delta)


def work(
    device: torch.device, small: bool, tokens: int, width: int, dtype: torch.dtype = torch.bfloat16
) -> Work:
    x, delta, weight = (random(device, *shape, dtype=dtype) for shape in [(tokens, width)] * 2 + [(width,)])
    steps = {"eager": eager, "compiled": baselines.compile_(eager), OURS: ours}

    def of(step: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[int, int], tuple[Tensor, Tensor]]:
        return lambda turn, at: step(x, delta, weight)

    return Work(
        {name: of(step) for name, step in steps.items()},
        [(4 * x.nbytes + weight.nbytes, 0, 1)],
        sets=16,
        graphs=(OURS, "eager"),
        under=torch.inference_mode,
        agree=close,
    )


def case(tokens: int) -> Case:
    """Warm, as in a decode, which has just computed both inputs."""
    shape = {"tokens": tokens, "width": WIDTH}
    return Case(f"rms_norm, {tokens} rows of {WIDTH}", "rms_norm", work, shape, ("warm", "graph, warm"))


@pytest.mark.parametrize("contender", ["eager", OURS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("rows", [32, 512], ids=lambda rows: f"{rows}_rows")
def test_rms_norm(
    benchmark: Any, read_bandwidth: float, rows: int, dtype: torch.dtype, contender: str
) -> None:
    group = f"rms_norm, {rows} rows of {WIDTH}, {dtype}".replace("torch.", "")
    on_cpu(benchmark, group, work(CPU, False, rows, WIDTH, dtype), contender, read_bandwidth, rounds=100)
