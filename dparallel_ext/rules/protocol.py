"""What a rule sees of a pass, and what it says.

A policy row (`policies`) is a rule that a kernel follows, without memory: the fast path. A `Rule` is a
program over the statistics of a pass, with a memory of its own if it wants one:

    row_stats -> RowStats (W, C) --decide(stats, where, state)--> Decision -> tokens

A pass has W windows, one of each sequence that it is over or, where several blocks are open, one of each of
them, and statistics of C columns of each: cell [w, j] is column `where.start[w] + j` of the sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..ops.select import select
from ..types import RowStats

Function = Callable[[RowStats, Tensor, Tensor], Tensor]
"""(stats (W, C), masked (W, C) bool, step (W,) int64) -> (W, C) bool, what to commit."""


class Cells(NamedTuple):
    """How N rows of logits lie in W windows of C columns."""

    at: Tensor
    """(N,) int64: the cell of each row, w * (C + 1) + j, with j = C where it has none."""
    windows: int
    columns: int

    def spread(self, values: Tensor, blank: float) -> Tensor:
        """(W, C, ...): values (N, ...) in their cells, `blank` in the others."""
        shape = self.windows, self.columns + 1, *values.shape[1:]
        cells = values.new_full(shape, blank).flatten(0, 1)
        cells[self.at] = values
        return cells.view(shape)[:, : self.columns]

    def gather(self, values: Tensor, blank: float) -> Tensor:
        """(N, ...): of values (W, C, ...) each row's, `blank` for those without a cell."""
        without = values.new_full((self.windows, 1, *values.shape[2:]), blank)
        return torch.cat((values, without), 1).flatten(0, 1)[self.at]


@dataclass(frozen=True)
class Where:
    """Where the statistics of a pass lie, and how far their sequences are; tensors on the model's device."""

    lane: Tensor
    """(W,) int64: which sequence each window is of."""
    start: Tensor
    """(W,) int64: the sequence's column that cell 0 is."""
    read: Tensor
    """(W, C) bool: cells that have statistics; elsewhere the ids are -1 and the numbers NaN."""
    open: Tensor
    """(W, C) bool: those that hold masks. A rule may commit these."""
    masked: Tensor
    """(W, C) bool: those in the active window. At least one of them is committed whatever a rule says."""
    token: Tensor
    """(W, C) int64: what the cells hold; -1 where there are no statistics."""
    decoded: Tensor
    """(W, C) bool: those that hold decoded tokens, none given: what a rule that `edits` may change."""
    step: Tensor
    """(W,) int64: the sequence's pass, from 1."""
    turn: Tensor
    """(W,) int64: passes that the active block has had before."""
    steps: Tensor
    """(W,) int64: passes of the fixed schedule; without one, the tokens of the response."""
    first: Tensor
    """(W,) int64: the column of the response's first token."""
    block: Tensor
    """(W,) int64: the column of the active block's first token, which the prompt's tail may hold."""
    policy: Tensor
    """(W, 5) float32: the sequences' policy rows, see `policies`."""
    cells: Cells
    rows: Tensor
    """(N, V): the logits that the statistics are of, for `logits`."""

    @property
    def column(self) -> Tensor:
        """(W, C) int64: the columns of the cells."""
        return self.start[:, None] + torch.arange(self.cells.columns, device=self.start.device)

    @property
    def progress(self) -> Tensor:
        """(W,) float32: the share of the passes of the fixed schedule that are done, from 0 to 1."""
        return ((self.step - 1) / (self.steps - 1).clamp(min=1)).clamp(0, 1)

    def by_policy(self, stats: RowStats) -> Tensor:
        """(W, C) bool: what the sequences' policy rows commit of the windows' masks, by these statistics."""
        return select(stats, self.masked, self.policy, check=False)

    def logits(self, ids: Tensor) -> Tensor:
        """(W, C, K) float32: the logits of `ids` (W, C, K) int64 in each cell; NaN where there are none.

        As in the statistics, +inf counts as the largest float32.
        """
        own = self.cells.gather(ids.clamp(0, self.rows.shape[1] - 1), 0)  # (N, K)
        found = self.rows.gather(1, own).float().clamp(max=torch.finfo(torch.float32).max)
        return self.cells.spread(found, torch.nan)

    def recall(self, state: Tensor) -> Tensor:
        """(W, C, ...): of a state (lanes, columns, ...), what it holds for the cells."""
        return state[self.lane[:, None], self.column]

    def remember(self, state: Tensor, values: Tensor) -> None:
        """Put values (W, C, ...) into a state (lanes, columns, ...), for the cells that have statistics."""
        beyond = state.shape[1] - 1  # no window reaches the last column
        state[self.lane[:, None], torch.where(self.read, self.column, beyond)] = values.to(state.dtype)


class Decision(NamedTuple):
    """What a rule says of a pass."""

    commit: Tensor | None = None
    """(W, C) bool: cells to commit, of which those that hold masks are. None: what the policy row commits."""
    token: Tensor | None = None
    """(W, C) int64: the tokens to commit. None: `RowStats.sample`."""
    edit: Tensor | None = None
    """(W, C) bool, of a rule that `edits`: cells whose decoded tokens are replaced by those."""


class Rule:
    """Decides what a pass commits; a frozen dataclass, since equal rules share what they remember.

    Whatever a rule says, at least one mask of a window is committed, and never the mask token.
    """

    reads: Literal["masked", "block", "response"] = "masked"
    """Statistics of which columns it needs: those of the active window that hold masks; all of the active
    block; or all of the response where a pass computes it (caches "none" and "prefix", else the block)."""
    edits: int = 0
    """0: what is committed stays. Else it may change as long as its block is open; a block without a mask is
    complete once a pass changes nothing, or after so many passes. Such a rule reads "block"."""
    recorded: bool = True
    """Whether `decide` launches work for the device and nothing else, so that its passes can be recorded as
    CUDA graphs: it looks at no number on the host, and what it keeps it keeps in the tensors of its state."""
    greedy: bool = False
    """Whether it commits tokens of its own, so that none can be sampled: the temperature has to be 0."""
    by_row: bool = False
    """Whether it commits at most as many tokens a pass as its policy row may, so that the host can issue
    passes ahead where the row bounds their number."""
    without: tuple[str, ...] = ()
    """Scores that it does not compute, so that no policy row can rank by them."""
    row: str | None = None
    """The policy row to decide by where the caller names none: "confidence:0.9". None: the fixed schedule."""

    def check(self, model: Any, block_length: int) -> None:
        """Raise ValueError, or warn, where it does not go with a model that decodes by such blocks."""

    def new_state(self, lanes: int, columns: int, device: torch.device) -> tuple[Tensor, ...]:
        """What it remembers: tensors (lanes, ...), most often (lanes, columns, ...) for `Where.recall`.

        They are made once for all passes over those lanes and changed in place.
        """
        return ()

    def reset(self, state: tuple[Tensor, ...], lane: int) -> None:
        """A sequence begins in the lane."""
        for remembered in state:
            remembered[lane] = 0

    def decide(self, stats: RowStats, where: Where, state: tuple[Tensor, ...]) -> Decision:
        """What the pass commits. A sequence's cells may not depend on those of other sequences."""
        raise NotImplementedError


@dataclass(frozen=True)
class FunctionRule(Rule):
    """A plain function as a rule: it decides alone, without policy rows."""

    function: Function
    recorded = False  # nobody has promised that it looks at no number

    def decide(self, stats: RowStats, where: Where, state: tuple[Tensor, ...]) -> Decision:
        commit = self.function(stats, where.masked, where.step)
        expect("policy", commit, where.masked)  # None is no decision of a function
        return Decision(commit)


def expect(name: str, given: Any, like: Tensor) -> None:
    """Raise ValueError, naming it, unless `given` is a tensor of the shape and dtype of `like`."""
    if not isinstance(given, Tensor) or given.shape != like.shape or given.dtype != like.dtype:
        got = type(given).__name__
        if isinstance(given, Tensor):
            got = f"{given.dtype} {tuple(given.shape)}"
        kind = "a bool" if like.dtype == torch.bool else "an int64"
        raise ValueError(f"{name}: expected {kind} Tensor {tuple(like.shape)}, got {got}")
