"""A batch of sequences that are decoded together, each with its own length, block and policy.

The semantics are the published decoders' (LLaDA, Fast-dLLM, dParallel, SDAR): blocks are decoded left to
right; each pass computes logits for a span of positions, and a policy commits some of the block's masked
positions. Only the work differs: the LM head and the statistics touch the masked rows of the blocks alone,
and a complete sequence is in no pass.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import policies
from ..cache import KVCache
from ..models import Model
from .inputs import SequenceWork
from .runner import Counts, Runner
from .schedule import Schedule, Window
from .sequence import IDLE, SequenceState, reads
from .sequence_settings import SequenceSettings
from .workspace import Workspace


class Batch:
    """Sequences in lanes, and the passes over them; `admit` puts a sequence into a lane.

    Args:
        lanes, width: the number of sequences, and the length of the longest.
        schedule: says which positions a pass computes, and which windows it may fill.
        pad_id: the token behind a sequence's end.
        batch_invariant: give each sequence passes of its own.
        graphs: on a GPU, record the passes of one `GraphKey` once and replay them, see `graphs`.
        ahead: the most passes to issue before the host waits for the device. Passes are issued ahead as long
            as no policy's choice can complete a block before the last of them: a pass beyond a complete block
            would be wasted, and costs more than the wait that it saves.
        kv_cache: a cache for so many lanes and positions; default: a contiguous one.
    """

    def __init__(
        self,
        model: Any,
        lanes: int,
        width: int,
        schedule: Schedule,
        mask_id: int,
        *,
        pad_id: int,
        device: torch.device | str = "cpu",
        batch_invariant: bool = False,
        graphs: bool = True,
        ahead: int = 1,
        kv_cache: KVCache | None = None,
    ) -> None:
        self.model, self.schedule, self.mask_id, self.pad_id = model, schedule, mask_id, pad_id
        self.batch_invariant, self.ahead = batch_invariant, ahead
        self.sequences = [IDLE] * lanes
        self.forwards = 0
        self.draft_forwards = 0  # nothing is guessed here
        native, space = isinstance(model, Model), None
        if native and kv_cache is None:
            if graphs:
                space = Workspace.take(model, lanes, width, mask_id, cached=schedule.keeps)
            if space is None:
                kv_cache = model.new_cache(lanes, width, kept=schedule.keeps)
        if space is None:
            tokens = torch.empty((lanes, width), dtype=torch.int64, device=device)
            space = Workspace.of(tokens, kv_cache, graphs=graphs and native)
        self._workspace = space
        self.tokens = space.tokens.fill_(pad_id)[:, :width]  # a workspace may be wider
        self.kv_cache, self.trajectory = space.kv_cache, space.trajectory
        self.runner = Runner(model, space, mask_id, schedule)

    def keep(self) -> None:
        """Leave the workspace to the model's next batch of this size, which replays these recordings.

        This batch is over then: its tensors belong to the next.
        """
        self._workspace.keep(self.model)

    def admit(
        self,
        lane: int,
        prompt: Tensor,
        gen_length: int,
        settings: SequenceSettings,
        *,
        masked: Sequence[int] = (),
        num_cached: int = 0,
    ) -> SequenceState:
        """Begin a sequence: `gen_length` tokens after `prompt` (P,) int64, in place of the lane's last
        sequence.

        `masked`: columns of the prompt that hold masks and are filled too, ascending. `num_cached`: positions
        whose keys and values are cached already, where the schedule stores blocks.

        Raises ValueError where `steps` does not divide into the blocks.
        """
        first = len(prompt)
        layout = self.schedule.lay_out(first, gen_length, settings.steps, masked)
        published = self.schedule.published_prefills(layout)
        sampling = settings.sampling(self.runner.suppress(settings.suppress))
        kept = len(layout.columns)
        sequence = SequenceState(
            first, layout, settings, sampling, kept, published=published, num_cached=num_cached
        )
        self.sequences[lane] = sequence
        if settings.top_logprobs:
            self.trajectory.hold_top()
        if settings.record:
            self.trajectory.clear(lane)
        if settings.rule is not None:
            used = {other.settings.rule for other in self.sequences if other.settings.rule is not None}
            self.runner.begin(lane, settings.rule, layout.columns, used)
        self.tokens[lane, :first] = prompt
        self.tokens[lane, first : sequence.length].fill_(self.mask_id)
        self._enter(lane)
        return sequence

    @property
    def nfe(self) -> list[int]:
        """Passes that each sequence has been in."""
        return [sequence.nfe for sequence in self.sequences]

    @property
    def live(self) -> list[int]:
        """The lanes of the next pass."""
        return [b for b, s in enumerate(self.sequences) if not s.done and not s.between_blocks]

    def _enter(self, b: int) -> None:
        """Begin the front block."""
        sequence = self.sequences[b]
        self.open_front(sequence)
        # Its rule may have filled some of the masks already.
        if sequence.open and reads(sequence, "response"):
            block = sequence.open[0]
            ids = self.tokens[b, block.start : block.end].tolist()
            left = ids.count(self.mask_id)
            first = block.start + (ids.index(self.mask_id) if left else 0)
            sequence.open = (block._replace(masks_left=left, first_mask=first),)

    def open_front(self, sequence: SequenceState) -> None:
        """Open the front block unless it is open already, and the blocks behind it that are due."""
        sequence.step_in_block, sequence.between_blocks, sequence.edits = 0, False, 0
        if sequence.done:
            sequence.open = ()
            return
        sequence.open = sequence.open or (sequence.opened(sequence.block_index),)
        self._open_more(sequence)

    def _open_more(self, sequence: SequenceState) -> None:
        """Open the blocks behind the open ones that are due."""
        while self.schedule.opens(sequence):
            sequence.open = (*sequence.open, sequence.opened(sequence.block_index + len(sequence.open)))

    def release(self, lane: int) -> None:
        """Forget the lane's sequence."""
        self.sequences[lane] = IDLE

    def end(self, b: int) -> None:
        """Complete sequence b early: all from its front block's first mask to its last mask becomes
        padding."""
        sequence = self.sequences[b]
        start, end = sequence.ahead, sequence.columns[-1] + 1
        self.tokens[b, start:end].fill_(self.pad_id)
        if sequence.settings.record:
            # Passes may have committed some of them, in blocks behind the front one.
            self.trajectory.clear(b, start, end)
        sequence.block_index, sequence.open = len(sequence.blocks), ()

    def _fill(self, b: int, start: int, end: int) -> None:
        """Replace the masks in columns [start, end) by padding."""
        padding = self.tokens[b, start:end]
        padding.masked_fill_(padding == self.mask_id, self.pad_id)

    def step(self, lanes: Sequence[int] | None = None) -> list[int]:
        """Run a pass, or several ahead, over every sequence that is not done (of `lanes`); return those whose
        block it completed.

        If the model, a policy or `unmask_` raises, every sequence is left as it was before the call.
        """
        live = self.live if lanes is None else [b for b in self.live if b in lanes]
        before = [vars(self.sequences[b]).copy() for b in live], self.tokens.clone(), self.forwards
        states = self._rule_states(live)
        saved_states = [state.clone() for state in states]
        try:
            return self._step(live, min(self.ahead, self._certain(live)))
        except BaseException:
            sequences, tokens, self.forwards = before
            self.tokens.copy_(tokens)
            for state, saved in zip(states, saved_states, strict=True):
                state.copy_(saved)
            for b, sequence in zip(live, sequences, strict=True):
                vars(self.sequences[b]).update(sequence)
            raise

    def _rule_states(self, live: list[int]) -> list[Tensor]:
        """The state tensors of these sequences' rules."""
        rules = {rule: None for b in live if (rule := self.sequences[b].settings.rule) is not None}
        return [state for rule in rules for state in self.runner.states[rule]]

    def _certain(self, live: list[int]) -> int:
        """How many passes can be issued in a row, such that no block can be complete before the last."""
        sequences = [self.sequences[b] for b in live]
        rules = [s.settings.rule for s in sequences if s.settings.rule is not None]
        free = any(not rule.by_row for rule in rules)
        ending = any(s.settings.eos_ids for s in sequences)
        if self.schedule.first_mask_matters or free or ending:
            return 1
        most = [policies.most(s.policy(s.open[0])) for s in sequences]
        passes = [max(1, math.ceil(s.masks_left / n)) for s, n in zip(sequences, most, strict=True)]
        return min(passes, default=1)

    def _step(self, live: list[int], passes: int) -> list[int]:
        groups, results = self._groups(live), []
        for _ in range(passes):
            for group in groups:
                results.append(self.runner.run(self.sequences, self._work(group, self.sequences)))
                self.forwards += 1
            for b in live:
                self._count_pass(self.sequences[b])
        if len(groups) == 1 and self.runner.packer.static_shapes:
            # While the device computes, prepare the passes that may come next. After a prefill-only pass
            # spans are empty: where the first mask is now, the host does not know yet.
            for sequences in self._coming(live, passes):
                coming = self._work([b for b in live if not sequences[b].done], sequences)
                if coming and all(work.spans for work in coming.values()):
                    self.runner.prepare(sequences, coming)
        seen = self.runner.read_counts(self.sequences, results)
        last = zip(groups, seen[-len(groups) :], strict=True)
        counts = {b: lanes[b] for group, lanes in last for b in group}
        return [b for b in live if self._advance(b, counts[b])]

    def _coming(self, live: list[int], passes: int) -> list[list[SequenceState]]:
        """The sequence states that the next pass may begin with.

        Where the issued passes complete a block for certain, the next block is in front. Where they only may,
        several sequences are prepared as they are now, and a single sequence both ways, the likelier first.

        passes: how many were issued whose results have not been read.
        """
        states = [self.sequences.copy()]
        for b in live:
            sequence = self.sequences[b]
            if sequence.edited or reads(sequence, "response"):  # its rule may fill other blocks, too
                continue
            least, most = self._commits(sequence, passes)
            if sequence.masks_left > (most if len(live) == 1 else least):
                continue
            after = copy.copy(sequence)
            after.leave_front()
            self.open_front(after)
            if sequence.masks_left <= least:
                states[0][b] = after
            else:
                # At its pace so far.
                likely = sequence.masks_left * (sequence.nfe - passes) <= sequence.decoded * passes
                states.insert(0 if likely else 1, [*self.sequences[:b], after, *self.sequences[b + 1 :]])
        return states

    def _commits(self, sequence: SequenceState, passes: int) -> tuple[float, float]:
        """The fewest and the most masks of the front block that the last `passes` passes commit."""
        if sequence.settings.rule is not None and not sequence.settings.rule.by_row:
            return passes, math.inf
        front = sequence.open[0]
        each = [sequence.policy(front._replace(step=step)) for step in range(front.step - passes, front.step)]
        least = passes if self.schedule.first_mask_matters else sum(map(policies.least, each))
        return least, sum(map(policies.most, each))

    def _count_pass(self, sequence: SequenceState) -> None:
        """Count a pass over the sequence that was issued."""
        prefill_only = self.schedule.prefill_only(sequence)
        # A published loop's second pass over a block is none.
        sequence.nfe += sequence.masks_left > 0 or sequence.edits > 0
        sequence.published += not prefill_only
        sequence.step_in_block += not prefill_only
        sequence.open = tuple(block._replace(step=block.step + (not prefill_only)) for block in sequence.open)
        sequence.num_cached = self.schedule.stored(sequence)

    def _advance(self, b: int, counted: Counts) -> bool:
        """Update sequence b by a pass's counts; return whether its front block is complete."""
        sequence = self.sequences[b]
        counts = counted.blocks[: len(self._counted(sequence))]
        sequence.open = tuple(
            block._replace(masks_left=left, first_mask=first if left else block.start, changed=changed > 0)
            for block, (left, first, changed) in zip(sequence.open, counts, strict=False)
        )
        at = next((i for i, block in enumerate(sequence.open) if block.masks_left), 0)
        block = sequence.open[at]  # that has the first mask; those before are complete
        end = counted.end if sequence.settings.eos_ids and not sequence.edited else None
        if end is not None and block.start <= end < block.first_mask:  # all in front of the EOS is final
            self._fill(b, block.start, block.end)
            sequence.generated -= block.masks_left
            sequence.open = (*sequence.open[:at], block._replace(masks_left=0), *sequence.open[at + 1 :])
            counts = [(0, block.start, 0)] * (at + 1)
        is_over = self.schedule.is_over(sequence)
        if not is_over or sequence.edits_on:
            sequence.edits += is_over
            self._open_more(sequence)
            return False
        sequence.published += self.schedule.published_passes(sequence)
        sequence.between_blocks = True
        for left, _, _ in counts:  # blocks behind the front one may be complete, too
            if left or sequence.done:
                break
            start, end = sequence.leave_front()
            if (sequence.settings.eos_ids or sequence.settings.stop) and self._stops(b, start, end):
                self.end(b)
        return True

    def _work(self, lanes: list[int], sequences: Sequence[SequenceState]) -> dict[int, SequenceWork]:
        """The work of the next pass, by lane."""
        work = {}
        for b in lanes:
            sequence = sequences[b]
            first, last = self.schedule.computed(sequence)
            spans, onward = self.schedule.spans(b, sequence), self.schedule.sees_onward(sequence)
            windows = self.schedule.windows(sequence)
            read = [self._read(sequence, window, first, last) for window in windows]
            ending = (0, 0)
            if sequence.settings.eos_ids:
                ending = max(sequence.last_run, sequence.block[0]), sequence.open[-1].end
            work[b] = SequenceWork(spans, windows, read, self._counted(sequence), ending, onward)
        return work

    def _counted(self, sequence: SequenceState) -> list[tuple[int, int]]:
        """Columns of the blocks to count: the open blocks, or all unfinished blocks if a rule may fill
        them."""
        if reads(sequence, "response"):
            return sequence.blocks[sequence.block_index :]
        return [(block.start, block.end) for block in sequence.open]

    def _stops(self, b: int, start: int, end: int) -> bool:
        """Whether EOS or a stop sequence ends in columns [start, end); if so, `kept` is where the first to
        end begins, of two that end together the longer. Tokens behind an EOS are filling, and no text.

        Only the last run of masks is searched: text decoded in front of a given token does not end there.
        """
        sequence = self.sequences[b]
        longest = max((len(stop) for stop in sequence.settings.stop), default=1)
        first = max(sequence.last_run, start - longest + 1)
        ids = self.tokens[b, first : min(end, sequence.columns[-1] + 1)].tolist()
        ending = sequence.settings.first_ending(ids, first, first)
        if ending is not None:
            sequence.kept, sequence.stopped = sequence.index(ending[0]), True
        return sequence.stopped

    def enter(self, finished: list[int]) -> None:
        """Let the sequences that `step` returned begin their next block."""
        for b in finished:
            self._enter(b)

    def _read(self, sequence: SequenceState, window: Window, first: int, last: int) -> tuple[int, int]:
        """Columns [start, end) that the sequence's rule reads, in a pass over positions [first, last).

        With shifted logits the position in front of a column has its logits: the pass has none for column
        `first`, whose token is then known.
        """
        rule, schedule = sequence.settings.rule, self.schedule
        if rule is None or rule.reads == "masked" or schedule.prefill_only(sequence):
            return window.start, window.end
        start, end = window.block[:2]
        if rule.reads == "response" and schedule.to_the_end:
            start, end = sequence.columns[0], sequence.length
        elif (
            start
            and schedule.shift
            and schedule.prefill_predicts_next
            and sequence.layout.start_of_block(start) == start
        ):
            start += 1  # its logits are in the block before, which passes with cache "block" do not compute
        elif (
            sequence.edited
            and schedule.shift
            and schedule.keeps
            and not schedule.block_causal
            and sequence.step_in_block
        ):
            start += 1  # a token that was remasked there would have no logits in the next pass
        first += first > 0 and schedule.shift
        return max(start, first), min(end, last)

    def _groups(self, live: list[int]) -> list[list[int]]:
        """The live lanes, grouped by the pass that they share."""
        if self.batch_invariant:
            return [[b] for b in live]
        if self.schedule.onward:  # some see onward, and some both ways
            stores = [b for b in live if self.schedule.prefill_only(self.sequences[b])]
            fills = [b for b in live if b not in stores]
            return [group for group in (stores, fills) if group]
        if isinstance(self.model, Model):
            return [live]
        by_length: dict[int, list[int]] = {}
        for b in live:
            by_length.setdefault(self.sequences[b].length, []).append(b)
        return list(by_length.values())
