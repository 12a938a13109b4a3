"""One sequence under decoding: its blocks, and how far it is."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from .. import policies
from .sequence_settings import SamplingGroup, SequenceSettings

NOTHING = (float(policies.SELECTORS["confidence"]), 1.0 + 2**-23, 0.0, math.inf, 0.0)
"""A policy row that commits nothing: no probability reaches the float32 after 1."""


class Layout(NamedTuple):
    """Which columns of a sequence are filled, and in which order. Columns are positions of the sequence."""

    columns: Sequence[int]
    """The columns of masks to fill, ascending: the places of the response's tokens."""
    blocks: list[tuple[int, int]]
    """Columns [start, end) of each block, left to right; each holds some of `columns`."""
    length: int
    """Positions of the whole sequence."""
    origin: int = 0
    """The column where the first block begins: in the prompt, if the prompt ends within a block."""
    asked: int = 0
    """The column behind the last token asked for; behind it is the rest of an aligned block."""
    block_length: int = 1

    def start_of_block(self, column: int) -> int:
        """Where the block begins that has the column; blocks are in the prompt too."""
        return column - (column - self.origin) % self.block_length


def whole_length(prompt: int, gen_length: int, block_length: int, whole: bool) -> int:
    """The length of prompt and response, which with `whole` blocks ends where a block does."""
    length = prompt + gen_length
    return -(-length // block_length) * block_length if whole and gen_length else length


def lay_out(
    prompt: int,
    gen_length: int,
    block_length: int,
    aligned: bool,
    steps: int | None = None,
    masked: Sequence[int] = (),
    *,
    whole: bool = True,
) -> Layout:
    """The layout of `gen_length` masks after a prompt of `prompt` tokens, whose columns `masked` (ascending)
    are to be filled too.

    Blocks count from the first mask, as published; a block without a mask is left out. `aligned` blocks, of
    most block-causal models, count from position 0, so that the first mask may lie within a block. If they
    are `whole` too, the last is filled to its end, unless gen_length is 0. Raises ValueError if `steps` is
    no multiple of the number of blocks.
    """
    length = whole_length(prompt, gen_length, block_length, aligned and whole)
    columns = [*masked, *range(prompt, length)]
    first = columns[0] if columns else length
    origin = first - first % block_length if aligned else first
    cuts = [first, *range(origin + block_length, length, block_length), length]
    blocks = [
        (a, b) for a, b in itertools.pairwise(cuts) if bisect_left(columns, a) < bisect_left(columns, b)
    ]
    if steps is not None and blocks and steps % len(blocks):
        raise ValueError(f"steps: expected a multiple of the {len(blocks)} blocks, got {steps}")
    return Layout(columns, blocks, length, origin, prompt + gen_length, block_length)


class OpenBlock(NamedTuple):
    """A block that passes may fill."""

    start: int
    end: int
    """Columns [start, end)."""
    held: int
    """Masks that the block began with."""
    masks_left: int
    first_mask: int
    """The column of the first mask left; where there is none, `start`."""
    step: int = 0
    """Passes over the block so far."""
    changed: bool = False
    """Whether the last of these passes changed a token."""

    @property
    def share(self) -> float:
        """The share of the block's masks that is decoded, from 0 to 1."""
        return 1 - self.masks_left / max(1, self.held)


@dataclass
class SequenceState:
    """How far one sequence is decoded. Columns are positions of the sequence."""

    prompt: int
    layout: Layout
    settings: SequenceSettings
    sampling: SamplingGroup
    """See `SequenceSettings.sampling`."""
    kept: int
    """Response tokens in front of EOS or a stop sequence, all where there is none."""
    block_index: int = 0
    """Index of the front block, the first that is not complete; len(blocks): done."""
    open: tuple[OpenBlock, ...] = ()
    """The blocks that passes may fill, from the front one on."""
    step_in_block: int = 0
    """Passes since the front block came to the front."""
    nfe: int = 0
    published: int = 0
    """Passes that the published loop has run so far."""
    generated: int = 0
    num_cached: int = 0
    """Positions whose keys and values are final, if the schedule stores blocks."""
    between_blocks: bool = False
    """Whether the front block is complete and the next has not begun."""
    edits: int = 0
    """Passes for which the front block stayed open without a mask."""
    stopped: bool = False
    """Whether EOS or a stop sequence ended the sequence."""
    drafted: int = 0
    accepted: int = 0
    refused: tuple[int, ...] = ()
    """Tokens that `self_speculation` guessed for the last pass, and of these the kept and the others."""
    draft_nfe: ClassVar[int] = 0
    """There is no drafter."""

    @property
    def length(self) -> int:
        return self.layout.length

    @property
    def columns(self) -> Sequence[int]:
        return self.layout.columns

    @property
    def blocks(self) -> list[tuple[int, int]]:
        return self.layout.blocks

    @property
    def done(self) -> bool:
        return self.block_index == len(self.blocks)

    @property
    def block(self) -> tuple[int, int]:
        return self.blocks[self.block_index]

    @property
    def masks_left(self) -> int:
        """Masks left in the front block."""
        return self.open[0].masks_left

    @property
    def first_mask(self) -> int:
        """The column of the front block's first mask."""
        return self.open[0].first_mask

    @property
    def decoded(self) -> int:
        """Tokens decoded so far."""
        return self.generated + sum(block.held - block.masks_left for block in self.open)

    def opened(self, index: int) -> OpenBlock:
        """Block `index` as it is when it opens."""
        start, end = self.blocks[index]
        first = self.index(start)
        held = self.index(end) - first
        return OpenBlock(start, end, held, held, self.columns[first])

    def leave_front(self) -> tuple[int, int]:
        """Go on to the block after the front block; return the front block's columns [start, end). It is
        complete."""
        start, end = self.block
        self.generated += self.index(end) - self.index(start)
        self.block_index, self.open = self.block_index + 1, self.open[1:]
        return start, end

    @property
    def ahead(self) -> int:
        """The column where the front block's first mask stood when it began; if done, the length."""
        return self.length if self.done else self.columns[self.index(self.block[0])]

    @property
    def last_run(self) -> int:
        """The column where the last run of masks begins; a given token ends a run."""
        end = len(self.columns)
        apart = self.columns[-1] - (end - 1)
        return self.columns[bisect_left(range(end), apart, key=lambda i: self.columns[i] - i)]

    @property
    def edited(self) -> bool:
        """Whether committed tokens may change as long as their block is open."""
        return self.settings.rule is not None and self.settings.rule.edits > 0

    @property
    def edits_on(self) -> bool:
        """Whether the front block, which has no mask, stays open for another pass of a rule that edits."""
        rule = self.settings.rule
        return rule is not None and self.open[0].changed and self.edits < rule.edits

    def index(self, column: int) -> int:
        """How many tokens of the response lie in front of `column`."""
        return bisect_left(self.columns, column)

    def progress(self, block: OpenBlock) -> tuple[int, int, int, int, int]:
        """Numbers for rules: passes over the block so far, passes of the schedule, the response's first
        column, the column behind its last token, the block's first column.
        """
        scheduled = self.settings.steps or len(self.columns)
        start = self.layout.origin if block.start == self.blocks[0][0] else block.start
        first = self.columns[0] if self.columns else 0
        return block.step, scheduled, first, self.layout.asked, start

    def policy(self, block: OpenBlock, must_move: bool = True) -> tuple[float, ...]:
        """The policy row, see `policies.FIELDS`, of the next pass over a block."""
        chosen, steps = self.settings.policy, self.settings.steps
        if not must_move:  # a quota applies only to windows that must move
            return NOTHING if chosen[0] == policies.SELECTORS["quota"] else (*chosen[:2], 0.0, *chosen[3:])
        if steps is None:
            return chosen
        share, rest = divmod(block.held, steps // len(self.blocks))
        return (chosen[0], float(max(1, share + (block.step < rest))), *chosen[2:])


_SETTINGS = SequenceSettings((0.0, 0.0, 1.0, math.inf, 0.0))
IDLE = SequenceState(0, Layout((), [], 0), _SETTINGS, _SETTINGS.sampling(None), 0)
"""The placeholder in a lane without a sequence."""


def eos_ids(sequences: Sequence[SequenceState]) -> tuple[int, ...]:
    """The EOS ids of the sequences, each once, ascending."""
    return tuple(sorted({eos for sequence in sequences for eos in sequence.settings.eos_ids}))


def reads(sequence: SequenceState, columns: str) -> bool:
    """Whether the sequence has a rule whose `reads` is `columns`, see `rules.Rule`."""
    return sequence.settings.rule is not None and sequence.settings.rule.reads == columns
