"""Attention of a few new tokens to a cache of many: `kv_write` and `block_attention`.

`varlen_attention` is for new tokens that see each other alone, of whole sequences.

A cache is pages of slots, each slot the key and value of one position; a sequence has a list of pages. A
contiguous cache is one page per sequence. Keys are kept after the rotary embedding, and a block that is
computed again overwrites its slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _C  # noqa: F401  (registers the ops)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of the kernels; float64 is computed by the twins in `reference`."""


def rope_table(
    length: int, head_dim: int, theta: float = 10000.0, *, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin (length, head_dim / 2) float32 of position / theta^(2 i / head_dim) (arXiv 2104.09864)."""
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim: expected an even number >= 2, got {head_dim}")
    even = torch.arange(0, head_dim, 2, device=device).float()
    angle = torch.outer(torch.arange(length, device=device).float(), 1.0 / theta ** (even / head_dim))
    return angle.cos(), angle.sin()


def kv_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    positions: Tensor,
    slots: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
) -> None:
    """Rotate queries in place, rotate keys and put them and the values into their slots, in one pass.

    Strides may be any; rows of q, k and v (H, D), and the last dimension of a cache, that are not contiguous
    are copied, and what is changed in place may not overlap itself. No gradient.

    Args:
        q: (N, H, D) float32, bfloat16 or float16; changed in place.
        k, v: (N, Hkv, D), likewise; read.
        k_cache, v_cache: (pages, Hkv, page_size, D); changed in place.
        positions: (N,) int64, of the rotary embedding: rows of cos and sin.
        slots: (N,) int64, page * page_size + offset, no two alike; negative: the row is written nowhere.
        cos, sin: (positions, D / 2) float32, see `rope_table`.
        interleaved: rotate the pairs (2 i, 2 i + 1), as GPT-J, and not (i, i + D / 2), as LLaMA.

    Raises:
        ValueError: naming the argument that does not fit, or that requires a gradient. Indices are looked at
            on the CPU alone.
    """
    _check("q", q, 3)
    for name, given in (("k", k), ("v", v), ("k_cache", k_cache), ("v_cache", v_cache)):
        _check(name, given, 4 if name.endswith("cache") else 3, like=q)
    _check_caches(q, k_cache, v_cache)
    count, dim = len(q), q.shape[2]
    for name, given in (("k", k), ("v", v)):
        _expect(name, given, (count, k_cache.shape[1], dim))
    for name, given in (("positions", positions), ("slots", slots)):
        _expect(name, given, (count,), torch.int64)
    if dim % 2:
        raise ValueError(f"q: expected an even head_dim, got {dim}")
    for name, given in (("cos", cos), ("sin", sin)):
        _expect(name, given, (len(cos), dim // 2), torch.float32)
    if q.dtype == torch.float64:
        from . import reference

        _within("positions", positions, 0, len(cos))
        _within("slots", slots, None, len(k_cache) * k_cache.shape[2])
        at = {"positions": positions, "slots": slots, "cos": cos, "sin": sin}
        return reference.kv_write(q, k, v, k_cache, v_cache, **at, interleaved=interleaved)
    torch.ops.dparallel.kv_write(q, k, v, k_cache, v_cache, positions, slots, cos, sin, interleaved)


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
    _check("q", q, 3)
    _check("k_cache", k_cache, 4, like=q)
    _check("v_cache", v_cache, 4, like=q)
    _check_caches(q, k_cache, v_cache)
    if begin is None or end is None:
        raise ValueError("begin: needed, and end, where q is (N, H, D)")
    if pages is None:
        pages = torch.arange(len(lengths) if lengths.ndim == 1 else 0, device=q.device)[:, None]
    if not isinstance(pages, Tensor) or pages.ndim != 2:
        got = tuple(pages.shape) if isinstance(pages, Tensor) else type(pages).__name__
        raise ValueError(f"pages: expected int64 (S, P), got {got}")
    for name, given in (("lengths", lengths), ("begin", begin), ("end", end)):
        _expect(name, given, (len(pages),), torch.int64)
    _expect("pages", pages, tuple(pages.shape), torch.int64)
    capacity = pages.shape[1] * k_cache.shape[2]
    scale = max(1, q.shape[2]) ** -0.5 if scale is None else scale
    if q.dtype == torch.float64:
        from . import reference

        _within("lengths", lengths, 0, capacity + 1)
        _within("begin", begin, 0, len(q) + 1)
        _within("end", end, 0, len(q) + 1)
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


def has_varlen(like: Tensor) -> bool:
    """Whether `varlen_attention` computes heads like those of `like` (..., D)."""
    return (
        like.is_cuda
        and like.dtype in (torch.bfloat16, torch.float16)
        and like.shape[-1] % 8 == 0
        and like.shape[-1] <= 256
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(like.device) >= (8, 0)
    )


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, seen: Tensor, *, longest: int
) -> Tensor:
    """Attention of packed sequences, each to itself, in both directions: torch's FlashAttention.

    Each sequence's result has the same bits as alone, in every run: no block of threads computes rows of two
    sequences, the head size alone decides the tiles, and the keys are never split (torch does that for single
    queries and for pages only). The bounds stay on the device, so a recorded pass serves other lengths.
    `scaled_dot_product_attention`, by cuDNN, takes half the time on Hopper. But the host must know each
    length, so every length would need a recording of its own, and cuDNN plans anew, for tens of milliseconds,
    whenever it meets a length for the first time.

    Args:
        q: (N, H, D) after the rotary embedding; k, v: (N, Hkv, D), likewise. Rows of any stride.
        bounds: (S + 1,) int32, ascending from 0 to N: sequence s is rows [bounds[s], bounds[s + 1]).
        seen: (S,) int32, how many of its rows, the first ones, it sees; where none, it comes out zero.
        longest: at least the rows of the longest one, which shapes the launch.

    Returns:
        As q.
    """
    out: Tensor = torch.ops.aten._flash_attention_forward(
        q, k, v, bounds, bounds, longest, longest, 0.0, False, False, seqused_k=seen
    )[0]
    return out


def _check(name: str, given: Tensor, ndim: int, like: Tensor | None = None) -> None:
    if not isinstance(given, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(given).__name__}")
    if given.dtype not in (*DTYPES, torch.float64) or (like is not None and given.dtype != like.dtype):
        wanted = "float32, bfloat16 or float16" if like is None else f"{like.dtype} as q"
        raise ValueError(f"{name}: expected {wanted}, got {given.dtype}")
    if like is not None and given.device != like.device:
        raise ValueError(f"{name}: expected on {like.device} as q, got {given.device}")
    if given.ndim != ndim:
        raise ValueError(f"{name}: expected {ndim} dimensions, got {tuple(given.shape)}")


def _check_caches(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    if k_cache.shape != v_cache.shape:
        raise ValueError(f"v_cache: expected {tuple(k_cache.shape)} as k_cache, got {tuple(v_cache.shape)}")
    heads, dim = q.shape[1:]
    if k_cache.shape[3] != dim or k_cache.shape[1] < 1 or heads % k_cache.shape[1] or k_cache.shape[2] < 1:
        raise ValueError(
            "k_cache: expected (pages, Hkv, page_size, D) with Hkv dividing the "
            f"{heads} heads of q and D = {dim}, got {tuple(k_cache.shape)}"
        )
    if heads > 64 * k_cache.shape[1]:
        raise ValueError(
            f"q: expected at most 64 heads for each of {k_cache.shape[1]} key heads, got {heads}"
        )


def _expect(name: str, given: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> None:
    if not isinstance(given, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(given).__name__}")
    if tuple(given.shape) != shape or (dtype is not None and given.dtype != dtype):
        raise ValueError(
            f"{name}: expected {dtype or given.dtype} {shape}, got {given.dtype} {tuple(given.shape)}"
        )


def _within(name: str, index: Tensor, low: int | None, high: int) -> None:
    """Of the twins; the ops look at their indices themselves."""
    if index.device.type != "cpu" or not index.numel() or torch.compiler.is_compiling():
        return
    least, most = (int(x) for x in index.aminmax())
    if (low is not None and least < low) or most >= high:
        raise ValueError(f"{name}: expected in [{low or 0}, {high}), got {least} to {most}")


@torch.library.register_fake("dparallel::kv_write")
def _(q, k, v, k_cache, v_cache, positions, slots, cos, sin, interleaved):  # type: ignore[no-untyped-def]
    return None


@torch.library.register_fake("dparallel::block_attention")
def _(  # type: ignore[no-untyped-def]
    q, k_cache, v_cache, begin, end, lengths, pages, longest_query, longest_length, scale
):
    return q.new_empty(q.shape)
