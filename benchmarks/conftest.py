"""Fixtures of every benchmark: facts of the machine, and its memory speed, from which floors follow."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

import dparallel_ext as dx


@pytest.hookimpl(optionalhook=True)  # without pytest-benchmark a line names the fixture that is missing
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["threads"] = torch.get_num_threads()
    machine_info["torch"] = torch.__version__
    machine_info["simd"] = dx.simd_level()


@pytest.fixture(scope="session")
def read_bandwidth() -> float:
    """The bytes a second at which torch sums 512 MB, the best of ten."""
    data = torch.ones(2**27)
    best = float("inf")
    for _ in range(10):
        began = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - began)
    return data.numel() * data.element_size() / best
