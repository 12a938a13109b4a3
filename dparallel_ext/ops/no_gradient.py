"""Makes a backward pass through an op without a gradient raise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _C  # noqa: F401  (registers the ops)

_library = torch.library.Library("dparallel", "IMPL")


def _below_autograd(op: Any, keys: Any, *arguments: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keys & torch._C._after_autograd_keyset, *arguments)


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: Any, keys: Any, *arguments: Any) -> Any:
        ctx.op = op._schema.name
        return _below_autograd(op, keys, *arguments)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(f"{ctx.op} has no gradient: detach its inputs, or use torch.no_grad()")


def _without_gradient(name: str) -> None:
    """Make a backward pass through the op raise; torch's own fallback would warn and yield None.

    An op that returns nothing has no backward pass to raise in, so it refuses inputs that require a gradient;
    and every op refuses to change such an input, whose gradient would pass by the op. Tensors that an op
    changes in place get a new version, so that autograd notices if it had saved them.
    """
    op = getattr(torch.ops.dparallel, name).default
    written = [place for place, argument in enumerate(op._schema.arguments) if argument.is_write]

    def kernel(keys: Any, *arguments: Any) -> Any:
        wanted = []
        if torch.is_grad_enabled():
            named = zip(op._schema.arguments, arguments, strict=False)
            wanted = [a for a, t in named if isinstance(t, Tensor) and t.requires_grad]
        for argument in wanted:
            if argument.is_write or not op._schema.returns:
                raise ValueError(
                    f"{argument.name}: requires a gradient, which this op does not have; use torch.no_grad()"
                )
        result = (_NoGradient.apply if wanted else _below_autograd)(op, keys, *arguments)
        changed = [arguments[place] for place in written]
        torch.autograd.graph.increment_version([t for t in changed if t is not None and not t.is_inference()])
        return result

    _library.impl(name, kernel, "Autograd", with_keyset=True)


for _name in (
    "row_stats", "row_topk", "select", "commit_", "unmask_", "accept", "keep_error_", "class_stats",
    "best_path", "kv_write", "kv_move", "block_attention", "rms_norm", "swiglu", "linear", "fp8_linear",
    "fp8_widen", "linear_swiglu", "linear_kv_write",
    "certainty_forcing_loss_backward", "certainty_forcing_loss_backward_",
    "distillation_loss_backward", "distillation_loss_backward_",
):  # fmt: skip
    _without_gradient(_name)
