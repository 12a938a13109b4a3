"""The gate of a transformer's MLP, in one pass.

It rounds where the modules that it replaces do, so that a model's tokens do not change.
"""

from __future__ import annotations

from torch import Tensor

from .fake import register_fake
from .inputs import check_like, check_rows, rows_view
from .kernel import kernel

_swiglu = kernel("swiglu")


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """silu(gate) * up, silu(z) = z / (1 + exp(-z)) (arXiv 2002.05202), in one pass.

    Computed in float32; silu and the product are each rounded to the dtype. No gradient.

    Args:
        gate: (..., width) float32, bfloat16 or float16, any strides (rows are made contiguous); without
            `up` (..., 2 * width), the gate's half and then up's, as one matrix product yields them.
        up: shape and dtype of gate.

    Returns:
        (..., width), dtype of gate, contiguous.

    Raises:
        ValueError: naming the argument that does not fit, or that requires a gradient.
        TypeError: naming an argument that should be a tensor and is not.
    """
    check_rows("gate", gate)
    if up is None:
        if gate.shape[-1] % 2:
            raise ValueError(f"gate: expected an even size, two halves, without up, got {gate.shape[-1]}")
        gate, up = gate.chunk(2, -1)
    else:
        check_like("up", up, gate, gate.shape)
    out: Tensor = _swiglu(rows_view(gate), rows_view(up))
    return out if out.ndim == gate.ndim else out.view(gate.shape)


@register_fake("swiglu")
def _(gate: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)
