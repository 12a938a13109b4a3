"""Fast-dLLM v2 (NVIDIA, arXiv 2509.26328): Qwen2.5 layers, block-causal, logits shifted by one position."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from .base import Model
from .config import ModelConfig
from .llama import LLAMA_NAMES
from .sdar import block_causal_shape


class FastDLLM(Model):
    """A block (`bd_size` in config.json, 32) sees itself and the blocks before it.

    The logits for a position come from the position before it, the logits for a block's first position from
    the last position of the block before. `decode` follows the published `generate`: the pass that stores a
    finished block gives the next block's first token, whatever its confidence; then its sub-blocks of 8 are
    filled from left to right, each by passes over the block that commit p > threshold (0.9 in the published
    examples) and the best one. `cache="block"` and `"none"` follow it exactly, `cache="dual"` with the
    published sub-block cache (`use_block_cache`).

    Where `decode` differs:
    - A prompt of exactly one block is seen; the published functions drop it, since they store a prompt only
      if it is longer than a block.
    - Above temperature 0 every token is sampled from the whole softmax; the published code takes the argmax
      as a block's first token, and samples the others from the top 95 %.
    - It decodes `gen_length` tokens, to the end of their last block; the published code decodes
      `max_new_tokens // bd_size` blocks from the one that the prompt ends in, and one token more.
    - The mask token is never committed.

    The tests compare, on random weights, with the published loop for one sequence, and with the layers
    written again in plain torch. No released checkpoint was checked, nor was its config.json at hand:
    `bd_size` and the mask's id, if the tokenizer's files do not name it, are the published code's defaults.
    """

    shift = True
    strict = frozenset({"confidence"})
    sub_block_length: ClassVar[int] = 8
    published_mask_id = 151665
    DEFAULTS: ClassVar[dict[str, Any]] = {"num_key_value_heads": 32}
    bd_size: ClassVar[int] = 32
    """The block length, unless config.json has another."""
    NAMES: ClassVar[dict[str, str]] = LLAMA_NAMES

    @staticmethod
    def read_config(config: Mapping[str, Any]) -> ModelConfig:
        shape = block_causal_shape(config, "bd_size", FastDLLM.bd_size, qkv_bias=True)
        part = FastDLLM.sub_block_length
        if (shape.block_length or 0) % part:
            raise ValueError(f"config: bd_size={shape.block_length}, expected a multiple of {part}")
        return shape
