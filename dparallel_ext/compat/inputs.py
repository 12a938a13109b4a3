"""Checks of the prompts that the published loops take, which are tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arguments import INTEGERS, check_ids, described
from ..decoding.settings import vocabulary
from ..models import for_decoding, ids_device, warn_of_dropout


def prompts_of(name: str, value: Any, model: Any, dims: tuple[int, ...] = (1, 2)) -> Tensor:
    """Token ids (B, P) int64, from whole numbers (B, P) or (P,), on the model's device, see `ids_device`.
    Raises ValueError naming the argument."""
    if not isinstance(value, Tensor) or value.ndim not in dims or value.dtype not in INTEGERS:
        raise ValueError(f"{name}: expected int64 (B, P), got {described(value)}")
    return torch.atleast_2d(value.to(ids_device(model) or value.device, torch.int64))


def visible(attention_mask: Any, name: str, prompts: Tensor) -> Tensor:
    """(B, P) bool: where `prompts` (B, P), the argument `name`, has no padding. Raises ValueError naming
    attention_mask."""
    shape = getattr(attention_mask, "shape", None)
    if not isinstance(attention_mask, Tensor) or shape != prompts.shape:
        got = type(attention_mask).__name__ if shape is None else tuple(shape)
        raise ValueError(f"attention_mask: expected the shape of {name} {tuple(prompts.shape)}, got {got}")
    return attention_mask.to(prompts.device, torch.bool)


def check_prompts(name: str, prompts: Tensor, model: Any) -> None:
    """Raise ValueError naming the argument for an id that the model does not have; warn of dropout."""
    called = for_decoding(model)
    warn_of_dropout(called)
    check_ids(name, [prompts], vocabulary(called))
