"""The distillation loss, forward and backward, on LLaDA's vocabulary in bfloat16: KL, and KL with L1.

Floor: student's and teacher's rows read forward, read again and the student's gradient written backward; the
L1 distance reads both once more. The contender `inplace` is ours, writing the gradient over the student's
logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext.ops.head import rows_of_chunk

from . import baselines
from .bench_certainty_forcing_loss import (
    INPLACE,
    PRODUCTS,
    VOCAB,
    WIDTH,
    linear_inputs,
    loss_work,
    same_gradient,
)
from .harness import CPU, OURS, Case, Work, on_cpu

ROWS = 64

CONTENDERS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "eager": baselines.divergence,
    "compiled": lambda *args: baselines.compile_(baselines.divergence)(*args),
    OURS: lambda student, teacher, l1: dx.distillation_loss(student, teacher, l1_weight=l1),
}


def inputs(rows: int, vocab: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A student's logits (rows, V) and a teacher's: the teacher is sure of a token in half of the rows, the
    student close to it.
    """
    random = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    teacher = torch.randn(rows, vocab, **random)
    at = torch.arange(rows, device=device)
    teacher[at, torch.randint(0, vocab, (rows,), **random)] += 14.0 * (at % 2)
    student = teacher + torch.randn(rows, vocab, **random)
    return student.to(torch.bfloat16).requires_grad_(), teacher.to(torch.bfloat16)


def work(
    device: torch.device, small: bool, rows: int, vocab: int, l1: float = 0.0, inplace: bool = False
) -> Work:
    """inplace: add the contender that writes over the student's logits, which each step gets anew."""
    student, teacher = inputs(rows, vocab, device)
    losses: dict[str, Callable[[Tensor], Tensor]] = {
        name: lambda z, loss_of=loss_of: loss_of(z, teacher, l1) for name, loss_of in CONTENDERS.items()
    }
    if inplace:
        losses[INPLACE] = lambda z: dx.distillation_loss(z, teacher, l1_weight=l1, inplace=True)
    return loss_work(device, small, student, losses, (7 if l1 else 5) * student.nbytes, (OURS, "eager"))


def case(l1: float) -> Case:
    name = "distillation_loss, 4096 rows" + (", with L1" if l1 else "")
    parameters, conditions = {"rows": 4096, "vocab": VOCAB, "l1": l1}, ("cold", "graph")
    return Case(name, "distillation_loss", work, parameters, conditions)


@pytest.mark.parametrize("l1", [0.0, 1.0])
@pytest.mark.parametrize("contender", [*CONTENDERS, INPLACE])
def test_distillation_loss(benchmark: Any, read_bandwidth: float, contender: str, l1: float) -> None:
    step = work(CPU, False, ROWS, VOCAB, l1, inplace=contender == INPLACE)
    group = "distillation_loss, forward and backward" + (", with L1" if l1 else "")
    on_cpu(benchmark, group, step, contender, read_bandwidth, rounds=40)


def linear_work(device: torch.device, small: bool, rows: int, width: int, vocab: int) -> Work:
    """Forward and backward with frozen heads: five matrix products, 10 N H V FLOP."""
    hidden, head, *_ = linear_inputs(rows, width, vocab, device)
    teacher, teacher_head = hidden.detach().flip(0), head.flip(0)

    def gradient(loss_of: Callable[[Tensor, Tensor, float], Tensor]) -> Tensor:
        return torch.autograd.grad(loss_of(hidden @ head.T, teacher @ teacher_head.T, 0.0), hidden)[0]

    def ours(turn: int, at: int) -> Tensor:
        return torch.autograd.grad(dx.linear_distillation_loss(hidden, head, teacher, teacher_head), hidden)[
            0
        ]

    @torch.no_grad()
    def products(turn: int, at: int) -> None:
        """The op's products, in its chunks: both models' logits twice, and the gradient's with the head."""
        size = rows_of_chunk(None, head)
        for part, other in zip(hidden.split(size), teacher.split(size), strict=True):
            for _ in range(2):
                logits = part @ head.T
                other @ teacher_head.T
            logits @ head

    run: dict[str, Callable[[int, int], Any]] = {
        "eager": lambda turn, at: gradient(baselines.divergence),
        "compiled": lambda turn, at: gradient(baselines.compile_(baselines.divergence)),
        OURS: ours,
        PRODUCTS: products,
    }

    return Work(run, [(5 * head.nbytes, 10 * rows * width * vocab, 1)], agree=same_gradient)


def linear_case() -> Case:
    op, parameters = "linear_distillation_loss", {"rows": 8192, "width": 4096, "vocab": VOCAB}
    return Case(f"{op}, 8192 rows", op, linear_work, parameters, ("cold",))


@pytest.mark.parametrize("contender", [PRODUCTS, OURS])
def test_linear(benchmark: Any, contender: str) -> None:
    """64 rows of width 1024, with frozen heads."""
    step, group = linear_work(CPU, False, ROWS, WIDTH, VOCAB), "linear_distillation_loss, 64 rows"
    on_cpu(benchmark, group, step, contender, None, rounds=7)
