"""Keys and values that outlive a pass, and which positions a pass computes."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops.varlen_attention import has_varlen
from .packed import Packing, unpack

PadTo = Callable[[int], int] | None


def fill_up(count: int, parts: int) -> int:
    """`count` or the next of 8, 16, 24, ... and then of `parts` numbers to every doubling; 0 stays 0."""
    size = max(8, 2 ** ((count - 1).bit_length() - parts.bit_length()))
    return -(-count // size) * size


GRAPH_BUCKETS = functools.partial(fill_up, parts=4)

WHOLE = 256
"""Positions from which on a sequence that is computed whole attends to itself, by `varlen_attention`, and
not to the cache. Measured on an H200 with LLaDA's heads, the launch that rotates the packed keys counted in:
256 positions take 15 us against 13 alone, 49 against 87 in a batch of 8; 512 take 24 against 47."""


class Span(NamedTuple):
    """Positions [start, end) of sequence `row`, which see the positions [0, visible)."""

    row: int
    start: int
    end: int
    visible: int


@dataclass(frozen=True)
class AttentionMetadata:
    """What one forward pass computes: spans of any sequences and lengths, packed.

    N tokens in the order of the spans, S spans; see `attention.kv_write` and `attention.block_attention`.
    Rows may follow that are no tokens (at position 0, in no slot and no span), and spans without any.
    """

    max_q_len: int
    max_kv_len: int
    """At least those of any span: its rows, and the slots it sees."""
    rows: Tensor
    """(N,) int64, each token's sequence."""
    positions: Tensor
    """(N,) int64, its position in that."""
    slot_mapping: Tensor
    """(N,) int64, where its key and value go."""
    q_start: Tensor
    q_end: Tensor
    kv_lens: Tensor
    """(S,) int64: a span's rows of the packed tokens, and the slots they see."""
    block_table: Tensor
    """(S, P) int64"""
    cu_seqlens: Tensor
    seqused_k: Tensor
    """(S + 2,) and (S + 1,) int64: see `attention.varlen_attention`. Spans of whole sequences see themselves,
    all others and the rows after the last span see nothing there; nor do whole ones see the cache: they have
    no rows in `q_start` and `q_end`. Empty where no span is whole; where all are, the four above are."""
    ancestors: Tensor | None = None
    """(N, W) int64: which of its span's slots a token sees, see `ops.block_attention`; None where the spans
    are no trees."""
    causal: bool = field(default=False, kw_only=True)
    """Whether a token sees its span's slots up to its own alone."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those of the fields that are tensors, in their order."""
        through_cache = self.q_start, self.q_end, self.kv_lens, self.block_table
        found = self.rows, self.positions, self.slot_mapping, *through_cache, self.cu_seqlens, self.seqused_k
        return found if self.ancestors is None else (*found, self.ancestors)

    def to(self, device: torch.device | str) -> AttentionMetadata:
        """The same on a device."""
        moved: Any = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)


class KVCache:
    """Keys (after RoPE) and values in slots allotted once, in pages of page_size slots.

    Args:
        slots: (layers, 2, pages, kv_heads, page_size, head_dim), in the dtype and on the device of the
            model. With one layer every layer uses the same slots: enough where each pass computes whole
            sequences and nothing is kept.
        rope: cos, sin of the model's rotary embedding, each (at least length, head_dim / 2) float32.
        block_table: (B, P) int64 on the CPU, each sequence's pages in order. Default: page b for sequence b.
    """

    def __init__(self, slots: Tensor, rope: tuple[Tensor, Tensor], block_table: Tensor | None = None) -> None:
        self.slots, self.rope = slots, rope
        self.block_table = torch.arange(slots.shape[2])[:, None] if block_table is None else block_table
        self.varlen = has_varlen(slots)
        """Long spans of whole sequences attend to themselves, not to the cache. A span's own numbers alone
        decide, so that a sequence's result depends neither on the others of its pass nor on its pages."""
        self.changes = 0
        """Times that pages were assigned."""
        self._known: dict[tuple[Any, ...], AttentionMetadata] = {}
        """The few last ones, the least recently used first."""

    @property
    def page_size(self) -> int:
        return self.slots.shape[4]

    @property
    def batch(self) -> int:
        return len(self.block_table)

    @property
    def length(self) -> int:
        """Positions that a sequence has slots for."""
        return self.block_table.shape[1] * self.page_size

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values (pages, kv_heads, page_size, head_dim) of a layer."""
        keys, values = self.slots[index % len(self.slots)].unbind(0)
        return keys, values

    def assign(self, row: int, pages: Sequence[int], first: int = 0) -> None:
        """Let `pages` be those of sequence `row`, from its page number `first` on."""
        self.block_table[row, first : first + len(pages)] = torch.tensor(pages, dtype=torch.int64)
        self._known.clear()
        self.changes += 1

    def metadata(
        self,
        spans: Sequence[Span],
        pad_to: PadTo = None,
        *,
        causal: bool = False,
        parents: Sequence[Sequence[int]] | None = None,
    ) -> AttentionMetadata:
        """The pass over `spans`, on the CPU.

        pad_to: gives the number, at least its argument, that so many rows are filled up to; with it, spans,
            `max_q_len` and `max_kv_len` (from 256 on) become powers of two, none beyond the slots.
            None: nothing is filled up.
        causal: each token sees its span's slots up to its own; a span then ends where it sees to.
        parents: instead, spans that are trees: of each token its parent's place in the span, an earlier one,
            -1 for a root. A token takes the slot of its place, the position of its depth, and sees its
            ancestors.

        Raises:
            ValueError: for a span of no sequence of the cache, or beyond its slots.
        """
        trees = None if parents is None else tuple(map(tuple, parents))
        key = (tuple(spans), pad_to, causal, trees)
        found = self._known.pop(key, None)  # the passes over a block are alike, and those over everything
        if found is None:
            packing = Packing()
            _, max_q_len, max_kv_len = self.put(packing, spans, pad_to, parents=parents)
            found = AttentionMetadata(max_q_len, max_kv_len, *unpack(*packing.pack()), causal=causal)
        self._known[key] = found
        if len(self._known) > 8:
            del self._known[next(iter(self._known))]
        return found

    def put(
        self,
        packing: Packing,
        spans: Sequence[Span],
        pad_to: PadTo = None,
        *,
        parents: Sequence[Sequence[int]] | None = None,
    ) -> tuple[int, int, int]:
        """Pack the tensors that `metadata` has, in their order. For passes that do not come again.

        Returns the number of tokens, those included that fill up, `max_q_len` and `max_kv_len`.
        """
        batch, length = self.batch, self.length
        for row, start, end, visible in spans:
            if not 0 <= row < batch:
                raise ValueError(f"spans: sequence {row}, but the cache is for {batch}")
            if not (0 <= start <= end <= length and visible <= length):
                raise ValueError(
                    f"spans: positions [{start}, {end}) seeing {visible} exceed the cache of {length}"
                )
        counts = [span.end - span.start for span in spans]
        ends = list(itertools.accumulate(counts))
        begins = [end - count for end, count in zip(ends, counts, strict=True)]
        seen_slots = [span.visible for span in spans]
        total, max_q_len, max_kv_len = sum(counts), max(counts, default=0), max(seen_slots, default=0)
        bounds: list[int] = []
        seen: list[int] = []
        through = list(spans)  # those that attend through the cache
        whole = [self.varlen and parents is None and is_whole(span) for span in spans]
        if any(whole):
            bounds = [0, *ends]
            seen = [span.visible if own else 0 for span, own in zip(spans, whole, strict=True)]
            begins, ends, seen_slots = (
                [0 if own else number for number, own in zip(numbers, whole, strict=True)]
                for numbers in (begins, ends, seen_slots)
            )
            if all(whole):
                begins, ends, seen_slots, through = [], [], [], []
        more = more_spans = 0
        if pad_to is not None and spans:
            more = pad_to(total) - total
            if seen:
                max_q_len = max(max_q_len, more)  # the rows after the last span are a sequence too
            more_spans = _power_of_two(len(begins)) - len(begins)
            more_seen = _power_of_two(len(seen)) - len(seen)
            bounds += [total] * more_seen
            seen += [0] * more_seen
            # They bound a launch's grid, whose blocks without work leave at once.
            max_q_len = _power_of_two(max_q_len)
            max_kv_len = min(max(256, _power_of_two(max_kv_len)), length)
        if seen:
            bounds.append(total + more)
            seen.append(0)
        for span, count in zip(spans, counts, strict=True):
            packing.repeat(span.row, count)
        packing.repeat(0, more)
        packing.close(total + more)
        if parents is None:
            for span in spans:
                packing.ascending(span.start, span.end)
        else:
            depths, ancestors = _of_trees(parents)
            own_starts = itertools.chain.from_iterable(
                [span.start] * count for span, count in zip(spans, counts, strict=True)
            )
            packing.add(map(operator.add, own_starts, depths))
        packing.repeat(0, more)
        packing.close(total + more)
        pages = self.block_table[[span.row for span in spans]]
        self._put_slots(packing, spans, pages.tolist())
        packing.repeat(-1, more)
        packing.close(total + more)
        for numbers in (begins, ends, seen_slots):
            packing.add(numbers)
            packing.repeat(0, more_spans)
            packing.close(len(begins) + more_spans)
        if len(through) < len(spans):
            pages = self.block_table[[span.row for span in through]]
        packing.tensors((F.pad(pages, (0, 0, 0, more_spans)) if more_spans else pages,))
        for numbers in (bounds, seen):
            packing.add(numbers)
            packing.close(len(numbers))
        if parents is not None:
            width = len(ancestors[0]) if ancestors else 0
            packing.add(itertools.chain.from_iterable(ancestors))
            packing.repeat(0, more * width)
            packing.close(total + more, width)
        return total + more, max_q_len, max_kv_len

    def _put_slots(self, packing: Packing, spans: Sequence[Span], pages: Sequence[Sequence[int]]) -> None:
        """Where the keys and values of the spans' tokens go; pages: of each span's sequence."""
        size = self.page_size
        for (_, start, end, _), table in zip(spans, pages, strict=True):
            while start < end:
                page, offset = divmod(start, size)
                count = min(size - offset, end - start)
                slot = table[page] * size + offset
                packing.ascending(slot, slot + count)
                start += count


def is_whole(span: Span) -> bool:
    """Whether a sequence is computed whole, and so long that it attends to itself where it can."""
    return span.start == 0 and span.end == span.visible >= WHOLE


def _of_trees(trees: Sequence[Sequence[int]]) -> tuple[list[int], list[list[int]]]:
    """The depths of N tokens of trees, and (N, W) words of their ancestors, themselves among them, signed."""
    depths: list[int] = []
    words: list[list[int]] = []
    width = -(-max(map(len, trees), default=0) // 64)
    for parents in trees:
        first = len(depths)
        for place, parent in enumerate(parents):
            own = list(words[first + parent]) if parent >= 0 else [0] * width
            own[place // 64] |= 1 << place % 64
            words.append(own)
            depths.append(depths[first + parent] + 1 if parent >= 0 else 0)
    return depths, [[word - 2**64 if word >= 2**63 else word for word in own] for own in words]


def _power_of_two(count: int) -> int:
    """The least that is not below `count`."""
    return 1 << (count - 1).bit_length() if count > 0 else 0
