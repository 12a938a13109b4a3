"""`dparallel serve`: an HTTP server that speaks OpenAI's protocol, over `dparallel_ext.Engine`.

    POST /v1/completions, /v1/chat/completions      GET /v1/models, /health, /metrics, /version

What differs from OpenAI: `temperature` is 0 unless given, as everywhere here; `policy` chooses the unmasking
rule; text streams by finished blocks, and with `stream_drafts` by passes too (`draft_of`); `usage` also has
forward_passes and tokens_per_pass; `logprobs` are those with which the tokens were drawn, see `decode`; a
completion with `suffix` is decoded between two texts. `top_k`, `ignore_eos` and `stop_token_ids` are vLLM's.
A parameter that the server does not follow is refused by name, unless its value is one that changes nothing
(`protocol`).

A body is JSON whatever its Content-Type says, except where a web page sends it: pages say application/json,
so that the browser asks first whether they may.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import gc
import hmac
import json
import logging
import math
import os
import re
import secrets
import socket
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self, TypeVar

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from pydantic import AfterValidator, BaseModel, ConfigDict, FailFast, Field, field_validator, model_validator
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as Event

import dparallel_ext as dx
from dparallel_ext import Completion, Draft, Engine, EngineFull, Handle

from . import connections, files, protocol, registry, text
from .evaluate import parse_policy
from .templates import Renderer

log = logging.getLogger("uvicorn.dparallel")

T = TypeVar("T")

MOST_PROMPTS = 4096
"""Of a request, whatever the server's own bound: so many are looked at one by one."""
MOST_STOPS = 32
"""Stop strings of a request, and stop_token_ids."""
CHARACTERS_A_TOKEN = 32
"""A text of more, on average, than these and than the longest token has is too long without being encoded."""
ENCODERS = 2
"""Threads that encode texts."""
KEY_VARIABLE = "DPARALLEL_API_KEY"
"""Of the environment; its keys count where the command line has none."""


@dataclass(frozen=True)
class Settings:
    """What the server is told on its command line."""

    name: str
    """The model's, in requests."""
    keys: tuple[str, ...] = ()
    """API keys, any of which opens everything; none: all is open. /health always is."""
    cors_origins: tuple[str, ...] = ()
    """Web pages' origins (scheme://host:port, or "null" for files) that may ask; "*": any."""
    policy: str = "entropy:0.5"
    gen_length: int = 256
    """max_tokens where a request has none."""
    max_length: int = 2048
    """Tokens of prompt and response."""
    max_choices: int = 64
    """Prompts of a request times `n`."""
    max_body: int = 2**20
    """Bytes of a request."""
    max_connections: int | None = None
    """At once; requests may be under way on all but a few of them. None: no bound."""
    body_seconds: float = 30.0
    """In which a request must be here, from its connection on, or from the answer before it on."""
    grace: float = 30.0
    """Seconds for running requests once the server is told to stop."""

    def __post_init__(self) -> None:
        """Raises ValueError, by name."""
        if not all(key.strip() for key in self.keys):
            raise ValueError("api_key: expected a key, got an empty one")
        if not self.name.strip():
            raise ValueError("name: expected the model's name, got an empty one")
        bounds = {
            "max_length": (1, 2**20),
            "max_choices": (1, MOST_PROMPTS),
            "max_body": (1, 2**31),
            "max_connections": (2, 2**20),
        }
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                most = f" and <= {high}" if value > high else ""
                raise ValueError(f"{name}: expected a whole number >= {low}{most}, got {value}")
        if not 0 <= self.grace < math.inf:
            raise ValueError(f"grace: expected seconds >= 0, got {self.grace}")
        for origin in self.cors_origins:
            # Browsers write them in lower case, without a path.
            if origin not in ("*", "null") and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#@\sA-Z]+", origin):
                raise ValueError(
                    f"cors_origin: expected '*' or an origin such as https://example.org, got {origin!r}"
                )
        parse_policy(self.policy)


class ApiError(HTTPException):
    """An answer in OpenAI's form: {"error": {message, type, param, code}}."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    @property
    def response(self) -> Response:
        # ASCII, since a message may quote what is no text.
        return Response(json.dumps(self.body), self.status_code, self.headers, "application/json")

    @classmethod
    def of(cls, error: HTTPException) -> ApiError:
        if isinstance(error, cls):
            return error
        return cls(error.status_code, error.detail, headers=error.headers)


class ErrorFields(BaseModel):
    """What is wrong, as OpenAI says it."""

    message: str
    type: str
    param: str | None
    """The parameter that it is about."""
    code: str | None


class ErrorAnswer(BaseModel):
    """The body of every answer that is an error."""

    error: ErrorFields


ERRORS = {
    400: "The request cannot be followed: `param` names what is wrong.",
    401: "The API key is missing or wrong.",
    404: "There is no such model or path.",
    413: "The body is too large.",
    429: "Too many requests are under way; Retry-After says when to come again.",
    503: "The server is shutting down.",
}


class Health(BaseModel):
    status: Literal["ok", "closed"]


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """How a path answers where it cannot, for its description; of others that may come, by their form."""
    found: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorAnswer, "description": ERRORS[status]} for status in statuses
    }
    return {**found, "default": {"model": ErrorAnswer, "description": "Another error."}}


def stopping() -> ApiError:
    return ApiError(503, "the server is shutting down", code="shutting_down", headers={"Connection": "close"})


async def in_time(what: Awaitable[T], aborted: asyncio.Future[None], seconds: float | None = None) -> T:
    """What is awaited, unless it is late or the server stops. Raises ApiError."""
    doing = asyncio.ensure_future(what)
    waiting: set[asyncio.Future[Any]] = {doing, aborted}
    try:
        await asyncio.wait(waiting, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return doing.result()
    finally:
        doing.cancel()
    if aborted.done():
        raise stopping()
    raise ApiError(408, "the request did not arrive in time", headers={"Connection": "close"})


# --- requests -----------------------------------------------------------------------------------


Text = Annotated[str, AfterValidator(text.unicode)]


class Strict(BaseModel):
    """Numbers are numbers, and what is not known is refused, unless it is null or neutral."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="allow")
    neutral: ClassVar[protocol.Neutral] = {}

    @model_validator(mode="after")
    def _refuse(self) -> Self:
        found = protocol.refused(self.model_extra or {}, self.neutral)
        if found is not None:
            name, said = found
            raise ApiError(400, said, param=name, code="unsupported_parameter")
        return self


class StreamOptions(Strict):
    neutral = protocol.STREAM_OPTIONS
    include_usage: bool | None = None


class Options(Strict):
    """What both endpoints take."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1)
    best_of: int | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    """-1 and 0: no bound."""
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: list[Text] | None = None
    stop_token_ids: list[Annotated[int, Field(ge=0)]] | None = Field(None, max_length=MOST_STOPS)
    ignore_eos: bool | None = None
    """Decode max_tokens, whatever the model's end tokens."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stream_drafts: bool | None = None
    """Stream the active block after every pass too, see `draft_of`."""
    policy: str | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _strings(cls, value: Any) -> Any:
        if value is None:
            return None
        found = [value] if isinstance(value, str) else value
        fits = isinstance(found, list) and len(found) <= MOST_STOPS
        if fits and all(isinstance(s, str) and s for s in found):
            return found
        raise ValueError(f"expected a string or up to {MOST_STOPS}, none of them empty")

    @field_validator("policy")
    @classmethod
    def _parsed(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                parse_policy(value)
            except ValueError as error:
                raise ValueError(str(error).removeprefix("policy: ")) from error
        return value

    @model_validator(mode="after")
    def _streamed(self) -> Self:
        usage = self.stream_options is not None and self.stream_options.include_usage
        for name, asked in (("stream_options", usage), ("stream_drafts", self.stream_drafts)):
            if asked and not self.stream:
                raise ApiError(400, f"{name}: belongs to stream=true", param=name)
        return self

    @model_validator(mode="after")
    def _best_of(self) -> Self:
        each = self.n or 1
        if self.best_of is not None and self.best_of != each:
            said = f"best_of: only n, here {each}, is supported, got {self.best_of}"
            raise ApiError(400, said, param="best_of", code="unsupported_parameter")
        return self


class CompletionRequest(Options):
    """POST /v1/completions. `prompt`: a text or its token ids, or a list of either. `suffix`: the text that
    follows the response, which is decoded between the two."""

    neutral = protocol.COMPLETION
    prompt: list[Text] | list[list[int]]
    suffix: Text | None = None
    logprobs: int | None = Field(None, ge=0, le=1)
    """0: the log-probability of each token. 1: of the most probable one too, which greedy decoding takes."""

    @property
    def scored(self) -> bool:
        """Whether log-probabilities are asked for."""
        return self.logprobs is not None

    @field_validator("logprobs", mode="before")
    @classmethod
    def _as_in_chats(cls, value: Any) -> Any:
        return None if value is False else value

    @model_validator(mode="after")
    def _most_probable(self) -> Self:
        if self.scored and self.logprobs and self.temperature:
            said = "logprobs: expected 0 at a temperature above 0, where a token may not be the most probable"
            raise ApiError(400, f"{said}, got {self.logprobs}", param="logprobs")
        return self

    @field_validator("prompt", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        def every(kind: type, values: Any) -> bool:
            return isinstance(values, list) and bool(values) and all(type(one) is kind for one in values)

        if isinstance(value, str) or every(int, value):
            return [value]
        if isinstance(value, list) and len(value) > MOST_PROMPTS:
            raise ValueError(f"expected at most {MOST_PROMPTS} prompts, got {len(value)}")
        if every(str, value) or (every(list, value) and all(every(int, one) for one in value)):
            return value
        raise ValueError("expected a string, a list of token ids, or a list of either, none of them empty")


class ChatMessage(Strict):
    neutral = protocol.MESSAGE
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | None = None
    """Null in an assistant's empty answer alone."""
    name: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _joined(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        for part in value:
            if (
                not isinstance(part, dict)
                or part.get("type") != "text"
                or not isinstance(part.get("text"), str)
            ):
                raise ValueError('expected text, or parts {"type": "text", "text": ...}')
        return "".join(part["text"] for part in value)

    @model_validator(mode="after")
    def _said(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"content: expected the text of the {self.role}, got null")
        return self


class ChatRequest(Options):
    """POST /v1/chat/completions."""

    neutral = protocol.CHAT
    # One error is told, so no more are looked for: there may be as many as messages.
    messages: Annotated[list[ChatMessage], FailFast()] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables of the model's chat template by name, such as enable_thinking."""

    @field_validator("chat_template_kwargs")
    @classmethod
    def _variables(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        taken = next((name for name in value or {} if name in protocol.TEMPLATE_NAMES), None)
        if taken is not None:
            raise ValueError(
                f"expected variables of the chat template, but {taken} is none of these: the server sets it"
            )
        return value

    @property
    def scored(self) -> bool:
        """Whether log-probabilities are asked for."""
        return bool(self.logprobs)

    @model_validator(mode="after")
    def _one_name(self) -> Self:
        newer = self.max_completion_tokens
        if newer is not None:
            if self.max_tokens not in (None, newer):
                said = (
                    f"max_tokens: not beside another max_completion_tokens, got {self.max_tokens} and {newer}"
                )
                raise ApiError(400, said, param="max_tokens")
            self.max_tokens = newer
        return self


# --- what is measured ---------------------------------------------------------------------------

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120)
GAUGES = {
    "waiting": "Requests that wait for a lane.",
    "active": "Requests under decoding.",
    "pages": "Pages of keys and values.",
    "pages_used": "Pages of requests under decoding.",
    "pages_kept": "Pages kept for later requests.",
    "page_bytes": "Memory of a page.",
    "closed": "1 where no more requests are taken, else 0.",
}
COUNTERS = {
    "completed": "Requests that were answered.",
    "failed": "Requests that ended in an error.",
    "cancelled": "Requests that were cancelled.",
    "forwards": "Forward passes.",
    "sequence_passes": "Forward passes, counted once for each sequence in them.",
    "tokens": "Tokens of finished blocks.",
    "prompt_tokens": "Tokens of prompts.",
    "reused_tokens": "Tokens of prompts whose keys and values came from another request.",
}


class Metrics:
    """The engine's counts as they are at a scrape, and what only the server sees."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.registry = CollectorRegistry()
        self.registry.register(self)
        ProcessCollector(registry=self.registry)
        self.http = Counter(
            "dparallel_http_requests",
            "HTTP requests by path and status; 499: the client left.",
            ["path", "status"],
            registry=self.registry,
        )
        self.first_block = self._histogram("first_block_seconds", "From request to first finished block.")
        self.whole = self._histogram("request_seconds", "From request to its last token, per choice.")
        self.waiting = self._histogram("waiting_seconds", "From request to its first pass, per choice.")
        self.rate = self._histogram(
            "tokens_per_pass", "Tokens of a response per forward pass.", (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
        )
        self.mean = 1.0
        """Seconds of a request in its lane, over about the last sixteen."""

    def finished(self, completion: Completion, tokens: int) -> None:
        self.whole.observe(completion.seconds)
        self.waiting.observe(completion.seconds_waiting)
        if completion.nfe:
            self.rate.observe(tokens / completion.nfe)
        self.mean += (completion.seconds - completion.seconds_waiting - self.mean) / 16

    def wait(self) -> int:
        """Seconds after which a request refused now may find a place."""
        stats = self.engine.stats
        return min(60, math.ceil(1 + self.mean * stats.waiting / max(1, stats.active)))

    def _histogram(self, name: str, said: str, buckets: Sequence[float] = SECONDS) -> Histogram:
        return Histogram(f"dparallel_{name}", said, buckets=buckets, registry=self.registry)

    def collect(self) -> Iterator[Metric]:
        stats = self.engine.stats
        for name, said in GAUGES.items():
            yield GaugeMetricFamily(f"dparallel_{name}", said, value=getattr(stats, name))
        for name, said in COUNTERS.items():
            yield CounterMetricFamily(f"dparallel_{name}", said, value=getattr(stats, name))


# --- a request under way ------------------------------------------------------------------------


@dataclass
class Choice:
    """One response of a request."""

    prompt: list[int]
    gen_length: int
    seed: int
    text: text.TextStream
    suffix: list[int]
    """Token ids that follow the response."""
    handle: Handle | None = None
    completion: Completion | None = None
    draft: Newest | None = None
    """The last one in the queue, unless it was taken or a block came after it."""


@dataclass
class Newest:
    """A place in the queue for a draft, which a newer one of its block takes: a slow client gets fewer."""

    draft: Draft


class Piece(NamedTuple):
    """What is new of a choice."""

    choice: int
    text: str = ""
    reason: str | None = None
    """At its end, why it ended."""
    draft: Draft | None = None
    scores: Sequence[tuple[int, float]] = ()
    """Its tokens and their log-probabilities, where they are asked for."""


class Call:
    """What one HTTP request asked for: its choices under way, their events in one queue.

    `submit` hands a choice to the engine, with a callback for its drafts. `fail` ends the call from outside;
    `close` cancels what is not finished, and may be called again.
    """

    def __init__(
        self,
        service: Service,
        choices: list[Choice],
        each: int,
        submit: Callable[[Choice, Callable[[Draft], None]], Handle],
    ):
        self.service, self.choices, self.each = service, choices, each
        self.began = time.perf_counter()
        self.queue: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def post(index: int, event: Any) -> None:
            # A loop that is gone has nobody to tell.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._put, index, event)

        service.aborted.add_done_callback(self._abort)
        try:
            for index, choice in enumerate(choices):
                tell = functools.partial(post, index)
                choice.handle = submit(choice, tell)
                choice.handle.subscribe(tell)
        except BaseException:
            self.close()
            raise

    def _put(self, index: int, event: Any) -> None:
        choice = self.choices[index]
        if not isinstance(event, Draft):
            choice.draft = None
        elif choice.draft is not None and choice.draft.draft.start == event.start:
            choice.draft.draft = event
            return
        else:
            event = choice.draft = Newest(event)
        self.queue.put_nowait((index, event))

    def fail(self, error: ApiError) -> None:
        self.queue.put_nowait((-1, error))

    def _abort(self, _: Any) -> None:
        self.fail(stopping())

    def close(self) -> None:
        self.service.aborted.remove_done_callback(self._abort)
        for choice in self.choices:
            if choice.handle is not None and choice.completion is None:
                choice.handle.cancel()

    async def pieces(self) -> AsyncIterator[Piece]:
        """What comes, until every choice has ended. Raises ApiError."""
        metrics, left, seen = self.service.metrics, len(self.choices), False
        while left:
            index, event = await self.queue.get()
            if isinstance(event, ApiError):
                raise event
            if isinstance(event, BaseException):
                log.error("a request failed", exc_info=event)
                raise ApiError(500, "the model failed on this request", code="internal_error")
            choice = self.choices[index]
            if isinstance(event, Newest):
                if choice.draft is event:
                    choice.draft = None
                if not choice.text.stopped:
                    yield Piece(index, draft=event.draft)
                continue
            if isinstance(event, Completion):
                left -= 1
                choice.completion = event
                rest, reason = choice.text.finish(), event.finish_reason
                if choice.text.stopped:
                    reason = "stop"
                elif reason == "cancelled":  # not by us
                    raise stopping()
                metrics.finished(event, choice.text.count)
                yield Piece(index, rest, reason)
                continue
            if not seen:
                seen = True
                metrics.first_block.observe(time.perf_counter() - self.began)
            before, piece = choice.text.count, choice.text.put(event)
            assert choice.handle is not None
            if choice.text.stopped:
                choice.handle.cancel()
            logprobs = choice.handle.logprobs[before : choice.text.count]
            scores = list(zip(event, logprobs, strict=False))  # up to a stop string, or none at all
            if piece or scores:
                yield Piece(index, piece, scores=scores)

    def usage(self) -> dict[str, Any]:
        """Of a finished call. A prompt counts once, however many its choices."""
        done = [choice.completion for choice in self.choices if choice.completion is not None]
        prompt = sum(len(choice.prompt) + len(choice.suffix) for choice in self.choices[:: self.each])
        tokens, passes = sum(choice.text.count for choice in self.choices), sum(one.nfe for one in done)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": tokens,
            "total_tokens": prompt + tokens,
            "prompt_tokens_details": {"cached_tokens": sum(one.reused for one in done[:: self.each])},
            "forward_passes": passes,
            "tokens_per_pass": round(tokens / passes, 3) if passes else 0.0,
        }


class Service:
    """The engine, and what stands between it and HTTP."""

    def __init__(
        self, engine: Engine, vocabulary: int, tokenizer: Any, directory: Path, settings: Settings
    ) -> None:
        self.engine, self.vocabulary, self.tokenizer, self.settings = engine, vocabulary, tokenizer, settings
        self.token_texts = text.TokenTexts(tokenizer)
        # What takes long gets threads and a process of its own, which end with the service whatever they do.
        self.renderer = Renderer()
        self.template = text.chat_template(directory, self.renderer)
        self.rendering = asyncio.Lock()
        self.encoders = ThreadPoolExecutor(ENCODERS, "encoder")
        longest = max(map(len, tokenizer.get_vocab()), default=0)
        self.most_characters = settings.max_length * max(CHARACTERS_A_TOKEN, longest)
        self.ends = text.endings(directory, tokenizer)
        self.metrics = Metrics(engine)
        self.created = int(time.time())
        self.aborted: asyncio.Future[None]
        """Done when running requests must end; made by the loop that serves."""

    def abort(self) -> None:
        if not self.aborted.done():
            self.aborted.set_result(None)

    def close(self) -> None:
        """End the threads and the process of texts, whatever they do."""
        self.encoders.shutdown(wait=False, cancel_futures=True)
        self.renderer.close()

    async def _ids(self, param: str, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        """The token ids of texts. Raises ApiError where one is too long to be looked at."""
        most = self.most_characters
        wrong = next((len(one) for one in texts if len(one) > most), None)
        if wrong is not None:
            tokens = self.settings.max_length
            said = f"{param}: expected at most {most} characters, for {tokens} tokens, got {wrong}"
            raise ApiError(400, said, param=param, code="context_length_exceeded")

        def encode() -> list[list[int]]:
            # A batch, of one text so that it is not padded to the length of others: `encode` holds the
            # interpreter's lock, so that nothing else would run.
            try:
                batches = [self.tokenizer.encode_batch([one], add_special_tokens=special) for one in texts]
            except Exception as error:  # of no kind of its own
                said = f"{param}: the model's tokenizer does not encode it: {str(error)[:200]}"
                raise ApiError(400, said, param=param) from error
            return [batch[0].ids for batch in batches]

        return await self._elsewhere(encode) if any(texts) else [[] for _ in texts]

    async def _elsewhere(self, work: Callable[[], T]) -> T:
        """The result of what an encoder's thread does. Raises ApiError if the server stops before."""
        loop = asyncio.get_running_loop()
        try:
            doing = loop.run_in_executor(self.encoders, work)
        except RuntimeError as error:  # they have been ended
            raise stopping() from error
        return await in_time(doing, self.aborted)

    async def encode(self, request: ChatRequest | CompletionRequest) -> list[list[int]]:
        """The prompts' token ids; a chat is by the checkpoint's template, else its last user message alone.

        Raises ApiError, and ValueError that names the argument.
        """
        if isinstance(request, CompletionRequest):
            texts = [one for one in request.prompt if isinstance(one, str)]
            if texts:
                return await self._ids("prompt", texts, special=True)
            return [one for one in request.prompt if isinstance(one, list)]
        roles = {"developer": "system"}  # the newer name; templates know the older
        messages = [
            {"role": roles.get(one.role, one.role), "content": one.content or ""} for one in request.messages
        ]
        given = request.chat_template_kwargs or {}
        if self.template is not None:
            render = functools.partial(self.template, messages, **given)
            async with self.rendering:  # by one thread: templates wait for each other, other texts do not
                said = await self._elsewhere(render)
            return await self._ids("messages", [said])
        if given:
            said = "chat_template_kwargs: expected none, since the model has no chat template"
            raise ApiError(400, f"{said}, got {sorted(given)[0]}", param="chat_template_kwargs")
        asked = [one["content"] for one in messages if one["role"] == "user"]
        if not asked:
            raise ValueError("messages: expected one from the user")
        return await self._ids("messages", asked[-1:], special=True)

    async def call(self, request: ChatRequest | CompletionRequest) -> Call:
        """The request, checked and handed to the engine. Raises ApiError."""
        settings, each = self.settings, request.n or 1
        param = "prompt" if isinstance(request, CompletionRequest) else "messages"
        if request.model != settings.name:
            said = f"model: expected {settings.name!r}, got {request.model!r}"
            raise ApiError(404, said, param="model", code="model_not_found")
        prompts = len(request.prompt) if isinstance(request, CompletionRequest) else 1
        if prompts * each > settings.max_choices:
            name = "n" if prompts <= settings.max_choices else param
            said = f"{name}: expected at most {settings.max_choices} responses, got {prompts * each}"
            raise ApiError(400, said, param=name)
        try:
            encoded = await self.encode(request)
        except ValueError as error:
            raise ApiError(400, str(error), param=param) from error
        suffix = await self._suffix(request, encoded)
        seed = secrets.randbits(62) if request.seed is None else request.seed
        choices = [
            Choice(
                ids,
                self._gen_length(ids, request, param, len(suffix)),
                (seed + i) % 2**63,
                text.TextStream(self.tokenizer, request.stop or ()),
                suffix,
            )
            for ids in encoded
            for i in range(each)
        ]
        policy, ends = parse_policy(request.policy or settings.policy), self._ends(request)

        def submit(choice: Choice, tell: Callable[[Draft], None]) -> Handle:
            try:
                between = [self.engine.mask_id] * choice.gen_length if choice.suffix else []
                return self.engine.submit(
                    [*choice.prompt, *between, *choice.suffix],
                    gen_length=0 if choice.suffix else choice.gen_length,
                    infill=bool(choice.suffix),
                    temperature=request.temperature or 0.0,
                    top_p=request.top_p,
                    top_k=max(0, request.top_k or 0),
                    seed=choice.seed,
                    logprobs=request.scored,
                    on_draft=tell if request.stream_drafts else None,
                    **policy,
                    **ends,
                )
            except EngineFull as error:
                raise self.full("too many requests wait already") from error
            except RuntimeError as error:
                raise ApiError(503, str(error), code="closed") from error
            except ValueError as error:
                ours = str(error).partition(":")[0]
                theirs = {"prompt": param, "gen_length": "max_tokens"}
                theirs |= {name: name for name in ("temperature", "top_p", "top_k")}
                raise ApiError(400, str(error), param=theirs.get(ours, "policy")) from error

        return Call(self, choices, each, submit)

    def full(self, said: str) -> ApiError:
        return ApiError(429, said, code="full", headers={"Retry-After": str(self.metrics.wait())})

    async def _suffix(self, request: ChatRequest | CompletionRequest, prompts: list[list[int]]) -> list[int]:
        """The token ids that follow the response. Raises ApiError where others than its own masks stand."""
        given = request.suffix if isinstance(request, CompletionRequest) else None
        (ids,) = await self._ids("suffix", [given or ""])
        if ids and any(self.engine.mask_id in prompt for prompt in [*prompts, ids]):
            said = "suffix: neither it nor the prompt may hold the mask token, which stands for the response"
            raise ApiError(400, said, param="suffix")
        return ids

    def _ends(self, request: Options) -> dict[str, Any]:
        """The tokens that end a response, as arguments of `Engine.submit`."""
        ends = {"eos_id": None, "stop": []} if request.ignore_eos else self.ends
        ids = request.stop_token_ids or []
        self._check_ids("stop_token_ids", ids)
        return {**ends, "stop": [*ends["stop"], *([one] for one in ids)]}

    def _check_ids(self, param: str, ids: list[int]) -> None:
        wrong = next((one for one in ids if not 0 <= one < self.vocabulary), None)
        if wrong is not None:
            said = f"{param}: expected token ids below {self.vocabulary}, got {wrong}"
            raise ApiError(400, said, param=param)

    def _gen_length(self, ids: list[int], request: Options, param: str, suffix: int) -> int:
        """max_tokens for a prompt. Raises ApiError if it or the prompt is too long, or has foreign ids."""
        most = self.settings.max_length
        given = len(ids) + suffix
        length = request.max_tokens or max(1, min(self.settings.gen_length, most - given))
        if given + length > most:
            name = param if given >= most else "max_tokens"
            said = f"{name}: expected at most {most} tokens with the response, got {given} + {length}"
            raise ApiError(400, said, param=name, code="context_length_exceeded")
        self._check_ids(param, ids)
        return length


# --- HTTP ---------------------------------------------------------------------------------------

READ = "GET, HEAD"
PATHS = {
    "/v1/chat/completions": "POST",
    "/v1/completions": "POST",
    "/v1/models": READ,
    "/health": READ,
    "/metrics": READ,
    "/version": READ,
}
"""Methods by path; /v1/models/NAME is read too."""


def methods(path: str) -> str | None:
    return READ if path.startswith("/v1/models/") else PATHS.get(path)


class Gate:
    """In front of everything but CORS: the key, the bounds on a request's body and on the number of requests,
    and the count of answers."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service
        self.keys = [key.encode() for key in service.settings.keys]
        self.answering = 0
        """Requests that are here whole, with their body, and are not answered yet."""
        most = service.settings.max_connections
        self.most = math.inf if most is None else most - connections.reserved(most)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        scope = {**scope, "path": scope["path"].rstrip("/") or "/"}
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
                    raise self.service.full("too many requests are under way already")
                self.answering, answering = self.answering + 1, 1
            return message

        async def counted(message: Event) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            allowed, refusal = methods(scope["path"]), self._refusal(scope)
            if scope["method"] == "OPTIONS" and allowed is not None:
                await Response(None, 204, {"Allow": f"{allowed}, OPTIONS"})(scope, receive, counted)
            elif refusal is not None:
                await refusal.response(scope, receive, counted)
            else:
                await self.app(self._as_json(scope), bounded, counted)
        finally:
            self.answering -= answering
            path = scope["path"] if scope["path"] in PATHS else "other"
            self.service.metrics.http.labels(path, str(status)).inc()

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = dict(scope["headers"])
        if self.keys and scope["path"] != "/health":
            kind, _, given = headers.get(b"authorization", b"").partition(b" ")
            # Every key is compared, and in constant time.
            same = [hmac.compare_digest(given.strip(), key) for key in self.keys]
            if kind.lower() != b"bearer" or not any(same):
                said = "the API key is missing or wrong: expected the header Authorization: Bearer KEY"
                return ApiError(401, said, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        if int(headers.get(b"content-length", 0)) > self.service.settings.max_body:
            return too_large(self.service.settings.max_body)
        kind = headers.get(b"content-type", b"")
        if scope["method"] == "POST" and b"origin" in headers and not is_json(kind):
            said = f"content-type: expected application/json from a web page, got {kind.decode('latin-1')!r}"
            return ApiError(415, said, param="content-type")
        return None

    @staticmethod
    def _as_json(scope: Scope) -> Scope:
        """The request with the Content-Type that its body must have."""
        headers = scope["headers"]
        if scope["method"] != "POST" or is_json(dict(headers).get(b"content-type", b"")):
            return scope
        others = [(name, value) for name, value in headers if name != b"content-type"]
        return {**scope, "headers": [*others, (b"content-type", b"application/json")]}


def is_json(content_type: bytes) -> bool:
    kind = content_type.partition(b";")[0].strip().lower()
    return kind == b"application/json" or (kind.startswith(b"application/") and kind.endswith(b"+json"))


def too_large(most: int) -> ApiError:
    return ApiError(413, f"expected at most {most} bytes", code="request_too_large")


class EventStream(StreamingResponse):
    """Server-sent events of a call, which is closed however they end."""

    def __init__(self, call: Call, events: AsyncIterator[str]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self.call = call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.call.close()


async def answer(service: Service, http: Request, request: ChatRequest | CompletionRequest) -> Response:
    """The response to either endpoint, whole or streaming."""
    chat = isinstance(request, ChatRequest)
    call = await service.call(request)
    frame = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
        "object": "chat.completion" if chat else "text_completion",
        "created": int(time.time()),
        "model": request.model,
    }

    lengths, offsets = [0] * len(call.choices), [0] * len(call.choices)

    def logprobs(index: int, scores: Sequence[tuple[int, float]]) -> dict[str, Any]:
        """Of the choice's next tokens."""
        first, offset = lengths[index] == 0, offsets[index]
        tokens = [
            (service.token_texts(token, first=first and at == 0), value)
            for at, (token, value) in enumerate(scores)
        ]
        lengths[index] += len(tokens)
        offsets[index] += sum(len(text) for text, _ in tokens)
        if isinstance(request, ChatRequest):
            return protocol.chat_logprobs(tokens)
        return protocol.completion_logprobs(tokens, offset, bool(request.logprobs))

    def choice(
        index: int, content: dict[str, Any], reason: str | None, scores: Sequence[tuple[int, float]] | None
    ) -> dict[str, Any]:
        scored = None if scores is None else logprobs(index, scores)
        return {"index": index, **content, "logprobs": scored, "finish_reason": reason}

    if request.stream:
        usage = bool(request.stream_options and request.stream_options.include_usage)
        if chat:
            frame["object"] = "chat.completion.chunk"

        def event(choices: list[dict[str, Any]], used: dict[str, Any] | None = None) -> str:
            return sse({**frame, "choices": choices, **({"usage": used} if usage else {})})

        def part(
            index: int,
            piece: str,
            reason: str | None = None,
            scores: Sequence[tuple[int, float]] = (),
            **more: Any,
        ) -> str:
            content = {"delta": {"content": piece} if piece else {}} if chat else {"text": piece}
            return event([choice(index, {**content, **more}, reason, scores or None)])

        async def events() -> AsyncIterator[str]:
            try:
                for index in range(len(call.choices) if chat else 0):
                    yield part(index, "", delta={"role": "assistant", "content": ""})
                async for piece in call.pieces():
                    if piece.draft is not None:
                        length = call.choices[piece.choice].gen_length
                        yield part(piece.choice, "", draft=draft_of(piece.draft, length, service.token_texts))
                    if piece.text or piece.scores:
                        yield part(piece.choice, piece.text, scores=piece.scores)
                    if piece.reason is not None:
                        yield part(piece.choice, "", piece.reason)
                if usage:
                    yield event([], call.usage())
                yield "data: [DONE]\n\n"
            except ApiError as error:
                yield sse(error.body)

        return EventStream(call, events())

    texts, reasons = [""] * len(call.choices), [""] * len(call.choices)
    scores: list[list[tuple[int, float]]] = [[] for _ in call.choices]

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
        choice(
            index,
            {"message": {"role": "assistant", "content": said, "refusal": None}} if chat else {"text": said},
            reason,
            scores[index] if request.scored else None,
        )
        for index, (said, reason) in enumerate(zip(texts, reasons, strict=True))
    ]
    return JSONResponse({**frame, "choices": choices, "usage": call.usage()})


def draft_of(draft: Draft, length: int, texts: text.TokenTexts) -> dict[str, Any]:
    """The "draft" that stands beside a choice's empty text in a chunk of its own, where a request asks for
    `stream_drafts`.

    pass: the forward passes that the response has had. start: where the active block begins in the response;
    the tokens before it are final and were streamed, those after it are masks. length: of the response.
    tokens: the block's, each as text, special tokens included; null where there is a mask. They join to the
    text but for characters over several tokens. Where the client is slow, drafts are left out, never a
    block's last. The whole block follows as text once it is complete.
    """
    tokens = [
        None if token is None else texts(token, first=draft.start + at == 0)
        for at, token in enumerate(draft.tokens)
    ]
    return {"pass": draft.nfe, "start": draft.start, "length": length, "tokens": tokens}


def sse(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"


def make_app(service: Service) -> FastAPI:
    """The ASGI application of a service. The engine is closed when its lifespan ends."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.aborted = asyncio.get_running_loop().create_future()
        yield
        service.abort()
        service.close()
        await asyncio.to_thread(service.engine.close, cancel=True)

    # No pages of documentation: they would load scripts from elsewhere.
    app = FastAPI(title="dparallel", lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_middleware(Gate, service=service)
    if service.settings.cors_origins:
        # In front of the gate: a browser asks without the key, and a refusal must reach the page.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=service.settings.cors_origins,
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After"],
        )

    @app.exception_handler(HTTPException)
    async def refused(http: Request, error: HTTPException) -> Response:
        path = http.scope["path"]
        if not isinstance(error, ApiError) and error.status_code in (404, 405):
            said, headers = f"path: expected one of {', '.join(PATHS)}, got {path}", error.headers
            if error.status_code == 405:
                allowed = methods(path) or READ
                said, headers = f"method: {path} expects {allowed}, got {http.method}", {"Allow": allowed}
            error = ApiError(error.status_code, said, headers=headers)
        return ApiError.of(error).response

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            said = f"body: expected JSON ({first['ctx']['error']} at character {first['loc'][-1]})"
            return ApiError(400, said).response
        where = [str(one) for one in first["loc"][1:]]
        said = f"{'.'.join(where) or 'body'}: {first['msg'].removeprefix('Value error, ')}"
        return ApiError(400, said, param=where[0] if where else None).response

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> Response:
        return ApiError(500, "internal error", code="internal_error").response

    @app.post("/v1/chat/completions", responses=errors(*ERRORS))
    async def chat_completions(http: Request, request: ChatRequest) -> Response:
        return await answer(service, http, request)

    @app.post("/v1/completions", responses=errors(*ERRORS))
    async def completions(http: Request, request: CompletionRequest) -> Response:
        return await answer(service, http, request)

    def read(path: str, answers: dict[int | str, dict[str, Any]]) -> Callable[[Any], Any]:
        head, get = app.head(path, include_in_schema=False), app.get(path, responses=answers)
        return lambda function: get(head(function))

    model = {
        "id": service.settings.name,
        "object": "model",
        "created": service.created,
        "owned_by": "dparallel",
        "root": service.settings.name,
        "parent": None,
        "max_model_len": service.settings.max_length,
    }

    @read("/v1/models", errors(401, 413))
    async def list_models() -> Response:
        return JSONResponse({"object": "list", "data": [model]})

    @read("/v1/models/{name:path}", errors(401, 404, 413))
    async def one_model(name: str) -> Response:
        if name != service.settings.name.rstrip("/"):
            said = f"model: expected {service.settings.name!r}, got {name!r}"
            raise ApiError(404, said, param="model", code="model_not_found")
        return JSONResponse(model)

    @read("/version", errors(401, 413))
    async def version() -> Response:
        return JSONResponse({"version": dx.__version__})

    states = {200: "It takes requests.", 503: "It takes no more requests."}

    @read(
        "/health",
        errors(413) | {status: {"model": Health, "description": said} for status, said in states.items()},
    )
    async def health() -> Response:
        closed = service.engine.closed
        return JSONResponse({"status": "closed" if closed else "ok"}, 503 if closed else 200)

    @read("/metrics", errors(401, 413))
    async def metrics() -> Response:
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


class Server(uvicorn.Server):
    """On SIGTERM or SIGINT it takes no more, and gives running requests their grace before they must end."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        for one in sockets or []:
            one.listen(self.config.backlog)  # fails, if at all, before anything else has begun
        await super().startup(sockets)
        for one in sockets or []:  # uvicorn names only those that it opens
            host, port = one.getsockname()[:2]
            at = f"[{host}]" if ":" in host else host
            logging.getLogger("uvicorn.error").info("dparallel running on http://%s:%d", at, port)

        for one in sockets or []:
            one.listen(connections.BACKLOG)  # how many are accepted in a turn is another number

    async def on_tick(self, counter: int) -> bool:
        if counter % 10 == 0:
            connections.cut_overdue(self.server_state.connections)
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ending = asyncio.get_running_loop().call_later(self.service.settings.grace, self.service.abort)
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()


def find_keys(key: str | None, file: Path | None) -> tuple[str, ...]:
    """API keys: the one that is given, those of a file, or those of the environment.

    Raises ValueError if there is none where some are to be: what should have held them must not open the
    server to all.
    """
    if key is not None and file is not None:
        raise ValueError("api_key: not beside --api-key-file")
    if file is not None:
        return read_keys(file)
    name = "api_key" if key is not None else KEY_VARIABLE
    given = os.environ.get(KEY_VARIABLE) if key is None else key
    if given is None:
        return ()
    if key is not None and key.startswith("--"):
        raise ValueError(f"api_key: expected a key, got the option {key}; is a variable empty?")
    keys = keys_in(name, given)
    if not keys:
        raise ValueError(f"{name}: expected a key, got an empty one")
    return keys


def read_keys(file: Path) -> tuple[str, ...]:
    """API keys of a file. Raises ValueError if there is none."""
    keys = keys_in("api_key_file", files.read_text("api_key_file", file))
    if not keys:
        raise ValueError(f"api_key_file: {file} holds no key")
    return keys


def keys_in(name: str, said: str) -> tuple[str, ...]:
    """API keys, one a line: without blanks around them and without comments, which # begins.

    Raises ValueError where one cannot be sent in a header.
    """
    found = (re.split(r"(?:^|\s)#", line)[0].strip() for line in re.split(r"\r\n|\r|\n", said))
    keys = tuple(key for key in found if key)
    for number, key in enumerate(keys, 1):
        if not key.isprintable():
            raise ValueError(f"{name}: expected printable characters, but key {number} has others")
    return keys


def listen(host: str, port: int) -> list[socket.socket]:
    """Sockets that have the port at every address of the host; "": of this machine; port 0: a free one.

    Raises ValueError, by name.
    """
    if not 0 <= port < 2**16:
        raise ValueError(f"port: expected 0 to 65535, got {port}")
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise ValueError(f"host: {host!r} does not resolve ({error})") from error
    with contextlib.ExitStack() as opened:
        sockets: list[socket.socket] = []
        for family, kind, number, _, address in dict.fromkeys(found):
            try:
                one = opened.enter_context(socket.socket(family, kind, number))
                if os.name == "posix":  # else a restart waits for connections that are over
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                one.bind((address[0], port, *address[2:]))
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise unusable(host, port, error) from error
                continue  # a machine without IPv6, whose names may have such addresses all the same
            sockets.append(one)
            port = one.getsockname()[1]
        if not sockets:
            raise ValueError(f"host: {host!r} is no address of this machine")
        opened.pop_all()
    return sockets


def unusable(host: str, port: int, error: OSError) -> ValueError:
    """Why the port cannot be had."""
    if error.errno == errno.EADDRINUSE:
        return ValueError(f"port: {port} of {host!r} is in use already; --port 0 takes a free one")
    return ValueError(f"port: {port} of {host!r} cannot be had ({error.strerror})")


def make_server(service: Service, log_level: str = "info") -> Server:
    """The server of a service; its `run` takes the sockets of `listen`."""
    settings = service.settings
    config = connections.config_of(
        make_app(service),
        most=settings.max_connections or connections.most_connections(None),
        seconds=settings.body_seconds,
        log_level=log_level,
        shutdown_seconds=math.ceil(settings.grace) + 5,
    )
    return Server(config, service)


def run(
    model: str,
    *,
    host: str,
    port: int,
    device: str | None,
    fp8: bool = False,
    mask_id: int | None = None,
    log_level: str,
    engine: dict[str, Any],
    **settings: Any,
) -> None:
    """Serve a model until SIGTERM or SIGINT.

    `engine`: arguments of `Engine`; `settings`: of `Settings`, without those that the model gives.
    Raises ValueError and FileNotFoundError, by name; what can be known before the model is loaded, then.
    """
    if log_level not in uvicorn.config.LOG_LEVELS:
        raise ValueError(f"log_level: expected one of {list(uvicorn.config.LOG_LEVELS)}, got {log_level!r}")
    directory = registry.directory_of(model)
    if not host.strip():  # an unset variable must not open the server either
        raise ValueError("host: expected a name or an address (0.0.0.0: every one), got an empty one")
    given = {key: value for key, value in settings.items() if value is not None}
    asked = Settings(**{"name": model, **given}).max_connections
    connections.most_connections(asked)
    with contextlib.ExitStack() as opened:
        sockets = [opened.enter_context(one) for one in listen(host, port)]
        loaded, tokenizer = registry.load(model, device=device, fp8=fp8, mask_id=mask_id)
        positions = dx.models.max_positions(loaded) or math.inf
        defaults = {
            "name": model,
            "gen_length": registry.gen_length(model),
            "max_length": min(Settings.max_length, positions),
        }
        chosen = Settings(**{**defaults, **given})
        if chosen.max_length > positions:
            log.warning(
                "max_length: %d, but the model is made for %d positions", chosen.max_length, positions
            )
        try:
            running = Engine(loaded, max_length=chosen.max_length, **engine)
        except (MemoryError, OverflowError, RuntimeError, TypeError) as error:
            raise ValueError(
                f"lanes, max_length: {engine.get('lanes')} requests of {chosen.max_length} tokens do not fit "
                f"({str(error).partition(chr(10))[0][:200]})"
            ) from error
        opened.callback(running.close, cancel=True)
        # Only now it is known how many files the model keeps open.
        chosen = replace(chosen, max_connections=connections.most_connections(asked))
        service = Service(running, loaded.shape.rows, tokenizer, directory, chosen)
        opened.callback(service.close)
        gc.collect()
        gc.freeze()  # what is here stays, so that no request waits until all of it is looked through
        try:
            with contextlib.suppress(KeyboardInterrupt):
                make_server(service, log_level).run(sockets)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            raise unusable(host, port, error) from error  # two had the port, one listened first
