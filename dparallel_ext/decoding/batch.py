"""Sequences under decoding: each with its own length, block and policy, all in one pass after the other.

The semantics are those of the published decoders (LLaDA, Fast-dLLM, dParallel, SDAR): blocks left to right,
in each pass logits for a span of positions, then a policy commits some of the block's masked positions. Only
the work differs: the LM head and the statistics touch the masked rows of the blocks alone, and a sequence
that is complete is in no pass.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import policies
from ..cache import KVCache, Span
from ..models import Model, traits
from .runner import Runner, SequenceWork, reads
from .sequence import IDLE, SequenceState, Settings, lay_out
from .workspace import Workspace

CACHES = ("none", "prefix", "dual", "block")

AHEAD = 8
"""Passes that the host issues before it looks at what they did, where that cannot change what they are."""


class Batch:
    """Sequences in lanes, and the passes over them; `admit` puts a sequence into a lane.

    Args:
        lanes, width: how many sequences, and the longest one's length.
        published: the published loops to the pass: fill the prompt's masks too, and run their extra pass
            where the full pass has completed a block.
        sub_block_length: of each block, the leftmost part of this length that has masks is filled first.
            None: a block is one part.
        refresh: with cache "dual", a full pass every so many passes over a block.
        batch_invariant: each sequence in passes of its own.
        graphs: on a GPU, passes of one form are recorded once and replayed, see `graphs`.
        slots: of lanes and width; default: contiguous ones.
    """

    def __init__(
        self,
        model: Any,
        lanes: int,
        width: int,
        block_length: int,
        cache: str,
        mask_id: int,
        *,
        pad_id: int,
        device: torch.device | str = "cpu",
        sub_block_length: int | None = None,
        published: bool = False,
        refresh: int | None = None,
        batch_invariant: bool = False,
        graphs: bool = True,
        slots: KVCache | None = None,
    ) -> None:
        self.model, self.cache, self.mask_id, self.published = model, cache, mask_id, published
        self.refresh, self.batch_invariant = refresh, batch_invariant
        self.block_length, self.pad_id = block_length, pad_id
        self.traits = traits(model)
        self.causal = self.traits.block_length is not None
        """The model is block-causal, by blocks of `block_length`."""
        self.sub_block_length = sub_block_length or block_length
        self.sub_block_cache = cache == "dual" and self.causal
        """Cache "dual" inside the active block; those before it are stored as with "block"."""
        if self.sub_block_cache:
            self.cache = cache = "block"
        self.rows = [IDLE] * lanes
        self.forwards = 0
        self._workspace: Workspace | None = None
        if slots is None and isinstance(model, Model):
            cached = cache != "none"
            if graphs:
                at = torch.device(device)
                self._workspace = Workspace.take(model, lanes, width, mask_id, at, cached=cached)
            slots = self._workspace.slots if self._workspace else model.new_cache(lanes, width, kept=cached)
        if self._workspace is not None:
            tokens = self._workspace.tokens.fill_(pad_id)
        else:
            tokens = torch.full((lanes, width), pad_id, dtype=torch.int64, device=device)
        self.tokens = tokens[:, :width]  # of a workspace, the part that this batch needs
        self.slots = slots
        self.runner = Runner(
            model,
            tokens,
            slots,
            mask_id,
            shift=int(self.traits.shift),
            window=self.sub_block_length,
            block=block_length,
            graphs=graphs,
            workspace=self._workspace,
        )

    def keep(self) -> None:
        """Let the next batch like this one replay what this one has recorded. This one is over: its
        tensors belong to that one.
        """
        if self._workspace is not None:
            self._workspace.give(self.model)
            self._workspace = None

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
        whose keys and values are in the lane's slots already (cache "block").

        Raises ValueError where `steps` does not divide into the blocks, or for an id to suppress that the
        model does not have.
        """
        first, size = len(prompt), self.block_length
        layout = lay_out(first, gen_length, size, self.causal, settings.steps, masked)
        prefill = self.cache == "block" and bool(layout.blocks) and layout.columns[0] >= size
        suppress = self.runner.suppress(settings.suppress)
        kept = len(layout.columns)
        row = SequenceState(
            first, layout, settings, kept, suppress, published=int(prefill), num_cached=num_cached
        )
        self.rows[lane] = row
        if settings.record:
            self.runner.trajectory.clear(lane)
        if settings.rule is not None:
            used = {other.settings.rule for other in self.rows if other.settings.rule is not None}
            self.runner.begin(lane, settings.rule, layout.columns, used)
        self.tokens[lane, :first] = prompt
        self.tokens[lane, first : row.length] = self.mask_id
        self.tokens[lane, row.length :] = self.pad_id
        self._enter(lane)
        return row

    @property
    def live(self) -> list[int]:
        """Sequences that the next pass is over."""
        return [b for b, row in enumerate(self.rows) if not row.done and not row.between_blocks]

    def _enter(self, b: int) -> None:
        """Begin the active block."""
        row = self.rows[b]
        row.step_in_block, row.between_blocks, row.edits, row.seen = 0, False, 0, []
        if row.done:
            return
        row.masks_left, row.first_mask = row.held, row.ahead
        if reads(row, "response"):  # its rule may have filled some of the masks already
            start, end = row.block
            row.look(self.tokens[b, start:end].tolist(), self.mask_id)

    def release(self, lane: int) -> None:
        """Forget the lane's sequence."""
        self.rows[lane] = IDLE

    def end(self, b: int) -> None:
        """Sequence b is complete: the masks after its last finished block, which adjoin, become padding."""
        row = self.rows[b]
        if not row.done:
            self.tokens[b, row.ahead : row.columns[-1] + 1] = self.pad_id
            row.block_index = len(row.blocks)

    def step(self, lanes: Sequence[int] | None = None, ahead: int = 1) -> list[int]:
        """A pass over every sequence that is not done (of `lanes`); returns those whose block it completed.

        ahead: up to so many passes, as many as complete no block whatever the policies choose, and one: the
            host waits for the device once, and not after each. Guessing further would cost a pass in vain for
            each block that is complete earlier, where a look costs the host's way there and back.

        Where it raises, what the model, the policy or `unmask_` raises, every sequence is as it was before.
        """
        live = self.live if lanes is None else [b for b in self.live if b in lanes]
        before = [copy.copy(self.rows[b]) for b in live], self.tokens.clone(), self.forwards
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
                self.rows[b].__dict__.update(row.__dict__)
            raise

    def _memory(self, live: list[int]) -> list[Tensor]:
        """What the rules of those sequences remember."""
        rules = {rule: None for b in live if (rule := self.rows[b].settings.rule) is not None}
        return [kept for rule in rules for kept in self.runner.states[rule]]

    def _certain(self, live: list[int]) -> int:
        """Passes that can be issued one after the other: a block is complete after the last, if at all."""
        first_mask_matters = self.sub_block_length < self.block_length or (self.traits.shift and self.causal)
        rows = [self.rows[b] for b in live]
        if first_mask_matters or any(row.settings.rule is not None for row in rows):
            return 1
        return min((max(1, math.ceil(row.masks_left / policies.most(row.policy))) for row in rows), default=1)

    def _step(self, live: list[int], passes: int) -> list[int]:
        groups, results = self._groups(live), []
        for _ in range(passes):
            maybe_redundant = [
                b for b in live if self.cache in ("prefix", "dual") and self.rows[b].step_in_block == 0
            ]
            for group in groups:
                results.append(self.runner.run(self.rows, self._work(group)))  # (lanes, 3)
                self.forwards += 1
            for b in live:
                row, prefill_only = self.rows[b], self._prefill_only(self.rows[b])
                row.nfe += row.masks_left > 0 or row.edits > 0
                row.published += not prefill_only
                row.step_in_block += not prefill_only
                if self.cache == "block":
                    row.num_cached = row.block[0] - row.block[0] % self.block_length
        if len(groups) == 1 and self.runner.static_shapes:
            # While the device is at it: what comes next if no block is complete. What follows a pass that
            # handed over is not known yet: its first token is.
            coming = self._work(live)
            if all(work.spans for work in coming.values()):
                self.runner.prepare(self.rows, coming)
        seen = self.runner.look(results)
        last = zip(groups, seen[-len(groups) :], strict=True)
        found = {b: lanes[b] for group, lanes in last for b in group}
        finished = []
        for b in live:
            row = self.rows[b]
            start, end = row.block
            row.look(found[b][: end - start], self.mask_id)
            if row.masks_left or (b in maybe_redundant and self.published) or row.edits_on():
                continue
            # Published: one more pass where the full one completed the block; one that stores the block.
            row.published += b in maybe_redundant or self.cache == "block"
            row.between_blocks = True
            finished.append(b)
            begin = start
            while True:
                row.generated += row.held
                row.block_index += 1
                if (row.settings.eos_id is not None or row.settings.stop) and self._stops(b, start, end):
                    self.end(b)
                if row.done or not reads(row, "response"):
                    break
                start, end = row.block  # a rule may have completed more blocks than the active one
                if self.mask_id in found[b][start - begin : end - begin]:
                    break
        return finished

    def _work(self, lanes: list[int]) -> dict[int, SequenceWork]:
        """Of the next pass."""
        work = {}
        for b in lanes:
            spans, window = self._spans(b), self._window(b)
            work[b] = SequenceWork(spans, window, self.rows[b].block, self._read(self.rows[b], window, spans))
        return work

    def _stops(self, b: int, start: int, end: int) -> bool:
        """Whether EOS or a stop sequence ends in columns [start, end); notes where it begins.

        Sought among the last masks alone: what is decoded in front of a given token does not end there.
        """
        row = self.rows[b]
        sought = row.settings.stop
        if row.settings.eos_id is not None:
            sought = (*sought, (row.settings.eos_id,))
        first = max(row.last_run, start - max(map(len, sought)) + 1)
        ids = tuple(self.tokens[b, first : min(end, row.columns[-1] + 1)].tolist())
        begins = [
            first + at
            for stop in sought
            for at in range(max(0, start - first - len(stop) + 1), len(ids) - len(stop) + 1)
            if ids[at : at + len(stop)] == stop
        ]
        if begins:
            row.kept, row.stopped = row.index(min(begins)), True
        return row.stopped

    def enter(self, finished: list[int]) -> None:
        """Let the sequences that `step` returned begin their next block."""
        for b in finished:
            self._enter(b)

    def _full(self, row: SequenceState) -> bool:
        """Whether this pass computes the whole sequence."""
        again = self.cache == "dual" and self.refresh is not None and row.step_in_block % self.refresh == 0
        return self.cache == "none" or (self.cache != "block" and (row.step_in_block == 0 or again))

    def _prefill_only(self, row: SequenceState) -> bool:
        """Whether this pass is over the blocks before alone: their last position gives its first token.

        So it is published for shifted logits in a block-causal model (Fast-dLLM v2): the pass that stores a
        block begins the next, and passes over that one know its first token.
        """
        at_a_block = row.first_mask > 0 and row.first_mask % self.block_length == 0
        return self.traits.shift and self.causal and at_a_block

    def _part(self, row: SequenceState) -> tuple[int, int]:
        """Columns of the active sub-block, in the prompt too; they count from where the block begins."""
        start = row.block[0]
        origin = start - start % self.block_length if self.causal else start
        low = row.first_mask - (row.first_mask - origin) % self.sub_block_length
        return low, low + self.sub_block_length

    def _spans(self, b: int) -> list[Span]:
        row = self.rows[b]
        start, end = row.block
        first, last = 0, row.length
        if self.cache == "block":  # the blocks finished since come along, so that theirs are stored
            first, last = row.num_cached, end
            if self._prefill_only(row):
                last = start
            elif self.sub_block_cache:
                again = row.step_in_block % self.refresh == 0 if self.refresh else row.step_in_block == 0
                low, high = self._part(row)
                if not again and row.first_mask > low:  # as published, not before its first column is known
                    first, last = low, min(high, end)
        elif not self._full(row):
            first, last = start, end if self.cache == "dual" else row.length
        if isinstance(self.model, Model):
            return self.model.spans(b, first, last, row.length, self.block_length)
        return [Span(b, first, last, row.length)]

    def _window(self, b: int) -> tuple[int, int]:
        """Columns whose masks this pass may fill."""
        row = self.rows[b]
        if self._prefill_only(row):
            return row.first_mask, row.first_mask + 1
        low, high = self._part(row)
        start, end = max(low, row.block[0]), min(high, row.block[1])
        if self._full(row):
            first = row.first_mask == row.block[0]
            if self.traits.shift and self.cache != "none" and row.step_in_block == 0 and first:
                end = start + 1  # published: the full pass serves the block's first position
            if self.published:
                start = 0
        return start, end

    def _read(self, row: SequenceState, window: tuple[int, int], spans: Sequence[Span]) -> tuple[int, int]:
        """Columns whose logits the sequence's rule reads; of a pass that computes them."""
        if row.settings.rule is None or row.settings.rule.reads == "masked" or self._prefill_only(row):
            return window
        start, end = row.block
        if row.settings.rule.reads == "response" and self.cache in ("none", "prefix"):
            start, end = row.columns[0], row.length
        return (
            min(window[0], max(start, spans[0].start)),
            max(window[1], min(end, spans[-1].end)),
        )

    def _groups(self, live: list[int]) -> list[list[int]]:
        """Sequences that share a pass."""
        if self.batch_invariant:
            return [[b] for b in live]
        if isinstance(self.model, Model):
            return [live]
        by_length: dict[int, list[int]] = {}
        for b in live:
            by_length.setdefault(self.rows[b].length, []).append(b)
        return list(by_length.values())
