"""row_stats: cost against the rows needed, and against rows that are there but not needed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dparallel_ext as dx

from .bench_unmask import MASK, VOCAB, inputs

NEEDED = (1, 2, 4, 8, 16, 32, 64, 128)
UNNEEDED = (0, 32, 96, 224, 480, 992)


@pytest.mark.parametrize("needed", NEEDED)
def test_needed_rows(benchmark: Any, read_bandwidth: float, needed: int) -> None:
    logits = inputs(needed)[1][0]
    benchmark.group = "row_stats, needed rows"
    benchmark.extra_info.update(rows=needed, floor=needed * VOCAB * 2 / read_bandwidth)
    benchmark.pedantic(lambda: dx.row_stats(logits, mask_id=MASK), rounds=60, warmup_rounds=5)


@pytest.mark.parametrize("unneeded", UNNEEDED)
def test_unneeded_rows(benchmark: Any, read_bandwidth: float, unneeded: int) -> None:
    """32 needed rows, spread evenly among the others."""
    total = 32 + unneeded
    logits = torch.empty(total, VOCAB, dtype=torch.bfloat16)
    rows = torch.arange(32) * (total // 32)
    logits[rows] = inputs(32)[1][0]
    benchmark.group = "row_stats, 32 needed rows among others"
    benchmark.extra_info.update(rows=unneeded, floor=32 * VOCAB * 2 / read_bandwidth)
    benchmark.pedantic(lambda: dx.row_stats(logits, rows=rows, mask_id=MASK), rounds=60, warmup_rounds=5)
