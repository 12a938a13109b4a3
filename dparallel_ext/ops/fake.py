"""Fake kernels, which give an op's results without numbers: for torch.compile and the device "meta"."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Kernel = Callable[..., Any]


def register_fake(name: str) -> Callable[[Kernel], Kernel]:
    """Decorates the fake kernel of the op `name`, whose parameters are those of the op's arguments that it
    reads. It is called for inputs that are on one device alone.

    If any input is on "meta", torch calls the fake kernel in place of the real one. Inputs on another device
    would then get results that nobody has written, or stay unchanged where the op changes them.
    """
    arguments = [a.name for a in getattr(torch.ops.dparallel, name).default._schema.arguments]

    def decorate(kernel: Kernel) -> Kernel:
        wanted = inspect.signature(kernel).parameters

        def checked(*args: Any, **kwargs: Any) -> Any:
            inputs = {**dict(zip(arguments, args, strict=False)), **kwargs}
            tensors = [(n, t.device) for n, t in inputs.items() if isinstance(t, Tensor)]
            (first, device), *others = tensors
            for other, its in others:
                if its != device:
                    raise ValueError(f"{other}: expected on {device} as {first}, got {its}")
            return kernel(**{argument: inputs[argument] for argument in wanted})

        torch.library.register_fake(f"dparallel::{name}", checked)
        return kernel

    return decorate
