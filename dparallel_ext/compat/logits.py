"""Logits as the published loops see them: of whole sequences without padding, shifted models' moved by
one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import models
from ..ops.errors import Cell, report
from ..types import NO_ERROR


def logits_of(model: Any, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """(B, L, V): the logits at column p are for the token of column p; 0 for padding."""
    if attention_mask is not None and not bool(attention_mask.all()):
        logits: Tensor | None = None
        for b, is_visible in enumerate(attention_mask):
            row = logits_of(model, x[b, is_visible][None])[0]
            if logits is None:
                logits = row.new_zeros((*x.shape, row.shape[-1]))
            logits[b, is_visible] = row
        assert logits is not None
        return logits
    logits = models.logits_of(models.for_decoding(model), x)
    return torch.cat((logits[:, :1], logits[:, :-1]), 1) if models.traits(model).shift else logits


def report_rows(error: Tensor, b: Tensor, column: Tensor, length: int) -> None:
    """Report the errors (N,) of rows of logits that are for tokens [b, column] (N,) of sequences of `length`,
    as ValueErrors that name sequence and position; on a GPU see `ops.check_errors`."""
    report(torch.where(error == NO_ERROR, error, 4 * (b * length + column) + error % 4), Cell(length))
