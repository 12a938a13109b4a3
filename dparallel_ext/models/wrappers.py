"""Wrappers of models: compilers, data parallelism, sharding, adapters."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import warn
from ..ops.inputs import DTYPES, check_logits
from .base import Model
from .config import Traits
from .modules import all_modules

Class = tuple[str, str, str]
"""A class's module, its name, and the attribute that holds the wrapped model."""

PARALLEL: tuple[Class, ...] = (
    ("torch.nn.parallel", "DataParallel", "module"),
    ("torch.nn.parallel", "DistributedDataParallel", "module"),
)
FSDP1: Class = ("torch.distributed.fsdp", "FullyShardedDataParallel", "module")
FSDP2: Class = ("torch.distributed.fsdp", "FSDPModule", "")  # a class that a module takes on beside its own
PEFT: Class = ("peft", "PeftModel", "base_model")
TUNER: Class = ("peft.tuners.tuners_utils", "BaseTuner", "model")
WRAPPERS: tuple[Class, ...] = (
    *PARALLEL,
    FSDP1,
    PEFT,
    ("peft", "PeftMixedModel", "base_model"),
    TUNER,
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    ("torch.optim.swa_utils", "AveragedModel", "module"),
    (
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
        "ActivationWrapper",
        "_checkpoint_wrapped_module",
    ),
)
"""Wrappers whose call is the call of the model in them. A module of another kind may do more."""
ADAPTED_LAYERS: tuple[Class, ...] = (
    ("peft.tuners.tuners_utils", "BaseTunerLayer", "base_layer"),
    ("peft.utils.other", "AuxiliaryTrainingWrapper", "original_module"),
)
"""Classes that PEFT's methods put in place of a layer; an object holds the layer, and whether it is
active."""


CALLS = ("forward", "__call__")


def classes(*wanted: Class) -> tuple[Any, ...]:
    """The classes whose modules are loaded; no object can be of another."""
    loaded = ((sys.modules.get(module), name) for module, name, _ in wanted)
    return tuple(getattr(module, name) for module, name in loaded if hasattr(module, name))


def wrapping_chain(model: Any) -> Iterator[Any]:
    """`model`, the model that it wraps, and so on, down to a native model or an object with `traits`."""
    yield model
    while not (issubclass(type(model), Model) or stated_traits(model) is not None):
        attribute = next((w[2] for w in WRAPPERS if isinstance(model, classes(w))), None)
        if attribute is not None:
            model = getattr(model, attribute)
        elif isinstance(model, functools.partial):
            model = model.func
        elif inspect.ismethod(model) and model in (getattr(model.__self__, n, 0) for n in CALLS):
            model = model.__self__
        elif inspect.isroutine(model):  # compiled, or decorated
            model = getattr(model, "__wrapped__", None)
        else:
            return
        if model is None:
            return
        yield model


def stated_traits(model: Any) -> Traits | None:
    """The attribute `traits` of the object or its class, if it has one; not that of an object to which it
    passes questions on."""
    stated = inspect.getattr_static(model, "traits", None)
    return stated if isinstance(stated, Traits) else None


def unwrap(model: Any) -> Any:
    """The innermost model in `WRAPPERS`, or the first with an attribute `traits`; else `model` itself."""
    *_, inner = wrapping_chain(model)
    return inner


def for_decoding(model: Any, name: str = "model") -> Any:
    """The object that decoding calls: a native model without its wrappers, or another model as it is.

    A native model is run by methods that no wrapper knows: `torch.compile` around it has no effect, adapters
    inside it have theirs. Another model is called as it was compiled or adapted, but without DataParallel and
    DistributedDataParallel, whose calls split the batch or wait for other processes.

    Raises ValueError, naming the argument `name` and the wrapper, for a model whose weights are not all in
    this process (sharded, or not loaded), and for adapters that do more than replace layers.
    """
    stack = list(wrapping_chain(model))
    inner = stack[-1]
    if stated_traits(inner) is None:  # an object with `traits` is called as it is
        check_adapters(stack, name)
        check_whole(stack, name)
    if isinstance(inner, Model) and all(isinstance(layer, nn.Module) for layer in stack):
        return inner
    parallel = classes(*PARALLEL)
    return stack[max((i + 1 for i, layer in enumerate(stack) if isinstance(layer, parallel)), default=0)]


def ids_device(model: Any) -> torch.device | None:
    """Where a model's ids have to be: the device that it says it has, as our models and Hugging Face's do.
    None: nobody knows, or its weights come from elsewhere with each call; ids stay where they are."""
    device = getattr(unwrap(model), "device", None)
    return device if isinstance(device, torch.device) and device.type != "meta" else None


def native(model: Any, name: str = "model", expected: str = "one") -> Model:
    """A native model without its wrappers. Raises ValueError naming the argument, and saying what was
    `expected`, for another model, and as `for_decoding` and `check_call`."""
    inner = for_decoding(model, name)
    check_call(inner, name)
    if not isinstance(inner, Model):
        raise ValueError(
            f"{name}: expected {expected} of dparallel_ext.models (models.load, or models.wrap for a loaded "
            f"Hugging Face model), got {type(inner).__name__}"
        )
    return inner


def own_precision(model: Any, device: torch.device) -> AbstractContextManager[Any]:
    """A context without autocast for a native model, which decodes in its own dtypes: its cached keys have
    them, and the Engine's thread has no autocast. Other models keep the caller's autocast."""
    if isinstance(model, Model) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def logits_of(model: Any, x: Tensor) -> Tensor:
    """The logits (B, L, V) of the model's call with x (B, L). Raises ValueError or TypeError naming an output
    that has no such logits."""
    with own_precision(model, x.device):
        output = model(x)
    if not hasattr(output, "logits"):
        raise ValueError(
            f"model: expected its call to return an object with .logits, got {type(output).__name__}"
        )
    logits: Tensor = output.logits
    check_logits(logits, "model: its logits")
    if logits.shape[:-1] != x.shape:
        raise ValueError(f"model: expected logits ({x.shape[0]}, {x.shape[1]}, V), got {tuple(logits.shape)}")
    return logits


def check_call(model: Any, name: str = "model") -> None:
    """Raise ValueError for a native model in a dtype without kernels, and for a native model whose call is
    changed, by its class or in the object, since decoding does not use it; warn of hooks on the whole model,
    which do not run, and of dropout. Models that are not native are called. name: the argument."""
    warn_of_dropout(model, name)
    if not isinstance(model, Model):
        return
    if model.dtype not in DTYPES:
        raise ValueError(
            f"{name}: expected weights in float32, bfloat16 or float16, got {model.dtype}; load it in "
            "another dtype (dtype=, --dtype), or convert it by .to"
        )
    for method in ("forward", "hidden"):
        if getattr(type(model), method) is not getattr(Model, method) or _replaced(model, method):
            raise ValueError(
                f"{name}: {type(model).__name__} has a {method} of its own, and decoding calls the layers of "
                "a native model one by one. Change a layer, such as lm_head, or pass a function of input_ids "
                "that has an attribute `traits`"
            )
    if model._forward_hooks or model._forward_pre_hooks:
        warn(
            f"{name}: {type(model).__name__} has hooks on its call, which decoding does not run, since it "
            "calls the layers one by one; hooks on layers run"
        )


DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


def warn_of_dropout(model: Any, argument: str = "model") -> None:
    """Warn of a model in training mode that has dropout, such as an adapter's: its logits are random."""
    if not getattr(model, "training", False) or not isinstance(model, nn.Module):
        return
    for name, part in model.named_modules():
        if isinstance(part, DROPOUTS) and part.training and part.p:
            warn(
                f"{argument}: {type(model).__name__} is in training mode, and the dropout of {name} changes "
                "its logits at random; call model.eval() before decoding"
            )
            return


def _replaced(model: Model, name: str) -> bool:
    """Whether the object has a method of its own that may do more than the class's. The class's own method,
    compiled, does not, and neither do accelerate's, which choose a precision and a device."""
    method: Any = vars(model).get(name)
    while hasattr(method, "_torchdynamo_orig_callable"):
        method = method._torchdynamo_orig_callable
    by_accelerate = not {"_original_forward", "_old_forward"}.isdisjoint(vars(model))
    return not (method is None or by_accelerate or method == getattr(type(model), name).__get__(model))


def check_whole(stack: list[Any], argument: str) -> None:
    """Raise ValueError if weights of a model are not in this process. stack: its wrappers, then the model."""
    inner, sharded = stack[-1], classes(FSDP1, FSDP2)
    parts = all_modules(inner) if isinstance(inner, nn.Module) else []
    shard = next((part for part in (*stack, *parts) if isinstance(part, sharded)), None) if sharded else None
    if shard is not None:
        raise ValueError(
            f"{argument}: FSDP has sharded its weights ({type(shard).__name__}), and processes that decode "
            "different prompts would wait for each other. Decode a copy that is whole: gather the state_dict "
            "(torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True) and "
            "load it into a model of its own"
        )
    if isinstance(inner, Model):
        parameters = [p for part in parts for p in part._parameters.values() if p is not None]
        away = {id(p) for p in parameters if p.is_meta or hasattr(p, "placements") or not p.numel()}
        for name, p in inner.named_parameters() if away else ():
            if id(p) in away:
                where = "on the meta device" if p.is_meta else "sharded"
                raise ValueError(
                    f"{argument}: expected all its weights in this process, but {name} is {where}: load it, "
                    "or gather what is sharded or offloaded"
                )


def check_adapters(stack: list[Any], argument: str) -> None:
    """Raise ValueError for PEFT's methods that do more than replace layers."""
    advice = "Merge it, or take LoRA or another method that stays within layers"
    for layer in stack:
        config = layer.active_peft_config if isinstance(layer, classes(PEFT)) else None
        if config is not None and config.is_prompt_learning:
            raise ValueError(
                f"{argument}: its adapter is of type {config.peft_type.value}, whose virtual tokens have no "
                f"place among the positions of a masked sequence. {advice}"
            )
        if isinstance(stack[-1], Model):
            check_tuner(layer, argument, advice)


def check_tuner(layer: Any, argument: str, advice: str) -> None:
    """Raise ValueError for an adapter of PEFT's tuner `layer` that acts on a call as a whole."""
    kinds = classes(TUNER)
    if not isinstance(layer, kinds):
        return
    configs = layer.peft_config.values()
    kind = next(iter(configs)).peft_type.value
    by_call = type(layer).forward is not kinds[0].forward and kind != "ADALORA"  # which changes a loss alone
    if any(getattr(config, "alora_invocation_tokens", None) for config in configs):
        kind, by_call = "aLoRA", True
    if by_call:
        raise ValueError(
            f"{argument}: its adapter is of type {kind}, which acts on a call as a whole, and decoding calls "
            f"the layers one by one. {advice}"
        )


def changed_modules(model: nn.Module, adapted: Iterable[str], known: bool) -> Iterator[str]:
    """The names of modules outside of adapters that have hooks or a forward of their own. The libraries' own
    hooks, which are for gradients, devices and records, do not count.

    known: whether transformers has classes of this family, so that other classes made from them are changed.
    """

    def home(function: Any) -> str:
        while isinstance(function, functools.partial):
            function = function.func
        function = getattr(function, "__func__", function)
        return str(getattr(function, "__globals__", {}).get("__name__") or type(function).__module__)

    libraries = ("transformers", "transformers_modules", "accelerate", "peft")
    for name, module in model.named_modules():
        if any(name == layer or name.startswith(f"{layer}.") for layer in adapted):
            continue
        called = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        called += [module.__dict__["forward"]] if "forward" in module.__dict__ else []
        homes = [*map(home, called)]
        kinds = type(module).__mro__
        if known and any(kind.__module__.startswith("transformers.models.") for kind in kinds):
            homes.append(next(kind.__module__ for kind in kinds if "forward" in vars(kind)))
        if any(place.partition(".")[0] not in libraries for place in homes):
            yield name
