"""CreditDecoding (arXiv 2510.06133): tokens that were predicted before count for more.

Each masked position and id has a credit C, which every pass updates:

    C <- decay C;  C[argmax] += p(argmax) ^ power;  z' = z + scale log(1 + C)

The policy row judges softmax(z'). Only ids that were the argmax have credit, so the state is a few ids for
each position. z' differs from z at these ids alone, so its statistics follow from those of z.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..arguments import check_fields, number, whole
from ..ops.row_stats import LARGEST
from ..types import RowStats
from .protocol import Decision, Rule, Where


@dataclass(frozen=True)
class Credit(Rule):
    """Adds the credit of earlier passes to the logits; the policy row decides by the statistics of the sum.

    Exact as long as at most `kept` ids have been the argmax of a position; the id with the least credit is
    dropped for another.
    """

    scale: float = 0.7
    decay: float = 0.8
    power: float = 0.2
    kept: int = 8

    row = "confidence:0.9"
    greedy = True
    by_row = True
    without = ("margin",)  # the statistics do not name the id of the second logit, so its credit is not known

    def __post_init__(self) -> None:
        check_fields(self, ("scale", "power"), number)
        check_fields(self, ("decay",), number, 0, 1)
        check_fields(self, ("kept",), whole, 1)

    def new_state(self, lanes: int, columns: int, device: torch.device) -> tuple[Tensor, ...]:
        ids = torch.zeros((lanes, columns, self.kept), dtype=torch.int64, device=device)
        return ids, torch.zeros(ids.shape, device=device)

    def decide(self, stats: RowStats, where: Where, state: tuple[Tensor, ...]) -> Decision:
        ids, credit = (where.recall(remembered) for remembered in state)  # (W, C, K)
        token = stats.token[..., None]
        credit = credit * self.decay
        slot = torch.where((ids == token) & (credit > 0), torch.inf, -credit).argmax(2, keepdim=True)
        before = credit.gather(2, slot) * (ids.gather(2, slot) == token)
        gained = stats.confidence[..., None] ** self.power  # nothing is sampled: p(argmax)
        ids = ids.scatter(2, slot, token)
        credit = credit.scatter(2, slot, before + gained)
        for remembered, values in zip(state, (ids, credit), strict=True):
            where.remember(remembered, values)
        raised = self._raised(stats, where.logits(ids), credit, ids)
        return Decision(where.by_policy(raised), raised.token)

    def _raised(self, stats: RowStats, z: Tensor, credit: Tensor, ids: Tensor) -> RowStats:
        """The statistics (W, C) of z'. stats: of the logits before credit; z, credit, ids: (W, C, K)."""
        has = credit > 0
        # Logits less the argmax's, so that sums are finite where it is +inf, which counts as the largest.
        largest = stats.top1.double().clamp(max=LARGEST)
        z = z.double() - largest[..., None]
        lse, entropy = -stats.confidence.double().log(), stats.entropy.double()
        up = z + self.scale * credit.double().log1p()
        top = torch.where(has, up, -torch.inf).amax(2)  # the argmax has credit, so no id without is above
        token = torch.where(has & (up == top[..., None]), ids, torch.iinfo(torch.int64).max).amin(2)

        def terms(values: Tensor) -> tuple[Tensor, Tensor]:
            """The sums of e^v and of e^v v over the ids, in units of e^top."""
            e = torch.where(has, (values - top[..., None]).exp(), 0.0)
            return e.sum(2), torch.where(e > 0, e * values, 0.0).sum(2)

        (before, before_z), (raised, raised_z) = terms(z), terms(up)
        mass = (lse - top).exp()
        total = mass - before + raised
        weighted = mass * (lse - entropy) - before_z + raised_z
        lse = top + total.log()
        return stats._replace(
            token=token,
            sample=token,
            lse=(largest + lse).float(),
            confidence=(1 / total).float(),
            entropy=(lse - weighted / total).clamp(min=0).float(),
            margin=torch.zeros_like(stats.margin),
        )
