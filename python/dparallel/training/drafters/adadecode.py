"""Trains AdaDecode's heads (arXiv 2506.03700): each learns, after some layers, the whole model's
distribution.

A step takes places of the target's answers. One pass gives the target's streams after these layers and its
logits; a head's loss is KL(p || p_l), with p the whole model's distribution. The loss of several heads is
their mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext import models
from dparallel_ext.arguments import check_fields, number, whole
from dparallel_ext.speculation.adadecode import KIND, AdaDecode, AdaDecodeOptions, ExitHeads
from dparallel_ext.speculation.drafter import check_layers

from .common import Answer, DrafterSettings, Target, Trainee, drawn, places_of


@dataclass(frozen=True)
class ExitSettings(DrafterSettings):
    KINDS = (KIND,)
    kind: str = KIND
    steps: int = 1000
    anchors: int = 64
    exits: tuple[int, ...] | None = None
    """The numbers of layers after which there are heads; None: a quarter, a half and three quarters of the
    target's, as published."""
    gamma: float = 0.85
    """The probability above which a head drafts."""
    most: int = 16
    """The most tokens of a draft."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, ("gamma",), number, 0, 1)
        check_fields(self, ("most",), whole, 1, 512)


class ExitHeadsTrainee(Trainee):
    SETTINGS = ExitSettings
    module: ExitHeads

    def __init__(self, target: Target, settings: ExitSettings) -> None:
        self._target, self._settings = target.model, settings
        s, exits = target.model.shape, settings.exits
        if exits is None:
            exits = tuple(sorted({s.layers * part // 4 for part in (1, 2, 3)} - {0}))
        check_layers("exits", exits, 1, s.layers)
        origin = target.origin(settings.kind)
        self.options = AdaDecodeOptions(
            s.width, s.embedding_size, s.layers, tuple(exits), settings.gamma, settings.most, origin
        )
        self.config = self.options.config

    def build(self) -> ExitHeads:
        return ExitHeads(self.options)

    def loss_of(self, answers: Sequence[Answer], step: int) -> Tensor:
        some, generator = drawn(answers, self._settings, step)
        ids, places = flat_places_of(some, self._settings.anchors, generator)
        device = self._target.device
        return loss_of(self.module, self._target, ids.to(device), places.to(device))

    def drafter(self, source: str, measured: Sequence[Answer]) -> AdaDecode:
        return AdaDecode(self.module, source=source)


def flat_places_of(
    answers: Sequence[Answer], anchors: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Answers (B, L) int64, padded with arbitrary tokens, and (N,) int64 flat places in them, ascending: up
    to `anchors` random places of each answer whose next token is in the response."""
    ids, *_, at, there = places_of(answers, anchors, generator, before=1, ahead=1)
    return ids, (at + torch.arange(len(ids))[:, None] * ids.shape[1])[there].sort().values


def loss_of(heads: ExitHeads, target: models.Model, ids: Tensor, places: Tensor) -> Tensor:
    """The mean KL of the heads. ids: (B, L) int64; places: (N,) int64, flat, where the heads learn."""
    layers = heads.options.layers
    taps = models.Taps(tuple(layer - 1 for layer in layers))
    with torch.no_grad():
        hidden = target.hidden(ids, taps=taps).flatten(0, 1)[places]
        whole_model = target.head(hidden)
    streams = [taps[layer - 1].flatten(0, 1)[places].float() for layer in layers]
    # (heads, N, V)
    logits = torch.stack([heads(index, stream, target) for index, stream in enumerate(streams)])
    return dx.distillation_loss(logits, whole_model.expand_as(logits), inplace=True) / logits[..., 0].numel()
