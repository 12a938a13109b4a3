"""The inputs of a pass: all that the device needs from the host, packed into one tensor."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..cache import Span
from ..models import Model
from ..packed import Packing, Shapes
from . import padding
from .schedule import Schedule, Window
from .sequence import IDLE, SequenceState, eos_ids, reads
from .sequence_settings import SamplingGroup, grouped
from .workspace import Workspace


class SequenceWork(NamedTuple):
    """The work of a pass on one sequence. Columns are positions of the sequence."""

    spans: list[Span]
    """The positions to compute, adjoining spans."""
    windows: list[Window]
    """The windows that may be filled."""
    reads: list[tuple[int, int]]
    """For each window the columns [start, end) whose logits its rule reads; without a rule, the window."""
    counted: list[tuple[int, int]]
    """Columns [start, end) of the blocks whose `Counts` the host needs."""
    ending: tuple[int, int]
    """Columns [start, end) in which an EOS ends the sequence."""
    onward: bool = False
    """Whether the positions are final and see the positions up to themselves, so that their logits are for
    the next position; the same for all sequences of a pass."""


class GraphKey(NamedTuple):
    """All that the launches of a pass depend on, beside the values of its inputs."""

    shapes: Shapes
    max_q_len: int
    max_kv_len: int
    onward: bool
    """See `SequenceWork`."""
    record: bool
    """Whether commits are written to the trajectory."""
    top: bool
    """Whether the most probable tokens of their places are, too."""
    cells: int
    """Columns of each window that rules see."""
    eos_ids: tuple[int, ...]
    groups: tuple[SamplingGroup, ...]

    @property
    def recorded(self) -> bool:
        """Whether the launches can be recorded."""
        return all(group.rule is None or group.rule.recorded for group in self.groups)


class InputPacker:
    """Packs the inputs of a batch's passes; arguments as `Runner`'s."""

    def __init__(self, model: Any, space: Workspace, mask_id: int, schedule: Schedule) -> None:
        self.model, self.mask_id = model, mask_id
        self.tokens, self.kv_cache = space.tokens, space.kv_cache
        self.shift = int(schedule.shift)
        """The logits for position p are produced at position max(p - shift, 0)."""
        self.schedule, self.windows_of_lane = schedule, schedule.active_blocks
        self.static_shapes = padding.runs_ahead(self.tokens.device)
        """Input shapes come from a small set and depend on no device results, so passes can be recorded."""
        self._pad_to = padding.row_padding(model) if isinstance(model, Model) else None

    def pack(
        self, sequences: Sequence[SequenceState], work: Mapping[int, SequenceWork]
    ) -> tuple[Tensor, GraphKey]:
        """All that the device needs from the host, (n,) int64 on the CPU, and the key that says how to read
        it.
        """
        reach, onward = self._reach(sequences, work), any(lane_work.onward for lane_work in work.values())
        lanes = sorted({*work, *self.filler_lanes(len(sequences), work, reach)})
        packing, longest = Packing(), (0, 0)
        if isinstance(self.model, Model):
            assert self.kv_cache is not None
            spans = [span for b in lanes if b in work for span in work[b].spans]
            metadata = self.kv_cache.metadata(spans, self._pad_to, causal=onward)
            longest = metadata.max_q_len, metadata.max_kv_len
            packing.tensors(metadata.tensors)
        numbers, groups = grouped(sequences[b].sampling for b in work)
        cells = self._cells(sequences, work, reach)
        self._put_rows(packing, sequences, work, lanes, reach)
        for group in range(len(groups)):
            members = [b for b, number in zip(work, numbers, strict=True) if number == group]
            packing.add(_by_field(self._edges(len(sequences), work, members)))
        packing.close(len(groups), 4, len(sequences) * self.windows_of_lane)
        counted = self._counted(sequences, work)
        packing.add(_by_field(counted))
        packing.close(2, len(counted))
        eos = eos_ids(sequences)
        for each in eos:
            packing.add(_by_field(self._endings(sequences, work, each)))
        packing.close(len(eos), 2, len(sequences))
        by_rule = any(group.rule is not None for group in groups)
        self._put_windows(packing, sequences, work, by_rule)
        inputs, shapes = packing.pack(self.tokens.device)
        record = any(sequences[b].settings.record for b in work)
        top = any(sequences[b].settings.top_logprobs for b in work)
        return inputs, GraphKey(shapes, *longest, onward, record, top, cells, eos, groups)

    def _put_rows(
        self,
        packing: Packing,
        sequences: Sequence[SequenceState],
        work: Mapping[int, SequenceWork],
        lanes: Sequence[int],
        reach: int,
    ) -> None:
        """Pack two tensors about the n rows of logits: each row's place among the packed positions, padded as
        `row_padding` says; and each row's flat position b * L + l. Lanes beside `work` get rows that nobody
        reads.
        """
        of_lane: list[range | list[int]] = []
        offset, count = 0, 0
        for b in lanes:
            if b not in work:
                of_lane.append(range(reach))
                packing.repeat(0, reach)
            else:
                lane_work = work[b]
                everything = reads(sequences[b], "block") or reads(sequences[b], "response")
                columns = self._columns(b, lane_work.reads, reach, everything)
                first, last = lane_work.spans[0].start, lane_work.spans[-1].end
                shift = self.shift or int(lane_work.onward)
                of_lane.append(columns)
                low, high = (columns[0], columns[-1]) if columns else (first, first)
                to = offset - first - shift
                if not (first <= low - shift and high - shift < last):
                    near = (min(max(column - shift, first), last - 1) for column in columns)
                    packing.add(at - first + offset for at in near)
                elif isinstance(columns, range):
                    packing.ascending(columns.start + to, columns.stop + to)
                else:
                    packing.add([column + to for column in columns])
                offset += last - first
            count += len(of_lane[-1])
        padded = count if self._pad_to is None else self._pad_to(count)
        packing.repeat(0, padded - count)
        packing.close(padded)
        length = self.tokens.shape[1]
        for b, columns in zip(lanes, of_lane, strict=True):
            if isinstance(columns, range):
                packing.ascending(columns.start + b * length, columns.stop + b * length)
            else:
                packing.add([column + b * length for column in columns])
        packing.close(count)

    def _put_windows(
        self,
        packing: Packing,
        sequences: Sequence[SequenceState],
        work: Mapping[int, SequenceWork],
        by_rule: bool,
    ) -> None:
        """Pack, for all W windows: (3, W) pass, seed and sequence number, which key the samples; (5, W)
        `SequenceState.progress`, or (5, 0) without rules; and W policy rows of 5 float32, two to an int64.
        """
        policy: list[float] = []
        progress: list[tuple[int, int, int, int, int]] = []
        keys = [(s.nfe + 1, *s.settings.key) for s in sequences for _ in range(self.windows_of_lane)]
        for b, sequence in enumerate(sequences):
            windows = work[b].windows if b in work else []
            for window in windows:
                policy += sequence.policy(window.block, window.must_move)
                progress.append(sequence.progress(window.block))
            for _ in range(self.windows_of_lane - len(windows)):
                policy += IDLE.settings.policy
                progress.append((0, 1, 0, 0, 0))
        packing.add(_by_field(keys))
        packing.close(3, len(keys))
        packing.add(_by_field(progress) if by_rule else ())
        packing.close(5, len(progress) if by_rule else 0)
        packing.floats(policy)
        packing.close(-(-len(policy) // 2))

    def _edges(
        self, lanes: int, work: Mapping[int, SequenceWork], group: Sequence[int]
    ) -> list[tuple[int, int, int, int]]:
        """For the windows of a group's lanes: columns [start, end), and columns [first, last) that rules
        read; zeros for other lanes.
        """
        edges = [(0, 0, 0, 0)] * (lanes * self.windows_of_lane)
        for b in group:
            for i, (window, read) in enumerate(zip(work[b].windows, work[b].reads, strict=True)):
                edges[b * self.windows_of_lane + i] = (window.start, window.end, *read)
        return edges

    def _counted(
        self, sequences: Sequence[SequenceState], work: Mapping[int, SequenceWork]
    ) -> list[tuple[int, int]]:
        """Columns [start, end) of the blocks to count, the same number for each lane."""
        most = max([self.schedule.most_open, *(len(s.blocks) for s in sequences if reads(s, "response"))])
        counted = [work[b].counted if b in work else [] for b in range(len(sequences))]
        return [edge for blocks in counted for edge in blocks + [(0, 0)] * (most - len(blocks))]

    def _endings(
        self, sequences: Sequence[SequenceState], work: Mapping[int, SequenceWork], eos: int
    ) -> list[tuple[int, int]]:
        """For each lane, the columns [start, end) in which this EOS ends the sequence; for a lane that it
        does not end, no columns, at the same end."""
        edges = [work[b].ending if b in work else (0, 0) for b in range(len(sequences))]
        ends_it = [eos in sequence.settings.eos_ids for sequence in sequences]
        return [(start if ends else end, end) for (start, end), ends in zip(edges, ends_it, strict=True)]

    def _reach(self, sequences: Sequence[SequenceState], work: Mapping[int, SequenceWork]) -> int:
        """Columns of each sequence whose logits the pass computes, where shapes are static: the length of a
        block, or sub-block, times a power of two where several blocks are open."""
        if any(reads(sequences[b], "response") for b in work):
            return self.tokens.shape[1]
        by_block = any(reads(sequences[b], "block") for b in work)
        columns = self.schedule.block_length if by_block else self.schedule.sub_block_length
        farthest = max(lane_work.reads[-1][1] - lane_work.reads[0][0] for lane_work in work.values())
        blocks = 1 << (max(1, -(-farthest // columns)) - 1).bit_length()
        return min(columns * min(blocks, self.windows_of_lane), self.tokens.shape[1])

    def _cells(self, sequences: Sequence[SequenceState], work: Mapping[int, SequenceWork], reach: int) -> int:
        """Columns of each window that rules see in the pass; 0 without rules."""
        rules = {b: rule for b in work if (rule := sequences[b].settings.rule) is not None}
        widest = max((last - first for b in rules for first, last in work[b].reads), default=0)
        recorded = bool(rules) and self.static_shapes and all(rule.recorded for rule in rules.values())
        return max(widest, reach) if recorded else widest

    def filler_lanes(self, lanes: int, work: Mapping[int, SequenceWork], reach: int) -> set[int]:
        """Idle lanes whose logits are computed for nothing, so that the number of sequences takes few
        values."""
        if not self.static_shapes or self._pad_to is None:
            return set()
        sequences = self._pad_to(len(work) * reach) // max(1, reach)
        idle = [b for b in range(lanes) if b not in work]
        return set(idle[: max(0, sequences - len(work))])

    def _columns(
        self, b: int, reads: list[tuple[int, int]], reach: int, everything: bool
    ) -> range | list[int]:
        """Columns of a lane whose logits are computed: on the CPU the masks among the columns read, unless a
        rule reads everything; on a GPU always `reach` of them.
        """
        start, end = reads[0][0], reads[-1][1]  # there is no mask between two windows
        if not self.static_shapes and not everything:
            held = self.tokens[b, start:end].tolist()
            return [start + at for at, token in enumerate(held) if token == self.mask_id]
        if self.static_shapes and end - start < reach:
            start = min(start, self.tokens.shape[1] - reach)
            end = start + reach
        return range(start, end)

    def key_of(self, sequences: Sequence[SequenceState], work: Mapping[int, SequenceWork]) -> tuple[Any, ...]:
        """All that `pack` depends on, where shapes are static."""
        # A sequence keeps these objects while it lives; another sequence has others.
        each = [(s.nfe, id(s.settings), id(s.layout), id(s.sampling)) for s in sequences]
        blocks = [  # without their counts, which the pass before is about to change
            (w.start, w.end, w.must_move, w.block.start, w.block.held, w.block.step)
            for lane_work in work.values()
            for w in lane_work.windows
        ]
        rest = [(b, lane_work.spans, *lane_work[2:]) for b, lane_work in work.items()]
        return rest, blocks, each, self.kv_cache and self.kv_cache.changes


def _by_field(rows: Sequence[tuple[int, ...]]) -> Iterable[int]:
    """The first number of all rows, then the second of all rows, ..."""
    return itertools.chain.from_iterable(zip(*rows, strict=True))
