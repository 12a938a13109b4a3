"""Keys and values that outlive a pass, and which positions a pass computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Span(NamedTuple):
    """Positions [start, end) of sequence `row`, which see the positions [0, visible)."""

    row: int
    start: int
    end: int
    visible: int


@dataclass(frozen=True)
class Pass:
    """What one forward pass computes: spans of any sequences and lengths, packed.

    N tokens in the order of the spans, S spans; see `attention.kv_write` and `attention.block_attention`.
    Rows may follow that are no tokens: at position 0, in no slot and no span.
    """

    positions: Tensor
    """(N,) int64, each token's position in its sequence."""
    slots: Tensor
    """(N,) int64, where its key and value go."""
    begin: Tensor
    end: Tensor
    lengths: Tensor
    """(S,) int64: a span's rows of the packed tokens, and the slots they see."""
    pages: Tensor
    """(S, P) int64"""
    longest_query: int
    longest_length: int


class KVCache:
    """Keys (after RoPE) and values in slots allotted once, in pages of page_size slots.

    Args:
        slots: (layers, 2, pages, kv_heads, page_size, head_dim), in the dtype and on the device of the
            model. With one layer every layer uses the same slots: enough where each pass computes whole
            sequences and nothing is kept.
        table: (B, P) int64 on the CPU, each sequence's pages in order. Default: page b for sequence b.
    """

    def __init__(self, slots: Tensor, table: Tensor | None = None) -> None:
        self.slots = slots
        self.table = torch.arange(slots.shape[2])[:, None] if table is None else table
        self._last: tuple[list[Span], int, Pass] | None = None

    @property
    def page_size(self) -> int:
        return self.slots.shape[4]

    @property
    def batch(self) -> int:
        return len(self.table)

    @property
    def length(self) -> int:
        """Positions that a sequence has slots for."""
        return self.table.shape[1] * self.page_size

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values (pages, kv_heads, page_size, head_dim) of a layer."""
        keys, values = self.slots[index % len(self.slots)].unbind(0)
        return keys, values

    def assign(self, row: int, pages: Sequence[int], first: int = 0) -> None:
        """Let `pages` be those of sequence `row`, from its page number `first` on."""
        self.table[row, first : first + len(pages)] = torch.tensor(pages, dtype=torch.int64)
        self._last = None

    def plan(self, spans: Sequence[Span], rows: int = 0) -> Pass:
        """The pass over `spans`, filled up to `rows` rows.

        Raises:
            ValueError: for a span of no sequence of the cache, or beyond its slots.
        """
        spans = list(spans)
        if self._last is not None and self._last[:2] == (spans, rows):  # the passes over a block are alike
            return self._last[2]
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
        total = int(end[-1]) if len(end) else 0
        positions = torch.arange(total) + (start - begin).repeat_interleave(count)
        pages = self.table[row]
        of_token = torch.arange(len(spans)).repeat_interleave(count)
        slots = pages[of_token, positions // self.page_size] * self.page_size + positions % self.page_size
        device, more = self.slots.device, max(0, rows - total)
        plan = Pass(
            F.pad(positions, (0, more)).to(device, non_blocking=True),
            F.pad(slots, (0, more), value=-1).to(device, non_blocking=True),
            begin.to(device, non_blocking=True),
            end.to(device, non_blocking=True),
            visible.to(device, non_blocking=True),
            pages.to(device, non_blocking=True),
            longest_query=int(count.max()) if len(count) else 0,
            longest_length=int(visible.max()) if len(count) else 0,
        )
        self._last = spans, rows, plan
        return plan
