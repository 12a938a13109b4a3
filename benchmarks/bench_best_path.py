"""best_path: the most probable way of a block through a form as large as a JSON schema's.

Floor: the transitions, read once (8 bytes each), and the scores (4 for each cell and class). The peer goes
from cell to cell in torch's operators, and finds the path's sum alone.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dparallel_ext.ops.best_path import best_path

from .bench_class_stats import form_of
from .harness import CPU, OURS, Case, Work, close, on_cpu

SHAPE = {"windows": 1, "cells": 32}
NAME = "best_path, a block of 32, 4,600 transitions"


def work(device: torch.device, small: bool, windows: int, cells: int) -> Work:
    tables = form_of(4096).tables(device)
    classes, states = len(tables.offsets) - 1, len(tables.distance)
    score = torch.randn(windows, cells, classes, device=device).log_softmax(2)
    origin, edge_class = tables.origin.long(), tables.edge_class.long()
    target = torch.arange(states, device=device).repeat_interleave(tables.edge_offsets.diff())
    begin, end = (
        torch.zeros(windows, dtype=torch.int64, device=device),
        torch.full((windows,), cells, device=device),
    )

    def eager(turn: int, at: int) -> Tensor:
        best = score.new_full((windows, states), -torch.inf)
        best[:, 0].fill_(0.0)
        for cell in range(cells):
            through = best[:, origin] + score[:, cell, edge_class]
            best = torch.full_like(best, -torch.inf).scatter_reduce(
                1, target.expand(windows, -1), through, "amax"
            )
        return best.amax(1)

    def total(result: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """The largest sum, or that of the path that was found."""
        if isinstance(result, Tensor):
            return result
        return score.gather(2, result[1][..., None]).sum((1, 2))

    return Work(
        {"eager": eager, OURS: lambda turn, at: best_path(score, begin, end, begin, end, tables)},
        [(8 * len(origin) + score.nbytes, 0, 1)],
        sets=16,
        graphs=(OURS, "eager"),
        agree=lambda result, expected: close(total(result), expected, 1e-4, 1e-4),
    )


CASE = Case(NAME, "best_path", work, SHAPE, ("warm", "graph, warm"))


@pytest.mark.parametrize("contender", ["eager", OURS])
def test_best_path(benchmark: Any, read_bandwidth: float, contender: str) -> None:
    on_cpu(benchmark, NAME, work(CPU, False, **SHAPE), contender, read_bandwidth, rounds=40)
