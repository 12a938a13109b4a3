"""The certainty-forcing loss of dParallel (arXiv 2509.26488).

Two compiled passes over the active rows of the logits, forward and backward. Between them torch computes
gate, weights and normalisation, from a few numbers per row.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from ..arguments import check_tensor, described, number, one_of, shown
from ..types import CertaintyForcingLossOutput
from .errors import named_row, report
from .fake import register_fake
from .inputs import WIDE_DTYPES, check_logits, refuse_transform, rows_view
from .kernel import kernel
from .loss_gradient import register_gradient

_certainty_forcing_loss = kernel("certainty_forcing_loss")


def row_errors(vocabulary: int) -> dict[int, str]:
    """The texts of the errors of rows, see `errors.explain`. vocabulary: ids that labels may have."""
    return {
        1: "logits: {} holds NaN",
        2: "logits: {} has no logit above -inf",
        3: f"labels: {{}} is active, but its label is no id in [0, {vocabulary}); rows to be ignored (-100) "
        "belong out of `active`",
    }


def certainty_forcing_loss(
    logits: Tensor,
    labels: Tensor,
    active: Tensor,
    *,
    temperature: float = 0.5,
    entropy_weight: float = 2.0,
    ce_temperature: float = 1.0,
    weight: Tensor | None = None,
    gate: Literal["correct", "all"] | Tensor = "correct",
    reduction: Literal["mean", "sum"] = "mean",
    inplace: bool = False,
) -> CertaintyForcingLossOutput:
    """Cross entropy of the active rows, plus `entropy_weight` times the entropy of the gated ones (dParallel,
    arXiv 2509.26488).

    As published: loss = sum(nll) / |active| + entropy_weight * sum(entropy of gated) / |gated|; a term
    without rows is 0. The published objective adds the loss for the complementary mask: call this twice. Only
    active rows are read, once forward and once backward; at temperature = ce_temperature / 2 one exponential
    serves both terms.

    Args:
        logits: (..., V) float32, bfloat16, float16 or float64, any V; sums are float32 or better. +inf
            counts as the largest float32.
        labels: (...) int64 or int32; labels of rows that are not active may be anything, such as -100.
        active: (...) bool, the rows that the loss is taken over: the masked tokens of the active block.
        temperature: of the entropy term, from 1e-5 to 1e5.
        entropy_weight: beta, 2 for LLaDA and 1 for Dream as published. 0 is cross entropy alone.
        ce_temperature: of the cross entropy, from 1e-5 to 1e5.
        weight: (...) floating point, multiplies each row's nll and entropy, as in d3LLM; the denominators
            stay counts.
        gate: the rows whose entropy counts: "correct", the active rows whose argmax is the label (published);
            "all" active rows; or a bool (...) of your own. No gradient passes through it.
        reduction: "mean" as above; "sum" leaves out the denominators, for a caller who normalises by the
            counts of all micro-batches or ranks.
        inplace: write the gradient over the logits, whose values are lost, and allocate no memory for it. Any
            other op that needs the logits for its gradient (a soft cap, a second call of this loss) then
            raises autograd's RuntimeError. Ignored under torch.compile, which plans memory itself.

    Returns:
        CertaintyForcingLossOutput.

    Raises:
        ValueError: naming the argument that does not fit; and for an active row that holds NaN, has
            no logit above -inf, or whose label is not in [0, V): on the CPU at once, on CUDA from
            `check_errors`; until then its nll and entropy are NaN.
        TypeError: naming an argument that should be a tensor and is not.
    """
    check_logits(logits, wide=True)
    check_loss_inputs(logits, labels, active, weight, gate, "logits")
    check_loss_settings(temperature, ce_temperature, entropy_weight, reduction)
    inplace = inplace and logits.requires_grad and not torch.compiler.is_compiling()
    if inplace:
        check_inplace(logits)
    flat = rows_view(logits)
    active = active.reshape(-1)
    nll, entropy, correct, _, error = _certainty_forcing_loss(
        flat,
        labels.reshape(-1).to(torch.int64),
        active,
        float(temperature),
        float(ce_temperature),
        inplace,
    )
    report(error, named_row, row_errors(logits.shape[-1]))
    return compose(nll, entropy, correct, labels.shape, active, entropy_weight, weight, gate, reduction)


def compose(
    nll: Tensor,
    entropy: Tensor,
    correct: Tensor,
    shape: torch.Size,
    active: Tensor,
    entropy_weight: float,
    weight: Tensor | None,
    gate: str | Tensor,
    reduction: str,
) -> CertaintyForcingLossOutput:
    """The loss from each row's nll, entropy and correctness (N,)."""
    gated = correct if gate == "correct" else active
    if isinstance(gate, Tensor):
        gated = active & gate.reshape(-1)
    weights = 1.0 if weight is None else weight.reshape(-1).to(nll.dtype)
    ce, certainty = (nll * weights).sum(), (entropy * weights * gated).sum()
    if reduction == "mean":
        ce = ce / active.sum().clamp(min=1)
        certainty = certainty / gated.sum().clamp(min=1)
    loss = ce + float(entropy_weight) * certainty
    return CertaintyForcingLossOutput(loss, nll.view(shape), entropy.view(shape), correct.view(shape))


def check_loss_settings(
    temperature: float, ce_temperature: float, entropy_weight: float, reduction: str
) -> None:
    """Raise ValueError naming the number, or the reduction, that does not fit."""
    number("entropy_weight", entropy_weight, -math.inf)
    check_temperature("temperature", temperature)
    check_temperature("ce_temperature", ce_temperature)
    one_of("reduction", reduction, ("mean", "sum"))


def check_temperature(name: str, value: float) -> None:
    """Raise ValueError unless the value is a number from 1e-5 to 1e5."""
    # float32 has to hold its square and the reciprocal of the square.
    if not 1e-5 <= number(name, value) <= 1e5:
        raise ValueError(f"{name}: expected a number from 1e-5 to 1e5, got {value!r}")


def check_inplace(logits: Tensor) -> None:
    """Raise ValueError for logits that are a leaf, over which no gradient may be written."""
    base = logits if logits._base is None else logits._base
    if base.is_leaf and base.requires_grad:
        raise ValueError("inplace: expected the output of an op as logits, got a leaf that requires grad")


def check_loss_inputs(
    like: Tensor, labels: Tensor, active: Tensor, weight: Any, gate: Any, name_of: str
) -> None:
    """Raise unless labels, active, weight and gate fit the rows of `like` (..., width), the argument
    `name_of`."""
    wanted: list[tuple[str, Any, tuple[torch.dtype, ...]]] = [
        ("labels", labels, (torch.int64, torch.int32)),
        ("active", active, (torch.bool,)),
    ]
    if weight is not None:
        wanted.append(("weight", weight, WIDE_DTYPES))
    if isinstance(gate, Tensor):
        wanted.append(("gate", gate, (torch.bool,)))
    elif not isinstance(gate, str) or gate not in ("correct", "all"):
        raise ValueError(f"gate: expected 'correct', 'all' or a bool Tensor, got {shown(gate)}")
    for name, value, allowed in wanted:
        check_of_rows(name, value, allowed, like, name_of)


def check_of_rows(
    name: str, value: Any, allowed: tuple[torch.dtype, ...], like: Tensor, name_of: str
) -> None:
    """Raise unless `value` has an entry of an allowed dtype for each row of `like` (..., width), and is under
    no transform of torch.func."""
    rows, is_tensor = like.shape[:-1], isinstance(value, Tensor)
    if is_tensor:
        refuse_transform(name, value)
        check_tensor(name, value)
    if not is_tensor or value.dtype not in allowed or value.shape != rows:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        kinds = "floating point" if allowed == WIDE_DTYPES else names
        raise ValueError(f"{name}: expected {kinds} {tuple(rows)} matching {name_of}, got {described(value)}")
    if value.device != like.device:
        raise ValueError(f"{name}: expected on {like.device} as {name_of}, got {value.device}")


# --- fake kernels and the gradient --------------------------------------------------------------


def real_dtype(logits: Tensor) -> torch.dtype:
    """The dtype of the numbers of rows: float64 for float64 logits, else float32."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


@register_fake("certainty_forcing_loss")
def _(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    n, real = labels.shape[0], real_dtype(logits)
    return (
        logits.new_empty((n,), dtype=real),
        logits.new_empty((n,), dtype=real),
        logits.new_empty((n,), dtype=torch.bool),
        logits.new_empty((n, 4), dtype=real),
        logits.new_empty((n,), dtype=torch.int64),
    )


@register_fake("certainty_forcing_loss_backward")
def _(logits: Tensor) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@register_fake("certainty_forcing_loss_backward_")
def _() -> None:
    return None


register_gradient("certainty_forcing_loss", terms=2)
