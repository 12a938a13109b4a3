"""The certainty-forcing loss, forward and backward, on LLaDA's vocabulary: 64 active rows of 256, bfloat16.

Floor: the active rows read twice and the whole gradient written once. Peak memory is what a process that
runs nothing else takes beyond the inputs. The contender `inplace` is ours, writing the gradient over the
logits.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext import backends
from dparallel_ext.ops.head import rows_of_chunk

from . import baselines
from .harness import CPU, OURS, Case, Work, copies, on_cpu

VOCAB, ROWS, ACTIVE = 126464, 256, slice(96, 160)


def ours(logits: Tensor, labels: Tensor, active: Tensor) -> Tensor:
    return dx.certainty_forcing_loss(logits, labels, active).loss


CONTENDERS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "published": baselines.published_loss,
    "eager": baselines.eager_loss,
    "compiled": baselines.compiled_loss,
    OURS: ours,
}
INPLACE, PRODUCTS = f"{OURS}, inplace", "matrix products alone"


def inputs(rows: int, active: slice, vocab: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (1, rows, V), labels (1, rows), which half of the rows predict, and the active rows (1,
    rows)."""
    random = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    logits = torch.randn(1, rows, vocab, **random)
    labels = torch.randint(0, vocab, (1, rows), **random)
    at = torch.arange(rows, device=device)
    logits[0, at, labels[0]] += 14.0 * (at % 2)
    chosen = torch.zeros(1, rows, dtype=torch.bool, device=device)
    chosen[0, active] = True
    return logits.to(torch.bfloat16).requires_grad_(), labels, chosen


def work(
    device: torch.device,
    small: bool,
    rows: int,
    vocab: int,
    active: slice | None = None,
    inplace: bool = False,
) -> Work:
    """Forward and backward. active: the active rows; None: all.

    inplace: add the contender that writes over the logits, which each step gets anew.
    """
    chosen = active or slice(0, rows)
    logits, labels, is_active = inputs(rows, chosen, vocab, device)
    losses: dict[str, Callable[[Tensor], Tensor]] = {
        name: lambda z, loss_of=loss_of: loss_of(z, labels, is_active) for name, loss_of in CONTENDERS.items()
    }
    if inplace:
        losses[INPLACE] = lambda z: dx.certainty_forcing_loss(z, labels, is_active, inplace=True).loss
    bytes_ = (2 * len(range(*chosen.indices(rows))) + rows) * vocab * 2
    return loss_work(device, small, logits, losses, bytes_, graphs=(OURS,))


def loss_work(
    device: torch.device,
    small: bool,
    logits: Tensor,
    losses: Mapping[str, Callable[[Tensor], Tensor]],
    bytes_: float,
    graphs: tuple[str, ...],
) -> Work:
    """Forward and backward of losses of `logits`; with `INPLACE` among them, each step gets the logits
    anew."""
    data = copies(logits, device, small)

    def of(loss_of: Callable[[Tensor], Tensor]) -> Callable[[int, int], tuple[Tensor, Tensor]]:
        def run(turn: int, at: int) -> tuple[Tensor, Tensor]:
            loss = loss_of(data[at])
            return loss.detach(), torch.autograd.grad(loss, data[at])[0]

        return run

    def reset() -> None:
        data[0] = logits.clone()

    run = {name: of(loss_of) for name, loss_of in losses.items()}
    if INPLACE in losses:
        return Work(run, [(bytes_, 0, 1)], reset=reset, agree=alike)
    return Work(run, [(bytes_, 0, 1)], sets=len(data), graphs=graphs, agree=alike)


def alike(result: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> bool:
    """Whether losses agree within 1e-4 of the loss, and gradients, by norm, within a hundredth."""
    (loss, grad), (exact, exact_grad) = result, expected
    near = (grad - exact_grad).float().norm() <= 0.01 * exact_grad.float().norm()
    return bool(near) and abs(float(loss) - float(exact)) <= 1e-4 * abs(float(exact))


def case() -> Case:
    parameters = {"rows": 4096, "vocab": VOCAB}
    name, conditions = "certainty_forcing_loss, 4096 rows", ("cold", "graph")
    return Case(name, "certainty_forcing_loss", work, parameters, conditions)


def peak_memory(contender: str) -> float:
    """Peak memory beyond the inputs, in megabytes, of a fresh process."""
    command = [sys.executable, "-m", __name__, contender]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


@pytest.mark.parametrize("contender", [*CONTENDERS, INPLACE])
def test_certainty_forcing_loss(benchmark: Any, read_bandwidth: float, contender: str) -> None:
    step = work(CPU, False, ROWS, VOCAB, ACTIVE, inplace=contender == INPLACE)
    group = "certainty_forcing_loss, forward and backward"
    megabytes = peak_memory(contender)
    on_cpu(benchmark, group, step, contender, read_bandwidth, rounds=40, megabytes=megabytes)


WIDTH = 1024


def linear_inputs(
    rows: int, width: int, vocab: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden (rows, width), a frozen head (V, width), labels (rows,), and all rows active.

    They are in bfloat16, but in float32 where the CPU's matrix library has no products of 16 bits: torch's
    own loop would take minutes for each product.
    """
    dtype = torch.bfloat16 if backends.fast_bfloat16(device) else torch.float32
    random = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    hidden = torch.randn(rows, width, **random).to(dtype)
    head = torch.randn(vocab, width, dtype=dtype, **random) / 10
    labels = torch.randint(0, vocab, (rows,), **random)
    return hidden.requires_grad_(), head, labels, torch.ones(rows, dtype=torch.bool, device=device)


def linear_work(device: torch.device, small: bool, rows: int, width: int, vocab: int) -> Work:
    """Forward and backward with a frozen head: three matrix products, 6 N H V FLOP."""
    hidden, head, labels, active = linear_inputs(rows, width, vocab, device)

    def gradient(loss_of_rows: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return torch.autograd.grad(loss_of_rows(hidden @ head.T, labels), hidden)[0]

    def ours(turn: int, at: int) -> Tensor:
        loss = dx.linear_certainty_forcing_loss(hidden, head, labels, active).loss
        return torch.autograd.grad(loss, hidden)[0]

    @torch.no_grad()
    def products(turn: int, at: int) -> None:
        """The op's products, in its chunks: logits twice, and the product of their gradient with the head."""
        for part in hidden.split(rows_of_chunk(None, head)):
            logits = part @ head.T
            logits = part @ head.T
            logits @ head

    run: dict[str, Callable[[int, int], Any]] = {
        "eager": lambda turn, at: gradient(baselines.row_loss),
        "compiled": lambda turn, at: gradient(baselines.compile_(baselines.row_loss)),
        OURS: ours,
        PRODUCTS: products,
    }
    if device.type == "cuda" and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()

        def of_liger(turn: int, at: int) -> None:  # its gradient is that of the cross entropy: not compared
            torch.autograd.grad(liger(head, hidden, labels), hidden)

        run["Liger (cross entropy alone)"] = of_liger

    return Work(run, [(3 * head.nbytes, 6 * rows * width * vocab, 1)], agree=same_gradient)


def same_gradient(result: Tensor | None, expected: Tensor) -> bool:
    """Whether gradients agree, by norm, within a hundredth; None: it was not computed."""
    return result is None or bool((result - expected).norm() <= 0.01 * expected.norm())


def linear_case() -> Case:
    op, parameters = "linear_certainty_forcing_loss", {"rows": 8192, "width": 4096, "vocab": VOCAB}
    return Case(f"{op}, 8192 rows", op, linear_work, parameters, ("cold",))


@pytest.mark.parametrize("contender", [PRODUCTS, OURS])
def test_linear(benchmark: Any, contender: str) -> None:
    """256 active rows of width 1024, with a frozen head."""
    step, group = linear_work(CPU, False, 256, WIDTH, VOCAB), "linear_certainty_forcing_loss, 256 rows"
    on_cpu(benchmark, group, step, contender, None, rounds=7)


@pytest.mark.parametrize("rows", [64, 256, 1024, 4096])
def test_linear_memory(benchmark: Any, rows: int) -> None:
    """Peak memory beyond the inputs; the time is that of the measuring process."""
    benchmark.group = "linear_certainty_forcing_loss, peak memory"
    benchmark.extra_info.update(rows=rows)
    megabytes = benchmark.pedantic(lambda: peak_memory(f"linear:{rows}"), rounds=1)
    benchmark.extra_info.update(megabytes=megabytes)


def main() -> None:
    name, _, rows = sys.argv[1].partition(":")
    if rows:
        name, step = OURS, linear_work(CPU, False, int(rows), WIDTH, VOCAB)
    else:
        step = work(CPU, False, ROWS, VOCAB, ACTIVE, inplace=name == INPLACE)
    if name == "compiled":  # compile first: the compiler's own memory does not count
        step.run[name](0, 0)
    step.reset()
    # Reset the peak, so far that of making the inputs; then measure how far a step goes beyond.
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = resident("VmRSS")
    step.run[name](0, 0)
    print((resident("VmHWM") - before) / 1024)


def resident(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field))


if __name__ == "__main__":
    main()
