"""An engine under random use and misuse from many threads, and programs that end while it computes."""

from __future__ import annotations

import functools
import itertools
import json
import logging
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from typing import Any

import pytest
import run_engine_ends
import torch
from conftest import golden
from drafters import KINDS, Knowing, drafter_with, eagle, exits, model_of, riding, strided
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext.models import Model, Stream
from dparallel_ext.speculation import Draft, Lane, ModelDrafter, TreeDrafter

MODELS = {name: golden.model(name) for name in ("llada_tiny_a", "dream_tiny_a", "sdar_tiny_a")}
MODELS["dream, a prompt block"] = golden.model("dream_tiny_a")
MODELS["dream, a prompt block"].prompt_block = True
MODELS["causal"] = model_of(vocab_size=512)
MODELS["sdar_moe"] = model_of("sdar_moe", vocab_size=512, mask_token_id=511)
DIFFUSION = [
    ("llada_tiny_a", "dual"),
    ("llada_tiny_a", "none"),
    ("dream_tiny_a", "prefix"),
    ("dream, a prompt block", "block"),
    ("sdar_tiny_a", "block"),
    ("sdar_moe", "block"),
]
"""Models and caches."""
RIDING = ("ppd", "hidden_transfer")
LISTED = ("plain", "ngram", "recycling", "chains", "trees", "model", "canvas", "exits", "tree")
EAGLES = ("eagle3", "p-eagle")
GUESSERS = (*LISTED, *KINDS, *RIDING, *EAGLES, "strided")
CAUSAL = [("causal", way) for way in GUESSERS]
"""And drafters."""
BLOCK, LONGEST = 8, 56
RAISED = [
    ValueError,
    SystemExit,
    KeyboardInterrupt,
    GeneratorExit,
    CancelledError,
    TimeoutError,
    StopIteration,
]
NAN = 496
POISON = {499: RuntimeError, 498: MemoryError, 497: SystemExit, NAN: None}
"""Prompts with such a token make a pass raise; NAN makes their keys, values and logits NaN."""
for model in MODELS.values():
    model.embed.weight.data[NAN] = float("nan")
BAD: list[dict[str, Any]] = [
    {"gen_length": 10**9},
    {"gen_length": -1},
    {"gen_length": 10**5000},
    {"gen_length": float("nan")},
    {"prompt": [512]},
    {"prompt": None},
    {"steps": 0},
    {"eos_id": -2},
    {"temperature": float("inf")},
    {"threshold": "x"},
    {"seed": 2**64},
    {"suppress": [10**18]},
    {"stop": [[]]},
    {"on_draft": 1},
]


@functools.cache
def alone(name: str, way: str, prompt: tuple[int, ...], settings: tuple[tuple[str, Any], ...]) -> list[int]:
    """What `decode` or `speculate` gives."""
    call = dict(settings)
    seed = torch.tensor([call.pop("seed")])
    ids = torch.tensor(prompt, dtype=torch.int64)
    out: dx.DecodeOutput
    if name == "causal":
        out = dx.speculate(MODELS[name], [ids], seed=seed, **call)
    else:
        out = dx.decode(
            MODELS[name], [ids], block_length=BLOCK, cache=way, seed=seed, batch_invariant=True, **call
        )
    found: list[int] = out.responses[0][: min(int(out.kept[0]), call["gen_length"])].tolist()
    return found


@dataclass
class Asked:
    """A request, and what it told."""

    handle: dx.Handle
    prompt: tuple[int, ...]
    settings: tuple[tuple[str, Any], ...]
    poisoned: bool
    told: list[Any] = field(default_factory=list)


class Client:
    """A thread that does as it likes, by its own random numbers."""

    def __init__(
        self, engine: dx.Engine, causal: bool, fixed: bool, seed: float, turns: int, name: str
    ) -> None:
        self.engine, self.rng, self.turns = engine, random.Random(seed), turns
        self.causal, self.fixed = causal, fixed
        self.asked: list[Asked] = []
        self.wrong: list[str] = []
        self.thread = threading.Thread(target=self.run, name=name)

    def run(self) -> None:
        for _ in range(self.turns):
            try:
                self.rng.choice(
                    [self.submit, self.submit, self.submit, self.refused, self.cancel, self.wait]
                )()
            except dx.EngineFull:
                time.sleep(0.001)
            except RuntimeError as error:
                if not str(error).startswith("the engine is closed"):
                    self.wrong.append(repr(error))
                return
            except BaseException as error:  # nothing else may come out of it
                self.wrong.append(repr(error))

    def submit(self) -> None:
        rng = self.rng
        prompt = [rng.choice([1, 2]) for _ in range(rng.choice([int(self.causal), 3, 8, 17, 24]))]
        poison = rng.random() < 0.15
        if poison:
            prompt.append(rng.choice(list(POISON)))
        own: dict[str, Any] = {
            "gen_length": rng.choice([0, 1, 8, 13, 24]),
            "temperature": rng.choice([0.0, 0.8]),
            "seed": rng.randrange(3),
            "eos_id": rng.choice([None, 5]),
            "suppress": tuple(POISON),
        }
        if rng.random() < 0.3:
            own |= {"logprobs": True, "top_logprobs": rng.choice([0, 3])}
        if self.causal and rng.random() < 0.3:
            own |= {"repetition_penalty": 1.3, "frequency_penalty": rng.choice([0.0, 0.5])}
        if self.fixed:
            own |= {"threshold": float(rng.choice([1, 3])), "selector": "quota"}
        elif not self.causal:
            own |= {"threshold": rng.choice([0.3, 0.9]), "selector": "confidence"}
        on_draft = rng.choice([None, None, lambda draft: self.callback(rng.random())])
        handle = self.engine.submit(prompt, on_draft=on_draft, **own)
        made = Asked(handle, tuple(prompt), tuple(own.items()), poison and own["gen_length"] > 0)
        self.asked.append(made)
        chance = rng.random()
        try:
            handle.subscribe(made.told.append)
            if chance < 0.3:
                handle.subscribe(lambda event: self.callback(chance))
        except BaseException as error:  # of an event that had been
            if type(error) not in RAISED:
                raise
        if rng.random() < 0.2:
            handle.cancel()

    def callback(self, chance: float) -> None:
        """In the engine's thread."""
        number = int(chance * 1e6)
        what = number % 16
        if what < 4:
            raise RAISED[number % len(RAISED)]("a callback")
        if what == 4 and self.asked:
            self.asked[number % len(self.asked)].handle.cancel()
        if what == 5:
            self.engine.stats  # noqa: B018
        if what == 6:
            self.engine.submit([1, 2], gen_length=0)
        if what == 7:
            next(iter(self.asked[-1].handle))
        if what == 8 and number % 7 == 0:
            self.engine.close(cancel=bool(number % 2))

    def refused(self) -> None:
        with pytest.raises(ValueError, match=r"^[a-z_]+: "):
            self.engine.submit(**{"prompt": [1], "gen_length": 8, **self.rng.choice(BAD)})

    def cancel(self) -> None:
        if self.asked:
            self.rng.choice(self.asked).handle.cancel()

    def wait(self) -> None:
        if not self.asked:
            return
        handle = self.rng.choice(self.asked).handle
        try:
            if self.rng.random() < 0.5:
                handle.result(self.rng.choice([0, 0.001, 0.01, -1.0]))
            else:
                next(iter(handle))
        except Exception:  # it is looked at in the end
            handle.cancel()


def poisoned(embedded: Callable[[Model, Tensor], Stream]) -> Callable[[Model, Tensor], Stream]:
    def checked(model: Model, ids: Tensor) -> Stream:
        for token, error in POISON.items():
            if error is not None and bool((ids == token).any()):
                raise error("a model")
        return embedded(model, ids)

    return checked


DRAFTERS = {
    "plain": None,
    "ngram": "ngram",
    "recycling": "recycling",
    "model": ModelDrafter(model_of("llama", vocab_size=512, num_hidden_layers=1), most=4),
    "canvas": ModelDrafter(MODELS["llada_tiny_a"], most=4),
    "exits": exits((1,), 0.1, target=MODELS["causal"]),
    "tree": TreeDrafter(drafter_with("dflash", MODELS["causal"])),
    **{kind: drafter_with(kind, MODELS["causal"]) for kind in KINDS},
    **{kind: riding(kind, MODELS["causal"]) for kind in RIDING},
    **{kind: eagle(kind, MODELS["causal"]) for kind in EAGLES},
    "strided": strided(MODELS["causal"]),
}


class Guessing(Knowing):
    """Guesses the tokens that the text has already, so that some are right."""

    def _draft(self, lane: Lane, most: int) -> Draft:
        draft = super()._draft(lane, most)
        return draft._replace(tokens=tuple(self.rng.choice(lane.tokens.tolist()) for _ in draft.tokens))


def engine_of(name: str, way: str, fixed: bool, rng: random.Random) -> dx.Engine:
    """An engine; `fixed`: with self-speculation."""
    lanes, own = rng.randint(1, 4), dict[str, Any]()
    if name == "causal":
        guessing = Guessing([], tree=way == "trees", right=0.0, seed=rng.randrange(99))
        own["drafter"] = DRAFTERS.get(way, guessing)
        own["draft_size"] = rng.choice([None, 4])
    else:
        own = {"cache": way, "block_length": BLOCK, "draft_size": rng.choice([1, 3, 9]) if fixed else None}
    return dx.Engine(
        MODELS[name],
        lanes=lanes,
        max_length=LONGEST,
        page_size=BLOCK,
        pages=LONGEST // BLOCK + rng.randint(0, 6 * lanes),
        max_waiting=rng.choice([1, 3, 100]),
        batch_invariant=(name != "causal" and way != "block") or rng.random() < 0.5,
        **own,
    )


@pytest.mark.parametrize(("ways", "few"), [(DIFFUSION, 25), (CAUSAL, 12)], ids=["diffusion", "causal"])
def test_chaos(
    ways: list[tuple[str, str]],
    few: int,
    attack: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Threads submit, cancel, wait, give bad arguments and close; callbacks and passes raise; the engine's
    own thread fails. Every request ends, those that finish as if they were alone; no page is lost, and the
    counters add up.
    """
    caplog.set_level(logging.CRITICAL + 1, logger="dparallel_ext.engine")
    embedded = Model.embedded
    for rng in attack.cases(few):
        name, way = rng.choice(ways)
        fixed = name != "causal" and rng.random() < 0.4
        engine = engine_of(name, way, fixed, rng)
        clients = [
            Client(engine, name == "causal", fixed, rng.random(), rng.randint(4, 12), f"client {n}")
            for n in range(rng.randint(1, 4))
        ]
        fault = rng.choice([None, None, None, "admit", "receive", "advance", "publish", "end"])
        with monkeypatch.context() as patch:
            patch.setattr(Model, "embedded", poisoned(embedded))
            for client in clients:
                client.thread.start()
            time.sleep(rng.random() * 0.05)
            if fault is not None:
                error = rng.choice([RuntimeError, MemoryError, SystemExit])
                patch.setattr(
                    engine.core, fault, lambda *_, error=error: (_ for _ in ()).throw(error("a fault"))
                )
            if rng.random() < 0.5:
                engine.close(cancel=rng.random() < 0.5)
            for client in clients:
                client.thread.join(60)
                assert not client.thread.is_alive(), "a client hangs"
            engine.close(cancel=rng.random() < 0.3)
        check(engine, clients, name, way, fault)


def check(engine: dx.Engine, clients: list[Client], name: str, way: str, fault: str | None) -> None:
    engine.thread.join(60)
    assert not engine.thread.is_alive()
    assert not [wrong for client in clients for wrong in client.wrong]
    ends = {"completed": 0, "failed": 0, "cancelled": 0}
    for asked in [asked for client in clients for asked in client.asked]:
        handle = asked.handle
        assert handle.done
        assert handle.events.waiters == []
        *blocks, last = handle.events.all
        assert asked.told[-1] is last
        assert asked.told == handle.events.all
        tokens = list(itertools.chain.from_iterable(blocks))
        if isinstance(last, dx.Completion) and last.finish_reason != "cancelled":
            ends["completed"] += 1
            assert tokens == last.tokens == alone(name, way, asked.prompt, asked.settings)
            assert not asked.poisoned
        elif isinstance(last, dx.Completion):
            ends["cancelled"] += 1
            assert tokens == last.tokens[: len(tokens)]
            if not asked.poisoned:
                assert last.tokens == alone(name, way, asked.prompt, asked.settings)[: len(last.tokens)]
        else:
            ends["failed"] += 1
            assert isinstance(last, Exception)
            if fault is None and not asked.poisoned:
                assert "a callback raised" in str(last)
    stats = engine.stats
    # Callbacks submitted some too.
    assert all(getattr(stats, kind) >= count for kind, count in ends.items()), (stats, ends)
    assert stats.completed + stats.failed + stats.cancelled == next(engine.request_ids)
    assert (stats.waiting, stats.active, stats.pages_used, stats.closed) == (0, 0, 0, True)
    assert engine.core.requests == engine.core.running == {}
    with pytest.raises(RuntimeError, match=r"^the engine is closed"):
        engine.submit([1])


FEW = [
    "normal_end",
    "an_exception_beside_a_subscriber_that_waits",
    "ctrl_c_twice_at_a_close",
    "daemon_threads",
    "a_fork_has_no_engine",
]


@pytest.mark.slow
def test_the_end_of_a_program(attack: Any) -> None:
    """None aborts, and none hangs."""
    expected = {function.__name__: int(code) for function, code in run_engine_ends.ENDS.items()}
    for rng in attack.cases(1):
        names = rng.sample(sorted(expected), 8) if attack.seconds else FEW
        command = [sys.executable, run_engine_ends.__file__, *names]
        done = subprocess.run(command, capture_output=True, text=True, timeout=500)
        assert json.loads(done.stdout) == {name: expected[name] for name in names}, done.stderr
