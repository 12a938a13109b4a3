"""Longest prefix decoding (SDLM, arXiv 2509.24007): masks are committed from left to right alone."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..types import RowStats
from .protocol import Decision, Rule, Where


@dataclass(frozen=True)
class Leading(Rule):
    """Commits a window's masks in front of the first that the policy row does not choose; where that is the
    window's first mask, this mask alone. With `confidence:0.9` it is the longest run of confident tokens."""

    row = "confidence:0.9"
    by_row = True

    def decide(self, stats: RowStats, where: Where, state: tuple[Tensor, ...]) -> Decision:
        masked = where.masked
        chosen = where.by_policy(stats)
        run = chosen & ((masked & ~chosen).cumsum(1) == 0)
        first = masked & (masked.cumsum(1) == 1) & where.must_move
        return Decision(run | first)
