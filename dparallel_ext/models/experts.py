"""Mixtures of experts: MLPs of which each token takes a few, as Qwen3's and SDAR's.

    router    a token's logits, one for each expert; their softmax, in float32
    choose    the `per_token` most probable experts, weighted by their probabilities, which in most releases
              are scaled to a sum of 1
    mix       the weighted sum of what these experts give

A checkpoint stores the experts one by one. Here all of a layer lie in two parameters, so that one grouped
product serves them, and under the names that transformers gives them in memory.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import linear, swiglu
from ..ops.inputs import compiled
from .config import ModelConfig

LEAVES = ("gate_up_proj", "down_proj")


class Experts(nn.Module):
    """The experts of a layer."""

    def __init__(self, shape: ModelConfig) -> None:
        super().__init__()
        assert shape.experts is not None
        self.sizes = e = shape.experts
        self.gate_up_proj = nn.Parameter(torch.empty(e.count, 2 * e.width, shape.width))
        self.down_proj = nn.Parameter(torch.empty(e.count, shape.width, e.width))
        for parameter in (self.gate_up_proj, self.down_proj):
            nn.init.uniform_(parameter, -(parameter.shape[-1] ** -0.5), parameter.shape[-1] ** -0.5)
        self.register_load_state_dict_pre_hook(_together)

    def forward(self, x: Tensor, logits: Tensor) -> Tensor:
        """The mixture (..., width) of x (..., width). logits (..., count): the router's."""
        share, chosen = logits.softmax(-1, dtype=torch.float32).topk(self.sizes.per_token)
        if self.sizes.normalized:
            share = share / share.sum(-1, keepdim=True)
        # Pairs of a token and one of its experts, by expert, then by token.
        order = chosen.flatten().argsort(stable=True)
        experts = torch.arange(self.sizes.count, device=x.device)
        ends = torch.searchsorted(chosen.flatten()[order], experts, right=True)  # of each expert's pairs
        mix = self.grouped if x.is_cuda and x.dtype == torch.bfloat16 else self.one_by_one
        flat = x.reshape(-1, x.shape[-1])
        return mix(flat, order, share.to(logits.dtype).flatten()[order, None], ends).view(x.shape)

    def one_by_one(self, x: Tensor, order: Tensor, share: Tensor, ends: Tensor) -> Tensor:
        """Expert by expert, as published: the order of the sums, and their roundings, are the same."""
        mixed, first, tokens = torch.zeros_like(x), 0, order // self.sizes.per_token
        for expert, end in enumerate(ends.tolist()):
            if first < end:
                token = tokens[first:end]
                hidden = _activated(linear(x[token], self.gate_up_proj[expert]))
                parts = linear(hidden, self.down_proj[expert]) * share[first:end]
                mixed.index_add_(0, token, parts.to(x.dtype))  # of another under autocast
            first = end
        return mixed

    def grouped(self, x: Tensor, order: Tensor, share: Tensor, ends: Tensor) -> Tensor:
        """By two products for all experts, without a wait for the device; sums are in float32."""
        tokens, ends = order // self.sizes.per_token, ends.to(torch.int32)
        hidden = _activated(F.grouped_mm(x[tokens], self.gate_up_proj.transpose(1, 2), offs=ends))
        parts = F.grouped_mm(hidden, self.down_proj.transpose(1, 2), offs=ends) * share
        by_token = torch.empty_like(parts).index_copy(0, order, parts)
        return by_token.unflatten(0, (-1, self.sizes.per_token)).sum(1, dtype=torch.float32).to(x.dtype)


def _activated(both: Tensor) -> Tensor:
    """silu(gate) * up of gate and up side by side, (N, 2 * width) -> (N, width)."""
    if compiled(both):
        return swiglu(both)
    gate, up = both.chunk(2, -1)
    return F.silu(gate) * up


def _together(experts: Experts, state: MutableMapping[str, Any], prefix: str, *_unused: object) -> None:
    """Put experts that a state dict holds one by one, as a checkpoint's file does, into one tensor."""
    for leaf in LEAVES:
        whole = torch.empty_like(getattr(experts, leaf), requires_grad=False)
        parts = in_parts(prefix + leaf, whole)
        if prefix + leaf not in state and parts.keys() <= state.keys():
            for name, part in parts.items():
                part.copy_(state.pop(name))
            state[prefix + leaf] = whole


def in_parts(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """The tensors by which a checkpoint stores the parameter `name`, as views of `tensor`, by their names;
    the tensor itself, unless it holds the experts of a layer."""
    module, _, leaf = name.rpartition(".")
    if not module.endswith(".experts") or leaf not in LEAVES:
        return {name: tensor}
    parts: dict[str, Tensor] = {}
    for expert, weights in enumerate(tensor):
        names = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else ("down_proj",)
        for of_part, part in zip(names, weights.chunk(len(names)), strict=True):
            parts[f"{module}.{expert}.{of_part}.weight"] = part
    return parts
