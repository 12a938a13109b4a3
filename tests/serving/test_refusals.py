"""Requests that are wrong or odd: each is answered, or refused by name."""

from __future__ import annotations

import asyncio
import copy
import json
import threading
from typing import Any

import openai
import pytest
import torch
from asking import (
    BLOCK,
    MODEL,
    PROMPT,
    PROMPTS,
    VOCABULARY,
    bad_request,
    chat,
    decoded,
    joined,
    raw,
)
from dparallel import registry
from dparallel.serving import unsupported
from dparallel.serving.app import make_app
from dparallel.serving.service import ModelService, Service
from dparallel.serving.settings import ServerSettings
from openai import OpenAI
from server_here import Here, serving

import dparallel_ext as dx
from benchmarks.serving import KEY

pytest_plugins = ["servers"]

TOOL = {"type": "function", "function": {"name": "f"}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("settings", "param", "said"),
    [
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": True}, "max_tokens", "valid integer"),
        ({"max_tokens": 1.5}, "max_tokens", "valid integer"),
        ({"max_tokens": 1000}, "max_tokens", "this model's maximum context length is 256 tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "got 5 and 6"),
        ({"max_completion_tokens": 1000}, "max_completion_tokens", "maximum context length is 256 tokens"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages", "one from the user"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages", "role"),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "1"}]}, "messages", "role tool"),
        ({"messages": [{"role": "tool", "tool_call_id": "1"}]}, "messages", "text of the tool"),
        ({"tools": [{}]}, "tools", "Field required"),
        ({"tools": [TOOL, TOOL], "tool_choice": "none"}, "tools", "different names"),
        (
            {"tools": [{**TOOL, "function": {"name": "f", "parameters": {"type": "array"}}}]},
            "tools",
            "schema of an object, got the type 'array'",
        ),
        ({"tools": [TOOL]}, "tool_choice", "'builtin:student' has none"),
        ({"tools": [TOOL], "tool_choice": "auto"}, "tool_choice", "'builtin:student' has none"),
        ({"tool_choice": "required"}, "tool_choice", "expected some tools"),
        ({"tools": [TOOL], "tool_choice": {**TOOL, "function": {"name": "g"}}}, "tool_choice", "got 'g'"),
        (
            {"tools": [TOOL], "tool_choice": "required", "response_format": {"type": "json_object"}},
            "response_format",
            "not beside a tool",
        ),
        ({"messages": [{"role": "user", "content": "a"}] * 4097}, "messages", "at most 4096 items"),
        ({"messages": [{"role": "user", "content": None}]}, "messages", "content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "parts"),
        (
            {"messages": [{"role": "user", "content": "a " * 300}]},
            "messages",
            "with the response, got 300 + 1",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "detail": "high"}]}]},
            "messages",
            "messages.content.detail: is not supported",
        ),
        (
            {"messages": [{"role": "user", "content": "a", "tool_calls": [CALL]}]},
            "messages",
            "tool_calls: belongs to the role assistant, not to user",
        ),
        ({"messages": [{"role": "user", "content": "a", "audio": {}}]}, "messages", "messages.audio: is not"),
        ({"temperature": -0.1}, "temperature", "greater"),
        ({"temperature": 2.1}, "temperature", "less"),
        ({"temperature": "1"}, "temperature", "valid number"),
        ({"seed": 2**63}, "seed", "less than"),
        ({"n": 0}, "n", "greater"),
        ({"n": 65}, "n", "at most 64 responses, got 65"),
        ({"stop": ["a"] * 33}, "stop", "up to 32"),
        ({"stop": ""}, "stop", "none of them empty"),
        ({"stop": [1]}, "stop", "a string or up to 32"),
        ({"stream": "yes"}, "stream", "valid boolean"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream=true"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options", "stream_options.x: is not"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"top_logprobs": 1}, "top_logprobs", "belongs to logprobs=true"),
        ({"logprobs": 1}, "logprobs", "valid boolean"),
        ({"top_p": -0.1}, "top_p", "greater than or equal to 0"),
        ({"top_p": 1.1}, "top_p", "less than or equal to 1"),
        ({"frequency_penalty": 0.1}, "frequency_penalty", "belongs to an autoregressive model"),
        ({"presence_penalty": 2.1}, "presence_penalty", "less than or equal to 2"),
        ({"extra_body": {"repetition_penalty": 1.1}}, "repetition_penalty", "autoregressive model"),
        ({"extra_body": {"repetition_penalty": 0}}, "repetition_penalty", "greater than or equal to 0.01"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "only {} is supported"),
        ({"extra_body": {"min_p": 0.1}}, "min_p", "only 0 is supported"),
        ({"extra_body": {"top_k": -2}}, "top_k", "greater"),
        ({"extra_body": {"top_k": 1.5}}, "top_k", "valid integer"),
        ({"extra_body": {"guided_regex": "a"}}, "guided_regex", "is not supported"),
        ({"extra_body": {"stop_token_ids": [VOCABULARY]}}, "stop_token_ids", "token ids below"),
        ({"extra_body": {"stop_token_ids": [VOCABULARY - 1]}}, "stop_token_ids", "got the mask token"),
        ({"extra_body": {"stop_token_ids": [-1]}}, "stop_token_ids", "greater"),
        ({"extra_body": {"stop_token_ids": [1] * 33}}, "stop_token_ids", "at most 32"),
        ({"extra_body": {"ignore_eos": 1}}, "ignore_eos", "valid boolean"),
        ({"extra_body": {"stream_drafts": True}}, "stream_drafts", "stream=true"),
        ({"extra_body": {"policy": "entropy"}}, "policy", "expected entropy:TAU, got 'entropy'"),
        ({"extra_body": {"policy": "unheard_of"}}, "policy", "expected 'one', steps:N"),
        ({"extra_body": {"policy": "learned:/etc/passwd"}}, "policy", "expected a file that ships"),
        ({"extra_body": {"policy": "quota:0.5"}}, "policy", "whole number"),
        ({"extra_body": {"policy": "steps:3"}}, "policy", "multiple of the 8 blocks"),
    ],
)
def test_bad_requests_are_named(client: OpenAI, settings: dict[str, Any], param: str, said: str) -> None:
    with bad_request(param, said):
        chat(client, **settings)


@pytest.mark.parametrize(
    ("settings", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [VOCABULARY]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [1] * 256}, "prompt"),
        ({"prompt": ["a"] * 65}, "prompt"),
        ({"prompt": ["a"] * 33, "n": 2}, "n"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"echo": True, "logprobs": 0}, "echo"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"suffix": ["x"]}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"extra_body": {"add_special_tokens": False}}, "add_special_tokens"),
        ({"extra_body": {"prompt_logprobs": 0}}, "prompt_logprobs"),
    ],
)
def test_bad_completions_are_named(client: OpenAI, settings: dict[str, Any], param: str) -> None:
    with bad_request(param):
        client.completions.create(**{"model": MODEL, "prompt": PROMPT, **settings})


@pytest.mark.parametrize("which", [0, -1])
def test_neutral_values_are_accepted(client: OpenAI, which: int) -> None:
    harmless = {**dict.fromkeys(unsupported.HARMLESS, "x"), "unheard_of": None}

    def one_of_each(neutral: unsupported.Neutral) -> dict[str, Any]:
        return {name: values[which] for name, values in neutral.items()}

    parts = [{"type": "text", "text": PROMPT, **one_of_each(unsupported.PART), **harmless}]
    messages = [{"role": "user", "content": parts, **one_of_each(unsupported.MESSAGE), **harmless}]
    asked = {**one_of_each(unsupported.CHAT), **harmless, "messages": messages}
    plain = chat(client, max_tokens=8, max_completion_tokens=8).choices[0].message.content
    assert chat(client, max_tokens=8, extra_body=asked).choices[0].message.content == plain
    assert chat(client, max_tokens=8, stream_options={"include_usage": False}).choices[0]
    options = {"include_usage": True, **one_of_each(unsupported.STREAM_OPTIONS)}
    assert joined(chat(client, max_tokens=8, stream=True, stream_options=options))[0] == {0: plain}
    asked = {**one_of_each(unsupported.COMPLETION), **harmless, "best_of": 2}
    answer = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=8, n=2, extra_body=asked)
    assert [choice.text for choice in answer.choices] == [plain, plain]


def test_what_is_not_neutral_is_named() -> None:
    for name in unsupported.CHAT:
        found = unsupported.refused({"user": "me", name: "something else"}, unsupported.CHAT)
        assert found is not None
        assert found[0] == name
        assert found[1].startswith(f"{name}: only ")
    for name, value in {
        "stop_regex": "a",
        "echo": 0,
        "min_tokens": 1,
        "functions": [{}],
        "ignored": 0,
    }.items():
        assert (unsupported.refused({name: value}, unsupported.CHAT) or "")[0] == name
    # That which says most about what the client is after comes first.
    found = unsupported.refused({"min_tokens": 1, "prompt_logprobs": 1}, unsupported.COMPLETION)
    assert found is not None
    assert found[0] == "prompt_logprobs"


@pytest.mark.parametrize("length", [13, 40])
def test_ignore_eos(client: OpenAI, student: tuple[Any, Any], length: int) -> None:
    """max_tokens are decoded, as benchmarks expect."""
    model, tokenizer = student
    out = dx.decode(
        model,
        torch.tensor(tokenizer.encode(PROMPT).ids),
        gen_length=length,
        block_length=BLOCK,
        cache="dual",
        threshold=0.5,
    )
    answer = chat(client, max_tokens=length, extra_body={"ignore_eos": True})
    assert answer.choices[0].message.content == tokenizer.decode(out.responses[0].tolist())
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.completion_tokens, answer.usage.forward_passes) == (length, int(out.nfe[0]))


def test_stop_token_ids(client: OpenAI, student: tuple[Any, Any]) -> None:
    """They end a response as the model's own end tokens do, with `ignore_eos` too."""
    whole = decoded(student, PROMPT)[0].split()
    at = len(whole) // 2
    stop = student[1].token_to_id(whole[at])
    expected = " ".join(whole[: whole.index(whole[at])])
    for ignore in (False, True):
        answer = chat(client, extra_body={"stop_token_ids": [stop], "ignore_eos": ignore})
        assert answer.choices[0].message.content == expected
        assert answer.choices[0].finish_reason == "stop"


def test_many_stop_strings(client: OpenAI, student: tuple[Any, Any]) -> None:
    whole = decoded(student, PROMPT)[0]
    stop = [*(f"no such text {i}" for i in range(31)), whole[9:14]]
    assert chat(client, stop=stop).choices[0].message.content == whole[: whole.find(whole[9:14])]


def test_a_conversation_as_clients_send_it_back(client: OpenAI, student: tuple[Any, Any]) -> None:
    answer = chat(client, PROMPTS[1], max_tokens=8).choices[0].message
    expected = decoded(student, PROMPT)[0]
    empty = {"content": None, "refusal": None, "tool_calls": [], "function_call": None, "annotations": []}
    parts = [{"type": "text", "text": "so "}, {"type": "text", "text": "it is", "annotations": []}]
    for said in (
        answer.model_dump(),
        answer.model_dump(exclude_none=True),
        {"role": "assistant", **empty, "audio": None, "reasoning_content": ""},
        {"role": "assistant"},
        {"role": "assistant", "content": parts},
        {"role": "assistant", "content": []},
        {"role": "assistant", "content": "{}", "parsed": {"a": 1}},
    ):
        messages = [
            {"role": "user", "content": PROMPTS[1]},
            said,
            {"role": "user", "content": PROMPT, "type": "text"},
        ]
        asked = client.chat.completions.create(model=MODEL, messages=messages)
        assert asked.choices[0].message.content == expected


def test_numbers_of_thousands_of_digits(served: Here) -> None:
    """Python writes none of more than 4300, and a product of two has more."""
    fine, digits = {"model": MODEL, "prompt": ["sam", "joe"], "max_tokens": 1}, 10**4300 - 1
    for name in ("n", "best_of", "max_tokens", "top_k", "seed", "temperature", "top_p", "logprobs"):
        for number in (digits, -digits):
            status, answer = raw(served, "/v1/completions", json.dumps({**fine, name: number}).encode())
            assert (status, answer["error"]["param"]) == (400, name)
    assert not served.faults()


def test_as_many_responses_as_the_engine_holds(student: tuple[Any, Any]) -> None:
    """Lanes and places to wait: so many are answered, and more are not told to come again, since that would
    never help."""
    with serving(student, engine={"lanes": 3, "max_waiting": 2}) as here:
        status, answer = here.ask({"model": MODEL, "prompt": PROMPT, "max_tokens": 8, "n": 5})
        assert (status, len(answer["choices"])) == (200, 5)
        for change, param in (({"n": 6}, "n"), ({"prompt": [PROMPT] * 6}, "prompt")):
            status, answer = here.ask({"model": MODEL, "prompt": PROMPT, "max_tokens": 8, **change})
            assert (status, answer["error"]["param"]) == (400, param)
            assert "at most 5 responses, got 6" in answer["error"]["message"]


def test_responses_without_a_place_are_refused_together(student: tuple[Any, Any]) -> None:
    """None of them takes a lane or counts as cancelled, and what runs goes on."""
    hold, settings = threading.Event(), {"model": MODEL, "prompt": PROMPT, "max_tokens": 8}
    with serving(student, engine={"lanes": 2, "max_waiting": 2}) as here:
        running = [here.engine.submit([5, 6], gen_length=8, on_draft=lambda _: hold.wait(20)) for _ in "ab"]
        for change in ({"n": 3}, {"prompt": [PROMPT] * 3}):
            status, answer = here.ask({**settings, **change})
            assert (status, answer["error"]["code"]) == (429, "full")
        hold.set()
        assert [len(handle.result(20).tokens) for handle in running] == [8, 8]
        assert len(here.ask({**settings, "n": 4})[1]["choices"]) == 4
        stats = here.engine.stats
        assert (stats.completed, stats.cancelled, stats.failed) == (6, 0, 0)


def test_models_of_another_name(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="model: expected 'builtin:student', got 'gpt-5'"):
        chat(client, model="gpt-5")


def test_keys(served: Here) -> None:
    for key in ("wrong", KEY[:-1], KEY + "x", "ключ".encode().decode("latin-1")):
        status, answer = raw(served, "/v1/models", Authorization=f"Bearer {key}")
        assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
    for header in ("", KEY, f"Basic {KEY}"):
        for path in ("/v1/models", "/metrics", "/openapi.json", "/nowhere"):
            assert raw(served, path, Authorization=header)[0] == 401
    with (
        OpenAI(base_url=f"{served.url}/v1", api_key="wrong") as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        chat(stranger)
    assert raw(served, "/v1/models", Authorization="bearer another")[0] == 200


def test_an_engine_that_is_closed(student: tuple[Any, Any]) -> None:
    """Straight at the application: 503, in OpenAI's form, and no longer healthy."""
    said: list[Any] = []

    async def ask(application: Any, method: str, path: str, body: bytes) -> tuple[int, Any]:
        begun = [{"type": "http.request", "body": body, "more_body": False}]
        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": method, "path": path, "headers": headers, "query_string": b""}

        async def receive() -> Any:
            return begun.pop() if begun else {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            said.append(message)

        said.clear()
        await application(scope, receive, send)
        return said[0]["status"], json.loads(b"".join(one["body"] for one in said[1:]))

    async def run() -> None:
        model, tokenizer = student
        engine = dx.Engine(model, lanes=1, max_length=64)
        service = Service(ServerSettings())
        ModelService(service, "x", engine, tokenizer, registry.directory_of(MODEL))
        application = make_app(service)
        async with application.router.lifespan_context(application):
            assert await ask(application, "GET", "/health", b"") == (200, {"status": "ok"})
            engine.close()
            assert await ask(application, "GET", "/health", b"") == (503, {"status": "closed"})
            body = json.dumps({"model": "x", "prompt": "sam"}).encode()
            status, answer = await ask(application, "POST", "/v1/completions", body)
            assert (status, answer["error"]["code"]) == (503, "closed")
            assert answer["error"]["type"] == "server_error"

    asyncio.run(run())


def test_responses_end_at_the_models_own_ends(student: tuple[Any, Any]) -> None:
    """As `registry.load` has set them, whatever the files beside the model say."""
    model, tokenizer = copy.deepcopy(student[0]), student[1]
    model.end_at([5, 7])
    with dx.Engine(model, lanes=1, max_length=64) as engine:
        service = Service(ServerSettings())
        ModelService(service, "x", engine, tokenizer, registry.directory_of(MODEL))
        assert service.model("x").config.eos_ids == (5, 7)
        service.close()
