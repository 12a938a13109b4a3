"""Where models come from: the ones that ship with the package, or a checkpoint directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dparallel_ext import models

BUILTIN = Path(__file__).parent / "builtin"
DEFAULT = "builtin:teacher"


def builtins() -> list[str]:
    """Names of the models that ship with the package."""
    return [f"builtin:{path.parent.name}" for path in sorted(BUILTIN.glob("*/config.json"))]


def directory_of(name: str) -> Path:
    """The checkpoint directory of "builtin:NAME" or of a path. Raises FileNotFoundError."""
    directory = BUILTIN / name.removeprefix("builtin:") if name.startswith("builtin:") else Path(name)
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(
            f"model: {name!r} is neither one of {builtins()} nor a directory with a config.json"
        )
    return directory


def load(name: str = DEFAULT, *, device: str | None = None, fp8: bool = False) -> tuple[models.Model, Any]:
    """(model, `tokenizers.Tokenizer`) of a name; `fp8`: see `Model.quantize`.

    Raises FileNotFoundError and ValueError, by name.
    """
    from tokenizers import Tokenizer

    directory = directory_of(name)
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(f"model: {directory} has no tokenizer.json")
    fuse = True if name.startswith("builtin:") else None  # small enough not to be mapped
    model = models.load(directory, device=device, fuse=fuse)
    return model.quantize() if fp8 else model, Tokenizer.from_file(str(file))
