"""The Responses API, as the openai package's client sees it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import openai
import pytest
from asking import EVENTS, MODEL, PROMPT, PROMPTS, bad_request, chat, decoded, exchange, responded, until
from dparallel import registry
from dparallel.serving import unsupported
from dparallel.serving.responses import ResponsesRequest
from openai import AsyncOpenAI, OpenAI
from server_here import Here, all_of, post, serving

from benchmarks.serving import KEY

pytest_plugins = ["servers"]

TOOL = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}}
BEARER = f"Authorization: Bearer {KEY}"
LOGPROBS: Any = ["message.output_text.logprobs"]


def test_a_response_is_a_chat_s_answer(client: OpenAI, student: tuple[Any, Any]) -> None:
    said, tokens, passes = decoded(student, PROMPT)
    found = responded(client, metadata={"a": "b"}, instructions="be brief")
    assert (found.output_text, found.status, found.incomplete_details) == (said, "completed", None)
    (message,) = found.output
    assert (message.type, message.role, message.status) == ("message", "assistant", "completed")
    usage = found.usage
    assert (usage.input_tokens, usage.output_tokens) == (len(PROMPT.split()), tokens)
    assert (usage.total_tokens, usage.forward_passes) == (usage.input_tokens + tokens, passes)
    assert (found.metadata, found.instructions, found.store) == ({"a": "b"}, "be brief", False)
    with client.responses.stream(model=MODEL, input=PROMPT) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        assert "".join(deltas) == stream.get_final_response().output_text == said
    assert len(deltas) > 1


def test_it_is_cut_at_max_output_tokens(client: OpenAI) -> None:
    on = {"extra_body": {"ignore_eos": True}}
    found = responded(client, max_output_tokens=8, **on)
    assert (found.status, found.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert found.max_output_tokens == found.usage.output_tokens == 8
    assert found.output[0].status == "incomplete"
    assert found.output_text == chat(client, max_tokens=8, **on).choices[0].message.content


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0, "top_p": 0.9, "extra_body": {"seed": 7, "top_k": 5}},
        {"extra_body": {"policy": "entropy:0.1", "stop": ["####"]}},
        {"extra_body": {"stop_token_ids": [5], "ignore_eos": True}},
        {"extra_body": {"structured_outputs": {"regex": "sam|finally"}}},
    ],
)
def test_what_a_chat_takes_it_takes(client: OpenAI, settings: dict[str, Any]) -> None:
    answer = chat(client, max_tokens=64, **settings)
    found = responded(client, max_output_tokens=64, **settings)
    assert found.output_text == answer.choices[0].message.content
    assert found.usage.forward_passes == answer.usage.forward_passes
    assert found.status == ("incomplete" if answer.choices[0].finish_reason == "length" else "completed")


def test_log_probabilities(client: OpenAI) -> None:
    for top in ({}, {"top_logprobs": 3}):
        expected = chat(client, logprobs=True, **top).choices[0].logprobs.content
        (part,) = responded(client, include=LOGPROBS, **top).output[0].content
        for one, other in zip(part.logprobs, expected, strict=True):
            assert (one.token, one.bytes) == (other.token, other.bytes)
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert len(one.top_logprobs) == len(other.top_logprobs) == top.get("top_logprobs", 0)
            for this, that in zip(one.top_logprobs, other.top_logprobs, strict=True):
                assert (this.token, this.bytes) == (that.token, that.bytes)
                assert this.logprob == pytest.approx(that.logprob, abs=1e-4)


def test_drafts(client: OpenAI, student: tuple[Any, Any]) -> None:
    """They are events of their own, which a client that does not know them passes over."""
    with client.responses.stream(model=MODEL, input=PROMPT, extra_body={"stream_drafts": True}) as stream:
        events = list(stream)
    drafts: list[Any] = [event for event in events if event.type == "response.draft"]
    assert drafts[-1].draft["pass"] == decoded(student, PROMPT)[2]
    assert stream.get_final_response().output_text == decoded(student, PROMPT)[0]


def test_the_async_client(served: Here, student: tuple[Any, Any]) -> None:
    async def run() -> list[str]:
        async with AsyncOpenAI(base_url=f"{served.url}/v1", api_key="another", timeout=120) as client:
            whole = client.responses.create(model=MODEL, input=PROMPTS[0])
            async with client.responses.stream(model=MODEL, input=PROMPTS[1]) as stream:
                return [(await whole).output_text, (await stream.get_final_response()).output_text]

    assert asyncio.run(run()) == [decoded(student, prompt)[0] for prompt in PROMPTS[:2]]


def test_a_stream_on_the_wire(served: Here) -> None:
    body = {"model": MODEL, "input": PROMPT, "stream": True}
    _, headers, answer = exchange(served, "POST", "/v1/responses", body)
    assert headers["Content-Type"].startswith("text/event-stream")
    *events, rest = answer.decode().split("\n\n")
    assert not rest
    for event in events:
        name, data = event.split("\n")
        assert json.loads(data.removeprefix("data: "))["type"] == name.removeprefix("event: ")


def messages(given: Any, **fields: Any) -> list[dict[str, Any]]:
    chat = ResponsesRequest.model_validate({"model": "m", "input": given, **fields}).chat
    return [message.model_dump(exclude_none=True) for message in chat.messages]


def test_items_become_messages(client: OpenAI, student: tuple[Any, Any]) -> None:
    """Calls are of the assistant's message before them, as the answer of a chat has them."""
    parts = [{"type": "input_text", "text": "so "}, {"type": "input_text", "text": "it is"}]
    said = {"type": "output_text", "text": "yes", "annotations": [], "logprobs": [], "parsed": None}
    call = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}", "status": "completed"}
    result = {"type": "function_call_output", "call_id": "1", "output": parts[:1], "id": None}
    items = [
        {"role": "developer", "content": "d"},
        {"type": "message", "role": "user", "content": parts},
        {"type": "reasoning", "id": "r", "summary": [], "encrypted_content": "x"},
        {"id": "m", "type": "message", "role": "assistant", "status": "completed", "content": [said]},
        {**call, "id": "c", "parsed_arguments": None},
        {**call, "call_id": "2"},
        result,
        {**result, "call_id": "2", "output": "no"},
        {**call, "call_id": "3"},
        {"role": "user", "content": PROMPT},
    ]
    calls = [
        {"id": number, "type": "function", "function": {"name": "f", "arguments": "{}"}} for number in "123"
    ]
    assert messages(items, instructions="i") == [
        {"role": "system", "content": "i"},
        {"role": "developer", "content": "d"},
        {"role": "user", "content": "so it is"},
        {"role": "assistant", "content": "yes", "tool_calls": calls[:2]},
        {"role": "tool", "content": "so ", "tool_call_id": "1"},
        {"role": "tool", "content": "no", "tool_call_id": "2"},
        {"role": "assistant", "tool_calls": calls[2:]},
        {"role": "user", "content": PROMPT},
    ]
    expected = decoded(student, PROMPT)[0]
    assert client.responses.create(model=MODEL, input=items).output_text == expected  # type: ignore[arg-type]
    answer: list[Any] = [*client.responses.create(model=MODEL, input=PROMPTS[1]).output]
    answer.append({"role": "user", "content": PROMPT})
    again = client.responses.create(model=MODEL, input=answer, include=["reasoning.encrypted_content"])
    assert again.output_text == expected


@pytest.mark.parametrize(
    ("settings", "param", "said"),
    [
        ({"input": []}, "input", "at least a message"),
        ({"input": [{"type": "reasoning"}]}, "input", "at least a message"),
        ({"input": 5}, "input", "valid list"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input", "input.0.role: "),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input", "'input_text' or"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input", "input.0: expected the type message, "),
        ({"input": ["x"]}, "input", "expected the type"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input", "call_id: Field required"),
        ({"input": [{"role": "user", "content": "x", "name": "y"}]}, "input", "input.name: is not supported"),
        ({"input": [{"role": "system", "content": "x"}]}, "input", "expected one from the user"),
        ({"input": "a " * 300}, "input", "with the response, got 300 + 1"),
        ({"input": "a" * 300_000}, "input", "at most"),
        ({"max_output_tokens": 0}, "max_output_tokens", "greater than or equal to 1"),
        ({"max_output_tokens": 1000}, "max_output_tokens", "this model's maximum context length is 256"),
        ({"extra_body": {"max_tokens": 5}}, "max_tokens", "is not supported"),
        ({"extra_body": {"messages": []}}, "messages", "is not supported"),
        ({"extra_body": {"response_format": {"type": "text"}}}, "response_format", "is not supported"),
        ({"extra_body": {"n": 2}}, "n", "only 1 is supported"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "is not supported"),
        ({"conversation": "c"}, "conversation", "is not supported"),
        ({"background": True}, "background", "only false is supported"),
        ({"store": True}, "store", "only false is supported"),
        ({"truncation": "auto"}, "truncation", 'only "disabled" is supported'),
        ({"prompt": {"id": "p"}}, "prompt", "is not supported"),
        ({"include": ["file_search_call.results"]}, "include", "'message.output_text.logprobs' or"),
        ({"input": [{"role": "user", "content": "a"}] * 4097}, "input", "at most 4096 items"),
        ({"top_logprobs": 1}, "top_logprobs", "belongs to include="),
        ({"top_logprobs": 21, "include": LOGPROBS}, "top_logprobs", "less than or equal to 20"),
        ({"reasoning": {"effort": "low"}}, "reasoning", 'reasoning.effort: only "none"'),
        ({"text": {"verbosity": "low"}}, "text", 'text.verbosity: only "medium"'),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text", "schema: belongs"),
        ({"text": {"format": {"type": "text", "schema": {}}}}, "text", "schema: belongs"),
        (
            {"text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "foo"}}}},
            "text",
            "schema: ",
        ),
        (
            {
                "text": {"format": {"type": "json_object"}},
                "extra_body": {"structured_outputs": {"regex": "a"}},
            },
            "structured_outputs",
            "not beside a text",
        ),
        (
            {"tools": [{"type": "web_search"}]},
            "tools",
            "is supported, got 'web_search'",
        ),
        ({"tools": [{**TOOL, "defer_loading": True}]}, "tools", "defer_loading: only false"),
        ({"tools": [TOOL, TOOL], "tool_choice": "none"}, "tools", "different names"),
        ({"tools": [TOOL]}, "tool_choice", "'builtin:student' has none"),
        ({"tool_choice": {"type": "function", "name": "g"}, "tools": [TOOL]}, "tool_choice", "got 'g'"),
        ({"tool_choice": {"type": "web_search"}, "tools": [TOOL]}, "tool_choice", "'none', 'auto' or"),
        ({"tools": [TOOL], "tool_choice": "required", "include": LOGPROBS}, "include", "tools may be called"),
        (
            {"tools": [TOOL], "tool_choice": "required", "text": {"format": {"type": "json_object"}}},
            "text",
            "not beside a tool",
        ),
        ({"temperature": 2.1}, "temperature", "less"),
        ({"metadata": {"a": 1}}, "metadata", "valid string"),
        ({"extra_body": {"policy": "entropy"}}, "policy", "expected entropy:TAU"),
        ({"extra_body": {"stop_token_ids": [10**6]}}, "stop_token_ids", "token ids below"),
        ({"extra_body": {"stream_drafts": True}}, "stream_drafts", "stream=true"),
        ({"extra_body": {"chat_template_kwargs": {"tools": []}}}, "chat_template_kwargs", "none of these"),
        ({"extra_body": {"chat_template_kwargs": {"a": 1}}}, "chat_template_kwargs", "no chat template"),
    ],
)
def test_what_cannot_be_had_is_named(client: OpenAI, settings: dict[str, Any], param: str, said: str) -> None:
    with bad_request(param, said):
        client.responses.create(**{"model": MODEL, "input": PROMPT, **settings})


def test_requests_of_codex(served: Here, student: tuple[Any, Any]) -> None:
    """Its fields and items, but for the tools' names: a model of words of one task has no way of calling."""
    call = {"type": "function_call", "name": "exec", "arguments": "{}", "call_id": "1"}
    said = [{"type": "input_text", "text": PROMPT}]
    body = {
        "model": MODEL,
        "instructions": "be brief",
        "input": [
            {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "so"}]},
            {"type": "reasoning", "summary": [], "content": None, "encrypted_content": None},
            call,
            {"type": "function_call_output", "call_id": "1", "output": "done"},
            {"type": "message", "role": "user", "content": said},
        ],
        "tools": [{**TOOL, "strict": False, "description": "runs"}],
        "tool_choice": "none",
        "parallel_tool_calls": False,
        "reasoning": None,
        "store": False,
        "stream": True,
        "include": [],
        "prompt_cache_key": "key",
        "client_metadata": {"a": "b"},
    }
    status, _, answer = exchange(served, "POST", "/v1/responses", body, Accept="text/event-stream")
    last = json.loads(answer.decode().split("\n\n")[-2].split("data: ")[1])
    assert (status, last["type"]) == (200, "response.completed")
    assert last["response"]["output"][0]["content"][0]["text"] == decoded(student, PROMPT)[0]


@pytest.mark.parametrize("which", [0, -1])
def test_neutral_values_are_accepted(client: OpenAI, which: int) -> None:
    def one_of_each(neutral: unsupported.Neutral) -> dict[str, Any]:
        return {name: values[which] for name, values in neutral.items()}

    harmless = {**dict.fromkeys(unsupported.HARMLESS - {"metadata"}, "x"), "unheard_of": None}
    tool = {**TOOL, **one_of_each(unsupported.RESPONSE_TOOL)}
    text = one_of_each(unsupported.RESPONSE_TEXT)
    asked = {
        **one_of_each(unsupported.RESPONSE),
        **harmless,
        "tools": [tool],
        "tool_choice": "none",
        "text": text,
    }
    asked["reasoning"] = one_of_each(unsupported.REASONING)
    plain = responded(client, max_output_tokens=8)
    assert responded(client, max_output_tokens=8, extra_body=asked).output_text == plain.output_text


def test_what_is_echoed_can_be(served: Here) -> None:
    """It is JSON, and of UTF-8 as it is sent; what cannot be is refused, and is no fault."""
    tool = '{"type": "function", "name": "f", "parameters": %s}'
    deep = [tool % ('{"a":' * depth + "1" + "}" * depth) for depth in (300, 950, 956, 961, 5000)]
    for name, value, status in (
        ("metadata", '{"a": "\\ud800"}', {400}),
        ("metadata", '{"\\ud800": "a"}', {400}),
        ("instructions", '"\\ud800"', {400}),
        ("tools", "[" + tool % '{"a": "\\ud800"}' + "]", {400}),
        ("tools", "[" + tool % '{"a": NaN}' + "]", {400}),
        *(("tools", f"[{each}]", {200, 400}) for each in deep),
    ):
        head = f'{{"model": "{MODEL}", "input": "sam", "max_output_tokens": 1, "tool_choice": "none"'
        for stream in ("false", "true"):
            body = f'{head}, "stream": {stream}, "{name}": {value}}}'.encode()
            said = served.exchange(post("/v1/responses", body, BEARER))
            assert int(said.split(b" ", 2)[1]) in status
            if b" 200 " in said[:20] and stream == "true":
                assert b"event: response.incomplete" in said
    assert not served.faults()


def test_a_failure_and_clients_that_leave(odd_model: Path) -> None:
    """A stream that fails says so by its last event, with what was said before; who leaves cancels."""
    model, tokenizer = registry.load(str(odd_model))
    engine = {"lanes": 2, "rule": "quota:1"}
    with (
        serving((model, tokenizer), odd_model, engine) as here,
        OpenAI(base_url=f"{here.url}/v1", api_key="none", max_retries=0, timeout=60) as client,
    ):
        fails: dict[str, Any] = {"model": MODEL, "input": tokenizer.id_to_token(0)}
        with pytest.raises(openai.InternalServerError, match="the model failed on this request"):
            client.responses.create(**fails)
        last = [*client.responses.create(**fails, stream=True)][-1]
        assert (last.type, last.response.status) == ("response.failed", "failed")
        assert last.response.error.code == "server_error"
        assert last.response.error.message == "the model failed on this request"
        EVENTS.validate_python(last.to_dict())
        here.log.lines.clear()
        slow: dict[str, Any] = {"model": MODEL, "input": tokenizer.id_to_token(5), "max_output_tokens": 200}
        stream = client.responses.create(**slow, stream=True)
        while next(iter(stream)).type != "response.output_text.delta":
            pass
        stream.close()
        until(lambda: here.engine.stats.cancelled == 1)
        with here.connect() as wire:
            wire.sendall(post("/v1/responses", json.dumps(slow).encode()))
            until(lambda: here.engine.stats.active == 1)
        until(lambda: here.engine.stats.cancelled == 2)
        waiting = here.connect()
        waiting.sendall(post("/v1/responses", json.dumps({**slow, "stream": True}).encode()))
        said = b""
        while b"output_text.delta" not in said:
            said += waiting.recv(65536)
        here.service.aborted.get_loop().call_soon_threadsafe(here.service.abort)
        last = (said + all_of(waiting)).rpartition(b"event: response.failed")[2]
        waiting.close()
        assert b'"message":"the server is shutting down"' in last
        assert b'"status":"incomplete"' in last
        assert not here.faults()
