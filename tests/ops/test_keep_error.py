"""keep_error_: a word keeps the least error of the first launch that has one."""

from __future__ import annotations

import pytest
import torch
from conftest import everywhere, layouts

from dparallel_ext.ops.keep_error import keep_error_
from dparallel_ext.types import NO_ERROR


def errors_of(count: int, at: dict[int, int]) -> torch.Tensor:
    error = torch.full((count,), NO_ERROR)
    for place, code in at.items():
        error[place] = code
    return error


@pytest.mark.parametrize("count", [1, 2, 31, 64, 511, 512, 513, 5000])
@everywhere
def test_the_first_launch_with_an_error_counts(count: int) -> None:
    word = torch.full((3,), NO_ERROR)
    generator = torch.Generator("cpu").manual_seed(count)
    bad = torch.randperm(count, generator=generator)[: 1 + count // 100].tolist()
    keep_error_(word[1], errors_of(count, {}))
    assert word.tolist() == [NO_ERROR] * 3
    keep_error_(word[1], errors_of(count, {place: 4 * place + 2**40 + 1 for place in bad}))
    kept = 4 * min(bad) + 2**40 + 1
    assert word.tolist() == [NO_ERROR, kept, NO_ERROR]
    keep_error_(word[1], errors_of(count, {count - 1: 5}))  # less, but later
    assert word.tolist() == [NO_ERROR, kept, NO_ERROR]


@everywhere
def test_strides_and_sizes_of_zero() -> None:
    for error in layouts(errors_of(6, {0: 9, 3: 9})):
        word = torch.full((1,), NO_ERROR)
        keep_error_(word, error)
        assert word.tolist() == [9 if error.numel() else NO_ERROR]
    word = torch.full((), NO_ERROR)
    keep_error_(word, errors_of(0, {}))
    assert int(word) == NO_ERROR


@everywhere
def test_opcheck() -> None:
    torch.library.opcheck(
        torch.ops.dparallel.keep_error_, (torch.full((1,), NO_ERROR), errors_of(40, {7: 29}))
    )


def test_refused() -> None:
    with pytest.raises(ValueError, match=r"word: expected one int64, got int64 \(2,\)"):
        keep_error_(torch.zeros(2, dtype=torch.int64), errors_of(3, {}))
    with pytest.raises(ValueError, match="word: expected one int64"):
        keep_error_(torch.zeros(1), errors_of(3, {}))
    with pytest.raises(ValueError, match="error: expected 1 dimension, got 2"):
        keep_error_(torch.zeros(1, dtype=torch.int64), errors_of(3, {})[None])
    with pytest.raises(ValueError, match="error: expected int64"):
        keep_error_(torch.zeros(1, dtype=torch.int64), torch.zeros(3))
