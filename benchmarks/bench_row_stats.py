"""row_stats: time against the number of needed rows, and of other rows beside them; in bfloat16.

Floor: the logits of the needed rows, read once: rows * V * 2 bytes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dparallel_ext as dx

from . import baselines
from .bench_unmask import VOCAB, inputs
from .harness import CPU, OURS, Case, Work, on_cpu, sets_of

NEEDED = (1, 2, 4, 8, 16, 32, 64, 128)
UNNEEDED = (0, 32, 96, 224, 480, 992)


def work(device: torch.device, small: bool, rows: int, vocab: int, unneeded: int = 0) -> Work:
    """`rows` needed rows, spread evenly among `unneeded` others."""
    needed = inputs(rows, vocab, vocab - 1, device)[1][0]
    logits, at = needed, None
    if unneeded:
        total = rows + unneeded
        logits = torch.empty(total, vocab, dtype=needed.dtype, device=device)
        at = torch.arange(rows, device=device) * (total // rows)
        logits[at] = needed
    sets = sets_of(needed.nbytes, device, small)
    data = [logits, *(logits.clone() for _ in range(sets - 1))]

    def eager(turn: int, at_: int) -> torch.Tensor:
        return baselines.statistics(data[at_] if at is None else data[at_][at])[0]

    compiled = baselines.compile_(baselines.statistics)
    return Work(
        {
            "eager": eager,
            OURS: lambda turn, at_: dx.row_stats(data[at_], rows=at).token,
            "compiled": lambda turn, at_: compiled(data[at_])[0],
        },
        [(needed.nbytes, 0, 1)],
        sets=sets,
        graphs=(OURS, "eager"),
        agree=torch.equal,
    )


def case(rows: int) -> Case:
    return Case(f"row_stats, {rows} rows", "row_stats", work, {"rows": rows, "vocab": VOCAB})


@pytest.mark.parametrize("needed", NEEDED)
def test_needed_rows(benchmark: Any, read_bandwidth: float, needed: int) -> None:
    step = work(CPU, False, needed, VOCAB)
    on_cpu(benchmark, "row_stats, needed rows", step, OURS, read_bandwidth, rounds=60, rows=needed)


@pytest.mark.parametrize("unneeded", UNNEEDED)
def test_unneeded_rows(benchmark: Any, read_bandwidth: float, unneeded: int) -> None:
    """32 needed rows, spread evenly among `unneeded` others."""
    step, group = work(CPU, False, 32, VOCAB, unneeded), "row_stats, 32 needed rows among others"
    on_cpu(benchmark, group, step, OURS, read_bandwidth, rounds=60, rows=unneeded)
