"""The keys and values of earlier tokens, and attention to them."""

from __future__ import annotations

import torch
from torch import Tensor


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
    """See `dparallel_ext.kv_write`; any floating-point dtype."""
    half, rest = cos.shape[1], q.shape[2] - 2 * cos.shape[1]
    c, s = (table[positions][:, None].double() for table in (cos, sin))  # (N, 1, R / 2)

    def rotated(x: Tensor, weight: Tensor | None) -> Tensor:
        if weight is not None:
            scale = (x.double().square().mean(-1, keepdim=True) + eps).rsqrt()
            x = (weight.double() * (x.double() * scale).to(x.dtype).double()).to(x.dtype)
        a, b, unrotated = x.double().split((half, half, rest), -1)
        return torch.cat((a * c - b * s, b * c + a * s, unrotated), -1).to(x.dtype)

    written = slot_mapping >= 0
    page, at = slot_mapping[written] // k_cache.shape[2], slot_mapping[written] % k_cache.shape[2]
    keys, values, queries = rotated(k, k_norm)[written], v[written], rotated(q, q_norm)
    k_cache[page, :, at] = keys
    v_cache[page, :, at] = values
    q.copy_(queries)


def kv_move(kv_cache: Tensor, source: Tensor, target: Tensor) -> None:
    """See `dparallel_ext.kv_move`; any dtype."""
    moved = (source >= 0) & (target >= 0)
    page_size = kv_cache.shape[4]
    (old_page, old), (page, at) = ((t[moved] // page_size, t[moved] % page_size) for t in (source, target))
    kv_cache[:, :, page, :, at] = kv_cache[:, :, old_page, :, old]


def block_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    kv_lens: Tensor,
    *,
    block_table: Tensor,
    q_start: Tensor,
    q_end: Tensor,
    causal: bool = False,
    ancestors: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """See `dparallel_ext.block_attention`; any floating-point dtype."""
    out, group = torch.zeros_like(q), q.shape[1] // k_cache.shape[1]
    scale = q.shape[2] ** -0.5 if scale is None else scale
    segments = zip(q_start.tolist(), q_end.tolist(), kv_lens.tolist(), block_table, strict=True)
    for first, last, length, table in segments:
        base = length - (last - first)
        for row in range(first, last):
            slot = torch.arange(length, device=q.device)
            if causal:
                slot = slot[: base + row - first + 1]
            elif ancestors is not None:
                words = [word % 2**64 for word in ancestors[row].tolist()]
                seen = [j < base or words[(j - base) // 64] >> (j - base) % 64 & 1 for j in range(length)]
                slot = slot[torch.tensor(seen, dtype=torch.bool, device=q.device)]
            if not len(slot):
                continue
            at = (table[slot // k_cache.shape[2]], slice(None), slot % k_cache.shape[2])
            k, v = (t[at].double().repeat_interleave(group, 1) for t in (k_cache, v_cache))  # (slots, H, D)
            scores = torch.einsum("hd,khd->hk", q[row].double(), k) * scale
            out[row] = torch.einsum("hk,khd->hd", scores.softmax(-1), v).to(q.dtype)
    return out
