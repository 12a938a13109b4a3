"""Soft parallel decoding (DMax, arXiv 2604.08302): decoded tokens stay uncertain while their block is open.

The model sees a decoded token of the open block as a mixture of the token's embedding and the mask's, by its
probability, and predicts it anew in each pass. Models have to be trained for that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..arguments import check_fields, number, whole
from ..types import RowStats
from .protocol import Decision, Rule, Where


@dataclass(frozen=True)
class Soft(Rule):
    """Commits the masks in front of the first whose confidence is below `threshold`, or else the first mask,
    and replaces every decoded token of the block by the token that is predicted now. Given tokens never
    change.

    A block is complete once it has no mask and all its predictions have a confidence of at least `accept`, or
    a pass changes nothing, or after `edits` passes.
    """

    threshold: float = 0.5
    accept: float = 0.9
    edits: int = 32

    reads = "block"
    alone = True
    soft = True
    greedy = True

    def __post_init__(self) -> None:
        check_fields(self, ("threshold", "accept"), number)
        check_fields(self, ("edits",), whole, 1)

    def new_state(self, lanes: int, columns: int, device: torch.device) -> tuple[Tensor, ...]:
        return (torch.zeros((lanes, columns), device=device),)  # the mask's share

    def decide(self, stats: RowStats, where: Where, state: tuple[Tensor, ...]) -> Decision:
        masked, decoded = where.masked, where.decoded
        doubted = masked & (stats.confidence < self.threshold)
        first = masked & (masked.cumsum(1) == 1)
        commit = (masked & (doubted.cumsum(1) == 0)) | first
        known = commit | decoded
        where.remember(state[0], torch.where(known, 1 - stats.confidence, 0))
        sure = (~(masked | decoded) | (stats.confidence >= self.accept)).all(1)
        return Decision(
            commit,
            edit=decoded & (stats.sample != where.token),
            complete=sure | (where.turn + 1 >= self.edits),
        )
