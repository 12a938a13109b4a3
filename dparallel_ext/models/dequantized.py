"""Weights that a checkpoint stores as 8-bit floats with scales, read into the type of its other tensors.

    weight (out, in) in blocks of (rows, columns), each with a scale:   block * scale in float32, rounded once

Software for such checkpoints also rounds the layers' inputs to 8 bits, and caches. Here they are not rounded,
and scales for them are left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .stored import DTYPES, NAMES, SourceTensor

_KEY = "quantization_config"
_TYPES = ("F8_E4M3", "F8_E5M2")
_SCALES = ("_scale_inv", "_scale")
"""Behind a weight's name: its scales, by transformers and DeepSeek, and by all others."""
_LEFT_OUT = {"activation_scale", "input_scale", "output_scale", "q_scale", "k_scale", "v_scale"}


def is_read(config: Mapping[str, Any]) -> bool:
    """Whether a config.json says that the weights are 8-bit floats, as transformers, vLLM,
    compressed-tensors, ModelOpt or FBGEMM writes it."""
    settings = config.get(_KEY)
    settings = settings if isinstance(settings, Mapping) else {}
    method, form = settings.get("quant_method"), settings.get("format")
    return (
        method in ("fp8", "fbgemm_fp8")
        or (method == "modelopt" and settings.get("quant_algo") == "FP8")
        or (method == "compressed-tensors" and form in ("float-quantized", "naive-quantized"))
    )


def dequantized(
    config: Mapping[str, Any], tensors: Iterable[SourceTensor], dtype: torch.dtype | None, source: str
) -> tuple[dict[str, Any], list[SourceTensor]]:
    """The config.json without its quantisation, and the tensors with 8-bit weights times their scales, in
    `dtype`, by default that of the largest of the others.

    Raises ValueError naming `source` and a weight with other scales than the config says.
    """
    stored = {entry.name: entry for entry in tensors if entry.name.rpartition(".")[2] not in _LEFT_OUT}
    scales: dict[str, SourceTensor] = {}
    for name, entry in stored.items():
        of_it = [stored[name + end] for end in _SCALES if name + end in stored]
        if of_it and entry.dtype in _TYPES:
            scales[name] = of_it[0]
    used = {entry.name for entry in scales.values()}
    others = [entry for name, entry in stored.items() if name not in scales and name not in used]
    if dtype is None:
        typed = [entry for entry in others if entry.dtype in DTYPES]
        dtype = (
            DTYPES[max(typed, key=lambda entry: math.prod(entry.shape)).dtype] if typed else torch.bfloat16
        )
    size = _block_size(config[_KEY])
    for name, scale in scales.items():
        weight = stored[name]
        block = _block(weight.shape, scale.shape, size)
        if block is None:
            raise ValueError(
                f"{source}: {scale.name} is {scale.shape} for a weight {weight.shape}, expected one scale, "
                f"one for each row, or one for each block of {size or '(the config names no size)'}"
            )
        later = partial(_product, weight, scale, block, dtype)
        others.append(SourceTensor(name, weight.shape, NAMES.get(dtype, str(dtype)), later, computed=True))
    return {key: value for key, value in config.items() if key != _KEY}, others


def _block_size(settings: Mapping[str, Any]) -> list[int] | None:
    """The (rows, columns) of a block, if a config names them: [128, 128], or "128x128"."""
    size = settings.get("weight_block_size")
    groups = settings.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        size = size or (weights.get("block_structure") if isinstance(weights, Mapping) else None)
    numbers = [int(number) for number in re.findall(r"\d{1,9}", str(size))]
    return numbers if len(numbers) == 2 and all(numbers) else None


def _block(shape: Sequence[int], scales: Sequence[int], size: Sequence[int] | None) -> tuple[int, int] | None:
    """The rows and columns for which a scale is, of a weight of this shape; None if the scales do not fit."""
    if len(shape) != 2:
        return None
    rows, columns = shape
    if math.prod(scales) == 1:
        return rows, columns
    if tuple(scales) in ((rows,), (rows, 1)):
        return 1, columns
    if size is not None and tuple(scales) == (-(-rows // size[0]), -(-columns // size[1])):
        return size[0], size[1]
    return None


def _product(weight: SourceTensor, scale: SourceTensor, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The weight (out, in) times its scales, one for each block of (rows, columns)."""
    numbers = weight.fetch().float()
    (out, width), (rows, columns) = numbers.shape, block
    factors = scale.fetch().float().reshape(-(-out // rows), -(-width // columns))
    factors = factors.repeat_interleave(rows, 0)[:out]
    if columns < width:
        factors = factors.repeat_interleave(columns, 1)[:, :width]
    return numbers.mul_(factors).to(dtype)
