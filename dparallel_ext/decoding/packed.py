"""Tensors of whole numbers in one, so that a single copy brings all that a pass needs to the device."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

Shapes = tuple[tuple[int, ...], ...]


def pack(tensors: Iterable[Tensor]) -> tuple[Tensor, Shapes]:
    """int64 tensors of any shapes -> (n,) int64, and their shapes."""
    parts = list(tensors)
    return torch.cat([part.reshape(-1) for part in parts]), tuple(tuple(part.shape) for part in parts)


def unpack(numbers: Tensor, shapes: Shapes) -> list[Tensor]:
    """The tensors that `pack` was given, as views of its `numbers` or of a copy."""
    parts = numbers.split([math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
