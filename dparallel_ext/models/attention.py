"""Attention when decoding: write new keys and values into their slots, attend to the slots that rows see."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..cache import AttentionMetadata, KVCache
from ..ops import block_attention, kv_write, varlen_attention
from .modules import Attend


class PagedAttention:
    """The attention of one pass over a cache, layer by layer."""

    def __init__(self, kv_cache: KVCache, metadata: AttentionMetadata) -> None:
        self.kv_cache, self.metadata = kv_cache, metadata
        cos, sin = kv_cache.rope
        self._write = functools.partial(kv_write, positions=metadata.positions, cos=cos, sin=sin)
        self._some_whole = len(metadata.seqused_k) > 0
        if self._some_whole:
            self._nowhere = torch.full_like(metadata.slot_mapping, -1)
            self._cu_seqlens, self._seqused_k = metadata.cu_seqlens.int(), metadata.seqused_k.int()

    def layer(self, index: int) -> Attend:
        return functools.partial(self._attend, *self.kv_cache.layer(index))

    def _attend(self, k_cache: Tensor, v_cache: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """k_cache, v_cache: (pages, Hkv, page_size, D); q (N, H, D), k and v (N, Hkv, D) before RoPE."""
        metadata = self.metadata
        self._write(q, k, v, k_cache, v_cache, slot_mapping=metadata.slot_mapping)
        of_whole = None
        if self._some_whole:
            # With q's part taken by k and no slot to write, this only rotates k in place.
            self._write(k, v, v, k_cache, v_cache, slot_mapping=self._nowhere)
            bounds = self._cu_seqlens, self._seqused_k
            of_whole = varlen_attention(
                q, k, v, *bounds, max_seqlen=metadata.max_q_len, causal=metadata.causal
            )
            if not len(metadata.kv_lens):
                return of_whole
        y = block_attention(
            q,
            k_cache,
            v_cache,
            metadata.kv_lens,
            block_table=metadata.block_table,
            q_start=metadata.q_start,
            q_end=metadata.q_end,
            causal=metadata.causal,
            ancestors=metadata.ancestors,
            max_q_len=metadata.max_q_len,
            max_kv_len=metadata.max_kv_len,
        )
        return y if of_whole is None else of_whole.add_(y)  # each is zero in the other's rows
