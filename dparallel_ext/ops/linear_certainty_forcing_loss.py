"""The certainty-forcing loss from the hidden states: the head and the loss, chunk by chunk."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..types import NO_ERROR, CertaintyForcingLossOutput
from .certainty_forcing_loss import (
    check_loss_inputs,
    check_loss_settings,
    compose,
    real_dtype,
    row_errors,
)
from .errors import named_row, report
from .fake import register_fake
from .head import HeadGradient, check_head, check_softcap, chunks, rows_of_chunk, slope_of
from .kernel import kernel
from .loss_gradient import register_head_gradient

_certainty_forcing_loss = kernel("certainty_forcing_loss")
_certainty_forcing_loss_backward_ = kernel("certainty_forcing_loss_backward_")


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
    writes their gradient over them, so that only one chunk (two with a soft cap) and the gradient of the
    hidden states are held. Each active row costs three matrix products, and a fourth if the head is
    trainable.

    Under `torch.autocast` the head multiplies in autocast's dtype, as a linear layer does.

    Args:
        hidden: (..., H) float32, bfloat16, float16 or float64, after the final norm.
        lm_head_weight: (V, H), same dtype. It gets a gradient only if it requires one.
        labels, active, weight, gate: (...), as in `certainty_forcing_loss`, like all arguments not named
            here.
        softcap: logits become softcap * tanh(logits / softcap).
        shift: the label at position t belongs to the hidden state at t - 1 (Dream), of hidden (..., T, H);
            the first position of a sequence has no hidden state and is left out, as published.
        chunk_rows: active rows per chunk; default: at most 32 MB of logits on the CPU, 256 MB on a GPU,
            and a multiple of 128 rows if that many fit.

    Returns:
        CertaintyForcingLossOutput, fields in the shape of `labels`.

    Raises:
        ValueError: as `certainty_forcing_loss`.
        TypeError: naming an argument that should be a tensor and is not.
    """
    hidden, lm_head_weight = check_head(hidden, lm_head_weight, "hidden", "lm_head_weight")
    check_loss_inputs(hidden, labels, active, weight, gate, "hidden")
    check_loss_settings(temperature, ce_temperature, entropy_weight, reduction)
    cap, chunk_rows = check_softcap(softcap), rows_of_chunk(chunk_rows, lm_head_weight)
    shape, counted = labels.shape, active
    if shift:
        if labels.ndim < 1:
            raise ValueError(f"shift: expected hidden (..., T, H), got {tuple(hidden.shape)}")
        # Each position gets the hidden state before it; the first keeps its own, but does not count.
        hidden = torch.cat((hidden[..., :1, :], hidden[..., :-1, :]), -2)
        counted = active.clone()
        counted[..., :1] = False
    flat = counted.reshape(-1)
    nll, entropy, correct, _, error = torch.ops.dparallel.linear_certainty_forcing_loss(
        hidden.reshape(-1, hidden.shape[-1]),
        lm_head_weight,
        labels.reshape(-1).to(torch.int64),
        flat,
        float(temperature),
        float(ce_temperature),
        cap,
        chunk_rows,
    )
    report(error, named_row, row_errors(len(lm_head_weight)))
    return compose(nll, entropy, correct, shape, flat, entropy_weight, weight, gate, reduction)


# --- the head and the loss, chunk by chunk ------------------------------------------------------

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


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
    for rows, _, logits in chunks(hidden, head, active, softcap, chunk_rows):
        all_active = active.new_ones(len(rows))
        out = _certainty_forcing_loss(logits, labels[rows], all_active, temperature, ce_temperature)
        for field, part in zip((nll, entropy, correct, saved), out, strict=False):
            field[rows] = part
        # The op numbers rows within the chunk: row * 4 + code.
        error[rows] = torch.where(out[4] == NO_ERROR, out[4], rows * 4 + out[4] % 4)
    return nll, entropy, correct, saved, error


@register_fake("linear_certainty_forcing_loss")
def _(hidden: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
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
    total = HeadGradient(hidden, head, head_needs_grad)
    for rows, states, logits in chunks(hidden, head, active, softcap, chunk_rows):
        all_active = active.new_ones(len(rows))
        slope = slope_of(softcap, logits)
        _certainty_forcing_loss_backward_(
            logits,
            labels[rows],
            all_active,
            temperature,
            ce_temperature,
            saved[rows],
            grad_nll[rows],
            grad_entropy[rows],
        )
        total.add(rows, states, logits, slope)  # `logits` now holds their gradient
    return total.result()


register_fake("linear_certainty_forcing_loss_backward")(HeadGradient.fake)


register_head_gradient("linear_certainty_forcing_loss", tensors=4, terms=2)
