"""Which tensors share memory, by strides alone, as csrc/torch/checks.h finds it for the kernels."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Step = tuple[int, int, int]
"""A stride in bytes, and the least and the most steps of it."""


def own_memory(changed: Mapping[str, Tensor], read: Mapping[str, Tensor | None]) -> None:
    """Raise ValueError unless each element of the tensors that are changed in place has memory of its own.

    Tensors by the names of the arguments. For float64; the kernels check theirs. Compiled code does not check
    it.
    """
    if torch.compiler.is_compiling():
        return
    others: dict[str, Tensor | None] = {**changed, **read}
    for name, tensor in changed.items():
        del others[name]
        span = 0  # of the smaller strides
        for stride, size in sorted(
            (s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1
        ):
            if tensor.numel() and stride <= span:
                raise ValueError(
                    f"{name}: expected memory of its own for each element, which is changed in place, got "
                    f"{size} elements at a stride of {stride}"
                )
            span += stride * (size - 1)
        for other, its in others.items():
            if its is not None and share_memory(tensor, its):
                raise ValueError(
                    f"{name}: expected memory of its own, which is changed in place, got some of {other}"
                )


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether a byte belongs to an element of both."""
    if not (a.numel() and b.numel()):
        return False
    reach = {1: [1 - b.element_size(), a.element_size() - 1]}  # elements of one size may lie askew
    for tensor, end, sign in ((a, 1, 1), (b, 0, -1)):
        for stride, size in zip(tensor.stride(), tensor.shape, strict=True):
            reach.setdefault(stride * tensor.element_size(), [0, 0])[end] += sign * (size - 1)
    steps = [(stride, low, high) for stride, (low, high) in sorted(reach.items(), reverse=True) if stride]
    return _is_sum(b.data_ptr() - a.data_ptr(), steps)


def _is_sum(distance: int, steps: list[Step]) -> bool:
    """Whether the distance is a sum of such steps, whose strides descend."""
    if not steps:
        return distance == 0
    (stride, low, high), *smaller = steps
    below, above = (sum(step[0] * step[end] for step in smaller) for end in (1, 2))
    first, last = max(low, -((above - distance) // stride)), min(high, (distance - below) // stride)
    return any(_is_sum(distance - n * stride, smaller) for n in range(first, last + 1))
