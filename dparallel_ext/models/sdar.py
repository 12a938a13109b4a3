"""SDAR (JetLM, arXiv 2510.06303): Qwen3 layers, block-causal, no shift."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from . import fields
from .base import Model
from .config import ModelConfig
from .dream import diffusion_shape
from .qwen import QWEN3_NAMES


class SDAR(Model):
    """A block sees itself and the blocks before it. `block_length` is the config's, else 4. A call of the
    model attends by it; `decode` attends by its own argument `block_length`, as the published loop does."""

    strict = frozenset({"confidence"})
    published_mask_id = 151669
    NAMES: ClassVar[dict[str, str]] = QWEN3_NAMES

    @staticmethod
    def read_config(config: Mapping[str, Any]) -> ModelConfig:
        bias = bool(fields.read(config, {"attention_bias": fields.NO})["attention_bias"])
        return block_causal_shape(config, "block_size", 4, qk_norm=True, qkv_bias=bias, o_bias=bias)


def block_causal_shape(config: Mapping[str, Any], key: str, default: int, **keywords: Any) -> ModelConfig:
    """The `ModelConfig` of a config.json in Qwen's keys, whose `key` holds the length of its blocks.

    `default`: the published length.
    """
    blocks = fields.read(config, {key: replace(fields.BLOCK_LENGTH, default=default)})
    return diffusion_shape(config, block_length=blocks[key], **keywords)
