"""Errors of rows that ops find bad: raised at once on a CPU, kept on a GPU until `check_errors` reads
them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..types import NO_ERROR
from . import streams
from .keep_error import keep_error_

ERRORS = {
    1: "logits: {} holds NaN",
    2: "logits: {} leaves no token to choose: every logit that may be chosen is -inf",
    3: "logits: {} is masked and in the active window, but `positions` does not list it",
}

PositionName = Callable[[int], str]
"""Names a flat position. It is hashable, and equal to a function that names all positions alike."""


@dataclass(frozen=True)
class Cell:
    """Names a flat position of tokens (B, length), whose columns count from `offset`."""

    length: int
    offset: int = 0

    def __call__(self, at: int) -> str:
        return f"sequence {at // self.length} at position {at % self.length + self.offset}"


def named_row(at: int) -> str:
    """Names a row by its number."""
    return f"row {at}"


def lane_row(at: int) -> str:
    """Names a row of `accept`: lane * 2^31 + row within it, as in csrc/include/dparallel/accept.h."""
    return f"row {at & 0x7FFFFFFF} of lane {at >> 31}"


class Errors:
    """The errors that the launches of one stream have found, on the device until they are read.

    There is a word (an int64 on the device) for each kind of report: a function that names rows, and the
    texts. It holds the error of the first report since it was read, the least if several rows had one: in
    training, later errors follow from the first. A report costs one small kernel and no memory.
    """

    KINDS = 64

    def __init__(self, device: torch.device) -> None:
        self.words = torch.full((self.KINDS,), NO_ERROR, device=device)
        self.word_of = self.words.unbind()
        self.stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self.kinds: dict[tuple[PositionName, tuple[tuple[int, str], ...]], int] = {}
        """Kind -> index of its word."""

    def report(self, error: Tensor, where: PositionName, texts: Mapping[int, str]) -> None:
        """Keep the least of the errors (N,) int64 for the next `read`; for the arguments see `explain`."""
        kind = where, tuple(texts.items())
        at = self.kinds.get(kind)
        if at is None:
            if len(self.kinds) == self.KINDS:
                if streams.capturing(error.device):
                    return  # a recording cannot read words, and must keep those that it writes
                self.read()
                self.kinds.clear()
            at = self.kinds[kind] = len(self.kinds)
        keep_error_(self.word_of[at], error)

    def read(self) -> None:
        """Raise ValueError for the first kind that has an error, with all words reset. Waits for the
        stream."""
        # Waiting for the whole device is forbidden while anybody records.
        here = None if self.stream is None else torch.cuda.current_stream(self.words.device)
        if self.stream is not None and here is not None:
            here.wait_stream(self.stream)
        errors = self.words.tolist()
        if min(errors) == NO_ERROR:
            return
        self.words.fill_(NO_ERROR)
        if self.stream is not None and here is not None:
            self.stream.wait_stream(here)
        for (where, texts), at in self.kinds.items():
            explain(errors[at], where, dict(texts))


pending: dict[tuple[torch.device, int | None], Errors] = {}
"""(device, stream) -> errors. Recorded launches may be replayed on any stream, so they have an entry of their
own, stream None. It is made by the first launch that is not recorded, such as the warm-up of a recording."""
pending_lock = threading.Lock()


def check_errors(device: torch.device | str | None = None) -> None:
    """Raise ValueError for a bad row that a CUDA op has met since the last call; this synchronises.

    Errors of a CUDA graph of yours are raised if its replay comes before this call on the current stream.

    device: "cuda" is every GPU of this process, and None every device.
    """
    wanted = None if device is None else torch.device(device)
    with pending_lock, torch.inference_mode():
        for (of, _), errors in pending.items():
            if wanted is None or (of.type == wanted.type and wanted.index in (None, of.index)):
                errors.read()


def report(error: Tensor, where: PositionName, texts: Mapping[int, str] = ERRORS) -> None:
    """Raise ValueError for the least of the errors (N,) int64, see `explain`; on a GPU keep it for
    `check_errors`, without waiting."""
    if torch.compiler.is_compiling() or isinstance(error, torch._subclasses.FakeTensor) or error.is_meta:
        return
    device = error.device
    if not waits(device):
        explain(int(error.min()) if error.numel() else NO_ERROR, where, texts)
    elif error.numel():
        with pending_lock, torch.inference_mode():
            recorded = streams.capturing(device)
            if not recorded:
                for stream in (None, streams.stream_of(device)):
                    if (device, stream) not in pending:
                        pending[device, stream] = Errors(device)
            errors = pending.get((device, None if recorded else streams.stream_of(device)))
            if errors is not None:
                errors.report(error, where, texts)


def explain(error: int, where: PositionName, texts: Mapping[int, str] = ERRORS) -> None:
    """Raise ValueError for an error that a kernel reports: 4 * flat position + code; not for NO_ERROR."""
    if error != NO_ERROR:
        raise ValueError(texts[error % 4].format(where(error // 4)))


def waits(device: torch.device) -> bool:
    """Whether errors stay on the device until `check_errors`, since reading them would make the host wait."""
    return device.type != "cpu"
