"""kv_write: rotate blocks of 32 tokens and write them to their slots, in bfloat16.

On a CPU the heads are SDAR-8B's: 32 over 8 key heads. Warm, as in a decode, which has just computed the rows.

With norms, each head of queries and keys is normed first, as of Qwen3 and SDAR; a baseline is `rms_norm` of
both and `kv_write`.

Floor: queries read and written, keys and values read and written to the cache, and the rotary table read:
tokens * 128 * 2 * (2 * heads + 4 * key heads) + 32 * 128 * 4 bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dparallel_ext as dx

from . import baselines
from .bench_block_attention import DIM, HEADS
from .harness import CPU, OURS, Case, Work, close, on_cpu, random

BLOCK = 32
STEPS = f"{OURS}, rms_norm and kv_write"
EPS = 1e-6


def work(
    device: torch.device,
    small: bool,
    tokens: int,
    heads: int,
    kv_heads: int,
    dim: int,
    capacity: int = 2 * BLOCK,
    norms: bool = False,
) -> Work:
    """One block of each sequence, in the middle of its cache of `capacity` slots.

    norms: each head of queries and keys is normed first, as of Qwen3.
    """
    sequences = -(-tokens // BLOCK)
    fused = random(device, tokens, (heads + 2 * kv_heads) * dim)
    q, k, v = fused.unflatten(1, (-1, dim)).split([heads, kv_heads, kv_heads], 1)
    caches = torch.zeros(2, sequences, kv_heads, capacity, dim, dtype=q.dtype, device=device)
    positions = capacity // 2 + torch.arange(BLOCK, device=device).repeat(sequences)[:tokens]
    blocks = torch.arange(sequences, device=device).repeat_interleave(BLOCK)[:tokens]
    slots = blocks * capacity + positions
    cos, sin = dx.rope_table(capacity, dim, device=device)
    inputs = (q, k, v, caches[0], caches[1], positions, slots, cos, sin)
    first = q.clone()
    weights = 1 + random(device, 2, dim) / 8

    def of(step: Callable[..., None]) -> Callable[[int, int], tuple[Tensor, Tensor]]:
        def run(turn: int, at: int) -> tuple[Tensor, Tensor]:
            step(*inputs)
            return q, caches

        return run

    def by_torch(q: Tensor, k: Tensor, *others: Tensor) -> None:
        if norms:
            k = F.rms_norm(k, (dim,), weights[1], EPS)
            q.copy_(F.rms_norm(q, (dim,), weights[0], EPS))
        baselines.rotate_and_put(q, k, *others)

    def ours(*inputs: Tensor, **of_norms: Any) -> None:
        names = ("positions", "slot_mapping", "cos", "sin")
        dx.kv_write(*inputs[:5], **dict(zip(names, inputs[5:], strict=True)), **of_norms)

    def with_norms(*inputs: Tensor) -> None:
        ours(*inputs, q_norm=weights[0], k_norm=weights[1], eps=EPS)

    def in_steps(q: Tensor, k: Tensor, *others: Tensor) -> None:
        k = dx.rms_norm(k, weights[1], eps=EPS)
        q.copy_(dx.rms_norm(q, weights[0], eps=EPS))
        ours(q, k, *others)

    def reset() -> None:
        q.copy_(first)
        caches[:, blocks, :, positions] = 0

    table = 4 * dim * min(tokens, BLOCK)  # the rows of cos and sin that are read
    run = {
        "eager": of(by_torch),
        "compiled": of(baselines.compile_(by_torch)),
        OURS: of(with_norms if norms else ours),
    }
    if norms:
        run[STEPS] = of(in_steps)
    return Work(
        run,
        [(2 * tokens * dim * (2 * heads + 4 * kv_heads) + table, 0, 1)],
        sets=16,
        graphs=(OURS, STEPS, "eager"),
        reset=reset,
        agree=lambda result, expected: close(result, expected, rtol=0.02, atol=0.02),
    )


def case(family: str, tokens: int) -> Case:
    heads, kv_heads = HEADS[family]
    norms = family in ("SDAR", "Qwen3")
    parameters = {"tokens": tokens, "heads": heads, "kv_heads": kv_heads, "dim": DIM, "norms": norms}
    name = f"kv_write, {family} heads{' and norms' if norms else ''}, {tokens} tokens"
    return Case(name, "kv_write", work, parameters, ("warm", "graph, warm"))


@pytest.mark.parametrize("contender", ["eager", OURS])
@pytest.mark.parametrize("sequences", [1, 32])
def test_kv_write(benchmark: Any, read_bandwidth: float, sequences: int, contender: str) -> None:
    step = work(CPU, False, sequences * BLOCK, *HEADS["SDAR"], DIM, capacity=2048)
    on_cpu(benchmark, f"kv_write, {sequences * BLOCK} tokens", step, contender, read_bandwidth, rounds=50)
