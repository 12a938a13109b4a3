"""The log-probabilities of the tokens of a given text, of an autoregressive model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

import dparallel_ext as dx
from dparallel_ext.cache import Span
from dparallel_ext.decoding.padding import row_padding
from dparallel_ext.models import Model, own_precision
from dparallel_ext.ops.head import rows_of_chunk
from dparallel_ext.types import RowTopK


class TokenScores(NamedTuple):
    """Of each token of a text but the first, which nothing predicts."""

    logprobs: list[float]
    """Its log-probability (nats) after the tokens before it."""
    top: list[list[tuple[int, float]]]
    """The most probable tokens of its place and their log-probabilities, in descending order."""


@torch.inference_mode()
def token_scores(model: Model, ids: Sequence[int], top: int = 0) -> TokenScores:
    """The scores of one text, in one pass over all of it. top: how many of the most probable tokens of each
    place are listed, 0 to 32.

    The head is applied in chunks, so no (L, V) tensor exists.
    """
    device, pad_to, length = model.device, row_padding(model), len(ids) - 1
    scores = TokenScores([], [])
    if length < 1:
        return scores
    cache = model.new_cache(1, length, kept=False)
    metadata = cache.metadata([Span(0, 0, length, length)], pad_to, causal=True).to(device)
    tokens, targets = torch.tensor([ids[:-1], ids[1:]], device="cpu")
    tokens = F.pad(tokens, (0, len(metadata.positions) - length))
    rows = rows_of_chunk(None, model.lm_head.weight)
    with own_precision(model, device):
        hidden = model.step(tokens.to(device), cache, metadata)
        for begin in range(0, length, rows):
            count = min(rows, length - begin)
            padded = count if pad_to is None else min(pad_to(count), len(hidden) - begin)
            logits = model.head(hidden[begin : begin + padded])[:count]
            stats = dx.row_stats(logits)
            target = targets[begin : begin + count].to(device)[:, None]
            of_target = logits.gather(1, target)[:, 0].float() - stats.lse
            scores.logprobs.extend(of_target.tolist())
            scores.top.extend(_listed(dx.row_topk(logits, top)) if top else [[] for _ in range(count)])
    dx.check_errors(device)
    return scores


def _listed(top: RowTopK) -> list[list[tuple[int, float]]]:
    places = zip(top.token.tolist(), top.logprob.tolist(), strict=True)
    return [[each for each in zip(*place, strict=True) if each[0] >= 0] for place in places]
