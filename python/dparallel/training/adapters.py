"""LoRA adapters of native models: fresh ones for `distill`, and trained ones merged into their base."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

import dparallel_ext as dx
from dparallel_ext.models import Model
from dparallel_ext.models import files as checkpoints
from dparallel_ext.speculation.checkpoint import OURS

from .. import files, registry

LORA_TARGETS = ("q", "k", "v", "qkv", "o", "gate", "up", "down")
"""The layers with adapters as published, by our names of modules; a family has some of them."""
PREFIX = "base_model.model."
"""The text that PEFT puts before the names of weights."""


def lora_names(model: Model) -> dict[str, str]:
    """`LORA_TARGETS` that the model's family has -> the checkpoint's names, without the layer's."""
    return {
        o: model.checkpoint_name(f"blocks.0.{o}").rpartition(".")[2] for o in LORA_TARGETS if o in model.NAMES
    }


def with_lora(model: Model, settings: Mapping[str, Any], base: str) -> Any:
    """The model with a fresh PEFT adapter, by default on the published layers.

    Raises ValueError naming a setting that PEFT does not know or refuses, and a module that the model lacks.
    """
    from peft import LoraConfig, get_peft_model

    if unknown := sorted(set(settings) - {f.name for f in fields(LoraConfig)}):
        raise ValueError(f"lora: no setting {unknown} in peft.LoraConfig")
    theirs = lora_names(model)
    modules = [name for name, _ in model.named_modules()]
    targets = [
        o for o, module_name in theirs.items() if any(name.endswith(f".{module_name}") for name in modules)
    ]
    theirs |= {name: model.checkpoint_name(name) for name in ("embed", "lm_head")}
    # In LLaDA a layer's last matrix has the head's name.
    changes: dict[str, Any] = {"exclude_modules": [theirs["lm_head"]], "target_modules": targets}
    changes |= settings
    for key in ("target_modules", "modules_to_save"):
        if not isinstance(names := changes.get(key), (list, tuple)):
            continue
        changes[key] = [theirs.get(name, name) for name in names]
        for name, module_name in zip(names, changes[key], strict=True):
            if not any(f".{module}".endswith(f".{module_name}") for module in modules):
                raise ValueError(f"lora: {key} has {name!r}, which is no module of {type(model).__name__}")
    try:
        config = LoraConfig(**changes)
        adapted = get_peft_model(model, config)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(f"lora: PEFT refuses {dict(settings)}: {error}") from error
    config.base_model_name_or_path = base
    return adapted


FILES = ("adapter_config.json", "adapter_model.safetensors")
"""An adapter's files, by which a directory is taken for one."""


def merge(
    adapter: str | Path, out: str | Path, *, model: str | None = None, mask_id: int | None = None
) -> Path:
    """Add a LoRA adapter's weights to its base and write a plain checkpoint in the base's own layout.

    The adapter may have been trained on a native model or on the Hugging Face model of the same checkpoint.
    Modules and biases that it holds whole (`modules_to_save`, `bias`) replace the base's. `model`: the base;
    default: the one that the adapter names. `mask_id`: replaces the base's.

    Raises FileNotFoundError; ValueError if the adapter cannot be read, is a drafter's, or does not fit the
    base, if `out` holds an adapter, or another run is writing there; OSError if the disk is full.
    """
    from peft import get_peft_model, set_peft_model_state_dict

    directory, adapter = files.possible("out", out), Path(adapter)
    if any((directory / file).exists() for file in FILES):
        raise ValueError(f"out: expected a directory without an adapter's files, got {directory}")
    config, tensors = _read(adapter)
    name = config.base_model_name_or_path if model is None else model
    if model is None and not name:
        raise ValueError("model: the adapter does not name its base, so give one")
    try:
        source = registry.directory_of(str(name))
    except FileNotFoundError as error:
        if model is not None:
            raise
        reason = str(error).removeprefix("model: ")
        raise FileNotFoundError(
            f"model: the adapter names {str(name)!r:.200} as its base, and another may be given: {reason}"
        ) from error
    files.apart(directory, source)
    with registry.naming("model", "path"):
        companions = files.Companions(source)
        base = dx.models.load(source, mask_id=mask_id)
    weights = _put(tensors, base, source)
    targets = {_parts(key.removeprefix(PREFIX)) for key in weights}
    config.target_modules = sorted({module for module, part, _ in targets if part == ".lora_"})
    if not config.target_modules:
        raise ValueError(f"adapter: {adapter / 'adapter_model.safetensors'} has no weights of LoRA")
    config.modules_to_save = None  # they are in the base now
    config.exclude_modules = None
    config.inference_mode = True
    config.base_model_name_or_path = None  # the base is here, and PEFT warns of any name but its own
    adapted = get_peft_model(base, config)
    left: Any = set_peft_model_state_dict(adapted, weights)
    if left.unexpected_keys:
        raise ValueError(f"adapter: {left.unexpected_keys[0]} does not fit {source}")
    try:
        merged = adapted.merge_and_unload()
    except RuntimeError as error:  # such as a bias (lora_bias) for layers without
        raise ValueError(f"adapter: PEFT does not merge it: {error}") from error
    with files.run_directory(directory):
        companions.save_pretrained(directory)  # before config.json, which makes it a checkpoint
        dx.models.save(merged, directory)
    return directory


def _read(adapter: Path) -> tuple[Any, dict[str, Tensor]]:
    """The `LoraConfig` and the tensors in an adapter's directory. Raises as `merge`."""
    from peft import LoraConfig
    from safetensors import safe_open

    for file in FILES:
        if not (adapter / file).is_file():
            complete = (adapter / "config.json").is_file()
            hint = " (a whole checkpoint, with nothing to merge)" if complete else ""
            raise FileNotFoundError(f"adapter: no {file} in {adapter}{hint}")
    try:
        config = LoraConfig.from_pretrained(str(adapter))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"adapter: {adapter / 'adapter_config.json'} is not LoRA's: {error}") from error
    if parameters := getattr(config, "target_parameters", None):
        raise ValueError(
            f"adapter: it changes parameters (target_parameters={list(parameters)!r:.200}), such as experts, "
            "which are not merged here. PEFT's merge_and_unload merges them in the model of models.load, and "
            "models.save writes it"
        )
    weights = adapter / "adapter_model.safetensors"
    with checkpoints.readable(weights, "adapter"), safe_open(weights, framework="pt") as opened:
        metadata = opened.metadata() or {}
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
    if OURS in metadata:
        raise ValueError(
            f"adapter: {adapter} is a drafter, whose weights take part in drafts alone; --drafter takes it"
        )
    return config, tensors


def _put(tensors: Mapping[str, Tensor], base: Model, source: Path) -> dict[str, Tensor]:
    """Copy the weights that an adapter holds whole into its base, which was read from `source`; return the
    others by PEFT's names. Raises ValueError for a weight that the base has no place for."""
    parameters = dict(base.named_parameters())
    known = {name.rpartition(".")[0]: None for name in parameters}
    ends = {base.checkpoint_name(name) for name in ("embed", "lm_head")}
    weights = {}
    for key, tensor in tensors.items():
        module, lora, rest = _parts(key.removeprefix(PREFIX))
        if module.startswith("blocks."):  # by our names, as earlier versions wrote adapters
            module = base.checkpoint_name(module)
        name = module.replace(".base_layer.", ".")
        if base.shape.tied and ends & {module, name.rpartition(".")[0]}:
            raise ValueError(
                f"adapter: {key} changes one of the embedding and the head, and {source} has one weight for "
                "both"
            )
        if not lora and name in parameters:  # of `modules_to_save`, `bias` or `save_embedding_layers`
            shape = parameters[name].shape
            if tensor.shape != shape:
                raise ValueError(f"adapter: {key} is {tuple(tensor.shape)}, and {source} has {tuple(shape)}")
            parameters[name].data.copy_(tensor)
        elif lora and module in known:
            weights[PREFIX + module + lora + rest] = tensor
        else:
            raise ValueError(
                f"adapter: {key} is for no module of {source}, which has {', '.join(list(known)[1:3])}, ..."
            )
    return weights


def _parts(key: str) -> tuple[str, str, str]:
    """The module of an adapter's weight, the mark of PEFT's own weights, and the rest of the name.

    A weight that replaces the base's has no mark: its whole name comes first.
    """
    module, *mark_and_rest = re.split(r"(\.lora_|\.token_adapter\.)", key, maxsplit=1)
    return (module, mark_and_rest[0], mark_and_rest[1]) if mark_and_rest else (module, "", "")
