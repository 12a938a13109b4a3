"""A GPU whose tensors keep their numbers on the CPU and say that they are on cuda:0.

It refuses what a GPU refuses: ops on tensors of two devices, and `numpy` of its tensors. The CPU's kernels
compute for it; the fixture `taped` records passes (`cuda_host` executes the CUDA kernels). Not emulated are
gradients, autocast, and what torch computes on a GPU alone.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dparallel_ext import backends
from dparallel_ext.ops import errors, inputs, streams

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
MOVES = {"aten::copy_", "aten::_has_compatible_shallow_copy_type"}
"""Ops that take tensors of two devices."""


def wrapper(cls: type, inner: Tensor, requires_grad: bool = False) -> Any:
    """A tensor of the class on the GPU, whose numbers are those of `inner`."""
    made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
        cls,
        inner.shape,
        strides=inner.stride(),
        storage_offset=inner.storage_offset(),
        dtype=inner.dtype,
        device=GPU,
        requires_grad=requires_grad,
    )
    made.inner = inner
    return made


class OnGPU(Tensor):
    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})

    __torch_function__ = torch._C._disabled_torch_function_impl

    def numpy(self, **settings: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")


def is_there(value: Any) -> bool:
    return isinstance(value, Tensor) and "inner" in value.__dict__


def on_cpu(value: Any) -> Any:
    """A tensor's numbers, and the device that has them."""
    if isinstance(value, torch.device):
        return CPU if value.type == "cuda" else value
    return value.inner if is_there(value) else value


def mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """`change` of each leaf of an op's arguments or results, which nest in lists, tuples and dicts alone.
    (torch's general walk takes longer than the op.)"""
    if isinstance(value, list | tuple):
        return type(value)([mapped(change, each) for each in value])
    if isinstance(value, dict):
        return {key: mapped(change, each) for key, each in value.items()}
    return change(value)


@functools.cache
def schema(func: Any) -> tuple[str, bool]:
    """An op's name, and whether it gives views of, or changes, what it is given."""
    return func._schema.name, any(returned.alias_info is not None for returned in func._schema.returns)


def compute(func: Any, args: Any, kwargs: Any) -> Any:
    """The op's results, on the device where torch would have them."""
    tensors: list[Tensor] = []
    named: list[str] = []

    def inside(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, torch.device):
            named.append(value.type)
        return on_cpu(value)

    name, is_view = schema(func)
    if name.endswith("pin_memory"):
        return args[0]
    kwargs.pop("pin_memory", None)
    args, kwargs = mapped(inside, args), mapped(inside, kwargs)
    places = {t.device.type for t in tensors if t.ndim or is_there(t)}  # numbers of the CPU go with any
    if "cuda" in places and len(places) > 1 and name not in MOVES and not name.startswith("aten::index"):
        shapes = [f"{t.device.type} {tuple(t.shape)}" for t in tensors]
        raise RuntimeError(f"{name}: expected all tensors on one device, got {shapes}")
    there = [t for t in tensors if is_there(t)]
    to_gpu = named[0] == "cuda" if named else bool(there)

    def placed(result: Any) -> Any:
        if not isinstance(result, Tensor):
            return result
        for t in there:
            if result is t.inner:  # type: ignore[attr-defined]  # in place
                return t if to_gpu else result.clone()
        if to_gpu:
            return wrapper(OnGPU, result.clone() if any(result is t for t in tensors) else result)
        return result

    # A view of a tensor that is none of inference mode is none either.
    is_plain = is_view and any(not torch.is_inference(t) for t in there)
    with torch.inference_mode(False) if is_plain else nullcontext():
        with torch.no_grad():
            results = func(*args, **kwargs)
        return mapped(placed, results)


class Emulation(TorchDispatchMode):
    """A context in which tensors may be made on the GPU. In fake modes torch does not look for a real one."""

    def __init__(self) -> None:
        super().__init__()
        self._mode_key = torch._C._TorchDispatchModeKey.FAKE

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


def _guard() -> None:
    """Have torch's CPU build switch CUDA devices from now on as it switches meta ones: not at all."""
    library = ctypes.CDLL(str(next((Path(torch.__file__).parent / "lib").glob("libc10.*"))))
    guards = (ctypes.c_void_p * 15).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    if guards[1] is None:
        guards[1] = guards[14]


@contextmanager
def emulated_gpu() -> Iterator[None]:
    """A context in which it is there; with the fixture `taped`."""
    torch._C._ensureCUDADeviceGuardSet()
    _guard()
    with pytest.MonkeyPatch.context() as patch:
        _patch(patch)
        torch._C._set_only_lift_cpu_tensors(True)
        try:
            with Emulation():
                yield
        finally:
            torch._C._set_only_lift_cpu_tensors(False)


def _patch(patch: pytest.MonkeyPatch) -> None:
    build = {**backends._C.build_info(), "backends": "cpu cuda"}
    patch.setattr(backends._C, "build_info", lambda: build)
    patch.setattr(inputs, "DEVICES", {"cpu", "cuda"})
    # What is kept for a device goes with it.
    patch.setattr(errors, "pending", {})
    patch.setattr(streams, "counter_buffers", {})
    patch.setattr(torch.cuda, "device_count", lambda: 1)
    patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    patch.setattr(torch.cuda, "device", lambda device: nullcontext())
    patch.setattr(torch, "autocast", lambda *args, **settings: nullcontext())
    patch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    # Threads that start here are here.
    run = threading.Thread.run

    def run_here(self: threading.Thread) -> None:
        torch._C._set_only_lift_cpu_tensors(True)
        with Emulation():
            run(self)

    patch.setattr(threading.Thread, "run", run_here)
    # What torch answers without an op.
    for name in ("tolist", "data_ptr", "untyped_storage"):
        plain = getattr(Tensor, name)
        patch.setattr(Tensor, name, lambda self, plain=plain: plain(on_cpu(self)))
    for name in ("__getitem__", "__setitem__"):
        plain = getattr(Tensor, name)
        patch.setattr(
            Tensor, name, lambda self, at, *value, plain=plain: plain(self, indices(self, at), *value)
        )
    # Parameters that are moved are parameters, not of a class of their own.
    patch.setattr(nn.Parameter, "__torch_dispatch__", OnGPU.__torch_dispatch__, raising=False)
    new = nn.Parameter.__new__

    def parameter(cls: type, data: Any = None, requires_grad: bool = True) -> Any:
        if is_there(data):
            return wrapper(nn.Parameter, data.inner.detach(), requires_grad)
        return new(cls, data, requires_grad)

    patch.setattr(nn.Parameter, "__new__", parameter)
    patch.setattr(torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True)


def indices(tensor: Tensor, at: Any) -> Any:
    """Indices by which a tensor is indexed, lists on its device."""
    if is_there(tensor) and isinstance(at, list):
        return torch.tensor(at, dtype=torch.int64).to(GPU)
    return tuple(indices(tensor, each) for each in at) if isinstance(at, tuple) else at
