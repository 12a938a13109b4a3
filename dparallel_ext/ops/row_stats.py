"""Statistics of rows of logits, each needed row read once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..arguments import described, shown, whole
from ..types import NO_ERROR, RowStats
from . import streams
from .errors import named_row, report
from .fake import register_fake
from .inputs import (
    Ids,
    check_index,
    check_logits,
    check_sampling,
    keys_of,
    mask_id_of,
    rows_view,
    suppressed,
)
from .kernel import kernel

_row_stats = kernel("row_stats")

_ROW_FIELDS = 9
LARGEST = torch.finfo(torch.float32).max


def row_stats(
    logits: Tensor,
    *,
    rows: Tensor | None = None,
    mask_id: int | None = None,
    suppress: Ids = None,
    ids: Ids = None,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | Tensor = 0,
    sequence: int | Tensor = 0,
    position: int | Tensor | None = None,
    step: int | Tensor = 0,
    check: bool = True,
) -> RowStats:
    """Statistics of softmax(logits), each needed row read once.

    The mask token has its share of the softmax, as in published decoders, but is never chosen.

    Args:
        logits: (..., V) float32, bfloat16 or float16, any strides (copied where the vocabulary is not
            contiguous).
        rows: (N,) int64 flat indices into the leading dimensions; only these rows are read.
        mask_id: the mask token; None: there is none.
        suppress: ids (n,) that are left out of the softmax.
        ids: (K,) int64, or (..., K) for each row its own: return the logits of these too, whether they are
            admissible or not. On CUDA an id out of bounds has NaN.
        temperature: above 0, also draw `sample` by Gumbel-max from softmax(logits / temperature). Below 1e-5
            it counts as 0, above 2^100 (1.3e30) as 2^100.
        top_p, top_k: draw from the most probable ids alone, ties to the lowest id: from at most `top_k` ids,
            and from ids before which at most `top_p` of the probability comes (nucleus sampling, arXiv
            1904.09751). None, 1.0 and 0 leave nothing out. The noise of an id stays the same. They are not
            read where the temperature is 0 (or below 1e-5).
        seed, sequence, position, step: the Philox key, one value or one per row: a sample depends on
            its key alone. `position` defaults to the row's place in the output.
        check: False reports no bad rows: their ids are -1, and their numbers NaN. But a row without NaN that
            leaves no token to choose has top1 and top2 -inf and right values of lse, entropy, max_logit and
            log_sum (-inf, 0, -inf and 0 if every logit is -inf), since it may be a part of a vocabulary, see
            `merge_row_stats`.

    Returns:
        RowStats with fields shaped like the leading dimensions, or (N,) with `rows`. The statistics do
        not depend on temperature, top_p or top_k, except that `confidence` is the sampled token's. A logit
        of +inf counts as the largest float32: k of them share the probability evenly.

    Raises:
        ValueError: naming the argument that does not fit; and on the CPU, for a row that holds NaN or leaves
            no token to choose. On CUDA, see `check_errors`.
        TypeError: naming an argument that should be a tensor and is not.
    """
    stats, error = read_rows(
        logits,
        rows=rows,
        mask_id=mask_id,
        suppress=suppress,
        ids=ids,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        sequence=sequence,
        position=position,
        step=step,
    )
    if check:
        report(error, named_row)
    return stats


def read_rows(
    logits: Tensor,
    *,
    rows: Tensor | None = None,
    mask_id: int | None = None,
    suppress: Ids = None,
    ids: Ids = None,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | Tensor = 0,
    sequence: int | Tensor = 0,
    position: int | Tensor | None = None,
    step: int | Tensor = 0,
) -> tuple[RowStats, Tensor]:
    """`row_stats`, and the error of each row (rows,) int64, see `errors.explain`, which the caller
    reports."""
    check_logits(logits)
    shape, vocab = logits.shape[:-1], logits.shape[-1]
    flat = rows_view(logits)
    count = flat.shape[:-1].numel()
    if rows is not None:
        check_index("rows", rows, logits)
        shape, count = rows.shape, rows.numel()
    temperature, top_p, top_k = check_sampling(temperature, top_p, top_k)
    keys = None
    if temperature > 0:
        where = torch.arange(count, device=logits.device) if position is None else position
        keys = keys_of(logits, count, seed=seed, sequence=sequence, position=where, step=step)
    gather_ids = None if ids is None else _ids(ids, shape, vocab, logits)
    tokens, fields, error, gathered = _row_stats(
        flat,
        rows,
        mask_id_of(mask_id, vocab),
        suppressed(suppress, logits),
        gather_ids,
        temperature,
        top_p,
        top_k,
        keys,
        streams.counters_for(logits, count),
    )
    stats = as_stats(tokens, fields, shape)
    return stats if gather_ids is None else stats._replace(
        logits=gathered.view(*shape, gathered.shape[-1])
    ), error


def merge_row_stats(shards: Sequence[RowStats], offsets: Sequence[int]) -> RowStats:
    """Merge the statistics of parts of a vocabulary into those of whole rows.

    With a head that is split over devices, each sends a few numbers a row instead of logits:

        stats = row_stats(part, mask_id=..., suppress=..., check=False)   # ids of the part, from 0
        whole = merge_row_stats(gathered, offsets)

    Args:
        shards: the `row_stats` of each part of the same rows, with `check=False`, at temperature 0. A part
            may hold the mask token alone, and so have no id to choose.
        offsets: the id, in the whole vocabulary, of each part's first id; in any order.

    Returns:
        RowStats of the whole rows, within 2e-6 + 1e-6 |x| of float64, like `row_stats`; `sample` is `token`,
        and `logits` None. Computed in float64 by torch, on the device of the parts, without synchronisation.

    Raises:
        ValueError: naming the argument that does not fit; and on the CPU a row that holds NaN or leaves no
            token to choose. On CUDA, see `check_errors`.
    """
    if not shards or len(shards) != len(offsets):
        raise ValueError(
            f"offsets: expected one for each of {len(shards)} shards, at least one, got {len(offsets)}"
        )
    for at, shard in enumerate(shards):
        if shard.max_logit is None or shard.log_sum is None:
            raise ValueError(f"shards: expected max_logit and log_sum, as of row_stats, none at {at}")
        if shard.token.shape != shards[0].token.shape:
            raise ValueError(
                f"shards: expected the same rows, got {tuple(shards[0].token.shape)} at 0 and "
                f"{tuple(shard.token.shape)} at {at}"
            )
    first = [whole("offsets", offset, 0) for offset in offsets]

    token = [
        torch.where(s.token < 0, -1, s.token + first_id) for s, first_id in zip(shards, first, strict=True)
    ]
    fields = {"top1", "top2", "entropy", "max_logit", "log_sum"}
    stacked = {name: torch.stack([getattr(s, name) for s in shards], -1) for name in fields}
    stats, error = merge_parts(shards[0]._replace(token=torch.stack(token, -1), **stacked))
    report(error, named_row)
    return stats


def merge_parts(parts: RowStats, among: Tensor | None = None) -> tuple[RowStats, Tensor]:
    """The statistics of rows (...) whose parts have the statistics `parts` (..., P), as `check=False` leaves
    them, and the error of each row (rows,) int64, see `errors.explain`. In float64.

    among: (..., P) bool: the parts that rows consist of; None: all.
    """

    def only(values: Tensor | None, blank: float) -> Tensor:  # +inf as the largest float32
        assert values is not None
        values = values if among is None else torch.where(among, values, blank)
        return values.double().clamp(max=LARGEST)

    top1, top2, largest = (only(x, -math.inf) for x in (parts.top1, parts.top2, parts.max_logit))
    top = largest.amax(-1)  # NaN if any is
    nothing = top == -math.inf
    anchor = torch.where(nothing, 0.0, top)
    log_sums = largest - anchor[..., None] + only(parts.log_sum, 0.0)  # relative to the row's largest logit
    log_sum = log_sums.logsumexp(-1)
    share = log_sums - log_sum[..., None]  # log of the part's share of the probability
    # For a part without a finite logit: -inf, where the line above may have made NaN.
    share = torch.where(largest == -math.inf, -math.inf, share)
    entropy = (share.exp() * torch.where(share > -math.inf, only(parts.entropy, 0.0) - share, 0.0)).sum(-1)
    best = top1.amax(-1)
    held = (top1 == best[..., None]) & (top1 > -math.inf)
    chosen = torch.where(held, parts.token, NO_ERROR).amin(-1)  # of a tie the lowest id
    second = torch.where(held & (parts.token == chosen[..., None]), top2, top1).amax(-1)
    logprob = best - anchor - log_sum
    p1, p2 = logprob.exp(), (second - anchor - log_sum).exp()
    error = torch.where(top.isnan(), 1, torch.where(held.any(-1), NO_ERROR, 2)).flatten()
    row = torch.arange(error.numel(), device=error.device)

    def infinite(values: Tensor) -> Tensor:
        return torch.where(values >= LARGEST, math.inf, values).float()

    chosen = torch.where(held.any(-1), chosen, -1)
    lse = torch.where(nothing, -math.inf, torch.where(top >= LARGEST, math.inf, top + log_sum))
    stats = RowStats(
        chosen, infinite(best), infinite(second), lse.float(), p1.float(), (p1 - p2).float(), entropy.float(),
        chosen.clone(), logprob.float(), infinite(top), log_sum.float(),
    )  # fmt: skip
    return stats, torch.where(error == NO_ERROR, error, 4 * row + error)


def as_stats(tokens: Tensor, fields: Tensor, shape: Sequence[int]) -> RowStats:
    """RowStats of this shape, from the op's ids (2, N) int64 and numbers (9, N) float32."""
    # Reshaped before they are separated: every view costs as much as a small kernel's launch.
    token, sample = tokens.view(len(tokens), *shape).unbind(0)
    top1, top2, lse, confidence, margin, entropy, *rest = fields.view(len(fields), *shape).unbind(0)
    return RowStats(token, top1, top2, lse, confidence, margin, entropy, sample, *rest)


def _ids(ids: Tensor | Sequence[int], rows: Sequence[int], vocab: int, logits: Tensor) -> Tensor:
    """(K,) int64, or (N, K) for N rows. Lists are checked here, tensors on the CPU by the op."""
    if not isinstance(ids, Iterable):  # nor a tensor, which is one
        raise ValueError(f"ids: expected int64 (K,) or {(*rows, 'K')}, got {shown(ids)}".replace("'", ""))
    if not isinstance(ids, Tensor):
        ids = torch.tensor([whole("ids", i, 0, vocab - 1) for i in ids], device=logits.device).long()
    if ids.dtype != torch.int64 or ids.ndim < 1 or (ids.ndim > 1 and tuple(ids.shape[:-1]) != tuple(rows)):
        raise ValueError(f"ids: expected int64 (K,) or {(*rows, 'K')}, got {described(ids)}".replace("'", ""))
    if ids.device != logits.device:
        raise ValueError(f"ids: expected on {logits.device} as the logits, got {ids.device}")
    return ids if ids.ndim == 1 else ids.reshape(math.prod(rows), ids.shape[-1])


def row_outputs(like: Tensor, count: Any, errors: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Empty outputs of an op that reads `count` rows: ids (2, count) int64, numbers (9, count) float32, and
    errors (errors,) int64."""
    return (
        like.new_empty((2, count), dtype=torch.int64),
        like.new_empty((_ROW_FIELDS, count), dtype=torch.float32),
        like.new_empty((errors,), dtype=torch.int64),
    )


@register_fake("row_stats")
def _(logits: Tensor, rows: Tensor | None, ids: Tensor | None) -> tuple[Tensor, ...]:
    count = logits.shape[:-1].numel() if rows is None else rows.shape[0]
    gathered = logits.new_empty((count, 0 if ids is None else ids.shape[-1]), dtype=torch.float32)
    return *row_outputs(logits, count, count), gathered
