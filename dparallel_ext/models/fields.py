"""Checks of the keys of a config.json, before a module is built."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any


def check_supported(
    config: Mapping[str, Any], supported: Mapping[str, Any], explicit: Collection[str] = ()
) -> None:
    """Raise ValueError naming a key whose value this transformer does not support; falsy values are equal.

    The keys in `explicit` must be there, since the published code's default is not supported.
    """
    for key, value in supported.items():
        got = config[key] if key in explicit else config.get(key, value)
        if got != value and (got or value):
            raise ValueError(f"config: {key}={got!r:.80} is not supported, only {value!r}")


@dataclass(frozen=True)
class Field:
    """The values that a key of a config.json may have: null, or a value of its kind within bounds."""

    kind: type
    """int, float, bool (also as 0 or 1) or dict."""
    default: Any = ...
    """The value if the key is missing or null; ...: it must not be."""
    least: float = 1
    most: float = 2**53

    def accepts(self, value: Any) -> bool:
        if self.kind is bool:
            return isinstance(value, int) and value in (0, 1)
        if self.kind is dict:
            return isinstance(value, Mapping)
        kinds = (int,) if self.kind is int else (int, float)
        right = isinstance(value, kinds) and not isinstance(value, bool)
        return right and self.least <= value <= self.most  # false for NaN

    def __str__(self) -> str:
        if self.kind in (bool, dict):
            return "true or false" if self.kind is bool else "an object"
        name = "a whole number" if self.kind is int else "a number"
        return f"{name} >= {self.least:g} and <= {self.most:.15g}"


# Within these bounds no product of sizes overflows, and a senseless config makes few modules.
LAYERS = Field(int, most=1000)
WIDTH = Field(int, most=2**20)
HEADS = Field(int, most=2**16)
MLP_WIDTH = Field(int, most=2**24)
VOCABULARY = Field(int, most=2**24)
EPS = Field(float, 1e-6, least=1e-30, most=1)
ROPE_THETA = Field(float, 10000.0, most=1e30)
POSITIONS = Field(int, None)
BLOCK_LENGTH = Field(int, most=4096)
NO = Field(bool, False)


def read(config: Mapping[str, Any], table: Mapping[str, Field], within: str | None = None) -> dict[str, Any]:
    """The values of the table's keys, each of its kind, or None. Raises ValueError naming a key that is
    missing or not of its kind.

    within: the key of the config.json whose object `config` is.
    """
    values, where = {}, "config" if within is None else f"config: {within}"
    for key, field in table.items():
        value = config.get(key)
        if value is None and key in config and field.kind is bool and field.default is not None:
            value = False  # as the published code takes null
        elif value is None:
            if field.default is ...:
                raise ValueError(f"{where}: {key!r} is {'null' if key in config else 'missing'}")
            value = field.default
        elif not field.accepts(value):
            raise ValueError(f"{where}: {key}={value!r:.80}, expected {field}")
        values[key] = None if value is None else field.kind(value)
    return values


def width_of_heads(width: int, heads: int) -> int:
    """The width of a head. Raises ValueError if the heads do not divide the width."""
    if width % heads:
        raise ValueError(f"config: {heads} heads do not divide a width of {width}")
    return width // heads
