"""swiglu against torch's two operations, on rows of LLaDA-8B's feed-forward width.

Floor: both halves read, the product written, all in memory: 3 * rows * width * bytes of an element. With few
rows the input is still in a cache, as it is in a model that has just written it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dparallel_ext as dx

from . import baselines
from .harness import CPU, OURS, Case, Work, close, on_cpu, random

WIDTH = 12288


def eager(both: Tensor) -> Tensor:
    gate, up = both.chunk(2, -1)
    return F.silu(gate) * up


def work(
    device: torch.device, small: bool, tokens: int, width: int, dtype: torch.dtype = torch.bfloat16
) -> Work:
    both = random(device, tokens, 2 * width, dtype=dtype)
    steps = {"eager": eager, "compiled": baselines.compile_(eager), OURS: dx.swiglu}

    def of(step: Callable[..., Tensor]) -> Callable[[int, int], Tensor]:
        return lambda turn, at: step(both)

    return Work(
        {name: of(step) for name, step in steps.items()},
        [(both.nbytes * 3 // 2, 0, 1)],
        sets=16,
        graphs=(OURS, "eager"),
        under=torch.inference_mode,
        agree=close,
    )


def case(tokens: int) -> Case:
    """Warm, as in a decode, which has just computed its input."""
    shape = {"tokens": tokens, "width": WIDTH}
    return Case(f"swiglu, {tokens} rows of {WIDTH}", "swiglu", work, shape, ("warm", "graph, warm"))


@pytest.mark.parametrize("contender", ["eager", OURS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("rows", [32, 512], ids=lambda rows: f"{rows}_rows")
def test_swiglu(benchmark: Any, read_bandwidth: float, rows: int, dtype: torch.dtype, contender: str) -> None:
    group = f"swiglu, {rows} rows of {WIDTH}, {dtype}".replace("torch.", "")
    on_cpu(benchmark, group, work(CPU, False, rows, WIDTH, dtype), contender, read_bandwidth, rounds=60)
