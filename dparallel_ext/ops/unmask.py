"""One unmasking step: statistics, selection and commit in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _C, policies  # noqa: F401  (importing _C registers the ops)
from ..types import UnmaskOutput
from . import streams
from .errors import Cell, report
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
from .row_stats import as_stats, row_outputs


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

    Only masked positions of active windows are read: columns [start, end) of a sequence each. W windows are
    one for each sequence, or those that `lane` names, any number of a sequence in any order. Each commits on
    its own, by its own policy row.

    Args:
        tokens: (B, L) int64, any strides (a view such as `x[:, s:e]` will do); changed in place.
        logits: (B, L, V) float32, bfloat16 or float16; or (N, V) with `positions`.
        mask_id: the token that marks what is to be filled; it is never committed.
        lane: (W,) int64: the sequence of each window; None: window w is of sequence w, and W = B. Windows of
            a sequence may not overlap.
        start, end: columns, a number or (W,) int64; `end` None is L.
        selector, threshold, min_commit, max_commit, score: the policy, see `policies.make`; each one
            value or one per window. A window with a `min_commit` of 0 may commit nothing.
        policy: (W, 5) float32 rows in full, instead of the above.
        positions: (N,) int64 ascending flat positions b * L + l that the rows of `logits` stand for, so
            that an LM head may be applied to the needed rows alone. It must list every masked
            position of the windows; others that it lists are not read.
        suppress: ids left out altogether.
        temperature: above 0, commit Gumbel-max samples of softmax(logits / temperature). Below 1e-5 it is 0,
            which commits the argmax, and above 2^100 (1.3e30) that.
        top_p, top_k: what may be sampled, see `row_stats`; the rule sees the statistics of all ids.
        seed, sequence, step: with the position, the sample's key; a number or (W,) int64. `sequence`
            defaults to `lane`, or 0..B-1.
        position_offset: added to the column to give the position, where `tokens` is a view.
        check: False leaves a bad row to the caller, who finds it in `error`, on the CPU too.

    Returns:
        UnmaskOutput: tensors on the device of the logits, without synchronisation.

    Raises:
        ValueError: naming the argument that does not fit; and on the CPU a row that holds NaN or
            leaves no token to choose (also since there is none but the mask token, or all are
            suppressed), by sequence and position, with every token left as it was; and windows that
            overlap. On CUDA such a row commits nothing in its window and raises a flag, see `check_errors`; a
            position of several windows belongs to the first of them, and a lane out of bounds has none.
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
    temperature, top_p, top_k = check_sampling(temperature, top_p, top_k)
    keys = None
    if temperature > 0:
        if sequence is None:
            sequence = torch.arange(batch, device=logits.device) if lane is None else lane
        keys = keys_of(logits, windows, seed=seed, sequence=sequence, step=step)
    committed, remaining, done, row_tokens, fields, error = torch.ops.dparallel.unmask_(
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
        streams.counters_for(logits, windows + 2 + logits.shape[:-1].numel()),
    )
    if check:
        report(error, Cell(length, position_offset))
    return UnmaskOutput(committed, remaining, done, as_stats(row_tokens, fields, stats_shape), error)


@torch.library.register_fake("dparallel::unmask_")
def _(  # type: ignore[no-untyped-def]
    tokens,
    logits,
    positions,
    lane,
    start,
    end,
    policy,
    mask_id,
    suppress,
    temperature,
    top_p,
    top_k,
    keys,
    position_offset,
    counters,
):
    windows = start.shape[0]
    return (
        logits.new_empty((windows,), dtype=torch.int64),
        logits.new_empty((windows,), dtype=torch.int64),
        logits.new_empty((), dtype=torch.bool),
        *row_outputs(logits, logits.shape[:-1].numel(), windows),
    )
