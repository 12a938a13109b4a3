"""A GPU's streams: the current one, whether it records, and the counters that its launches share."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def stream_of(device: torch.device) -> int:
    """The handle of the current stream of a GPU; 0 on other devices."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def capturing(device: torch.device) -> bool:
    """Whether launches are being recorded now, by any code, and not run."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


counter_buffers: dict[tuple[torch.device, int], list[Tensor]] = {}
_own_recording = threading.local()


@contextmanager
def own_recording() -> Iterator[None]:
    """A context in which recorded launches use the counters of the stream that they are recorded on.

    For recordings that are replayed on that stream alone. The launches must have run there before, so that
    the counters exist.
    """
    _own_recording.active = True
    try:
        yield
    finally:
        _own_recording.active = False


def counters_for(like: Tensor, needed: int) -> Tensor | None:
    """int32 zeros for the CUDA kernels' last-block-done counters, which they leave zero again.

    There is one buffer per stream, so that launches that may overlap never share one. Launches recorded by
    other code, or compiled, get zeros of their own, since they may be replayed on any stream.
    """
    if like.device.type != "cuda":
        return None
    is_apart = not torch.compiler.is_compiling()
    if is_apart and capturing(like.device):
        is_apart = getattr(_own_recording, "active", False)
    if not is_apart:
        return torch.zeros(needed, dtype=torch.int32, device=like.device)
    buffers = counter_buffers.setdefault((like.device, stream_of(like.device)), [])
    if not buffers or buffers[-1].numel() < needed:
        size = max(4096, 2 * buffers[-1].numel() if buffers else 0, needed)
        # Smaller buffers stay: CUDA graphs may hold their addresses.
        buffers.append(torch.zeros(size, dtype=torch.int32, device=like.device))
    return buffers[-1]
