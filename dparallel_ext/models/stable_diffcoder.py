"""Stable-DiffCoder (ByteDance Seed, arXiv 2601.15892): Llama's layers, block-causal, no shift."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .config import ModelConfig
from .llama import Llama


class StableDiffCoder(Llama):
    """A block of 4 sees itself and the blocks before it; blocks count from position 0. A checkpoint names
    Llama as its model_type, and is known by the code that its config.json names.

    `decode`, with cache "block", follows the published loop (`generate_block`): the prompt's last tokens may
    lie in the first block, and the last block ends with the response. `rule="confidence:TAU"` is its
    `threshold`, without which it commits a token a pass, or by the fixed schedule of `steps`. The published
    loop has gen_length / block_length blocks share `steps`, also where the response lies in one block more;
    `steps` here is a multiple of the number of blocks. It does not count its prefill as a pass, which
    `nfe_published` does, and decodes the rest of a block behind an end token.

    A call of the published class itself is causal, as Llama's is, so it is decoded through `models.wrap`.

    The tests compare, on random weights, logits with transformers' Llama under a block-causal mask, and
    tokens and passes with the published loop, written again in plain torch. No released weights were read.
    """

    causal = False
    whole_blocks = False
    published_mask_id = 5

    @staticmethod
    def read_config(config: Mapping[str, Any]) -> ModelConfig:
        return replace(Llama.read_config(config), block_length=4)


def is_published_so(config: Mapping[str, Any]) -> bool:
    """Whether a config.json names the published code of Stable-DiffCoder, by its older or newer name."""
    code = config.get("auto_map")
    names = code.values() if isinstance(code, Mapping) else ()
    return any(str(name).endswith("DiffcoderForCausalLM") for name in names)
