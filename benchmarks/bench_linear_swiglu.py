"""linear_swiglu against its two steps: an MLP's gate and up of LLaDA-8B's shape, 32 rows in bfloat16.

Floor: the weights read once. Baselines: `linear` and `swiglu` one after the other, and torch's operations. On
a CPU it is its two steps, and takes as long.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dparallel_ext as dx

from .bench_fp8_linear import error_of
from .bench_swiglu import eager
from .harness import CPU, OURS, Case, Work, on_cpu, random, sets_of

WIDTH = 4096
STEPS = f"{OURS}, linear and swiglu"


def work(device: torch.device, small: bool, tokens: int, inner: int) -> Work:
    """From `inner` to three times as many gates, and as many ups."""
    bytes_ = 12 * inner * inner
    sets = sets_of(bytes_, device, small)
    weights = [random(device, 6 * inner, inner) * inner**-0.5 for _ in range(sets)]
    x = random(device, tokens, inner)
    steps: dict[str, Callable[[Tensor], Tensor]] = {
        "torch": lambda weight: eager(F.linear(x, weight)),
        STEPS: lambda weight: dx.swiglu(dx.linear(x, weight, constant=True)),
        OURS: lambda weight: dx.linear_swiglu(x, weight, constant=True),
    }

    def of(step: Callable[[Tensor], Tensor]) -> Callable[[int, int], Tensor]:
        return lambda turn, at: step(weights[at])

    return Work(
        {name: of(step) for name, step in steps.items()},
        [(bytes_, tokens * bytes_, 1)],
        sets=sets,
        graphs=tuple(steps),
        under=torch.inference_mode,
        agree=lambda result, expected: error_of(result, expected) < 0.01,
    )


def case(tokens: int) -> Case:
    name = f"linear_swiglu, {tokens} rows of {WIDTH}"
    return Case(name, "linear_swiglu", work, {"tokens": tokens, "inner": WIDTH}, ("graph",))


@pytest.mark.parametrize("contender", ["torch", STEPS, OURS])
def test_linear_swiglu(benchmark: Any, read_bandwidth: float, contender: str) -> None:
    step = work(CPU, False, 32, WIDTH)
    on_cpu(benchmark, "linear_swiglu, 32 rows, bfloat16", step, contender, read_bandwidth, rounds=7)
