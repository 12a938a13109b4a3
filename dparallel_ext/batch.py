"""Sequences under decoding: each with its own length, block and policy, all in one pass after the other.

The semantics are those of the published decoders (LLaDA, Fast-dLLM, dParallel, SDAR): blocks left to right,
in each pass logits for a span of positions, then a policy commits some of the block's masked positions. Only
the work differs: the LM head and the statistics touch the masked rows of the blocks alone, and a sequence
that is complete is in no pass.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import policies
from .cache import KVCache, Span
from .models import Model, traits
from .ops import check_errors, row_stats, select, unmask_
from .types import RowStats

CACHES = ("none", "prefix", "dual", "block")

Policy = Callable[[RowStats, Tensor, Tensor], Tensor]
"""(stats (B, W), eligible (B, W) bool, step (B,) int64) -> (B, W) bool, over the columns of each block, or of
its active sub-block."""


@dataclass
class Trajectory:
    """When each generated token was committed, and how sure the model was."""

    step: Tensor
    """(B, gen_length) int64: the sequence's pass that committed it, from 1; 0 where none did."""
    confidence: Tensor
    """(B, gen_length) float32: its probability in that pass; NaN where none did."""


@dataclass(frozen=True)
class Settings:
    """How one sequence is decoded."""

    policy: tuple[float, ...]
    """A row of `policies.FIELDS`."""
    steps: int | None = None
    """The fixed schedule: passes in all, whose quota stands in for the policy's threshold."""
    temperature: float = 0.0
    suppress: Tensor | None = None
    """(n,) int64, ids never to be decoded."""
    key: tuple[int, int] = (0, 0)
    """Of its samples: seed, sequence."""
    eos_id: int | None = None
    stop: tuple[tuple[int, ...], ...] = ()
    """Sequences of tokens that end the response as eos_id does."""


@dataclass
class Row:
    """Where one sequence is. Columns are positions of the sequence."""

    prompt: int
    length: int
    """Of prompt and response."""
    blocks: list[tuple[int, int]]
    """Columns [start, end) that are filled, block by block."""
    settings: Settings
    kept: int
    """Response tokens in front of EOS or a stop sequence, all where there is none."""
    at: int = 0
    """The active block; len(blocks): done."""
    turn: int = 0
    """Passes that the active block has had."""
    left: int = 0
    """Masks in the active block."""
    leftmost: int = 0
    """The column of the first of them."""
    nfe: int = 0
    published: int = 0
    """Passes that the published loop has run so far."""
    generated: int = 0
    stored: int = 0
    """cache "block": positions whose keys and values are final."""
    waiting: bool = False
    """Its block is complete, and it has not begun the next."""
    stopped: bool = False
    """It met EOS or a stop sequence."""

    @property
    def done(self) -> bool:
        return self.at == len(self.blocks)

    @property
    def block(self) -> tuple[int, int]:
        return self.blocks[self.at]

    @property
    def policy(self) -> tuple[float, ...]:
        """Of the next pass, a row of `policies.FIELDS`."""
        chosen, steps = self.settings.policy, self.settings.steps
        if steps is None or self.done:
            return chosen
        start, end = self.block
        share, rest = divmod(end - start, steps // len(self.blocks))
        return (chosen[0], float(max(1, share + (self.turn < rest))), *chosen[2:])


IDLE = Row(0, 0, [], Settings((0.0, 0.0, 1.0, math.inf, 0.0)), 0)
"""What a lane without a sequence holds."""


def lay_out(
    prompt: int, gen_length: int, block_length: int, causal: bool, steps: int | None = None
) -> list[tuple[int, int]]:
    """The blocks, columns [start, end), that `gen_length` tokens after the prompt are filled by.

    Block-causal models count blocks from position 0, so that the first may begin with the prompt's tail, and
    fill the last to its end. Raises ValueError where `steps` passes do not divide into the blocks.
    """
    end, origin = prompt + gen_length, prompt
    if causal:
        end, origin = -(-end // block_length) * block_length, prompt - prompt % block_length
    cuts = [prompt, *range(origin + block_length, end, block_length), end]
    blocks = [(a, b) for a, b in itertools.pairwise(cuts) if a < b] if gen_length else []
    if steps is not None and blocks and steps % len(blocks):
        raise ValueError(f"steps: expected a multiple of the {len(blocks)} blocks, got {steps}")
    return blocks


class Batch:
    """Sequences in lanes, and the passes over them; `admit` puts a sequence into a lane.

    Args:
        lanes, width: how many sequences, and the longest one's length.
        policy: a function that decides instead of the policies of the sequences.
        published: the published loops to the pass: fill the prompt's masks too, and run their extra pass
            where the full pass has completed a block.
        sub_block_length: of each block, the leftmost part of this length that has masks is filled first.
            None: a block is one part.
        refresh: with cache "dual", a full pass every so many passes over a block.
        batch_invariant: each sequence in passes of its own.
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
        policy: Policy | None = None,
        sub_block_length: int | None = None,
        published: bool = False,
        refresh: int | None = None,
        batch_invariant: bool = False,
        slots: KVCache | None = None,
    ) -> None:
        self.model, self.cache, self.mask_id, self.published = model, cache, mask_id, published
        self.refresh, self.alone, self.policy = refresh, batch_invariant, policy
        self.block_length, self.pad_id = block_length, pad_id
        self.traits = traits(model)
        self.sub_block_length = sub_block_length or block_length
        self.within = cache == "dual" and self.traits.block_length is not None
        """Cache "dual" inside the active block; those before it are stored as with "block"."""
        if self.within:
            self.cache = cache = "block"
        self.rows = [IDLE] * lanes
        self.tokens = torch.full((lanes, width), pad_id, dtype=torch.int64, device=device)
        self.forwards = 0
        self.slots = slots
        if slots is None and isinstance(model, Model):
            self.slots = model.new_cache(lanes, width, kept=cache != "none")
        self.trajectory: Trajectory | None = None

    def admit(
        self, lane: int, prompt: Tensor, gen_length: int, settings: Settings, *, stored: int = 0
    ) -> Row:
        """Begin a sequence: `gen_length` tokens after `prompt` (P,) int64, in place of what the lane held.

        `stored`: positions whose keys and values are in the lane's slots already (cache "block").

        Raises ValueError where `steps` does not divide into the blocks.
        """
        first, size, causal = len(prompt), self.block_length, self.traits.block_length is not None
        blocks = lay_out(first, gen_length, size, causal, settings.steps)
        end = blocks[-1][1] if blocks else first
        prefill = self.cache == "block" and first >= size and bool(blocks)
        row = Row(first, end, blocks, settings, end - first, published=int(prefill), stored=stored)
        self.rows[lane] = row
        self.tokens[lane, :first] = prompt
        self.tokens[lane, first:end] = self.mask_id
        self.tokens[lane, end:] = self.pad_id
        self._enter(lane)
        return row

    @property
    def live(self) -> list[int]:
        """Sequences that the next pass is over."""
        return [b for b, row in enumerate(self.rows) if not row.done and not row.waiting]

    @property
    def policies(self) -> Tensor:
        """(lanes, 5) float32, of the next pass."""
        rows = [row.policy for row in self.rows]
        return torch.tensor(rows, dtype=torch.float32, device=self.tokens.device).view(-1, 5)

    def _enter(self, b: int) -> None:
        """Begin the active block; blocks without a mask are passed over."""
        row = self.rows[b]
        while not row.done:
            row.turn, row.waiting = 0, False
            row.left, row.leftmost = self._masks([b])[b]
            if row.left:
                return
            self._leave(row)

    def release(self, lane: int) -> None:
        """Forget the lane's sequence."""
        self.rows[lane] = IDLE

    def _leave(self, row: Row) -> None:
        start, end = row.block
        row.generated += end - start
        row.at += 1

    def end(self, b: int) -> None:
        """Sequence b is complete: what comes after its last finished block is padding."""
        row = self.rows[b]
        if not row.done:
            self.tokens[b, row.block[0] : row.length] = self.pad_id
            row.at = len(row.blocks)

    def step(self, lanes: Sequence[int] | None = None) -> list[int]:
        """One pass over every sequence that is not done (of `lanes`); returns those whose block it completed.

        Where it raises, what the model, the policy or `unmask_` raises, every sequence is as it was before.
        """
        live = self.live if lanes is None else [b for b in self.live if b in lanes]
        before = [copy.copy(self.rows[b]) for b in live], self.tokens.clone(), self.forwards
        try:
            return self._step(live)
        except BaseException:
            rows, tokens, self.forwards = before
            self.tokens.copy_(tokens)
            for b, row in zip(live, rows, strict=True):
                self.rows[b].__dict__.update(row.__dict__)
            raise

    def _step(self, live: list[int]) -> list[int]:
        for b in live:
            row = self.rows[b]
            row.nfe += row.left > 0
            row.published += not self._hands_over(row)
        for group in self._groups(live):
            self._pass(group)
            self.forwards += 1
        finished = []
        left = self._masks(live)
        check_errors(self.tokens.device)  # on a GPU a bad row commits nothing: without this, for ever
        for b in live:
            row = self.rows[b]
            wasteful = self.cache in ("prefix", "dual") and row.turn == 0
            row.turn += not self._hands_over(row)
            row.left, row.leftmost = left[b]
            if self.cache == "block":
                row.stored = row.block[0] - row.block[0] % self.block_length
            if row.left or (wasteful and self.published):
                continue
            # Published: one more pass where the full one completed the block; one that stores the block.
            row.published += wasteful or self.cache == "block"
            start, end = row.block
            self._leave(row)
            row.waiting = True
            finished.append(b)
            if (row.settings.eos_id is not None or row.settings.stop) and self._stops(b, start, end):
                self.end(b)
        return finished

    def _stops(self, b: int, start: int, end: int) -> bool:
        """Whether EOS or a stop sequence ends in columns [start, end); notes where it begins."""
        row = self.rows[b]
        sought = row.settings.stop
        if row.settings.eos_id is not None:
            sought = (*sought, (row.settings.eos_id,))
        first = max(row.prompt, start - max(map(len, sought)) + 1)
        ids = tuple(self.tokens[b, first:end].tolist())
        begins = [
            first + at
            for stop in sought
            for at in range(max(0, start - first - len(stop) + 1), len(ids) - len(stop) + 1)
            if ids[at : at + len(stop)] == stop
        ]
        if begins:
            row.kept, row.stopped = min(begins) - row.prompt, True
        return row.stopped

    def enter(self, finished: list[int]) -> None:
        """Let the sequences that `step` returned begin their next block."""
        for b in finished:
            self._enter(b)

    def _full(self, row: Row) -> bool:
        """Whether this pass computes the whole sequence."""
        again = self.cache == "dual" and self.refresh is not None and row.turn % self.refresh == 0
        return self.cache == "none" or (self.cache != "block" and (row.turn == 0 or again))

    def _hands_over(self, row: Row) -> bool:
        """Whether this pass is over the blocks before alone: their last position gives its first token.

        So it is published for shifted logits in a block-causal model (Fast-dLLM v2): the pass that stores a
        block begins the next, and passes over that one know its first token.
        """
        size = self.traits.block_length
        return self.traits.shift and size is not None and row.leftmost > 0 and row.leftmost % size == 0

    def _part(self, row: Row) -> tuple[int, int]:
        """Columns of the active sub-block, in the prompt too; they count from where the block begins."""
        start = row.block[0]
        origin = start - start % self.traits.block_length if self.traits.block_length else start
        low = row.leftmost - (row.leftmost - origin) % self.sub_block_length
        return low, low + self.sub_block_length

    def _spans(self, b: int) -> list[Span]:
        row = self.rows[b]
        start, end = row.block
        first, last = 0, row.length
        if self.cache == "block":  # the blocks finished since come along, so that theirs are stored
            first, last = row.stored, end
            if self._hands_over(row):
                last = start
            elif self.within:
                again = row.turn % self.refresh == 0 if self.refresh else row.turn == 0
                low, high = self._part(row)
                if not again and row.leftmost > low:  # as published, not before its first column is known
                    first, last = low, high
        elif not self._full(row):
            first, last = start, end if self.cache == "dual" else row.length
        if isinstance(self.model, Model):
            return self.model.spans(b, first, last, row.length)
        return [Span(b, first, last, row.length)]

    def _window(self, b: int) -> tuple[int, int]:
        """Columns whose masks this pass may fill."""
        row = self.rows[b]
        if self._hands_over(row):
            return row.leftmost, row.leftmost + 1
        low, high = self._part(row)
        start, end = max(low, row.block[0]), min(high, row.block[1])
        if self._full(row):
            if self.traits.shift and self.cache != "none" and row.turn == 0:
                end = start + 1  # published: the full pass serves the block's first position
            if self.published:
                start = 0
        return start, end

    def _masks(self, live: list[int]) -> dict[int, tuple[int, int]]:
        """Masks left in each active block, and the column of the first."""
        found = []
        for b in live:
            start, end = self.rows[b].block
            masked = (self.tokens[b, start:end] == self.mask_id).to(torch.int64)
            found.append(torch.stack((masked.sum(), masked.argmax() + start)))
        return {b: (n, at) for b, (n, at) in zip(live, torch.stack(found).tolist(), strict=True)}

    def _groups(self, live: list[int]) -> list[list[int]]:
        """Sequences that share a pass."""
        if self.alone:
            return [[b] for b in live]
        if isinstance(self.model, Model):
            return [live]
        by_length: dict[int, list[int]] = {}
        for b in live:
            by_length.setdefault(self.rows[b].length, []).append(b)
        return list(by_length.values())

    def _pass(self, group: list[int]) -> None:
        """One forward pass over sequences, and what is committed by it.

        Of the logits, those of the masks in the windows are computed; on a GPU whole windows, so as not to
        wait for it.
        """
        windows, device = {b: self._window(b) for b in group}, self.tokens.device
        spans: list[Span] = []
        rows, columns, sources, offset = [], [], [], 0
        for b in group:
            start, end = windows[b]
            column = torch.arange(start, end)
            if device.type == "cpu":
                column = column[self.tokens[b, start:end] == self.mask_id]
            own = self._spans(b)
            first, last = own[0].start, own[-1].end
            source = (column - 1).clamp_(min=first) if self.traits.shift else column
            rows.append(torch.full_like(column, b))
            columns.append(column)
            sources.append(source - first + offset)  # among the packed positions of the pass
            spans += own
            offset += last - first
        numbers = torch.stack([torch.cat(part) for part in (rows, columns, sources)])
        row_of, column, source = numbers.to(device, non_blocking=True)  # (N,) each
        if isinstance(self.model, Model):
            rows_of_head = F.pad(source, (0, self._rows(len(source)) - len(source)))
            logits = self.model.head(self._hidden(spans, self._rows(offset))[rows_of_head])[: len(source)]
        else:
            logits = self._foreign(group)[source]
        self._commit(group, logits, row_of, column, windows)

    def _rows(self, count: int) -> int:
        """How many rows `count` are filled up to, for the matrix library's sake.

        On the CPU it keeps compiled code for each number of rows of 16-bit matrices that it has met, for ever
        (half a megabyte and half a millisecond for each), so there shall be few: 8, 16, ... 64, and then four
        to every doubling.
        """
        if self.tokens.device.type != "cpu" or self.model.dtype == torch.float32 or not count:
            return count
        size = max(8, 2 ** ((count - 1).bit_length() - 3))
        return -(-count // size) * size

    def _hidden(self, spans: list[Span], rows: int) -> Tensor:
        """Of one of our models: (rows, width), those of the spans' positions first."""
        assert self.slots is not None
        plan = self.slots.plan(spans, rows)
        row = torch.tensor([span.row for span in spans])
        count = torch.tensor([span.end - span.start for span in spans])
        of_token = row.repeat_interleave(count)
        of_token = F.pad(of_token, (0, rows - len(of_token))).to(plan.positions.device)
        return self.model.step(self.tokens[of_token, plan.positions], self.slots, plan)

    def _foreign(self, group: list[int]) -> Tensor:
        """Of any other model, which knows no ragged batches: logits (B * L, V) of whole sequences."""
        x = self.tokens[group, : self.rows[group[0]].length]
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

    def _commit(
        self,
        live: list[int],
        logits: Tensor,
        row_of: Tensor,
        column: Tensor,
        windows: dict[int, tuple[int, int]],
    ) -> None:
        x, lanes = self.tokens, range(len(self.rows))
        positions = row_of * x.shape[1] + column
        nfe = torch.tensor([row.nfe for row in self.rows], device=x.device)
        keys = torch.tensor([row.settings.key for row in self.rows], device=x.device).view(-1, 2)
        seed, sequence = keys.unbind(1)
        if self.policy is not None:
            stats = self._by_function(self.policy, live, logits, row_of, column, windows, nfe, seed, sequence)
            return self._record(positions, row_of, column, nfe, stats)
        policy = self.policies
        # What a launch has but one of: a call for each that occurs.
        groups: dict[tuple[float, int], list[int]] = {}
        for b in live:
            own = self.rows[b].settings
            groups.setdefault((own.temperature, id(own.suppress)), []).append(b)
        for group in groups.values():
            own = self.rows[group[0]].settings
            edges = [windows[b] if b in group else (0, 0) for b in lanes]
            start, end = torch.tensor(edges, device=x.device).view(-1, 2).unbind(1)
            stats = unmask_(
                x,
                logits,
                mask_id=self.mask_id,
                start=start,
                end=end,
                policy=policy,
                positions=positions,
                step=nfe,
                temperature=own.temperature,
                suppress=own.suppress,
                seed=seed,
                sequence=sequence,
            ).stats
        self._record(positions, row_of, column, nfe, stats)  # where wanted, there is but one group

    def _by_function(
        self,
        policy: Policy,
        live: list[int],
        logits: Tensor,
        row_of: Tensor,
        column: Tensor,
        windows: dict[int, tuple[int, int]],
        nfe: Tensor,
        seed: Tensor,
        sequence: Tensor,
    ) -> RowStats:
        """Commit what a function chooses of statistics laid out (B, W), W the widest window."""
        x, batch, own = self.tokens, len(self.rows), self.rows[live[0]].settings
        width = max(end - start for start, end in windows.values())
        start = torch.tensor([windows.get(b, (0, 0))[0] for b in range(batch)], device=x.device)
        at = (row_of, column - start[row_of])
        eligible = torch.zeros((batch, width), dtype=torch.bool, device=x.device)
        eligible[at] = x[row_of, column] == self.mask_id
        stats = row_stats(
            logits,
            mask_id=self.mask_id,
            suppress=own.suppress,
            temperature=own.temperature,
            seed=seed[row_of],
            sequence=sequence[row_of],
            position=column,
            step=nfe[row_of],
        )
        spread = []
        for values in stats:
            blank = -1 if values.dtype == torch.int64 else math.nan
            whole = values.new_full(eligible.shape, blank)
            whole[at] = values
            spread.append(torch.where(eligible, whole, blank))  # on a GPU `at` is the whole window
        by_column = RowStats(*spread)
        chosen = policy(by_column, eligible, nfe)
        if not isinstance(chosen, Tensor) or chosen.shape != eligible.shape:
            raise ValueError(
                f"policy: expected a bool Tensor {tuple(eligible.shape)}, "
                f"got {getattr(chosen, 'shape', type(chosen).__name__)}"
            )
        best = policies.make("quota", 1, batch=batch, device=x.device)
        chosen = chosen.to(torch.bool) & eligible
        chosen |= ~chosen.any(1, keepdim=True) & select(by_column, eligible, best)
        x[row_of, column] = torch.where(chosen[at], stats.sample, x[row_of, column])
        return stats

    def _record(
        self, positions: Tensor, row_of: Tensor, column: Tensor, nfe: Tensor, stats: RowStats
    ) -> None:
        """Of the positions, which were masked before, those that are not any more."""
        if self.trajectory is None:
            return
        prompt = torch.tensor([row.prompt for row in self.rows], device=positions.device)
        where = column - prompt[row_of]
        # On a GPU the positions are whole windows: what was committed earlier has its step already.
        fresh = (self.tokens.view(-1)[positions] != self.mask_id) & (where >= 0)
        row_of, where, sure = row_of[fresh], where[fresh], stats.confidence[fresh]
        new = self.trajectory.step[row_of, where] == 0
        row_of, where, sure = row_of[new], where[new], sure[new]
        self.trajectory.step[row_of, where] = nfe[row_of]
        self.trajectory.confidence[row_of, where] = sure
