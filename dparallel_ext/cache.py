"""The cache of keys and values, and the metadata of the positions that a pass computes."""

from __future__ import annotations

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


def bucket(count: int) -> int:
    """`count` rounded up to a multiple of 8, and above 64 to one of four sizes a doubling; 0 is 0."""
    size = max(8, 2 ** (count.bit_length() - 3))
    return -(-count // size) * size


MIN_VARLEN = 256
"""The least length of a sequence at which a pass over all of it attends by `varlen_attention` to its packed
keys, and not through the cache. Measured on an H200 with LLaDA's heads, with the launch that rotates the
packed keys: 256 positions take 15 us against 13 alone, 49 against 87 in a batch of 8; 512 take 24 against
47."""


WORD = 64
"""Bits of a word of `AttentionMetadata.ancestors`."""


class Span(NamedTuple):
    """Positions [start, end) of sequence `row`, which see the positions [0, visible)."""

    row: int
    start: int
    end: int
    visible: int


def block_causal_spans(
    row: int, start: int, end: int, length: int, block_length: int, origin: int = 0
) -> list[Span]:
    """The spans of positions [start, end) of a sequence of `length`: one for each block, which sees the
    positions up to the block's end.

    origin: a position where a block begins; the blocks before and behind it adjoin.
    """

    def end_of_block(position: int) -> int:
        return position + block_length - (position - origin) % block_length

    cuts = [start, *range(end_of_block(start), end, block_length), end]
    return [Span(row, a, b, min(end_of_block(a), length)) for a, b in itertools.pairwise(cuts) if a < b]


def known_first(known: Tensor, all_known: Tensor, earlier: Tensor) -> Tensor:
    """The tokens that each token sees where masks come behind all known tokens: a known token the known
    tokens up to itself, a mask all known tokens and the masks up to itself.

    known: bool, whether each token is known. all_known, earlier: all known tokens, and the tokens up to each,
    both bool or both as bits of words.
    """
    return torch.where(known, all_known & earlier, all_known | earlier)


def runs_joined(masked: Tensor) -> Tensor:
    """(B, L, L) bool: the tokens that each token sees where a run of masks and the token in front of it see
    each other. No other token sees them, and each sees the other tokens up to itself.

    masked: (B, L) bool, whether each token is a mask.
    """
    position = torch.arange(masked.shape[1], device=masked.device)
    joined = masked | F.pad(masked[:, 1:], (0, 1))
    in_front = torch.where(joined, -1, position).cummax(1).values
    same_run = joined[:, :, None] & (in_front[:, :, None] == in_front[:, None])
    return torch.where(joined[:, None], same_run, position[:, None] >= position)


@dataclass(frozen=True)
class AttentionMetadata:
    """The work of one forward pass: spans of any sequences and lengths, packed.

    N tokens in the order of the spans, S spans; see `ops.kv_write` and `ops.block_attention`. Padding may
    follow: rows that are no tokens (position 0, no slot, no span), and spans without rows.
    """

    max_q_len: int
    max_kv_len: int
    """Upper bounds of a span's rows, and of the slots that it sees."""
    rows: Tensor
    """(N,) int64: each token's sequence."""
    positions: Tensor
    """(N,) int64: each token's position in its sequence."""
    slot_mapping: Tensor
    """(N,) int64: the slot for each token's key and value."""
    q_start: Tensor
    q_end: Tensor
    kv_lens: Tensor
    """(S,) int64 each: a span's rows [q_start, q_end) of the packed tokens, and the slots that they see."""
    block_table: Tensor
    """(S, P) int64: each span's pages, in the order of positions."""
    cu_seqlens: Tensor
    seqused_k: Tensor
    """(S + 2,) and (S + 1,) int64, see `ops.varlen_attention`, which computes the spans of whole sequences;
    for it, other spans and padding rows see nothing. In `q_start` and `q_end` these spans have no rows, so
    that they do not read the cache. Empty if no span is whole; if all are, the four tensors above are."""
    ancestors: Tensor | None = None
    """(N, W) int64: which of its span's slots a token sees, see `ops.block_attention`; None unless spans are
    trees, or have masks behind known tokens."""
    causal: bool = field(default=False, kw_only=True)
    """Whether a token sees only its span's slots up to its own."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The fields that are tensors, in their order."""
        return tuple(value for value in vars(self).values() if isinstance(value, Tensor))

    def to(self, device: torch.device | str) -> AttentionMetadata:
        """A copy whose tensors are on `device`."""
        moved: Any = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    def known_first(self, known: Tensor, *, both_ways: bool = False) -> AttentionMetadata:
        """A copy in which each span's tokens see each other as `known_first` says, and all in front of it.

        known: (N,) bool. A span has at most `WORD` tokens, and sees no slots behind them. It is computed on
        the device, without waiting for it.
        both_ways: a span's other tokens, which are its last, see each other.
        """
        row = torch.arange(len(known), device=known.device)
        ends = self.q_end.cummax(0).values  # those of padding are 0
        span = torch.searchsorted(ends, row, right=True).clamp(max=len(ends) - 1)
        place = (row - self.q_start[span]).clamp(max=WORD - 1)  # that of padding may be beyond
        earlier = ~(-2 << place)
        if both_ways:
            words = torch.where(known, earlier, -1)
        else:
            bit = torch.where(known & (row < ends[-1]), 1 << place, 0)
            all_known = torch.zeros_like(ends).index_add_(0, span, bit)
            words = known_first(known, all_known[span], earlier)
        return replace(self, ancestors=words[:, None])


class KVCache:
    """Keys (after RoPE) and values in slots allocated once, in pages of page_size slots.

    Args:
        slots: (layers, 2, pages, kv_heads, page_size, head_dim), in the dtype and on the device of the
            model. With one layer every layer uses the same slots: enough where each pass computes whole
            sequences and nothing is kept.
        rope: cos, sin of the model's rotary embedding, each (at least length, R / 2) float32.
        block_table: (B, P) int64 on the CPU, each sequence's pages in order. Default: page b for sequence b.
        query_scale: (at least length,) float32, the factor of a position's queries; None: 1.
    """

    def __init__(
        self,
        slots: Tensor,
        rope: tuple[Tensor, Tensor],
        block_table: Tensor | None = None,
        query_scale: Tensor | None = None,
    ) -> None:
        self.slots, self.rope, self.query_scale = slots, rope, query_scale
        self._layers: list[Any] = [layer.unbind(0) for layer in slots.unbind(0)]
        self.block_table = (
            torch.arange(slots.shape[2], device="cpu")[:, None] if block_table is None else block_table
        )
        self.varlen = has_varlen(slots)
        """Whether long spans of whole sequences attend by `varlen_attention`. Only a span's own numbers
        decide about it, so that a result depends neither on other sequences of the pass nor on pages."""
        self.changes = 0
        """How often pages were assigned."""
        self._known: dict[tuple[Any, ...], AttentionMetadata] = {}
        """The results of `metadata` used last, the least recent first."""

    @property
    def page_size(self) -> int:
        """Slots of a page."""
        return self.slots.shape[4]

    @property
    def batch(self) -> int:
        """Sequences that it is for."""
        return len(self.block_table)

    @property
    def length(self) -> int:
        """Positions that a sequence has slots for."""
        return self.block_table.shape[1] * self.page_size

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values (pages, kv_heads, page_size, head_dim) of a layer."""
        return self._layers[index % len(self._layers)]

    def assign(self, row: int, pages: Sequence[int], first: int = 0) -> None:
        """Set the pages of sequence `row`, from its page number `first` on."""
        self.block_table[row, first : first + len(pages)] = torch.tensor(
            pages, dtype=torch.int64, device="cpu"
        )
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
        """The metadata, on the CPU, of a pass over `spans`.

        pad_to: maps a number of rows to the number, no smaller, that it is padded to; the number of spans,
            `max_q_len` and `max_kv_len` (256 or more, and no more than the slots) then become powers of two.
            None: no padding.
        causal: each token sees its span's slots up to its own; a span's `visible` is then its `end`.
        parents: for spans that are trees, each token's parent, as an earlier place in the span; -1 for a
            root. A token has the slot of its place and the position of its depth, and sees its ancestors.

        Raises:
            ValueError: for a span whose sequence the cache does not have, or that exceeds its slots.
        """
        trees = None if parents is None else tuple(map(tuple, parents))
        key = (tuple(spans), pad_to, causal, trees)
        metadata = self._known.pop(key, None)  # the passes over a block have the same spans
        if metadata is None:
            packing = Packing()
            _, max_q_len, max_kv_len = self.put(packing, spans, pad_to, parents=parents)
            metadata = AttentionMetadata(max_q_len, max_kv_len, *unpack(*packing.pack()), causal=causal)
        self._known[key] = metadata
        if len(self._known) > 8:
            del self._known[next(iter(self._known))]
        return metadata

    def put(
        self,
        packing: Packing,
        spans: Sequence[Span],
        pad_to: PadTo = None,
        *,
        parents: Sequence[Sequence[int]] | None = None,
    ) -> tuple[int, int, int]:
        """Pack the tensors of the metadata of a pass whose spans do not come again; arguments as
        `metadata`'s.

        Returns the number of rows, padding included, `max_q_len` and `max_kv_len`.
        """
        self._check(spans)
        counts = [span.end - span.start for span in spans]
        ends = list(itertools.accumulate(counts))
        begins = [end - count for end, count in zip(ends, counts, strict=True)]
        seen_slots = [span.visible for span in spans]
        total, max_q_len, max_kv_len = sum(counts), max(counts, default=0), max(seen_slots, default=0)
        bounds: list[int] = []
        seen: list[int] = []
        whole = [self.varlen and parents is None and is_whole(span) for span in spans]
        if any(whole):
            bounds = [0, *ends]
            seen = [span.visible if is_all else 0 for span, is_all in zip(spans, whole, strict=True)]
            begins, ends, seen_slots = (
                [0 if is_all else number for number, is_all in zip(numbers, whole, strict=True)]
                for numbers in (begins, ends, seen_slots)
            )
            if all(whole):
                begins, ends, seen_slots = [], [], []  # none attends through the cache
        padding = padding_spans = 0
        if pad_to is not None and spans:
            padding = pad_to(total) - total
            if seen:
                max_q_len = max(max_q_len, padding)  # for `varlen_attention` the padding is a sequence
            padding_spans = _power_of_two(len(begins)) - len(begins)
            more_seen = _power_of_two(len(seen)) - len(seen)
            bounds += [total] * more_seen
            seen += [0] * more_seen
            # Both only bound a launch's grid, whose blocks without work return at once.
            max_q_len = _power_of_two(max_q_len)
            max_kv_len = min(max(256, _power_of_two(max_kv_len)), self.length)
        if seen:
            bounds.append(total + padding)
            seen.append(0)
        depths, ancestors = (None, None) if parents is None else _of_trees(parents)
        pages = self.block_table[[span.row for span in spans]]
        self._put_tokens(packing, spans, counts, depths, pages, padding)
        for numbers in (begins, ends, seen_slots):
            packing.padded(numbers, 0, len(begins) + padding_spans)
        if not begins:
            pages = pages[:0]
        packing.tensors((F.pad(pages, (0, 0, 0, padding_spans)) if padding_spans else pages,))
        for numbers in (bounds, seen):
            packing.padded(numbers, 0, len(numbers))
        if ancestors is not None:
            width = len(ancestors[0]) if ancestors else 0
            packing.add(itertools.chain.from_iterable(ancestors))
            packing.repeat(0, padding * width)
            packing.close(total + padding, width)
        return total + padding, max_q_len, max_kv_len

    def _check(self, spans: Sequence[Span]) -> None:
        """Raise ValueError for a span that the cache does not have."""
        batch, length = self.batch, self.length
        for row, start, end, visible in spans:
            if not 0 <= row < batch:
                raise ValueError(f"spans: sequence {row}, but the cache is for {batch}")
            if not (0 <= start <= end <= length and visible <= length):
                raise ValueError(
                    f"spans: positions [{start}, {end}) seeing {visible} exceed the cache of {length}"
                )

    def _put_tokens(
        self,
        packing: Packing,
        spans: Sequence[Span],
        counts: Sequence[int],
        depths: Sequence[int] | None,
        pages: Tensor,
        padding: int,
    ) -> None:
        """Pack each token's sequence, position and slot, with `padding` tokens more.

        depths: with trees, of each token, from its span's start. pages: each span's row of the block table.
        """
        padded = sum(counts) + padding
        for span, count in zip(spans, counts, strict=True):
            packing.repeat(span.row, count)
        packing.repeat(0, padding)
        packing.close(padded)
        if depths is None:
            for span in spans:
                packing.ascending(span.start, span.end)
        else:
            starts = itertools.chain.from_iterable(
                [span.start] * count for span, count in zip(spans, counts, strict=True)
            )
            packing.add(map(operator.add, starts, depths))
        packing.repeat(0, padding)
        packing.close(padded)
        self._put_slots(packing, spans, pages.tolist())
        packing.repeat(-1, padding)
        packing.close(padded)

    def _put_slots(self, packing: Packing, spans: Sequence[Span], pages: Sequence[Sequence[int]]) -> None:
        """Pack the slot mapping of the spans' tokens. pages: each span's row of the block table."""
        size = self.page_size
        for (_, start, end, _), table in zip(spans, pages, strict=True):
            while start < end:
                page, offset = divmod(start, size)
                count = min(size - offset, end - start)
                slot = table[page] * size + offset
                packing.ascending(slot, slot + count)
                start += count


def is_whole(span: Span) -> bool:
    """Whether the span is a whole sequence of at least `MIN_VARLEN` positions."""
    return span.start == 0 and span.end == span.visible >= MIN_VARLEN


def _of_trees(trees: Sequence[Sequence[int]]) -> tuple[list[int], list[list[int]]]:
    """The depths of the N tokens of trees, and (N, W) words of 64 bits, as int64: a bit for each place of the
    token's span that is an ancestor of the token, or the token itself.
    """
    depths: list[int] = []
    words: list[list[int]] = []
    width = -(-max(map(len, trees), default=0) // WORD)
    for parents in trees:
        first = len(depths)
        for place, parent in enumerate(parents):
            ancestors = list(words[first + parent]) if parent >= 0 else [0] * width
            ancestors[place // WORD] |= 1 << place % WORD
            words.append(ancestors)
            depths.append(depths[first + parent] + 1 if parent >= 0 else 0)
    return depths, [[word - 2**64 if word >= 2**63 else word for word in ancestors] for ancestors in words]


def _power_of_two(count: int) -> int:
    """The least power of two that is not below `count`; 0 for 0."""
    return 1 << (count - 1).bit_length() if count > 0 else 0
