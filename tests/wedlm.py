"""For tests of WeDLM: random weights in transformers' Qwen2 and Qwen3 and in our model, and the published
loop in plain torch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dparallel_ext import models

transformers = pytest.importorskip("transformers")

VOCABULARY, MASK, EOS = 60, 59, 2
KINDS = {"qwen2": {}, "qwen3": {"qk_norm": True, "attention_bias": False, "head_dim": 16}}
"""transformers' class of the layers -> what a published config says of them."""
every_kind = pytest.mark.parametrize("kind", KINDS)


@functools.cache
def theirs(kind: str = "qwen3") -> Any:
    """transformers' model with a published config's keys, as the published classes are derived from it; sure
    of its guesses now and then."""
    sizes = {
        **{"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512},
        **{"eos_token_id": EOS, "pad_token_id": 1, "rope_theta": 500.0, "mask_token_id": MASK, **KINDS[kind]},
    }
    config = transformers.AutoConfig.for_model(kind, **sizes, tie_word_embeddings=False)
    kind_of = type(transformers.AutoModelForCausalLM.from_config(config))
    config_kind = type("WeDLMConfig", (type(config),), {"model_type": "wedlm"})
    kind_of = type("WeDLMForCausalLM", (kind_of,), {"config_class": config_kind})
    torch.manual_seed(0)
    made = kind_of(config_kind(**config.to_dict() | {"model_type": "wedlm"}))
    with torch.no_grad():
        for name, p in made.named_parameters():
            p.normal_(1.0 if "norm" in name else 0.0, 0.3)
        made.lm_head.weight *= 1.5
    return made.eval()


@functools.cache
def ours(kind: str = "qwen3") -> models.Model:
    """Ours, of the same weights."""
    return models.wrap(theirs(kind))


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, MASK, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def in_order(of: Any, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
    """Logits (N, V) of rows that see those up to themselves, in the order in which they come."""
    n = len(tokens)
    upto = torch.ones(n, n, dtype=torch.bool).tril()
    mask = torch.where(upto, 0.0, -torch.inf)[None, None]
    found: Tensor = of(
        torch.tensor([[*tokens]]), attention_mask=mask, position_ids=torch.tensor([[*positions]])
    ).logits[0]
    return found


class Published(NamedTuple):
    tokens: list[int]
    """Of the response, to the end token if there is one."""
    passes: int
    """With the one in which the last tokens leave, without that over the prompt."""
    filled: list[list[int]]
    """By pass the places of the response that it fills."""


def published(
    of: Any,
    prompt: Tensor,
    gen_length: int,
    size: int = 16,
    tau: float | None = 0.4,
    penalty: float = 0.02,
    eos: int | None = None,
) -> Published:
    """The published engine's loop at temperature 0 with windows that end where the response does. Rows are
    permuted, nothing is kept from pass to pass, and the mask token is never chosen."""
    text, response, filled = prompt.tolist(), list[int](), list[list[int]]()
    window: list[int | None] = [None] * min(size, gen_length)
    while window:
        ahead = next((i for i, token in enumerate(window) if token is None), len(window))
        window += [None] * min(ahead, gen_length - len(response) - len(window))
        start = len(text)
        rows = [i for i, token in enumerate(window) if token is not None]
        known = len(text) + len(rows)
        rows += [i for i, token in enumerate(window) if token is None]
        tokens = [*text, *(MASK if window[i] is None else window[i] for i in rows)]
        logits = in_order(of, tokens, [*range(start), *(start + i for i in rows)])[known:]
        filled.append([])
        for token in window[:ahead]:
            text.append(token)
            response.append(token)
            if token == eos:
                return Published(response, len(filled), filled)
        window, masks = window[ahead:], [i - ahead for i in rows[known - start :]]
        if not masks:
            continue
        entropy = torch.distributions.Categorical(logits=logits).entropy()
        score = entropy + (torch.tensor(masks, dtype=torch.float32) - masks[0]) * penalty
        chosen = (score < (-1 if tau is None else tau)).nonzero()[:, 0].tolist() or [int(score.argmin())]
        logits[:, MASK] = -torch.inf
        for i in chosen:
            window[masks[i]] = int(logits[i].argmax())
            filled[-1].append(len(response) + masks[i])
    return Published(response, len(filled), filled)
