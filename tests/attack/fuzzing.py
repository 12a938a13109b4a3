"""Random tensors: numbers, strides, policies."""

from __future__ import annotations

import math
import random

import torch
from conftest import layouts
from torch import Tensor

from dparallel_ext import policies

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


STEP = {torch.float32: 2**-23, torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float64: 2**-52}


VOCABULARIES = (1, 2, 3, 5, 15, 16, 17, 31, 33, 64, 247, 1000, 2047, 2049, 4100)


def randn(rng: random.Random, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rng.randrange(2**40)))


def some(rng: random.Random, p: float, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(rng.randrange(2**40))) < p


def whole(rng: random.Random, low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(rng.randrange(2**40)))


def numbers(rng: random.Random, dtype: torch.dtype, *shape: int, special: tuple[float, ...] = ()) -> Tensor:
    """Of a random scale, some of them `special` or as small as can be."""
    tiny = torch.finfo(dtype).smallest_normal
    t = (randn(rng, *shape) * rng.choice([0.01, 1.0, 1.0, 5.0])).to(dtype)
    if t.numel():
        for _ in range(rng.choice([0, 0, 1, 4])):
            t.view(-1)[rng.randrange(t.numel())] = rng.choice(
                [0.0, -0.0, tiny, tiny / 4, -tiny / 4, *special]
            )
    return t


def strided(rng: random.Random, t: Tensor, changed: bool = False) -> Tensor:
    """`t` in memory of its own, of random strides; expanded too unless it is to be changed."""
    found = [t.clone(), t.clone(), *layouts(t)]
    return rng.choice([x for x in found if not (changed and 0 in x.stride())])


def near(found: Tensor, expected: Tensor, bound: Tensor | float) -> bool:
    """Within `bound`; infinities equal, NaN in the same places."""
    a, b = found.double(), expected.double()
    same = (a == b) | (a.isnan() & b.isnan())
    return bool((same | ((a - b).abs() <= bound)).all())


def policy_rows(rng: random.Random, batch: int, length: int) -> Tensor:
    made = []
    for _ in range(batch):
        selector = rng.choice(list(policies.SELECTORS))
        high = policies.RULES[selector].high
        threshold = rng.choice([0.0, 2**-149, 0.5, rng.random(), 1.0, min(high, 3.0), min(high, 1e30)])
        if selector == "quota":
            threshold = rng.choice([1, 2, length + 1, 2**40])
        low = rng.choice([0, 1, 1, 2, length + 3, policies.MOST])
        most = rng.choice([None, max(low, 1), low + 1, math.inf])
        score = rng.choice(list(policies.SCORES)) if selector == "quota" else None
        made.append(policies.make(selector, threshold, min_commit=low, max_commit=most, score=score))
    return torch.cat(made) if made else torch.empty(0, 5)
