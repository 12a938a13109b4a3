"""A linear layer where torch's is slow."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from .._C import simd_level
from ..arguments import check_tensor, described
from ..backends import fast_bfloat16
from .fake import register_fake
from .inputs import refuse_gradient
from .kernel import kernel

_linear = kernel("linear")

FEW = 64
"""Rows up to which a product takes as long as reading the weights."""
FEW_ON_TENSOR_CORES = 128
"""The same of weights in 8 bits, on a GPU's tensor cores: reading the weights again from the GPU's cache then
costs no more than widening them first. Measured on an H200, 4096 -> 12288: 128 rows take 70 us, against 37 to
widen and 29 for the product; 256 rows 104 us, against 37 and 38."""
LARGE = 2**20
"""Weights of a float32 product, 4 MB, from which on the kernel is faster on a CPU."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, constant: bool = False) -> Tensor:
    """x weight^T + bias, as `torch.nn.functional.linear`, by a kernel of ours where that is faster.

    That is: up to 64 rows in bfloat16 or float16 on a GPU of compute capability 9.0 or 10; bfloat16 on a CPU
    without instructions for it; and on a CPU with AVX2 or AVX-512 up to 64 rows in float32, by 2^20 weights
    or more. The kernel sums in float32 and rounds once; a row has the same bits as alone. All else is torch's
    product, also wherever a gradient may be asked for (outside `torch.no_grad()` and
    `torch.inference_mode()`, whatever the tensors are), under `torch.autocast` and `torch.compile`.

    Args:
        x: (..., in), any strides (rows are made contiguous).
        weight: (out, in), the dtype of x.
        bias: (out,), the dtype of x.
        constant: promises that since `weight` was written one of torch's kernels was launched on this stream,
            such as a lookup of embeddings. The GPU then begins to read it while the preceding kernels still
            run.

    Returns:
        (..., out)

    Raises:
        ValueError: naming the argument that does not fit.
        TypeError: naming an argument that should be a tensor and is not.
    """
    check_tensor("x", x)
    check_product(x, weight, bias)
    if not _runs_kernel(x, weight, bias):
        # On a CPU torch reads one element behind a 16-bit row of odd length: with a gap there may be none.
        return F.linear(x.contiguous(), weight, bias)
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    out: Tensor = _linear(rows, weight, bias, constant)
    return out if x.ndim == 2 else out.view(*x.shape[:-1], len(weight))


def check_product(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None) -> None:
    """Raise unless they are the factors of a product; with scales, unless the weights have 8 bits."""
    check_tensor("weight", weight)
    if bias is not None:
        check_tensor("bias", bias)
    wanted = x.dtype if scale is None else torch.float8_e4m3fn
    fits = weight.ndim == 2 and x.ndim > 0 and weight.shape[1] == x.shape[-1]
    if not fits or (weight.dtype != wanted and (scale is not None or not _casts(x))):
        into = x.shape[-1] if x.ndim else "in"
        raise ValueError(f"weight: expected {wanted} (out, {into}), got {described(weight)}")
    if bias is not None and (bias.shape != weight.shape[:1] or (bias.dtype != x.dtype and not _casts(x))):
        raise ValueError(f"bias: expected {x.dtype} ({len(weight)},), got {described(bias)}")
    if scale is not None:
        check_tensor("scale", scale)
        if scale.dtype != torch.float32 or scale.shape != weight.shape[:1]:
            raise ValueError(f"scale: expected float32 ({len(weight)},), got {described(scale)}")
        refuse_gradient("scale", scale)
    device = x.device
    if weight.device != device:
        raise ValueError(f"weight: expected on {device} as x, got {weight.device}")
    if scale is not None and scale.device != device:
        raise ValueError(f"scale: expected on {device} as x, got {scale.device}")
    if bias is not None and bias.device != device:
        raise ValueError(f"bias: expected on {device} as x, got {bias.device}")


def _casts(x: Tensor) -> bool:
    """Whether torch's product casts its factors to one dtype."""
    return torch.is_autocast_enabled(x.device.type)


def fuses_epilogue(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> bool:
    """Whether the kernel of this product can also compute the next op, such as `swiglu` or `kv_write`."""
    if x.dtype != torch.bfloat16 or not x.is_cuda:
        return False
    if scale is None:
        return _runs_kernel(x, weight, bias)
    few = x.numel() <= FEW_ON_TENSOR_CORES * x.shape[-1]
    return few and x.shape[-1] % 64 == 0 and _has_clusters(x.get_device())


def _runs_kernel(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or forward_ad._current_level >= 0:
        return False
    if not (_is_faster_on_gpu(x) if x.is_cuda else _is_faster_on_cpu(x, weight)):
        return False
    others = [t for t in (weight, bias) if t is not None]
    return (
        not _casts(x)
        and x.numel() > 0
        and all(t.dtype == x.dtype and t.device == x.device for t in others)
        and all(type(t) in (Tensor, Parameter) for t in (x, *others))  # not sharded or quantised
        and weight.is_contiguous()
    )


def _is_faster_on_gpu(x: Tensor) -> bool:
    if x.dtype not in (torch.bfloat16, torch.float16):
        return False
    return x.numel() <= FEW * x.shape[-1] and x.shape[-1] % 64 == 0 and _has_clusters(x.get_device())


def _is_faster_on_cpu(x: Tensor, weight: Tensor) -> bool:
    """In float32 MKL takes 2 and 3 times as long for 2 and 3 rows as for one, and for one no less with two
    threads than with one (4096 x 1024 weights)."""
    if x.dtype != torch.float32 or not x.is_cpu:
        return x.dtype == torch.bfloat16 and not fast_bfloat16(x.device)
    few = x.numel() <= FEW * x.shape[-1]
    return few and weight.numel() >= LARGE and simd_level() != "portable"


@functools.cache
def _has_clusters(device: int) -> bool:
    """Whether the GPU has clusters, and the shared memory that the kernel is made for."""
    return torch.cuda.get_device_capability(device)[0] in (9, 10)


@register_fake("linear")
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))
