"""The norm of a transformer's residual stream, in one pass.

It rounds where the modules that it replaces do, so that a model's tokens do not change.
"""

from __future__ import annotations

import math
from typing import overload

from torch import Tensor

from ..arguments import number
from .fake import register_fake
from .inputs import check_like, check_rows, rows_view
from .kernel import kernel

_rms_norm = kernel("rms_norm")


@overload
def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float, bias: Tensor | None = None, delta: None = None
) -> Tensor: ...


@overload
def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float, bias: Tensor | None = None, delta: Tensor
) -> tuple[Tensor, Tensor]: ...


def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float, bias: Tensor | None = None, delta: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """weight * s / sqrt(mean(s^2) + eps) + bias of each row s = x + delta (arXiv 1910.07467), in one pass.

    Computed in float32 and rounded to the dtype after the sum s, the normalisation, the product and the
    sum with the bias, as in a model that computes these one by one. No gradient.

    Args:
        x: (..., width) float32, bfloat16 or float16, any strides (rows are made contiguous).
        weight, bias: (width,), the dtype of x.
        eps: added to the mean square; finite, at least 0.
        delta: shape and dtype of x; added to x first, as a layer's output to the residual stream.

    Returns:
        y (..., width), dtype of x, contiguous; with delta (y, s).

    Raises:
        ValueError: naming the argument that does not fit, or that requires a gradient.
        TypeError: naming an argument that should be a tensor and is not.
    """
    check_rows("x", x)
    check_like("weight", weight, x, x.shape[-1:])
    if bias is not None:
        check_like("bias", bias, x, x.shape[-1:])
    if delta is not None:
        check_like("delta", delta, x, x.shape)
    if type(eps) is not float or not 0.0 <= eps < math.inf:
        eps = number("eps", eps)
    y, s = _rms_norm(
        rows_view(x),
        None if delta is None else rows_view(delta),
        weight,
        bias,
        eps,
    )
    if x.ndim != y.ndim:
        y, s = y.view(x.shape), s if delta is None else s.view(x.shape)
    return y if delta is None else (y, s)


@register_fake("rms_norm")
def _(x: Tensor, delta: Tensor | None) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), x.new_empty((0,) if delta is None else x.shape)
