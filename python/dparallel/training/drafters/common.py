"""The parts of training that all kinds of drafters share: settings, the target, a kind's interface."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from dparallel_ext import models
from dparallel_ext.arguments import check_fields, number, one_of, whole
from dparallel_ext.decoding.settings import check_mask
from dparallel_ext.models import files as checkpoints
from dparallel_ext.speculation.checkpoint import FILES, Origin
from dparallel_ext.speculation.drafter import Drafter

from ... import registry
from ...text import Template
from ..loop import TrainingSchedule

Answer = tuple[Tensor, int]
"""Prompt and response (T,) int64 with the end token, and the prompt's length."""


@dataclass(frozen=True, kw_only=True)
class DrafterSettings(TrainingSchedule):
    """The settings that all drafters have; the same settings and answers give the same drafter.

    Each kind has a subclass with settings of its own.
    """

    KINDS: ClassVar[tuple[str, ...]]
    """Values of `kind`."""
    kind: str
    steps: int = 2000
    batch: int = 16
    """Answers in a step."""
    anchors: int = 16
    """The most places of an answer that a step learns from."""
    gen_length: int = 256
    """The most tokens of an answer."""
    temperature: float = 0.0
    """Temperature of the answers. A drafter for sampling needs one: samples differ from the greedy
    answers."""
    muon_lr: float = 3e-3
    adam_lr: float = 2e-3
    weight_decay: float = 0.01
    warmup: int = 100
    decay: float = 0.4
    ema: float = 0.995
    seed: int = 0
    dtype: str = "auto"
    """The target's: "float32", "bfloat16", "float16", or "auto", see `registry.load`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("kind", self.kind, self.KINDS)
        registry.dtype_of(self.dtype)
        check_fields(self, ("batch", "anchors", "gen_length"), whole, 1)
        check_fields(self, ("temperature",), number, 0, 100)


def drawn(
    answers: Sequence[Answer], settings: DrafterSettings, step: int
) -> tuple[list[Answer], torch.Generator]:
    """A step's answers, and the generator of its other random numbers. They depend only on the seed and the
    step, so that a resumed run gets the same."""
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    some = torch.randint(len(answers), (settings.batch,), generator=generator).tolist()
    return [answers[i] for i in some], generator


class Places(NamedTuple):
    """Random places of B answers, A of each, that a step learns from."""

    ids: Tensor
    """(B, L) int64: the answers, padded with arbitrary tokens."""
    prompts: Tensor
    """(B, 1) int64: the prompts' lengths."""
    ends: Tensor
    """(B, 1) int64: the answers' lengths."""
    at: Tensor
    """(B, A) int64, in random order."""
    there: Tensor
    """(B, A) bool: False where an answer has fewer places than others."""


def places_of(
    answers: Sequence[Answer], anchors: int | None, generator: torch.Generator | None, before: int, ahead: int
) -> Places:
    """Up to `anchors` random places of each answer (None: all), from `before` tokens before the response on,
    and with `ahead` tokens behind them."""
    ids = pad_sequence([each for each, _ in answers], batch_first=True)
    prompts = torch.tensor([length for _, length in answers])[:, None]
    ends = torch.tensor([len(each) for each, _ in answers])[:, None]
    column = torch.arange(ids.shape[1])
    outside = (column < prompts - before) | (column >= ends - ahead)
    key, at = torch.rand(ids.shape, generator=generator).masked_fill(outside, 2.0).sort(1)
    most = int((key < 2).any(0).sum())  # the places of the answer with the most
    used = most if anchors is None else min(anchors, most)
    return Places(ids, prompts, ends, at[:, :used], key[:, :used] < 2)


@dataclass(frozen=True)
class Target:
    """The model that a drafter is trained for."""

    name: str
    """The model's name, as given."""
    model: models.Model
    template: Template | None
    has_files: bool
    """Whether the name is a checkpoint's, whose tokenizer files can be read."""

    def origin(self, kind: str) -> Origin:
        """The origin for a drafter's file."""
        return Origin(kind, models.fingerprint(self.model), _name_of(self.template))

    def mask_id(self, mask_id: int | None, published: int | None = None) -> int:
        """The id of a token that appears in no text; published: where the model and its tokenizer have none.
        Raises ValueError if there is none."""
        token = self.model.mask_id if mask_id is None else mask_id
        if token is None and self.has_files:
            token = checkpoints.mask_token_id(registry.directory_of(self.name))
        token = published if token is None else token
        if token is None:
            raise ValueError(
                f"mask_id: {self.name} has no mask token; name an id that its text does not use (--mask-id), "
                f"below {self.model.shape.embedding_size}"
            )
        return check_mask(self.model, token)


def _name_of(template: Template | None) -> str | None:
    """A hash of a chat template's text for an empty message; None without a template."""
    if template is None:
        return None
    return hashlib.sha256(template([{"role": "user", "content": ""}]).encode()).hexdigest()[:16]


class SavableDrafter(Drafter, Protocol):
    """A drafter that can be written to a file for `speculation.load`."""

    def save(self, path: str | Path) -> None: ...


class Trainee(ABC):
    """A drafter of a kind under training: its module, its loss, and the finished drafter.

    The constructor raises ValueError naming the setting that does not fit the target.
    """

    SETTINGS: ClassVar[type[DrafterSettings]]
    config: dict[str, Any]
    """The drafter's config.json."""
    file: ClassVar[str] = FILES[1]
    """The name of the drafter's weights."""
    module: nn.Module
    """The trained module, made by `build`, on the target's device."""
    measured: ClassVar[int] = 0
    """Answers, at most a tenth of all, that it does not learn from, and that `drafter` gets to measure
    with."""

    @abstractmethod
    def __init__(self, target: Target, settings: Any) -> None: ...

    @abstractmethod
    def build(self) -> nn.Module:
        """Fresh weights from torch's generator, on the CPU."""

    @property
    def matrices(self) -> list[nn.Parameter]:
        """The parameters that Muon moves; AdamW moves the others."""
        return [p for p in self.module.parameters() if p.ndim == 2]

    def learnable(self, answers: list[Answer]) -> list[Answer]:
        """The parts of the target's answers that it can learn from. Raises ValueError if nothing is left."""
        return answers

    @abstractmethod
    def loss_of(self, answers: Sequence[Answer], step: int) -> Tensor:
        """The loss of a step, which depends only on the seed and the step, see `drawn`."""

    @abstractmethod
    def drafter(self, source: str, measured: Sequence[Answer]) -> SavableDrafter:
        """The trained drafter; source: names it in errors."""
