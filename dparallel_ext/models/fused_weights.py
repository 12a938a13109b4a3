"""Fused weights: layers with the same input lie side by side in memory, so that one matrix product serves
them.

Each weight stays a parameter of its own, a slice of a shared storage. Their addresses tell whether they still
are side by side; if something moves or replaces a weight (an adapter, a sharder, `.data = `), each gets a
product of its own again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, TypeGuard, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import fp8_linear, linear, linear_swiglu, swiglu
from ..ops.inputs import compiled
from .fp8 import Fp8Linear

Layer = TypeVar("Layer", bound=nn.Module)
PLAIN = (nn.Parameter, Tensor)


def joined_view(parts: Sequence[Tensor]) -> Tensor | None:
    """A view (rows, ...) of all parts (rows_i, ...), without a copy; None if they are not side by side."""
    first = parts[0]
    if torch.compiler.is_compiling() or first.is_meta:
        return None
    for part in parts:
        if type(part) not in PLAIN:  # sharded, fake or quantised
            return None
    dtype, stride, end, rows = first.dtype, first.stride(), first.data_ptr(), 0
    for part in parts:
        # Contiguous tensors of equal strides have rows of one shape.
        if (
            part.data_ptr() != end
            or part.dtype != dtype
            or part.stride() != stride
            or not part.is_contiguous()
        ):
            return None
        end += part.nbytes
        rows += part.shape[0]
    storage = first.untyped_storage()
    if end > storage.data_ptr() + storage.nbytes():  # neighbours by chance
        return None
    return first.as_strided((rows, *first.shape[1:]), stride, first.storage_offset())


def is_unmodified(module: nn.Module, kind: type[Layer]) -> TypeGuard[Layer]:
    """Whether a call of `module` runs the `forward` of its class `kind` and nothing else, such as a hook."""
    return (
        type(module) is kind
        and not (module._forward_hooks or module._forward_pre_hooks)
        and "forward" not in module.__dict__
        and module._compiled_call_impl is None
    )


def tensor_of(module: nn.Module, name: str) -> Any:
    """`getattr(module, name)`; a parameter is found at once, where torch's search takes as long as a small
    operator."""
    parameters = module.__dict__["_parameters"]
    return parameters[name] if name in parameters else getattr(module, name)


class Joined(NamedTuple):
    """The tensors of layers that are side by side, as of one layer."""

    weight: Tensor
    """(out, in)"""
    bias: Tensor | None
    """(out,)"""
    scale: Tensor | None = None
    """(out,) float32, of weights in 8 bits"""


def joined(layers: Sequence[nn.Module]) -> Joined | None:
    """The tensors of layers with the same input, if one product may serve them."""
    kind = type(layers[0])
    if kind not in LEAVES or torch.is_grad_enabled():
        return None
    for layer in layers:
        if not is_unmodified(layer, kind):
            return None
    tensors: list[Any] = []
    for leaf in LEAVES[kind]:
        of_layers = [tensor_of(layer, leaf) for layer in layers]
        parts = [part for part in of_layers if part is not None]
        tensors.append(joined_view(parts) if len(parts) == len(layers) else None)
        if parts and tensors[-1] is None:
            return None
    return Joined(*tensors)


def project(x: Tensor, layers: Sequence[nn.Module]) -> Sequence[Tensor]:
    """Each layer's output for x (..., in), by one matrix product if their weights are fused."""
    together = joined(layers)
    if together is None:
        return [apply(layer, x) for layer in layers]
    weight, bias, scale = together
    if scale is None:
        product = linear(x, weight, bias, constant=True)
    else:
        product = fp8_linear(x, weight, scale, bias, constant=True)
    widths: list[Any] = [layer.out_features for layer in layers]
    return product.split(widths, -1)


def apply(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer's output of x, by `linear` where the layer is torch's and does nothing else."""
    if torch.is_grad_enabled() or not is_unmodified(layer, nn.Linear):
        return layer(x)
    return linear(x, tensor_of(layer, "weight"), tensor_of(layer, "bias"), constant=True)


def gated(x: Tensor, gate: nn.Module, up: nn.Module) -> Tensor:
    """silu(gate x) * (up x), (..., width), of x (..., in), by one product if their weights are fused."""
    if compiled(x) and (w := joined((gate, up))):
        return linear_swiglu(x, w.weight, w.bias, scale=w.scale, constant=True)
    return activated(*project(x, (gate, up)))


def activated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, (..., width) all three."""
    return swiglu(gate, up) if compiled(gate, up) else F.silu(gate) * up


LEAVES: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("weight", "bias"),
    Fp8Linear: ("weight", "bias", "scale"),
}
"""Kind of layer -> the names of its tensors, as in `Joined`."""


def parameters(groups: Sequence[Sequence[nn.Module]]) -> Iterator[list[nn.Parameter]]:
    """The weights, then the biases, of each group whose layers are all plain nn.Linear."""
    for layers in groups:
        for leaf in ("weight", "bias"):
            linears = [getattr(layer, leaf) for layer in layers if type(layer) is nn.Linear]
            parts = [part for part in linears if type(part) is nn.Parameter]
            if len(parts) == len(layers):
                yield parts


class FusedLoader:
    """Puts the parameters of a model that is being read side by side, group by group."""

    def __init__(self, groups: Iterable[list[nn.Parameter]]) -> None:
        self.group_of = {id(part): group for group in groups for part in group}
        self.joined: dict[int, Tensor] = {}

    def put(self, parameter: Tensor, tensor: Tensor) -> Tensor:
        """`tensor`, copied to the place of `parameter` in its group; unchanged if it has no group."""
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
    """Move parameters side by side, into new memory."""
    if joined_view(parts) is None and len({(p.dtype, p.device) for p in parts}) == 1:
        joined = _cat([part.data for part in parts])
        for part, data in zip(parts, joined.split([len(part) for part in parts]), strict=True):
            part.data = data


def _cat(parts: Sequence[Tensor]) -> Tensor:
    """`torch.cat`, which under `torch.autocast` refuses 8 bits, and 16 bits of another kind than its own."""
    with nullcontext() if parts[0].is_meta else torch.autocast(parts[0].device.type, enabled=False):
        return torch.cat(list(parts))


def join_quantised(layers: Sequence[Fp8Linear]) -> None:
    """Move the weights, then the scales, of quantised layers side by side; for the order see `fp8_linear` on
    constant weights."""
    for leaf in ("weight", "scale"):
        parts = [getattr(layer, leaf) for layer in layers]
        if len(parts) > 1 and joined_view(parts) is None:
            joined = _cat(parts).split([len(part) for part in parts])
            for layer, part in zip(layers, joined, strict=True):
                setattr(layer, leaf, part)
    biases = [layer.bias for layer in layers if layer.bias is not None]
    if biases:
        join(biases)


def separate(parts: Sequence[nn.Parameter]) -> None:
    """Give each parameter memory of its own again."""
    if joined_view(parts) is not None:
        for part in parts:
            part.data = part.data.clone()
