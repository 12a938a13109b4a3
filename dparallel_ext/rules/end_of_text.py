"""End-of-text prediction (Learn2PD, arXiv 2509.25188): end where the model is sure that nothing follows.

As published any predicted end of text ends the response, and of several the surest. Here it takes a floor,
and the first that reaches it ends, so that what is behind it are ends of text too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..arguments import number, whole
from ..types import RowStats
from .protocol import Decision, Rule, Where


@dataclass(frozen=True)
class EndOfText(Rule):
    """Fills with `eos` all masks from the first on that it is predicted for with a probability >= `floor`.

    It sees the masks that the pass has logits for: with the caches "none" and "prefix" those of later blocks,
    too. What it saves is passes over blocks that hold no text; with `eos_id` the sequence then ends.
    """

    eos: int
    floor: float = 0.9

    reads = "response"
    greedy = True

    def __post_init__(self) -> None:
        whole("eos", self.eos, 0)
        if number("floor", self.floor) > 1:
            raise ValueError(f"floor: expected a number from 0 to 1, got {self.floor!r}")

    def decide(self, stats: RowStats, where: Where, state: tuple[torch.Tensor, ...]) -> Decision:
        ends = where.open & (stats.token == self.eos) & (stats.confidence >= self.floor)
        behind = where.open & (ends.cumsum(1) > 0)
        token = torch.where(behind, self.eos, stats.token)
        return Decision(where.by_policy(stats) | behind, token)
