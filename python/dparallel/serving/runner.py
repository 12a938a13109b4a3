"""The server's process: its sockets, startup and shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import math
import os
import re
import signal
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any

import uvicorn

import dparallel_ext as dx
from dparallel_ext import DecodeConfig, Engine
from dparallel_ext.arguments import one_of, warn
from dparallel_ext.speculation import drafter_of

from .. import registry
from . import connections
from .app import make_app
from .service import ModelService, Service
from .settings import MAX_LENGTH, ServerSettings


class Server(uvicorn.Server):
    """A server that, on SIGTERM or SIGINT, takes no more requests and gives running ones `grace` to
    finish."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        for listening in sockets or []:
            listening.listen(self.config.backlog)  # if this fails, nothing else has started yet
        await super().startup(sockets)
        for listening in sockets or []:  # uvicorn logs only sockets that it opens itself
            host, port = listening.getsockname()[:2]
            at = f"[{host}]" if ":" in host else host
            logging.getLogger("uvicorn.error").info("dparallel running on http://%s:%d", at, port)

        for listening in sockets or []:
            listening.listen(connections.BACKLOG)  # uvicorn's backlog also limits how many a turn accepts

    async def on_tick(self, counter: int) -> bool:
        if counter % 10 == 0:
            connections.cut_overdue(self.server_state.connections)
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop. SIGINT in the time of grace ends it: requests that still run get an error. One more drops
        them."""
        again = self.started and self.should_exit and sig == signal.SIGINT
        if again and not self.service.aborted.done():
            self.service.aborted.get_loop().call_soon_threadsafe(self.service.abort)
        else:
            super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ending = asyncio.get_running_loop().call_later(self.service.settings.grace, self.service.abort)
        closing = asyncio.ensure_future(connections.close_idle(self.server_state.connections))
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()
            closing.cancel()


def listen(host: str, port: int) -> list[socket.socket]:
    """Sockets bound to the port at every address of the host ("": of this machine); port 0: any free port.

    An IPv6 address may stand in brackets, as in a URL. Raises ValueError naming the argument.
    """
    if not 0 <= port < 2**16:
        raise ValueError(f"port: expected 0 to 65535, got {port}")
    bare = re.sub(r"^\[(.*:.*)\]$", r"\1", host)
    try:
        addresses = socket.getaddrinfo(bare or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise ValueError(f"host: {host!r} does not resolve ({error})") from error
    with contextlib.ExitStack() as opened:
        sockets: list[socket.socket] = []
        for family, kind, number, _, address in dict.fromkeys(addresses):
            try:
                listening = opened.enter_context(socket.socket(family, kind, number))
                if os.name == "posix":  # so that a restart need not wait for closed connections
                    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                listening.bind((address[0], port, *address[2:]))
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise unusable(host, port, error) from error
                continue  # a machine without IPv6, where names may still resolve to such addresses
            sockets.append(listening)
            port = listening.getsockname()[1]
        if not sockets:
            raise ValueError(f"host: {host!r} is no address of this machine")
        opened.pop_all()
    return sockets


def unusable(host: str, port: int, error: OSError) -> ValueError:
    """The ValueError for a port that cannot be bound."""
    if error.errno == errno.EADDRINUSE:
        return ValueError(f"port: {port} of {host!r} is in use already; --port 0 takes a free one")
    return ValueError(f"port: {port} of {host!r} cannot be had ({error.strerror})")


def make_server(service: Service, log_level: str = "info") -> Server:
    """The server of a service; its `run` takes the sockets of `listen`."""
    settings = service.settings
    config = connections.uvicorn_config(
        make_app(service),
        most=settings.max_connections or connections.most_connections(None),
        seconds=settings.body_seconds,
        log_level=log_level,
        shutdown_seconds=math.ceil(settings.grace) + 5,
    )
    return Server(config, service)


@dataclass(frozen=True)
class Served:
    """A model to serve, and the config of requests that name nothing else."""

    name: str
    """The name in requests."""
    model: str
    """The name for `registry.load`."""
    config: DecodeConfig
    loading: registry.Loading
    drafter: str | None = None
    draft_size: int | None = None
    verifier: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    """Mixture, window and lookahead, as far as they are given."""


def run(
    models: Sequence[Served],
    settings: ServerSettings,
    *,
    host: str,
    port: int,
    log_level: str,
    lanes: int,
    max_waiting: int,
) -> None:
    """Serve models until SIGTERM or SIGINT, each with an engine of its own.

    `lanes`, `max_waiting`: of each `Engine`.
    Raises ValueError and FileNotFoundError naming the argument, if possible before a model is loaded.
    """
    one_of("log_level", log_level, uvicorn.config.LOG_LEVELS)
    check_names([model.name for model in models])
    if not host.strip():  # an unset shell variable must not open the server to all
        raise ValueError("host: expected a name or an address (0.0.0.0: every one), got an empty one")
    connections.most_connections(settings.max_connections)
    directories = {model.model: registry.directory_of(model.model) for model in models}
    drafters = []
    for model in models:
        device, dtype = dx.models.device_of(model.loading.device), model.loading.dtype_for(model.model)
        drafters.append(drafter_of(model.drafter, device, dtype))
    with contextlib.ExitStack() as opened:
        sockets = [opened.enter_context(listening) for listening in listen(host, port)]
        engines: list[tuple[Engine, Any]] = []
        loaded: dict[tuple[str, registry.Loading], tuple[Any, Any]] = {}
        for model, drafter in zip(models, drafters, strict=True):
            key = model.model, model.loading
            if key not in loaded:  # engines share a model's weights
                loaded[key] = model.loading.load(model.model)
            weights, tokenizer = loaded[key]
            verifier = model.verifier and registry.load_verifier(model.verifier, weights, tokenizer)
            others = {"drafter": drafter, "verifier": verifier}
            engine = make_engine(weights, model, others, settings.max_length, lanes, max_waiting)
            opened.callback(engine.close, cancel=True)
            engines.append((engine, tokenizer))
        # Now that models are loaded, it is known how many files they keep open.
        most = connections.most_connections(settings.max_connections)
        service = Service(replace(settings, max_connections=most))
        opened.callback(service.close)
        for model, (engine, tokenizer) in zip(models, engines, strict=True):
            place = directories[model.model]
            ModelService(service, model.name, engine, tokenizer, place, model.drafter, model.verifier)
        gc.collect()
        gc.freeze()  # objects made so far stay, and collections need not scan them while requests wait
        try:
            with contextlib.suppress(KeyboardInterrupt):
                make_server(service, log_level).run(sockets)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            raise unusable(host, port, error) from error  # another process that had bound it listened first


def check_names(names: Sequence[str]) -> None:
    """Raise ValueError for an empty name, and for a name that two models have."""
    for at, name in enumerate(names):
        if not name.strip():
            raise ValueError("name: expected the model's name, got an empty one")
        if name in names[:at]:
            raise ValueError(f"name: two models are called {name!r}; give each a --name of its own")


def make_engine(
    weights: Any,
    model: Served,
    others: Mapping[str, Any],
    max_length: int | None,
    lanes: int,
    max_waiting: int,
) -> Engine:
    """The engine of a loaded model. `others`: its drafter and verifier, loaded. `max_length`: None: the
    model's own, at most `MAX_LENGTH`."""
    positions = dx.models.max_positions(weights) or math.inf
    length = int(min(MAX_LENGTH, positions)) if max_length is None else max_length
    if length > positions:
        # Not to the server's log, which is set up when the server begins.
        warn(f"max_length: {length}, but {model.name} is made for {positions} positions")
    try:
        return Engine(
            weights,
            model.config,
            **others,
            draft_size=model.draft_size,
            **model.options,
            lanes=lanes,
            max_waiting=max_waiting,
            max_length=length,
        )
    except (MemoryError, OverflowError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"lanes, max_length: {lanes} requests of {length} tokens do not fit "
            f"({str(error).partition(chr(10))[0][:200]})"
        ) from error
