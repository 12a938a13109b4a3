"""How the gradients of the losses are registered, for logits and for hidden states.

A loss takes tensors and then settings. Its results are `terms` tensors that have a gradient, perhaps others,
what the backward pass needs, and errors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .kernel import kernel


def register_gradient(name: str, terms: int) -> None:
    """Register the gradient of the loss `name` of logits; it has two tensors beside them, and its last
    setting is `inplace`."""
    backward, backward_ = kernel(f"{name}_backward"), kernel(f"{name}_backward_")

    def gradient(ctx: Any, tensors: Sequence[Tensor], *saved_and_grads: Tensor) -> tuple[Tensor]:
        *settings, inplace = ctx.settings
        arguments = *tensors, *settings, *saved_and_grads
        if not inplace or torch.is_grad_enabled():  # enabled: the gradient's own graph needs the logits
            return (backward(*arguments),)
        backward_(*arguments)
        return (tensors[0].detach(),)

    _register(name, 3, terms, gradient)


def register_head_gradient(name: str, tensors: int, terms: int) -> None:
    """Register the gradient of the loss `name` of hidden states and a head, its first two tensors, by the op
    whose results are those of `HeadGradient`."""

    def gradient(
        ctx: Any, tensors: Sequence[Tensor], *saved_and_grads: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        backward, needed = getattr(torch.ops.dparallel, f"{name}_backward"), ctx.needs_input_grad[1]
        # The dtypes are those of the forward pass.
        with torch.autocast(tensors[0].device.type, enabled=False):
            grad, grad_head = backward(*tensors, *ctx.settings, *saved_and_grads, needed)
        return grad, grad_head if needed else None

    _register(name, tensors, terms, gradient)


def _register(
    name: str, tensors: int, terms: int, gradient: Callable[..., tuple[Tensor | None, ...]]
) -> None:
    """gradient(ctx, the tensors, what the backward pass needs, the gradients of the terms): the gradients of
    the first tensors."""

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.settings = inputs[tensors:]
        ctx.save_for_backward(*inputs[:tensors], output[-2])
        ctx.mark_non_differentiable(*output[terms:])

    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, saved = ctx.saved_tensors
        leading = gradient(ctx, inputs, saved, *grads[:terms])
        return *leading, *(None,) * (tensors + len(ctx.settings) - len(leading))

    torch.library.register_autograd(f"dparallel::{name}", backward, setup_context=save)
