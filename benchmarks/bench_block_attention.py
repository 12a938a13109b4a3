"""block_attention: 32 queries a sequence to caches of ragged lengths, in bfloat16.

The heads are SDAR-8B's: 32 over 8 key heads, of 128.

Floor: the keys and values that are seen, read once: sum of lengths * 8 * 128 * 2 * 2 bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import dparallel_ext as dx

from . import baselines, gpu

QUERIES, HEADS, KV_HEADS, DIM = 32, 32, 8, 128
SLOT_BYTES = KV_HEADS * DIM * 2 * 2
MOST_BYTES = 2**34  # of caches on a GPU


@dataclass
class Case:
    q: Tensor
    """(B, Q, H, D)"""
    k_cache: Tensor
    v_cache: Tensor
    """(B, Hkv, length, D)"""
    sizes: list[int]
    """slots that each sequence sees"""

    def __post_init__(self) -> None:
        device = self.q.device
        self.lengths = torch.tensor(self.sizes, device=device)
        self.begin = QUERIES * torch.arange(len(self.sizes), device=device)
        self.end = self.begin + QUERIES
        self.pages = torch.arange(len(self.sizes), device=device)[:, None]


def ours(case: Case) -> Tensor:
    return dx.block_attention(
        case.q.flatten(0, 1),
        case.k_cache,
        case.v_cache,
        case.lengths,
        begin=case.begin,
        end=case.end,
        pages=case.pages,
        longest_query=QUERIES,
        longest_length=max(case.sizes),
    ).view(case.q.shape)


def masked(case: Case) -> Tensor:
    return baselines.masked_attention(case.q, case.k_cache, case.v_cache, case.lengths)


def by_sequence(case: Case) -> Tensor:
    return baselines.attention_by_sequence(case.q, case.k_cache, case.v_cache, case.sizes)


CONTENDERS: dict[str, Callable[[Case], Tensor]] = {
    "SDPA, padded, with a mask": masked,
    "SDPA, one sequence after another": by_sequence,
    "dparallel_ext": ours,
}


def inputs(batch: int, length: int, device: str, seed: int = 0) -> Case:
    """Lengths from `length` down to half of it."""
    generator = torch.Generator(device).manual_seed(seed)
    q, k, v = (
        torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
        for shape in [(batch, QUERIES, HEADS, DIM)] + 2 * [(batch, KV_HEADS, length, DIM)]
    )
    return Case(q, k, v, [length - length // 2 * b // batch for b in range(batch)])


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize(("batch", "length"), [(1, 512), (8, 512), (1, 4096)])
def test_block_attention(
    benchmark: Any, read_bandwidth: float, batch: int, length: int, contender: str
) -> None:
    case = inputs(batch, length, "cpu")
    run = CONTENDERS[contender]
    torch.testing.assert_close(run(case), by_sequence(case), rtol=0.02, atol=0.02)
    benchmark.group = f"block_attention, {batch} of {length} slots"
    floor = sum(case.sizes) * SLOT_BYTES / read_bandwidth
    benchmark.extra_info.update(contender=contender, floor=floor)
    benchmark.pedantic(run, args=(case,), rounds=20, warmup_rounds=3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("length", [512, 2048, 8192, 32768])
@pytest.mark.parametrize("batch", [1, 4, 16, 64])
def test_block_attention_cuda(benchmark: Any, batch: int, length: int) -> None:
    """On a GPU, from a captured graph over caches larger than its own, timed by CUDA events."""
    size = batch * length * SLOT_BYTES
    if size > MOST_BYTES:
        pytest.skip(f"caches of {size / 2**30:.0f} GB")
    turns = [inputs(batch, length, "cuda", seed) for seed in range(max(1, 2**28 // size))]
    expected = by_sequence(turns[0])

    def graph_of(run: Callable[..., Tensor]) -> torch.cuda.CUDAGraph:
        torch.testing.assert_close(run(turns[0]), expected, rtol=0.02, atol=0.02)

        def steps() -> None:
            for turn in turns:
                run(turn)

        return gpu.capture(steps)

    times = {name: gpu.median(graph_of(run), len(turns)) for name, run in CONTENDERS.items()}
    read = sum(turns[0].sizes) * SLOT_BYTES
    benchmark.group = f"block_attention on a GPU, {batch} of {length} slots"
    benchmark.extra_info.update(
        contender="dparallel_ext",
        seconds=times.pop("dparallel_ext"),
        baselines=times,
        gpu=torch.cuda.get_device_name(),
        floor=read / gpu.copy_bandwidth(),
        cache_bytes=read,
    )
    benchmark.pedantic(ours, args=(turns[0],), rounds=5)
