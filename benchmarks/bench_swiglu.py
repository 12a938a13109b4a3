"""swiglu against torch's two operations, on rows of LLaDA-8B's feed-forward width.

Floor: both halves read, the product written: 3 * rows * width * bytes of an element. That is from memory:
what a model has just written is still in a cache, and so it is here, the fewer rows the nearer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dparallel_ext as dx

WIDTH = 12288


def eager(both: Tensor) -> Tensor:
    gate, up = both.chunk(2, -1)
    return F.silu(gate) * up


CONTENDERS: dict[str, Callable[[Tensor], Tensor]] = {"eager": eager, "dparallel_ext": dx.swiglu}


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("rows", [32, 512], ids=lambda rows: f"{rows}_rows")
@torch.inference_mode()
def test_swiglu(benchmark: Any, read_bandwidth: float, rows: int, dtype: torch.dtype, contender: str) -> None:
    both = torch.randn(rows, 2 * WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype)
    run = CONTENDERS[contender]
    torch.testing.assert_close(run(both), eager(both))
    benchmark.group = f"swiglu, {rows} rows of {WIDTH}, {dtype}".replace("torch.", "")
    benchmark.extra_info.update(
        contender=contender, floor=3 * rows * WIDTH * both.element_size() / read_bandwidth
    )
    benchmark.pedantic(run, args=(both,), rounds=60, warmup_rounds=5)
