"""One forward pass over sequences of a batch, and what is committed by it.

The host says what a pass is about: spans to compute, windows to fill (`batch` decides them). All that follows
runs on the device and asks the host for nothing more, so that on a GPU it can be recorded and replayed.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .cache import FEW_SIZES, Fill, KVCache, Pass, Span
from .models import Model, own_precision
from .ops import NO_ERROR, Cell, explain
from .packed import Shapes, pack, unpack
from .rows import Row
from .rules import Rule
from .sampler import Predicted, Way, commit_
from .types import RowStats
from .workspace import Workspace


class Work(NamedTuple):
    """What a pass does with one sequence. Columns are positions of the sequence."""

    spans: list[Span]
    """Adjoining, of our models' passes: the positions computed."""
    window: tuple[int, int]
    """Columns [start, end) whose masks may be filled."""
    block: tuple[int, int]
    """The active block."""
    read: tuple[int, int]
    """Columns [start, end) whose logits its rule reads; the window where it has none."""


class Form(NamedTuple):
    """What the launches of a pass depend on, beside the values of its numbers."""

    shapes: Shapes
    longest_query: int
    longest_length: int
    record: bool
    """Whether what is committed goes into the trajectory."""
    cells: int
    """Of each sequence, the columns that rules see."""
    ways: tuple[Way, ...]

    @property
    def key(self) -> tuple[Any, ...]:
        return (*self[:5], tuple(way.key for way in self.ways))

    @property
    def recorded(self) -> bool:
        """Whether its launches can be recorded."""
        return all(way.rule is None or way.rule.recorded for way in self.ways)

    @property
    def rows(self) -> int:
        """Of the packed tokens that the pass computes."""
        return self.shapes[0][0]


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


def few_forms(count: int, recorded: int) -> int:
    """What `count` rows are filled up to on a GPU: to four sizes a doubling as far as passes are recorded."""
    filled = FEW_SIZES(count)
    return filled if filled <= recorded else -(-count // 8) * 8


def runs_ahead(device: torch.device) -> bool:
    """Whether the host issues work for the device without waiting for what came before."""
    return device.type != "cpu"


class Passes:
    """Runs the passes of a batch.

    Args:
        tokens: (lanes, L) int64, changed in place.
        slots: with our models, of so many sequences and positions.
        shift: the logits for position p are produced at position max(p - shift, 0).
        window, block: columns of the widest window that is usual, and of the widest block.
        graphs: on a GPU, passes of one form are recorded once and replayed, see `graphs`.
        workspace: of those tokens and slots; default: a fresh one.
    """

    def __init__(
        self,
        model: Any,
        tokens: Tensor,
        slots: KVCache | None,
        mask_id: int,
        *,
        shift: int,
        window: int,
        block: int,
        graphs: bool = True,
        workspace: Workspace | None = None,
    ) -> None:
        self.model, self.tokens, self.slots, self.mask_id = model, tokens, slots, mask_id
        self.shift = shift
        self.window, self.block = (min(width, tokens.shape[1]) for width in (window, block))
        if workspace is None:
            workspace = Workspace.of(tokens, slots, graphs=graphs and isinstance(model, Model))
        self.trajectory, self.graphs = workspace.trajectory, workspace.graphs
        self._suppressed, self.states, self.given = workspace.suppressed, workspace.states, workspace.given
        self.regular = runs_ahead(tokens.device)
        """Passes take few forms, which hang on nothing that the host would have to wait for."""
        self.recorded_rows = recorded_rows(model)
        self._few_forms = functools.partial(few_forms, recorded=self.recorded_rows)
        self._prepared: tuple[tuple[Any, ...], tuple[Tensor, Form]] | None = None

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
                size = self.model.shape.rows
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

    def run(self, rows: Sequence[Row], work: Mapping[int, Work]) -> Tensor:
        """One forward pass over the sequences of `work`, by their lanes in ascending order.

        Returns (lanes, block + 1) int64 on the device, what `look` reads.
        """
        if self.graphs is not None and any(rows[b].nfe == 0 for b in work):
            self.graphs.look(self.model.addresses())  # where a sequence begins, the model may have moved
        prepared, self._prepared = self._prepared, None
        if prepared is not None and prepared[0] == self._told(rows, work):
            numbers, form = prepared[1]
        else:
            numbers, form = self._numbers(rows, work)
        compute = functools.partial(self._compute, form, rows, work)
        if self.graphs is None or self.graphs.addresses is None:
            return compute(numbers.to(self.tokens.device, non_blocking=True))
        key = form.key if form.rows <= self.recorded_rows and form.recorded else None
        return self.graphs.run(key, numbers, compute, device=self.tokens.device, held=form)

    def look(self, results: Sequence[Tensor]) -> list[list[list[int]]]:
        """What `run` returned, on the host; this waits for the device.

        For each pass and lane the tokens from the active block's first column on.

        Raises ValueError for an error that kept a sequence from committing, of the first pass that has one.
        """
        found = torch.stack(list(results)).cpu()  # (passes, lanes, block + 1)
        errors = found[..., -1].amin(1).tolist() if found.numel() else []
        explain(next((error for error in errors if error != NO_ERROR), NO_ERROR), Cell(self.tokens.shape[1]))
        tokens: list[list[list[int]]] = found[..., :-1].tolist()
        return tokens

    def prepare(self, rows: Sequence[Row], work: Mapping[int, Work]) -> None:
        """Do what the host has to do for a pass that may come next."""
        self._prepared = self._told(rows, work), self._numbers(rows, work)

    def _told(self, rows: Sequence[Row], work: Mapping[int, Work]) -> tuple[Any, ...]:
        """All that `_numbers` follows from, where passes are regular."""
        each = [(r.nfe, r.turn, r.policy, r.settings.key, r.settings.record, Way.of(r).key) for r in rows]
        return list(work.items()), each, self.slots and self.slots.changes

    def _numbers(self, rows: Sequence[Row], work: Mapping[int, Work]) -> tuple[Tensor, Form]:
        """All that the device has to be told, (n,) int64 on the CPU, and how it is to be read."""
        spans: list[Span] = []
        positions, sources, offset, length = [], [], 0, self.tokens.shape[1]
        reach = self._reach(rows, work)
        beside = self._beside(len(rows), work, reach)
        for b in sorted({*work, *beside}):
            if b in beside:  # no window: what is listed is not read
                positions.append(torch.arange(reach) + b * length)
                sources.append(torch.zeros(reach, dtype=torch.int64))
                continue
            own = work[b]
            everything = reads(rows[b], "block") or reads(rows[b], "response")
            column = self._columns(b, own.read, reach, everything)
            first, last = own.spans[0].start, own.spans[-1].end
            positions.append(column + b * length)
            sources.append((column - self.shift).clamp(first, last - 1) - first + offset)
            spans += own.spans
            offset += last - first
        source = torch.cat(sources)  # among the packed positions
        plan: Sequence[Tensor] = ()
        longest = 0, 0
        if isinstance(self.model, Model):
            assert self.slots is not None
            fill = self._fill
            found = self.slots.plan(spans, fill)
            plan, longest = found.tensors, (found.longest_query, found.longest_length)
            if fill is not None:
                source = F.pad(source, (0, fill(len(source)) - len(source)))
        ways: dict[tuple[Any, ...], list[int]] = {}
        for b in work:
            ways.setdefault(Way.of(rows[b]).key, []).append(b)
        first_of = [rows[group[0]] for group in ways.values()]
        record = any(rows[b].settings.record for b in work)
        lanes = range(len(rows))

        def columns(of: Mapping[int, tuple[int, int]]) -> Tensor:
            return torch.tensor([of.get(b, (0, 0)) for b in lanes]).T  # (2, lanes)

        edges = [
            torch.cat([columns({b: getattr(work[b], name) for b in group}) for name in ("window", "read")])
            for group in ways.values()
        ]
        start, _ = columns({b: own.block for b, own in work.items()})
        block = length if any(reads(row, "response") for row in rows) else self.block
        seen = (start[:, None] + torch.arange(block)).clamp(max=length - 1)  # (lanes, block)
        cells = self._cells(rows, work, reach)
        policy = torch.tensor([row.policy for row in rows], dtype=torch.float32).view(-1)
        numbers, shapes = pack(
            (
                *plan,
                source,
                torch.cat(positions),
                torch.stack(edges),
                seen + torch.arange(len(rows))[:, None] * length,
                torch.tensor([(row.nfe + 1, *row.settings.key) for row in rows]).T,
                torch.tensor([row.progress for row in rows if cells], dtype=torch.int64).view(-1, 4).T,
                F.pad(policy, (0, len(policy) % 2)).view(torch.int64),
            )
        )
        if self.tokens.device.type == "cuda":
            numbers = numbers.pin_memory()  # else its copy to the device may wait for the passes before
        return numbers, Form(shapes, *longest, record, cells, tuple(Way.of(row) for row in first_of))

    def _reach(self, rows: Sequence[Row], work: Mapping[int, Work]) -> int:
        """The most columns whose logits are usual for a sequence of the pass."""
        if any(reads(rows[b], "response") for b in work):
            return self.tokens.shape[1]
        return max(self.window, self.block if any(reads(rows[b], "block") for b in work) else 0)

    def _cells(self, rows: Sequence[Row], work: Mapping[int, Work], reach: int) -> int:
        """Columns of each sequence that the rules of the pass see; 0 without rules."""
        rules = {b: rule for b in work if (rule := rows[b].settings.rule) is not None}
        widest = max((work[b].read[1] - work[b].read[0] for b in rules), default=0)
        recorded = bool(rules) and self.regular and all(rule.recorded for rule in rules.values())
        return max(widest, reach) if recorded else widest

    def _beside(self, lanes: int, work: Mapping[int, Work], reach: int) -> set[int]:
        """Lanes beside those of `work`, whose logits are computed for nothing: so passes take few forms."""
        if not self.regular or not isinstance(self.model, Model):
            return set()
        sequences = self._few_forms(len(work) * reach) // max(1, reach)
        idle = [b for b in range(lanes) if b not in work]
        return set(idle[: max(0, sequences - len(work))])

    def _columns(self, b: int, read: tuple[int, int], reach: int, everything: bool) -> Tensor:
        """Those whose logits are computed: on the CPU the masks among those read, unless a rule reads
        everything; else as many each time.
        """
        start, end = read
        if not self.regular:
            columns = torch.arange(start, end)
            return columns if everything else columns[self.tokens[b, start:end] == self.mask_id]
        if end - start < reach:
            start = min(start, self.tokens.shape[1] - reach)
            end = start + reach
        return torch.arange(start, end)

    @property
    def _fill(self) -> Fill:
        """How many rows a number of rows is filled up to; not a method, since the slots remember it.

        On a GPU so that passes take few forms. On a CPU since the matrix library keeps compiled code for each
        number of rows of 16-bit matrices that it has met, for ever (half a megabyte and half a millisecond).
        """
        if self.regular:
            return self._few_forms
        return FEW_SIZES if self.model.dtype != torch.float32 else None

    def _compute(self, form: Form, rows: Sequence[Row], work: Mapping[int, Work], numbers: Tensor) -> Tensor:
        *plan, source, positions, edges, block, keys, progress, policy = unpack(numbers, form.shapes)
        if isinstance(self.model, Model):
            made = Pass(form.longest_query, form.longest_length, *plan)
            assert self.slots is not None
            with own_precision(self.model, self.tokens.device):
                x = self.model.step(self.tokens[made.rows, made.positions], self.slots, made)
                logits = self.model.head(x[source])[: len(positions)]
        else:
            logits = self._foreign(work)[source]
        policy = policy.view(torch.float32)[: 5 * keys.shape[1]].view(-1, 5)
        predicted = Predicted(logits, positions, keys, progress, policy, form.cells)
        before = self.tokens.view(-1)[positions] if form.record else None
        stats, errors = [], []
        for way, windows in zip(form.ways, edges, strict=True):
            state = () if way.rule is None else self.states[way.rule]
            own, error = commit_(
                self.tokens, predicted, way, windows, state, mask_id=self.mask_id, given=self.given
            )
            stats.append(own)
            errors.append(error)
        if before is not None:
            self._record(before, positions, keys[0], stats)
        error = functools.reduce(torch.minimum, errors) if errors else torch.full_like(keys[0], NO_ERROR)
        return torch.cat((self.tokens.view(-1)[block], error[:, None]), 1)

    def _foreign(self, work: Mapping[int, Work]) -> Tensor:
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

    def _record(self, before: Tensor, positions: Tensor, nfe: Tensor, stats: Sequence[RowStats]) -> None:
        """Of the positions, those that hold another token than `before`."""
        fresh = before != self.tokens.view(-1)[positions]
        confidence, logprob = stats[0].confidence, stats[0].sample_logprob
        for other in stats[1:]:  # each read the rows of its own sequences
            confidence = torch.where(other.token >= 0, other.confidence, confidence)
            logprob = torch.where(other.token >= 0, other.sample_logprob, logprob)
        kept = self.trajectory
        values = (kept.step, nfe[positions // self.tokens.shape[1]]), (kept.confidence, confidence)
        for field, value in (*values, (kept.logprob, logprob)):
            flat = field.view(-1)
            flat[positions] = torch.where(fresh, value, flat[positions])


def reads(row: Row, what: str) -> bool:
    """Whether the sequence has a rule that reads so much, see `rules.Rule`."""
    return row.settings.rule is not None and row.settings.rule.reads == what
