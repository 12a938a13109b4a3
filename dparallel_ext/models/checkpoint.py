"""Reads published checkpoints as they are, and writes models in their layout."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .. import backends, whole_files
from ..arguments import instance, warn
from . import dequantized, files, fingerprints, fused_weights, multimodal
from .base import Model
from .config import PENALTY, ModelConfig, config_ids
from .experts import Experts, Router, in_parts
from .families import FAMILIES, family_in, family_of, own_code
from .modules import shapes_only
from .stored import DTYPES, NAMES, WEIGHTS, SourceTensor, shards_of, stored_tensors
from .wrappers import ADAPTED_LAYERS, changed_modules, classes, for_decoding, unwrap


def load(
    path: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    fuse: bool | None = None,
    mask_id: int | None = None,
) -> Model:
    """Load a checkpoint of one of `FAMILIES`: a directory with config.json and (sharded) safetensors.

    `path` may be ORG/NAME of the Hugging Face Hub, see `locate`. Tensors are memory-mapped and go straight to
    `device` (default: CPU) and `dtype` (default: as stored). The model is in evaluation mode. `fuse` lays out
    weights as `Model.fuse` does while they are read; default: on any device but the CPU. `mask_id` replaces
    the checkpoint's mask token, which is read from config.json, generation_config.json or the tokenizer's
    files, or else is that of the family's released checkpoints; a causal model's is read from config.json
    alone. The model's `eos_ids` are those of config.json, then those of generation_config.json, whose
    repetition_penalty an autoregressive model keeps, see `DecodeConfig`. Weights that are stored as 8-bit
    floats with scales are read into `dtype` (default: that of the other tensors). Of a Mistral 3, which sees
    images, the language model is read.

    Raises:
        FileNotFoundError: naming the missing file or directory.
        ValueError: naming the device that is not there, a dtype that is none of floating point, the config
            key, or the missing, extra, misshapen, quantised or unreadable tensors.
    """
    _check_dtype(dtype)
    place = backends.device_of(device)
    directory = files.locate(path)
    source = f"path: {directory}"
    config, shape = config_of(directory)
    if code := own_code(config):
        warn(
            f"{source}: config.json names code of its own, {code:.80}, which is not run: it is read as "
            f"{family_in(config, source).__name__}, autoregressive, and the code's logits may be others; if "
            "it is another family's diffusion model, name that family's model_type"
        )
    if not dequantized.is_read(config):
        files.refuse_quantised(config, (), source)
    _set_mask(config, mask_id, directory, shape.embedding_size)
    _add_ends(
        config, files.generation_end_ids(directory), shape.embedding_size, f"{source}: generation_config.json"
    )
    _set_penalty(config, files.read_json(directory / "generation_config.json").get(PENALTY))
    backends.warn_without_kernels(place)
    fuse = place.type != "cpu" if fuse is None else fuse
    with ExitStack() as opened:
        config, stored = _opened(directory, config, str(place), dtype, opened)
        return _assemble(config, stored, source, fuse, dtype)


def as_stored(path: str | Path, *, mask_id: int | None = None) -> Model:
    """The model of a checkpoint with its tensors as they are stored, of one type or several, and
    memory-mapped: to look at, not to decode with. Experts that are stored one by one, and weights in 8 bits,
    are not read, since they would take memory. Raises as `load`."""
    directory = files.locate(path)
    config, shape = config_of(directory)
    _set_mask(config, mask_id, directory, shape.embedding_size)
    with ExitStack() as opened:
        config, stored = _opened(directory, config, "cpu", None, opened)
        return _assemble(config, stored, f"path: {directory}", mixed=True, mapped=True)


def _opened(
    directory: Path, config: dict[str, Any], device: str, dtype: torch.dtype | None, opened: ExitStack
) -> tuple[dict[str, Any], list[SourceTensor]]:
    """The config and the tensors of the model that is read; `opened` closes its files."""
    stored = stored_tensors(shards_of(directory), device, opened)
    config, tensors = multimodal.language_tensors(config, stored)
    if dequantized.is_read(config):
        return dequantized.dequantized(config, tensors, dtype, f"path: {directory}")
    return config, tensors


def _check_dtype(dtype: Any) -> None:
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype: expected a floating-point type such as torch.bfloat16, got {dtype!r}")


def config_of(directory: Path) -> tuple[dict[str, Any], ModelConfig]:
    """The content of config.json, and the transformer's sizes and options in it.

    Raises FileNotFoundError, and ValueError naming the file and the key.
    """
    file = directory / "config.json"
    config = files.read_json(file, required=True)
    named = config.get("transformers_weights")  # files that transformers reads in place of the usual ones
    if named not in (None, WEIGHTS):
        raise ValueError(f"path: {file}: transformers_weights={named!r:.80} is not supported, only {WEIGHTS}")
    try:
        config = multimodal.language_config(config)
        return config, family_in(config, "config").shape_of(config)
    except ValueError as error:
        raise ValueError(f"path: {file}: {str(error).removeprefix('config: ')}") from error


def _set_mask(config: dict[str, Any], mask_id: int | None, directory: Path, rows: int) -> None:
    """Set the config's mask token: `mask_id`, else that of the checkpoint's files, of a causal model that of
    its config alone."""
    name, token, family = "mask_id", mask_id, family_in(config, f"path: {directory}")
    if mask_id is None:
        name = f"path: the mask token of {directory}, unless mask_id is given"
        token = (
            config.get(family.mask_key) if family.causal else files.mask_token_id(directory, family.mask_key)
        )
    if token is not None and (type(token) is not int or not 0 <= token < rows):
        raise ValueError(f"{name}: expected an id below {rows}, got {token!r}")
    if token is not None:
        config["mask_token_id"] = config[family.mask_key] = token


def _add_ends(config: dict[str, Any], others: Iterable[int], rows: int, source: str) -> None:
    """Append to the config's eos_token_id the ids of `others` that it lacks."""
    of_config = config_ids(config, "eos_token_id", rows)
    ends = list(dict.fromkeys([*of_config, *others]))
    beyond = [end for end in ends if end >= rows]
    if beyond:
        raise ValueError(f"{source}: eos_token_id has {beyond!r:.80}, expected ids below {rows}")
    if len(ends) > len(of_config):
        config["eos_token_id"] = ends if len(ends) > 1 else ends[0]


def _set_penalty(config: dict[str, Any], of_generation: Any) -> None:
    """Set the config's repetition penalty to generation_config.json's, if that has one."""
    if of_generation is not None:
        config[PENALTY] = of_generation


def wrap(hf_model: nn.Module) -> Model:
    """A native model that shares the weights of a loaded Hugging Face model of one of `FAMILIES`.

    It may be wrapped, see `for_decoding`. PEFT's layers are shared too: switching, disabling or merging
    an adapter in one model does it in both. All are put in evaluation mode. Experts that it holds one by one,
    as remote code does, are copied. A native model is returned as it is. The native model has layers of its
    own, so hooks on the Hugging Face model's modules, and code that replaces its classes' `forward`, do not
    run; a warning names them.

    Raises:
        ValueError: naming the config key, or the missing, extra or misshapen tensors; also if the
            weights do not all lie on one device, as after offloading, an adapter is on a router or an
            expert, or experts of a layer that are held one by one have several types.
    """
    for_decoding(hf_model, "hf_model")  # raises if weights are sharded or not loaded
    hf_model = unwrap(hf_model)
    if isinstance(hf_model, Model):
        return hf_model
    config = getattr(hf_model, "config", None)
    if config is None:
        raise ValueError(f"hf_model: {type(hf_model).__name__} has no .config")
    adapted = _adapted(hf_model)
    held = itertools.chain(hf_model.named_parameters(), hf_model.named_buffers())
    weights = {
        name: p
        for name, p in held
        if isinstance(p, nn.Parameter) or name.endswith(".expert_bias")  # a router's, see `experts`
        if not any(name.startswith(f"{layer}.") for layer in adapted)
    }
    for name, module in adapted.items():
        base = _base_of(module)
        if within := {p.rsplit(".", 2)[-2] for p, _ in base.named_parameters() if "." in p}:
            raise ValueError(
                f"hf_model: PEFT has a copy of {name} as a whole, expected one of each layer: in place of "
                f"{name.rpartition('.')[2]!r} modules_to_save may name {', '.join(sorted(within))}"
            )
        weights |= {f"{name}.{leaf}": p for leaf, p in base.named_parameters(recurse=False)}
    devices = {str(p.device) for p in weights.values()}
    if len(devices) > 1 or "meta" in devices:
        raise ValueError(f"hf_model: expected its weights on one device, got {sorted(devices)}")
    tensors = [
        SourceTensor(name, tuple(p.shape), NAMES.get(p.dtype, str(p.dtype)), partial(lambda p: p, p))
        for name, p in weights.items()
    ]
    content = multimodal.language_config(config if isinstance(config, Mapping) else config.to_dict())
    generation, source = getattr(hf_model, "generation_config", None), f"hf_model: {type(hf_model).__name__}"
    if content.get("mask_token_id") is None:
        content["mask_token_id"] = getattr(generation, "mask_token_id", None)
    files.refuse_quantised(content, weights, source)
    family = family_in(content, source)
    if changed := [name or "the model" for name in changed_modules(hf_model, adapted, family.causal)]:
        warn(
            f"{source}: {', '.join(changed[:3])}{', ...' if changed[3:] else ''}: hooks, or a forward of its "
            "own, which the native model does not run; put hooks on the layers of what models.wrap returns"
        )
    rows = family.shape_of(content).embedding_size
    ends = config_ids({"eos_token_id": getattr(generation, "eos_token_id", None)}, "eos_token_id", rows)
    _add_ends(content, ends, rows, source)
    _set_penalty(content, getattr(generation, PENALTY, None))
    model = _assemble(*multimodal.language_tensors(content, tensors), source, mixed=True)
    mixtures = tuple(f"{name}." for name, part in model.named_modules() if isinstance(part, Router | Experts))
    for name, module in adapted.items():
        if f"{name}.".startswith(mixtures):
            raise ValueError(
                f"hf_model: PEFT has adapted {name}, and experts are called otherwise here. Merge the "
                "adapter, or load the adapter into the base model that models.load or models.wrap gives"
            )
        parent, _, leaf = (multimodal.language_name(name) or name).rpartition(".")
        setattr(model.get_submodule(parent), leaf, module)
    return model.eval()


def _adapted(model: nn.Module) -> dict[str, nn.Module]:
    """PEFT's modules that have replaced layers, by the layers' names."""
    kinds: Any = classes(*ADAPTED_LAYERS)
    adapted: dict[str, nn.Module] = {}
    for name, module in model.named_modules():  # an outer module comes before its inner ones
        if isinstance(module, kinds) and not any(name.startswith(f"{outer}.") for outer in adapted):
            adapted[name] = module
    return adapted


def _base_of(module: Any) -> nn.Module:
    """The layer that PEFT's module has replaced."""
    for wrapper in ADAPTED_LAYERS:
        while isinstance(module, classes(wrapper)):
            module = getattr(module, wrapper[2])
    assert isinstance(module, nn.Module)
    return module


def save(
    model: Model,
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write config.json and model.safetensors in the layout of the family's published checkpoints.

    `dtype`: the file's, by default the model's. `state_dict`: tensors to write in place of the model's own,
    such as gathered shards: all of them. Each file appears whole or not at all, config.json last. Saves into
    one directory wait for each other, in several threads and processes too.

    Raises ValueError for another dtype than of floating point, for a path that is no directory or cannot be
    written to, for a state_dict that lacks a tensor or has another's, and for a model that is not ours, is
    quantised, under adapters or not loaded.
    """
    _check_dtype(dtype)
    if state_dict is not None:
        instance("state_dict", state_dict, Mapping)
    model = unwrap(model)
    if not isinstance(model, Model):
        raise ValueError(f"model: expected one of dparallel_ext.models, got {type(model).__name__}")
    if model.quantized:
        raise ValueError("model: it is quantised, and no published layout has such weights; save it before")
    if _adapted(model):
        raise ValueError(
            "model: its layers have adapters, and no published layout has such weights; save them by "
            "save_pretrained, or merge them before"
        )
    dtype = dtype or model.dtype
    tied = model.checkpoint_name("lm_head") + ".weight" if model.shape.tied else None
    buffers = dict(model.named_buffers())  # which keep their own dtype
    state = {**dict(model.named_parameters()), **buffers} if state_dict is None else state_dict
    if state_dict is not None:
        known = model.state_dict().keys()
        faults = [f"{name} is missing" for name in sorted(known - state.keys() - {tied})]
        faults += [f"{name:.200} is unexpected" for name in sorted(state.keys() - known)]
        if faults:
            raise ValueError(f"state_dict: expected the model's tensors, but {'; '.join(faults[:5])}")
    for name, held in state.items():
        if held.is_meta:
            raise ValueError(f"model: expected weights, but {name} is on the meta device, without numbers")
    directory = whole_files.directory("path", path)
    tensors = {
        stored: tensor.contiguous()
        for name, held in state.items()
        if name != tied
        for stored, tensor in in_parts(
            name, held.detach().to("cpu", held.dtype if name in buffers else dtype)
        ).items()
    }
    config = {**model.config, "torch_dtype": str(dtype).removeprefix("torch.")}
    config.pop("transformers_weights", None)
    if "dtype" in config:  # the newer name, which transformers reads first
        config["dtype"] = config["torch_dtype"]
    if family_of(config) is not type(model):
        names = [name for name, family in FAMILIES.items() if type(model) is family]
        config["model_type"] = names[0] if names else config.get("model_type")
    files.replace_model(directory, config, lambda file: save_file(tensors, file, metadata={"format": "pt"}))


TABLES = ".rotary_emb.inv_freq"
"""The end of the names of tensors, in checkpoints of Llama 1 and 2, that follow from config.json."""


def _assemble(
    config: Mapping[str, Any],
    tensors: Iterable[SourceTensor],
    source: str,
    fuse: bool = False,
    dtype: torch.dtype | None = None,
    mixed: bool = False,
    mapped: bool = False,
) -> Model:
    """The model of `config`, with `tensors` in `dtype`; without `dtype` they must have one type, or be
    `mixed`, but for the parts of a parameter. If `mapped`, parameters that are stored in parts or computed
    stay on "meta".

    No other memory is allocated or initialised, and nothing is read before all names, shapes and types fit.
    """
    family = family_in(config, source)
    with shapes_only():
        model = family(config)
    available = {entry.name: entry for entry in tensors}
    buffers = dict(model.named_buffers())  # which keep their own dtype
    parameters: dict[str, Tensor] = {**dict(model.named_parameters()), **buffers}
    wanted: dict[str, Tensor] = {}
    owner: dict[str, str] = {}
    """Stored name -> the parameter that it is a part of."""
    for name, parameter in parameters.items():
        parts = {name: parameter} if name in available else in_parts(name, parameter)
        wanted |= parts
        owner |= dict.fromkeys(parts, name)
    head = model.checkpoint_name("lm_head") + ".weight"
    known = {*wanted, head} if model.shape.tied else set(wanted)  # a tied head may be stored all the same
    fitting = [entry for entry in available.values() if entry.name in wanted]
    faults = _shape_faults(fitting, wanted)
    if dtype is None and not mapped:
        typed = [entry for entry in fitting if entry.name not in buffers]
        faults += _type_faults(typed, owner, mixed)
    faults += [f"{name} is missing" for name in sorted(wanted.keys() - available.keys())]
    extra = {name for name in available.keys() - known if not name.endswith(TABLES)}
    faults += [f"{name:.200} is unexpected" for name in sorted(extra)]
    if faults:
        files.refuse_quantised(config, extra, source)
        others = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ValueError(f"{source} does not fit {family.__name__}: {'; '.join(faults[:5])}{others}")
    places = fused_weights.FusedLoader(model.groups() if fuse else ())
    stacked: dict[str, dict[str, Tensor]] = {}
    of_hash = [
        model.checkpoint_name(o) + ".weight" for o in ("norm", "embed" if model.shape.tied else "lm_head")
    ]
    hashed: dict[str, Tensor] = {}

    def put(name: str, tensor: Tensor) -> None:
        module, _, leaf = name.rpartition(".")
        is_registered = isinstance(tensor, nn.Parameter) or name in buffers
        setattr(model.get_submodule(module), leaf, tensor if is_registered else nn.Parameter(tensor))

    for entry in fitting:
        stored, name = entry.name, owner[entry.name]
        if mapped and (name != stored or (entry.computed and name not in of_hash)):
            continue
        tensor = entry.fetch()
        if name in buffers:
            tensor = tensor.to(buffers[name].dtype)
        elif dtype is not None:
            if name in of_hash:
                hashed[name] = tensor
            tensor = tensor.to(dtype)
        if name == stored:
            put(name, places.put(parameters[name], tensor))
            continue
        if name not in stacked:
            stack = tensor.new_empty(parameters[name].shape)
            put(name, stack)
            stacked[name] = in_parts(name, stack)
        stacked[name][stored].copy_(tensor.detach())
    if head in available and head not in wanted:
        _refuse_another_head(available[head], model.embed.weight, config, source)
    model.tie()
    if dtype == torch.float16:  # its bits are not those from which bfloat16 is rounded
        fingerprints.remember(model, *map(hashed.__getitem__, of_hash))
    return model.eval()


def _shape_faults(available: Iterable[SourceTensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """The tensors of wrong shapes or unsupported types, in words."""
    faults = []
    for name, shape, dtype, *_ in available:
        if shape != (expected := tuple(wanted[name].shape)):
            faults.append(f"{name} is {shape}, expected {expected}")
        elif dtype not in DTYPES:
            faults.append(f"{name} is {dtype}, expected a floating-point type of 16 bits or more")
    return faults


def _type_faults(available: Sequence[SourceTensor], owner: Mapping[str, str], mixed: bool) -> list[str]:
    """The types that differ, of all tensors, or if `mixed` of the parts of a parameter, in words."""
    types: dict[str, dict[str, str]] = {}
    """Parameter, "" unless mixed -> type -> the first tensor of it."""
    for entry in reversed(available):
        if entry.dtype in DTYPES:
            types.setdefault(owner[entry.name] if mixed else "", {})[entry.dtype] = entry.name
    faults = []
    for names in types.values():
        if len(names) > 1:
            both = " and ".join(f"{name} {dtype}" for dtype, name in sorted(names.items())[:2])
            advice = "hf_model.to(dtype)" if mixed else "the argument dtype"
            faults.append(f"{both}, expected tensors of one type; {advice} makes them so")
    return faults


def _refuse_another_head(
    head: SourceTensor, embedding: Tensor, config: Mapping[str, Any], source: str
) -> None:
    """Raise ValueError if a tied head is stored, and differs from the embedding.

    transformers 5 then uses the stored head, transformers 4 and the published code do not.
    """
    same = head.shape == tuple(embedding.shape) and head.dtype in DTYPES
    if not (same and torch.equal(head.fetch().to(embedding.dtype), embedding)):
        key = next(key for key in ("weight_tying", "tie_word_embeddings") if config.get(key))
        raise ValueError(
            f"{source}: {key} says that {head.name} is the embedding, and it is stored with other numbers; "
            f"set {key} to false to use it, or remove it"
        )
