"""Mixtures of experts: MLPs of which each token takes a few, as in Qwen3, SDAR and LLaDA2.

    router    a token's scores of the experts, in float32: their softmax; or the sigmoid of each
    choose    the `per_token` experts of the highest scores, weighted by these, which in most releases are
              scaled to a sum of 1. With groups (DeepSeek-V3, arXiv 2412.19437): by score and a learnt bias,
              among the groups with the highest sums of two. With blocks (LLaDA 2.2): by score and bias too,
              among the experts with the highest of any token of the block
    mix       the weighted sum of what these experts give

A checkpoint stores the experts one by one. Here all of a layer lie in two parameters, so that one grouped
product serves them, and under the names that transformers gives them in memory.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import linear
from . import fused_weights
from .config import BlockRouting, ExpertsConfig, GroupRouting, ModelConfig

LEAVES = ("gate_up_proj", "down_proj")


def by_one_product(sizes: ExpertsConfig, like: Tensor) -> bool:
    """Whether one product serves all experts of rows like those of `like` (..., width). Torch's takes
    bfloat16 on a GPU, rows of multiples of 16 bytes, and fewer than 1024 experts."""
    fits = not (like.shape[-1] % 8 or sizes.width % 8) and sizes.count < 1024
    return like.is_cuda and like.dtype == torch.bfloat16 and fits


def waits(sizes: ExpertsConfig, like: Tensor) -> bool:
    """Whether a mixture of rows like those of `like` (..., width) waits for the device, so that passes cannot
    be recorded as CUDA graphs.

    Expert by expert the host must know how many tokens each has. Torch's product of all experts leaves that
    to the GPU where it has a kernel for them, for compute capability 9.x and 10.x; elsewhere it copies the
    numbers to the host and goes expert by expert (ATen/native/GroupedMMUtils.h of torch 2.13).
    """
    return not by_one_product(sizes, like) or torch.cuda.get_device_capability(like.device)[0] not in (9, 10)


class Router(nn.Module):
    """Chooses each token's experts."""

    def __init__(self, shape: ModelConfig) -> None:
        super().__init__()
        assert shape.experts is not None
        self.sizes = s = shape.experts
        self.expert_bias: Tensor
        self.weight = nn.Parameter(torch.empty(s.count, shape.width))
        nn.init.uniform_(self.weight, -(shape.width**-0.5), shape.width**-0.5)
        if s.routing is not None:
            self.register_buffer("expert_bias", torch.zeros(s.count))

    def forward(self, x: Tensor, together: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The weights and the ids (N, per_token) of the experts of x (N, width).

        together: (N,) int64 from 0 to N, the block of each row; needed where tokens are routed by blocks.
        """
        s = self.sizes
        if s.routing is not None:
            return self._by_sigmoids(x, s.routing, together)
        logits = linear(x, self.weight)
        share, chosen = logits.softmax(-1, dtype=torch.float32).topk(s.per_token)
        if s.normalized:
            share = share / share.sum(-1, keepdim=True)
        return share.to(logits.dtype), chosen

    def _by_sigmoids(
        self, x: Tensor, routing: GroupRouting | BlockRouting, together: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        with nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
            scores = F.linear(x.float(), self.weight.float()).sigmoid()
        biased = (scores + self.expert_bias).detach()
        if isinstance(routing, GroupRouting):
            among = _among_groups(biased, routing)
        else:
            assert together is not None
            among = _among_experts_of_blocks(biased, routing, together)
        chosen = among.topk(self.sizes.per_token).indices
        share = scores.gather(1, chosen)
        if self.sizes.normalized:
            share = share / (share.sum(-1, keepdim=True) + 1e-20)
        return share * routing.scale, chosen

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Move with the model; a change of dtype leaves the bias in float32."""
        bias = self._buffers.get("expert_bias")
        super()._apply(fn, recurse)
        if bias is not None and self.expert_bias.dtype != bias.dtype:
            self._buffers["expert_bias"] = bias.to(self.expert_bias.device)
        return self


def _among_groups(scores: Tensor, routing: GroupRouting) -> Tensor:
    """`scores` (N, experts), -inf outside the best groups of each token."""
    by_group = scores.unflatten(-1, (routing.groups, -1))
    best = by_group.topk(2).values.sum(-1).topk(routing.per_token).indices  # (N, groups for a token)
    outside = torch.ones(by_group.shape[:2], dtype=torch.bool, device=scores.device)
    return by_group.masked_fill(outside.scatter_(1, best, False)[..., None], -torch.inf).flatten(1)


def _among_experts_of_blocks(scores: Tensor, routing: BlockRouting, together: Tensor) -> Tensor:
    """`scores` (N, experts), -inf outside the experts of each token's block. together: see `Router`."""
    # As many blocks as there may be, so that no number has to be read from the device.
    highest = scores.new_full((len(scores) + 1, scores.shape[1]), -torch.inf)
    highest.scatter_reduce_(0, together[:, None].expand(scores.shape), scores, "amax")
    outside = torch.ones(highest.shape, dtype=torch.bool, device=scores.device)
    outside.scatter_(1, highest.topk(routing.capacity).indices, False)
    return scores.masked_fill(outside[together], -torch.inf)


def together_in(sequence: Tensor, position: Tensor, real: Tensor, block: int) -> Tensor:
    """The blocks of N packed tokens, (N,) int64 from 0 to N, for the `Router`.

    sequence, position: (N,) int64, of each token; those of a block adjoin. real: (N,) bool, the tokens that
    are no padding, which has a block of its own. block: the length of the blocks.
    """
    number = torch.where(real, sequence * 2**32 + position // block, -1)
    first = torch.ones_like(real)
    first[1:] = number[1:] != number[:-1]
    return first.cumsum(0) - 1


class SharedExpert(nn.Module):
    """The MLP that every token takes."""

    def __init__(self, shape: ModelConfig) -> None:
        super().__init__()
        assert shape.experts is not None
        width = shape.experts.shared_width
        self.gate_proj = nn.Linear(shape.width, width, bias=False)
        self.up_proj = nn.Linear(shape.width, width, bias=False)
        self.down_proj = nn.Linear(width, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return fused_weights.apply(self.down_proj, fused_weights.gated(x, self.gate_proj, self.up_proj))


class Experts(nn.Module):
    """The experts of a layer."""

    def __init__(self, shape: ModelConfig) -> None:
        super().__init__()
        assert shape.experts is not None
        self.sizes = s = shape.experts
        self.gate_up_proj = nn.Parameter(torch.empty(s.count, 2 * s.width, shape.width))
        self.down_proj = nn.Parameter(torch.empty(s.count, shape.width, s.width))
        for parameter in (self.gate_up_proj, self.down_proj):
            nn.init.uniform_(parameter, -(parameter.shape[-1] ** -0.5), parameter.shape[-1] ** -0.5)
        self.register_load_state_dict_pre_hook(_together)

    def forward(self, x: Tensor, share: Tensor, chosen: Tensor) -> Tensor:
        """The mixture (N, width) of x (N, width). share, chosen: of the `Router`. The sums are in the dtype
        of `share`, or that of x if it is wider."""
        # Pairs of a token and one of its experts, by expert, then by token.
        of_pair, order = chosen.flatten().sort(stable=True)
        experts = torch.arange(self.sizes.count, device=x.device)
        ends = torch.searchsorted(of_pair, experts, right=True, out_int32=True)  # of each expert's pairs
        # Torch's kernel is not asked for a product of no rows.
        mix = self.grouped if len(x) and by_one_product(self.sizes, x) else self.one_by_one
        return mix(x, share, order, ends).to(x.dtype)

    def one_by_one(self, x: Tensor, share: Tensor, order: Tensor, ends: Tensor) -> Tensor:
        """Expert by expert, as published: the order of the sums, and their roundings, are the same."""
        mixed = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, share.dtype))
        tokens, share, first = order // self.sizes.per_token, share.flatten()[order, None], 0
        # On the meta device there are no numbers, so the first expert stands for all.
        for expert, end in enumerate([len(order)] if ends.is_meta else ends.tolist()):
            if first < end or not len(order):  # without a token, gradients are zeros, as of dense layers
                token = tokens[first:end]
                product = linear(x[token], self.gate_up_proj[expert])
                hidden = fused_weights.activated(*product.chunk(2, -1))
                parts = linear(hidden, self.down_proj[expert]) * share[first:end]
                mixed.index_add_(0, token, parts.to(mixed.dtype))  # narrower under autocast
            first = end
        return mixed

    def grouped(self, x: Tensor, share: Tensor, order: Tensor, ends: Tensor) -> Tensor:
        """By two products for all experts."""
        rows = x[order // self.sizes.per_token]
        product = F.grouped_mm(rows, self.gate_up_proj.transpose(1, 2), offs=ends)
        hidden = fused_weights.activated(*product.chunk(2, -1))
        parts = F.grouped_mm(hidden, self.down_proj.transpose(1, 2), offs=ends)
        by_token = torch.empty_like(parts).index_copy_(0, order, parts).unflatten(0, share.shape)
        return (by_token * share[..., None]).sum(1)  # rounded once


def _together(
    experts: Experts,
    state: MutableMapping[str, Any],
    prefix: str,
    _metadata: object,
    _strict: bool,
    missing: list[str],
    _unexpected: list[str],
    errors: list[str],
) -> None:
    """Put experts that a state dict holds one by one, as a checkpoint's file does, into one tensor."""
    for leaf in LEAVES:
        if prefix + leaf in state:
            continue
        stack = torch.empty(getattr(experts, leaf).shape, device="meta")  # a shard has no parts
        parts = in_parts(prefix + leaf, stack)
        stored = {name: state.pop(name) for name in parts if name in state}
        if not stored:
            continue
        missing += [name for name in parts if name not in stored]
        misshapen = [name for name, part in stored.items() if part.shape != parts[name].shape]
        for name in misshapen:
            errors.append(f"{name} is {tuple(stored[name].shape)}, expected {tuple(parts[name].shape)}")
        if len(stored) == len(parts) and not misshapen:
            state[prefix + leaf] = torch.cat(list(stored.values())).view(stack.shape)


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
