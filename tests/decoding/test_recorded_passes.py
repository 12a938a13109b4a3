"""Which passes are recorded, how many are replayed, and of what kernels they are."""

from __future__ import annotations

import functools
import importlib
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import drafters
import pytest
import torch
from conftest import golden
from tape import PROMPTS, TINY, TapeGraph, kernels, prompt, tiny

import dparallel_ext as dx
from dparallel_ext import cache as caches
from dparallel_ext import models
from dparallel_ext.decoding import inputs, padding
from dparallel_ext.decoding.graphs import Graphs
from dparallel_ext.engine.core import EngineCore
from dparallel_ext.models import attention

pytest_plugins = ["taping"]


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


@pytest.mark.parametrize(
    ("name", "share", "rows", "varlen"),
    [
        ("llada", 0.5, None, False),
        ("llada", 0.55, ROWS_8B, True),
        ("sdar", 0.6, None, True),
        ("sdar", 0.55, ROWS_8B, False),
    ],
)
def test_most_passes_of_an_engine_are_replayed(
    taped: list[Graphs],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    share: float,
    rows: int | None,
    varlen: bool,
) -> None:
    """64 requests of all lengths in 16 lanes; of a model whose every pass is recorded, and of a large one;
    also where long sequences attend to themselves, as on a GPU."""
    monkeypatch.setattr(caches, "has_varlen", lambda like: varlen)
    monkeypatch.setattr(attention, "varlen_attention", lambda q, *args, **settings: q.clone())
    if rows is not None:
        monkeypatch.setattr(padding, "recorded_rows", lambda model: rows)
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
    """Idle lanes among those that decode, whose windows' logits are computed for nothing: as many as make the
    rows those of a bucket."""
    model, size = golden.model(name), {"llada_tiny_a": 16, "sdar_tiny_a": 8}[name]
    prompts = [torch.arange(3, 8 + lane) for lane in range(14)]
    lengths = [size * (1 + lane % 4) for lane in range(14)]
    settings: dict[str, Any] = {"cache": cache, "block_length": size, "threshold": 1.0, "record": True}
    beside, seen = inputs.InputPacker.filler_lanes, []

    def seeing(self: inputs.InputPacker, lanes: int, work: Any, reach: int) -> set[int]:
        idle = beside(self, lanes, work, reach)
        assert idle.isdisjoint(work)
        if self.static_shapes:
            assert len(work) + len(idle) == min(lanes, caches.bucket(len(work) * size) // size)
        seen.append(idle)
        return idle

    monkeypatch.setattr(inputs.InputPacker, "filler_lanes", seeing)
    out = dx.decode(model, prompts, gen_length=lengths, **settings)
    assert any(seen)
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
    """Of a block: so many launches for each layer, norms of heads or not, and eight beside; seven where
    products end in more."""
    for op in ("linear_swiglu", "linear_kv_write"):
        module = importlib.import_module(f"dparallel_ext.ops.{op}")
        monkeypatch.setattr(module, "fuses_epilogue", lambda *_: fused)
    layer, beside = kernels_of(monkeypatch, functools.partial(tiny, name), cache)
    linear = {"linear": 4, "kv_write": 1, "swiglu": 1}
    if fused:
        linear = {"linear": 2, "linear_kv_write": 1, "linear_swiglu": 1}
    assert layer == {**linear, "rms_norm": 2, "block_attention": 1}
    assert layer.total() == (7 if fused else 9)
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
