"""End-of-text prediction (Learn2PD, arXiv 2509.25188): end where the model is sure that nothing follows.

As published, any predicted end of text ends the response, the most confident one if there are several. Here
the first one whose probability reaches a floor ends it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..arguments import check_fields, number, whole
from ..types import RowStats
from .protocol import Decision, Rule, Where


@dataclass(frozen=True)
class EndOfText(Rule):
    """Fills all masks with `eos`, from the first mask on that has `eos` predicted with a probability >=
    `floor`.

    It sees the masks that the pass has logits for; with the caches "none" and "prefix" also those of later
    blocks. It saves passes over blocks without text; with `eos_id` the sequence then ends.
    """

    eos: int
    floor: float = 0.9

    reads = "response"
    greedy = True

    def __post_init__(self) -> None:
        check_fields(self, ("eos",), whole, 0)
        check_fields(self, ("floor",), number, 0, 1)

    @property
    def tokens(self) -> tuple[int, ...]:  # type: ignore[override]
        """The end of text."""
        return (self.eos,)

    def decide(self, stats: RowStats, where: Where, state: tuple[torch.Tensor, ...]) -> Decision:
        ends = where.open & (stats.token == self.eos) & (stats.confidence >= self.floor)
        behind = where.open & (ends.cumsum(1) > 0)
        token = torch.where(behind, self.eos, stats.token)
        return Decision(where.by_policy(stats) | behind, token)
