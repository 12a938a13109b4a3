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

from . import baselines

QUERIES, HEADS, KV_HEADS, DIM = 32, 32, 8, 128
SLOT_BYTES = KV_HEADS * DIM * 2 * 2


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
        self.lengths = torch.tensor(self.sizes)
        self.begin = QUERIES * torch.arange(len(self.sizes))
        self.end = self.begin + QUERIES
        self.pages = torch.arange(len(self.sizes))[:, None]


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


def inputs(batch: int, length: int) -> Case:
    """Lengths from `length` down to half of it."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(shape, generator=generator, dtype=torch.bfloat16)
        for shape in [(batch, QUERIES, HEADS, DIM)] + 2 * [(batch, KV_HEADS, length, DIM)]
    )
    return Case(q, k, v, [length - length // 2 * b // batch for b in range(batch)])


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize(("batch", "length"), [(1, 512), (8, 512), (1, 4096)])
def test_block_attention(
    benchmark: Any, read_bandwidth: float, batch: int, length: int, contender: str
) -> None:
    case = inputs(batch, length)
    run = CONTENDERS[contender]
    torch.testing.assert_close(run(case), by_sequence(case), rtol=0.02, atol=0.02)
    benchmark.group = f"block_attention, {batch} of {length} slots"
    floor = sum(case.sizes) * SLOT_BYTES / read_bandwidth
    benchmark.extra_info.update(contender=contender, floor=floor)
    benchmark.pedantic(run, args=(case,), rounds=20, warmup_rounds=3)
