"""The tensors that the passes of a batch read and write, which the next batch of the same size can reuse."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import model_store
from ..cache import KVCache, bucket
from ..models import Model
from ..ops.streams import stream_of
from ..rules import Rule
from ..types import RowTopK
from .graphs import CudaRecorder, Graphs, can_record
from .most_probable import MOST


@dataclass
class Trajectory:
    """When each generated token was committed, and how sure the model was."""

    step: Tensor
    """(B, R) int64, a column for each token of the response: the pass of the sequence that committed the
    token, from 1; 0 where no pass did."""
    confidence: Tensor
    """(B, R) float32: the token's probability in that pass, by softmax(logits); in `speculate` and
    `adaptive_decode` the probability that it was drawn with, exp(`logprob`). NaN where no pass committed
    it."""
    logprob: Tensor
    """(B, R) float32: the log-probability (nats) that the token was drawn with in that pass, see
    `RowStats.sample_logprob`; NaN where no pass committed it."""
    top: RowTopK | None = None
    """With `top_logprobs`, (B, R, K): the K most probable tokens of the place in that pass, see
    `most_probable`; -1 and NaN where no pass committed a token."""

    @classmethod
    def blank(cls, tokens: Tensor) -> Trajectory:
        """An empty trajectory, for every position of tokens (B, L)."""
        none = torch.full(tokens.shape, math.nan, device=tokens.device)
        return cls(torch.zeros_like(tokens, dtype=torch.int64), none, none.clone())

    def clear(self, b: int, start: int = 0, end: int | None = None) -> None:
        """Empty columns [start, end) of sequence b, by default all."""
        self.step[b, start:end].fill_(0)
        self.confidence[b, start:end].fill_(math.nan)
        self.logprob[b, start:end].fill_(math.nan)
        if self.top is not None:
            self.top.token[b, start:end].fill_(-1)
            self.top.logprob[b, start:end].fill_(math.nan)

    def hold_top(self) -> None:
        """Make room for the most probable tokens of each place, unless there is some."""
        if self.top is None:
            self.top = _blank_top((*self.step.shape, MOST), self.step.device)

    def responses(self, masked: Tensor, device: torch.device, top: int) -> Trajectory:
        """The trajectory at the positions `masked` (B, L) bool, a row for a sequence; blank beyond its end.

        B and L may be smaller than the trajectory's. `masked` is on the CPU, so that no device is waited for.
        device: where the result is. top: how many of the most probable tokens of each place it has.
        """
        counts = masked.sum(1)
        of_sequence = torch.arange(int(counts.max()) if len(counts) else 0, device="cpu") < counts[:, None]
        places = torch.full(of_sequence.shape, -1, device="cpu")
        places[of_sequence] = masked.nonzero()[:, 1]
        places = places.to(self.step.device)
        inside, places, blank = places >= 0, places.clamp(min=0), Trajectory.blank(places)

        def picked(values: Tensor, none: Tensor) -> Tensor:
            here, at = (each.view(*each.shape, *[1] * (none.ndim - 2)) for each in (inside, places))
            return torch.where(here, values[: len(masked)].gather(1, at.expand_as(none)), none).to(device)

        found = Trajectory(
            picked(self.step, blank.step),
            picked(self.confidence, blank.confidence),
            picked(self.logprob, blank.logprob),
        )
        if top and self.top is not None:
            of_top = RowTopK(*(values[..., :top] for values in self.top))
            found.top = RowTopK(*map(picked, of_top, _blank_top((*places.shape, top), places.device)))
        return found


def _blank_top(shape: Sequence[int], device: torch.device) -> RowTopK:
    """The most probable tokens of places where no pass committed a token."""
    token = torch.full(tuple(shape), -1, device=device)
    return RowTopK(token, torch.full(token.shape, math.nan, device=device))


def graphs_on(device: torch.device) -> Graphs | None:
    """A recorder of passes on the device; None where it cannot record."""
    return Graphs(CudaRecorder(device)) if can_record(device) else None


@dataclass
class Workspace:
    """The tensors that recorded passes read and write, and the recordings; for one batch after another."""

    tokens: Tensor
    """(lanes, L) int64"""
    kv_cache: KVCache | None
    trajectory: Trajectory
    """For every column of every lane; written for sequences whose settings record it."""
    given: Tensor
    """(lanes, L) bool: positions that rules which edit may not change."""
    graphs: Graphs | None
    """None: nothing is recorded."""
    suppressed: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    """Ids to suppress, ascending -> the tensor of them that recorded passes read."""
    states: dict[Rule, tuple[Tensor, ...]] = field(default_factory=dict)
    """The state tensors of rules."""
    key: Hashable = None
    """The key under which the model keeps it; None: it is not kept."""
    size: int = 0
    """Bytes of its cache."""
    session: Any = None
    """The `speculation.DraftSession` whose tensors recorded passes read, if there is one."""

    @classmethod
    def of(cls, tokens: Tensor, kv_cache: KVCache | None, *, graphs: bool = False) -> Workspace:
        """A fresh workspace. graphs: record passes, if the device can."""
        recorder = graphs_on(tokens.device) if graphs else None
        given = torch.ones_like(tokens, dtype=torch.bool)
        return cls(tokens, kv_cache, Trajectory.blank(tokens), given, recorder)

    @classmethod
    def take(
        cls,
        model: Model,
        lanes: int,
        width: int,
        mask_id: int,
        *,
        cached: bool,
        drafter: Any = None,
    ) -> Workspace | None:
        """A workspace of at least `width` positions, which an earlier batch has left with the model, or a
        fresh one; None where the model could not keep it.

        cached: whether keys and values outlive a pass. drafter: the drafter whose session the passes read.
        All else that recorded passes depend on is in their `GraphKey`.
        """
        s, device = model.shape, model.device
        length = bucket(width)
        of_layer = 2 * lanes * s.kv_heads * length * s.head_dim * model.dtype.itemsize
        size = of_layer * (s.layers if cached else 1)
        if not can_record(device) or not lanes or size > model_store.BYTES:
            return None
        precision = torch.backends.cuda.matmul.fp32_precision
        # The stream is in the key: work of the next batch is ordered after all work of the last.
        key = device, stream_of(device), model.dtype, precision, lanes, length, mask_id, cached, drafter
        workspace: Workspace | None = model_store.take(model, key)
        if workspace is None:
            tokens = torch.empty((lanes, length), dtype=torch.int64, device=device)
            workspace = cls.of(tokens, model.new_cache(lanes, length, kept=cached), graphs=True)
            workspace.key, workspace.size = key, size
        return workspace

    def suppress(self, ids: Tensor | None, device: torch.device) -> Tensor | None:
        """The ids, ascending, on the device: the same object for the same ids. None without an id."""
        key = () if ids is None else tuple(ids.unique().tolist())
        if not key:
            return None
        if key not in self.suppressed:
            if len(self.suppressed) == 64:
                self.suppressed.clear()
            self.suppressed[key] = torch.tensor(key, device=device)
        return self.suppressed[key]

    def keep(self, model: Model) -> None:
        """Keep it with the model for `take`, if that made it and the session can go on; the caller must not
        use it any more."""
        for rule in [rule for rule in self.states if not rule.recorded]:
            del self.states[rule]  # a function may hold on to the model
        session = self.session
        size = self.size + (0 if session is None else session.size)
        records = self.graphs is not None and self.graphs.recorder is not None
        goes_on = records and (session is None or session.recorded)
        if self.key is not None and goes_on and size <= model_store.BYTES:
            model_store.put(model, self.key, self, size)
