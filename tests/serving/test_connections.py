"""The end of a server and of its connections: signals, silent clients, more than files may be open."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import resource
import signal
import socket
import time
from pathlib import Path
from typing import Any

import openai
import pytest
import uvicorn
from asking import BLOCK, FIRST, MODEL, exchange, head, until
from dparallel import registry, text
from dparallel.serving import connections
from openai import OpenAI
from server_here import all_of, answer_of, post, serving

from benchmarks.serving import KEY, server

pytest_plugins = ["servers"]


@pytest.mark.slow
@pytest.mark.parametrize(("grace", "how"), [(60, signal.SIGTERM), (0, signal.SIGINT)])
def test_signals_in_mid_stream(odd_model: Path, grace: int, how: signal.Signals) -> None:
    """What runs is finished in the time of grace, or ends with an error; nothing new is taken."""
    options = ("--name", "odd", "--policy", "one", "--lanes", 1, "--grace", grace)
    with server(odd_model, *options) as served:
        client = OpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0, timeout=120)
        settings = {"model": "odd", "prompt": [5, 6], "max_tokens": 300 if grace else 1900}
        stream = iter(client.completions.create(stream=True, **settings))
        said = next(stream).choices[0].text
        served.process.send_signal(how)
        until(lambda: "Shutting down" in served.log.read_text())
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", served.port), timeout=5)
        if grace:
            chunks = list(stream)
            said += "".join(chunk.choices[0].text for chunk in chunks)
            assert chunks[-1].choices[0].finish_reason == "length"
            assert len(said.strip(text.INCOMPLETE)) == 299
        else:
            with pytest.raises(openai.APIError, match="shutting down") as found:
                list(stream)
            assert found.value.code == "shutting_down"
        code = served.process.wait(30)
        assert code == (-signal.SIGTERM if how == signal.SIGTERM else 0)
        assert "Traceback" not in served.log.read_text()


def test_a_second_ctrl_c_ends_the_time_of_grace(odd_model: Path) -> None:
    """Requests that run are told, and no task is left to be cut off."""
    loaded = registry.load(str(odd_model))
    with serving(loaded, odd_model, {"cache": "none", "lanes": 1}, grace=60, max_length=2048) as here:
        slow = {"model": MODEL, "prompt": [5, 6], "max_tokens": 1900, "policy": "one"}
        whole, streamed = here.connect(), here.connect()
        whole.sendall(post("/v1/completions", json.dumps(slow).encode()))
        until(lambda: here.engine.stats.active == 1)
        streamed.sendall(post("/v1/completions", json.dumps({**slow, "stream": True}).encode()))
        until(lambda: here.engine.stats.waiting == 1)
        here.server.handle_exit(signal.SIGINT, None)
        until(lambda: "Shutting down" in here.log.lines)
        assert here.engine.stats.active == 1
        here.server.handle_exit(signal.SIGINT, None)
        assert (here.stop() < 20, here.server.force_exit) == (True, False)
        status, answer = answer_of(all_of(whole))
        assert (status, answer["error"]["code"]) == (503, "shutting_down")
        assert b'"code":"shutting_down"' in all_of(streamed)
        whole.close()
        streamed.close()
        assert not here.faults()


def test_a_waiting_request_is_told_of_the_end(odd_model: Path) -> None:
    """The time of grace is over before its answer is."""
    slow = {"model": MODEL, "prompt": [5, 6], "max_tokens": 1900, "policy": "one"}
    loaded = registry.load(str(odd_model))
    with serving(loaded, odd_model, {"cache": "none"}, grace=0.2, max_length=2048) as here:
        wires = [here.connect() for _ in range(3)]
        for wire in wires:
            wire.sendall(post("/v1/completions", json.dumps(slow).encode()))
        until(lambda: here.engine.stats.active == 3)
        here.server.handle_exit(signal.SIGTERM, None)
        for wire in wires:
            status, answer = answer_of(all_of(wire))
            assert (status, answer["error"]["code"]) == (503, "shutting_down")
            wire.close()
        assert not here.faults()


def test_a_connection_accepted_as_the_server_ends_does_not_hold_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accepting takes turns of the loop, and uvicorn has told all connections to end by then."""
    told = uvicorn.Server.shutdown
    client, accepted = socket.socketpair()

    async def shutdown(self: Any, sockets: Any = None) -> None:
        def connection() -> Any:
            state = self.server_state, self.lifespan.state
            return self.config.http_protocol_class(self.config, *state)

        ending = asyncio.ensure_future(told(self, sockets))
        await asyncio.sleep(0)
        await asyncio.get_running_loop().connect_accepted_socket(connection, accepted)
        await ending

    monkeypatch.setattr(uvicorn.Server, "shutdown", shutdown)
    with client, serving(grace=60) as here:
        assert here.stop() < 20
        client.settimeout(5)
        assert client.recv(1) == b""
        assert not here.faults()


def test_half_sent_requests_keep_nobody_out() -> None:
    """160 of each kind where 128 files may be open: /health answers throughout, and a text is right after."""
    kinds = (b"POST /v1/completions HT", head("Content-Length: 500") + b'{"mod', b"")
    with server(MODEL, "--block-length", BLOCK, "--cache", "dual", files=128) as served:
        before = exchange(served, "POST", "/v1/completions", FIRST)
        with contextlib.ExitStack() as held:
            for number in range(160 * len(kinds)):
                wire = held.enter_context(socket.create_connection(("127.0.0.1", served.port), timeout=10))
                with contextlib.suppress(OSError):
                    wire.sendall(kinds[number // 160])
                if number % 8 == 7:
                    assert exchange(served, "GET", "/health", key=None)[0] == 200
            after = exchange(served, "POST", "/v1/completions", FIRST)
            assert (before[0], after[0]) == (200, 200)
            assert json.loads(after[2])["choices"] == json.loads(before[2])["choices"]
        lines = [line for line in served.log.read_text().splitlines() if "/health" not in line]
        assert len(lines) < 30, lines
        assert max(map(len, lines)) < 200
        until(lambda: served.metrics()["process_open_fds"] < 40)


def test_each_connection_has_an_end() -> None:
    """Silent ones, those with half a head, those that trickle, and those that do not take their answers."""
    with serving(body_seconds=0.4, send_buffer=4096) as here:
        began = time.monotonic()
        silent, half, trickling = (here.connect() for _ in range(3))
        greedy = socket.socket()
        greedy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        greedy.connect(("127.0.0.1", here.port))
        half.sendall(b"POST /v1/completions HTTP/1.1\r\nHo")
        greedy.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 60)
        late = here.connect()
        late.sendall(post("/v1/completions", b"{}")[:-1])
        assert b" 408 " in all_of(late)
        with pytest.raises(OSError, match=r"reset|Broken pipe"):  # noqa: PT012
            for _ in range(200):
                trickling.sendall(b"a")
                time.sleep(0.05)
        assert all_of(silent) == all_of(half) == b""
        until(lambda: not here.server.server_state.connections, 10)
        assert time.monotonic() - began < 8
        for wire in (silent, half, trickling, greedy, late):
            wire.close()
        assert here.ask(FIRST)[0] == 200
        assert not here.faults()


def test_a_connection_is_kept_as_long_as_a_request_may_take() -> None:
    """uvicorn's own limit of an idle connection, 5 s, would cut in before the promised 30."""
    with serving() as here, here.connect() as wire:
        wire.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b" 200 " in wire.recv(65536)
        (connection,) = here.server.server_state.connections
        until(lambda: connection.timeout_keep_alive_task is not None)
        due = connection.timeout_keep_alive_task.when() - connection.loop.time()
        assert due > here.service.settings.body_seconds - 5


def test_more_requests_than_connections_are_for(odd_model: Path) -> None:
    """Some stay free: who is too much is told so, and /health answers."""
    loaded = registry.load(str(odd_model))
    with serving(loaded, odd_model, {"cache": "none"}, max_connections=6, max_length=2048) as here:
        slow = json.dumps({"model": MODEL, "prompt": [5, 6], "max_tokens": 1500, "policy": "one"}).encode()
        with contextlib.ExitStack() as held:
            for _ in range(3):
                held.enter_context(here.connect()).sendall(post("/v1/completions", slow))
            until(lambda: here.engine.stats.active == 3)
            for _ in range(20):  # they make place for each other
                held.enter_context(here.connect()).sendall(b"POST")
            status, answer = here.ask({**FIRST, "prompt": [5, 6]})
            assert (status, answer["error"]["code"]) == (429, "full")
            assert here.get("/health")[0] == 200
            assert here.engine.stats.active == 3
        here.settles()
        assert here.ask({**FIRST, "prompt": [5, 6]})[0] == 200


def test_connections_beyond_the_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [(256, 4096)]
    monkeypatch.setattr("resource.getrlimit", lambda _: limits[0])
    most = connections.most_connections(None)
    assert 100 < most < 256 - connections.SPARE
    assert connections.most_connections(most - 20) == most - 20
    with pytest.raises(
        ValueError, match=rf"max_connections: .* since 256 files may be open .*, got {most + 20}"
    ):
        connections.most_connections(most + 20)
    limits[0] = (32, 4096)
    with pytest.raises(ValueError, match=r"max_connections: expected at most 0, since 32 files"):
        connections.most_connections(None)
    limits[0] = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    assert connections.most_connections(None) == connections.MOST


def test_the_log_is_bounded() -> None:
    """In the length of a line, and in lines of a kind; what is left out is counted."""
    found: list[logging.LogRecord] = []
    bound = connections.Bounded()

    def log(second: float, name: str, message: str, *args: Any) -> bool:
        record = logging.makeLogRecord(
            {"name": name, "msg": message, "args": args, "created": 1000.0 + second}
        )
        found.append(record)
        return bound.filter(record)

    assert sum(log(i / 1000, "uvicorn.error", "Invalid HTTP request received.") for i in range(2000)) < 530
    assert not log(1, "asyncio", "socket.send() raised exception.")
    assert log(2, "uvicorn.error", "Another %s", "x" * 10000)
    assert len(found[-1].getMessage()) == 500
    asked = ("127.0.0.1:1", "GET", "/" + "a" * 9000, "1.1")
    assert sum(log(3, "uvicorn.access", '%s - "%s %s HTTP/%s" %d', *asked, 200) for _ in range(1000)) == 500
    assert log(3, "uvicorn.access", '%s - "%s %s HTTP/%s" %d', *asked, 401)
    assert len(found[-1].getMessage()) < 300
    assert log(4, "uvicorn.access", '%s - "%s %s HTTP/%s" %d', *asked, 200)
    assert "(500 more such lines were left out)" in found[-1].getMessage()
    assert log(9, "uvicorn.error", "Invalid HTTP request received.")
    assert "more such lines were left out" in found[-1].getMessage()


def test_garbage_behind_a_request_is_no_fault() -> None:
    """A body that is no body, behind a head that is answered at once; and after an answer."""
    bad = b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"
    with serving(keys=("k",)) as here:
        for sent in (
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n" + bad,
            b"GET /health HTTP/1.1\r\nHost: x\r\n" + bad,
            b"HEAD /health HTTP/1.1\r\nHost: x\r\n\r\nrubbish\r\n\r\n",
            b"\x16\x03\x01\r\n\r\n",
        ):
            assert re.findall(rb"HTTP/1.1 (\d+) ", here.exchange(sent))[-1] == b"400"
        assert answer_of(here.exchange(sent))[1]["error"]["type"] == "invalid_request_error"
        assert not here.faults()
