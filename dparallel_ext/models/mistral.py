"""Mistral (arXiv 2310.06825) and Ministral 3 (arXiv 2601.08584): causal, in Llama's layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from . import fields, rope
from .config import ModelConfig
from .llama import Llama, llama_shape

_ROPE = {
    **{"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384},
    **{"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0},
    "llama_4_scaling_beta": 0.1,
}
"""transformers' default for a Ministral 3's config."""


class Mistral(Llama):
    """Mistral 7B from version 0.2 on, Mistral Nemo, and others without a sliding window."""

    DEFAULTS: ClassVar[dict[str, Any]] = {"num_key_value_heads": 8}

    @staticmethod
    def read_config(config: Mapping[str, Any]) -> ModelConfig:
        # transformers takes a missing key for 4096.
        fields.check_supported(config, {"sliding_window": None}, ("sliding_window",))
        return llama_shape(config)


class Ministral3(Llama):
    """Queries far behind the original context are scaled up, see `rope.QueryScaling`."""

    DEFAULTS: ClassVar[dict[str, Any]] = {"num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5}

    @staticmethod
    def read_config(config: Mapping[str, Any]) -> ModelConfig:
        fields.check_supported(config, {"sliding_window": None, "attention_bias": False, "mlp_bias": False})
        if not (config.get("rope_parameters") or config.get("rope_scaling")):
            config = {**config, "rope_parameters": _ROPE}
        return replace(llama_shape(config), query_scaling=rope.query_scaling(config))
