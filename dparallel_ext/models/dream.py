"""Dream (HKU, arXiv 2508.15487): Qwen2 layers, bidirectional, logits shifted by one position."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from . import fields
from .base import Model
from .config import ModelConfig
from .llama import LLAMA_NAMES, llama_shape

_SUPPORTED = {"use_sliding_window": False, "mlp_bias": False}


class Dream(Model):
    """Every position sees every other; the logits at a position predict the token after it."""

    shift = True
    strict = frozenset({"entropy"})
    published_mask_id = 151666
    DEFAULTS: ClassVar[dict[str, Any]] = {"num_key_value_heads": 32}
    NAMES: ClassVar[dict[str, str]] = LLAMA_NAMES

    @staticmethod
    def read_config(config: Mapping[str, Any]) -> ModelConfig:
        return diffusion_shape(config, qkv_bias=True)


def diffusion_shape(config: Mapping[str, Any], **keywords: Any) -> ModelConfig:
    """The `ModelConfig` of a diffusion model that was made from a Qwen model.

    Scaled rotary embeddings are refused: the published code runs with releases of transformers that read the
    factor of "yarn" in different ways.
    """
    fields.check_supported(config, _SUPPORTED)
    return llama_shape(config, scalings=(), **keywords)
