"""One whole unmasking step (statistics, selection, commit) on LLaDA's vocabulary, in bfloat16.

Floor: the logits of the masked rows of the window, read once: rows * V * 2 bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import dparallel_ext as dx

from . import baselines, gpu

VOCAB, MASK, THRESHOLD = 126464, 126336, 0.5
WINDOW = 32


def step(tokens: Tensor, logits: Tensor, mask_id: int, start: int, end: int, threshold: float) -> None:
    dx.unmask_(tokens, logits, mask_id=mask_id, start=start, end=end, threshold=threshold)


CONTENDERS: dict[str, Callable[..., None]] = {
    "published": baselines.published,
    "eager": baselines.eager,
    "compiled": baselines.compiled,
    "dparallel_ext": step,
}


def inputs(rows: int, vocab: int = VOCAB, mask_id: int = MASK) -> tuple[Tensor, Tensor]:
    """All-masked tokens (1, rows) and logits (1, rows, vocab) whose entropies lie on both sides of 0.5."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, rows, vocab, generator=generator)
    sure = torch.arange(rows) % 3
    logits[0, torch.arange(rows), torch.randint(0, mask_id, (rows,), generator=generator)] += 8.0 * sure
    return torch.full((1, rows), mask_id), logits.to(torch.bfloat16)


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("rows", [32, 512], ids=lambda rows: f"{rows}_rows")
def test_unmask(benchmark: Any, read_bandwidth: float, rows: int, contender: str) -> None:
    """32 rows, all in the window; and 512 rows of which the first 32 are."""
    tokens, logits = inputs(rows)
    run = CONTENDERS[contender]
    expected, actual = tokens.clone(), tokens.clone()
    baselines.published(expected, logits, MASK, 0, WINDOW, THRESHOLD)
    run(actual, logits, MASK, 0, WINDOW, THRESHOLD)
    assert torch.equal(actual, expected)
    slow = contender == "published"
    benchmark.group = f"unmask, {rows} rows"
    benchmark.extra_info.update(contender=contender, floor=WINDOW * VOCAB * 2 / read_bandwidth)
    benchmark.pedantic(
        run,
        setup=lambda: ((tokens.clone(), logits, MASK, 0, WINDOW, THRESHOLD), {}),
        rounds=5 if slow else 100,
        warmup_rounds=1 if slow else 10,
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("rows", [32, 128, 512], ids=lambda rows: f"{rows}_rows")
def test_unmask_cuda(benchmark: Any, rows: int) -> None:
    """On a GPU, from a captured graph of 20 steps over logits larger than its cache."""
    copies = max(2, int(2**28 / (rows * VOCAB * 2)))
    tokens, logits = inputs(rows)
    expected = tokens.clone()
    step(expected, logits, MASK, 0, rows, THRESHOLD)
    turns = [(tokens.cuda(), logits.cuda()) for _ in range(copies)]
    fresh = tokens.cuda()

    def steps() -> None:
        for t, z in turns:
            t.copy_(fresh)
            step(t, z, MASK, 0, rows, THRESHOLD)

    graph = gpu.capture(steps)
    assert all(torch.equal(t.cpu(), expected) for t, _ in turns)
    benchmark.group = f"unmask on a GPU, {rows} rows"
    benchmark.extra_info.update(
        contender="dparallel_ext",
        seconds=gpu.median(graph, copies),
        gpu=torch.cuda.get_device_name(),
        floor=rows * VOCAB * 2 / gpu.copy_bandwidth(),
    )
    benchmark.pedantic(graph.replay, rounds=5)
