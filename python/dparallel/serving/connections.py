"""Limits of the clients' connections: their time, their number, and their lines in the log.

A request must arrive whole within a time that begins with its connection, or with the end of the last answer.
The number of connections is limited by file descriptors. When one more comes, the connection that has been
without a whole request for longest is closed, so that slow, silent and half-open clients keep nobody out.
Requests that are being answered are never cut for others: `Gate` in `app` limits their number, so that some
connections stay free and /health answers whatever the load.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import math
import os
import resource
import time
from typing import Any

import h11
import uvicorn
from uvicorn.config import LOGGING_CONFIG
from uvicorn.protocols.http.h11_impl import H11Protocol

from .errors import ApiError

MOST = 4096
"""The most connections by default, if the limit of open files allows."""
SPARE = 40
"""File descriptors kept for others than clients: connections accepted but not yet counted, the event loop,
the templates' process, and files."""
ACCEPTS = 4
"""Connections accepted in one turn of the event loop."""
BACKLOG = 128
"""Connections that the operating system queues until they are accepted."""
LATE = 1.0
"""Seconds after a request is due, and answered with an error, until its connection is closed."""


def most_connections(asked: int | None) -> int:
    """`asked`, or the number that the limit of open files allows. Raises ValueError naming
    max_connections."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = 2**31 if limit == resource.RLIM_INFINITY else limit
    free = limit - len(os.listdir("/dev/fd")) - SPARE
    least = 2 if asked is None else asked
    if free < least:
        raise ValueError(
            f"max_connections: expected at most {max(free, 0)}, since {limit} files may be open (ulimit -n), "
            f"got {least}"
        )
    return min(MOST, free) if asked is None else asked


def reserved(connections: int) -> int:
    """How many of the connections are kept free of requests that are being answered."""
    return max(1, min(32, connections // 2))


class Connection(H11Protocol):
    """A client's connection, with a time limit.

    `state["ends"]` of a request's scope is the `time.monotonic` by which the request must have arrived.
    """

    most: int
    seconds: float

    @classmethod
    def bounded(cls, most: int, seconds: float) -> type[Connection]:
        """The class with at most `most` connections at once, and `seconds` for a request to arrive."""
        return type("Connection", (cls,), {"most": most, "seconds": seconds})

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._unsent = (0, 0.0)  # bytes waiting for the client, and since when that number has not changed
        self._begin()
        if len(self.connections) > self.most:
            others = (each for each in self.connections if isinstance(each, Connection) and each is not self)
            asking = (each for each in others if each.asking)
            # Connections that still take an answer come last.
            victim = min(asking, key=lambda each: (each.unsent > 0, each.ends), default=self)
            self.connections.discard(victim)
            victim.transport.abort()

    def _begin(self) -> None:
        self.ends = time.monotonic() + self.seconds
        self.app_state = {**self.app_state, "ends": self.ends}

    @property
    def asking(self) -> bool:
        """Whether the connection has no whole request that is unanswered."""
        return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

    @property
    def unsent(self) -> int:
        """Bytes of answers that the operating system cannot send yet, since the client does not read."""
        return self.transport.get_write_buffer_size()

    def overdue(self, now: float) -> bool:
        """Whether the client takes too long to read its answer, or to send a request."""
        size, since = self._unsent
        if self.unsent != size:
            size, since = self._unsent = self.unsent, now
        return now - since > self.seconds if size else self.asking and now > self.ends + LATE

    def on_response_complete(self) -> None:
        self._begin()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are no HTTP with an error in OpenAI's form, unless an answer is on its way."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # its own answer would come after this one
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = bytes(ApiError(400, msg).response.body)
            head = "HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nConnection: close\r\n"
            self.transport.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        self.transport.close()


def cut_overdue(connections: Any) -> None:
    """Close the connections whose client takes too long."""
    now = time.monotonic()
    for connection in list(connections):
        if isinstance(connection, Connection) and connection.overdue(now):
            connection.transport.abort()


async def close_idle(connections: Any) -> None:
    """Close connections without a request, again and again until it is cancelled.

    uvicorn does so once when it shuts down, and would wait for connections that it accepted in that moment.
    """
    while True:
        await asyncio.sleep(0.1)
        for connection in list(connections):
            if not connection.transport.is_closing():
                connection.shutdown()


# --- the log ------------------------------------------------------------------------------------


class Bounded(logging.Filter):
    """Cuts lines to `LENGTH` characters, and limits lines of one kind (same message, and status of an answer)
    to `BURST` at once and `RATE` a second after that; the next line says how many were left out. Lines of
    asyncio about answers to clients that have left are no news."""

    LENGTH = 500
    BURST = 500
    RATE = 10.0

    def __init__(self) -> None:
        super().__init__()
        self._kinds: dict[Any, tuple[float, float, int]] = {}  # lines allowed, at which time; lines left out

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name == "asyncio" and record.msg == "socket.send() raised exception.":
            return False
        # The formatter of answers needs these arguments: address, method, path, version, status.
        parts = record.args if record.name == "uvicorn.access" and isinstance(record.args, tuple) else ()
        kind = (record.name, str(record.msg)[:80], parts[-1] if parts else None)
        if kind not in self._kinds and len(self._kinds) > 1000:
            self._kinds.clear()
        left, since, out = self._kinds.get(kind, (float(self.BURST), record.created, 0))
        left = min(self.BURST, left + self.RATE * max(0.0, record.created - since))
        if left < 1:
            self._kinds[kind] = (left, record.created, out + 1)
            return False
        self._kinds[kind] = (left - 1, record.created, 0)
        note = f" ({out} more such lines were left out)" if out else ""
        if parts:
            *others, path, version, status = (_short(part, self.LENGTH // 2) for part in parts)
            record.args = (*others, f"{path}{note}", version, status)
        else:
            record.msg, record.args = _short(record.getMessage(), self.LENGTH) + note, None
            record.__dict__.pop("color_message", None)  # uvicorn's, of the same text
        return True


def _short(value: Any, most: int) -> Any:
    return f"{value[: most - 3]}..." if isinstance(value, str) and len(value) > most else value


def log_config() -> dict[str, Any]:
    """uvicorn's logging, bounded, and asyncio's warnings through the same handler."""
    config = copy.deepcopy(LOGGING_CONFIG)
    config["filters"] = {"bounded": {"()": Bounded}}
    for handler in config["handlers"].values():
        handler["filters"] = ["bounded"]
    config["loggers"]["asyncio"] = {"handlers": ["default"], "level": "WARNING", "propagate": False}
    return config


def uvicorn_config(
    app: Any, *, most: int, seconds: float, log_level: str, shutdown_seconds: int
) -> uvicorn.Config:
    """uvicorn's settings for these limits: with its own loop and parser, whatever else is installed."""
    return uvicorn.Config(
        app,
        http=Connection.bounded(most, seconds),
        ws="none",
        loop="asyncio",
        backlog=ACCEPTS,
        # Longer than clients keep idle connections (httpx 5 s, aiohttp 15 s), so that none sends a request
        # into a connection that is being closed.
        timeout_keep_alive=math.ceil(seconds),
        log_config=log_config(),
        log_level=log_level,
        server_header=False,
        # A last resort: streams have been told to end before.
        timeout_graceful_shutdown=shutdown_seconds,
    )
