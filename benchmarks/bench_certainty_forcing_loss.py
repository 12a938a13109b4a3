"""The certainty-forcing loss, forward and backward, on LLaDA's vocabulary: 64 active rows of 256, bfloat16.

Floor: the active rows read twice and the whole gradient written once. Peak memory is that of a process of
its own, beyond the inputs. The contender `inplace` is ours that writes the gradient over the logits.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from dparallel import registry
from torch import Tensor

import dparallel_ext as dx

from . import baselines

VOCAB, ROWS, ACTIVE = 126464, 256, 64


def ours(logits: Tensor, labels: Tensor, active: Tensor) -> Tensor:
    return dx.certainty_forcing_loss(logits, labels, active).loss


CONTENDERS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "published": baselines.published_loss,
    "eager": baselines.eager_loss,
    "compiled": baselines.compiled_loss,
    "dparallel_ext": ours,
}
INPLACE = "dparallel_ext, inplace"


def inputs(
    rows: int = ROWS,
    active: slice = slice(96, 96 + ACTIVE),
    vocab: int = VOCAB,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (1, rows, V), labels that half of the rows get right, and the active rows."""
    random = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    logits = torch.randn(1, rows, vocab, **random)
    labels = torch.randint(0, vocab, (1, rows), **random)
    at = torch.arange(rows, device=device)
    logits[0, at, labels[0]] += 14.0 * (at % 2)
    chosen = torch.zeros(1, rows, dtype=torch.bool, device=device)
    chosen[0, active] = True
    return logits.to(torch.bfloat16).requires_grad_(), labels, chosen


def step(contender: str, logits: Tensor, labels: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    if contender == INPLACE:
        loss = dx.certainty_forcing_loss(logits, labels, active, inplace=True).loss
    else:
        loss = CONTENDERS[contender](logits, labels, active)
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


def spent(contender: str, logits: Tensor, *rest: Tensor) -> tuple[str, Tensor, Tensor, Tensor]:
    """The arguments of a step; logits that are lost with it are of its own."""
    return contender, logits.clone() if contender == INPLACE else logits, *rest


def peak_memory(contender: str) -> float:
    """Megabytes beyond the inputs, of a fresh process."""
    command = [sys.executable, "-m", __name__, contender]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


@pytest.mark.parametrize("contender", [*CONTENDERS, INPLACE])
def test_certainty_forcing_loss(benchmark: Any, read_bandwidth: float, contender: str) -> None:
    case = inputs()
    loss, grad = step(*spent(contender, *case))
    exact, exact_grad = step("eager", *case)
    assert float(loss) == pytest.approx(float(exact), rel=1e-4)
    assert (grad - exact_grad).float().norm() <= 0.01 * exact_grad.float().norm()
    slow = contender == "published"
    benchmark.group = "certainty_forcing_loss, forward and backward"
    floor = (2 * ACTIVE + ROWS) * VOCAB * 2 / read_bandwidth
    benchmark.extra_info.update(contender=contender, floor=floor, megabytes=peak_memory(contender))
    benchmark.pedantic(
        step,
        setup=lambda: (spent(contender, *case), {}),
        rounds=5 if slow else 40,
        warmup_rounds=1 if slow else 5,
    )


WIDTH = 1024


def linear_inputs(
    rows: int, width: int = WIDTH, vocab: int = VOCAB, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden (rows, width), a frozen head (V, width), labels, all rows active.

    In bfloat16, but in float32 where the CPU's matrix library has no products of 16 bits: torch's own loop
    would take minutes for each.
    """
    dtype = torch.bfloat16 if registry.fast_bfloat16(device) else torch.float32
    random = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    hidden = torch.randn(rows, width, **random).to(dtype)
    head = torch.randn(vocab, width, dtype=dtype, **random) / 10
    labels = torch.randint(0, vocab, (rows,), **random)
    return hidden.requires_grad_(), head, labels, torch.ones(rows, dtype=torch.bool, device=device)


def linear_step(hidden: Tensor, head: Tensor, labels: Tensor, active: Tensor) -> Tensor:
    loss = dx.linear_certainty_forcing_loss(hidden, head, labels, active).loss
    return torch.autograd.grad(loss, hidden)[0]


def linear_products(
    hidden: Tensor, head: Tensor, labels: Tensor, active: Tensor, megabytes: int = 32
) -> None:
    """The matrix products of that step alone, in the same chunks: logits twice, and their gradient's."""
    with torch.no_grad():
        for rows in hidden.split(max(1, megabytes * 2**20 // (len(head) * head.itemsize))):
            logits = rows @ head.T
            logits = rows @ head.T
            logits @ head


@pytest.mark.parametrize("contender", ["matrix products alone", "dparallel_ext"])
def test_linear(benchmark: Any, contender: str) -> None:
    """256 active rows of width 1024, frozen head."""
    case = linear_inputs(256)
    run = linear_step if contender == "dparallel_ext" else linear_products
    benchmark.group = "linear_certainty_forcing_loss, 256 rows"
    benchmark.extra_info.update(contender=contender)
    benchmark.pedantic(run, args=case, rounds=7, warmup_rounds=1)


@pytest.mark.parametrize("rows", [64, 256, 1024, 4096])
def test_linear_memory(benchmark: Any, rows: int) -> None:
    """Peak memory beyond the inputs, in the time of one process."""
    benchmark.group = "linear_certainty_forcing_loss, peak memory"
    benchmark.extra_info.update(rows=rows)
    megabytes = benchmark.pedantic(lambda: peak_memory(f"linear:{rows}"), rounds=1)
    benchmark.extra_info.update(megabytes=megabytes)


def main() -> None:
    name, _, rows = sys.argv[1].partition(":")
    case: Any = linear_inputs(int(rows)) if rows else spent(name, *inputs())
    run: Any = linear_step if rows else step
    if name == "compiled":  # the compiler's own memory is not meant
        run(*case)
    # The peak so far is that of making the inputs: forget it, then see how far a step goes beyond.
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = resident("VmRSS")
    run(*case)
    print((resident("VmHWM") - before) / 1024)


def resident(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field))


if __name__ == "__main__":
    main()
