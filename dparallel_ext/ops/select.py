"""The positions that policy rows commit, from statistics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import policies
from ..arguments import check_tensor, described
from ..types import RowStats
from .fake import register_fake
from .kernel import kernel

_select = kernel("select")


def select(stats: RowStats, eligible: Tensor, policy: Tensor, *, check: bool = True) -> Tensor:
    """The positions that each policy row commits, from statistics.

    Args:
        stats: confidence, margin and entropy (B, L) float32 are used; other fields are ignored.
        eligible: (B, L) bool, the masked positions of the active window.
        policy: (B, 5) float32 rows, see `policies.make`.
        check: False does not read values, as a recording as a CUDA graph needs.

    Returns:
        (B, L) bool: at least one position of every sequence that has an eligible one, unless its `min_commit`
        is 0.

    Raises:
        ValueError: naming the argument that does not fit, or an eligible position whose score is NaN (CPU).
        TypeError: naming an argument that should be a tensor and is not.
    """
    check_tensor("eligible", eligible)
    if eligible.ndim != 2 or eligible.dtype != torch.bool:
        raise ValueError(f"eligible: expected bool (B, L), got {described(eligible)}")
    names = ("confidence", "margin", "entropy")
    scores: list[Any] = [getattr(stats, name, None) for name in names]
    for name, value in zip(names, scores, strict=True):
        check_tensor(f"stats.{name}", value)
        if value.shape != eligible.shape or value.dtype != torch.float32:
            raise ValueError(
                f"stats.{name}: expected float32 {tuple(eligible.shape)}, got {described(value)}"
            )
    policies.check(policy, len(eligible), values=check)
    return _select(*scores, eligible, policy.to(eligible.device))


@register_fake("select")
def _(eligible: Tensor) -> Tensor:
    return eligible.new_empty(eligible.shape)
