"""Checks of the ops' arguments; each error names the argument, what came and what was expected."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import _C
from ..arguments import INTEGERS, check_tensor, described, is_number, shown, temperature_in_force, whole

Ids = Tensor | Sequence[int] | None

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of the kernels."""
WIDE_DTYPES = (*DTYPES, torch.float64)
"""Dtypes of the losses and the attention."""
DEVICES = {"cpu", *_C.build_info()["backends"].split()}


def compiled(first: Tensor, *others: Tensor) -> bool:
    """Whether the ops can compute with these inputs: of one dtype, on a built backend, without a gradient."""
    if torch.is_grad_enabled() or first.dtype not in DTYPES:
        return False
    if not first.is_cpu and first.device.type not in DEVICES:
        return False
    for other in others:  # noqa: SIM110 (every layer of every pass asks: `all` would take twice as long)
        if other.dtype != first.dtype:
            return False
    return True


# --- rows of logits ----------------------------------------------------------------------------


def check_logits(logits: Tensor, name: str = "logits", *, wide: bool = False) -> None:
    """Raise unless `logits` is (..., V) of a kernel's dtype; wide: float64 too, as the losses take it."""
    check_tensor(name, logits)
    if logits.dtype not in (WIDE_DTYPES if wide else DTYPES):
        wanted = "float32, bfloat16, float16 or float64" if wide else "float32, bfloat16 or float16"
        raise ValueError(f"{name}: expected {wanted}, got {logits.dtype}")
    if logits.ndim < 1 or logits.shape[-1] < 1:
        raise ValueError(f"{name}: expected (..., V) with V >= 1, got {tuple(logits.shape)}")
    refuse_transform(name, logits)


def rows_view(logits: Tensor) -> Tensor:
    """(..., V) as (R, V) or (B, L, V) without a copy wherever strides allow."""
    if logits.ndim > 3:
        logits = logits.flatten(0, -3)
    return logits[None] if logits.ndim == 1 else logits


def check_tokens(tokens: Tensor) -> None:
    """Raise unless `tokens` is int64 (B, L)."""
    check_tensor("tokens", tokens)
    if tokens.ndim != 2 or tokens.dtype != torch.int64:
        raise ValueError(f"tokens: expected int64 (B, L), got {described(tokens)}")


def windows_of(
    tokens: Tensor, lane: Tensor | None, start: int | Tensor, end: int | Tensor | None
) -> tuple[Tensor, Tensor]:
    """Start and end columns (W,) int64 of windows of tokens (B, L); W = B without `lane`."""
    if lane is not None:
        check_index("lane", lane, tokens, "tokens")
    count, last = len(tokens if lane is None else lane), tokens.shape[1] if end is None else end
    return per_sequence("start", start, count, tokens), per_sequence("end", last, count, tokens)


def check_index(name: str, index: Tensor, like: Tensor, of: str = "logits") -> None:
    """Raise unless `index` is int64 (N,) on the device of `like`, the argument `of`."""
    check_tensor(name, index)
    if index.dtype != torch.int64 or index.ndim != 1:
        raise ValueError(f"{name}: expected int64 (N,), got {described(index)}")
    if index.device != like.device:
        raise ValueError(f"{name}: expected on {like.device} as the {of}, got {index.device}")


def check_sampling(temperature: float, top_p: float | None, top_k: int | None) -> tuple[float, float, int]:
    """Temperature, top_p and top_k in force: top_p 1.0 and top_k 0 if not given, or if the temperature is 0.

    Raises ValueError naming the argument that does not fit.
    """
    temperature = temperature_in_force(temperature)
    top_p = 1.0 if top_p is None else top_p
    top_k = 0 if top_k is None else top_k
    if isinstance(top_p, bool) or not (is_number(top_p) and 0 <= top_p <= 1):
        raise ValueError(f"top_p: expected a number from 0 to 1, got {shown(top_p)}")
    if isinstance(top_k, bool) or not isinstance(top_k, numbers.Integral) or not 0 <= top_k < 2**63:
        raise ValueError(f"top_k: expected a whole number >= 0 (0 keeps all), got {shown(top_k)}")
    return (temperature, float(top_p), int(top_k)) if temperature > 0 else (0.0, 1.0, 0)


def mask_id_of(mask_id: int | None, vocab: int | None) -> int:
    """`mask_id` as an int, -1 for None. Raises ValueError unless it is an id, below `vocab` if known."""
    if mask_id is None:
        return -1
    if type(mask_id) is not int or not 0 <= mask_id < 2**63:
        mask_id = whole("mask_id", mask_id, 0)
    if vocab is not None and mask_id >= vocab:
        raise ValueError(f"mask_id: expected an id below {vocab}, got {mask_id}")
    return mask_id


def suppressed(ids: Ids, logits: Tensor) -> Tensor | None:
    """Ids to suppress, (n,) int64 on the device of the logits (..., V), on a CPU ascending; None for none.

    Raises ValueError for an id that is out of range, unless the ids are such a tensor: the kernel checks
    these."""
    if ids is None:
        return None
    if isinstance(ids, Tensor) and ids.dtype == torch.int64 and ids.device == logits.device:
        ids = ids.reshape(-1)
        return ids.sort().values if ids.device.type == "cpu" else ids  # CPU kernels bisect them
    values = ids.reshape(-1).tolist() if isinstance(ids, Tensor) else ids
    if not isinstance(values, Iterable):
        raise ValueError(f"suppress: expected token ids, got {shown(values)}")
    ordered = sorted({i if type(i) is int else whole("suppress", i, 0) for i in values})
    vocab = logits.shape[-1]
    if ordered and not (ordered[0] >= 0 and ordered[-1] < vocab):
        raise ValueError(
            f"suppress: expected ids in [0, {vocab}), got {ordered[0] if ordered[0] < 0 else ordered[-1]}"
        )
    return torch.tensor(ordered, dtype=torch.int64, device=logits.device) if ordered else None


def per_sequence(name: str, value: int | Tensor, batch: int, like: Tensor) -> Tensor:
    """`value`, an integer or int64 (batch,), as int64 (batch,) on the device of `like`. Raises ValueError."""
    if type(value) is int:
        if not -(2**63) <= value < 2**63:
            raise ValueError(f"{name}: expected an integer of 64 bits, got {value}")
        return torch.full((batch,), value, dtype=torch.int64, device=like.device)
    try:
        values = torch.as_tensor(value, device=like.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: expected an integer or int64 ({batch},), got {value!r}") from error
    if values.dtype not in INTEGERS or values.ndim > 1 or values.shape not in ((), (batch,)):
        raise ValueError(f"{name}: expected an integer or int64 ({batch},), got {described(values)}")
    return values if values.ndim and values.dtype == torch.int64 else values.to(torch.int64).expand(batch)


def keys_of(like: Tensor, count: int, **parts: int | Tensor) -> Tensor:
    """(count, len(parts)) int64: the keys of `count` rows, each part one value or one for each row."""
    return torch.stack([per_sequence(k, v, count, like) for k, v in parts.items()], 1)


# --- heads and caches --------------------------------------------------------------------------


def check_heads(name: str, tensor: Tensor, ndim: int, like: Tensor | None = None) -> None:
    """Raise unless `tensor` is floating point, of `ndim` dimensions and of dtype and device of `like`."""
    check_tensor(name, tensor)
    if tensor.dtype not in WIDE_DTYPES or (like is not None and tensor.dtype != like.dtype):
        wanted = "float32, bfloat16 or float16" if like is None else f"{like.dtype} as q"
        raise ValueError(f"{name}: expected {wanted}, got {tensor.dtype}")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name}: expected on {like.device} as q, got {tensor.device}")
    if tensor.ndim != ndim:
        raise ValueError(f"{name}: expected {ndim} dimensions, got {tuple(tensor.shape)}")
    refuse_tangent(name, tensor)


def check_caches(q_shape: Sequence[int], k_cache: Tensor, v_cache: Tensor) -> None:
    """Raise unless the caches (pages, Hkv, page_size, D) are alike and fit queries of `q_shape` (N, H, D)."""
    if k_cache.shape != v_cache.shape:
        raise ValueError(f"v_cache: expected {tuple(k_cache.shape)} as k_cache, got {tuple(v_cache.shape)}")
    _, heads, dim = q_shape
    if k_cache.shape[3] != dim or k_cache.shape[1] < 1 or heads % k_cache.shape[1] or k_cache.shape[2] < 1:
        raise ValueError(
            "k_cache: expected (pages, Hkv, page_size, D) with Hkv dividing the "
            f"{heads} heads of q and D = {dim}, got {tuple(k_cache.shape)}"
        )
    if heads > 64 * k_cache.shape[1]:
        raise ValueError(
            f"q: expected at most 64 heads for each of {k_cache.shape[1]} key heads, got {heads}"
        )


def expect(name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> None:
    """Raise unless `tensor` has this shape and, if given, dtype."""
    check_tensor(name, tensor)
    if tensor.shape != shape or (dtype is not None and tensor.dtype != dtype):
        raise ValueError(f"{name}: expected {dtype or tensor.dtype} {tuple(shape)}, got {described(tensor)}")


def on_device_of_q(q: Tensor, **others: Tensor | None) -> None:
    """Raise unless they are on the device of q. For float64; the kernels check theirs."""
    for name, other in others.items():
        if other is not None and other.device != q.device:
            raise ValueError(f"{name}: expected on {q.device} as q, got {other.device}")


def within(name: str, index: Tensor, low: int | None, high: int) -> None:
    """Raise ValueError unless indices on the CPU are in [low, high). For float64; the kernels check their
    own.
    """
    if index.device.type != "cpu" or not index.numel() or torch.compiler.is_compiling():
        return
    least, most = (int(x) for x in index.aminmax())
    if (low is not None and least < low) or most >= high:
        raise ValueError(f"{name}: expected in [{low or 0}, {high}), got {least} to {most}")


# --- rows of layers ----------------------------------------------------------------------------


def check_rows(name: str, tensor: Tensor) -> None:
    """Raise unless `tensor` is (..., width) of a kernel's dtype, without a gradient or a tangent."""
    check_tensor(name, tensor)
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name}: expected float32, bfloat16 or float16, got {tensor.dtype}")
    if tensor.ndim < 1 or tensor.shape[-1] < 1:
        raise ValueError(f"{name}: expected (..., width) with width >= 1, got {tuple(tensor.shape)}")
    refuse_tangent(name, tensor)
    refuse_gradient(name, tensor)


def check_like(name: str, tensor: Tensor, like: Tensor, shape: torch.Size) -> None:
    """Raise unless `tensor` has this shape, dtype and device of `like`, and no gradient or tangent."""
    check_tensor(name, tensor)
    if tensor.dtype != like.dtype or tensor.shape != shape or tensor.device != like.device:
        raise ValueError(
            f"{name}: expected {like.dtype} {tuple(shape)} on {like.device}, "
            f"got {described(tensor)} on {tensor.device}"
        )
    refuse_tangent(name, tensor)
    refuse_gradient(name, tensor)


def refuse_gradient(name: str, tensor: Tensor) -> None:
    """Raise for a tensor whose gradient is wanted."""
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: requires a gradient, which this op does not have; use torch.no_grad()")


def refuse_tangent(name: str, tensor: Tensor) -> None:
    """Raise for a tensor under forward-mode differentiation: torch drops its tangent in a custom op."""
    if forward_ad._current_level < 0 or torch.compiler.is_compiling():  # no such differentiation is going on
        return
    if forward_ad.unpack_dual(tensor).tangent is not None:
        raise ValueError(
            f"{name}: has a tangent, and this op has no forward-mode derivative; use torch.autograd.grad"
        )


def refuse_transform(name: str, tensor: Tensor) -> None:
    """Raise for a tensor under a transform of torch.func, none of which torch passes on to these ops."""
    refuse_tangent(name, tensor)
    if torch.compiler.is_compiling():
        return
    if torch._C._functorch.is_batchedtensor(tensor):
        raise ValueError(
            f"{name}: is under torch.vmap, which this op does not support; give it all rows at once"
        )
    if torch._C._functorch.is_gradtrackingtensor(tensor) and tensor.requires_grad:
        raise ValueError(
            f"{name}: is under a gradient of torch.func, which this op does not support; use "
            "torch.autograd.grad"
        )
