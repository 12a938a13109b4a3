"""linear_kv_write against its two steps: queries, keys and values of LLaDA-8B's shape, 32 rows in bfloat16.

On a GPU also with norms of heads, for which the product is cut otherwise. Floor: the weights read once.
Baselines: `linear` and `kv_write` one after the other, and torch's operations. On a CPU it is its two steps,
and takes as long.
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
from .bench_fp8_linear import error_of
from .harness import CPU, OURS, Case, Work, on_cpu, random, sets_of

WIDTH = 4096
STEPS = f"{OURS}, linear and kv_write"


def work(device: torch.device, small: bool, tokens: int, inner: int, norms: bool = False) -> Work:
    """From `inner` to as many numbers of queries, keys and values, in heads of at most 128."""
    dim = min(128, inner & -inner)
    bytes_ = 6 * inner * inner
    sets = sets_of(bytes_, device, small)
    weights = [random(device, 3 * inner, inner) * inner**-0.5 for _ in range(sets)]
    x, heads = random(device, tokens, inner), inner // dim
    caches = torch.zeros(2, 1, heads, 2 * tokens, dim, dtype=x.dtype, device=device)
    positions = tokens + torch.arange(tokens, device=device)
    cos, sin = dx.rope_table(2 * tokens, dim, device=device)
    where = {"positions": positions, "slot_mapping": positions, "cos": cos, "sin": sin}
    if norms:
        where |= {"q_norm": random(device, dim), "k_norm": random(device, dim)}

    def parts(product: Tensor) -> tuple[Tensor, ...]:
        return product.unflatten(1, (-1, dim)).chunk(3, 1)

    def in_torch(weight: Tensor) -> Tensor:
        q, k, v = parts(F.linear(x, weight))
        if norms:
            q, k = (F.rms_norm(t, (dim,), where[f"{name}_norm"], 1e-6) for t, name in ((q, "q"), (k, "k")))
        baselines.rotate_and_put(q, k, v, caches[0], caches[1], positions, positions, cos, sin)
        return q

    def in_steps(weight: Tensor) -> Tensor:
        q, k, v = parts(dx.linear(x, weight, constant=True))
        dx.kv_write(q, k, v, caches[0], caches[1], **where)
        return q

    def ours(weight: Tensor) -> Tensor:
        return dx.linear_kv_write(x, weight, None, caches[0], caches[1], **where, constant=True)

    def of(step: Callable[[Tensor], Tensor]) -> Callable[[int, int], tuple[Tensor, Tensor]]:
        return lambda turn, at: (step(weights[at]), caches)

    return Work(
        {"torch": of(in_torch), STEPS: of(in_steps), OURS: of(ours)},
        [(bytes_, tokens * bytes_, 1)],
        sets=sets,
        graphs=("torch", STEPS, OURS),
        under=torch.inference_mode,
        reset=lambda: caches.zero_(),
        agree=lambda result, expected: all(
            error_of(a, b) < 0.01 for a, b in zip(result, expected, strict=True)
        ),
    )


def case(tokens: int, norms: bool = False) -> Case:
    name = f"linear_kv_write, {tokens} rows of {WIDTH}{', norms of heads' if norms else ''}"
    parameters = {"tokens": tokens, "inner": WIDTH, "norms": norms}
    return Case(name, "linear_kv_write", work, parameters, ("graph",))


@pytest.mark.parametrize("contender", ["torch", STEPS, OURS])
def test_linear_kv_write(benchmark: Any, read_bandwidth: float, contender: str) -> None:
    step = work(CPU, False, 32, WIDTH)
    on_cpu(benchmark, "linear_kv_write, 32 rows, bfloat16", step, contender, read_bandwidth, rounds=7)
