"""An emulation of CUDA graphs where there is no GPU, and what its tests share.

A `Tape` keeps the operators that a pass dispatches, with the very tensors, and a replay runs them again on
those, without any of the Python around them. So a number that was read on the host while recording stays what
it was, as in a CUDA graph. Everything else is the library's own.
"""

from __future__ import annotations

import collections
import functools
import itertools
import sys
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from emulated_gpu import mapped, on_cpu
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from dparallel_ext import models
from dparallel_ext.decoding.graphs import Graphs

aten = torch.ops.aten
RECORDED = """
    __and__.Tensor __iand__.Tensor __ior__.Tensor __or__.Tensor _grouped_mm _safe_softmax _to_copy
    _unsafe_view add.Tensor add_.Tensor alias all.dim amax amin any.dim arange argmax argmin argsort
    argsort.stable as_strided bitwise_and.Tensor bitwise_left_shift.Scalar_Tensor bitwise_not
    bitwise_or.Tensor bmm cat chunk clamp clamp.Tensor clamp.out clone contiguous copy_ cos cummax cumsum
    detach div.Tensor einsum embedding empty_like eq.Scalar eq.Tensor exp expand fill_.Scalar
    flatten.using_ints floor_divide full full_like gather ge.Scalar ge.Tensor gt.Scalar gt.Tensor index.Tensor
    index_add_ index_copy_ index_fill_.int_Scalar index_put_ isnan le.Scalar le.Tensor lerp.Scalar
    linalg_vector_norm linear log log1p logsumexp lt.Scalar lt.Tensor masked_fill.Scalar masked_fill_.Scalar
    matmul mean.dim minimum mul.Scalar mul.Tensor mul_.Tensor nan_to_num ne.Scalar ne.Tensor neg new_full
    new_zeros ones ones_like pad pow.Tensor_Scalar promote_types reciprocal relu remainder.Scalar
    repeat_interleave.self_int reshape round rsqrt rsub.Scalar scalar_tensor scatter.src scatter_.value
    scatter_add scatter_reduce.two scatter_reduce_.two searchsorted.Tensor select.int sigmoid silu
    slice.Tensor softmax.int sort sort.stable split.Tensor split_with_sizes square squeeze.dim stack
    sub.Tensor sub_.Tensor sum.dim_IntList to.device to.dtype to.dtype_layout topk transpose.int unbind.int
    unflatten.int unsqueeze view view.dtype where.Scalar where.ScalarOther where.ScalarSelf where.self
    where.self_out zeros zeros_like
"""
"""Torch's operators of which passes and benchmarks are made. By torch's sources their CUDA kernels neither
wait for the device nor copy from the host: look there (aten/src/ATen/native/cuda) before you add another."""
READS = ("tolist", "numpy", "cpu")
"""Methods that read numbers by no operator."""
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
LOOKS = {
    "_check",
    "check_heads",
    "check_index",
    "check_rows",
    "check_caches",
    "within",
    "check",
    "suppressed",
}
"""Functions that read values on the CPU alone."""


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Of an op's arguments or results, which nest in lists, tuples and dicts alone. (torch's general walk
    takes longer than the op.)"""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors_of(each)
    elif isinstance(value, dict):
        yield from tensors_of(list(value.values()))


def devices_of(value: Any) -> set[str]:
    """Of its tensors, single numbers too: a recording would keep the value of one on the CPU."""
    return {tensor.device.type for tensor in tensors_of(value)}


def is_view(func: Any, args: Any, kwargs: Any, out: Any) -> bool:
    """Whether the call launched nothing: what it gave lies in the memory of what it was given."""
    given = {t.untyped_storage().data_ptr() for t in tensors_of((args, kwargs))}
    made = [t.untyped_storage().data_ptr() for t in tensors_of(out)]
    return bool(made) and given.issuperset(made) and not func._schema.is_mutable


@functools.cache
def writes(func: Any) -> list[tuple[int, str]]:
    """The arguments that an op changes: places and names."""
    return [
        (place, argument.name)
        for place, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]


class NoReads(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.reads = {getattr(Tensor, name) for name in READS}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.reads and not looks():
            raise RuntimeError(f"{func}: not permitted while recording")
        return func(*args, **(kwargs or {}))


@functools.cache
def is_recorded(func: Any) -> bool:
    """Whether a GPU's recording permits the operator, for tensors of one device and no mask as an index."""
    space, name = func._schema.name.split("::")
    name = f"{name}.{func._schema.overload_name}".removesuffix(".")
    return space == "dparallel" or (space == "aten" and name in RECORDED.split())


class Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.no_reads = NoReads()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.written: list[tuple[Tensor, Tensor]] = []
        """Before each call, what it changes and a copy of it."""
        self.launched: list[tuple[Any, Any, Any, list[Tensor]]] = []
        """The calls that a replay makes, on the tensors that have the numbers: views stay as they are."""

    def __enter__(self) -> Tape:
        self.no_reads.__enter__()
        return super().__enter__()  # type: ignore[no-any-return]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.no_reads.__exit__(*error)
        self.launched = [
            (func, mapped(on_cpu, args), mapped(on_cpu, kwargs), [on_cpu(t) for t in tensors_of(out)])
            for func, args, kwargs, out in self.calls
            if not is_view(func, args, kwargs, out)
        ]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        by_mask = func in INDEXED and any(i is not None and i.dtype == torch.bool for i in args[1])
        devices = devices_of((args, kwargs))
        if not (is_recorded(func) and not by_mask and len(devices) < 2) and not looks():
            raise RuntimeError(f"{func}: not permitted while recording")
        for place, name in writes(func):
            given = args[place] if place < len(args) else kwargs.get(name)
            if isinstance(given, Tensor):
                self.written.append((given, given.clone()))
        out = func(*args, **kwargs)
        if len(devices | devices_of(out)) > 1 and not looks():
            raise RuntimeError(f"{func}: not permitted while recording, from one device to another")
        self.calls.append((func, args, kwargs, out))
        return out

    def put_back(self) -> None:
        """As if nothing had run."""
        for tensor, was in reversed(self.written):
            tensor.copy_(was)
        self.written.clear()
        self.calls[-1][-1].fill_(-7)  # the result

    def forget(self) -> None:
        """Keep none of the tensors."""
        for kept in (self.calls, self.written, self.launched):
            kept.clear()  # type: ignore[attr-defined]

    def replay(self) -> None:
        with _disable_current_modes():
            for func, args, kwargs, out in self.launched:
                again = func(*args, **kwargs)
                for old, new in zip(out, tensors_of(again), strict=True):
                    if old.numel() and old.data_ptr() != new.data_ptr():
                        old.copy_(new)

    def read(self) -> list[tuple[StorageWeakRef, str]]:
        """The memory from outside that a replay reads or changes, which a CUDA graph knows by its address and
        does not keep, with the first operator that does."""
        made: set[int] = set()
        outside: dict[int, tuple[StorageWeakRef, str]] = {}
        for func, args, kwargs, out in self.calls:
            for tensors, into in (((args, kwargs), outside), (out, made)):
                for tensor in tensors_of(tensors):
                    storage = tensor.untyped_storage()
                    if storage._cdata in made or storage._cdata in outside:
                        continue
                    if into is made:
                        made.add(storage._cdata)
                    else:
                        outside[storage._cdata] = StorageWeakRef(storage), str(func)
        return list(outside.values())


def looks() -> bool:
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "_compute":
        if frame.f_code.co_name in LOOKS:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


class TapeGraph:
    """A `torch.cuda.CUDAGraph` on a tape, whose pools follow the rules of torch's allocator."""

    pools: ClassVar[dict[int, int]] = {}
    """How many graphs use each. One that no graph uses any more stays known, and is refused."""

    def capture_begin(self, pool: int, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local"
        if not self.pools.get(pool, 1) > 0:
            raise RuntimeError("it->second->use_count > 0 INTERNAL ASSERT FAILED")
        self.users, self.pool, self.tape = self.pools, pool, Tape()
        self.users[pool] = self.users.get(pool, 0) + 1
        self.tape.__enter__()

    def capture_end(self) -> None:
        self.tape.__exit__(None, None, None)
        self.tape.put_back()

    def replay(self) -> None:
        self.tape.replay()

    def __del__(self) -> None:
        if hasattr(self, "pool"):
            self.users[self.pool] -= 1


class TapeStream:
    made = itertools.count()

    def __init__(self, device: Any = None) -> None:
        self.device, self.cuda_stream = device, next(self.made) % 32

    def wait_stream(self, other: TapeStream) -> None:
        pass

    def record_event(self) -> TapeStream:
        return self

    def synchronize(self) -> None:
        pass


def recordings(graphs: Graphs) -> int:
    return sum(found is not None for found in graphs.recordings.values())


PROMPTS = [torch.arange(3, 14), torch.arange(40, 47), torch.arange(1, 30)]
TINY = {
    "llada": {
        "d_model": 128, "n_layers": 1, "n_heads": 2, "mlp_hidden_size": 16, "vocab_size": 64,
        "block_type": "llama", "activation_type": "silu", "layer_norm_type": "rms", "rope": True,
        "rope_theta": 1e4, "include_bias": False, "weight_tying": False, "mask_token_id": 60,
    },
    "sdar": {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
        "head_dim": 128, "intermediate_size": 16, "vocab_size": 64, "mask_token_id": 60, "block_size": 32,
    },
}  # fmt: skip


def tiny(name: str, layers: int = 1) -> models.Model:
    family, key = {"llada": (models.LLaDA, "n_layers"), "sdar": (models.SDAR, "num_hidden_layers")}[name]
    return family({**TINY[name], key: layers}).eval()  # type: ignore[abstract]


def prompt(length: int) -> Tensor:
    return torch.randint(0, 59, (length,))


LOOKING = {"aminmax", "gt", "all"}
"""Operators of the checks that are made on the CPU alone."""


def kernels(tape: Tape) -> collections.Counter[str]:
    """Operators that launch something: not views, nor those that only make room or give a number."""
    found: collections.Counter[str] = collections.Counter()
    for func, args, kwargs, out in tape.calls:
        name = func._schema.name.split("::")[1]
        made = any(True for _ in tensors_of(out)) and name not in LOOKING and "empty" not in name
        if func._schema.is_mutable or (made and not is_view(func, args, kwargs, out)):
            found[name] += 1
    return found
