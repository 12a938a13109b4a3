"""One whole unmasking step (statistics, selection, commit) on LLaDA's vocabulary, in bfloat16.

Floor: the logits of the masked rows of the window, read once: rows * V * 2 bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import dparallel_ext as dx

from . import baselines
from .harness import CPU, OURS, Case, Work, copies, on_cpu

VOCAB, MASK, THRESHOLD = 126464, 126336, 0.5
WINDOW = 32


def step(tokens: Tensor, logits: Tensor, mask_id: int, start: int, end: int, threshold: float) -> None:
    """`unmask_` as a decode calls it: all arguments are on the device, and bad rows are not checked for."""
    policy = policy_of(threshold, len(tokens), tokens.device)
    positions = positions_of(tokens.numel(), tokens.device)
    bounds = bounds_of(start, end, len(tokens), tokens.device)
    where = {"positions": positions, "mask_id": mask_id, "start": bounds[0], "end": bounds[1]}
    dx.unmask_(tokens, logits.flatten(0, 1), policy=policy, check=False, **where)


@functools.cache
def positions_of(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, device=device)


@functools.cache
def bounds_of(start: int, end: int, batch: int, device: torch.device) -> Tensor:
    """start and end (2, batch), on the device: a decode copies them there with a pass's other inputs."""
    return torch.tensor([[start] * batch, [end] * batch], device=device)


@functools.cache
def policy_of(threshold: float, batch: int, device: torch.device) -> Tensor:
    """The policy, on the device: a decode makes it once, for all its passes."""
    return dx.policies.make("entropy", threshold, batch=batch, device=device)


CONTENDERS: dict[str, Callable[..., None]] = {
    "published": baselines.published,
    "eager": baselines.eager,
    "compiled": baselines.compiled,
    OURS: step,
}


def inputs(
    rows: int, vocab: int = VOCAB, mask_id: int = MASK, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """All-masked tokens (1, rows) and logits (1, rows, vocab) whose entropies lie on both sides of 0.5."""
    random = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    logits = torch.randn(1, rows, vocab, **random)
    at = torch.arange(rows, device=device)
    logits[0, at, torch.randint(0, mask_id, (rows,), **random)] += 8.0 * (at % 3)
    return torch.full((1, rows), mask_id, device=device), logits.to(torch.bfloat16)


def work(device: torch.device, small: bool, rows: int, vocab: int, window: int | None = None) -> Work:
    """A step over the first `window` of `rows` positions, all masked. window: None: all."""
    mask, end = min(MASK, vocab - 1), window or rows
    tokens, logits = inputs(rows, vocab, mask, device)
    data = copies(logits, device, small)
    board = tokens.expand(len(data), -1, -1).clone()

    def of(step: Callable[..., None]) -> Callable[[int, int], Tensor]:
        def run(turn: int, at: int) -> Tensor:
            step(board[turn], data[at], mask, 0, end, THRESHOLD)
            return board[turn]

        return run

    return Work(
        {name: of(step) for name, step in CONTENDERS.items()},
        [(end * vocab * 2, 0, 1)],
        sets=len(data),
        graphs=(OURS,),
        reset=lambda: board.copy_(tokens.expand_as(board)),
        agree=torch.equal,
    )


def case(rows: int) -> Case:
    return Case(f"unmask_, {rows} rows", "unmask_", work, {"rows": rows, "vocab": VOCAB})


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("rows", [32, 512], ids=lambda rows: f"{rows}_rows")
def test_unmask(benchmark: Any, read_bandwidth: float, rows: int, contender: str) -> None:
    """32 rows, all in the window; and 512 rows, the first 32 in the window."""
    step = work(CPU, False, rows, VOCAB, WINDOW)
    on_cpu(benchmark, f"unmask, {rows} rows", step, contender, read_bandwidth, rounds=100)
