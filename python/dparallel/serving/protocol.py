"""Requests of OpenAI's API."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, FailFast, Field, field_validator, model_validator

from dparallel_ext.decoding.most_probable import MOST as MOST_TOP

from ..structured import choice_pattern
from ..text import unicode
from .errors import ApiError
from .tools import NO_ARGUMENTS
from .unsupported import CHAT, COMPLETION, MESSAGE, PART, STREAM_OPTIONS, Neutral, refused

MOST_PROMPTS = 4096
"""The most prompts of a request, and the most `n`, whatever the server's own limit, since each prompt is
checked by itself."""
MOST_MESSAGES = 4096
"""The most messages of a chat, since everybody waits while they are checked."""
MOST_STOPS = 32
"""The most stop strings of a request, and the most stop_token_ids."""
MOST_TOOLS = 128
"""The most tools of a request."""

TEMPLATE_NAMES = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "documents",
        "messages",
        "tokenize",
        "tools",
    }
)
"""Names that chat_template_kwargs must not have: the server sets them, or a request's other parameters do."""


class Health(BaseModel):
    status: Literal["ok", "closed"]


class Form(NamedTuple):
    """The form of a response."""

    kind: Literal["json", "regex", "calls"]
    text: str
    """A JSON schema, a regular expression, or JSON of functions' names and the schemas of their arguments."""
    calls: str = ""
    """JSON of the functions that may be called in its place: whether one at most, and names and schemas."""


ANY_OBJECT = Form("json", '{"type": "object"}')
"""The form that clients mean by "json_object"."""


Text = Annotated[str, AfterValidator(unicode)]
Ids = Annotated[list[int], Field(min_length=1)]
Stop = Annotated[str, Field(min_length=1)]
Several = Field(min_length=1, max_length=MOST_PROMPTS)


class Strict(BaseModel):
    """A model without type conversion that refuses unknown fields, unless their value is null or neutral."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="allow")
    neutral: ClassVar[Neutral] = {}
    within: ClassVar[str | None] = None
    """The request's parameter that holds such objects; None: it is the request."""

    @model_validator(mode="after")
    def _refuse(self) -> Self:
        refusal = refused(self.model_extra or {}, self.neutral)
        if refusal is not None:
            name, message = refusal
            if self.within is not None:
                name, message = self.within, f"{self.within}.{message}"
            raise ApiError(400, message, param=name, code="unsupported_parameter")
        return self


class StreamOptions(Strict):
    neutral, within = STREAM_OPTIONS, "stream_options"
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    """With `include_usage`, each event has the usage so far."""


class JsonSchema(Strict):
    within = "response_format"
    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    """A response has the schema's form in any case."""
    body: dict[str, Any] = Field(alias="schema")


class ResponseFormat(Strict):
    """The form of a response, as OpenAI has it."""

    within = "response_format"
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _with_schema(self) -> Self:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError('json_schema: the type "json_schema" needs {"schema": ...}')
        if self.type != "json_schema" and self.json_schema is not None:
            raise ValueError(f'json_schema: belongs to the type "json_schema", got {self.type!r}')
        return self

    @property
    def form(self) -> Form | None:
        if self.type == "json_object":
            return ANY_OBJECT
        return None if self.json_schema is None else Form("json", json.dumps(self.json_schema.body))


class StructuredOutputs(Strict):
    """The form of a response, as vLLM has it: exactly one of the fields."""

    within = "structured_outputs"
    body: dict[str, Any] | Text | None = Field(None, alias="json")
    regex: Text | None = None
    choice: list[Text] | None = Field(None, min_length=1)
    json_object: bool | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        given = (self.body, self.regex, self.choice, self.json_object or None)
        if sum(value is not None for value in given) != 1:
            raise ValueError("expected one of json, regex, choice and json_object")
        return self

    @property
    def form(self) -> Form:
        if self.body is not None:
            return Form("json", self.body if isinstance(self.body, str) else json.dumps(self.body))
        if self.json_object:
            return ANY_OBJECT
        return Form("regex", choice_pattern(self.choice) if self.choice else self.regex or "")


class Common(Strict):
    """The parameters of every endpoint."""

    model: str
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    """-1 and 0: no limit."""
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: list[Text] | None = None
    stop_token_ids: list[Annotated[int, Field(ge=0)]] | None = Field(None, max_length=MOST_STOPS)
    ignore_eos: bool | None = None
    """Decode max_tokens tokens, and do not stop at the model's end tokens."""
    stream: bool | None = None
    stream_drafts: bool | None = None
    """Stream the active block after every pass too, see `draft_of`."""
    policy: str | None = None
    """The unmasking rule of a diffusion model, see `parse_policy`. It is read when the model is known."""
    structured_outputs: StructuredOutputs | None = None

    @field_validator(
        "stop",
        mode="before",
        json_schema_input_type=Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None,
    )
    @classmethod
    def _strings(cls, value: Any) -> Any:
        if value is None:
            return None
        strings = [value] if isinstance(value, str) else value
        fits = isinstance(strings, list) and len(strings) <= MOST_STOPS
        if fits and all(isinstance(s, str) and s for s in strings):
            return strings
        raise ValueError(f"expected a string or up to {MOST_STOPS}, none of them empty")


class Options(Common):
    """The parameters of chat completions and of completions."""

    asked: ClassVar[str]
    """The parameter that holds the prompt or the messages."""
    top_name: ClassVar[str]
    format_name: ClassVar[str] = "response_format"
    max_tokens: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1, le=MOST_PROMPTS)
    best_of: int | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _together(self) -> Self:
        usage = self.stream_options is not None and self.stream_options.include_usage
        for name, asked in (("stream_options", usage), ("stream_drafts", self.stream_drafts)):
            if asked and not self.stream:
                raise ApiError(400, f"{name}: belongs to stream=true", param=name)
        if self.best_of not in (None, self.n or 1):
            message = f"best_of: only n, here {self.n or 1}, is supported, got {self.best_of}"
            raise ApiError(400, message, param="best_of", code="unsupported_parameter")
        if self.structured_outputs and self.response_format and self.response_format.form:
            message = f"structured_outputs: not beside a {self.format_name}"
            raise ApiError(400, message, param="structured_outputs")
        return self

    @property
    def form(self) -> Form | None:
        """The form that the response is to have."""
        given = self.structured_outputs or self.response_format
        return None if given is None else given.form

    @property
    def form_name(self) -> str:
        """The parameter by which the form is given."""
        return "structured_outputs" if self.structured_outputs is not None else self.format_name

    @property
    def length_name(self) -> str:
        """The parameter by which the response's length is given."""
        return "max_tokens"

    @property
    def scored(self) -> bool:
        """Whether log-probabilities are requested."""
        logprobs = getattr(self, "logprobs", None)  # a completion's 0 asks for them
        return logprobs is not None and logprobs is not False

    @property
    def top(self) -> int:
        """How many of the most probable tokens are requested, by the parameter `top_name`."""
        return getattr(self, self.top_name) or 0


class CompletionRequest(Options):
    """POST /v1/completions. `prompt`: a text or its token ids, or a list of either. `suffix`: the text that
    follows the response, which is decoded between the two."""

    neutral, asked, top_name = COMPLETION, "prompt", "logprobs"
    prompt: list[Text] | list[list[int]]
    suffix: Text | None = None
    max_tokens: int | None = Field(None, ge=0)
    echo: bool | None = None
    """The prompt comes in front of the response, with `logprobs` of its tokens too. `max_tokens` may be 0."""
    logprobs: int | None = Field(None, ge=0, le=MOST_TOP)
    """0: the log-probability of each token. Above 0: also those of the most probable tokens of its place."""

    @model_validator(mode="after")
    def _some(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise ApiError(400, "max_tokens: expected at least 1, or 0 with echo=true", param="max_tokens")
        return self

    @field_validator("logprobs", mode="before")
    @classmethod
    def _as_in_chats(cls, value: Any) -> Any:
        return None if value is False else value

    @field_validator(
        "prompt",
        mode="before",
        json_schema_input_type=str | Ids | Annotated[list[str], Several] | Annotated[list[Ids], Several],
    )
    @classmethod
    def _several(cls, value: Any) -> Any:
        def every(kind: type, values: Any) -> bool:
            return isinstance(values, list) and bool(values) and all(type(each) is kind for each in values)

        if isinstance(value, str) or every(int, value):
            return [value]
        if isinstance(value, list) and len(value) > MOST_PROMPTS:
            raise ValueError(f"expected at most {MOST_PROMPTS} prompts, got {len(value)}")
        if every(str, value) or (every(list, value) and all(every(int, each) for each in value)):
            return value
        raise ValueError("expected a string, a list of token ids, or a list of either, none of them empty")


class Function(Strict):
    within = "tools"
    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    """The schema of its arguments; null: it has none."""
    strict: bool | None = None
    """The arguments of a call have the schema's form in any case."""

    @field_validator("parameters")
    @classmethod
    def _of_an_object(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None and value.get("type", "object") != "object":
            raise ValueError(f"expected the schema of an object, got the type {value['type']!r:.80}")
        return value


class Tool(Strict):
    within = "tools"
    type: Literal["function"]
    function: Function


class FunctionName(Strict):
    within = "tool_choice"
    name: str


class ToolName(Strict):
    within = "tool_choice"
    type: Literal["function"]
    function: FunctionName


class FunctionCall(Strict):
    within = "messages"
    name: str
    arguments: Text


class ToolCall(Strict):
    within = "messages"
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None
    """Its place among the message's calls, in messages that a client has put together from a stream."""


class TextPart(BaseModel):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class ChatMessage(Strict):
    neutral, within = MESSAGE, "messages"
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | None = None
    """Null only in an assistant's empty answer."""
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    @field_validator("content", mode="before", json_schema_input_type=str | list[TextPart] | None)
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
            refusal = refused({name: part[name] for name in part if name != "text"}, PART)
            if refusal is not None:
                message = f"messages.content.{refusal[1]}"
                raise ApiError(400, message, param="messages", code="unsupported_parameter")
        return "".join(part["text"] for part in value)

    @model_validator(mode="after")
    def _check_content(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"content: expected the text of the {self.role}, got null")
        for name, value, role in (
            ("tool_calls", self.tool_calls, "assistant"),
            ("tool_call_id", self.tool_call_id, "tool"),
        ):
            if value and self.role != role:
                raise ValueError(f"{name}: belongs to the role {role}, not to {self.role}")
        return self


class ChatRequest(Options):
    """POST /v1/chat/completions."""

    neutral, asked, top_name = CHAT, "messages", "top_logprobs"
    suffix: ClassVar[None] = None
    # Only one error is reported, so validation stops at the first: there may be one in every message.
    messages: Annotated[list[ChatMessage], FailFast()] = Field(min_length=1, max_length=MOST_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_TOP)
    """As `CompletionRequest.logprobs`, beside `logprobs`."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables of the model's chat template by name, such as enable_thinking."""
    tools: list[Tool] | None = Field(None, max_length=MOST_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | ToolName | None = None
    """With tools null is "auto"."""
    parallel_tool_calls: bool | None = None
    """False: at most one call."""

    @field_validator("chat_template_kwargs")
    @classmethod
    def _variables(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        taken = next((name for name in value or {} if name in TEMPLATE_NAMES), None)
        if taken is not None:
            raise ValueError(
                f"expected variables of the chat template, but {taken} is none of these: the server sets it"
            )
        return value

    @model_validator(mode="after")
    def _calls(self) -> Self:
        names, choice = [tool.function.name for tool in self.tools or ()], self.tool_choice
        if len({*names}) < len(names):
            name, message = "tools", "expected functions of different names"
        elif isinstance(choice, ToolName) and choice.function.name not in names:
            name, message = "tool_choice", f"expected one of the tools {names}, got {choice.function.name!r}"
        elif choice == "required" and not names:
            name, message = "tool_choice", "expected some tools beside it"
        elif self.calls and super().form:
            name, message = super().form_name, "not beside a tool that is to be called"
        else:
            return self
        raise ApiError(400, f"{name}: {message}", param=name)

    @property
    def may_call(self) -> bool:
        """Whether the model decides if it calls functions."""
        return bool(self.tools) and self.tool_choice in (None, "auto")

    @property
    def calls(self) -> dict[str, dict[str, Any]]:
        """The functions of which the response is to call one: the schemas of their arguments."""
        choice = self.tool_choice
        if isinstance(choice, ToolName):
            return {choice.function.name: self.schemas[choice.function.name]}
        return self.schemas if choice == "required" else {}

    @property
    def schemas(self) -> dict[str, dict[str, Any]]:
        """The schemas of each function's arguments."""
        functions = [tool.function for tool in self.tools or ()]
        return {each.name: each.parameters or NO_ARGUMENTS for each in functions}

    @property
    def form(self) -> Form | None:
        """The form that the response is to have."""
        form = super().form
        if form is not None and self.may_call:
            return form._replace(calls=json.dumps([self.parallel_tool_calls is False, self.schemas]))
        return Form("calls", json.dumps(self.calls)) if self.calls else form

    @property
    def form_name(self) -> str:
        """The parameter by which the form is given."""
        return "tools" if self.calls else super().form_name

    @model_validator(mode="after")
    def _scored(self) -> Self:
        if self.top and not self.logprobs:
            raise ApiError(400, "top_logprobs: belongs to logprobs=true", param="top_logprobs")
        return self

    @property
    def length_name(self) -> str:
        """The parameter by which the response's length is given."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @model_validator(mode="after")
    def _one_name(self) -> Self:
        newer = self.max_completion_tokens
        if newer is not None:
            if self.max_tokens not in (None, newer):
                message = (
                    f"max_tokens: not beside another max_completion_tokens, got {self.max_tokens} and {newer}"
                )
                raise ApiError(400, message, param="max_tokens")
            self.max_tokens = newer
        return self
