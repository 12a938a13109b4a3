"""Every op on random shapes, dtypes, strides, instruction sets and numbers, against its float64 reference."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import LEVELS, Attack, assert_stats_close
from forms import a_form
from fuzzed_layers import (
    block_attention,
    fp8_linear,
    kv_move,
    kv_write,
    linear,
    linear_kv_write,
    linear_swiglu,
    rms_norm,
    swiglu,
)
from fuzzing import DTYPES, STEP, VOCABULARIES, near, numbers, policy_rows, some, strided, whole
from ops.test_accept import forest
from ops.test_distillation_loss import compare
from ops.test_unmask import windows_of
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext import ops, policies, reference


@pytest.fixture(autouse=True)
def _level() -> Iterator[None]:
    before = dx.simd_level()
    yield
    dx._C.use_simd_level(before)


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
