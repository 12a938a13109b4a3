"""LLaDA (GSAI-ML, arXiv 2502.09992) and LLaDA-MoE (inclusionAI, arXiv 2509.24389): the checkpoints' own names
and config keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from . import fields
from .base import Model
from .config import ExpertsConfig, ModelConfig
from .fields import Field
from .llama import llama_shape
from .qwen import EXPERTS_NAMES

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
_FIELDS = {
    "n_layers": fields.LAYERS,
    "d_model": fields.WIDTH,
    "n_heads": fields.HEADS,
    "n_kv_heads": replace(fields.HEADS, default=None),
    "multi_query_attention": fields.NO,
    "mlp_hidden_size": replace(fields.MLP_WIDTH, default=None),
    "mlp_ratio": Field(int, None, most=1000),
    "vocab_size": fields.VOCABULARY,
    "embedding_size": replace(fields.VOCABULARY, default=None, least=0),
    "rms_norm_eps": replace(fields.EPS, default=1e-5),
    "rope_theta": fields.ROPE_THETA,
    "rope_full_precision": Field(bool, True),
    "max_sequence_length": fields.POSITIONS,
    "include_bias": Field(bool),
    "include_qkv_bias": fields.NO,
    "bias_for_layer_norm": Field(bool, None),
    "weight_tying": Field(bool),
    "scale_logits": fields.NO,
}


class LLaDA(Model):
    """Every position sees every other; the logits at a position predict its own token."""

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
    def read_config(config: Mapping[str, Any]) -> ModelConfig:
        fields.check_supported(config, _SUPPORTED, _EXPLICIT)
        c = fields.read(config, _FIELDS)
        heads, width, bias, norm_bias = (
            c[key] for key in ("n_heads", "d_model", "include_bias", "bias_for_layer_norm")
        )
        if c["mlp_hidden_size"] is None and c["mlp_ratio"] is None:
            raise ValueError("config: 'mlp_hidden_size' is missing or null, and so is 'mlp_ratio'")
        return ModelConfig(
            layers=c["n_layers"],
            width=width,
            heads=heads,
            kv_heads=c["n_kv_heads"] or (1 if c["multi_query_attention"] else heads),
            head_dim=fields.width_of_heads(width, heads),
            mlp_width=c["mlp_hidden_size"] or c["mlp_ratio"] * width,
            embedding_size=c["embedding_size"] or c["vocab_size"],
            vocab_size=c["vocab_size"],
            eps=c["rms_norm_eps"],
            rope_theta=c["rope_theta"],
            rope_in_float32=c["rope_full_precision"],
            qkv_bias=c["include_qkv_bias"] or bias,
            o_bias=bias,
            mlp_bias=bias,
            head_bias=bias,
            norm_bias=bias if norm_bias is None else norm_bias,  # null: as include_bias
            tied=c["weight_tying"],
            logit_scale=width**-0.5 if c["scale_logits"] else 1.0,
        )


_MOE_SUPPORTED = {
    "qk_layernorm": True,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1,
    "moe_router_score_function": "softmax",
    "moe_router_enable_expert_bias": False,
    "router_num_group": None,
    "router_topk_group": None,
    "clip_qkv": None,
}
_MOE_FIELDS = {
    "dense_intermediate_size": replace(fields.MLP_WIDTH, default=None),
    "expert_intermediate_size": fields.MLP_WIDTH,
    "shared_expert_intermediate_size": Field(int, 0, least=-1, most=0),
    "num_experts": Field(int, most=2**14),
    "num_experts_per_tok": Field(int, most=2**10),
    "rms_norm_eps": replace(fields.EPS, default=1e-5),
    "attention_bias": fields.NO,
}


class LLaDAMoE(Model):
    """LLaDA with mixtures of experts (LLaDA-MoE-7B-A1B), see `experts`: layers of Qwen3's, of which every
    position sees every other."""

    published_mask_id = 156895
    NAMES: ClassVar[dict[str, str]] = EXPERTS_NAMES

    @staticmethod
    def read_config(config: Mapping[str, Any]) -> ModelConfig:
        fields.check_supported(config, _MOE_SUPPORTED, ("qk_layernorm",))
        c = fields.read(config, _MOE_FIELDS)
        bias, width = c["attention_bias"], c["expert_intermediate_size"]
        theirs = {
            "intermediate_size": c["dense_intermediate_size"] or width,
            "rms_norm_eps": c["rms_norm_eps"],
        }
        shape = llama_shape({**config, **theirs}, scalings=(), qk_norm=True, qkv_bias=bias, o_bias=bias)
        sparse = config.get("moe_layer_freq")
        if (
            not isinstance(sparse, list)
            or len(sparse) != shape.layers
            or not all(type(each) is int and each in (0, 1) for each in sparse)
        ):
            raise ValueError(
                f"config: moe_layer_freq={sparse!r:.80}, expected 1 or 0 for each of {shape.layers} layers"
            )
        layers = frozenset(layer for layer, each in enumerate(sparse) if each)
        experts = ExpertsConfig(c["num_experts"], c["num_experts_per_tok"], width, False, layers)
        return replace(shape, experts=experts)
