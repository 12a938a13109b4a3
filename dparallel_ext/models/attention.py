"""Attention when decoding: write new keys and values into their slots, attend to the slots that rows see."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..cache import AttentionMetadata, KVCache
from ..ops import kv_write, varlen_attention
from ..ops.block_attention import attend_checked, check_segments
from ..ops.inputs import compiled
from ..ops.kv_write import check_places
from ..ops.linear_kv_write import write_product
from .fused_weights import Joined, is_unmodified
from .modules import CachedAttend, HeadNorms, RMSNorm


class PagedAttention:
    """The attention of one pass over a cache, layer by layer."""

    def __init__(self, kv_cache: KVCache, metadata: AttentionMetadata) -> None:
        self.kv_cache, self.metadata = kv_cache, metadata
        cos, sin = kv_cache.rope
        self.rotation: dict[str, Any] = {"positions": metadata.positions, "cos": cos, "sin": sin}
        """Arguments of `kv_write`, checked here for all layers, as those below are."""
        self.segments: dict[str, Any] = {
            "kv_lens": metadata.kv_lens,
            "block_table": metadata.block_table,
            "q_start": metadata.q_start,
            "q_end": metadata.q_end,
            "causal": metadata.causal,
            "ancestors": metadata.ancestors,
        }
        """Arguments of `block_attention`."""
        count, head_dim = metadata.positions.shape[0], kv_cache.slots.shape[5]
        check_places((count, 1, head_dim), metadata.positions, metadata.slot_mapping, cos, sin)
        check_segments(count, **self.segments)
        self.query_scale: Tensor | None = None
        """(N, 1, 1), in the dtype of the queries."""
        if kv_cache.query_scale is not None:
            factors = kv_cache.query_scale[metadata.positions][:, None, None]
            self.query_scale = factors.to(kv_cache.slots.dtype)
        self.some_whole = metadata.seqused_k.shape[0] > 0
        if self.some_whole:
            self.nowhere = torch.full_like(metadata.slot_mapping, -1)
            self.whole = metadata.cu_seqlens.int(), metadata.seqused_k.int()

    def layer(self, index: int) -> LayerAttention:
        return LayerAttention(self, *self.kv_cache.layer(index))


class LayerAttention(CachedAttend):
    """Of one layer: k_cache, v_cache (pages, Hkv, page_size, D)."""

    def __init__(self, of_pass: PagedAttention, k_cache: Tensor, v_cache: Tensor) -> None:
        self.of_pass, self.caches = of_pass, (k_cache, v_cache)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, norms: HeadNorms | None = None) -> Tensor:
        """q (N, H, D), k and v (N, Hkv, D), before their norms and RoPE."""
        of_pass, metadata = self.of_pass, self.of_pass.metadata
        k_cache, v_cache = self.caches
        weights: dict[str, Any] = {}
        if norms is not None:
            weights = kernel_norms(q, norms)
            if not weights:
                q, k = norms.q(q), norms.k(k)
        kv_write(q, k, v, k_cache, v_cache, slot_mapping=metadata.slot_mapping, **of_pass.rotation, **weights)
        self._scale(q)
        if not of_pass.some_whole:
            return self._attend(q)
        # With q's part taken by k and no slot to write, this only norms and rotates k in place.
        if weights:
            weights["q_norm"] = weights["k_norm"]
        kv_write(k, v, v, k_cache, v_cache, slot_mapping=of_pass.nowhere, **of_pass.rotation, **weights)
        y = varlen_attention(q, k, v, *of_pass.whole, max_seqlen=metadata.max_q_len, causal=metadata.causal)
        return y.add_(self._attend(q)) if len(metadata.kv_lens) else y  # each is zero in the other's rows

    def of_product(self, x: Tensor, weights: Joined, norms: HeadNorms | None = None) -> Tensor | None:
        of_pass = self.of_pass
        norm_weights: dict[str, Any] = {} if norms is None else kernel_norms(x, norms)
        if of_pass.some_whole or (norms is not None and not norm_weights):
            return None
        weight, bias, scale = weights
        k_cache, v_cache = self.caches
        q = write_product(
            x,
            weight,
            bias,
            k_cache,
            v_cache,
            slot_mapping=of_pass.metadata.slot_mapping,
            scale=scale,
            constant=True,
            **of_pass.rotation,
            **norm_weights,
        )
        self._scale(q)
        return self._attend(q)

    def _scale(self, q: Tensor) -> None:
        """Scale q (N, H, D), rotated, in place."""
        if self.of_pass.query_scale is not None:
            q.mul_(self.of_pass.query_scale)

    def _attend(self, q: Tensor) -> Tensor:
        """q (N, H, D), rotated: `kv_write` has checked it, and the caches."""
        of_pass, metadata = self.of_pass, self.of_pass.metadata
        return attend_checked(
            q,
            *self.caches,
            max_q_len=metadata.max_q_len,
            max_kv_len=metadata.max_kv_len,
            **of_pass.segments,
        )


def kernel_norms(x: Tensor, norms: HeadNorms) -> dict[str, Any]:
    """The arguments by which `kv_write` computes the norms, of the dtype and device of x; none where their
    modules have to."""
    of_q, of_k = norms
    if not (is_unmodified(of_q, RMSNorm) and is_unmodified(of_k, RMSNorm)):
        return {}
    if of_q.bias is not None or of_k.bias is not None or of_q.eps != of_k.eps:
        return {}
    if not compiled(x, of_q.weight, of_k.weight):
        return {}
    return {"q_norm": of_q.weight, "k_norm": of_k.weight, "eps": of_q.eps}
