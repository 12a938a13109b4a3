"""LLaDA2 (inclusionAI, arXiv 2512.15745, 2602.08676): mixtures of experts, block-causal, no shift.

Source of 2.2: the technical report "LLaDA2.2: Enabling Agentic Diffusion Language Models via Levenshtein
Editing", and ports of the code published with its checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from . import fields
from .base import Model
from .config import BlockRouting, ExpertsConfig, GroupRouting, ModelConfig
from .fields import Field
from .llama import llama_shape

_LAYER = "model.layers.{}."
_SUPPORTED = {"score_function": "sigmoid", "norm_head": False, "moe_router_enable_expert_bias": True}
_ROTARY = {"partial_rotary_factor": Field(float, 0.5, least=0.0, most=1.0)}
_FIELDS = {
    **_ROTARY,
    "num_hidden_layers": fields.LAYERS,
    "num_key_value_heads": Field(int, 0, least=0, most=2**16),
    "rms_norm_eps": replace(fields.EPS, default=1e-5),
    "use_qkv_bias": fields.NO,
    "use_bias": Field(bool, True),
    "use_qk_norm": Field(bool, True),
    "block_length": replace(fields.BLOCK_LENGTH, default=32),
    "num_experts": Field(int, most=2**14),
    "num_experts_per_tok": Field(int, 2, most=2**10),
    "num_shared_experts": Field(int, 0, least=0, most=2**10),
    "moe_intermediate_size": fields.MLP_WIDTH,
    "first_k_dense_replace": Field(int, 0, least=0),
    "n_group": Field(int, 8, most=2**10),
    "topk_group": Field(int, 4, most=2**10),
    "routed_scaling_factor": Field(float, 2.5, least=0.0, most=2**20),
}
_OF_BLOCKS = {"expert_capacity": Field(int, most=2**14), "block_size": fields.BLOCK_LENGTH}


class LLaDA2(Model):
    """A block sees itself and the blocks before it; half of each head's dimensions are rotated.

    LLaDA2.1 has learned to correct itself: `decode` with `rule="edit:TAU,TAU_EDIT"` gives the tokens of its
    published `generate`, with cache "block" or "none".

    LLaDA2.2 deletes and inserts too, `rule="levenshtein:TAU,TAU_EDIT"`, and all tokens of a block choose
    among the `expert_capacity` experts that some token of the block scores highest.

    Where `decode` differs:
    - The `generate` that comes with LLaDA2.1-mini adds its mask of ones and zeros to the scores, where 0 and
      -inf are meant, so that a block sees later ones too. Here attention is block-causal, as in LLaDA2.0's
      code, in training and in SGLang.
    - The first release of LLaDA2.0's `generate` draws tokens at temperature 1 where its temperature is 0.
    - Its `steps` below `block_length` are `min_commit=block_length // steps`, if they divide it.
    - The mask token is never committed.

    The tests compare, on random weights, with the layers and that loop, its mask mended, written again in
    plain torch. No released checkpoint was checked.
    """

    strict = frozenset({"confidence"})
    published_mask_id = 156895
    NAMES: ClassVar[dict[str, str]] = {
        "embed": "model.word_embeddings",
        "norm1": _LAYER + "input_layernorm",
        "qkv": _LAYER + "attention.query_key_value",
        "q_norm": _LAYER + "attention.query_layernorm",
        "k_norm": _LAYER + "attention.key_layernorm",
        "o": _LAYER + "attention.dense",
        "norm2": _LAYER + "post_attention_layernorm",
        "gate": _LAYER + "mlp.gate_proj",
        "up": _LAYER + "mlp.up_proj",
        "down": _LAYER + "mlp.down_proj",
        "router": _LAYER + "mlp.gate",
        "experts": _LAYER + "mlp.experts",
        "shared": _LAYER + "mlp.shared_experts",
        "norm": "model.norm",
        "lm_head": "lm_head",
    }

    @staticmethod
    def read_config(config: Mapping[str, Any]) -> ModelConfig:
        fields.check_supported(config, _SUPPORTED)
        c = fields.read(config, _FIELDS)
        block_length = c["block_length"]
        routing: GroupRouting | BlockRouting
        if config.get("expert_capacity") is None:
            routing = GroupRouting(c["n_group"], c["topk_group"], c["routed_scaling_factor"])
        else:  # LLaDA 2.2, which keeps the keys of groups, and reads them no more
            of_blocks = fields.read(config, _OF_BLOCKS)
            size, scale = of_blocks["block_size"], c["routed_scaling_factor"]
            routing = BlockRouting(size, of_blocks["expert_capacity"], scale)
            block_length = block_length if config.get("block_length") is not None else size
            if block_length % size:
                raise ValueError(
                    f"config: block_length={block_length}, expected a multiple of block_size={size}, since "
                    "as many tokens choose among the same experts"
                )
        # What Llama's keys do not hold as they are.
        theirs = {"num_key_value_heads": c["num_key_value_heads"] or None, "rms_norm_eps": c["rms_norm_eps"]}
        factor, rope = c["partial_rotary_factor"], config.get("rope_parameters")
        # transformers 5 writes it there, too.
        if isinstance(rope, Mapping) and "partial_rotary_factor" in rope:
            nested = fields.read(rope, _ROTARY, "rope_parameters")["partial_rotary_factor"]
            if config.get("partial_rotary_factor") not in (None, nested):
                raise ValueError(
                    f"config: partial_rotary_factor={factor:g}, and that of rope_parameters is {nested:g}"
                )
            factor, theirs["rope_parameters"] = nested, {**rope, "partial_rotary_factor": 1}
        shape = llama_shape({**config, **theirs, "partial_rotary_factor": 1}, scalings=())
        rotated = int(shape.head_dim * factor)
        if rotated < 2 or rotated % 2:
            raise ValueError(
                f"config: partial_rotary_factor={factor:g} rotates {rotated} of "
                f"{shape.head_dim} dimensions, expected an even number of 2 or more"
            )
        experts = ExpertsConfig(
            c["num_experts"],
            c["num_experts_per_tok"],
            c["moe_intermediate_size"],
            normalized=c["num_experts_per_tok"] > 1,
            layers=frozenset(range(c["first_k_dense_replace"], shape.layers)),
            shared_width=c["moe_intermediate_size"] * c["num_shared_experts"],
            routing=routing,
        )
        return replace(
            shape,
            qkv_bias=c["use_qkv_bias"],
            o_bias=c["use_bias"],
            qk_norm=c["use_qk_norm"],
            block_length=block_length,
            fused_qkv=True,
            rotary_dim=None if rotated == shape.head_dim else rotated,
            experts=experts,
        )
