"""Prophet (arXiv 2508.19982) and SchED (arXiv 2512.02892): stop where the model is sure of all that is left.

Both compare the mean gap between the two largest logits with a threshold, which falls from pass to pass of
the schedule: of the fixed schedule, or else of one pass for each token of the response. At or above it, every
mask that the pass has logits for is filled at once; below it, the policy row decides. The published
thresholds are for LLaDA-8B and Dream-7B: other models' logits have other gaps. The mask token, which is never
committed, is in no gap; the published code counts it too. Above temperature 0 the tokens are samples, as a
row's are; the published code fills with the argmax.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ..arguments import check_fields, number, one_of, shown, whole
from ..ops.row_stats import LARGEST
from ..types import RowStats
from .protocol import Decision, Rule, Where

Shape = Literal["linear", "cosine", "exponential"]

_STEP = 2.0**-20  # gaps are rounded to multiples, whose sums are exact whatever the order and the padding


def _mean_gap(stats: RowStats, cells: Tensor) -> Tensor:
    """(W,) float64: the mean gap between the two largest logits over the cells (W, C) of each window, +inf
    counting as the largest float32; NaN where there is no cell."""
    gaps = stats.top1.clamp(max=LARGEST) - stats.top2.clamp(max=LARGEST)
    rounded = (gaps.double().clamp(max=2.0**20) / _STEP).round() * _STEP
    return torch.where(cells, rounded, 0.0).sum(1) / cells.sum(1)


@dataclass(frozen=True)
class Prophet(Rule):
    """Fills all masks once the mean gap over the answer's columns reaches 7.5, 5.0 or 2.5 logits, in the
    first, second and last third of the schedule.

    The answer's columns are [start, start + width) of the response, as far as it goes, masked or not.
    Published: five columns, from the second after "The answer is", which the caller puts into the response
    beforehand (`infill`). A pass without logits for one of these columns does not end early.
    """

    start: int
    width: int = 5
    bars: tuple[float, float, float] = (7.5, 5.0, 2.5)

    reads = "response"

    def __post_init__(self) -> None:
        check_fields(self, ("start",), whole, 0)
        check_fields(self, ("width",), whole, 1)
        if not isinstance(self.bars, tuple) or len(self.bars) != 3:
            raise ValueError(f"bars: expected a tuple of three numbers, got {shown(self.bars)}")
        object.__setattr__(self, "bars", tuple(number("bars", bar, -math.inf) for bar in self.bars))

    def decide(self, stats: RowStats, where: Where, state: tuple[Tensor, ...]) -> Decision:
        begin = where.first + self.start
        end = torch.minimum(begin + self.width, where.last)
        answer = (where.column >= begin[:, None]) & (where.column < end[:, None])
        seen = (begin < end) & ((where.read & answer).sum(1) == end - begin)
        progress = where.step / where.steps
        high, middle, low = self.bars
        bar = torch.where(progress < 0.33, high, torch.where(progress < 0.67, middle, low))
        sure = seen & (_mean_gap(stats, answer) >= bar)
        return Decision(where.by_policy(stats) | (where.open & sure[:, None]))


@dataclass(frozen=True)
class SchED(Rule):
    """Fills all masks once their mean gap reaches a threshold that falls from `high` to `low` logits over the
    schedule.

    Besides, at most the share `changes` of their predictions may differ from the pass before (in the first
    pass all do), and the share `floor` of the schedule must be done. As published, except that the mean is
    over one sequence, not over the batch.
    """

    high: float = 7.5
    low: float = 2.5
    kind: Shape = "linear"
    k: float = 4.0
    """How fast an exponential threshold falls."""
    floor: float = 0.0
    changes: float = 0.0

    reads = "response"

    def __post_init__(self) -> None:
        one_of("kind", self.kind, get_args(Shape))
        check_fields(self, ("high", "low", "k"), number)
        check_fields(self, ("floor", "changes"), number, 0, 1)

    def new_state(self, lanes: int, columns: int, device: torch.device) -> tuple[Tensor, ...]:
        predictions = torch.zeros((lanes, columns), dtype=torch.int64, device=device)  # + 1; 0: none yet
        return (predictions,)

    def bar(self, t: Tensor) -> Tensor:
        """The threshold (W,) at progress t (W,), from 0 to 1."""
        if self.kind == "linear":
            return self.high + (self.low - self.high) * t
        if self.kind == "cosine":
            return self.low + (self.high - self.low) * (1 + (math.pi * t).cos()) / 2
        return self.low + (self.high - self.low) * (-self.k * t).exp()

    def decide(self, stats: RowStats, where: Where, state: tuple[Tensor, ...]) -> Decision:
        (last,) = state
        left = where.open.sum(1)
        changed = (where.open & (where.recall(last) != stats.token + 1)).sum(1)
        where.remember(last, stats.token + 1)
        sure = _mean_gap(stats, where.open) >= self.bar(where.progress)
        sure &= (changed.double() / left <= self.changes) & (where.progress >= self.floor)
        return Decision(where.by_policy(stats) | (where.open & sure[:, None]))
