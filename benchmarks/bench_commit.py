"""commit_: write a block's chosen tokens and count the masks that are left.

Floor: tokens and choices read, each chosen token read and written: B * L * 9 bytes, and 16 for each token
chosen.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import dparallel_ext as dx

from .harness import CPU, OURS, Case, Work, on_cpu

MASK = 1000
SHAPE = {"batch": 64, "length": 512}
NAME = "commit_, batch 64, 512 positions"


def work(device: torch.device, small: bool, batch: int, length: int) -> Work:
    """All positions are masked; each step commits a fifth of them."""
    masked = torch.full((batch, length), MASK, device=device)
    board = masked.clone()
    commit = torch.rand(batch, length, device=device) < 0.2
    token = torch.randint(MASK, (batch, length), device=device)

    def eager(turn: int, at: int) -> tuple[Tensor, Tensor]:
        board.copy_(torch.where(commit, token, board))
        return board, (board == MASK).sum(1)

    def ours(turn: int, at: int) -> tuple[Tensor, Tensor]:
        return board, dx.commit_(board, commit=commit, token=token, mask_id=MASK, check=False).remaining

    return Work(
        {"eager": eager, OURS: ours},
        [(batch * length * 9 + 16 * int(commit.sum()), 0, 1)],
        sets=16,
        graphs=(OURS, "eager"),
        reset=lambda: board.copy_(masked),
        agree=lambda result, expected: all(map(torch.equal, result, expected)),
    )


CASE = Case(NAME, "commit_", work, SHAPE, ("warm", "graph, warm"))


@pytest.mark.parametrize("contender", ["eager", OURS])
def test_commit(benchmark: Any, read_bandwidth: float, contender: str) -> None:
    on_cpu(benchmark, NAME, work(CPU, False, **SHAPE), contender, read_bandwidth, rounds=100)
