"""The certainty-forcing loss from the hidden states: the head and the loss, chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from ..arguments import whole
from .certainty_forcing_loss import (
    DTYPES,
    CertaintyForcingLossOutput,
    check_loss_inputs,
    check_settings,
    compose,
    real_dtype,
    row_errors,
)
from .errors import NO_ERROR, named_row, report


def linear_certainty_forcing_loss(
    hidden: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    active: Tensor,
    *,
    temperature: float = 0.5,
    entropy_weight: float = 2.0,
    ce_temperature: float = 1.0,
    weight: Tensor | None = None,
    gate: Literal["correct", "all"] | Tensor = "correct",
    reduction: Literal["mean", "sum"] = "mean",
    softcap: float | None = None,
    shift: bool = False,
    chunk_rows: int | None = None,
) -> CertaintyForcingLossOutput:
    """`certainty_forcing_loss` of hidden @ lm_head_weight.T, whose logits never exist all at once.

    The head is applied to chunks of active rows; the backward pass computes each chunk's logits again and
    writes their gradient over them, so that one chunk (two with a soft cap) and the gradient of the
    hidden states are all that is held. That is three matrix products per active row, and a fourth
    where the head is trainable.

    Under `torch.autocast` the head multiplies in autocast's dtype, as a linear layer does.

    Args:
        hidden: (..., H) float32, bfloat16, float16 or float64, after the final norm.
        lm_head_weight: (V, H), same dtype. It gets a gradient only if it requires one.
        labels, active, weight, gate: (...), as in `certainty_forcing_loss`, and so the other arguments.
        softcap: logits become softcap * tanh(logits / softcap).
        shift: (..., T, H): the label at position t belongs to the hidden state at t - 1 (Dream); the
            first position of a sequence has none and is left out, as published.
        chunk_rows: active rows per chunk; default: at most 32 MB of logits on the CPU, 256 MB on a GPU,
            and a multiple of 128 rows where so many fit.

    Returns:
        CertaintyForcingLossOutput, its fields in the place of the labels.

    Raises:
        ValueError: as `certainty_forcing_loss`.
    """
    if hidden.ndim < 1 or hidden.dtype not in DTYPES:
        raise ValueError(
            f"hidden: expected floating point (..., H), got {hidden.dtype} {tuple(hidden.shape)}"
        )
    if lm_head_weight.ndim != 2 or lm_head_weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"lm_head_weight: expected (V, {hidden.shape[-1]}) matching hidden, "
            f"got {tuple(lm_head_weight.shape)}"
        )
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, lm_head_weight = (
            t if t.dtype == torch.float64 else t.to(dtype) for t in (hidden, lm_head_weight)
        )
    if lm_head_weight.dtype != hidden.dtype or lm_head_weight.device != hidden.device:
        raise ValueError(
            f"lm_head_weight: expected {hidden.dtype} on {hidden.device} as hidden, "
            f"got {lm_head_weight.dtype} on {lm_head_weight.device}"
        )
    if lm_head_weight.shape[0] < 1:
        raise ValueError("lm_head_weight: expected at least one row")
    check_loss_inputs(hidden, labels, active, weight, gate, "hidden")
    check_settings(temperature, ce_temperature, reduction)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap: expected a number > 0 or None, got {softcap!r}")
    if chunk_rows is not None:
        chunk_rows = whole("chunk_rows", chunk_rows, 1)
    shape, counted = labels.shape, active
    if shift:
        if labels.ndim < 1:
            raise ValueError("shift: expected hidden (..., T, H)")
        # The hidden state before; the first position stays, but is not counted.
        hidden = torch.cat((hidden[..., :1, :], hidden[..., :-1, :]), -2)
        counted = active.clone()
        counted[..., :1] = False
    if chunk_rows is None:
        megabytes = 256 if hidden.device.type == "cuda" else 32
        chunk_rows = megabytes * 2**20 // (lm_head_weight.shape[0] * hidden.element_size())
        # Whole tiles of the matrix products: 1024 rows of LLaDA's 126464 16-bit logits, not 1061.
        chunk_rows = chunk_rows // 128 * 128 if chunk_rows >= 128 else max(1, chunk_rows)
    flat = counted.reshape(-1)
    nll, entropy, correct, _, error = torch.ops.dparallel.linear_certainty_forcing_loss(
        hidden.reshape(-1, hidden.shape[-1]),
        lm_head_weight,
        labels.reshape(-1).to(torch.int64),
        flat,
        float(temperature),
        float(ce_temperature),
        0.0 if softcap is None else float(softcap),
        chunk_rows,
    )
    report(error, named_row, row_errors(len(lm_head_weight)))
    return compose(nll, entropy, correct, shape, flat, entropy_weight, weight, gate, reduction)


# --- the head and the loss, chunk by chunk ------------------------------------------------------

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _chunks(
    hidden: Tensor, head: Tensor, active: Tensor, softcap: float, chunk_rows: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Of the active rows, in pieces: indices, hidden states, and logits, all in the same memory."""
    at = active.nonzero()[:, 0]
    memory = hidden.new_empty((min(chunk_rows, len(at)), len(head)))
    for begin in range(0, len(at), chunk_rows):
        rows = at[begin : begin + chunk_rows]
        own, logits = hidden[rows], memory[: len(rows)]
        torch.mm(own, head.T, out=logits)
        if softcap:
            logits.div_(softcap).tanh_().mul_(softcap)
        yield rows, own, logits


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total (m, n) += a (m, k) @ b (k, n), where `total` may be float32 and the others of 16 bits."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        # cuBLAS adds to the float32 sum: the product is neither rounded nor stored. `addmm` refuses
        # a float32 sum in some releases; `baddbmm`, of a batch of one, takes it in all.
        batch = total[None]
        torch.ops.aten.baddbmm.dtype_out(batch, a[None], b[None], total.dtype, out=batch)
    else:
        total += a @ b


@torch.library.custom_op("dparallel::linear_certainty_forcing_loss", mutates_args=())
def _linear(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    active: Tensor,
    temperature: float,
    ce_temperature: float,
    softcap: float,
    chunk_rows: int,
) -> Outputs:
    n, real = len(labels), real_dtype(hidden)
    nll, entropy = (hidden.new_zeros(n, dtype=real) for _ in range(2))
    correct = active.new_zeros(n)
    saved = hidden.new_zeros((n, 4), dtype=real)
    error = labels.new_full((n,), NO_ERROR)
    for rows, _, logits in _chunks(hidden, head, active, softcap, chunk_rows):
        one = active.new_ones(len(rows))
        out = torch.ops.dparallel.certainty_forcing_loss(
            logits, labels[rows], one, temperature, ce_temperature
        )
        for field, part in zip((nll, entropy, correct, saved), out, strict=False):
            field[rows] = part
        # Rows are numbered within the chunk there: row * 4 + code.
        error[rows] = torch.where(out[4] == NO_ERROR, out[4], rows * 4 + out[4] % 4)
    return nll, entropy, correct, saved, error


@_linear.register_fake
def _(  # type: ignore[no-untyped-def]
    hidden, head, labels, active, temperature, ce_temperature, softcap, chunk_rows
):
    n, real = labels.shape[0], real_dtype(hidden)
    return (
        hidden.new_empty((n,), dtype=real),
        hidden.new_empty((n,), dtype=real),
        hidden.new_empty((n,), dtype=torch.bool),
        hidden.new_empty((n, 4), dtype=real),
        labels.new_empty((n,)),
    )


@torch.library.custom_op("dparallel::linear_certainty_forcing_loss_backward", mutates_args=())
def _linear_backward(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    active: Tensor,
    temperature: float,
    ce_temperature: float,
    softcap: float,
    chunk_rows: int,
    saved: Tensor,
    grad_nll: Tensor,
    grad_entropy: Tensor,
    head_needs_grad: bool,
) -> tuple[Tensor, Tensor]:
    grad = torch.zeros_like(hidden)
    # Over many chunks, 16 bits would lose the small ones.
    grad_head = torch.zeros(
        head.shape if head_needs_grad else (0,), dtype=real_dtype(head), device=head.device
    )
    for rows, own, logits in _chunks(hidden, head, active, softcap, chunk_rows):
        one = active.new_ones(len(rows))
        slope_of_cap = (logits / softcap).square_().neg_().add_(1) if softcap else None
        torch.ops.dparallel.certainty_forcing_loss_backward_(
            logits,
            labels[rows],
            one,
            temperature,
            ce_temperature,
            saved[rows],
            grad_nll[rows],
            grad_entropy[rows],
        )
        gradient = logits  # now
        if slope_of_cap is not None:
            gradient *= slope_of_cap
        grad[rows] = gradient @ head
        if head_needs_grad:
            add_product(grad_head, gradient.T, own)
    return grad, grad_head.to(head.dtype)


@_linear_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    hidden, head, labels, active, temperature, ce_temperature, softcap, chunk_rows,
    saved, grad_nll, grad_entropy, head_needs_grad,
):  # fmt: skip
    return torch.empty_like(hidden), head.new_empty(head.shape if head_needs_grad else (0,))


def _linear_save(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    hidden, head, labels, active, *ctx.settings = inputs
    ctx.save_for_backward(hidden, head, labels, active, output[3])
    ctx.mark_non_differentiable(output[2], output[3], output[4])


def _linear_gradient(ctx: Any, grad_nll: Tensor, grad_entropy: Tensor, *_: Any) -> tuple[Any, ...]:
    hidden, head, labels, active, saved = ctx.saved_tensors
    needed = ctx.needs_input_grad[1]
    with torch.autocast(hidden.device.type, enabled=False):  # the dtypes are those of the forward pass
        grad, grad_head = torch.ops.dparallel.linear_certainty_forcing_loss_backward(
            hidden, head, labels, active, *ctx.settings, saved, grad_nll, grad_entropy, needed
        )
    return grad, grad_head if needed else None, None, None, None, None, None, None


_linear.register_autograd(_linear_gradient, setup_context=_linear_save)
