"""rms_norm with its residual, against torch's operations one after another, on rows of LLaDA-8B's width.

Floor: x and delta read, their sum and its norm written: 4 * rows * width * bytes of an element. That is from
memory: what a model has just written is still in a cache, and so it is here, the fewer rows the nearer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import dparallel_ext as dx

WIDTH, EPS = 4096, 1e-5


def eager(x: Tensor, delta: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """As the published models write it."""
    x = x + delta
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + EPS)
    return weight * y.to(x.dtype), x


def ours(x: Tensor, delta: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return dx.rms_norm(x, weight, eps=EPS, delta=delta)


CONTENDERS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"eager": eager, "dparallel_ext": ours}


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("rows", [32, 512], ids=lambda rows: f"{rows}_rows")
@torch.inference_mode()
def test_rms_norm(
    benchmark: Any, read_bandwidth: float, rows: int, dtype: torch.dtype, contender: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    x, delta = torch.randn(2, rows, WIDTH, generator=generator).to(dtype)
    weight = torch.randn(WIDTH, generator=generator).to(dtype)
    run = CONTENDERS[contender]
    (y, s), (expected, stream) = run(x, delta, weight), eager(x, delta, weight)
    assert torch.equal(s, stream)
    torch.testing.assert_close(y, expected)
    benchmark.group = f"rms_norm, {rows} rows of {WIDTH}, {dtype}".replace("torch.", "")
    benchmark.extra_info.update(
        contender=contender, floor=4 * rows * WIDTH * x.element_size() / read_bandwidth
    )
    benchmark.pedantic(run, args=(x, delta, weight), rounds=100, warmup_rounds=10)
