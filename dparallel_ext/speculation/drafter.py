"""What guesses the tokens that a verify pass looks at: the protocol of drafters.

A drafter changes how many passes a text takes, never the text: whatever it guesses, only the model's own
choices are emitted. So a drafter may be as rough as it likes, and has no temperature.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from ..cache import AttentionMetadata, KVCache
from ..models import Model, Stream
from .draft import Draft
from .sequence import SamplingGroup


class Lane(NamedTuple):
    """A sequence that a draft is asked for."""

    lane: int
    tokens: Tensor
    """(n,) int64 on the CPU: prompt and what is decoded, the last of them the root of the draft. All but the
    root are in the cache."""
    length: int
    """Positions that the sequence may come to have: the slots behind are not its own."""
    sampling: SamplingGroup
    """How the model's own choices are made."""
    key: tuple[int, int]
    """Of their noise: seed, sequence. The position of the chosen token is the third number, the last is 0."""
    eos_ids: tuple[int, ...] = ()
    """The first of them ends the sequence."""

    @property
    def suppress(self) -> Tensor | None:
        """(n,) int64 on the device: ids that the model never chooses."""
        return self.sampling.suppress

    @property
    def room(self) -> int:
        """Tokens that may still come behind the root."""
        return self.length - len(self.tokens)


class DraftSession(Protocol):
    """What a drafter remembers of the sequences in a batch's lanes.

    In an engine a sequence may begin with pages that others have filled, and pages are shared as soon as the
    model's passes have filled them. What `observe` and `moved` put into pages is there for every position
    that is in the cache, whoever's pass has computed it; what `propose` puts there may not be, but for keys
    and values of the model itself, see `KeepsStreams`.
    """

    taps: tuple[int, ...]
    """Layers of the model, ascending, behind which it wants to see the residual stream; -1: the embedding."""

    def reset(self, lane: int) -> None:
        """A sequence begins in the lane."""

    def observe(self, metadata: AttentionMetadata, taps: Sequence[Tensor]) -> None:
        """A pass of the model has computed the tokens of `metadata`; taps: (N, width) behind each of `taps`.

        Part of the pass, which may be recorded: nothing of it may wait for the device. Tokens of drafts are
        among them that the pass then refuses; the next pass computes the places behind the accepted ones
        again.
        """

    def moved(self, source: Tensor, target: Tensor) -> None:
        """What a path of a tree has put into slots `source` (B, M) lies in `target` from now on, as
        `ops.kv_move` has it. Part of the pass."""

    def propose(self, lanes: Sequence[Lane], sizes: Sequence[int]) -> list[Draft]:
        """A draft for each of `lanes`, of at most so many nodes each."""


@runtime_checkable
class KeepsStreams(Protocol):
    """A session that drafts with layers of the model itself, which the verify pass does not run again."""

    def streams(self, metadata: AttentionMetadata) -> Stream:
        """Of the packed tokens of `metadata`, roots and nodes of drafts, what layer `Draft.start` gets. The
        layers in front of it have written these tokens' keys and values. Part of the pass, as `observe`."""


@runtime_checkable
class Drafter(Protocol):
    """Guesses tokens. One object serves any number of batches, each with a session of its own."""

    most: int
    """The most nodes of a draft that are of use."""

    def check(self, model: Model) -> None:
        """Raise ValueError where it cannot draft for the model: another vocabulary, another target."""

    def session(self, model: Model, kv_cache: KVCache, lanes: int, *, graphs: bool = True) -> DraftSession:
        """For a batch of so many lanes; graphs: passes may be recorded. What it keeps of positions belongs
        into pages like those of `kv_cache`, under its `block_table`, so that sequences that share a beginning
        share this too."""
