"""WeDLM (Tencent, arXiv 2512.22737): diffusion under causal attention, on layers of Qwen2.5 or Qwen3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from . import fields
from .base import Model
from .config import ModelConfig
from .fields import Field
from .llama import llama_shape
from .qwen import QWEN3_NAMES

_FIELDS = {"attention_bias": Field(bool, True), "qk_norm": fields.NO}


class WeDLM(Model):
    """Known tokens come first, whatever their positions: a known token sees the known tokens up to itself,
    a mask all known tokens and the masks up to itself. A mask's row predicts the mask's own token.

    `decode`, with cache "window", follows the published engine: each pass computes the `block_length` masks
    (16, as published) from the first mask on, and the known tokens whose keys and values are not stored. A
    token is final once no mask is in front of it, and the next pass stores it; until then each pass computes
    it again. The published rule is `rule="distance:0.4,0.02"`, the published temperature
    0.2.

    Where `decode` differs:
    - The window ends where the response does. The published engine has masks behind gen_length too, as far as
      its pages reach, and drops the tokens that it fills there: close to the end of a response without an end
      token, its tokens and passes may be others.
    - The prompt is computed by the first pass over masks, and no pass follows in which the last tokens are
      stored; `nfe_published` counts both.
    - An id may be sampled by the probability at the temperature in force (`top_p`); the published code looks
      at the probability at temperature 1.
    - The mask token is never committed.

    A call of the model sees known tokens first, too: without masks that is causal attention. The published
    class for transformers leaves the order to its caller.

    The tests compare, on random weights, logits with those of transformers' Qwen2 and Qwen3, and tokens and
    passes with the published loop, written again in plain torch. No released weights were read.
    """

    window = 16
    aligned_blocks = False
    published_mask_id = 151665
    NAMES: ClassVar[dict[str, str]] = QWEN3_NAMES

    @staticmethod
    def read_config(config: Mapping[str, Any]) -> ModelConfig:
        c = fields.read(config, _FIELDS)
        return llama_shape(config, qk_norm=c["qk_norm"], qkv_bias=c["attention_bias"])
