"""Clients that leave, stall and hang up half-way: others get their text, and nothing of theirs stays."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from server_here import MODEL, Here, all_of, post, serving

from benchmarks.serving import KEY, server

PROMPT = "sam has 3 cups . each cup has 4 beads"
FIRST = {"model": MODEL, "prompt": PROMPT, "max_tokens": 16}
LONG = {"max_tokens": 60, "ignore_eos": True, "policy": "one"}


@pytest.fixture(scope="module")
def here() -> Iterator[Here]:
    with serving(body_seconds=2.0, max_connections=24) as running:
        yield running


@pytest.fixture(scope="module")
def expected(here: Here) -> Any:
    return here.ask(FIRST)[1]["choices"]


def client(rng: random.Random, port: int, *headers: str) -> None:
    """One that does what it likes with its connection, and then leaves."""
    body = {**FIRST, "stream": rng.random() < 0.8, "n": rng.choice([1, 1, 3]), **rng.choice([{}, LONG])}
    if body["stream"]:
        body["stream_drafts"] = rng.random() < 0.5
    sent = post("/v1/completions", json.dumps(body).encode(), *headers, close=rng.random() < 0.5)
    with contextlib.suppress(OSError), socket.socket() as wire:
        if rng.random() < 0.3:
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        wire.settimeout(0.5)
        wire.connect(("127.0.0.1", port))
        how = rng.randint(0, 7)
        if how == 0:  # half of it
            wire.sendall(sent[: rng.randint(0, len(sent) - 1)])
            time.sleep(rng.uniform(0, 0.2))
        elif how == 1:  # little by little
            for at in range(0, len(sent), 50):
                wire.sendall(sent[at : at + 50])
                time.sleep(rng.uniform(0, 0.02))
            wire.recv(1000)
        elif how == 2:  # to the end, slowly
            wire.sendall(sent)
            for _ in range(20):
                if not wire.recv(rng.choice([1, 100])):
                    break
                time.sleep(rng.uniform(0, 0.02))
        elif how == 3:  # without a word more
            wire.sendall(sent)
            wire.shutdown(socket.SHUT_WR)
            all_of(wire)
        elif how == 4:  # a few at once, none of which is read
            wire.sendall(sent * rng.randint(2, 5))
            time.sleep(rng.uniform(0, 0.2))
        elif how == 5:
            wire.sendall(sent)
            wire.recv(rng.choice([1, 200, 2000]))
        elif how == 6:
            wire.sendall(sent)
            all_of(wire)
        else:
            time.sleep(rng.uniform(0, 0.3))
        if rng.random() < 0.5:  # a reset, not an end
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def crowd(rng: random.Random, count: int, port: int, *headers: str) -> list[threading.Thread]:
    seeds = [rng.random() for _ in range(count)]
    threads = [
        threading.Thread(target=client, args=(random.Random(seed), port, *headers), daemon=True)
        for seed in seeds
    ]
    for thread in threads:
        thread.start()
    return threads


def test_clients_that_do_as_they_like(attack: Any, here: Here, expected: Any) -> None:
    for rng in attack.cases(2):
        threads = crowd(rng, 12, here.port)
        assert here.get("/health")[0] == 200
        status, answer = here.ask(FIRST)
        assert (status, answer["choices"]) == (200, expected)
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
        here.settles()
        assert not here.faults(), here.faults()[0]
        here.log.lines.clear()


def test_an_end_amid_clients(attack: Any, loaded: Any) -> None:
    """The server ends soon after its time of grace, whatever they do."""
    for rng in attack.cases(1):
        grace = rng.choice([0.0, 0.2])
        with serving(loaded, grace=grace) as here:
            threads = crowd(rng, 12, here.port)
            time.sleep(rng.uniform(0.05, 0.3))
            assert here.stop() < grace + 3
            assert not here.faults(), here.faults()[0]
            assert here.engine.closed
            stats = here.engine.stats
            assert (stats.active, stats.waiting, stats.pages_used) == (0, 0, 0)
            for thread in threads:
                thread.join(20)
                assert not thread.is_alive()


@pytest.fixture(scope="module")
def loaded() -> Any:
    from dparallel import registry

    return registry.load(MODEL)


@pytest.mark.slow
def test_sigterm_amid_clients(attack: Any) -> None:
    for rng in attack.cases(1):
        with server(MODEL, "--block-length", 8, "--cache", "dual", "--grace", 0.5) as served:
            threads = crowd(rng, 30, served.port, f"Authorization: Bearer {KEY}")
            time.sleep(rng.uniform(0.1, 0.4))
            began = time.monotonic()
            served.process.terminate()
            assert served.process.wait(30) == -signal.SIGTERM
            assert time.monotonic() - began < 5
            for thread in threads:
                thread.join(20)
            assert "Traceback" not in served.log.read_text()
