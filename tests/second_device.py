"""A second device: tensors of the type "xla", which torch knows and has no kernels for. Their numbers are on
the CPU all the same; operators on tensors of both devices raise, as on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("xla:0")
BEFORE_DISPATCH = (
    *(Tensor.__getitem__, Tensor.__setitem__, Tensor.__invert__),
    *(Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.item, Tensor.tolist),
    *(Tensor.copy_, Tensor.nonzero, Tensor.unbind),
)
"""Methods that ask for the device's driver before a dispatch mode sees them."""


class There(Tensor):
    """A tensor on the second device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> There:
        made: There = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=DEVICE
        )
        made.held = held
        return made

    def __init__(self, held: Tensor) -> None:
        pass

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function not in BEFORE_DISPATCH or not isinstance(args[0], There):
            return torch._C._disabled_torch_function_impl(function, types, args, kwargs or {})
        result = function(*tree_map(_held, args), **tree_map(_held, kwargs or {}))
        if function is Tensor.copy_:
            return args[0]
        return tree_map(lambda x: _there(x, {}), result)

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


class FromNumbers(TorchFunctionMode):
    """A context in which `torch.tensor` makes tensors on the second device."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if function in (torch.tensor, torch.as_tensor) and device is not None:
            made = function(*args, **{**kwargs, "device": "cpu"})
            return made.to(device)
        return function(*args, **kwargs)


class SecondDevice(TorchDispatchMode):
    """A context in which tensors are made on the second device, and moved to and from it."""

    def __enter__(self) -> Any:
        self.from_numbers = FromNumbers()
        self.from_numbers.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.from_numbers.__exit__(*error)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


def _held(value: Any) -> Any:
    if isinstance(value, There):
        return value.held
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == DEVICE.type else value


def _there(value: Any, known: dict[int, There]) -> Any:
    if not isinstance(value, Tensor) or isinstance(value, There):
        return value
    return known[id(value)] if id(value) in known else There(value)


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    there = {id(value.held): value for value in tensors if isinstance(value, There)}
    mixed = there and any(value.dim() for value in tensors if not isinstance(value, There))
    if mixed and function is not torch.ops.aten.copy_.default:
        raise RuntimeError(f"{function}: expected tensors on one device, got some on each")
    result = function(*tree_map(_held, args), **tree_map(_held, kwargs))
    device = kwargs.get("device")
    is_there = bool(there) if device is None else device.type == DEVICE.type
    if function is torch.ops.aten.copy_.default:
        is_there = isinstance(args[0], There)
    if not is_there:
        return result
    return tree_map(lambda x: _there(x, there), result)


def moved(model: nn.Module) -> nn.Module:
    """The model, its weights on the second device."""
    for name, held in [*model.named_parameters(), *model.named_buffers()]:
        module, _, leaf = name.rpartition(".")
        tensor: Tensor = There(held.detach())
        if isinstance(held, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=False)
        setattr(model.get_submodule(module), leaf, tensor)
    return model
