"""Recorded passes give what passes give that run as they are; what a recording may not do is refused.

Without a GPU a `Tape` stands in for CUDA graphs: it keeps the operators that a pass dispatches, with the very
tensors, and a replay runs them again on those, without any of the Python around them. So a number that was
read on the host while recording stays what it was, as in a CUDA graph.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dparallel_ext as dx
from dparallel_ext import batch as batches
from dparallel_ext import models, passes
from dparallel_ext.graphs import LIMIT, Graphs

GOLDEN = Path(__file__).parent / "golden"
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
LOOKS = {"_check", "_check_index", "_check_rows", "_check_caches", "_within", "check", "_suppress"}
"""Functions that read values on the CPU alone."""


class Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        by_mask = func is aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        if (func in WAITS or by_mask) and not looks():
            raise RuntimeError(f"{func}: not permitted while recording")
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out

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


class TapeRecorder:
    """Recording on a tape runs the operators, so what they change is put back."""

    def __init__(self, changed: Callable[[], list[Tensor]]) -> None:
        self.changed, self.taken = changed, 0

    @contextmanager
    def turn(self) -> Iterator[None]:
        with nullcontext():
            yield

    def record(self, compute: Any, numbers: Tensor) -> tuple[Callable[[], None], Tensor]:
        before = [t.clone() for t in self.changed()]
        tape = Tape()
        with tape:
            result = compute(numbers)
        for t, was in zip(self.changed(), before, strict=True):
            t.copy_(was)
        result.fill_(-7)  # nothing has run yet
        self.taken += 1
        return tape.replay, result


@pytest.fixture
def taped(monkeypatch: pytest.MonkeyPatch) -> list[Graphs]:
    """Batches on the CPU whose passes take the forms they have on a GPU, and are recorded."""
    made: list[Graphs] = []

    class Recorded(passes.Passes):
        def __init__(self, *args: Any, graphs: bool = True, **settings: Any) -> None:
            super().__init__(*args, **settings)
            self.regular = True
            if graphs and isinstance(self.model, models.Model):
                slots = self.slots
                assert slots is not None
                self.graphs = Graphs(TapeRecorder(lambda: [self.tokens, slots.slots]))
                made.append(self.graphs)

    monkeypatch.setattr(batches, "Passes", Recorded)
    return made


@pytest.mark.parametrize("name", ["llada_tiny_a", "sdar_tiny_a"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_the_device(device: str, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA graphs where there is a GPU; on the CPU nothing is recorded."""
    made: list[passes.Passes] = []

    class Kept(passes.Passes):
        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **settings)
            made.append(self)

    monkeypatch.setattr(batches, "Passes", Kept)
    model = models.load(GOLDEN / name, dtype=dtype, device=device)
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
    model = models.load(GOLDEN / name, dtype=dtype)
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
    model = models.load(GOLDEN / name)
    expected = dx.decode(model, prompts, graphs=False, **settings)
    out = dx.decode(model, prompts, **settings)
    assert torch.equal(out.sequences, expected.sequences)
    assert torch.equal(out.nfe, expected.nfe)
    assert taped[0].recorder is not None, "a recording failed"
    assert taped[0].replays > out.forwards / 2


def test_a_form_met_three_times_runs_once(taped: list[Graphs]) -> None:
    """One sequence, dual cache: the full passes take one form and the passes over a block another."""
    model = models.load(GOLDEN / "llada_tiny_a")
    out = dx.decode(model, PROMPTS[0], gen_length=128, block_length=16, cache="dual", steps=64)
    (graphs,) = taped
    assert len(graphs.forms) == 2
    assert graphs.replays == out.forwards - 2
    assert graphs.recorder.taken == 2  # type: ignore[union-attr]


@pytest.mark.parametrize("moved", [False, True])
def test_the_host_is_ready_for_the_next_pass(
    taped: list[Graphs], monkeypatch: pytest.MonkeyPatch, moved: bool
) -> None:
    """Within a block it has what a pass needs before it looks at the one before; not where pages moved."""
    late: list[int] = []
    numbers, prepare, step = passes.Passes._numbers, passes.Passes.prepare, batches.Batch.step
    preparing = False

    def counted(self: passes.Passes, rows: Any, work: Any) -> Any:
        if not preparing:
            late.append(next(iter(work.values())).block[0])
        return numbers(self, rows, work)

    def ahead(self: passes.Passes, rows: Any, work: Any) -> None:
        nonlocal preparing
        preparing = True
        prepare(self, rows, work)
        preparing = False

    def moving(self: batches.Batch, *args: Any, **settings: Any) -> list[int]:
        if moved and self.slots is not None:
            self.slots.assign(0, [0])
        return step(self, *args, **settings)

    monkeypatch.setattr(passes.Passes, "_numbers", counted)
    monkeypatch.setattr(passes.Passes, "prepare", ahead)
    monkeypatch.setattr(batches.Batch, "step", moving)
    model = models.load(GOLDEN / "llada_tiny_a")
    out = dx.decode(model, PROMPTS[0], gen_length=64, block_length=16, cache="dual", threshold=0.3)
    assert out.forwards > 12
    blocks = [len(PROMPTS[0]) + 16 * block for block in range(4)]
    assert len(late) == out.forwards if moved else late == blocks


def test_an_engine_replays(taped: list[Graphs]) -> None:
    model = models.load(GOLDEN / "sdar_tiny_a")
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
    model = models.load(GOLDEN / "llada_tiny_a")
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
    model = models.load(GOLDEN / "llada_tiny_a")
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
    model, calls = models.load(GOLDEN / "llada_tiny_a"), []
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
    model = models.load(GOLDEN / "llada_tiny_a")
    with dx.Engine(model, lanes=1, max_length=64, cache="dual", block_length=16) as engine:
        first = engine.submit(PROMPTS[0], gen_length=32).result(60).tokens
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.data = torch.zeros_like(parameter)
        changed = engine.submit(PROMPTS[0], gen_length=32).result(60).tokens
    assert taped[0].replays > 20
    assert first != changed
    assert set(changed) == {0}


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
    graphs.look([1])
    assert not graphs.forms
    run(1000, 1)
    graphs.look([1])
    assert graphs.forms
