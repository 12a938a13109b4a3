"""Recorded passes give what passes give that run as they are; what a recording may not do is refused.

Without a GPU a `tape.Tape` stands in for CUDA graphs.
"""

from __future__ import annotations

import copy
import dataclasses
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
from dparallel_ext.models import attention, experts

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
    ("dream_tiny_a", {"cache": "prefix", "rule": Planner(64), "temperature": 0.7, "seed": 5}),
    ("sdar_tiny_a", {"cache": "block", "rule": Planner(64), "block_length": 8, "active_blocks": 2}),
    ("dream_tiny_a", {"cache": "none", "rule": "prophet:6", "temperature": 0.7, "seed": 5}),
    ("sdar_tiny_a", {"cache": "block", "rule": "sched:0.4,0.1,cosine", "block_length": 8}),
    ("llada_tiny_a", {"cache": "dual", "threshold": 2.0, "block_length": 8, "active_blocks": 3}),
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


@pytest.mark.parametrize("moved", [False, True])
def test_the_host_is_ready_for_the_next_pass(
    taped: list[Graphs], monkeypatch: pytest.MonkeyPatch, moved: bool
) -> None:
    """It has what a pass needs before it looks at the one before, also where that completes a block; not
    where pages moved."""
    late: list[int] = []
    numbers, prepare, step = inputs.InputPacker.pack, runner.Runner.prepare, batches.Batch.step
    preparing = False

    def counted(self: inputs.InputPacker, rows: Any, work: Any) -> Any:
        if not preparing:
            late.append(next(iter(work.values())).windows[0].start)
        return numbers(self, rows, work)

    def ahead(self: runner.Runner, rows: Any, work: Any) -> None:
        nonlocal preparing
        preparing = True
        prepare(self, rows, work)
        preparing = False

    def moving(self: batches.Batch, *args: Any, **settings: Any) -> list[int]:
        if moved and self.kv_cache is not None:
            self.kv_cache.assign(0, [0])
        return step(self, *args, **settings)

    monkeypatch.setattr(inputs.InputPacker, "pack", counted)
    monkeypatch.setattr(runner.Runner, "prepare", ahead)
    monkeypatch.setattr(batches.Batch, "step", moving)
    model = golden.model("llada_tiny_a")
    out = dx.decode(model, PROMPTS[0], gen_length=64, block_length=16, cache="dual", threshold=0.3)
    assert out.forwards > 12
    assert len(late) == out.forwards if moved else late == [len(PROMPTS[0])]


class Told:
    """What passes are told: that it is what they would be told if nothing had been prepared; and of the
    passes for which the device waits, the first after each look, how many the host was ready for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clear()
        methods = {name: getattr(runner.Runner, name) for name in ("run", "look", "_compute")}
        packs = inputs.InputPacker.pack
        expected: list[tuple[Tensor, inputs.GraphKey]] = []
        within = False

        def run(own: runner.Runner, rows: Any, work: Any) -> Tensor:
            nonlocal within
            expected[:] = [packs(own.packer, rows, work)]
            within = True
            result = methods["run"](own, rows, work)
            within = self.waits = False
            return result

        def pack(own: inputs.InputPacker, rows: Any, work: Any) -> tuple[Tensor, inputs.GraphKey]:
            self.late += within and self.waits
            self.prepared += not within
            return packs(own, rows, work)

        def look(own: runner.Runner, rows: Any, results: Any) -> Any:
            self.waits, self.looks = True, self.looks + 1
            return methods["look"](own, rows, results)

        def compute(own: runner.Runner, key: inputs.GraphKey, work: Any, told: Tensor) -> Tensor:
            assert torch.equal(told, expected[0][0])
            assert key == expected[0][1]
            return methods["_compute"](own, key, work, told)

        monkeypatch.setattr(padding, "runs_ahead", lambda device: True)
        for name, function in zip(methods, (run, look, compute), strict=True):
            monkeypatch.setattr(runner.Runner, name, function)
        monkeypatch.setattr(inputs.InputPacker, "pack", pack)

    def clear(self) -> None:
        self.looks = self.prepared = self.late = 0
        self.waits = True


@pytest.mark.parametrize("name", ["llada_tiny_a", "dream_tiny_a", "sdar_tiny_a"])
@pytest.mark.parametrize(
    "way",
    [
        {"selector": "quota", "threshold": 4},
        {"threshold": 2.0, "temperature": 0.7, "seed": 3},
        {"threshold": 2.0, "eos_id": 5},
        {"threshold": 2.0, "stop": [[7], [11, 12]]},
        {"threshold": 2.0, "active_blocks": 3},
        {"rule": "credit+confidence:0.03"},
        {"rule": "edit:0.03,0.05,4"},
        {"rule": "prophet:6"},
        {"threshold": 2.0, "sub_block_length": 4},
    ],
    ids=str,
)
def test_what_is_prepared_is_what_would_be_made(
    monkeypatch: pytest.MonkeyPatch, name: str, way: dict[str, Any]
) -> None:
    """Where a block is complete and where none is, in every cache mode, of one sequence and of several."""
    model, told = golden.model(name), Told(monkeypatch)
    caches = ("none", "block") if model.block_length else ("none", "prefix", "dual")
    settings: dict[str, Any] = {"gen_length": 24, "block_length": 8, **way}
    for cache in caches:
        told.clear()
        dx.decode(model, PROMPTS[0], cache=cache, **settings)
        assert told.prepared > 0
        assert told.late < told.looks or "active_blocks" in way
        dx.decode(model, PROMPTS, cache=cache, **settings)
    told.clear()
    with dx.Engine(model, lanes=2, max_length=80, block_length=8) as engine:
        own = {key: way[key] for key in way if key not in ("active_blocks", "sub_block_length", "steps")}
        handles = [engine.submit(p, gen_length=g, **own) for p in PROMPTS for g in (8, 24)]
        for handle in handles:
            handle.result(60)
    assert 0 < told.late < told.looks


@pytest.mark.parametrize(
    ("way", "prepared"),
    [
        ({"selector": "quota", "threshold": 4}, 3),  # for sure each block is complete after four passes
        ({"steps": 16}, 3),
        ({"selector": "quota", "threshold": 4, "eos_id": 5}, 15),
        ({"threshold": 0.0}, 63 + 45),  # one a pass, but it might be all; not so with one mask left
    ],
)
def test_a_block_begins_with_what_was_prepared(
    monkeypatch: pytest.MonkeyPatch, way: dict[str, Any], prepared: int
) -> None:
    model, told = golden.model("llada_tiny_a"), Told(monkeypatch)
    dx.decode(model, PROMPTS[0], gen_length=64, block_length=16, cache="dual", **way)
    assert (told.late, told.prepared) == (1, prepared)  # the very first pass


def test_blocks_begin_with_what_was_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several sequences, each in another block, and one after the other complete."""
    model, told = golden.model("llada_tiny_a"), Told(monkeypatch)
    settings: dict[str, Any] = {"gen_length": [64, 24, 7], "selector": "quota", "threshold": [4, 3, 2]}
    out = dx.decode(model, PROMPTS, block_length=16, cache="dual", **settings)
    assert out.nfe.tolist() == [16, 9, 4]
    assert (told.late, told.looks) == (1, told.prepared + 1)


def test_a_state_that_is_guessed_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model = golden.model("llada_tiny_a")
    settings: dict[str, Any] = {"gen_length": 64, "block_length": 16, "cache": "dual", "threshold": 2.0}
    expected = dx.decode(model, PROMPTS[0], **settings)
    told, opens = Told(monkeypatch), batches.Batch.open_front
    wrong: list[Callable[[Any], None]] = [
        lambda row: setattr(row, "nfe", row.nfe + 1),
        lambda row: setattr(row, "step_in_block", 1),
        lambda row: setattr(row, "open", (row.open[0]._replace(held=3), *row.open[1:])),
        lambda row: setattr(row, "open", (row.open[0]._replace(step=1), *row.open[1:])),
        lambda row: setattr(row, "settings", dataclasses.replace(row.settings, temperature=0.5)),
        lambda row: setattr(row, "layout", row.layout._replace(length=row.layout.length - 1)),
        lambda row: setattr(row, "suppress", torch.tensor([3])),
    ]
    for change in wrong:
        told.clear()

        def guessed(self: batches.Batch, row: Any, change: Any = change) -> None:
            opens(self, row)
            if all(row is not own for own in self.rows) and row.open:
                change(row)

        monkeypatch.setattr(batches.Batch, "open_front", guessed)
        out = dx.decode(model, PROMPTS[0], **settings)
        assert torch.equal(out.sequences, expected.sequences)
        assert torch.equal(out.nfe, expected.nfe)
        assert told.looks == out.forwards
        assert told.late == 4  # the first pass of each block


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


MIXTURES: list[tuple[str, dict[str, Any]]] = [
    ("sdar_moe", {"cache": "block"}),
    ("sdar_moe", {"cache": "none", "temperature": 0.7, "seed": 5}),
    ("lladamoe", {"cache": "none"}),
    ("lladamoe", {"cache": "dual", "rule": "credit+entropy:3.5"}),
    ("lladamoe", {"cache": "dual", "draft_size": 3}),
    ("llada2_moe", {"cache": "block", "rule": "edit:0.03,0.03"}),
    ("llada2_moe", {"cache": "block", "threshold": 3.0}),
    ("qwen3_moe", {}),
    ("qwen3_moe", {"drafter": "ngram", "draft_size": 4}),
]


def text_of(model: models.Model, prompts: list[Tensor], way: dict[str, Any], **settings: Any) -> Tensor:
    if model.causal:
        return dx.speculate(model, prompts, gen_length=24, eos_id=-1, **way, **settings).sequences
    return dx.decode(model, prompts, gen_length=24, block_length=8, **way, **settings).sequences


@pytest.mark.parametrize(("family", "way"), MIXTURES)
def test_experts_are_chosen_in_replays(
    taped: list[Graphs], monkeypatch: pytest.MonkeyPatch, family: str, way: dict[str, Any]
) -> None:
    """Each token's, of other prompts too than those whose passes were recorded."""
    model, forward = drafters.model_of(family), experts.Router.forward
    taken: list[list[Tensor]] = []
    expected = []

    def seen(self: experts.Router, x: Tensor) -> tuple[Tensor, Tensor]:
        share, chosen = forward(self, x)
        taken[-1].append(chosen)
        return share, chosen

    texts = PROMPTS, [prompt.flip(0) % 50 + 7 for prompt in PROMPTS]
    with monkeypatch.context() as patched:
        patched.setattr(experts.Router, "forward", seen)
        for prompts in texts:
            taken.append([])
            expected.append(text_of(model, prompts, way, graphs=False))
    assert not torch.equal(taken[0][0], taken[1][0])
    assert not taped
    for prompts, tokens in zip(texts, expected, strict=True):
        before = sum(graphs.replays for graphs in taped)
        assert torch.equal(text_of(model, prompts, way), tokens)
        assert sum(graphs.replays for graphs in taped) >= before + 2
    assert all(graphs.recorder is not None for graphs in taped), "a recording failed"


@pytest.mark.parametrize("device", GPUS, indirect=True)
@pytest.mark.parametrize(("family", "way"), MIXTURES)
def test_a_gpu_records_mixtures_of_experts(
    device: str, family: str, way: dict[str, Any], seen_graphs: list[Graphs]
) -> None:
    """Where one product serves all experts and asks the host for nothing."""
    for dtype in (torch.bfloat16, torch.float32):
        model = drafters.model_of(family).to(device, dtype)
        prompts = [each.to(device) for each in PROMPTS]
        expected = text_of(model, prompts, way, graphs=False)
        for _ in range(2):
            assert torch.equal(text_of(model, prompts, way), expected)
        assert all(graphs.recorder is not None for graphs in seen_graphs), "a recording failed"
        replays = sum(graphs.replays for graphs in seen_graphs)
        can = dtype == torch.bfloat16 and torch.cuda.get_device_capability()[0] in (9, 10)
        assert (replays >= 2) if can else (replays == 0)
        seen_graphs.clear()


@pytest.mark.parametrize("family", ["sdar_moe", "qwen3_moe"])
def test_an_engine_replays_mixtures_of_experts(taped: list[Graphs], family: str) -> None:
    model = drafters.model_of(family)
    size: dict[str, Any] = {"lanes": 2, "max_length": 80, "page_size": 8}
    size |= {"drafter": "ngram", "draft_size": 4} if model.causal else {}
    prompts = PROMPTS * 2
    found = []
    for graphs in (False, True):
        with dx.Engine(model, graphs=graphs, **size) as engine:
            handles = [engine.submit(prompt, gen_length=24, eos_id=-1) for prompt in prompts]
            found.append([handle.result(60).tokens for handle in handles])
    assert found[0] == found[1]
    (graphs_seen,) = taped
    assert graphs_seen.recorder is not None, "a recording failed"
    assert graphs_seen.replays > 10


@pytest.mark.parametrize("why", ["expert by expert", "another GPU"])
@pytest.mark.parametrize(("family", "way"), [MIXTURES[0], MIXTURES[3], MIXTURES[-1]])
def test_experts_for_which_the_host_waits_are_not_recorded(
    taped: list[Graphs],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    why: str,
    family: str,
    way: dict[str, Any],
) -> None:
    """Nor is it tried: their passes run as they are."""
    if why == "expert by expert":
        monkeypatch.setattr(experts, "by_one_product", lambda sizes, like: False)
    else:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 6))
    model = drafters.model_of(family)
    assert padding.recorded_rows(model) == 0
    expected = text_of(model, PROMPTS, way, graphs=False)
    for _ in range(2):
        assert torch.equal(text_of(model, PROMPTS, way), expected)
    assert taped
    assert all(graphs.small == graphs.replays == len(graphs.recordings) == 0 for graphs in taped)  # type: ignore[attr-defined]
    assert not caplog.text


def test_a_recording_of_experts_one_by_one_fails(
    taped: list[Graphs], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The tape tells what the tests above would not: a number that a recording may not read."""
    model = drafters.model_of("sdar_moe")
    monkeypatch.setattr(experts.Experts, "grouped", experts.Experts.one_by_one)
    expected = text_of(model, PROMPTS, {"cache": "block"}, graphs=False)
    assert torch.equal(text_of(model, PROMPTS, {"cache": "block"}), expected)
    assert "tolist" in caplog.text
    assert taped[0].recorder is None


CHANGES: dict[str, Callable[[models.Model], object]] = {
    "a router": lambda model: setattr(
        model.blocks[1].router, "weight", torch.nn.Parameter(model.blocks[1].router.weight.flip(0))
    ),
    "experts": lambda model: setattr(
        model.blocks[2].experts, "down_proj", torch.nn.Parameter(model.blocks[2].experts.down_proj.flip(0))
    ),
    "a shared expert": lambda model: setattr(
        model.blocks[1].shared.up_proj.weight, "data", model.blocks[1].shared.up_proj.weight.flip(0)
    ),
    "a bias": lambda model: setattr(
        model.blocks[2].router, "expert_bias", model.blocks[2].router.expert_bias.flip(0)
    ),
    "fused": lambda model: model.fuse(),
    "experts in place": lambda model: model.blocks[2].experts.gate_up_proj.neg_(),
    "a bias in place": lambda model: model.blocks[1].router.expert_bias.copy_(torch.arange(8) % 3),
    "a hook": lambda model: model.blocks[1].router.register_forward_hook(
        lambda module, x, out: (out[0], out[1].flip(-1))
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_experts_that_changed_are_seen(taped: list[Graphs], change: str) -> None:
    """What lies elsewhere is recorded again, what changed in place is read, and a hook runs."""
    model, way = drafters.model_of("llada2_moe"), {"cache": "block"}
    first = text_of(model, PROMPTS, way)
    (graphs,) = taped
    before, replays = [found for found in graphs.recordings.values() if found is not None], graphs.replays
    assert before
    assert replays
    CHANGES[change](model)
    second = text_of(model, PROMPTS, way)
    assert torch.equal(second, text_of(model, PROMPTS, way, graphs=False))
    assert torch.equal(first, second) == (change == "fused")
    assert taped == [graphs]
    left = [found for found in before if any(found is other for other in graphs.recordings.values())]
    assert len(left) == (len(before) if "in place" in change else 0)
    assert (graphs.replays == replays) == (change == "a hook")


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


def test_of_experts_those_that_a_token_takes_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of SDAR-30B-A3B's layer, eight of 128."""
    monkeypatch.setattr(models.Model, "waits", False)
    sizes = {"hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128}
    moe = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
    with torch.device("meta"):
        found = [
            padding.recorded_rows(
                models.SDARMoE({**TINY["sdar"], **sizes, **moe, "intermediate_size": width})
            )
            for width in (768, 6144)
        ]
        dense = padding.recorded_rows(models.SDAR({**TINY["sdar"], **sizes, "intermediate_size": 6144}))
    assert found == [dense, dense]


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


@pytest.mark.parametrize("family", ["sdar_moe", "llada2_moe"])
def test_the_kernels_of_a_layer_with_experts(
    taped: list[Graphs], monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Attention as above, a router, its pairs in order, two products, and a sum; LLaDA2's router has groups,
    and beside the experts is one that is shared."""

    def model_of(layers: int) -> models.Model:
        sparse = {"mlp_only_layers": [], "first_k_dense_replace": 0}
        return drafters.model_of(family, num_hidden_layers=layers, **sparse)

    layer, _ = kernels_of(monkeypatch, model_of, "block")
    expected = Counter(rms_norm=2, linear=3, kv_write=1, block_attention=1)
    expected += Counter(sort=1, arange=1, searchsorted=1, floor_divide=1, index=1)
    expected += Counter({"_grouped_mm": 2, "swiglu": 1, "index_copy_": 1, "mul": 1, "sum": 1})
    if family == "sdar_moe":
        expected += Counter(softmax=1, topk=1, sum=1, div=1, to=1)
        assert layer.total() == 23
    else:
        expected += Counter(to=2, sigmoid=1, add=1)
        expected += Counter(topk=3, sum=1, ones=1, scatter_=1, masked_fill=1)
        expected += Counter(gather=1, sum=1, add=1, div=1, mul=1)
        expected += Counter(linear=2, swiglu=1, add=1, to=1)
        assert layer.total() == 39
    assert layer == expected


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
