"""CUDA graphs of passes: the launches of a pass are recorded once for each key, and then replayed.

A pass of a large model is some three hundred launches, and the host needs about as long to issue them as a
GPU needs to read the weights. A recorded pass is one launch. All that differs between passes of one key is in
one tensor of inputs, whose address does not change.
"""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..ops.streams import own_recording

log = logging.getLogger(__name__)

LIMIT = 128
"""Keys that are remembered; beyond it the least recently used is forgotten."""

Compute = Callable[[Tensor], Tensor]
"""Inputs on the device -> the pass's result, without waiting for the device or reading from the host."""


class Recorder(Protocol):
    """How launches are recorded: `CudaRecorder`, or an emulation where there is no GPU."""

    def turn(self) -> AbstractContextManager[None]:
        """Order the launches inside behind all earlier launches, and before all later launches."""

    def record(self, compute: Compute, inputs: Tensor) -> tuple[Callable[[], None], Tensor]:
        """Record compute(inputs), without running it; return a function that replays it, and the tensor of
        its result."""


_recording = threading.Lock()
"""Held while a pass is recorded: the garbage collector is off then, for the whole process."""
recorders: weakref.WeakSet[CudaRecorder] = weakref.WeakSet()
"""No two share a stream: else one would record the other's launches."""


def can_record(device: torch.device) -> bool:
    """Whether launches on the device can be recorded."""
    return device.type == "cuda"


class CudaRecorder:
    """Records on one stream of its own, so that no two replays overlap, and allocates from one pool."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        with _recording:
            others = {other.stream.cuda_stream for other in recorders}
            for _ in range(32):  # torch has a pool of 32 streams, and hands them out in turn
                if self.stream.cuda_stream in others:
                    self.stream = torch.cuda.Stream(device)
            recorders.add(self)
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        """The graphs that use the pool."""

    @contextmanager
    def turn(self) -> Iterator[None]:
        outer = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(outer)
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            outer.wait_stream(self.stream)

    def record(self, compute: Compute, inputs: Tensor) -> tuple[Callable[[], None], Tensor]:
        graph: Any = torch.cuda.CUDAGraph()
        with _recording, own_recording():
            if not self._graphs:  # torch refuses a pool whose last graph is gone
                self._pool = torch.cuda.graph_pool_handle()
            collecting = gc.isenabled()
            gc.disable()  # freeing a tensor could call CUDA in the midst of the recording
            try:
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    result = compute(inputs)
                finally:
                    graph.capture_end()
            finally:
                if collecting:
                    gc.enable()
        self._graphs.add(graph)
        return graph.replay, result


class Recorded(NamedTuple):
    """A recorded pass."""

    inputs: Tensor
    replay: Callable[[], None]
    result: Tensor
    held: Any
    """Tensors that the recording reads, and that nobody else may keep."""


class Graphs:
    """Recordings of passes, for `run_pass`: the first of a key runs eagerly; the second is recorded, and it
    and all later ones are replayed.

    If recording fails, all later passes run eagerly, with a warning in the log.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.recorder: Recorder | None = recorder
        self.recordings: dict[Hashable, Recorded | None] = {}
        """The least recently used key first; None: it was met once."""
        self.replays = 0
        self.addresses: tuple[Sequence[int] | None, ...] | None = None
        """Addresses of the tensors that the recordings read; None: nothing can be recorded."""

    def drop_stale(self, *addresses: Sequence[int] | None) -> None:
        """Drop the recordings if the tensors that they read have moved.

        addresses: of the tensors of each model and drafter; None where the model or drafter cannot be
        recorded.
        """
        known = None if None in addresses else addresses
        if known != self.addresses:
            self.addresses = known
            self.recordings.clear()

    def recording_of(
        self, key: Hashable, inputs: Tensor, compute: Compute, device: torch.device, held: Any
    ) -> Recorded | None:
        """The recording of a key, for `run_pass`; None the first time, and if recording fails."""
        met, recording = key in self.recordings, self.recordings.pop(key, None)
        if met and recording is None:
            recording = self._record(inputs.to(device, non_blocking=True), compute, held)
        self.recordings[key] = recording
        if len(self.recordings) > LIMIT:
            del self.recordings[next(iter(self.recordings))]
        return recording

    def _record(self, inputs: Tensor, compute: Compute, held: Any) -> Recorded | None:
        assert self.recorder is not None
        try:
            return Recorded(inputs, *self.recorder.record(compute, inputs), held)
        except Exception:  # of any kind: if the pass itself is at fault, it raises again when run eagerly
            log.warning(
                "a pass could not be recorded; passes run without CUDA graphs. If CUDA ended the recording, "
                "torch's allocator may believe that it goes on, and then keeps memory that several streams "
                "have used: restart this process before its GPU is full",
                exc_info=True,
            )
            self.recorder = None
            return None


def recorded_key(key: Any, rows: int, most: int) -> Hashable:
    """The key of the recording of a pass of `rows` rows, for `run_pass`; None if these are more than `most`.

    key: a tuple with the sampling groups at its end, whose tensors a recording's key may not hold.
    """
    if rows > most:
        return None
    return (*key[:-1], tuple(group.key for group in key.groups))


def run_pass(
    graphs: Graphs | None,
    key: Hashable,
    inputs: Tensor,
    compute: Compute,
    *,
    device: torch.device,
    held: Any,
) -> Tensor:
    """compute(inputs), replayed where it can be.

    graphs: None: nothing can be recorded. key: all that the launches depend on beside the values of `inputs`;
    None: run eagerly, in turn. inputs: (n,) int64 on the CPU. held: objects that must live as long as the
    recording.
    """
    recorder = None if graphs is None or graphs.addresses is None else graphs.recorder
    with nullcontext() if recorder is None else recorder.turn():
        if graphs is None or recorder is None or key is None:
            recording = None
        else:
            recording = graphs.recording_of(key, inputs, compute, device, held)
        if graphs is None or recording is None:
            return compute(inputs.to(device, non_blocking=True))
        recording.inputs.copy_(inputs, non_blocking=True)
        recording.replay()
        graphs.replays += 1
        return recording.result.clone()  # the next replay, of any key, may write there
