"""The product of an MLP's gate and up with its activation, one launch where that is faster."""

from __future__ import annotations

from torch import Tensor

from ..arguments import check_tensor
from .fake import register_fake
from .fp8_linear import fp8_linear
from .inputs import check_like, check_rows, refuse_gradient
from .kernel import kernel
from .linear import check_product, fuses_epilogue, linear
from .swiglu import swiglu

_linear_swiglu = kernel("linear_swiglu")


def linear_swiglu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    constant: bool = False,
) -> Tensor:
    """`swiglu` of a product: silu(x gate^T) * (x up^T), the weights of gate and up one above the other.

    Rounded as `linear` (or, with scales, `fp8_linear`) and `swiglu` one after the other round, and computed
    by them, but in bfloat16 on a GPU of compute capability 9.0 or 10 for up to 64 rows (128 with weights of 8
    bits): there the product's kernel ends in the activation, with the same bits. No gradient.

    Args:
        x: (..., in) float32, bfloat16 or float16, any strides (rows are made contiguous).
        weight: (2 * width, in), the gate's rows and then up's, the dtype of x; with scales float8_e4m3fn.
        bias: (2 * width,), the dtype of x.
        scale: (2 * width,) float32, of weights in 8 bits; see `fp8_linear`.
        constant: as of `linear`.

    Returns:
        (..., width), contiguous.

    Raises:
        ValueError: naming the argument that does not fit; also where a gradient would be lost.
        TypeError: naming an argument that should be a tensor and is not.
    """
    check_rows("x", x)
    check_tensor("weight", weight)
    if weight.ndim != 2 or weight.shape[0] % 2 or not weight.shape[0]:
        got = tuple(weight.shape)
        raise ValueError(f"weight: expected (2 * width, in), the gate's rows and as many of up, got {got}")
    refuse_gradient("weight", weight)
    if bias is not None:
        check_like("bias", bias, x, weight.shape[:1])
    if fuses_epilogue(x, weight, bias, scale):
        check_product(x, weight, bias, scale)
        rows = x.reshape(-1, x.shape[-1])
        out: Tensor = _linear_swiglu(rows, weight, scale, bias, constant)
        return out.view(*x.shape[:-1], out.shape[1])
    if scale is not None:
        return swiglu(fp8_linear(x, weight, scale, bias, constant=constant))
    return swiglu(linear(x, weight, bias, constant=constant))


@register_fake("linear_swiglu")
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0] // 2))
