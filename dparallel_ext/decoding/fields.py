"""Checks of `DecodeConfig`'s fields, each by itself; a check returns the value in plain Python types."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any

import torch
from torch import Tensor

from .. import arguments, policies
from ..arguments import described, number, shown, whole
from ..automaton import Automaton
from ..rules import Rule
from . import most_probable


def plain(value: Any) -> Any:
    """`value` in Python's own numbers, with lists, arrays and tensors as tuples. A set stays a set: it has no
    order."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping, Set)):
        return tuple(plain(each) for each in value)
    return value


def _plain(name: str, value: Any) -> Any:
    return plain(value)


def _switch(name: str, value: Any) -> bool:
    value = plain(value)
    if not isinstance(value, (bool, int)) or value not in (0, 1):
        raise ValueError(f"{name}: expected True or False, got {shown(value)}")
    return bool(value)


def _whole_of(least: int) -> Callable[[str, Any], int | None]:
    return lambda name, value: None if value is None else whole(name, value, least)


def _counts(name: str, value: Any) -> int | tuple[int, ...]:
    value = plain(value)
    several = isinstance(value, tuple)
    return tuple(whole(name, each, 0) for each in value) if several else whole(name, value, 0)


def _real(name: str, value: Any) -> Any:
    """A number whose bounds are checked later."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def _rows(name: str, value: Any) -> Any:
    if value is None or (callable(value) and not isinstance(value, Rule)):
        return value
    if isinstance(value, Tensor):
        rows = value.cpu()  # `policies.check` reads numbers on the CPU alone
    else:
        try:
            filled = [[math.inf if each is None else each for each in row] for row in value]
            rows = torch.tensor(filled, dtype=torch.float32, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            hint = f"; pass it as rule={shown(value)}" if isinstance(value, (str, Rule)) else ""
            raise ValueError(
                f"policy: expected rows or a function, got {type(value).__name__}{hint}"
            ) from error
    policies.check(rows, len(rows) if rows.ndim else 1)
    return plain(rows)


def _ids(name: str, value: Any) -> tuple[int, ...] | None:
    return None if value is None else tuple(arguments.token_ids(name, value).tolist())


def _ends(name: str, value: Any) -> int | tuple[int, ...] | None:
    value = plain(value)
    if isinstance(value, tuple):
        return tuple(whole(name, each, 0) for each in value)
    return None if value is None else whole(name, value, -1)


def _stops(name: str, value: Any) -> tuple[tuple[int, ...], ...]:
    stops = []
    for sequence in value if isinstance(value, Iterable) and getattr(value, "ndim", None) != 0 else [value]:
        if getattr(sequence, "ndim", 0 if isinstance(sequence, int) else 1) == 0:
            raise ValueError(f"stop: expected sequences of token ids, got the number {shown(sequence)}")
        ids = arguments.token_ids("stop", sequence).tolist()
        if not ids:
            raise ValueError("stop: expected sequences of at least one token, got an empty one")
        stops.append(tuple(ids))
    return tuple(stops)


def _automaton(name: str, value: Any) -> Automaton | None:
    if value is not None:
        arguments.instance(name, value, Automaton)
    return value


def _seed(name: str, value: Any) -> Any:
    if value is None:
        return None
    try:
        seeds = arguments.on_host(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"seed: expected an integer of 64 bits or int64 (B,), got {shown(value)}") from error
    if seeds.shape == (0,):
        seeds = seeds.to(torch.int64)  # torch makes an empty list float32
    if seeds.dtype not in (*arguments.INTEGERS, torch.bool) or seeds.ndim > 1:
        raise ValueError(f"seed: expected an integer or int64 (B,), got {described(seeds)}")
    return plain(seeds.to(torch.int64))


def _penalty(name: str, value: Any) -> float | None:
    return None if value is None else number(name, value, least=0.01, most=100)


CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "gen_length": _counts,
    "infill": _switch,
    "block_length": _whole_of(1),
    "sub_block_length": _whole_of(1),
    "steps": _whole_of(1),
    "threshold": _plain,
    "selector": _plain,
    "policy": _rows,
    "automaton": _automaton,
    "min_commit": _plain,
    "max_commit": _plain,
    "score": _plain,
    "refresh": _whole_of(1),
    "active_blocks": functools.partial(whole, least=1),
    "open_at": functools.partial(number, most=1),
    "activate_at": functools.partial(number, most=1),
    "batch_invariant": _switch,
    "graphs": _switch,
    "temperature": number,
    "top_p": _real,
    "top_k": _real,
    "suppress": _ids,
    "repetition_penalty": _penalty,
    "presence_penalty": functools.partial(number, least=-2, most=2),
    "frequency_penalty": functools.partial(number, least=-2, most=2),
    "mask_id": _whole_of(0),
    "eos_id": _ends,
    "stop": _stops,
    "seed": _seed,
    "record": _switch,
    "logprobs": _switch,
    "top_logprobs": functools.partial(whole, least=0, most=most_probable.MOST),
}
"""(name, value) -> the value to keep, or ValueError. `DecodeConfig` checks how fields go together."""
