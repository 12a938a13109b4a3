"""Rotary embeddings as a config.json specifies them: their base, and the scaling of their frequencies.

transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5 `rope_parameters` with the base in it.
Formulas and order of operations are transformers 5's, so that the tables are equal to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ..ops import rope_table
from . import fields
from .fields import Field


class RopeScaling(Protocol):
    """A way to make the frequencies for a longer context from the frequencies that a model was first trained
    with."""

    @property
    def attention_factor(self) -> float:
        """The factor of cos and sin."""

    @property
    def positions(self) -> float:
        """The positions that the scaling is made for; 0: the config's max_position_embeddings."""

    def inv_freq(self, head_dim: int, theta: float) -> Tensor:
        """(head_dim / 2,) float32 on the CPU: the angle from one position to the next."""


def _powers(head_dim: int, theta: float) -> Tensor:
    """theta^(2 i / head_dim), (head_dim / 2,) float32: the inverse of the frequencies before scaling."""
    return theta ** (torch.arange(0, head_dim, 2, device="cpu").float() / head_dim)


@dataclass(frozen=True)
class Linear:
    """Linear scaling (arXiv 2306.15595): positions are divided by the factor."""

    factor: float
    positions: float
    attention_factor: ClassVar[float] = 1.0

    def inv_freq(self, head_dim: int, theta: float) -> Tensor:
        return 1.0 / _powers(head_dim, theta) / self.factor


@dataclass(frozen=True)
class Llama3:
    """Llama 3.1: long waves are stretched, short waves are not, and waves between them in part."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original: int
    attention_factor: ClassVar[float] = 1.0
    positions: ClassVar[float] = 0.0

    def inv_freq(self, head_dim: int, theta: float) -> Tensor:
        low, high = self.low_freq_factor, self.high_freq_factor
        inv_freq = 1.0 / _powers(head_dim, theta)
        wavelength = 2 * math.pi / inv_freq
        share = (self.original / wavelength - low) / (high - low)
        between = (1 - share) * inv_freq / self.factor + share * inv_freq
        long, short = wavelength > self.original / low, wavelength < self.original / high
        return torch.where(long, inv_freq / self.factor, torch.where(short, inv_freq, between))


@dataclass(frozen=True)
class Yarn:
    """YaRN (arXiv 2309.00071): high frequencies stay, low ones are divided by the factor, with a ramp
    between."""

    factor: float
    original: int
    beta_fast: float
    beta_slow: float
    truncate: bool
    attention_factor: float

    @property
    def positions(self) -> float:
        return self.factor * self.original

    def inv_freq(self, head_dim: int, theta: float) -> Tensor:
        def dimension(rotations: float) -> float:
            """The dimension that makes this many rotations within the original context."""
            return (head_dim * math.log(self.original / (rotations * 2 * math.pi))) / (2 * math.log(theta))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        high += 0.001 if low == high else 0
        ramp = (torch.arange(head_dim // 2, device="cpu").float() - low) / (high - low)
        as_trained = 1 - ramp.clamp(0, 1)
        powers = _powers(head_dim, theta)
        return 1.0 / (self.factor * powers) * (1 - as_trained) + 1.0 / powers * as_trained


def table(
    length: int, head_dim: int, theta: float, scaling: RopeScaling | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos, sin (length, head_dim / 2) float32, see `rope_table`."""
    if scaling is None:
        return rope_table(length, head_dim, theta, device=device)
    cos, sin = rope_table(length, head_dim, device=device, inv_freq=scaling.inv_freq(head_dim, theta))
    return cos * scaling.attention_factor, sin * scaling.attention_factor


@dataclass(frozen=True)
class QueryScaling:
    """Llama 4's scaling of queries, for texts longer than the original context (Ministral 3): at position p
    by 1 + beta log(1 + floor(p / original))."""

    beta: float
    original: int

    def table(self, length: int, device: torch.device) -> Tensor | None:
        """(length,) float32, the factors of positions from 0; None: all are 1."""
        if length <= self.original:
            return None
        contexts = torch.floor(torch.arange(length, device=device) / self.original)
        return 1 + self.beta * torch.log(1 + contexts)


# --- of a config.json ---------------------------------------------------------------------------

FIELDS = {
    "rope_theta": replace(fields.ROPE_THETA, default=None),
    "rope_scaling": Field(dict, None),
    "rope_parameters": Field(dict, None),
    "max_position_embeddings": fields.POSITIONS,
    "original_max_position_embeddings": fields.POSITIONS,
}
"""Keys of a config.json."""
_FACTOR = Field(float, most=2**20)
_BETA = Field(float, None, least=0, most=2**20)
_QUERY_BETA = "llama_4_scaling_beta"
_LLAMA3 = {
    "factor": _FACTOR,
    "low_freq_factor": Field(float, least=1e-6, most=2**20),
    "high_freq_factor": Field(float, least=1e-6, most=2**20),
}
_YARN = {
    "factor": _FACTOR,
    "attention_factor": Field(float, None, least=1e-6, most=2**20),
    "beta_fast": _BETA,
    "beta_slow": _BETA,
    "mscale": Field(float, None, least=0, most=2**20),
    "mscale_all_dim": Field(float, None, least=0, most=2**20),
    "truncate": Field(bool, True),
}


def _linear(rope: Mapping[str, Any], config: Mapping[str, Any], key: str) -> RopeScaling:
    factor = fields.read(rope, {"factor": _FACTOR}, key)["factor"]
    return Linear(factor, factor * (config["max_position_embeddings"] or 0))


def _llama3(rope: Mapping[str, Any], config: Mapping[str, Any], key: str) -> RopeScaling:
    c = fields.read(rope, _LLAMA3, key)
    if c["low_freq_factor"] >= c["high_freq_factor"]:
        raise ValueError(
            f"config: {key}: expected low_freq_factor below high_freq_factor, "
            f"got {c['low_freq_factor']:g} and {c['high_freq_factor']:g}"
        )
    return Llama3(**c, original=_original(rope, config, key))


def _yarn(rope: Mapping[str, Any], config: Mapping[str, Any], key: str) -> RopeScaling:
    c = fields.read(rope, _YARN, key)
    fast, slow = c["beta_fast"] or 32.0, c["beta_slow"] or 1.0
    if not 1e-6 <= slow <= fast:
        raise ValueError(
            f"config: {key}: expected beta_fast >= beta_slow >= 1e-06, got {fast:g} and {slow:g}"
        )

    def scale(weight: float) -> float:
        return 1.0 if c["factor"] <= 1 else 0.1 * weight * math.log(c["factor"]) + 1.0

    attention = c["attention_factor"]
    if attention is None:
        both = c["mscale"] and c["mscale_all_dim"]
        attention = scale(c["mscale"]) / scale(c["mscale_all_dim"]) if both else scale(1.0)
    original = _original(rope, config, key)
    return Yarn(c["factor"], original, fast, slow, c["truncate"], attention)


def _original(rope: Mapping[str, Any], config: Mapping[str, Any], key: str) -> int:
    """The positions of the original training."""
    name = "original_max_position_embeddings"
    inside = fields.read(rope, {name: fields.POSITIONS}, key)[name]
    original: int | None = config[name] or inside or config["max_position_embeddings"]
    if original is None:
        raise ValueError(f"config: {key}: {name!r} is missing")
    return original


SCALINGS: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any], str], RopeScaling]] = {
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
"""Type of scaling, beside "default" -> the function that reads it."""


def with_base(config: Mapping[str, Any], theta: float) -> Mapping[str, Any]:
    """The config.json, with the base `theta` if it has none."""
    nested = (config.get(key) for key in ("rope_parameters", "rope_scaling"))
    holders = [config, *(rope for rope in nested if isinstance(rope, Mapping))]
    named = any(holder.get("rope_theta") is not None for holder in holders)
    return config if named else {**config, "rope_theta": theta}


def query_scaling(config: Mapping[str, Any]) -> QueryScaling | None:
    """The scaling of queries that a config.json specifies. Raises ValueError as `fields.read`, and if
    `rope_scaling` and `rope_parameters` differ."""
    c = fields.read(config, FIELDS)
    betas = {
        key: fields.read(c[key], {_QUERY_BETA: _BETA}, key)[_QUERY_BETA] or None
        for key in ("rope_parameters", "rope_scaling")
        if c[key]
    }
    if len(set(betas.values())) > 1:
        raise ValueError(f"config: the {_QUERY_BETA} of {' and '.join(betas)} differ: {betas}")
    key, beta = next(iter(betas.items()), ("", None))
    return None if beta is None else QueryScaling(beta, _original(c[key], c, key))


def read(
    config: Mapping[str, Any], scalings: Collection[str] = tuple(SCALINGS)
) -> tuple[float, RopeScaling | None]:
    """The base and the scaling that a config.json specifies.

    Raises ValueError naming a type that is none of `scalings`, or keys that contradict each other.
    """
    c = fields.read(config, FIELDS)
    thetas = {"rope_theta": c["rope_theta"]}
    by_layer: dict[str, RopeScaling | None] = {}
    for key in ("rope_scaling", "rope_parameters"):
        rope = c[key]
        if not rope:
            continue
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default" and (not isinstance(kind, str) or kind not in scalings):
            raise ValueError(
                f"config: {key} of type {kind!r:.80} is not supported, only {sorted({'default', *scalings})}"
            )
        nested = [name for name, value in rope.items() if isinstance(value, Mapping)]
        if nested:
            raise ValueError(f"config: {key} by kinds of layers ({nested[0]!r:.80}) is not supported")
        fields.check_supported(rope, {"partial_rotary_factor": 1})
        thetas[key] = fields.read(rope, {"rope_theta": FIELDS["rope_theta"]}, key)["rope_theta"]
        by_layer[key] = None if kind == "default" else SCALINGS[kind](rope, c, key)
    if len(set(by_layer.values())) > 1:
        raise ValueError("config: rope_scaling and rope_parameters ask for different embeddings")
    if len(by_layer) > 1 and thetas["rope_theta"] is None and thetas["rope_scaling"] is None:
        # transformers reads rope_scaling alone, whose base is then the default.
        thetas["rope_scaling"] = fields.ROPE_THETA.default
    bases = {key: theta for key, theta in thetas.items() if theta is not None}
    if len(set(bases.values())) > 1:
        raise ValueError(f"config: the rope_theta of {' and '.join(map(str, bases))} differ: {bases}")
    theta = next(iter(bases.values()), fields.ROPE_THETA.default)
    scaling = next(iter(by_layer.values()), None)
    if isinstance(scaling, Yarn) and theta == 1:
        raise ValueError("config: rope_theta=1, expected more for yarn")
    return theta, scaling
