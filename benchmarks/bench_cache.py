"""The time that a cache saves: whole decodes of a random LLaDA-shaped model, and of an SDAR-shaped one.

Width 512, 8 layers, V = 126464, prompt 512, 128 new tokens, block 32, 8 tokens a pass by quota, so that every
contender runs the same 16 passes. `published`: each pass computes the whole sequence through the same
layers, the head on every row, and selects in float64.
"""

from __future__ import annotations

import functools
import time
from typing import Any

import pytest
import torch
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext.models import SDAR, LLaDA, Model

from . import baselines
from .harness import OURS

PROMPT, NEW, BLOCK, TAKEN = 512, 128, 32, 8
PROMPT_IDS = torch.randint(0, 126000, (1, PROMPT), generator=torch.Generator().manual_seed(1))
CONFIG = {
    "d_model": 512,
    "n_layers": 8,
    "n_heads": 8,
    "mlp_hidden_size": 1536,
    "vocab_size": 126464,
    "block_type": "llama",
    "activation_type": "silu",
    "layer_norm_type": "rms",
    "rope": True,
    "include_bias": False,
    "weight_tying": False,
    "mask_token_id": 126336,
}
CAUSAL_CONFIG = {
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 1536,
    "vocab_size": 126464,
    "mask_token_id": 126336,
    "block_size": BLOCK,
}


def random_model(causal: bool, dtype: torch.dtype) -> Model:
    torch.manual_seed(0)
    model = SDAR(CAUSAL_CONFIG) if causal else LLaDA(CONFIG)
    return model.to(dtype).eval()


def ours(model: Model, prompt: Tensor, cache: str, **settings: Any) -> Tensor:
    return dx.decode(
        model,
        prompt,
        gen_length=NEW,
        block_length=BLOCK,
        selector="quota",
        threshold=TAKEN,
        score="confidence",
        cache=cache,
        **settings,
    ).sequences


@functools.cache
def published(causal: bool, dtype: torch.dtype) -> tuple[Tensor, float]:
    """The tokens that the published loop decodes, and its seconds."""
    model, began = random_model(causal, dtype), time.perf_counter()
    commit = functools.partial(baselines.published_quota, quota=TAKEN)
    result = baselines.published_decode(
        lambda x, start: model(x).logits, PROMPT_IDS, model.mask_id, NEW, BLOCK, commit
    )
    return result[0], time.perf_counter() - began


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("cache", ["none", "dual", "block"])
def test_cache(benchmark: Any, cache: str, dtype: torch.dtype) -> None:
    model = random_model(cache == "block", dtype)
    expected, seconds = published(cache == "block", dtype)
    result = ours(model, PROMPT_IDS, cache)
    same = int((result == expected)[:, PROMPT:].sum())
    benchmark.group = f"16 passes, prompt {PROMPT}, {NEW} new tokens, cache {cache}, {dtype}".replace(
        "torch.", ""
    )
    benchmark.pedantic(lambda: ours(model, PROMPT_IDS, cache), rounds=5, warmup_rounds=1)
    benchmark.extra_info.update(
        contender=f"{OURS} ({same}/{NEW} tokens the same)", baselines={"published": seconds}
    )
