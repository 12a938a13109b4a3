"""What guesses the tokens that a verify pass looks at: the protocol of drafters.

A drafter changes how many passes a text takes, never the text: whatever it guesses, only the model's own
choices are emitted. So a drafter may be as rough as it likes, and has no temperature.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn

from ..cache import AttentionMetadata, KVCache
from ..decoding.workspace import graphs_on
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


class Riders(Protocol):
    """Rows of a verify pass that are not verified: each guesses a token, for the draft of the next pass.

    A rider has its place in a chain behind a node of the draft (or the root) and sees what the node sees, the
    node, and the chain in front of it. It joins the pass in front of a layer, by what `born` makes of the
    node's stream there; its keys and values of earlier layers do not exist, and the others are never kept.
    So a rider's logits are those of a token that was not there to be known, and its row brings the pass no
    token. The text does not depend on it.
    """

    most: int
    """How many may ride behind a node."""
    layer: int
    """The layer in front of which riders join; 0: the first."""

    def born(self, nodes: Tensor, numbers: Tensor) -> Tensor:
        """(R, width): the stream of R riders. nodes: (R, width), that of each one's node; numbers: (R,)
        int64, its place in the chain, from 0. Part of the pass, which may be recorded."""

    def guess(self, logits: Tensor, rows: Tensor, suppress: Tensor | None) -> Tensor:
        """(B, K) int64, what the host is to hear of each lane: see `DraftSession.guessed`. Part of the pass.

        rows: (B, most) int64, the rows of `logits` (M, V) that are the riders of the last accepted node; of
        these so many are the lane's as rode there, and the rest may be any. suppress: (n,) ids that the
        model never chooses.
        """


class DraftSession:
    """What a drafter remembers of the sequences in a batch's lanes. A session has `propose`, and of the rest
    what it needs.

    In an engine a sequence may begin with pages that others have filled, and pages are shared as soon as the
    model's passes have filled them. What `observe` and `moved` put into pages is there for every position
    that is in the cache, whoever's pass has computed it; what `propose` puts there may not be, but for keys
    and values of the model itself, see `KeepsStreams`.
    """

    taps: tuple[int, ...] = ()
    """Layers of the model, ascending, behind which it wants to see the residual stream; -1: the embedding."""
    recorded: bool = False
    """Whether it may serve the next batch like this one, `reset` for each lane, with the recordings that read
    its tensors. It then says the `addresses` of its weights, and does not keep the model alive."""
    size: int = 0
    """Bytes of the tensors that are its own."""
    riders: Riders | None = None
    """How the riders of its drafts come to be; such a session has no taps, and keeps no streams. A pass over
    a prompt may have riders too, so it is then asked for drafts of these lanes, which have no nodes."""

    def reset(self, lane: int) -> None:
        """A sequence begins in the lane."""

    def addresses(self) -> Sequence[int]:
        """Where the weights lie that its part of the passes reads."""
        return ()

    def observe(self, metadata: AttentionMetadata, taps: Sequence[Tensor]) -> None:
        """A pass of the model has computed the tokens of `metadata`; taps: (N, width) behind each of `taps`.

        Part of the pass, which may be recorded: nothing of it may wait for the device. Tokens of drafts are
        among them that the pass then refuses; the next pass computes the places behind the accepted ones
        again.
        """

    def moved(self, source: Tensor, target: Tensor) -> None:
        """What a path of a tree has put into slots `source` (B, M) lies in `target` from now on, as
        `ops.kv_move` has it. Part of the pass."""

    def guessed(self, lane: int, riders: int, numbers: Sequence[int]) -> None:
        """What a pass with the lane has guessed: so many riders rode behind the node whose choice is the new
        root, and `numbers` are the K that `Riders.guess` made of them; none where none rode."""

    def propose(self, lanes: Sequence[Lane], sizes: Sequence[int]) -> list[Draft]:
        """A draft for each of `lanes`, of at most so many nodes, riders among them, each."""
        raise NotImplementedError


class RecordedSession(DraftSession):
    """A session with passes of its own, recorded where the batch's are; it does not keep the model alive.

    weights: of the drafter.
    """

    def __init__(self, weights: nn.Module, model: Model, graphs: bool) -> None:
        self.weights, self._target = weights, weakref.ref(model)
        self.graphs = graphs_on(model.device) if graphs else None

    @property
    def model(self) -> Model:
        model = self._target()
        assert model is not None  # its batch is there
        return model

    @property
    def recorded(self) -> bool:  # type: ignore[override]
        return self.graphs is not None and self.graphs.recorder is not None

    def addresses(self) -> Sequence[int]:
        return [p.data_ptr() for p in self.weights.parameters()]

    def reset(self, lane: int) -> None:
        """Recordings go where weights have moved. What of the lane was written before is overwritten before
        it is seen."""
        if self.graphs is not None:
            of_model = self.model.addresses()
            self.graphs.drop_stale(None if of_model is None else [*of_model, *self.addresses()])


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


@runtime_checkable
class Apart(Protocol):
    """A drafter whose sessions have no part in the model's passes: neither taps nor streams nor riders, and
    nothing to do where a pass is observed or a path moves. So passes recorded with one serve with another."""

    apart: Literal[True]


@runtime_checkable
class Expecting(Protocol):
    """A drafter that knows how many tokens a pass with its drafts may bring."""

    def expected(self, size: int) -> float:
        """Tokens of a pass whose draft has `size` nodes, riders among them, on average."""
