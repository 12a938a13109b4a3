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
from typing import NamedTuple

import torch
from torch import Tensor

from ..automaton import Automaton, Tables
from ..ops.row_stats import LARGEST, read_rows
from ..types import RowStats
from .protocol import Decision, Rule, Where


class Path(NamedTuple):
    """The best path through the C cells of W windows."""

    moves: Tensor
    """(W, C) bool: cells whose tokens it chooses: of the response, and read by the pass; none in a window
    without a path."""
    before: Tensor
    """(W, C) int64: the state in front of each cell."""
    after: Tensor
    """(W, C) int64: the state behind it."""
    token_class: Tensor
    """(W, C) int64: the class of its token."""
    exists: Tensor
    """(W,) bool"""


@dataclass(frozen=True)
class Constrained(Rule):
    """The response is one of the automaton's sequences; where none fits into its columns, the beginning of
    one."""

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
        logits = where.cells.spread(where.rows, -math.inf).float().clamp(max=LARGEST)  # (W, C, V)
        classes = tables.classes(logits.shape[2])
        path = _best_path(_scores(logits, classes, tables, where), tables, where, behind)
        where.remember(behind, path.after)
        of_path = logits.masked_fill(classes != path.token_class[..., None], -math.inf).argmax(2)
        allowed = tables.allowed(path.before, where.last[:, None] - where.column - 1)
        logits.masked_fill_(~allowed[..., classes], -math.inf)
        among, _ = read_rows(logits, ids=of_path[..., None])
        assert among.logits is not None
        best, share = among.token == of_path, (among.logits[..., 0] - among.lse).exp()
        # Where another token that is allowed is more probable, the path's is not certain at all.
        judged = {
            "confidence": torch.where(best, among.confidence, share),
            "margin": torch.where(best, among.margin, share - among.confidence),
            "entropy": torch.where(best, among.entropy, math.inf),
        }
        by_path = {name: torch.where(path.moves, each, getattr(stats, name)) for name, each in judged.items()}
        commit = where.by_policy(stats._replace(**by_path))
        return Decision(commit, torch.where(path.moves, of_path, stats.token), impossible=~path.exists)


def _scores(logits: Tensor, classes: Tensor, tables: Tables, where: Where) -> Tensor:
    """(W, C, K + 1): the largest logit of each class in each cell, less the cell's largest; where the cell
    holds a token, 0 for its class and -inf for others.

    logits: (W, C, V). classes: (V,).
    """
    score = logits.new_full((*logits.shape[:2], tables.onward.shape[1]), -math.inf)
    score.scatter_reduce_(2, classes.expand_as(logits), logits, "amax")
    score -= score.amax(2, keepdim=True).clamp(min=-LARGEST)
    held = classes[where.token.clamp(min=0)]
    only = torch.where(torch.arange(score.shape[2], device=score.device) == held[..., None], 0.0, -math.inf)
    return torch.where(where.open[..., None], score, only)


def _best_path(score: Tensor, tables: Tables, where: Where, behind: Tensor) -> Path:
    """The path with the largest sum of scores (W, C, K + 1) behind which the response can end in time.

    behind: (lanes, columns) int64: the states that are remembered for cells that the pass does not read,
    which are in front of the others.
    """
    windows, cells = where.read.shape
    origin, edge_class, target = tables.edges
    column, first, last = where.column, where.first[:, None], where.last[:, None]
    end = torch.where(where.read, column + 1, first).amax(1, keepdim=True).clamp(max=last)  # (W, 1)
    inside = (column >= first) & (column < end)
    moves, known = inside & where.read, inside & ~where.read

    def only(state: Tensor) -> Tensor:
        """(..., S): 0 for the state (...), -inf for others."""
        states = torch.arange(len(tables.distance), device=state.device)
        return torch.where(states == state[..., None], 0.0, -math.inf)

    enter = behind[where.lane, (where.start - 1).clamp(min=0)]
    best = only(torch.where(where.start > where.first, enter, 0))  # (W, S): the sums of paths up to a cell
    remembered, gained = only(where.recall(behind)), score[..., edge_class]
    bests, sums = [], []
    for c in range(cells):
        sums.append(best[:, origin] + gained[:, c])  # (W, E): of paths through each transition
        onward = torch.full_like(best, -math.inf)
        onward.scatter_reduce_(1, target.expand(windows, -1), sums[c], "amax")
        best = torch.where(moves[:, c, None], onward, torch.where(known[:, c, None], remembered[:, c], best))
        bests.append(best)

    fits = (tables.distance <= last - end) & (best > -math.inf)
    at = torch.where(fits | ~fits.any(1, keepdim=True), best, -math.inf).argmax(1)
    exists = best.gather(1, at[:, None])[:, 0] > -math.inf
    steps = []
    for c in reversed(range(cells)):
        taken = (target == at[:, None]) & (sums[c] == bests[c].gather(1, at[:, None]))
        came, token_class, _ = tables.edges[:, taken.int().argmax(1)]
        came = torch.where(moves[:, c], came, at)
        steps.append((came, at, token_class))
        at = came
    before, after, chosen = (torch.stack(each[::-1], 1) for each in zip(*steps, strict=True))
    return Path(moves & exists[:, None], before, after, chosen, exists)
