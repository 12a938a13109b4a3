"""keep_error_: the report of bad rows, which an op makes of each launch on a GPU.

Floor: the errors read: N * 8 bytes. The peer is the same in torch's operators, three kernels.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dparallel_ext.ops.keep_error import keep_error_
from dparallel_ext.types import NO_ERROR

from .harness import CPU, OURS, Case, Work, on_cpu

SHAPE = {"rows": 4096}
NAME = "keep_error_, 4096 rows"


def work(device: torch.device, small: bool, rows: int) -> Work:
    """The word keeps the error of row 3, since later errors do not count."""
    error = torch.full((rows,), NO_ERROR, device=device)
    error[3:] = 4 * torch.arange(3, rows, device=device) + 1
    words = torch.full((16, 1), NO_ERROR, device=device)

    def ours(turn: int, at: int) -> Tensor:
        keep_error_(words[turn], error)
        return words[turn]

    def eager(turn: int, at: int) -> Tensor:
        word = words[turn]
        return torch.where(word == NO_ERROR, error.amin(0, keepdim=True), word, out=word)

    def reset() -> None:
        words.fill_(NO_ERROR)

    return Work(
        {"eager": eager, OURS: ours},
        [(error.nbytes, 0, 1)],
        sets=len(words),
        graphs=(OURS, "eager"),
        reset=reset,
        agree=torch.equal,
    )


CASE = Case(NAME, "keep_error_", work, SHAPE, ("warm", "graph, warm"))


@pytest.mark.parametrize("contender", ["eager", OURS])
def test_keep_error(benchmark: Any, read_bandwidth: float, contender: str) -> None:
    on_cpu(benchmark, NAME, work(CPU, False, **SHAPE), contender, read_bandwidth, rounds=100)
