"""Where models come from: the ones that ship with the package, or a checkpoint directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

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


def fast_bfloat16(device: torch.device | str | None = None) -> bool:
    """Whether a device multiplies bfloat16 matrices as fast as float32's.

    A CPU without such products (AVX2 alone) leaves them to a loop of torch's that is ten times slower.
    """
    if torch.device(device or "cpu").type != "cpu":
        return True
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is not None and supported()


def load(
    name: str = DEFAULT,
    *,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    fp8: bool = False,
) -> tuple[models.Model, Any]:
    """(model, `tokenizers.Tokenizer`) of a name; `fp8`: see `Model.quantize`.

    `dtype`: default the checkpoint's; of the models that ship float32, where bfloat16 is slow.

    Raises FileNotFoundError and ValueError, by name.
    """
    from tokenizers import Tokenizer

    directory = directory_of(name)
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(f"model: {directory} has no tokenizer.json")
    fuse = None
    if name.startswith("builtin:"):
        fuse = True  # small enough not to be mapped
        if dtype is None and not fast_bfloat16(device):
            dtype = torch.float32
    model = models.load(directory, device=device, dtype=dtype, fuse=fuse)
    return model.quantize() if fp8 else model, Tokenizer.from_file(str(file))
