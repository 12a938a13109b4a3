"""Logits as the published loops see them: of whole sequences without padding, shifted models' moved by
one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..models import for_decoding, own_precision, traits


def logits_of(model: Any, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """(B, L, V): the logits at column p are for the token of column p; 0 for padding."""
    if attention_mask is not None and not bool(attention_mask.all()):
        logits: Tensor | None = None
        for b, kept in enumerate(attention_mask):
            row = logits_of(model, x[b, kept][None])[0]
            if logits is None:
                logits = row.new_zeros((*x.shape, row.shape[-1]))
            logits[b, kept] = row
        assert logits is not None
        return logits
    called = for_decoding(model)
    with own_precision(called, x.device):
        output = called(x)
    if not hasattr(output, "logits"):
        raise ValueError(
            f"model: expected its call to return an object with .logits, got {type(output).__name__}"
        )
    logits = output.logits
    return torch.cat((logits[:, :1], logits[:, :-1]), 1) if traits(model).shift else logits
