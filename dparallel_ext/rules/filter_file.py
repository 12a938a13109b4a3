"""The files of filters for the rule `learned`: two layers' weights, and the model that they were trained
for."""

from __future__ import annotations

import errno
import functools
import hashlib
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..arguments import shown

TENSORS = ("0.weight", "0.bias", "2.weight", "2.bias")
"""W1 (H, N), b1, W2 (N, H), b2 by their names in a file, which are the names in Sequential(Linear, ReLU,
Linear)."""

NAMED: dict[str, Path] = {}
"""Name -> file, such as "builtin:teacher"; `dparallel.registry` adds the filters that ship."""


def read_filter(file: str | Path) -> tuple[str, tuple[Tensor, ...], dict[str, str]]:
    """The hash of a filter's weights, the weights by `TENSORS`, and the file's metadata.

    file: a safetensors file, or a name in `NAMED`. Raises ValueError for a file that is no filter.
    """
    if not isinstance(file, (str, Path)):
        raise ValueError(f"file: expected a path or one of the names {list(NAMED)}, got {shown(file)}")
    try:
        path = NAMED.get(str(file), Path(file))
        stat = _stat(path)
        return _read(str(path), stat.st_mtime_ns, stat.st_size)
    except (OSError, SafetensorError) as error:
        why = str(getattr(error, "strerror", None) or error)
        if str(file).startswith("builtin:"):
            why += f"; filters with a name: {list(NAMED)}, once dparallel.registry is imported"
        raise ValueError(f"file: {file!s:.200} is not a readable safetensors file: {why}") from error


def _stat(path: Path) -> os.stat_result:
    """`path.stat()`. Raises FileNotFoundError also for a name that no file can have."""
    try:
        return path.stat()
    except ValueError as error:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)) from error


@functools.lru_cache(16)
def _read(file: str, time: int, size: int) -> tuple[str, tuple[Tensor, ...], dict[str, str]]:
    """See `read_filter`. time, size: of the file, so that a changed file is read again."""
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata() or {}
        if not {*TENSORS} <= {*opened.keys()}:
            raise ValueError(
                f"file: {file} is no filter: expected {list(TENSORS)}, got {sorted(opened.keys())[:8]}"
            )
        weights = tuple(opened.get_tensor(name).float().clone() for name in TENSORS)  # no maps of the file
    w1 = weights[0]
    shapes = [tuple(weight.shape) for weight in weights]
    if w1.ndim != 2 or not w1.numel() or shapes != [w1.shape, w1.shape[:1], w1.shape[::-1], w1.shape[1:]]:
        raise ValueError(f"file: {file} is no filter: expected (H, N), (H,), (N, H), (N,), got {shapes}")
    if not all(bool(weight.isfinite().all()) for weight in weights):
        raise ValueError(f"file: {file} holds NaN or infinite weights")
    content = hashlib.sha256(b"".join(weight.numpy().tobytes() for weight in weights))
    return content.hexdigest(), weights, metadata
