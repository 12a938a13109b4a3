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
from array import array
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cache import KVCache
from ..decoding import padding
from ..decoding.sequence_settings import SequenceSettings
from ..decoding.workspace import Trajectory, Workspace
from ..models import Model
from ..types import RowTopK
from .draft import Draft, check_drafts, depths
from .drafter import Apart, Drafter, DraftSession, KeepsStreams, Lane, check_session
from .runner import CausalRunner, Emitted, Issued
from .sequence import IDLE, UNKNOWN, CausalSequence, Verified
from .sizing import Fixed, Sizer


@dataclass
class AcceptanceCounts:
    """Drafted and accepted tokens by the depth of their nodes; index 0 is for the root's children."""

    drafted: list[int]
    """Passes whose draft reached this depth."""
    accepted: list[int]
    """How many of these passes accepted a token of the draft at this depth."""

    def add(self, depth: int, taken: int) -> None:
        """Count a pass whose draft reached `depth`, and of which `taken` tokens were accepted."""
        missing = depth - len(self.drafted)
        self.drafted += [0] * missing
        self.accepted += [0] * missing
        for at in range(depth):
            self.drafted[at] += 1
            self.accepted[at] += at < taken


class Drafted(NamedTuple):
    """The draft of a sequence in one `step`, and the tokens that the pass emitted."""

    size: int
    """The most rows that its draft could have; 0 if none was asked for."""
    draft: Draft
    emitted: Emitted


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
            pass before them. A sequence's end is noticed `ahead` passes late; those passes are wasted, and do
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
        self.trajectory = Trajectory.blank(self.tokens)
        """On the CPU; written for sequences whose settings record it."""
        device, owner = model.device, None if isinstance(drafter, Apart) else drafter
        space = None
        if kv_cache is None and graphs:
            space = Workspace.take(model, lanes, width, UNKNOWN, cached=True, drafter=owner)
        if space is None:
            kv_cache = model.new_cache(lanes, width) if kv_cache is None else kv_cache
            space = Workspace.of(
                torch.zeros((lanes, 1), dtype=torch.int64, device=device), kv_cache, graphs=graphs
            )
        assert space.kv_cache is not None
        self._workspace = space
        self.kv_cache = space.kv_cache
        self.sequences: list[CausalSequence] = [IDLE] * lanes
        self.forwards = 0
        self.draft_forwards = 0
        self.counts = AcceptanceCounts([], [])
        self._most = 0 if drafter is None else drafter.most
        self._session: DraftSession = DraftSession() if space.session is None else space.session
        """Without a drafter, a session that drafts nothing."""
        if space.session is not None:
            self._session.begin()
        elif drafter is not None:
            self._session = drafter.session(model, self.kv_cache, lanes, graphs=graphs)
            check_session(drafter, self._session, model)
        space.session = None if owner is None else self._session
        self._keeps_streams = isinstance(self._session, KeepsStreams)
        self._sizer: Sizer = Fixed(self._most) if sizer is None else sizer
        self._suppress = space.suppress
        may = drafter is None and not batch_invariant and padding.runs_ahead(device)
        self._ahead = ahead if may else 0
        self._runner = CausalRunner(model, self._ids, width, space, self._session, follows=self._ahead > 0)
        self._issued: collections.deque[Issued] = collections.deque()
        """Passes whose results have not been read, the oldest first."""

    def keep(self) -> None:
        """Leave the workspace to the model's next batch of this size, see `Batch.keep`."""
        self._workspace.keep(self.model)

    def admit(
        self,
        lane: int,
        prompt: Tensor,
        gen_length: int,
        settings: SequenceSettings,
        *,
        num_cached: int = 0,
    ) -> CausalSequence:
        """Begin a sequence: up to `gen_length` tokens after `prompt` (P,) int64, with P >= 1.

        num_cached: positions, from 0 on, whose keys and values are cached already, fewer than P.
        """
        first, length = len(prompt), len(prompt) + gen_length
        sequence = CausalSequence(
            first,
            length,
            settings,
            settings.sampling(self._suppress(settings.suppress, device=self.model.device)),
            known=first,
            num_cached=num_cached,
            kept=gen_length,
            done=gen_length == 0,
        )
        self.sequences[lane] = sequence
        self._issued.clear()  # they may be for the lane's last sequence
        self.tokens[lane] = self.pad_id
        self.tokens[lane, :first] = prompt
        self.tokens[lane, first:length] = UNKNOWN
        if settings.top_logprobs:
            self.trajectory.hold_top()
        self.trajectory.clear(lane)
        self._session.reset(lane)
        return sequence

    @property
    def nfe(self) -> list[int]:
        """Passes that each sequence has been in."""
        return [sequence.nfe for sequence in self.sequences]

    @property
    def live(self) -> list[int]:
        """The lanes of the next pass."""
        return [b for b, sequence in enumerate(self.sequences) if not sequence.done]

    def release(self, lane: int) -> None:
        """Forget the lane's sequence."""
        self.sequences[lane] = IDLE

    def enter(self, finished: list[int]) -> None:
        """Do nothing: an autoregressive sequence has no blocks."""

    # --- a pass -------------------------------------------------------------------------------------

    def step(self, lanes: Sequence[int] | None = None) -> list[int]:
        """Draft and verify once for every sequence that is not done (of `lanes`); return their lanes, each of
        which has new tokens.

        If the model, the drafter or `accept` raises, every sequence is left as it was before the call.
        """
        live = self.live if lanes is None else [b for b in self.live if b in lanes]
        if not live:
            return []
        before = self.forwards, self.draft_forwards
        try:
            results = self._run(live)
        except BaseException:
            self.forwards, self.draft_forwards = before
            self._issued.clear()
            raise
        for b in live:
            self._advance(b, results[b])
        return live

    def _run(self, live: Sequence[int]) -> Mapping[int, Any]:
        """Run passes over some lanes, which change no sequence; return the arguments of `_advance`, by
        lane."""
        sizes = self._sizes(live)
        drafts = dict.fromkeys(live, Draft()) | self._drafts(sizes)
        results: dict[int, Drafted] = {}
        for group, tree in self._groups(live, drafts):
            of_group = self._verify({b: drafts[b] for b in group}, tree)
            results |= {b: Drafted(sizes.get(b, 0), drafts[b], of_group[b]) for b in group}
            self.forwards += 1
        # Before any sequence changes, since a drafter may raise.
        for b, (size, draft, emitted) in results.items():
            self._session.guessed(b, emitted.riders, emitted.guessed)
            # A draft of riders alone does not show how many guesses are accepted.
            if size and (draft.tokens or not draft.riders):
                self._sizer.learn(size, len(emitted.tokens) - 1)
        return results

    def _sizes(self, live: Sequence[int]) -> dict[int, int]:
        """The most rows of each draft, by lane. A lane whose prompt is computed has none, or riders alone."""
        size = min(self._sizer.size(len(live)), self._most)
        asked = [b for b in live if self._session.riders is not None or not self.sequences[b].prefills]
        # One token less than there is room for: the pass adds the model's own choice.
        sizes = {b: min(size, self.sequences[b].room - 1) for b in asked}
        return {b: most for b, most in sizes.items() if most > 0}

    def _drafts(self, sizes: dict[int, int]) -> dict[int, Draft]:
        """The drafts of the lanes in `sizes`."""
        if not sizes:
            return {}
        sequences = [(b, self.sequences[b]) for b in sizes]
        views = [
            Lane(
                b,
                self._known(b),
                sequence.length,
                sequence.sampling,
                sequence.settings.key,
                sequence.settings.eos_ids,
                sequence.settings.automaton,
                sequence.state,
            )
            for b, sequence in sequences
        ]
        drafts: list[Draft] = []
        with self._sizer.drafting():
            one_by_one = [slice(i, i + 1) for i in range(len(sequences))]
            for part in one_by_one if self.batch_invariant else [slice(None)]:
                proposed = self._session.propose(views[part], list(sizes.values())[part])
                if not isinstance(proposed, Sequence):
                    raise ValueError(f"drafter: expected a list of drafts, got {type(proposed).__name__}")
                drafts += proposed
        prefilling = [b for b in sizes if self.sequences[b].prefills]
        riders = self._session.riders
        check_drafts(
            drafts,
            list(sizes),
            list(sizes.values()),
            self.model.shape,
            0 if riders is None else riders.most,
            prefilling,
            self._keeps_streams,
        )
        drafting = len(sizes) - len(prefilling)
        self.draft_forwards += drafting if self.batch_invariant else drafting > 0
        return dict(zip(sizes, drafts, strict=True))

    def _known(self, b: int) -> Tensor:
        """(n,) int64: a copy of the known tokens of sequence b, which a drafter may keep or change. To copy a
        slice of an array takes less time than to index a tensor."""
        first = b * self.tokens.shape[1]
        return torch.frombuffer(self._ids[first : first + self.sequences[b].known], dtype=torch.int64)

    def _groups(self, live: Sequence[int], drafts: dict[int, Draft]) -> list[tuple[list[int], bool]]:
        """The lanes of each pass, whose drafts begin at one layer, and whether the pass is over trees."""
        branching = {b for b in live if not drafts[b].is_chain}
        if self.batch_invariant:
            return [([b], b in branching) for b in live]
        groups = []
        for start in sorted({drafts[b].start for b in live}):
            chains, trees = [b for b in live if drafts[b].start == start], list[int]()
            if branching.intersection(chains):
                # A chain is a tree, too, but a prompt has too many rows for ancestor words.
                trees = [b for b in chains if b in branching or not self.sequences[b].prefills]
                chains = [b for b in chains if b not in trees]
            groups += [(group, tree) for group, tree in ((chains, False), (trees, True)) if group]
        return groups

    def _verify(self, drafts: dict[int, Draft], tree: bool) -> dict[int, Emitted]:
        """Run one pass over some sequences, which changes only keys and values behind the cached
        positions."""
        # A pass that computes a prompt does not measure the cost of a draft's size.
        prefills = any(self.sequences[b].prefills for b in drafts)
        with nullcontext() if prefills else self._sizer.verifying():
            coming = [b for b in self._issued[0].drafts if not self.sequences[b].done] if self._issued else []
            if coming != [*drafts]:
                self._issued.clear()  # they were for other sequences
            if not self._issued:
                self._issued.append(self._issue(drafts, tree))
            # An automaton's state, and what is penalized, is known once a pass's tokens are.
            waits = any(self.sequences[b].settings.reads_text for b in drafts)
            ahead = 0 if waits else self._ahead
            while len(self._issued) <= ahead:
                coming = [b for b in drafts if self.sequences[b].room > self._coming(b)]
                if not coming:
                    break
                self._issued.append(self._issue(dict.fromkeys(coming, Draft()), tree))
            issued = self._issued.popleft()
            numbers = issued.read()
        return self._runner.emitted(self.sequences, drafts, issued.key, numbers)

    def _coming(self, b: int) -> int:
        """Issued passes over the sequence whose results have not been read; each emits one token."""
        return sum(b in issued.drafts for issued in self._issued)

    def _issue(self, drafts: dict[int, Draft], tree: bool) -> Issued:
        """Issue a pass after those already issued."""
        return self._runner.issue(self.sequences, drafts, tree, {b: self._coming(b) for b in drafts})

    # --- commit ---------------------------------------------------------------------------------------

    def _advance(self, b: int, result: Any) -> None:
        """Update sequence b by the `Drafted` of a pass."""
        sequence, (size, draft, emitted) = self.sequences[b], result
        sequence.draft_nfe += bool(size) and not sequence.prefills
        sequence.layers += draft.layers + self.model.shape.layers - draft.start
        count = self.commit(b, emitted.tokens, emitted.logprobs, emitted.top)
        if draft.tokens:
            self.counts.add(max(depths(draft)), count - 1)
        sequence.judged(Verified(len(draft.tokens), count - 1, draft.refused(emitted.tokens[:count])))

    def commit(
        self, b: int, tokens: Sequence[int], logprobs: Sequence[float], top: RowTopK | None = None
    ) -> int:
        """Append the tokens of a pass to sequence b, up to its end; return how many these are.

        logprobs: of each token, if the sequence is recorded. top: of each token, if it has `top_logprobs`.
        """
        sequence, count = self.sequences[b], len(tokens)
        start = sequence.known
        sequence.nfe += 1
        sequence.known += count
        lane = b * self.tokens.shape[1]  # where the sequence begins in `_ids`
        self._ids[lane + start : lane + sequence.known] = array("q", tokens)
        if sequence.settings.record:
            logprob, new = torch.tensor(logprobs, device="cpu"), slice(start, sequence.known)
            self.trajectory.step[b, new] = sequence.nfe
            self.trajectory.confidence[b, new], self.trajectory.logprob[b, new] = logprob.exp(), logprob
            if top is not None and self.trajectory.top is not None:
                for field, values in zip(self.trajectory.top, top, strict=True):
                    field[b, new] = values
        ended = None
        if sequence.settings.stop or not set(sequence.settings.eos_ids).isdisjoint(tokens):
            # A stop sequence that ends at a new token begins among the last tokens.
            reach = max((len(stop) for stop in sequence.settings.stop), default=1)
            first = max(sequence.prompt, start - reach + 1)
            ids = self._ids[lane + first : lane + sequence.known].tolist()
            ended = sequence.settings.first_ending(ids, first, start)
        if ended is not None:
            begin, end = ended
            sequence.kept, sequence.stopped = sequence.index(begin), True
            sequence.known = end
            self.trajectory.clear(b, end)
        sequence.num_cached = sequence.known - 1
        if (automaton := sequence.settings.automaton) is not None:
            sequence.state = automaton.after(sequence.state, tokens[: sequence.known - start])
        if sequence.stopped or not sequence.room:
            sequence.done = True
            self.tokens[b, sequence.known :] = self.pad_id
        return sequence.known - start
