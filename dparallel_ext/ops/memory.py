"""Which tensors share memory, as csrc/include/dparallel/memory.h finds it for the kernels too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import _C


def own_memory(changed: Mapping[str, Tensor], read: Mapping[str, Tensor | None]) -> None:
    """Raise ValueError unless each element of the tensors that are changed in place has memory of its own.

    Tensors by the names of the arguments. For float64; the kernels check theirs. Compiled code does not check
    it.
    """
    if not torch.compiler.is_compiling():
        _C.own_memory(_layouts(changed), _layouts(read))


def _layouts(tensors: Mapping[str, Tensor | None]) -> list[tuple[Any, ...]]:
    return [
        (name, t.data_ptr(), t.element_size(), list(zip(t.stride(), t.shape, strict=True)))
        for name, t in tensors.items()
        if t is not None
    ]
