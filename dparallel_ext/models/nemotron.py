"""Nemotron-Labs-Diffusion (NVIDIA, 2026): Ministral 3's layers, trained to predict the next token and masks.

Source: the technical report "Nemotron-Labs-Diffusion: A Tri-Mode Language Model Unifying Autoregressive,
Diffusion, and Self-Speculation Decoding", and the code published with the checkpoints.

    autoregressive     as Ministral 3: the logits at a position are for the next
    diffusion          masks of a block behind the text, whose rows see each other: the logits at a mask are
                       for the mask's own position. The block's first token is the autoregressive choice, and
                       a finished block is computed again, each position seeing the positions up to itself
    self-speculation   masks draft, the autoregressive model verifies (`speculation.SelfDrafter`)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from . import fields, rope
from .config import ModelConfig
from .llama import LLAMA_NAMES
from .mistral import Ministral3

_SUPPORTED = {"dlm_type": "llada"}
"""With "dream" the logits for a mask are at the position before it."""
_ROPE_THETA = 1e6
"""The published base, where a config has none."""


class NemotronDiffusion(Ministral3):
    """An autoregressive model, which drafts for itself with `drafter="self"`, and which `decode` decodes by
    diffusion (an engine with cache "block").

    Where diffusion differs from the published code:
    - gen_length need not be a multiple of block_length: the last block is shorter.
    - There is no budget of thinking tokens, and no fixed schedule (`steps`).
    - No pass is run over a block whose first token is an end.
    - The mask token is never committed.

    The tests compare, on random weights, its logits with transformers' Ministral 3, and tokens, drafts and
    passes with the published loops, written again in plain torch. No released weights were read.
    """

    aligned_blocks = False
    onward = True
    NAMES: ClassVar[dict[str, str]] = {
        ours: theirs.replace("model.", "encoder.", 1) for ours, theirs in LLAMA_NAMES.items()
    } | {"lm_head": "diffusion_head"}

    @staticmethod
    def read_config(config: Mapping[str, Any]) -> ModelConfig:
        fields.check_supported(config, _SUPPORTED)
        if not (config.get("rope_parameters") or config.get("rope_scaling")):
            raise ValueError("config: 'rope_parameters' is missing or null")
        return Ministral3.read_config(rope.with_base(config, _ROPE_THETA))
