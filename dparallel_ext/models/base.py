"""One bidirectional transformer for every family: RMSNorm, RoPE, grouped-query attention, SwiGLU.

A family is data: how its config.json reads (`Shape`) and what its checkpoint calls each tensor
(`NAMES`). The modules go by short names of their own; `state_dict` speaks the checkpoint's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Shape:
    """What the transformer needs to know of a config.json."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    rows: int
    """Rows of the embedding and the head, which may exceed the vocabulary."""
    vocab_size: int
    eps: float
    rope_theta: float
    rope_in_float32: bool = True
    qkv_bias: bool = False
    bias: bool = False
    norm_bias: bool = False
    tied: bool = False
    logit_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.width % self.heads or self.head_dim % 2:
            raise ValueError(
                f"config: {self.heads} heads do not divide the width {self.width} into even parts"
            )
        if self.heads % self.kv_heads:
            raise ValueError(f"config: {self.kv_heads} key heads do not divide {self.heads} heads")
        if self.rows < self.vocab_size:
            raise ValueError(
                f"config: {self.rows} embedding rows do not hold a vocabulary of {self.vocab_size}"
            )


def check_supported(
    config: Mapping[str, Any], supported: Mapping[str, Any], explicit: Collection[str] = ()
) -> None:
    """Refuse by name what this transformer does not compute; falsy values are one and the same.

    The keys in `explicit` must be there: the published code's default is not what we support.
    """
    for key, value in supported.items():
        given = config[key] if key in explicit else config.get(key, value)
        if given != value and (given or value):
            raise ValueError(f"config: {key}={given!r} is not supported, only {value!r}")


class Config(dict[str, Any]):
    """A config.json's content. Others may set attributes on it, as transformers' Trainer does."""


@dataclass
class Output:
    """What a forward pass returns."""

    logits: Tensor
    """(B, L, V)"""


class KVCache:
    """Keys (after RoPE) and values of every position, in slots allotted once.

    slots: (layers, 2, B, kv_heads, length, head_dim), in the dtype and on the device of the model.
    A pass writes them in place, so it belongs under `torch.no_grad` or `inference_mode`.
    """

    def __init__(self, slots: Tensor) -> None:
        self.slots = slots

    @property
    def batch(self) -> int:
        return self.slots.shape[2]

    @property
    def length(self) -> int:
        return self.slots.shape[4]

    def write(self, layer: int, start: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Overwrite slots [start, start + Q) and return all keys and values (B, H, length, D)."""
        k, v = self.slots[layer, 0], self.slots[layer, 1]
        k[:, :, start : start + keys.shape[2]] = keys
        v[:, :, start : start + keys.shape[2]] = values
        return k, v


class RMSNorm(nn.Module):
    """Normalised in float32 or better, scaled in the model's dtype, as published."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.eps = shape.eps
        self.weight = nn.Parameter(torch.ones(shape.width))
        self.bias = nn.Parameter(torch.zeros(shape.width)) if shape.norm_bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        y = self.weight * y.to(x.dtype)
        return y if self.bias is None else y + self.bias


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split rotary embedding of x (B, H, Q, D) by cos, sin (Q, D)."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        s = self.shape = shape
        self.norm1 = RMSNorm(s)
        self.q = nn.Linear(s.width, s.heads * s.head_dim, bias=s.qkv_bias)
        self.k = nn.Linear(s.width, s.kv_heads * s.head_dim, bias=s.qkv_bias)
        self.v = nn.Linear(s.width, s.kv_heads * s.head_dim, bias=s.qkv_bias)
        self.o = nn.Linear(s.heads * s.head_dim, s.width, bias=s.bias)
        self.norm2 = RMSNorm(s)
        self.gate = nn.Linear(s.width, s.mlp_width, bias=s.bias)
        self.up = nn.Linear(s.width, s.mlp_width, bias=s.bias)
        self.down = nn.Linear(s.mlp_width, s.width, bias=s.bias)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        cache: KVCache | None,
        layer: int,
        start: int,
        visible: Tensor | None,
    ) -> Tensor:
        s, (batch, queries, _) = self.shape, x.shape

        def heads(y: Tensor, count: int) -> Tensor:  # (B, Q, H D) -> (B, H, Q, D)
            return y.view(batch, queries, count, s.head_dim).transpose(1, 2)

        y = self.norm1(x)
        q, k = heads(self.q(y), s.heads), heads(self.k(y), s.kv_heads)
        v = heads(self.v(y), s.kv_heads)
        rope_dtype = torch.promote_types(v.dtype, torch.float32) if s.rope_in_float32 else v.dtype
        cos, sin = (t.to(rope_dtype) for t in rope)  # (Q, D)
        q, k = (rotate(t.to(rope_dtype), cos, sin).to(v.dtype) for t in (q, k))
        if cache is not None:
            k, v = cache.write(layer, start, k, v)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=s.kv_heads != s.heads)
        x = x + self.o(y.transpose(1, 2).reshape(batch, queries, s.heads * s.head_dim))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Model(nn.Module):
    """A masked diffusion language model: every position sees every other.

    Called on input_ids (B, L) int64 it returns an object with `.logits` (B, L, V), raw, as the
    Hugging Face model of the same checkpoint does (V: rows of the embedding). `hidden` and `head`
    are its two halves, for decoding. Built from a config.json's content, it has fresh weights to
    train, initialised as torch does; `load` and `wrap` fill it with given ones.

    Raises ValueError naming the config key that is missing or asks for what is not implemented.
    """

    NAMES: ClassVar[Mapping[str, str]]
    """Our module -> the checkpoint's; `{}` stands for the layer."""
    shift: ClassVar[bool] = False
    """The logits for position p are produced at position max(p - 1, 0)."""
    strict_entropy: ClassVar[bool] = False
    """The published decoder of this family keeps H < tau rather than H <= tau."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = Config(config)
        try:
            s = self.shape = self.read_config(config)
        except KeyError as error:
            raise ValueError(f"config: {error} is missing") from error
        self.vocab_size = s.vocab_size
        self.mask_id = self._token_id("mask_token_id")
        self.eos_id = self._token_id("eos_token_id")
        self.embed = nn.Embedding(s.rows, s.width)
        self.blocks = nn.ModuleList(Block(s) for _ in range(s.layers))
        self.norm = RMSNorm(s)
        self.lm_head = nn.Linear(s.width, s.rows, bias=s.bias and not s.tied)
        self.tie()
        self.checkpointing: dict[str, Any] | None = None
        self._rope: tuple[Tensor, Tensor] | None = None
        self.register_state_dict_post_hook(_to_checkpoint_names)
        self.register_load_state_dict_pre_hook(_from_checkpoint_names)

    @staticmethod
    def read_config(config: Mapping[str, Any]) -> Shape:
        raise NotImplementedError

    def _token_id(self, key: str) -> int | None:
        given = self.config.get(key)
        if given is None or (isinstance(given, int) and 0 <= given < self.shape.rows):
            return given
        raise ValueError(f"config: {key}={given!r}, expected an id below {self.shape.rows} or null")

    def tie(self) -> None:
        """Let the head be the embedding, where the config says so."""
        if self.shape.tied:
            self.lm_head.weight = self.embed.weight

    @classmethod
    def checkpoint_name(cls, name: str) -> str:
        """The checkpoint's name of our parameter `name`."""
        module, _, parameter = name.rpartition(".")
        parts = module.split(".")
        if parts[0] != "blocks":
            return f"{cls.NAMES[module]}.{parameter}"
        return f"{cls.NAMES[parts[2]].format(parts[1])}.{parameter}"

    @property
    def adapted(self) -> bool:
        """Whether adapters (PEFT's) stand in the place of modules; state_dict then has our own names."""
        return any(
            name.count(".") != (3 if name.startswith("blocks.") else 1) for name, _ in self.named_parameters()
        )

    def checkpoint_parameters(self) -> Iterator[tuple[str, str, nn.Parameter]]:
        """(the checkpoint's name, ours, parameter) of each; a tied head is not repeated."""
        for name, parameter in self.named_parameters():
            yield self.checkpoint_name(name), name, parameter

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.weight.dtype

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Output:
        return Output(self.head(self.hidden(input_ids, attention_mask=attention_mask)))

    def hidden(
        self,
        input_ids: Tensor,
        cache: KVCache | None = None,
        start: int = 0,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (B, Q, width) after the final norm, of input_ids (B, Q).

        With a cache, the ids are those of positions start .. start + Q - 1: their keys and values
        overwrite those slots, and attention sees all slots of the cache. Without one, attention_mask
        (B, Q), bool or whole numbers, is 0 where a position is padding, that none shall see.

        Raises TypeError or ValueError for ids of a wrong type, shape or (on the CPU, where looking
        costs no synchronisation) range, and for positions outside the cache.
        """
        self._check(input_ids, cache, start)
        visible = self._visible(input_ids, cache, attention_mask)
        x = self.embed(input_ids)
        rope = self._rope_of(start, start + input_ids.shape[1])
        for layer, block in enumerate(self.blocks):
            if self.checkpointing is not None and self.training:
                x = checkpoint(block, x, rope, cache, layer, start, visible, **self.checkpointing)
            else:
                x = block(x, rope, cache, layer, start, visible)
        return self.norm(x)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        """Keep only each layer's input in training and compute the rest again, as transformers' models do.

        The keywords are those of `torch.utils.checkpoint.checkpoint`.
        """
        self.checkpointing = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}

    def gradient_checkpointing_disable(self) -> None:
        self.checkpointing = None

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """The same by the name that transformers 5 calls; every layer, without offloading."""
        if every_n_layers != 1 or offload:
            raise ValueError(
                "activation_checkpointing: expected every_n_layers=1 and offload=False, "
                f"got {every_n_layers} and {offload}"
            )
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., width)."""
        logits = self.lm_head(hidden)
        return logits if self.shape.logit_scale == 1.0 else logits * self.shape.logit_scale

    def new_cache(self, batch: int, length: int) -> KVCache:
        """An empty cache for `length` positions: its first pass must write them all."""
        s = self.shape
        shape = (s.layers, 2, batch, s.kv_heads, length, s.head_dim)
        return KVCache(torch.zeros(shape, dtype=self.dtype, device=self.device))

    def _rope_of(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """cos, sin (end - start, head_dim) float32."""
        if self._rope is None or len(self._rope[0]) < end or self._rope[0].device != self.device:
            length, s = max(64, 2 ** (end - 1).bit_length()), self.shape
            # An inference tensor, kept, would break a later training pass.
            with torch.inference_mode(False), torch.no_grad():
                even = torch.arange(0, s.head_dim, 2, device=self.device).float()
                position = torch.arange(length, device=self.device).float()
                frequency = 1.0 / s.rope_theta ** (even / s.head_dim)
                angle = torch.outer(position, frequency).repeat(1, 2)
                self._rope = angle.cos(), angle.sin()
        cos, sin = self._rope
        return cos[start:end], sin[start:end]

    def _visible(
        self, input_ids: Tensor, cache: KVCache | None, attention_mask: Tensor | None
    ) -> Tensor | None:
        """The mask of keys (B, 1, 1, Q) that attention takes, or None."""
        if attention_mask is None:
            return None
        if cache is not None:
            raise ValueError("attention_mask: not supported together with a cache")
        if attention_mask.shape != input_ids.shape or attention_mask.is_floating_point():
            raise ValueError(
                f"attention_mask: expected bool or whole numbers {tuple(input_ids.shape)} as input_ids, "
                f"got {attention_mask.dtype} {tuple(attention_mask.shape)}"
            )
        visible = attention_mask.to(torch.bool)
        on_cpu = visible.device.type == "cpu" and not torch.compiler.is_compiling()
        if on_cpu and visible.numel() and not bool(visible.any(1).all()):
            raise ValueError("attention_mask: expected a visible position in every row")
        return visible[:, None, None]

    def _check(self, input_ids: Tensor, cache: KVCache | None, start: int) -> None:
        if not isinstance(input_ids, Tensor):
            raise TypeError(f"input_ids: expected a tensor, got {type(input_ids).__name__}")
        if input_ids.ndim != 2 or input_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"input_ids: expected int64 (B, L), got {input_ids.dtype} {tuple(input_ids.shape)}"
            )
        batch, queries = input_ids.shape
        if cache is None:
            if start != 0:
                raise ValueError(f"start: expected 0 without a cache, got {start}")
        elif batch != cache.batch:
            raise ValueError(f"input_ids: {batch} sequences, but the cache is for {cache.batch}")
        elif not 0 <= start <= start + queries <= cache.length:
            raise ValueError(
                f"start: positions [{start}, {start + queries}) exceed the cache of {cache.length}"
            )
        on_cpu = input_ids.device.type == "cpu" and not torch.compiler.is_compiling()
        if on_cpu and input_ids.numel():
            low, high = (int(x) for x in input_ids.aminmax())
            if low < 0 or high >= self.shape.rows:
                worst = low if low < 0 else high
                raise ValueError(f"input_ids: expected ids in [0, {self.shape.rows}), got {worst}")


@dataclass(frozen=True)
class Traits:
    """What decoding and training need to know of a model, ours or not."""

    mask_id: int | None
    shift: bool
    """The logits for position p are produced at position max(p - 1, 0)."""
    strict_entropy: bool
    """The published decoder of this family keeps H < tau rather than H <= tau."""


def traits(model: Any) -> Traits:
    """The traits of one of ours, of a Hugging Face model (by its config), or of either under adapters."""
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    if isinstance(model, Model):
        return Traits(model.mask_id, model.shift, model.strict_entropy)
    if not callable(model):
        raise ValueError(f"model: expected a module or function, got {type(model).__name__}")
    config = getattr(model, "config", None)
    dream = getattr(config, "model_type", None) == "Dream"
    return Traits(getattr(config, "mask_token_id", None), dream, dream)


def _to_checkpoint_names(
    model: Model, state: MutableMapping[str, Any], prefix: str, _metadata: object
) -> None:
    if model.adapted:
        return
    tied = f"{prefix}lm_head.weight"
    for name in [n for n in state if n.startswith(prefix)]:
        value = state.pop(name)
        if not (model.shape.tied and name == tied):
            state[prefix + model.checkpoint_name(name.removeprefix(prefix))] = value


def _from_checkpoint_names(
    model: Model, state: MutableMapping[str, Any], prefix: str, *_unused: object
) -> None:
    """Our own names pass as they are."""
    if model.adapted:
        return
    for theirs, ours, _ in model.checkpoint_parameters():
        if prefix + theirs in state:
            state[prefix + ours] = state.pop(prefix + theirs)
    if model.shape.tied and f"{prefix}embed.weight" in state:
        state[f"{prefix}lm_head.weight"] = state[f"{prefix}embed.weight"]
