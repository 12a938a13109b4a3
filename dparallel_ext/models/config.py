"""Sizes and options of the network in a config.json, and traits of a model's decoding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from ..arguments import check_fields, instance, number, shown, whole
from . import files
from .rope import QueryScaling, RopeScaling


@dataclass(frozen=True)
class GroupRouting:
    """A router that scores by sigmoids, and chooses among the experts of the best groups (LLaDA2)."""

    groups: int
    """Groups of consecutive experts."""
    per_token: int
    """Groups among whose experts a token's are chosen."""
    scale: float
    """Of the weights of a token's experts."""


@dataclass(frozen=True)
class BlockRouting:
    """A router that scores by sigmoids, and lets the tokens of a block choose among a few experts
    (LLaDA 2.2)."""

    block: int
    """Tokens of a block; blocks count from position 0."""
    capacity: int
    """Experts among which a block's tokens choose: those that some token of the block scores highest."""
    scale: float
    """Of the weights of a token's experts."""


@dataclass(frozen=True)
class ExpertsConfig:
    """Mixtures of experts in place of some layers' MLPs, see `experts`."""

    count: int
    """Experts of a layer."""
    per_token: int
    """Experts that a token takes."""
    width: int
    """Of an expert."""
    normalized: bool
    """Whether the probabilities of a token's experts are scaled to a sum of 1."""
    layers: frozenset[int]
    """The layers that have them, from 0."""
    shared_width: int = 0
    """Of an MLP beside them that every token takes; 0: none."""
    routing: GroupRouting | BlockRouting | None = None
    """None: by softmax, among all experts."""

    def __post_init__(self) -> None:
        count = self.count
        if isinstance(routing := self.routing, BlockRouting):
            if routing.capacity > count:
                raise ValueError(f"config: {routing.capacity} experts for a block, and there are {count}")
            count = routing.capacity
        elif routing is not None:
            if count % routing.groups or count < 2 * routing.groups:
                raise ValueError(
                    f"config: expected groups of two experts or more, got {count} in {routing.groups}"
                )
            if routing.per_token > routing.groups:
                raise ValueError(
                    f"config: {routing.per_token} groups for a token, and there are {routing.groups}"
                )
            count = count // routing.groups * routing.per_token
        if self.per_token > count:
            raise ValueError(f"config: {self.per_token} experts for a token, and there are {count}")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and options of the transformer, as read from a config.json."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    embedding_size: int
    """Rows of the embedding and the head, which may exceed the vocabulary."""
    vocab_size: int
    eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    query_scaling: QueryScaling | None = None
    rope_in_float32: bool = True
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    norm_bias: bool = False
    tied: bool = False
    logit_scale: float = 1.0
    fused_qkv: bool = False
    """Queries, keys and values are one layer of the checkpoint."""
    rotary_dim: int | None = None
    """The first dimensions of each head that are rotated; None: all."""
    qk_norm: bool = False
    """Queries and keys of each head are normalised before the rotary embedding (Qwen3)."""
    block_length: int | None = None
    """Length of a block-causal model's blocks; None for others."""
    window: int | None = None
    """The masks of a window, see `Traits`, where the config says it."""
    prompt_block: bool = False
    """See `Traits`; where the config says it."""
    experts: ExpertsConfig | None = None

    @property
    def active_width(self) -> int:
        """Of the MLPs that a token takes in a layer; of a layer with experts, if there are any."""
        e = self.experts
        return e.per_token * e.width + e.shared_width if e is not None and e.layers else self.mlp_width

    def __post_init__(self) -> None:
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"config: expected heads of even size, got {self.head_dim}")
        if self.heads % self.kv_heads:
            raise ValueError(f"config: {self.kv_heads} key heads do not divide {self.heads} heads")
        if self.embedding_size < self.vocab_size:
            raise ValueError(
                f"config: {self.embedding_size} embedding rows do not hold a vocabulary of {self.vocab_size}"
            )


class Config(dict[str, Any]):
    """A config.json's content. Its keys read as attributes too, and others may set attributes on it, as the
    libraries around transformers expect of a config; neither changes the content."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"config has no {name}") from None

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Config:
        """The config of a checkpoint directory. PEFT calls it to compare a model's vocabulary with its
        base's."""
        return cls(files.read_json(Path(directory) / "config.json", required=True))

    def to_dict(self) -> dict[str, Any]:
        return dict(self)


def config_ids(config: Mapping[str, Any], key: str, rows: int) -> tuple[int, ...]:
    """The ids under a key, which may hold one, a list, or null. Raises ValueError naming the key."""
    ids = config.get(key)
    several: list[Any] = ids if isinstance(ids, list) and ids else [ids]
    if ids is not None and not all(type(token) is int and 0 <= token < rows for token in several):
        raise ValueError(f"config: {key}={ids!r:.80}, expected an id below {rows} or null")
    return () if ids is None else tuple(several)


PENALTY = "repetition_penalty"


def penalty_in(config: Mapping[str, Any]) -> float:
    """The repetition penalty that transformers' `generate` applies; 1: none. Raises ValueError naming the
    key."""
    value = config.get(PENALTY)
    return 1.0 if value is None else number(f"config: {PENALTY}", value, 0.01, 100)


BLOCK_LENGTH = 32
"""The length of blocks for a model that has none of its own, as published for LLaDA."""


@dataclass(frozen=True)
class Traits:
    """The properties of a model, ours or not, that decoding and training depend on.

    A function, or a module that wraps a model in a way of its own, states them in an attribute `traits`.

    Raises ValueError naming the field that does not fit.
    """

    mask_id: int | None = None
    """The mask token; None: not known."""
    shift: bool = False
    """The logits for position p are produced at position max(p - 1, 0)."""
    strict: frozenset[str] = frozenset()
    """Selectors whose threshold its published decoder compares strictly (p > tau, not p >= tau)."""
    block_length: int | None = None
    """Length of a block-causal model's blocks; None for others."""
    sub_block_length: int | None = None
    """The part of a block that its published decoder fills at a time; None: all of it."""
    causal: bool = False
    """Autoregressive: position p sees the positions up to p, and its logits are for position p + 1."""
    block_causal_too: bool = False
    """Whether cache "block" decodes it block-causally, though its calls and the other caches see both
    ways."""
    aligned_blocks: bool = True
    """Where it is decoded block-causally: whether blocks count from position 0, else from the first mask."""
    whole_blocks: bool = True
    """Where its blocks count from position 0: whether a response fills its last block, else it ends with its
    last token asked for, as if the model saw no position behind."""
    prompt_block: bool = False
    """Whether a model that sees both ways when it is called is decoded block-causally, with cache "block"
    alone: all in front of the first mask is one block, and blocks of `block_length` follow (D2F, CDLM)."""
    onward: bool = False
    """Whether cache "block" decodes an autoregressive model block-causally: finished positions see the
    positions up to themselves, as in its other passes, and the last of them gives the next block's first
    token."""
    window: int | None = None
    """The masks that the published decoder fills in a pass; None for other models. With a number, masks come
    behind all known tokens, and cache "window" decodes the model. A known token sees the known tokens up to
    itself. Without `shift` a mask sees all known tokens and the masks up to itself (WeDLM). With `shift` a
    window's masks and the token in front of them see each other, and masks are committed from left to right
    (SDLM)."""

    def __post_init__(self) -> None:
        """`mask_id` is checked where it is used, since a caller may name another."""
        for field in fields(self):
            if field.type == "bool":
                instance(field.name, getattr(self, field.name), bool)
        instance("strict", self.strict, frozenset)
        check_fields(self, ("block_length", "sub_block_length", "window"), whole, 1)
        others = ("causal", "block_causal_too", "onward", "block_length", "sub_block_length", "prompt_block")
        for having, means in (
            ("window", "a window, whose masks see all known tokens"),
            ("prompt_block", "a prompt_block, of models that see both ways when they are called"),
        ):
            for name in others:
                if getattr(self, having) and name != having and (value := getattr(self, name)):
                    raise ValueError(f"{name}: does not go with {means}, got {shown(value)}")

    @property
    def default_block_length(self) -> int:
        """The length of blocks, or of a window, for which nobody names another."""
        return self.block_length or self.window or BLOCK_LENGTH

    @property
    def own_cache(self) -> str | None:
        """The only cache mode in which `decode` fills the model's masks; None: there are several."""
        if self.window is not None:
            return "window"
        return "block" if self.causal or self.prompt_block else None

    @property
    def leading(self) -> bool:
        """Whether `decode` commits masks from left to right alone."""
        return self.window is not None and self.shift


@dataclass
class Output:
    """The output of a forward pass."""

    logits: Tensor
    """(B, L, V), in the model's dtype."""
