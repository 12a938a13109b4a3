"""From the logits of a pass to tokens: in one launch by policy rows, or by statistics, a rule and a
commit."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import policies
from ..ops import select, unmask_
from ..ops.row_stats import LARGEST, read_rows
from ..rules import Decision, Rule, Where
from ..rules.protocol import Cells, expect
from ..types import NO_ERROR, RowStats
from .sequence_settings import SamplingGroup


class Predicted(NamedTuple):
    """The logits of a pass, and the windows that they are for; B sequences, W windows."""

    logits: Tensor
    """(N, V)"""
    positions: Tensor
    """(N,) int64: the flat position b * L + l of each row of logits."""
    keys: Tensor
    """(3, W) int64: the sequence's pass, from 1, and the seed and the number that key its samples."""
    progress: Tensor
    """(5, W) int64, see `sequence.SequenceState.progress`; empty where there is no rule."""
    policy: Tensor
    """(W, 5) float32 policy rows."""
    lane: Tensor | None
    """(W,) int64: each window's lane, ascending, the same number for each; None: one window for each lane."""
    cells: int
    """Columns of each window that rules see."""
    hidden: Tensor | None
    """(N, D): the head's input for each row of logits; None where the model gives logits alone."""


class Decided(NamedTuple):
    """The decision of policy rows or a rule, as far as it may be carried out."""

    stats: RowStats
    """Fields (N,): statistics of the rows that were read; ids are -1 elsewhere."""
    error: Tensor
    """(W,) int64, see `ops.errors.explain`."""
    commit: Tensor | None = None
    """(N,) bool: rows whose `token` is still to be written; None: `unmask_` has written all."""
    token: Tensor | None = None
    """(N,) int64 tokens to write."""
    remask: Tensor | None = None
    """(N,) bool: rows whose tokens become masks again, none of `commit`; None: no rows."""
    complete: Tensor | None = None
    """(W,) bool: windows whose blocks need no further pass once they have no mask; None: no windows."""


def decide(
    tokens: Tensor,
    predicted: Predicted,
    group: SamplingGroup,
    windows: Tensor,
    state: tuple[Tensor, ...],
    *,
    mask_id: int,
    given: Tensor,
) -> Decided:
    """Decide, by policy rows or the rule of `group`, which tokens its sequences' windows commit.

    tokens: (B, L) int64; policy rows commit in place, a rule leaves that to the caller.
    windows: (4, W) int64: columns [start, end) that may be filled, and columns [first, last) that a rule
        reads; empty for sequences of other groups.
    state: the rule's state tensors.
    given: (B, L) bool: positions that no rule may change.
    """
    if group.rule is not None:
        return _by_rule(tokens, predicted, group, windows, state, mask_id, given)
    step, seed, sequence = predicted.keys
    out = unmask_(
        tokens,
        predicted.logits,
        mask_id=mask_id,
        lane=predicted.lane,
        start=windows[0],
        end=windows[1],
        policy=predicted.policy,
        positions=predicted.positions,
        step=step,
        **group.arguments,
        seed=seed,
        sequence=sequence,
        check=False,
    )
    return Decided(out.stats, out.error)


def _by_rule(
    tokens: Tensor,
    predicted: Predicted,
    group: SamplingGroup,
    windows: Tensor,
    state: tuple[Tensor, ...],
    mask_id: int,
    given: Tensor,
) -> Decided:
    """`decide` by the rule of the group."""
    assert group.rule is not None
    rule, logits, positions, step = group.rule, predicted.logits, predicted.positions, predicted.keys[0]
    policy, cells = predicted.policy, predicted.cells
    turn, steps, response, asked, block = predicted.progress
    start, end, first, last = windows
    lane, column = positions // tokens.shape[1], positions % tokens.shape[1]
    held = tokens.view(-1)[positions]
    window = lane if predicted.lane is None else _windows_of(column, lane, first, last, len(tokens))
    read = (column >= first[window]) & (column < last[window])
    masks = read & (held == mask_id)
    if rule.reads == "masked":
        read = masks
    stats, errors = _statistics(predicted, group, read, column, window, mask_id)
    moves = read & (errors[window] == NO_ERROR)  # a window with a bad row commits nothing
    masks = masks & moves
    at = window * (cells + 1) + torch.where(read, column - first[window], cells)
    grid = Cells(at, len(step), cells)
    where = Where(
        lane=torch.arange(len(step), device=step.device) if predicted.lane is None else predicted.lane,
        start=first,
        read=grid.spread(read, False),
        open=grid.spread(masks, False),
        masked=grid.spread(masks & (column >= start[window]) & (column < end[window]), False),
        token=grid.spread(held, -1),
        decoded=grid.spread(moves & (held != mask_id) & ~given.view(-1)[positions], False),
        step=step,
        turn=turn,
        steps=steps,
        first=response,
        last=asked,
        block=block,
        policy=policy,
        suppress=None if group.suppress is None else group.suppress.to(positions.device),
        mask_id=mask_id,
        cells=grid,
        rows=logits,
        hidden_rows=predicted.hidden if rule.hidden else None,
    )
    by_cell = stats.map(lambda values: grid.spread(values, _blank(values)))
    # Before the rule is called, which may change what it is given.
    best = select(by_cell, where.masked, _most_confident(policy), check=False)
    decision = rule.decide(by_cell, where, state)
    commit, token, remask = _allowed(rule, decision, where, by_cell, best, mask_id)
    if decision.impossible is not None:
        expect(f"{type(rule).__name__}: impossible", decision.impossible, where.masked[:, 0])
        none = grid.gather(where.masked & decision.impossible[:, None], False)
        none = torch.where(none, 4 * positions + 2, NO_ERROR)
        errors = errors.scatter_reduce(0, window, none, "amin")
        commit &= (errors == NO_ERROR)[:, None]
    chosen = stats.sample if token is None else grid.gather(token, -1)
    if token is not None:
        stats = _of_tokens(stats, chosen, logits, group.temperature)
    back = None if remask is None else grid.gather(remask, False)
    complete = None if decision.complete is None else decision.complete & (first < last)  # of this group
    return Decided(stats, errors, grid.gather(commit, False), chosen, back, complete)


def _statistics(
    predicted: Predicted, group: SamplingGroup, read: Tensor, column: Tensor, window: Tensor, mask_id: int
) -> tuple[RowStats, Tensor]:
    """The statistics (N,) of the rows that are `read` (N,) bool, blank elsewhere, and the error of each
    window (W,) int64, see `ops.errors.explain`.

    column, window: (N,) int64, of each row.
    """
    step, seed, sequence = predicted.keys
    stats, error = read_rows(
        predicted.logits,
        mask_id=mask_id,
        **group.arguments,
        seed=seed[window],
        sequence=sequence[window],
        position=column,
        step=step[window],
    )
    bad = torch.where(read & (error != NO_ERROR), 4 * predicted.positions + error % 4, NO_ERROR)
    errors = torch.full_like(step, NO_ERROR).scatter_reduce(0, window, bad, "amin")
    return stats.map(lambda values: torch.where(read, values, _blank(values))), errors


def _allowed(
    rule: Rule,
    decision: Decision,
    where: Where,
    stats: RowStats,
    best: Tensor,
    mask_id: int,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The cells (W, C) that a rule's decision commits, as far as it may, its tokens (W, C), and the cells
    (W, C) that become masks again.

    best: (W, C) bool: each window's most confident mask. A window that must move commits it where the rule
    commits none.
    """
    if not isinstance(decision, Decision):
        raise ValueError(f"{type(rule).__name__}: decide: expected a Decision, got {type(decision).__name__}")
    commit, token, edit, remask, complete, unbounded, _ = decision
    if commit is None:
        commit = where.by_policy(stats)
    expect(f"{type(rule).__name__}: commit", commit, where.masked)
    sound = where.read
    if token is not None:
        expect(f"{type(rule).__name__}: token", token, where.token)
        sound = sound & (token >= 0) & (token < where.rows.shape[1]) & (token != mask_id)
        sound &= where.logits(token[..., None])[..., 0] > -math.inf
        if where.suppress is not None:
            # Not torch.isin, which waits for the device where ids are many.
            sound &= (token[..., None] != where.suppress).all(-1)
        token = torch.where(sound, token, stats.sample)
    commit = commit & where.open & sound
    of_windows = {"complete": complete, "unbounded": unbounded}
    for name, cells in {"edit": edit, "remask": remask, **of_windows}.items():
        if cells is not None:
            like = where.masked[:, 0] if name in of_windows else where.masked
            expect(f"{type(rule).__name__}: {name}", cells, like)
            if not rule.edits:
                raise ValueError(f"{type(rule).__name__}: {name}: expected None of a rule whose edits are 0")
    must_move = where.must_move if unbounded is None else where.must_move & ~unbounded[:, None]
    commit |= must_move & ~(commit & where.masked).any(1, keepdim=True) & best
    if remask is not None:
        remask = remask & where.decoded
        # So that every decode ends: each pass leaves fewer masks, or at least as many decoded tokens in the
        # block as there were passes over it.
        made, held = commit.sum(1), where.decoded.sum(1)
        most = made - 1 + (held - where.turn).clamp(min=0)
        fits = (remask.cumsum(1) <= most[:, None]) | ~where.open.any(1, keepdim=True)
        remask &= fits if unbounded is None else fits | unbounded[:, None]
    if edit is not None:
        edit = edit & where.decoded & sound
        commit |= edit if remask is None else edit & ~remask
    return commit, token, remask


def _of_tokens(stats: RowStats, token: Tensor, logits: Tensor, temperature: float) -> RowStats:
    """The statistics (N,) with the rule's tokens (N,) as samples. logits: (N, V)."""
    ids = torch.stack((token, stats.sample), 1).clamp(min=0)
    z, drawn = logits.gather(1, ids).float().clamp(max=LARGEST).unbind(1)
    # Relative to the sample's log-probability, which is among the ids that could be drawn.
    logprob = (stats.sample_logprob + (z - drawn) / (temperature or 1.0)).clamp(max=0.0)
    confidence = (z - stats.lse.clamp(max=LARGEST)).exp() if temperature else logprob.exp()
    return stats._replace(sample=token, confidence=confidence, sample_logprob=logprob)


def _windows_of(column: Tensor, lane: Tensor, first: Tensor, last: Tensor, lanes: int) -> Tensor:
    """(N,) int64: the window that reads each row's column; where none does, one of the same sequence."""
    each = len(first) // max(1, lanes)
    windows = lane[:, None] * each + torch.arange(each, device=lane.device)  # (N, windows of a sequence)
    inside = (column[:, None] >= first[windows]) & (column[:, None] < last[windows])
    return windows.gather(1, inside.to(torch.int8).argmax(1, keepdim=True))[:, 0]


def _most_confident(policy: Tensor) -> Tensor:
    """Policy rows (W, 5) that commit the most confident position; made on the device, as recording needs."""
    row = torch.ones_like(policy)
    row[:, 0].fill_(policies.SELECTORS["quota"])
    row[:, 4].fill_(policies.SCORES["confidence"])
    return row


def _blank(values: Tensor) -> float:
    """The value for rows that were not read: -1 for ids, NaN for statistics."""
    return -1 if values.dtype == torch.int64 else math.nan
