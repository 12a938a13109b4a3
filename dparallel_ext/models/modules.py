"""The modules of the transformer; they have short names beside the checkpoint's."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..ops import rms_norm
from ..ops.fp8_linear import fp8_scale
from ..ops.inputs import compiled
from . import fused_weights
from .config import ModelConfig
from .experts import Experts, Router, SharedExpert
from .fp8 import Fp8Linear


@contextmanager
def shapes_only() -> Iterator[None]:
    """A context in which tensors and modules are made on the device "meta", with shapes and types, without
    memory.

    It is given no values either: torch.nn.init would go through them all the same, and imports
    torch._dynamo for that, which takes as long as torch.
    """
    with torch.device("meta"), _NoValues():
        yield


class _NoValues(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


class CheckpointNamed(nn.Module):
    """A module whose parts have a checkpoint's names for torch, and short names for the code here.

    Setting a short name puts the part into the tree under the checkpoint's name, and reading a short name
    returns the part that is there, whatever has put it there.
    """

    def __init__(self, names: Mapping[str, str]) -> None:
        """names: short name -> the checkpoint's, such as "self_attn.q_proj", whose parents hold nothing
        else."""
        super().__init__()
        self._paths = {ours: theirs.split(".") for ours, theirs in names.items()}

    def __getattr__(self, name: str) -> Any:
        try:
            path = self.__dict__["_paths"][name]
        except KeyError:
            return super().__getattr__(name)
        module: Any = self
        try:
            for part in path:
                module = module._modules[part]
        except (KeyError, AttributeError):
            # PEFT's module around several layers passes the name on to the copy that is active.
            module = None if module is self else getattr(module, path[-1], None)
            if module is None:
                raise AttributeError(f"{type(self).__name__} has no {name}") from None
        return module

    def __setattr__(self, name: str, value: Any) -> None:
        path = self.__dict__.get("_paths", {}).get(name)
        if path is None or not (value is None or isinstance(value, nn.Module)):
            return super().__setattr__(name, value)
        at: nn.Module = self
        for part in path[:-1]:
            if part not in at._modules:
                at.add_module(part, nn.Module())
            at = at.get_submodule(part)
        at.add_module(path[-1], value)


def all_modules(module: nn.Module) -> list[nn.Module]:
    """`list(module.modules())`, but faster, without names, since every decode needs it."""
    modules, met = [module], {module}
    for each in modules:
        if each._modules:
            for part in each._modules.values():
                if part is not None and part not in met:
                    met.add(part)
                    modules.append(part)
    return modules


class RMSNorm(nn.Module):
    """RMS norm, computed in float32 or better and scaled in the model's dtype, as published."""

    def __init__(self, shape: ModelConfig, width: int | None = None) -> None:
        super().__init__()
        self.eps, width = shape.eps, width or shape.width
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if shape.norm_bias else None

    def forward(self, x: Tensor) -> Tensor:
        if compiled(x, self.weight):
            return rms_norm(x, self.weight, eps=self.eps, bias=self.bias)
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        y = self.weight * y.to(x.dtype)
        return y if self.bias is None else y + self.bias


class Stream(NamedTuple):
    """The residual stream x + delta (..., width); the next norm computes the sum."""

    x: Tensor
    delta: Tensor | None = None

    @property
    def sum(self) -> Tensor:
        """x + delta, (..., width)."""
        return self.x if self.delta is None else self.x + self.delta


def soft_embeddings(tokens: Tensor, mask: Tensor, share: Tensor) -> Tensor:
    """Mixtures (N, width) of the embeddings `tokens` (N, width) and the mask token's, `mask` (1, width).

    share: (N,) float32, the mask's share s of each: (1 - s) e + s m, as long as the mixture of the lengths,
    (1 - s) |e| + s |m| (DMax, arXiv 2604.08302). A token whose share is 0 keeps its embedding.
    """
    e, m, s = tokens.float(), mask.float(), share[:, None]

    def length(x: Tensor) -> Tensor:
        return torch.linalg.vector_norm(x, dim=-1, keepdim=True)

    mixed = (1 - s) * e + s * m
    mixed = mixed * (((1 - s) * length(e) + s * length(m)) / (length(mixed) + 1e-6))
    return torch.where(s > 0, mixed.to(tokens.dtype), tokens)


def mixed_embeddings(tokens: Tensor, others: Iterable[Tensor], shares: Tensor) -> Tensor:
    """Mixtures (N, width) of the embeddings `tokens` (N, width) and K others (N, width).

    shares: (N, K) float32, the shares of the others; the rest to 1 is the token's. Their lengths stay as the
    sum makes them (EvoToken-DLM, arXiv 2601.07351). A token without shares keeps its embedding.
    """
    mixed = (1 - shares.sum(1, keepdim=True)) * tokens.float()
    for other, share in zip(others, shares.unbind(1), strict=True):
        mixed = mixed + share[:, None] * other.float()
    return torch.where((shares != 0).any(1, keepdim=True), mixed.to(tokens.dtype), tokens)


def norm_of_sum(norm: nn.Module, stream: Stream) -> tuple[Tensor, Tensor]:
    """The stream's sum and the sum's norm, each (..., width); `norm` may be an adapter's module."""
    x, delta = stream
    if delta is None:
        return x, norm(x)
    if fused_weights.is_unmodified(norm, RMSNorm):
        weight, bias = fused_weights.tensor_of(norm, "weight"), fused_weights.tensor_of(norm, "bias")
        if compiled(x, delta, weight):
            y, x = rms_norm(x, weight, eps=norm.eps, bias=bias, delta=delta)
            return x, y
    x = x + delta
    return x, norm(x)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split rotary embedding of the first R dimensions of x (B, Q, H, D) by cos, sin (Q, 1, R / 2)."""
    a, b, rest = x.tensor_split((cos.shape[-1], 2 * cos.shape[-1]), -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)


class Taps(dict[int, Tensor]):
    """The residual streams after some layers of a pass, by their numbers; -1: the embeddings."""

    def __init__(self, layers: Collection[int]) -> None:
        super().__init__()
        self.layers = layers

    def take(self, layer: int, stream: Stream) -> None:
        """Keep the sum of the stream after `layer`, if it is one of the layers."""
        if layer in self.layers:
            self[layer] = stream.sum


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries (..., heads, D), keys and values (..., kv_heads, D), before RoPE -> (..., heads, D)."""


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, *, causal: bool = False) -> Tensor:
    """Attention (B, N, heads, D) of q (B, N, heads, D) to k and v (B, M, kv_heads, D), after RoPE.

    visible: bool, to broadcast to (B, heads, N, M); None: each row sees all rows of k, or if `causal` the
    rows up to itself.
    """
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, visible, is_causal=causal, enable_gqa=grouped)
    return y.transpose(1, 2)


class HeadNorms(NamedTuple):
    """The norms of each head of queries and of keys; they may be an adapter's modules."""

    q: nn.Module
    k: nn.Module


class CachedAttend:  # no ABC: each layer of each pass asks `isinstance`, which is slow for these
    """An `Attend` over a cache, which can do some of the work before it."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, norms: HeadNorms | None = None) -> Tensor:
        """norms: the norms of q and k, for this call to compute."""
        raise NotImplementedError

    def of_product(
        self, x: Tensor, weights: fused_weights.Joined, norms: HeadNorms | None = None
    ) -> Tensor | None:
        """(N, heads, D), as a call gives it, from the x (N, width) of which q, k and v are the product with
        `weights`; None if q, k and v themselves are needed."""
        raise NotImplementedError


DROPOUT = ("attention_dropout", "embedding_dropout", "residual_dropout")
"""Keys of a config.json that only matter in training; LLaDA's published class has 0.1 for each."""
LINEAR = ("qkv", "q", "k", "v", "o", "gate", "up", "down")
"""The linear layers that a block may have."""


class Block(CheckpointNamed):
    """A layer. sparse: its MLP is a mixture of experts."""

    def __init__(self, shape: ModelConfig, names: Mapping[str, str], sparse: bool = False) -> None:
        super().__init__(names)
        s = self.shape = shape
        self.sparse = sparse
        self.norm1 = RMSNorm(s)
        q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
        if s.fused_qkv:
            self.qkv = nn.Linear(s.width, q + 2 * kv, bias=s.qkv_bias)
        else:
            self.q = nn.Linear(s.width, q, bias=s.qkv_bias)
            self.k = nn.Linear(s.width, kv, bias=s.qkv_bias)
            self.v = nn.Linear(s.width, kv, bias=s.qkv_bias)
        if s.qk_norm:
            self.q_norm = RMSNorm(s, s.head_dim)
            self.k_norm = RMSNorm(s, s.head_dim)
        self.o = nn.Linear(s.heads * s.head_dim, s.width, bias=s.o_bias)
        self.norm2 = RMSNorm(s)
        if sparse:
            assert s.experts is not None
            self.router, self.experts = Router(s), Experts(s)
            self.shared = SharedExpert(s) if s.experts.shared_width else None
        else:
            self.gate = nn.Linear(s.width, s.mlp_width, bias=s.mlp_bias)
            self.up = nn.Linear(s.width, s.mlp_width, bias=s.mlp_bias)
            self.down = nn.Linear(s.mlp_width, s.width, bias=s.mlp_bias)

    def forward(self, x: Tensor, attend: Attend, together: Tensor | None = None) -> Tensor:
        """x (..., width) -> (..., width). together: see `experts.Router`, of which this is the argument."""
        return self.run(Stream(x), attend, together).sum

    def run(self, stream: Stream, attend: Attend, together: Tensor | None = None) -> Stream:
        """The stream (..., width) after the block, as a sum still to be computed."""
        return self.run_normed(*norm_of_sum(self.norm1, stream), attend, together)

    def run_normed(self, x: Tensor, y: Tensor, attend: Attend, together: Tensor | None = None) -> Stream:
        """The stream after the block, of the stream x (..., width) before it, and y, the input of queries,
        keys and values: the norm of x, unless a kind of block has another."""
        y = self._attended(y, attend).flatten(-2)
        x, y = norm_of_sum(self.norm2, Stream(x, fused_weights.apply(self.o, y)))
        return Stream(x, self._mlp(y, together))

    def _attended(self, y: Tensor, attend: Attend) -> Tensor:
        """y (..., width) -> (..., heads, D)"""
        s = self.shape
        layers = (self.qkv,) if s.fused_qkv else (self.q, self.k, self.v)
        norms = HeadNorms(self.q_norm, self.k_norm) if s.qk_norm else None
        if isinstance(attend, CachedAttend) and (w := fused_weights.joined(layers)):
            attended = attend.of_product(y, w, norms)
            if attended is not None:
                return attended
        parts = [t.unflatten(-1, (-1, s.head_dim)) for t in fused_weights.project(y, layers)]
        q, k, v = parts[0].split([s.heads, s.kv_heads, s.kv_heads], -2) if s.fused_qkv else parts
        if norms is None:
            return attend(q, k, v)
        if isinstance(attend, CachedAttend):
            return attend(q, k, v, norms)
        return attend(norms.q(q), norms.k(k), v)

    def _mlp(self, y: Tensor, together: Tensor | None) -> Tensor:
        """y (..., width) -> (..., width)"""
        if self.sparse:
            rows = y.reshape(-1, y.shape[-1])
            mixed: Tensor = self.experts(rows, *self.router(rows, together)).view(y.shape)
            return mixed if self.shared is None else mixed + self.shared(y)
        return fused_weights.apply(self.down, fused_weights.gated(y, self.gate, self.up))

    def groups(self) -> Iterator[list[nn.Parameter]]:
        """The groups of weights (and of biases) to fuse, without groups that have an adapter."""
        return fused_weights.parameters(self._of_one_input())

    def _of_one_input(self) -> list[list[nn.Module]]:
        groups: list[list[nn.Module]] = [] if self.shape.fused_qkv else [[self.q, self.k, self.v]]
        if not self.sparse:
            groups.append([self.gate, self.up])
        elif self.shared is not None:
            groups.append([self.shared.gate_proj, self.shared.up_proj])
        return groups

    def _linear(self) -> list[str]:
        return [name for name in LINEAR if hasattr(self, name)]

    def check_quantizable(self) -> None:
        """Raise ValueError as `Model.quantize` does."""
        if self.sparse:
            raise ValueError("model: expected one without mixtures of experts, which are not quantised")
        for name in self._linear():
            layer = getattr(self, name)
            if not fused_weights.is_unmodified(layer, nn.Linear):
                raise ValueError(f"model: expected a plain nn.Linear layer {name} to quantise, got {layer}")
            fp8_scale(layer.weight)

    def quantize(self) -> None:
        """See `Model.quantize`."""
        for name in self._linear():
            setattr(self, name, Fp8Linear(getattr(self, name)))
        self._join_quantised()

    def _join_quantised(self) -> None:
        for layers in self._of_one_input():
            fused_weights.join_quantised([layer for layer in layers if isinstance(layer, Fp8Linear)])

    def train(self, mode: bool = True) -> Block:
        if mode:
            for group in self.groups():
                fused_weights.separate(group)
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Block:
        joined = [fused_weights.joined_view(group) is not None for group in self.groups()]
        super()._apply(fn, recurse)  # copies one parameter after another
        for group, was_joined in zip(self.groups(), joined, strict=True):
            if was_joined:
                fused_weights.join(group)
        self._join_quantised()
        return self
