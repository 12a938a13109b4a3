"""Dream (HKU, arXiv 2508.15487): Qwen2 layers, bidirectional, logits shifted by one position."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from . import fields
from .base import Model
from .config import Shape
from .fields import Field

_LAYER = "model.layers.{}."
_SUPPORTED = {
    "hidden_act": "silu",
    "use_sliding_window": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1,
}
_FIELDS = {
    "num_hidden_layers": fields.LAYERS,
    "hidden_size": fields.WIDTH,
    "num_attention_heads": fields.HEADS,
    "num_key_value_heads": replace(fields.HEADS, default=None),
    "head_dim": Field(int, None, most=2**16),
    "intermediate_size": fields.MLP_WIDTH,
    "vocab_size": fields.VOCABULARY,
    "rms_norm_eps": fields.EPS,
    "rope_theta": replace(fields.ROPE_THETA, default=None),
    "rope_scaling": Field(dict, None),
    "rope_parameters": Field(dict, None),  # transformers 5
    "max_position_embeddings": fields.POSITIONS,
    "tie_word_embeddings": fields.NO,
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
    fields.check_supported(config, _SUPPORTED)
    c = fields.read(config, _FIELDS)
    rope: Mapping[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        rope = c[key] or rope
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise ValueError(f"config: {key} of type {kind!r:.80} is not supported")
        nested = [name for name, value in rope.items() if isinstance(value, Mapping)]
        if nested:
            raise ValueError(f"config: {key} by kinds of layers ({nested[0]!r:.80}) is not supported")
    fields.check_supported(rope, {"partial_rotary_factor": 1})
    heads, width = c["num_attention_heads"], c["hidden_size"]
    return Shape(
        layers=c["num_hidden_layers"],
        width=width,
        heads=heads,
        kv_heads=c["num_key_value_heads"] or heads,
        head_dim=c["head_dim"] or fields.width_of_heads(width, heads),
        mlp_width=c["intermediate_size"],
        rows=c["vocab_size"],
        vocab_size=c["vocab_size"],
        eps=c["rms_norm_eps"],
        rope_theta=c["rope_theta"] or fields.read(rope, {"rope_theta": fields.ROPE_THETA})["rope_theta"],
        rope_in_float32=False,
        tied=bool(c["tie_word_embeddings"]),
        **more,
    )
