"""The product of queries, keys and values with their way into the cache, one launch where that is faster."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import check_tensor
from .fake import register_fake
from .fp8_linear import fp8_linear
from .inputs import check_caches, check_heads, check_like, refuse_gradient, refuse_tangent
from .kernel import kernel
from .kv_write import check_norms, check_places, write_checked
from .linear import check_product, fuses_epilogue, linear

_linear_kv_write = kernel("linear_kv_write")


def linear_kv_write(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    positions: Tensor,
    slot_mapping: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    scale: Tensor | None = None,
    constant: bool = False,
) -> Tensor:
    """`kv_write` of a product whose columns are queries, keys and values; returns the rotated queries.

    Rounded as `linear` (or, with scales, `fp8_linear`) and `kv_write` one after the other round, and computed
    by them, but in bfloat16 on a GPU of compute capability 9.0 or 10 for up to 64 rows (128 with weights of 8
    bits): there, for heads of a multiple of 64 dimensions (with norms: of 128) that are all rotated, the
    product's kernel norms and turns its sums and writes them to their slots. The bits are the same, except
    that with norms the product may be added up in another order. No gradient.

    Args:
        x: (N, in) float32, bfloat16 or float16, any strides (rows are made contiguous).
        weight: ((H + 2 Hkv) * D, in), the rows of H queries' heads, Hkv keys' and Hkv values', the dtype of
            x; with scales float8_e4m3fn.
        bias: ((H + 2 Hkv) * D,), the dtype of x, or None.
        k_cache, v_cache: (pages, Hkv, page_size, D); changed in place.
        positions, slot_mapping, cos, sin, q_norm, k_norm, eps: as of `kv_write`.
        scale: ((H + 2 Hkv) * D,) float32, of weights in 8 bits; see `fp8_linear`.
        constant: as of `linear`.

    Returns:
        (N, H, D)

    Raises:
        ValueError: naming the argument that does not fit, or that requires a gradient. Indices are checked on
            the CPU alone.
        TypeError: naming an argument that should be a tensor and is not.
    """
    check_heads("x", x, 2)
    check_heads("k_cache", k_cache, 4, like=x)
    check_places((x.shape[0], 1, k_cache.shape[3]), positions, slot_mapping, cos, sin)
    return write_product(
        x,
        weight,
        bias,
        k_cache,
        v_cache,
        positions=positions,
        slot_mapping=slot_mapping,
        cos=cos,
        sin=sin,
        q_norm=q_norm,
        k_norm=k_norm,
        eps=eps,
        scale=scale,
        constant=constant,
    )


def write_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    positions: Tensor,
    slot_mapping: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    scale: Tensor | None,
    constant: bool,
) -> Tensor:
    """`linear_kv_write` after `check_places`, which a pass does once for all layers."""
    check_heads("x", x, 2)
    check_tensor("weight", weight)
    for name, factor in (("x", x), ("weight", weight)):
        refuse_gradient(name, factor)
        refuse_tangent(name, factor)
    check_heads("k_cache", k_cache, 4, like=x)
    _, kv_heads, _, dim = k_cache.shape
    whole_heads = dim > 0 and weight.ndim == 2 and weight.shape[0] % dim == 0
    heads = weight.shape[0] // dim - 2 * kv_heads if whole_heads else 0
    if heads < 1:
        raise ValueError(
            f"weight: expected ((H + 2 * {kv_heads}) * {dim}, in) for the heads of k_cache, "
            f"got {tuple(weight.shape)}"
        )
    if bias is not None:
        check_like("bias", bias, x, weight.shape[:1])
    check_heads("v_cache", v_cache, 4, like=x)
    shape = (x.shape[0], heads, dim)
    check_caches(shape, k_cache, v_cache)
    eps = check_norms(x, dim, q_norm, k_norm, eps)
    fits = dim % 64 == 0 if q_norm is None else dim == 128
    if fits and dim == 2 * cos.shape[1] and fuses_epilogue(x, weight, bias, scale):
        check_product(x, weight, bias, scale)
        norms = q_norm, k_norm, eps
        return _linear_kv_write(
            x, weight, scale, bias, k_cache, v_cache, positions, slot_mapping, cos, sin, *norms, constant
        )
    if scale is not None:
        product = fp8_linear(x, weight, scale, bias, constant=constant)
    else:
        product = linear(x, weight, bias, constant=constant)
    rows = product.view(x.shape[0], heads + 2 * kv_heads, dim)
    q, k, v = torch.split_with_sizes(rows, (heads, kv_heads, kv_heads), 1)
    write_checked(q, k, v, k_cache, v_cache, positions, slot_mapping, cos, sin, q_norm, k_norm, eps)
    return q


@register_fake("linear_kv_write")
def _(x: Tensor, weight: Tensor, k_cache: Tensor) -> Tensor:
    _, kv_heads, _, dim = k_cache.shape
    return x.new_empty((x.shape[0], weight.shape[0] // dim - 2 * kv_heads, dim))
