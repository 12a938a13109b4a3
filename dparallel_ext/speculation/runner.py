"""One verify pass over the drafts of a batch's sequences.

`batch` decides on the drafts. From there on everything runs on the device and asks the host for nothing, so
that on a GPU a pass can be recorded and replayed, and issued before the result of the pass before it is
known.
"""

from __future__ import annotations

import functools
import math
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..automaton import NOWHERE, Automaton
from ..cache import AttentionMetadata, PadTo, Span
from ..decoding import padding
from ..decoding.graphs import recorded_key, run_pass
from ..decoding.most_probable import MOST, most_probable
from ..decoding.sequence_settings import NO_PENALTIES, SamplingGroup
from ..decoding.workspace import Workspace
from ..models import Model, Taps, own_precision
from ..ops import accept, kv_move
from ..ops.errors import explain
from ..packed import Packing, Shapes, bits_of, floats_of, unpack
from ..types import NO_ERROR, AcceptOutput, RowTopK
from . import rider_pass
from .draft import Draft, depths
from .drafter import DraftSession, KeepsStreams, Observation
from .penalties import TENSORS, PenalizedRows, penalized
from .sequence import UNKNOWN, CausalSequence


class PassKey(NamedTuple):
    """All that the launches of a pass depend on, beside the values of its inputs."""

    shapes: Shapes
    max_q_len: int
    max_kv_len: int
    rows: int
    """The most rows of a lane that are verified."""
    start: int
    """The first layer that the pass runs."""
    tree: bool
    penalized: bool
    """Whether some rows' choices are."""
    riders: int
    """The number of input tensors about riders; 0: there are none."""
    follows: bool
    """Whether the pass stores its choices on the device, for a next pass issued before the host knows
    them."""
    logprobs: bool
    top: bool
    """Whether the most probable tokens of each emitted token's place are wanted."""
    automata: tuple[Automaton, ...]
    """The forms of some lanes' responses."""
    groups: tuple[SamplingGroup, ...]


class Emitted(NamedTuple):
    """The tokens that a pass has emitted for one sequence."""

    tokens: list[int]
    logprobs: list[float]
    """With `logprobs`, of each token; else empty."""
    top: RowTopK | None = None
    """With `top`, of each token, (n, MOST) on the CPU, see `most_probable`."""
    riders: int = 0
    """Riders behind the node whose choice is the last token."""
    guessed: Sequence[int] = ()
    """Their guesses, see `DraftSession.guessed`."""


class Issued(NamedTuple):
    """A pass that was issued, and whose result has not been read."""

    drafts: dict[int, Draft]
    key: PassKey
    result: Tensor
    """(n,) int64 on the host, valid after the event `there`."""
    there: torch.cuda.Event | None
    """None: `result` is valid."""

    def read(self) -> list[int]:
        """The result; waits for the device."""
        if self.there is not None:
            self.there.synchronize()
        return self.result.tolist()


class PassRows:
    """The rows of a pass, sequence by sequence.

    There are N packed tokens, B lanes, and M rows whose logits are needed: of each lane the root and the
    nodes, which are verified, and then its riders, which are not.
    """

    def __init__(self, sequences: Sequence[CausalSequence]) -> None:
        self.sequences = sequences
        self.spans: list[Span] = []
        self.ids: list[int] = []
        """The ids of the packed tokens without riders; 0 for a root that the host does not know yet."""
        self.unknown: list[tuple[int, int]] = []
        """(index in `ids`, the lane whose last token belongs there)"""
        self.source: list[int] = []
        """(M,): the packed token of each row of logits."""
        self.token: list[int] = []
        self.parent: list[int] = []
        self.keys: list[int] = []
        """(M, 4), as `accept` takes keys."""
        self.groups: dict[tuple[Any, ...], tuple[SamplingGroup, list[int]]] = {}
        """Key of a group -> the group, and the edges (2, B) of its lanes' verified rows."""
        self.states: dict[Automaton, dict[int, int]] = {}
        """Automaton -> row -> its state before the row's choice, for the rows that it constrains."""
        self.left: dict[int, int] = {}
        """Row -> the tokens that may follow its choice, for the same rows."""
        self.room = [sequence.room for sequence in sequences]
        self.bases = [sequence.known - 1 for sequence in sequences]
        self.verified = 1
        """The most rows of a lane that are verified."""
        self.with_riders = self.logprobs = self.top = False
        self._offset = 0

    def add(self, b: int, draft: Draft, new: Sequence[int], coming: int) -> None:
        """Add the rows of lane b.

        new: its tokens that are not cached. coming: its tokens of issued passes whose results have not been
        read; the last of them is the root then.
        """
        sequence, first, nodes, size = self.sequences[b], len(self.source), draft.tokens, draft.size
        known, start = sequence.known, sequence.num_cached
        if coming:
            known += coming
            start = known - 1
            self.room[b] -= coming
            self.bases[b] = known - 1
            self.unknown.append((len(self.ids), b))
            self.ids.append(0)
            root = 0
        else:
            self.ids += new
            root = self.ids[-1]
        self.spans.append(Span(b, start, known + size, known + size))
        self._offset += known - start
        self.source.append(self._offset - 1)
        self._offset += size
        self.token.append(root)
        riders = size - len(nodes)
        self.with_riders |= riders > 0
        self.verified = max(self.verified, 1 + len(nodes))
        self.ids += nodes
        self.source += range(self.source[-1] + 1, self.source[-1] + 1 + size)
        self.token += nodes
        self.parent += draft.verified_rows
        for depth in depths(draft):  # row r chooses the token at position known + depth
            self.keys += (*sequence.settings.key, known + depth, 0)
        # `accept` does not read the rows of riders.
        self.token += [0] * riders
        self.parent += [-1] * riders
        self.keys += [0] * (4 * riders)
        group, lanes = sequence.sampling, len(self.sequences)
        _, edges = self.groups.setdefault(group.key, (group, [0] * (2 * lanes)))
        edges[b], edges[lanes + b] = first, len(self.source) - riders
        self.logprobs |= sequence.settings.record
        self.top |= sequence.settings.top_logprobs > 0
        if (automaton := sequence.settings.automaton) is not None:
            states = [sequence.state]
            for node, parent in zip(nodes, draft.verified_rows[1:], strict=True):
                states.append(automaton.after(states[parent], (node,)))
            self.states.setdefault(automaton, {}).update(enumerate(states, first))
            self.left.update((first + r, sequence.room - depth - 1) for r, depth in enumerate(depths(draft)))

    def put(self, packing: Packing, tokens: int, padded: int) -> None:
        """Pack the tensors of `_compute` from `ids` to `left`; `tokens` and `padded` are N and M with
        padding."""
        lanes = len(self.sequences)
        packing.padded(self.ids, 0, tokens)
        if self.unknown:
            places = list(range(tokens))
            for place, b in self.unknown:
                places[place] = tokens + b
            packing.add(places)
        packing.close(tokens if self.unknown else 0)
        packing.padded(self.source, self.source[-1], padded)  # sessions observe no row but true ones
        packing.padded(self.token, 0, padded)
        packing.padded(self.parent, -1, padded)
        packing.padded(self.keys, 0, padded, 4)
        for _, edges in self.groups.values():
            packing.add(edges)
        packing.close(len(self.groups), 2, lanes)
        packing.padded(self.room, 0, lanes)
        for states in self.states.values():
            packing.add([states.get(row, NOWHERE) for row in range(padded)])
        packing.close(len(self.states), padded)
        packing.add([self.left.get(row, 0) for row in range(padded)] if self.states else ())
        packing.close(padded if self.states else 0)


class CausalRunner:
    """Runs the verify passes of a batch.

    Args:
        ids, width: the memory of the sequences' tokens, `width` for each lane.
        space: the cache and the graphs of the passes.
        session: the drafter's.
        follows: whether passes are issued before the host knows the tokens of the pass before.
    """

    def __init__(
        self,
        model: Model,
        ids: array[int],
        width: int,
        space: Workspace,
        session: DraftSession,
        *,
        follows: bool,
    ) -> None:
        assert space.kv_cache is not None
        self.model, self.device = model, model.device
        self._ids, self._width = ids, width
        self.kv_cache, self.graphs = space.kv_cache, space.graphs
        self._session = session
        self._owned = space.session
        """The same, if recorded passes read its tensors; else None."""
        self._riders = session.riders
        self._recorded_rows = padding.recorded_rows(model)
        self._pad_to: PadTo = padding.row_padding(model)
        self._last = space.tokens[:, 0] if follows else None
        """(lanes,) int64 on the device: the last pass's choices, if passes are issued ahead."""

    def issue(
        self,
        sequences: Sequence[CausalSequence],
        drafts: dict[int, Draft],
        tree: bool,
        coming: dict[int, int],
    ) -> Issued:
        """Issue a pass over the drafts, by lane; all are trees, or all are chains.

        coming: for each lane, the tokens of issued passes whose results have not been read.
        """
        if self.graphs is not None and any(sequences[b].nfe + coming[b] == 0 for b in drafts):
            # The weights of the model or the drafter may have moved.
            of_drafter = () if self._owned is None else (self._owned.addresses(),)
            self.graphs.drop_stale(self.model.addresses(), *of_drafter)
        inputs, key = self._inputs(sequences, drafts, tree, coming)
        compute = functools.partial(self._compute, key)
        graph_key = recorded_key(key, key.shapes[0][0], self._recorded_rows)
        result = run_pass(self.graphs, graph_key, inputs, compute, device=self.device, held=key)
        there = None
        if self.device.type == "cuda":
            # Copied now, into pinned memory: a copy issued later would wait for later passes.
            result = result.to("cpu", non_blocking=True)
            there = torch.cuda.current_stream(self.device).record_event()
        return Issued(drafts, key, result, there)

    def _inputs(
        self,
        sequences: Sequence[CausalSequence],
        drafts: dict[int, Draft],
        tree: bool,
        coming: dict[int, int],
    ) -> tuple[Tensor, PassKey]:
        """All that the device needs from the host, (n,) int64 on the CPU, and the key that says how to read
        it.
        """
        lanes, width, pad_to = len(sequences), self._width, self._pad_to
        rows, penalties = PassRows(sequences), PenalizedRows()
        for b, draft in drafts.items():
            sequence = sequences[b]
            begin, end = b * width, b * width + sequence.known
            if (own := sequence.settings.penalties) != NO_PENALTIES:
                penalties.add(len(rows.source), self._ids[begin:end], sequence.prompt, draft, own)
            rows.add(b, draft, self._ids[begin + sequence.num_cached : end], coming[b])
        packing, wanted = Packing(), len(rows.source)
        trees = [draft.rows for draft in drafts.values()] if tree else None
        tokens, max_q_len, max_kv_len = self.kv_cache.put(packing, rows.spans, pad_to, parents=trees)
        joined: tuple[Tensor, ...] = ()
        if rows.with_riders:
            assert self._riders is not None
            drafted = {b: sequences[b] for b in drafts}
            joined, tokens = rider_pass.inputs(
                self._riders, self.kv_cache, drafted, drafts, tree, wanted, pad_to
            )
        padded = wanted if pad_to is None else pad_to(wanted)
        rows.put(packing, tokens, padded)
        eos = [sequence.settings.eos_ids for sequence in sequences]
        most = max(1, *map(len, eos))
        for each in eos:
            packing.add(each)
            packing.repeat(UNKNOWN, most - len(each))
        packing.close(lanes, most)
        packing.padded(rows.bases, 0, lanes)
        if tree:
            packing.tensors((self.kv_cache.block_table,))
        else:
            packing.close(0, 0)
        if penalties:
            penalties.put(packing, padded)
        packing.tensors(joined)
        inputs, shapes = packing.pack(self.device)
        return inputs, PassKey(
            shapes,
            max_q_len,
            max_kv_len,
            rows.verified if pad_to is None else 1 << (rows.verified - 1).bit_length(),
            next(iter(drafts.values())).start,
            tree,
            bool(penalties),
            len(joined),
            self._last is not None,
            rows.logprobs,
            rows.top,
            tuple(rows.states),
            tuple(group for group, _ in rows.groups.values()),
        )

    def _compute(self, key: PassKey, inputs: Tensor) -> Tensor:
        tensors = unpack(inputs, key.shapes)
        tensors, joined = tensors[: len(tensors) - key.riders], tensors[len(tensors) - key.riders :]
        count = len(tensors) - (TENSORS if key.penalized else 0)
        tensors, penalties = tensors[:count], tensors[count:]
        *tensors, room, states, left, eos_ids, bases, table = tensors
        *about_tokens, ids, places, source, token, parent, keys, edges = tensors
        metadata = AttentionMetadata(key.max_q_len, key.max_kv_len, *about_tokens, causal=not key.tree)
        if len(places):
            assert self._last is not None
            ids = torch.cat((ids, self._last))[places]
        logits = self._logits(key, ids, source, metadata, joined)
        if key.penalized:
            logits = penalized(logits, *penalties)
        logits = _constrained(logits, key.automata, states, left)
        outputs = [
            accept(
                logits,
                token,
                parent,
                edge[0],
                edge[1],
                room=room,
                eos_ids=eos_ids,
                keys=keys if group.temperature > 0 else None,
                **group.arguments,
                max_q_len=key.rows,
                check=False,
            )
            for group, edge in zip(key.groups, edges, strict=True)
        ]
        # Lanes of other groups have emitted nothing: 0 tokens, -1 in their places, no error.
        count, path, tokens = (
            functools.reduce(torch.maximum, each)
            for each in zip(*((output.count, output.path, output.tokens) for output in outputs), strict=True)
        )
        error = functools.reduce(torch.minimum, [output.error for output in outputs])
        if key.follows:
            assert self._last is not None
            # A bad row has no choice: later passes over its lane are not read, so any token will do.
            torch.clamp(tokens[:, 0], min=0, out=self._last)
        results = [error, count, tokens.flatten()]
        if key.tree:
            source_slots, target_slots = self._moves(path, bases, table)
            kv_move(self.kv_cache.slots, source_slots, target_slots)
            self._session.moved(source_slots, target_slots)
        if key.tree or key.riders:
            results.append(path.flatten())
        if key.riders:
            assert self._riders is not None
            guessed = rider_pass.guesses(self._riders, key.groups, logits, edges, path, count, joined[-1])
            results.append(guessed.flatten())
        if key.logprobs:
            logprob = functools.reduce(torch.maximum, map(_logprobs, outputs, edges))
            results.append(bits_of(logprob).flatten())
        if key.top:
            of_groups = [
                _most_probable(logits, *of_group) for of_group in zip(key.groups, outputs, edges, strict=True)
            ]
            token, logprob = (functools.reduce(torch.maximum, each) for each in zip(*of_groups, strict=True))
            results += [token.flatten(), bits_of(logprob).flatten()]
        return torch.cat(results)

    def _logits(
        self,
        key: PassKey,
        ids: Tensor,
        source: Tensor,
        metadata: AttentionMetadata,
        joined: Sequence[Tensor],
    ) -> Tensor:
        """(M, V): the logits of the rows `source` (M,) of the pass, which the drafter's session observes."""
        taps = Taps(self._session.taps)
        with own_precision(self.model, self.device):
            if key.riders:
                assert self._riders is not None
                x = rider_pass.step(self.model, self._riders, self.kv_cache, ids, metadata, joined)
            elif key.start:
                assert isinstance(self._session, KeepsStreams)
                stream = self._session.streams(metadata)
                stream = self.model.run_layers(stream, self.kv_cache, metadata, key.start, taps=taps)
                x = self.model.final_norm(stream)
            else:
                x = self.model.step(ids, self.kv_cache, metadata, taps=taps)
            logits: Tensor = self.model.head(x[source])
            tapped = tuple(taps[layer] for layer in self._session.taps)
            self._session.observe(Observation(metadata, ids, tapped, source, logits))
        return logits

    def _moves(self, path: Tensor, bases: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """(B, D) int64 each: the slots of a path's keys and values, and the slots to move them to; -1:
        none."""
        places = torch.arange(path.shape[1], device=path.device)
        size = self.kv_cache.page_size

        def slots(place: Tensor) -> Tensor:
            page = table.gather(1, (place // size).clamp(0, table.shape[1] - 1))
            return (page * size + place % size).masked_fill((path < 0) | (path == places), -1)

        return slots(bases[:, None] + path), slots(bases[:, None] + places)

    def emitted(
        self, sequences: Sequence[CausalSequence], drafts: dict[int, Draft], key: PassKey, numbers: list[int]
    ) -> dict[int, Emitted]:
        """The emitted tokens in a pass's result. Raises ValueError for a bad row on a path."""
        lanes, width = len(sequences), key.rows
        error, count, rest = numbers[:lanes], numbers[lanes : 2 * lanes], numbers[2 * lanes :]
        if (first := min(error[b] for b in drafts)) != NO_ERROR:

            def where(at: int) -> str:
                lane, row = at >> 31, at & 0x7FFFFFFF
                return f"sequence {lane} at position {sequences[lane].known + depths(drafts[lane])[row]}"

            explain(first, where)
        logprobs: list[float] = []
        top: RowTopK | None = None
        if key.top:
            count_of_top = lanes * width * MOST
            numbers_of_top = torch.tensor(rest[-2 * count_of_top :], device="cpu").view(2, lanes, width, MOST)
            rest = rest[: -2 * count_of_top]
            top = RowTopK(numbers_of_top[0], floats_of(numbers_of_top[1]))
        if key.logprobs:
            bits = torch.tensor(rest[-lanes * width :], device="cpu")
            logprobs, rest = floats_of(bits).tolist(), rest[: -lanes * width]
        emitted = {
            b: Emitted(
                rest[b * width :][: count[b]],
                logprobs[b * width :][: count[b]],
                None if top is None else RowTopK(*(values[b, : count[b]] for values in top)),
            )
            for b in drafts
        }
        if key.riders:
            path, guesses = rest[lanes * width : 2 * lanes * width], rest[2 * lanes * width :]
            each = len(guesses) // lanes
            for b, draft in drafts.items():
                if draft.riders:
                    riders = draft.riders[path[b * width + count[b] - 1]]
                    guessed = guesses[b * each : (b + 1) * each] if riders else ()
                    emitted[b] = emitted[b]._replace(riders=riders, guessed=guessed)
        return emitted


def _constrained(logits: Tensor, automata: Sequence[Automaton], states: Tensor, left: Tensor) -> Tensor:
    """Logits (M, V); -inf replaces the logits of tokens that an automaton does not allow.

    states: (automata, M) int64, `NOWHERE` for rows that are not constrained: rows of other lanes, and rows
    behind a node that is not of the form. left: (M,) int64, see `Tables.allowed`.
    """
    for automaton, state in zip(automata, states, strict=True):
        tables = automaton.tables(logits.device)
        classes = tables.classes(torch.arange(logits.shape[1], device=logits.device))
        allowed = tables.allowed(state.clamp(min=0), left)[:, classes]
        logits = logits.masked_fill(~allowed & (state != NOWHERE)[:, None], -math.inf)
    return logits


def _logprobs(output: AcceptOutput, edge: Tensor) -> Tensor:
    """(B, D) float32: the log-probabilities of the emitted tokens; -inf where there is none. edge: (2, B)."""
    rows = edge[0][:, None] + output.path
    return output.stats.sample_logprob[rows].masked_fill(output.path < 0, -math.inf)


def _most_probable(logits: Tensor, group: SamplingGroup, output: AcceptOutput, edge: Tensor) -> RowTopK:
    """(B, D, MOST) each: the most probable tokens of the emitted tokens' places; -1 and -inf where there is
    none."""
    none = (output.path < 0)[..., None]
    rows = (edge[0][:, None] + output.path.clamp(min=0)).flatten()
    stats = output.stats
    found = most_probable(logits, rows, stats.sample[rows], stats.sample_logprob[rows], group)
    token, logprob = (values.view(*output.path.shape, MOST) for values in found)
    return RowTopK(token.masked_fill(none, -1), logprob.masked_fill(none, -math.inf))
