"""A batch of sequences that are decoded together, each with its own length, block and policy.

The semantics are those of the published decoders (LLaDA, Fast-dLLM, dParallel, SDAR): blocks are decoded left
to right; each pass computes logits for a span of positions, and a policy commits some of the block's masked
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
from .sequence import IDLE, SequenceState, Settings, lay_out, reads
from .workspace import Workspace

AHEAD = 8
"""The most passes that the host issues before it reads their results, where no result could change them."""


class Batch:
    """Sequences in lanes, and the passes over them; `admit` puts a sequence into a lane.

    Args:
        lanes, width: the number of sequences, and the length of the longest.
        schedule: says which positions a pass computes, and which windows it may fill.
        pad_id: the token behind a sequence's end.
        batch_invariant: give each sequence passes of its own.
        graphs: on a GPU, record the passes of one `GraphKey` once and replay them, see `graphs`.
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
        kv_cache: KVCache | None = None,
    ) -> None:
        self.model, self.schedule, self.mask_id, self.pad_id = model, schedule, mask_id, pad_id
        self.batch_invariant = batch_invariant
        self.rows = [IDLE] * lanes
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
        self._workspace: Workspace | None = space
        self.tokens = space.tokens.fill_(pad_id)[:, :width]  # a workspace may be wider
        self.kv_cache = space.kv_cache
        self.runner = Runner(model, space, mask_id, schedule)

    def keep(self) -> None:
        """Leave the workspace to the model's next batch of this size, which replays these recordings.

        This batch is over then: its tensors belong to the next.
        """
        space, self._workspace = self._workspace, None
        if space is not None:
            space.keep(self.model)

    def admit(
        self,
        lane: int,
        prompt: Tensor,
        gen_length: int,
        settings: Settings,
        *,
        masked: Sequence[int] = (),
        num_cached: int = 0,
    ) -> SequenceState:
        """Begin a sequence: `gen_length` tokens after `prompt` (P,) int64, in place of what the lane held.

        `masked`: columns of the prompt that hold masks and are filled too, ascending. `num_cached`: positions
        whose keys and values are cached already, where the schedule stores blocks.

        Raises ValueError where `steps` does not divide into the blocks.
        """
        first, size, schedule = len(prompt), self.schedule.block_length, self.schedule
        layout = lay_out(first, gen_length, size, schedule.aligned, settings.steps, masked)
        published = schedule.published_prefills(layout)
        sampling = settings.sampling(self.runner.suppress(settings.suppress))
        kept = len(layout.columns)
        row = SequenceState(
            first, layout, settings, sampling, kept, published=published, num_cached=num_cached
        )
        self.rows[lane] = row
        if settings.record:
            self.runner.trajectory.clear(lane)
        if settings.rule is not None:
            used = {other.settings.rule for other in self.rows if other.settings.rule is not None}
            self.runner.begin(lane, settings.rule, layout.columns, used)
        self.tokens[lane, :first] = prompt
        self.tokens[lane, first : row.length].fill_(self.mask_id)
        self._enter(lane)
        return row

    @property
    def logprobs(self) -> Tensor:
        """(lanes, width) float32: each token's log-probability, of sequences that record it."""
        return self.runner.trajectory.logprob

    @property
    def steps(self) -> Tensor:
        """(lanes, width) int64: the pass that committed each token, of sequences that record it."""
        return self.runner.trajectory.step

    @property
    def nfe(self) -> list[int]:
        """Passes that each sequence has been in."""
        return [row.nfe for row in self.rows]

    @property
    def live(self) -> list[int]:
        """The lanes of the next pass."""
        return [b for b, row in enumerate(self.rows) if not row.done and not row.between_blocks]

    def _enter(self, b: int) -> None:
        """Begin the front block."""
        row = self.rows[b]
        self.open_front(row)
        if row.open and reads(row, "response"):  # its rule may have filled some of the masks already
            block = row.open[0]
            ids = self.tokens[b, block.start : block.end].tolist()
            left = ids.count(self.mask_id)
            first = block.start + (ids.index(self.mask_id) if left else 0)
            row.open = (block._replace(masks_left=left, first_mask=first),)

    def open_front(self, row: SequenceState) -> None:
        """Open the front block unless it is open already, and the blocks behind it that are due."""
        row.step_in_block, row.between_blocks, row.edits = 0, False, 0
        if row.done:
            row.open = ()
            return
        row.open = row.open or (row.opened(row.block_index),)
        self._open_more(row)

    def _open_more(self, row: SequenceState) -> None:
        """Open the blocks behind the open ones that are due."""
        while self.schedule.opens(row):
            row.open = (*row.open, row.opened(row.block_index + len(row.open)))

    def release(self, lane: int) -> None:
        """Forget the lane's sequence."""
        self.rows[lane] = IDLE

    def end(self, b: int) -> None:
        """Complete sequence b early: all from its front block's first mask to its last mask becomes
        padding."""
        row = self.rows[b]
        if not row.done:
            start, end = row.ahead, row.columns[-1] + 1
            self.tokens[b, start:end].fill_(self.pad_id)
            if row.settings.record:  # passes may have committed some of them, in blocks behind the front one
                self.runner.trajectory.clear(b, start, end)
            row.block_index, row.open = len(row.blocks), ()

    def _fill(self, b: int, start: int, end: int) -> None:
        """Replace the masks in columns [start, end) by padding."""
        padding = self.tokens[b, start:end]
        padding.masked_fill_(padding == self.mask_id, self.pad_id)

    def step(self, lanes: Sequence[int] | None = None, ahead: int = 1) -> list[int]:
        """Run a pass over every sequence that is not done (of `lanes`); return those whose block it
        completed.

        ahead: the most passes to issue before the host waits for the device. Passes are issued ahead as long
            as no policy's choice can complete a block before the last of them: a pass beyond a complete block
            would be wasted, and costs more than the wait that it saves.

        If the model, a policy or `unmask_` raises, every sequence is left as it was before the call.
        """
        live = self.live if lanes is None else [b for b in self.live if b in lanes]
        before = [vars(self.rows[b]).copy() for b in live], self.tokens.clone(), self.forwards
        memory = self._memory(live)
        remembered = [kept.clone() for kept in memory]
        try:
            return self._step(live, min(ahead, self._certain(live)))
        except BaseException:
            rows, tokens, self.forwards = before
            self.tokens.copy_(tokens)
            for kept, old in zip(memory, remembered, strict=True):
                kept.copy_(old)
            for b, row in zip(live, rows, strict=True):
                vars(self.rows[b]).update(row)
            raise

    def _memory(self, live: list[int]) -> list[Tensor]:
        """The state tensors of these sequences' rules."""
        rules = {rule: None for b in live if (rule := self.rows[b].settings.rule) is not None}
        return [kept for rule in rules for kept in self.runner.states[rule]]

    def _certain(self, live: list[int]) -> int:
        """How many passes can be issued in a row, such that no block can be complete before the last."""
        rows = [self.rows[b] for b in live]
        free = [row for row in rows if row.settings.rule is not None and not row.settings.rule.by_row]
        ending = any(row.settings.eos_ids for row in rows)
        if self.schedule.first_mask_matters or free or ending:
            return 1
        most = [policies.most(row.policy(row.open[0])) for row in rows]
        return min(
            (max(1, math.ceil(row.masks_left / n)) for row, n in zip(rows, most, strict=True)), default=1
        )

    def _step(self, live: list[int], passes: int) -> list[int]:
        groups, results = self._groups(live), []
        for _ in range(passes):
            for group in groups:
                results.append(self.runner.run(self.rows, self._work(group, self.rows)))
                self.forwards += 1
            for b in live:
                self._count_pass(self.rows[b])
        if len(groups) == 1 and self.runner.packer.static_shapes:
            # While the device computes, prepare the passes that may come next. After a prefill-only pass
            # spans are empty: where the first mask is now, the host does not know yet.
            for rows in self._coming(live, passes):
                coming = self._work([b for b in live if not rows[b].done], rows)
                if coming and all(work.spans for work in coming.values()):
                    self.runner.prepare(rows, coming)
        seen = self.runner.read_counts(self.rows, results)
        last = zip(groups, seen[-len(groups) :], strict=True)
        counts = {b: lanes[b] for group, lanes in last for b in group}
        return [b for b in live if self._advance(b, counts[b])]

    def _coming(self, live: list[int], passes: int) -> list[list[SequenceState]]:
        """The sequence states that the next pass may begin with.

        Where the issued passes complete a block for certain, the next block is in front. Where they only may,
        several sequences are prepared as they are now, and a single one both ways, the likelier first.

        passes: how many were issued whose results have not been read.
        """
        states = [self.rows.copy()]
        for b in live:
            row = self.rows[b]
            if row.edited or reads(row, "response"):  # its rule may fill other blocks, too
                continue
            least, most = self._commits(row, passes)
            if row.masks_left > (most if len(live) == 1 else least):
                continue
            after = copy.copy(row)
            after.leave_front()
            self.open_front(after)
            if row.masks_left <= least:
                states[0][b] = after
            else:
                likely = row.masks_left * (row.nfe - passes) <= row.decoded * passes  # at its pace so far
                states.insert(0 if likely else 1, [*self.rows[:b], after, *self.rows[b + 1 :]])
        return states

    def _commits(self, row: SequenceState, passes: int) -> tuple[float, float]:
        """The fewest and the most masks of the front block that the last `passes` passes commit."""
        if row.settings.rule is not None and not row.settings.rule.by_row:
            return passes, math.inf
        front = row.open[0]
        each = [row.policy(front._replace(step=step)) for step in range(front.step - passes, front.step)]
        least = passes if self.schedule.first_mask_matters else sum(map(policies.least, each))
        return least, sum(map(policies.most, each))

    def _count_pass(self, row: SequenceState) -> None:
        """Count a pass over the sequence that was issued."""
        prefill_only = self.schedule.prefill_only(row)
        row.nfe += row.masks_left > 0 or row.edits > 0  # a published loop's second pass over a block is none
        row.published += not prefill_only
        row.step_in_block += not prefill_only
        row.open = tuple(block._replace(step=block.step + (not prefill_only)) for block in row.open)
        row.num_cached = self.schedule.stored(row)

    def _advance(self, b: int, counted: Counts) -> bool:
        """Update sequence b by a pass's counts; return whether its front block is complete."""
        row = self.rows[b]
        counts = counted.blocks[: len(self._counted(row))]
        row.open = tuple(
            block._replace(masks_left=left, first_mask=first if left else block.start, changed=changed > 0)
            for block, (left, first, changed) in zip(row.open, counts, strict=False)
        )
        at = next((i for i, block in enumerate(row.open) if block.masks_left), 0)
        block = row.open[at]  # that has the first mask; those before are complete
        end = counted.end if row.settings.eos_ids and not row.edited else None
        if end is not None and block.start <= end < block.first_mask:  # all in front of the EOS is final
            self._fill(b, block.start, block.end)
            row.generated -= block.masks_left
            row.open = (*row.open[:at], block._replace(masks_left=0), *row.open[at + 1 :])
            counts = [(0, block.start, 0)] * (at + 1)
        is_over = self.schedule.is_over(row)
        if not is_over or row.edits_on:
            row.edits += is_over
            self._open_more(row)
            return False
        row.published += self.schedule.published_passes(row)
        row.between_blocks = True
        for left, _, _ in counts:  # blocks behind the front one may be complete, too
            if left or row.done:
                break
            start, end = row.leave_front()
            if (row.settings.eos_ids or row.settings.stop) and self._stops(b, start, end):
                self.end(b)
        return True

    def _work(self, lanes: list[int], rows: Sequence[SequenceState]) -> dict[int, SequenceWork]:
        """What the next pass does with each lane."""
        work = {}
        for b in lanes:
            row = rows[b]
            first, last = self.schedule.computed(row)
            spans, onward = self.schedule.spans(b, row), self.schedule.sees_onward(row)
            windows = self.schedule.windows(row)
            read = [self._read(row, window, first, last) for window in windows]
            ending = (0, 0)
            if row.settings.eos_ids:
                ending = max(row.last_run, row.block[0]), row.open[-1].end
            work[b] = SequenceWork(spans, windows, read, self._counted(row), ending, onward)
        return work

    def _counted(self, row: SequenceState) -> list[tuple[int, int]]:
        """Columns of the blocks to count: the open ones, or all unfinished ones if a rule may fill them."""
        if reads(row, "response"):
            return row.blocks[row.block_index :]
        return [(block.start, block.end) for block in row.open]

    def _stops(self, b: int, start: int, end: int) -> bool:
        """Whether EOS or a stop sequence ends in columns [start, end); if so, `kept` is where the one begins
        that ends first, the longer one if two end together. What follows an EOS is filling, and no text.

        Only the last run of masks is searched: text decoded in front of a given token does not end there.
        """
        row = self.rows[b]
        sought = *row.settings.stop, *((eos,) for eos in row.settings.eos_ids)
        first = max(row.last_run, start - max(map(len, sought)) + 1)
        ids = tuple(self.tokens[b, first : min(end, row.columns[-1] + 1)].tolist())
        endings = [
            (first + at + len(stop), first + at)
            for stop in sought
            for at in range(len(ids) - len(stop) + 1)
            if ids[at : at + len(stop)] == stop
        ]
        if endings:
            _, begin = min(endings)
            row.kept, row.stopped = row.index(begin), True
        return row.stopped

    def enter(self, finished: list[int]) -> None:
        """Let the sequences that `step` returned begin their next block."""
        for b in finished:
            self._enter(b)

    def _read(self, row: SequenceState, window: Window, first: int, last: int) -> tuple[int, int]:
        """Columns [start, end) that the sequence's rule reads, in a pass over positions [first, last).

        With shifted logits the position in front of a column has its logits: the pass has none for column
        `first`, whose token is then known.
        """
        rule, schedule = row.settings.rule, self.schedule
        if rule is None or rule.reads == "masked" or schedule.prefill_only(row):
            return window.start, window.end
        start, end = window.block[:2]
        if rule.reads == "response" and schedule.to_the_end:
            start, end = row.columns[0], row.length
        elif start and schedule.shift and schedule.causal and row.layout.start_of_block(start) == start:
            start += 1  # its logits are in the block before, which passes with cache "block" do not compute
        elif row.edited and schedule.shift and schedule.keeps and not schedule.causal and row.step_in_block:
            start += 1  # a token that was remasked there would have no logits in the next pass
        first += first > 0 and schedule.shift
        return max(start, first), min(end, last)

    def _groups(self, live: list[int]) -> list[list[int]]:
        """The live lanes, grouped by the pass that they share."""
        if self.batch_invariant:
            return [[b] for b in live]
        if self.schedule.onward:  # some see onward, and some both ways
            stores = [b for b in live if self.schedule.prefill_only(self.rows[b])]
            fills = [b for b in live if b not in stores]
            return [group for group in (stores, fills) if group]
        if isinstance(self.model, Model):
            return [live]
        by_length: dict[int, list[int]] = {}
        for b in live:
            by_length.setdefault(self.rows[b].length, []).append(b)
        return list(by_length.values())
