"""Which devices there are, which of them this build has kernels for, and which multiply bfloat16 fast."""

from __future__ import annotations

import functools
import platform

import torch

from . import _C
from .arguments import warn


def device_of(device: torch.device | str | None) -> torch.device:
    """The device of this name, by default the CPU. Raises ValueError if it is not there."""
    place: torch.device | None
    try:
        place = torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError, ValueError):
        place = None
    if place is None or place.type not in ("cpu", "cuda") or (place.type == "cpu" and place.index):
        raise ValueError(f"device: expected cpu, cuda or cuda:N, got {str(device)!r}")
    if place.type == "cpu":
        return torch.device("cpu")  # safetensors does not know cpu:0
    if place.type == "cuda":
        count = torch.cuda.device_count()
        if not count:
            built = "none is there" if torch.version.cuda else "this torch is built without CUDA"
            raise ValueError(f"device: {str(device)!r} needs an NVIDIA GPU, and {built}")
        if (place.index or 0) >= count:
            raise ValueError(f"device: expected cuda:0 to cuda:{count - 1}, got {str(device)!r}")
    return place


def warn_without_kernels(device: torch.device | str | None) -> None:
    """Warn, before tensors are moved there, if this build has no kernels for `device`."""
    kind = torch.device("cpu" if device is None else device).type
    info = _C.build_info()
    if kind in ("cpu", "meta", *info["backends"].split()):
        return
    why = f": {info['cuda_reason']}" if kind == "cuda" else ""
    warn(f"dparallel_ext has no kernels for {kind} in this build: its ops will refuse tensors there{why}")


def fast_bfloat16(device: torch.device | str | None = None) -> bool:
    """Whether torch multiplies bfloat16 matrices as fast as float32 ones on a device (default: the CPU).

    On a CPU it does with instructions for them (AMX, AVX512-BF16, Arm's BF16). Without these it converts the
    numbers first, or uses a loop, which is five (AVX-512) or ten (AVX2) times slower.
    """
    return torch.device("cpu" if device is None else device).type != "cpu" or _cpu_multiplies_bfloat16()


@functools.cache
def _cpu_multiplies_bfloat16() -> bool:
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    if supported is None or not supported():
        return False
    if platform.machine() not in ("x86_64", "AMD64"):
        return True
    # There oneDNN supports dtypes that it converts, too. Without an answer from torch a dtype counts as fast,
    # as in torch.
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: True)() for name in names)
