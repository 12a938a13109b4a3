"""The ASGI application: paths, errors, CORS, keys and limits."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hmac
import math
import re
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as Event

import dparallel_ext as dx

from .. import page
from . import connections
from .answer import answer
from .errors import ERRORS, ApiError, errors, full, in_time
from .protocol import ChatRequest, CompletionRequest, Health
from .responses import ResponsesRequest, ResponseWriter
from .service import Service

READ = "GET, HEAD"
PATHS = {
    "/v1/chat/completions": "POST",
    "/v1/completions": "POST",
    "/v1/responses": "POST",
    "/v1/models": READ,
    "/health": READ,
    "/metrics": READ,
    "/version": READ,
}
"""Path -> methods; besides, /v1/models/NAME and the page's paths can be read."""


def path_of(target: str) -> str:
    """The path of a request's target, without slashes at its end. The target may be a whole URL, as proxies
    get it (RFC 9112, 3.2.2)."""
    return re.sub(r"^https?://[^/]*", "", target, flags=re.IGNORECASE).rstrip("/") or "/"


def methods(path: str, service: Service) -> str | None:
    return READ if path.startswith("/v1/models/") or path in service.page else PATHS.get(path)


class Gate:
    """Middleware before all but CORS: checks the key, limits a request's body and the number of requests, and
    counts answers."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service
        self.keys = [key.encode() for key in service.settings.keys]
        self.answering = 0
        """Requests that have arrived whole and are not answered yet."""
        most = service.settings.max_connections
        self.most = math.inf if most is None else most - connections.reserved(most)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        scope = {**scope, "path": path_of(scope["path"])}
        status, taken, complete, answering = 500, 0, False, 0
        settings, now = self.service.settings, time.monotonic()
        ends = scope.get("state", {}).get("ends", now + settings.body_seconds)  # see connections

        async def bounded() -> Event:
            nonlocal taken, complete, answering
            if complete:
                return await receive()
            message: Event = await in_time(receive(), self.service.aborted, ends - time.monotonic())
            complete = not message.get("more_body", False)
            taken += len(message.get("body", b""))
            if taken > settings.max_body:
                raise too_large(settings.max_body)
            if complete and message["type"] == "http.request":
                if self.answering >= self.most:
                    raise full("too many requests are under way already", self.service.metrics.wait())
                self.answering, answering = self.answering + 1, 1
            return message

        async def counted(message: Event) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            allowed, refusal = methods(scope["path"], self.service), self._refusal(scope)
            if scope["method"] == "OPTIONS" and allowed is not None:
                await Response(None, 204, {"Allow": f"{allowed}, OPTIONS"})(scope, receive, counted)
            elif refusal is not None:
                await refusal.response(scope, receive, counted)
            else:
                await self.app(self._as_json(scope), bounded, counted)
        finally:
            self.answering -= answering
            known = scope["path"] in PATHS or scope["path"] in self.service.page
            path = scope["path"] if known else "other"
            self.service.metrics.http.labels(path, str(status)).inc()

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = dict(scope["headers"])
        if self.keys and scope["path"] != "/health" and scope["path"] not in self.service.page:
            kind, _, key_given = headers.get(b"authorization", b"").partition(b" ")
            # Compare every key, in constant time.
            same = [hmac.compare_digest(key_given.strip(), key) for key in self.keys]
            if kind.lower() != b"bearer" or not any(same):
                message = "the API key is missing or wrong: expected the header Authorization: Bearer KEY"
                return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        coding = headers.get(b"content-encoding", b"identity")
        if scope["method"] == "POST" and coding.strip().lower() not in (b"", b"identity"):
            message = (
                f"content-encoding: expected a body that is not compressed, got {coding.decode('latin-1')!r}"
            )
            return ApiError(415, message, param="content-encoding")
        if int(headers.get(b"content-length", 0)) > self.service.settings.max_body:
            return too_large(self.service.settings.max_body)
        kind = headers.get(b"content-type", b"")
        if scope["method"] == "POST" and b"origin" in headers and not is_json(kind):
            message = (
                f"content-type: expected application/json from a web page, got {kind.decode('latin-1')!r}"
            )
            return ApiError(415, message, param="content-type")
        return None

    @staticmethod
    def _as_json(scope: Scope) -> Scope:
        """The request with the Content-Type of JSON, so that its body is read as that."""
        headers = scope["headers"]
        if scope["method"] != "POST" or is_json(dict(headers).get(b"content-type", b"")):
            return scope
        others = [(name, value) for name, value in headers if name != b"content-type"]
        return {**scope, "headers": [*others, (b"content-type", b"application/json")]}


def is_json(content_type: bytes) -> bool:
    kind = content_type.partition(b";")[0].strip().lower()
    return kind == b"application/json" or (kind.startswith(b"application/") and kind.endswith(b"+json"))


def too_large(most: int) -> ApiError:
    return ApiError(413, f"body: expected at most {most} bytes", code="request_too_large")


def place_in(body: Any, location: Sequence[str | int], missing: bool) -> list[str]:
    """The keys and indices of pydantic's location of an error that lead through a body. missing: the last key
    is not there. Between them pydantic names its own types, where a value may be of several."""
    place = []
    for number, part in enumerate(location, 1):
        if isinstance(body, dict) and (part in body or (missing and number == len(location))):
            body = body.get(part)
        elif isinstance(body, list) and isinstance(part, int) and part < len(body):
            body = body[part]
        else:
            continue
        place.append(str(part))
    return place


def name_errors(app: FastAPI, service: Service) -> None:
    """Make the application answer every error in OpenAI's form."""

    @app.exception_handler(HTTPException)
    async def refused(http: Request, error: HTTPException) -> Response:
        if isinstance(error, ApiError):
            return error.response
        path, message, headers = http.scope["path"], error.detail, error.headers
        if error.status_code == 404:
            message = f"path: expected one of {', '.join(PATHS)}, got {path}"
        elif error.status_code == 405:
            allowed = methods(path, service) or READ
            message, headers = f"method: {path} expects {allowed}, got {http.method}", {"Allow": allowed}
        elif error.status_code == 400:  # FastAPI could not read it
            message = "body: expected JSON in UTF-8, not nested deeply, without numbers of so many digits"
        return ApiError(error.status_code, message, headers=headers).response

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            message = f"body: expected JSON ({first['ctx']['error']} at character {first['loc'][-1]})"
            return ApiError(400, message).response
        where = place_in(error.body, first["loc"][1:], missing=first["type"] == "missing")
        message = f"{'.'.join(where) or 'body'}: {first['msg'].removeprefix('Value error, ')}"
        return ApiError(400, message, param=where[0] if where else None).response

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> Response:
        return ApiError(500, "internal error", code="internal_error").response


def make_app(service: Service) -> FastAPI:
    """The ASGI application of a service. The engines are closed when its lifespan ends."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.aborted = asyncio.get_running_loop().create_future()
        yield
        service.abort()
        service.close()
        for model in service.models.values():
            await asyncio.to_thread(model.engine.close, cancel=True)

    # FastAPI's documentation pages are off, since they load scripts from elsewhere.
    app = FastAPI(
        title="dparallel",
        version=dx.__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.add_middleware(Gate, service=service)
    if service.settings.cors_origins:
        # Before the gate: a browser's preflight has no key, and a refusal must reach the page.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=service.settings.cors_origins,
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After"],
        )

    name_errors(app, service)
    add_routes(app, service)
    return app


def add_routes(app: FastAPI, service: Service) -> None:
    """Add all paths of `PATHS`, and the page's."""

    @app.post("/v1/chat/completions", responses=errors(*ERRORS))
    async def chat_completions(http: Request, request: ChatRequest) -> Response:
        return await answer(service, http, request)

    @app.post("/v1/completions", responses=errors(*ERRORS))
    async def completions(http: Request, request: CompletionRequest) -> Response:
        return await answer(service, http, request)

    @app.post("/v1/responses", responses=errors(*ERRORS))
    async def responses(http: Request, request: ResponsesRequest) -> Response:
        return await answer(service, http, request.chat, functools.partial(ResponseWriter, request))

    def read(
        path: str, answers: dict[int | str, dict[str, Any]], form: type[Response] = JSONResponse
    ) -> Callable[[Any], Any]:
        head = app.head(path, include_in_schema=False)
        get = app.get(path, responses=answers, response_class=form)
        return lambda function: get(head(function))

    @read("/v1/models", errors(401, 413))
    async def list_models() -> Response:
        described = [model.described for model in service.models.values()]
        return JSONResponse({"object": "list", "data": described})

    @read("/v1/models/{name:path}", errors(401, 404, 413))
    async def one_model(name: str) -> Response:
        # The gate strips a slash from the path's end, but a directory's name may end with one.
        full_name = next((known for known in service.models if known.rstrip("/") == name), name)
        return JSONResponse(service.model(full_name).described)

    @read("/version", errors(401, 413))
    async def version() -> Response:
        return JSONResponse({"version": dx.__version__})

    states = {200: "It takes requests.", 503: "It takes no more requests."}

    @read(
        "/health",
        errors(413)
        | {status: {"model": Health, "description": description} for status, description in states.items()},
    )
    async def health() -> Response:
        closed = service.closed
        return JSONResponse({"status": "closed" if closed else "ok"}, 503 if closed else 200)

    lines = {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Prometheus' format."}

    @read("/metrics", errors(401, 413) | {200: lines}, Response)
    async def metrics() -> Response:
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def page_part(http: Request) -> Response:
        part = service.page[http.scope["path"]]
        return Response(part.content, headers=page.HEADERS, media_type=part.media_type)

    for path in service.page:
        app.add_route(path, page_part, methods=READ.split(", "), include_in_schema=False)
