"""Every op on random shapes, dtypes, strides, instruction sets and numbers, against its float64 reference."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import LEVELS, Attack, assert_stats_close, layouts
from forms import a_form
from ops import op_examples as inputs
from ops.test_accept import forest
from ops.test_distillation_loss import compare
from ops.test_unmask import windows_of
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext import ops, policies, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STEP = {torch.float32: 2**-23, torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float64: 2**-52}
VOCABULARIES = (1, 2, 3, 5, 15, 16, 17, 31, 33, 64, 247, 1000, 2047, 2049, 4100)


@pytest.fixture(autouse=True)
def _level() -> Iterator[None]:
    before = dx.simd_level()
    yield
    dx._C.use_simd_level(before)


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


def row_stats(rng: random.Random) -> None:
    dtype, vocab = rng.choice(DTYPES), rng.choice(VOCABULARIES)
    low, high = torch.finfo(dtype).min, torch.finfo(dtype).max
    lead = rng.choice([(), (0,), (3,), (2, 3), (2, 0), (2, 1, 2)])
    logits = numbers(rng, dtype, *lead, vocab, special=(math.inf, -math.inf, low, high, 60000.0, math.nan))
    settings: dict[str, Any] = {}
    count = math.prod(lead)
    if rng.random() < 0.4:
        settings["rows"] = strided(rng, whole(rng, 0, max(1, count), rng.randrange(4) if count else 0))
    if rng.random() < 0.5:
        settings["mask_id"] = rng.randrange(vocab)
    if rng.random() < 0.5:
        settings["suppress"] = strided(rng, whole(rng, 0, vocab, rng.randrange(4)))
    if rng.random() < 0.5:
        shape = settings["rows"].shape if "rows" in settings else lead
        own = shape if rng.random() < 0.5 else ()
        settings["ids"] = strided(rng, whole(rng, 0, vocab, *own, rng.randrange(4)))
    try:
        expected = reference.row_stats(logits, **settings)
    except ValueError:
        with pytest.raises(ValueError, match=r"logits: row \d+ (holds NaN|leaves no token)"):
            dx.row_stats(strided(rng, logits), **settings)
        return
    except IndexError:  # the reference's topk and argmax do not take no rows
        assert not count or not len(settings["rows"])
        return
    found = dx.row_stats(strided(rng, logits), **settings)
    for name, a, b in zip(found._fields, found, expected, strict=True):
        assert_stats_close(a, b, name)


def row_topk(rng: random.Random) -> None:
    dtype, vocab, k = rng.choice(DTYPES), rng.choice(VOCABULARIES), rng.randint(1, 16)
    lead = rng.choice([(), (3,), (2, 3), (2, 1, 2)])
    low, high = torch.finfo(dtype).min, torch.finfo(dtype).max
    logits = numbers(rng, dtype, *lead, vocab, special=(math.inf, -math.inf, low, high, 60000.0, math.nan))
    logits = logits.round() if rng.random() < 0.3 else logits
    settings: dict[str, Any] = {}
    if rng.random() < 0.4:
        settings["rows"] = strided(rng, whole(rng, 0, math.prod(lead), 1 + rng.randrange(4)))
    if rng.random() < 0.5:
        settings["mask_id"] = rng.randrange(vocab)
    if rng.random() < 0.5:
        settings["suppress"] = strided(rng, whole(rng, 0, vocab, rng.randrange(4)))
    try:
        expected = reference.row_topk(logits, k, **settings)
    except ValueError:
        with pytest.raises(ValueError, match=r"logits: row \d+ (holds NaN|leaves no token)"):
            dx.row_topk(strided(rng, logits), k, **settings)
        return
    found = dx.row_topk(strided(rng, logits), k, **settings)
    for name, a, b in zip(found._fields, found, expected, strict=True):
        assert_stats_close(a, b, name)


def scores(rng: random.Random, *shape: int) -> Tensor:
    """Multiples of 1/64, whose sums are exact, and infinities."""
    t = whole(rng, 0, rng.choice([2, 65, 400]), *shape) / 64
    return torch.where(some(rng, rng.choice([0.0, 0.1]), *shape), math.inf, t)


def select(rng: random.Random) -> None:
    batch, length = rng.randrange(4), rng.choice([0, 1, 2, 31, 300])
    shape = (batch, length)
    stats = dx.RowStats(*[torch.empty(shape)] * 9)._replace(
        confidence=scores(rng, *shape), margin=scores(rng, *shape) - 1, entropy=scores(rng, *shape)
    )
    eligible, policy = some(rng, rng.choice([0.0, 0.5, 1.0]), *shape), policy_rows(rng, batch, length)
    expected = reference.select(stats.confidence, stats.margin, stats.entropy, eligible, policy)
    given = stats._replace(
        **{n: strided(rng, getattr(stats, n)) for n in ("confidence", "margin", "entropy")}
    )
    assert torch.equal(dx.select(given, strided(rng, eligible), strided(rng, policy)), expected)


def unmask_(rng: random.Random) -> None:
    dtype, vocab = rng.choice(DTYPES), rng.choice(VOCABULARIES[1:])
    batch, length, mask = rng.randrange(4), rng.choice([0, 1, 3, 20]), rng.randrange(vocab + 2)
    special = (math.inf, -math.inf, torch.finfo(dtype).max)
    logits = numbers(rng, dtype, batch, length, vocab, special=special)
    tokens = torch.where(some(rng, 0.6, batch, length), mask, whole(rng, 0, vocab, batch, length))
    settings: dict[str, Any] = {}
    if rng.random() < 0.5:
        lane, start, end = windows_of(rng, batch, length)
        settings["lane"] = strided(rng, lane)
    else:
        lane = torch.arange(batch)
        start, end = whole(rng, -2, length + 2, batch), whole(rng, -2, length + 9, batch)
    policy = policy_rows(rng, len(lane), length)
    column = torch.arange(length)
    open_ = (column >= start[:, None]) & (column < end[:, None]) & (tokens[lane] == mask)  # (W, L)
    masked = torch.zeros_like(tokens, dtype=torch.bool).index_put((lane,), open_, accumulate=True)
    settings |= {"start": strided(rng, start), "end": strided(rng, end)}
    at = (masked | some(rng, 0.5, batch, length)).flatten().nonzero()[:, 0]
    packed, given = rng.random() < 0.5, logits
    if packed:
        settings["positions"], given = strided(rng, at), logits.flatten(0, 1)[at]
    needed = masked.flatten().nonzero()[:, 0]
    keeps = {"mask_id": mask} if mask < vocab else {}
    try:
        expected = reference.row_stats(logits[masked], **keeps) if len(needed) else None
    except ValueError:
        return  # a row of one token, the mask
    ours = strided(rng, tokens, changed=True)
    out = dx.unmask_(ours, strided(rng, given), mask_id=mask, policy=strided(rng, policy), **settings)
    rows = torch.searchsorted(at, needed) if packed else needed
    found = out.stats.map(lambda x: x.flatten()[rows])
    for name, a in zip(found._fields, found, strict=True):
        if expected is not None and a is not None:
            assert_stats_close(a, getattr(expected, name), name)

    def spread(x: Tensor) -> Tensor:
        return torch.zeros(batch, length, dtype=x.dtype).masked_scatter(masked, x)

    commit = reference.select(
        *(spread(getattr(found, n))[lane] for n in ("confidence", "margin", "entropy")), open_, policy
    )
    by_sum = policy[:, 0] == policies.SELECTORS["entropy_bound"]  # whose order the rounding sees
    changed = ours != tokens
    of_window = changed[lane] & open_
    assert not bool((changed & ~masked).any())
    assert torch.equal(out.committed, of_window.sum(1))
    assert torch.equal(out.remaining, (open_ & ~of_window).sum(1))
    assert torch.equal(of_window[~by_sum], commit[~by_sum])
    assert torch.equal(ours[changed], spread(found.sample)[changed])
    assert bool((out.committed >= open_.sum(1).clamp(max=1))[policy[:, 2] > 0].all())


def commit_(rng: random.Random) -> None:
    batch, length, mask = rng.randrange(4), rng.choice([0, 1, 3, 20, 700]), rng.randrange(5)
    tokens = whole(rng, 0, 5, batch, length)
    lanes = rng.random() < 0.5 and batch > 0
    windows = rng.randrange(9) if lanes else batch
    settings: dict[str, Any] = {"mask_id": mask}
    if lanes:
        settings["lane"] = strided(rng, whole(rng, 0, batch, windows))
    if rng.random() < 0.8:
        edges = [whole(rng, -2, length + 2, windows), whole(rng, -2, length + 9, windows)]
        edges[1][some(rng, 0.1, windows)] = rng.choice([2**63 - 1, -(2**63)])
        settings |= {"start": strided(rng, edges[0]), "end": strided(rng, edges[1])}
    rows: list[Tensor | None] = [None, None, None]
    if rng.random() < 0.8:
        at = some(rng, 0.5, batch * length).nonzero()[:, 0] if rng.random() < 0.5 else None
        shape = (batch, length) if at is None else at.shape
        token = whole(rng, -1, 6, *shape)
        commit = some(rng, 0.4, *shape) & (token >= 0) & (token != mask)
        rows = [None if at is None else strided(rng, at), strided(rng, commit), strided(rng, token)]
    ours, plain = strided(rng, tokens, changed=True), tokens.clone()
    found, expected = dx.commit_(ours, *rows, **settings), reference.commit_(plain, *rows, **settings)
    assert torch.equal(ours, plain)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def accept(rng: random.Random) -> None:
    dtype, vocab = rng.choice(DTYPES), rng.choice(VOCABULARIES)
    lanes, most = rng.randrange(5), rng.choice([1, 3, 20])
    rows = lanes * most
    special = (math.inf, -math.inf, torch.finfo(dtype).max, math.nan)
    logits = numbers(rng, dtype, rows, vocab, special=special)
    settings: dict[str, Any] = {"max_q_len": rng.choice([None, most])}
    if rng.random() < 0.5:
        settings["mask_id"] = rng.randrange(vocab)
    if rng.random() < 0.5:
        settings["suppress"] = strided(rng, whole(rng, 0, vocab, rng.randrange(3)))
    if rng.random() < 0.5:
        settings["room"] = strided(rng, whole(rng, 0, most + 2, lanes))
    if rng.random() < 0.5:
        settings["eos_ids"] = strided(rng, whole(rng, -1, vocab, lanes, rng.randrange(3)))
    trees = forest(rng, dx.row_stats(logits, check=False).token, lanes, most)
    found = dx.accept(strided(rng, logits), *(strided(rng, t) for t in trees), check=False, **settings)
    expected = reference.accept(logits, *trees, **settings)
    for name in ("count", "path", "tokens", "ended", "error"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    read = expected.stats.token >= 0
    for name, a, b in zip(found.stats._fields, found.stats, expected.stats, strict=True):
        if a is not None and b is not None:
            assert_stats_close(a[read], b[read], name)


def certainty_forcing_loss(rng: random.Random) -> None:
    dtype, vocab = rng.choice((*DTYPES, torch.float64)), rng.choice(VOCABULARIES)
    lead = rng.choice([(), (0,), (4,), (2, 3), (2, 0), (2, 1, 2)])
    most = min(1e30, torch.finfo(dtype).max)
    logits = numbers(rng, dtype, *lead, vocab, special=(math.inf, -math.inf, most, -most))
    labels, active = whole(rng, 0, vocab, *lead), some(rng, rng.choice([0.0, 0.6, 1.0]), *lead)
    if lead and dtype != torch.float64:
        own = logits.gather(-1, labels[..., None])
        logits.scatter_(-1, labels[..., None], own.clamp(-50, 50))  # else its loss is infinite
    else:
        logits = logits.clamp(-50, 50)
    settings: dict[str, Any] = {
        "temperature": rng.choice([0.5, 1.0, 0.3, 2.0]),
        "ce_temperature": rng.choice([1.0, 2.0, 0.7]),
        "gate": rng.choice(["correct", "all"]),
        "reduction": "sum",
    }
    leaf = strided(rng, logits).detach().requires_grad_()
    theirs = logits.double().requires_grad_()
    ours = dx.certainty_forcing_loss(
        leaf * 1, strided(rng, labels), strided(rng, active), inplace=rng.random() < 0.5, **settings
    )
    by_reference = reference.certainty_forcing_loss(theirs, labels, active, **settings)
    assert torch.equal(ours.correct, by_reference.correct)
    for a, b in ((ours.nll, by_reference.nll), (ours.entropy, by_reference.entropy)):
        assert near(a, b.float() if dtype != torch.float64 else b, 2e-6 + 2e-6 * b.abs())
    (grad,) = torch.autograd.grad(ours.loss, leaf)
    (expected,) = torch.autograd.grad(by_reference.loss, theirs)
    assert grad.shape == leaf.shape
    if bool(logits.isfinite().all()):  # the reference has no gradient at an infinity
        assert near(grad, expected, 2e-6 + 4 * STEP[dtype] * expected.abs())
    assert not bool(grad.isnan().any())


def distillation_loss(rng: random.Random) -> None:
    dtype, vocab = rng.choice((*DTYPES, torch.float64)), rng.choice(VOCABULARIES)
    lead = rng.choice([(), (0,), (4,), (2, 3), (2, 0), (2, 1, 2)])
    least = max(torch.finfo(torch.float32).min, torch.finfo(dtype).min)
    special = (math.inf, -math.inf, least, 1e4, -1e4)
    student, teacher = (numbers(rng, dtype, *lead, vocab, special=special) for _ in range(2))
    if rng.random() < 0.3:
        teacher = student + numbers(rng, dtype, *lead, vocab) / 8
    student[some(rng, rng.choice([0.0, 0.0, 0.3]), *lead, vocab)] = rng.choice([-math.inf, least])
    # An id that the student gives nothing is one that the teacher gives nothing; one has something.
    top, at = student.max(-1, keepdim=True)
    student.scatter_(-1, at, top.clamp(min=-50))
    wide = student.double().clamp(max=torch.finfo(torch.float32).max)
    teacher.masked_fill_(wide < wide.amax(-1, keepdim=True) - 1e29, -math.inf)
    teacher.scatter_(-1, at, teacher.gather(-1, at).nan_to_num(0.0).clamp(-50, 50))
    weight = torch.rand(lead, generator=torch.Generator().manual_seed(rng.randrange(2**40)))
    weight = weight * some(rng, 0.7, *lead)
    compare(
        strided(rng, student),
        strided(rng, teacher),
        weight=strided(rng, weight) if lead and rng.random() < 0.5 else None,
        temperature=rng.choice([1.0, 1.0, 0.3, 2.0]),
        kl_weight=rng.choice([1.0, 0.5, 0.0]),
        l1_weight=rng.choice([0.0, 0.0, 1.0]),
    )


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
    sizes = x.double().abs().nan_to_num(0, 0, 0) @ (weight.float().double().abs() * scale.double()[:, None]).T
    bound = (2 * STEP[dtype] + 4e-6) * (sizes + (0.0 if bias is None else bias.double().abs()))
    assert near(found, expected, bound + torch.finfo(dtype).smallest_normal)


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
    found = torch.ops.dparallel.linear_kv_write(*given, *ours, *where.values(), rng.random() < 0.5)
    q, k, v = of_product(*given).unflatten(1, (-1, dim)).split((group * heads, heads, heads), 1)
    dx.kv_write(q, k, v, *by_reference, **where)
    for a, b in zip((found, *ours), (q, *by_reference), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def class_stats(rng: random.Random) -> None:
    dtype, vocab, classes = rng.choice(DTYPES), rng.choice(VOCABULARIES), rng.randrange(9)
    low, high = torch.finfo(dtype).min, torch.finfo(dtype).max
    special = (math.inf, -math.inf, low, high, 60000.0, math.nan)
    logits = numbers(rng, dtype, rng.randrange(4), vocab, special=special)
    ids = [token for token in range(-2, vocab + 2) if rng.random() < 0.8] if classes else []
    ends = sorted(rng.randint(0, len(ids)) for _ in range(classes))
    given = (
        strided(rng, logits),
        strided(rng, torch.tensor(ids, dtype=torch.int32)),
        strided(rng, torch.tensor([0, *ends])),
    )
    found, expected = ops.class_stats.class_stats(*given), reference.class_stats(*given)
    for name, a, b in zip(found._fields, found, expected, strict=True):
        assert_stats_close(a, b, name)


def best_path(rng: random.Random) -> None:
    tables = a_form(rng.randrange(10**6)).tables(torch.device("cpu"))
    windows, cells, classes = rng.randrange(4), rng.randrange(20), len(tables.offsets) - 1
    scores = -whole(rng, 0, 4, windows, cells, classes).float()  # whole numbers, with ties
    scores[some(rng, 0.2, windows, cells, classes)] = rng.choice([-math.inf, math.nan])
    begin, end, room = (whole(rng, 0, cells + 1, windows) for _ in range(3))
    where = (begin, end, whole(rng, 0, len(tables.distance), windows), room)
    given = [strided(rng, t) for t in (scores, *where)]
    found, expected = ops.best_path.best_path(*given, tables), reference.best_path(scores, *where, tables)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


CASES: list[Callable[[random.Random], None]] = [
    row_stats, row_topk, select, unmask_, commit_, accept, certainty_forcing_loss, distillation_loss,
    kv_write, kv_move, block_attention, rms_norm, swiglu, linear, fp8_linear,
    linear_swiglu, linear_kv_write, class_stats, best_path,
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_ops_equal_their_references(case: Callable[[random.Random], None], attack: Attack) -> None:
    for rng in attack.cases(25):
        dx._C.use_simd_level(rng.choice(LEVELS))
        case(rng)
