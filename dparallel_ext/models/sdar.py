"""SDAR (JetLM, arXiv 2510.06303) and DreamReasoner (HKU, arXiv 2606.19257): Qwen3 layers, block-causal, no
shift."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from . import fields
from .base import Model
from .config import ModelConfig
from .dream import diffusion_shape
from .qwen import EXPERTS_NAMES, QWEN3_NAMES, experts_of, qwen3_options


class SDAR(Model):
    """A block sees itself and the blocks before it. `block_length` is the config's, else 4. A call of the
    model attends by it; `decode` attends by its own argument `block_length`, as the published loop does."""

    strict = frozenset({"confidence"})
    published_mask_id = 151669
    DEFAULTS: ClassVar[dict[str, Any]] = {"num_key_value_heads": 32, "head_dim": 128}
    NAMES: ClassVar[dict[str, str]] = QWEN3_NAMES

    @staticmethod
    def read_config(config: Mapping[str, Any]) -> ModelConfig:
        return block_causal_shape(config, "block_size", 4, **qwen3_options(config))


class DreamReasoner(SDAR):
    """DreamReasoner-8B: as SDAR, with blocks of 32. A checkpoint names Dream as its model_type, and is known
    by `block_size` in its config.json.

    The tests compare, on random weights, logits with transformers' Qwen3 under a block-causal mask, and
    tokens and passes with the published loop, written again in plain torch. No released weights were read.
    """

    DEFAULTS: ClassVar[dict[str, Any]] = {"num_key_value_heads": 32}

    @staticmethod
    def read_config(config: Mapping[str, Any]) -> ModelConfig:
        return block_causal_shape(config, "block_size", 32, **qwen3_options(config))


class SDARMoE(SDAR):
    """SDAR with mixtures of experts (SDAR-30B-A3B), see `experts`."""

    DEFAULTS: ClassVar[dict[str, Any]] = {}
    NAMES: ClassVar[dict[str, str]] = EXPERTS_NAMES

    @staticmethod
    def read_config(config: Mapping[str, Any]) -> ModelConfig:
        fields.check_supported(config, {"use_regular_causal": False})  # I-DLM's, which is known of SDAR alone
        return replace(SDAR.read_config(config), experts=experts_of(config))


def block_causal_shape(config: Mapping[str, Any], key: str, default: int, **keywords: Any) -> ModelConfig:
    """The `ModelConfig` of a config.json in Qwen's keys, whose `key` holds the length of its blocks.

    `default`: the published length.
    """
    blocks = fields.read(config, {key: replace(fields.BLOCK_LENGTH, default=default)})
    return diffusion_shape(config, block_length=blocks[key], **keywords)
