"""Sequences of an autoregressive model that are decoded together: draft, verify, accept, commit.

    draft     guesses behind the root, the last known token: none, a chain or a tree
    verify    one pass over root and guesses (and what of the prompt is not computed yet)
    accept    at each row the model's own choice; the path from the root along the guesses that are it
    commit    the choices along the path are known tokens now, the keys and values of its rows are kept

Every token is the model's own choice behind true tokens, and samples are keyed by position, so a text is a
function of prompt and seed, whatever the drafter. Each sequence goes on at its own pace.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cache import AttentionMetadata, KVCache, PadTo, Span
from ..decoding.runner import recorded_rows, row_padding
from ..decoding.sequence import Settings
from ..decoding.workspace import graphs_on
from ..models import Model, Taps, own_precision
from ..ops import accept, kv_move
from ..ops.errors import NO_ERROR, explain
from ..packed import Shapes, pack, unpack
from . import riding
from .draft import Draft, check_drafts
from .drafter import Drafter, KeepsStreams, Lane
from .sequence import IDLE, CausalSequence, SamplingGroup, Verified
from .sizing import Fixed, Sizer

UNKNOWN = -1
"""What stands in the place of a token that is not known yet."""


class PassKey(NamedTuple):
    """What the launches of a pass depend on, beside the values of its inputs."""

    shapes: Shapes
    max_q_len: int
    max_kv_len: int
    rows: int
    """The most rows of a lane that are verified."""
    start: int
    """The first layer."""
    tree: bool
    riders: int
    """Tensors that tell of the riders; 0: there are none."""
    logprobs: bool
    groups: tuple[SamplingGroup, ...]

    @property
    def key(self) -> tuple[Any, ...]:
        return (*self[:-1], tuple(group.key for group in self.groups))


class Emitted(NamedTuple):
    """What a pass has emitted of one sequence."""

    tokens: list[int]
    logprobs: list[float]
    """With `logprobs`, of each token."""
    riders: int = 0
    """That rode behind the node whose choice is the last token."""
    guessed: Sequence[int] = ()
    """What was made of their logits, see `DraftSession.guessed`."""


@dataclass
class Counts:
    """What drafts were worth, by the depth of their nodes: index 0 are the root's children."""

    drafted: list[int]
    """Passes whose draft reached so deep, as far as there was room for its tokens."""
    accepted: list[int]
    """Of these, how many took a token of the draft at this depth."""

    def add(self, depth: int, taken: int) -> None:
        missing = depth - len(self.drafted)
        self.drafted += [0] * missing
        self.accepted += [0] * missing
        for at in range(depth):
            self.drafted[at] += 1
            self.accepted[at] += at < taken


class CausalBatch:
    """Sequences in lanes, each with its own place in them.

    Args:
        model: one of ours, `causal`.
        lanes, width: how many sequences, and the longest one's length.
        drafter: None: plain decoding, a token a pass.
        sizer: how many nodes are asked for; default: as many as the drafter has a use for.
        pad_id: what stands behind the end of a sequence.
        batch_invariant: each sequence in passes of its own.
        graphs: on a GPU, passes of one form are recorded once and replayed.
        kv_cache: of so many sequences and positions; default: a fresh one.
    """

    def __init__(
        self,
        model: Model,
        lanes: int,
        width: int,
        *,
        drafter: Drafter | None = None,
        sizer: Sizer | None = None,
        pad_id: int = UNKNOWN,
        batch_invariant: bool = False,
        graphs: bool = True,
        kv_cache: KVCache | None = None,
    ) -> None:
        self.model, self.pad_id, self.batch_invariant = model, pad_id, batch_invariant
        self.mask_id = UNKNOWN
        self.tokens = torch.full((lanes, width), pad_id, dtype=torch.int64)
        """On the CPU: drafters and stop sequences look at them there."""
        self.logprobs = torch.full((lanes, width), torch.nan)
        """(lanes, width) float32: of each token, where a sequence wants them."""
        self.steps = torch.zeros((lanes, width), dtype=torch.int64)
        """(lanes, width): the pass that brought each token, where a sequence wants log-probabilities or the
        record."""
        self.kv_cache = model.new_cache(lanes, width) if kv_cache is None else kv_cache
        self.rows: list[CausalSequence] = [IDLE] * lanes
        self.forwards = 0
        self.draft_forwards = 0
        self.counts = Counts([], [])
        self._most = 0 if drafter is None else drafter.most
        self._session = (
            None if drafter is None else drafter.session(model, self.kv_cache, lanes, graphs=graphs)
        )
        self._riders = None if self._session is None else self._session.riders
        self._sizer: Sizer = Fixed(self._most) if sizer is None else sizer
        self.graphs = graphs_on(model.device) if graphs else None
        self._recorded_rows = recorded_rows(model)
        self._pad_to: PadTo = row_padding(model)
        self._suppressed: dict[tuple[int, ...], Tensor] = {}

    def admit(
        self,
        lane: int,
        prompt: Tensor,
        gen_length: int,
        settings: Settings,
        *,
        eos_ids: tuple[int, ...] = (),
        num_cached: int = 0,
    ) -> CausalSequence:
        """Begin a sequence: up to `gen_length` tokens after `prompt` (P,) int64, at least one.

        num_cached: its first positions whose keys and values are cached already, fewer than P.
        """
        first, length = len(prompt), len(prompt) + gen_length
        row = CausalSequence(
            first,
            length,
            settings,
            self._suppress(settings.suppress),
            eos_ids,
            known=first,
            num_cached=num_cached,
            kept=gen_length,
            done=gen_length == 0,
        )
        self.rows[lane] = row
        self.tokens[lane] = self.pad_id
        self.tokens[lane, :first] = prompt
        self.tokens[lane, first:length] = UNKNOWN
        self.logprobs[lane], self.steps[lane] = torch.nan, 0
        if self._session is not None:
            self._session.reset(lane)
        return row

    @property
    def live(self) -> list[int]:
        """Sequences that the next pass is over."""
        return [b for b, row in enumerate(self.rows) if not row.done]

    def release(self, lane: int) -> None:
        """Forget the lane's sequence."""
        self.rows[lane] = IDLE

    def enter(self, finished: list[int]) -> None:
        """Nothing is between blocks here."""

    def _suppress(self, ids: Tensor | None) -> Tensor | None:
        """One tensor for the same ids, on the device."""
        if ids is None or not len(ids):
            return None
        key = tuple(ids.unique().tolist())
        if key not in self._suppressed:
            if len(self._suppressed) == 64:
                self._suppressed.clear()
            self._suppressed[key] = torch.tensor(key, device=self.model.device)
        return self._suppressed[key]

    # --- a pass -------------------------------------------------------------------------------------

    def step(self, lanes: Sequence[int] | None = None) -> list[int]:
        """Draft and verify once for every sequence that is not done (of `lanes`); returns these, each of
        which has new tokens.

        Where it raises, what the model, the drafter or `accept` raises, every sequence is as it was before.
        """
        live = self.live if lanes is None else [b for b in self.live if b in lanes]
        if not live:
            return []
        before = [copy.copy(self.rows[b]) for b in live], self.forwards, self.draft_forwards
        try:
            sizes = self._sizes(live)
            drafts = dict.fromkeys(live, Draft()) | self._drafts(sizes)
            found: dict[int, Emitted] = {}
            for group, tree in self._groups(live, drafts):
                found |= self._verify({b: drafts[b] for b in group}, tree)
                self.forwards += 1
        except BaseException:
            rows, self.forwards, self.draft_forwards = before
            for b, row in zip(live, rows, strict=True):
                self.rows[b].__dict__.update(row.__dict__)
            raise
        for b in live:
            # A draft of riders alone says nothing of what drafts are worth.
            if sizes.get(b) and (drafts[b].tokens or not drafts[b].riders):
                self._sizer.learn(sizes[b], len(found[b].tokens) - 1)
            self._advance(b, drafts[b], found[b])
        return live

    def _sizes(self, live: Sequence[int]) -> dict[int, int]:
        """The most rows of each draft; while the prompt is computed none, or riders alone."""
        if self._session is None:
            return {}
        size = min(self._sizer.size(len(live)), self._most)
        asked = [b for b in live if self._riders is not None or not self.rows[b].prefills]
        # The last token that there is room for is the model's own choice in any case.
        sizes = {b: min(size, self.rows[b].room - 1) for b in asked}
        return {b: most for b, most in sizes.items() if most > 0}

    def _drafts(self, sizes: dict[int, int]) -> dict[int, Draft]:
        """What is guessed of each."""
        if self._session is None or not sizes:
            return {}
        rows = [(b, self.rows[b]) for b in sizes]
        views = [
            Lane(b, self.tokens[b, : row.known], row.length, row.sampling, row.settings.key, row.eos_ids)
            for b, row in rows
        ]
        found: list[Draft] = []
        with self._sizer.drafting():
            for part in (
                [slice(i, i + 1) for i in range(len(rows))] if self.batch_invariant else [slice(None)]
            ):
                found += self._session.propose(views[part], list(sizes.values())[part])
        prefilling = [b for b in sizes if self.rows[b].prefills]
        most_riders = 0 if self._riders is None else self._riders.most
        check_drafts(found, list(sizes), list(sizes.values()), self.model.shape, most_riders, prefilling)
        drafting = len(sizes) - len(prefilling)
        self.draft_forwards += drafting if self.batch_invariant else drafting > 0
        for b in sizes:
            self.rows[b].draft_nfe += b not in prefilling
        return dict(zip(sizes, found, strict=True))

    def _groups(self, live: Sequence[int], drafts: dict[int, Draft]) -> list[tuple[list[int], bool]]:
        """Sequences that share a pass, all of which begin at one layer, and whether it is one over trees."""
        if self.batch_invariant:
            return [([b], not drafts[b].is_chain) for b in live]
        found = []
        for start in sorted({drafts[b].start for b in live}):
            alike = [b for b in live if drafts[b].start == start]
            trees = [b for b in alike if not drafts[b].is_chain]
            chains = [b for b in alike if drafts[b].is_chain]
            if trees:  # a short chain is a tree; the rows of a prompt are too many to be
                trees += [b for b in chains if not self.rows[b].prefills]
                chains = [b for b in chains if self.rows[b].prefills]
            found += [(sorted(group), tree) for group, tree in ((chains, False), (trees, True)) if group]
        return found

    def _verify(self, drafts: dict[int, Draft], tree: bool) -> dict[int, Emitted]:
        """One pass over some sequences. Nothing of them changes but keys and values behind the known ones."""
        if self.graphs is not None and any(self.rows[b].nfe == 0 for b in drafts):
            self.graphs.drop_stale(self.model.addresses())  # the model may have moved
        inputs, key = self._inputs(drafts, tree)
        device = self.model.device
        compute = functools.partial(self._compute, key)
        # A pass that computes a prompt says nothing of what a size of draft takes.
        prefills = any(self.rows[b].prefills for b in drafts)
        with nullcontext() if prefills else self._sizer.verifying():
            if self.graphs is None or self.graphs.addresses is None:
                result = compute(inputs.to(device, non_blocking=True))
            else:
                few = key.shapes[0][0] <= self._recorded_rows
                result = self.graphs.run(key.key if few else None, inputs, compute, device=device, held=key)
            numbers = result.tolist()  # waits for the device
        return self._look(drafts, key, numbers)

    def _inputs(self, drafts: dict[int, Draft], tree: bool) -> tuple[Tensor, PassKey]:
        """All that the device has to be told, (n,) int64 on the CPU, and how it is to be read.

        N packed tokens of the pass; M rows whose logits are wanted, each lane's root and nodes, which are
        verified, and behind them its riders, which are not; B lanes.
        """
        lanes, pad_to = len(self.rows), self._pad_to
        spans: list[Span] = []
        ids: list[int] = []
        source: list[int] = []
        token: list[int] = []
        parent: list[int] = []
        keys: list[tuple[int, int, int, int]] = []
        parents: list[tuple[int, ...]] = []
        q_start, q_end = [0] * lanes, [0] * lanes
        offset = 0
        for b, draft in drafts.items():
            row, end = self.rows[b], self.rows[b].known + draft.size
            spans.append(Span(b, row.num_cached, end, end))
            known = self.tokens[b, row.num_cached : row.known].tolist()
            ids += [*known, *draft.tokens]
            parents.append(draft.rows)
            q_start[b] = len(source)
            source += range(offset + len(known) - 1, offset + len(known) + draft.size)
            q_end[b] = q_start[b] + 1 + len(draft.tokens)
            token += [known[-1], *draft.tokens]
            parent += draft.verified_rows
            seed, number = row.settings.key
            positions = [row.known + depth for depth in _depths(draft)]  # of what each row chooses
            keys += [(seed, number, position, 0) for position in positions]
            offset += len(known) + draft.size
            riders = len(source) - q_end[b]  # `accept` does not look at their rows
            token += [0] * riders
            parent += [-1] * riders
            keys += [(0, 0, 0, 0)] * riders
        metadata = self.kv_cache.metadata(spans, pad_to, causal=not tree, parents=parents if tree else None)
        joined: tuple[Tensor, ...] = ()
        tokens = len(metadata.positions)
        if any(draft.size > len(draft.tokens) for draft in drafts.values()):
            assert self._riders is not None
            own, wanted = {b: self.rows[b] for b in drafts}, len(source)
            joined, tokens = riding.inputs(self._riders, self.kv_cache, own, drafts, tree, wanted, pad_to)
        more_ids = tokens - len(ids)
        more = 0 if pad_to is None else pad_to(len(source)) - len(source)
        groups: dict[tuple[Any, ...], list[int]] = {}
        for b in drafts:
            groups.setdefault(self.rows[b].sampling.key, []).append(b)
        edges = torch.zeros((len(groups), 2, lanes), dtype=torch.int64)
        for edge, group in zip(edges, groups.values(), strict=True):
            for b in group:
                edge[0, b], edge[1, b] = q_start[b], q_end[b]
        eos = [row.eos_ids for row in self.rows]
        width = max(1, *map(len, eos))
        bases = [row.known - 1 for row in self.rows]
        tensors = (
            *metadata.tensors,
            torch.tensor(ids + [0] * more_ids),
            torch.tensor(source + [0] * more),
            torch.tensor(token + [0] * more),
            torch.tensor(parent + [-1] * more),
            torch.tensor(keys + [(0, 0, 0, 0)] * more),
            edges,
            torch.tensor([row.room for row in self.rows]),
            torch.tensor([[*each, *[UNKNOWN] * (width - len(each))] for each in eos]),
            torch.tensor(bases),
            self.kv_cache.block_table if tree else torch.zeros((0, 0), dtype=torch.int64),
            *joined,
        )
        inputs, shapes = pack(tensors)
        if self.model.device.type == "cuda":
            inputs = inputs.pin_memory()  # else its copy to the device may wait for the passes before
        rows = 1 + max(len(draft.tokens) for draft in drafts.values())
        if pad_to is not None:
            rows = 1 << (rows - 1).bit_length()
        logprobs = any(self.rows[b].settings.record for b in drafts)
        sampling = tuple(self.rows[group[0]].sampling for group in groups.values())
        start = next(iter(drafts.values())).start
        return inputs, PassKey(
            shapes,
            metadata.max_q_len,
            metadata.max_kv_len,
            rows,
            start,
            tree,
            len(joined),
            logprobs,
            sampling,
        )

    def _compute(self, key: PassKey, inputs: Tensor) -> Tensor:
        tensors = unpack(inputs, key.shapes)
        tensors, joined = tensors[: len(tensors) - key.riders], tensors[len(tensors) - key.riders :]
        *given, ids, source, token, parent, keys, edges, room, eos_ids, bases, table = tensors
        metadata = AttentionMetadata(key.max_q_len, key.max_kv_len, *given, causal=not key.tree)
        taps = Taps(() if self._session is None else self._session.taps)
        with own_precision(self.model, self.model.device):
            if key.riders:
                assert self._riders is not None
                x = riding.step(self.model, self._riders, self.kv_cache, ids, metadata, joined)
            elif key.start:
                assert isinstance(self._session, KeepsStreams)
                stream = self._session.streams(metadata)
                stream = self.model.run_layers(stream, self.kv_cache, metadata, key.start, taps=taps)
                x = self.model.final_norm(stream)
            else:
                x = self.model.step(ids, self.kv_cache, metadata, taps=taps)
            logits = self.model.head(x[source])
            if self._session is not None:
                self._session.observe(metadata, [taps[layer] for layer in self._session.taps])
        found = [
            accept(
                logits,
                token,
                parent,
                edge[0],
                edge[1],
                room=room,
                eos_ids=eos_ids,
                keys=keys if group.temperature > 0 else None,
                temperature=group.temperature,
                top_p=group.top_p,
                top_k=group.top_k,
                suppress=group.suppress,
                max_q_len=key.rows,
                check=False,
            )
            for group, edge in zip(key.groups, edges, strict=True)
        ]
        # Lanes of other groups have emitted nothing: 0 tokens, -1 in their places, no error.
        count, path, tokens = (
            functools.reduce(torch.maximum, each)
            for each in zip(*((one.count, one.path, one.tokens) for one in found), strict=True)
        )
        error = functools.reduce(torch.minimum, [one.error for one in found])
        results = [error, count, tokens.flatten()]
        if key.tree:
            source_slots, target_slots = self._moves(path, bases, table)
            kv_move(self.kv_cache.slots, source_slots, target_slots)
            if self._session is not None:
                self._session.moved(source_slots, target_slots)
        if key.tree or key.riders:
            results.append(path.flatten())
        if key.riders:
            assert self._riders is not None
            guessed = riding.guesses(self._riders, key.groups, logits, edges, path, count, joined[-1])
            results.append(guessed.flatten())
        if key.logprobs:
            each = [
                one.stats.sample_logprob[(edge[0][:, None] + one.path).clamp(min=0)].masked_fill(
                    one.path < 0, -torch.inf
                )
                for one, edge in zip(found, edges, strict=True)
            ]
            logprob = functools.reduce(torch.maximum, each)
            results.append(logprob.view(torch.int32).to(torch.int64).flatten())
        return torch.cat(results)

    def _moves(self, path: Tensor, bases: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """(B, D) slots that a path's keys and values lie in, and those that they belong into; -1 for none."""
        places = torch.arange(path.shape[1], device=path.device)
        size = self.kv_cache.page_size

        def slots(place: Tensor) -> Tensor:
            page = table.gather(1, (place // size).clamp(0, table.shape[1] - 1))
            return (page * size + place % size).masked_fill((path < 0) | (path == places), -1)

        return slots(bases[:, None] + path), slots(bases[:, None] + places)

    def _look(self, drafts: dict[int, Draft], key: PassKey, numbers: list[int]) -> dict[int, Emitted]:
        """What a pass has emitted, from its result. Raises ValueError for a row that kept one from it."""
        lanes, width = len(self.rows), key.rows
        error, count, rest = numbers[:lanes], numbers[lanes : 2 * lanes], numbers[2 * lanes :]
        if min(error) != NO_ERROR:

            def where(at: int) -> str:
                lane, row = at >> 31, at & 0x7FFFFFFF
                return f"sequence {lane} at position {self.rows[lane].known + _depths(drafts[lane])[row]}"

            explain(min(error), where)
        logprobs: list[float] = []
        if key.logprobs:
            bits = torch.tensor(rest[-lanes * width :]).to(torch.int32)
            logprobs, rest = bits.view(torch.float32).tolist(), rest[: -lanes * width]
        found = {b: Emitted(rest[b * width :][: count[b]], logprobs[b * width :][: count[b]]) for b in drafts}
        if key.riders:
            path, guesses = rest[lanes * width : 2 * lanes * width], rest[2 * lanes * width :]
            each = len(guesses) // lanes
            for b, draft in drafts.items():
                if draft.riders:
                    riders = draft.riders[path[b * width + count[b] - 1]]
                    guessed = guesses[b * each : (b + 1) * each] if riders else ()
                    found[b] = found[b]._replace(riders=riders, guessed=guessed)
        return found

    # --- what it has brought ------------------------------------------------------------------------

    def _advance(self, b: int, draft: Draft, emitted: Emitted) -> None:
        """Take in the tokens that a pass has emitted of a sequence."""
        row, count = self.rows[b], len(emitted.tokens)
        if self._session is not None:
            self._session.guessed(b, emitted.riders, emitted.guessed)
        if draft.tokens:
            depth = max(_depths(draft))
            self.counts.add(depth, count - 1)
        start = row.known
        row.nfe += 1
        row.layers += draft.layers + self.model.shape.layers - draft.start
        row.drafted, row.accepted = len(draft.tokens), count - 1
        row.refused = draft.refused(emitted.tokens)
        row.num_cached = row.known + count - 1
        row.known += count
        self.tokens[b, start : row.known] = torch.tensor(emitted.tokens)
        if row.settings.record:
            self.logprobs[b, start : row.known] = torch.tensor(emitted.logprobs)
            self.steps[b, start : row.known] = row.nfe
            row.passes.append(Verified(row.drafted, row.accepted, row.refused))
        # Only the last tokens can be part of what ends at a new one.
        reach = max((len(stop) for stop in row.settings.stop), default=1)
        first = max(row.prompt, start - reach + 1)
        ended = row.first_end(self.tokens[b, first : row.known].tolist(), first, start)
        if ended is not None:
            begin, end = ended
            row.kept, row.stopped = row.index(begin), True
            row.known, row.num_cached = end, min(row.num_cached, end - 1)
            self.logprobs[b, end:], self.steps[b, end:] = torch.nan, 0
        if row.stopped or not row.room:
            row.done = True
            self.tokens[b, row.known :] = self.pad_id


def _depths(draft: Draft) -> list[int]:
    """Of the root and the nodes: steps from the root."""
    depths = [0]
    for node in range(1, len(draft.tokens) + 1):
        depths.append(1 + depths[node - 1 if draft.parents is None else draft.parents[node - 1]])
    return depths
