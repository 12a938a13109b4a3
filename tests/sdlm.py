"""For tests of SDLM: random weights in transformers' Qwen2 and in our model, the published masks, and the
published loop in plain torch."""

from __future__ import annotations

import copy
import functools
import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dparallel_ext import models

transformers = pytest.importorskip("transformers")

VOCABULARY, MASK, EOS, OTHER_EOS = 60, 59, 2, 4


@functools.cache
def theirs(size: int = 4, **changes: Any) -> Any:
    """transformers' Qwen2 with a published config's keys; sure of its guesses now and then."""
    config = transformers.Qwen2Config(
        **{"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512},
        **{"eos_token_id": EOS, "bos_token_id": EOS, "rope_theta": 500.0, "tie_word_embeddings": False},
        **{"block_size": size, "causal_attn": False, "text_mask_token_id": MASK, **changes},
    )
    torch.manual_seed(0)
    made = transformers.Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, p in made.named_parameters():
            p.normal_(1.0 if "norm" in name else 0.0, 0.3)
        made.lm_head.weight *= 1.5
    return made.eval()


def of_few_words(theirs: Any) -> Any:
    """A copy that writes three tokens most of the time, so that guesses are often right."""
    made = copy.deepcopy(theirs)
    with torch.no_grad():
        made.lm_head.weight[:10] *= 0.2
        made.lm_head.weight[13:] *= 0.2
    return made


@functools.cache
def ours(size: int = 4) -> models.Model:
    """Ours, of the same weights."""
    return models.wrap(theirs(size))


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(5, MASK, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_under(of: Any, tokens: list[int], positions: list[int], seen: Tensor) -> Tensor:
    """Logits (N, V) of rows that see what `seen` (N, N) bool says."""
    mask = torch.where(seen, 0.0, -torch.inf)[None, None]
    found: Tensor = of(
        torch.tensor([tokens]), attention_mask=mask, position_ids=torch.tensor([positions])
    ).logits[0]
    return found


def of_a_call(of: Any, row: Tensor) -> Tensor:
    """Logits (L, V) of a call under the published mask for sequences without a cache, token by token."""
    masked = (row == MASK).tolist()
    n = len(masked)
    joined = [masked[i] or (i + 1 < n and masked[i + 1]) for i in range(n)]
    seen = torch.zeros(n, n, dtype=torch.bool)
    for i in range(n):
        for j in range(n):
            between = all(joined[min(i, j) : max(i, j) + 1])
            seen[i, j] = between if joined[j] else j <= i
    return logits_under(of, row.tolist(), list(range(n)), seen)


class Published(NamedTuple):
    tokens: list[int]
    """Of the response, up to an end token, which is dropped."""
    passes: int
    filled: list[int]
    """By pass the tokens that it appends, the end token not counted."""


def published(
    of: Any,
    prompt: Tensor,
    gen_length: int,
    size: int = 4,
    tau: float = 0.9,
    by: str = "confidence",
    ends: tuple[int, ...] = (),
    whole: bool = True,
) -> Published:
    """The published loop with a cache at temperature 0, but that nothing is kept from pass to pass and the
    mask token is never chosen.

    whole: as published, windows are whole at the response's end, too, and it may get longer than asked for.
    """
    text, response, filled = prompt.tolist(), list[int](), list[int]()
    while len(response) < gen_length:
        masks = (size if whole else min(size, gen_length - len(response))) - 1
        known = len(text)
        tokens = [*text, text[-1], *[MASK] * masks]
        positions = [*range(known), *range(known - 1, known + masks)]
        seen = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()
        seen[known:, known:] = True
        seen[known:, known - 1] = False  # the last token is seen as part of the window
        logits = logits_under(of, tokens, positions, seen)[known:]
        probability = logits.softmax(-1)
        entropy = -(probability * (probability + 1e-9).log()).sum(-1)
        probability[:, MASK] = -1
        confidence, best = probability.max(-1)
        if by == "entropy":
            confidence = 1 - entropy / math.log(VOCABULARY)
        chosen = best.tolist()
        sure = (confidence > tau).tolist()
        new = chosen[: max(1, [*sure, False].index(False))]
        end = next((i for i, token in enumerate(new) if token in ends), None)
        new = new[:end]
        text += new
        response += new
        filled.append(len(new))
        if end is not None:
            break
    return Published(response, len(filled), filled)


def self_speculative(
    of: Any, prompt: Tensor, gen_length: int, size: int = 4, ends: tuple[int, ...] = ()
) -> Published:
    """The published loop that checks the tokens of the pass before, at temperature 0, but that nothing is
    kept from pass to pass and the mask token is never chosen. It may get longer than asked for.

    A pass is over `size` rows: the text with 1, 2, ... of those tokens, and then masks.
    """

    def window(known: list[int]) -> list[int]:
        tokens, first = [*known, *[MASK] * (size - 1)], len(known) - 1
        seen = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()
        seen[first:, first:] = True
        logits = logits_under(of, tokens, list(range(len(tokens))), seen)[first:]
        logits[:, MASK] = -torch.inf
        return logits.argmax(-1).tolist()

    text, response, filled = prompt.tolist(), list[int](), list[int]()
    guesses = window(text)
    while len(response) < gen_length:
        rows = [window([*text, *guesses[: count + 1]]) for count in range(size)]
        right = next((i for i in range(1, size) if guesses[i] != rows[i - 1][0]), size)
        new, guesses = guesses[:right], rows[right - 1]
        end = next((i for i, token in enumerate(new) if token in ends), None)
        new = new[:end]
        text += new
        response += new
        filled.append(len(new))
        if end is not None:
            break
    return Published(response, 1 + len(filled), filled)
