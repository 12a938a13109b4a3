"""What the passes of a batch write beside tokens and cache, and what outlives it for the next like it."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import kept
from ..cache import GRAPH_BUCKETS, KVCache
from ..models import Model
from ..ops.streams import stream_of
from ..rules import Rule
from .graphs import CudaRecorder, Graphs, can_record


@dataclass
class Trajectory:
    """When each generated token was committed, and how sure the model was."""

    step: Tensor
    """(B, R) int64, a column for each token of the response: the sequence's pass that committed it, from 1;
    0 where none did."""
    confidence: Tensor
    """(B, R) float32: its probability in that pass; NaN where none did."""
    logprob: Tensor
    """(B, R) float32: log of the probability that it was drawn with in that pass, see
    `RowStats.sample_logprob`; NaN where none did."""

    @classmethod
    def blank(cls, tokens: Tensor) -> Trajectory:
        """For every position of tokens (B, L)."""
        none = torch.full(tokens.shape, math.nan, device=tokens.device)
        return cls(torch.zeros_like(tokens, dtype=torch.int64), none, none.clone())

    def clear(self, b: int) -> None:
        """Forget what sequence b was."""
        self.step[b].fill_(0)
        self.confidence[b].fill_(math.nan)
        self.logprob[b].fill_(math.nan)

    def responses(self, masked: Tensor) -> Trajectory:
        """What it says of the positions `masked` (B, L) bool, a row for a sequence; blank beyond its end.

        B and L may be less than what it is for. The mask is on the CPU: a device would be waited for.
        """
        counts = masked.sum(1)
        of_sequence = torch.arange(int(counts.max()) if len(counts) else 0) < counts[:, None]
        places = torch.full(of_sequence.shape, -1)
        places[of_sequence] = masked.nonzero()[:, 1]
        places = places.to(self.step.device)
        inside, places, blank = places >= 0, places.clamp(min=0), Trajectory.blank(places)
        return Trajectory(
            *(
                torch.where(inside, getattr(self, name)[: len(masked)].gather(1, places), none)
                for name, none in vars(blank).items()
            )
        )


def graphs_on(device: torch.device) -> Graphs | None:
    """What records passes on the device, if it can."""
    return Graphs(CudaRecorder(device)) if can_record(device) else None


@dataclass
class Workspace:
    """What recorded passes read and write, and the recordings. It can serve one batch after another."""

    tokens: Tensor
    """(lanes, L) int64"""
    kv_cache: KVCache | None
    trajectory: Trajectory
    """Of the sequences that want it, by column."""
    graphs: Graphs | None
    """None: nothing is recorded."""
    suppressed: dict[tuple[int, ...], Tensor]
    """For ids to suppress, ascending, the tensor that recorded passes read."""
    given: Tensor
    """(lanes, L) bool: what rules that edit may not change."""
    states: dict[Rule, tuple[Tensor, ...]]
    """What rules remember."""
    key: Hashable = None
    size: int = 0
    """What it is kept under, and the bytes of its cache."""
    session: Any = None
    """Of a drafter, what recorded passes read of it, a `speculation.DraftSession`."""

    @classmethod
    def of(cls, tokens: Tensor, kv_cache: KVCache | None, *, graphs: bool = False) -> Workspace:
        """A fresh one; `graphs`: where the device has them."""
        found = graphs_on(tokens.device) if graphs else None
        return cls(
            tokens,
            kv_cache,
            Trajectory.blank(tokens),
            found,
            {},
            torch.ones_like(tokens, dtype=torch.bool),
            {},
        )

    @classmethod
    def take(
        cls,
        model: Model,
        lanes: int,
        width: int,
        mask_id: int,
        device: torch.device,
        *,
        cached: bool,
        drafter: Any = None,
    ) -> Workspace | None:
        """The one that an earlier batch of the model gave back, or a fresh one; None where it could not be
        kept. It has at least `width` positions.

        cached: whether keys and values outlive a pass. drafter: whose session the passes read. What else
        recorded passes depend on, their forms say.
        """
        s = model.shape
        length = GRAPH_BUCKETS(width)
        of_layer = 2 * lanes * s.kv_heads * length * s.head_dim * model.dtype.itemsize
        size = of_layer * (s.layers if cached else 1)
        if not can_record(device) or not lanes or size > kept.BYTES:
            return None
        precision = torch.backends.cuda.matmul.fp32_precision
        # Always used from one stream: whoever takes it comes after all that was done with it before.
        key = device, stream_of(device), model.dtype, precision, lanes, length, mask_id, cached, drafter
        found: Workspace | None = kept.take(model, key)
        if found is None:
            tokens = torch.empty((lanes, length), dtype=torch.int64, device=device)
            found = cls.of(tokens, model.new_cache(lanes, length, kept=cached), graphs=True)
            found.key, found.size = key, size
        return found

    def give(self, model: Model) -> None:
        """Keep it for `take`; whoever gives it back does not use it any more."""
        for rule in [rule for rule in self.states if not rule.recorded]:
            del self.states[rule]  # a function may hold on to the model
        size = self.size + (0 if self.session is None else self.session.size)
        if self.graphs is not None and self.graphs.recorder is not None and size <= kept.BYTES:
            kept.give(model, self.key, self, size)
