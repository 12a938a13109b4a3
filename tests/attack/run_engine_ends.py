"""Programs that end while an engine computes, for test_engine_chaos: run_engine_ends.py [NAME...].

Each ends in a fork of its own, made before there is any engine or thread, so that torch is imported once.
Prints as JSON by name how each ended: its exit status, minus the signal, or "hangs".
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import queue
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import torch

import dparallel_ext as dx
from dparallel_ext.engine import engine as engine_module

MODEL = dx.models.load(Path(__file__).parents[1] / "golden" / "llada_tiny_a")
SECONDS = 60.0
kept: Any = None


def busy(requests: int = 6, **more: Any) -> dx.Engine:
    """An engine with requests under way and waiting."""
    made = dx.Engine(MODEL, lanes=3, max_length=512, **more)
    for _ in range(requests):
        made.submit([1, 2, 3], gen_length=500)
    while not made.stats.forwards:
        time.sleep(0.001)
    return made


def interrupt(number: int, after: float = 0.05) -> None:
    """This process, once."""
    threading.Timer(after, os.kill, (os.getpid(), number)).start()


def normal_end() -> None:
    global kept
    kept = busy()


def an_idle_engine() -> None:
    global kept
    kept = dx.Engine(MODEL, max_length=64)
    kept.submit([1], gen_length=4).result()


def several_engines_one_closed() -> None:
    global kept
    kept = [busy(), busy(), dx.Engine(MODEL, max_length=64)]
    kept[1].close(cancel=True)


def a_reference_cycle() -> None:
    cycle: list[Any] = [busy()]
    cycle.append(cycle)


def dropped_while_it_computes() -> None:
    busy()
    gc.collect()


def dropped_at_the_end() -> None:
    """The engine's thread may be freeing the engine."""
    dx.Engine(MODEL, lanes=16, max_length=2**15).submit([1], gen_length=4).result()


def sys_exit() -> None:
    next(iter(busy(1).submit([1], gen_length=500)))
    sys.exit(3)


def an_uncaught_exception() -> None:
    with busy():
        raise ValueError("uncaught")


def an_exception_beside_a_subscriber_that_waits() -> None:
    """Its queue is full, and who empties it is gone: the end waits for it no longer than PATIENCE."""
    engine_module.PATIENCE = 0.2
    full: queue.Queue[Any] = queue.Queue(1)
    made = busy()
    made.submit([1], gen_length=8)
    made.submit([1], gen_length=64).subscribe(full.put)
    for request in list(made.core.requests.values()):
        request.handle.cancel()
    full.get()
    time.sleep(0.2)
    raise ValueError("uncaught")


def ctrl_c_at_a_result() -> None:
    interrupt(signal.SIGINT)
    busy().submit([1], gen_length=500).result()


def ctrl_c_at_an_iterator() -> None:
    interrupt(signal.SIGINT)
    list(busy().submit([1], gen_length=500))


def ctrl_c_twice_at_a_close() -> None:
    """`Thread.join` forgets a thread that it was interrupted at."""
    made = busy(100)  # more than it decodes until then
    interrupt(signal.SIGINT)
    with contextlib.suppress(KeyboardInterrupt):
        made.close()
    interrupt(signal.SIGINT)
    made.close()


def ctrl_c_while_submitting() -> None:
    made = dx.Engine(MODEL, lanes=3, max_length=64, max_waiting=10**6)
    interrupt(signal.SIGINT, 0.1)
    while True:
        made.submit([1], gen_length=60)


def ctrl_c_again_and_again() -> None:
    """At any moment of any call, and the engine is as good as before."""
    rng, made, handles = (
        random.Random(time.time_ns()),
        dx.Engine(MODEL, lanes=2, max_length=64),
        list[dx.Handle](),
    )
    calls: list[Callable[[], Any]] = [
        lambda: handles.append(made.submit([1, 2], gen_length=8, threshold=0.5)),
        lambda: handles[-1].result(),
        lambda: list(handles[-1]),
        lambda: handles[-1].cancel(),
        lambda: handles[-1].subscribe(lambda event: None),
        lambda: made.stats,
    ]
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    calls[0]()
    interrupted, end = 0, time.monotonic() + 1
    while time.monotonic() < end:
        try:
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-6, 1e-3))
            while True:
                with contextlib.suppress(CancelledError, dx.EngineFull):
                    rng.choice(calls)()
        except KeyboardInterrupt:
            interrupted += 1
    assert interrupted > 20
    assert len(made.submit([1, 2], gen_length=8).result(SECONDS).tokens) == 8
    made.close()
    stats = made.stats
    assert (stats.waiting, stats.active, stats.pages_used, stats.failed) == (0, 0, 0, 0)
    assert all(handle.done for handle in handles)
    sys.exit(4)


def sigterm() -> None:
    global kept
    kept = busy()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(10)


def sigterm_with_a_handler_that_exits() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
    interrupt(signal.SIGTERM)
    busy().submit([1], gen_length=500).result()


def sigterm_with_a_handler_that_closes() -> None:
    """In the midst of a submit, too."""
    made = dx.Engine(MODEL, lanes=3, max_length=64, max_waiting=10**6)
    signal.signal(signal.SIGTERM, lambda *_: made.close(cancel=True))
    interrupt(signal.SIGTERM, 0.1)
    try:
        while True:
            made.submit([1], gen_length=60)
    except RuntimeError as error:
        sys.exit(6 if str(error) == "the engine is closed" else 1)


def callbacks_that_raise() -> None:
    def leave(event: Any) -> None:
        raise SystemExit(9)

    made = busy()
    for _ in range(3):
        made.submit([1], gen_length=8, on_draft=leave).subscribe(leave)
    for request in list(made.core.requests.values())[:3]:
        request.handle.cancel()
    time.sleep(0.05)


def daemon_threads() -> None:
    """That submit and wait for as long as they may."""
    made = busy()

    def client() -> None:
        with contextlib.suppress(RuntimeError, dx.EngineFull, CancelledError):
            while True:
                made.submit([1], gen_length=8).result()

    for _ in range(4):
        threading.Thread(target=client, daemon=True).start()
    time.sleep(0.05)


def a_thread_that_outlives_the_main_one() -> None:
    """It still gets its answer."""
    handle = dx.Engine(MODEL, max_length=512).submit([1], gen_length=200)

    def client() -> None:
        if len(handle.result(SECONDS).tokens) != 200:
            os._exit(1)

    threading.Thread(target=client).start()


def work_at_exit() -> None:
    """What was registered after the import still has an engine, and none can be made when they are closed."""
    made = dx.Engine(MODEL, max_length=512)

    def last() -> None:
        if len(made.submit([1], gen_length=8).result(SECONDS).tokens) != 8:
            os._exit(1)

    atexit.register(last)
    atexit.unregister(engine_module.close_engines)  # so that it comes first
    atexit.register(engine_module.close_engines)
    atexit.register(last)


def a_fork_has_no_engine() -> None:
    """It is told so at once, whatever the thread held, and ends; the parent's engine goes on."""
    made = dx.Engine(MODEL, lanes=3, max_length=512)
    expected = made.submit([1, 2], gen_length=64).result().tokens
    children = []
    for _ in range(3):
        early = made.submit([1, 2], gen_length=64)
        early.subscribe(lambda event: None)
        next(iter(early))
        over = made.submit([3], gen_length=0)
        over.result()
        child = os.fork()
        if child == 0:
            in_a_fork(made, early, over)
            made.close(cancel=True)
            with made:
                sys.exit(7)
        children.append((child, early))
    for child, handle in children:
        assert handle.result(SECONDS).tokens == expected
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert made.submit([1, 2], gen_length=64).result(SECONDS).tokens == expected
    made.close()


def in_a_fork(made: dx.Engine, early: dx.Handle, over: dx.Handle) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: made.submit([1]),
        lambda: made.stats,
        early.result,
        lambda: list(early),
    ]
    for call in calls:
        try:
            call()
        except RuntimeError as error:
            assert f"the engine belongs to process {os.getppid()}, and this is a fork of it" in str(error)  # noqa: PT017
        else:
            raise AssertionError("not refused")
    early.cancel()
    told: list[Any] = []
    early.subscribe(told.append)
    assert isinstance(told[-1], RuntimeError)
    assert over.result().tokens == []
    assert made.closed
    own = dx.Engine(MODEL, lanes=1, max_length=64)
    assert len(own.submit([1], gen_length=8).result(SECONDS).tokens) == 8


def a_fork_in_a_callback() -> None:
    """The fork's one thread is the engine's: there it has nothing more to do."""
    made, children = dx.Engine(MODEL, lanes=3, max_length=512), list[int]()

    def forks(event: Any) -> None:
        if not children:
            children.append(os.fork())
            if not children[0]:
                sys.exit(8)

    handles = [made.submit([1], gen_length=64) for _ in range(2)]
    handles[0].subscribe(forks)
    assert all(len(handle.result(SECONDS).tokens) == 64 for handle in handles)
    assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == 1


ENDS: dict[Callable[[], None], int] = {
    normal_end: 0,
    an_idle_engine: 0,
    several_engines_one_closed: 0,
    a_reference_cycle: 0,
    dropped_while_it_computes: 0,
    dropped_at_the_end: 0,
    sys_exit: 3,
    an_uncaught_exception: 1,
    an_exception_beside_a_subscriber_that_waits: 1,
    ctrl_c_at_a_result: -signal.SIGINT,
    ctrl_c_at_an_iterator: -signal.SIGINT,
    ctrl_c_twice_at_a_close: -signal.SIGINT,
    ctrl_c_while_submitting: -signal.SIGINT,
    ctrl_c_again_and_again: 4,
    sigterm: -signal.SIGTERM,
    sigterm_with_a_handler_that_exits: 5,
    sigterm_with_a_handler_that_closes: 6,
    callbacks_that_raise: 0,
    daemon_threads: 0,
    a_thread_that_outlives_the_main_one: 0,
    work_at_exit: 0,
    a_fork_has_no_engine: 0,
    a_fork_in_a_callback: 0,
}
"""By what must come of it."""


def wait(child: int) -> int | str:
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "hangs"


def main(names: list[str]) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have background jobs ignore it
    torch.set_num_threads(1)  # threads of a pool do not live on in a fork
    gc.freeze()  # a fork's end does not look through all that torch has made
    results = {}
    for function in ENDS:
        if function.__name__ in names:
            process = os.fork()
            if process == 0:
                return function()
            results[function.__name__] = wait(process)
    print(json.dumps(results), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:] or [function.__name__ for function in ENDS])
