"""SDAR (JetLM, arXiv 2510.06303): Qwen3 layers, block-causal, no shift."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from .base import Model, Shape
from .dream import QWEN_NAMES, qwen_shape


class SDAR(Model):
    """A block sees itself and the blocks before it; `block_length` may be set to what a checkpoint was
    trained with, where its config does not say."""

    strict = frozenset({"confidence"})
    NAMES: ClassVar[dict[str, str]] = {
        **QWEN_NAMES,
        "q_norm": "model.layers.{}.self_attn.q_norm",
        "k_norm": "model.layers.{}.self_attn.k_norm",
    }

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        size = config.get("block_size", 4)  # the published default
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"config: block_size={size!r}, expected a whole number >= 1")
        self.block_length = size

    @staticmethod
    def read_config(config: Mapping[str, Any]) -> Shape:
        return qwen_shape(config, qk_norm=True, qkv_bias=bool(config.get("attention_bias", False)))
