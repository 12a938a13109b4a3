"""Packs int64 tensors into one: a single copy brings all that a pass needs to the device, and another its
results back."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

Shapes = tuple[tuple[int, ...], ...]

COUNTING = array("q", range(2**16))
"""The numbers that `Packing.ascending` copies slices of."""


def unpack(numbers: Tensor, shapes: Shapes) -> list[Tensor]:
    """The tensors of these shapes, as views of the packed `numbers` (n,)."""
    parts = torch.split_with_sizes(numbers, [math.prod(shape) for shape in shapes])
    return [part if len(shape) == 1 else part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def bits_of(values: Tensor) -> Tensor:
    """The bits of float32 `values` as int64, so that one tensor holds them and ids; see `floats_of`."""
    return values.view(torch.int32).to(torch.int64)


def floats_of(bits: Tensor) -> Tensor:
    """The float32 values whose bits are these, see `bits_of`."""
    return bits.to(torch.int32).view(torch.float32)


class Packing:
    """Packs tensors number by number: a pass has many short tensors, and each torch operator costs as much as
    a hundred numbers do here. `close` ends a tensor.
    """

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self._parts: list[Tensor] = []
        self._last = array("q")
        """Numbers that come after the last of `_parts`."""

    def add(self, numbers: Iterable[int]) -> None:
        """Add numbers of 64 bits."""
        self._last += array("q", numbers if isinstance(numbers, list) else list(numbers))

    def ascending(self, start: int, end: int) -> None:
        """Add start, start + 1, ..., end - 1."""
        if start >= 0 and end <= len(COUNTING):
            self._last += COUNTING[start:end]
        elif end - start < 128:  # torch is faster for more
            self.add(range(start, end))
        else:
            self._append(torch.arange(start, end, device="cpu"))

    def repeat(self, number: int, count: int) -> None:
        """Add a number `count` times."""
        self._last += array("q", (number,)) * count

    def floats(self, numbers: Sequence[float]) -> None:
        """Add float32 numbers, two in each int64, padded with a zero; read them by `view(torch.float32)`."""
        self._last.frombytes(array("f", [*numbers, *[0.0] * (len(numbers) % 2)]).tobytes())

    def padded(self, numbers: Sequence[int], filler: int, *shape: int) -> None:
        """Add a tensor of this shape: the numbers, followed by `filler`."""
        self.filled(numbers, filler, math.prod(shape))
        self.shapes.append(shape)

    def filled(self, numbers: Sequence[int], filler: int, count: int) -> None:
        """Add `count` numbers: these, followed by `filler`."""
        self._last += array("q", numbers)
        self._last += array("q", (filler,)) * (count - len(numbers))

    def close(self, *shape: int) -> None:
        """Make a tensor of this shape of the numbers added since the last one."""
        self.shapes.append(shape)

    def tensors(self, tensors: Iterable[Tensor]) -> None:
        """Add int64 tensors, each with its shape."""
        for tensor in tensors:
            self._append(tensor if tensor.ndim == 1 else tensor.reshape(-1))
            self.shapes.append(tuple(tensor.shape))

    def pack(self, device: torch.device | None = None) -> tuple[Tensor, Shapes]:
        """All tensors in one (n,) int64 on the CPU, and their shapes.

        device: where it is copied to. For a GPU it is in pinned memory: else the copy may wait for earlier
        work there.
        """
        self._end_last()
        parts = self._parts or [torch.empty(0, dtype=torch.int64, device="cpu")]
        packed = torch.cat(parts)
        if device is not None and device.type == "cuda":
            packed = packed.pin_memory()
        return packed, tuple(self.shapes)

    def _append(self, part: Tensor) -> None:
        self._end_last()
        self._parts.append(part)

    def _end_last(self) -> None:
        if self._last:
            self._parts.append(torch.frombuffer(self._last, dtype=torch.int64))
            self._last = array("q")
