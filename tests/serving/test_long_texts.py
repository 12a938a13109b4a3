"""Texts and chat templates that take long, or are too long, stop nobody else."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from asking import FIRST, MODEL, PROMPT, VOCABULARY, decoded, enumerate_bytes, until
from dparallel import registry, sandbox
from dparallel.serving.errors import ApiError
from dparallel.serving.protocol import ChatRequest, CompletionRequest
from dparallel.serving.responses import ResponsesRequest
from pydantic import ValidationError
from server_here import all_of, answer_of, post, serving
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models

import dparallel_ext as dx

pytest_plugins = ["servers"]


def byte_level(odd_model: Path, out: Path) -> tuple[Path, Any]:
    """A tokenizer of byte-level BPE, in a directory of its own."""
    shutil.copytree(odd_model, out, dirs_exist_ok=True)
    names = {chr_: b for b, chr_ in enumerate_bytes()}
    vocabulary = {name: i for i, name in enumerate(sorted(names)[:VOCABULARY])}
    made = Tokenizer(tokenizer_models.BPE(vocabulary, [], unk_token=next(iter(vocabulary))))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.save(str(out / "tokenizer.json"))
    return out, made


def test_long_prompts_do_not_stop_other_requests(odd_model: Path, tmp_path: Path) -> None:
    """Two clients send prompts that take long to encode; others get their answers meanwhile."""
    place, made = byte_level(odd_model, tmp_path)
    long = "the cat sat on the mat " * 20000
    begun, ended, answers, stopping = list[int](), list[int](), list[Any](), threading.Event()

    class Watched:
        def encode_batch(self, *args: Any, **more: Any) -> Any:
            begun.append(1)
            encoded = made.encode_batch(*args, **more)
            ended.append(1)
            return encoded

        def __getattr__(self, name: str) -> Any:
            return getattr(made, name)

    with serving((registry.load(str(odd_model))[0], Watched()), place, max_length=2**15) as here:

        def send() -> None:
            while not stopping.is_set():
                answers.append(here.ask({"model": MODEL, "prompt": long}))

        def answers_while_it_encodes_both() -> bool:
            before = len(ended)
            both = len(begun) - before == 2
            assert [here.get("/health")[0] for _ in range(3)] == [200] * 3
            return both and len(ended) == before

        senders = [threading.Thread(target=send) for _ in range(2)]
        for sender in senders:
            sender.start()
        until(answers_while_it_encodes_both)
        stopping.set()
        for sender in senders:
            sender.join()
        assert {(status, answer["error"]["code"]) for status, answer in answers} == {
            (400, "context_length_exceeded")
        }


def test_texts_that_are_too_long_are_not_encoded(student: tuple[Any, Any]) -> None:
    model, tokenizer = student

    class Watched:
        def encode_batch(self, texts: list[str], add_special_tokens: bool) -> Any:
            assert all(len(text) <= 8192 for text in texts)
            if "fault" in texts[0]:
                raise Exception("no such token")
            return tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens)

        def __getattr__(self, name: str) -> Any:
            assert name != "encode"
            return getattr(tokenizer, name)

    with serving((model, Watched())) as here:
        for body, param in (
            ({"prompt": "a" * 8193}, "prompt"),
            ({"prompt": ["a", "a" * 8193]}, "prompt"),
            ({"prompt": "a", "suffix": "a" * 8193}, "suffix"),
        ):
            status, answer = here.ask({"model": MODEL, **body})
            assert (status, answer["error"]["param"]) == (400, param)
            expected = "this model's maximum context length is 256 tokens, at most 8192 characters, got 8193"
            assert answer["error"]["message"] == f"{param}: {expected}"
        messages = [{"role": "user", "content": "a" * 8193}]
        status, answer = here.ask({"model": MODEL, "messages": messages}, "/v1/chat/completions")
        assert (status, answer["error"]["param"]) == (400, "messages")
        assert here.ask({"model": MODEL, "prompt": " " * 8180 + "sam", "max_tokens": 2})[0] == 200
        status, answer = here.ask({"model": MODEL, "prompt": "fault"})
        assert (status, answer["error"]["message"]) == (
            400,
            "prompt: the model's tokenizer does not encode it: no such token",
        )


def test_as_many_messages_as_fit_are_refused_at_once() -> None:
    """One error is told of each request, so no more are looked for."""
    with pytest.raises(ValidationError) as found:
        ChatRequest.model_validate({"model": "x", "messages": [{}] * 1000})
    assert found.value.error_count() < 10
    with pytest.raises(ValidationError) as found:
        ResponsesRequest.model_validate({"model": "x", "input": [{}] * 1000})
    assert found.value.error_count() < 10
    with pytest.raises(ValidationError, match="expected at most 4096 prompts, got 200000"):
        CompletionRequest.model_validate({"model": "x", "prompt": [[1]] * 200000})


TEMPLATE = (
    "{% if loop_it %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    "{% endif %}"
    "{{ 1 // divide if divide is defined }}{{ say }}{{ messages[-1].content if enable_thinking else 'sam' }}"
)


@pytest.fixture
def with_template(tmp_path: Path) -> Path:
    shutil.copytree(registry.directory_of(MODEL), tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    return tmp_path


def test_variables_of_the_chat_template(
    with_template: Path, student: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "SECONDS", 0.2)
    path, asked = "/v1/chat/completions", {"model": MODEL, "messages": [{"role": "user", "content": PROMPT}]}
    with serving(student, with_template) as here:
        for given, expected in (
            ({"enable_thinking": True}, PROMPT),
            ({"enable_thinking": False}, "sam"),
            ({}, "sam"),
            (None, "sam"),
        ):
            status, answer = here.ask({**asked, "chat_template_kwargs": given}, path)
            assert status == 200
            assert answer["choices"][0]["message"]["content"] == decoded(student, expected)[0]
        for name in ("messages", "tools", "add_generation_prompt", "chat_template"):
            status, answer = here.ask({**asked, "chat_template_kwargs": {name: []}}, path)
            assert (status, answer["error"]["param"]) == (400, "chat_template_kwargs")
            assert f"but {name} is none of these" in answer["error"]["message"]
        for given, said in (
            ({"divide": 0}, "division"),
            ({"loop_it": True}, r"more than 0\.2 s"),
            ({"say": "\ud800"}, "surrogate"),
            ({"say": "a" * 9000}, "at most 8192 characters"),
            (["a"], "dictionary"),
        ):
            status, answer = here.ask({**asked, "chat_template_kwargs": given}, path)
            assert status == 400
            assert re.search(said, answer["error"]["message"])
        assert here.ask(asked, path)[0] == 200
        assert not here.faults()
    # Tools, calls of before and what they gave are there for the template.
    (with_template / "chat_template.jinja").write_text(
        "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}"
        "{% for m in messages %}{{ m.content }} {% for c in m.tool_calls or [] %}"
        "{{ c.function.arguments.n }} {{ c.id }} {% endfor %}"
        "{{ m.tool_call_id or '' }}{% endfor %}"
    )
    function = {"name": "sam", "arguments": '{"n": "joe"}'}
    calls = [{"id": "has", "type": "function", "function": function}]
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "how"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "has", "content": "4"},
    ]
    tools = {"tools": [{"type": "function", "function": {"name": "sam"}}], "tool_choice": "none"}
    with serving(student, with_template) as here:
        status, answer = here.ask({"model": MODEL, "messages": turns, **tools}, path)
        said = decoded(student, "sam how joe has 4 has")
        assert (status, answer["choices"][0]["message"]["content"]) == (200, said[0])
    with serving(student) as here:
        status, answer = here.ask({**asked, "chat_template_kwargs": {"enable_thinking": True}}, path)
        assert (status, answer["error"]["param"]) == (400, "chat_template_kwargs")


def test_a_template_without_end_stops_nobody(
    with_template: Path, student: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other prompts are encoded meanwhile, and the server ends in its time of grace."""
    monkeypatch.setattr(sandbox, "SECONDS", 600.0)  # so that none is refused here
    path, asked = "/v1/chat/completions", {"model": MODEL, "messages": [{"role": "user", "content": PROMPT}]}
    endless = json.dumps({**asked, "chat_template_kwargs": {"loop_it": True}}).encode()
    with serving(student, with_template, grace=0.2) as here, contextlib.ExitStack() as held:
        wires = [held.enter_context(here.connect()) for _ in range(10)]
        for wire in wires:
            wire.sendall(post(path, endless))
        until(lambda: here.gate.answering == 10)
        assert here.ask({**FIRST, "max_tokens": 2})[0] == 200
        assert here.gate.answering == 10
        assert here.stop() < 3
        for wire in wires:
            assert b" 503 " in all_of(wire)
        assert not here.faults()


def test_what_may_be_answered_is_described(student: tuple[Any, Any]) -> None:
    with serving(student, keys=("k",)) as here:
        said = here.exchange(
            b"GET /openapi.json HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer k\r\nConnection: close\r\n\r\n"
        )
        described = answer_of(said)[1]
    error = {"$ref": "#/components/schemas/ErrorAnswer"}
    expected = {
        "/v1/chat/completions": (400, 401, 404, 413, 429, 503),
        "/v1/completions": (400, 401, 404, 413, 429, 503),
        "/v1/responses": (400, 401, 404, 413, 429, 503),
        "/v1/models": (401, 413),
        "/v1/models/{name}": (401, 404, 413),
        "/metrics": (401, 413),
        "/version": (401, 413),
        "/health": (413,),
    }
    assert set(described["paths"]) == set(expected)
    for path, statuses in expected.items():
        (operation,) = described["paths"][path].values()
        answers = operation["responses"]
        assert "422" not in answers
        for status in (*statuses, "default"):
            assert answers[str(status)]["content"]["application/json"]["schema"] == error
    assert "503" in described["paths"]["/health"]["get"]["responses"]
    assert set(described["paths"]["/metrics"]["get"]["responses"]["200"]["content"]) == {"text/plain"}
    assert described["info"]["version"] == dx.__version__
    schemas = described["components"]["schemas"]

    def kinds(schema: str, field: str) -> set[str]:
        """The types that a field may have, and those of a list's items."""
        forms = schemas[schema]["properties"][field]["anyOf"]
        return {" of ".join([form["type"], *form.get("items", {}).get("type", "").split()]) for form in forms}

    lists = {"array of string", "array of integer", "array of array"}
    assert kinds("CompletionRequest", "prompt") == {"string", *lists}
    for form in schemas["CompletionRequest"]["properties"]["prompt"]["anyOf"][1:]:
        assert form["minItems"] == form.get("items", {}).get("minItems", 1) == 1
    assert kinds("ChatRequest", "stop") == {"string", "array of string", "null"}
    assert kinds("MessageItem", "content") == {"string", "array"}
    assert kinds("ChatMessage", "content") == {"string", "array", "null"}
    assert set(schemas["TextPart"]["required"]) == {"type", "text"}
    fields = schemas["ErrorFields"]
    assert set(fields["required"]) == set(ApiError(400, "").body["error"])
