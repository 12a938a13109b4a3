"""End-of-text prediction (Learn2PD, arXiv 2509.25188): end where the model is sure that nothing follows.

As published, any predicted end of text ends the response, of several ends the most confident. Here the first
end whose probability reaches a floor ends it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from ..arguments import check_fields, number, whole
from ..types import RowStats
from .protocol import Decision, Rule, Where


@dataclass(frozen=True)
class EndOfText(Rule):
    """Fills all masks with `eos`, from the first mask on that has `eos` predicted with a probability >=
    `floor`. Of several ends that mask gets its own, and the masks behind it the first of `eos`.

    It sees the masks that the pass has logits for; with the caches "none" and "prefix" also the masks of
    later blocks. It saves passes over blocks without text; with `eos_id` the sequence then ends.
    """

    eos: int | tuple[int, ...]
    floor: float = 0.9

    reads = "response"
    greedy = True

    def __post_init__(self) -> None:
        if isinstance(self.eos, (tuple, list)) and self.eos:
            object.__setattr__(self, "eos", tuple(whole("eos", id, 0) for id in self.eos))
        else:
            check_fields(self, ("eos",), whole, 0)
        check_fields(self, ("floor",), number, 0, 1)

    @property
    def tokens(self) -> tuple[int, ...]:  # type: ignore[override]
        """The ends of text."""
        return self.eos if isinstance(self.eos, tuple) else (self.eos,)

    def decide(self, stats: RowStats, where: Where, state: tuple[torch.Tensor, ...]) -> Decision:
        is_end = functools.reduce(torch.logical_or, [stats.token == id for id in self.tokens])
        count = (where.open & is_end & (stats.confidence >= self.floor)).cumsum(1)
        behind = where.open & (count > 0)
        # Masks in front of the first end, and itself, keep their tokens.
        filled = behind & (count.cumsum(1) > 1)
        token = torch.where(filled, self.tokens[0], stats.token)
        return Decision(where.by_policy(stats) | behind, token)
