"""The k best tokens of rows of logits, each needed row read once; draft trees branch into them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import whole
from ..types import RowTopK
from . import streams
from .errors import named_row, report
from .fake import register_fake
from .inputs import Ids, check_index, check_logits, mask_id_of, rows_view, suppressed
from .kernel import kernel

_row_topk = kernel("row_topk")

MOST = 32


def row_topk(
    logits: Tensor,
    k: int,
    *,
    rows: Tensor | None = None,
    mask_id: int | None = None,
    suppress: Ids = None,
    check: bool = True,
) -> RowTopK:
    """The k largest logits of each row, in descending order, and their log-probabilities.

    Ties go to the lowest id. The log-probabilities are of the softmax of the whole row, as in `row_stats` and
    within the same bounds; the first is that of `row_stats`'s `token`.

    Args:
        logits: (..., V) float32, bfloat16 or float16, any strides (copied where the vocabulary is not
            contiguous).
        k: 1 to 32.
        rows: (N,) int64 flat indices into the leading dimensions; only these rows are read.
        mask_id: the mask token, which has its share of the softmax but is never chosen.
        suppress: ids (n,) that are left out of the softmax.
        check: False reports no bad row, see below, on either device; it has the ids -1 and NaN.

    Returns:
        RowTopK of token (..., k) int64 and logprob (..., k) float32, or (N, k) with `rows`. If fewer than k
        ids have a logit above -inf, token -1 and logprob -inf follow them. A logit of +inf counts as the
        largest float32: several of them share the probability evenly.

    Raises:
        ValueError: naming the argument that does not fit; and on the CPU, for a row that holds NaN or leaves
            no token to choose. On CUDA, see `check_errors`: such a row has the ids -1 and NaN.
        TypeError: naming an argument that should be a tensor and is not.
    """
    check_logits(logits)
    if type(k) is not int or not 1 <= k <= MOST:
        k = whole("k", k, 1, MOST)
    shape = logits.shape[:-1]
    if rows is not None:
        check_index("rows", rows, logits)
        shape = rows.shape
    tokens, logprobs, error = _row_topk(
        rows_view(logits),
        k,
        rows,
        mask_id_of(mask_id, logits.shape[-1]),
        suppressed(suppress, logits),
        streams.counters_for(logits, shape.numel()),
    )
    if check:
        report(error, named_row)
    return RowTopK(tokens.view(*shape, k), logprobs.view(*shape, k))


@register_fake("row_topk")
def _(logits: Tensor, k: int, rows: Tensor | None) -> tuple[Tensor, ...]:
    count = logits.shape[:-1].numel() if rows is None else rows.shape[0]
    return (
        logits.new_empty((count, k), dtype=torch.int64),
        logits.new_empty((count, k), dtype=torch.float32),
        logits.new_empty((count,), dtype=torch.int64),
    )
