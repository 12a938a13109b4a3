"""select: choose from their statistics alone which of a block's masked positions to commit.

Floor: three statistics and the mask of eligible positions read, the choice written: B * L * 14 bytes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import dparallel_ext as dx

from .bench_unmask import THRESHOLD
from .harness import CPU, OURS, Case, Work, on_cpu

SHAPE = {"batch": 64, "length": 512}
NAME = "select, batch 64, 512 positions"


def work(device: torch.device, small: bool, batch: int, length: int) -> Work:
    score = torch.rand(batch, length, device=device)
    entropy = 4 * torch.rand(batch, length, device=device)
    stats = dx.RowStats(*[score] * 5, score, entropy, *[score] * 2)
    eligible = torch.rand(batch, length, device=device) < 0.6
    policy = dx.policies.make("entropy", THRESHOLD, batch=batch, device=device)

    def eager(turn: int, at: int) -> Tensor:
        masked = torch.where(eligible, entropy, torch.inf)
        return eligible & ((masked <= THRESHOLD) | (masked == masked.amin(1, keepdim=True)))

    return Work(
        {"eager": eager, OURS: lambda turn, at: dx.select(stats, eligible, policy)},
        [(batch * length * (3 * 4 + 2), 0, 1)],
        sets=16,
        graphs=(OURS, "eager"),
        agree=torch.equal,
    )


CASE = Case(NAME, "select", work, SHAPE, ("warm", "graph, warm"))


@pytest.mark.parametrize("contender", ["eager", OURS])
def test_select(benchmark: Any, read_bandwidth: float, contender: str) -> None:
    on_cpu(benchmark, NAME, work(CPU, False, **SHAPE), contender, read_bandwidth, rounds=100)
