"""Entropy with a penalty for distance (WeDLM, arXiv 2512.22737): masks near the text are committed first.

    score = H + penalty * (column - column of the window's first mask)

Every mask whose score is below tau is committed; where there is none, the mask with the least score.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..arguments import check_fields, number
from ..types import RowStats
from .protocol import Decision, Rule, Where


@dataclass(frozen=True)
class Distance(Rule):
    """Commits the masks whose entropy in nats, plus `penalty` for each column behind the window's first mask,
    is below `tau` (not at it); where there is none, the mask with the least sum, the first of equal ones.

    With `tau` 0 a pass commits one token. As published, the entropy is that of softmax(logits), whatever the
    temperature.
    """

    tau: float = 0.4
    penalty: float = 0.02

    alone = True

    def __post_init__(self) -> None:
        check_fields(self, ("tau", "penalty"), number)

    def decide(self, stats: RowStats, where: Where, state: tuple[Tensor, ...]) -> Decision:
        masked = where.masked
        column = torch.arange(masked.shape[1], device=masked.device)
        first = masked.to(torch.int8).argmax(1, keepdim=True)
        score = stats.entropy + self.penalty * (column - first).float()
        below = masked & (score < self.tau)
        least = column == score.masked_fill(~masked, torch.inf).argmin(1, keepdim=True)
        none = ~below.any(1, keepdim=True)
        return Decision(below | (masked & least & none & where.must_move))
