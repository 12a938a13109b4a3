"""Hashes that tell models apart, by which drafters, filters and measurements name theirs."""

from __future__ import annotations

import hashlib
import weakref
from typing import Any

import torch
from torch import Tensor

from .base import Model
from .wrappers import unwrap

_KNOWN: weakref.WeakKeyDictionary[Model, str] = weakref.WeakKeyDictionary()


def fingerprint(model: Any) -> str | None:
    """A hash that tells models apart, of the final norm and 64 rows of the head; None if not a native model.

    It is the same in every dtype, on every device and in 8 bits. It is computed once for each object, so that
    later training does not change it. `models.load` computes it of the checkpoint's numbers where it makes
    them float16; of a model that was made float16 otherwise it is another one.
    """
    inner = unwrap(model)
    if not isinstance(inner, Model):
        return None
    if inner not in _KNOWN:
        remember(inner, inner.norm.weight, inner.lm_head.weight)
    return _KNOWN[inner]


def remember(model: Model, norm: Tensor, head: Tensor) -> None:
    """Set the fingerprint of a model to that of these weights of its final norm and its head."""
    digest = hashlib.sha256()
    for some in (norm, head[:: -(-len(head) // 64)]):
        numbers = some.detach().flatten().to(torch.bfloat16)
        digest.update(numbers.cpu().view(torch.uint8).numpy().tobytes())
    _KNOWN[model] = digest.hexdigest()[:16]
