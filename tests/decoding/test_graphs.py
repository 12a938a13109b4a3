"""Recorded passes give what passes give that run as they are; what a recording may not do is refused.

Without a GPU a `tape.Tape` stands in for CUDA graphs.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import GPUS, golden
from forms import a_form
from tape import PROMPTS, TINY, recordings
from test_infill import fast_dllm
from test_rules import Planner
from test_rules_that_edit import Backtrack, Revoke
from test_soft import Mixed
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext import cache as caches
from dparallel_ext import models
from dparallel_ext.decoding import batch as batches
from dparallel_ext.decoding import runner
from dparallel_ext.decoding.graphs import Graphs

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
        for _ in range(1 if device == "cpu" else 3):  # the last replays what the others have recorded
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
    ("llada_tiny_a", {"cache": "dual", "rule": "levenshtein:0.03,0.05,4,439,40", "suppress": [3, 77]}),
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
    ("sdar_tiny_a", {"cache": "block", "rule": "confidence:0.8", "block_length": 8, "draft_size": 3}),
    ("sdar_tiny_a", {"cache": "block", "block_length": 8, "draft_size": 2, "temperature": 0.7, "seed": 5}),
    ("llada_tiny_a", {"cache": "dual", "rule": "soft:0.05,0.9,6"}),
    ("sdar_tiny_a", {"cache": "block", "rule": "soft:0.05,0.9,6", "block_length": 8}),
    ("llada_tiny_a", {"cache": "dual", "rule": Mixed(likely=0.95), "active_blocks": 2}),
    ("sdar_tiny_a", {"cache": "block", "rule": Mixed(reads="block", edits=1), "block_length": 8}),
    ("llada_tiny_a", {"cache": "dual", "rule": Revoke()}),
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
    "whatever is not known": lambda ids: ids.unique_consecutive(),
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


@pytest.mark.parametrize("how", ["hook", "adapter", "policy", "policy beside a row"])
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
    else:

        def policy(stats: dx.RowStats, eligible: Tensor, step: Tensor) -> Tensor:
            calls.append(1)
            return torch.zeros_like(eligible)

        settings["policy"] = policy
    if how == "policy beside a row":
        own = {name: settings.pop(name) for name in ("gen_length", "policy")}
        with dx.Engine(model, lanes=2, max_length=64, **settings) as engine:
            handles = [engine.submit(PROMPTS[0], **each) for each in ({"gen_length": 32, "steps": 32}, own)]
            assert handles[1].result(60).nfe == len(calls) == 16
        return
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
