"""Keys and values that outlive a pass, and which positions a pass computes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops.varlen_attention import has_varlen

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
            found = self._metadata(*key)
        self._known[key] = found
        if len(self._known) > 8:
            del self._known[next(iter(self._known))]
        return found

    def _metadata(
        self,
        spans: tuple[Span, ...],
        pad_to: PadTo,
        causal: bool,
        trees: tuple[tuple[int, ...], ...] | None,
    ) -> AttentionMetadata:
        for span in spans:
            if not 0 <= span.row < self.batch:
                raise ValueError(f"spans: sequence {span.row}, but the cache is for {self.batch}")
            if not (0 <= span.start <= span.end <= self.length and span.visible <= self.length):
                raise ValueError(
                    f"spans: positions [{span.start}, {span.end}) seeing {span.visible} exceed the "
                    f"cache of {self.length}"
                )
        numbers = torch.tensor([list(span) for span in spans], dtype=torch.int64).view(-1, 4)
        row, start, stop, visible = numbers.unbind(1)
        count = stop - start
        end = count.cumsum(0)
        begin = end - count
        total, max_q_len, max_kv_len = (
            int(t[-1] if t is end else t.max()) if len(t) else 0 for t in (end, count, visible)
        )
        positions = torch.arange(total) + (start - begin).repeat_interleave(count)
        rows, pages = row.repeat_interleave(count), self.block_table[row]
        of_token = torch.arange(len(spans)).repeat_interleave(count)
        slots = pages[of_token, positions // self.page_size] * self.page_size + positions % self.page_size
        ancestors = None
        if trees is not None:
            depths, ancestors = _of_trees(trees)
            positions = start.repeat_interleave(count) + depths
        bounds = seen = begin[:0]
        if self.varlen and trees is None:
            whole = (start == 0) & (stop == visible) & (visible >= WHOLE)
            if bool(whole.any()):
                bounds, seen = F.pad(end, (1, 0)), torch.where(whole, visible, 0)
                begin, end, visible = (t.masked_fill(whole, 0) for t in (begin, end, visible))
                if bool(whole.all()):
                    begin, end, visible, pages = (t[:0] for t in (begin, end, visible, pages))
        if pad_to is not None and spans:
            more = pad_to(total) - total
            rows, positions = F.pad(rows, (0, more)), F.pad(positions, (0, more))
            slots = F.pad(slots, (0, more), value=-1)
            if ancestors is not None:
                ancestors = F.pad(ancestors, (0, 0, 0, more))
            if len(seen):
                max_q_len = max(max_q_len, more)  # the rows after the last span are a sequence too
            more = _power_of_two(len(begin)) - len(begin)
            begin, end, visible = (F.pad(t, (0, more)) for t in (begin, end, visible))
            pages = F.pad(pages, (0, 0, 0, more))
            more = _power_of_two(len(seen)) - len(seen)
            bounds, seen = F.pad(bounds, (0, more), value=total), F.pad(seen, (0, more))
            # They bound a launch's grid, whose blocks without work leave at once.
            max_q_len = _power_of_two(max_q_len)
            max_kv_len = min(max(256, _power_of_two(max_kv_len)), self.length)
        if len(seen):
            bounds, seen = F.pad(bounds, (0, 1), value=len(rows)), F.pad(seen, (0, 1))
        through_cache = begin, end, visible, pages
        tensors = rows, positions, slots, *through_cache, bounds, seen, ancestors
        return AttentionMetadata(max_q_len, max_kv_len, *tensors, causal=causal)


def _of_trees(trees: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """(N,) int64 depths and (N, W) int64 ancestor words of the tokens of trees, themselves among them."""
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
    signed = [[word - 2**64 if word >= 2**63 else word for word in own] for own in words]
    return torch.tensor(depths, dtype=torch.int64), torch.tensor(signed, dtype=torch.int64).view(-1, width)


def _power_of_two(count: int) -> int:
    """The least that is not below `count`."""
    return 1 << (count - 1).bit_length() if count > 0 else 0
