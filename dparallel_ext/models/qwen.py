"""Qwen2, Qwen2.5 (arXiv 2407.10671, 2412.15115) and Qwen3 (arXiv 2505.09388): causal, in Llama's layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from . import fields
from .base import Model
from .config import ModelConfig
from .llama import LLAMA_NAMES, llama_shape

QWEN3_NAMES = {
    **LLAMA_NAMES,
    "q_norm": "model.layers.{}.self_attn.q_norm",
    "k_norm": "model.layers.{}.self_attn.k_norm",
}


class Qwen2(Model):
    """Queries, keys and values have biases, whatever the config says."""

    causal = True
    NAMES: ClassVar[dict[str, str]] = LLAMA_NAMES

    @staticmethod
    def read_config(config: Mapping[str, Any]) -> ModelConfig:
        return llama_shape(config, qkv_bias=True)


class Qwen3(Model):
    """Queries and keys are normalised; heads have 128 dimensions unless the config says otherwise."""

    causal = True
    NAMES: ClassVar[dict[str, str]] = QWEN3_NAMES

    @staticmethod
    def read_config(config: Mapping[str, Any]) -> ModelConfig:
        bias = bool(fields.read(config, {"attention_bias": fields.NO})["attention_bias"])
        return llama_shape(config, head_dim=128, qk_norm=True, qkv_bias=bias, o_bias=bias)
