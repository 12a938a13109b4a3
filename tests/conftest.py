"""Shared by the tests: comparison with the float64 oracle, and deterministic hypothesis runs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from torch import Tensor

settings.register_profile("ci", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("ci")


def assert_stats_close(actual: Tensor, expected: Tensor, name: str) -> None:
    """The bound of DESIGN.md: |d| <= 2e-6 + 1e-6 |x|, infinities equal, ids exact."""
    assert actual.shape == expected.shape, f"{name}: {actual.shape} != {expected.shape}"
    assert actual.dtype == expected.dtype, f"{name}: {actual.dtype} != {expected.dtype}"
    if actual.dtype == torch.int64:
        assert torch.equal(actual, expected), f"{name}: {actual} != {expected}"
        return
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    gap = (actual.double() - expected.double()).abs()
    close = same | (gap <= 2e-6 + 1e-6 * expected.double().abs())
    assert bool(close.all()), f"{name}: {actual[~close]} != {expected[~close]}"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
