"""Decoding the model that ships, batch 1: the published loop in plain torch, and ours.

The same weights and threshold; tokens are compared in float32. Floor: none is claimed, since the matrix
products are torch's.
"""

from __future__ import annotations

import copy
import functools
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from dparallel import registry
from dparallel.toy import tasks
from torch import Tensor

import dparallel_ext as dx

from . import baselines

PROBLEMS = 20


@pytest.fixture(scope="module")
def model() -> Any:
    return registry.load()[0]


@pytest.fixture(scope="module")
def prompts() -> list[Tensor]:
    tokenizer = registry.load()[1]
    problems = itertools.islice(tasks.problems("held_out", seed=2), PROBLEMS)
    return [torch.tensor([tokenizer.encode(p.prompt).ids]) for p in problems]


def ours(cache: str) -> Callable[..., Any]:
    def run(model: Any, prompt: Tensor) -> Tensor:
        return dx.decode(
            model, prompt, gen_length=tasks.GEN_LENGTH, block_length=32, threshold=0.5, cache=cache
        ).sequences

    return run


def published(cache: str) -> Callable[..., Any]:
    commit = functools.partial(baselines.published, threshold=0.5)

    def run(model: Any, prompt: Tensor) -> Tensor:
        return baselines.published_decode(
            baselines.Plain(model), prompt, model.mask_id, tasks.GEN_LENGTH, 32, commit, cache
        )[0]

    return run


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_decode(benchmark: Any, model: Any, prompts: list[Tensor], cache: str) -> None:
    """20 problems a round, each round beside one of the published loop with the same cache."""
    run, baseline = ours(cache), published(cache)
    exact = copy.deepcopy(model).float()  # in bfloat16 rounding decides between some tokens
    same = sum(torch.equal(run(exact, p), baseline(exact, p)) for p in prompts)
    seconds = []

    def time_baseline() -> None:
        began = time.perf_counter()
        for prompt in prompts:
            baseline(model, prompt)
        seconds.append(time.perf_counter() - began)

    benchmark.group = f"decode 20 problems, cache {cache}"
    benchmark.pedantic(
        lambda: [run(model, p) for p in prompts], setup=time_baseline, rounds=11, warmup_rounds=1
    )
    benchmark.extra_info.update(
        contender=f"dparallel_ext ({same}/{PROBLEMS} with the same tokens in float32)",
        baselines={"published": statistics.median(seconds)},
    )
