"""row_topk: the 8 best tokens of rows and their log-probabilities, on LLaDA's vocabulary; in bfloat16.

Floor: the logits, read once: rows * V * 2 bytes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import dparallel_ext as dx

from . import baselines
from .bench_unmask import VOCAB, inputs
from .harness import CPU, OURS, Case, Work, close, copies, on_cpu

BEST = 8


def work(device: torch.device, small: bool, rows: int, vocab: int, k: int = BEST) -> Work:
    logits = inputs(rows, vocab, vocab - 1, device)[1][0]
    data = copies(logits, device, small)
    compiled = baselines.compile_(baselines.topk)

    def agree(result: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> bool:
        """Whether both choose the same logits: of tokens with equal logits torch may take any."""
        return close(result[1], expected[1], 1e-5, 1e-5) and torch.equal(
            logits.gather(1, result[0]), logits.gather(1, expected[0])
        )

    return Work(
        {
            "eager": lambda turn, at: baselines.topk(data[at], k),
            "compiled": lambda turn, at: compiled(data[at], k),
            OURS: lambda turn, at: dx.row_topk(data[at], k),
        },
        [(logits.nbytes, 0, 1)],
        sets=len(data),
        graphs=(OURS, "eager"),
        agree=agree,
    )


def case(rows: int, k: int = BEST) -> Case:
    name = f"row_topk, {k} best of {rows} rows"
    return Case(name, "row_topk", work, {"rows": rows, "vocab": VOCAB, "k": k})


@pytest.mark.parametrize("contender", ["eager", OURS])
@pytest.mark.parametrize("rows", [1, 32])
def test_row_topk(benchmark: Any, read_bandwidth: float, rows: int, contender: str) -> None:
    step = work(CPU, False, rows, VOCAB)
    on_cpu(benchmark, f"row_topk, {rows} rows", step, contender, read_bandwidth, rounds=60, rows=rows)
