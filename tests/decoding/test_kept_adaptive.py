"""Recorded passes of adaptive decoding, and what its calls keep for the next ones."""

from __future__ import annotations

import copy
import gc
import random
import threading
import weakref
from pathlib import Path
from typing import Any

import drafters
import pytest
import torch
from conftest import GPUS, golden
from tape import PROMPTS
from test_kept_speculation import lost
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext import model_store, models
from dparallel_ext.cache import bucket
from dparallel_ext.decoding import padding
from dparallel_ext.decoding.graphs import Graphs
from dparallel_ext.engine.core import EngineCore

pytest_plugins = ["taping"]

FAMILIES = ("llada_tiny_a", "dream_tiny_a", "sdar_tiny_a", "fast_dllm")
SETTINGS: dict[str, Any] = {"gen_length": 24, "eos_id": -1, "mixture": 0.9, "window": 4, "lookahead": 8}
COUNTS = ("sequences", "nfe", "verifier_nfe", "kept", "drafted", "accepted")


def model_of(name: str) -> models.Model:
    return drafters.fast_dllm() if name == "fast_dllm" else golden.model(name)


def verifier_of(seed: int = 0) -> models.Model:
    torch.manual_seed(seed)
    return drafters.model_of(vocab_size=500)


def adaptive(
    model: models.Model, verifier: Any, prompts: Any = PROMPTS, **settings: Any
) -> dx.AdaptiveOutput:
    return dx.adaptive_decode(model, prompts, verifier=verifier, **{**SETTINGS, **settings})


def same(found: dx.AdaptiveOutput, expected: dx.AdaptiveOutput) -> None:
    for name in COUNTS:
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert found.passes == expected.passes
    assert (found.forwards, found.verifier_forwards) == (expected.forwards, expected.verifier_forwards)
    if expected.trajectory is not None:
        assert found.trajectory is not None
        assert torch.equal(found.trajectory.step, expected.trajectory.step)
        torch.testing.assert_close(found.trajectory.logprob, expected.trajectory.logprob, equal_nan=True)


def of_passes(taped: list[Graphs]) -> list[Graphs]:
    """The graphs that passes were recorded in."""
    return [graphs for graphs in taped if graphs.recordings]


def results(taped: list[Graphs]) -> list[weakref.ref[Tensor]]:
    """Of all recordings."""
    found = [each for graphs in taped for each in graphs.recordings.values()]
    return [weakref.ref(each.result) for each in found if each is not None]


@pytest.mark.parametrize("name", FAMILIES)
def test_recorded_passes_give_the_same(taped: list[Graphs], name: str) -> None:
    """Random batches, one after another, so that recordings of one are replayed by the next."""
    model, verifier, rng = model_of(name), verifier_of(), random.Random(name)
    for _ in range(10):
        prompts = PROMPTS[: rng.randint(1, len(PROMPTS))]
        settings = {
            "gen_length": [rng.choice([0, 1, 9, 24]) for _ in prompts],
            "temperature": rng.choice([0.0, 0.8]),
            "seed": [rng.randrange(9) for _ in prompts],
            "mixture": rng.choice([0.0, 0.8, 1.0]),
            "window": rng.choice([None, 1, 5]),
            "lookahead": rng.choice([None, 1, 7]),
            "suppress": rng.choice([None, [3, 17, 505]]),
            "eos_id": rng.choice([-1, 5]),
            "batch_invariant": rng.random() < 0.3,
            "record": True,
        }
        expected = adaptive(model, verifier, prompts, graphs=False, **settings)
        for _again in range(2):
            same(adaptive(model, verifier, prompts, **settings), expected)
    assert all(graphs.recorder is not None for graphs in taped), "a recording failed"
    assert sum(graphs.replays for graphs in taped) > 50


def test_most_passes_of_a_long_decode_are_replayed(taped: list[Graphs]) -> None:
    """The first time; the second time all are."""
    model, verifier = golden.model("llada_tiny_a"), verifier_of()
    settings: dict[str, Any] = {"gen_length": 256, "mixture": 0.0}
    out = adaptive(model, verifier, PROMPTS[0], **settings)
    (graphs,) = of_passes(taped)
    assert out.forwards > 100
    assert graphs.replays >= 0.9 * out.forwards
    before = graphs.replays
    adaptive(model, verifier, PROMPTS[0], **settings)  # records what came once
    third = adaptive(model, verifier, PROMPTS[0], **settings)
    assert graphs.replays >= before + 2 * out.forwards
    assert of_passes(taped) == [graphs]
    same(third, adaptive(model, verifier, PROMPTS[0], graphs=False, **settings))


def test_passes_have_few_shapes(taped: list[Graphs]) -> None:
    """Though each has another number of places, rows and positions."""
    settings: dict[str, Any] = {"mixture": 0.0, "lookahead": None, "gen_length": 64}
    out = adaptive(golden.model("llada_tiny_a"), verifier_of(), PROMPTS[0], **settings)
    (graphs,) = of_passes(taped)
    assert len(graphs.recordings) < 24 < 48 < out.forwards, len(graphs.recordings)


def test_most_passes_of_an_engine_are_replayed(taped: list[Graphs], monkeypatch: pytest.MonkeyPatch) -> None:
    model, verifier = golden.model("llada_tiny_a"), verifier_of()
    all_there, work = threading.Event(), EngineCore.work

    def waits(self: EngineCore) -> bool:
        assert all_there.wait(60)
        return work(self)

    monkeypatch.setattr(EngineCore, "work", waits)

    asked: Any = {"gen_length": 40, "eos_id": -1}
    requests = [(PROMPTS[n % len(PROMPTS)], (n % 2) * 0.8) for n in range(12)]

    def decoded(**settings: Any) -> tuple[list[list[int]], int]:
        all_there.clear()
        numbers: Any = {"mixture": 0.9, "window": 4, "lookahead": 5}
        with dx.Engine(model, verifier=verifier, lanes=2, max_length=128, **numbers, **settings) as engine:
            handles = [engine.submit(prompt, temperature=t, seed=3, **asked) for prompt, t in requests]
            all_there.set()
            return [handle.result(60).tokens for handle in handles], engine.stats.forwards

    found, forwards = decoded()
    (graphs,) = of_passes(taped)
    assert graphs.recorder is not None, "a recording failed"
    assert graphs.replays >= 0.6 * forwards
    taped.clear()
    assert decoded(graphs=False) == (found, forwards)
    assert not taped
    for (prompt, temperature), tokens in zip(requests, found, strict=True):
        alone = adaptive(model, verifier, prompt, temperature=temperature, seed=[3], lookahead=5, **asked)
        assert tokens == alone.responses[0].tolist()


def test_without_graphs_and_beyond_the_rows_nothing_is_recorded(
    taped: list[Graphs], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the rows of either model; a verifier that waits for the host has none. Rows are padded to other
    numbers then, which need not be the same for both."""
    model, verifier = golden.model("llada_tiny_a"), verifier_of()
    expected = adaptive(model, verifier, graphs=False, lookahead=None)
    assert not taped
    rows = padding.recorded_rows
    for slow in (model, verifier):
        with monkeypatch.context() as patch:
            for module in ("speculation.drafter", "speculation.adaptive_passes", "decoding.padding"):
                where = f"dparallel_ext.{module}.recorded_rows"
                patch.setattr(where, lambda of, slow=slow: 0 if of is slow else rows(of))
            fresh = copy.copy(model) if slow is verifier else model
            same(adaptive(fresh, verifier, lookahead=None), expected)
        assert not of_passes(taped)
    taped.clear()
    hooked = verifier_of()
    hooked.lm_head.register_forward_hook(lambda module, args, output: output)
    same(adaptive(golden.model("llada_tiny_a"), hooked, lookahead=None), expected)
    assert not of_passes(taped)


def test_what_recordings_read_outlives_the_decode(taped: list[Graphs]) -> None:
    model, verifier = golden.model("llada_tiny_a"), verifier_of()
    for suppress in ([3, 77], None) * 2:
        adaptive(model, verifier, temperature=0.8, suppress=suppress, record=True)
    assert not lost(of_passes(taped))


@pytest.mark.parametrize("how", ["deleted", "moved", "replaced"])
@pytest.mark.parametrize("which", ["model", "verifier"])
def test_what_is_kept_goes_with_the_weights(taped: list[Graphs], which: str, how: str) -> None:
    pair = {"model": golden.model("llada_tiny_a"), "verifier": verifier_of()}
    for _ in range(2):
        adaptive(**pair)
    recorded = results(taped)
    taped[:] = []
    assert recorded
    if how == "deleted":
        gone = weakref.ref(pair.pop(which))
        gc.collect()
        assert gone() is None
        assert which == "verifier" or all(result() is None for result in recorded)
        return
    if how == "moved":
        pair[which].to(torch.bfloat16)
    else:
        with torch.no_grad():
            for parameter in pair[which].parameters():
                parameter.data = torch.flip(parameter, [0]).contiguous()
    for _ in range(2):
        same(adaptive(**pair), adaptive(**pair, graphs=False))
    # A verifier of another dtype has another cache, and what was kept may come again.
    assert all(result() is None for result in recorded) == ((which, how) != ("verifier", "moved"))
    assert all(graphs.recorder is not None for graphs in taped), "a recording failed"


def test_the_verifiers_cache_counts(taped: list[Graphs], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is room for the model's alone, nothing is kept, and what was there stays."""
    model, verifier = golden.model("llada_tiny_a"), verifier_of()
    own = model.new_cache(1, bucket(len(PROMPTS[0]) + 24)).slots.nbytes
    settings: dict[str, Any] = {"gen_length": 24, "block_length": 8, "cache": "dual"}
    for room, kinds in ((own, 3), (model_store.BYTES, 4)):
        monkeypatch.setattr(model_store, "BYTES", room)
        for _ in range(2):
            adaptive(model, verifier, PROMPTS[0])
            dx.decode(model, PROMPTS[0], **settings)
        assert len(of_passes(taped)) == kinds


def test_a_call_goes_on_with_its_own_verifier_and_mixture(taped: list[Graphs]) -> None:
    model, verifiers = golden.model("llada_tiny_a"), [verifier_of(seed) for seed in (0, 1)]
    ways = [(verifier, mixture) for verifier in verifiers for mixture in (0.0, 0.9)]
    expected = [adaptive(model, verifier, mixture=r, graphs=False) for verifier, r in ways]
    for _ in range(3):
        for (verifier, mixture), known in zip(ways, expected, strict=True):
            same(adaptive(model, verifier, mixture=mixture), known)
    assert len(of_passes(taped)) == 4
    assert not all(torch.equal(known.sequences, expected[0].sequences) for known in expected)


def test_a_verifier_that_is_read_in_each_call_is_not_kept(taped: list[Graphs], tmp_path: Path) -> None:
    model = golden.model("llada_tiny_a")
    models.save(verifier_of(), tmp_path)
    for _ in range(2):
        adaptive(model, tmp_path, PROMPTS[0], mixture=0.0)
    recorded = results(taped)
    assert len(of_passes(taped)) == 2
    taped[:] = []
    gc.collect()
    assert recorded
    assert all(result() is None for result in recorded)


def test_a_decode_that_raises_leaves_nothing_behind(taped: list[Graphs]) -> None:
    model, verifier = golden.model("llada_tiny_a"), verifier_of()
    adaptive(model, verifier)
    was = verifier.norm.weight.data.clone()
    verifier.norm.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match=f"sequence 0 at position {len(PROMPTS[0]) + 1} holds NaN"):
        adaptive(model, verifier)
    verifier.norm.weight.data.copy_(was)
    for _ in range(2):
        same(adaptive(model, verifier), adaptive(model, verifier, graphs=False))


@pytest.mark.parametrize("device", GPUS, indirect=True)
def test_a_gpu_records_them(device: str, seen_graphs: list[Graphs]) -> None:
    model, verifier = golden.model("llada_tiny_a", device=device), verifier_of().to(device)
    prompts: list[Tensor] = [prompt.to(device) for prompt in PROMPTS]
    for temperature in (0.0, 0.8):
        settings = {"temperature": temperature, "seed": 3}
        expected = adaptive(model, verifier, prompts, **settings, graphs=False)
        for _ in range(2):
            out = adaptive(model, verifier, prompts, **settings)
            assert torch.equal(out.sequences, expected.sequences)
    assert all(graphs.recorder is not None for graphs in seen_graphs), "a recording failed"
    assert any(graphs.replays for graphs in seen_graphs)
