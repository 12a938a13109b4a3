"""Trains drafters with riders: prompt tokens (PPD), Hidden Transfer, and adapters of masks (I-DLM's R-ISD).

A step puts a chain of riders, one for each distance, behind random places of the target's answers. A rider
sees the text up to its place and the riders before it. It learns the target's distribution in the row of the
true token at the rider's position, by KL(target || rider) with weight .8^i at distance i (PPD, arXiv
2405.18628; Hidden Transfer, 2404.12022, distils the same way). In the loss the rider's logits are divided by
`soften`, since only their order is used: the few numbers of a prompt token cannot lower the head's
confidence, and at `soften` 1 most of the loss is from places where the next tokens cannot be known (300 steps
for `builtin:causal`: the first rider's best token is right in 38% at 1, in 49% at 3). Maps of Hidden Transfer
can, and are better at 1. Only the kind's own parameters get a gradient: of an adapter, which takes part in
the rows of masks alone (2604.11035), its matrices.

At the end the ranks are measured on answers that were not trained on: how often the true token is a rider's
most probable one, the second, and so on. The drafter's trees are built from these ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dparallel_ext import models
from dparallel_ext.arguments import check_fields, number, whole
from dparallel_ext.models import IDLM, rope
from dparallel_ext.models.modules import attention, rotate
from dparallel_ext.speculation import HiddenTransfer, PromptTokens, RiderDrafter, StridedDrafter, strided
from dparallel_ext.speculation.adapter import Adapter, LowRank
from dparallel_ext.speculation.checkpoint import ADAPTER_FILES, DraftCheckpoint
from dparallel_ext.speculation.drafter import Adapting, Riders
from dparallel_ext.speculation.riders import GUESSES, rider_config

from ..adapters import lora_names
from .common import Answer, DrafterSettings, SavableDrafter, Target, Trainee, drawn, places_of

DECAY = 0.8
"""The weight of a rider relative to the one before it."""


@dataclass(frozen=True)
class RiderSettings(DrafterSettings):
    riders: int = 3
    """Riders of a node: the number of tokens beyond the next that are guessed."""
    soften: float = 1.0
    """Divides the riders' logits in the loss."""
    ema: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, ("riders",), whole, 1, 16)
        check_fields(self, ("soften",), number)
        if not 0 < self.soften <= 100:
            raise ValueError(f"soften: expected a number above 0 and at most 100, got {self.soften}")


@dataclass(frozen=True)
class PromptSettings(RiderSettings):
    KINDS = (PromptTokens.KIND,)
    kind: str = PromptTokens.KIND
    adam_lr: float = 0.1
    soften: float = 3.0


@dataclass(frozen=True)
class TransferSettings(RiderSettings):
    KINDS = (HiddenTransfer.KIND,)
    kind: str = HiddenTransfer.KIND
    adam_lr: float = 3e-3
    layer: int | None = None
    """The layer before which riders join; None: the middle one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, ("layer",), whole, 1)


@dataclass(frozen=True)
class StridedSettings(RiderSettings):
    KINDS = (strided.KIND,)
    kind: str = strided.KIND
    muon_lr: float = 1e-2
    rank: int = 128
    """Of the adapter's matrices. The released adapter has 128. PEFT's factor alpha / rank is 1: to Muon and
    AdamW another factor would be another rate."""
    target_modules: tuple[str, ...] | None = None
    """The adapted layers, by our names or the checkpoint's; None: all of `adapters.LORA_TARGETS`."""
    mask_id: int | None = None
    """The token that the riders are; None: the model's or its tokenizer's, else that of I-DLM's releases."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, ("rank",), whole, 1, 2**14)


class _RiderTrainee(Trainee):
    measured = 200

    def __init__(self, target: Target, settings: RiderSettings) -> None:
        self._target, self._settings = target.model, settings
        self.config = rider_config(target.model, settings.riders, target.origin(settings.kind))

    @property
    def riders(self) -> Any:
        """The `Riders` of the module's parameters."""
        return self.module

    def loss_of(self, answers: Sequence[Answer], step: int) -> Tensor:
        some, generator = drawn(answers, self._settings, step)
        placed = place(some, self._settings.riders, self._settings.anchors, generator)
        student, teacher, _ = logits_of(self.riders, self._target, placed)
        student = student / self._settings.soften
        kl = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True)
        distance = placed.asked.nonzero()[:, 2].to(kl.device)
        weight = DECAY**distance
        return (kl.sum(-1) * weight).sum() / weight.sum()

    def drafter(self, source: str, measured: Sequence[Answer]) -> SavableDrafter:
        return RiderDrafter(self.riders, ranks_of(self.riders, self._target, measured), source)


class PromptTokensTrainee(_RiderTrainee):
    SETTINGS = PromptSettings

    @property
    def matrices(self) -> list[torch.nn.Parameter]:
        return []  # AdamW trains embeddings, as in a model

    def build(self) -> PromptTokens:
        """Prompt tokens, initialised by the embeddings of random tokens of the vocabulary."""
        module = PromptTokens(self.config)
        some = torch.randint(module.vocabulary, (module.most,))
        with torch.no_grad():
            module.prompt.copy_(self._target.embed.weight[some.to(self._target.device)])
        return module


class HiddenTransferTrainee(_RiderTrainee):
    SETTINGS = TransferSettings

    def __init__(self, target: Target, settings: TransferSettings) -> None:
        super().__init__(target, settings)
        layers = target.model.shape.layers
        layer = max(1, layers // 2) if settings.layer is None else settings.layer
        if not layer < layers:
            raise ValueError(f"layer: expected one of [1, {layers}), got {layer}")
        self.config["layer"] = layer

    def build(self) -> HiddenTransfer:
        """Maps, initialised to the identity: a rider's stream is its node's."""
        module = HiddenTransfer(self.config)
        with torch.no_grad():
            module.maps.copy_(torch.eye(module.width).expand_as(module.maps))
        return module


class StridedTrainee(_RiderTrainee):
    SETTINGS = StridedSettings
    module: nn.ParameterList
    """Of each adapted layer down and up, see `LowRank`."""
    file = ADAPTER_FILES[1]
    _settings: StridedSettings

    def __init__(self, target: Target, settings: StridedSettings) -> None:
        super().__init__(target, settings)
        released = IDLM.released_mask_id(target.model.shape.embedding_size)
        self.mask_id = target.mask_id(settings.mask_id, released)
        self._layers = linear_layers(target.model, settings.target_modules)
        self.config = {
            **{"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": target.name},
            **{"r": settings.rank, "lora_alpha": settings.rank},
            "target_modules": sorted({name.rpartition(".")[2] for name in self._layers}),
            **target.origin(settings.kind).ours,
        }

    def build(self) -> nn.ParameterList:
        """As PEFT begins: up is zero, so that the masks are the model's own."""
        rank, module = self._settings.rank, nn.ParameterList()
        for layer in self._layers.values():
            bound = layer.in_features**-0.5
            module.append(torch.empty(rank, layer.in_features).uniform_(-bound, bound))
            module.append(torch.zeros(layer.out_features, rank))
        return module

    @property
    def riders(self) -> strided.MaskRiders:
        layers = zip(self._layers.items(), self.module[::2], self.module[1::2], strict=True)
        parts = {name: LowRank(layer, down, up) for (name, layer), down, up in layers}
        return strided.MaskRiders(self._target, self.mask_id, self._settings.riders, parts)

    def drafter(self, source: str, measured: Sequence[Answer]) -> StridedDrafter:
        ranks = ranks_of(self.riders, self._target, measured)
        names = [f"{layer}.lora_{leaf}.weight" for layer in self._layers for leaf in "AB"]
        tensors = {name: p.detach() for name, p in zip(names, self.module, strict=True)}
        adapter = Adapter(DraftCheckpoint(source, self.config, tensors))
        return StridedDrafter(self._settings.riders + 1, adapter, mask_id=self.mask_id, chance=ranks)


def linear_layers(model: models.Model, wanted: Sequence[str] | None) -> dict[str, nn.Linear]:
    """The linear layers that `wanted` names, see `StridedSettings.target_modules`, by the checkpoint's names.
    Raises ValueError naming the argument for a layer that no block has, and for none."""
    present = {o: leaf for o, leaf in lora_names(model).items() if any(hasattr(b, o) for b in model.blocks)}
    known = {*present, *present.values()}
    chosen = known if wanted is None else {*wanted}
    if not chosen or chosen - known:
        raise ValueError(f"target_modules: expected some of {[*present.values()]}, got {wanted!r:.80}")
    return {
        model.checkpoint_name(f"blocks.{index}.{o}"): getattr(block, o)
        for index, block in enumerate(model.blocks)
        for o, leaf in present.items()
        if hasattr(block, o) and {o, leaf} & chosen
    }


class PlacedAnswers(NamedTuple):
    """Answers and riders behind some places of each: B sequences, A places, n riders behind each."""

    ids: Tensor
    """(B, L) int64, padded with arbitrary tokens."""
    places: Tensor
    """(B, A) int64: the positions of the nodes; their choice is the next token."""
    asked: Tensor
    """(B, A, n) bool: whether the answer has a token after the rider's position, which the rider guesses."""


def place(
    answers: Sequence[Answer], riders: int, anchors: int | None, generator: torch.Generator | None = None
) -> PlacedAnswers:
    """Riders behind up to `anchors` random places of each answer (None: behind all) where at least one rider
    has a token to guess."""
    # After a node at position p comes the token at p + 1; the first rider guesses the token at p + 2.
    ids, _, ends, places, there = places_of(answers, anchors, generator, before=1, ahead=2)
    target = places[..., None] + 2 + torch.arange(riders)
    return PlacedAnswers(ids, places, there[..., None] & (target < ends[..., None]))


def logits_of(riders: Riders, model: models.Model, placed: PlacedAnswers) -> tuple[Tensor, Tensor, Tensor]:
    """For the R riders with a token to guess: their logits (R, V) float32, the target's logits (R, V) in the
    rows of the true tokens at their positions, and the true tokens (R,) int64 that they guess."""
    device, n = model.device, riders.most
    ids, places, asked = (each.to(device) for each in placed)
    length, s = ids.shape[1], model.shape
    cos, sin = rope.table(length + n, s.head_dim, s.rope_theta, s.rope_scaling, device)
    with torch.no_grad():
        known, stream, hidden = context_of(model, ids, riders.layer, cos, sin)
        positions = places[..., None] + 1 + torch.arange(n, device=device)  # (B, A, n)
        rows = positions.clamp(max=length - 1)
        true = ids.gather(1, (rows + 1).clamp(max=length - 1).flatten(1)).view_as(rows)[asked]
        at = torch.arange(len(ids), device=device)[:, None, None].expand_as(rows)
        teacher = model.head(hidden[at[asked], rows[asked]]).float()
        nodes = stream[at[..., 0], places]  # (B, A, width)
    numbers = torch.arange(n, device=device).expand(*places.shape, n)
    of_riders = nodes[:, :, None].expand(-1, -1, n, -1).flatten(0, 2).float()
    x = riders.embed(of_riders, numbers.flatten()).view(len(ids), -1, s.width)  # (B, A n, width)
    row = torch.arange(x.shape[1], device=device)
    same_chain = (row[:, None] // n == row // n) & (row[:, None] >= row)
    seen = torch.arange(length, device=device) <= places.repeat_interleave(n, 1)[..., None]  # (B, A n, L)
    visible = torch.cat((seen, same_chain.expand(len(ids), -1, -1)), -1)[:, None]
    turn = [t[positions.flatten(1)][:, :, None] for t in (cos, sin)]  # (B, A n, 1, head_dim / 2)
    x = x.to(model.dtype)
    if isinstance(riders, Adapting):
        model = riders.through(model, torch.ones(1, 1, dtype=torch.bool, device=device))  # all of x
    for block, of_layer in zip(list(model.blocks)[riders.layer :], known, strict=True):

        def attend(q: Tensor, k: Tensor, v: Tensor, known: tuple[Tensor, Tensor] = of_layer) -> Tensor:
            q, k = (rotate(t.to(turn[0].dtype), *turn).to(v.dtype) for t in (q, k))
            return attention(q, torch.cat((known[0], k), 1), torch.cat((known[1], v), 1), visible)

        x = block(x, attend)
    student = model.head(model.norm(x).view(*places.shape, n, -1)[asked]).float()
    return student, teacher, true


def context_of(
    model: models.Model, ids: Tensor, layer: int, cos: Tensor, sin: Tensor
) -> tuple[list[tuple[Tensor, Tensor]], Tensor, Tensor]:
    """For whole sequences ids (B, L): keys after RoPE and values (B, L, kv_heads, D) of the layers from
    `layer` on, the stream (B, L, width) before that layer, and the head's input (B, L, width)."""
    turn = [t[: ids.shape[1], None] for t in (cos, sin)]  # (L, 1, head_dim / 2)
    known: list[tuple[Tensor, Tensor]] = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = (rotate(t.to(turn[0].dtype), *turn).to(v.dtype) for t in (q, k))
        known.append((k, v))
        return attention(q, k, v, None, causal=True)

    x = stream = model.embed(ids)
    for index, block in enumerate(model.blocks):
        if index == layer:
            stream = x
        x = block(x, attend)
    return known[layer:], stream, model.norm(x)


def ranks_of(
    riders: Riders, model: models.Model, answers: Sequence[Answer], batch: int = 16
) -> tuple[tuple[float, ...], ...]:
    """For each rider of a chain, how often the true token was its most probable one, its second, ..."""
    count = min(GUESSES, model.shape.embedding_size)
    hits = torch.zeros(riders.most, count)
    total = torch.zeros(riders.most, 1)
    for first in range(0, len(answers), batch):
        placed = place(answers[first : first + batch], riders.most, None)
        with torch.no_grad():
            student, _, true = logits_of(riders, model, placed)
        matches = (student.topk(count).indices == true[:, None]).float().cpu()
        distance = placed.asked.nonzero()[:, 2]
        hits.index_add_(0, distance, matches)
        total.index_add_(0, distance, torch.ones(len(matches), 1))
    shares = (hits / total.clamp(min=1) * 1e5).floor().double() / 1e5  # downwards: their sum is at most 1
    return tuple(map(tuple, shares.tolist()))
