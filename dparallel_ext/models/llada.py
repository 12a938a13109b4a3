"""LLaDA (GSAI-ML, arXiv 2502.09992): the checkpoints' own names and config keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from .base import Model, Shape, check_supported, number

_BLOCK = "model.transformer.blocks.{}."

_SUPPORTED = {
    "block_type": "llama",
    "activation_type": "silu",
    "layer_norm_type": "rms",
    "rope": True,
    "layer_norm_with_affine": True,
    "alibi": False,
    "attention_layer_norm": False,
    "block_group_size": 1,
    "input_emb_norm": False,
    "clip_qkv": None,
}
_EXPLICIT = ("block_type", "activation_type", "layer_norm_type", "rope")


class LLaDA(Model):
    published_mask_id = 126336
    NAMES: ClassVar[dict[str, str]] = {
        "embed": "model.transformer.wte",
        "norm1": _BLOCK + "attn_norm",
        "q": _BLOCK + "q_proj",
        "k": _BLOCK + "k_proj",
        "v": _BLOCK + "v_proj",
        "o": _BLOCK + "attn_out",
        "norm2": _BLOCK + "ff_norm",
        "gate": _BLOCK + "ff_proj",
        "up": _BLOCK + "up_proj",
        "down": _BLOCK + "ff_out",
        "norm": "model.transformer.ln_f",
        "lm_head": "model.transformer.ff_out",
    }

    @staticmethod
    def read_config(config: Mapping[str, Any]) -> Shape:
        check_supported(config, _SUPPORTED, _EXPLICIT)
        heads, width, bias = (
            number(config, "n_heads"),
            number(config, "d_model"),
            bool(config["include_bias"]),
        )
        kv_heads = config.get("n_kv_heads") or (1 if config.get("multi_query_attention") else heads)
        norm_bias = config.get("bias_for_layer_norm")  # null: as include_bias
        return Shape(
            layers=number(config, "n_layers"),
            width=width,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=width // heads,
            mlp_width=config.get("mlp_hidden_size") or number(config, "mlp_ratio") * width,
            rows=config.get("embedding_size") or number(config, "vocab_size"),
            vocab_size=number(config, "vocab_size"),
            eps=number(config, "rms_norm_eps", 1e-5, kind=float),
            rope_theta=number(config, "rope_theta", 10000.0, kind=float),
            rope_in_float32=config.get("rope_full_precision", True),
            qkv_bias=bool(config.get("include_qkv_bias", False)) or bias,
            bias=bias,
            norm_bias=bias if norm_bias is None else bool(norm_bias),
            tied=bool(config["weight_tying"]),
            logit_scale=width**-0.5 if config.get("scale_logits") else 1.0,
        )
