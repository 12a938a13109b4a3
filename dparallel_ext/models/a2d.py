"""A2D (dLLM, arXiv 2602.22661): autoregressive models that were trained on to masked diffusion.

A checkpoint has the layout of its base family, with a `model_type` of its own.
"""

from __future__ import annotations

from .base import Model
from .llama import Llama
from .qwen import Qwen2, Qwen3


class A2D(Model):
    """What the families have in common (Tiny-A2D): logits are not shifted, and attention is of two kinds.

    No file says for which of them a checkpoint was trained, so the cache mode of `decode` does:
    - MDLM, every position sees every other: `decode(model, prompt, gen_length=128, block_length=32)`, cache
      "none", is LLaDA's loop, which dLLM's MDLM sampler follows; "prefix" and "dual" are Fast-dLLM's caches.
      A call of the model is of this kind, and so are training and likelihoods.
    - BD3LM, block-causal: `cache="block"`. A position sees the blocks up to its own. Blocks of `block_length`
      (32, as published) count from the prompt's end in both directions, so that the prompt's first block may
      be shorter, and so may the response's last. The pass over a block sees the blocks before it as they were
      computed when they were complete, which is exact.

    Where dLLM's samplers differ:
    - `steps` of a block that do not divide its masks: of m masks in s steps both commit m // s or one more a
      pass, in as many passes. LLaDA's loop, and `decode`, begin with the larger numbers; theirs commits in
      each pass what is left over the steps that are left, rounded, so that the larger ones lie in between.
    - `steps` is a multiple of the number of blocks here; they round steps per block up.
    - Their canvas of several prompts is as long as the longest needs, which changes nothing here: a sequence
      sees itself alone.
    - Their BD3LM sampler takes a prompt's tokens that are the padding token for padding, which nothing sees;
      here they are tokens. It stops once every sequence has an end; `eos_id` ends each by itself.
    - The mask token is never committed.

    The tests compare, on random weights, with transformers' layers under full and block-causal masks, and
    with those loops written again. No released checkpoint was run.
    """

    causal = False
    block_causal_too = True
    aligned_blocks = False


class A2DQwen3(A2D, Qwen3):
    """Qwen3's layers, see `A2D`."""

    published_mask_id = 151669


class A2DQwen2(A2D, Qwen2):
    """Qwen2's layers, see `A2D`. The tokenizer's files name the mask token, or `mask_id` does."""


class A2DLlama(A2D, Llama):
    """Llama's layers, see `A2D`. The tokenizer's files name the mask token, or `mask_id` does."""
