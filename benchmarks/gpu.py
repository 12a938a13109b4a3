"""Timing on a GPU: captured graphs, CUDA events, and the speed of its memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch


def capture(steps: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """A graph of `steps`, which run once before; replaying it costs the host one launch."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        steps()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        steps()
    return graph


def seconds(run: Callable[[], None], rounds: int = 50, warmup: int = 5) -> list[float]:
    """Of each round, by CUDA events."""
    events = [
        [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # before and after
        for _ in range(warmup + rounds)
    ]
    for began, ended in events:
        began.record()
        run()
        ended.record()
    torch.cuda.synchronize()
    return [began.elapsed_time(ended) / 1e3 for began, ended in events[warmup:]]


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy of 512 MB: the best of ten."""
    source = torch.empty(2**29, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / min(seconds(lambda: target.copy_(source), rounds=10, warmup=1))


def median(graph: torch.cuda.CUDAGraph, steps: int) -> float:
    """Seconds of one of the graph's equal steps."""
    return statistics.median(seconds(graph.replay)) / steps
