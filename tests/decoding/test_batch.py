"""Batches as people have them: block-causal models, prompts of any lengths, each sequence at its own pace."""

from __future__ import annotations

import gc
import importlib
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import golden
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext import model_store, models
from dparallel_ext.cache import KVCache
from dparallel_ext.decoding import padding
from dparallel_ext.decoding.batch import Batch
from dparallel_ext.models import SDAR, Model

MASK = 511
CASES = golden.json("sdar_tiny_a", "cases")
MODELS = {
    (name, dtype): golden.model(name, dtype=dtype)
    for name in ("llada_tiny_a", "dream_tiny_a", "sdar_tiny_a")
    for dtype in (torch.float32, torch.bfloat16)
}
WAYS = [
    ("llada_tiny_a", "none"),
    ("llada_tiny_a", "prefix"),
    ("llada_tiny_a", "dual"),
    ("dream_tiny_a", "none"),
    ("dream_tiny_a", "dual"),
    ("sdar_tiny_a", "none"),
    ("sdar_tiny_a", "block"),
]


@pytest.fixture(autouse=True)
def _there(device: str) -> None:
    """Every test of this file runs on every device."""
    for model in MODELS.values():
        model.to(device)


@pytest.fixture
def sdar(device: str) -> SDAR:
    model = golden.model("sdar_tiny_a", device=device)
    assert isinstance(model, SDAR)
    return model


@torch.no_grad()
def test_sdar_has_the_published_logits(sdar: SDAR, device: str) -> None:
    assert sdar.block_length == 8  # of its config
    published = {n: t.to(device) for n, t in golden.tensors("sdar_tiny_a", "logits").items()}
    sdar.block_length = 4  # of the golden logits
    torch.testing.assert_close(sdar(published["input_ids"]).logits, published["logits"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{len(case['prompt'])}-{case['threshold']}")
@pytest.mark.parametrize("cache", ["block", "none"])
def test_sdar_decodes_the_published_tokens(sdar: SDAR, case: dict[str, Any], cache: str) -> None:
    prompt = torch.tensor(case["prompt"])
    out = dx.decode(
        sdar,
        prompt,
        gen_length=case["gen_length"],
        block_length=case["block_length"],  # followed, whatever the config says
        selector=case["selector"] if case["threshold"] is not None else None,
        threshold=case["threshold"],
        cache=cache,
    )
    assert out.sequences[0, len(prompt) :].tolist() == case["tokens"]
    if cache == "block":
        assert int(out.nfe_published) == case["forwards"]
        blocks = -(-(len(prompt) + case["gen_length"]) // case["block_length"])
        done = len(prompt) // case["block_length"]
        # The prefill and the pass that stores a block are part of the next block's first pass.
        assert out.forwards == int(out.nfe) == case["forwards"] - (done > 0) - (blocks - done)


@pytest.mark.parametrize("length", [7, 8, 9])
def test_a_prompt_of_a_whole_block_is_prefilled_as_published(sdar: SDAR, length: int) -> None:
    """And every block that is filled is stored by a pass of its own."""
    out = dx.decode(sdar, torch.arange(3, 3 + length), gen_length=16 - length, block_length=8, cache="block")
    assert int(out.nfe_published - out.nfe) == (length >= 8) + 2 - length // 8


@pytest.mark.parametrize(("size", "cache"), [(4, "block"), (16, "block"), (4, "none")])
def test_a_block_length_that_is_given_is_attended_by(sdar: SDAR, size: int, cache: str) -> None:
    """In `decode` and in the Engine, as if the model had it; the model keeps its own."""
    prompts = random_prompts(torch.Generator().manual_seed(3), 4)
    settings = {"gen_length": 21, "threshold": 0.1, "selector": "confidence"}
    out = dx.decode(sdar, prompts, block_length=size, cache=cache, **settings)
    with dx.Engine(sdar, block_length=size, cache=cache, lanes=2, max_length=64) as engine:
        handles = [engine.submit(prompt, **settings) for prompt in prompts]
        tokens = [handle.result(60).tokens for handle in handles]
    assert tokens == [response[:21].tolist() for response in out.responses]
    own = dx.decode(sdar, prompts, cache=cache, **settings)
    assert sdar.block_length == 8
    sdar.block_length = size
    assert torch.equal(dx.decode(sdar, prompts, cache=cache, **settings).sequences, out.sequences)
    assert not torch.equal(own.sequences[:, :50], out.sequences[:, :50])


def random_prompts(generator: torch.Generator, count: int) -> list[Tensor]:
    lengths = torch.randint(1, 30, (count,), generator=generator).tolist()
    return [torch.randint(0, 500, (n,), generator=generator) for n in lengths]


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 6),
    way=st.sampled_from(WAYS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    temperature=st.sampled_from([0.0, 0.8]),
    eos=st.booleans(),
)
def test_a_sequence_is_as_alone_whatever_shares_the_batch(seed, count, way, dtype, temperature, eos) -> None:
    """To the bit, in any order: tokens, passes, confidences."""
    name, cache = way
    model, g = MODELS[name, dtype], torch.Generator().manual_seed(seed)
    prompts = random_prompts(g, count)
    own = {
        "gen_length": torch.randint(0, 40, (count,), generator=g).tolist(),
        "threshold": torch.rand(count, generator=g),
        "selector": [["confidence", "entropy", "factor"][i] for i in torch.randint(3, (count,), generator=g)],
        "seed": torch.randint(0, 99, (count,), generator=g),
    }
    shared = {
        "cache": cache,
        "temperature": temperature,
        "eos_id": 5 if eos else None,
        "block_length": 8,
        "record": True,
        "batch_invariant": True,
    }
    together = dx.decode(model, prompts, **own, **shared)
    for b in range(count):
        pick = {k: [v[b]] if isinstance(v, list) else v[b : b + 1] for k, v in own.items()}
        alone = dx.decode(model, [prompts[b]], **pick, **shared)
        assert torch.equal(alone.responses[0], together.responses[b])
        for field in ("nfe", "generated", "lengths", "nfe_published"):
            assert getattr(alone, field)[0] == getattr(together, field)[b]
        width = len(alone.responses[0])
        for field in ("step", "confidence"):
            one, all_ = (getattr(out.trajectory, field) for out in (alone, together))
            assert torch.equal(one[0].nan_to_num(-1), all_[b, :width].nan_to_num(-1))


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_shared_passes_give_the_same_tokens(way: tuple[str, str]) -> None:
    """In float32, where the matrix library's rounding does not decide between tokens."""
    name, cache = way
    model, g = MODELS[name, torch.float32], torch.Generator().manual_seed(8)
    prompts = random_prompts(g, 7)
    settings = {"threshold": 0.4, "selector": "confidence", "cache": cache, "block_length": 8}
    gen_length = [0, 9, 24, 16, 3, 31, 8]
    out = dx.decode(model, prompts, gen_length=gen_length, **settings)
    assert out.forwards == int(out.nfe.max())  # no pass on a sequence that is complete, none in vain
    for b, prompt in enumerate(prompts):
        alone = dx.decode(model, prompt, gen_length=gen_length[b], **settings)
        assert torch.equal(alone.responses[0], out.responses[b])
        assert alone.nfe[0] == out.nfe[b]
        assert torch.equal(out.sequences[b, : len(prompt)], prompt)
        assert bool((out.sequences[b, int(out.lengths[b]) :] == MASK).all())  # padding


def test_finished_sequences_are_in_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model, counts = MODELS["llada_tiny_a", torch.float32], []
    step = Model.step

    def counted(self: Model, ids: Tensor, cache: Any, metadata: Any) -> Tensor:
        counts.append(int((metadata.q_end > metadata.q_start).sum()))  # spans without rows fill up
        return step(self, ids, cache, metadata)

    monkeypatch.setattr(Model, "step", counted)
    prompts = random_prompts(torch.Generator().manual_seed(1), 3)
    out = dx.decode(model, prompts, gen_length=[4, 12, 8], block_length=4, graphs=False)
    assert counts == [3] * 4 + [2] * 4 + [1] * 4
    assert sum(counts) == int(out.nfe.sum())


def test_padding_is_taken_out() -> None:
    model, g = MODELS["dream_tiny_a", torch.float32], torch.Generator().manual_seed(3)
    prompts = random_prompts(g, 4)
    width = max(map(len, prompts))
    settings = {"gen_length": 16, "threshold": 1.0, "block_length": 8, "cache": "dual"}
    expected = dx.decode(model, prompts, **settings)
    for left in (False, True):
        padded, mask = torch.full((4, width), 77), torch.zeros(4, width)
        for b, prompt in enumerate(prompts):
            at = slice(width - len(prompt), width) if left else slice(0, len(prompt))
            padded[b, at], mask[b, at] = prompt, 1
        out = dx.decode(model, padded, attention_mask=mask.long(), **settings)
        assert torch.equal(out.sequences, expected.sequences)
        assert torch.equal(out.nfe, expected.nfe)
    with pytest.raises(ValueError, match=r"attention_mask: expected the shape of prompt \(B, P\)"):
        dx.decode(model, padded, attention_mask=mask[:, 1:], **settings)


def test_foreign_models_get_no_padding() -> None:
    shapes = []
    native = MODELS["llada_tiny_a", torch.float32]

    def foreign(ids: Tensor) -> SimpleNamespace:
        shapes.append(tuple(ids.shape))
        return SimpleNamespace(logits=native(ids).logits)

    prompts = [torch.tensor([1, 2, 3]), torch.tensor([4, 5]), torch.tensor([6, 7, 8])]
    settings = {"gen_length": 8, "block_length": 8, "threshold": 1.0, "mask_id": MASK}
    out = dx.decode(foreign, prompts, **settings)
    expected = dx.decode(native, prompts, **settings)
    assert torch.equal(out.sequences, expected.sequences)
    assert torch.equal(out.nfe, expected.nfe)
    assert set(shapes) <= {(2, 11), (1, 11), (1, 10)}


@pytest.mark.parametrize("refresh", [1, 2, 3])
def test_a_dual_cache_can_be_renewed(monkeypatch, refresh: int) -> None:
    model, spans = MODELS["llada_tiny_a", torch.float32], []
    step = Model.step

    def counted(self: Model, ids: Tensor, cache: Any, metadata: Any) -> Tensor:
        spans.append(int((metadata.q_end - metadata.q_start).sum()))
        return step(self, ids, cache, metadata)

    monkeypatch.setattr(Model, "step", counted)
    prompt = torch.tensor([5, 6, 7, 8])
    settings = {"gen_length": 16, "block_length": 8, "graphs": False}
    out = dx.decode(model, prompt, cache="dual", refresh=refresh, **settings)
    assert spans == [20 if turn % refresh == 0 else 8 for turn in range(8)] * 2
    if refresh == 1:
        plain = dx.decode(model, prompt, score="entropy", **settings)
        assert torch.equal(out.sequences, plain.sequences)
    with pytest.raises(ValueError, match="refresh: belongs to cache"):
        dx.decode(model, prompt, cache="prefix", refresh=2)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "llada_tiny_a",
            {"cache": "block"},
            'cache: expected "none", "prefix" or "dual", since LLaDA is not',
        ),
        ("sdar_tiny_a", {"cache": "dual"}, 'cache: expected "block" or "none" for a block-causal model'),
        ("llada_tiny_a", {"gen_length": [4]}, "gen_length: expected a number or one for each of 2, got 1"),
        ("llada_tiny_a", {"gen_length": [4, -1]}, "gen_length: expected a whole number >= 0, got -1"),
        ("llada_tiny_a", {"refresh": 0, "cache": "dual"}, "refresh: expected a whole number >= 1"),
    ],
)
def test_bad_arguments_are_named(name: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dx.decode(MODELS[name, torch.float32], [torch.tensor([1]), torch.tensor([2, 3])], **change)


def test_sdar_is_written_as_it_was_read(sdar: SDAR, tmp_path: Path) -> None:
    models.save(sdar, tmp_path)
    again = load_file(tmp_path / "model.safetensors")
    stored = golden.tensors("sdar_tiny_a")
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[name], stored[name]) for name in stored)
    assert isinstance(models.load(tmp_path), SDAR)


def test_passes_come_in_few_sizes(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In 16 bits on the CPU, where the matrix library keeps code for each number of rows; and on a GPU."""
    monkeypatch.setattr(padding, "fast_bfloat16", lambda: True)  # and not `linear`
    model, sizes = MODELS["dream_tiny_a", torch.bfloat16], set()
    step, head = Model.step, Model.head
    monkeypatch.setattr(
        Model,
        "step",
        lambda self, ids, cache, metadata: sizes.add(len(ids)) or step(self, ids, cache, metadata),
    )
    monkeypatch.setattr(Model, "head", lambda self, hidden: sizes.add(len(hidden)) or head(self, hidden))
    generator = torch.Generator().manual_seed(0)
    for count in range(1, 12):
        prompts = random_prompts(generator, count)
        dx.decode(model, prompts, gen_length=21, block_length=8, threshold=5.0, cache="dual", graphs=False)
    few = [*range(8, 65, 8), *range(80, 129, 16), *range(160, 257, 32), *range(320, 513, 64), 640]
    if device != "cpu":
        few = [*range(8, 257, 8), *range(272, 513, 16), *range(544, 1025, 32)]
    assert len(sizes) > 10
    assert sizes <= set(few)


class Looks:
    """What `decode` runs passes by: how many it lets run ahead, and how many there were to each look."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ahead: int) -> None:
        self.passes: list[int] = []
        step = Batch.step

        def counted(batch: Batch) -> list[int]:
            before = batch.forwards
            finished = step(batch)
            self.passes.append(batch.forwards - before)
            return finished

        monkeypatch.setattr(Batch, "step", counted)
        monkeypatch.setattr(importlib.import_module("dparallel_ext.decoding.decode"), "AHEAD", ahead)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 4),
    way=st.sampled_from(WAYS),
    most=st.integers(1, 6),
    temperature=st.sampled_from([0.0, 0.8]),
    alone=st.booleans(),
)
def test_passes_that_run_ahead_are_the_same(seed, count, way, most, temperature, alone) -> None:
    """Thresholds with a cap, the fixed schedule, quotas: as with a look after each pass."""
    name, cache = way
    model, g = MODELS[name, torch.float32], torch.Generator().manual_seed(seed)
    prompts = random_prompts(g, count)
    own: dict[str, Any] = {"gen_length": torch.randint(0, 40, (count,), generator=g).tolist()}
    kind = seed % 3
    if kind == 0:
        own |= {"selector": "confidence", "threshold": torch.rand(count, generator=g), "max_commit": most}
    elif kind == 1:
        quotas = torch.randint(1, 9, (count,), generator=g).tolist()
        own |= {"selector": "quota", "threshold": quotas, "max_commit": max(most, 2), "min_commit": 2}
    else:
        own |= {"gen_length": 32, "steps": 4 * (1 + seed % 5) if model.block_length is None else None}
    own |= {"cache": cache, "block_length": 8, "record": True, "temperature": temperature}
    ending = 5 if seed % 4 == 0 else -1  # with an end token every pass is looked at
    own |= {"batch_invariant": alone, "eos_id": ending, "seed": seed}
    found = []
    for ahead in (1, 3, 8):
        with pytest.MonkeyPatch.context() as patch:
            looks = Looks(patch, ahead)
            out = dx.decode(model, prompts, **own)
        fields = (out.sequences, out.nfe, out.nfe_published, out.kept, out.trajectory.step)
        found.append((out.forwards, *(field.tolist() for field in fields)))
        assert sum(looks.passes) == out.forwards
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    ("way", "passes"),
    [
        ({"steps": 8}, [4, 4]),
        ({"steps": 14}, [6, 1, 6, 1]),  # 3, 3, 2, ...: by 3 it would be 6
        ({"selector": "quota", "threshold": 3}, [6, 6]),
        ({"rule": "credit+quota:3"}, [6, 6]),
        ({"rule": "sched:9+quota:3"}, [1] * 12),  # it may fill all at any pass
        ({"threshold": 9.0, "max_commit": 5}, [4, 4]),  # 16 = 5 + 5 + 5 + 1
        (
            {"threshold": 0.0, "max_commit": 5},
            [4, 3, 2, 2, 1, 1, 1, 1, 1] * 2,
        ),  # 16, 12, 9, ... left
        ({"threshold": 0.0}, [1] * 32),
        ({}, [8, 8, 8, 8]),
    ],
)
def test_how_far_passes_run_ahead(monkeypatch, way: dict[str, Any], passes: list[int]) -> None:
    """To the pass that may complete a block, and at most 8 at once."""
    looks, model = Looks(monkeypatch, 8), MODELS["llada_tiny_a", torch.float32]
    out = dx.decode(model, torch.arange(5, 20), gen_length=32, block_length=16, cache="dual", **way)
    assert sum(looks.passes) == out.forwards
    assert looks.passes == passes
    each = dx.decode(
        model, torch.arange(5, 20), gen_length=32, block_length=16, cache="dual", eos_id=MASK - 1, **way
    )
    # An EOS may end it after any pass; this one is never committed.
    assert looks.passes[len(passes) :] == [1] * each.forwards
    assert torch.equal(each.sequences, out.sequences)


def test_a_pass_ahead_that_fails_undoes_those_before_it() -> None:
    """The row of the first such pass is named, whatever the later ones say."""
    calls = []

    def model(input_ids: Tensor) -> SimpleNamespace:
        calls.append(1)
        logits = torch.randn(*input_ids.shape, 32, generator=torch.Generator().manual_seed(len(calls)))
        logits[:, 5] = 0  # the last to be committed
        if len(calls) in (3, 4):
            logits[4 - len(calls), 5] = torch.nan  # of the second sequence, then of the first
        return SimpleNamespace(logits=logits.to(input_ids.device))

    decoding = importlib.import_module("dparallel_ext.decoding.decode")
    quota = dx.policies.make("quota", 1, batch=2)
    config = dx.DecodeConfig(policy=quota, gen_length=6, block_length=6, mask_id=31)
    batch = decoding.start_batch(model, [torch.tensor([1, 2])] * 2, config, ahead=4)
    before = batch.tokens.clone(), [vars(row).copy() for row in batch.sequences]
    with torch.inference_mode(), pytest.raises(ValueError, match="sequence 1 at position 5 holds NaN"):
        batch.step()
    assert len(calls) == 4
    assert torch.equal(batch.tokens, before[0])
    assert ([vars(row) for row in batch.sequences], batch.forwards) == (before[1], 0)
    with torch.inference_mode():
        batch.ahead = 99
        assert batch.step() == [0, 1]
    assert batch.forwards == 6


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_decode_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, way: tuple[str, str]) -> None:
    """Its cache is freed when it returns, not when the cycles of objects are next collected."""
    name, cache = way
    found: list[weakref.ref[KVCache]] = []
    init = KVCache.__init__

    def noted(self: KVCache, *args: Any, **settings: Any) -> None:
        init(self, *args, **settings)
        found.append(weakref.ref(self))

    monkeypatch.setattr(KVCache, "__init__", noted)
    gc.disable()
    try:
        dx.decode(MODELS[name, torch.bfloat16], torch.arange(9), gen_length=24, block_length=8, cache=cache)
        model_store.drop(MODELS[name, torch.bfloat16])  # what it keeps on a GPU for the next decode
        assert [cache() for cache in found] == [None]
    finally:
        gc.enable()
