"""What decoding and training need to know of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .base import Model
from .checkpoint import FAMILIES
from .fast_dllm import MASK_ID, FastDLLM


@dataclass(frozen=True)
class Traits:
    """What decoding and training need to know of a model, ours or not."""

    mask_id: int | None
    shift: bool
    """The logits for position p are produced at position max(p - 1, 0)."""
    strict: frozenset[str]
    """The selectors by which its published decoder commits beyond the threshold, not at it."""
    block_length: int | None
    """Of block-causal models."""
    sub_block_length: int | None
    """The part of a block that its published decoder fills at a time; None: all of it."""


def traits(model: Any) -> Traits:
    """The traits of one of ours, of a Hugging Face model (by its config), or of either under adapters."""
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    if isinstance(model, Model):
        return Traits(model.mask_id, model.shift, model.strict, model.block_length, model.sub_block_length)
    if not callable(model):
        raise ValueError(f"model: expected a module or function, got {type(model).__name__}")
    config = getattr(model, "config", None)
    family = FAMILIES.get(getattr(config, "model_type", None) or "", Model)
    mask_id, block_length = getattr(config, "mask_token_id", None), None
    if family is FastDLLM:  # block-causal whenever it is called, unlike SDAR, whose mask its caller makes
        mask_id, block_length = MASK_ID if mask_id is None else mask_id, getattr(config, "bd_size", 32)
    return Traits(mask_id, family.shift, family.strict, block_length, family.sub_block_length)
