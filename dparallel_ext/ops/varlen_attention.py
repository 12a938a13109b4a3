"""Attention of packed whole sequences to themselves, on a GPU, by torch."""

from __future__ import annotations

import torch
from torch import Tensor


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
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    seqused_k: Tensor,
    *,
    max_seqlen: int,
    causal: bool = False,
) -> Tensor:
    """Attention of packed sequences, each to itself: torch's FlashAttention.

    Each sequence's result has the same bits as alone, in every run: no block of threads computes rows of two
    sequences, the head size alone decides the tiles, and the keys are never split (torch does that for single
    queries and for pages only). The bounds stay on the device, so a recorded pass serves other lengths.
    `scaled_dot_product_attention`, by cuDNN, takes half the time on Hopper. But the host must know each
    length, so every length would need a recording of its own, and cuDNN plans anew, for tens of milliseconds,
    whenever it meets a length for the first time.

    Args:
        q: (N, H, D) bfloat16 or float16, after the rotary embedding; rows of any stride.
        k, v: (N, Hkv, D), likewise.
        cu_seqlens: (S + 1,) int32, ascending from 0 to N: sequence s is rows
            [cu_seqlens[s], cu_seqlens[s + 1]).
        seqused_k: (S,) int32, the number of its rows, from the first on, that a sequence sees; with 0 its
            result is zero.
        max_seqlen: an upper bound of the rows of a sequence, which sizes the launch.
        causal: a row sees the rows up to itself; otherwise, both directions.

    Returns:
        (N, H, D), dtype of q.
    """
    return torch.ops.aten._flash_attention_forward(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, 0.0, causal, False, seqused_k=seqused_k
    )[0]
