"""LoRA adapters (arXiv 2106.09685) as PEFT writes them, which take part in drafts alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models import Model, fused_weights
from ..models.fields import NO, Field, check_supported, read
from ..ops.inputs import DTYPES
from .checkpoint import OURS, DraftCheckpoint, Origin, check_target, write_checkpoint

_RANK = Field(int, most=2**14)
_FIELDS = {"r": _RANK, "lora_alpha": Field(float, least=0, most=2**20), "use_rslora": NO}
_SUPPORTED = {
    **{"peft_type": "LORA", "bias": "none", "use_dora": False, "fan_in_fan_out": False, "lora_bias": False},
    **{"rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": [], "layer_replication": []},
}
_PREFIX = "base_model.model."


class LowRank(nn.Module):
    """A layer's output and up(down(x)). down: (r, in), up: (out, r), with the adapter's factor in it; in the
    dtype of x, or under training in float32."""

    only: Tensor | None = None
    """(N, 1) bool: the rows of x (N, in) that are adapted; None: all."""

    def __init__(self, base: nn.Module, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self.base, self.down, self.up = base, down, up

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)"""
        low = F.linear(x, self.down.to(x.dtype))
        if self.only is not None:
            low = low.masked_fill(~self.only, 0.0)
        return fused_weights.apply(self.base, x) + F.linear(low, self.up.to(x.dtype))


class Adapter:
    """A LoRA adapter of linear layers, as PEFT writes it.

    Raises ValueError naming the key of adapter_config.json, or the tensor, that is not supported.
    """

    def __init__(self, checkpoint: DraftCheckpoint) -> None:
        self.source, config = checkpoint.source, checkpoint.config
        self.config, self.origin = config, Origin.of(config)
        check_supported(config, _SUPPORTED)
        c = read(config, _FIELDS)
        factor = c["lora_alpha"] / (math.sqrt(c["r"]) if c["use_rslora"] else c["r"])
        self.pairs: dict[str, tuple[Tensor, Tensor]] = {}
        """The checkpoint's name of a layer -> down and up, see `LowRank`."""
        left = dict(checkpoint.tensors)
        for name in sorted(checkpoint.tensors):
            layer, _, end = name.removeprefix(_PREFIX).rpartition(".lora_A.")
            up = left.pop(name.replace(".lora_A.", ".lora_B."), None) if layer and end == "weight" else None
            if up is None:
                continue
            down, r = left.pop(name), c["r"]
            if any(t.ndim != 2 or t.dtype not in DTYPES for t in (down, up)) or not (
                len(down) == up.shape[1] == r
            ):
                raise ValueError(
                    f"{self.source}: {name}: expected ({r}, in), and (out, {r}) of lora_B, in one of "
                    f"{[str(dtype) for dtype in DTYPES]}, got {[(*t.shape, t.dtype) for t in (down, up)]}"
                )
            if layer in self.pairs:
                raise ValueError(f"{self.source}: {layer:.200} is named twice, with {_PREFIX!r} and without")
            up = up * factor
            if not all(bool(t.isfinite().all()) for t in (down, up)):
                raise ValueError(f"{self.source}: {name}: expected finite weights, got inf or NaN in A or B")
            self.pairs[layer] = down, up
        if left or not self.pairs:
            names = f"got {sorted(left)[0]:.200}" if left else "got none"
            raise ValueError(f"{self.source}: expected tensors LAYER.lora_A.weight and lora_B, {names}")

    def check(self, model: Model) -> None:
        """Raise ValueError for a layer that the model does not have, or that has another shape, and for a
        model other than the one that the file says it was trained for."""
        check_target(self.source, self.origin, model)
        layers = dict(model.named_modules())
        for name, (down, up) in self.pairs.items():
            layer: Any = layers.get(name)
            if layer is None or not hasattr(layer, "in_features"):
                raise ValueError(f"drafter: {self.source} adapts {name:.200}, which the model does not have")
            if (layer.out_features, layer.in_features) != (len(up), down.shape[1]):
                raise ValueError(
                    f"drafter: {self.source} adapts {name} of ({len(up)}, {down.shape[1]}), and the model "
                    f"has ({layer.out_features}, {layer.in_features})"
                )

    def of(self, model: Model) -> dict[str, LowRank]:
        """The adapted layers by name, with weights in the dtype and on the device of the model."""
        layers = dict(model.named_modules())

        def there(t: Tensor) -> nn.Parameter:
            return nn.Parameter(t.to(model.device, model.dtype), requires_grad=False)

        return {name: LowRank(layers[name], *map(there, pair)) for name, pair in self.pairs.items()}

    def save(self, path: str | Path, ours: Mapping[str, Any], dtype: torch.dtype) -> None:
        """Write the adapter, see `write_checkpoint`. ours: the fields that only this library reads."""
        tensors = {
            f"{_PREFIX}{name}.{leaf}.weight": t
            for name, pair in self.pairs.items()
            for leaf, t in zip(("lora_A", "lora_B"), pair, strict=True)
        }
        in_weights = {"lora_alpha": self.config["r"], "use_rslora": False}  # the factor
        write_checkpoint(path, {**self.config, **in_weights, OURS: dict(ours)}, tensors, dtype)


def adapted(model: Model, parts: Mapping[str, LowRank]) -> Model:
    """A model that shares all modules of `model`, but has these parts in place of the layers they are named
    after. Each part's `base` becomes the layer that the model has now."""
    result, layers = model, dict(model.named_modules())
    for name, part in parts.items():
        part.base = layers[name]
        result = _replaced(result, name.split("."), part)
    return result


def _replaced(module: Any, path: Sequence[str], part: nn.Module) -> Any:
    """A copy of the module that shares all but the part at `path`, and the modules around it."""
    if not path:
        return part
    copied = copy.copy(module)
    copied._modules = dict(module._modules)
    copied._modules[path[0]] = _replaced(module._modules[path[0]], path[1:], part)
    return copied
