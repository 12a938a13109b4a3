"""Published checkpoints, read as they are and written as they were."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from . import side_by_side
from .base import Model
from .dream import Dream
from .fast_dllm import FastDLLM
from .llada import LLaDA
from .sdar import SDAR
from .wrappers import ADAPTED_LAYERS, classes, for_decoding, unwrap

FAMILIES: dict[str, type[Model]] = {
    "llada": LLaDA,
    "Dream": Dream,
    "sdar": SDAR,
    "Fast_dLLM_Qwen": FastDLLM,
}
"""config.json's model_type -> the family that reads it."""


def load(
    path: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    fuse: bool | None = None,
) -> Model:
    """Load a checkpoint of one of `FAMILIES`: a directory with config.json and (sharded) safetensors.

    Tensors are memory-mapped and go straight to `device` (default: CPU) and `dtype` (default: as
    stored). The model comes in evaluation mode. `fuse`: as `Model.fuse` would leave it, each tensor read to
    its place; default: unless on the CPU.

    Raises:
        FileNotFoundError: naming what is not there.
        ValueError: naming the device that is not there, the config key, or the missing, extra, misshapen or
            unreadable tensors.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype: expected a floating-point type, got {dtype}")
    place = device_of(device)
    directory = Path(path)
    if not directory.is_dir():
        raise FileNotFoundError(f"path: no directory {directory}")
    config = _json(directory / "config.json")
    stored = _stored(_files(directory), str(place), dtype)
    fuse = place.type != "cpu" if fuse is None else fuse
    return _assemble(config, stored, f"path: {directory}", fuse)


def device_of(device: torch.device | str | None) -> torch.device:
    """The device of that name, default the CPU. Raises ValueError where there is none."""
    place: torch.device | None
    try:
        place = torch.device("cpu" if device is None else device)
    except RuntimeError:
        place = None
    if place is None or place.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"device: expected cpu, cuda or cuda:N, got {str(device)!r}")
    if place.type == "cuda":
        count = torch.cuda.device_count()
        if not count:
            built = "none is there" if torch.version.cuda else "this torch is built without CUDA"
            raise ValueError(f"device: {str(device)!r} needs an NVIDIA GPU, and {built}")
        if (place.index or 0) >= count:
            raise ValueError(f"device: expected cuda:0 to cuda:{count - 1}, got {str(device)!r}")
    return place


def wrap(hf_model: nn.Module) -> Model:
    """A native model on the weights of a loaded Hugging Face one of `FAMILIES`: shared, not copied.

    It may be wrapped, see `for_decoding`. PEFT's layers are shared too, so that an adapter that is switched,
    disabled or merged there is so here; all are put in evaluation mode. One of ours comes back as it is.

    Raises:
        ValueError: naming the config key, or the missing, extra or misshapen tensors; also if the
            weights do not all lie on one device, as after offloading.
    """
    for_decoding(hf_model)  # refuses what is not whole
    hf_model = unwrap(hf_model)
    if isinstance(hf_model, Model):
        return hf_model
    config = getattr(hf_model, "config", None)
    if config is None:
        raise ValueError(f"hf_model: {type(hf_model).__name__} has no .config")
    adapted = _adapted(hf_model)
    given = {
        name: p
        for name, p in hf_model.named_parameters()
        if not any(name.startswith(f"{layer}.") for layer in adapted)
    }
    for name, module in adapted.items():
        given |= {f"{name}.{leaf}": p for leaf, p in _base_of(module).named_parameters(recurse=False)}
    devices = {str(p.device) for p in given.values()}
    if len(devices) > 1 or "meta" in devices:
        raise ValueError(f"hf_model: expected its weights on one device, got {sorted(devices)}")
    tensors = ((name, tuple(p.shape), partial(_same, p)) for name, p in given.items())
    content = config if isinstance(config, Mapping) else config.to_dict()
    model = _assemble(content, tensors, f"hf_model: {type(hf_model).__name__}")
    for name, module in adapted.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module)
    return model.eval()


def _adapted(model: nn.Module) -> dict[str, nn.Module]:
    """What PEFT has put in the place of layers, by the layers' names."""
    kinds: Any = classes(*ADAPTED_LAYERS)
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():  # what holds another comes before it
        if isinstance(module, kinds) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return found


def _base_of(module: Any) -> nn.Module:
    """The layer in whose place PEFT's stands."""
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
    """Write config.json and model.safetensors as the family's published checkpoints have them.

    `dtype`: of the file, default the model's. `state_dict`: tensors to write instead of the model's own, as
    gathered from shards. Each file appears whole or not at all.

    Raises ValueError for a quantised model.
    """
    if model.quantized:
        raise ValueError("model: it is quantised, and no published layout holds its weights; save it before")
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    dtype = dtype or model.dtype
    tied = model.checkpoint_name("lm_head") + ".weight" if model.shape.tied else None
    tensors = {
        name: p.detach().to("cpu", dtype).contiguous()
        for name, p in (state_dict or dict(model.named_parameters())).items()
        if name != tied
    }
    names = [name for name, family in FAMILIES.items() if type(model) is family]
    config = {**model.config, "torch_dtype": str(dtype).removeprefix("torch.")}
    config["model_type"] = names[0] if names else config.get("model_type")
    weights = directory / "model.safetensors"
    partial_weights = weights.with_name(weights.name + ".partial")
    save_file(tensors, partial_weights, metadata={"format": "pt"})
    os.replace(partial_weights, weights)
    file = directory / "config.json"
    partial_file = file.with_name(file.name + ".partial")
    partial_file.write_text(json.dumps(config, indent=2) + "\n")
    os.replace(partial_file, file)


# A tensor on offer: its name, its shape, and how to get it.
Offer = tuple[str, tuple[int, ...], Callable[[], Tensor]]


def _assemble(config: Mapping[str, Any], tensors: Iterable[Offer], source: str, fuse: bool = False) -> Model:
    """The model of `config`, holding `tensors`: nothing is allotted or initialised beside them."""
    family = FAMILIES.get(config.get("model_type", ""))
    if family is None:
        raise ValueError(f"{source}: model_type {config.get('model_type')!r} is none of {list(FAMILIES)}")
    with torch.device("meta"):
        model = family(config)
    wanted = dict(model.named_parameters())
    places = side_by_side.Places(model.groups() if fuse else ())
    # A tied head may be stored all the same.
    known = {*wanted, model.checkpoint_name("lm_head") + ".weight"} if model.shape.tied else set(wanted)
    found: set[str] = set()
    faults: list[str] = []
    for name, shape, fetch in tensors:
        found.add(name)
        if name not in wanted:
            continue
        expected = wanted[name]
        if shape != tuple(expected.shape):
            faults.append(f"{name} is {shape}, expected {tuple(expected.shape)}")
            continue
        tensor = fetch()
        if not tensor.is_floating_point():
            faults.append(f"{name} is {tensor.dtype}, expected a floating-point type")
            continue
        module, _, parameter = name.rpartition(".")
        held = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(places.put(expected, tensor))
        setattr(model.get_submodule(module), parameter, held)
    faults += [f"{name} is missing" for name in sorted(set(wanted) - found)]
    faults += [f"{name} is unexpected" for name in sorted(found - known)]
    if faults:
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ValueError(f"{source} does not fit {family.__name__}: {'; '.join(faults[:5])}{more}")
    model.tie()
    return model.eval()


def _stored(files: list[Path], device: str, dtype: torch.dtype | None) -> Iterator[Offer]:
    for file in files:
        try:
            with safe_open(file, framework="pt", device=device) as shard:
                for name in shard.keys():  # noqa: SIM118 (no mapping)
                    shape = tuple(shard.get_slice(name).get_shape())
                    yield name, shape, partial(_read, shard, name, dtype)
        except SafetensorError as error:
            raise ValueError(f"path: {file} is not a readable safetensors file: {error}") from error


def _read(shard: safe_open, name: str, dtype: torch.dtype | None) -> Tensor:
    tensor: Tensor = shard.get_tensor(name)
    return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    single = directory / "model.safetensors"
    if not index.is_file():
        if not single.is_file():
            raise FileNotFoundError(f"path: no {single.name} (nor {index.name}) in {directory}")
        return [single]
    shards = _json(index).get("weight_map")
    if not isinstance(shards, dict):
        raise ValueError(f"path: {index} has no weight_map")
    files = [directory / name for name in sorted(set(shards.values()))]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"path: {index.name} names {file.name}, not in {directory}")
    return files


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"path: no {file.name} in {file.parent}")
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"path: {file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"path: {file} holds a {type(content).__name__}, expected an object")
    return content
