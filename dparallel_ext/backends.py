"""Which devices this build has kernels for."""

from __future__ import annotations

import warnings

import torch

from . import _C


def warn_without_kernels(device: torch.device | str | None) -> None:
    """Warn, before tensors are moved there, if this build has no kernels for `device`."""
    kind = torch.device(device or "cpu").type
    info = _C.build_info()
    if kind in ("cpu", "meta", *info["backends"].split()):
        return
    why = f": {info['cuda_reason']}" if kind == "cuda" else ""
    warnings.warn(
        f"dparallel_ext has no kernels for {kind} in this build: its ops will refuse tensors there{why}",
        stacklevel=3,
    )
