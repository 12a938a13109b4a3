"""Constrained decoding: the response has a given form, and a pass still commits many tokens.

Of all ways to fill the block's masks so that the response keeps the form, and can end within the columns left
for it, a pass finds the most probable one (DINGO, arXiv 2505.23061): the best path through the automaton's
states, column by column,

    best(c, s') = max over tokens t with s -t-> s' of  best(c - 1, s) + log p_c(t)

Its tokens fit together, so any of them may be committed; the policy row says which, as it does without a
form. A token counts by its share of the tokens that the form allows in the path's state. So a token without
an alternative has probability 1, and the text between a form's blanks is committed at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..automaton import FAR, Automaton, Tables
from ..ops.best_path import best_path
from ..ops.class_stats import class_stats
from ..ops.row_stats import LARGEST, merge_parts
from ..types import RowStats
from .protocol import Decision, Rule, Where


@dataclass(frozen=True)
class Constrained(Rule):
    """The response is one of the automaton's sequences; where no sequence fits into its columns, it is the
    beginning of one."""

    automaton: Automaton

    reads = "block"
    in_order = True

    def new_state(self, lanes: int, columns: int, device: torch.device) -> tuple[Tensor, ...]:
        """The automaton's `Tables`, and the state behind each column (lanes, columns)."""
        behind = torch.zeros((lanes, columns), dtype=torch.int64, device=device)
        return *self.automaton.tables(device), behind

    def reset(self, state: tuple[Tensor, ...], lane: int) -> None:
        pass  # a response begins in state 0, whatever is remembered

    def decide(self, stats: RowStats, where: Where, state: tuple[Tensor, ...]) -> Decision:
        tables, behind = Tables(*state[:-1]), state[-1]
        of_classes = class_stats(where.rows, tables.ids, tables.offsets)  # (N, K)
        last = where.last[:, None]
        end = torch.where(where.read, where.column + 1, where.first[:, None]).amax(1, keepdim=True)
        end = end.clamp(max=last)  # (W, 1)
        # The cells that the path fills: the response's cells that the pass reads, which adjoin.
        moves = where.read & (where.column >= where.first[:, None]) & (where.column < end)
        begin = moves.int().argmax(1)
        before = where.start + begin - 1
        path, token_class = best_path(
            _scores(of_classes.top1, tables, where),
            begin,
            begin + moves.sum(1),
            torch.where(before >= where.first, behind[where.lane, before.clamp(min=0)], 0),
            (last - end)[:, 0],
            tables,
        )
        where.remember(behind, path[:, 1:])
        impossible = (moves & (token_class < 0)).any(1)
        moves &= ~impossible[:, None]

        # Where no path ends in time, all tokens that may follow are allowed.
        in_time = tables.distance[path[:, -1:]] <= last - end
        left = where.cells.gather(torch.where(in_time, last - where.column - 1, FAR - 1), 0)
        allowed = tables.allowed(where.cells.gather(path[:, :-1], 0), left)[:, :-1]  # (N, K)
        among, _ = merge_parts(of_classes, allowed)
        chosen = where.cells.gather(token_class, 0).clamp(min=0)[:, None]
        token, logit = (t.gather(1, chosen)[:, 0] for t in (of_classes.token, of_classes.top1))
        assert among.max_logit is not None
        assert among.log_sum is not None
        # Less the largest logit first, so that logits of +inf share the probability.
        below = logit.clamp(max=LARGEST) - among.max_logit.clamp(max=LARGEST)
        best, share = below == 0, (below - among.log_sum).exp()
        # Where another token that is allowed is more probable, the path's is not certain at all.
        judged = {
            "confidence": torch.where(best, among.confidence, share),
            "margin": torch.where(best, among.margin, share - among.confidence),
            "entropy": torch.where(best, among.entropy, math.inf),
        }
        spread = where.cells.spread
        by_path = {
            name: torch.where(moves, spread(each, math.nan), getattr(stats, name))
            for name, each in judged.items()
        }
        commit = where.by_policy(stats._replace(**by_path))
        return Decision(commit, torch.where(moves, spread(token, -1), stats.token), impossible=impossible)


def _scores(largest: Tensor, tables: Tables, where: Where) -> Tensor:
    """(W, C, K): the largest logit of each class in each cell, less the cell's largest, scaled down; where
    the cell holds a token, 0 for its class and -inf for others. largest: (N, K)."""
    score = largest.clamp(max=LARGEST)
    score -= score.amax(1, keepdim=True).clamp(min=-LARGEST)
    score *= 2.0**-20  # exact, and a sum of the largest numbers stays finite
    score = where.cells.spread(score, -math.inf)
    number = torch.arange(score.shape[2], device=score.device)
    only = torch.where(number == tables.classes(where.token)[..., None], 0.0, -math.inf)
    return torch.where(where.open[..., None], score, only)
