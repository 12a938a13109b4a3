"""linear where it stands: layers of LLaDA-8B's shape in bfloat16, and of Qwen3-0.6B's width in float32.

A step is the products of a layer, with the norms and the activation between them; attention is left out.

Floor: the weights read once. Baselines: the same by torch's product; and by `fp8_linear`, weights in 8 bits,
which read half. On a CPU with instructions for bfloat16 `linear` is torch's product, and takes as long; so is
that of more than 64 rows in float32.
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
from .harness import CPU, OURS, Case, Work, on_cpu, random, sets_of

WIDTH = 4096
WIDTH_ON_LAPTOPS = 1024
EPS = 1e-5
Product = Callable[[Tensor, int], Tensor]


def work(
    device: torch.device, small: bool, tokens: int, inner: int, dtype: torch.dtype = torch.bfloat16
) -> Work:
    """A step is a layer: inner to 3 inner, to inner, to 6 inner, and half of that to inner."""
    shapes = [(3 * inner, inner), (inner, inner), (6 * inner, inner), (inner, 3 * inner)]
    weights = sum(out * into for out, into in shapes)
    bytes_ = dtype.itemsize * weights
    sets = sets_of(bytes_, device, small)
    full = [[random(device, *shape, dtype=dtype) * shape[1] ** -0.5 for shape in shapes] for _ in range(sets)]
    bytewise = [[dx.quantize_fp8(weight) for weight in layer] for layer in full]
    scale = torch.ones(inner, dtype=dtype, device=device)
    x = random(device, tokens, inner, dtype=dtype)

    def layer(product: Product) -> Tensor:
        qkv = product(dx.rms_norm(x, scale, eps=EPS), 0)
        y, stream = dx.rms_norm(x, scale, eps=EPS, delta=product(qkv[:, :inner].contiguous(), 1))
        return stream + product(dx.swiglu(product(y, 2)), 3)

    return Work(
        {
            "torch": lambda turn, at: layer(lambda y, i: F.linear(y, full[at][i])),
            OURS: lambda turn, at: layer(lambda y, i: dx.linear(y, full[at][i], constant=True)),
            f"{OURS}, 8-bit weights": lambda turn, at: layer(
                lambda y, i: dx.fp8_linear(y, *bytewise[at][i], constant=True)
            ),
        },
        [(bytes_, 2 * tokens * weights, 1)],
        sets=sets,
        graphs=("torch", OURS, f"{OURS}, 8-bit weights"),
        under=torch.inference_mode,
        agree=lambda result, expected: error_of(result, expected) < 0.06,  # 8 bits in four products
    )


def case(tokens: int) -> Case:
    name = f"linear, a layer's products, {tokens} rows"
    return Case(name, "linear", work, {"tokens": tokens, "inner": WIDTH}, ("graph",))


@pytest.mark.parametrize("contender", ["torch", OURS, f"{OURS}, 8-bit weights"])
@pytest.mark.parametrize(
    ("dtype", "rows"),
    [*((torch.bfloat16, rows) for rows in (1, 32, 256)), *((torch.float32, rows) for rows in (1, 4, 32))],
    ids=str,
)
def test_linear(benchmark: Any, read_bandwidth: float, dtype: torch.dtype, rows: int, contender: str) -> None:
    step = work(CPU, False, rows, WIDTH if dtype == torch.bfloat16 else WIDTH_ON_LAPTOPS, dtype)
    name = str(dtype).removeprefix("torch.")
    on_cpu(benchmark, f"linear, a layer, {rows} rows, {name}", step, contender, read_bandwidth, rounds=7)
