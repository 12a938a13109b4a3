"""From the logits of a pass to tokens: by a policy row in one launch, or statistics, a rule, and a commit."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import policies
from .ops import NO_ERROR, read_rows, select, unmask_
from .rows import Row
from .rules import Rule, Where
from .rules.protocol import Cells, expect
from .types import RowStats


class Way(NamedTuple):
    """How tokens are chosen: by `unmask_`, or by a rule from the statistics."""

    temperature: float
    top_p: float
    top_k: int
    rule: Rule | None
    suppress: Tensor | None

    @classmethod
    def of(cls, row: Row) -> Way:
        own = row.settings
        return cls(own.temperature, own.top_p, own.top_k, own.rule, row.suppress)

    @property
    def key(self) -> tuple[Any, ...]:
        return (*self[:4], id(self.suppress))

    @property
    def sampling(self) -> dict[str, Any]:
        """Arguments of `unmask_` and `row_stats`."""
        return {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "suppress": self.suppress,
        }


class Predicted(NamedTuple):
    """What a pass has predicted, and of whom; B sequences."""

    logits: Tensor
    """(N, V)"""
    positions: Tensor
    """(N,) int64: the flat positions b * L + l that they stand for."""
    keys: Tensor
    """(3, B) int64: each sequence's pass, from 1, and the seed and the number that key its samples."""
    progress: Tensor
    """(4, B) int64, see `rows.Row.progress`; empty where there is no rule."""
    policy: Tensor
    """(B, 5) float32"""
    cells: int
    """Of each sequence, the columns that rules see."""


def commit_(
    tokens: Tensor,
    predicted: Predicted,
    way: Way,
    windows: Tensor,
    state: tuple[Tensor, ...],
    *,
    mask_id: int,
    given: Tensor,
) -> tuple[RowStats, Tensor]:
    """Commit, in tokens (B, L), what a policy row or the rule of `way` says of some sequences' windows.

    windows: (4, B) int64: the columns [start, end) that may be filled, and those that a rule reads; of the
        sequences that go another way, nothing.
    state: what the rule remembers.
    given: (B, L) bool: what no rule may change.

    Returns (N,) statistics of the rows read, ids -1 elsewhere; and (B,) errors, see `ops.explain`.
    """
    if way.rule is not None:
        return _by_rule(tokens, predicted, way, way.rule, windows, state, mask_id, given)
    step, seed, sequence = predicted.keys
    out = unmask_(
        tokens,
        predicted.logits,
        mask_id=mask_id,
        start=windows[0],
        end=windows[1],
        policy=predicted.policy,
        positions=predicted.positions,
        step=step,
        **way.sampling,
        seed=seed,
        sequence=sequence,
        check=False,
    )
    return out.stats, out.error


def _by_rule(
    tokens: Tensor,
    predicted: Predicted,
    way: Way,
    rule: Rule,
    windows: Tensor,
    state: tuple[Tensor, ...],
    mask_id: int,
    given: Tensor,
) -> tuple[RowStats, Tensor]:
    logits, positions, (step, seed, sequence), (turn, steps, response, block), policy, cells = predicted
    start, end, first, last = windows
    flat = tokens.view(-1)
    lane, column = positions // tokens.shape[1], positions % tokens.shape[1]
    held = flat[positions]
    read = (column >= first[lane]) & (column < last[lane])
    masks = read & (held == mask_id)
    if rule.reads == "masked":
        read = masks
    stats, error = read_rows(
        logits,
        mask_id=mask_id,
        **way.sampling,
        seed=seed[lane],
        sequence=sequence[lane],
        position=column,
        step=step[lane],
    )
    bad = torch.where(read & (error != NO_ERROR), 4 * positions + error % 4, NO_ERROR)
    errors = torch.full_like(step, NO_ERROR).scatter_reduce(0, lane, bad, "amin")
    moves = read & (errors[lane] == NO_ERROR)  # a bad row keeps its own sequence from committing
    masks = masks & moves
    stats = RowStats(*(torch.where(read, values, _blank(values)) for values in stats))
    at = lane * (cells + 1) + torch.where(read, column - first[lane], cells)
    grid = Cells(at, len(step), cells)
    where = Where(
        start=first,
        read=grid.spread(read, False),
        open=grid.spread(masks, False),
        masked=grid.spread(masks & (column >= start[lane]) & (column < end[lane]), False),
        token=grid.spread(held, -1),
        decoded=grid.spread(moves & (held != mask_id) & ~given.view(-1)[positions], False),
        step=step,
        turn=turn,
        steps=steps,
        first=response,
        block=block,
        policy=policy,
        cells=grid,
        rows=logits,
    )
    by_cell = RowStats(*(grid.spread(values, _blank(values)) for values in stats))
    commit, token, edit = rule.decide(by_cell, where, state)
    if commit is None:
        commit = where.by_policy(by_cell)
    expect(f"{type(rule).__name__}: commit", commit, where.masked)
    sound = where.read
    if token is not None:
        expect(f"{type(rule).__name__}: token", token, where.token)
        sound = sound & (token >= 0) & (token < logits.shape[1]) & (token != mask_id)
        if way.suppress is not None:
            sound &= ~torch.isin(token, way.suppress.to(token.device))
        token = torch.where(sound, token, by_cell.sample)
    commit = commit & where.open & sound
    best = select(by_cell, where.masked, _one(policy), check=False)
    commit |= ~(commit & where.masked).any(1, keepdim=True) & best
    if edit is not None and rule.edits:
        expect(f"{type(rule).__name__}: edit", edit, where.masked)
        commit |= edit & where.decoded & sound
    chosen = stats.sample if token is None else grid.gather(token, -1)
    flat[positions] = torch.where(grid.gather(commit, False), chosen, held)
    if token is not None:
        own = logits.gather(1, chosen.clamp(min=0)[:, None])[:, 0].float() - stats.lse
        stats = stats._replace(sample=chosen, confidence=own.exp(), sample_logprob=own)
    return stats, errors


def _one(policy: Tensor) -> Tensor:
    """Rows like `policy` that commit the surest position; made on the device, so that it can be recorded."""
    row = torch.ones_like(policy)
    row[:, 0].fill_(policies.SELECTORS["quota"])
    row[:, 3].fill_(math.inf)
    row[:, 4].fill_(policies.SCORES["confidence"])
    return row


def _blank(values: Tensor) -> float:
    """Of ids and numbers that there are none of."""
    return -1 if values.dtype == torch.int64 else math.nan
