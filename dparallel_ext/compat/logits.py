"""Logits as the published loops see them: of whole sequences without padding, shifted models' moved by
one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arguments import check_tensor
from ..models import for_decoding, own_precision, traits
from ..ops.errors import NO_ERROR, Cell, report


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
    check_tensor("model: its logits", logits)
    if logits.shape[:-1] != x.shape:
        raise ValueError(f"model: expected logits ({x.shape[0]}, {x.shape[1]}, V), got {tuple(logits.shape)}")
    return torch.cat((logits[:, :1], logits[:, :-1]), 1) if traits(model).shift else logits


def report_rows(error: Tensor, b: Tensor, column: Tensor, length: int) -> None:
    """Report the errors (N,) of rows of logits that are for tokens [b, column] (N,) of sequences of `length`,
    as ValueErrors that name sequence and position; on a GPU see `ops.check_errors`."""
    report(torch.where(error == NO_ERROR, error, 4 * (b * length + column) + error % 4), Cell(length))
