"""Long sequences that are computed whole attend to themselves, by torch's kernel, whatever is beside them.

Where there is no GPU, the same by a mask in float64 stands in for that kernel, and short ones count as long.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import GPUS, golden
from tape import Tape, kernels, prompt, tiny
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext import cache as caches
from dparallel_ext import models
from dparallel_ext.cache import Span, bucket
from dparallel_ext.decoding.graphs import CudaRecorder, Graphs
from dparallel_ext.models import attention
from dparallel_ext.ops.varlen_attention import has_varlen, varlen_attention

pytest_plugins = ["taping"]

LONG = 24
"""Positions of a long sequence, where short ones count."""


def by_a_mask(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    seqused_k: Tensor,
    *,
    max_seqlen: int,
    causal: bool = False,
) -> Tensor:
    """`varlen_attention`, on any device, without a look at a number."""
    row = torch.arange(len(q), device=q.device)
    begin = cu_seqlens.long()
    which = torch.searchsorted(begin, row, right=True) - 1
    key = row - begin[which]  # of a row, its place in its sequence
    mask = (which[:, None] == which) & (key < seqused_k[which])
    if causal:
        mask &= row <= row[:, None]
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    queries, k, v = (t.transpose(0, 1).double() for t in (q, k, v))
    weights = (queries @ k.transpose(1, 2) / q.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf).softmax(-1)
    out = (weights.nan_to_num() @ v).masked_fill((key >= max_seqlen)[:, None], torch.nan)  # not computed
    return out.transpose(0, 1).to(q.dtype)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Short sequences count as long, on the CPU too; returns the calls: rows, and whether alone."""
    calls: list[tuple[int, bool]] = []
    own = varlen_attention

    def called(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor,
        seqused_k: Tensor,
        *,
        max_seqlen: int,
        causal: bool = False,
    ) -> Tensor:
        calls.append((len(q), len(seqused_k) == 2))
        if q.is_cuda:
            return own(q, k, v, cu_seqlens, seqused_k, max_seqlen=max_seqlen, causal=causal)
        return by_a_mask(q, k, v, cu_seqlens, seqused_k, max_seqlen=max_seqlen, causal=causal)

    monkeypatch.setattr(caches, "MIN_VARLEN", LONG)
    monkeypatch.setattr(attention, "varlen_attention", called)
    monkeypatch.setattr(caches, "has_varlen", lambda like: not like.is_cuda or has_varlen(like))
    return calls


def step(model: models.Model, cache: caches.KVCache, spans: list[Span], ids: Tensor, pad_to: Any) -> Tensor:
    metadata, count = cache.metadata(spans, pad_to).to(model.device), len(ids)
    ids = torch.nn.functional.pad(ids, (0, len(metadata.positions) - count))
    return model.step(ids.to(model.device), cache, metadata)[:count]


MIXES = {
    "one": [(0, 0, 40, 40)],
    "all": [(0, 0, 40, 40), (1, 0, 24, 24), (2, 0, 31, 31)],
    "some": [(0, 8, 16, 40), (1, 0, 24, 24), (2, 0, 23, 23), (3, 0, 31, 31), (4, 16, 40, 40)],
    "the last": [(0, 0, 23, 23), (1, 0, 30, 40), (3, 0, 40, 40)],
    "none": [(0, 0, 23, 23), (1, 8, 40, 40), (2, 0, 30, 40)],
}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("pad_to", [None, bucket], ids=["as it is", "filled"])
@pytest.mark.parametrize("name", ["llada_tiny_a", "dream_tiny_a", "sdar_tiny_a"])
@pytest.mark.parametrize("device", ["cpu", *GPUS], indirect=True)
@torch.no_grad()
def test_it_is_attention_to_the_cache(
    short: list[tuple[int, bool]], device: str, name: str, pad_to: Any, mix: str
) -> None:
    """In pages of any order; keys and values are written as ever."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = golden.model(name, dtype=dtype, device=device)
    spans = [Span(*span) for span in MIXES[mix]]
    ids = torch.randint(0, 510, (sum(span.end - span.start for span in spans),)).cpu()
    table = torch.randperm(25).view(5, 5).cpu()
    found = {}
    for varlen in (True, False):
        cache = model.new_cache(25, 8, table)
        cache.slots.normal_(generator=torch.Generator(device).manual_seed(1))
        cache.varlen = varlen and cache.varlen
        found[varlen] = step(model, cache, spans, ids, pad_to), cache.slots
    assert len(short) == (0 if mix == "none" else len(model.blocks))
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for with_it, without in zip(*found.values(), strict=True):
        assert float((with_it - without).norm()) <= tolerance * float(without.norm())
    assert not found[True][0].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_heads_are_normed_once(short: list[tuple[int, bool]], dtype: torch.dtype) -> None:
    """By `kv_write`, or by their modules where one does more; in the cache and in packed keys."""
    model = golden.model("sdar_tiny_a", dtype=dtype)
    for block in model.blocks:
        for norm in (block.q_norm, block.k_norm):
            norm.weight.data = 0.5 + torch.rand_like(norm.weight)
    spans = [Span(*span) for span in MIXES["some"]]
    ids = torch.randint(0, 510, (sum(span.end - span.start for span in spans),))
    called: list[torch.nn.Module] = []
    found = []
    for hooked in ("", "q_norm", "k_norm"):
        hooks = [
            getattr(block, hooked).register_forward_hook(lambda module, *_: called.append(module))
            for block in model.blocks
            if hooked
        ]
        cache = model.new_cache(25, 8, torch.arange(25).view(5, 5))
        cache.slots.zero_()
        found.append((step(model, cache, spans, ids, None), cache.slots))
        for hook in hooks:
            hook.remove()
    assert len(short) == 3 * len(model.blocks)
    assert len(called) == 2 * len(model.blocks)
    for pair in zip(*found, strict=True):
        for other in pair[1:]:
            assert torch.equal(pair[0], other)


WAYS: list[dict[str, Any]] = [
    {"cache": "none", "threshold": 2.0},
    {"cache": "dual", "threshold": 2.0},
    {"cache": "dual", "threshold": 3.0, "refresh": 3},
    {"cache": "prefix", "threshold": 1.0},
]
PROMPTS = [torch.arange(3, 14), torch.arange(40, 47), torch.arange(1, 30)]
LENGTHS = [29, 9, 40]
"""Of the responses: the second sequence is a short one."""


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("device", ["cpu", *GPUS], indirect=True)
def test_an_engine_gives_what_decode_gives(
    short: list[tuple[int, bool]], device: str, way: dict[str, Any]
) -> None:
    """Each sequence in passes of its own, to the bit; on the CPU in shared ones, too."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = golden.model("llada_tiny_a", dtype=dtype, device=device)
    settings = {"block_length": 8, "batch_invariant": device != "cpu"}
    alone = [
        dx.decode(model, prompt, gen_length=length, **settings, **way).responses[0].tolist()
        for prompt, length in zip(PROMPTS, LENGTHS, strict=True)
    ]
    assert {alone for _, alone in short} == {True}
    together = dx.decode(model, PROMPTS, gen_length=LENGTHS, **settings, **way)
    engine = {name: way[name] for name in ("cache", "refresh") if name in way}
    with dx.Engine(model, lanes=2, max_length=80, page_size=16, **settings, **engine) as running:
        handles = [
            running.submit(prompt, gen_length=length, threshold=way["threshold"])
            for prompt, length in zip(PROMPTS, LENGTHS, strict=True)
        ]
        completions = [handle.result(120).tokens for handle in handles]
    assert completions == alone
    assert [response.tolist() for response in together.responses] == alone


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_recorded(
    taped: list[Graphs],
    short: list[tuple[int, bool]],
    way: dict[str, Any],
    dtype: torch.dtype,
) -> None:
    model = golden.model("llada_tiny_a", dtype=dtype)
    settings = {"gen_length": LENGTHS, "block_length": 8, **way}
    expected = dx.decode(model, PROMPTS, graphs=False, **settings)
    assert short
    out = dx.decode(model, PROMPTS, **settings)
    assert torch.equal(out.sequences, expected.sequences)
    assert torch.equal(out.nfe, expected.nfe)
    (graphs,) = taped
    assert graphs.recorder is not None, "a recording failed"
    assert graphs.replays >= 2


def test_what_torch_is_given() -> None:
    """Its operator is not public: its names and types, without a GPU."""
    q, k = (torch.empty(600, heads, 16, device="meta", dtype=torch.bfloat16) for heads in (12, 2))
    cu_seqlens = torch.empty(4, device="meta", dtype=torch.int32)
    found = varlen_attention(q[:, :4], k, k, cu_seqlens, cu_seqlens[1:], max_seqlen=512)
    assert found.shape == (600, 4, 16)
    assert found.is_contiguous()


def test_all_rows_are_in_the_launch() -> None:
    """Also the rows that fill up a pass of many sequences, after the last."""
    cache = golden.model("llada_tiny_a").new_cache(9, 256)
    cache.varlen = True
    metadata = cache.metadata([Span(row, 0, 256, 256) for row in range(9)], bucket)
    assert len(metadata.positions) == 2560
    assert metadata.cu_seqlens.tolist() == [*range(0, 2305, 256), *[2304] * 7, 2560]
    assert metadata.seqused_k.tolist() == [256] * 9 + [0] * 8
    assert metadata.max_q_len == 256
    metadata = cache.metadata([Span(0, 0, 256, 256)], lambda count: 600)
    assert metadata.cu_seqlens.tolist() == [0, 256, 600]
    assert metadata.max_q_len == 512
    for field in (metadata.q_start, metadata.q_end, metadata.kv_lens, metadata.block_table):
        assert len(field) == 0
    for spans in ([Span(0, 0, 255, 255)], [Span(0, 0, 255, 256), Span(1, 1, 256, 256)]):
        assert not len(cache.metadata(spans, bucket).seqused_k)


@pytest.mark.parametrize("device", GPUS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(32, 32, 128), (28, 4, 128), (4, 2, 16), (6, 6, 40)])
def test_the_kernel(device: str, dtype: torch.dtype, heads: int, kv_heads: int, dim: int) -> None:
    """Right; to the bit as alone, in any company; zero where nothing is seqused_k."""
    lengths, sees = [300, 17, 0, 1024, 257, 5], [True, False, False, True, True, False]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    seqused_k = torch.tensor([n if whole else 0 for n, whole in zip(lengths, sees, strict=True)]).int()
    rows = sum(lengths)
    joined = torch.randn(rows, (heads + 2 * kv_heads) * dim).to(dtype)
    parts = joined.split([heads * dim, kv_heads * dim, kv_heads * dim], 1)
    q, k, v = (part.unflatten(1, (-1, dim)) for part in parts)
    assert has_varlen(q)
    found = varlen_attention(q, k, v, cu_seqlens, seqused_k, max_seqlen=1024)
    expected = by_a_mask(q, k, v, cu_seqlens, seqused_k, max_seqlen=1024)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    for begin, length, whole in zip(cu_seqlens.tolist(), lengths, sees, strict=False):
        at = slice(begin, begin + length)
        if not whole:
            assert not found[at].any()
            continue
        own = torch.tensor([0, length]).int()
        for max_seqlen in (length, 2048):
            alone = (t[at].clone() for t in (q, k, v))
            again = varlen_attention(*alone, own, own[1:], max_seqlen=max_seqlen)
            assert torch.equal(again, found[at])


def test_the_kernels_of_a_full_pass(
    taped: list[Graphs],
    short: list[tuple[int, bool]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One launch more than a pass over a block has in a layer, which rotates the packed keys."""
    tapes: list[Tape] = []
    record = CudaRecorder.record

    def kept(self: CudaRecorder, *args: Any) -> Any:
        made = record(self, *args)
        tapes.append(made[0].__self__.tape)  # type: ignore[attr-defined]
        return made

    monkeypatch.setattr(CudaRecorder, "record", kept)
    monkeypatch.setattr(attention, "varlen_attention", lambda q, *args, **settings: q.clone())
    found = []
    for layers in (1, 2):
        model = tiny("llada", layers).to(torch.bfloat16).fuse()
        dx.decode(model, prompt(32), gen_length=64, cache="none", selector="quota", threshold=8)
        found.append(kernels(tapes.pop()))
        assert not tapes
    layer = found[1] - found[0]
    assert layer == {"linear": 4, "rms_norm": 2, "kv_write": 2, "clone": 1, "swiglu": 1}
