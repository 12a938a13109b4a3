"""One sequence under decoding: how it is to be decoded, its blocks, and where it is."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from torch import Tensor


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
    record: bool = False
    """Whether the passes keep its `passes.Trajectory`."""


@dataclass
class Row:
    """Where one sequence is. Columns are positions of the sequence."""

    prompt: int
    length: int
    """Of prompt and response."""
    blocks: list[tuple[int, int]]
    """Columns [start, end) that are filled, block by block."""
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
    stopped: bool = False
    """It met EOS or a stop sequence."""

    @property
    def done(self) -> bool:
        return self.at == len(self.blocks)

    @property
    def block(self) -> tuple[int, int]:
        return self.blocks[self.at]

    @property
    def policy(self) -> tuple[float, ...]:
        """Of the next pass, a row of `policies.FIELDS`."""
        chosen, steps = self.settings.policy, self.settings.steps
        if steps is None or self.done:
            return chosen
        start, end = self.block
        share, rest = divmod(end - start, steps // len(self.blocks))
        return (chosen[0], float(max(1, share + (self.turn < rest))), *chosen[2:])


IDLE = Row(0, 0, [], Settings((0.0, 0.0, 1.0, math.inf, 0.0)), 0)
"""What a lane without a sequence holds."""


def lay_out(
    prompt: int, gen_length: int, block_length: int, causal: bool, steps: int | None = None
) -> list[tuple[int, int]]:
    """The blocks, columns [start, end), that `gen_length` tokens after the prompt are filled by.

    Block-causal models count blocks from position 0, so that the first may begin with the prompt's tail, and
    fill the last to its end. Raises ValueError where `steps` passes do not divide into the blocks.
    """
    end, origin = prompt + gen_length, prompt
    if causal:
        end, origin = -(-end // block_length) * block_length, prompt - prompt % block_length
    cuts = [prompt, *range(origin + block_length, end, block_length), end]
    blocks = [(a, b) for a, b in itertools.pairwise(cuts) if a < b] if gen_length else []
    if steps is not None and blocks and steps % len(blocks):
        raise ValueError(f"steps: expected a multiple of the {len(blocks)} blocks, got {steps}")
    return blocks
