"""Every op on arguments that nobody should give, which are errors by name or have a result, but never end the
process."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import LEVELS, Attack, layouts
from fuzzing import DTYPES, strided
from ops import op_examples as inputs
from torch import Tensor

import dparallel_ext as dx


@pytest.fixture(autouse=True)
def _level() -> Iterator[None]:
    before = dx.simd_level()
    yield
    dx._C.use_simd_level(before)


INDICES = {
    "row_stats": ("rows", "suppress", "ids"),
    "row_topk": ("rows", "suppress"),
    "unmask_": ("suppress", "positions", "lane"),
    "commit_": ("positions", "lane"),
    "accept": ("q_start", "q_end", "suppress"),
    "kv_write": ("positions", "slot_mapping"),
    "kv_move": ("source", "target"),
    "block_attention": ("q_start", "q_end", "kv_lens", "block_table"),
}


def test_indices_out_of_bounds_are_named(attack: Attack) -> None:
    """And nothing is changed."""
    for rng in attack.cases(100):
        dx._C.use_simd_level(rng.choice(LEVELS))
        torch.manual_seed(rng.randrange(2**31))
        name = rng.choice(list(INDICES))
        op, argument = inputs.op_of(name), rng.choice(INDICES[name])
        names = [a.name for a in op.default._schema.arguments]
        call = inputs.copied(inputs.examples(rng.choice(DTYPES))[name])
        if argument == "positions" and name == "unmask_":
            call[1], call[2] = call[1].flatten(0, 1), torch.arange(6)
        index = call[names.index(argument)]
        bad = rng.choice([-1, 41, 2**31, 2**32 + 1, 2**60, 2**63 - 1, -(2**63), -(2**31)])
        if argument in ("slot_mapping", "source", "target"):
            bad = abs(bad) % 2**62 + 40
        index.view(-1)[rng.randrange(index.numel()) if argument != "block_table" else 0] = bad
        call = [
            strided(rng, t, changed=a.is_write) if isinstance(t, Tensor) else t
            for t, a in zip(call, op.default._schema.arguments, strict=True)
        ]
        before = inputs.copied(tuple(call))
        with pytest.raises(ValueError, match=f"^{argument}: expected in "):
            op(*call)
        assert inputs.same(call, before)


def mutated(rng: random.Random, value: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return rng.choice([True, False, None])
    if isinstance(value, int):
        return rng.choice([0, -1, 1, 2**31, -(2**31), 2**63 - 1, -(2**63), rng.randrange(100)])
    if isinstance(value, float):
        return rng.choice([0.0, -1.0, math.nan, math.inf, -math.inf, 1e-45, 1e308, rng.random()])
    if value.is_meta:
        return value
    kind = rng.randrange(6)
    if kind == 0:
        dtypes = (*DTYPES, torch.float64, torch.int64, torch.int32, torch.bool, torch.uint8, torch.complex64)
        return value if value.is_complex() else value.float().to(rng.choice(dtypes))
    if kind == 1:  # one dimension more or less, or of another size
        shape = list(value.shape)
        change = rng.randrange(4)
        if shape and change == 0:
            del shape[rng.randrange(len(shape))]
        elif change == 1:
            shape.insert(rng.randint(0, len(shape)), rng.randrange(3))
        elif shape:
            shape[rng.randrange(len(shape))] = rng.randrange(9)
        return value.new_empty(shape).copy_(torch.zeros(shape))
    if kind == 2 and value.numel():  # the same memory, each element several times
        return value.clone().flatten().as_strided(value.shape, [rng.randrange(2) for _ in value.shape])
    if kind == 3 and value.dtype == torch.int64 and value.numel():
        value = value.clone(memory_format=torch.contiguous_format)
        value.view(-1)[rng.randrange(value.numel())] = mutated(rng, 1)
        return value
    if kind == 4 and value.is_floating_point() and value.dtype != torch.float8_e4m3fn:
        return torch.full_like(
            value, rng.choice([math.nan, math.inf, -math.inf, torch.finfo(value.dtype).max, 0])
        )
    return rng.choice([None, value, value.to("meta"), *layouts(value)])


def test_no_arguments_end_the_process(attack: Attack) -> None:
    """An error of Python, or a result."""
    refused = 0
    for rng in attack.cases(150):
        dx._C.use_simd_level(rng.choice(LEVELS))
        torch.manual_seed(rng.randrange(2**31))
        name = rng.choice(inputs.OPS)
        call = inputs.copied(inputs.examples(rng.choice(DTYPES))[name])
        for _ in range(rng.choice([1, 1, 2, 4])):
            place = rng.randrange(len(call))
            call[place] = mutated(rng, call[place])
        try:
            inputs.op_of(name)(*call)
        except Exception:
            refused += 1
    assert attack.seconds or 0 < refused < attack.tried
