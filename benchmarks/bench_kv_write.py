"""kv_write: blocks of 32 tokens rotated and put into their slots, in bfloat16.

The heads are SDAR-8B's: 32 over 8 key heads, of 128.

Floor: queries read and written, keys and values read, and written into the cache:
tokens * 128 * 2 * (2 * 32 + 4 * 8) bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import dparallel_ext as dx

from . import baselines

HEADS, KV_HEADS, DIM, CAPACITY, BLOCK = 32, 8, 128, 2048, 32
TOKEN_BYTES = DIM * 2 * (2 * HEADS + 4 * KV_HEADS)

CONTENDERS: dict[str, Callable[..., None]] = {
    "torch: rotary, index_put": baselines.rotate_and_put,
    "dparallel_ext": dx.kv_write,
}


def inputs(sequences: int) -> dict[str, Tensor]:
    """One block of each sequence, in the middle of its cache."""
    generator = torch.Generator().manual_seed(0)
    count = sequences * BLOCK

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.bfloat16)

    fused = normal(count, (HEADS + 2 * KV_HEADS) * DIM)
    parts = fused.unflatten(1, (-1, DIM)).split([HEADS, KV_HEADS, KV_HEADS], 1)
    caches = [normal(sequences, KV_HEADS, CAPACITY, DIM) for _ in "kv"]
    positions = CAPACITY // 2 + torch.arange(BLOCK).repeat(sequences)
    slots = torch.arange(sequences).repeat_interleave(BLOCK) * CAPACITY + positions
    cos, sin = dx.rope_table(CAPACITY, DIM)
    return {
        **dict(zip("qkv", parts, strict=True)),
        "k_cache": caches[0],
        "v_cache": caches[1],
        "positions": positions,
        "slots": slots,
        "cos": cos,
        "sin": sin,
    }


def check(run: Callable[..., None], case: dict[str, Tensor]) -> None:
    """What `run` changes is what the baseline does, within the rounding of bfloat16."""
    found, expected = ({name: t.clone() for name, t in case.items()} for _ in range(2))
    run(**found)
    baselines.rotate_and_put(**expected)
    for name in ("q", "k_cache", "v_cache"):
        torch.testing.assert_close(found[name], expected[name], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("sequences", [1, 32])
def test_kv_write(benchmark: Any, read_bandwidth: float, sequences: int, contender: str) -> None:
    case, run = inputs(sequences), CONTENDERS[contender]
    check(run, case)
    benchmark.group = f"kv_write, {sequences * BLOCK} tokens"
    floor = sequences * BLOCK * TOKEN_BYTES / read_bandwidth
    benchmark.extra_info.update(contender=contender, floor=floor)
    benchmark.pedantic(run, kwargs=case, rounds=50, warmup_rounds=5)
