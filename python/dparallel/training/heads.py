"""The output embedding of a model in training, in whose place a loss can be computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from dparallel_ext.models import Model


def plain_head(model: nn.Module) -> nn.Linear | None:
    """The model's output embedding, if its class computes it, and its output are the logits without further
    changes; else None: accelerate, for example, gives a layer on another device a forward of its own."""
    if isinstance(model, Model):
        head: Any = model.lm_head
        unscaled = model.shape.logit_scale == 1.0
    else:
        get = getattr(model, "get_output_embeddings", None)
        head, config = get() if get is not None else None, getattr(model, "config", None)
        unscaled = not any(getattr(config, key, None) for key in ("scale_logits", "final_logit_softcapping"))
    plain = type(head) is nn.Linear and head.bias is None and "forward" not in vars(head)
    return head if unscaled and plain else None


@contextmanager
def forward_of(module: nn.Module | None, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """A context in which `module` computes `function`; its hooks stay."""
    if module is None:
        yield
        return
    module.forward = function
    try:
        yield
    finally:
        del module.forward
