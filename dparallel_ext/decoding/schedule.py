"""Which positions a pass computes, and which windows it may fill: a class for each cache mode.

                 computed                                        filled
    Whole        the sequence                                    the open blocks
    Prefix       at a block's first pass the sequence,           the open blocks
                 then from the front block on
    Dual         at a block's first pass (and every `refresh`)   the open blocks
                 the sequence, then the open blocks alone
    BlockCausal  what is not stored, up to the open blocks' end  the open blocks
    SubBlock     as BlockCausal until the sub-block's            the front block's first sub-block with masks
                 first token is known, then that alone
    Sliding      what is not stored, up to the window's end      `block_length` columns from the first mask on

The semantics are those of the published decoders (LLaDA, Fast-dLLM, dParallel, SDAR, Fast-dLLM v2,
WeDLM, SDLM). The front block is the first that is not complete. Passes of the published loops that change
nothing are in `compat`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from ..cache import WORD, Span, block_causal_spans
from ..models import Traits
from .sequence import Layout, OpenBlock, SequenceState, lay_out, whole_length


class Window(NamedTuple):
    """Columns [start, end) of a sequence whose masks a pass may fill."""

    start: int
    end: int
    block: OpenBlock
    """The block that the window is in."""
    must_move: bool = True
    """Whether at least one mask of the window is committed, whatever the rule decides."""


@dataclass(frozen=True)
class Schedule:
    """Says which positions a pass computes and which windows it may fill, see the table above.

    With several `active_blocks` (d3LLM, arXiv 2601.07568; D2F, arXiv 2508.09192) the block after the last
    open block opens once the last open block's share of decoded tokens reaches `open_at`. A pass has to
    commit in the front block, and in an open block once the share of the block before has reached
    `activate_at`.
    """

    block_length: int
    sub_block_length: int
    shift: bool
    block_causal: bool
    """Whether attention is block-causal, with blocks of `block_length`."""
    aligned: bool
    """Whether blocks begin at multiples of `block_length`, else at the first mask and multiples from it."""
    prompt_block: bool
    """Whether all in front of the first mask is one block."""
    whole: bool
    """Whether a response fills its last block."""
    onward: bool
    """Whether finished positions see the positions up to themselves, and predict the next
    (`models.Traits`)."""
    active_blocks: int
    open_at: float
    activate_at: float

    keeps: ClassVar[bool] = True
    """Whether keys and values outlive a pass."""
    to_the_end: ClassVar[bool] = False
    """Whether every pass computes all positions from the front block to the sequence's end."""
    known_first: ClassVar[bool] = False
    """Whether masks come behind all known tokens, see `cache.known_first`."""

    def length(self, prompt: int, gen_length: int) -> int:
        """Positions of a prompt and a response of at least `gen_length` tokens."""
        return whole_length(prompt, gen_length, self.block_length, self.whole)

    def lay_out(self, prompt: int, gen_length: int, steps: int | None, masked: Sequence[int]) -> Layout:
        """The layout of a sequence, see `sequence.lay_out`."""
        return lay_out(prompt, gen_length, self.block_length, self.aligned, steps, masked, whole=self.whole)

    @property
    def most_open(self) -> int:
        """The most blocks that are open at once."""
        return self.active_blocks

    @property
    def shared(self) -> bool:
        """Whether sequences that begin alike have the same keys and values stored, so that requests may share
        them."""
        return False

    @property
    def prefill_predicts_next(self) -> bool:
        """Whether the pass that stores a block gives the next block's first token."""
        return self.onward or (self.shift and self.block_causal and not self.prompt_block)

    @property
    def overlap(self) -> int:
        """Positions in front of a block that its passes compute again, for the logits of its first token
        (D2F for Dream)."""
        return int(self.shift and self.prompt_block)

    @property
    def in_parts(self) -> str | None:
        """How blocks are filled that are not filled as a whole, in words; None: they are."""
        if self.sub_block_length < self.block_length:
            return f"these are filled {self.sub_block_length} by {self.sub_block_length}"
        return "here the block before begins each block" if self.prefill_predicts_next else None

    @property
    def first_mask_matters(self) -> bool:
        """Whether the next pass depends on the position of the first mask."""
        return self.in_parts is not None or self.active_blocks > 1

    def full(self, s: SequenceState) -> bool:
        """Whether the next pass computes the whole sequence."""
        return False

    def computed(self, s: SequenceState) -> tuple[int, int]:
        """Positions [first, last) that the next pass computes."""
        raise NotImplementedError

    def spans(self, lane: int, s: SequenceState) -> list[Span]:
        """The positions of `computed` as adjoining spans, each with the positions that it sees."""
        first, last = self.computed(s)
        if self.block_causal and not self.sees_onward(s):
            origin, prompt = s.layout.origin, list[Span]()
            if self.prompt_block and first < origin:
                prompt, first = [Span(lane, first, origin, origin)], origin
            return prompt + block_causal_spans(lane, first, last, s.length, self.block_length, origin)
        return [Span(lane, first, last, last if self.sees_onward(s) else s.length)] if first < last else []

    def stored(self, s: SequenceState) -> int:
        """Positions whose keys and values are final after the next pass; 0 where none ever are."""
        return 0

    def sees_onward(self, s: SequenceState) -> bool:
        """Whether each position of the next pass sees the positions up to itself, see `onward`."""
        return self.onward and self.prefill_only(s)

    def prefill_only(self, s: SequenceState) -> bool:
        """Whether the next pass computes only the blocks in front of the front block.

        With shifted logits and a block-causal model (Fast-dLLM v2), and where finished positions see onward
        (Nemotron-Labs-Diffusion), the last position of a block predicts the first token of the next. So, as
        published, the pass that stores a block also commits that token, and passes over the next block know
        it.
        """
        at_a_block = s.first_mask > 0 and s.layout.start_of_block(s.first_mask) == s.first_mask
        return self.prefill_predicts_next and at_a_block

    def part(self, s: SequenceState) -> tuple[int, int]:
        """Columns [start, end) of the front block's active sub-block. Sub-blocks count from where the block
        begins, which may be in the prompt.
        """
        low = s.first_mask - (s.first_mask - s.layout.start_of_block(s.block[0])) % self.sub_block_length
        return low, low + self.sub_block_length

    def windows(self, s: SequenceState) -> list[Window]:
        """The windows that the next pass may fill, the front block's first."""
        windows = [self.front_window(s)]
        before = s.open[0]
        for block in s.open[1:]:
            if block.masks_left:
                windows.append(Window(block.start, block.end, block, before.share >= self.activate_at))
            before = block
        return windows

    def front_window(self, s: SequenceState) -> Window:
        block = s.open[0]
        if self.prefill_only(s):
            return Window(s.first_mask, s.first_mask + 1, block)
        low, high = self.part(s)
        return Window(max(low, block.start), min(high, block.end), block)

    def opens(self, s: SequenceState) -> bool:
        """Whether the block after the open ones may open now."""
        after = s.block_index + len(s.open)
        if len(s.open) == self.most_open or after == len(s.blocks) or s.settings.one_block:
            return False
        return s.open[-1].share >= self.open_at

    def is_over(self, s: SequenceState) -> bool:
        """Whether the front block is complete after its last pass."""
        return not s.masks_left

    def published_prefills(self, layout: Layout) -> int:
        """Passes that change nothing, which the published loop runs before the first block."""
        return 0

    def published_passes(self, s: SequenceState) -> int:
        """Passes that change nothing, which the published loop runs for the front block after it is
        complete."""
        return 0


class Whole(Schedule):
    """Each pass computes the whole sequence (LLaDA)."""

    keeps = False
    to_the_end = True

    def full(self, s: SequenceState) -> bool:
        return True

    def computed(self, s: SequenceState) -> tuple[int, int]:
        return 0, s.length


class Prefix(Schedule):
    """In front of the front block, keys and values stay as the block's first pass left them (Fast-dLLM)."""

    to_the_end = True

    def full(self, s: SequenceState) -> bool:
        return s.step_in_block == 0

    def computed(self, s: SequenceState) -> tuple[int, int]:
        return (0 if self.full(s) else s.block[0]), s.length

    def front_window(self, s: SequenceState) -> Window:
        window = super().front_window(s)
        if self.shift and s.step_in_block == 0 and s.first_mask == s.block[0]:
            return window._replace(end=window.start + 1)  # as published: the full pass fills one position
        return window

    def published_passes(self, s: SequenceState) -> int:
        return int(s.step_in_block == 1)  # one more where the full pass completed the block


@dataclass(frozen=True)
class Dual(Prefix):
    """As Prefix, and keys and values behind the open blocks stay too (Fast-dLLM)."""

    to_the_end = False
    refresh: int | None = None
    """Passes over a block from one full pass to the next; None: the first alone is full."""

    def full(self, s: SequenceState) -> bool:
        again = self.refresh is not None and s.step_in_block % self.refresh == 0
        return s.step_in_block == 0 or again

    def computed(self, s: SequenceState) -> tuple[int, int]:
        return (0, s.length) if self.full(s) else (s.block[0], s.open[-1].end)


class BlockCausal(Schedule):
    """For block-causal attention: finished blocks are exact, and the pass after their last stores them
    (SDAR)."""

    @property
    def shared(self) -> bool:
        # Else a prefix of two prompts is cut into blocks from the end of each, and has other keys in each.
        return self.aligned or self.onward

    def stored(self, s: SequenceState) -> int:
        return max(0, s.layout.start_of_block(s.block[0]) - self.overlap)

    def computed(self, s: SequenceState) -> tuple[int, int]:
        # Blocks finished since the last pass are computed once more, so that they are stored.
        return s.num_cached, s.block[0] if self.prefill_only(s) else s.open[-1].end

    def published_prefills(self, layout: Layout) -> int:
        # Where blocks count from the prompt's end (BD3LM in dLLM), the pass over the positions in front of a
        # block is run anew for each block, and none after the last: as many passes in all as blocks.
        return int(self.aligned and bool(layout.blocks) and layout.columns[0] >= self.block_length)

    def published_passes(self, s: SequenceState) -> int:
        # The pass that stores the block, or the one in front of it. D2F's next pass stores it, as here.
        return int(not self.prompt_block)


@dataclass(frozen=True)
class SubBlock(BlockCausal):
    """As BlockCausal, but once the first token of the active sub-block is known, passes compute that
    sub-block alone (Fast-dLLM v2).
    """

    refresh: int | None = None
    """Passes from a pass over the whole front block to the next such pass; None: the first alone is over all
    of it."""

    def computed(self, s: SequenceState) -> tuple[int, int]:
        columns = super().computed(s)
        step = s.step_in_block
        again = step % self.refresh == 0 if self.refresh else step == 0
        low, high = self.part(s)
        if self.prefill_only(s) or again or s.first_mask <= low:
            return columns
        return low, min(high, columns[1])


class Sliding(Schedule):
    """Masks in a window that begins at the first mask, behind all known tokens (WeDLM, SDLM). A token is
    final once no mask is in front of it, and the next pass stores it; known tokens between masks are computed
    in every pass. With shifted logits (SDLM) the token in front of the first mask is computed with the
    window, and stored by the pass after that.

    Blocks say when tokens are streamed and where a response ends. The window may reach into the block after
    the front block, so both are open.
    """

    known_first = True
    most_open = 2
    in_parts = "here a window slides over them"
    shared = True

    def computed(self, s: SequenceState) -> tuple[int, int]:
        return s.num_cached, self.front_window(s).end - self.shift

    def spans(self, lane: int, s: SequenceState) -> list[Span]:
        # Cut from the end, so that the window is in one span.
        first, last = self.computed(s)
        cuts = [first, *range(last, first, -WORD)[::-1]]
        return [Span(lane, a, b, b) for a, b in itertools.pairwise(cuts)]

    def stored(self, s: SequenceState) -> int:
        return max(0, s.first_mask - self.shift)

    def windows(self, s: SequenceState) -> list[Window]:
        return [self.front_window(s)]

    def front_window(self, s: SequenceState) -> Window:
        return Window(s.first_mask, min(s.first_mask + self.block_length, s.length), s.open[0])

    def opens(self, s: SequenceState) -> bool:
        return len(s.open) < self.most_open and s.block_index + len(s.open) < len(s.blocks)

    def published_prefills(self, layout: Layout) -> int:
        # Not shifted, a pass over the prompt, and, though not in front, a pass in which the last tokens are
        # stored.
        return 1 + (layout.columns[0] > 0) if layout.columns and not self.shift else 0


CACHES = ("none", "prefix", "dual", "block", "window")


def is_block_causal(traits: Traits, cache: str) -> bool:
    """Whether a model attends block-causally with a cache mode."""
    too = traits.block_causal_too or traits.onward or traits.prompt_block
    return traits.block_length is not None or (too and cache == "block")


def make(
    cache: str,
    traits: Traits,
    block_length: int,
    sub_block_length: int,
    refresh: int | None,
    **active: Any,
) -> Schedule:
    """The schedule for a cache mode, one of `CACHES`; the caller has checked that the options go together.

    active: `active_blocks`, `open_at` and `activate_at`.
    """
    block_causal = is_block_causal(traits, cache)
    kinds = {"none": Whole, "prefix": Prefix, "dual": SubBlock if block_causal else Dual}
    kind = (kinds | {"block": BlockCausal, "window": Sliding})[cache]
    options: dict[str, Any] = {"refresh": refresh} if kind in (Dual, SubBlock) else {}
    aligned = block_causal and traits.aligned_blocks and not traits.prompt_block
    return kind(
        block_length=block_length,
        sub_block_length=sub_block_length,
        shift=traits.shift,
        block_causal=block_causal,
        aligned=aligned,
        prompt_block=block_causal and traits.prompt_block,
        whole=aligned and traits.whole_blocks,
        onward=block_causal and traits.onward,
        **active,
        **options,
    )
