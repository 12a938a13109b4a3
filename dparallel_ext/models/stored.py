"""The tensors of a checkpoint's files, before they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from . import files

WEIGHTS = "model.safetensors"


class SourceTensor(NamedTuple):
    """A tensor of a checkpoint's files or of a loaded model; `fetch` reads it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """A name in `DTYPES`, or the name of a dtype that is not supported."""
    fetch: Callable[[], Tensor]
    computed: bool = False
    """Whether `fetch` computes it, and takes memory for it."""


DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
"""safetensors' name -> dtype, of the dtypes that are read."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def stored_tensors(
    shards: Mapping[Path, Mapping[str, str] | None], device: str, opened: ExitStack
) -> Iterator[SourceTensor]:
    """The tensors in the files; `opened` closes the files."""
    seen: dict[str, Path] = {}
    for file, index in shards.items():
        with files.readable(file):
            files.refuse_pointer(file)
            shard = opened.enter_context(safe_open(file, framework="pt", device=device))
            for name in shard.keys():  # noqa: SIM118 (no mapping)
                if index is not None and index.get(name, file.name) != file.name:
                    continue  # the index names another file for this tensor
                if name in seen:
                    raise ValueError(
                        f"path: {file} and {seen[name].name} both hold {name:.200}, and the index does not "
                        "say which is meant"
                    )
                seen[name] = file
                part = shard.get_slice(name)
                later = partial(fetch, file, shard, name)
                yield SourceTensor(name, tuple(part.get_shape()), part.get_dtype(), later)


def fetch(file: Path, shard: Any, name: str) -> Tensor:
    """A tensor of an open safetensors file. Raises ValueError naming the file if it cannot be read."""
    with files.readable(file):
        tensor: Tensor = shard.get_tensor(name)
    return tensor


def shards_of(directory: Path) -> dict[Path, dict[str, str] | None]:
    """The files of weights, each with the index, {tensor: file}; None for a single file."""
    single, index = directory / WEIGHTS, directory / f"{WEIGHTS}.index.json"
    if files.is_there(single):  # before an index, as in transformers
        return {single: None}
    if not files.is_there(index):
        hint = files.unread_weights(directory.glob("*"))
        raise FileNotFoundError(f"path: no {single.name} (nor {index.name}) in {directory}{hint}")
    weight_map = files.read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"path: {index} has no weight_map")
    for name in weight_map.values():
        if not isinstance(name, str) or name in ("", "..") or Path(name).name != name:
            raise ValueError(f"path: {index} names {name!r:.200}, expected a file beside it")
    shards = [directory / name for name in sorted(set(weight_map.values()))]
    for file in shards:
        if not files.is_there(file):
            raise FileNotFoundError(f"path: {index.name} names {file.name!r:.200}, not in {directory}")
    return dict.fromkeys(shards, weight_map)
