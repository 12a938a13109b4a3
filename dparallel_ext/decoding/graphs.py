"""CUDA graphs of passes: what a pass launches, recorded once for each form it takes, and then replayed.

A pass of a large model is some three hundred launches, and the host needs about as long to issue them as a
GPU needs to read the weights. A recorded pass is one launch. It reads what differs from pass to pass from one
tensor of numbers that lies where it did when it was recorded.
"""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..ops.streams import own_recording

log = logging.getLogger(__name__)

LIMIT = 128
"""Forms that are remembered; beyond it the one not used for longest is forgotten."""

Compute = Callable[[Tensor], Tensor]
"""Numbers on the device -> the pass's result, without waiting for the device or reading from the host."""


class Recorder(Protocol):
    """How launches are recorded: `CudaRecorder`, or a stand-in where there is no GPU."""

    def turn(self) -> AbstractContextManager[None]:
        """What is launched within comes after all before it and before all after it."""

    def record(self, compute: Compute, numbers: Tensor) -> tuple[Callable[[], None], Tensor]:
        """How to replay compute(numbers), which is not run now, and where its result then lies."""


_recording = threading.Lock()
"""Held while a pass is recorded: the garbage collector is off then, for the whole process."""
recorders: weakref.WeakSet[CudaRecorder] = weakref.WeakSet()
"""No two share a stream, or what one launches while the other records would be recorded."""


def can_record(device: torch.device) -> bool:
    return device.type == "cuda"


class CudaRecorder:
    """Everything on one stream of its own, so that no two replays overlap, and from one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        with _recording:
            others = {other.stream.cuda_stream for other in recorders}
            for _ in range(32):  # torch hands out so many in turn
                if self.stream.cuda_stream in others:
                    self.stream = torch.cuda.Stream(device)
            recorders.add(self)
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        """Those that use the pool."""

    @contextmanager
    def turn(self) -> Iterator[None]:
        outer = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(outer)
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            outer.wait_stream(self.stream)

    def record(self, compute: Compute, numbers: Tensor) -> tuple[Callable[[], None], Tensor]:
        graph: Any = torch.cuda.CUDAGraph()
        with _recording, own_recording():
            if not self._graphs:  # torch refuses a pool whose last graph is gone
                self._pool = torch.cuda.graph_pool_handle()
            collecting = gc.isenabled()
            gc.disable()  # what it frees could call CUDA in the midst of the recording
            try:
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    result = compute(numbers)
                finally:
                    graph.capture_end()
            finally:
                if collecting:
                    gc.enable()
        self._graphs.add(graph)
        return graph.replay, result


class Recorded(NamedTuple):
    numbers: Tensor
    replay: Callable[[], None]
    result: Tensor
    held: Any
    """Tensors that the recording reads, and that nobody else may keep."""


class Graphs:
    """Runs passes: the first of a form as it is, the second is recorded, and from then on it is replayed.

    Where recording fails, all passes run as they are from then on, with a warning in the log.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.recorder: Recorder | None = recorder
        self.forms: dict[Hashable, Recorded | None] = {}
        """The least recently used first; None: met once."""
        self.replays = 0
        self.addresses: Sequence[int] | None = None
        """Where what the recordings read lies; None: nothing can be recorded."""

    def drop_stale(self, addresses: Sequence[int] | None) -> None:
        """Drop the recordings if what they read lies elsewhere now."""
        if addresses != self.addresses:
            self.addresses = addresses
            self.forms.clear()

    def run(
        self, form: Hashable, numbers: Tensor, compute: Compute, *, device: torch.device, held: Any = None
    ) -> Tensor:
        """compute(numbers): `form` says all that the launches depend on beside the values of `numbers`.

        form: None: run it as it is, in its turn. numbers: (n,) int64 on the CPU. held: what must live as long
        as the recording.
        """
        if self.recorder is None:
            return compute(numbers.to(device, non_blocking=True))
        with self.recorder.turn():
            if form is None:
                return compute(numbers.to(device, non_blocking=True))
            met, found = form in self.forms, self.forms.pop(form, None)
            if met and found is None:
                found = self._record(numbers.to(device, non_blocking=True), compute, held)
            self.forms[form] = found
            if len(self.forms) > LIMIT:
                del self.forms[next(iter(self.forms))]
            if found is None:
                return compute(numbers.to(device, non_blocking=True))
            found.numbers.copy_(numbers, non_blocking=True)
            found.replay()
            self.replays += 1
            return found.result.clone()  # the next replay, of any form, may write there

    def _record(self, numbers: Tensor, compute: Compute, held: Any) -> Recorded | None:
        assert self.recorder is not None
        try:
            return Recorded(numbers, *self.recorder.record(compute, numbers), held)
        except Exception:  # of any cause: the same pass, run as it is, shows whether it is the pass's own
            log.warning(
                "a pass could not be recorded; passes run without CUDA graphs. If CUDA broke it off, torch's "
                "allocator may believe that the recording goes on, and then keeps what several streams have "
                "used: start this process again before its GPU is full",
                exc_info=True,
            )
            self.recorder = None
            return None
