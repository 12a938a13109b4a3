"""RND1 (Radical Numerics, 2025): Qwen3's layers with mixtures of experts, bidirectional, logits shifted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from . import rope
from .base import Model
from .config import ModelConfig
from .dream import diffusion_shape
from .qwen import EXPERTS_NAMES, experts_of, qwen3_options

_FALSE_FOR_NULL = ("rope_scaling", "sliding_window")
"""Keys that the published config.json has as false."""
_ROPE_THETA = 1e6
"""The published base, where a config has none."""


class RND1(Model):
    """Every position sees every other; the logits at a position predict the token after it.

    The published sampler fills the whole response as one block, the tokens of the lowest entropy first:
    `decode(model, prompt, gen_length=n, block_length=n, steps=s, score="entropy")`. Where it differs:
    - The published `generate` fills one token less than max_new_tokens, and has a padding token behind them
      (the end token with add_eos_at_end), which the model sees. So does `decode` with `infill=True` and
      gen_length 0, where the prompt has the n masks and that token behind it.
    - After i of s passes it has filled n * i / s tokens, rounded up. `decode` has LLaDA's counts, which begin
      with the larger ones; they are the same where s divides n. But the published product is of float32, and
      where it falls short of a whole number, as for n = s = 100, a pass fills one token more, and the next
      pass a token less.
    - Its entropies are those of softmax(logits / T) among the ids that top_k and top_p leave, also where it
      takes the likeliest tokens; here a rule judges softmax(logits).
    - Its error bound (`eb_gamma`) goes through the tokens by their probability; the rule "entropy_bound" goes
      through them by their entropy, as the EB-sampler's paper does.

    The tests compare, on random weights, its logits with transformers' Qwen3-MoE without a mask, and tokens
    and passes with that sampler, written again in plain torch. No released weights were run.
    """

    shift = True
    published_mask_id = 151669
    DEFAULTS: ClassVar[dict[str, Any]] = {"num_key_value_heads": 4, "head_dim": 128, "norm_topk_prob": True}
    NAMES: ClassVar[dict[str, str]] = EXPERTS_NAMES

    @staticmethod
    def read_config(config: Mapping[str, Any]) -> ModelConfig:
        config = {**config, **{key: None for key in _FALSE_FOR_NULL if config.get(key) is False}}
        shape = diffusion_shape(rope.with_base(config, _ROPE_THETA), **qwen3_options(config))
        return replace(shape, experts=experts_of(config))
