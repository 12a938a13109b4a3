"""Levenshtein editing, the decoding of LLaDA 2.2 (inclusionAI, 2026): tokens of the open block are deleted
and inserted, too.

Source: the technical report "LLaDA2.2: Enabling Agentic Diffusion Language Models via Levenshtein Editing",
and what public ports of the `generate` that comes with LLaDA2.2-mini and -flash say, since that code itself
was not at hand. Two ids of the vocabulary are no text:

    DELETE    the position goes; what is behind it moves to the left, and a mask comes at the end
    SPLIT     a mask comes in front of what the position holds, which moves to the right with all behind it;
              what leaves the block is lost

A block keeps its length. The masks that it began with are told apart from those that came later: `left` are
of the former, `fresh` of the latter. A pass t = 0, 1, ... writes

    masks     those of a confidence above MASK, unless these are fewer than `fresh` + 1 (`fresh`, once t
              reaches the number of masks that the block began with): then so many, the surest; all, once t
              reaches the block's length
    tokens    those in whose place another token has a confidence above EDIT

and the next pass sees the block as DELETE and SPLIT leave it. The last of a block's passes, the EDITS-th with
`left` = 0, writes all masks, and no DELETE or SPLIT.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_fields, number, whole
from ..types import RowStats
from .protocol import Decision, Rule, Where

STEPS = 1000
"""The passes over a block, as published; the last of them ends it."""
TRIES = 5
"""The tokens that are exchanged, as published, so that a block is not written a second time."""
FACTOR = 6364136223846793005
"""Of the numbers by which blocks are told apart."""


@dataclass(frozen=True)
class Levenshtein(Rule):
    """Commits masks with a confidence above `mask`, replaces decoded tokens by others with a confidence above
    `edit`, and carries out the ids `delete` and `split` where they are predicted. Given tokens never change
    nor move, so that what is inserted or deleted moves the tokens up to the next of them.

    A block is complete once it has no mask and a pass changes nothing, or after `edits` passes from when the
    masks that it began with are written.

    Where a pass would write what an earlier pass over the block has written, some predictions give way to the
    second best, so that it ends: the least confident of those that change something, then the next, up to
    five; as published, these are drawn at random.
    """

    mask: float = 0.5
    edit: float = 0.0
    edits: int = 16
    delete: int = 156930
    split: int = 156931

    reads = "block"
    alone = True
    greedy = True

    def __post_init__(self) -> None:
        check_fields(self, ("mask", "edit"), number)
        check_fields(self, ("edits",), whole, 1)
        check_fields(self, ("delete", "split"), whole, 0)
        if self.delete == self.split:
            raise ValueError(f"split: expected another id than delete, {self.delete}, got {self.split}")

    @property
    def tokens(self) -> tuple[int, ...]:  # type: ignore[override]
        """The ids that are carried out."""
        return self.delete, self.split

    def check(self, model: Any, block_length: int) -> None:
        config = getattr(model, "config", None)
        for name in ("delete", "split"):
            stated, own = getattr(config, f"{name}_token_id", None), getattr(self, name)
            if stated is not None and stated != own:
                raise ValueError(
                    f"rule: expected {name}={stated}, the {name}_token_id of the model, got {own}"
                )

    def new_state(self, lanes: int, columns: int, device: torch.device) -> tuple[Tensor, ...]:
        began = torch.zeros((lanes, columns), dtype=torch.bool, device=device)  # tokens that began as masks
        seen = torch.zeros((lanes, STEPS), dtype=torch.int64, device=device)  # numbers of the blocks written
        alone = torch.zeros(lanes, dtype=torch.int64, device=device)  # passes without such masks
        factors = torch.full((columns,), FACTOR, dtype=torch.int64, device=device).cumprod(0)
        return began, seen, alone, factors

    def reset(self, state: tuple[Tensor, ...], lane: int) -> None:
        super().reset(state[:3], lane)

    def decide(self, stats: RowStats, where: Where, state: tuple[Tensor, ...]) -> Decision:
        masked, decoded, turn = where.open, where.decoded, where.turn
        first_pass = turn == 0
        began = torch.where(first_pass[:, None], masked, where.recall(state[0]))
        left = masked & began
        alone = torch.where(first_pass, 0, state[2][where.lane]) + ~left.any(1)
        last = (alone >= self.edits) | (turn + 1 >= STEPS)

        write = self._masks(stats, where, left)
        write = torch.where(last[:, None], masked, write)
        write |= decoded & (stats.confidence > self.edit) & (stats.sample != where.token)
        best, other, plain = self._predictions(stats, where)
        written = torch.where(write, torch.where(last[:, None], plain, best), where.token)
        written = torch.where(last[:, None], written, self._unseen(stats, where, written, other, state))
        token, kept = self._carried_out(where, written, began)

        where.remember(state[0], kept)
        at = where.lane * STEPS + turn.clamp(max=STEPS - 1)
        _note(state[1].view(-1), at, where, _numbers(where, written, state[3]))
        _note(state[2], where.lane, where, alone)
        is_mask = token == where.mask_id
        return Decision(
            masked & ~is_mask,
            token,
            edit=decoded & ~is_mask & (token != where.token),
            remask=decoded & is_mask,
            complete=last,
            unbounded=~last,
        )

    def _masks(self, stats: RowStats, where: Where, left: Tensor) -> Tensor:
        """(W, C) bool: the masks to write. left: (W, C) bool, those that the block began with."""
        masked, turn = where.open, where.turn
        began_with = (masked | where.decoded).sum(1)
        length = where.start - where.block + where.read.sum(1)
        least = masked.sum(1) - left.sum(1) + (turn < began_with)
        sure = masked & (stats.confidence > self.mask)
        order = torch.where(masked, stats.confidence, -1.0).argsort(dim=1, descending=True, stable=True)
        surest = masked & (order.argsort(1) < least[:, None])
        write = torch.where((sure.sum(1) >= least)[:, None], sure, surest)
        return torch.where((turn >= length)[:, None], masked, write)

    def _predictions(self, stats: RowStats, where: Where) -> tuple[Tensor, Tensor, Tensor]:
        """(W, C) int64: the likeliest ids, the likeliest but these, and the likeliest but `delete` and
        `split`."""
        logits = where.rows.to(torch.float32, copy=True)
        logits.select(1, where.mask_id).fill_(-torch.inf)
        if where.suppress is not None:
            logits.index_fill_(1, where.suppress, -torch.inf)
        ranked = where.cells.spread(logits.topk(3).indices, -1)  # (W, C, 3)
        best = stats.sample  # of two as likely ids `topk` may have taken the other
        other = torch.where(ranked[..., 0] == best, ranked[..., 1], ranked[..., 0])
        plain = ranked[..., 2]
        for each in (ranked[..., 1], ranked[..., 0], best):
            plain = torch.where((each == self.delete) | (each == self.split), plain, each)
        return best, other, plain

    def _unseen(
        self, stats: RowStats, where: Where, written: Tensor, other: Tensor, state: tuple[Tensor, ...]
    ) -> Tensor:
        """(W, C) int64: `written`, with some tokens replaced by `other` where it was written before."""
        history = state[1][where.lane]
        earlier = torch.arange(STEPS, device=history.device) < where.turn[:, None]

        def repeats(tokens: Tensor) -> Tensor:
            same = history == _numbers(where, tokens, state[3])[:, None]
            return (earlier & same).any(1, keepdim=True)

        changed = written != where.token
        order = torch.where(changed, stats.confidence, torch.inf).argsort(dim=1, stable=True).argsort(1)
        result, again = written, repeats(written)
        for exchanged in range(1, TRIES + 1):
            trial = torch.where(changed & (order < exchanged), other, written)
            result = torch.where(again, trial, result)
            again = again & repeats(trial)
        return result

    def _carried_out(self, where: Where, written: Tensor, began: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens (W, C) once `delete` and `split` are carried out, and whether each began as a mask."""
        free = where.open | where.decoded
        end = free.shape[1]
        place = torch.arange(end, device=free.device).expand(free.shape)
        gone, split = free & (written == self.delete), free & (written == self.split)
        count = free.long() - gone.long() + split.long()
        before = count.cumsum(1) - count
        # Tokens move within a run of free cells, from `begin` on up to `stop`.
        run = (~free).cumsum(1)
        sizes = torch.zeros_like(torch.cat((run, run[:, :1]), 1)).scatter_add(1, run, free.long())
        begin = torch.where(free, 0, place + 1).cummax(1).values
        stop = begin + sizes.gather(1, run)
        to = begin + before - before.gather(1, begin.clamp(max=end - 1))
        mine = torch.where(free & ~gone & (to < stop), to, end)
        pushed = torch.where(split & (to + 1 < stop), to + 1, end)
        # Column `end` takes what leaves the block.
        token = torch.where(free, where.mask_id, where.token)
        token, kept = (torch.cat((each, each[:, :1]), 1) for each in (token, torch.zeros_like(free)))
        token = token.scatter(1, mine, torch.where(split, where.mask_id, written))
        token = token.scatter(1, pushed, where.token)
        kept = kept.scatter(1, mine, began & ~split).scatter(1, pushed, began)
        return token[:, :end], kept[:, :end]


def _note(state: Tensor, at: Tensor, where: Where, values: Tensor) -> None:
    """Write values (W,) int64 into state (n,) at `at` (W,), for the windows that the pass reads; a sequence
    may have others."""
    state.index_add_(0, at, torch.where(where.read.any(1), values - state[at], 0))


def _numbers(where: Where, tokens: Tensor, factors: Tensor) -> Tensor:
    """(W,) int64: a number for the tokens (W, C) of each block, by which it is told from others. factors:
    (C or more,) int64."""
    return (torch.where(where.read, tokens + 1, 0) * factors[: tokens.shape[1]]).sum(1)
