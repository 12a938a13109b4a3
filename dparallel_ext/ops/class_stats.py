"""Op: `class_stats`, the statistics of each class of ids of rows of logits, each row read once."""

from __future__ import annotations

from torch import Tensor

from ..types import RowStats
from .fake import register_fake
from .kernel import kernel
from .row_stats import as_stats, row_outputs

_class_stats = kernel("class_stats")


def class_stats(logits: Tensor, ids: Tensor, offsets: Tensor) -> RowStats:
    """For each row and class the `row_stats` of the class's logits alone, with `check=False`.

    So `merge_parts` of some classes are the statistics among their ids. An id that the logits do not have
    counts as one whose logit is -inf.

    Args:
        logits: (N, V) float32, bfloat16 or float16, any strides.
        ids: (M,) int32, class by class, ascending in each.
        offsets: (K + 1,) int64: where each class begins in `ids`, and the end of the last.

    Returns:
        RowStats (N, K).

    Raises:
        ValueError: naming the argument that does not fit; on the CPU, offsets that are not ascending.
    """
    tokens, fields = _class_stats(logits, ids, offsets)
    return as_stats(tokens, fields, tokens.shape[1:])


@register_fake("class_stats")
def _(logits: Tensor, offsets: Tensor) -> tuple[Tensor, ...]:
    rows, classes = logits.shape[:-1].numel(), offsets.shape[0] - 1
    tokens, fields, _ = row_outputs(logits, rows * classes, 0)
    return tokens.view(len(tokens), rows, classes), fields.view(len(fields), rows, classes)
