"""Attention of a few new tokens to a paged cache of many, which `kv_write` fills."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ..arguments import check_tensor, described, number
from .fake import register_fake
from .inputs import check_caches, check_heads, expect, on_device_of_q, within
from .kernel import kernel

_block_attention = kernel("block_attention")


def block_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    kv_lens: Tensor,
    *,
    block_table: Tensor | None = None,
    q_start: Tensor | None = None,
    q_end: Tensor | None = None,
    causal: bool = False,
    ancestors: Tensor | None = None,
    scale: float | None = None,
    max_q_len: int | None = None,
    max_kv_len: int | None = None,
) -> Tensor:
    """Attention of each segment's queries to its own sequence's slots: by default all, in both directions.

    A segment is some query rows of one sequence, and the number of its slots that they see. Block-causal
    attention is one call with a segment per block, each seeing the slots up to its block's end. There is no
    mask tensor, and a row's result depends only on the slots that it sees. No gradient: a backward pass
    raises.

    With `causal` or `ancestors` a segment's Q rows are the last of its slots: row i is slot base + i, base =
    kv_len - Q, and every row sees the slots [0, base).

    Args:
        q: (S, Q, H, D), a segment of Q rows per sequence; or (N, H, D) with `q_start` and `q_end`. After the
            rotary embedding; float32, bfloat16 or float16.
        k_cache, v_cache: (pages, Hkv, page_size, D), Hkv dividing H: query head h uses head h // (H / Hkv).
        kv_lens: (S,) int64, the segment sees slots [0, kv_len). Other slots may hold anything.
        block_table: (S, P) int64, the segment's pages in order; None: page s for segment s.
        q_start, q_end: (S,) int64, the segment's rows of q, which no other has (the CPU refuses it); the
            result of rows in no segment is zero.
        causal: row i of a segment sees the slots [0, base + i + 1).
        ancestors: (N, W) int64, W >= Q / 64, not with `causal`: row r sees slot base + b if bit b % 64 of its
            word b // 64 is set, its own slot included; bits b from Q on say nothing. For a tree of drafted
            tokens (arXiv 2401.10774).
        scale: factor of the scores, default D ** -0.5.
        max_q_len, max_kv_len: upper bounds of q_end - q_start and kv_len, which size a CUDA launch without
            waiting for the device. Default: all rows, all slots.

    Returns:
        softmax(scale q K^T) V, shape and dtype of q, accumulated in float32; zero where a segment sees no
        slot.

    Raises:
        ValueError: naming the argument that does not fit. Indices are checked on the CPU alone.
        TypeError: naming an argument that should be a tensor and is not.
    """
    check_tensor("q", q)
    check_tensor("kv_lens", kv_lens)
    shape = q.shape
    if q.ndim == 4:
        if q_start is not None or q_end is not None:
            raise ValueError(f"q_start, q_end: belong to q of (N, H, D), got q of {tuple(shape)}")
        q_start = torch.arange(0, shape[0] * shape[1], max(1, shape[1]), device=q.device)[: shape[0]]
        q_start = q_start if shape[1] else q_start.new_zeros(shape[0])
        q_end = q_start + shape[1]
        max_q_len = shape[1]
        q = q.flatten(0, 1)
    check_heads("q", q, 3)
    check_heads("k_cache", k_cache, 4, like=q)
    check_heads("v_cache", v_cache, 4, like=q)
    check_caches(q.shape, k_cache, v_cache)
    if q_start is None or q_end is None:
        missing = "q_start" if q_start is None else "q_end"
        raise ValueError(f"{missing}: expected int64 (S,) with q of (N, H, D), got None")
    if block_table is None:
        block_table = torch.arange(len(kv_lens) if kv_lens.ndim == 1 else 0, device=q.device)[:, None]
    check_segments(q.shape[0], kv_lens, block_table, q_start, q_end, causal, ancestors)
    capacity = block_table.shape[1] * k_cache.shape[2]
    if scale is not None and (type(scale) is not float or not -math.inf < scale < math.inf):
        scale = number("scale", scale, -math.inf)
    out = attend_checked(
        q,
        k_cache,
        v_cache,
        kv_lens,
        block_table=block_table,
        q_start=q_start,
        q_end=q_end,
        causal=causal,
        ancestors=ancestors,
        scale=scale,
        max_q_len=q.shape[0] if max_q_len is None else max_q_len,
        max_kv_len=capacity if max_kv_len is None else max_kv_len,
    )
    return out if len(shape) == 3 else out.view(shape)


def check_segments(
    count: int,
    kv_lens: Tensor,
    block_table: Tensor,
    q_start: Tensor,
    q_end: Tensor,
    causal: bool,
    ancestors: Tensor | None,
) -> None:
    """Raise unless they are segments of q (count, H, D)."""
    if not isinstance(block_table, Tensor) or block_table.ndim != 2:
        raise ValueError(f"block_table: expected int64 (S, P), got {described(block_table)}")
    for name, tensor in (("kv_lens", kv_lens), ("q_start", q_start), ("q_end", q_end)):
        expect(name, tensor, (block_table.shape[0],), torch.int64)
    expect("block_table", block_table, block_table.shape, torch.int64)
    if ancestors is not None:
        if causal:
            raise ValueError("ancestors: expected instead of causal, got both")
        if not isinstance(ancestors, Tensor) or ancestors.ndim != 2:
            raise ValueError(f"ancestors: expected int64 ({count}, W), got {described(ancestors)}")
        expect("ancestors", ancestors, (count, ancestors.shape[1]), torch.int64)


def attend_checked(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    kv_lens: Tensor,
    *,
    block_table: Tensor,
    q_start: Tensor,
    q_end: Tensor,
    causal: bool,
    ancestors: Tensor | None,
    scale: float | None = None,
    max_q_len: int,
    max_kv_len: int,
) -> Tensor:
    """`block_attention` of q (N, H, D), of arguments that fit each other; only indices are still checked, on
    the CPU."""
    scale = max(1, q.shape[2]) ** -0.5 if scale is None else scale
    if q.dtype == torch.float64:
        segments = {"block_table": block_table, "q_start": q_start, "q_end": q_end}
        on_device_of_q(q, **segments, kv_lens=kv_lens, ancestors=ancestors)
        _check_indices(len(q), k_cache, q_start, q_end, kv_lens, block_table, causal, ancestors)
        return reference.block_attention(
            q, k_cache, v_cache, kv_lens, **segments, causal=causal, ancestors=ancestors, scale=scale
        )
    out: Tensor = _block_attention(
        q,
        k_cache,
        v_cache,
        q_start,
        q_end,
        kv_lens,
        block_table,
        max_q_len,
        max_kv_len,
        scale,
        causal,
        ancestors,
    )
    return out


def _check_indices(
    count: int,
    k_cache: Tensor,
    q_start: Tensor,
    q_end: Tensor,
    kv_lens: Tensor,
    block_table: Tensor,
    causal: bool,
    ancestors: Tensor | None,
) -> None:
    """Raise ValueError for indices out of bounds, or rows of q (count, H, D) in two segments. For float64;
    the kernels check theirs."""
    page_size = k_cache.shape[2]
    rows, capacity = q_end - q_start, block_table.shape[1] * page_size
    within("kv_lens", kv_lens, 0, capacity + 1)
    within("q_start", q_start, 0, count + 1)
    within("q_end", q_end, 0, count + 1)
    if causal or ancestors is not None:
        within("kv_lens", kv_lens - rows, 0, capacity + 1)
    if ancestors is not None:
        within("ancestors", rows, 0, 64 * ancestors.shape[1] + 1)
    segments = list(zip(q_start.tolist(), q_end.tolist(), strict=True))
    _check_apart(segments)
    for (start, end), length, table in zip(segments, kv_lens.tolist(), block_table, strict=True):
        if start < end:
            within("block_table", table[: -(-length // page_size)], 0, len(k_cache))


def _check_apart(segments: Sequence[tuple[int, int]]) -> None:
    """Raise ValueError for rows [start, end) of a segment that end before they start, or are another's
    too."""
    for at, (start, end) in enumerate(segments):
        if start > end:
            raise ValueError(f"q_start: expected no larger than q_end, got {start} above {end} at {at}")
    ordered = sorted((start, end) for start, end in segments if start < end)
    for (first, end), (start, last) in itertools.pairwise(ordered):
        if start < end:
            raise ValueError(
                f"q_start: expected segments that do not overlap, got [{first}, {end}) and [{start}, {last})"
            )


@register_fake("block_attention")
def _(q: Tensor) -> Tensor:
    return q.new_empty(q.shape)
