"""The compiled kernels as the wrappers call them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

from .. import _C  # noqa: F401  (registers the ops)

_OF_ARGUMENT = re.compile(r"[a-z_]+(, [a-z_]+)*: ")
"""The beginning of an error that names arguments, see `csrc/torch/checks.h`."""


def kernel(name: str) -> Callable[..., Any]:
    """The op torch.ops.dparallel.`name`, whose error about an argument is a ValueError with every torch.

    The library throws std::invalid_argument. Until torch 2.14 that is a ValueError in Python, from 2.15 on a
    RuntimeError, which a direct call of the op and compiled code raise there too.
    """
    op = getattr(torch.ops.dparallel, name)

    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling():
            return op(*arguments)
        try:
            return op(*arguments)
        except RuntimeError as error:
            if type(error) is RuntimeError and _OF_ARGUMENT.match(text := str(error)):
                raise ValueError(text) from None
            raise

    call.__name__ = name
    return call
