"""Weights that read the same input, side by side in memory, so that one matrix product serves them.

Each stays a parameter of its own: a slice of a storage that they share. Whether they still lie so is seen
from their addresses, so whatever moves or replaces one (an adapter, a sharder, `.data = `) merely brings
back one product each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from ..ops import fp8_linear, linear
from .fp8 import Fp8Linear

Kind = TypeVar("Kind", bound=nn.Module)


def joined_view(parts: Sequence[Tensor]) -> Tensor | None:
    """(rows, ...) of all parts (rows_i, ...), in their own memory; None where they are not side by side."""
    first = parts[0]
    ordinary = all(type(part) in (nn.Parameter, Tensor) for part in parts)  # not sharded, fake or quantised
    if torch.compiler.is_compiling() or not ordinary or first.is_meta:
        return None
    at, storage, rows = first.data_ptr(), first.untyped_storage().data_ptr(), 0
    for part in parts:
        if (
            part.data_ptr() != at
            or part.untyped_storage().data_ptr() != storage
            or part.dtype != first.dtype
            or part.shape[1:] != first.shape[1:]
            or not part.is_contiguous()
        ):
            return None
        at += part.nbytes
        rows += len(part)
    return first.as_strided((rows, *first.shape[1:]), first.stride(), first.storage_offset())


def is_unmodified(module: nn.Module, kind: type[Kind]) -> TypeGuard[Kind]:
    """Whether calling `module` does what its class says and nothing beside: no hook, nothing in its place."""
    return (
        type(module) is kind
        and not (module._forward_hooks or module._forward_pre_hooks)
        and "forward" not in module.__dict__
        and module._compiled_call_impl is None
    )


def project(x: Tensor, layers: Sequence[nn.Module]) -> Sequence[Tensor]:
    """Each layer's output of x, by one matrix product where that may be."""
    if not torch.is_grad_enabled():
        for kind, leaves in LEAVES.items():
            alike: list[Any] = [layer for layer in layers if is_unmodified(layer, kind)]
            joined = _joined(alike, leaves) if len(alike) == len(layers) else None
            if joined is not None:
                product: Callable[..., Tensor] = linear if kind is nn.Linear else fp8_linear
                return product(x, *joined, constant=True).split([layer.out_features for layer in alike], -1)
    return [layer(x) for layer in layers]


def apply(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer's output of x, by `linear` where the layer is torch's and does nothing else."""
    if torch.is_grad_enabled() or not is_unmodified(layer, nn.Linear):
        out: Tensor = layer(x)
        return out
    return linear(x, layer.weight, layer.bias, constant=True)


LEAVES: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("weight", "bias"),
    Fp8Linear: ("weight", "scale", "bias"),
}
"""The tensors that make a layer, as the product takes them."""


def _joined(layers: Sequence[Any], leaves: Sequence[str]) -> list[Tensor | None] | None:
    """The layers' tensors of each name, None where none has one; None where they are not side by side."""
    found: list[Tensor | None] = []
    for leaf in leaves:
        parts = [part for layer in layers if (part := getattr(layer, leaf)) is not None]
        joined = joined_view(parts) if len(parts) == len(layers) else None
        if parts and joined is None:
            return None
        found.append(joined)
    return found


def parameters(groups: Sequence[Sequence[nn.Module]]) -> Iterator[list[nn.Parameter]]:
    """The weights, and the biases, of each group of layers that are plain linear ones."""
    for layers in groups:
        for leaf in ("weight", "bias"):
            found = [getattr(layer, leaf) for layer in layers if type(layer) is nn.Linear]
            parts = [part for part in found if type(part) is nn.Parameter]
            if len(parts) == len(layers):
                yield parts


class FusedLoader:
    """Where the parameters of a model that is being read go, so that each group comes to lie side by side."""

    def __init__(self, groups: Iterable[list[nn.Parameter]]) -> None:
        self.group_of = {id(part): group for group in groups for part in group}
        self.joined: dict[int, Tensor] = {}

    def put(self, parameter: nn.Parameter, tensor: Tensor) -> Tensor:
        """`tensor` in the place of `parameter`, or as it is where that has no group."""
        group = self.group_of.get(id(parameter))
        if group is None:
            return tensor
        if id(group) not in self.joined:
            self.joined[id(group)] = tensor.new_empty((sum(map(len, group)), *tensor.shape[1:]))
        joined = self.joined[id(group)]
        if joined.dtype != tensor.dtype:
            return tensor
        places = joined.split([len(part) for part in group])
        place = next(place for part, place in zip(group, places, strict=True) if part is parameter)
        return place.copy_(tensor)


def join(parts: Sequence[nn.Parameter]) -> None:
    """Lay them side by side; they take new memory and leave the old."""
    if joined_view(parts) is None and len({(p.dtype, p.device) for p in parts}) == 1:
        joined = torch.cat([part.data for part in parts])
        for part, data in zip(parts, joined.split([len(part) for part in parts]), strict=True):
            part.data = data


def join_quantised(layers: Sequence[Fp8Linear]) -> None:
    """The same of quantised layers, their scales too, those last: see `fp8_linear` on constant weights."""
    for leaf in ("weight", "scale"):
        parts = [getattr(layer, leaf) for layer in layers]
        if len(parts) > 1 and joined_view(parts) is None:
            joined = torch.cat(parts).split([len(part) for part in parts])
            for layer, part in zip(layers, joined, strict=True):
                setattr(layer, leaf, part)
    biases = [layer.bias for layer in layers if layer.bias is not None]
    if biases:
        join(biases)


def separate(parts: Sequence[nn.Parameter]) -> None:
    """Give each memory of its own again."""
    if joined_view(parts) is not None:
        for part in parts:
            part.data = part.data.clone()
