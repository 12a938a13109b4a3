"""Qwen2, Qwen2.5 (arXiv 2407.10671, 2412.15115) and Qwen3 (arXiv 2505.09388), dense and with mixtures of
experts: causal, in Llama's layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from . import fields
from .base import Model
from .config import ExpertsConfig, ModelConfig
from .fields import Field
from .llama import LLAMA_NAMES, llama_shape

QWEN3_NAMES = {
    **LLAMA_NAMES,
    "q_norm": "model.layers.{}.self_attn.q_norm",
    "k_norm": "model.layers.{}.self_attn.k_norm",
}

EXPERTS_NAMES = {
    **QWEN3_NAMES,
    "router": "model.layers.{}.mlp.gate",
    "experts": "model.layers.{}.mlp.experts",
}
_EXPERTS = {
    "num_experts_per_tok": Field(int, most=2**10),
    "moe_intermediate_size": fields.MLP_WIDTH,
    "norm_topk_prob": fields.NO,
    "decoder_sparse_step": Field(int, 1),
    "num_hidden_layers": fields.LAYERS,
}


class Qwen2(Model):
    """Queries, keys and values have biases, whatever the config says."""

    causal = True
    DEFAULTS: ClassVar[dict[str, Any]] = {"num_key_value_heads": 32}
    NAMES: ClassVar[dict[str, str]] = LLAMA_NAMES

    @staticmethod
    def read_config(config: Mapping[str, Any]) -> ModelConfig:
        return llama_shape(config, qkv_bias=True)


def qwen3_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options of Qwen3's layers in a `ModelConfig`: queries and keys are normalised, and there are biases
    where the config says it."""
    bias = fields.read(config, {"attention_bias": fields.NO})["attention_bias"]
    return {"qk_norm": True, "qkv_bias": bias, "o_bias": bias}


class Qwen3(Model):
    """Queries and keys are normalised; heads have 128 dimensions unless the config says otherwise."""

    causal = True
    DEFAULTS: ClassVar[dict[str, Any]] = {"num_key_value_heads": 32, "head_dim": 128}
    NAMES: ClassVar[dict[str, str]] = QWEN3_NAMES

    @staticmethod
    def read_config(config: Mapping[str, Any]) -> ModelConfig:
        return llama_shape(config, **qwen3_options(config))


class Qwen3MoE(Qwen3):
    """Qwen3 with mixtures of experts, see `experts`; heads share the model's width unless the config says
    otherwise."""

    DEFAULTS: ClassVar[dict[str, Any]] = {"num_key_value_heads": 4}
    NAMES: ClassVar[dict[str, str]] = EXPERTS_NAMES

    @staticmethod
    def read_config(config: Mapping[str, Any]) -> ModelConfig:
        if config.get("use_sliding_window"):  # which transformers' class gives to every layer
            config = {**config, "max_window_layers": 0, "layer_types": None}
        return replace(llama_shape(config, **qwen3_options(config)), experts=experts_of(config))


def experts_of(config: Mapping[str, Any]) -> ExpertsConfig:
    """The mixtures of experts in a config.json in Qwen3's keys."""
    c = fields.read(config, _EXPERTS)
    # transformers 5 writes the newer name.
    key = "num_experts" if config.get("num_local_experts") is None else "num_local_experts"
    count = fields.read(config, {key: Field(int, most=2**14)})[key]
    dense = config.get("mlp_only_layers") or []
    if not (isinstance(dense, list) and all(type(layer) is int for layer in dense)):
        raise ValueError(f"config: mlp_only_layers={dense!r:.80}, expected a list of layers")
    step, layers = c["decoder_sparse_step"], range(c["num_hidden_layers"])
    sparse = frozenset(layer for layer in layers if (layer + 1) % step == 0 and layer not in dense)
    each = c["num_experts_per_tok"], c["moe_intermediate_size"], c["norm_topk_prob"]
    return ExpertsConfig(count, *each, sparse)
