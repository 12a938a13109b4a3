"""The inputs of a pass that are made while the one before still runs are those that would be made then."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import golden
from tape import PROMPTS
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext.decoding import ENGINE_FIELDS, inputs, padding, runner
from dparallel_ext.decoding import batch as batches
from dparallel_ext.decoding.graphs import Graphs

pytest_plugins = ["taping"]


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
        methods = {name: getattr(runner.Runner, name) for name in ("run", "read_counts", "_compute")}
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

        def read_counts(own: runner.Runner, rows: Any, results: Any) -> Any:
            self.waits, self.looks = True, self.looks + 1
            return methods["read_counts"](own, rows, results)

        def compute(own: runner.Runner, key: inputs.GraphKey, work: Any, told: Tensor) -> Tensor:
            assert torch.equal(told, expected[0][0])
            assert key == expected[0][1]
            return methods["_compute"](own, key, work, told)

        monkeypatch.setattr(padding, "runs_ahead", lambda device: True)
        for name, function in zip(methods, (run, read_counts, compute), strict=True):
            monkeypatch.setattr(runner.Runner, name, function)
        monkeypatch.setattr(inputs.InputPacker, "pack", pack)

    def clear(self) -> None:
        self.looks = self.prepared = self.late = 0
        self.waits = True


@pytest.mark.parametrize(
    ("name", "way"),
    [
        *(
            (name, way)
            for name in ("llada_tiny_a", "sdar_tiny_a")
            for way in (
                {"selector": "quota", "threshold": 4},
                {"threshold": 2.0, "temperature": 0.7, "seed": 3},
                {"threshold": 2.0, "stop": [[7], [11, 12]]},
                {"threshold": 2.0, "max_commit": 2, "active_blocks": 3, "activate_at": 0.5},
                {"rule": "edit:0.03,0.05,4"},
            )
        ),
        ("llada_tiny_a", {"rule": "soft:0.05,0.9,6"}),
        ("llada_tiny_a", {"threshold": 2.0, "sub_block_length": 4}),
        ("llada_tiny_a", {"rule": "edit:0.03,0.05,4", "sub_block_length": 4}),
        ("sdar_tiny_a", {"rule": "prophet:6"}),
        ("sdar_tiny_a", {"threshold": 2.0, "eos_id": 5}),
        ("dream_tiny_a", {"threshold": 2.0, "eos_id": 5}),
        ("dream_tiny_a", {"rule": "credit+confidence:0.03"}),
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
        own = {key: way[key] for key in way if key not in ENGINE_FIELDS}
        with engine.core.lock:  # no pass may run between, or the counts depend on the machine's pace
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
        lambda row: setattr(row, "sampling", row.sampling._replace(suppress=torch.tensor([3]))),
    ]
    for change in wrong:
        told.clear()

        def guessed(self: batches.Batch, row: Any, change: Any = change) -> None:
            opens(self, row)
            if all(row is not own for own in self.sequences) and row.open:
                change(row)

        monkeypatch.setattr(batches.Batch, "open_front", guessed)
        out = dx.decode(model, PROMPTS[0], **settings)
        assert torch.equal(out.sequences, expected.sequences)
        assert torch.equal(out.nfe, expected.nfe)
        assert told.looks == out.forwards
        assert told.late == 4  # the first pass of each block
