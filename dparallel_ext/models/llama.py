"""Llama (Meta, arXiv 2302.13971, 2307.09288, 2407.21783): causal; names and config keys are Qwen's too."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, ClassVar

from . import fields, rope
from .base import Model
from .config import ModelConfig
from .fields import Field

_LAYER = "model.layers.{}."
LLAMA_NAMES = {
    "embed": "model.embed_tokens",
    "norm1": _LAYER + "input_layernorm",
    "q": _LAYER + "self_attn.q_proj",
    "k": _LAYER + "self_attn.k_proj",
    "v": _LAYER + "self_attn.v_proj",
    "o": _LAYER + "self_attn.o_proj",
    "norm2": _LAYER + "post_attention_layernorm",
    "gate": _LAYER + "mlp.gate_proj",
    "up": _LAYER + "mlp.up_proj",
    "down": _LAYER + "mlp.down_proj",
    "norm": "model.norm",
    "lm_head": "lm_head",
}
_SUPPORTED = {"hidden_act": "silu", "partial_rotary_factor": 1, "per_layer_config": None}
_FIELDS = {
    "num_hidden_layers": fields.LAYERS,
    "hidden_size": fields.WIDTH,
    "num_attention_heads": fields.HEADS,
    "num_key_value_heads": replace(fields.HEADS, default=None),
    "head_dim": Field(int, None, most=2**16),
    "intermediate_size": fields.MLP_WIDTH,
    "vocab_size": fields.VOCABULARY,
    "rms_norm_eps": fields.EPS,
    "tie_word_embeddings": fields.NO,
}
_WINDOW = {
    "use_sliding_window": fields.NO,
    "sliding_window": fields.POSITIONS,
    "max_window_layers": Field(int, 28, least=0),
}


class Llama(Model):
    """Llama 1, 2, 3, 3.1, 3.2, and models that others have published in their layout."""

    causal = True
    NAMES: ClassVar[dict[str, str]] = LLAMA_NAMES

    @staticmethod
    def read_config(config: Mapping[str, Any]) -> ModelConfig:
        c = fields.read(config, {"attention_bias": fields.NO, "mlp_bias": fields.NO})
        _refuse_forgetting(config)
        bias = c["attention_bias"]
        return llama_shape(config, qkv_bias=bias, o_bias=bias, mlp_bias=c["mlp_bias"])


def llama_shape(
    config: Mapping[str, Any],
    *,
    scalings: Collection[str] = tuple(rope.SCALINGS),
    **keywords: Any,
) -> ModelConfig:
    """The `ModelConfig` of a config.json in Llama's keys, which Qwen uses too.

    scalings: the keys of `rope.SCALINGS` that the family supports.
    """
    fields.check_supported(config, _SUPPORTED)
    c = fields.read(config, _FIELDS)
    theta, scaling = rope.read(config, scalings)
    _refuse_windows(config, c["num_hidden_layers"])
    heads, width = c["num_attention_heads"], c["hidden_size"]
    return ModelConfig(
        layers=c["num_hidden_layers"],
        width=width,
        heads=heads,
        kv_heads=c["num_key_value_heads"] or heads,
        head_dim=c["head_dim"] or fields.width_of_heads(width, heads),
        mlp_width=c["intermediate_size"],
        embedding_size=c["vocab_size"],
        vocab_size=c["vocab_size"],
        eps=c["rms_norm_eps"],
        rope_theta=theta,
        rope_scaling=scaling,
        rope_in_float32=False,
        tied=c["tie_word_embeddings"],
        **keywords,
    )


def _refuse_windows(config: Mapping[str, Any], layers: int) -> None:
    """Raise ValueError if a layer attends to a sliding window."""
    c, kinds = fields.read(config, _WINDOW), config.get("layer_types")
    if kinds is not None:
        others = [kind for kind in kinds if kind != "full_attention"] if isinstance(kinds, list) else [kinds]
        if others:
            raise ValueError(
                f"config: layer_types with {others[0]!r:.80} is not supported, only 'full_attention'"
            )
        return
    # transformers takes a missing key for 4096.
    window = c["sliding_window"] if "sliding_window" in config else 4096
    if c["use_sliding_window"] and window is not None and c["max_window_layers"] < layers:
        raise ValueError(
            f"config: use_sliding_window=True is not supported: layers from max_window_layers="
            f"{c['max_window_layers']} on would see {window} positions"
        )


def _refuse_forgetting(config: Mapping[str, Any]) -> None:
    """Raise ValueError for a config that gives transformers' cache a window, which Llama's attention does not
    have: `generate` with the cache then gives other tokens than without."""
    keys = ("sliding_window", "attention_chunk_size")
    c = fields.read(config, dict.fromkeys((*keys, "max_position_embeddings"), fields.POSITIONS))
    most = c["max_position_embeddings"]
    for key in keys if config.get("layer_types") is None else ():
        if c[key] is not None and (most is None or c[key] < most):
            raise ValueError(
                f"config: {key}={c[key]} is not supported: Llama attends to all positions, but transformers' "
                f"cache would forget those further back. If all are to be seen, set {key} to null"
            )
