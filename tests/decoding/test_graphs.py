"""Recorded passes give what passes give that run as they are; what a recording may not do is refused.

Without a GPU a `Tape` stands in for CUDA graphs: it keeps the operators that a pass dispatches, with the very
tensors, and a replay runs them again on those, without any of the Python around them. So a number that was
read on the host while recording stays what it was, as in a CUDA graph. Everything else is the library's own.
"""

from __future__ import annotations

import collections
import gc
import itertools
import logging
import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, ClassVar

import pytest
import torch
from conftest import GPUS, golden
from test_infill import fast_dllm
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dparallel_ext as dx
from dparallel_ext import cache as caches
from dparallel_ext import kept, models
from dparallel_ext.decoding import batch as batches
from dparallel_ext.decoding import graphs as recording
from dparallel_ext.decoding import runner, workspace
from dparallel_ext.decoding.graphs import LIMIT, CudaRecorder, Graphs
from dparallel_ext.engine.core import EngineCore
from dparallel_ext.models import base

aten = torch.ops.aten

WAITS = {
    aten.item.default,
    aten._local_scalar_dense.default,
    aten.is_nonzero.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.lift_fresh.default,  # a tensor of numbers from the host
}
"""What a GPU's recording does not permit; so with an index that is a mask."""
LOOKS = {
    "_check",
    "check_heads",
    "check_index",
    "check_rows",
    "check_caches",
    "within",
    "check",
    "suppressed",
}
"""Functions that read values on the CPU alone."""


class Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.written: list[tuple[Tensor, Tensor]] = []
        """Before each call, what it changes and a copy of it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        by_mask = func is aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        if (func in WAITS or by_mask) and not looks():
            raise RuntimeError(f"{func}: not permitted while recording")
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = args[place] if place < len(args) else kwargs.get(argument.name)
                if isinstance(given, Tensor):
                    self.written.append((given, given.clone()))
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out

    def put_back(self) -> None:
        """As if nothing had run."""
        for tensor, was in reversed(self.written):
            tensor.copy_(was)
        self.written.clear()
        self.calls[-1][-1].fill_(-7)  # the result

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.numel() and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def looks() -> bool:
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "_compute":
        if frame.f_code.co_name in LOOKS:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


class TapeGraph:
    """A `torch.cuda.CUDAGraph` on a tape, whose pools follow the rules of torch's allocator."""

    pools: ClassVar[dict[int, int]] = {}
    """How many graphs use each. One that no graph uses any more stays known, and is refused."""

    def capture_begin(self, pool: int, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local"
        if not self.pools.get(pool, 1) > 0:
            raise RuntimeError("it->second->use_count > 0 INTERNAL ASSERT FAILED")
        self.users, self.pool, self.tape = self.pools, pool, Tape()
        self.users[pool] = self.users.get(pool, 0) + 1
        self.tape.__enter__()

    def capture_end(self) -> None:
        self.tape.__exit__(None, None, None)
        self.tape.put_back()

    def replay(self) -> None:
        self.tape.replay()

    def __del__(self) -> None:
        if hasattr(self, "pool"):
            self.users[self.pool] -= 1


class TapeStream:
    made = itertools.count()

    def __init__(self, device: Any = None) -> None:
        self.device, self.cuda_stream = device, next(self.made) % 32

    def wait_stream(self, other: TapeStream) -> None:
        pass


@pytest.fixture
def taped(monkeypatch: pytest.MonkeyPatch) -> list[Graphs]:
    """Batches on the CPU whose passes take the forms they have on a GPU, and are recorded."""
    made: list[Graphs] = []

    class Seen(Graphs):
        def __init__(self, recorder: Any) -> None:
            super().__init__(recorder)
            self.small = 0  # passes that may be recorded
            made.append(self)

        def run(self, form: Any, *args: Any, **settings: Any) -> Tensor:
            self.small += form is not None
            return super().run(form, *args, **settings)

    monkeypatch.setattr(workspace, "Graphs", Seen)
    monkeypatch.setattr(workspace, "can_record", lambda device: True)
    monkeypatch.setattr(runner, "runs_ahead", lambda device: True)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", TapeGraph)
    monkeypatch.setattr(TapeGraph, "pools", {})
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", itertools.count(1).__next__)
    monkeypatch.setattr(torch.cuda, "Stream", TapeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", TapeStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    return made


def recordings(graphs: Graphs) -> int:
    return sum(found is not None for found in graphs.forms.values())


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


PROMPTS = [torch.arange(3, 14), torch.arange(40, 47), torch.arange(1, 30)]
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
    ("llada_tiny_a", {"cache": "dual", "rule": "credit+confidence:0.04"}),
    ("llada_tiny_a", {"cache": "prefix", "rule": "sched:0.4,0.1", "steps": 24}),
    ("llada_tiny_a", {"cache": "dual", "rule": "edit:0.03,0.05,4"}),
    ("sdar_tiny_a", {"cache": "block", "rule": "edit:0.03,0.03", "block_length": 8}),
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
]


@pytest.mark.parametrize(("name", "way"), WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
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
    assert len(graphs.forms) <= out.forwards - graphs.replays


@pytest.mark.parametrize(
    ("name", "cache"), [("llada_tiny_a", "dual"), ("dream_tiny_a", "prefix"), ("sdar_tiny_a", "block")]
)
def test_infill_replays(taped: list[Graphs], name: str, cache: str) -> None:
    """Masks between given tokens are numbers of a pass, not part of its form."""
    prompts = [torch.arange(3, 60), torch.arange(1, 43)]
    for prompt, gaps in zip(prompts, (((7, 29), (40, 52)), ((0, 20), (23, 24))), strict=True):
        for start, end in gaps:
            prompt[start:end] = 511
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
    assert len(graphs.forms) == 2
    assert graphs.replays == out.forwards - 2
    assert recordings(graphs) == 2


@pytest.mark.parametrize("moved", [False, True])
def test_the_host_is_ready_for_the_next_pass(
    taped: list[Graphs], monkeypatch: pytest.MonkeyPatch, moved: bool
) -> None:
    """Within a block it has what a pass needs before it looks at the one before; not where pages moved."""
    late: list[int] = []
    numbers, prepare, step = runner.Runner.inputs, runner.Runner.prepare, batches.Batch.step
    preparing = False

    def counted(self: runner.Runner, rows: Any, work: Any) -> Any:
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

    monkeypatch.setattr(runner.Runner, "inputs", counted)
    monkeypatch.setattr(runner.Runner, "prepare", ahead)
    monkeypatch.setattr(batches.Batch, "step", moving)
    model = golden.model("llada_tiny_a")
    out = dx.decode(model, PROMPTS[0], gen_length=64, block_length=16, cache="dual", threshold=0.3)
    assert out.forwards > 12
    blocks = [len(PROMPTS[0]) + 16 * block for block in range(4)]
    assert len(late) == out.forwards if moved else late == blocks


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


def test_what_cannot_be_recorded_runs_as_it_is(
    taped: list[Graphs], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = golden.model("llada_tiny_a")
    settings: dict[str, Any] = {"gen_length": 32, "block_length": 16, "cache": "dual", "steps": 16}
    expected = dx.decode(model, PROMPTS, graphs=False, **settings)
    step = models.Model.step

    def waits(self: models.Model, ids: Tensor, cache: Any, plan: Any) -> Tensor:
        int(ids[0])
        return step(self, ids, cache, plan)

    monkeypatch.setattr(models.Model, "step", waits)
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


TINY = {
    "llada": {
        "d_model": 16, "n_layers": 1, "n_heads": 2, "mlp_hidden_size": 16, "vocab_size": 64,
        "block_type": "llama", "activation_type": "silu", "layer_norm_type": "rms", "rope": True,
        "rope_theta": 1e4, "include_bias": False, "weight_tying": False, "mask_token_id": 60,
    },
    "sdar": {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
        "vocab_size": 64, "mask_token_id": 60, "block_size": 32,
    },
}  # fmt: skip
ROWS_8B = 630
"""That a model of 8B parameters has in the largest pass that is recorded."""


def tiny(name: str, layers: int = 1) -> models.Model:
    family, key = {"llada": (models.LLaDA, "n_layers"), "sdar": (models.SDAR, "num_hidden_layers")}[name]
    return family({**TINY[name], key: layers}).eval()  # type: ignore[abstract]


def prompt(length: int) -> Tensor:
    return torch.randint(0, 59, (length,))


def test_what_is_recorded_is_what_hides_no_launches() -> None:
    """Rows up to which a pass of LLaDA-8B, and of a model of 1.7B, is recorded."""
    llada = {**TINY["llada"], "d_model": 4096, "n_heads": 32, "mlp_hidden_size": 12288}
    qwen = {"hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 8}
    sdar = {**TINY["sdar"], **qwen, "head_dim": 128, "intermediate_size": 6144}
    with torch.device("meta"):
        assert runner.recorded_rows(models.LLaDA(llada)) == ROWS_8B
        assert runner.recorded_rows(models.SDAR(sdar)) > 2500
    assert runner.recorded_rows(torch.nn.Linear(1, 1)) == 0


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
    monkeypatch.setattr(base, "varlen_attention", lambda q, *args, **settings: q.clone())
    if rows is not None:
        monkeypatch.setattr(runner, "recorded_rows", lambda model: rows)
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
    beside, idle = runner.Runner.beside_of, []

    def seen(self: runner.Runner, *args: Any) -> set[int]:
        idle.append(beside(self, *args))
        return idle[-1]

    monkeypatch.setattr(runner.Runner, "beside_of", seen)
    out = dx.decode(model, prompts, gen_length=lengths, **settings)
    assert any(lanes for lanes in idle)
    assert taped[0].replays > 0
    monkeypatch.setattr(runner, "runs_ahead", lambda device: False)
    expected = dx.decode(model, prompts, gen_length=lengths, graphs=False, **settings)
    assert torch.equal(out.sequences, expected.sequences)
    assert torch.equal(out.nfe, expected.nfe)
    assert out.trajectory is not None
    assert expected.trajectory is not None
    assert torch.equal(out.trajectory.step, expected.trajectory.step)
    torch.testing.assert_close(out.trajectory.confidence, expected.trajectory.confidence, equal_nan=True)


LOOKING = {"aminmax", "gt", "all"}
"""Operators of the checks that are made on the CPU alone."""


def kernels(tape: Tape) -> collections.Counter[str]:
    """Operators that launch something: not views, nor those that only make room or give a number."""
    found: collections.Counter[str] = collections.Counter()
    for func, args, kwargs, out in tape.calls:
        name = func._schema.name.split("::")[1]
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        views = bool(made) and all(t.untyped_storage().data_ptr() in given for t in made)
        changes = func._schema.is_mutable
        if changes or (made and not views and name not in LOOKING and "empty" not in name):
            found[name] += 1
    return found


def test_the_kernels_of_a_pass(taped: list[Graphs], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a block: so many launches for each layer, and eight beside."""
    graphs: list[Any] = []

    class Kept(TapeGraph):
        def capture_end(self) -> None:
            super().capture_end()
            graphs.append(self)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Kept)
    found = []
    for layers in (1, 2):
        model = tiny("llada", layers).to(torch.bfloat16).fuse()
        dx.decode(model, prompt(32), gen_length=64, cache="dual", selector="quota", threshold=8)
        assert len(graphs) == 2
        found.append(kernels(graphs[1].tape))
        graphs.clear()
    layer = found[1] - found[0]
    assert layer == {"linear": 4, "rms_norm": 2, "kv_write": 1, "block_attention": 1, "swiglu": 1}
    beside = found[0] - layer
    assert beside == {
        **{"index": 2, "embedding": 1, "rms_norm": 1, "linear": 1},
        **{"unmask_": 1, "commit_": 1, "cat": 1},
    }


SETTINGS: dict[str, Any] = {"gen_length": 32, "block_length": 16, "cache": "dual", "steps": 16}


def plain(model: models.Model, prompts: Any, **settings: Any) -> Tensor:
    return dx.decode(model, prompts, graphs=False, **{**SETTINGS, **settings}).sequences


def test_a_second_decode_replays_from_its_first_pass(taped: list[Graphs]) -> None:
    """So does one of other lengths that are near, with other rules, and one that records its trajectory."""
    model = golden.model("llada_tiny_a")
    dx.decode(model, PROMPTS[0], **SETTINGS)
    (graphs,) = taped
    assert len(graphs.forms) == recordings(graphs) == 2
    for length, more in ((11, {}), (9, {}), (16, {"steps": 8}), (11, {"steps": None, "threshold": 1.0})):
        before = graphs.replays
        out = dx.decode(model, PROMPTS[2][:length], **{**SETTINGS, **more})
        assert torch.equal(out.sequences, plain(model, PROMPTS[2][:length], **more))
        assert graphs.replays == before + out.forwards
    assert recordings(graphs) == 2
    groups: list[dict[str, Any]] = [
        {"record": True, "logprobs": True},
        {"temperature": 0.8, "seed": 3},
        {"suppress": [5, 9]},
        {"gen_length": [30]},
    ]
    for way in groups:
        for _ in range(2):
            out = dx.decode(model, PROMPTS[0], **{**SETTINGS, **way})
        before = graphs.replays
        again = dx.decode(model, PROMPTS[0], **{**SETTINGS, **way})
        assert graphs.replays == before + again.forwards
        expected = dx.decode(model, PROMPTS[0], graphs=False, **{**SETTINGS, **way})
        for found in (out, again):
            assert torch.equal(found.sequences, expected.sequences)
            assert torch.equal(found.nfe, expected.nfe)
        if "record" in way:
            assert expected.trajectory is not None
            assert again.trajectory is not None
            assert torch.equal(again.trajectory.step, expected.trajectory.step)
            assert torch.equal(again.logprobs, expected.logprobs)
    assert taped == [graphs]


def test_what_is_kept_is_bounded(taped: list[Graphs], monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = (golden.model("llada_tiny_a") for _ in range(2))

    def decode(lanes: int, of: models.Model = model) -> None:
        dx.decode(of, [PROMPTS[0]] * lanes, **SETTINGS)

    for lanes in range(1, kept.LIMIT + 2):
        decode(lanes)
    decode(2, other)
    assert len(taped) == kept.LIMIT + 2
    decode(2)
    decode(2, other)
    assert len(taped) == kept.LIMIT + 2
    decode(1)  # the one not used for longest
    assert len(taped) == kept.LIMIT + 3
    monkeypatch.setattr(kept, "BYTES", 2 * 2 * 48 * model.shape.width * 4 * model.shape.layers - 1)
    decode(2)
    decode(2)  # larger than what is kept: as it was before
    assert len(taped) == kept.LIMIT + 5
    assert taped[-1].replays > 0


@pytest.mark.parametrize("how", ["deleted", "moved", "trained", "replaced"])
def test_what_is_kept_goes_with_the_weights(taped: list[Graphs], how: str) -> None:
    model = golden.model("llada_tiny_a")
    dx.decode(model, PROMPTS[0], **SETTINGS)
    recorded = weakref.ref(next(found for found in taped[0].forms.values() if found is not None).result)
    taped[:] = []
    assert recorded() is not None
    if how == "deleted":
        del model
        gc.collect()
        assert recorded() is None
        return
    if how == "moved":
        model.to(torch.bfloat16)
        assert recorded() is None
    elif how == "trained":
        model.train().eval()
        assert recorded() is None
    else:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.data = torch.flip(parameter, [0]).contiguous()
        assert recorded() is not None
    for _ in range(2):
        out = dx.decode(model, PROMPTS[0], **SETTINGS)
        assert torch.equal(out.sequences, plain(model, PROMPTS[0]))
    assert recorded() is None
    assert all(graphs.recorder is not None for graphs in taped), "a recording failed"


def test_a_decode_that_raises_leaves_nothing_behind(taped: list[Graphs]) -> None:
    model = golden.model("llada_tiny_a")
    dx.decode(model, PROMPTS[0], **SETTINGS)
    was = model.norm.weight.data.clone()
    model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="holds NaN"):
        dx.decode(model, PROMPTS[0], **SETTINGS)
    model.norm.weight.data.copy_(was)
    for _ in range(2):
        out = dx.decode(model, PROMPTS[0], **SETTINGS)
        assert torch.equal(out.sequences, plain(model, PROMPTS[0]))
    assert len(taped) == 2


def test_two_threads_decode_with_one_model(taped: list[Graphs]) -> None:
    """Each with recordings of its own. Both are in the midst of it when each is."""
    model = golden.model("llada_tiny_a")
    expected = [plain(model, PROMPTS[place][:11]) for place in (0, 2)]
    meet = threading.Barrier(2)

    class Waits:
        def put(self, tokens: Tensor) -> None:
            meet.wait(60)

        def end(self) -> None:
            pass

    found: dict[int, Tensor] = {}

    def decode(place: int, prompt: Tensor) -> None:
        found[place] = dx.decode(model, prompt, streamer=Waits(), **SETTINGS).sequences

    for _ in range(2):
        threads = [threading.Thread(target=decode, args=(i, PROMPTS[2 * i][:11])) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(found.pop(place), expected[place]) for place in (0, 1))
    assert len(taped) == 2
    assert sum(graphs.replays for graphs in taped) == 4 * 16 - 4


def test_recorders_share_no_stream(taped: list[Graphs], monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as torch has enough: it gives out the same ones again in turn."""
    monkeypatch.setattr(recording, "recorders", weakref.WeakSet())
    made = [CudaRecorder(torch.device("cpu")) for _ in range(20)]
    del made[1::2]
    made += [CudaRecorder(torch.device("cpu")) for _ in range(22)]
    assert len({recorder.stream.cuda_stream for recorder in made}) == 32


@pytest.mark.parametrize("device", GPUS, indirect=True)
def test_recordings_of_a_gpu_outlive_a_decode(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not weights that move; and they take no more memory each time."""
    made: list[Graphs] = []

    class Seen(Graphs):
        def __init__(self, recorder: Any) -> None:
            super().__init__(recorder)
            made.append(self)

    monkeypatch.setattr(workspace, "Graphs", Seen)
    model = golden.model("llada_tiny_a", dtype=torch.bfloat16, device=device)
    prompts = [prompt.to(device) for prompt in PROMPTS]
    dx.decode(model, prompts, **SETTINGS)
    (graphs,) = made
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.data = torch.flip(parameter, [0]).contiguous()
        expected = plain(model, prompts)
        reserved = []
        for around in range(4):
            before = graphs.replays
            out = dx.decode(model, prompts, **SETTINGS)
            assert graphs.recorder is not None, "a recording failed"
            assert torch.equal(out.sequences, expected)
            if around:
                assert graphs.replays == before + out.forwards
            reserved.append(torch.cuda.memory_reserved())
        assert reserved[1] == reserved[3]
    assert made == [graphs]
    for length in range(40, 400, 40):  # more forms than are kept, and other buffers
        dx.decode(model, prompts, **{**SETTINGS, "gen_length": length, "steps": None})
    assert torch.equal(dx.decode(model, prompts, **SETTINGS).sequences, expected)
    assert all(found.recorder is not None for found in made), "a recording failed"
    model.train().eval()
    del made[:], graphs
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.equal(dx.decode(model, prompts, **SETTINGS).sequences, expected)


def test_forms_are_forgotten() -> None:
    """The least recently used form goes, and with it what its recording held."""

    class Count:
        taken = 0
        turn = staticmethod(nullcontext)

        def record(self, compute: Any, numbers: Tensor) -> tuple[Callable[[], None], Tensor]:
            self.taken += 1
            result = torch.zeros(1)
            return lambda: result.copy_(compute(numbers)), result  # type: ignore[return-value]

    recorder = Count()
    graphs, cpu = Graphs(recorder), torch.device("cpu")

    def run(form: int, number: int) -> int:
        got = graphs.run(form, torch.tensor([number]), lambda n: n.sum()[None].float() + form, device=cpu)
        return int(got)

    for number in range(4):
        assert run(1000, number) == 1000 + number
    assert (recorder.taken, graphs.replays) == (1, 3)
    for form in range(LIMIT):
        assert run(form, 7) == form + 7
    assert len(graphs.forms) == LIMIT
    run(1000, 1)
    assert recorder.taken == 1  # it was forgotten, so this pass ran as it is
    run(1000, 1)
    assert recorder.taken == 2
    graphs.drop_stale([1])
    assert not graphs.forms
    run(1000, 1)
    graphs.drop_stale([1])
    assert graphs.forms


@pytest.mark.parametrize("how", ["evicted", "moved"])
def test_a_pool_without_recordings_is_not_used_again(taped: list[Graphs], how: str) -> None:
    """torch's allocator refuses it, which would be the end of all recordings."""
    cpu = torch.device("cpu")
    graphs = Graphs(CudaRecorder(cpu))
    number = torch.ones(1, dtype=torch.int64)
    for around in range(3):
        for _ in range(3):
            assert int(graphs.run("again", number, lambda n: n + 1, device=cpu)) == 2
        if how == "moved":
            graphs.drop_stale([around])
        else:
            for form in range(LIMIT):
                graphs.run((around, form), number, lambda n: n + 1, device=cpu)
        assert "again" not in graphs.forms
        assert not any(TapeGraph.pools.values())
    assert graphs.recorder is not None
    assert graphs.replays == 6
    assert len(TapeGraph.pools) == 3
    # A pool that a recording holds serves the next.
    for form in ("one", "two"):
        for _ in range(2):
            graphs.run(form, number, lambda n: n + 1, device=cpu)
    assert list(TapeGraph.pools.values()) == [0, 0, 0, 2]
