"""OpenAI's Responses API: a request is decoded as a chat, and its outcome is told in items.

Nothing is stored: a client sends the whole conversation with each request.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    Discriminator,
    FailFast,
    Field,
    PrivateAttr,
    Tag,
    ValidationError,
    model_validator,
)

from .answer import Writer, sse
from .call import Call, Piece, Score
from .errors import ApiError
from .logprobs import as_json
from .protocol import (
    MOST_MESSAGES,
    MOST_TOOLS,
    MOST_TOP,
    ChatRequest,
    Common,
    CompletionRequest,
    Function,
    Strict,
    Text,
)
from .service import Service
from .tools import PossibleCalls
from .unsupported import REASONING, RESPONSE, RESPONSE_TEXT, RESPONSE_TOOL

LOGPROBS = "message.output_text.logprobs"

# --- the input ------------------------------------------------------------------------------------


class Part(Strict):
    within = "input"
    type: Literal["input_text", "output_text"]
    text: Text
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None
    """Of an answer that a client sends back, as are the annotations."""


def as_parts(value: Any) -> Any:
    return [{"type": "input_text", "text": value}] if isinstance(value, str) else value


Content = Annotated[
    list[Part], FailFast(), BeforeValidator(as_parts, json_schema_input_type=str | list[Part])
]


def joined(parts: Sequence[Part]) -> str:
    return "".join(part.text for part in parts)


class Item(Strict):
    within = "input"
    id: str | None = None
    status: str | None = None
    phase: str | None = None
    """These three are of an answer that a client sends back."""


class MessageItem(Item):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Content


class CallItem(Item):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: Text


class ResultItem(Item):
    type: Literal["function_call_output"]
    call_id: str
    output: Content


class ReasoningItem(BaseModel):
    """The thoughts of another model, which are passed over."""

    type: Literal["reasoning"]


def kind_of(item: Any) -> Any:
    kind = item.get("type") if isinstance(item, dict) else getattr(item, "type", "")
    return "message" if kind is None else kind if isinstance(kind, str) else ""


AnyItem = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[ResultItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(
        kind_of,
        custom_error_type="unsupported_item",
        custom_error_message="expected the type message, function_call, function_call_output or reasoning",
    ),
]


def as_items(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


def messages_of(items: Sequence[MessageItem | CallItem | ResultItem | ReasoningItem]) -> list[dict[str, Any]]:
    """The messages of a chat: calls belong to the assistant's message before them, as in a chat's answer."""
    messages: list[dict[str, Any]] = []
    for item in items:
        if isinstance(item, MessageItem):
            messages.append({"role": item.role, "content": joined(item.content)})
        elif isinstance(item, ResultItem):
            result = {"role": "tool", "tool_call_id": item.call_id, "content": joined(item.output)}
            messages.append(result)
        elif isinstance(item, CallItem):
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": None})
            function = {"name": item.name, "arguments": item.arguments}
            messages[-1].setdefault("tool_calls", []).append({"id": item.call_id, "function": function})
    return messages


# --- the request ----------------------------------------------------------------------------------


class FlatFunction(Function):
    neutral = RESPONSE_TOOL
    type: Literal["function"]

    @model_validator(mode="before")
    @classmethod
    def _of_the_clients(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("type") != "function":
            raise ValueError(f'only the type "function" is supported, got {value.get("type")!r:.80}')
        return value

    @property
    def fields(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "description": self.description,
            "parameters": self.parameters,
            "strict": self.strict,
        }


class FlatName(Strict):
    within = "tool_choice"
    type: Literal["function"]
    name: str


class TextFormat(Strict):
    within = "text"
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    """A response has the schema's form in any case."""
    body: dict[str, Any] | None = Field(None, alias="schema")

    @model_validator(mode="after")
    def _with_schema(self) -> Self:
        if (self.type == "json_schema") != (self.body is not None):
            raise ValueError(f'schema: belongs to the type "json_schema", got the type {self.type!r}')
        return self

    @property
    def fields(self) -> dict[str, Any]:
        named = {"name": self.name, "description": self.description, "strict": self.strict}
        return {**{name: value for name, value in named.items() if value is not None}, "schema": self.body}

    @property
    def response_format(self) -> dict[str, Any]:
        return {"type": self.type} | ({} if self.body is None else {"json_schema": self.fields})


class TextOptions(Strict):
    neutral, within = RESPONSE_TEXT, "text"
    format: TextFormat | None = None


class Reasoning(Strict):
    neutral, within = REASONING, "reasoning"


class ResponseChat(ChatRequest):
    """A request as a chat, whose errors have the names of the Responses API."""

    asked, format_name = "input", "text"

    @property
    def length_name(self) -> str:
        return "max_output_tokens"


class ResponsesRequest(Common):
    """POST /v1/responses."""

    neutral = RESPONSE
    input: Annotated[
        list[AnyItem],
        FailFast(),
        Field(max_length=MOST_MESSAGES),
        BeforeValidator(as_items, json_schema_input_type=str | list[AnyItem]),
    ]
    instructions: Text | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    text: TextOptions | None = None
    tools: list[FlatFunction] | None = Field(None, max_length=MOST_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | FlatName | None = None
    parallel_tool_calls: bool | None = None
    """False: at most one call."""
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = None
    """An answer has no reasoning of which it could include anything."""
    top_logprobs: int | None = Field(None, ge=0, le=MOST_TOP)
    reasoning: Reasoning | None = None
    metadata: dict[Text, Text] | None = Field(None, max_length=16)
    """It is echoed."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables of the model's chat template by name, such as enable_thinking."""
    _chat: ResponseChat = PrivateAttr()
    _echo: dict[str, Any] = PrivateAttr()

    @property
    def chat(self) -> ResponseChat:
        """The request as a chat."""
        return self._chat

    @property
    def echo(self) -> dict[str, Any]:
        """The fields of a response that repeat the request's."""
        return self._echo

    @property
    def scored(self) -> bool:
        return LOGPROBS in (self.include or ())

    @model_validator(mode="after")
    def _read(self) -> Self:
        begins = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        choice, given = self.tool_choice, self.text and self.text.format
        functions = [{"type": "function", "function": tool.fields} for tool in self.tools or ()]
        named = (
            {"type": "function", "function": {"name": choice.name}}
            if isinstance(choice, FlatName)
            else choice
        )
        messages = [*begins, *messages_of(self.input)]
        if not messages:
            raise ApiError(400, "input: expected at least a message", param="input")
        if self.top_logprobs and not self.scored:
            raise ApiError(400, f'top_logprobs: belongs to include=["{LOGPROBS}"]', param="top_logprobs")
        try:
            self._chat = ResponseChat.model_validate(
                {
                    **{name: getattr(self, name) for name in Common.model_fields},
                    "messages": messages,
                    "max_tokens": self.max_output_tokens,
                    "response_format": given.response_format if given else None,
                    "tools": functions or None,
                    "tool_choice": named,
                    "parallel_tool_calls": self.parallel_tool_calls,
                    "logprobs": self.scored,
                    "top_logprobs": self.top_logprobs,
                    "chat_template_kwargs": self.chat_template_kwargs,
                }
            )
        except ValidationError as error:  # of fields that both requests have
            first = error.errors()[0]
            name = str((*first["loc"], "input")[0])
            message = f"{name}: {first['msg'].removeprefix('Value error, ')}"
            raise ApiError(400, message, param=name) from error
        if self.scored and (self._chat.may_call or self._chat.calls):
            raise ApiError(
                400, "include: log-probabilities are of texts, and tools may be called", param="include"
            )
        self._echo = self._echoed()
        return self

    def _echoed(self) -> dict[str, Any]:
        choice, given = self.tool_choice, self.text and self.text.format
        form = given.fields if given and given.body is not None else {}
        echo = {
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "metadata": self.metadata or {},
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "temperature": self.temperature,
            "text": {"format": {"type": given.type if given else "text", **form}},
            "tool_choice": {"type": "function", "name": choice.name}
            if isinstance(choice, FlatName)
            else choice or "auto",
            "tools": [{"type": "function", **tool.fields} for tool in self.tools or ()],
            "top_logprobs": self.top_logprobs or 0,
            "top_p": self.top_p,
        }
        for name, value in echo.items():
            try:
                json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
            except (ValueError, RecursionError) as error:
                message = f"{name}: expected JSON of Unicode and finite numbers, not nested deeply"
                raise ApiError(400, message, param=name) from error
        return echo


# --- the response ---------------------------------------------------------------------------------


def new_id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"


class ResponseWriter(Writer):
    """Writes the answer as a response: whole, or as its events."""

    LEFT_OUT: ClassVar[dict[str, Any]] = {
        "background": False,
        "error": None,
        "incomplete_details": None,
        "previous_response_id": None,
        "store": False,
        "truncation": "disabled",
    }

    def __init__(
        self, asked: ResponsesRequest, service: Service, request: ChatRequest | CompletionRequest, call: Call
    ) -> None:
        super().__init__(service, request, call)
        self.output: list[dict[str, Any]] = []
        self.response: dict[str, Any] = {
            "id": new_id("resp"),
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "model": request.model,
            "output": self.output,
            "usage": None,
            **self.LEFT_OUT,
            **asked.echo,
        }
        self.item: dict[str, Any] | None = None
        """The item of the output that is written."""
        self.number = 0
        """Of the next event."""

    async def events(self) -> AsyncIterator[str]:
        try:
            async for event in self._events():
                yield sse(event, event["type"])
        except ApiError as error:
            event = self._ended("error", {"code": "server_error", "message": error.detail})
            yield sse(event, event["type"])

    async def whole(self) -> str:
        async for _ in self._events():
            pass
        return as_json(self.response)

    async def _events(self) -> AsyncIterator[dict[str, Any]]:
        """The events of the response, which grows with them. Raises ApiError."""
        yield self._event("created", response=self.response)
        yield self._event("in_progress", response=self.response)
        async for piece in self.call.pieces():
            if piece.draft is not None:
                yield self._event("draft", draft=self.draft(piece))
            for event in self._grown(piece):
                yield event
            if piece.reason is not None:
                yield self._ended(piece.reason)

    def _grown(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """The events of what a piece adds to the output."""
        last = piece.reason is not None
        parts: Sequence[str | dict[str, Any]] = [piece.text] if piece.text or piece.scores else []
        if self.calls is not None:
            parts = self.calls[0].put(piece.text, last).parts
        if last and not parts and not self.output:
            parts = [""]
        for part in parts:
            yield from self._text(part, piece.scores) if isinstance(part, str) else self._call(part)
        if last:
            yield from self._close("incomplete" if piece.reason == "length" else "completed")

    def _text(self, text: str, scores: Sequence[Score]) -> Iterator[dict[str, Any]]:
        if self.item is None or self.item["type"] != "message":
            yield from self._close()
            yield self._open({"id": new_id("msg"), "type": "message", "role": "assistant", "content": []})
            part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            yield self._of_item("content_part.added", content_index=0, part=part)
            self.output[-1]["content"].append(part)
        assert self.item is not None
        (part,) = self.item["content"]
        scored = self.logprobs(scores)["content"] if scores else []
        part["text"] += text
        part["logprobs"] += scored
        yield self._of_item("output_text.delta", content_index=0, delta=text, logprobs=scored)

    def _call(self, part: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """part: an entry of "tool_calls" of a chat's stream; with an id a call begins."""
        function = part["function"]
        if "id" in part:
            yield from self._close()
            call = {"id": new_id("fc"), "type": "function_call", "call_id": part["id"]}
            yield self._open({**call, "name": function["name"], "arguments": ""})
        assert self.item is not None
        self.item["arguments"] += function["arguments"]
        if function["arguments"]:
            yield self._of_item("function_call_arguments.delta", delta=function["arguments"])
        if self.calls is not None and isinstance(self.calls[0], PossibleCalls):
            yield from self._close()  # such calls come whole

    def _open(self, item: dict[str, Any]) -> dict[str, Any]:
        self.item = item
        item["status"] = "in_progress"
        self.output.append(item)
        return self._event("output_item.added", output_index=len(self.output) - 1, item=item)

    def _close(self, status: str = "completed") -> Iterator[dict[str, Any]]:
        """The events by which the item that is written ends, if there is any."""
        item = self.item
        if item is None:
            return
        if item["type"] == "message":
            (part,) = item["content"]
            said = {"text": part["text"], "logprobs": part["logprobs"]}
            yield self._of_item("output_text.done", content_index=0, **said)
            yield self._of_item("content_part.done", content_index=0, part=part)
        else:
            called = {"name": item["name"], "arguments": item["arguments"]}
            yield self._of_item("function_call_arguments.done", **called)
        item["status"], self.item = status, None
        yield self._event("output_item.done", output_index=len(self.output) - 1, item=item)

    def _ended(self, reason: str, error: dict[str, Any] | None = None) -> dict[str, Any]:
        """The response's last event."""
        status = {"stop": "completed", "length": "incomplete"}.get(reason, "failed")
        if self.item is not None:  # which a failure has cut
            self.item["status"] = "incomplete"
        used = self.call.usage()
        prompt_details = used.pop("prompt_tokens_details")
        usage = {
            "input_tokens": used.pop("prompt_tokens"),
            "input_tokens_details": {**prompt_details, "cache_write_tokens": 0},
            "output_tokens": used.pop("completion_tokens"),
            "output_tokens_details": {"reasoning_tokens": 0},
            **used,
        }
        self.response |= {"status": status, "error": error, "usage": usage}
        if status == "completed":
            self.response["completed_at"] = int(time.time())
        elif status == "incomplete":
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        return self._event(status, response=self.response)

    def _of_item(self, name: str, /, **fields: Any) -> dict[str, Any]:
        """An event of the item that is written, which is the last."""
        item = self.output[-1]
        return self._event(name, item_id=item["id"], output_index=len(self.output) - 1, **fields)

    def _event(self, name: str, /, **fields: Any) -> dict[str, Any]:
        event = {"type": f"response.{name}", "sequence_number": self.number, **fields}
        self.number += 1
        return event
