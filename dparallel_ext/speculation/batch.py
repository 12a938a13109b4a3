"""A batch of sequences of an autoregressive model: draft, verify, accept, commit.

    draft     guesses of the tokens after the root, which is the last known token: none, a chain or a tree
    verify    one pass over root and guesses (and the rest of the prompt, if it is not computed yet)
    accept    the path from the root along the guesses that are the model's own choice at the row before
    commit    the choices along the path become known tokens; keys and values of the path's rows are kept

Every token is the model's own choice after true tokens, and samples are keyed by position, so a text is a
function of prompt and seed, whatever the drafter. Each sequence goes on at its own pace.
"""

from __future__ import annotations

import collections
import functools
from array import array
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cache import AttentionMetadata, KVCache, PadTo, Span
from ..decoding import padding
from ..decoding.sequence import Settings
from ..decoding.workspace import Workspace
from ..models import Model, Taps, own_precision
from ..ops import accept, kv_move
from ..ops.errors import NO_ERROR, explain
from ..packed import Packing, Shapes, unpack
from . import riding
from .draft import Draft, check_drafts
from .drafter import Apart, Drafter, DraftSession, KeepsStreams, Lane
from .sequence import IDLE, CausalSequence, SamplingGroup, Verified
from .sizing import Fixed, Sizer

UNKNOWN = -1
"""The number in place of a token that is not known yet."""


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
    riders: int
    """The number of input tensors about riders; 0: there are none."""
    follows: bool
    """Whether the pass stores its choices on the device, for a next pass issued before the host knows
    them."""
    logprobs: bool
    groups: tuple[SamplingGroup, ...]

    @property
    def key(self) -> tuple[Any, ...]:
        return (*self[:-1], tuple(group.key for group in self.groups))


class Emitted(NamedTuple):
    """The tokens that a pass has emitted for one sequence."""

    tokens: list[int]
    logprobs: list[float]
    """With `logprobs`, of each token; else empty."""
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

    def numbers(self) -> list[int]:
        """The result; waits for the device."""
        if self.there is not None:
            self.there.synchronize()
        found: list[int] = self.result.tolist()
        return found


@dataclass
class Counts:
    """Drafted and accepted tokens by the depth of their nodes; index 0 is for the root's children."""

    drafted: list[int]
    """Passes whose draft reached this depth."""
    accepted: list[int]
    """Passes, of those, that accepted a token of the draft at this depth."""

    def add(self, depth: int, taken: int) -> None:
        missing = depth - len(self.drafted)
        self.drafted += [0] * missing
        self.accepted += [0] * missing
        for at in range(depth):
            self.drafted[at] += 1
            self.accepted[at] += at < taken


class CausalBatch:
    """Sequences in lanes, and the passes over them; `admit` puts a sequence into a lane.

    Args:
        model: a native model, `causal`.
        lanes, width: the number of sequences, and the length of the longest.
        drafter: None: plain decoding, a token a pass.
        sizer: chooses the number of nodes of drafts; default: the most that the drafter uses.
        pad_id: the token behind a sequence's end.
        batch_invariant: give each sequence passes of its own.
        graphs: on a GPU, record the passes of one `PassKey` once and replay them.
        ahead: on a GPU and without a drafter, passes that the host issues before it reads the result of the
            one before them. A sequence's end is noticed `ahead` passes late; those passes are wasted, and do
            not count.
        kv_cache: a cache for so many sequences and positions; default: a fresh one.
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
        ahead: int = 0,
        kv_cache: KVCache | None = None,
    ) -> None:
        self.model, self.pad_id, self.batch_invariant = model, pad_id, batch_invariant
        self.mask_id = UNKNOWN
        # Not empty, since torch makes no tensor of an empty buffer.
        self._ids = array("q", (pad_id,)) * max(1, lanes * width)
        """The memory of `tokens`, since a pass reads and writes few of them."""
        self.tokens = torch.frombuffer(self._ids, dtype=torch.int64)[: lanes * width].view(lanes, width)
        """(lanes, width) int64 on the CPU, where drafters and the search for stop sequences read them."""
        self.logprobs = torch.full((lanes, width), torch.nan)
        """(lanes, width) float32: each token's log-probability, of sequences that record it; else NaN."""
        self.steps = torch.zeros((lanes, width), dtype=torch.int64)
        """(lanes, width): the pass that emitted each token, of sequences that record it; else 0."""
        self.device = device = model.device
        owner = None if isinstance(drafter, Apart) else drafter
        space = None
        if kv_cache is None and graphs:
            space = Workspace.take(model, lanes, width, UNKNOWN, device, cached=True, drafter=owner)
        if space is None:
            kv_cache = model.new_cache(lanes, width) if kv_cache is None else kv_cache
            space = Workspace.of(
                torch.zeros((lanes, 1), dtype=torch.int64, device=device), kv_cache, graphs=graphs
            )
        assert space.kv_cache is not None
        self._workspace: Workspace | None = space
        self.kv_cache, self.graphs = space.kv_cache, space.graphs
        self.rows: list[CausalSequence] = [IDLE] * lanes
        self.forwards = 0
        self.draft_forwards = 0
        self.counts = Counts([], [])
        self._most = 0 if drafter is None else drafter.most
        self._session: DraftSession | None = space.session
        if drafter is not None and self._session is None:
            self._session = drafter.session(model, self.kv_cache, lanes, graphs=graphs)
        self._owned = self._session if owner is not None else None
        """The drafter's session, if recorded passes read its tensors."""
        self._riders = None if self._session is None else self._session.riders
        self._sizer: Sizer = Fixed(self._most) if sizer is None else sizer
        self._suppressed = space.suppressed
        self._recorded_rows = padding.recorded_rows(model)
        self._pad_to: PadTo = padding.row_padding(model)
        may = drafter is None and not batch_invariant and padding.runs_ahead(device)
        self._ahead = ahead if may else 0
        self._last = space.tokens[:, 0] if self._ahead else None
        """(lanes,) int64 on the device: the last pass's choices, if passes are issued ahead."""
        self._issued: collections.deque[Issued] = collections.deque()
        """Passes whose results have not been read, the oldest first."""

    def keep(self) -> None:
        """Leave the workspace to the model's next batch of this size, if the drafter's session can go on too.

        This batch is over then: its tensors belong to the next.
        """
        space, self._workspace = self._workspace, None
        if space is not None and space.key is not None and (self._owned is None or self._owned.recorded):
            space.session = self._owned
            space.give(self.model)

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
        """Begin a sequence: up to `gen_length` tokens after `prompt` (P,) int64, with P >= 1.

        num_cached: positions, from 0 on, whose keys and values are cached already, fewer than P.
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
        self._issued.clear()
        self.tokens[lane] = self.pad_id
        self.tokens[lane, :first] = prompt
        self.tokens[lane, first:length] = UNKNOWN
        self.logprobs[lane], self.steps[lane] = torch.nan, 0
        if self._session is not None:
            self._session.reset(lane)
        return row

    @property
    def live(self) -> list[int]:
        """The lanes of the next pass."""
        return [b for b, row in enumerate(self.rows) if not row.done]

    def release(self, lane: int) -> None:
        """Forget the lane's sequence."""
        self.rows[lane] = IDLE
        self._issued.clear()

    def enter(self, finished: list[int]) -> None:
        """Do nothing: an autoregressive sequence has no blocks."""

    def _suppress(self, ids: Tensor | None) -> Tensor | None:
        """The ids as a tensor on the device, the same object for the same ids."""
        if ids is None or not len(ids):
            return None
        key = tuple(ids.unique().tolist())
        if key not in self._suppressed:
            if len(self._suppressed) == 64:
                self._suppressed.clear()
            self._suppressed[key] = torch.tensor(key, device=self.device)
        return self._suppressed[key]

    # --- a pass -------------------------------------------------------------------------------------

    def step(self, lanes: Sequence[int] | None = None) -> list[int]:
        """Draft and verify once for every sequence that is not done (of `lanes`); return their lanes, each of
        which has new tokens.

        If the model, the drafter or `accept` raises, every sequence is left as it was before the call.
        """
        live = self.live if lanes is None else [b for b in self.live if b in lanes]
        if not live:
            return []
        before = [vars(self.rows[b]).copy() for b in live], self.forwards, self.draft_forwards
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
                vars(self.rows[b]).update(row)
            self._issued.clear()
            raise
        for b in live:
            # A draft of riders alone does not show how many guesses are accepted.
            if sizes.get(b) and (drafts[b].tokens or not drafts[b].riders):
                self._sizer.learn(sizes[b], len(found[b].tokens) - 1)
            self._advance(b, drafts[b], found[b])
        return live

    def _sizes(self, live: Sequence[int]) -> dict[int, int]:
        """The most rows of each draft, by lane. A lane whose prompt is computed has none, or riders alone."""
        if self._session is None:
            return {}
        size = min(self._sizer.size(len(live)), self._most)
        asked = [b for b in live if self._riders is not None or not self.rows[b].prefills]
        # One token less than there is room for: the pass adds the model's own choice.
        sizes = {b: min(size, self.rows[b].room - 1) for b in asked}
        return {b: most for b, most in sizes.items() if most > 0}

    def _drafts(self, sizes: dict[int, int]) -> dict[int, Draft]:
        """The drafts of the lanes in `sizes`."""
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
        """The lanes of each pass, whose drafts begin at one layer, and whether the pass is over trees."""
        if self.batch_invariant:
            return [([b], not drafts[b].is_chain) for b in live]
        found = []
        for start in sorted({drafts[b].start for b in live}):
            alike = [b for b in live if drafts[b].start == start]
            trees = [b for b in alike if not drafts[b].is_chain]
            chains = [b for b in alike if drafts[b].is_chain]
            if trees:  # a chain is a tree, too, but a prompt has too many rows for ancestor words
                trees += [b for b in chains if not self.rows[b].prefills]
                chains = [b for b in chains if self.rows[b].prefills]
            found += [(sorted(group), tree) for group, tree in ((chains, False), (trees, True)) if group]
        return found

    def _verify(self, drafts: dict[int, Draft], tree: bool) -> dict[int, Emitted]:
        """Run one pass over some sequences, which changes nothing but keys and values after the cached
        ones."""
        # A pass that computes a prompt does not measure the cost of a draft's size.
        prefills = any(self.rows[b].prefills for b in drafts)
        with nullcontext() if prefills else self._sizer.verifying():
            if self._issued and [b for b in self._issued[0].drafts if not self.rows[b].done] != [*drafts]:
                self._issued.clear()  # they were for other sequences
            if not self._issued:
                self._issued.append(self._issue(drafts, tree))
            while len(self._issued) <= self._ahead:
                coming = [b for b in drafts if self.rows[b].room > self._coming(b)]
                if not coming:
                    break
                self._issued.append(self._issue(dict.fromkeys(coming, Draft()), tree))
            issued = self._issued.popleft()
            numbers = issued.numbers()
        return self._look(drafts, issued.key, numbers)

    def _coming(self, b: int) -> int:
        """Issued passes over the sequence whose results have not been read; each emits one token."""
        return sum(b in issued.drafts for issued in self._issued)

    def _issue(self, drafts: dict[int, Draft], tree: bool) -> Issued:
        """Issue a pass after those already issued."""
        coming = {b: self._coming(b) for b in drafts}
        if self.graphs is not None and any(self.rows[b].nfe + coming[b] == 0 for b in drafts):
            # The weights of the model or the drafter may have moved.
            of_model, of_drafter = self.model.addresses(), self._owned and self._owned.addresses()
            self.graphs.drop_stale(of_model if of_model is None else [*of_model, *(of_drafter or ())])
        inputs, key = self._inputs(drafts, tree, coming)
        compute = functools.partial(self._compute, key)
        if self.graphs is None or self.graphs.addresses is None:
            result = compute(inputs.to(self.device, non_blocking=True))
        else:
            few = key.shapes[0][0] <= self._recorded_rows
            result = self.graphs.run(key.key if few else None, inputs, compute, device=self.device, held=key)
        there = None
        if self.device.type == "cuda":
            # Copied now, into pinned memory: a copy issued later would wait for later passes.
            result = result.to("cpu", non_blocking=True)
            there = torch.cuda.current_stream(self.device).record_event()
        return Issued(drafts, key, result, there)

    def _inputs(self, drafts: dict[int, Draft], tree: bool, coming: dict[int, int]) -> tuple[Tensor, PassKey]:
        """All that the device needs from the host, (n,) int64 on the CPU, and the key that says how to read
        it.

        There are N packed tokens of the pass, B lanes, and M rows whose logits are needed: of each lane the
        root and the nodes, which are verified, and then its riders, which are not.

        coming: for each lane, the tokens of issued passes whose results have not been read.
        """
        lanes, width, pad_to = len(self.rows), self.tokens.shape[1], self._pad_to
        spans: list[Span] = []
        ids: list[int] = []
        unknown: list[tuple[int, int]] = []  # (index in ids, the lane whose last token belongs there)
        source: list[int] = []
        token: list[int] = []
        parent: list[int] = []
        keys: list[int] = []
        parents: list[tuple[int, ...]] = []
        groups: dict[tuple[Any, ...], tuple[SamplingGroup, list[int]]] = {}  # each with the edges of B lanes
        room, bases = [row.room for row in self.rows], [row.known - 1 for row in self.rows]
        offset, rows, riding_along, logprobs = 0, 1, False, False
        for b, draft in drafts.items():
            row, first, nodes, size = self.rows[b], len(source), draft.tokens, draft.size
            known, start = row.known, row.num_cached
            if coming[b]:
                known += coming[b]
                start = known - 1
                room[b] -= coming[b]
                bases[b] = known - 1
                unknown.append((len(ids), b))
                ids.append(0)
                root = 0
            else:
                ids += self._ids[b * width + start : b * width + known]
                root = ids[-1]
            spans.append(Span(b, start, known + size, known + size))
            offset += known - start
            source.append(offset - 1)
            offset += size
            token.append(root)
            seed, number = row.settings.key
            if size:
                riders = size - len(nodes)
                riding_along |= riders > 0
                rows = max(rows, 1 + len(nodes))
                ids += nodes
                source += range(source[-1] + 1, source[-1] + 1 + size)
                token += nodes
                parent += draft.verified_rows
                for depth in _depths(draft):  # row r chooses the token at position known + depth
                    keys += (seed, number, known + depth, 0)
                # `accept` does not read the rows of riders.
                token += [0] * riders
                parent += [-1] * riders
                keys += [0] * (4 * riders)
                end = len(source) - riders
            else:
                parent.append(-1)
                keys += (seed, number, known, 0)
                end = len(source)
            if tree:
                parents.append(draft.rows)
            group = row.sampling
            _, edges = groups.setdefault(group.key, (group, [0] * (2 * lanes)))
            edges[b], edges[lanes + b] = first, end
            logprobs |= row.settings.record
        packing, wanted = Packing(), len(source)
        trees = parents if tree else None
        tokens, max_q_len, max_kv_len = self.kv_cache.put(packing, spans, pad_to, parents=trees)
        joined: tuple[Tensor, ...] = ()
        if riding_along:
            assert self._riders is not None
            own = {b: self.rows[b] for b in drafts}
            joined, tokens = riding.inputs(self._riders, self.kv_cache, own, drafts, tree, wanted, pad_to)
        more = 0 if pad_to is None else pad_to(wanted) - wanted
        packing.add(ids)
        packing.repeat(0, tokens - len(ids))
        packing.close(tokens)
        if unknown:
            places = list(range(tokens))
            for place, b in unknown:
                places[place] = tokens + b
            packing.add(places)
        packing.close(tokens if unknown else 0)
        for numbers, none in ((source, 0), (token, 0), (parent, -1)):
            packing.add(numbers)
            packing.repeat(none, more)
            packing.close(wanted + more)
        packing.add(keys)
        packing.repeat(0, 4 * more)
        packing.close(wanted + more, 4)
        for _, edges in groups.values():
            packing.add(edges)
        packing.close(len(groups), 2, lanes)
        packing.add(room)
        packing.close(lanes)
        eos = [row.eos_ids for row in self.rows]
        most = max(1, *map(len, eos))
        for each in eos:
            packing.add(each)
            packing.repeat(UNKNOWN, most - len(each))
        packing.close(lanes, most)
        packing.add(bases)
        packing.close(lanes)
        if tree:
            packing.tensors((self.kv_cache.block_table,))
        else:
            packing.close(0, 0)
        packing.tensors(joined)
        inputs, shapes = packing.pack()
        if self.device.type == "cuda":
            inputs = inputs.pin_memory()  # else the copy to the device may wait for earlier passes
        if pad_to is not None:
            rows = 1 << (rows - 1).bit_length()
        return inputs, PassKey(
            shapes,
            max_q_len,
            max_kv_len,
            rows,
            next(iter(drafts.values())).start,
            tree,
            len(joined),
            self._last is not None,
            logprobs,
            tuple(group for group, _ in groups.values()),
        )

    def _compute(self, key: PassKey, inputs: Tensor) -> Tensor:
        tensors = unpack(inputs, key.shapes)
        tensors, joined = tensors[: len(tensors) - key.riders], tensors[len(tensors) - key.riders :]
        *given, ids, places, source, token, parent, keys, edges, room, eos_ids, bases, table = tensors
        metadata = AttentionMetadata(key.max_q_len, key.max_kv_len, *given, causal=not key.tree)
        taps = Taps(() if self._session is None else self._session.taps)
        if len(places):
            assert self._last is not None
            ids = torch.cat((ids, self._last))[places]
        with own_precision(self.model, self.device):
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
        if key.follows:
            assert self._last is not None
            # A bad row has no choice: later passes over its lane are not read, so any token will do.
            torch.clamp(tokens[:, 0], min=0, out=self._last)
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
        """(B, D) int64 each: the slots of a path's keys and values, and the slots to move them to; -1:
        none."""
        places = torch.arange(path.shape[1], device=path.device)
        size = self.kv_cache.page_size

        def slots(place: Tensor) -> Tensor:
            page = table.gather(1, (place // size).clamp(0, table.shape[1] - 1))
            return (page * size + place % size).masked_fill((path < 0) | (path == places), -1)

        return slots(bases[:, None] + path), slots(bases[:, None] + places)

    def _look(self, drafts: dict[int, Draft], key: PassKey, numbers: list[int]) -> dict[int, Emitted]:
        """The emitted tokens in a pass's result. Raises ValueError for a bad row on a path."""
        lanes, width = len(self.rows), key.rows
        error, count, rest = numbers[:lanes], numbers[lanes : 2 * lanes], numbers[2 * lanes :]
        if (first := min(error[b] for b in drafts)) != NO_ERROR:

            def where(at: int) -> str:
                lane, row = at >> 31, at & 0x7FFFFFFF
                return f"sequence {lane} at position {self.rows[lane].known + _depths(drafts[lane])[row]}"

            explain(first, where)
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

    # --- commit ---------------------------------------------------------------------------------------

    def _advance(self, b: int, draft: Draft, emitted: Emitted) -> None:
        """Update sequence b by the tokens that a pass has emitted."""
        row, count = self.rows[b], len(emitted.tokens)
        if self._session is not None:
            self._session.guessed(b, emitted.riders, emitted.guessed)
        if draft.tokens:
            self.counts.add(max(_depths(draft)), count - 1)
        row.layers += draft.layers + self.model.shape.layers - draft.start
        row.judged(Verified(len(draft.tokens), count - 1, draft.refused(emitted.tokens)))
        self.commit(b, emitted.tokens, emitted.logprobs)

    def commit(self, b: int, tokens: Sequence[int], logprobs: Sequence[float]) -> None:
        """Append the tokens of a pass to sequence b, up to its end.

        logprobs: of each token, if the sequence is recorded.
        """
        row, count = self.rows[b], len(tokens)
        start = row.known
        row.nfe += 1
        row.num_cached = row.known + count - 1
        row.known += count
        lane = b * self.tokens.shape[1]  # where the sequence begins in `_ids`
        self._ids[lane + start : lane + row.known] = array("q", tokens)
        if row.settings.record:
            self.logprobs[b, start : row.known] = torch.tensor(logprobs)
            self.steps[b, start : row.known] = row.nfe
        ended = None
        if row.settings.stop or not set(row.eos_ids).isdisjoint(tokens):
            # A stop sequence that ends at a new token begins among the last tokens.
            reach = max((len(stop) for stop in row.settings.stop), default=1)
            first = max(row.prompt, start - reach + 1)
            ended = row.first_end(self._ids[lane + first : lane + row.known].tolist(), first, start)
        if ended is not None:
            begin, end = ended
            row.kept, row.stopped = row.index(begin), True
            row.known, row.num_cached = end, min(row.num_cached, end - 1)
            self.logprobs[b, end:], self.steps[b, end:] = torch.nan, 0
        if row.stopped or not row.room:
            row.done = True
            self.tokens[b, row.known :] = self.pad_id


def _depths(draft: Draft) -> Sequence[int]:
    """The depths of the root, which is 0, and of the nodes."""
    if draft.parents is None:
        return range(len(draft.tokens) + 1)
    depths = [0]
    for node in range(1, len(draft.tokens) + 1):
        depths.append(1 + depths[draft.parents[node - 1]])
    return depths
