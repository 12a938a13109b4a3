"""One forward pass over sequences of a batch, and its commits.

`batch` decides the spans to compute and the windows to fill. From there on everything runs on the device and
asks the host for nothing, so that on a GPU a pass can be recorded and replayed.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cache import AttentionMetadata
from ..models import Model, Stream, logits_of, mixed_embeddings, own_precision, soft_embeddings
from ..ops import commit_
from ..ops.errors import Cell, explain
from ..packed import unpack
from ..rules import Rule
from ..rules.protocol import state_of
from ..types import CommitOutput
from . import padding
from .graphs import recorded_key, run_pass
from .inputs import GraphKey, InputPacker, SequenceWork
from .most_probable import most_probable
from .sampler import Decided, Predicted, decide
from .schedule import Schedule
from .sequence import SequenceState, eos_ids
from .sequence_settings import SamplingGroup
from .workspace import Workspace


class Counts(NamedTuple):
    """The state of a sequence after a pass, as the device counted it."""

    blocks: list[tuple[int, int, int]]
    """For each block in `SequenceWork.counted`, and perhaps padding after them: masks left, the column of the
    first of them, tokens that the pass changed."""
    end: int | None
    """The column of the first EOS in `SequenceWork.ending`, else the end of its columns; None where no
    sequence has an EOS."""


class Prepared(NamedTuple):
    """The inputs of a pass that may come, made in advance."""

    inputs_key: tuple[Any, ...]
    sequences: tuple[SequenceState, ...]
    """Kept alive, since `inputs_key` holds ids of their objects."""
    inputs: Tensor
    key: GraphKey


REMEMBERED = 16
"""The number of rules with state beyond which the state of rules that no sequence uses is dropped."""


class Runner:
    """Runs the passes of a batch.

    Args:
        space: the tokens, which passes change in place; with our models also a cache, and the graphs of the
            passes.
    """

    def __init__(self, model: Any, space: Workspace, mask_id: int, schedule: Schedule) -> None:
        self.model, self.mask_id = model, mask_id
        self.tokens, self.kv_cache = space.tokens, space.kv_cache
        self.trajectory, self.graphs = space.trajectory, space.graphs
        self.states, self.given = space.states, space.given
        self._suppress = space.suppress
        self.windows_of_lane, self.known_first = schedule.active_blocks, schedule.known_first
        self.lane = self._lane_of(self.windows_of_lane)
        """(W,) int64: each window's lane; None where each lane has one window."""
        self.packer = InputPacker(model, space, mask_id, schedule)
        self.recorded_rows = padding.recorded_rows(model)
        self._prepared: list[Prepared] = []

    def suppress(self, ids: Tensor | None) -> Tensor | None:
        """The ids as a tensor, the same object for the same ids. It is on the device with our models; with
        others on the CPU, where the ops check the range."""
        is_native = isinstance(self.model, Model)
        return self._suppress(ids, self.tokens.device if is_native else torch.device("cpu"))

    def begin(self, lane: int, rule: Rule, columns: Sequence[int], used: Collection[Rule]) -> None:
        """Begin a sequence that is decoded by `rule` in the lane.

        columns: of its response. used: the rules of all lanes.
        """
        if rule not in self.states:
            if len(self.states) >= REMEMBERED and (idle := [old for old in self.states if old not in used]):
                for old in idle:
                    del self.states[old]
                if self.graphs is not None:
                    self.graphs.recordings.clear()  # recordings may write to the dropped state
            lanes, length = self.tokens.shape
            # The window of the last column may have cells beyond it.
            self.states[rule] = state_of(rule, lanes, 2 * length, self.tokens.device)
        rule.reset(self.states[rule], lane)
        if rule.edits:
            self.given[lane] = True
            self.given[lane, list(columns)] = False

    def run(self, sequences: Sequence[SequenceState], work: Mapping[int, SequenceWork]) -> Tensor:
        """Run one forward pass over the lanes of `work`, which are in ascending order.

        Returns (n,) int64 on the device, for `read_counts`.
        """
        if self.graphs is not None and any(sequences[b].nfe == 0 for b in work):
            # Between sequences the model's weights may have moved.
            self.graphs.drop_stale(self.model.addresses())
        prepared, self._prepared = self._prepared, []
        inputs_key = self.packer.key_of(sequences, work) if prepared else ()
        ready = next((each for each in prepared if each.inputs_key == inputs_key), None)
        inputs, key = self.packer.pack(sequences, work) if ready is None else (ready.inputs, ready.key)
        compute = functools.partial(self._compute, key, work)
        device = self.tokens.device
        graph_key = recorded_key(key, key.shapes[0][0], self.recorded_rows) if key.recorded else None
        held = key, self.lane  # recordings outlive this runner
        return run_pass(self.graphs, graph_key, inputs, compute, device=device, held=held)

    def read_counts(
        self, sequences: Sequence[SequenceState], results: Sequence[Tensor]
    ) -> list[list[Counts]]:
        """For each pass and lane, the counts in the results of `run`; waits for the device.

        Raises ValueError for the first pass in which an error kept a sequence from committing.
        """
        passes: list[list[Counts]] = []
        lanes = len(self.tokens)
        windows = lanes * self.windows_of_lane
        for numbers in torch.stack(list(results)).tolist() if lanes else []:
            explain(min(numbers[:windows]), Cell(self.tokens.shape[1]))
            ends = numbers[-lanes:] if eos_ids(sequences) else [None] * lanes
            counted = (len(numbers) - windows - (lanes if ends[0] is not None else 0)) // 3
            counts = list(zip(*(numbers[windows + i * counted :][:counted] for i in range(3)), strict=True))
            each = counted // lanes
            passes.append([Counts(counts[b * each :][:each], end) for b, end in enumerate(ends)])
        return passes

    def prepare(self, sequences: Sequence[SequenceState], work: Mapping[int, SequenceWork]) -> None:
        """Make the inputs of a pass that may come next; the next `run` uses them if it is that very pass."""
        self._prepared.append(
            Prepared(
                self.packer.key_of(sequences, work), tuple(sequences), *self.packer.pack(sequences, work)
            )
        )

    def _compute(self, key: GraphKey, work: Mapping[int, SequenceWork], inputs: Tensor) -> Tensor:
        *about_tokens, source, positions, edges, counted, endings, keys, progress, policy = unpack(
            inputs, key.shapes
        )
        if isinstance(self.model, Model):
            metadata = AttentionMetadata(key.max_q_len, key.max_kv_len, *about_tokens, causal=key.onward)
            assert self.kv_cache is not None
            ids = self.tokens[metadata.rows, metadata.positions]
            if self.known_first:  # all tokens in front of a lane's window are known, masks of a prompt too
                shift = self.packer.shift  # then the token in front of the window is of the window
                known = metadata.positions < edges[:, 0].sum(0)[metadata.rows] - shift
                if not shift:
                    known |= ids != self.mask_id
                metadata = metadata.known_first(known, both_ways=bool(shift))
            with own_precision(self.model, self.tokens.device):
                if any(group.rule is not None and group.rule.soft for group in key.groups):
                    stream = self._soft(ids, metadata, key.groups, edges)
                    x = self.model.final_norm(self.model.run_layers(stream, self.kv_cache, metadata))
                else:
                    x = self.model.step(ids, self.kv_cache, metadata)
                x = x[source]
                logits, hidden = self.model.head(x)[: len(positions)], x[: len(positions)]
        else:
            logits, hidden = self._foreign(work)[source], None
        policy = policy.view(torch.float32)[: 5 * keys.shape[1]].view(-1, 5)
        predicted = Predicted(logits, positions, keys, progress, policy, self.lane, key.cells, hidden)
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
        counts = self._complete(self._commit(positions, decided, counted), decided)
        if before is not None:
            self._record(before, positions, keys[0, :: self.windows_of_lane], decided)
            if key.top:
                self._record_top(before, predicted, key.groups, decided)
        error = functools.reduce(torch.minimum, [each.error for each in decided])
        ends = [
            commit_(self.tokens, mask_id=eos, start=ending[0], end=ending[1]).first
            for eos, ending in zip(key.eos_ids, endings, strict=True)
        ]
        end = [functools.reduce(torch.minimum, ends)] if ends else []
        return torch.cat((error, *counts, *end))

    def _commit(self, positions: Tensor, decided: Sequence[Decided], counted: Tensor) -> CommitOutput:
        """Write the decided tokens, and count the blocks in columns `counted` (2, lanes * k)."""
        commit, token = None, None
        for each in decided:  # groups have sequences, and so rows, of their own
            if each.remask is not None:
                flat = self.tokens.view(-1)
                flat[positions] = torch.where(each.remask, self.mask_id, flat[positions])
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

    def _soft(
        self, ids: Tensor, metadata: AttentionMetadata, groups: Sequence[SamplingGroup], edges: Tensor
    ) -> Stream:
        """The first layer's input for ids (N,), soft in the cells that soft rules read, see `Rule.soft`.

        edges: (groups, 4, W) int64, see `sampler.decide`.
        """
        tokens = self.model.embedded(ids).sum
        for group, windows in zip(groups, edges, strict=True):
            if group.rule is None or not group.rule.soft:
                continue
            first, last = windows[2:].view(2, len(self.tokens), -1)[:, metadata.rows]
            column = metadata.positions[:, None]
            soft = ((column >= first) & (column < last)).any(1)
            if not group.rule.edits:
                soft &= ids == self.mask_id
            shares = self.states[group.rule][0][metadata.rows, metadata.positions]
            shares = torch.where(soft if shares.ndim == 1 else soft[:, None], shares, 0)
            if shares.ndim == 1:
                mask = self.model.embedded(ids.new_full((1,), self.mask_id)).sum
                tokens = soft_embeddings(tokens, mask, shares)
            else:
                others = self.states[group.rule][1][metadata.rows, metadata.positions]
                others = others.clamp(0, self.model.shape.embedding_size - 1)
                each = (self.model.embedded(column).sum for column in others.unbind(1))
                tokens = mixed_embeddings(tokens, each, shares)
        return Stream(tokens)

    def _complete(self, counts: CommitOutput, decided: Sequence[Decided]) -> CommitOutput:
        """`counts` without the changes in blocks that need no further pass."""
        for each in decided:
            if each.complete is not None:
                lanes = len(self.tokens)
                done = each.complete.view(lanes, -1)[:, :1]  # such a rule has one block open
                changed = counts.changed.view(lanes, -1).masked_fill(done, 0).flatten()
                counts = counts._replace(changed=changed)
        return counts

    def _lane_of(self, each: int) -> Tensor | None:
        """(lanes * each,) int64: the lane of each window; None where each lane has one window."""
        if each == 1:
            return None
        return torch.arange(len(self.tokens), device=self.tokens.device).repeat_interleave(each)

    def _foreign(self, work: Mapping[int, SequenceWork]) -> Tensor:
        """Logits (B * L, V) of whole sequences of one length, from a model that takes no ragged batches."""
        x = self.tokens[list(work), : next(iter(work.values())).spans[-1].end]
        return logits_of(self.model, x).flatten(0, 1)

    def _record(self, before: Tensor, positions: Tensor, nfe: Tensor, decided: Sequence[Decided]) -> None:
        """Write the positions whose token differs from `before` (n,) to the trajectory."""
        fresh = before != self.tokens.view(-1)[positions]
        confidence, logprob = decided[0].stats.confidence, decided[0].stats.sample_logprob
        for other in (each.stats for each in decided[1:]):  # groups have sequences, and so rows, of their own
            confidence = torch.where(other.token >= 0, other.confidence, confidence)
            logprob = torch.where(other.token >= 0, other.sample_logprob, logprob)
        trajectory = self.trajectory
        steps = nfe[positions // self.tokens.shape[1]]
        for field, value in (
            (trajectory.step, steps),
            (trajectory.confidence, confidence),
            (trajectory.logprob, logprob),
        ):
            flat = field.view(-1)
            flat[positions] = torch.where(fresh, value, flat[positions])

    def _record_top(
        self,
        before: Tensor,
        predicted: Predicted,
        groups: Sequence[SamplingGroup],
        decided: Sequence[Decided],
    ) -> None:
        """Write the most probable tokens at the same positions to the trajectory."""
        top, positions = self.trajectory.top, predicted.positions
        assert top is not None
        fresh = before != self.tokens.view(-1)[positions]
        rows = torch.arange(len(positions), device=positions.device)
        for group, each in zip(groups, decided, strict=True):
            stats = each.stats
            found = most_probable(
                predicted.logits, rows, stats.sample, stats.sample_logprob, group, mask_id=self.mask_id
            )
            own = (fresh & (stats.token >= 0))[:, None]
            for field, value in zip(top, found, strict=True):
                flat = field.view(-1, field.shape[-1])
                flat[positions] = torch.where(own, value, flat[positions])
