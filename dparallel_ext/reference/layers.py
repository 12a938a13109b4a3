"""The rest of a layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .attention import kv_write


def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float, bias: Tensor | None = None, delta: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """See `dparallel_ext.rms_norm`; any floating-point dtype."""
    x = x if delta is None else (x.double() + delta.double()).to(x.dtype)
    scale = (x.double().square().mean(-1, keepdim=True) + eps).rsqrt()
    y = (weight.double() * (x.double() * scale).to(x.dtype).double()).to(x.dtype)
    y = y if bias is None else (y.double() + bias.double()).to(x.dtype)
    return y if delta is None else (y, x)


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """See `dparallel_ext.swiglu`; any floating-point dtype."""
    if up is None:
        gate, up = gate.chunk(2, -1)
    z = gate.double()
    return ((z * z.sigmoid()).to(gate.dtype).double() * up.double()).to(gate.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """See `dparallel_ext.linear`; any floating-point dtype."""
    y = x.double() @ weight.double().T
    return (y if bias is None else y + bias.double()).to(x.dtype)


def linear_swiglu(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, scale: Tensor | None = None
) -> Tensor:
    """See `dparallel_ext.linear_swiglu`; any floating-point dtype."""
    return swiglu(linear(x, weight, bias) if scale is None else fp8_linear(x, weight, scale, bias))


def linear_kv_write(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    scale: Tensor | None = None,
    **where: Any,
) -> Tensor:
    """See `dparallel_ext.linear_kv_write`; any floating-point dtype. where: its arguments for `kv_write`."""
    y = linear(x, weight, bias) if scale is None else fp8_linear(x, weight, scale, bias)
    kv_heads, dim = k_cache.shape[1], k_cache.shape[3]
    q, k, v = y.unflatten(1, (-1, dim)).tensor_split((-2 * kv_heads, -kv_heads), 1)
    kv_write(q, k, v, k_cache, v_cache, **where)
    return q


def fp8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """See `dparallel_ext.fp8_linear`; any floating-point dtype."""
    y = x.double() @ weight.to(torch.float32).double().T * scale.double()
    return (y if bias is None else y + bias.double()).to(x.dtype)
