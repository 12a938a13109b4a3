"""Checks of arguments: numbers and token ids of Python, numpy and torch become Python's or torch's own."""

from __future__ import annotations

import contextlib
import inspect
import math
import operator
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def shown(value: Any) -> str:
    """`repr(value)` for an error text, cut to 200 characters; the type alone where `repr` raises."""
    try:
        text = repr(value)
    except Exception:  # Python refuses to write an int of more than 4300 digits
        return f"{type(value).__name__} that cannot be shown"
    return text if len(text) <= 200 else f"{text[:200]}..."


def described(value: Any) -> str:
    """The dtype and the shape of a tensor, "torch.int64 (3, 4)"; of another value the name of its type."""
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


OURS = ("dparallel_ext", "dparallel", "torch")
"""Packages in which no warning is placed: ours, and torch, which wraps our functions."""


def warn(text: str) -> None:
    """Warn, at the line that called our packages, however deep in them the reason is found."""
    level, frame = 2, inspect.currentframe()
    while (frame := frame and frame.f_back) and str(frame.f_globals.get("__name__")).split(".")[0] in OURS:
        level += 1
    warnings.warn(text, stacklevel=level)


def whole(name: str, value: Any, least: int, most: int = 2**63 - 1) -> int:
    """`value` as an int: of Python or numpy, or a 0-d tensor.

    Raises ValueError naming the argument unless it is a whole number of at least `least` and at most `most`.
    """
    result = None
    if not isinstance(value, bool) and not (
        isinstance(value, Tensor) and (value.ndim or value.dtype == torch.bool)
    ):
        with contextlib.suppress(TypeError, RuntimeError):  # of a tensor on "meta"
            result = operator.index(value)
    if result is None or result < least:
        raise ValueError(f"{name}: expected a whole number >= {least}, got {shown(value)}")
    if result > most:
        raise ValueError(f"{name}: expected a whole number <= {most}, got {shown(value)}")
    return result


def number(name: str, value: Any, least: float = 0.0, most: float = math.inf) -> float:
    """`value` as a float: of Python or numpy, or a 0-d tensor.

    Raises ValueError naming the argument unless it is a finite number of at least `least` and at most `most`.
    """
    result = math.nan
    if not isinstance(value, (str, bytes, bool)):
        with contextlib.suppress(TypeError, ValueError, RuntimeError, OverflowError):
            result = float(value)
    if not (least <= result <= most and math.isfinite(result)):
        bound = "" if least == -math.inf else f" >= {least:g}"
        wanted = f"finite number{bound}" if most == math.inf else f"number from {least:g} to {most:g}"
        raise ValueError(f"{name}: expected a {wanted}, got {shown(value)}")
    return result


def check_fields(
    instance: object, names: Iterable[str], check: Callable[..., int | float], *bounds: int | float
) -> None:
    """Check fields of a dataclass, frozen or not, by `whole` or `number`, and keep what these return: a
    tensor would make equal objects' hashes differ, and could change later. A field may be None if that is
    its default."""
    for name in names:
        value, default = getattr(instance, name), getattr(type(instance), name, ...)
        if value is not None or default is not None:
            object.__setattr__(instance, name, check(name, value, *bounds))


def check_tensor(name: str, value: Any) -> None:
    """Raise TypeError unless `value` is a tensor, ValueError unless it is dense, with strides."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")
    if value.layout is not torch.strided or value.is_nested:
        kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise ValueError(f"{name}: expected a dense Tensor, got a {kind} one")


def one_of(name: str, value: Any, choices: Collection[str]) -> str:
    """`value`. Raises ValueError naming the argument unless it is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: expected one of {list(choices)}, got {shown(value)}")
    return value


def instance(name: str, value: Any, kind: type) -> None:
    """Raise ValueError unless the value is a `kind`."""
    if not isinstance(value, kind):
        raise ValueError(f"{name}: expected {kind.__name__}, got {type(value).__name__}")


def function(name: str, value: Any) -> Any:
    """`value`. Raises ValueError naming the argument unless it can be called."""
    if not callable(value):
        raise ValueError(f"{name}: expected a function, got {type(value).__name__}")
    return value


def check_streamer(streamer: Any, batch: int) -> None:
    """Raise ValueError unless `streamer` is None, or an object with `put` and `end` and the batch is of 1."""
    if streamer is None:
        return
    has = all(callable(getattr(streamer, name, None)) for name in ("put", "end"))
    if not has or isinstance(streamer, type):
        raise ValueError(f"streamer: expected an object with the methods put and end, got {shown(streamer)}")
    if batch != 1:
        raise ValueError(f"streamer: expected a batch of 1, got {batch}")


COLDEST, HOTTEST = 1e-5, 2.0**100
"""The lowest and highest temperature in force besides 0; the same in csrc/include/dparallel/launch.h."""


def temperature_in_force(value: Any) -> float:
    """The temperature that `value` stands for: below `COLDEST` 0, which is greedy, and at most `HOTTEST`.

    Raises ValueError unless it is a finite number of at least 0.
    """
    is_checked = type(value) is float and 0.0 <= value < math.inf  # every pass gives such a value
    temperature: float = value if is_checked else number("temperature", value)
    return 0.0 if temperature < COLDEST else min(temperature, HOTTEST)


def per_sequence(name: str, value: Any, count: int, least: int) -> list[int]:
    """`count` whole numbers, from one number for all or from `count` in a tuple, as a `DecodeConfig` has
    them."""
    values = list(value) if isinstance(value, tuple) else [value] * count
    if len(values) != count:
        raise ValueError(f"{name}: expected a number or one for each of {count}, got {len(values)}")
    return [whole(name, each, least) for each in values]


def on_host(value: Any) -> Tensor:
    """A tensor as it is; another value as a tensor on the CPU, whatever torch's default device.

    Raises ValueError for a tensor on "meta", which has no values.
    """
    if not isinstance(value, Tensor):
        return torch.as_tensor(value, device="cpu")
    if value.is_meta:
        raise ValueError("expected values, got a tensor on meta")
    return value


def token_ids(name: str, value: Any) -> Tensor:
    """One sequence of token ids (P,) int64 from a list, an array or a tensor.

    Raises ValueError naming the argument.
    """
    try:
        ids = on_host(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(
            f"{name}: expected int64 (P,) or a list of ids, got {_kind(value)}{_first_refused(value)}"
            f"{_where_ids_are(value)}"
        ) from error
    if not ids.numel():
        ids = ids.to(torch.int64)  # torch makes an empty list float32
    if ids.ndim != 1 or ids.dtype not in INTEGERS:
        raise ValueError(f"{name}: expected int64 (P,), got {described(ids)}")
    return ids.to(torch.int64)


def prompts(prompt: Any, attention_mask: Any = None) -> list[Tensor]:
    """B prompts (P,) int64 of any lengths, from any form that `decode` takes; padding is taken out.

    Raises ValueError naming the argument that does not fit.
    """
    if isinstance(prompt, Mapping):  # a tokenizer's BatchEncoding
        if "input_ids" not in prompt:
            raise ValueError(f"prompt: expected input_ids in the mapping, got {sorted(map(str, prompt))}")
        if attention_mask is None:
            attention_mask = prompt.get("attention_mask")
        prompt = prompt["input_ids"]
    rows = _rows("prompt", prompt)
    ids = [token_ids("prompt", row) for row in rows]
    if attention_mask is None:
        return ids
    masks = [_mask(row) for row in _rows("attention_mask", attention_mask)]
    if [mask.numel() for mask in masks] != [len(row) for row in ids]:
        raise ValueError(
            f"attention_mask: expected the shape of prompt (B, P), got {_shape(attention_mask)} "
            f"beside {_shape(prompt)}"
        )
    return [row[_visible(mask).to(row.device)] for row, mask in zip(ids, masks, strict=True)]


def _rows(name: str, value: Any) -> list[Any]:
    """The sequences of a batch; a single sequence is a batch of one."""
    if isinstance(value, str):
        return [value]  # `token_ids` refuses it
    if not (isinstance(value, Sequence) or hasattr(value, "ndim")):
        raise ValueError(
            f"{name}: expected int64 (B, P) or (P,), or a list of (P,), got {_kind(value)}"
            f"{_where_ids_are(value)}"
        )
    if isinstance(value, Sequence):
        # A list of numbers is one sequence, any other list a batch; an empty list is an empty batch.
        return [value] if value and is_number(value[0]) else list(value)
    if value.ndim not in (1, 2):
        raise ValueError(f"{name}: expected (B, P) or (P,), got {tuple(value.shape)}")
    return [value] if value.ndim == 1 else list(value)


def _mask(row: Any) -> Tensor:
    """A row of an attention mask, as it was given."""
    try:
        return on_host(row)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"attention_mask: expected bool or whole numbers, got {_kind(row)}") from error


def _visible(mask: Tensor) -> Tensor:
    """A row of an attention mask, (P,) bool."""
    if mask.ndim != 1 or (mask.numel() and mask.is_floating_point()):
        raise ValueError(f"attention_mask: expected bool or whole numbers, got rows {described(mask)}")
    return mask.to(torch.bool)


def is_number(value: Any) -> bool:
    """Whether `value` is a number of Python or numpy, or a 0-d tensor."""
    return isinstance(value, (int, float)) or getattr(value, "ndim", None) == 0


def _first_refused(value: Any) -> str:
    """ " with X" for the first entry of a list that is no number of 64 bits, else ""."""
    for each in value if isinstance(value, list | tuple) else ():
        try:
            on_host(each)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            return f" with {shown(each)}"
    return ""


def _where_ids_are(value: Any) -> str:
    """A hint for an error: how to get the ids from a text, or from a tokenizer's output; else ""."""
    if isinstance(value, str):
        return "; encode it with the model's tokenizer first"
    if isinstance(value, Mapping) and "input_ids" in value:
        return '; its ids are its ["input_ids"]'
    return "; its ids are its .ids" if hasattr(value, "ids") else ""


def _kind(value: Any) -> str:
    where = " on meta" if getattr(value, "is_meta", False) else ""
    return f"{getattr(value, 'dtype', type(value).__name__)}{where}"


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if hasattr(value, "shape") else f"{len(value)} rows"


def moved(ids: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Token ids (P,) of any lengths on `device`, moved by one copy if all are on one other device."""
    if len({each.device for each in ids} - {device}) != 1 or any(each.device == device for each in ids):
        return [each.to(device) for each in ids]
    return list(torch.cat(list(ids)).to(device).split([len(each) for each in ids]))


def check_ids(name: str, ids: Sequence[Tensor], vocabulary: int | None) -> None:
    """Raise ValueError naming the argument if an id of `ids` is negative or not below `vocabulary`.

    Waits for the devices that the ids are on, so call it before the passes.
    """
    for device in {each.device: None for each in ids}:
        there = [each for each in ids if each.device == device]
        together = torch.cat(there) if len(there) > 1 else there[0]
        low, high = torch.stack(together.aminmax()).tolist() if together.numel() else (0, -1)
        if low < 0 or (vocabulary is not None and high >= vocabulary):
            wanted = ">= 0" if vocabulary is None else f"in [0, {vocabulary})"
            raise ValueError(f"{name}: expected token ids {wanted}, got {low if low < 0 else high}")
