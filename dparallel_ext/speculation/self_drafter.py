"""Self-speculation of a model that predicts masks and the next token (Nemotron-Labs-Diffusion, NVIDIA, 2026).

    draft     rows [root, mask, ...] behind the text, which see each other: each mask's likeliest token
    verify    the same model, each position seeing those up to itself

The text is the autoregressive model's. The draft's keys and values lie where the verify pass writes its own.
A LoRA adapter (arXiv 2106.09685) may take part in the draft alone, as the published `linear_spec_lora` does.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .._C import DraftTree
from ..arguments import instance, whole
from ..cache import AttentionMetadata, KVCache
from ..models import Model, fused_weights, traits
from ..models.fields import NO, Field, check_supported, read
from ..ops.inputs import DTYPES
from .blocks import BlockSession, chain
from .checkpoint import DraftCheckpoint
from .draft import Draft

_RANK = Field(int, most=2**14)
_FIELDS = {"r": _RANK, "lora_alpha": Field(float, least=0, most=2**20), "use_rslora": NO}
_SUPPORTED = {
    **{"peft_type": "LORA", "bias": "none", "use_dora": False, "fan_in_fan_out": False, "lora_bias": False},
    **{"rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": [], "layer_replication": []},
}
_PREFIX = "base_model.model."


class LowRank(nn.Module):
    """A layer's output and up(down(x)). down: (r, in), up: (out, r), with the adapter's factor in it."""

    def __init__(self, base: nn.Module, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = (nn.Parameter(t, requires_grad=False) for t in (down, up))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)"""
        return fused_weights.apply(self.base, x) + F.linear(F.linear(x, self.down), self.up)


class Adapter:
    """A LoRA adapter of linear layers, as PEFT writes it.

    Raises ValueError naming the key of adapter_config.json, or the tensor, that is not supported.
    """

    def __init__(self, checkpoint: DraftCheckpoint) -> None:
        self.source, config = checkpoint.source, checkpoint.config
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
        """Raise ValueError for a layer that the model does not have, or that has another shape."""
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
        return {
            name: LowRank(layers[name], *(t.to(model.device, model.dtype) for t in pair))
            for name, pair in self.pairs.items()
        }


def adapted(model: Model, parts: Mapping[str, LowRank]) -> Model:
    """A model that shares all modules of `model` but some layers, whose places these parts take, before the
    layers that the model has now."""
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


class SelfDrafter:
    """Drafts with the model itself, a block of masks in one pass: the published `linear_spec_generate`.

    Args:
        block: rows of a block, the root among them, from 2 to 512; at the end of a sequence, as many as it
            has room for. The published code has 32, as in training.
        adapter: takes part in drafts. `load` reads a drafter with one.
    """

    width = 1
    """As `BlockDrafter.width`."""

    def __init__(self, block: int = 32, adapter: Adapter | None = None) -> None:
        if adapter is not None:
            instance("adapter", adapter, Adapter)
        self.block, self.adapter = whole("block", block, 2, 512), adapter
        self.most = self.block - 1

    def __repr__(self) -> str:
        adapter = self.adapter and self.adapter.source
        return f"{type(self).__name__}(block={self.block}, adapter={adapter!r})"

    def check(self, model: Model) -> None:
        """Raise ValueError for a model that predicts the next token alone, without a mask token, or whose
        layers the adapter does not fit."""
        if not traits(model).onward:
            raise ValueError(
                'drafter: "self" is for models that predict masks too, as Nemotron-Labs-Diffusion does, got '
                f"{type(model).__name__}"
            )
        if model.mask_id is None:
            raise ValueError('drafter: "self" needs a mask token, and the model\'s config names none')
        if self.adapter is not None:
            self.adapter.check(model)

    def draft(self, tree: DraftTree, guesses: Sequence[int]) -> Draft:
        """As `BlockDrafter.draft`."""
        return chain(tree, guesses)

    def session(self, model: Model, kv_cache: KVCache, lanes: int, *, graphs: bool = True) -> BlockSession:
        return _Session(self, model, kv_cache, graphs)


def drafter_of_adapter(checkpoint: DraftCheckpoint) -> SelfDrafter:
    """The drafter of an adapter's directory. Raises ValueError as `Adapter`."""
    return SelfDrafter(adapter=Adapter(checkpoint))


class _Session(BlockSession):
    def __init__(self, drafter: SelfDrafter, model: Model, kv_cache: KVCache, graphs: bool) -> None:
        assert model.mask_id is not None
        self._parts = {} if drafter.adapter is None else drafter.adapter.of(model)
        own = nn.ParameterList([t for part in self._parts.values() for t in (part.down, part.up)])
        self.size = sum(t.nbytes for t in own)
        super().__init__(
            own,
            model,
            kv_cache,
            block=drafter.block,
            mask_id=model.mask_id,
            width=min(drafter.width, model.shape.embedding_size),
            draft=drafter.draft,
            graphs=graphs,
        )
        self.begin()

    def begin(self) -> None:
        """Draft with the layers that the model has now; it may have been quantised or adapted."""
        self._adapted = adapted(self.model, self._parts) if self._parts else None

    @property
    def _drafting(self) -> Model:
        return self._adapted or self.model

    def hidden(self, ids: Tensor, metadata: AttentionMetadata) -> Tensor:
        return self._drafting.step(ids, self.kv_cache, metadata)

    def head(self, hidden: Tensor) -> Tensor:
        return self._drafting.head(hidden)
