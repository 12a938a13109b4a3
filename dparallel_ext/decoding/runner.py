"""One forward pass over sequences of a batch, and its commits.

`batch` decides the spans to compute and the windows to fill. From there on everything runs on the device and
asks the host for nothing, so that on a GPU a pass can be recorded and replayed.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cache import GRAPH_BUCKETS, AttentionMetadata, KVCache, PadTo, Span
from ..models import Model, own_precision
from ..ops import commit_
from ..ops.errors import Cell, explain
from ..packed import Packing, Shapes, unpack
from ..rules import Rule
from ..types import CommitOutput
from .sampler import Decided, Predicted, SamplingGroup, decide
from .schedule import Window
from .sequence import IDLE, SequenceState
from .workspace import Workspace


class Counts(NamedTuple):
    """The state of a sequence after a pass, as the device counted it."""

    blocks: list[tuple[int, int, int]]
    """For each block in `SequenceWork.counted`, and perhaps padding after them: masks left, the column of the
    first of them, tokens that the pass changed."""
    end: int | None
    """The column of the first EOS in `SequenceWork.ending`, else the end of those columns; None where no
    sequence has an EOS."""


class SequenceWork(NamedTuple):
    """What a pass does with one sequence. Columns are positions of the sequence."""

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


class GraphKey(NamedTuple):
    """All that the launches of a pass depend on, beside the values of its inputs."""

    shapes: Shapes
    max_q_len: int
    max_kv_len: int
    record: bool
    """Whether commits are written to the trajectory."""
    cells: int
    """Columns of each window that rules see."""
    eos_ids: tuple[int, ...]
    groups: tuple[SamplingGroup, ...]

    @property
    def key(self) -> tuple[Any, ...]:
        return (*self[:6], tuple(group.key for group in self.groups))

    @property
    def recorded(self) -> bool:
        """Whether the launches can be recorded."""
        return all(group.rule is None or group.rule.recorded for group in self.groups)

    @property
    def rows(self) -> int:
        """Packed tokens that the pass computes."""
        return self.shapes[0][0]


class Prepared(NamedTuple):
    """The inputs of a pass that may come, made in advance."""

    inputs_key: tuple[Any, ...]
    rows: tuple[SequenceState, ...]
    """Kept alive, since `inputs_key` holds ids of their objects."""
    inputs: Tensor
    key: GraphKey


RECORDED = 2**37
"""Multiplications in a layer up to which a pass is recorded: 630 rows of LLaDA-8B, 2700 of a model of 1.7B.
More keep a GPU busy for longer than the host needs to issue them (beside an H200 it took 0.4 ms a layer, and
the GPU 0.3 ms for 512 rows of LLaDA-8B); and a recording would hold as much memory again as the pass."""


REMEMBERED = 16
"""Rules with state beyond which the state of those that no sequence uses is dropped."""


def recorded_rows(model: Any) -> int:
    """The most rows with which a pass of the model is recorded."""
    if not isinstance(model, Model):
        return 0
    s = model.shape
    weights = s.width * (2 * (s.heads + s.kv_heads) * s.head_dim + 3 * s.mlp_width)  # of one layer
    return RECORDED // weights


def graph_bucket(count: int, recorded: int) -> int:
    """The rows that `count` rows are padded to on a GPU: four sizes a doubling as far as passes are recorded,
    then multiples of 8.
    """
    filled = GRAPH_BUCKETS(count)
    return filled if filled <= recorded else -(-count // 8) * 8


def row_padding(model: Model) -> PadTo:
    """How to pad the number of a pass's rows; None: not at all.

    On a GPU padding keeps the number of `GraphKey`s small. On a CPU, for 16-bit weights, the matrix library
    compiles code for each number of rows and keeps it for ever (half a megabyte and half a millisecond).
    """
    if runs_ahead(model.device):
        return functools.partial(graph_bucket, recorded=recorded_rows(model))
    return GRAPH_BUCKETS if model.dtype != torch.float32 else None


def runs_ahead(device: torch.device) -> bool:
    """Whether the host can issue work for the device without waiting for earlier work."""
    return device.type != "cpu"


class Runner:
    """Runs the passes of a batch.

    Args:
        tokens: (lanes, L) int64, changed in place.
        kv_cache: with our models, a cache of so many sequences and positions.
        shift: the logits for position p are produced at position max(p - shift, 0).
        window, block: columns of the widest usual window, and of the widest block.
        blocks: how many blocks of a sequence may be open, each with a window.
        graphs: on a GPU, record the passes of one `GraphKey` once and replay them, see `graphs`.
        workspace: the workspace that holds `tokens` and `kv_cache`; default: a fresh one.
    """

    def __init__(
        self,
        model: Any,
        tokens: Tensor,
        kv_cache: KVCache | None,
        mask_id: int,
        *,
        shift: int,
        window: int,
        block: int,
        blocks: int = 1,
        graphs: bool = True,
        workspace: Workspace | None = None,
    ) -> None:
        self.model, self.tokens, self.kv_cache, self.mask_id = model, tokens, kv_cache, mask_id
        self.shift, self.blocks = shift, blocks
        self.window, self.block = (min(width, tokens.shape[1]) for width in (window, block))
        self.lane = self._lane_of(blocks)
        """(W,) int64: each window's lane; None where each lane has one window."""
        if workspace is None:
            workspace = Workspace.of(tokens, kv_cache, graphs=graphs and isinstance(model, Model))
        self.trajectory, self.graphs = workspace.trajectory, workspace.graphs
        self._suppressed, self.states, self.given = workspace.suppressed, workspace.states, workspace.given
        self.static_shapes = runs_ahead(tokens.device)
        """Input shapes come from a small set and depend on no device results, so passes can be recorded."""
        self.recorded_rows = recorded_rows(model)
        self._graph_bucket = functools.partial(graph_bucket, recorded=self.recorded_rows)
        self._pad_to = row_padding(model) if isinstance(model, Model) else None
        self._prepared: list[Prepared] = []

    def suppress(self, ids: Tensor | None) -> Tensor | None:
        """The ids as a tensor, the same object for the same ids; with our models on the device.

        Raises ValueError for an id that one of our models does not have.
        """
        key = () if ids is None else tuple(ids.unique().tolist())  # ascending
        if not key:
            return None
        if key not in self._suppressed:
            found = torch.tensor(key)
            if isinstance(self.model, Model):
                size = self.model.shape.embedding_size
                if key[0] < 0 or key[-1] >= size:
                    raise ValueError(f"suppress: expected ids in [0, {size}), got {list(key[:8])}")
                found = found.to(self.tokens.device)
            if len(self._suppressed) == 64:
                self._suppressed.clear()
            self._suppressed[key] = found
        return self._suppressed[key]

    def begin(self, lane: int, rule: Rule, columns: Sequence[int], used: Collection[Rule]) -> None:
        """Begin a sequence that is decoded by `rule` in the lane.

        columns: of its response. used: the rules of all lanes.
        """
        if rule not in self.states:
            if len(self.states) >= REMEMBERED and (idle := [old for old in self.states if old not in used]):
                for old in idle:
                    del self.states[old]
                if self.graphs is not None:
                    self.graphs.recordings.clear()  # recordings may write to the dropped state
            lanes, length = self.tokens.shape
            # The window of the last column may have cells beyond it.
            self.states[rule] = rule.new_state(lanes, 2 * length, self.tokens.device)
        rule.reset(self.states[rule], lane)
        if rule.edits:
            self.given[lane] = True
            self.given[lane, list(columns)] = False

    def run(self, rows: Sequence[SequenceState], work: Mapping[int, SequenceWork]) -> Tensor:
        """Run one forward pass over the lanes of `work`, which are in ascending order.

        Returns (n,) int64 on the device, for `look` to read.
        """
        if self.graphs is not None and any(rows[b].nfe == 0 for b in work):
            # Between sequences the model's weights may have moved.
            self.graphs.drop_stale(self.model.addresses())
        prepared, self._prepared = self._prepared, []
        inputs_key = self._input_key(rows, work) if prepared else ()
        found = next((each for each in prepared if each.inputs_key == inputs_key), None)
        inputs, key = self.inputs(rows, work) if found is None else (found.inputs, found.key)
        compute = functools.partial(self._compute, key, work)
        if self.graphs is None or self.graphs.addresses is None:
            return compute(inputs.to(self.tokens.device, non_blocking=True))
        may = key.rows <= self.recorded_rows and key.recorded
        return self.graphs.run(key.key if may else None, inputs, compute, device=self.tokens.device, held=key)

    def look(self, rows: Sequence[SequenceState], results: Sequence[Tensor]) -> list[list[Counts]]:
        """For each pass and lane, the counts in what `run` returned; waits for the device.

        Raises ValueError for the first pass in which an error kept a sequence from committing.
        """
        found: list[list[Counts]] = []
        lanes = len(self.tokens)
        windows = lanes * self.blocks
        for numbers in torch.stack(list(results)).tolist() if lanes else []:
            explain(min(numbers[:windows]), Cell(self.tokens.shape[1]))
            ends = numbers[-lanes:] if eos_ids(rows) else [None] * lanes
            counted = (len(numbers) - windows - (lanes if ends[0] is not None else 0)) // 3
            counts = list(zip(*(numbers[windows + i * counted :][:counted] for i in range(3)), strict=True))
            each = counted // lanes
            found.append([Counts(counts[b * each :][:each], end) for b, end in enumerate(ends)])
        return found

    def prepare(self, rows: Sequence[SequenceState], work: Mapping[int, SequenceWork]) -> None:
        """Make the inputs of a pass that may come next; the next `run` uses them if it is that very pass."""
        self._prepared.append(Prepared(self._input_key(rows, work), tuple(rows), *self.inputs(rows, work)))

    def _input_key(self, rows: Sequence[SequenceState], work: Mapping[int, SequenceWork]) -> tuple[Any, ...]:
        """All that `inputs` depends on, where shapes are static."""
        # A sequence keeps these objects while it lives; another sequence has others.
        each = [(r.nfe, id(r.settings), id(r.layout), id(r.suppress)) for r in rows]
        blocks = [  # without their counts, which the pass before is about to change
            (w.start, w.end, w.must_move, w.block.start, w.block.held, w.block.step)
            for own in work.values()
            for w in own.windows
        ]
        rest = [(b, own.spans, *own[2:]) for b, own in work.items()]
        return rest, blocks, each, self.kv_cache and self.kv_cache.changes

    def inputs(
        self, rows: Sequence[SequenceState], work: Mapping[int, SequenceWork]
    ) -> tuple[Tensor, GraphKey]:
        """All that the device needs from the host, (n,) int64 on the CPU, and the key that says how to read
        it.
        """
        reach = self._reach(rows, work)
        lanes = sorted({*work, *self.beside_of(len(rows), work, reach)})
        packing, longest = Packing(), (0, 0)
        if isinstance(self.model, Model):
            assert self.kv_cache is not None
            spans = [span for b in lanes if b in work for span in work[b].spans]
            metadata = self.kv_cache.metadata(spans, self._pad_to)
            longest = metadata.max_q_len, metadata.max_kv_len
            packing.tensors(metadata.tensors)
        groups: dict[tuple[Any, ...], list[int]] = {}
        for b in work:
            groups.setdefault(SamplingGroup.of(rows[b]).key, []).append(b)
        cells = self._cells(rows, work, reach)
        self._put_rows(packing, rows, work, lanes, reach)
        for group in groups.values():
            packing.add(_by_field(self._edges(len(rows), work, group)))
        packing.close(len(groups), 4, len(rows) * self.blocks)
        counted = self._counted(rows, work)
        packing.add(_by_field(counted))
        packing.close(2, len(counted))
        eos = eos_ids(rows)
        for each in eos:
            packing.add(_by_field(self._endings(rows, work, each)))
        packing.close(len(eos), 2, len(rows))
        self._put_windows(packing, rows, work, bool(cells))
        inputs, shapes = packing.pack()
        if self.tokens.device.type == "cuda":
            inputs = inputs.pin_memory()  # else the copy to the device may wait for earlier passes
        record = any(rows[b].settings.record for b in work)
        sampling = tuple(SamplingGroup.of(rows[group[0]]) for group in groups.values())
        return inputs, GraphKey(shapes, *longest, record, cells, eos, sampling)

    def _put_rows(
        self,
        packing: Packing,
        rows: Sequence[SequenceState],
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
                own = work[b]
                everything = reads(rows[b], "block") or reads(rows[b], "response")
                columns = self._columns(b, own.reads, reach, everything)
                first, last = own.spans[0].start, own.spans[-1].end
                of_lane.append(columns)
                low, high = (columns[0], columns[-1]) if columns else (first, first)
                if first <= low - self.shift and high - self.shift < last and isinstance(columns, range):
                    to = offset - first - self.shift
                    packing.ascending(columns.start + to, columns.stop + to)
                else:
                    near = (min(max(column - self.shift, first), last - 1) for column in columns)
                    packing.add(at - first + offset for at in near)
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
                packing.add(column + b * length for column in columns)
        packing.close(count)

    def _put_windows(
        self,
        packing: Packing,
        rows: Sequence[SequenceState],
        work: Mapping[int, SequenceWork],
        by_rule: bool,
    ) -> None:
        """Pack, for all W windows: (3, W) pass, seed and sequence number, which key the samples; (4, W)
        `SequenceState.progress`, or (4, 0) without rules; and W policy rows of 5 float32, two to an int64.
        """
        policy: list[float] = []
        progress: list[tuple[int, int, int, int]] = []
        keys = [(row.nfe + 1, *row.settings.key) for row in rows for _ in range(self.blocks)]
        for b, row in enumerate(rows):
            windows = work[b].windows if b in work else []
            for window in windows:
                policy += row.policy(window.block, window.must_move)
                progress.append(row.progress(window.block))
            for _ in range(self.blocks - len(windows)):
                policy += IDLE.settings.policy
                progress.append((0, 1, 0, 0))
        packing.add(_by_field(keys))
        packing.close(3, len(keys))
        packing.add(_by_field(progress) if by_rule else ())
        packing.close(4, len(progress) if by_rule else 0)
        packing.floats(policy)
        packing.close(-(-len(policy) // 2))

    def _edges(
        self, lanes: int, work: Mapping[int, SequenceWork], group: Sequence[int]
    ) -> list[tuple[int, int, int, int]]:
        """For the windows of a group's lanes: columns [start, end), and columns [first, last) that rules
        read; zeros for other lanes.
        """
        edges = [(0, 0, 0, 0)] * (lanes * self.blocks)
        for b in group:
            for i, (window, read) in enumerate(zip(work[b].windows, work[b].reads, strict=True)):
                edges[b * self.blocks + i] = (window.start, window.end, *read)
        return edges

    def _counted(
        self, rows: Sequence[SequenceState], work: Mapping[int, SequenceWork]
    ) -> list[tuple[int, int]]:
        """Columns [start, end) of the blocks to count, the same number for each lane."""
        most = max([self.blocks, *(len(row.blocks) for row in rows if reads(row, "response"))])
        counted = [work[b].counted if b in work else [] for b in range(len(rows))]
        return [edge for blocks in counted for edge in blocks + [(0, 0)] * (most - len(blocks))]

    def _endings(
        self, rows: Sequence[SequenceState], work: Mapping[int, SequenceWork], eos: int
    ) -> list[tuple[int, int]]:
        """For each lane, the columns [start, end) in which this EOS ends the sequence."""
        return [
            work[b].ending if b in work and row.settings.eos_id == eos else (0, 0)
            for b, row in enumerate(rows)
        ]

    def _reach(self, rows: Sequence[SequenceState], work: Mapping[int, SequenceWork]) -> int:
        """Columns of each sequence whose logits the pass computes, where shapes are static."""
        if any(reads(rows[b], "response") for b in work):
            return self.tokens.shape[1]
        widest = self.block if any(reads(rows[b], "block") for b in work) else 0
        return min(max(self.window, widest) * self.blocks, self.tokens.shape[1])

    def _cells(self, rows: Sequence[SequenceState], work: Mapping[int, SequenceWork], reach: int) -> int:
        """Columns of each window that rules see in the pass; 0 without rules."""
        rules = {b: rule for b in work if (rule := rows[b].settings.rule) is not None}
        widest = max((last - first for b in rules for first, last in work[b].reads), default=0)
        recorded = bool(rules) and self.static_shapes and all(rule.recorded for rule in rules.values())
        return max(widest, reach) if recorded else widest

    def beside_of(self, lanes: int, work: Mapping[int, SequenceWork], reach: int) -> set[int]:
        """Idle lanes whose logits are computed for nothing, so that the number of sequences takes few
        values."""
        if not self.static_shapes or not isinstance(self.model, Model):
            return set()
        sequences = self._graph_bucket(len(work) * reach) // max(1, reach)
        idle = [b for b in range(lanes) if b not in work]
        return set(idle[: max(0, sequences - len(work))])

    def _columns(
        self, b: int, reads: list[tuple[int, int]], reach: int, everything: bool
    ) -> range | list[int]:
        """Columns of a lane whose logits are computed: on the CPU the masks among those read, unless a rule
        reads everything; on a GPU always `reach` of them.
        """
        start, end = reads[0][0], reads[-1][1]  # there is no mask between two windows
        if not self.static_shapes and not everything:
            held = self.tokens[b, start:end].tolist()
            return [start + at for at, token in enumerate(held) if token == self.mask_id]
        if self.static_shapes and end - start < reach:
            start = min(start, self.tokens.shape[1] - reach)
            end = start + reach
        return range(start, end)

    def _compute(self, key: GraphKey, work: Mapping[int, SequenceWork], inputs: Tensor) -> Tensor:
        *metadata, source, positions, edges, counted, endings, keys, progress, policy = unpack(
            inputs, key.shapes
        )
        if isinstance(self.model, Model):
            made = AttentionMetadata(key.max_q_len, key.max_kv_len, *metadata)
            assert self.kv_cache is not None
            with own_precision(self.model, self.tokens.device):
                x = self.model.step(self.tokens[made.rows, made.positions], self.kv_cache, made)
                logits = self.model.head(x[source])[: len(positions)]
        else:
            logits = self._foreign(work)[source]
        policy = policy.view(torch.float32)[: 5 * keys.shape[1]].view(-1, 5)
        predicted = Predicted(logits, positions, keys, progress, policy, self.lane, key.cells)
        before = self.tokens.view(-1)[positions] if key.record else None
        decided = [
            decide(
                self.tokens,
                predicted,
                group,
                windows,
                () if group.rule is None else self.states[group.rule],
                mask_id=self.mask_id,
                given=self.given,
            )
            for group, windows in zip(key.groups, edges, strict=True)
        ]
        counts = self._commit(positions, decided, counted)
        if before is not None:
            self._record(before, positions, keys[0, :: self.blocks], decided)
        error = functools.reduce(torch.minimum, [each.error for each in decided])
        ends = [
            commit_(self.tokens, mask_id=eos, start=ending[0], end=ending[1]).first
            for eos, ending in zip(key.eos_ids, endings, strict=True)
        ]
        end = [functools.reduce(torch.maximum, ends)] if ends else []  # 0 of other ids' sequences
        return torch.cat((error, *counts, *end))

    def _commit(self, positions: Tensor, decided: Sequence[Decided], counted: Tensor) -> CommitOutput:
        """Write what the rules decided, and count the blocks in columns `counted` (2, lanes * k)."""
        commit, token = None, None
        for each in decided:  # groups have sequences, and so rows, of their own
            if each.commit is not None and each.token is not None:
                token = each.token if token is None else torch.where(each.commit, each.token, token)
                commit = each.commit if commit is None else commit | each.commit
        return commit_(
            self.tokens,
            None if commit is None else positions,
            commit,
            token,
            mask_id=self.mask_id,
            lane=self._lane_of(counted.shape[1] // len(self.tokens)),
            start=counted[0],
            end=counted[1],
            check=False,
        )

    def _lane_of(self, each: int) -> Tensor | None:
        """(lanes * each,) int64: the lane of each window; None where each lane has one window."""
        if each == 1:
            return None
        return torch.arange(len(self.tokens), device=self.tokens.device).repeat_interleave(each)

    def _foreign(self, work: Mapping[int, SequenceWork]) -> Tensor:
        """Logits (B * L, V) of whole sequences of one length, from a model that takes no ragged batches."""
        x = self.tokens[list(work), : next(iter(work.values())).spans[-1].end]
        output = self.model(x)
        if not hasattr(output, "logits"):
            raise ValueError(
                f"model: expected its call to return an object with .logits, got {type(output).__name__}"
            )
        if output.logits.shape[:-1] != x.shape:
            raise ValueError(
                f"model: expected logits ({x.shape[0]}, {x.shape[1]}, V), got {tuple(output.logits.shape)}"
            )
        logits: Tensor = output.logits.flatten(0, 1)
        return logits

    def _record(self, before: Tensor, positions: Tensor, nfe: Tensor, decided: Sequence[Decided]) -> None:
        """Write the positions whose token differs from `before` (n,) to the trajectory."""
        fresh = before != self.tokens.view(-1)[positions]
        confidence, logprob = decided[0].stats.confidence, decided[0].stats.sample_logprob
        for other in (each.stats for each in decided[1:]):  # groups have sequences, and so rows, of their own
            confidence = torch.where(other.token >= 0, other.confidence, confidence)
            logprob = torch.where(other.token >= 0, other.sample_logprob, logprob)
        kept = self.trajectory
        values = (kept.step, nfe[positions // self.tokens.shape[1]]), (kept.confidence, confidence)
        for field, value in (*values, (kept.logprob, logprob)):
            flat = field.view(-1)
            flat[positions] = torch.where(fresh, value, flat[positions])


def _by_field(rows: Sequence[tuple[int, ...]]) -> Iterable[int]:
    """The first number of all rows, then the second of all rows, ..."""
    return itertools.chain.from_iterable(zip(*rows, strict=True))


def eos_ids(rows: Sequence[SequenceState]) -> tuple[int, ...]:
    """The EOS ids of the sequences, each once, ascending."""
    return tuple(sorted({row.settings.eos_id for row in rows if row.settings.eos_id is not None}))


def reads(row: SequenceState, what: str) -> bool:
    """Whether the sequence has a rule whose `reads` is `what`, see `rules.Rule`."""
    return row.settings.rule is not None and row.settings.rule.reads == what
