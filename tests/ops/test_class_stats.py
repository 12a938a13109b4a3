"""class_stats against its oracle, and its parts merged against the statistics among their ids."""

from __future__ import annotations

import math
import random

import pytest
import torch
from conftest import assert_stats_close, every_level, everywhere
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext import reference
from dparallel_ext.ops.class_stats import class_stats
from dparallel_ext.ops.row_stats import merge_parts
from dparallel_ext.types import NO_ERROR

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def some_classes(seed: int, vocab: int, classes: int) -> tuple[Tensor, Tensor]:
    """Ids and offsets; some ids in no class, some classes of one id or none, most ids in one."""
    rng = random.Random(seed)
    of_ids = [rng.choice([0, 0, 0, rng.randrange(classes + 1)]) for _ in range(vocab)]
    ids = [[id for id in range(vocab) if of_ids[id] == each] for each in range(classes)]
    ends = torch.tensor([0, *map(len, ids)]).cumsum(0)
    return torch.tensor([id for each in ids for id in each], dtype=torch.int32), ends


def check(logits: Tensor, ids: Tensor, offsets: Tensor) -> None:
    found, expected = class_stats(logits, ids, offsets), reference.class_stats(logits, ids, offsets)
    for name, a, b in zip(found._fields, found, expected, strict=True):
        assert_stats_close(a, b, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("vocab", "classes"), [(1, 1), (40, 3), (3000, 9), (5000, 20)])
@every_level
def test_class_stats_against_the_oracle(dtype: torch.dtype, vocab: int, classes: int) -> None:
    logits = (torch.randn(3, vocab) * 4).to(dtype)
    ids, offsets = some_classes(vocab, vocab, classes)
    check(logits, ids, offsets)
    logits[0, ids[: len(ids) // 2].long()] = -math.inf
    logits[1, ids[-1:].long()] = math.inf
    logits[2] = torch.finfo(dtype).min
    check(logits, ids, offsets)


@every_level
def test_classes_with_nan_and_without_a_token() -> None:
    logits = torch.randn(2, 60)
    ids = torch.arange(60, dtype=torch.int32)
    offsets = torch.tensor([0, 20, 20, 21, 60])
    logits[0, 5], logits[1, 20] = math.nan, -math.inf
    check(logits, ids, offsets)
    found = class_stats(logits, ids, offsets)
    assert found.token[0, :2].tolist() == [-1, -1]
    assert found.top1[:, 1].tolist() == [-math.inf] * 2
    assert int(found.token[1, 2]) == -1


@everywhere
def test_ids_that_the_logits_do_not_have_count_nothing() -> None:
    ids = torch.tensor([1, 3, 7, -1, 10**6, 2], dtype=torch.int32)
    check(torch.randn(3, 5), ids, torch.tensor([0, 3, 5, 6]))


@pytest.mark.parametrize("shape", [(0, 9), (2, 9)])
@everywhere
def test_sizes_of_zero(shape: tuple[int, int]) -> None:
    none = torch.empty(0, dtype=torch.int32)
    assert class_stats(torch.randn(shape), none, torch.zeros(1, dtype=torch.int64)).token.shape == (
        shape[0],
        0,
    )
    check(torch.randn(shape), none, torch.zeros(3, dtype=torch.int64))


@everywhere
def test_a_row_is_as_alone() -> None:
    logits = torch.randn(9, 4000)
    ids, offsets = some_classes(1, 4000, 7)
    whole = class_stats(logits, ids, offsets)
    for row in range(9):
        alone = class_stats(logits[row : row + 1], ids, offsets)
        assert all(torch.equal(a[row], b[0]) for a, b in zip(whole[:-1], alone[:-1], strict=True))


@pytest.mark.parametrize("vocab", [40, 3000])
@every_level
def test_merged_parts_are_the_statistics_among_their_ids(vocab: int) -> None:
    logits, classes = torch.randn(4, vocab) * 3, 6
    ids, offsets = some_classes(vocab + 1, vocab, classes)
    parts = class_stats(logits, ids, offsets)
    for seed in range(4):
        among = torch.rand(4, classes, generator=torch.Generator().manual_seed(seed)) < 0.6
        allowed = torch.zeros(4, vocab, dtype=torch.bool)
        for k in range(classes):
            allowed[:, ids[offsets[k] : offsets[k + 1]].long()] |= among[:, k : k + 1]
        merged, error = merge_parts(parts, among)
        expected = dx.row_stats(logits.masked_fill(~allowed, -math.inf), check=False)
        some = allowed.any(1)
        for name, a, b in zip(merged._fields[:-1], merged[:-1], expected[:-1], strict=True):
            assert_stats_close(a[some], b[some], name)
        assert bool((merged.token[~some] == -1).all())
        assert torch.equal(error, torch.where(some, NO_ERROR, 4 * torch.arange(4) + 2))


@everywhere
def test_opcheck() -> None:
    args = (torch.randn(3, 40), *some_classes(3, 40, 4))
    torch.library.opcheck(torch.ops.dparallel.class_stats.default, args)


def test_refused() -> None:
    logits, ids, offsets = torch.randn(3, 9), torch.arange(9, dtype=torch.int32), torch.tensor([0, 4, 9])
    with pytest.raises(ValueError, match="ids: expected int32"):
        class_stats(logits, ids.long(), offsets)
    with pytest.raises(ValueError, match="offsets: expected int64"):
        class_stats(logits, ids, offsets.int())
    with pytest.raises(ValueError, match="offsets: expected at least 1 number, got 0"):
        class_stats(logits, ids, offsets[:0])
