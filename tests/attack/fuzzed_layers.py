"""Random cases of the ops of layers: cache, attention, products."""

from __future__ import annotations

import math
import random
from typing import Any

import torch
from fuzzing import DTYPES, STEP, near, numbers, randn, some, strided, whole
from ops import op_examples as inputs
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext import reference


def kv_write(rng: random.Random) -> None:
    dtype, count, heads, group = (
        rng.choice(DTYPES),
        rng.choice([0, 1, 7, 40]),
        rng.randint(1, 3),
        rng.randrange(4),
    )
    dim, page, table = rng.choice([0, 2, 6, 16, 34, 64]), rng.choice([1, 5, 16]), rng.randint(1, 60)
    normed = rng.random() < 0.5
    special = (math.inf, -math.inf, math.nan, *([] if normed else [torch.finfo(dtype).max / 4]))
    pages = -(-count // page) + rng.randrange(3)
    made = [numbers(rng, dtype, count, n * heads, dim, special=special) for n in (group, 1, 1)]
    made += [numbers(rng, dtype, pages, heads, page, dim) for _ in "kv"]
    slots = torch.randperm(pages * page, generator=torch.Generator().manual_seed(rng.randrange(2**30)))[
        :count
    ]
    slots = torch.where(some(rng, 0.2, count), -rng.randint(1, 2**60), slots)
    rotary = 2 * rng.randint(0, dim // 2)
    cos, sin = dx.rope_table(table, rotary, 500.0) if rotary else torch.ones(2, table, 0)
    positions = whole(rng, 0, table, count)
    given: dict[str, Any] = {"positions": positions, "slot_mapping": slots, "cos": cos, "sin": sin}
    most = 0.0  # that a norm may give
    if normed:
        given |= {name: numbers(rng, dtype, dim) for name in ("q_norm", "k_norm")}
        given["eps"] = rng.choice([1e-5, 1e-6, 1.0])
        if dim:
            most = math.sqrt(dim) * max(float(given[name].abs().max()) for name in ("q_norm", "k_norm"))
    ours, by_reference = [strided(rng, t, changed=True) for t in made], [t.clone() for t in made]
    dx.kv_write(*ours, **{n: strided(rng, t) if isinstance(t, Tensor) else t for n, t in given.items()})
    if dim:
        reference.kv_write(*by_reference, **given)
    for a, b in zip(ours, by_reference, strict=True):
        scale = b.double().nan_to_num(0, 0, 0).abs().amax(-1, keepdim=True) if dim else 0.0
        assert near(a, b, STEP[dtype] * (2 * scale + 4 * most + 4 * torch.finfo(dtype).smallest_normal))


def kv_move(rng: random.Random) -> None:
    dtype, page = rng.choice((*DTYPES, torch.float64)), rng.choice([1, 5, 16])
    lanes, count, pages = rng.randrange(4), rng.choice([0, 1, 7, 40]), rng.randint(1, 40)
    count = min(count, pages * page // max(lanes, 1))
    shape = (rng.randrange(3), 2, pages, rng.randrange(3), page, rng.choice([0, 1, 6, 16]))
    cache = randn(rng, *shape).to(dtype)
    order = torch.randperm(pages * page, generator=torch.Generator().manual_seed(rng.randrange(2**30)))
    target = order[: lanes * count].view(lanes, count)
    source = target.gather(1, whole(rng, 0, max(1, count), lanes, count))
    nowhere = -rng.randint(1, 2**60)
    source = torch.where(some(rng, 0.2, lanes, count), nowhere, source)
    target = torch.where(some(rng, 0.2, lanes, count), nowhere, target)
    ours, by_reference = strided(rng, cache, changed=True), cache.clone()
    dx.kv_move(ours, strided(rng, source), strided(rng, target))
    reference.kv_move(by_reference, source, target)
    assert torch.equal(ours, by_reference)


def block_attention(rng: random.Random) -> None:
    dtype, heads, group = rng.choice(DTYPES), rng.randint(1, 3), rng.choice([0, 1, 2, 3, 8])
    dim, page = rng.choice([0, 1, 2, 7, 16, 40, 64]), rng.choice([1, 5, 16, 64])
    segments, pages = rng.randrange(4), rng.randrange(6)
    width = rng.randrange(4) if pages else 0
    queries, gaps = whole(rng, 0, 20, segments), whole(rng, 0, 3, segments)
    begin = (queries + gaps).cumsum(0) - queries
    count = int(begin[-1] + queries[-1]) + rng.randrange(3) if segments else rng.randrange(3)
    infinite = rng.random() < 0.2  # then the reference is NaN where the kernel need not be
    special = (math.nan, math.inf, -math.inf) if infinite else (math.nan, 300.0, -300.0)
    q = numbers(rng, dtype, count, group * heads, dim, special=special[1:])
    k, v = (numbers(rng, dtype, pages, heads, page, dim, special=special) for _ in "kv")
    given = {
        "kv_lens": whole(rng, 0, width * page + 1, segments),
        "block_table": whole(rng, 0, max(1, pages), segments, width),
        "q_start": begin,
        "q_end": begin + queries,
    }
    kind = rng.choice(["all", "causal", "ancestors"])
    if kind != "all":
        given["q_end"] = torch.minimum(given["q_end"], begin + given["kv_lens"])
    restriction = {"causal": kind == "causal"}
    if kind == "ancestors":
        given["ancestors"] = whole(rng, -(2**62), 2**62, count, rng.randint(1, 2))
    scale = rng.choice([None, 0.3, 0.0, 2.0])
    found = dx.block_attention(
        *(strided(rng, t) for t in (q, k, v)),
        **{n: strided(rng, t) for n, t in given.items()},
        scale=scale,
        **restriction,
    )
    assert found.shape == q.shape
    if infinite or not found.numel():
        return
    scale = dim**-0.5 if scale is None else scale
    expected = reference.block_attention(
        q.double(), k.double(), v.double(), **given, **restriction, scale=scale
    )
    largest = q.double().norm(dim=-1).max() * k.double().nan_to_num(0).norm(dim=-1).amax() if pages else 0.0
    values = float(v.double().nan_to_num(0).abs().max()) if v.numel() else 0.0
    assert near(found, expected, (STEP[dtype] + 4e-6 + 1e-6 * scale * float(largest)) * (values + 1e-6))


def rms_norm(rng: random.Random) -> None:
    dtype, width = rng.choice(DTYPES), rng.choice([1, 2, 7, 16, 31, 33, 64, 300])
    lead = rng.choice([(), (0,), (4,), (2, 3), (2, 0), (2, 1, 2)])
    special = (math.inf, -math.inf, math.nan)
    x, delta = (numbers(rng, dtype, *lead, width, special=special) for _ in "xd")
    weight, bias = (numbers(rng, dtype, width) for _ in "wb")
    given: dict[str, Any] = {"eps": rng.choice([1e-5, 1e-6, 1.0])}
    if rng.random() < 0.5:
        given["bias"] = bias
    if rng.random() < 0.5:
        given["delta"] = delta
    moved = {n: strided(rng, t) if isinstance(t, Tensor) else t for n, t in given.items()}
    found = dx.rms_norm(strided(rng, x), strided(rng, weight), **moved)
    expected = reference.rms_norm(x, weight, **given)
    for a, b in zip(inputs.flat(found), inputs.flat(expected), strict=True):
        size = (
            weight.double().abs() * math.sqrt(width)
            + bias.double().abs()
            + b.double().abs().nan_to_num(0, 0, 0)
        )
        assert a.is_contiguous()
        assert near(a, b, 4 * STEP[dtype] * size + 1e-7)


def swiglu(rng: random.Random) -> None:
    dtype, width = rng.choice(DTYPES), rng.choice([1, 2, 7, 16, 31, 33, 64, 300])
    lead = rng.choice([(), (0,), (4,), (2, 3), (2, 0), (2, 1, 2)])
    most = torch.finfo(dtype).max
    gate = numbers(
        rng, dtype, *lead, width, special=(math.inf, -math.inf, math.nan, most, -most, -87.0, -90.0)
    )
    up = numbers(rng, dtype, *lead, width, special=(math.inf, math.nan, most))
    if rng.random() < 0.3:
        found = dx.swiglu(strided(rng, torch.cat((gate, up), -1)))
    else:
        found = dx.swiglu(strided(rng, gate), strided(rng, up))
    expected = reference.swiglu(gate, up)
    # Below -87 the gate counts as closed, which `up` may still see where it is as large as can be.
    known = (gate.double() > -87) | (up.double().abs() < 1e6) | ~gate.isfinite()
    size = up.double().abs().nan_to_num(0, 0, 0) + expected.double().abs().nan_to_num(0, 0, 0)
    tiny = float(torch.finfo(dtype).smallest_normal)
    assert near(found[known], expected[known], (3 * STEP[dtype] * size + tiny * (1 + size))[known])


def linear(rng: random.Random) -> None:
    """The op: `dx.linear` on a CPU is torch's product."""
    dtype, width, out = rng.choice(DTYPES), rng.choice([1, 2, 15, 33, 64, 300]), rng.choice([0, 1, 3, 20])
    x = numbers(rng, dtype, rng.choice([0, 1, 4, 65]), width, special=(math.inf, -math.inf, math.nan))
    weight = numbers(rng, dtype, out, width, special=(1e-30, 30.0))
    bias = numbers(rng, dtype, out) if rng.random() < 0.5 else None
    given = strided(rng, x), strided(rng, weight), None if bias is None else strided(rng, bias)
    found = torch.ops.dparallel.linear(*given, rng.random() < 0.5)
    expected = reference.linear(x, weight, bias)
    sizes = x.double().abs().nan_to_num(0, 0, 0) @ weight.double().abs().T
    bound = (2 * STEP[dtype] + 4e-6) * (sizes + (0.0 if bias is None else bias.double().abs()))
    assert near(found, expected, bound + torch.finfo(dtype).smallest_normal)


def fp8_linear(rng: random.Random) -> None:
    dtype, width, out = rng.choice(DTYPES), rng.choice([1, 2, 15, 33, 64, 300]), rng.choice([0, 1, 3, 20])
    lead = rng.choice([(), (0,), (4,), (2, 3), (64,), (65,), (2, 0), (1, 70)])
    many = math.prod(lead) > 64  # then weights are rounded to the dtype, and infinity times 0 is NaN
    x = numbers(rng, dtype, *lead, width, special=() if many else (math.inf, -math.inf, math.nan))
    weight, scale = dx.quantize_fp8(numbers(rng, torch.float32, out, width, special=(1e-30, 30.0)))
    bias = numbers(rng, dtype, out) if rng.random() < 0.5 else None
    moved = (strided(rng, t) for t in (weight, scale))
    found = dx.fp8_linear(strided(rng, x), *moved, None if bias is None else strided(rng, bias))
    expected = reference.fp8_linear(x, weight, scale, bias)
    weights = weight.float().double().abs()
    sizes = x.double().abs().nan_to_num(0, 0, 0) @ (weights * scale.double()[:, None]).T
    bound = (2 * STEP[dtype] + 4e-6) * (sizes + (0.0 if bias is None else bias.double().abs()))
    # Where a CPU multiplies bfloat16, subnormal factors and sums count as 0.
    tiny = 1 + (scale * (weights.sum(1) + width) if dtype == torch.bfloat16 else 0.0)
    assert near(found, expected, bound + torch.finfo(dtype).smallest_normal * tiny)


def product(rng: random.Random, dtype: torch.dtype, rows: int, out: int) -> tuple[Tensor | None, ...]:
    """x, weight, scale and bias, strided."""
    width = rng.choice([1, 2, 15, 33, 64, 300])
    x = numbers(rng, dtype, rows, width, special=(math.inf, -math.inf, math.nan))
    weight, scale = numbers(rng, dtype, out, width, special=(1e-30, 30.0)), None
    if rng.random() < 0.5:
        weight, scale = dx.quantize_fp8(weight)
    bias = numbers(rng, dtype, out) if rng.random() < 0.5 else None
    return tuple(None if t is None else strided(rng, t) for t in (x, weight, scale, bias))


def of_product(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    ops = torch.ops.dparallel
    return ops.linear(x, weight, bias) if scale is None else ops.fp8_linear(x, weight, scale, bias)


def linear_swiglu(rng: random.Random) -> None:
    """On a CPU, to the bit: its steps."""
    given = product(rng, rng.choice(DTYPES), rng.choice([0, 1, 4, 65]), 2 * rng.choice([1, 3, 20]))
    found = torch.ops.dparallel.linear_swiglu(*given, rng.random() < 0.5)
    torch.testing.assert_close(found, dx.swiglu(of_product(*given)), rtol=0, atol=0, equal_nan=True)


def linear_kv_write(rng: random.Random) -> None:
    """On a CPU, to the bit: its steps."""
    dtype, rows, page = rng.choice(DTYPES), rng.choice([0, 1, 7, 40]), rng.choice([1, 5, 16])
    heads, group, dim = rng.randint(1, 3), rng.randint(1, 3), rng.choice([2, 6, 16, 64])
    given = product(rng, dtype, rows, (group + 2) * heads * dim)
    pages = -(-rows // page) + rng.randint(1, 3)
    slots = torch.randperm(pages * page, generator=torch.Generator().manual_seed(rng.randrange(2**30)))[:rows]
    where = {
        "positions": whole(rng, 0, 30, rows),
        "slot_mapping": torch.where(some(rng, 0.2, rows), -1, slots),
    }
    where |= dict(zip(("cos", "sin"), dx.rope_table(30, 2 * rng.randint(1, dim // 2)), strict=True))
    made = [numbers(rng, dtype, pages, heads, page, dim) for _ in "kv"]
    ours, by_reference = [strided(rng, t, changed=True) for t in made], [t.clone() for t in made]
    norms: dict[str, Any] = {"q_norm": None, "k_norm": None, "eps": 1e-5}
    if rng.random() < 0.5:
        norms |= {name: numbers(rng, dtype, dim) for name in ("q_norm", "k_norm")}
    where |= norms
    found = torch.ops.dparallel.linear_kv_write(*given, *ours, *where.values(), rng.random() < 0.5)
    q, k, v = of_product(*given).unflatten(1, (-1, dim)).split((group * heads, heads, heads), 1)
    dx.kv_write(q, k, v, *by_reference, **where)
    for a, b in zip((found, *ours), (q, *by_reference), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
