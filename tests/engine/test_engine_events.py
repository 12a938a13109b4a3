"""What happens to an engine's requests: cancelled, failed, waited for; callbacks, threads, its end."""

from __future__ import annotations

import gc
import itertools
import math
import signal
import threading
import time
import weakref
from concurrent.futures import CancelledError
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from engines import BLOCK, LLADA, SDAR, Gate, alone, some_prompts, until
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext.engine.core import EngineCore
from dparallel_ext.models import Model


def test_cancelled_requests_leave_at_the_next_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    with dx.Engine(LLADA, block_length=8, lanes=1, max_length=64) as engine:
        running, waiting, last = (engine.submit([1, 2], gen_length=24) for _ in range(3))
        blocks = iter(running)
        until(lambda: engine.stats.active == 1)
        gate.passes.release(8)
        assert len(next(blocks)) == 8
        waiting.cancel()
        running.cancel()
        for _ in range(2):  # before the engine hears of it: one end each
            waiting.cancel()
        gate.passes.release(100)
        with pytest.raises(CancelledError, match="request 1 was cancelled"):
            waiting.result(60)
        end = waiting.events.all[-1]
        assert isinstance(end, dx.Completion)
        assert end.nfe == 0  # not a running request's
        with pytest.raises(CancelledError):
            list(blocks)
        assert last.result(60).finish_reason == "length"
        last.cancel()  # over: nothing happens
        assert last.result().finish_reason == "length"
    assert (engine.stats.cancelled, engine.stats.completed, engine.stats.pages_used) == (2, 1, 0)
    assert gate.counts[-1] > 0
    assert len(gate.counts) <= 8 + 1 + 24


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_what_one_request_fails_of_concerns_no_other(monkeypatch: pytest.MonkeyPatch, cache: str) -> None:
    """A prompt with token 499 makes its own rows NaN."""
    step = Model.step

    def poisoned(model: Model, ids: Tensor, slots: Any, metadata: Any) -> Tensor:
        hidden = step(model, ids, slots, metadata)
        for begin, end in zip(metadata.q_start.tolist(), metadata.q_end.tolist(), strict=True):
            if bool((ids[begin:end] == 499).any()):
                hidden[begin:end] = float("nan")
        return hidden

    monkeypatch.setattr(Model, "step", poisoned)
    prompts = [p.clamp(max=498) for p in some_prompts(5, 6)]
    expected = [alone(LLADA, p, cache, gen_length=16, threshold=1.0) for p in prompts]
    with dx.Engine(LLADA, cache=cache, block_length=BLOCK, lanes=3, max_length=64) as engine:
        bad = [engine.submit([499, 3], gen_length=16) for _ in range(2)]
        good = [engine.submit(p, gen_length=16, threshold=1.0) for p in prompts]
        for handle in bad:
            with pytest.raises(ValueError, match=r"logits: sequence \d at position 2 holds NaN"):
                handle.result(60)
            with pytest.raises(ValueError, match="NaN"):
                list(handle)
        for handle, (tokens, nfe) in zip(good, expected, strict=True):
            assert (handle.result(60).tokens, handle.result().nfe) == (tokens, nfe)
    assert (engine.stats.failed, engine.stats.completed) == (2, 6)


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, SystemExit, KeyboardInterrupt])
def test_what_a_pass_raises_fails_the_requests_that_raise_it(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    """In the pass that several share, each by itself then; and where a request is let in."""
    step, raising = Model.step, threading.Event()

    def broken(model: Model, ids: Tensor, slots: Any, metadata: Any) -> Tensor:
        if bool((ids == 499).any()):
            raise error("no such luck")
        return step(model, ids, slots, metadata)

    monkeypatch.setattr(Model, "step", broken)
    with dx.Engine(LLADA, block_length=BLOCK, lanes=3, max_length=64) as engine:
        good = engine.submit([1, 2], gen_length=24, threshold=1.0)
        bad = [engine.submit([499], gen_length=8) for _ in range(3)]
        expected = error if issubclass(error, Exception) else RuntimeError
        for handle in bad:
            with pytest.raises(expected, match=r"no such luck|the model raised") as failed:
                handle.result(60)
            assert error in (type(failed.value), type(failed.value.__cause__))
        assert (
            good.result(60).tokens
            == alone(LLADA, torch.tensor([1, 2]), "dual", gen_length=24, threshold=1.0)[0]
        )
        admit = engine.core.batch.admit

        def full(*args: Any, **more: Any) -> Any:
            if raising.is_set():
                raise error("no such luck")
            return admit(*args, **more)

        monkeypatch.setattr(engine.core.batch, "admit", full)
        raising.set()
        with pytest.raises(expected):
            engine.submit([1], gen_length=8).result(60)
        raising.clear()
        assert len(engine.submit([1], gen_length=8).result(60).tokens) == 8
    stats = engine.stats
    assert (stats.failed, stats.completed, stats.cancelled, stats.pages_used) == (4, 2, 0, 0)


@pytest.mark.parametrize("error", [ZeroDivisionError, MemoryError, SystemExit])
def test_a_fault_of_the_engine_leaves_nobody_waiting(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: type[BaseException]
) -> None:
    gate, told = Gate(monkeypatch), list[Any]()
    engine = dx.Engine(LLADA, lanes=1, max_length=64)

    def fault() -> None:
        raise error("a bug")

    called = engine.run(fault)  # it is made before the first pass
    handles = [engine.submit([1], gen_length=8) for _ in range(3)]
    handles[2].subscribe(told.append)
    handles[2].subscribe(lambda event: 1 / 0)
    until(lambda: engine.stats.active == 1)
    calls = [engine.run(lambda: "made") for _ in range(2)]  # one is made between two passes
    waiting = threading.Thread(target=lambda: told.append(list(handles[1])))
    monkeypatch.setattr(threading, "excepthook", lambda args: told.append(args.exc_value))
    waiting.start()
    monkeypatch.setattr(engine.core, "admit", fault)
    gate.passes.release(100)
    waiting.join(60)
    for handle in handles:
        with pytest.raises(error if issubclass(error, Exception) else RuntimeError) as failed:
            handle.result(60)
        assert error in (type(failed.value), type(failed.value.__cause__))
    until(lambda: len(told) == 2)
    assert told == [failed.value] * 2
    assert called.exception(60) is not None
    assert calls[0].result(60) == "made"
    assert calls[1].exception(60) is failed.value
    for _ in range(2):  # the second time after `close`
        with pytest.raises(RuntimeError, match=f"engine is closed: its thread ended with {error.__name__}$"):
            engine.submit([1], gen_length=4)
        handles[0].cancel()
        engine.close()
    until(lambda: not engine.thread.is_alive())  # Python may still be putting it away
    stats = engine.stats
    assert (stats.failed, stats.completed, stats.waiting, stats.active, stats.pages_used) == (3, 0, 0, 0, 0)
    assert stats.closed
    assert engine.closed
    assert "the engine's thread ends" in caplog.text


def test_an_engine_that_nobody_has_ends_after_its_last_request(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, told = Gate(monkeypatch), list[Any]()
    engine: dx.Engine | None = dx.Engine(LLADA, block_length=8, lanes=1, max_length=64)
    assert engine is not None
    thread, gone = engine.thread, weakref.ref(engine)
    engine.submit([1], gen_length=16).subscribe(lambda event: told.append(event))
    until(lambda: gone().stats.active == 1)  # type: ignore[union-attr]
    engine = None
    gc.collect()
    assert thread.is_alive()
    gate.passes.release(100)
    thread.join(60)
    gc.collect()
    assert gone() is None
    assert not thread.is_alive()
    assert [type(event) for event in told] == [list, list, dx.Completion]


def test_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = some_prompts(9, 6, 40)
    expected = [alone(SDAR, p, "block", gen_length=16)[0] for p in prompts]
    wrong: list[Any] = []
    with dx.Engine(SDAR, lanes=3, max_length=128, pages=12, page_size=8) as engine:

        def client(number: int) -> None:
            for turn in range(5):
                at = (number + turn) % len(prompts)
                handle = engine.submit(prompts[at], gen_length=16)
                if (number + turn) % 4 == 0:
                    handle.cancel()
                try:
                    tokens = list(itertools.chain.from_iterable(handle))
                except CancelledError:
                    continue
                if tokens != expected[at][:16]:
                    wrong.append((at, tokens))

        clients = [threading.Thread(target=client, args=(n,)) for n in range(8)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join(60)
    assert not wrong
    stats = engine.stats
    assert stats.completed + stats.cancelled == 40
    assert stats.pages_used == 0


def test_closing(monkeypatch: pytest.MonkeyPatch) -> None:
    with dx.Engine(LLADA, lanes=1, max_length=64) as engine:
        handles = [engine.submit([1], gen_length=8) for _ in range(3)]
    assert all(h.done for h in handles)  # leaving the block waits for all
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit([1], gen_length=8)
    engine.close()  # again
    gate = Gate(monkeypatch)
    engine = dx.Engine(LLADA, lanes=1, max_length=64)
    handles = [engine.submit([1], gen_length=60) for _ in range(3)]
    closing = threading.Thread(target=engine.close, kwargs={"cancel": True})
    closing.start()
    until(lambda: engine.closed)
    gate.passes.release(100)
    closing.join(60)
    assert not closing.is_alive()
    assert {len(h.events.all) and h.events.all[-1].finish_reason for h in handles} == {"cancelled"}  # type: ignore[union-attr]


@pytest.mark.parametrize("raises", [None, ValueError, KeyboardInterrupt, "while it waits"])
def test_the_end_of_a_with_block(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, raises: Any
) -> None:
    """Without an error requests are finished; with one, or with Ctrl-C meanwhile, they are cancelled."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # workers of pytest-xdist ignore it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    began, closing, close = threading.Event(), threading.Event(), EngineCore.close

    def closes(core: EngineCore, cancel: bool) -> None:
        close(core, cancel)
        closing.set()

    def at_a_pass(_: dx.DraftEvent) -> None:
        began.set()
        first = not closing.is_set()
        assert closing.wait(60)
        if first and raises == "while it waits":
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            until(lambda: len(closed) > 1)

    closed: list[bool] = []
    monkeypatch.setattr(
        EngineCore, "close", lambda core, cancel: (closed.append(cancel), closes(core, cancel))
    )
    error = KeyboardInterrupt if raises == "while it waits" else raises
    raised = (
        nullcontext()
        if error is None
        else pytest.raises(error, match="in the block" if raises == error else None)
    )
    with raised, dx.Engine(LLADA, block_length=8, lanes=1, max_length=64) as engine:
        done = engine.submit([1, 2], gen_length=0)
        done.result(60)
        running = engine.submit([1, 2], gen_length=16, on_draft=at_a_pass)
        waiting = engine.submit([3, 4], gen_length=16)
        assert began.wait(60)
        if error is not None and raises == error:
            raise error("in the block")
    engine.close()  # and wait, if that was interrupted
    assert closed[:2] == {None: [False, False], "while it waits": [False, True]}.get(raises, [True, False])
    engine.thread.join(60)  # Python may still be putting it away
    assert not engine.thread.is_alive()
    assert done.result().finish_reason == "length"
    for handle in (running, waiting):
        if error is None:
            assert handle.result(60).finish_reason == "length"
        else:
            with pytest.raises(CancelledError):
                handle.result(60)
    assert (engine.stats.completed, engine.stats.cancelled) == ((3, 0) if error is None else (1, 2))
    with pytest.raises(RuntimeError, match="the engine is closed"):
        engine.submit([1], gen_length=4)


def test_waiting_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    with dx.Engine(LLADA, lanes=1, max_length=64) as engine:
        handle = engine.submit([1], gen_length=2)
        with pytest.raises(TimeoutError, match=r"request 0 has not ended in 0.01 s"):
            handle.result(0.01)
        for timeout in (0, -1.0, -math.inf):
            with pytest.raises(TimeoutError):
                handle.result(timeout)
        for wrong in (math.nan, "1", [1]):
            with pytest.raises(ValueError, match="timeout: expected seconds or None, got"):
                handle.result(wrong)  # type: ignore[arg-type]
        assert handle.events.waiters == []
        gate.passes.release(10)
        assert handle.result(math.inf).seconds >= handle.result(1e300).seconds_waiting >= 0


def test_seconds_are_counted_from_the_submit_and_from_the_lane() -> None:
    goes_on, began, ends = threading.Event(), list[float](), list[Any]()

    def hold(_: dx.DraftEvent) -> None:
        began.append(time.monotonic())
        assert goes_on.wait(60)

    with dx.Engine(LLADA, block_length=8, lanes=1, max_length=64) as engine:
        running = engine.submit([1], gen_length=8, on_draft=hold)
        until(lambda: bool(began))
        waiting, leaving = (engine.submit([1], gen_length=8) for _ in range(2))
        leaving.subscribe(ends.append)
        leaving.cancel()
        asked = time.monotonic()
        time.sleep(0.01)
        released = time.monotonic()
        goes_on.set()
        first, second = running.result(60), waiting.result(60)
        until(lambda: bool(ends))
    assert first.seconds - first.seconds_waiting >= released - began[0]
    assert second.seconds >= second.seconds_waiting >= released - asked
    assert ends[0].finish_reason == "cancelled"
    assert ends[0].seconds == ends[0].seconds_waiting >= released - asked  # it never had a lane


def test_subscribers_get_every_event_in_order() -> None:
    with dx.Engine(LLADA, block_length=8, lanes=1, max_length=64) as engine:
        early: list[Any] = []
        handle = engine.submit([1], gen_length=24)
        handle.subscribe(early.append)
        done = handle.result(60)
    late: list[Any] = []
    handle.subscribe(late.append)
    assert early == late == [*(done.tokens[a : a + 8] for a in (0, 8, 16)), done]
    assert engine.core.calling == math.inf  # its thread is in no callback
    with pytest.raises(ValueError, match="callback: expected a function, got int"):
        handle.subscribe(3)  # type: ignore[arg-type]


ERRORS = [
    RuntimeError,
    SystemExit,
    KeyboardInterrupt,
    GeneratorExit,
    CancelledError,
    StopIteration,
    MemoryError,
]


@pytest.mark.parametrize("by", ["subscribe", "on_draft"])
@pytest.mark.parametrize("error", ERRORS)
def test_a_callback_that_raises_ends_its_request_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: type[BaseException], by: str
) -> None:
    gate, seen, others = Gate(monkeypatch), list[Any](), list[Any]()

    def fail(event: Any) -> None:
        seen.append(event)
        raise error("enough")

    with dx.Engine(LLADA, block_length=8, lanes=2, max_length=64) as engine:
        bad = engine.submit([1, 2], gen_length=16, on_draft=fail if by == "on_draft" else None)
        good = engine.submit([1, 2], gen_length=16)
        if by == "subscribe":
            bad.subscribe(fail)
        bad.subscribe(others.append)
        gate.passes.release(100)
        with pytest.raises(RuntimeError, match=f"request 0: a callback raised {error.__name__}") as failed:
            bad.result(60)
        assert isinstance(failed.value.__cause__, error)
        with pytest.raises(RuntimeError, match="a callback raised"):
            list(bad)
        assert len(good.result(60).tokens) == 16
        assert len(engine.submit([1, 2], gen_length=16).result(60).tokens) == 16
    if by == "subscribe":  # both got the block, and then the end
        assert seen == others
        assert [type(event) for event in seen] == [list, RuntimeError]
    assert others[-1] is failed.value
    assert (engine.stats.failed, engine.stats.completed, engine.stats.pages_used) == (1, 2, 0)
    assert "a callback of Handle.subscribe or on_draft failed" in caplog.text
    assert "enough" in caplog.text


def test_what_a_callback_raises_of_the_last_event_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)

    def fail(event: Any) -> None:
        if isinstance(event, dx.Completion):
            raise SystemExit

    with dx.Engine(LLADA, lanes=1, max_length=64) as engine:
        handle = engine.submit([1], gen_length=8)
        handle.subscribe(fail)
        gate.passes.release(8)
        assert len(handle.result(60).tokens) == 8
        with pytest.raises(SystemExit):  # here it is the caller's
            handle.subscribe(fail)
    assert (engine.stats.completed, engine.stats.failed) == (1, 0)


def test_a_callback_may_call_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Submit, cancel, subscribe, close; but it cannot wait for what its own thread is to compute."""
    gate, more, refusals = Gate(monkeypatch), list[dx.Handle](), list[str]()

    def busy(event: Any) -> None:
        if not isinstance(event, list) or more:
            return
        more.extend(engine.submit([3], gen_length=4) for _ in range(2))
        more[1].cancel()
        for wait in (other.result, lambda: next(iter(other))):
            try:
                wait()
            except RuntimeError as error:
                refusals.append(str(error))
        assert not handle.done
        assert engine.stats.active == 2
        handle.subscribe(lambda event: None)
        engine.close()

    with dx.Engine(LLADA, block_length=8, lanes=2, max_length=64) as engine:
        handle, other = engine.submit([1], gen_length=16), engine.submit([1], gen_length=24)
        handle.subscribe(busy)
        gate.passes.release(200)
        assert len(handle.result(60).tokens) == 16
        assert len(other.result(60).tokens) == 24
        assert len(more[0].result(60).tokens) == 4
        with pytest.raises(CancelledError):
            more[1].result(60)
    assert len(refusals) == 2
    assert "request 1: a callback in the engine's thread cannot wait for it" in refusals[0]


def test_what_the_caller_changes_after_a_submit_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, suppress = torch.tensor([1, 2, 3]), torch.tensor([4, 5])
    expected = alone(LLADA, prompt, "dual", gen_length=8, suppress=suppress)[0]
    gate = Gate(monkeypatch)
    with dx.Engine(LLADA, block_length=BLOCK, lanes=1, max_length=64) as engine:
        engine.submit([1], gen_length=8)
        until(lambda: engine.stats.active == 1)
        handle = engine.submit(prompt, gen_length=8, suppress=suppress)
        prompt.fill_(10**9)
        suppress.fill_(expected[0])
        gate.passes.release(100)
        assert handle.result(60).tokens == expected


def test_no_lock_is_held_during_a_callback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread may hold what the callback waits for, and ask the handle meanwhile."""
    gate, entered, leave = Gate(monkeypatch), threading.Event(), threading.Event()

    def wait(event: Any) -> None:
        entered.set()
        assert leave.wait(60)

    with dx.Engine(LLADA, block_length=8, lanes=1, max_length=64) as engine:
        handle = engine.submit([1], gen_length=16)
        handle.subscribe(wait)
        gate.passes.release(100)
        assert entered.wait(60)
        with pytest.raises(TimeoutError):
            handle.result(0.01)
        assert not handle.done
        late: list[Any] = []
        handle.subscribe(late.append)
        assert late == [handle.events.all[0]]
        assert engine.stats.active == 1
        leave.set()
        assert len(handle.result(60).tokens) == 16
