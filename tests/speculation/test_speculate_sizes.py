"""What speculate measures of drafters, by which it chooses the sizes of drafts, and keeps."""

from __future__ import annotations

import gc
import random
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from drafters import MODEL, Knowing, drafter_with, model_of, riding
from test_speculate import PROMPTS, plain

from dparallel_ext.decoding.config import DecodeConfig
from dparallel_ext.decoding.settings import make_settings
from dparallel_ext.models import Model
from dparallel_ext.speculation import (
    CausalBatch,
    DraftSession,
    Measured,
    NGram,
    TreeDrafter,
)
from dparallel_ext.speculation.sizing import Fixed, Measurements, remembered_sizer


def test_sizes_follow_what_passes_take_and_bring() -> None:
    now = [0.0]
    sizer = Measured(8, clock=lambda: now[0])
    assert sizer.sizes == [0, 1, 2, 4, 8]

    def run(right: float, cost: dict[int, float], passes: int) -> list[int]:
        rng, asked = random.Random(0), []
        for _ in range(passes):
            size = sizer.size(1)
            with sizer.verifying():
                now[0] += cost[size]
            taken = 0
            while taken < size and rng.random() < right:
                taken += 1
            if size:
                sizer.learn(size, taken)
            asked.append(size)
        return asked

    cheap = {0: 1.0, 1: 1.01, 2: 1.02, 4: 1.04, 8: 1.1}
    assert set(run(0.95, cheap, 12)) == {0, 1, 2, 4, 8}  # each is tried
    run(0.95, cheap, 100)
    assert run(0.95, cheap, 200).count(8) > 150
    dear = {0: 1.0, 1: 3.0, 2: 3.0, 4: 3.0, 8: 3.0}
    run(0.05, dear, 2000)
    assert run(0.05, dear, 200).count(0) > 150  # drafting is off


def test_passes_that_are_recorded_do_not_count() -> None:
    """On a GPU the second pass of a size is recorded: it takes longer, as the first does."""
    now, used = [0.0], dict.fromkeys((0, 1, 2, 4, 8), 0)
    sizer = Measured(8, clock=lambda: now[0])
    asked = []
    for _ in range(60):
        size = sizer.size(1)
        with sizer.verifying():
            now[0] += (3.0 if size else 1.0) + (10.0 if used[size] < 2 else 0.0)
        used[size] += 1
        sizer.learn(size, min(size, 1))  # two tokens a pass are worth less than they take
        asked.append(size)
    assert set(asked[-40:]) == {0}


@pytest.mark.parametrize("kind", ["ngram", "ppd"])
def test_sizes_are_told_what_passes_accept(kind: str) -> None:
    """Of each draft that was asked for, but of riders alone, as in the pass over a prompt."""

    class Told(Fixed):
        def learn(self, asked: int, taken: int) -> None:
            said.append((asked, taken))

    said: list[tuple[int, int]] = []
    drafts, drafter = 0, NGram() if kind == "ngram" else riding("ppd")
    batch = CausalBatch(MODEL, 2, 64, drafter=drafter, sizer=Told(6))
    own = make_settings(DecodeConfig(eos_id=-1), MODEL, "none", 1)[0]
    with torch.inference_mode():
        for lane in range(2):
            batch.admit(lane, torch.arange(3, 14 + lane), 20, own)
        while live := batch.live:
            asked = {b: min(6, s.room - 1) for b in live if not (s := batch.sequences[b]).prefills}
            said.clear()
            batch.step()
            told = [b for b in live if asked.get(b) and (kind == "ngram" or batch.sequences[b].drafted)]
            assert said == [(asked[b], batch.sequences[b].accepted) for b in told]
            drafts += any(asked.values())
    assert batch.draft_forwards == drafts > 0
    assert sum(batch.counts.accepted) > 0


def test_what_was_measured_with_a_drafter_serves_its_next_call(tmp_path: Path) -> None:
    """Of a name, also where the object is made anew, and of an object while there is this object."""
    model = model_of()
    name, made = f"tree:{tmp_path}", drafter_with("dflash", model)
    first = remembered_sizer(model, name, TreeDrafter(made))
    for _ in range(first.TRIALS * len(first.sizes)):
        first.size(1)
        with first.verifying():
            pass
        first.learn(4, 3)
    again = remembered_sizer(model, f"tree:{tmp_path}", TreeDrafter(made))
    assert again.known is first.known
    assert again.tokens(4) > 1  # it has drafted nothing yet, and has to be asked all the same
    other = TreeDrafter(made)
    assert (
        remembered_sizer(model, other, other).known
        is remembered_sizer(model, other, other).known
        is not first.known
    )
    assert (
        remembered_sizer(model, name, NGram(most=3)).known is not first.known
    )  # the file has another drafter


def test_threads_ask_one_after_the_other_for_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    model, drafter, inside, at_once = model_of(), NGram(), list[int](), set[int]()

    class Slow(Measurements):
        def __init__(self, most: int) -> None:
            inside.append(most)
            time.sleep(0.001)  # another thread runs
            at_once.add(len(inside))
            inside.pop()
            super().__init__(most)

    monkeypatch.setattr("dparallel_ext.speculation.sizing.Measurements", Slow)
    with ThreadPoolExecutor(4) as threads:
        made = [*threads.map(lambda call: remembered_sizer(model, f"drafter {call}", drafter), range(40))]
    assert len({each.known for each in made}) == 40
    assert at_once == {1}


def test_a_drafter_of_ones_own_need_not_be_hashable() -> None:
    @dataclass
    class Own(Knowing):
        most: int = 4

        def __post_init__(self) -> None:
            super().__init__(list(plain().sequences), most=self.most)

    @dataclass(slots=True)
    class Slotted:
        most: int = 4

        def check(self, model: Model) -> None:
            pass

        def session(self, model: Model, kv_cache: Any, lanes: int, *, graphs: bool = True) -> DraftSession:
            return NGram().session(model, kv_cache, lanes)

    for drafter in (Own(), Slotted()):
        assert torch.equal(plain(drafter=drafter).sequences, plain().sequences)


def test_no_call_keeps_its_models_alive() -> None:
    """Neither a drafter, while the model lives, nor a model that drafts for itself."""
    target = model_of("llama")
    drafters = [model_of("qwen2"), riding("ppd", target)]
    while drafters:
        gone = weakref.ref(drafters[-1])
        plain(target, PROMPTS[:1], drafter=drafters.pop())
        gc.collect()
        assert gone() is None
    gone = weakref.ref(target)
    plain(target, PROMPTS[:1], drafter=target)
    del target
    gc.collect()
    assert gone() is None


def test_passes_over_prompts_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would make the size that was asked for look dear, for as long as it is not asked for again."""
    batch = CausalBatch(MODEL, 2, 60, drafter=NGram(), sizer=(sizer := Measured(4)))
    timed: list[int] = []
    verifying = sizer.verifying

    def seen() -> Any:
        timed.append(batch.forwards)
        return verifying()

    monkeypatch.setattr(sizer, "verifying", seen)
    own = make_settings(DecodeConfig(), MODEL, "none", 1)[0]
    with torch.inference_mode():
        batch.admit(0, PROMPTS[2], 20, own)
        for _ in range(4):
            batch.step()
        batch.admit(1, PROMPTS[2], 20, own)  # beside one that is verified
        for _ in range(3):
            batch.step()
    assert timed == [1, 2, 3, 5, 6]
