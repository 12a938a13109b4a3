"""The distillation loss from the hidden states: both heads and the divergence, chunk by chunk."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..arguments import described
from ..types import NO_ERROR
from .certainty_forcing_loss import real_dtype
from .distillation_loss import ROW_ERRORS, check_divergence, named_pair, read_rows, reduced
from .errors import report
from .fake import register_fake
from .head import HeadGradient, check_head, check_softcap, chunks, rows_of_chunk, slope_of
from .kernel import kernel
from .loss_gradient import register_head_gradient

_distillation_loss = kernel("distillation_loss")
_distillation_loss_backward_ = kernel("distillation_loss_backward_")


def linear_distillation_loss(
    hidden: Tensor,
    lm_head_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_lm_head_weight: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    temperature: float = 1.0,
    kl_weight: float = 1.0,
    l1_weight: float = 0.0,
    reduction: Literal["sum", "none"] = "sum",
    softcap: float | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """`distillation_loss` of hidden @ lm_head_weight.T and of the teacher's logits, which never exist all at
    once.

    Both heads are applied to chunks of the rows whose weight is not 0; the backward pass computes each
    chunk's logits again and writes the student's gradient over its logits. Only two chunks of logits (three
    with a soft cap) and the gradient of the hidden states are held. Each row costs five matrix products, and
    a sixth if the head is trainable.

    Under `torch.autocast` the heads multiply in autocast's dtype, as a linear layer does.

    A step of distillation, with the mean over the `active` positions:

        with torch.no_grad():
            theirs = teacher.hidden(ids)
        loss = dx.linear_distillation_loss(
            student.hidden(ids), student.lm_head.weight, theirs, teacher.lm_head.weight,
            weight=active / active.sum(),
        )

    Args:
        hidden: (..., H) float32, bfloat16, float16 or float64, the student's hidden states after the final
            norm.
        lm_head_weight: (V, H), same dtype. It gets a gradient only if it requires one.
        teacher_hidden: (..., H') same dtype, the teacher's for the same rows. No gradient passes through it.
        teacher_lm_head_weight: (V, H'), same dtype, without a gradient; default: the values of
            lm_head_weight.
        weight, temperature, kl_weight, l1_weight, reduction: as in `distillation_loss`.
        softcap: both models' logits become softcap * tanh(logits / softcap).
        chunk_rows: rows per chunk; default: at most 32 MB of logits each on the CPU, 256 MB on a GPU, and a
            multiple of 128 rows if that many fit.

    Returns:
        () or (...) float32 (float64 for float64 inputs), as `distillation_loss`.

    Raises:
        ValueError: as `distillation_loss`.
        TypeError: naming an argument that should be a tensor and is not.
    """
    own_head = teacher_lm_head_weight is None
    other_head = lm_head_weight if teacher_lm_head_weight is None else teacher_lm_head_weight
    head_name = "lm_head_weight" if own_head else "teacher_lm_head_weight"
    hidden, lm_head_weight = check_head(hidden, lm_head_weight, "hidden", "lm_head_weight")
    teacher_hidden, other_head = check_head(teacher_hidden, other_head, "teacher_hidden", head_name)
    if (
        teacher_hidden.shape[:-1] != hidden.shape[:-1]
        or teacher_hidden.dtype != hidden.dtype
        or teacher_hidden.device != hidden.device
    ):
        raise ValueError(
            f"teacher_hidden: expected {hidden.dtype} {(*hidden.shape[:-1], teacher_hidden.shape[-1])} "
            f"on {hidden.device} as hidden, got {described(teacher_hidden)} on "
            f"{teacher_hidden.device}"
        )
    if len(other_head) != len(lm_head_weight):
        raise ValueError(
            f"teacher_lm_head_weight: expected {len(lm_head_weight)} rows as lm_head_weight, "
            f"got {len(other_head)}"
        )
    settings = check_divergence(hidden, "hidden", weight, temperature, kl_weight, l1_weight, reduction)
    cap, chunk_rows = check_softcap(softcap), rows_of_chunk(chunk_rows, lm_head_weight)
    divergence, _, error = torch.ops.dparallel.linear_distillation_loss(
        hidden.reshape(-1, hidden.shape[-1]),
        lm_head_weight,
        teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1]),
        other_head.detach(),
        read_rows(hidden, weight),
        *settings,
        cap,
        chunk_rows,
    )
    report(error, named_pair, ROW_ERRORS)
    return reduced(divergence, hidden.shape[:-1], weight, reduction)


# --- both heads and the loss, chunk by chunk ----------------------------------------------------

Outputs = tuple[Tensor, Tensor, Tensor]


@torch.library.custom_op("dparallel::linear_distillation_loss", mutates_args=())
def _linear(
    hidden: Tensor,
    head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    active: Tensor,
    temperature: float,
    kl_weight: float,
    l1_weight: float,
    softcap: float,
    chunk_rows: int,
) -> Outputs:
    n, real = len(active), real_dtype(hidden)
    divergence, saved = hidden.new_zeros(n, dtype=real), hidden.new_zeros((n, 6), dtype=real)
    error = torch.full((n,), NO_ERROR, device=active.device)
    settings = temperature, kl_weight, l1_weight
    students = chunks(hidden, head, active, softcap, chunk_rows)
    teachers = chunks(teacher_hidden, teacher_head, active, softcap, chunk_rows)
    for (rows, _, student), (_, _, teacher) in zip(students, teachers, strict=True):
        all_active = active.new_ones(len(rows))
        out = _distillation_loss(student, teacher, all_active, *settings)
        divergence[rows], saved[rows] = out[0], out[1]
        # The op numbers rows within the chunk: (2 row + (0 student, 1 teacher)) * 4 + code.
        error[rows] = torch.where(out[2] == NO_ERROR, out[2], rows * 8 + out[2] % 8)
    return divergence, saved, error


@register_fake("linear_distillation_loss")
def _(hidden: Tensor, active: Tensor) -> tuple[Tensor, ...]:
    n, real = active.shape[0], real_dtype(hidden)
    return (
        hidden.new_empty((n,), dtype=real),
        hidden.new_empty((n, 6), dtype=real),
        active.new_empty((n,), dtype=torch.int64),
    )


@torch.library.custom_op("dparallel::linear_distillation_loss_backward", mutates_args=())
def _linear_backward(
    hidden: Tensor,
    head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    active: Tensor,
    temperature: float,
    kl_weight: float,
    l1_weight: float,
    softcap: float,
    chunk_rows: int,
    saved: Tensor,
    grad_divergence: Tensor,
    head_needs_grad: bool,
) -> tuple[Tensor, Tensor]:
    total, settings = HeadGradient(hidden, head, head_needs_grad), (temperature, kl_weight, l1_weight)
    students = chunks(hidden, head, active, softcap, chunk_rows)
    teachers = chunks(teacher_hidden, teacher_head, active, softcap, chunk_rows)
    for (rows, states, student), (_, _, teacher) in zip(students, teachers, strict=True):
        all_active, slope = active.new_ones(len(rows)), slope_of(softcap, student)
        _distillation_loss_backward_(
            student, teacher, all_active, *settings, saved[rows], grad_divergence[rows]
        )
        total.add(rows, states, student, slope)  # `student` now holds the gradient of its logits
    return total.result()


register_fake("linear_distillation_loss_backward")(HeadGradient.fake)


register_head_gradient("linear_distillation_loss", tensors=5, terms=1)
