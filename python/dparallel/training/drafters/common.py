"""What the kinds of drafters have in common under training: settings, the target, and what a kind is."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from dparallel_ext import models
from dparallel_ext.arguments import whole
from dparallel_ext.models import files as checkpoints
from dparallel_ext.speculation.checkpoint import Origin
from dparallel_ext.speculation.drafter import Drafter

from ... import registry
from ...text import Template
from ...toy.train import MOST_SEEDS

Answer = tuple[Tensor, int]
"""Prompt and response (T,) int64, the end token with them, and the prompt's length."""


@dataclass(frozen=True)
class Settings:
    """What every drafter is trained by; with the same settings and answers it comes out the same.

    A kind's settings are a subclass, which adds what the drafter is.
    """

    KINDS: ClassVar[tuple[str, ...]]
    """What `kind` may be."""
    kind: str
    steps: int = 2000
    batch: int = 16
    """Answers in a step."""
    anchors: int = 16
    """Places in each that it learns from, as far as there are so many."""
    gen_length: int = 256
    """Of the answers at most."""
    temperature: float = 0.0
    """Of the answers: what is decoded at a higher one goes ways that the likeliest answers never went."""
    muon_lr: float = 3e-3
    adam_lr: float = 2e-3
    weight_decay: float = 0.01
    warmup: int = 100
    decay: float = 0.4
    """Share of the steps, at the end, over which the learning rates fall to zero."""
    ema: float = 0.995
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in self.KINDS:
            raise ValueError(f"kind: expected one of {list(self.KINDS)}, got {self.kind!r}")
        for name in ("steps", "batch", "anchors", "warmup", "gen_length"):
            whole(name, getattr(self, name), 1)
        for name in ("muon_lr", "adam_lr", "ema"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a number between 0 and 1, got {getattr(self, name)}")
        for name in ("weight_decay", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a number from 0 to 1, got {getattr(self, name)}")
        if not 0 <= self.temperature <= 100:
            raise ValueError(f"temperature: expected a number from 0 to 100, got {self.temperature}")
        if not 0 <= whole("seed", self.seed, 0) < MOST_SEEDS:
            raise ValueError(f"seed: expected a whole number >= 0 and < {MOST_SEEDS}, got {self.seed}")


@dataclass(frozen=True)
class Target:
    """The model that a drafter is trained for."""

    name: str
    """As it was given."""
    model: models.Model
    template: Template | None
    has_files: bool
    """Whether its name is that of a checkpoint, whose tokenizer can be looked at."""

    def origin(self, kind: str) -> Origin:
        """What a drafter's file says of its training."""
        return Origin(kind, models.fingerprint(self.model), _name_of(self.template))

    def mask_id(self, given: int | None) -> int:
        """The id of a token that no text has. Raises ValueError where there is none to be found."""
        found = self.model.mask_id if given is None else given
        if found is None and self.has_files:
            found = checkpoints.mask_token_id(registry.directory_of(self.name))
        if found is None:
            raise ValueError(
                f"mask_id: {self.name} has no mask token; name an id that its text does not use, below "
                f"{self.model.shape.embedding_size}"
            )
        if found >= self.model.shape.embedding_size:
            count = self.model.shape.embedding_size
            raise ValueError(f"mask_id: expected one of the model's {count} token ids, got {found}")
        return found


def _name_of(template: Template | None) -> str | None:
    """A hash of what a chat template makes of an empty message; None where there is none."""
    if template is None:
        return None
    return hashlib.sha256(template([{"role": "user", "content": ""}]).encode()).hexdigest()[:16]


class Saved(Drafter, Protocol):
    """A drafter that can be written, as `speculation.load` reads it."""

    def save(self, path: str | Path) -> None: ...


class Trainee(ABC):
    """A drafter of a kind under training: what is trained, by which loss, and what becomes of it.

    Made of a target and settings, which raises ValueError naming the setting that does not fit.
    """

    SETTINGS: ClassVar[type[Settings]]
    config: dict[str, Any]
    """config.json of the drafter."""
    module: nn.Module
    """What is trained: what `build` has made, on the target's device."""
    measured: ClassVar[int] = 0
    """Answers, a tenth of all at most, that it does not learn from, and that `drafter` gets."""

    @abstractmethod
    def __init__(self, target: Target, settings: Any) -> None: ...

    @abstractmethod
    def build(self) -> nn.Module:
        """Fresh weights from torch's generator, on the CPU."""

    @property
    def matrices(self) -> list[nn.Parameter]:
        """The parameters that Muon moves; AdamW moves the others."""
        return [p for p in self.module.parameters() if p.ndim == 2]

    @abstractmethod
    def loss_of(self, answers: Sequence[Answer], step: int) -> Tensor:
        """Of a step. It depends on the seed and the step alone, so that a resumed run sees what it would
        have."""

    @abstractmethod
    def drafter(self, source: str, measured: Sequence[Answer]) -> Saved:
        """What has been trained; source: what errors call it."""
