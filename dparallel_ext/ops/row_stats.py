"""Statistics of rows of logits, each needed row read once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _C  # noqa: F401  (registers the ops)
from ..types import RowStats
from . import streams
from .errors import named_row, report
from .inputs import (
    Ids,
    check_index,
    check_logits,
    check_sampling,
    keys_of,
    mask_id_of,
    rows_view,
    suppressed,
)

_ROW_FIELDS = 7


def row_stats(
    logits: Tensor,
    *,
    rows: Tensor | None = None,
    mask_id: int | None = None,
    suppress: Ids = None,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | Tensor = 0,
    sequence: int | Tensor = 0,
    position: int | Tensor | None = None,
    step: int | Tensor = 0,
) -> RowStats:
    """Statistics of softmax(logits), each needed row read once.

    Args:
        logits: (..., V) float32, bfloat16 or float16, any strides (copied where the vocabulary is not
            contiguous).
        rows: (N,) int64 flat indices into the leading dimensions; only these rows are read.
        mask_id: keeps its share of the softmax but is never chosen.
        suppress: ids left out altogether.
        temperature: above 0, also draw `sample` by Gumbel-max from softmax(logits / temperature). Below 1e-5
            it is 0, and above 2^100 (1.3e30) that.
        top_p, top_k: draw it from the most probable ids alone, ties to the lowest id: from those before
            which at most `top_p` of the probability comes (nucleus sampling, arXiv 1904.09751), and at
            most `top_k` of them. None, 1.0 and 0 leave nothing out. The noise of an id stays the same.
            They are not read where the temperature is 0 (or below 1e-5).
        seed, sequence, position, step: the Philox key, one value or one per row: a sample depends on
            its key alone. `position` defaults to the row's place in the output.

    Returns:
        RowStats with fields shaped like the leading dimensions, or (N,) with `rows`. The statistics do
        not depend on temperature, top_p or top_k, but `confidence` is that of the sampled token. A logit
        of +inf counts as the largest float32: k of them share the probability evenly.

    Raises:
        ValueError: on the CPU, for a row that holds NaN or leaves no token to choose. On CUDA, see
            `check_errors`.
    """
    stats, error = read_rows(
        logits,
        rows=rows,
        mask_id=mask_id,
        suppress=suppress,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        sequence=sequence,
        position=position,
        step=step,
    )
    report(error, named_row)
    return stats


def read_rows(
    logits: Tensor,
    *,
    rows: Tensor | None = None,
    mask_id: int | None = None,
    suppress: Ids = None,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | Tensor = 0,
    sequence: int | Tensor = 0,
    position: int | Tensor | None = None,
    step: int | Tensor = 0,
) -> tuple[RowStats, Tensor]:
    """`row_stats` that leaves bad rows to the caller: errors (rows,) int64 of `explain`, by row."""
    check_logits(logits)
    shape, vocab = logits.shape[:-1], logits.shape[-1]
    flat = rows_view(logits)
    count = flat.shape[:-1].numel()
    if rows is not None:
        check_index("rows", rows, logits)
        shape, count = rows.shape, rows.numel()
    temperature, top_p, top_k = check_sampling(temperature, top_p, top_k)
    keys = None
    if temperature > 0:
        where = torch.arange(count, device=logits.device) if position is None else position
        keys = keys_of(logits, count, seed=seed, sequence=sequence, position=where, step=step)
    tokens, fields, error = torch.ops.dparallel.row_stats(
        flat,
        rows,
        mask_id_of(mask_id, vocab),
        suppressed(suppress, logits),
        temperature,
        top_p,
        top_k,
        keys,
        streams.counters_for(logits, count),
    )
    return as_stats(tokens, fields, shape), error


def as_stats(tokens: Tensor, fields: Tensor, shape: Sequence[int]) -> RowStats:
    token, sample = (x.view(shape) for x in tokens.unbind(0))
    top1, top2, lse, confidence, margin, entropy, logprob = (x.view(shape) for x in fields.unbind(0))
    return RowStats(token, top1, top2, lse, confidence, margin, entropy, sample, logprob)


def row_outputs(like: Tensor, count: Any, errors: Any) -> tuple[Tensor, Tensor, Tensor]:
    return (
        like.new_empty((2, count), dtype=torch.int64),
        like.new_empty((_ROW_FIELDS, count), dtype=torch.float32),
        like.new_empty((errors,), dtype=torch.int64),
    )


@torch.library.register_fake("dparallel::row_stats")
def _(  # type: ignore[no-untyped-def]
    logits, rows, mask_id, suppress, temperature, top_p, top_k, keys, counters
):
    count = logits.shape[:-1].numel() if rows is None else rows.shape[0]
    return row_outputs(logits, count, count)
