"""Requests as HTTP carries them: bodies, lines of a stream, paths, other clients' requests."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest
from asking import (
    MODEL,
    PAGE,
    PROMPT,
    PROMPTS,
    decoded,
    exchange,
    raw,
)
from dparallel.serving.app import Gate
from dparallel.serving.errors import ApiError
from dparallel.serving.settings import ServerSettings
from prometheus_client import Counter
from server_here import Here, serving

import dparallel_ext as dx

pytest_plugins = ["servers"]


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
        (b"[" * 100000, "body: expected JSON in UTF-8, not nested deeply, without numbers of so"),
        (b"\xff", "body: expected JSON in UTF-8, "),
        (b"[" + b"1" * 5000 + b"]", "body: expected JSON in UTF-8, "),
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
    counted = exchange(served, "GET", "/metrics")[2].decode()
    assert 'path="other",status="404"' in counted  # whatever paths there are, so that there are few counts
    assert "nowhere" not in counted
    # A target may be a whole URL, as a proxy gets it.
    for path in ("/v1/completions", "/v1/completions/"):
        assert exchange(served, "POST", f"http://Some.Host:80{path}", body)[0] == 200
    assert exchange(served, "GET", "HTTPS://host/health?a=http://b")[0] == 200
    assert exchange(served, "GET", "http://host")[1]["Content-Type"] == "text/html; charset=utf-8"
    assert exchange(served, "GET", "http://host/nowhere")[0] == 404
    assert exchange(served, "POST", "ftp://host/v1/completions", body)[0] == 404


def test_a_body_must_arrive_in_time() -> None:
    """Straight at the gate, whose limit here is short."""

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["more_body"]:
            pass

    async def run() -> None:
        loop = asyncio.get_running_loop()
        settings = ServerSettings(body_seconds=0.05)
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
