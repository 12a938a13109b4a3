"""The ASGI application: paths, errors, CORS, keys, limits, and the form of answers."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import math
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as Event

import dparallel_ext as dx
from dparallel_ext import DraftEvent

from .. import page, text
from . import connections, protocol
from .call import Call, Score
from .errors import ERRORS, ApiError, errors, full, in_time
from .protocol import ChatRequest, CompletionRequest, Health
from .service import Service
from .tools import CallText

READ = "GET, HEAD"
PATHS = {
    "/v1/chat/completions": "POST",
    "/v1/completions": "POST",
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


class EventStream(StreamingResponse):
    """Server-sent events of a call; closes the call however they end."""

    def __init__(self, call: Call, events: AsyncIterator[str]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self.call = call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.call.close()


class AnswerWriter:
    """Writes the pieces of a call as either endpoint's JSON: whole, or as events of a stream."""

    def __init__(self, service: Service, request: ChatRequest | CompletionRequest, call: Call) -> None:
        self.request, self.call = request, call
        self.chat = isinstance(request, ChatRequest)
        self.token_texts = service.model(request.model).token_texts
        self.frame = {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": "chat.completion" if self.chat else "text_completion",
            "created": int(time.time()),
            "model": request.model,
        }
        self.usage = bool(request.stream_options and request.stream_options.include_usage)
        functions = [*request.calls] if isinstance(request, ChatRequest) else []
        self.calls = [CallText(functions) for _ in call.choices] if functions else None

    def logprobs(self, scores: Sequence[Score]) -> dict[str, Any]:
        """The entry "logprobs" for the next tokens of a choice."""
        tokens = [(self.token_texts(each.token, first=each.start == 0), each.logprob) for each in scores]
        if isinstance(self.request, ChatRequest):
            return protocol.chat_logprobs(tokens, bool(self.request.top))
        starts = [each.start for each in scores]
        return protocol.completion_logprobs(tokens, starts, bool(self.request.top))

    def choice(
        self,
        index: int,
        content: dict[str, Any],
        reason: str | None,
        scores: Sequence[Score] | None,
    ) -> dict[str, Any]:
        scored = None if scores is None else self.logprobs(scores)
        return {"index": index, **content, "logprobs": scored, "finish_reason": reason}

    def reason(self, choice: int, reason: str) -> str:
        """A choice's finish reason; "tool_calls" where the model was to call some function, as OpenAI's."""
        chosen = isinstance(self.request, ChatRequest) and self.request.tool_choice == "required"
        called = chosen and self.calls is not None and self.calls[choice].named
        return "tool_calls" if called and reason == "stop" else reason

    def message(self, choice: int, text: str) -> dict[str, Any]:
        """The whole answer of a chat."""
        said: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if self.calls is not None:
            calls = self.calls[choice].put(text)
            said |= {"content": None, "tool_calls": calls}
        return said

    def event(self, choices: list[dict[str, Any]], used: dict[str, Any] | None = None) -> str:
        return sse({**self.frame, "choices": choices, **({"usage": used} if self.usage else {})})

    def part(
        self,
        index: int,
        piece: str,
        reason: str | None = None,
        scores: Sequence[Score] = (),
        **fields: Any,
    ) -> str:
        """The event of a piece of a choice's text. fields: others of the choice."""
        if self.calls is not None:
            calls = [{"index": 0, **each} for each in self.calls[index].put(piece)] if piece else []
            content: dict[str, Any] = {"delta": {"tool_calls": calls} if calls else {}}
        else:
            content = {"delta": {"content": piece} if piece else {}} if self.chat else {"text": piece}
        return self.event([self.choice(index, {**content, **fields}, reason, scores or None)])

    async def events(self) -> AsyncIterator[str]:
        """The answer as server-sent events."""
        call = self.call
        if self.chat:
            self.frame["object"] = "chat.completion.chunk"
        try:
            for index in range(len(call.choices) if self.chat else 0):
                begins = "" if self.calls is None else None
                yield self.part(index, "", delta={"role": "assistant", "content": begins})
            async for piece in call.pieces():
                if piece.draft is not None:
                    length = call.choices[piece.choice].gen_length
                    yield self.part(piece.choice, "", draft=draft_of(piece.draft, length, self.token_texts))
                if piece.text or piece.scores:
                    yield self.part(piece.choice, piece.text, scores=piece.scores)
                if piece.reason is not None:
                    yield self.part(piece.choice, "", self.reason(piece.choice, piece.reason))
            if self.usage:
                yield self.event([], call.usage())
            yield "data: [DONE]\n\n"
        except ApiError as error:
            yield sse(error.body)

    async def whole(self, http: Request) -> dict[str, Any]:
        """All choices; ends the call if the client leaves."""
        call = self.call
        texts, reasons = [""] * len(call.choices), [""] * len(call.choices)
        scores: list[list[Score]] = [[] for _ in call.choices]

        async def gone() -> None:
            while (await http.receive())["type"] != "http.disconnect":
                pass
            call.fail(ApiError(499, "the client left"))

        watching = asyncio.ensure_future(gone())
        try:
            async for piece in call.pieces():
                texts[piece.choice] += piece.text
                scores[piece.choice] += piece.scores
                reasons[piece.choice] = piece.reason or ""
        finally:
            watching.cancel()
            call.close()
        choices = [
            self.choice(
                index,
                {"message": self.message(index, text)} if self.chat else {"text": text},
                self.reason(index, reason),
                scores[index] if self.request.scored else None,
            )
            for index, (text, reason) in enumerate(zip(texts, reasons, strict=True))
        ]
        return {**self.frame, "choices": choices, "usage": call.usage()}


async def answer(service: Service, http: Request, request: ChatRequest | CompletionRequest) -> Response:
    """The response to either endpoint, whole or streaming."""
    call = await service.model(request.model).call(request)
    written = AnswerWriter(service, request, call)
    if request.stream:
        return EventStream(call, written.events())
    return JSONResponse(await written.whole(http))


def draft_of(draft: DraftEvent, length: int, texts: text.TokenTexts) -> dict[str, Any]:
    """The "draft" of a chunk, beside a choice's empty text, for a request with `stream_drafts`.

    pass: the number of passes over the response so far. start: the index in the response where the active
    block begins; tokens before it are final and were streamed, tokens after it are masks. length: of the
    response, in tokens. tokens: the block's, each as text, special tokens included; null for a mask. Joined,
    they are the text, except for characters of several tokens. A slow client misses drafts, but never a
    block's last. The whole block follows as text once it is complete. With an autoregressive model, or a
    verifier, the block is the pass's tokens.

    drafted, accepted: the number of tokens that the drafter guessed for the pass, or that the verifier
    judged, and how many of these were kept, which are the first of the pass's tokens. refused: the other
    guesses, each as text. A token that ends the text is in neither, see `speculation.sequence.Verified`.

    passes, logprobs: if the request asks for `logprobs`, for each token the pass that committed it, and its
    log-probability (nats); null for a mask.
    """
    tokens = [
        None if token is None else texts(token, first=draft.start + at == 0)
        for at, token in enumerate(draft.tokens)
    ]
    fields = {"pass": draft.nfe, "start": draft.start, "length": length, "tokens": tokens}
    fields |= {"drafted": draft.drafted, "accepted": draft.accepted}
    fields["refused"] = [texts(token, first=False) for token in draft.refused]
    if draft.passes is not None and draft.logprobs is not None:
        values = [
            None if value is None or math.isnan(value) else protocol.finite(value) for value in draft.logprobs
        ]
        fields |= {"passes": draft.passes, "logprobs": values}
    return fields


def sse(content: dict[str, Any]) -> str:
    """An event of a stream of server-sent events: a line of JSON.

    It is ASCII, since clients that split decoded text as Python's `str.splitlines` does, such as httpx's
    `iter_lines`, also end a line at U+0085, U+2028 and U+2029.
    """
    return f"data: {json.dumps(content, separators=(',', ':'))}\n\n"


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
