"""iLLaDA (GSAI-ML, arXiv 2606.25331): Llama's layers, bidirectional, no shift."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from . import fields
from .base import Model
from .config import ModelConfig
from .llama import LLAMA_NAMES, llama_shape

_SUPPORTED = {"layer_norm_eps": None}
"""With it the published layers have LayerNorm."""


class ILLaDA(Model):
    """Every position sees every other, and the published code decodes as LLaDA's does, with its own mask id.

    The tests compare, on random weights, logits with transformers' Llama without a mask. No released weights
    were read.
    """

    published_mask_id = 5
    NAMES: ClassVar[dict[str, str]] = LLAMA_NAMES

    @staticmethod
    def read_config(config: Mapping[str, Any]) -> ModelConfig:
        fields.check_supported(config, _SUPPORTED)
        c = fields.read(config, {"attention_bias": fields.NO, "mlp_bias": fields.NO})
        bias = c["attention_bias"]
        shape = llama_shape(config, scalings=(), qkv_bias=bias, o_bias=bias, mlp_bias=c["mlp_bias"])
        # The published code does not read a head_dim.
        return replace(shape, head_dim=fields.width_of_heads(shape.width, shape.heads))
