"""Token editing, the joint threshold of LLaDA2.1 (arXiv 2602.08676): decoded tokens may change again."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..arguments import check_fields, number, whole
from ..types import RowStats
from .protocol import Decision, Rule, Where


@dataclass(frozen=True)
class Edit(Rule):
    """Commits masks with a confidence above `mask`, and replaces a decoded token of the block if another
    token is predicted with a confidence above `edit`. Given tokens never change.

    A block is complete once it has no mask and a pass changes nothing, or after `edits` passes without a
    mask.
    """

    mask: float = 0.9
    edit: float = 0.9
    edits: int = 16

    reads = "block"
    alone = True

    def __post_init__(self) -> None:
        check_fields(self, ("mask", "edit"), number)
        check_fields(self, ("edits",), whole, 1)

    def decide(self, stats: RowStats, where: Where, state: tuple[Tensor, ...]) -> Decision:
        other = stats.sample != where.token
        return Decision(
            where.masked & (stats.confidence > self.mask),
            edit=where.decoded & other & (stats.confidence > self.edit),
        )
