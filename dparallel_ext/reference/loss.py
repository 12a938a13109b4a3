"""The losses, differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import CertaintyForcingLossOutput

_LARGEST = torch.finfo(torch.float32).max


def certainty_forcing_loss(
    logits: Tensor,
    labels: Tensor,
    active: Tensor,
    *,
    temperature: float = 0.5,
    entropy_weight: float = 2.0,
    ce_temperature: float = 1.0,
    weight: Tensor | None = None,
    gate: str | Tensor = "correct",
    reduction: str = "mean",
) -> CertaintyForcingLossOutput:
    """See `dparallel_ext.certainty_forcing_loss`; in float64, differentiable."""
    z = logits.double().clamp(max=_LARGEST)[active]  # (N, V)
    y = labels[active]
    log_p = (z / ce_temperature).log_softmax(-1)
    log_q = (z / temperature).log_softmax(-1)
    nll = -log_p.gather(1, y[:, None])[:, 0]
    entropy = -(log_q.exp() * log_q.clamp(min=-1e4)).sum(-1)
    correct = z.argmax(-1) == y
    weights = torch.ones_like(nll) if weight is None else weight[active].double()
    if isinstance(gate, Tensor):
        gated = gate[active]
    else:
        gated = correct if gate == "correct" else torch.ones_like(correct)
    ce, certainty = (nll * weights).sum(), (entropy * weights)[gated].sum()
    if reduction == "mean":
        ce, certainty = ce / max(1, len(nll)), certainty / max(1, int(gated.sum()))

    def spread(x: Tensor) -> Tensor:
        return x.new_zeros(active.shape).masked_scatter(active, x)

    loss = ce + entropy_weight * certainty
    return CertaintyForcingLossOutput(loss, spread(nll), spread(entropy), spread(correct))


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    weight: Tensor | None = None,
    temperature: float = 1.0,
    kl_weight: float = 1.0,
    l1_weight: float = 0.0,
    reduction: str = "sum",
) -> Tensor:
    """See `dparallel_ext.distillation_loss`; in float64, differentiable."""
    active = student.new_ones(student.shape[:-1], dtype=torch.bool) if weight is None else weight != 0
    z, t = (x.double().clamp(max=_LARGEST)[active] for x in (student, teacher.detach()))  # (N, V)
    log_q, log_p = ((x / temperature).log_softmax(-1) for x in (z, t))
    never = t < t.amax(-1, keepdim=True) - 1e29
    kl = (log_p.exp() * (log_p.masked_fill(never, 0) - log_q.masked_fill(never, 0))).sum(-1)
    l1 = (log_p.exp() - log_q.exp()).abs().sum(-1)
    divergence = l1_weight * l1 + (kl_weight * kl if kl_weight else 0.0)
    if weight is not None:
        divergence = divergence * weight[active].double()
    if reduction == "sum":
        return divergence.sum()
    return divergence.new_zeros(active.shape).masked_scatter(active, divergence)
