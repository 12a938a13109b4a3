"""Files of drafters with weights: config.json and model.safetensors in a directory, or one .safetensors file.

config.json has a key `OURS` for facts that the published layouts have no place for: the kind of drafter, the
model that it was trained for, and the chat template of its training. A LoRA adapter's directory has PEFT's
files instead. PEFT warns of keys that it does not know, so there `OURS` is in the metadata of the weights.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from .. import whole_files
from ..models import Model, files, fingerprint
from ..models.fields import Field, read
from ..ops.inputs import DTYPES

OURS = "dparallel"
"""The key of config.json for facts that the published layout has no place for."""
FILES = ("config.json", "model.safetensors")
"""The files of a drafter's directory."""
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
"""The files of a LoRA adapter, as PEFT writes them."""
METADATA = "config"
"""The key of a single file's metadata that holds the content of config.json."""


class Origin(NamedTuple):
    """A drafter's kind and training, from its config.json; all None in published files."""

    kind: str | None = None
    target: str | None = None
    """The `models.fingerprint` of the model that it was trained for; None: not known."""
    template: str | None = None
    """The chat template of prompts in training, by its name."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Origin:
        """The origin in a config.json. Raises ValueError for values that are no text."""
        ours = read(config, {OURS: Field(dict, {})})[OURS]
        origin = cls(*map(ours.get, Origin._fields))
        for name, text in zip(Origin._fields, origin, strict=True):
            if not isinstance(text, str | None):
                raise ValueError(f"config: {OURS}: {name}={text!r:.80}, expected text or null")
        return origin

    @property
    def ours(self) -> dict[str, Any]:
        """The entry for config.json."""
        return {OURS: dict(zip(Origin._fields, self, strict=True))}


class DraftCheckpoint(NamedTuple):
    """A drafter's file as it was read."""

    source: str
    """Names the file in errors."""
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    def fill(self, model: nn.Module) -> None:
        """Put the weights into `model`, which is on the device "meta".

        Raises ValueError naming missing, extra and misshapen tensors.
        """
        wanted = model.state_dict()
        faults = []
        for name, like in wanted.items():
            tensor = self.tensors.get(name)
            if tensor is None:
                faults.append(f"{name} is missing")
            elif tensor.shape != like.shape:
                faults.append(f"{name} is {tuple(tensor.shape)}, expected {tuple(like.shape)}")
            elif not like.is_floating_point() and tensor.dtype != like.dtype:
                faults.append(f"{name} is {tensor.dtype}, expected {like.dtype}")
            elif like.is_floating_point() and tensor.dtype not in DTYPES:
                faults.append(f"{name} is {tensor.dtype}, expected a floating-point type of 16 or 32 bits")
        faults += [f"{name:.200} is unexpected" for name in sorted(self.tensors.keys() - wanted.keys())]
        if faults:
            others = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
            raise ValueError(f"{self.source} does not fit its config: {'; '.join(faults[:5])}{others}")
        with torch.inference_mode(False):
            model.load_state_dict(self.tensors, assign=True)


def read_checkpoint(path: str | Path) -> DraftCheckpoint:
    """Read a directory (or ORG/NAME, see `models.locate`), also of an adapter, or one .safetensors file.

    Raises:
        FileNotFoundError: naming the missing file or directory.
        ValueError: naming the file that cannot be read.
    """
    path = whole_files.as_path("path", path, "a directory, ORG/NAME or a .safetensors file")
    is_file = is_single_file(path)
    directory = path.parent if is_file else files.locate(path)
    adapter = not is_file and any(files.is_there(directory / name) for name in ADAPTER_FILES)
    config_file, weights = ADAPTER_FILES if adapter else FILES
    file = path if is_file else directory / weights
    if not files.is_there(file):
        others = [] if is_file else sorted(other.name for other in directory.glob("*.bin"))
        hint = f"; {others[0]} is not read, safetensors.torch.save_file writes its tensors" if others else ""
        raise FileNotFoundError(f"path: no file {file!s:.200}{hint}")
    files.refuse_pointer(file)
    # Tensors made outside inference mode can be trained or copied anywhere.
    with files.readable(file), torch.inference_mode(False), safe_open(file, framework="pt") as opened:
        metadata = opened.metadata() or {}
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
    if is_file:
        config = _of_metadata(file, metadata, METADATA)
    else:
        config = files.read_json(directory / config_file, required=True)
    if OURS in metadata:
        config[OURS] = _of_metadata(file, metadata, OURS)
    return DraftCheckpoint(str(path), config, tensors)


def is_single_file(path: Path) -> bool:
    """Whether a drafter's path is that of one file, and not of a directory."""
    return path.suffix == ".safetensors" and not os.path.isdir(path)


def _of_metadata(file: Path, metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    try:
        content = json.loads(metadata.get(key, ""))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"path: {file} is no drafter: its metadata has no {key}, as `save` writes it")
    return content


def write_checkpoint(
    path: str | Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> None:
    """Write one file if the path ends in .safetensors, else a directory in the layout of the published
    checkpoints, or of an adapter if the config is one's, see `files.replace_model`. Each file appears whole
    or not at all.

    Raises ValueError for a dtype that `DraftCheckpoint.fill` does not take, and for a path that cannot be
    written to.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected float32, bfloat16 or float16, got {dtype!r}")
    path = whole_files.as_path("path", path)
    config = {**config, "torch_dtype": str(dtype).removeprefix("torch.")}
    stored = {
        name: t.to("cpu", dtype if t.is_floating_point() else t.dtype, copy=True).contiguous()
        for name, t in tensors.items()
    }
    if is_single_file(path):
        whole_files.directory("path", path.parent)
        with whole_files.replacing(path) as file:
            file.write_bytes(save(stored, {METADATA: json.dumps(config)}))
        return
    names, metadata = FILES, {"format": "pt"}
    if "peft_type" in config:
        names, metadata[OURS] = ADAPTER_FILES, json.dumps(config.pop(OURS))
        del config["torch_dtype"]
    weights = save(stored, metadata)
    files.replace_model(
        whole_files.directory("path", path), config, lambda file: file.write_bytes(weights), names
    )


def check_target(source: str, origin: Origin, model: Model, **sizes: int) -> None:
    """Raise ValueError for a model of another vocabulary, other sizes or other weights than a drafter's.

    sizes: of the model that the drafter was made for, by name: vocabulary, width, layers.
    """
    s = model.shape
    for name, what, theirs in (
        ("vocabulary", "a vocabulary of {} tokens", s.embedding_size),
        ("width", "a model of width {}", s.width),
        ("layers", "a model of {} layers", s.layers),
    ):
        if sizes.get(name, theirs) != theirs:
            raise ValueError(
                f"drafter: {source} was made for {what.format(sizes[name])}, and the model has {theirs}"
            )
    if origin.target is not None and (target := fingerprint(model)) != origin.target:
        raise ValueError(
            f"drafter: {source} was trained for another model ({origin.target}, and this is {target})"
        )
