"""Writes new keys, rotated, and values into their slots: `kv_write`, and the tables that it rotates by.

A cache is pages of slots; a slot holds the key and value of one position, and a sequence has a list of pages.
A contiguous cache is one page per sequence. Keys are kept after the rotary embedding, and a block that is
computed again overwrites its slots.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ..arguments import described, number, whole
from .fake import register_fake
from .inputs import check_caches, check_heads, check_like, expect, on_device_of_q, within
from .kernel import kernel
from .memory import own_memory

_kv_write = kernel("kv_write")


def rope_table(
    length: int,
    head_dim: int,
    theta: float = 10000.0,
    *,
    inv_freq: Tensor | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """cos and sin (length, head_dim / 2) float32 of position / theta^(2 i / head_dim) (arXiv 2104.09864).

    inv_freq: (head_dim / 2,) float32 frequencies, in place of theta^(-2 i / head_dim): scaled ones.

    Raises ValueError naming the argument that does not fit, such as an odd head_dim, and TypeError for an
    inv_freq that is no tensor.
    """
    length, head_dim = whole("length", length, 0), whole("head_dim", head_dim, 2)
    if head_dim % 2:
        raise ValueError(f"head_dim: expected an even number >= 2, got {head_dim}")
    if inv_freq is None:
        theta = number("theta", theta)
        inv_freq = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=device).float() / head_dim)
    else:
        expect("inv_freq", inv_freq, (head_dim // 2,), torch.float32)
        inv_freq = inv_freq.to(device)
    angle = torch.outer(torch.arange(length, device=device).float(), inv_freq)
    return angle.cos(), angle.sin()


def kv_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    positions: Tensor,
    slot_mapping: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> None:
    """Rotate queries in place, and write rotated keys, and values, into their slots, in one pass.

    The first R of a head's D dimensions are rotated, in the pairs (i, i + R / 2), as by LLaMA's (GPT-NeoX's)
    rotary embedding with a rotary width of R; the other dimensions stay.

    With norms, as of Qwen3, each head x of q and of k becomes weight * x / sqrt(mean(x^2) + eps) before it is
    rotated, over all D dimensions and with the roundings of `rms_norm`. On a GPU the squares are added in
    another order than there. A row's results do not depend on other rows.

    Any strides; no element of the tensors that are changed is another's too. Rows (H, D) of q, k and v, and
    the last dimension of a cache, are copied if they are not contiguous. No gradient.

    Args:
        q: (N, H, D) float32, bfloat16 or float16; changed in place.
        k, v: (N, Hkv, D), likewise; read.
        k_cache, v_cache: (pages, Hkv, page_size, D); changed in place.
        positions: (N,) int64, the position of each row: an index into cos and sin.
        slot_mapping: (N,) int64, page * page_size + offset, distinct; rows with a negative number are not
            written.
        cos, sin: (positions, R / 2) float32, R <= D, see `rope_table`.
        q_norm, k_norm: (D,), the dtype of q, weights of the norms; both or neither.
        eps: added to the mean square; finite, at least 0.

    Raises:
        ValueError: naming the argument that does not fit, or that requires a gradient. Indices are checked on
            the CPU alone.
        TypeError: naming an argument that should be a tensor and is not.
    """
    check_heads("q", q, 3)
    check_heads("k", k, 3, like=q)
    check_heads("v", v, 3, like=q)
    check_heads("k_cache", k_cache, 4, like=q)
    check_heads("v_cache", v_cache, 4, like=q)
    check_caches(q.shape, k_cache, v_cache)
    for name, tensor in (("k", k), ("v", v)):
        expect(name, tensor, (q.shape[0], k_cache.shape[1], q.shape[2]))
    check_places(q.shape, positions, slot_mapping, cos, sin)
    eps = check_norms(q, q.shape[2], q_norm, k_norm, eps)
    write_checked(q, k, v, k_cache, v_cache, positions, slot_mapping, cos, sin, q_norm, k_norm, eps)


def write_checked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> None:
    """`kv_write` of arguments that fit each other; only indices are still checked, on the CPU."""
    if q.dtype == torch.float64:
        on_device_of_q(q, positions=positions, slot_mapping=slot_mapping, cos=cos, sin=sin)
        within("positions", positions, 0, len(cos))
        within("slot_mapping", slot_mapping, None, len(k_cache) * k_cache.shape[2])
        tables = {"positions": positions, "slot_mapping": slot_mapping, "cos": cos, "sin": sin}
        own_memory(
            {"v_cache": v_cache, "k_cache": k_cache, "q": q},
            {"k": k, "v": v, **tables, "q_norm": q_norm, "k_norm": k_norm},
        )
        return reference.kv_write(q, k, v, k_cache, v_cache, **tables, q_norm=q_norm, k_norm=k_norm, eps=eps)
    _kv_write(q, k, v, k_cache, v_cache, positions, slot_mapping, cos, sin, q_norm, k_norm, eps)


def check_places(
    q_shape: Sequence[int], positions: Tensor, slot_mapping: Tensor, cos: Tensor, sin: Tensor
) -> None:
    """Raise unless they fit queries of `q_shape`, (N, H, D)."""
    count, _, dim = q_shape
    for name, tensor in (("positions", positions), ("slot_mapping", slot_mapping)):
        expect(name, tensor, (count,), torch.int64)
    if dim % 2:
        raise ValueError(f"q: expected an even head_dim, got {dim}")
    if not isinstance(cos, Tensor) or cos.ndim != 2 or 2 * cos.shape[1] > dim:
        raise ValueError(f"cos: expected float32 (positions, R / 2) with R <= {dim}, got {described(cos)}")
    for name, tensor in (("cos", cos), ("sin", sin)):
        expect(name, tensor, cos.shape, torch.float32)


def check_norms(
    like: Tensor, head_dim: int, q_norm: Tensor | None, k_norm: Tensor | None, eps: float
) -> float:
    """eps as a number; raise unless it and the norms fit heads of `head_dim` in the dtype of `like`."""
    for name, weight, other in (("q_norm", q_norm, k_norm), ("k_norm", k_norm, q_norm)):
        if weight is not None:
            check_like(name, weight, like, torch.Size((head_dim,)))
        elif other is not None:
            raise ValueError(f"{name}: expected a norm for both or neither of q and k, got None")
    return eps if type(eps) is float and 0.0 <= eps < math.inf else number("eps", eps)


@register_fake("kv_write")
def _() -> None:
    return None
