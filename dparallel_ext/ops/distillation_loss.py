"""The divergence of a student's distribution from a teacher's, over whole rows of logits.

Two compiled passes over both rows, forward and backward, and one more forward if the L1 distance counts.
Torch computes weights and sums, from a few numbers per row.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ..arguments import described, number, one_of
from .certainty_forcing_loss import check_inplace, check_of_rows, check_temperature, real_dtype
from .errors import report
from .fake import register_fake
from .inputs import WIDE_DTYPES, check_logits, rows_view
from .kernel import kernel
from .loss_gradient import register_gradient

_distillation_loss = kernel("distillation_loss")

ROW_ERRORS = {
    1: "{} holds NaN",
    2: "{} has no logit above -inf",
    3: "{} gives no probability (-inf, or 1e29 below its maximum) to an id to which the teacher gives some: "
    "the divergence is infinite",
}


def named_pair(at: int) -> str:
    """Names a row of the student's (even numbers) or the teacher's (odd)."""
    return f"{'teacher' if at % 2 else 'student'}: row {at // 2}"


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    weight: Tensor | None = None,
    temperature: float = 1.0,
    kl_weight: float = 1.0,
    l1_weight: float = 0.0,
    reduction: Literal["sum", "none"] = "sum",
    inplace: bool = False,
) -> Tensor:
    """The weighted sum over rows of a divergence between the teacher's and the student's distribution.

    With a row's p = softmax(teacher / temperature), q = softmax(student / temperature) and weight w:

        loss = sum over rows of w (kl_weight KL + l1_weight L1)
        KL = sum_j p_j (ln p_j - ln q_j)          L1 = sum_j |p_j - q_j|
        d loss / d student_j = w / temperature (kl_weight (q_j - p_j)
                               + l1_weight q_j (s_j - sum_i s_i q_i)),   s_j = sign(q_j - p_j)

    KL is Hinton's distillation (arXiv 1503.02531; multiply by temperature^2 to keep the size of its gradient,
    as there), the loss of PPD's prompt tokens (2405.18628, w = 0.8^distance) and of AdaDecode's intermediate
    heads (2506.03700). L1, twice the total variation, is 2 minus twice the probability that speculative
    sampling accepts the student's token, and the loss of DSpark (2607.05147).

    Both rows are read once forward, once more where l1_weight is above 0, and once backward. Sums are float32
    or better, relative to the maximum. Equal rows have exactly the loss 0 and the gradient 0.

    Args:
        student: (..., V) float32, bfloat16, float16 or float64, any V.
        teacher: (..., V) of the same shape and dtype. No gradient passes through it.
        weight: (...) floating point, each row's weight; default: 1. A row whose weight is 0 is not read.
        temperature: of both softmaxes, from 1e-5 to 1e5.
        kl_weight: a number >= 0.
        l1_weight: a number >= 0.
        reduction: "sum" as above; "none": each row's term of the sum, (...). For a mean, use weights that add
            up to 1.
        inplace: write the gradient over the student's logits, whose values are lost, as in
            `certainty_forcing_loss`. Ignored if the teacher shares the student's storage, and under
            torch.compile.

    Returns:
        () or (...) float32 (float64 for float64 logits).

    Raises:
        ValueError: naming the argument that does not fit; and for a row that holds NaN or has no logit above
            -inf, or, if kl_weight is above 0, whose student gives no probability (-inf, or 1e29 below the
            row's maximum) to an id to which the teacher gives some: on the CPU at once, on CUDA from
            `check_errors`; until then the row's divergence is NaN. An id to which the teacher gives no
            probability, such as a suppressed one, adds nothing.
        TypeError: naming an argument that should be a tensor and is not.
    """
    check_logits(student, "student", wide=True)
    check_logits(teacher, "teacher", wide=True)
    if teacher.shape != student.shape or teacher.dtype != student.dtype or teacher.device != student.device:
        raise ValueError(
            f"teacher: expected {student.dtype} {tuple(student.shape)} on {student.device} as the student, "
            f"got {described(teacher)} on {teacher.device}"
        )
    settings = check_divergence(student, "student", weight, temperature, kl_weight, l1_weight, reduction)
    inplace = inplace and student.requires_grad and not torch.compiler.is_compiling()
    if inplace:
        check_inplace(student)
        inplace = teacher.untyped_storage().data_ptr() != student.untyped_storage().data_ptr()
    rows = student.shape[:-1]
    divergence, _, error = _distillation_loss(
        rows_view(student), rows_view(teacher.detach()), read_rows(student, weight), *settings, inplace
    )
    report(error, named_pair, ROW_ERRORS)
    return reduced(divergence, rows, weight, reduction)


def reduced(divergence: Tensor, rows: torch.Size, weight: Tensor | None, reduction: str) -> Tensor:
    """The loss, or each row's term of it, from the divergence of each row (N,)."""
    if weight is not None:
        divergence = divergence * weight.reshape(-1).to(divergence.dtype)
    return divergence.sum() if reduction == "sum" else divergence.view(rows)


def read_rows(like: Tensor, weight: Tensor | None) -> Tensor:
    """bool (N,): the rows of `like` (..., width) that count."""
    if weight is None:
        return torch.ones(like.shape[:-1].numel(), dtype=torch.bool, device=like.device)
    return weight.detach().reshape(-1) != 0


# --- checks -------------------------------------------------------------------------------------


def check_divergence(
    like: Tensor,
    name_of: str,
    weight: Any,
    temperature: float,
    kl_weight: float,
    l1_weight: float,
    reduction: str,
) -> tuple[float, float, float]:
    """Temperature, kl_weight and l1_weight as floats. Raises ValueError naming the argument that does not
    fit.
    """
    if weight is not None:
        check_of_rows("weight", weight, WIDE_DTYPES, like, name_of)
    check_temperature("temperature", temperature)
    one_of("reduction", reduction, ("sum", "none"))
    return float(temperature), number("kl_weight", kl_weight), number("l1_weight", l1_weight)


# --- fake kernels and the gradient --------------------------------------------------------------


@register_fake("distillation_loss")
def _(student: Tensor, active: Tensor) -> tuple[Tensor, ...]:
    n, real = active.shape[0], real_dtype(student)
    return (
        student.new_empty((n,), dtype=real),
        student.new_empty((n, 6), dtype=real),
        student.new_empty((n,), dtype=torch.int64),
    )


@register_fake("distillation_loss_backward")
def _(student: Tensor) -> Tensor:
    return torch.empty_like(student, memory_format=torch.contiguous_format)


@register_fake("distillation_loss_backward_")
def _() -> None:
    return None


register_gradient("distillation_loss", terms=1)
