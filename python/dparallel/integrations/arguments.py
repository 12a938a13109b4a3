"""Reads the harness's arguments, of a model and of a generation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from dparallel_ext import DecodeConfig

MAX_LENGTH = 2048
"""Positions of models whose config names no number."""
AUTO_BATCH_SIZE = 16
"""The batch size of `--batch_size auto`."""
LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "min_p": (0,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "repetition_penalty": (1,),
    "typical_p": (1,),
    "use_cache": (True, False),
}
"""Generation arguments that are not supported -> the values that change nothing."""
OF_SAMPLING = {"min_p", "typical_p"}
"""Unsupported arguments that change nothing in greedy decoding."""


@dataclass(frozen=True)
class Generation:
    """How one request of `generate_until` is decoded."""

    prompt: list[int]
    gen_length: int
    config: DecodeConfig
    """Its stops are the end tokens after the first, and strings of `until` that are special tokens, which do
    not appear in text."""
    until: tuple[str, ...]


def batch_size_of(value: int | str | None, largest: int | None) -> int:
    if isinstance(value, str) and value.startswith("auto"):
        return min(AUTO_BATCH_SIZE, int(largest or AUTO_BATCH_SIZE))
    try:
        size = 1 if value is None else int(value)
    except ValueError:
        size = 0
    if size < 1:
        raise ValueError(f"batch_size: expected a whole number >= 1 or 'auto', got {value!r}")
    return size


def device_of(asked: str | None, local_rank: str | None) -> str:
    if not torch.cuda.is_available():
        return "cpu"
    return asked or "cuda" if local_rank is None else f"cuda:{local_rank}"


def temperature_of(do_sample: bool | None, temperature: Any) -> Any:
    """The temperature: 0 unless the task samples; 1 for sampling without a temperature, as in
    transformers."""
    if do_sample is False:
        return 0.0
    if temperature is None:
        return 1.0 if do_sample else 0.0
    return temperature


def rolling_windows(ids: list[int], prefix: list[int], width: int) -> Iterator[tuple[list[int], list[int]]]:
    """(context, continuation) of at most `width` tokens, whose continuations make up `ids`.

    The first context is the prefix. Each later continuation leaves its context one token, and the last one
    gets all the context that fits.
    """
    first = ids[: max(1, width - len(prefix))]
    if first:
        yield prefix, first
    at = len(first)
    while at < len(ids):
        end = min(at + max(1, width - 1), len(ids))
        yield ids[max(0, end - width) : at], ids[at:end]
        at = end
