"""block_attention: 32 queries of each sequence attend to caches of one length, or ragged, in bfloat16.

On a CPU the heads are SDAR-8B's, 32 over 8 key heads, and the lengths of a batch go down to half. A verify
pass is causal: 1, 16 or 64 rows at the end of their cache, with Qwen3-8B's heads; torch does it by a mask.

Floor: the keys and values that are seen, read once, and the queries and the output.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import dparallel_ext as dx

from . import baselines
from .harness import CPU, OURS, Case, Work, close, on_cpu, random, sets_of

QUERIES, DIM = 32, 128
HEADS = {"LLaDA": (32, 32), "Dream": (28, 4), "SDAR": (32, 8), "Qwen3": (32, 8)}
ROWS = (1, 16, 64)
"""Rows of a verify pass."""
MASKED, BY_SEQUENCE = "SDPA, padded, with a mask", "SDPA, one sequence after another"


def work(
    device: torch.device,
    small: bool,
    batch: int,
    length: int,
    heads: int,
    kv_heads: int,
    dim: int,
    ragged: bool = False,
    rows: int = QUERIES,
    causal: bool = False,
) -> Work:
    """Attention to contiguous caches (B, Hkv, length, D). ragged: their lengths go from `length` down to
    half of it.
    """
    q = random(device, batch, rows, heads, dim)
    rows_of_q, start = q.flatten(0, 1), torch.arange(0, batch * rows, rows, device=device)
    segments = {  # as a pass is told of them, on the device
        "q_start": start,
        "q_end": start + rows,
        "block_table": torch.arange(batch, device=device)[:, None],
        "max_q_len": rows,
    }
    sizes = [length - length // 2 * b // batch if ragged else length for b in range(batch)]
    lengths, shape = torch.tensor(sizes, device=device), (batch, kv_heads, length, dim)
    bytes_ = 2 * (2 * sum(sizes) * kv_heads * dim) + 2 * q.nbytes
    sets = sets_of(bytes_, device, small)
    data = [(random(device, *shape), random(device, *shape)) for _ in range(sets)]

    seen = torch.ones(rows, length, dtype=torch.bool, device=device).tril(length - rows) if causal else None

    def sdpa(turn: int, at: int) -> Tensor:
        grouped = heads != kv_heads
        y = functional.scaled_dot_product_attention(q.transpose(1, 2), *data[at], seen, enable_gqa=grouped)
        return y.transpose(1, 2)

    peers = {"torch SDPA": sdpa}
    if ragged:
        peers = {
            MASKED: lambda turn, at: baselines.masked_attention(q, *data[at], lengths),
            BY_SEQUENCE: lambda turn, at: baselines.attention_by_sequence(q, *data[at], sizes),
        }
    return Work(
        {
            **peers,
            OURS: lambda turn, at: dx.block_attention(
                rows_of_q, *data[at], lengths, **segments, causal=causal, max_kv_len=length
            ).view_as(q),
        },
        [(bytes_, 4 * rows * sum(sizes) * heads * dim, 1)],
        sets=sets,
        graphs=(OURS, "torch SDPA"),
        agree=lambda result, expected: close(result, expected, rtol=0.02, atol=0.02),
    )


def case(family: str, batch: int, length: int) -> Case:
    heads, kv_heads = HEADS[family]
    parameters = {"batch": batch, "length": length, "heads": heads, "kv_heads": kv_heads, "dim": DIM}
    name = f"block_attention, {family} heads, batch {batch}, length {length}"
    return Case(name, "block_attention", work, parameters, ("cold", "graph"))


def verify_case(rows: int, length: int = 4096) -> Case:
    heads, kv_heads = HEADS["Qwen3"]
    parameters = {"batch": 1, "length": length, "heads": heads, "kv_heads": kv_heads, "dim": DIM}
    name = f"block_attention, verify of {rows} rows, length {length}"
    arguments = {**parameters, "rows": rows, "causal": True}
    return Case(name, "block_attention", work, arguments, ("cold", "graph"))


@pytest.mark.parametrize("contender", ["torch SDPA", OURS])
@pytest.mark.parametrize("rows", ROWS)
def test_verify(benchmark: Any, read_bandwidth: float, rows: int, contender: str) -> None:
    step = work(CPU, False, 1, 4096, *HEADS["Qwen3"], DIM, rows=rows, causal=True)
    on_cpu(benchmark, f"block_attention, verify of {rows} rows", step, contender, read_bandwidth, rounds=20)


@pytest.mark.parametrize("contender", [MASKED, BY_SEQUENCE, OURS])
@pytest.mark.parametrize(("batch", "length"), [(1, 512), (8, 512), (1, 4096)])
def test_block_attention(
    benchmark: Any, read_bandwidth: float, batch: int, length: int, contender: str
) -> None:
    step = work(CPU, False, batch, length, *HEADS["SDAR"], DIM, ragged=True)
    group = f"block_attention, {batch} of {length} slots"
    on_cpu(benchmark, group, step, contender, read_bandwidth, rounds=20)
