"""Moves keys and values from slot to slot.

A pass over a draft tree writes each node into a slot of its own. The nodes of the accepted path then move to
the slots that follow the sequence; if the draft is a chain, they are there already.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import check_tensor, described
from .fake import register_fake
from .inputs import check_heads, expect
from .kernel import kernel

_kv_move = kernel("kv_move")


def kv_move(kv_cache: Tensor, source: Tensor, target: Tensor) -> None:
    """Move the keys and values of every layer from slot source[b, m] to target[b, m], in one launch.

    All sources of a lane b are read before any of its targets is written, so that a source may be the target
    of another entry of the lane: paths may be shifted, swapped or reversed. A source keeps its values unless
    it is a target. An entry whose source is its target costs nothing. No gradient.

    Args:
        kv_cache: (layers, 2, pages, Hkv, page_size, D) float32, bfloat16, float16 or float64, keys and values
            as in `KVCache.slots`; changed in place, in memory of its own. Any strides without overlaps; a
            last dimension that is not contiguous is copied.
        source, target: (B, M) int64, M <= 2048, page * page_size + offset; an entry with a negative number is
            skipped. Lanes share no slot, and a lane's targets are distinct.

    Raises:
        ValueError: naming the argument that does not fit, or that requires a gradient; then nothing has
            moved. Slots are checked on the CPU alone; on a GPU an entry beyond the cache is skipped, and a
            slot that lanes share gets the value of one of them.
        TypeError: naming an argument that should be a tensor and is not.
    """
    check_heads("kv_cache", kv_cache, 6)
    if kv_cache.shape[1] != 2 or kv_cache.shape[4] < 1:
        raise ValueError(
            "kv_cache: expected (layers, 2, pages, Hkv, page_size, D) with page_size >= 1, "
            f"got {tuple(kv_cache.shape)}"
        )
    for name, tensor in (("source", source), ("target", target)):
        check_tensor(name, tensor)
        if tensor.ndim != 2:
            raise ValueError(f"{name}: expected int64 (B, M), got {described(tensor)}")
        expect(name, tensor, tuple(source.shape), torch.int64)
        if tensor.device != kv_cache.device:
            raise ValueError(f"{name}: expected on {kv_cache.device} as kv_cache, got {tensor.device}")
    _kv_move(kv_cache, source, target)


@register_fake("kv_move")
def _() -> None:
    return None
