"""The server under 200 streaming clients at once, each with a problem of its own; baseline: `decode` of one
prompt after another.

Every answer is compared with what `decode` returns for its prompt. No floor is claimed.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from dparallel import registry
from dparallel.toy import tasks

import dparallel_ext as dx

from .harness import OURS
from .serving import Served, ask_all, percentile, server

CLIENTS, MODEL = 200, "builtin:student"


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with server(MODEL) as running:
        yield running


def test_serve(benchmark: Any, served: Served) -> None:
    model, tokenizer = registry.load(MODEL)
    prompts = [p.prompt for p in itertools.islice(tasks.problems("held_out", seed=7), CLIENTS)]
    ids = [torch.tensor(tokenizer.encode(prompt).ids) for prompt in prompts]
    eos = tokenizer.token_to_id(tasks.EOS)

    def one_by_one() -> list[str]:
        texts = []
        for each in ids:
            out = dx.decode(model, each, gen_length=tasks.GEN_LENGTH, threshold=0.5, cache="dual", eos_id=eos)
            texts.append(tokenizer.decode(out.responses[0].tolist()))
        return texts

    seconds, replies = [], []
    expected = one_by_one()

    def time_baseline() -> None:
        began = time.perf_counter()
        one_by_one()
        seconds.append(time.perf_counter() - began)

    def run() -> None:
        replies.append(ask_all(served, MODEL, prompts))

    benchmark.group = f"serve {CLIENTS} streaming clients at once"
    benchmark.pedantic(run, setup=time_baseline, rounds=3, warmup_rounds=1)
    same = min(sum(a.text == b for a, b in zip(texts, expected, strict=True)) for texts in replies)
    timed = [reply for texts in replies[1:] for reply in texts]
    benchmark.extra_info.update(
        contender=f"{OURS} ({same}/{CLIENTS} with the same text)",
        baselines={"decode, one by one": statistics.median(seconds)},
        latencies={
            name: {p: percentile([getattr(r, field) for r in timed], p / 100) for p in (50, 95)}
            for name, field in (("first block", "first"), ("whole response", "seconds"))
        },
    )
