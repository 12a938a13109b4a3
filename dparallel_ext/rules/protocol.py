"""The interface of a rule: the statistics of a pass that it sees, and the decision that it returns.

A policy row (`policies`) is a rule without memory that a kernel follows: the fast path. A `Rule` is a program
over the statistics of a pass, and may have state:

    row_stats -> RowStats (W, C) --decide(stats, where, state)--> Decision -> tokens

A pass has W windows, one for each sequence or, if several blocks are open, one for each open block, and
statistics of C columns of each: cell [w, j] is column `where.start[w] + j` of the sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..arguments import check_tensor, described, one_of, shown, whole
from ..ops.row_stats import LARGEST
from ..ops.select import select
from ..types import RowStats

Function = Callable[[RowStats, Tensor, Tensor], Tensor]
"""(stats (W, C), masked (W, C) bool, step (W,) int64) -> (W, C) bool: the cells to commit."""


class Cells(NamedTuple):
    """Maps N rows of logits to the cells of W windows of C columns."""

    at: Tensor
    """(N,) int64: the cell of each row, w * (C + 1) + j; j = C for a row without a cell."""
    windows: int
    columns: int

    def spread(self, values: Tensor, blank: float) -> Tensor:
        """(W, C, ...): values (N, ...) of rows, put into their cells; `blank` in other cells."""
        shape = self.windows, self.columns + 1, *values.shape[1:]
        cells = values.new_full(shape, blank).flatten(0, 1)
        cells[self.at] = values
        return cells.view(shape)[:, : self.columns]

    def gather(self, values: Tensor, blank: float) -> Tensor:
        """(N, ...): for each row the value of its cell, of values (W, C, ...); `blank` for rows without a
        cell."""
        without = values.new_full((self.windows, 1, *values.shape[2:]), blank)
        return torch.cat((values, without), 1).flatten(0, 1)[self.at]


@dataclass(frozen=True)
class Where:
    """The cells of a pass's statistics, and the progress of their sequences; tensors on the model's
    device."""

    lane: Tensor
    """(W,) int64: the sequence of each window."""
    start: Tensor
    """(W,) int64: the sequence's column in cell 0; not always `block`, where the window's block begins."""
    read: Tensor
    """(W, C) bool: cells with statistics; in other cells the ids are -1 and the numbers NaN."""
    open: Tensor
    """(W, C) bool: cells with statistics that hold masks. A rule may commit them."""
    masked: Tensor
    """(W, C) bool: open cells in the window. In a window that `must_move`, as the front block's, at least one
    of them commits: if the rule commits none, the most confident."""
    token: Tensor
    """(W, C) int64: the token in each cell; -1 without statistics."""
    decoded: Tensor
    """(W, C) bool: cells with decoded tokens; given tokens are none. A rule that `edits` may change them."""
    step: Tensor
    """(W,) int64: the number of the sequence's pass, from 1."""
    turn: Tensor
    """(W,) int64: earlier passes over the window's block."""
    steps: Tensor
    """(W,) int64: passes of the fixed schedule; without a schedule, the tokens of the response."""
    first: Tensor
    """(W,) int64: the column of the response's first token."""
    last: Tensor
    """(W,) int64: the column behind the last token asked for; a block-causal model's last block may go on."""
    block: Tensor
    """(W,) int64: the column where the window's block begins, which may be in the prompt."""
    policy: Tensor
    """(W, 5) float32: the windows' policy rows, see `policies`."""
    suppress: Tensor | None
    """(n,) int64: ids that are not decoded; None: there are none."""
    mask_id: int
    """The mask token."""
    cells: Cells
    rows: Tensor
    """(N, V): the logits of the pass, which `logits` reads."""
    hidden_rows: Tensor | None
    """(N, D): their hidden states, which `hidden` reads; None without `Rule.hidden`."""

    @property
    def column(self) -> Tensor:
        """(W, C) int64: the columns of the cells."""
        return self.start[:, None] + torch.arange(self.cells.columns, device=self.start.device)

    @property
    def progress(self) -> Tensor:
        """(W,) float64: the share of the fixed schedule's passes that is done, from 0 to 1."""
        return ((self.step - 1).double() / (self.steps - 1).clamp(min=1)).clamp(0, 1)

    @property
    def must_move(self) -> Tensor:
        """(W, 1) bool: whether at least one masked cell of the window commits."""
        return self.policy[:, 2:3] >= 1  # min_commit

    def by_policy(self, stats: RowStats) -> Tensor:
        """(W, C) bool: the masked cells that the policy rows commit by these statistics."""
        return select(stats, self.masked, self.policy, check=False)

    def logits(self, ids: Tensor) -> Tensor:
        """(W, C, K) float32: the logits of `ids` (W, C, K) int64 in each cell; NaN in cells without
        statistics.

        As in the statistics, +inf counts as the largest float32. Raises ValueError for ids of another shape
        or type.
        """
        if ids.ndim != 3 or ids.shape[:2] != self.read.shape or ids.dtype != torch.int64:
            cells = ", ".join(map(str, self.read.shape))
            raise ValueError(
                f"Where.logits: ids: expected an int64 Tensor ({cells}, K), got {described(ids)}"
            )
        columns = self.cells.gather(ids.clamp(0, self.rows.shape[1] - 1), 0)  # (N, K)
        gathered = self.rows.gather(1, columns).float().clamp(max=LARGEST)
        return self.cells.spread(gathered, torch.nan)

    @property
    def hidden(self) -> Tensor:
        """(W, C, D) in the model's dtype: the hidden state, after the model's final norm, of which the head
        makes each cell's logits; NaN in cells without statistics.

        So where logits are shifted, a cell has the hidden state of the position before it. Raises ValueError
        for a rule without `Rule.hidden`.
        """
        if self.hidden_rows is None:
            raise ValueError("Where.hidden: expected a rule with hidden = True")
        return self.cells.spread(self.hidden_rows, torch.nan)

    def recall(self, state: Tensor) -> Tensor:
        """(W, C, ...): the values of the cells in a state (lanes, columns, ...).

        Raises ValueError for a state of too few columns (on the CPU).
        """
        try:
            return state[self.lane[:, None], self.column]
        except IndexError as error:
            raise ValueError(_too_small("recall", state)) from error

    def remember(self, state: Tensor, values: Tensor) -> None:
        """Write values (W, C, ...) into a state (lanes, columns, ...), for the cells with statistics.

        Raises ValueError as `recall`.
        """
        beyond = state.shape[1] - 1  # no window reaches the last column
        try:
            state[self.lane[:, None], torch.where(self.read, self.column, beyond)] = values.to(state.dtype)
        except IndexError as error:
            raise ValueError(_too_small("remember", state)) from error


def _too_small(method: str, state: Tensor) -> str:
    """The error text for a state that has not the columns of a pass."""
    return (
        f"Where.{method}: expected a state (lanes, columns, ...) of the columns that new_state was given, "
        f"got {described(state)}"
    )


class Decision(NamedTuple):
    """A rule's decision about a pass."""

    commit: Tensor | None = None
    """(W, C) bool: cells to commit; only cells with masks are. None: the cells that the policy row
    commits."""
    token: Tensor | None = None
    """(W, C) int64: the tokens to write. None: `RowStats.sample`. Not written are the mask token,
    suppressed ids, ids that the model does not have, and ids whose logit is -inf."""
    edit: Tensor | None = None
    """(W, C) bool, for a rule that `edits`: cells whose decoded tokens are replaced by `token`."""
    remask: Tensor | None = None
    """(W, C) bool, for a rule that `edits`: cells whose decoded tokens become masks again, from left to right
    as long as the pass leaves fewer masks in the block, or after n passes over the block at least n decoded
    tokens. A pass over a block without a mask may remask any of its cells."""
    complete: Tensor | None = None
    """(W,) bool, for a rule that `edits`: windows whose block needs no further pass if this one leaves no
    mask in it. None: a block needs further passes until a pass changes nothing."""
    unbounded: Tensor | None = None
    """(W,) bool, for a rule that `edits`: windows of which it need commit no mask, and may remask any cells.
    A rule that says so has to come to an end by itself. None: no windows."""
    impossible: Tensor | None = None
    """(W,) bool: windows without a possible decision: the error of a row that leaves no token to choose."""


class Rule:
    """Decides which tokens a pass commits. A frozen dataclass: equal rules share their state.

    Whatever a rule decides, at least one mask of the front block's window is committed, and never the mask
    token; and so few tokens become masks again that every decode ends (`Decision.remask`), unless a rule
    that edits answers for that itself (`Decision.unbounded`).
    """

    reads: Literal["masked", "block", "response"] = "masked"
    """The columns whose statistics it needs: the masks of the active window; the whole active block, from the
    response's first token on; or the whole response if the pass computes it (caches "none" and "prefix"; else
    the block). Where logits are shifted, a pass from the block on has no logits for the block's first column,
    and a pass that takes a block's first token from the block before (Fast-dLLM v2) reads this one column."""
    edits: int = 0
    """0: committed tokens stay. N > 0: they may change, or become masks again, while their block is open; a
    block without a mask is complete once a pass changes nothing, or after N such passes, or when
    `Decision.complete` says so. The rule then needs `reads` "block"."""
    soft: bool = False
    """Whether the model sees soft tokens in the cells that the rule reads. The state then begins with the
    mask's share of each cell's embedding, (lanes, columns) float32, from 0, the token as it is, to 1
    (`models.soft_embeddings`); or with the shares of K ids, (lanes, columns, K) float32, and the ids, (lanes,
    columns, K) int64; the rest to 1 is then the share of the token in the cell (`models.mixed_embeddings`).
    Of a rule without `edits` only masks are soft. It needs a model of `dparallel_ext.models`."""
    hidden: bool = False
    """Whether it reads `Where.hidden`, which only models of `dparallel_ext.models` give."""
    in_order: bool = False
    """Whether it decides on a block by the tokens of the blocks before it, so that blocks are decoded one
    after the other, and no text between them is given."""
    recorded: bool = True
    """Whether its passes can be recorded as CUDA graphs: `decide` only launches work for the device, reads no
    number on the host, and keeps nothing outside the tensors of its state."""
    greedy: bool = False
    """Whether it chooses tokens itself, so that none can be sampled: the temperature has to be 0."""
    by_row: bool = False
    """Whether it commits at most as many tokens a pass as its policy row allows, so that the host can issue
    passes ahead."""
    without: tuple[str, ...] = ()
    """Scores that it does not compute; policy rows cannot rank by them."""
    tokens: tuple[int, ...] = ()
    """Ids that it waits for or writes; an id that the model never decodes is an error."""
    alone: bool = False
    """Whether it decides without a policy row, so that a row beside it is an error."""
    row: str | None = None
    """The policy row if the caller names none, such as "confidence:0.9". None: the fixed schedule."""

    def check(self, model: Any, block_length: int) -> None:
        """Raise ValueError, or warn, if the rule does not go with this model and block length."""

    def new_state(self, lanes: int, columns: int, device: torch.device) -> tuple[Tensor, ...]:
        """The state: tensors (lanes, ...) on the device, most often (lanes, columns, ...) for `Where.recall`.

        It is made once for all passes over these lanes; `decide` and `reset` change it in place. A rule with
        a `reset` of its own may have tensors of any shapes.
        """
        return ()

    def reset(self, state: tuple[Tensor, ...], lane: int) -> None:
        """Reset the state of a lane in which a sequence begins."""
        for remembered in state:
            remembered[lane] = 0

    def decide(self, stats: RowStats, where: Where, state: tuple[Tensor, ...]) -> Decision:
        """Decide which tokens the pass commits. A sequence's cells must not depend on other sequences' cells.
        Only tensors of `state` may be changed in place."""
        raise NotImplementedError(f"{type(self).__name__}: expected a method decide(stats, where, state)")


@dataclass(frozen=True)
class FunctionRule(Rule):
    """A plain function as a rule."""

    function: Function
    alone = True
    recorded = False  # the function may read numbers on the host

    def decide(self, stats: RowStats, where: Where, state: tuple[Tensor, ...]) -> Decision:
        commit = self.function(stats, where.masked.clone(), where.step)  # which it may change in place
        expect("rule or policy", commit, where.masked)  # a function must not return None
        return Decision(commit)


def check_rule(rule: Rule) -> None:
    """Raise ValueError naming the rule's class and its field that does not fit."""
    name = type(rule).__name__
    try:
        hash(rule)
    except TypeError as error:
        raise ValueError(
            f"{name}: expected a rule that can be hashed, such as a frozen dataclass of numbers: {error}"
        ) from error
    one_of(f"{name}: reads", rule.reads, ("masked", "block", "response"))
    if whole(f"{name}: edits", rule.edits, 0) and rule.reads != "block":
        raise ValueError(f"{name}: reads: expected 'block' of a rule that edits, got {rule.reads!r}")


def state_of(rule: Rule, lanes: int, columns: int, device: torch.device) -> tuple[Tensor, ...]:
    """`rule.new_state`. Raises ValueError naming the rule's class unless it is a tuple of tensors on the
    device, each with the lanes that the default `reset` resets."""
    state = rule.new_state(lanes, columns, device)
    name = f"{type(rule).__name__}: new_state"
    if not isinstance(state, tuple) or not all(isinstance(values, Tensor) for values in state):
        raise ValueError(f"{name}: expected a tuple of Tensors, got {shown(state)}")
    for values in state:
        if values.device != device:
            raise ValueError(f"{name}: expected Tensors on {device}, got one on {values.device}")
        if type(rule).reset is Rule.reset and values.shape[:1] != (lanes,):
            raise ValueError(
                f"{name}: expected Tensors ({lanes}, ...) of a rule without a reset of its own, got one "
                f"{tuple(values.shape)}"
            )
    if rule.soft and not _makes_soft(state, lanes, columns):
        raise ValueError(
            f"{name}: expected, of a rule that makes soft tokens, the mask's shares in front, float32 "
            f"({lanes}, {columns}), or shares and ids, float32 and int64 ({lanes}, {columns}, K), got "
            f"{[described(values) for values in state[:2]]}"
        )
    return state


def _makes_soft(state: tuple[Tensor, ...], lanes: int, columns: int) -> bool:
    """Whether a state begins as `Rule.soft` says."""
    kinds = [(values.shape, values.dtype) for values in state[:2]]
    if kinds[:1] == [((lanes, columns), torch.float32)]:
        return True
    shape = (lanes, columns, *kinds[0][0][2:3]) if kinds else ()
    return len(shape) == 3 and kinds == [(shape, torch.float32), (shape, torch.int64)]


def expect(name: str, value: Any, like: Tensor) -> None:
    """Raise ValueError, naming it, unless `value` is a tensor of the shape, dtype and device of `like`."""
    if isinstance(value, Tensor):
        check_tensor(name, value)
        if value.device != like.device:
            raise ValueError(f"{name}: expected on {like.device}, got {value.device}")
    if not isinstance(value, Tensor) or value.shape != like.shape or value.dtype != like.dtype:
        kind = "a bool" if like.dtype == torch.bool else "an int64"
        raise ValueError(f"{name}: expected {kind} Tensor {tuple(like.shape)}, got {described(value)}")
