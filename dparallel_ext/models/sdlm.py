"""SDLM (OpenGVLab, arXiv 2509.24007): Qwen2.5's layers; the last token and masks behind it see each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from ..cache import WORD
from . import fields
from .base import Model
from .config import ModelConfig, config_ids
from .fields import Field
from .llama import LLAMA_NAMES, llama_shape

_SUPPORTED = {"causal_attn": False, "casual_attn": False}
"""The second is how the first releases spell it."""


class SDLM(Model):
    """Known tokens are causal. Behind them comes a window: the last known token and the masks that follow see
    each other and all tokens in front, and each predicts the next position's token.

    A checkpoint names Qwen2 as its model_type, and is known by `text_mask_token_id` in its config.json.

    `decode`, with cache "window", follows the published loop: a pass predicts `block_length` tokens (the
    config's `block_size`: 4, or 8 in SDLM-3B-D8) from the last known token and one mask less, and commits the
    tokens in front of the first token that the policy row does not choose, or else the first token
    (`rules.Leading`). With the published `rule="confidence:0.9"` (`prob_conf`) these are the longest run of
    p > 0.9; the published `entropy_conf` at 0.9 is `"entropy:TAU"` with TAU 0.1 times the logarithm of the
    number of ids.

    The published passes compute the last known token twice, in the window and, to store its key and value, by
    itself. Here the next pass does the latter, which gives the same keys and values.

    Where `decode` differs:
    - The window ends where the response does. The published loop always has all its masks, and may write up
      to `block_size` - 1 tokens more than it was asked for. With a gen_length that is larger by as many,
      `decode` gives the same tokens, the additional ones too.
    - Above temperature 0 the policy row judges softmax(logits); the published code judges the distribution
      from which it samples.
    - The mask token is never committed.

    Published `self_speculative` decoding, where passes check the tokens of the pass before, is
    `rule="one", draft_size=block_length - 1` (`decoding.self_speculation`): the text of a token a pass, in
    fewer passes. The first token of a pass, which the published loop keeps for the next, is committed at
    once. At temperature 0 tokens and passes are the published ones; above, where the published loop compares
    samples of two passes, the text is still that of a token a pass.

    The tests compare, on random weights, logits with those of transformers' Qwen2 under the published masks,
    and tokens and passes with the published loops, written again in plain torch. No released weights were
    read.
    """

    shift = True
    strict = frozenset({"confidence", "entropy"})
    aligned_blocks = False
    window = 4
    published_mask_id = 151665
    mask_key = "text_mask_token_id"
    DEFAULTS: ClassVar[dict[str, Any]] = {"num_key_value_heads": 32}
    NAMES: ClassVar[dict[str, str]] = LLAMA_NAMES

    @staticmethod
    def read_config(config: Mapping[str, Any]) -> ModelConfig:
        fields.check_supported(config, _SUPPORTED)
        size = fields.read(config, {"block_size": Field(int, SDLM.window, most=WORD)})["block_size"]
        shape = replace(llama_shape(config, qkv_bias=True), window=size)
        config_ids(config, SDLM.mask_key, shape.embedding_size)
        return shape
