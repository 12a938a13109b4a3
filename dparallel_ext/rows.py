"""One sequence under decoding: how it is to be decoded, its blocks, and where it is."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from .rules import Rule


@dataclass(frozen=True)
class Settings:
    """How one sequence is decoded."""

    policy: tuple[float, ...]
    """A row of `policies.FIELDS`."""
    steps: int | None = None
    """The fixed schedule: passes in all, whose quota stands in for the policy's threshold."""
    temperature: float = 0.0
    suppress: Tensor | None = None
    """(n,) int64, ids never to be decoded."""
    key: tuple[int, int] = (0, 0)
    """Of its samples: seed, sequence."""
    eos_id: int | None = None
    stop: tuple[tuple[int, ...], ...] = ()
    """Sequences of tokens that end the response as eos_id does."""
    top_p: float = 1.0
    top_k: int = 0
    """What may be sampled; 1 and 0: all, see `ops.row_stats`."""
    rule: Rule | None = None
    """What decides instead of the policy alone."""
    record: bool = False
    """Whether the passes keep its `passes.Trajectory`."""


class Layout(NamedTuple):
    """What of a sequence is filled, and in which order. Columns are positions of the sequence."""

    columns: Sequence[int]
    """Those that hold masks and are filled, ascending: the places of the response's tokens."""
    blocks: list[tuple[int, int]]
    """Columns [start, end) of each block, left to right; each holds some of `columns`."""
    length: int
    """Of the whole sequence."""
    origin: int = 0
    """The first column of the first block: one of the prompt's where that ends within a block."""


def whole_length(prompt: int, gen_length: int, block_length: int, causal: bool) -> int:
    """Of prompt and response, to the end of a block where tokens are decoded by a block-causal model."""
    length = prompt + gen_length
    return -(-length // block_length) * block_length if causal and gen_length else length


def lay_out(
    prompt: int,
    gen_length: int,
    block_length: int,
    causal: bool,
    steps: int | None = None,
    masked: Sequence[int] = (),
) -> Layout:
    """The layout of `gen_length` masks after a prompt, and of the prompt's own columns `masked`, ascending.

    Blocks count from the first mask, as published, where it is the prompt's end; a block without a mask is
    left out. Block-causal models count blocks from position 0, so that the first may begin within one, and
    fill the last to its end where tokens are decoded after the prompt. Raises ValueError where `steps` passes
    do not divide into the blocks.
    """
    length = whole_length(prompt, gen_length, block_length, causal)
    columns = [*masked, *range(prompt, length)]
    first = columns[0] if columns else length
    origin = first - first % block_length if causal else first
    cuts = [first, *range(origin + block_length, length, block_length), length]
    blocks = [
        (a, b) for a, b in itertools.pairwise(cuts) if bisect_left(columns, a) < bisect_left(columns, b)
    ]
    if steps is not None and blocks and steps % len(blocks):
        raise ValueError(f"steps: expected a multiple of the {len(blocks)} blocks, got {steps}")
    return Layout(columns, blocks, length, origin)


@dataclass
class Row:
    """Where one sequence is. Columns are positions of the sequence."""

    prompt: int
    layout: Layout
    settings: Settings
    kept: int
    """Response tokens in front of EOS or a stop sequence, all where there is none."""
    suppress: Tensor | None = None
    """Those of its settings, one tensor for all sequences of the batch that have the same."""
    at: int = 0
    """The active block; len(blocks): done."""
    turn: int = 0
    """Passes that the active block has had."""
    left: int = 0
    """Masks in the active block."""
    leftmost: int = 0
    """The column of the first of them."""
    nfe: int = 0
    published: int = 0
    """Passes that the published loop has run so far."""
    generated: int = 0
    stored: int = 0
    """cache "block": positions whose keys and values are final."""
    waiting: bool = False
    """Its block is complete, and it has not begun the next."""
    seen: list[int] = field(default_factory=list)
    """What the active block held after the last pass, and whether that pass changed it."""
    changed: bool = False
    edits: int = 0
    """Passes that an active block without masks stayed open for."""
    stopped: bool = False
    """It met EOS or a stop sequence."""

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
        return self.at == len(self.blocks)

    @property
    def block(self) -> tuple[int, int]:
        return self.blocks[self.at]

    @property
    def held(self) -> int:
        """Masks that the active block began with."""
        start, end = self.block
        return self.index(end) - self.index(start)

    @property
    def ahead(self) -> int:
        """Where the active block's first mask stood when it began; at the end the length."""
        return self.length if self.done else self.columns[self.index(self.block[0])]

    @property
    def last_run(self) -> int:
        """Where the last masks begin that no given token parts."""
        end = len(self.columns)
        apart = self.columns[-1] - (end - 1)
        return self.columns[bisect_left(range(end), apart, key=lambda i: self.columns[i] - i)]

    def look(self, block: list[int], mask_id: int) -> None:
        """Take in what the active block holds."""
        self.changed, self.seen = block != self.seen, block
        start = self.block[0]
        self.left = block.count(mask_id)
        self.leftmost = start + block.index(mask_id) if self.left else start

    def edits_on(self) -> bool:
        """Whether the active block, which has no mask, is open for another pass of a rule that edits."""
        rule = self.settings.rule
        if rule is None or not self.changed or self.edits >= rule.edits:
            return False
        self.edits += 1
        return True

    def index(self, column: int) -> int:
        """How many tokens of the response lie in front of `column`."""
        return bisect_left(self.columns, column)

    @property
    def progress(self) -> tuple[int, int, int, int]:
        """For rules: passes that the active block has had, passes of the schedule, the response's first
        column, the active block's first column.
        """
        scheduled = self.settings.steps or len(self.columns)
        block = self.layout.origin if self.at == 0 or self.done else self.block[0]
        return self.turn, scheduled, self.columns[0] if self.columns else 0, block

    @property
    def policy(self) -> tuple[float, ...]:
        """Of the next pass, a row of `policies.FIELDS`."""
        chosen, steps = self.settings.policy, self.settings.steps
        if steps is None or self.done:
            return chosen
        share, rest = divmod(self.held, steps // len(self.blocks))
        return (chosen[0], float(max(1, share + (self.turn < rest))), *chosen[2:])


IDLE = Row(0, Layout((), [], 0), Settings((0.0, 0.0, 1.0, math.inf, 0.0)), 0)
"""What a lane without a sequence holds."""
