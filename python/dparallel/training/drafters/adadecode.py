"""AdaDecode's heads: each learns to say behind some layers what the whole model says, by KL.

A step takes places of the target's answers. The target's streams behind the layers and its logits at the end
come from one pass; a head's loss is KL(p || p_l) in float32, p the whole model's distribution. The loss of
several heads is their mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dparallel_ext import models
from dparallel_ext.arguments import number, whole
from dparallel_ext.speculation.adadecode import KIND, AdaDecode, ExitHeads, Layout, check_layers

from .common import Answer, Settings, Target, Trainee


@dataclass(frozen=True)
class ExitSettings(Settings):
    KINDS = (KIND,)
    kind: str = KIND
    steps: int = 1000
    anchors: int = 64
    exits: tuple[int, ...] | None = None
    """Behind so many layers stand heads; None: behind a quarter, a half and three quarters of the target's,
    as published."""
    gamma: float = 0.85
    """How sure a head has to be, as a probability."""
    most: int = 16
    """Tokens of a draft."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if number("gamma", self.gamma) > 1:
            raise ValueError(f"gamma: expected a number from 0 to 1, got {self.gamma}")
        whole("most", self.most, 1, 512)


class Exits(Trainee):
    SETTINGS = ExitSettings
    module: ExitHeads

    def __init__(self, target: Target, settings: ExitSettings) -> None:
        self._target, self._settings = target.model, settings
        s, exits = target.model.shape, settings.exits
        if exits is None:
            exits = tuple(sorted({s.layers * part // 4 for part in (1, 2, 3)} - {0}))
        check_layers("exits", exits, s.layers)
        origin = target.origin(settings.kind)
        self.layout = Layout(
            s.width, s.embedding_size, s.layers, tuple(exits), settings.gamma, settings.most, origin
        )
        self.config = self.layout.config

    def build(self) -> ExitHeads:
        return ExitHeads(self.layout)

    def loss_of(self, answers: Sequence[Answer], step: int) -> Tensor:
        settings, device = self._settings, self._target.device
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
        some = torch.randint(len(answers), (settings.batch,), generator=generator).tolist()
        ids, places = places_of([answers[i] for i in some], settings.anchors, generator)
        return loss_of(self.module, self._target, ids.to(device), places.to(device))

    def drafter(self, source: str, measured: Sequence[Answer]) -> AdaDecode:
        return AdaDecode(self.module, source=source)


def places_of(answers: Sequence[Answer], anchors: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Answers (B, L) int64, filled up with any token, and (N,) int64 flat places in them: up to `anchors`
    random ones of each answer, whose next token is one of the response."""
    ids = pad_sequence([each for each, _ in answers], batch_first=True)
    first = torch.tensor([length - 1 for _, length in answers])[:, None]
    last = torch.tensor([len(each) - 2 for each, _ in answers])[:, None]
    at = torch.arange(ids.shape[1])
    key = torch.rand(ids.shape, generator=generator).masked_fill((at < first) | (at > last), 2.0)
    limit = key.sort(1).values[:, min(anchors, ids.shape[1]) - 1, None].clamp(max=1.0)
    return ids, (key <= limit).flatten().nonzero()[:, 0]


def loss_of(heads: ExitHeads, target: models.Model, ids: Tensor, places: Tensor) -> Tensor:
    """ids: (B, L) int64; places: (N,) int64, flat, where the heads learn."""
    layers = heads.layout.layers
    taps = models.Taps(tuple(layer - 1 for layer in layers))
    with torch.no_grad():
        hidden = target.hidden(ids, taps=taps).flatten(0, 1)[places]
        whole_model = target.head(hidden).float().log_softmax(-1)
    losses = []
    for index, layer in enumerate(layers):
        stream = taps[layer - 1].flatten(0, 1)[places].float()
        logits = heads(index, stream, target).float()
        losses.append(F.kl_div(logits.log_softmax(-1), whole_model, log_target=True, reduction="batchmean"))
    return torch.stack(losses).mean()
