"""One forward pass over sequences of a batch, and what is committed by it.

The host says what a pass is about: spans to compute, windows to fill (`batch` decides them). All that follows
runs on the device and asks the host for nothing more, so that on a GPU it can be recorded and replayed.
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
    """What a pass has left of a sequence."""

    blocks: list[tuple[int, int, int]]
    """Of the blocks that its `SequenceWork` names, and perhaps of more: masks left, the column of the first
    of them, tokens that the pass changed."""
    end: int | None
    """The column of the first EOS in its `ending`, else that one's end; None where no sequence has an EOS."""


class SequenceWork(NamedTuple):
    """What a pass does with one sequence. Columns are positions of the sequence."""

    spans: list[Span]
    """Adjoining, of our models' passes: the positions computed."""
    windows: list[Window]
    """What may be filled."""
    reads: list[tuple[int, int]]
    """For each window the columns [start, end) whose logits its rule reads; the window where it has none."""
    counted: list[tuple[int, int]]
    """Columns [start, end) of the blocks that the host wants the `Counts` of."""
    ending: tuple[int, int]
    """Columns [start, end) where an EOS ends the sequence."""


class GraphKey(NamedTuple):
    """What the launches of a pass depend on, beside the values of its numbers."""

    shapes: Shapes
    max_q_len: int
    max_kv_len: int
    record: bool
    """Whether what is committed goes into the trajectory."""
    cells: int
    """Of each sequence, the columns that rules see."""
    eos_ids: tuple[int, ...]
    groups: tuple[SamplingGroup, ...]

    @property
    def key(self) -> tuple[Any, ...]:
        return (*self[:6], tuple(group.key for group in self.groups))

    @property
    def recorded(self) -> bool:
        """Whether its launches can be recorded."""
        return all(group.rule is None or group.rule.recorded for group in self.groups)

    @property
    def rows(self) -> int:
        """Of the packed tokens that the pass computes."""
        return self.shapes[0][0]


class Prepared(NamedTuple):
    """What the host has done already for a pass that may come."""

    inputs_key: tuple[Any, ...]
    rows: tuple[SequenceState, ...]
    """Kept so that what `inputs_key` names by its id stays."""
    inputs: Tensor
    key: GraphKey


RECORDED = 2**37
"""Multiplications in a layer up to which a pass is recorded: 630 rows of LLaDA-8B, 2700 of a model of 1.7B.
More keep a GPU busy for longer than the host needs to issue them (beside an H200 it took 0.4 ms a layer, and
the GPU 0.3 ms for 512 rows of LLaDA-8B); and a recording would hold as much memory again as the pass."""


REMEMBERED = 16
"""Rules whose memory is kept though no sequence uses them."""


def recorded_rows(model: Any) -> int:
    """Rows up to which a pass of the model is recorded."""
    if not isinstance(model, Model):
        return 0
    s = model.shape
    weights = s.width * (2 * (s.heads + s.kv_heads) * s.head_dim + 3 * s.mlp_width)  # of a layer
    return RECORDED // weights


def graph_bucket(count: int, recorded: int) -> int:
    """What `count` rows are filled up to on a GPU: to four sizes a doubling as far as passes are recorded."""
    filled = GRAPH_BUCKETS(count)
    return filled if filled <= recorded else -(-count // 8) * 8


def row_padding(model: Model) -> PadTo:
    """How many rows a number of rows of a pass is filled up to.

    On a GPU so that passes take few forms. On a CPU since the matrix library keeps compiled code for each
    number of rows of 16-bit matrices that it has met, for ever (half a megabyte and half a millisecond).
    """
    if runs_ahead(model.device):
        return functools.partial(graph_bucket, recorded=recorded_rows(model))
    return GRAPH_BUCKETS if model.dtype != torch.float32 else None


def runs_ahead(device: torch.device) -> bool:
    """Whether the host issues work for the device without waiting for what came before."""
    return device.type != "cpu"


class Runner:
    """Runs the passes of a batch.

    Args:
        tokens: (lanes, L) int64, changed in place.
        kv_cache: with our models, of so many sequences and positions.
        shift: the logits for position p are produced at position max(p - shift, 0).
        window, block: columns of the widest window that is usual, and of the widest block.
        blocks: how many blocks of a sequence may be open, each with a window.
        graphs: on a GPU, passes of one form are recorded once and replayed, see `graphs`.
        workspace: of those tokens and that cache; default: a fresh one.
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
        """(W,) int64: each window's sequence; None where each has one."""
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
        """One tensor for the same ids; with our models on the device.

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
        """A sequence that is decoded by `rule` begins in the lane.

        columns: those of its response. used: the rules of all lanes.
        """
        if rule not in self.states:
            if len(self.states) >= REMEMBERED and (idle := [old for old in self.states if old not in used]):
                for old in idle:
                    del self.states[old]
                if self.graphs is not None:
                    self.graphs.forms.clear()  # recordings write to what those remembered
            lanes, length = self.tokens.shape
            # A cell of the last column's window may lie beyond it.
            self.states[rule] = rule.new_state(lanes, 2 * length, self.tokens.device)
        rule.reset(self.states[rule], lane)
        if rule.edits:
            self.given[lane] = True
            self.given[lane, list(columns)] = False

    def run(self, rows: Sequence[SequenceState], work: Mapping[int, SequenceWork]) -> Tensor:
        """One forward pass over the sequences of `work`, by their lanes in ascending order.

        Returns (n,) int64 on the device, what `look` reads.
        """
        if self.graphs is not None and any(rows[b].nfe == 0 for b in work):
            # Where a sequence begins, the model may have moved.
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
        """What `run` returned, for each pass and lane, on the host; this waits for the device.

        Raises ValueError for an error that kept a sequence from committing, of the first pass that has one.
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
        """Do what the host has to do for a pass that may come next, beside others that may. The next pass
        uses it if it is that very pass.
        """
        self._prepared.append(Prepared(self._input_key(rows, work), tuple(rows), *self.inputs(rows, work)))

    def _input_key(self, rows: Sequence[SequenceState], work: Mapping[int, SequenceWork]) -> tuple[Any, ...]:
        """All that `inputs` follows from, where shapes are static."""
        # What does not change is the same object, or it may be another sequence.
        each = [(r.nfe, id(r.settings), id(r.layout), id(r.suppress)) for r in rows]
        blocks = [  # not what they hold: that is known after the pass before
            (w.start, w.end, w.must_move, w.block.start, w.block.held, w.block.step)
            for own in work.values()
            for w in own.windows
        ]
        rest = [(b, own.spans, *own[2:]) for b, own in work.items()]
        return rest, blocks, each, self.kv_cache and self.kv_cache.changes

    def inputs(
        self, rows: Sequence[SequenceState], work: Mapping[int, SequenceWork]
    ) -> tuple[Tensor, GraphKey]:
        """All that the device has to be told, (n,) int64 on the CPU, and how it is to be read."""
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
            inputs = inputs.pin_memory()  # else its copy to the device may wait for the passes before
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
        """(n,) of each row of logits: its place among the packed positions, to n = so many as `row_padding`
        says; and its flat position b * L + l. Of lanes beside those of `work`: what is not read.
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
        """Of all W windows: (3, W) pass, seed and number of the samples' key; (4, W), or (4, 0) without
        rules, of `SequenceState.progress`; and policy rows, W * 5 float32 and one more where that is odd.
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
        """For some lanes: each window's columns [start, end), and those that rules read."""
        edges = [(0, 0, 0, 0)] * (lanes * self.blocks)
        for b in group:
            for i, (window, read) in enumerate(zip(work[b].windows, work[b].reads, strict=True)):
                edges[b * self.blocks + i] = (window.start, window.end, *read)
        return edges

    def _counted(
        self, rows: Sequence[SequenceState], work: Mapping[int, SequenceWork]
    ) -> list[tuple[int, int]]:
        """Columns [start, end) of the blocks that are counted, as many of each sequence."""
        most = max([self.blocks, *(len(row.blocks) for row in rows if reads(row, "response"))])
        counted = [work[b].counted if b in work else [] for b in range(len(rows))]
        return [edge for blocks in counted for edge in blocks + [(0, 0)] * (most - len(blocks))]

    def _endings(
        self, rows: Sequence[SequenceState], work: Mapping[int, SequenceWork], eos: int
    ) -> list[tuple[int, int]]:
        """Of each lane, where this EOS ends the sequence."""
        return [
            work[b].ending if b in work and row.settings.eos_id == eos else (0, 0)
            for b, row in enumerate(rows)
        ]

    def _reach(self, rows: Sequence[SequenceState], work: Mapping[int, SequenceWork]) -> int:
        """The most columns whose logits are usual for a sequence of the pass."""
        if any(reads(rows[b], "response") for b in work):
            return self.tokens.shape[1]
        widest = self.block if any(reads(rows[b], "block") for b in work) else 0
        return min(max(self.window, widest) * self.blocks, self.tokens.shape[1])

    def _cells(self, rows: Sequence[SequenceState], work: Mapping[int, SequenceWork], reach: int) -> int:
        """Columns of each window that the rules of the pass see; 0 without rules."""
        rules = {b: rule for b in work if (rule := rows[b].settings.rule) is not None}
        widest = max((last - first for b in rules for first, last in work[b].reads), default=0)
        recorded = bool(rules) and self.static_shapes and all(rule.recorded for rule in rules.values())
        return max(widest, reach) if recorded else widest

    def beside_of(self, lanes: int, work: Mapping[int, SequenceWork], reach: int) -> set[int]:
        """Lanes beside those of `work`, whose logits are computed for nothing: so passes take few forms."""
        if not self.static_shapes or not isinstance(self.model, Model):
            return set()
        sequences = self._graph_bucket(len(work) * reach) // max(1, reach)
        idle = [b for b in range(lanes) if b not in work]
        return set(idle[: max(0, sequences - len(work))])

    def _columns(
        self, b: int, reads: list[tuple[int, int]], reach: int, everything: bool
    ) -> range | list[int]:
        """Those whose logits are computed: on the CPU the masks among those read, unless a rule reads
        everything; else as many each time.
        """
        start, end = reads[0][0], reads[-1][1]  # what lies between windows holds no mask
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
        """Write what rules have decided, and count the blocks in columns `counted` (2, lanes * k)."""
        commit, token = None, None
        for each in decided:  # each decided about rows of its own sequences
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
        """(lanes * each,) int64: the sequence of each window; None where each sequence has one."""
        if each == 1:
            return None
        return torch.arange(len(self.tokens), device=self.tokens.device).repeat_interleave(each)

    def _foreign(self, work: Mapping[int, SequenceWork]) -> Tensor:
        """Of a model that knows no ragged batches: logits (B * L, V) of whole sequences of one length."""
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
        """Of the positions, those that hold another token than `before`."""
        fresh = before != self.tokens.view(-1)[positions]
        confidence, logprob = decided[0].stats.confidence, decided[0].stats.sample_logprob
        for other in (each.stats for each in decided[1:]):  # each read the rows of its own sequences
            confidence = torch.where(other.token >= 0, other.confidence, confidence)
            logprob = torch.where(other.token >= 0, other.sample_logprob, logprob)
        kept = self.trajectory
        values = (kept.step, nfe[positions // self.tokens.shape[1]]), (kept.confidence, confidence)
        for field, value in (*values, (kept.logprob, logprob)):
            flat = field.view(-1)
            flat[positions] = torch.where(fresh, value, flat[positions])


def _by_field(rows: Sequence[tuple[int, ...]]) -> Iterable[int]:
    """The first number of all, the second of all, ..."""
    return itertools.chain.from_iterable(zip(*rows, strict=True))


def eos_ids(rows: Sequence[SequenceState]) -> tuple[int, ...]:
    """The EOS of all sequences, each once."""
    return tuple(sorted({row.settings.eos_id for row in rows if row.settings.eos_id is not None}))


def reads(row: SequenceState, what: str) -> bool:
    """Whether the sequence has a rule that reads so much, see `rules.Rule`."""
    return row.settings.rule is not None and row.settings.rule.reads == what
