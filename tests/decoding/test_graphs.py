"""Recorded passes give what passes give that run as they are; what a recording may not do is refused.

Without a GPU a `tape.Tape` stands in for CUDA graphs.
"""

from __future__ import annotations

import copy
import functools
import importlib
import logging
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import drafters
import pytest
import torch
from conftest import GPUS, golden
from forms import a_form
from tape import PROMPTS, TINY, TapeGraph, kernels, prompt, recordings, tiny
from test_infill import fast_dllm
from test_rules import Backtrack, Planner
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext import cache as caches
from dparallel_ext import models
from dparallel_ext.decoding import batch as batches
from dparallel_ext.decoding import inputs, padding, runner
from dparallel_ext.decoding.graphs import Graphs
from dparallel_ext.engine.core import EngineCore
from dparallel_ext.models import attention

pytest_plugins = ["taping"]


@pytest.mark.parametrize("name", ["llada_tiny_a", "sdar_tiny_a"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_the_device(device: str, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA graphs where there is a GPU; on the CPU nothing is recorded."""
    made: list[runner.Runner] = []

    class Kept(runner.Runner):
        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **settings)
            made.append(self)

    monkeypatch.setattr(batches, "Runner", Kept)
    model = golden.model(name, dtype=dtype, device=device)
    settings: dict[str, Any] = {"gen_length": 64, "threshold": 1.0}
    settings |= {"cache": "block"} if model.block_length else {"cache": "dual", "block_length": 16}
    prompts = [prompt.to(device) for prompt in PROMPTS]
    for way in ({}, {"temperature": 0.8, "seed": 3}, {"suppress": [5, 9]}):
        plain = dx.decode(model, prompts, graphs=False, **way, **settings)
        replayed = dx.decode(model, prompts, **way, **settings)
        assert torch.equal(plain.sequences, replayed.sequences)
        assert torch.equal(plain.nfe, replayed.nfe)
        found = made[-1].graphs
        if device == "cpu":
            assert found is None
        else:
            assert found is not None
            assert found.recorder is not None, "a recording failed"
            assert found.replays > 0
            assert recordings(found) > 0


@pytest.mark.parametrize("how", ["apart", "fused", "in 8 bits"])
@torch.no_grad()
def test_products_of_few_rows_on_the_device(device: str, how: str) -> None:
    """Of widths that a GPU's own kernels take, which begin while the kernels before them run."""
    torch.manual_seed(0)
    sizes = {"d_model": 192, "n_heads": 3, "mlp_hidden_size": 320, "n_layers": 3}
    exact = models.LLaDA({**TINY["llada"], **sizes}).eval()
    model = copy.deepcopy(exact).to(device, torch.bfloat16)
    if how != "apart":
        model.fuse()
    if how == "in 8 bits":
        model.quantize()
    for rows in (1, 19, 33, 64):
        ids, kv_cache = torch.randint(0, 59, (rows,)), model.new_cache(1, 64)
        metadata = kv_cache.metadata([caches.Span(0, 0, rows, rows)], None).to(device)
        found = model.head(model.step(ids, kv_cache, metadata)).float().cpu()
        expected = exact(ids.cpu()[None]).logits[0]
        assert (found - expected).norm() < (0.1 if how == "in 8 bits" else 0.03) * expected.norm()
    prompts = [each.to(device) for each in PROMPTS[:2]]
    for way in ({"cache": "dual"}, {"cache": "none", "active_blocks": 2}):
        settings: dict[str, Any] = {"gen_length": 16, "block_length": 8, "threshold": 2.0, **way}
        plain = dx.decode(model, prompts, graphs=False, **settings)
        for _ in range(3 if device == "cuda" else 1):  # the last replays what the others have recorded
            replayed = dx.decode(model, prompts, **settings)
            assert torch.equal(replayed.sequences, plain.sequences)
            assert torch.equal(replayed.nfe, plain.nfe)


WAYS: list[tuple[str, dict[str, Any]]] = [
    ("llada_tiny_a", {"cache": "none", "threshold": 2.0}),
    ("llada_tiny_a", {"cache": "prefix", "threshold": 0.2, "selector": "confidence"}),
    ("llada_tiny_a", {"cache": "dual", "steps": 12}),
    ("llada_tiny_a", {"cache": "dual", "threshold": 3.0, "refresh": 3, "batch_invariant": True}),
    ("llada_tiny_a", {"cache": "dual", "threshold": [0.5, 2.0, 4.0], "temperature": 0.7, "seed": 5}),
    ("llada_tiny_a", {"cache": "dual", "threshold": 0.1, "suppress": [3, 77], "gen_length": [48, 20, 5]}),
    (
        "llada_tiny_a",
        {"cache": "dual", "steps": 12, "temperature": 0.9, "seed": 5, "top_p": 0.8, "top_k": 60},
    ),
    ("llada_tiny_a", {"cache": "none", "rule": "credit+entropy:3.5"}),
    ("llada_tiny_a", {"cache": "dual", "rule": "credit+confidence:0.04", "suppress": range(3, 40)}),
    ("llada_tiny_a", {"cache": "prefix", "rule": "sched:0.4,0.1", "steps": 24}),
    ("llada_tiny_a", {"cache": "dual", "rule": "edit:0.03,0.05,4"}),
    ("sdar_tiny_a", {"cache": "block", "rule": "edit:0.03,0.03", "block_length": 8}),
    ("llada_tiny_a", {"cache": "dual", "rule": Backtrack(0.03, 0.03, 2)}),
    ("sdar_tiny_a", {"cache": "block", "rule": Backtrack(0.03, 0.03, 2), "block_length": 8}),
    ("llada_tiny_a", {"cache": "dual", "rule": Planner(64, -1.0)}),
    ("llada_tiny_a", {"cache": "dual", "threshold": 0.02, "selector": "confidence", "automaton": a_form(3)}),
    ("dream_tiny_a", {"cache": "prefix", "automaton": a_form(1), "suppress": [20, 30], "block_length": 8}),
    ("sdar_tiny_a", {"cache": "block", "threshold": 4.5, "automaton": a_form(2), "block_length": 8}),
    ("dream_tiny_a", {"cache": "prefix", "rule": Planner(64), "temperature": 0.7, "seed": 5}),
    ("sdar_tiny_a", {"cache": "block", "rule": Planner(64), "block_length": 8, "active_blocks": 2}),
    ("dream_tiny_a", {"cache": "none", "rule": "prophet:6", "temperature": 0.7, "seed": 5}),
    ("sdar_tiny_a", {"cache": "block", "rule": "sched:0.4,0.1,cosine", "block_length": 8}),
    ("llada_tiny_a", {"cache": "dual", "threshold": 2.0, "block_length": 8, "active_blocks": 3}),
    ("llada_tiny_a", {"cache": "dual", "rule": "distance:3,0.1", "block_length": 8, "active_blocks": 2}),
    ("llada_tiny_a", {"cache": "dual", "rule": "leading+entropy:4", "block_length": 8, "active_blocks": 2}),
    (
        "llada_tiny_a",
        {"cache": "none", "rule": "credit+confidence:0.03", "block_length": 8, "active_blocks": 2},
    ),
    ("sdar_tiny_a", {"cache": "block", "threshold": 3.0, "block_length": 8, "active_blocks": 2}),
    ("dream_tiny_a", {"cache": "none", "threshold": 2.0}),
    ("dream_tiny_a", {"cache": "dual", "threshold": 2.0}),
    ("sdar_tiny_a", {"cache": "block", "threshold": 2.0, "block_length": 8}),
    ("sdar_tiny_a", {"cache": "block", "threshold": 2.0, "block_length": 8, "sub_block_length": 4}),
    ("llada_tiny_a", {"cache": "none", "draft_size": 3}),
    ("llada_tiny_a", {"cache": "dual", "draft_size": 3, "block_length": 12}),
    ("sdar_tiny_a", {"cache": "block", "block_length": 8, "draft_size": 2, "temperature": 0.7, "seed": 5}),
]


@pytest.mark.parametrize(
    ("name", "way", "dtype"),
    [(*way, torch.float32) for way in WAYS] + [(*way, torch.bfloat16) for way in WAYS[::4]],
)
def test_the_tokens_are_the_same(
    taped: list[Graphs], name: str, way: dict[str, Any], dtype: torch.dtype
) -> None:
    model = golden.model(name, dtype=dtype)
    settings = {"gen_length": 48, "block_length": 16, **way}
    expected = dx.decode(model, PROMPTS, graphs=False, record=True, logprobs=True, **settings)
    assert not taped
    out = dx.decode(model, PROMPTS, record=True, logprobs=True, **settings)
    assert torch.equal(out.sequences, expected.sequences)
    assert torch.equal(out.nfe, expected.nfe)
    assert out.trajectory is not None
    assert torch.equal(out.trajectory.step, expected.trajectory.step)
    assert torch.equal(out.logprobs.nan_to_num(7.0), expected.logprobs.nan_to_num(7.0))
    (graphs,) = taped
    assert graphs.recorder is not None, "a recording failed"
    assert graphs.replays >= 2, f"{graphs.replays} replays in {out.forwards} passes"
    assert len(graphs.recordings) <= out.forwards - graphs.replays


@pytest.mark.parametrize("device", GPUS, indirect=True)
@pytest.mark.parametrize(("name", "way"), WAYS)
def test_a_gpu_records_every_way(
    device: str, name: str, way: dict[str, Any], seen_graphs: list[Graphs]
) -> None:
    """Rules, too. The second decode replays what the first has recorded."""
    model, prompts = golden.model(name, device=device), [each.to(device) for each in PROMPTS]
    settings = {"gen_length": 48, "block_length": 16, **way}
    expected = dx.decode(model, prompts, graphs=False, **settings)
    for _ in range(2):
        out = dx.decode(model, prompts, **settings)
        assert torch.equal(out.sequences, expected.sequences)
        assert torch.equal(out.nfe, expected.nfe)
    assert seen_graphs
    assert all(graphs.recorder is not None for graphs in seen_graphs), "a recording failed"
    assert sum(graphs.replays for graphs in seen_graphs) >= 2


@pytest.mark.parametrize(
    ("name", "cache"), [("llada_tiny_a", "dual"), ("dream_tiny_a", "prefix"), ("sdar_tiny_a", "block")]
)
def test_infill_replays(taped: list[Graphs], name: str, cache: str) -> None:
    """Masks between given tokens are numbers of a pass, not part of its form."""
    prompts = [torch.arange(3, 60), torch.arange(1, 43)]
    for given, gaps in zip(prompts, (((7, 29), (40, 52)), ((0, 20), (23, 24))), strict=True):
        for start, end in gaps:
            given[start:end] = 511
    settings: dict[str, Any] = {"gen_length": 12, "infill": True, "cache": cache, "block_length": 8}
    model = golden.model(name)
    expected = dx.decode(model, prompts, graphs=False, **settings)
    out = dx.decode(model, prompts, **settings)
    assert torch.equal(out.sequences, expected.sequences)
    assert torch.equal(out.nfe, expected.nfe)
    assert taped[0].recorder is not None, "a recording failed"
    assert taped[0].replays > out.forwards / 2


@pytest.mark.parametrize("cache", ["none", "block"])
def test_passes_that_hand_over_are_followed(taped: list[Graphs], cache: str) -> None:
    """Fast-dLLM v2 (block-causal, shifted): what follows such a pass is not known before it has run."""
    model = fast_dllm()
    settings: dict[str, Any] = {"gen_length": 48, "cache": cache, "block_length": 8, "threshold": 2.0}
    expected = dx.decode(model, PROMPTS, graphs=False, **settings)
    out = dx.decode(model, PROMPTS, **settings)
    assert torch.equal(out.sequences, expected.sequences)
    assert torch.equal(out.nfe, expected.nfe)
    assert taped[0].replays > 0


def test_a_form_met_three_times_runs_once(taped: list[Graphs]) -> None:
    """One sequence, dual cache: the full passes take one form and the passes over a block another."""
    model = golden.model("llada_tiny_a")
    out = dx.decode(model, PROMPTS[0], gen_length=128, block_length=16, cache="dual", steps=64)
    (graphs,) = taped
    assert len(graphs.recordings) == 2
    assert graphs.replays == out.forwards - 2
    assert recordings(graphs) == 2


def test_an_engine_replays(taped: list[Graphs]) -> None:
    model = golden.model("sdar_tiny_a")
    alone = [
        dx.decode(model, p, gen_length=24, cache="block", threshold=t, graphs=False).responses[0].tolist()
        for p in PROMPTS
        for t in (1.0, 3.0)
    ]
    with dx.Engine(model, lanes=2, max_length=64) as engine:
        handles = [engine.submit(p, gen_length=24, threshold=t) for p in PROMPTS for t in (1.0, 3.0)]
        tokens = [h.result(60).tokens for h in handles]
    for found, expected in zip(tokens, alone, strict=True):
        assert found == expected[:24]
    assert taped[0].replays > 10


def test_a_bad_row_is_named_from_a_replay(taped: list[Graphs]) -> None:
    model = golden.model("llada_tiny_a")
    settings: dict[str, Any] = {"gen_length": 32, "block_length": 16, "cache": "dual", "steps": 32}
    poisoned = iter(range(10))

    def progress(draft: Tensor) -> None:
        if next(poisoned) == 5:
            assert taped[0].replays
            model.norm.weight.data.fill_(torch.nan)

    class Streamer:
        def put(self, tokens: Tensor) -> None:
            pass

        def end(self) -> None:
            pass

        put_draft = staticmethod(progress)

    with pytest.raises(ValueError, match=r"logits: sequence 0 at position 1\d holds NaN"):
        dx.decode(model, PROMPTS[0], streamer=Streamer(), **settings)


WAITS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda ids: int(ids[0]),
    "tolist": lambda ids: ids.tolist(),
    "cpu": lambda ids: ids.cpu(),
    "numpy": lambda ids: ids.numpy(),
    "bincount": lambda ids: ids.bincount(),
    "nonzero": lambda ids: ids.nonzero(),
    "where": lambda ids: torch.where(ids > 3),
    "mask": lambda ids: ids[ids > 3],
    "repeats": lambda ids: ids.repeat_interleave(ids % 2),
}


@pytest.mark.parametrize("waits", WAITS)
def test_what_cannot_be_recorded_runs_as_it_is(
    taped: list[Graphs], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, waits: str
) -> None:
    """A pass that reads numbers of the device, in whichever way."""
    model = golden.model("llada_tiny_a")
    settings: dict[str, Any] = {"gen_length": 32, "block_length": 16, "cache": "dual", "steps": 16}
    expected = dx.decode(model, PROMPTS, graphs=False, **settings)
    step = models.Model.step

    def waiting(self: models.Model, ids: Tensor, cache: Any, metadata: Any) -> Tensor:
        WAITS[waits](ids)
        return step(self, ids, cache, metadata)

    monkeypatch.setattr(models.Model, "step", waiting)
    with caplog.at_level(logging.WARNING):
        out = dx.decode(model, PROMPTS, **settings)
    assert torch.equal(out.sequences, expected.sequences)
    assert "could not be recorded" in caplog.text
    assert "not permitted while recording" in caplog.text
    assert taped[0].recorder is None
    assert taped[0].replays == 0


@pytest.mark.parametrize("how", ["hook", "adapter", "policy"])
def test_what_python_has_to_see_is_not_recorded(taped: list[Graphs], how: str) -> None:
    model, calls = golden.model("llada_tiny_a"), []
    settings: dict[str, Any] = {"gen_length": 16, "block_length": 16, "cache": "dual"}
    if how == "hook":
        model.blocks[1].o.register_forward_hook(lambda *_: calls.append(1))
    elif how == "adapter":

        class Adapted(torch.nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                calls.append(1)
                return super().forward(x)

        model.lm_head.__class__ = Adapted
    elif how == "policy":

        def policy(stats: dx.RowStats, eligible: Tensor, step: Tensor) -> Tensor:
            calls.append(1)
            return torch.zeros_like(eligible)

        settings["policy"] = policy
    out = dx.decode(model, PROMPTS[0], **settings)
    assert out.forwards == len(calls) == 16
    assert taped[0].replays == 0


def test_weights_that_moved_are_seen(taped: list[Graphs]) -> None:
    """An engine records again where the model lies elsewhere than when its passes were recorded."""
    model = golden.model("llada_tiny_a")
    with dx.Engine(model, lanes=1, max_length=64, cache="dual", block_length=16) as engine:
        first = engine.submit(PROMPTS[0], gen_length=32).result(60).tokens
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.data = torch.zeros_like(parameter)
        changed = engine.submit(PROMPTS[0], gen_length=32).result(60).tokens
    assert taped[0].recorder is not None, "a recording failed"
    assert taped[0].replays > 40
    assert first != changed
    assert set(changed) == {0}


ROWS_8B = 630
"""That a model of 8B parameters has in the largest pass that is recorded."""


def test_what_is_recorded_is_what_hides_no_launches() -> None:
    """Rows up to which a pass of LLaDA-8B, and of a model of 1.7B, is recorded."""
    llada = {**TINY["llada"], "d_model": 4096, "n_heads": 32, "mlp_hidden_size": 12288}
    qwen = {"hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 8}
    sdar = {**TINY["sdar"], **qwen, "head_dim": 128, "intermediate_size": 6144}
    with torch.device("meta"):
        assert padding.recorded_rows(models.LLaDA(llada)) == ROWS_8B
        assert padding.recorded_rows(models.SDAR(sdar)) > 2500
    assert padding.recorded_rows(torch.nn.Linear(1, 1)) == 0


@pytest.mark.parametrize(("name", "share"), [("llada", 0.85), ("sdar", 0.8)])
def test_most_passes_of_a_sequence_are_replayed(taped: list[Graphs], name: str, share: float) -> None:
    """256 tokens, 8 a pass, the first time that they are decoded, and the second."""
    model, cache = tiny(name), {"llada": "dual", "sdar": "block"}[name]
    settings: dict[str, Any] = {"gen_length": 256, "cache": cache, "selector": "quota", "threshold": 8}
    out = dx.decode(model, prompt(256), **settings)
    (graphs,) = taped
    assert out.forwards == 32
    assert graphs.replays >= share * 32
    dx.decode(model, prompt(256), **settings)
    assert taped == [graphs]
    assert graphs.replays >= share * 32 + 32 - (name == "sdar")


@pytest.mark.parametrize("rows", [None, ROWS_8B])
@pytest.mark.parametrize(("name", "share"), [("llada", 0.5), ("sdar", 0.6)])
@pytest.mark.parametrize("varlen", [False, True])
def test_most_passes_of_an_engine_are_replayed(
    taped: list[Graphs],
    monkeypatch: pytest.MonkeyPatch,
    rows: int | None,
    name: str,
    share: float,
    varlen: bool,
) -> None:
    """64 requests of all lengths in 16 lanes; of a model whose every pass is recorded, and of a large one;
    also where long sequences attend to themselves, as on a GPU."""
    monkeypatch.setattr(caches, "has_varlen", lambda like: varlen)
    monkeypatch.setattr(attention, "varlen_attention", lambda q, *args, **settings: q.clone())
    if rows is not None:
        monkeypatch.setattr(padding, "recorded_rows", lambda model: rows)
        share = 0.55
    drawn = torch.Generator().manual_seed(2)
    all_there = threading.Event()
    work = EngineCore.work

    def waits(self: EngineCore) -> bool:
        all_there.wait()
        return work(self)

    monkeypatch.setattr(EngineCore, "work", waits)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=drawn))

    settings: dict[str, Any] = {"block_length": 32, "lanes": 16, "max_length": 768}
    with dx.Engine(tiny(name), share=False, **settings) as engine:
        handles = [
            engine.submit(
                prompt(number(32, 512)),
                gen_length=32 * number(1, 8),
                selector="quota",
                threshold=float(number(4, 12)),
            )
            for _ in range(64)
        ]
        all_there.set()
        for handle in handles:
            handle.result(60)
        forwards = engine.stats.forwards
    (graphs,) = taped
    assert graphs.recorder is not None, "a recording failed"
    assert (graphs.small == forwards) == (rows is None)
    assert graphs.replays >= share * graphs.small, f"{graphs.replays} of {graphs.small} of {forwards}"


@pytest.mark.parametrize(("name", "cache"), [("llada_tiny_a", "dual"), ("sdar_tiny_a", "block")])
def test_lanes_that_fill_up_a_pass_change_nothing(
    taped: list[Graphs], monkeypatch: pytest.MonkeyPatch, name: str, cache: str
) -> None:
    """Idle lanes among those that decode, whose windows' logits are computed for nothing."""
    model, size = golden.model(name), {"llada_tiny_a": 16, "sdar_tiny_a": 8}[name]
    prompts = [torch.arange(3, 8 + lane) for lane in range(14)]
    lengths = [size * (1 + lane % 4) for lane in range(14)]
    settings: dict[str, Any] = {"cache": cache, "block_length": size, "threshold": 1.0, "record": True}
    beside, idle = inputs.InputPacker.beside_of, []

    def seen(self: inputs.InputPacker, *args: Any) -> set[int]:
        idle.append(beside(self, *args))
        return idle[-1]

    monkeypatch.setattr(inputs.InputPacker, "beside_of", seen)
    out = dx.decode(model, prompts, gen_length=lengths, **settings)
    assert any(lanes for lanes in idle)
    assert taped[0].replays > 0
    monkeypatch.setattr(padding, "runs_ahead", lambda device: False)
    expected = dx.decode(model, prompts, gen_length=lengths, graphs=False, **settings)
    assert torch.equal(out.sequences, expected.sequences)
    assert torch.equal(out.nfe, expected.nfe)
    assert out.trajectory is not None
    assert expected.trajectory is not None
    assert torch.equal(out.trajectory.step, expected.trajectory.step)
    torch.testing.assert_close(out.trajectory.confidence, expected.trajectory.confidence, equal_nan=True)


def kernels_of(
    monkeypatch: pytest.MonkeyPatch, model_of: Callable[[int], models.Model], cache: str
) -> tuple[Counter[str], Counter[str]]:
    """The kernels of a layer in a pass over a block, and those beside the layers. model_of: makes a model of
    so many layers."""
    graphs: list[Any] = []

    class Kept(TapeGraph):
        def capture_end(self) -> None:
            super().capture_end()
            graphs.append(self)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Kept)
    found = []
    for layers in (1, 2):
        model = model_of(layers).to(torch.bfloat16).fuse()
        dx.decode(model, prompt(32), gen_length=64, cache=cache, selector="quota", threshold=8)
        found.append(kernels(graphs[-1].tape))
    layer = found[1] - found[0]
    return layer, found[0] - layer


@pytest.mark.parametrize(("name", "cache"), [("llada", "dual"), ("sdar", "block")])
@pytest.mark.parametrize("fused", [False, True])
def test_the_kernels_of_a_pass(
    taped: list[Graphs], monkeypatch: pytest.MonkeyPatch, name: str, cache: str, fused: bool
) -> None:
    """Of a block: so many launches for each layer, norms of heads or not, and eight beside; seven, or eight,
    where products end in more."""
    for op in ("linear_swiglu", "linear_kv_write"):
        module = importlib.import_module(f"dparallel_ext.ops.{op}")
        monkeypatch.setattr(module, "ends_in_more", lambda *_: fused)
    layer, beside = kernels_of(monkeypatch, functools.partial(tiny, name), cache)
    linear = {"linear": 4, "kv_write": 1, "swiglu": 1}
    if fused:
        linear = {"linear": 2, "linear_kv_write": 1, "linear_swiglu": 1}
        if name == "sdar":
            linear = {"linear": 3, "kv_write": 1, "linear_swiglu": 1}
    assert layer == {**linear, "rms_norm": 2, "block_attention": 1}
    assert layer.total() == (9 if not fused else 8 if name == "sdar" else 7)
    assert beside == {
        **{"index": 2, "embedding": 1, "rms_norm": 1, "linear": 1},
        **{"unmask_": 1, "commit_": 1, "cat": 1},
    }


@pytest.mark.parametrize("drafter", [None, "ngram", "chains", "trees"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_passes_over_drafts_are_replayed(taped: list[Graphs], drafter: Any, temperature: float) -> None:
    """Of an autoregressive model, in `speculate` and in an engine, whose pages change: one form for the sizes
    of draft that are alike."""
    model = drafters.model_of()
    settings: dict[str, Any] = {"gen_length": 40, "temperature": temperature, "seed": [4, 5, 6], "eos_id": -1}
    expected = dx.speculate(model, PROMPTS, graphs=False, **settings)
    texts = [text[: int(length)] for text, length in zip(expected.sequences, expected.lengths, strict=True)]
    if drafter in ("chains", "trees"):
        drafter = drafters.Knowing(texts, tree=drafter == "trees", right=0.7)
    assert not taped
    out = dx.speculate(model, PROMPTS, drafter=drafter, draft_size=4, **settings)
    assert torch.equal(out.sequences, expected.sequences)
    size = {"lanes": 2, "max_length": 80, "page_size": 8, "drafter": drafter, "draft_size": 4}
    with dx.Engine(model, **size) as engine:
        asked = list(zip(PROMPTS, settings.pop("seed"), strict=True)) * 2
        handles = [engine.submit(ids, **{**settings, "seed": seed}) for ids, seed in asked]
        found = [handle.result(60).tokens for handle in handles]
    assert found == [response.tolist() for response in expected.responses] * 2
    assert sum(handle.result().reused for handle in handles) > 0
    for graphs, forwards in zip(taped, (out.forwards, engine.stats.forwards), strict=True):
        assert graphs.recorder is not None, "a recording failed"
        assert graphs.replays > forwards / 4, f"{graphs.replays} of {forwards}"
