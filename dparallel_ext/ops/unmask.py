"""One unmasking step: statistics, selection and commit in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import policies
from ..arguments import whole
from ..types import UnmaskOutput
from . import streams
from .errors import Cell, report
from .fake import register_fake
from .inputs import (
    Ids,
    check_index,
    check_logits,
    check_sampling,
    check_tokens,
    keys_of,
    mask_id_of,
    rows_view,
    suppressed,
    windows_of,
)
from .kernel import kernel
from .row_stats import as_stats, row_outputs

_unmask_ = kernel("unmask_")


def unmask_(
    tokens: Tensor,
    logits: Tensor,
    *,
    mask_id: int,
    lane: Tensor | None = None,
    start: int | Tensor = 0,
    end: int | Tensor | None = None,
    selector: policies.Name = "entropy",
    threshold: policies.Number = 0.5,
    policy: Tensor | None = None,
    min_commit: policies.Number = 1,
    max_commit: policies.Number | None = None,
    score: policies.Name | None = None,
    positions: Tensor | None = None,
    suppress: Ids = None,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | Tensor = 0,
    sequence: int | Tensor | None = None,
    step: int | Tensor = 0,
    position_offset: int = 0,
    check: bool = True,
) -> UnmaskOutput:
    """One unmasking step, in place: statistics, selection and commit in one call.

    A window is columns [start, end) of a sequence; only its masked positions are read. There are W windows:
    one for each sequence, or those that `lane` names, any number for a sequence, in any order. Each commits
    by its own policy row, independently of the others.

    Args:
        tokens: (B, L) int64, any strides (a view such as `x[:, s:e]` will do); changed in place, in memory of
            their own.
        logits: (B, L, V) float32, bfloat16 or float16; or (N, V) with `positions`.
        mask_id: the mask token; it is never committed.
        lane: (W,) int64: the sequence of each window; None: window w is of sequence w, and W = B. Windows of
            a sequence may not overlap.
        start, end: columns [start, end) of each window, a number or (W,) int64; `end` None is L.
        selector, threshold, min_commit, max_commit, score: the policy, see `policies.make`; each one
            value or one per window. A window with a `min_commit` of 0 may commit nothing.
        policy: (W, 5) float32 rows in full, instead of the above.
        positions: (N,) int64 ascending flat positions b * L + l of the rows of `logits`, so that an LM head
            needs to be applied to these rows alone. It must list every masked position of the windows;
            rows of other positions are not read.
        suppress: ids (n,) that are left out of the softmax.
        temperature: above 0, commit Gumbel-max samples of softmax(logits / temperature). Below 1e-5 it counts
            as 0, which commits the argmax, and above 2^100 (1.3e30) as 2^100.
        top_p, top_k: limits of sampling, see `row_stats`; the rule sees the statistics of all ids.
        seed, sequence, step: with the position, the sample's key; a number or (W,) int64. `sequence`
            defaults to `lane`, or 0..B-1.
        position_offset: added to the column to give the position, if `tokens` is a view.
        check: False reports a bad row in `error` alone, on the CPU too.

    Returns:
        UnmaskOutput: tensors on the device of the logits, without synchronisation.

    Raises:
        ValueError: naming the argument that does not fit; and on the CPU, for windows that overlap, and,
            naming sequence and position, for a row that holds NaN or leaves no token to choose (such as one
            with all ids suppressed); no token is changed then. On CUDA a bad row's window commits nothing and
            raises a flag, see `check_errors`; a position of several windows belongs to the first of them, and
            a window whose lane is out of bounds has no positions.
        TypeError: naming an argument that should be a tensor and is not.
    """
    check_logits(logits)
    check_tokens(tokens)
    if tokens.device != logits.device:
        raise ValueError(f"tokens: expected on {logits.device} as the logits, got {tokens.device}")
    batch, length = tokens.shape
    if positions is None:
        if logits.shape[:-1] != tokens.shape:
            raise ValueError(
                f"logits: expected ({batch}, {length}, V) matching tokens, got {tuple(logits.shape)}"
            )
        stats_shape = tokens.shape
    else:
        check_index("positions", positions, logits)
        if logits.ndim != 2 or len(logits) != len(positions):
            raise ValueError(
                f"logits: expected ({len(positions)}, V), a row for each of positions, "
                f"got {tuple(logits.shape)}"
            )
        stats_shape = positions.shape
    start, end = windows_of(tokens, lane, start, end)
    windows = len(start)
    if policy is None:
        policy = policies.make(
            selector,
            threshold,
            min_commit=min_commit,
            max_commit=max_commit,
            score=score,
            batch=windows,
        )
    else:
        policies.check(policy, windows)
    if type(position_offset) is not int or not -(2**62) <= position_offset < 2**62:
        position_offset = whole("position_offset", position_offset, -(2**62), 2**62 - 1)
    temperature, top_p, top_k = check_sampling(temperature, top_p, top_k)
    keys = None
    if temperature > 0:
        if sequence is None:
            sequence = torch.arange(batch, device=logits.device) if lane is None else lane
        keys = keys_of(logits, windows, seed=seed, sequence=sequence, step=step)
    committed, remaining, done, row_tokens, fields, error = _unmask_(
        tokens,
        logits if positions is None else rows_view(logits),
        positions,
        lane,
        start,
        end,
        policy.to(logits.device),
        mask_id_of(mask_id, None),
        suppressed(suppress, logits),
        temperature,
        top_p,
        top_k,
        keys,
        position_offset,
        streams.counters_for(logits, windows + 3 + logits.shape[:-1].numel()),
    )
    if check:
        report(error, Cell(length, position_offset))
    return UnmaskOutput(committed, remaining, done, as_stats(row_tokens, fields, stats_shape), error)


@register_fake("unmask_")
def _(logits: Tensor, start: Tensor) -> tuple[Tensor, ...]:
    windows = start.shape[0]
    return (
        logits.new_empty((windows,), dtype=torch.int64),
        logits.new_empty((windows,), dtype=torch.int64),
        logits.new_empty((), dtype=torch.bool),
        *row_outputs(logits, logits.shape[:-1].numel(), windows),
    )
