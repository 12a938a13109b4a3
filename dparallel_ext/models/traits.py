"""What decoding and training need to know of a model, through whatever it is wrapped in."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from .base import Model, Traits
from .checkpoint import FAMILIES
from .fast_dllm import MASK_ID, FastDLLM
from .wrappers import said, unwrap


def traits(model: Any) -> Traits:
    """The traits of one of ours or of a Hugging Face model (by its config), also inside `wrappers.WRAPPERS`.

    Whoever says them by an attribute `traits` is believed. A plain function without has none.

    Raises ValueError for what is no model, and for a module of another kind that holds a model with traits
    beside its mask token, since they may hold for its own logits or not.
    """
    inner = unwrap(model)
    if (own := said(inner)) is not None:
        return own
    if isinstance(inner, Model):
        return Traits(inner.mask_id, inner.shift, inner.strict, inner.block_length, inner.sub_block_length)
    if not callable(inner):
        raise ValueError(f"model: expected a module or function, got {type(inner).__name__}")
    held = _held(inner)
    config = getattr(inner, "config", None)
    family = FAMILIES.get(getattr(config, "model_type", None) or "", Model)
    if not any(isinstance(part, Model) for part in held.values()) and family is not Model:
        held = {}
    for name, part in held.items():
        if replace(traits(part), mask_id=None) != Traits():
            raise ValueError(
                f"model: {type(inner).__name__} holds a {type(part).__name__} as {name}, and whether its own "
                "logits are shifted or block-causal as the inner model's is not known. Pass the inner model, "
                f"or say it: model.traits = dparallel_ext.models.traits(model.{name})"
            )
    if held:
        return traits(next(iter(held.values())))
    mask_id, block_length = getattr(config, "mask_token_id", None), None
    if family is FastDLLM:  # block-causal whenever it is called, unlike SDAR, whose mask its caller makes
        mask_id, block_length = MASK_ID if mask_id is None else mask_id, getattr(config, "bd_size", 32)
    return Traits(mask_id, family.shift, family.strict, block_length, family.sub_block_length)


def _held(model: Any) -> dict[str, Any]:
    """Models of a known family that a module or another object holds, by name."""
    parts = model.named_modules() if isinstance(model, nn.Module) else getattr(model, "__dict__", {}).items()
    return {
        name: part
        for name, part in parts
        if part is not model
        and (
            isinstance(part, Model) or getattr(getattr(part, "config", None), "model_type", None) in FAMILIES
        )
    }
