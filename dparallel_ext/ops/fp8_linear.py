"""A linear layer on weights of 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import check_tensor, described
from .fake import register_fake
from .inputs import check_like, check_rows
from .kernel import kernel
from .linear import FEW, FEW_ON_TENSOR_CORES, check_product, linear

_fp8_linear = kernel("fp8_linear")
_fp8_widen = kernel("fp8_widen")

E4M3_MAX = 448.0


def quantize_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise weight (out, in) to float8_e4m3fn (out, in) and float32 scales (out,), for `fp8_linear`.

    Each row's largest magnitude becomes 448, the largest of e4m3; a row of zeros has scale 1. Rounded to
    nearest, a weight errs by at most 2^-4 of itself, or by 2^-10 of the scale where it is subnormal.

    Raises ValueError unless `weight` is floating point (out, in), and finite in float32; TypeError unless it
    is a tensor.
    """
    check_tensor("weight", weight)
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(f"weight: expected floats (out, in), got {described(weight)}")
    scale = fp8_scale(weight)
    wide = weight.detach().to(torch.float32)
    return (wide / scale[:, None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


def fp8_scale(weight: Tensor) -> Tensor:
    """The scales (out,) of `quantize_fp8`. Raises ValueError as it does."""
    weight = weight.detach()
    largest = weight.abs().amax(1) if weight.shape[1] else weight.new_zeros(len(weight))
    largest = largest.to(torch.float32)
    if not bool(largest.isfinite().all()):
        row = int((~largest.isfinite()).nonzero()[0])
        raise ValueError(f"weight: row {row} holds a number that is not finite in float32")
    scale = torch.where(largest > 0, largest / E4M3_MAX, 1.0)
    return scale.clamp(min=torch.finfo(torch.float32).tiny)


def fp8_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, *, constant: bool = False
) -> Tensor:
    """scale * (x weight^T) + bias, the weights in 8 bits and everything else in the dtype of x.

    The weights are read as bytes; the sum is in float32 and rounded once, and a row has the same bits as
    alone. On a GPU, for more than 64 rows, or 128 on tensor cores, the weights are scaled, rounded to the
    dtype of x for the length of the call, and multiplied by `linear`. Where a CPU multiplies bfloat16,
    numbers of x and sums below 2^-126 count as 0, as in torch's products there. No gradient.

    Args:
        x: (..., in) float32, bfloat16 or float16, any strides (rows are made contiguous).
        weight: (out, in) float8_e4m3fn, contiguous and without NaN; `quantize_fp8` makes it.
        scale: (out,) float32.
        bias: (out,), the dtype of x.
        constant: promises that since `weight` was written one of torch's kernels was launched on this stream,
            such as a lookup of embeddings. A GPU of compute capability 9.0 or more then begins to read it
            while the preceding kernels still run.

    Returns:
        (..., out), contiguous.

    Raises:
        ValueError: naming the argument that does not fit; also where a gradient would be lost.
        TypeError: naming an argument that should be a tensor and is not.
    """
    check_rows("x", x)
    check_tensor("scale", scale)
    check_product(x, weight, None, scale)
    if bias is not None:
        check_like("bias", bias, x, weight.shape[:1])
    rows = x.shape[:-1].numel()
    on_tensor_cores = x.is_cuda and x.dtype != torch.float32 and x.shape[-1] % 64 == 0
    if not x.is_cpu and rows > (FEW_ON_TENSOR_CORES if on_tensor_cores else FEW):
        return linear(x, _fp8_widen(weight, scale, x), bias)
    x_rows = x.reshape(rows, x.shape[-1])
    out: Tensor = _fp8_linear(x_rows, weight, scale, bias, constant)
    return out.view(*x.shape[:-1], len(weight))


@register_fake("fp8_linear")
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


@register_fake("fp8_widen")
def _(weight: Tensor, like: Tensor) -> Tensor:
    return like.new_empty(weight.shape)
