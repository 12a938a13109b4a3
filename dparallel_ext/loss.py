"""The certainty-forcing loss of dParallel (arXiv 2509.26488).

Two compiled passes over the active rows of the logits, forward and backward; everything between (gate,
weights, normalisation) is a few numbers per row, and torch's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from . import _C  # noqa: F401  (registers the ops)
from .arguments import whole
from .ops import NO_ERROR, _report, _rows_view, named_row

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _errors(vocabulary: int) -> dict[int, str]:
    return {
        1: "logits: {} holds NaN",
        2: "logits: {} has no logit above -inf",
        3: f"labels: {{}} is active, but its label is no id in [0, {vocabulary}); rows to be ignored (-100) "
        "belong out of `active`",
    }


class CertaintyForcingLoss(NamedTuple):
    """What `certainty_forcing_loss` returns; the per-row fields have the shape of `labels`.

    Rows that are not active are 0 and False. `loss`, `nll` and `entropy` carry gradients.
    """

    loss: Tensor
    """() float32 (float64 of float64 logits)."""
    nll: Tensor
    """float32: -log softmax(z / ce_temperature)[label]."""
    entropy: Tensor
    """float32: of softmax(z / temperature), in nats."""
    correct: Tensor
    """bool: whether the argmax (ties to the lowest id) is the label."""


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
) -> CertaintyForcingLoss:
    """Cross entropy of the active rows, plus `entropy_weight` times the entropy of those that pass the gate.

    As published: loss = sum(nll) / |active| + entropy_weight * sum(entropy of gated) / |gated|, and 0 for a
    share that has no row. The published objective adds the same for the complementary mask: call it
    twice. Only active rows are read, once forward and once backward; at temperature = ce_temperature / 2
    one exponential serves both terms.

    Args:
        logits: (..., V) float32, bfloat16, float16 or float64, any V; sums are float32 or better.
        labels: (...) int64 or int32; those of rows that are not active may be anything, -100 included.
        active: (...) bool, the rows the loss is of: the masked tokens of the active block.
        temperature: of the entropy term, from 1e-5 to 1e5.
        entropy_weight: beta, 2 for LLaDA and 1 for Dream as published. 0 is cross entropy alone.
        ce_temperature: of the cross entropy, from 1e-5 to 1e5.
        weight: (...) float, of each row's nll and entropy, as in d3LLM; the denominators stay counts.
        gate: whose entropy counts: "correct", the active rows whose argmax is the label (published);
            "all" active rows; or a bool (...) of your own. No gradient passes through it.
        reduction: "mean" as above, or "sum": sums instead, so that a caller who knows the counts of all
            micro-batches or ranks can normalise.
        inplace: the backward pass writes the gradient over the logits, whose values are lost, instead of
            into as much memory again. Whatever else needs them for its own gradient (a soft cap, this
            loss taken twice) then raises autograd's RuntimeError. Under torch.compile, which plans
            memory itself, nothing is written over.

    Returns:
        CertaintyForcingLoss.

    Raises:
        ValueError: naming the argument that does not fit; and for an active row that holds NaN, has
            no logit above -inf, or whose label is not in [0, V): on the CPU at once, on CUDA from
            `check_errors`, until when its nll and entropy are NaN.
    """
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits: expected a Tensor, got {type(logits).__name__}")
    if logits.dtype not in _DTYPES:
        raise ValueError(f"logits: expected float32, bfloat16, float16 or float64, got {logits.dtype}")
    if logits.ndim < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits: expected (..., V) with V >= 1, got {tuple(logits.shape)}")
    _check_rows(logits, labels, active, weight, gate, "logits")
    _check_settings(temperature, ce_temperature, reduction)
    inplace = inplace and logits.requires_grad and not torch.compiler.is_compiling()
    if inplace:
        _check_inplace(logits)
    flat = _rows_view(logits)
    active = active.reshape(-1)
    nll, entropy, correct, _, error = torch.ops.dparallel.certainty_forcing_loss(
        flat,
        labels.reshape(-1).to(torch.int64),
        active,
        float(temperature),
        float(ce_temperature),
        inplace,
    )
    _report(error, named_row, _errors(logits.shape[-1]))
    return _compose(nll, entropy, correct, labels.shape, active, entropy_weight, weight, gate, reduction)


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
) -> CertaintyForcingLoss:
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
        CertaintyForcingLoss, its fields in the place of the labels.

    Raises:
        ValueError: as `certainty_forcing_loss`.
    """
    if hidden.ndim < 1 or hidden.dtype not in _DTYPES:
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
    _check_rows(hidden, labels, active, weight, gate, "hidden")
    _check_settings(temperature, ce_temperature, reduction)
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
    _report(error, named_row, _errors(len(lm_head_weight)))
    return _compose(nll, entropy, correct, shape, flat, entropy_weight, weight, gate, reduction)


def _compose(
    nll: Tensor,
    entropy: Tensor,
    correct: Tensor,
    shape: torch.Size,
    active: Tensor,
    entropy_weight: float,
    weight: Tensor | None,
    gate: str | Tensor,
    reduction: str,
) -> CertaintyForcingLoss:
    """The loss from what is known of each row (N,)."""
    gated = correct if gate == "correct" else active
    if isinstance(gate, Tensor):
        gated = active & gate.reshape(-1)
    own = 1.0 if weight is None else weight.reshape(-1).to(nll.dtype)
    ce, certainty = (nll * own).sum(), (entropy * own * gated).sum()
    if reduction == "mean":
        ce = ce / active.sum().clamp(min=1)
        certainty = certainty / gated.sum().clamp(min=1)
    loss = ce + entropy_weight * certainty
    return CertaintyForcingLoss(loss, nll.view(shape), entropy.view(shape), correct.view(shape))


def _check_settings(temperature: float, ce_temperature: float, reduction: str) -> None:
    for name, value in (("temperature", temperature), ("ce_temperature", ce_temperature)):
        if not 1e-5 <= value <= 1e5:  # its square and the reciprocal of that are to be float32
            raise ValueError(f"{name}: expected a number from 1e-5 to 1e5, got {value!r}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction: expected 'mean' or 'sum', got {reduction!r}")


def _check_inplace(logits: Tensor) -> None:
    base = logits if logits._base is None else logits._base
    if base.is_leaf and base.requires_grad:
        raise ValueError("inplace: expected logits that an op has made, got a leaf that requires grad")


def _check_rows(like: Tensor, labels: Tensor, active: Tensor, weight: Any, gate: Any, name_of: str) -> None:
    rows = like.shape[:-1]
    wanted: list[tuple[str, Any, tuple[torch.dtype, ...]]] = [
        ("labels", labels, (torch.int64, torch.int32)),
        ("active", active, (torch.bool,)),
    ]
    if weight is not None:
        wanted.append(("weight", weight, _DTYPES))
    if isinstance(gate, Tensor):
        wanted.append(("gate", gate, (torch.bool,)))
    elif gate not in ("correct", "all"):
        raise ValueError(f"gate: expected 'correct', 'all' or a bool Tensor, got {gate!r}")
    for name, value, allowed in wanted:
        if not isinstance(value, Tensor) or value.dtype not in allowed or value.shape != rows:
            got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            kinds = "floating point" if name == "weight" else str(allowed[0]).removeprefix("torch.")
            raise ValueError(f"{name}: expected {kinds} {tuple(rows)} matching {name_of}, got {got}")
        if value.device != like.device:
            raise ValueError(f"{name}: expected on {like.device} as {name_of}, got {value.device}")


# --- fake kernels and the gradient --------------------------------------------------------------


def _real(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


@torch.library.register_fake("dparallel::certainty_forcing_loss")
def _(logits, labels, active, temperature, ce_temperature, inplace=False):  # type: ignore[no-untyped-def]
    n, real = labels.shape[0], _real(logits)
    return (
        logits.new_empty((n,), dtype=real),
        logits.new_empty((n,), dtype=real),
        logits.new_empty((n,), dtype=torch.bool),
        logits.new_empty((n, 4), dtype=real),
        logits.new_empty((n,), dtype=torch.int64),
    )


@torch.library.register_fake("dparallel::certainty_forcing_loss_backward")
def _(  # type: ignore[no-untyped-def]
    logits, labels, active, temperature, ce_temperature, saved, grad_nll, grad_entropy
):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@torch.library.register_fake("dparallel::certainty_forcing_loss_backward_")
def _(  # type: ignore[no-untyped-def]
    logits, labels, active, temperature, ce_temperature, saved, grad_nll, grad_entropy
):
    return None


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, labels, active, ctx.temperature, ctx.ce_temperature, ctx.inplace = inputs
    ctx.save_for_backward(logits, labels, active, output[3])
    ctx.mark_non_differentiable(output[2], output[3], output[4])


def _backward(ctx: Any, grad_nll: Tensor, grad_entropy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    logits, labels, active, saved = ctx.saved_tensors
    settings = ctx.temperature, ctx.ce_temperature
    given = logits, labels, active, *settings, saved, grad_nll, grad_entropy
    if ctx.inplace and not torch.is_grad_enabled():  # that is, unless a graph of the gradient is wanted
        torch.ops.dparallel.certainty_forcing_loss_backward_(*given)
        grad = logits.detach()
    else:
        grad = torch.ops.dparallel.certainty_forcing_loss_backward(*given)
    return grad, None, None, None, None, None


torch.library.register_autograd("dparallel::certainty_forcing_loss", _backward, setup_context=_save)


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


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
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
    n, real = len(labels), _real(hidden)
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
    n, real = labels.shape[0], _real(hidden)
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
    grad_head = torch.zeros(head.shape if head_needs_grad else (0,), dtype=_real(head), device=head.device)
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
            _add_product(grad_head, gradient.T, own)
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
