"""Attention of a few new tokens to a cache of many; the cache is that of `kv_write`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _C  # noqa: F401  (registers the ops)
from .inputs import check_caches, check_heads, expect, within


def block_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    pages: Tensor | None = None,
    begin: Tensor | None = None,
    end: Tensor | None = None,
    scale: float | None = None,
    longest_query: int | None = None,
    longest_length: int | None = None,
) -> Tensor:
    """Attention of each segment's queries to its own sequence's slots: all of them, in both directions.

    A segment is some query rows of one sequence, and how many of its slots they see. Block-causal attention
    is a segment per block, each seeing the slots up to its own block's end, all in one call. No mask tensor;
    what a segment yields does not depend on the others. No gradient: a backward pass raises.

    Args:
        q: (S, Q, H, D), a segment of Q rows per sequence; or (N, H, D) with `begin` and `end`. After the
            rotary embedding; float32, bfloat16 or float16.
        k_cache, v_cache: (pages, Hkv, page_size, D), Hkv dividing H: query head h uses head h // (H / Hkv).
        lengths: (S,) int64, the slots [0, length) that the segment sees. The others may hold anything.
        pages: (S, P) int64, the segment's pages in order; None: page s for segment s.
        begin, end: (S,) int64, rows of q; rows in no segment come out zero.
        scale: of the scores, default D ** -0.5.
        longest_query, longest_length: at least the largest end - begin and length, numbers that a CUDA
            launch is shaped by without waiting for the device. Default: all rows, all slots.

    Returns:
        As q: softmax(scale q K^T) V, accumulated in float32; zero where a segment sees no slot.

    Raises:
        ValueError: naming the argument that does not fit. Indices are looked at on the CPU alone.
    """
    for name, given in (("q", q), ("lengths", lengths)):
        if not isinstance(given, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(given).__name__}")
    shape = q.shape
    if q.ndim == 4:
        if begin is not None or end is not None:
            raise ValueError("begin: belongs to q of (N, H, D)")
        begin = torch.arange(0, shape[0] * shape[1], max(1, shape[1]), device=q.device)[: shape[0]]
        begin = begin if shape[1] else begin.new_zeros(shape[0])
        end = begin + shape[1]
        longest_query = shape[1]
        q = q.flatten(0, 1)
    check_heads("q", q, 3)
    check_heads("k_cache", k_cache, 4, like=q)
    check_heads("v_cache", v_cache, 4, like=q)
    check_caches(q, k_cache, v_cache)
    if begin is None or end is None:
        raise ValueError("begin: needed, and end, where q is (N, H, D)")
    if pages is None:
        pages = torch.arange(len(lengths) if lengths.ndim == 1 else 0, device=q.device)[:, None]
    if not isinstance(pages, Tensor) or pages.ndim != 2:
        got = tuple(pages.shape) if isinstance(pages, Tensor) else type(pages).__name__
        raise ValueError(f"pages: expected int64 (S, P), got {got}")
    for name, given in (("lengths", lengths), ("begin", begin), ("end", end)):
        expect(name, given, (len(pages),), torch.int64)
    expect("pages", pages, tuple(pages.shape), torch.int64)
    capacity = pages.shape[1] * k_cache.shape[2]
    scale = max(1, q.shape[2]) ** -0.5 if scale is None else scale
    if q.dtype == torch.float64:
        from .. import reference

        within("lengths", lengths, 0, capacity + 1)
        within("begin", begin, 0, len(q) + 1)
        within("end", end, 0, len(q) + 1)
        at = {"pages": pages, "begin": begin, "end": end}
        return reference.block_attention(q, k_cache, v_cache, lengths, **at, scale=scale).view(shape)
    out = torch.ops.dparallel.block_attention(
        q,
        k_cache,
        v_cache,
        begin,
        end,
        lengths,
        pages,
        len(q) if longest_query is None else longest_query,
        capacity if longest_length is None else longest_length,
        scale,
    )
    return out.view(shape)


@torch.library.register_fake("dparallel::block_attention")
def _(  # type: ignore[no-untyped-def]
    q, k_cache, v_cache, begin, end, lengths, pages, longest_query, longest_length, scale
):
    return q.new_empty(q.shape)
