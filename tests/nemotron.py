"""For tests of Nemotron-Labs-Diffusion: random weights in transformers' Ministral 3, and in our model."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from dparallel_ext import models
from dparallel_ext.models import NemotronDiffusion

transformers = pytest.importorskip("transformers")

MASK = 12
ROPE = {
    **{"rope_type": "yarn", "rope_theta": 500.0, "factor": 3.0, "beta_fast": 32.0, "beta_slow": 1.0},
    **{"mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 16},
    "llama_4_scaling_beta": 0.5,
}
SIZES = {
    **{"vocab_size": 13, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5},
    **{"max_position_embeddings": 512, "rope_parameters": ROPE, "eos_token_id": 2},
}
CONFIG = {
    **{"model_type": "nemotron_labs_diffusion", "dlm_paradigm": "bidirectional", "block_size": 32},
    **{"mask_token_id": MASK, "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False},
    **{"hidden_act": "silu", "sliding_window": None, **SIZES},
}
PROMPTS = [torch.randint(3, 12, (n,), generator=torch.Generator().manual_seed(n)) for n in (5, 1, 23)]


@functools.cache
def theirs() -> Any:
    """transformers' Ministral 3 with random weights, by which guesses of masks are right now and then."""
    torch.manual_seed(1)
    of = transformers.Ministral3ForCausalLM(transformers.Ministral3Config(**SIZES, pad_token_id=None))
    with torch.no_grad():
        for p in of.parameters():
            p.normal_(1.0 if p.ndim == 1 else 0.0, 0.35)
    return of.eval()


def names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """By the names of the published checkpoints."""
    return {
        ("encoder." + name.removeprefix("model.")).replace("encoder.lm_head", "diffusion_head"): tensor
        for name, tensor in state.items()
    }


@functools.cache
def ours() -> models.Model:
    """The same weights."""
    model = NemotronDiffusion(CONFIG)
    model.load_state_dict(names(theirs().state_dict()))
    return model.eval()


@torch.no_grad()
def chosen_behind(text: Sequence[int], vocabulary: int = MASK + 1) -> list[int]:
    """The autoregressive model's choice behind each token, among the first ids."""
    return theirs()(torch.tensor([text])).logits[0, :, :vocabulary].argmax(-1).tolist()


@torch.no_grad()
def guesses(of: Any, text: Sequence[int], block: Sequence[int]) -> tuple[list[float], list[int]]:
    """Of each row of a block behind the text the likeliest token but the mask, and its probability: the rows
    see each other, and what the model without an adapter has made of the text."""
    cache = theirs()(torch.tensor([text]), use_cache=True).past_key_values if text else None
    everything = torch.zeros(1, 1, len(block), len(text) + len(block))
    found = of(torch.tensor([block]), past_key_values=cache, attention_mask=everything).logits[0].softmax(-1)
    found[:, MASK] = -1
    best = found.max(-1)
    return best.values.tolist(), best.indices.tolist()
