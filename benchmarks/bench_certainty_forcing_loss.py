"""The certainty-forcing loss, forward and backward, on LLaDA's vocabulary: 64 active rows of 256, bfloat16.

Floor: the active rows read twice and the whole gradient written once. Peak memory is that of a process of
its own, beyond the inputs.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
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


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Logits (1, 256, V), labels that half of the rows get right, and the active rows."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, ROWS, VOCAB, generator=generator)
    labels = torch.randint(0, VOCAB, (1, ROWS), generator=generator)
    logits[0, torch.arange(ROWS), labels[0]] += 14.0 * (torch.arange(ROWS) % 2)
    active = torch.zeros(1, ROWS, dtype=torch.bool)
    active[0, 96 : 96 + ACTIVE] = True
    return logits.to(torch.bfloat16).requires_grad_(), labels, active


def step(contender: str, logits: Tensor, labels: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    loss = CONTENDERS[contender](logits, labels, active)
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


def peak_memory(contender: str) -> float:
    """Megabytes beyond the inputs, of a fresh process."""
    command = [sys.executable, "-m", __name__, contender]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


@pytest.mark.parametrize("contender", CONTENDERS)
def test_certainty_forcing_loss(benchmark: Any, read_bandwidth: float, contender: str) -> None:
    case = inputs()
    loss, grad = step(contender, *case)
    exact, exact_grad = step("eager", *case)
    assert float(loss) == pytest.approx(float(exact), rel=1e-4)
    assert (grad - exact_grad).float().norm() <= 0.01 * exact_grad.float().norm()
    slow = contender == "published"
    benchmark.group = "certainty_forcing_loss, forward and backward"
    floor = (2 * ACTIVE + ROWS) * VOCAB * 2 / read_bandwidth
    benchmark.extra_info.update(contender=contender, floor=floor, megabytes=peak_memory(contender))
    benchmark.pedantic(
        step, args=(contender, *case), rounds=5 if slow else 40, warmup_rounds=1 if slow else 5
    )


def main() -> None:
    case = inputs()
    if sys.argv[1] == "compiled":  # the compiler's own memory is not meant
        step("compiled", *case)
    # The peak so far is that of making the inputs: let go of it, then see how far a step goes beyond.
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = resident("VmRSS")
    step(sys.argv[1], *case)
    print((resident("VmHWM") - before) / 1024)


def resident(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field))


if __name__ == "__main__":
    main()
