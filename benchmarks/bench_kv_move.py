"""kv_move: move a draft tree's accepted path, every second of its slots, to the end of the sequence;
bfloat16.

36 layers with 8 key heads of 128, as Qwen3-8B has. Warm, as in a decode, whose verify pass has just written
the slots.

Floor: the keys and values that move, read and written once: 4 * batch * entries * layers * key heads * 128
* 2 bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import dparallel_ext as dx

from . import baselines
from .harness import CPU, OURS, Case, Work, on_cpu, random

LAYERS, KV_HEADS, DIM, PAGE = 36, 8, 128, 64


def work(
    device: torch.device,
    small: bool,
    batch: int,
    entries: int,
    layers: int,
    kv_heads: int,
    dim: int,
) -> Work:
    """Each lane has pages of `PAGE` slots of its own; its path begins in the first of them."""
    pages = -(-2 * entries // PAGE)
    kv_cache = random(device, layers, 2, batch * pages, kv_heads, PAGE, dim)
    first = kv_cache.clone()
    target = torch.arange(entries, device=device) + PAGE * pages * torch.arange(batch, device=device)[:, None]
    source = target + 1 + torch.arange(entries, device=device)

    def of(step: Callable[..., None]) -> Callable[[int, int], Tensor]:
        def run(turn: int, at: int) -> Tensor:
            step(kv_cache, source, target)
            return kv_cache

        return run

    def reset() -> None:
        kv_cache.copy_(first)

    return Work(
        {
            "eager": of(baselines.move_slots),
            "compiled": of(baselines.compile_(baselines.move_slots)),
            OURS: of(dx.kv_move),
        },
        [(4 * batch * entries * layers * kv_heads * dim * kv_cache.element_size(), 0, 1)],
        sets=16,
        graphs=(OURS, "eager"),
        reset=reset,
        agree=torch.equal,
    )


def case(batch: int, entries: int) -> Case:
    sizes = {"layers": LAYERS, "kv_heads": KV_HEADS, "dim": DIM}
    name = f"kv_move, batch {batch}, {entries} of {2 * entries} slots"
    return Case(name, "kv_move", work, {"batch": batch, "entries": entries, **sizes}, ("warm", "graph, warm"))


@pytest.mark.parametrize("contender", ["eager", OURS])
@pytest.mark.parametrize(("batch", "entries"), [(1, 8), (8, 8), (1, 64)])
def test_kv_move(benchmark: Any, read_bandwidth: float, batch: int, entries: int, contender: str) -> None:
    step = work(CPU, False, batch, entries, LAYERS, KV_HEADS, DIM)
    on_cpu(benchmark, f"kv_move, batch {batch}, {entries} slots", step, contender, read_bandwidth, rounds=50)
