"""A2D (dLLM, arXiv 2602.22661): autoregressive models that were trained on to masked diffusion.

A checkpoint has the layout of its base family, with a `model_type` of its own.
"""

from __future__ import annotations

from .llama import Llama
from .qwen import Qwen2, Qwen3


class A2DQwen3(Qwen3):
    """Qwen3's layers, of which every position sees every other; logits are not shifted (Tiny-A2D).

    dLLM's MDLM sampler is LLaDA's loop: `decode(model, prompt, gen_length=128, block_length=32)` gives its
    tokens. Where they differ:
    - `steps` of a block that do not divide its masks: of m masks in s steps both commit m // s or one more a
      pass, in as many passes. LLaDA's loop, and `decode`, begin with the larger numbers; theirs commits in
      each pass what is left over the steps that are left, rounded, so that the larger ones lie in between.
    - `steps` is a multiple of the number of blocks here; they round steps per block up.
    - Their canvas of several prompts is as long as the longest needs, which changes nothing here: a sequence
      sees itself alone.
    - The mask token is never committed.

    The tests compare, on random weights, with transformers' layers under a full mask, and with that loop
    written again. No released checkpoint was run.
    """

    causal = False
    published_mask_id = 151669


class A2DQwen2(Qwen2):
    """As `A2DQwen3`, with Qwen2's layers. The tokenizer's files name the mask token, or `mask_id` does."""

    causal = False


class A2DLlama(Llama):
    """As `A2DQwen3`, with Llama's layers. The tokenizer's files name the mask token, or `mask_id` does."""

    causal = False
