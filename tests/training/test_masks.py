"""The training states: one random block per row, and its complement."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import dparallel_ext as dx

MASK = 99


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(
    batch=st.integers(0, 5),
    length=st.integers(0, 40),
    block_length=st.sampled_from([1, 3, 8, 32, None]),
    ratio=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    padded=st.booleans(),
    aligned=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_every_row_is_as_the_definition_says(
    batch, length, block_length, ratio, padded, aligned, seed
) -> None:
    ids = torch.randint(0, 90, (batch, length), generator=drawn(seed))
    prompts = torch.randint(0, length + 1, (batch,), generator=drawn(seed + 1))
    ends = torch.randint(0, length + 1, (batch,), generator=drawn(seed + 2)) if padded else None
    pair = dx.semi_autoregressive_masks(
        ids, prompts, mask_id=MASK, block_length=block_length, aligned=aligned, mask_ratio=ratio,
        lengths=ends, generator=drawn(seed),
    )  # fmt: skip
    for b in range(batch):
        start, end = int(prompts[b]), length if ends is None else int(ends[b])
        size = block_length or max(1, length)
        origin = start // size * size if aligned else start
        number = -(-(end - origin) // size) if start < end else 0
        block = int(pair.block[b])
        assert (0 <= block < number) if number else block == -1
        for t in range(length):
            where = (t - origin) // size if start <= t < end else -1
            here = number > 0 and where == block
            later = number > 0 and where > block
            assert bool(pair.active[b, t]) + bool(pair.reverse_active[b, t]) == here
            for given_ids, active in (
                (pair.input_ids, pair.active),
                (pair.reverse_input_ids, pair.reverse_active),
            ):
                masked = later or bool(active[b, t])
                assert int(given_ids[b, t]) == (MASK if masked else int(ids[b, t]))


def shares(ratio: float | Tensor, eps: float = 1e-3) -> Tensor:
    ids = torch.zeros(400, 64, dtype=torch.int64)
    prompts = torch.full((400,), 16)
    pair = dx.semi_autoregressive_masks(
        ids, prompts, mask_id=MASK, block_length=16, mask_ratio=ratio, eps=eps, generator=drawn(7)
    )
    assert torch.bincount(pair.block, minlength=3).min() > 100  # of 133 expected
    return pair.active.sum(1) / 16


def test_blocks_and_ratios_have_their_laws() -> None:
    assert float(shares(0.5).mean()) == pytest.approx(0.5005, abs=0.02)  # 6400 tokens: deviation 0.006
    assert float(shares(0.25).std()) > 0.05  # every row draws its own
    assert float(shares(1.0).min()) == 1.0
    assert float(shares(0.0, eps=0.0).max()) == 0.0
    assert float(shares(0.0, eps=1.0).min()) == 1.0
    each = shares(torch.linspace(0, 1, 400))
    assert float(each[:100].mean()) == pytest.approx(0.125, abs=0.04)
    assert float(each[300:].mean()) == pytest.approx(0.875, abs=0.04)


def test_seeded() -> None:
    ids, prompts = torch.randint(0, 90, (6, 50)), torch.full((6,), 5)
    one, two, other = (
        dx.semi_autoregressive_masks(ids, prompts, mask_id=MASK, generator=drawn(s)) for s in (1, 1, 2)
    )
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one.active, other.active)


def test_the_input_is_left_alone() -> None:
    ids = torch.randint(0, 90, (2, 30))
    before = ids.clone()
    dx.semi_autoregressive_masks(ids, torch.tensor([0, 30]), mask_id=MASK)
    assert torch.equal(ids, before)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"input_ids": torch.zeros(3, dtype=torch.int64)}, "input_ids: expected int64"),
        ({"input_ids": torch.zeros(2, 9)}, "input_ids: expected int64"),
        ({"prompt_lengths": torch.tensor([1])}, r"prompt_lengths: expected int64 \(2,\)"),
        ({"prompt_lengths": torch.tensor([1, 10])}, r"prompt_lengths: expected lengths in \[0, 9\]"),
        ({"prompt_lengths": [1, 2]}, "prompt_lengths: expected int64"),
        ({"lengths": torch.tensor([-1, 2])}, "lengths: expected lengths"),
        ({"block_length": 0}, "block_length: expected"),
        ({"block_length": 2.5}, "block_length: expected a whole number >= 1, got 2.5"),
        ({"block_length": True}, "block_length: expected"),
        ({"aligned": 1}, "aligned: expected"),
        ({"mask_id": -1}, "mask_id: expected a whole number >= 0, got -1"),
        ({"mask_id": None}, "mask_id: expected"),
        ({"prompt_lengths": torch.tensor([True, False])}, r"prompt_lengths: expected int64 \(2,\)"),
        ({"mask_ratio": 1.5}, "mask_ratio: expected"),
        ({"mask_ratio": torch.ones(3)}, "mask_ratio: expected"),
        ({"eps": -1.0}, "eps: expected"),
        ({"eps": 1.5}, "eps: expected a number from 0 to 1, got 1.5"),
        ({"generator": 3}, "generator: expected Generator, got int"),
        ({"generator": [drawn(0), None]}, "generator: expected Generator, got NoneType"),
    ],
)
def test_bad_arguments_are_named(change: dict, said: str) -> None:
    good = {"input_ids": torch.zeros(2, 9, dtype=torch.int64), "prompt_lengths": torch.tensor([2, 3])}
    with pytest.raises(ValueError, match=said):
        dx.semi_autoregressive_masks(**{**good, "mask_id": MASK, **change})


def test_a_row_with_its_own_generator_does_not_depend_on_its_batch() -> None:
    ids = torch.randint(0, 90, (5, 40), generator=drawn(0))
    prompts, ends = torch.tensor([3, 0, 8, 5, 1]), torch.tensor([40, 33, 20, 40, 12])
    whole = dx.semi_autoregressive_masks(
        ids, prompts, mask_id=MASK, block_length=8, lengths=ends, generator=[drawn(10 + b) for b in range(5)]
    )
    for b in range(5):
        for width in (int(ends[b]), 40):
            alone = dx.semi_autoregressive_masks(
                ids[b : b + 1, :width], prompts[b : b + 1], mask_id=MASK, block_length=8,
                lengths=ends[b : b + 1], generator=[drawn(10 + b)],
            )  # fmt: skip
            for one, all_ in zip(alone, whole, strict=True):
                expected = all_[b : b + 1] if all_.ndim == 1 else all_[b : b + 1, :width]
                assert torch.equal(one, expected)
    with pytest.raises(ValueError, match="generator: expected one, or one for each of 5 rows, got 2"):
        dx.semi_autoregressive_masks(ids, prompts, mask_id=MASK, generator=[drawn(0), drawn(1)])
