"""The answer to a request: whole, or as a stream of server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from dparallel_ext import DraftEvent

from .. import text
from .call import Call, Piece, Score
from .errors import ApiError, client_left
from .logprobs import GrowingLists, as_json, chat_logprobs, completion_logprobs, finite
from .protocol import ChatRequest, CompletionRequest, ToolName
from .service import Service
from .tools import CallText, PossibleCalls


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


class Writer(ABC):
    """Writes the pieces of a call as an endpoint's JSON: whole, or as events of a stream."""

    def __init__(self, service: Service, request: ChatRequest | CompletionRequest, call: Call) -> None:
        self.request, self.call = request, call
        self.token_texts = service.model(request.model).token_texts
        self.calls = self._calls(service)

    @abstractmethod
    def events(self) -> AsyncIterator[str]:
        """The answer as server-sent events."""

    @abstractmethod
    async def whole(self) -> str:
        """The answer as one object of JSON."""

    def draft(self, piece: Piece) -> dict[str, Any]:
        """The "draft" of a piece that has one."""
        assert piece.draft is not None
        return draft_of(piece.draft, self.call.choices[piece.choice].gen_length, self.token_texts)

    def _calls(self, service: Service) -> Sequence[CallText | PossibleCalls] | None:
        """What reads the calls of each choice; None where there are none."""
        request = self.request
        if not isinstance(request, ChatRequest):
            return None
        if functions := [*request.calls]:
            return [CallText(functions) for _ in self.call.choices]
        style = service.model(request.model).call_style
        if not request.may_call or style is None:
            return None
        most = 1 if request.parallel_tool_calls is False else None
        return [PossibleCalls(style, request.schemas, most) for _ in self.call.choices]

    def logprobs(self, scores: Sequence[Score]) -> dict[str, Any]:
        """The entry "logprobs" for the next tokens of a choice."""

        def said(token: int, score: Score) -> str:
            return self.token_texts(token, first=score.start == 0)

        tokens = [(said(each.token, each), each.logprob) for each in scores]
        top = [[(said(token, each), value) for token, value in each.top] for each in scores]
        if isinstance(self.request, ChatRequest):
            return chat_logprobs(tokens, top)
        return completion_logprobs(tokens, [each.start for each in scores], top if self.request.top else None)


class AnswerWriter(Writer):
    """Writes the answer of chat completions or of completions."""

    def __init__(self, service: Service, request: ChatRequest | CompletionRequest, call: Call) -> None:
        super().__init__(service, request, call)
        self.chat = isinstance(request, ChatRequest)
        self.frame = {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": "chat.completion" if self.chat else "text_completion",
            "created": int(time.time()),
            "model": request.model,
        }
        options = request.stream_options
        self.usage = bool(options and options.include_usage)
        self.continuous = bool(options and options.continuous_usage_stats)

    def reason(self, choice: int, reason: str) -> str:
        """A choice's finish reason; as OpenAI's "tool_calls" where the model has chosen to call functions."""
        named = isinstance(self.request, ChatRequest) and isinstance(self.request.tool_choice, ToolName)
        called = not named and self.calls is not None and self.calls[choice].count
        return "tool_calls" if called and reason == "stop" else reason

    def message(self, choice: int, text: str) -> dict[str, Any]:
        """The whole answer of a chat."""
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if self.calls is not None:
            parts = [self.calls[choice].put(text), self.calls[choice].put("", last=True)]
            message["content"] = "".join(part.text for part in parts) or self.calls[choice].content
            calls = [{k: v for k, v in call.items() if k != "index"} for part in parts for call in part.calls]
            message |= {"content": message["content"] or None, "tool_calls": calls} if calls else {}
        return message

    def event(self, choices: list[dict[str, Any]], used: dict[str, Any] | None = None) -> str:
        if self.continuous and used is None:
            used = self.call.usage()
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
        calls: Sequence[dict[str, Any]] = ()
        if self.calls is not None and (piece or reason is not None):
            said = self.calls[index].put(piece, last=reason is not None)
            piece, calls = said.text, said.calls
        delta = {**({"content": piece} if piece else {}), **({"tool_calls": calls} if calls else {})}
        content: dict[str, Any] = {"delta": delta} if self.chat else {"text": piece}
        reason = reason and self.reason(index, reason)
        scored = self.logprobs(scores) if scores else None
        choice = {"index": index, **content, **fields, "logprobs": scored, "finish_reason": reason}
        return self.event([choice])

    async def events(self) -> AsyncIterator[str]:
        call = self.call
        if self.chat:
            self.frame["object"] = "chat.completion.chunk"
        try:
            for index in range(len(call.choices) if self.chat else 0):
                begins = "" if self.calls is None else self.calls[index].content
                yield self.part(index, "", delta={"role": "assistant", "content": begins})
            async for piece in call.pieces():
                if piece.draft is not None:
                    yield self.part(piece.choice, "", draft=self.draft(piece))
                if piece.text or piece.scores:
                    yield self.part(piece.choice, piece.text, scores=piece.scores)
                if piece.reason is not None:
                    yield self.part(piece.choice, "", piece.reason)
            if self.usage:
                yield self.event([], call.usage())
            yield "data: [DONE]\n\n"
        except ApiError as error:
            yield sse(error.body)

    async def whole(self) -> str:
        call = self.call
        texts, reasons = [""] * len(call.choices), [""] * len(call.choices)
        # Written piece by piece: of many tokens at once it would take seconds, in which nobody is answered.
        scored = [GrowingLists(self.logprobs(())) for _ in call.choices]
        async for piece in call.pieces():
            texts[piece.choice] += piece.text
            if piece.scores:
                scored[piece.choice].add(self.logprobs(piece.scores))
            reasons[piece.choice] = piece.reason or ""
        choices = []
        for index, (said, how) in enumerate(zip(texts, reasons, strict=True)):
            content = {"message": self.message(index, said)} if self.chat else {"text": said}
            reason = self.reason(index, how)  # behind `message`, which reads the calls
            fields = {"index": index, **content, "finish_reason": reason}
            logprobs = scored[index].text() if self.request.scored else "null"
            choices.append(f'{as_json(fields)[:-1]},"logprobs":{logprobs}}}')
        usage = as_json(call.usage())
        return f'{as_json(self.frame)[:-1]},"choices":[{",".join(choices)}],"usage":{usage}}}'


async def left(http: Request) -> None:
    """Wait until the client leaves."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


@contextlib.asynccontextmanager
async def attended(call: Call, http: Request) -> AsyncIterator[None]:
    """A context that closes the call at its end, and fails it if the client leaves before."""

    async def gone() -> None:
        await left(http)
        call.fail(client_left())

    watching = asyncio.ensure_future(gone())
    try:
        yield
    finally:
        watching.cancel()
        call.close()


async def answer(
    service: Service,
    http: Request,
    request: ChatRequest | CompletionRequest,
    writer: Callable[[Service, ChatRequest | CompletionRequest, Call], Writer] = AnswerWriter,
) -> Response:
    """The response to a request, whole or streaming, as `writer` writes it."""
    call = await service.model(request.model).call(request, lambda: left(http))
    written = writer(service, request, call)
    if request.stream:
        return EventStream(call, written.events())
    async with attended(call, http):
        return Response(await written.whole(), media_type="application/json")


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
        values = [None if value is None or math.isnan(value) else finite(value) for value in draft.logprobs]
        fields |= {"passes": draft.passes, "logprobs": values}
    return fields


def sse(content: dict[str, Any], name: str | None = None) -> str:
    """An event of a stream of server-sent events: its name, if it has one, and a line of JSON.

    It is ASCII, since clients that split decoded text as Python's `str.splitlines` does, such as httpx's
    `iter_lines`, also end a line at U+0085, U+2028 and U+2029.
    """
    named = "" if name is None else f"event: {name}\n"
    return f"{named}data: {json.dumps(content, separators=(',', ':'))}\n\n"
