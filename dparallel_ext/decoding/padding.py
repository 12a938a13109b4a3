"""The numbers of rows that passes have: the numbers that these are padded to, and the most rows of a recorded
pass."""

from __future__ import annotations

import functools
from typing import Any

import torch

from ..backends import fast_bfloat16
from ..cache import PadTo, bucket
from ..models import Model

RECORDED = 2**37
"""Multiplications in a layer up to which a pass is recorded: 630 rows of LLaDA-8B, 2700 of a model of 1.7B.
More keep a GPU busy for longer than the host needs to issue them (beside an H200 it took 0.4 ms a layer, and
the GPU 0.3 ms for 512 rows of LLaDA-8B); and a recording would hold as much memory again as the pass."""


def recorded_rows(model: Any) -> int:
    """The most rows with which a pass of the model is recorded."""
    if not isinstance(model, Model) or model.waits:
        return 0
    s = model.shape
    weights = s.width * (2 * (s.heads + s.kv_heads) * s.head_dim + 3 * s.active_width)  # of one layer
    return RECORDED // weights


def graph_bucket(count: int, recorded: int) -> int:
    """The rows that `count` rows are padded to on a GPU: four sizes a doubling as far as passes are recorded,
    then multiples of 8.
    """
    filled = bucket(count)
    return filled if filled <= recorded else -(-count // 8) * 8


def row_padding(model: Model) -> PadTo:
    """How to pad the number of a pass's rows; None: not at all.

    On a GPU padding keeps the number of `GraphKey`s small. On a CPU, for 16-bit weights, the matrix library
    compiles code for each number of rows and keeps it for ever (half a megabyte and half a millisecond);
    where `linear` multiplies bfloat16 there is no such code.
    """
    if runs_ahead(model.device):
        return functools.partial(graph_bucket, recorded=recorded_rows(model))
    by_library = model.dtype == torch.float16 or (model.dtype == torch.bfloat16 and fast_bfloat16())
    return bucket if by_library else None


def runs_ahead(device: torch.device) -> bool:
    """Whether the host can issue work for the device without waiting for earlier work."""
    return device.type != "cpu"
