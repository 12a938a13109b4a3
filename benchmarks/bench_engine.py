"""The time that the engine saves by shared passes and common prefixes; and a pass against its length.

The models are those of bench_cache: width 512, 8 layers, V = 126464, random weights; a quota of 8 tokens a
pass, so that every contender runs the same passes for a sequence.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext.cache import KVCache
from dparallel_ext.models import Model
from dparallel_ext.ops import block_attention

from .bench_cache import BLOCK, TAKEN, random_model
from .harness import OURS

POLICY: dict[str, Any] = {"selector": "quota", "threshold": TAKEN, "score": "confidence"}
DTYPES = [torch.float32, torch.bfloat16]
CACHES = ["dual", "block"]
LENGTHS = [128, 256, 512, 1024, 2048, 4096, 8192]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def ragged(count: int, shortest: int, longest: int, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=g).tolist()
    return [torch.randint(0, 126000, (n,), generator=g) for n in lengths]


def seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("cache", CACHES)
def test_engine(benchmark: Any, cache: str, dtype: torch.dtype) -> None:
    """16 requests, of 32 to 512 prompt tokens and 32 to 128 new ones; baseline: `decode` of one after the
    other.
    """
    benchmark.group = f"16 ragged requests, cache {cache}, {name_of(dtype)}"
    model = random_model(cache == "block", dtype)
    prompts = ragged(16, 32, 512)
    lengths = (torch.randint(1, 5, (16,), generator=torch.Generator().manual_seed(1)) * 32).tolist()
    work = list(zip(prompts, lengths, strict=True))
    single: list[dx.DecodeOutput] = []

    def one_by_one() -> None:
        single[:] = [
            dx.decode(model, prompt, gen_length=n, block_length=BLOCK, cache=cache, **POLICY)
            for prompt, n in work
        ]

    with dx.Engine(model, cache=cache, block_length=BLOCK, lanes=16, max_length=704, share=False) as engine:

        def together() -> list[list[int]]:
            handles = [engine.submit(p, gen_length=n, **POLICY) for p, n in work]
            return [handle.result().tokens for handle in handles]

        batched, before = together(), seconds(one_by_one)
        same = sum(
            a == b
            for tokens, out in zip(batched, single, strict=True)
            for a, b in zip(tokens, out.responses[0].tolist(), strict=False)  # block fills its last
        )
        benchmark.pedantic(together, rounds=3)
        stats = engine.stats
    assert stats.sequence_passes == 4 * sum(int(out.nfe) for out in single)  # finished ones take no pass
    baseline = min(before, seconds(one_by_one))
    benchmark.extra_info.update(
        contender=f"{OURS}, Engine ({same}/{sum(lengths)} tokens the same)",
        baselines={"one after the other": baseline},
    )


def test_shared_prefix(benchmark: Any) -> None:
    """64 requests that begin with the same 1024 tokens; baseline: an engine without the prefix tree."""
    benchmark.group = "64 requests that share 1024 tokens"
    model = random_model(True, torch.bfloat16)
    common = ragged(1, 1024, 1024)[0]
    prompts = [torch.cat((common, tail)) for tail in ragged(64, 16, 64, seed=1)]
    computed, spent = {}, {}

    def all_of_them(share: bool) -> None:
        with dx.Engine(model, lanes=16, max_length=1152, share=share) as engine:
            for handle in [engine.submit(p, gen_length=8, threshold=9.0) for p in prompts]:
                handle.result()
            stats = engine.stats
        computed[share] = stats.prompt_tokens - stats.reused_tokens

    spent[False] = seconds(lambda: all_of_them(False))
    benchmark.pedantic(lambda: all_of_them(True), rounds=2)
    benchmark.extra_info.update(
        contender=f"{OURS}, prefix tree ({computed[True]} prompt tokens computed)",
        baselines={f"without the tree ({computed[False]})": spent[False]},
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_batch_invariant(benchmark: Any, dtype: torch.dtype) -> None:
    """The cost of batch invariance: 8 sequences, each bit for bit as alone; baseline: shared passes."""
    model, prompts = random_model(False, dtype), ragged(8, 128, 256)
    settings = {"gen_length": 64, "block_length": BLOCK, "cache": "dual", **POLICY}
    shared = min(seconds(lambda: dx.decode(model, prompts, **settings)) for _ in range(3))
    benchmark.group = f"8 sequences, batch_invariant, {name_of(dtype)}"
    benchmark.pedantic(lambda: dx.decode(model, prompts, batch_invariant=True, **settings), rounds=3)
    benchmark.extra_info.update(
        contender=f"{OURS}, batch_invariant", baselines={f"{OURS}, shared passes": shared}
    )


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("length", LENGTHS)
def test_step(benchmark: Any, length: int, cache: str) -> None:
    """A pass over one block against a cached prompt of `length`; and its attention to the cache alone."""
    model = random_model(cache == "block", torch.bfloat16)
    whole = length + BLOCK if cache == "block" else length + 4 * BLOCK
    slots = model.new_cache(1, whole)
    slots.slots.normal_(generator=torch.Generator().manual_seed(0))
    metadata = slots.metadata(model.spans(0, length, length + BLOCK, whole))
    ids = torch.full((BLOCK,), model.mask_id or 0)

    @torch.inference_mode()
    def step() -> None:
        model.head(model.step(ids, slots, metadata))

    benchmark.group = f"one block against a cache, {cache}"
    step()
    benchmark.pedantic(step, rounds=15, warmup_rounds=3)
    benchmark.extra_info.update(
        rows=length, attention=min(seconds(attention(model, slots, metadata)) for _ in range(10))
    )


def attention(model: Model, slots: KVCache, metadata: Any) -> Callable[[], None]:
    """A function that computes the attention of a pass, in every layer, and nothing else."""
    s = model.shape
    q = torch.randn(len(metadata.positions), s.heads, s.head_dim).to(model.dtype)

    def all_layers() -> None:
        for layer in range(s.layers):
            keys, values = slots.layer(layer)
            block_attention(
                q,
                keys,
                values,
                metadata.kv_lens,
                block_table=metadata.block_table,
                q_start=metadata.q_start,
                q_end=metadata.q_end,
            )

    return all_layers
