"""The protocol of drafters, which guess the tokens that a verify pass checks.

A drafter changes how many passes a text takes, never the text: whatever it guesses, only the model's own
choices are emitted. So a drafter may be approximate, and has no temperature.
"""

from __future__ import annotations

import copy
import functools
import itertools
import weakref
from collections.abc import Sequence
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from ..arguments import shown
from ..automaton import Automaton
from ..cache import AttentionMetadata, KVCache
from ..decoding.graphs import recorded_key, run_pass
from ..decoding.padding import recorded_rows, row_padding
from ..decoding.sequence_settings import SamplingGroup
from ..decoding.workspace import graphs_on
from ..models import Model, Stream
from ..packed import Packing, Shapes
from .draft import Draft

EMBEDDING = -1
"""The tap in front of the first layer: the token's embedding."""
Weights = TypeVar("Weights", bound=nn.Module)


class Lane(NamedTuple):
    """A sequence to make a draft for."""

    lane: int
    tokens: Tensor
    """(n,) int64 on the CPU: a copy of prompt and decoded tokens. The last is the root of the draft; all
    others are in the cache."""
    length: int
    """The most positions of the sequence: slots beyond are not its own."""
    sampling: SamplingGroup
    """How the model's own choices are made."""
    key: tuple[int, int]
    """Seed and sequence number of the choices' noise, whose full key is (seed, sequence, position, 0), with
    the position of the chosen token."""
    eos_ids: tuple[int, ...] = ()
    """Tokens that end the sequence."""
    automaton: Automaton | None = None
    """The form of the response."""
    state: int = 0
    """The automaton's state behind the root."""

    @property
    def suppress(self) -> Tensor | None:
        """(n,) int64 on the device: ids that the model never chooses."""
        return self.sampling.suppress

    @property
    def room(self) -> int:
        """The most tokens that may still come after the root."""
        return self.length - len(self.tokens)


class Riders(Protocol):
    """Rows of a verify pass that are not verified: each guesses a token for the draft of the next pass.

    A rider is in a chain behind a node of the draft (or the root); it sees what the node sees, the node, and
    the riders before it in the chain. It joins the pass before layer `layer`, with the stream that `embed`
    makes from the node's; it has no keys and values of earlier layers, and its keys and values of later
    layers are not kept. A rider emits no token, and the text does not depend on it.
    """

    most: int
    """The most riders of a node."""
    layer: int
    """The layer before which riders join the pass; 0: the first."""

    def embed(self, nodes: Tensor, numbers: Tensor) -> Tensor:
        """(R, width): the streams with which R riders join the pass. nodes: (R, width), the stream of each
        rider's node; numbers: (R,) int64, its place in the chain, from 0. Part of the pass, which may be
        recorded."""

    def guess(self, logits: Tensor, rows: Tensor, suppress: Tensor | None) -> Tensor:
        """(B, K) int64: numbers for `DraftSession.guessed` of each lane. Part of the pass.

        rows: (B, most) int64, the rows of `logits` (M, V) of the last accepted node's riders; if that node
        has fewer riders, the remaining rows are arbitrary. suppress: (n,) ids that the model never chooses.
        """


@runtime_checkable
class Adapting(Protocol):
    """Riders whose rows run through layers of their own, where all other rows run through the model's."""

    def through(self, model: Model, riding: Tensor) -> Model:
        """The model whose layers a pass runs. riding: (N, 1) bool, the packed tokens that are riders. The
        result of every other token is the model's own."""


class Observation(NamedTuple):
    """A pass of the model over N packed tokens with M rows of logits, as `DraftSession.observe` gets it. The
    pass itself reads the same tensors afterwards, so a session changes none of them."""

    metadata: AttentionMetadata
    """Of the packed tokens, those of riders included."""
    ids: Tensor
    """(N,) int64: the packed tokens; riders have none, and are left out."""
    taps: tuple[Tensor, ...]
    """(N, width) each: the streams after the layers of `DraftSession.taps`."""
    source: Tensor
    """(M,) int64: the packed token of each row of logits: of every lane the root, and the nodes and riders of
    its draft. Padding repeats the last of them."""
    logits: Tensor
    """(M, V)"""


class DraftSession:
    """A drafter's state for the sequences in a batch's lanes. A session implements `propose`, and the other
    methods that it needs.

    In an engine a sequence may begin with pages that others have filled, and pages are shared as soon as the
    model's passes have filled them. So data that `observe` and `moved` write into pages is there for every
    cached position, whichever sequence's pass has computed it. Data that `propose` writes may be missing,
    except for the model's own keys and values, see `KeepsStreams`.
    """

    taps: tuple[int, ...] = ()
    """Layers of the model, ascending, after which `observe` gets the residual stream; -1: the embedding."""
    recorded: bool = False
    """Whether the next batch of the same size may use the session, after `begin` and `reset` for each lane,
    with the recordings that read its tensors. It then returns the `addresses` of its weights, and does not
    keep the model alive."""
    size: int = 0
    """Bytes of its own tensors."""
    riders: Riders | None = None
    """Makes the riders of its drafts; such a session has no taps, and keeps no streams. A pass over a prompt
    may have riders too, so `propose` is then called for these lanes too, whose drafts have no nodes."""

    def begin(self) -> None:
        """Forget all that an earlier batch has left: the next begins. A batch's first session is fresh."""

    def reset(self, lane: int) -> None:
        """Reset the state of a lane in which a sequence begins."""

    def addresses(self) -> Sequence[int] | None:
        """The addresses of the weights that its part of the passes reads; None: that cannot be recorded."""
        return ()

    def observe(self, seen: Observation) -> None:
        """Take what it needs of a pass, before the pass accepts any of its draft.

        Part of the pass, which may be recorded, so nothing may wait for the device. Some of the tokens are
        guesses that the pass then refuses; the next pass computes their positions again.
        """

    def moved(self, source: Tensor, target: Tensor) -> None:
        """Move the data of an accepted path from slots `source` (B, M) to `target`, as `ops.kv_move` moves
        keys and values. Part of the pass."""

    def guessed(self, lane: int, riders: int, numbers: Sequence[int]) -> None:
        """Take a pass's guesses for the lane: the number of riders of the node whose choice is the new root,
        and the K numbers that `Riders.guess` made from them; none without riders."""

    def propose(self, lanes: Sequence[Lane], sizes: Sequence[int]) -> list[Draft]:
        """A draft for each of `lanes`, of at most the given number of nodes and riders."""
        raise NotImplementedError(f"{type(self).__name__}: expected a method propose(lanes, sizes)")


class DraftKey(NamedTuple):
    """All that the launches of a drafter's pass depend on, beside the values of its inputs."""

    shapes: Shapes
    """Of the inputs."""
    numbers: tuple[int, ...]
    """Further numbers that the drafter's `_compute` reads."""
    groups: tuple[SamplingGroup, ...]

    def suppressed(self, vocabulary: int) -> dict[int, Tensor]:
        """The number of each group that suppresses ids -> (vocabulary,) bool: which. Part of the pass."""
        return {
            number: torch.zeros(vocabulary, dtype=torch.bool, device=ids.device).index_fill_(0, ids, True)
            for number, group in enumerate(self.groups)
            if (ids := group.suppress) is not None
        }


class RecordedSession(DraftSession):
    """A session with passes of its own, recorded if the batch's are; it does not keep the model alive.

    weights: the drafter's module, if it has one.
    """

    def __init__(self, weights: nn.Module | None, model: Model, graphs: bool) -> None:
        self.weights, self._target = weights, weakref.ref(model)
        self.graphs = graphs_on(model.device) if graphs else None
        self._pad_to, self._recorded_rows = row_padding(model), recorded_rows(model)

    @property
    def model(self) -> Model:
        model = self._target()
        assert model is not None  # the batch keeps it
        return model

    @property
    def recorded(self) -> bool:  # type: ignore[override]
        return self.graphs is not None and self.graphs.recorder is not None

    def addresses(self) -> Sequence[int] | None:
        return [] if self.weights is None else [p.data_ptr() for p in self.weights.parameters()]

    def reset(self, lane: int) -> None:
        """Drop recordings if weights have moved. Data of the lane needs no reset: it is overwritten before it
        is read."""
        if self.graphs is not None:
            self.graphs.drop_stale(self.model.addresses(), self.addresses())

    def _put_sources(self, packing: Packing, source: Sequence[int]) -> int:
        """Pack the rows whose logits a pass needs; return their number, padding included."""
        count = len(source) if self._pad_to is None else self._pad_to(len(source))
        packing.padded(source, 0, count)
        return count

    def _run_pass(
        self, packing: Packing, numbers: tuple[int, ...], groups: tuple[SamplingGroup, ...]
    ) -> Tensor:
        """The result of a pass with these inputs. numbers, groups: see `DraftKey`."""
        device = self.model.device
        inputs, shapes = packing.pack(device)
        key = DraftKey(shapes, numbers, groups)
        compute = functools.partial(self._compute, key)
        rows = max(shape[0] for shape in shapes)  # of the largest pass, or a few more
        graph_key = recorded_key(key, rows, self._recorded_rows)
        return run_pass(self.graphs, graph_key, inputs, compute, device=device, held=key)

    def _compute(self, key: DraftKey, inputs: Tensor) -> Tensor:
        """The work of a pass on the device, which may be recorded."""
        raise NotImplementedError


class Placed(Generic[Weights]):
    """A drafter's weights on a device and in a dtype; a copy, unless they are there, is kept for the next
    call."""

    def __init__(self, weights: Weights) -> None:
        self._weights = self._copy = weights

    def __call__(self, device: torch.device, dtype: torch.dtype) -> Weights:
        for held in (self._weights, self._copy):  # not read again below: other threads place copies, too
            if all((p.device, p.dtype) == (device, dtype) for p in held.parameters()):
                return held
        # Tensors made outside inference mode can be used anywhere.
        with torch.inference_mode(False), torch.no_grad():
            copied = copy.deepcopy(self._weights).to(device, dtype)
        self._copy = copied
        return copied


@runtime_checkable
class KeepsStreams(Protocol):
    """A session that drafts with layers of the model itself, which the verify pass does not run again."""

    def streams(self, metadata: AttentionMetadata) -> Stream:
        """The input of layer `Draft.start`, (N, width), for the packed tokens of `metadata`: roots and nodes
        of drafts, whose keys and values the layers before it have written. Part of the pass, as `observe`."""


@runtime_checkable
class Drafter(Protocol):
    """Guesses tokens. One object serves any number of batches, each with a session of its own."""

    most: int
    """The most nodes of a draft that it can make use of."""

    def check(self, model: Model) -> None:
        """Raise ValueError if it cannot draft for the model: another vocabulary, another target. By default
        it goes with every model."""
        return

    def session(self, model: Model, kv_cache: KVCache, lanes: int, *, graphs: bool = True) -> DraftSession:
        """A session for a batch of `lanes` lanes; graphs: passes may be recorded. It keeps data about
        positions in pages like those of `kv_cache`, under its `block_table`, so that sequences with a common
        prefix share this data too."""


def check_session(drafter: Drafter, session: Any, model: Model) -> None:
    """Raise ValueError unless `session` is a DraftSession with layers of the model as its taps, without a
    part in the model's passes if the drafter is `Apart`."""
    if not isinstance(session, DraftSession):
        raise ValueError(f"drafter: expected a DraftSession from session, got {type(session).__name__}")
    if session.taps:
        check_layers("drafter: taps", session.taps, EMBEDDING, model.shape.layers)
    observes = getattr(session.observe, "__func__", None) is not DraftSession.observe
    part = observes or session.taps or session.riders is not None or isinstance(session, KeepsStreams)
    if part and isinstance(drafter, Apart):
        raise ValueError(
            "drafter: apart: expected no such attribute of a drafter with taps, riders, streams or a method "
            "observe"
        )


def check_layers(name: str, layers: Any, least: int, target_layers: int) -> None:
    """Raise ValueError unless `layers` are ascending numbers of layers of the target, from `least` on."""
    are_numbers = isinstance(layers, (list, tuple)) and all(type(layer) is int for layer in layers)
    inside = are_numbers and layers and least <= layers[0] and layers[-1] < target_layers
    if not inside or any(a >= b for a, b in itertools.pairwise(layers)):
        raise ValueError(
            f"{name}: expected ascending numbers of layers of [{least}, {target_layers}), got {shown(layers)}"
        )


@runtime_checkable
class Apart(Protocol):
    """A drafter whose sessions have no part in the model's passes: no taps, streams or riders, and nothing to
    do in `observe` and `moved`. Passes recorded with one such drafter can be replayed with another."""

    apart: Literal[True]


@runtime_checkable
class PredictsAcceptance(Protocol):
    """A drafter that can predict how many tokens a pass with its drafts emits."""

    def expected(self, size: int) -> float:
        """The mean number of tokens that a pass emits if its draft has `size` nodes and riders."""
