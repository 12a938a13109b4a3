"""The harness: what an op's benchmark states once (contenders, inputs, bytes and FLOP), and how it is timed.

A `Work` is an op ready to run; each bench_<op>.py makes them, `on_cpu` times one under pytest-benchmark, and
`python -m benchmarks.gpu` those of cases.py on the card.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

OURS = "dparallel_ext"
CPU = torch.device("cpu")
LEAST, MOST = 3, 100
"""Repeats of a measurement on a GPU; with `--small` 2."""

SMALL = {
    "rows": 5,
    "vocab": 1003,
    "width": 24,
    "batch": 3,
    "length": 70,
    "heads": 4,
    "kv_heads": 2,
    "tokens": 37,
    "new": 32,
    "prompt": 19,
    "side": 64,
    "megabytes": 1,
}
"""What `--small` caps each parameter at: odd sizes, so that every edge of a kernel is met."""


@dataclass
class Work:
    """A case on its device, ready to run."""

    run: dict[str, Callable[[int, int], Any]]
    """Contender -> a step on state `turn` (what it changes) and data set `at` (what it reads)."""
    phases: list[tuple[float, float, int]]
    """(bytes, FLOP, times): what must be moved and computed; each takes the longer of the two at least."""
    sets: int = 1
    """States, and data sets; a graph rotates among them, so that they exceed the L2 cache."""
    graphs: tuple[str, ...] = ()
    """The contenders whose launches a graph can replay."""
    reset: Callable[[], None] = lambda: None
    """Before each repeat, not timed: the states as at first."""
    less: dict[str, Callable[[int, int], Any]] = field(default_factory=dict)
    """A run whose time is taken off, and what is left divided by `per`."""
    per: int = 1
    tokens: int = 0
    """That a step yields, where it is a decode."""
    under: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    """What the steps run under: `torch.inference_mode` where the models' would."""
    agree: Callable[[Any, Any], bool] = lambda found, expected: True
    """Whether a contender's result is that of the first one; looked at before it is timed."""


@dataclass(frozen=True)
class Case:
    name: str
    op: str
    """The public name in `dparallel_ext` that it measures; "" where it is a ceiling."""
    make: Callable[..., Work]
    parameters: dict[str, Any]
    conditions: tuple[str, ...] = ("cold", "warm", "graph", "graph, warm")

    def build(self, device: torch.device, small: bool) -> Work:
        capped = {k: min(v, SMALL[k]) if small and k in SMALL else v for k, v in self.parameters.items()}
        return self.make(device=device, small=small, **capped)


def sets_of(bytes_: float, device: torch.device, small: bool) -> int:
    """Data sets that exceed any L2 cache several times over (256 MB and more), and at least two; a CPU's are
    read again and again, as a decode does."""
    if device.type != "cuda":
        return 2 if small else 1
    return 2 if small else max(2, -(-(2**28) // int(bytes_)))


def random(device: torch.device, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device=device, dtype=torch.float32).to(dtype)


def close(found: Tensor, expected: Tensor, rtol: float | None = None, atol: float | None = None) -> bool:
    """As `torch.testing.assert_close` on a CPU; on a GPU within a hundredth of the largest number."""
    if expected.is_cuda:
        return bool((found - expected).abs().max() <= 0.01 * expected.abs().max())
    try:
        torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)
    except AssertionError:
        return False
    return True


def result_of(work: Work, name: str) -> Any:
    """Of a first step, kept from what later steps change."""
    work.reset()
    with work.under():
        return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, work.run[name](0, 0))


def check(work: Work, name: str, expected: Any) -> None:
    """Raise ValueError where a contender's result is not that of the first one."""
    if not work.agree(result_of(work, name), expected):
        raise ValueError(f"its result is not that of {next(iter(work.run))}")


# --- on a CPU ------------------------------------------------------------------------------------


def on_cpu(
    benchmark: Any, group: str, work: Work, contender: str, bandwidth: float | None, rounds: int, **extra: Any
) -> None:
    """Time a contender under pytest-benchmark. `bandwidth`: bytes a second; None: no floor is claimed.

    The published procedure is too slow for as many rounds.
    """
    check(work, contender, result_of(work, next(iter(work.run))))
    benchmark.group = group
    if bandwidth is not None:
        extra["floor"] = sum(bytes_ * times for bytes_, _, times in work.phases) / bandwidth
    benchmark.extra_info.update(contender=contender, **extra)
    rounds = 5 if contender == "published" else rounds

    def setup() -> None:
        work.reset()

    with work.under():
        benchmark.pedantic(
            work.run[contender],
            setup=setup,
            args=(0, 0),
            rounds=rounds,
            warmup_rounds=max(1, rounds // 10),
        )


# --- on a GPU ------------------------------------------------------------------------------------


class OutOfTime(Exception):
    pass


class Clock:
    """Times work on a device: by events on a GPU, by the clock on the CPU."""

    def __init__(self, device: torch.device, deadline: float, small: bool) -> None:
        self.device, self.deadline = device, deadline
        self.least, self.most = (2, 2) if small else (LEAST, MOST)
        self.cuda = device.type == "cuda"
        size = 4 * torch.cuda.get_device_properties(device).L2_cache_size if self.cuda else 2**16
        self._written, self._read = torch.zeros(2, max(size, 2**28 if self.cuda else 0) // 4, device=device)

    def flush(self) -> None:
        """A buffer larger than L2 is written, then another read, so that no line waits to be written back."""
        self._written.fill_(1.0)
        self._read.sum()

    def stamp(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, a: Any, b: Any) -> float:
        return float(a.elapsed_time(b)) / 1e3 if self.cuda else b - a

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def repeat(
        self,
        call: Callable[[], Any],
        *,
        before: Callable[[], None],
        less: Callable[[], Any] | None,
        per: int,
        seconds: float,
    ) -> list[float]:
        """Seconds of each repeat, until so many seconds have passed.

        Several repeats are queued without waiting, so that the host is ahead of the device where it can be.
        """

        def one(what: Callable[[], Any]) -> tuple[Any, Any]:
            before()
            began = self.stamp()
            what()
            return began, self.stamp()

        def turn() -> list[tuple[Any, Any]]:
            return [one(call)] if less is None else [one(call), one(less)]

        began = time.monotonic()
        turn()
        self.wait()
        once = time.monotonic() - began
        quick = self.most > 10 and once < seconds / 20
        for _ in range(3 if quick else 0):  # a slow one is warm by now
            turn()
        self.wait()
        times: list[float] = []
        began = time.monotonic()
        while len(times) < self.most and (len(times) < self.least or time.monotonic() - began < seconds):
            if time.monotonic() > self.deadline:
                raise OutOfTime
            found = [turn() for _ in range(10 if quick else 1)]
            self.wait()
            for first, *rest in found:
                taken = sum(self.between(*other) for other in rest)
                times.append((self.between(*first) - taken) / per)
        return times

    def graph(self, steps: Callable[[], None]) -> Callable[[], None]:
        """`steps` as one replay; on the CPU, themselves."""
        if not self.cuda:
            return steps
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            steps()
            steps()
        self.wait()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured, stream=stream):
            steps()
        return captured.replay


def time_contender(clock: Clock, work: Work, name: str, condition: str, seconds: float) -> list[float]:
    """Of a step under a condition: "cold" or "warm" L2, launched or from a graph."""
    run, per = work.run[name], work.per
    call: Callable[[], Any] = functools.partial(run, 0, 0)
    less = functools.partial(work.less[name], 0, 0) if work.less else None
    before = work.reset
    if condition.startswith("graph"):

        def steps() -> None:
            for i in range(work.sets):
                run(i, 0 if "warm" in condition else i)

        work.reset()
        call, per = clock.graph(steps), work.sets
    elif condition == "cold":

        def before() -> None:
            work.reset()
            clock.flush()

    return clock.repeat(call, before=before, less=less, per=per, seconds=seconds)
