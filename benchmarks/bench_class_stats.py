"""class_stats: the statistics of each class of tokens of a form, on LLaDA's vocabulary; in bfloat16.

Floor: the logits and the list of ids, read once: V * (2 * rows + 4) bytes; 52 written for each row and class.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dparallel_ext.automaton import NOWHERE, Automaton
from dparallel_ext.ops.class_stats import class_stats

from .bench_unmask import VOCAB, inputs
from .harness import CPU, OURS, Case, Work, close, copies, on_cpu


def form_of(vocab: int, states: int = 460, classes: int = 400) -> Automaton:
    """As large as that of a JSON schema: nine in ten ids, those of free text, are one class; 10 transitions
    from each state."""
    of_text = torch.rand(vocab, device="cpu") < 0.9
    token_class = torch.where(of_text, 0, torch.randint(classes, (vocab,), device="cpu"))
    transitions = torch.full((states, classes), NOWHERE, device="cpu")
    ways = torch.rand(states, classes, device="cpu").topk(10, 1).indices
    transitions.scatter_(1, ways, torch.randint(states, (states, 10), device="cpu"))
    return Automaton(token_class, transitions, torch.ones(states, dtype=torch.bool, device="cpu"))


def work(device: torch.device, small: bool, rows: int, vocab: int) -> Work:
    logits = inputs(rows, vocab, vocab - 1, device)[1][0]
    data, tables = copies(logits, device, small), form_of(vocab).tables(device)
    classes = len(tables.offsets) - 1
    numbers = tables.token_class[:vocab].expand(rows, -1)  # `classes` for ids that lead nowhere

    def peer(turn: int, at: int) -> tuple[Tensor, Tensor]:
        z = data[at].float()
        largest = z.new_full((rows, classes + 1), -torch.inf).scatter_reduce(1, numbers, z, "amax")
        shifted = (z - largest.gather(1, numbers)).exp()
        sums = torch.zeros_like(largest).scatter_add(1, numbers, shifted)
        return largest[:, :classes], (largest + sums.log())[:, :classes]

    def ours(turn: int, at: int) -> tuple[Tensor, Tensor]:
        stats = class_stats(data[at], tables.ids, tables.offsets)
        return stats.top1, stats.lse

    return Work(
        {"eager": peer, OURS: ours},
        [(vocab * (2 * rows + 4) + 52 * rows * classes, 0, 1)],
        sets=len(data),
        graphs=(OURS, "eager"),
        agree=lambda result, expected: close(result, expected, 1e-4, 1e-4),
    )


def case(rows: int) -> Case:
    return Case(f"class_stats, {rows} rows", "class_stats", work, {"rows": rows, "vocab": VOCAB})


@pytest.mark.parametrize("contender", ["eager", OURS])
def test_class_stats(benchmark: Any, read_bandwidth: float, contender: str) -> None:
    step = work(CPU, False, 32, VOCAB)
    on_cpu(benchmark, "class_stats, 32 rows", step, contender, read_bandwidth, rounds=20)
