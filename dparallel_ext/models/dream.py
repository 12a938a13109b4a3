"""Dream (HKU, arXiv 2508.15487): Qwen2 layers, bidirectional, logits shifted by one position."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from .base import Model, Shape, check_supported, number

_LAYER = "model.layers.{}."
_SUPPORTED = {
    "hidden_act": "silu",
    "use_sliding_window": False,
    "mlp_bias": False,
}


QWEN_NAMES = {
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


class Dream(Model):
    shift = True
    strict = frozenset({"entropy"})
    published_mask_id = 151666
    NAMES: ClassVar[dict[str, str]] = QWEN_NAMES

    @staticmethod
    def read_config(config: Mapping[str, Any]) -> Shape:
        return qwen_shape(config, qkv_bias=True)


def qwen_shape(config: Mapping[str, Any], **more: Any) -> Shape:
    """The shape of a config.json in the keys of Qwen's models."""
    check_supported(config, _SUPPORTED)
    rope: Mapping[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):  # the second: transformers 5
        rope = config.get(key) or rope
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise ValueError(f"config: {key} of type {kind!r} is not supported")
    heads, width = number(config, "num_attention_heads"), number(config, "hidden_size")
    theta = rope.get("rope_theta") if config.get("rope_theta") is None else config["rope_theta"]
    return Shape(
        layers=number(config, "num_hidden_layers"),
        width=width,
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or width // heads,
        mlp_width=number(config, "intermediate_size"),
        rows=number(config, "vocab_size"),
        vocab_size=number(config, "vocab_size"),
        eps=number(config, "rms_norm_eps", 1e-6, kind=float),
        rope_theta=number({"rope_theta": theta}, "rope_theta", 10000.0, kind=float),
        rope_in_float32=False,
        tied=bool(config.get("tie_word_embeddings", False)),
        **more,
    )
