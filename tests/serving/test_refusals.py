"""Requests that are wrong, odd, or another server's clients': each is answered, or refused by name."""

from __future__ import annotations

import asyncio
import json
import threading
from types import SimpleNamespace
from typing import Any

import openai
import pytest
import torch
from asking import (
    BLOCK,
    MODEL,
    PAGE,
    PROMPT,
    PROMPTS,
    VOCABULARY,
    bad_request,
    chat,
    decoded,
    exchange,
    joined,
    raw,
)
from dparallel import registry
from dparallel.serving import unsupported
from dparallel.serving.app import Gate, make_app
from dparallel.serving.errors import ApiError
from dparallel.serving.service import Service
from dparallel.serving.settings import Settings
from openai import OpenAI
from prometheus_client import Counter
from server_here import Here, serving

import dparallel_ext as dx
from benchmarks.serving import KEY

pytest_plugins = ["servers"]


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
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages", "role"),
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
            {"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]},
            "messages",
            "messages.tool_calls: only [] is supported",
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
        ({"logprobs": True, "top_logprobs": 2}, "top_logprobs", "only 0 is supported"),
        ({"logprobs": 1}, "logprobs", "valid boolean"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "only [] is supported"),
        ({"top_p": -0.1}, "top_p", "greater than or equal to 0"),
        ({"top_p": 1.1}, "top_p", "less than or equal to 1"),
        ({"frequency_penalty": 0.1}, "frequency_penalty", "only 0"),
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
        ({"logprobs": 2}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": 1, "temperature": 0.5}, "logprobs"),
        ({"echo": True}, "echo"),
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
        "top_logprobs": False,
        "echo": 0,
        "min_tokens": 1,
        "tools": [{}],
        "ignored": 0,
    }.items():
        assert (unsupported.refused({name: value}, unsupported.CHAT) or "")[0] == name
    # That which says most about what the client is after comes first.
    found = unsupported.refused({"logprobs": 1, "echo": True}, unsupported.COMPLETION)
    assert found is not None
    assert found[0] == "echo"


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
    ):
        messages = [
            {"role": "user", "content": PROMPTS[1]},
            said,
            {"role": "user", "content": PROMPT, "type": "text"},
        ]
        asked = client.chat.completions.create(model=MODEL, messages=messages)
        assert asked.choices[0].message.content == expected


def test_bodies_by_content_type(served: Here, student: tuple[Any, Any]) -> None:
    """JSON, whatever it is called; but from a web page, which may call it so, only where the page may ask."""
    said = decoded(student, PROMPT)[0]
    body = {"model": MODEL, "prompt": PROMPT}
    for kind in (
        None,
        "text/plain",
        "text/plain;charset=UTF-8",
        "application/x-www-form-urlencoded",
        "application/json; charset=utf-8",
        "Application/JSON",
        "application/vnd.api+json",
    ):
        head = {} if kind is None else {"Content-Type": kind}
        status, _, answer = exchange(served, "POST", "/v1/completions", body, **head)
        assert status == 200, (kind, answer)
        assert json.loads(answer)["choices"][0]["text"] == said
        status, _, answer = exchange(served, "POST", "/v1/completions", body, **head, Origin=PAGE)
        if kind is not None and "json" in kind.lower():
            assert status == 200
        else:
            assert status == 415
            assert "content-type: expected application/json from a web page" in str(answer)


def events_of(answer: bytes) -> list[dict[str, Any]]:
    """The chunks of a stream, as benchmarks read it: by blank lines, each a data line of JSON."""
    *chunks, done, rest = answer.decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert all(chunk.startswith("data: ") for chunk in chunks)
    return [json.loads(chunk.removeprefix("data: ")) for chunk in chunks]


def test_lines_of_a_stream_however_they_are_split(student: tuple[Any, Any]) -> None:
    """httpx's `iter_lines` ends a line where `str.splitlines` does: at U+0085, U+2028 and U+2029 too."""
    name = "a\u0085b\u2028c\u2029d"  # it is in every chunk
    with serving(student, name=name) as here:
        body = {"model": name, "prompt": PROMPT, "max_tokens": 16, "stream": True}
        status, _, answer = exchange(here, "POST", "/v1/completions", body)
    *chunks, done = [line for line in answer.decode().splitlines() if line]
    assert (status, done) == (200, "data: [DONE]")
    assert {json.loads(chunk.removeprefix("data: "))["model"] for chunk in chunks} == {name}


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_requests_of_vllm_bench_serve(served: Here, student: tuple[Any, Any], ignore_eos: bool) -> None:
    """Its bodies, and how it reads the answers: the name of the model, text as it comes, usage at the end."""
    (model,) = json.loads(exchange(served, "GET", "/v1/models")[2])["data"]
    assert (model["id"], model["root"], model["max_model_len"]) == (MODEL, MODEL, 256)
    common = {"model": model["id"], "stream": True, "stream_options": {"include_usage": True}}
    common |= {"temperature": 0.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0}
    common |= {"ignore_eos": True} if ignore_eos else {}
    content = [{"type": "text", "text": PROMPT}]
    bodies = {
        "/v1/completions": {
            "prompt": PROMPT,
            "repetition_penalty": 1.0,
            "best_of": 1,
            "max_tokens": 50,
            "logprobs": None,
        },
        "/v1/chat/completions": {
            "messages": [{"role": "user", "content": content}],
            "max_completion_tokens": 50,
        },
    }
    said, count, _ = decoded(student, PROMPT, gen_length=50)
    for path, body in bodies.items():
        status, _, answer = exchange(served, "POST", path, {**common, **body})
        assert status == 200
        *chunks, last = events_of(answer)
        pieces = [chunk["choices"][0] for chunk in chunks]
        texts = [one["delta"].get("content") if "delta" in one else one.get("text") for one in pieces]
        assert "".join(one or "" for one in texts) == said
        assert not last["choices"]
        assert last["usage"]["completion_tokens"] == (50 if ignore_eos else count)
        assert last["usage"]["prompt_tokens"] == len(PROMPT.split())


def test_requests_of_lm_eval(served: Here, student: tuple[Any, Any]) -> None:
    """local-completions and local-chat-completions: text or ids, one or a batch; scores are refused."""
    ids = [student[1].encode(one).ids for one in PROMPTS[:2]]
    texts = [decoded(student, one, gen_length=40)[0].partition("####")[0] for one in PROMPTS[:2]]
    settings = {"model": MODEL, "max_tokens": 40, "temperature": 0, "seed": 1234}
    settings |= {"stop": ["####", "<|endoftext|>"]}
    for prompt, expected in (
        (PROMPTS[0], texts[:1]),
        (PROMPTS[:2], texts),
        (ids[0], texts[:1]),
        (ids, texts),
    ):
        status, _, answer = exchange(served, "POST", "/v1/completions", {"prompt": prompt, **settings})
        assert status == 200
        choices = sorted(json.loads(answer)["choices"], key=lambda one: one["index"])
        assert [one["text"] for one in choices] == expected
    message = {"role": "user", "content": PROMPT, "type": "text"}
    status, _, answer = exchange(served, "POST", "/v1/chat/completions", {"messages": [message], **settings})
    assert status == 200
    assert json.loads(answer)["choices"][0]["message"]["content"] == texts[0]
    scores = {"model": MODEL, "prompt": ids, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234}
    status, _, answer = exchange(served, "POST", "/v1/completions", {**scores, "echo": True})
    error = json.loads(answer)["error"]
    assert (status, error["param"]) == (400, "echo")
    assert "lm_eval --model dparallel" in error["message"]


def test_requests_that_are_no_requests(served: Here) -> None:
    path, fine = "/v1/completions", {"model": MODEL, "prompt": "sam"}
    for body, said in (
        (b"{", "body: expected JSON (Expecting property name enclosed in double quotes at character 1)"),
        (b"[1]", "body: "),
        (b"[" * 100000, "body: expected JSON in UTF-8 that is not nested deeply"),
        (b"\xff", "body: expected JSON in UTF-8 that is not nested deeply"),
        (b'{"model": "x"', "JSON"),
        (b"{}", "model: Field required"),
        (json.dumps({**fine, "prompt": "\ud800"}).encode(), "prompt: expected text, got half of a surrogate"),
        (json.dumps({**fine, "prompt": ["a", "\ud800"]}).encode(), "prompt.1: expected text, got half of"),
        (json.dumps({**fine, "stop": ["a", "\ud800"]}).encode(), "stop.1: expected text, got half of"),
        (json.dumps({**fine, "structured_outputs": {"json": 5}}).encode(), "structured_outputs.json: Input"),
        (
            json.dumps({**fine, "structured_outputs": {"json": "\ud800"}}).encode(),
            "structured_outputs.json: ",
        ),
        (json.dumps({**fine, "\ud800": 1}).encode(), "unicode"),
        (json.dumps({**fine, "temperature": float("nan")}).encode(), "finite"),
    ):
        status, answer = raw(served, path, body)
        assert (status, answer["error"]["type"]) == (400, "invalid_request_error"), body[:80]
        assert said in answer["error"]["message"], body[:80]
    assert raw(served, path, json.dumps({**fine, "model": "\ud800"}).encode())[0] == 404
    status, answer = raw(served, path)
    assert (status, answer["error"]["message"]) == (405, f"method: {path} expects POST, got GET")
    status, answer = raw(served, "/v1/embeddings", b"{}")
    assert status == 404
    assert "path: expected one of /v1/chat/completions, " in answer["error"]["message"]
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert not served.faults()


def test_bodies_that_are_compressed(served: Here) -> None:
    """They are refused by name; `identity` says that they are not."""
    body = {"model": MODEL, "prompt": "sam", "max_tokens": 1}
    for coding in ("gzip", "Deflate", "identity, br"):
        status, _, answer = exchange(served, "POST", "/v1/completions", body, **{"Content-Encoding": coding})
        error = json.loads(answer)["error"]
        assert (status, error["param"]) == (415, "content-encoding")
        assert error["message"].endswith(f"got {coding!r}")
    for coding in ("", "identity"):
        assert exchange(served, "POST", "/v1/completions", body, **{"Content-Encoding": coding})[0] == 200


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


def test_paths_and_methods(served: Here) -> None:
    for path in ("/v1/models", f"/v1/models/{MODEL}", "/health", "/metrics", "/version"):
        whole = exchange(served, "GET", path)
        for other in (path, path + "/"):
            status, headers, body = exchange(served, "HEAD", other)
            assert (status, body) == (200, b"")
            assert headers["Content-Type"] == whole[1]["Content-Type"]
        status, headers, _ = exchange(served, "OPTIONS", path, key=None)
        assert (status, headers["Allow"]) == (204, "GET, HEAD, OPTIONS")
    assert json.loads(exchange(served, "GET", "/version")[2]) == {"version": dx.__version__}
    body = {"model": MODEL, "prompt": "sam", "max_tokens": 2}
    assert exchange(served, "POST", "/v1/completions/", body)[0] == 200
    assert exchange(served, "OPTIONS", "/v1/completions")[1]["Allow"] == "POST, OPTIONS"
    status, headers, _ = exchange(served, "PUT", "/v1/completions", body)
    assert (status, headers["Allow"]) == (405, "POST")
    status, headers, _ = exchange(served, "PUT", "/health")
    assert (status, headers["Allow"]) == (405, "GET, HEAD")
    assert exchange(served, "OPTIONS", "/nowhere")[0] == 404
    # A target may be a whole URL, as a proxy gets it.
    for path in ("/v1/completions", "/v1/completions/"):
        assert exchange(served, "POST", f"http://Some.Host:80{path}", body)[0] == 200
    assert exchange(served, "GET", "HTTPS://host/health?a=http://b")[0] == 200
    assert exchange(served, "GET", "http://host")[1]["Content-Type"] == "text/html; charset=utf-8"
    assert exchange(served, "GET", "http://host/nowhere")[0] == 404
    assert exchange(served, "POST", "ftp://host/v1/completions", body)[0] == 404


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


def test_a_body_must_arrive_in_time() -> None:
    """Straight at the gate, whose limit here is short."""

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["more_body"]:
            pass

    async def run() -> None:
        loop = asyncio.get_running_loop()
        settings = Settings(body_seconds=0.05)
        service: Any = SimpleNamespace(settings=settings, page={}, aborted=loop.create_future())
        service.metrics = SimpleNamespace(http=Counter("x", "x", ["path", "status"], registry=None))
        gate = Gate(inner, service)
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
        begun = [{"type": "http.request", "body": b"{", "more_body": True}]

        async def receive() -> Any:
            return begun.pop() if begun else await asyncio.sleep(60)

        async def send(message: Any) -> None:
            raise AssertionError(message)

        with pytest.raises(ApiError) as late:
            await gate(scope, receive, send)
        assert late.value.status_code == 408
        service.aborted.set_result(None)
        with pytest.raises(ApiError) as stopped:
            await gate(scope, receive, send)
        assert stopped.value.status_code == 503

    asyncio.run(run())


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
        service = Service(Settings())
        service.add("x", engine, tokenizer, registry.directory_of(MODEL))
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
