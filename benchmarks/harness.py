"""The harness: what an op's benchmark states once (contenders, inputs, bytes and FLOP), and how it is timed.

A `Work` is an op ready to run. Each bench_<op>.py makes some; `on_cpu` times one under pytest-benchmark, and
`python -m benchmarks.gpu` times those of cases.py on the GPU.
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

from dparallel_ext.ops.streams import own_recording

OURS = "dparallel_ext"
CPU = torch.device("cpu")
LEAST, MOST = 3, 100
"""The least and the most repeats of a measurement on a GPU; with `--small` there are 2."""

SMALL = {
    "rows": 5,
    "vocab": 1003,
    "width": 24,
    "inner": 192,
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
"""The value at which `--small` caps each parameter: odd sizes, which exercise every edge of a kernel. But the
`inner` dimension of products is one that a GPU's tensor cores take."""


@dataclass
class Work:
    """A case with its inputs on a device, ready to run."""

    run: dict[str, Callable[[int, int], Any]]
    """Contender -> a step (turn, at), which changes state `turn` and reads data set `at`."""
    phases: list[tuple[float, float, int]]
    """(bytes, FLOP, times): what each phase must move and compute, and how often; a phase takes at least the
    longer of the two times."""
    sets: int = 1
    """The number of states, and of data sets: a graph visits them in turn, and together they exceed the L2
    cache."""
    graphs: tuple[str, ...] = ()
    """The contenders that a CUDA graph can record."""
    reset: Callable[[], None] = lambda: None
    """Called before each repeat, outside its time: puts the states back as they were at first."""
    less: dict[str, Callable[[int, int], Any]] = field(default_factory=dict)
    """Contender -> a step whose time is subtracted from that of `run`; the difference is divided by `per`."""
    per: int = 1
    tokens: int = 0
    """Tokens that a step decodes; 0 where it is no decode."""
    under: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    """The context in which steps run: `torch.inference_mode` where a model runs the op in it."""
    agree: Callable[[Any, Any], bool] = lambda result, expected: True
    """(result, result of the first contender) -> whether they agree; checked before a contender is timed."""


@dataclass(frozen=True)
class Case:
    name: str
    op: str
    """The name of the op, or public function, that it measures; "" for a ceiling."""
    make: Callable[..., Work]
    parameters: dict[str, Any]
    conditions: tuple[str, ...] = ("cold", "warm", "graph", "graph, warm")

    def build(self, device: torch.device, small: bool) -> Work:
        capped = {k: min(v, SMALL[k]) if small and k in SMALL else v for k, v in self.parameters.items()}
        return self.make(device=device, small=small, **capped)


def sets_of(bytes_: float, device: torch.device, small: bool) -> int:
    """The number of data sets: on a GPU at least two, and enough to exceed any L2 cache several times (256 MB
    together); on a CPU one, read again and again, as a decode reads its own.
    """
    if device.type != "cuda":
        return 2 if small else 1
    return 2 if small else max(2, -(-(2**28) // int(bytes_)))


def copies(data: Tensor, device: torch.device, small: bool) -> list[Tensor]:
    """`data`, and as many copies, each with a gradient of its own, as make up the data sets of a graph."""
    sets = sets_of(data.nbytes, device, small)
    return [data, *(data.detach().clone().requires_grad_(data.requires_grad) for _ in range(sets - 1))]


def random(device: torch.device, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device=device, dtype=torch.float32).to(dtype)


def close(result: Any, expected: Any, rtol: float | None = None, atol: float | None = None) -> bool:
    """Whether tensors, or tuples of them, agree: on a CPU as `torch.testing.assert_close` says, on a GPU
    within a hundredth of the largest number.
    """
    if isinstance(expected, tuple):
        return all(close(a, b, rtol, atol) for a, b in zip(result, expected, strict=True))
    if expected.is_cuda:
        return bool((result - expected).abs().max() <= 0.01 * expected.abs().max())
    try:
        torch.testing.assert_close(result, expected, rtol=rtol, atol=atol)
    except AssertionError:
        return False
    return True


def result_of(work: Work, name: str) -> Any:
    """A contender's result of one step on fresh states, copied, so that later steps do not change it."""
    work.reset()
    with work.under():
        return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, work.run[name](0, 0))


def check(work: Work, name: str, expected: Any) -> None:
    """Raises ValueError where a contender's result does not agree with `expected`, the first contender's."""
    if not work.agree(result_of(work, name), expected):
        raise ValueError(f"its result is not that of {next(iter(work.run))}")


# --- on a CPU ------------------------------------------------------------------------------------


def on_cpu(
    benchmark: Any, group: str, work: Work, contender: str, bandwidth: float | None, rounds: int, **extra: Any
) -> None:
    """Time a contender under pytest-benchmark.

    bandwidth: bytes a second, for the floor; None: no floor is claimed. rounds: the contender "published"
    runs 5 instead, since it is slow.
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
    """Times work on a device: by CUDA events on a GPU, by the host's clock on a CPU.

    deadline: the value of time.monotonic() after which `repeat` raises OutOfTime.
    """

    def __init__(self, device: torch.device, deadline: float, small: bool) -> None:
        self.device, self.deadline = device, deadline
        self.least, self.most = (2, 2) if small else (LEAST, MOST)
        self.cuda = device.type == "cuda"
        size = 4 * torch.cuda.get_device_properties(device).L2_cache_size if self.cuda else 2**16
        self._written, self._read = torch.zeros(2, max(size, 2**28 if self.cuda else 0) // 4, device=device)

    def flush(self) -> None:
        """Empty the L2 cache: write a buffer larger than it, then read another, so that no line waits to be
        written back.
        """
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
        """Repeat `call` until `seconds` have passed; return the seconds of each repeat, those of `less`
        subtracted, divided by `per`.

        Several repeats are queued without waiting, so that the host is ahead of the device where it can be.
        Raises OutOfTime at the deadline.
        """

        def seconds_of(what: Callable[[], Any]) -> tuple[Any, Any]:
            before()
            began = self.stamp()
            what()
            return began, self.stamp()

        def turn() -> list[tuple[Any, Any]]:
            return [seconds_of(call)] if less is None else [seconds_of(call), seconds_of(less)]

        began = time.monotonic()
        turn()
        self.wait()
        once = time.monotonic() - began
        quick = self.most > 10 and once < seconds / 20
        for _ in range(3 if quick else 0):  # slow work is warm after its first turn
            turn()
        self.wait()
        times: list[float] = []
        began = time.monotonic()
        while len(times) < self.most and (len(times) < self.least or time.monotonic() - began < seconds):
            if time.monotonic() > self.deadline:
                raise OutOfTime
            turns = [turn() for _ in range(10 if quick else 1)]
            self.wait()
            for first, *rest in turns:
                taken = sum(self.between(*other) for other in rest)
                times.append((self.between(*first) - taken) / per)
        return times

    def graph(self, steps: Callable[[], None]) -> Callable[[], None]:
        """A function that replays `steps` as one CUDA graph, recorded as a decode's are, without launches
        that make counters; on a CPU, `steps`.
        """
        if not self.cuda:
            return steps
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            steps()
            steps()
        self.wait()
        captured = torch.cuda.CUDAGraph()
        with own_recording(), torch.cuda.graph(captured, stream=stream):
            steps()
        return captured.replay


def time_contender(clock: Clock, work: Work, name: str, condition: str, seconds: float) -> list[float]:
    """The seconds of each repeat of a contender's step under a condition: with a cold or warm L2 cache,
    launched or from a graph.
    """
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
