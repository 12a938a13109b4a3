"""A server in a thread of the test's own process, so that it starts at once and can be looked into."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dparallel import registry
from dparallel.serving.app import Gate
from dparallel.serving.runner import Server, listen, make_server
from dparallel.serving.service import ModelService, Service
from dparallel.serving.settings import ServerSettings

import dparallel_ext as dx

MODEL, BLOCK, EOS = "builtin:student", 8, 1
LOGGERS = ("uvicorn", "uvicorn.error", "uvicorn.access", "asyncio")


class Lines(logging.Handler):
    """What is logged, a text a record."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@dataclass
class Here:
    """A running server."""

    port: int
    server: Server
    service: Service
    thread: threading.Thread
    log: Lines = field(repr=False)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def engine(self) -> dx.Engine:
        """Of its model, where it has one."""
        (model,) = self.service.models.values()
        return model.engine

    @property
    def gate(self) -> Any:
        """Its `Gate`, once there was a request."""
        found = self.server.config.app.middleware_stack
        while not isinstance(found, Gate):
            found = found.app
        return found

    def connect(self, seconds: float = 20) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=seconds)

    def exchange(self, sent: bytes, seconds: float = 20) -> bytes:
        """What it says until it hangs up."""
        with self.connect(seconds) as wire:
            wire.sendall(sent)
            return all_of(wire)

    def ask(self, body: Any, path: str = "/v1/completions") -> tuple[int, Any]:
        """Status and JSON of the answer to a JSON body."""
        return answer_of(self.exchange(post(path, json.dumps(body).encode())))

    def get(self, path: str) -> tuple[int, bytes]:
        said = self.exchange(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        return int(said.split(b" ", 2)[1]), said.partition(b"\r\n\r\n")[2]

    def stop(self, seconds: float = 30) -> float:
        """Tell it to stop, and wait; the seconds that it took."""
        began = time.monotonic()
        self.server.should_exit = True
        self.thread.join(seconds)
        assert not self.thread.is_alive(), "the server did not end"
        return time.monotonic() - began

    def settles(self, seconds: float = 20) -> None:
        """Wait until nobody is served; the counters must say so in time."""
        ends = time.monotonic() + seconds
        while True:
            stats = [model.engine.stats for model in self.service.models.values()]
            left = [(one.active, one.waiting, one.pages_used) for one in stats] + [(self.gate.answering,)]
            if not any(map(any, left)):
                return
            assert time.monotonic() < ends, f"active, waiting, pages; answering: {left}"
            time.sleep(0.01)

    def faults(self) -> list[str]:
        """Lines of the log that tell of a fault of the server's."""
        return [line for line in self.log.lines if re.search(r"Traceback|Exception|Error|never", line)]


def all_of(wire: socket.socket) -> bytes:
    """What comes until the other side hangs up, or until the socket's time is over."""
    said = b""
    with contextlib.suppress(TimeoutError, ConnectionError):
        while got := wire.recv(65536):
            said += got
    return said


def post(path: str, body: bytes, *headers: str, close: bool = True) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *headers]
    lines += ["Connection: close"] if close else []
    return "\r\n".join([*lines, "", ""]).encode() + body


def answer_of(said: bytes) -> tuple[int, Any]:
    head, _, body = said.partition(b"\r\n\r\n")
    assert head, "it hung up"
    return int(head.split(b" ", 2)[1]), json.loads(body)


@contextlib.contextmanager
def serving(
    loaded: tuple[Any, Any] | None = None,
    directory: Path | None = None,
    engine: dict[str, Any] | None = None,
    send_buffer: int | None = None,
    name: str = MODEL,
    others: Mapping[str, dict[str, Any]] | None = None,
    **settings: Any,
) -> Iterator[Here]:
    """A server of the student, or of what is loaded, under a name; `settings`: of `serving.settings`.

    others: models that ship, served beside it, and what their engines are told; a verifier by its name.
    """
    model, tokenizer = loaded or registry.load(MODEL)
    settings = {"max_length": 256, "grace": 0.5, **settings}
    service, running = Service(ServerSettings(**settings)), []

    def add(name: str, model: Any, tokenizer: Any, place: Path, engine: dict[str, Any]) -> None:
        defaults: dict[str, Any] = {"gen_length": 64, "lanes": 4, "max_waiting": 64}
        named = engine.get("verifier")
        if named is not None:
            engine = {**engine, "verifier": registry.load_verifier(named, model, tokenizer)}
        elif not model.causal:
            defaults |= {"block_length": BLOCK, "cache": "dual", "rule": "entropy:0.5"}
        made = dx.Engine(model, max_length=settings["max_length"], **{**defaults, **engine})
        running.append(made)
        ModelService(service, name, made, tokenizer, place, engine.get("drafter"), named)

    add(name, model, tokenizer, directory or registry.directory_of(MODEL), engine or {})
    for other, own in (others or {}).items():
        add(other, *registry.load(other), registry.directory_of(other), own)
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(one.handlers[:], one.level, one.propagate) for one in loggers]
    log = Lines()
    try:
        server = make_server(service)
        for one in loggers:
            one.handlers = [] if one.name == "uvicorn.error" else [log]
        sockets = listen("127.0.0.1", 0)
        if send_buffer is not None:
            sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        thread = threading.Thread(target=server.run, args=(sockets,), daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive(), log.lines
            time.sleep(0.005)
        here = Here(sockets[0].getsockname()[1], server, service, thread, log)
        yield here
        here.stop()
    finally:
        server.should_exit = True
        thread.join(30)
        for one in running:
            one.close(cancel=True)
        for one, (handlers, level, propagate) in zip(loggers, before, strict=True):
            one.handlers, one.propagate = handlers, propagate
            one.setLevel(level)
