"""The most probable tokens of a place, beside the token that was drawn there."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..ops import row_topk
from ..ops.row_stats import LARGEST
from ..types import RowTopK
from .sequence_settings import SamplingGroup

MOST = 20
"""As many as OpenAI's API lists."""
ROUNDING = 1e-5
"""Of a sum of probabilities; what is left out by top_p may have a smaller share."""


def most_probable(
    logits: Tensor,
    rows: Tensor,
    drawn: Tensor,
    logprob: Tensor,
    group: SamplingGroup,
    *,
    mask_id: int | None = None,
) -> RowTopK:
    """The `MOST` most probable tokens of rows of logits (N, V), and their log-probabilities, in the
    distribution that each row's token was drawn from. Ties go to the lowest id.

    Args:
        rows: (n,) int64.
        drawn, logprob: (n,) int64 and float32: the token of each row, and its log-probability.
        group: what temperature, top_p, top_k and suppressed ids made the distribution.
        mask_id: as `row_stats` has it.

    Returns:
        token (n, MOST) int64 and logprob (n, MOST) float32; -1 and -inf where fewer can be drawn.
    """
    token = row_topk(logits, MOST, rows=rows, mask_id=mask_id, suppress=group.suppress, check=False).token
    ids = torch.cat((drawn[:, None], token), 1).clamp(min=0)
    z = logits[rows[:, None], ids].float().clamp(max=LARGEST)
    # Relative to the token's own log-probability, which is among the ids that could be drawn.
    values = (logprob[:, None] + (z[:, 1:] - z[:, :1]) / (group.temperature or 1.0)).clamp(max=0.0)
    out = token < 0
    if group.temperature > 0:
        if group.top_k:
            out[:, group.top_k :] = True
        if group.top_p < 1:  # all that can be drawn is in front of these
            p = values.exp()
            out |= p.cumsum(1) - p > 1 - ROUNDING
    return RowTopK(token.masked_fill(out, -1), values.masked_fill(out, -math.inf))
