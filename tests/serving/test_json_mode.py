"""OpenAI's JSON mode: `response_format={"type": "json_object"}` of both endpoints, whole and streaming; and
calls of functions, whose arguments are JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from asking import bad_request, chat, joined, responded
from conftest import golden
from dparallel.any_json import DEPTH
from drafters import model_of
from json_texts import END, depth_of, read, tokenizer
from openai import OpenAI
from pydantic import BaseModel
from server_here import Here, serving

MODE = {"response_format": {"type": "json_object"}}
PROMPTS = ["Zoë has 3 hats. Answer in JSON.", "a", '{"name": ']
MODELS: dict[str, dict[str, Any]] = {
    "diffusion": {"rule": "confidence:0.02"},
    "causal": {"drafter": "jump_forward", "draft_size": 4},
}


@pytest.fixture(scope="module", params=[*MODELS])
def here(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Here]:
    """A server of random weights."""
    place: Path = tmp_path_factory.mktemp(request.param)
    (place / "config.json").write_text(json.dumps({"eos_token_id": END}))
    is_causal = request.param == "causal"
    model = model_of(vocab_size=512, eos_token_id=END) if is_causal else golden.model("llada_tiny_a")
    loaded, engine = (model, tokenizer()), {"lanes": 6, **MODELS[request.param]}
    with serving(loaded, place, engine=engine, name="json") as running:
        yield running


@pytest.fixture(scope="module")
def client(here: Here) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{here.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


def check(text: str | None) -> dict[str, Any]:
    said = read(text or "")
    assert isinstance(said, dict)
    assert depth_of(said) <= DEPTH
    return said


@pytest.mark.parametrize("length", [2, 5, 60])
def test_an_answer_is_an_object(here: Here, client: OpenAI, length: int) -> None:
    model: dict[str, Any] = {"model": "json", "max_tokens": length}
    for prompt in PROMPTS:
        answer = chat(client, prompt, **model, **MODE)
        check(answer.choices[0].message.content)
        assert answer.usage.completion_tokens <= length
        streamed = joined(chat(client, prompt, stream=True, **model, **MODE))
        assert streamed[0] == {0: answer.choices[0].message.content}
        assert streamed[1] == {0: answer.choices[0].finish_reason}
        # Clients of vLLM ask by another name, and nothing is made anew.
        named: dict[str, Any] = {"extra_body": {"structured_outputs": {"json_object": True}}}
        assert check(chat(client, prompt, **model, **named).choices[0].message.content) == check(
            streamed[0][0]
        )
    body = {**model, "prompt": PROMPTS, "n": 2, "extra_body": MODE}
    whole = client.completions.create(**body)
    texts = [choice.text for choice in whole.choices]
    assert len([check(text) for text in texts]) == 6
    assert joined(client.completions.create(**body, stream=True))[0] == dict(enumerate(texts))
    (served,) = here.service.models.values()
    assert len(served.forms) == 1


def test_answers_that_are_drawn(here: Here, client: OpenAI) -> None:
    asked = {"model": "json", "max_tokens": 30, "temperature": 1, "seed": 5, "n": 4, **MODE}
    if here.engine.mask_id is not None:
        with bad_request("temperature", "expected 0 beside a form"):
            chat(client, **asked)
        return
    texts = [choice.message.content for choice in chat(client, PROMPTS[0], **asked).choices]
    assert len(set(texts)) > 1
    for text in texts:
        check(text)


def test_a_stop_cuts_an_answer(client: OpenAI) -> None:
    model: dict[str, Any] = {"model": "json", "max_tokens": 40, **MODE}
    whole = chat(client, PROMPTS[0], **model).choices[0].message.content
    middle = whole[len(whole) // 2 :][:2]
    cut = chat(client, PROMPTS[0], stop=[middle], **model).choices[0]
    assert (cut.message.content, cut.finish_reason) == (whole[: whole.index(middle)], "stop")


ARGUMENTS: dict[str, dict[str, Any]] = {
    "add-b": {"type": "object", "properties": {"n": {"type": "integer", "maximum": 99}}, "required": ["n"]},
    "add": {
        "type": "object",
        "properties": {"it": {"$ref": "#/$defs/kind"}, "ok": {"type": "boolean"}},
        "required": ["it"],
        "$defs": {"kind": {"enum": ["a", 'b"', "é}"]}},
    },
    "none": {},
}


class Kind(BaseModel):
    it: Literal["a", "b"]
    ok: bool


def called(client: OpenAI, tools: list[str], choice: Any, length: int = 60) -> tuple[str | None, str, str]:
    """Name and arguments of the call, whole and as they stream, and the finish reason."""
    functions = [{"name": name, "parameters": ARGUMENTS[name] or None} for name in tools]
    asked: dict[str, Any] = {"model": "json", "max_tokens": length, "tool_choice": choice}
    asked["tools"] = [{"type": "function", "function": each, "strict": None} for each in functions]
    choice = chat(client, "a", **asked).choices[0]
    assert choice.message.content is None
    calls = choice.message.tool_calls or []
    assert all(call.type == "function" and call.id for call in calls)
    whole = [(call.function.name, call.function.arguments) for call in calls]
    names, arguments, reason = [], "", None
    for chunk in chat(client, "a", **asked, stream=True):
        assert not chunk.choices[0].delta.content
        for part in chunk.choices[0].delta.tool_calls or ():
            names += [part.function.name] if part.id else []
            arguments += part.function.arguments
        reason = chunk.choices[0].finish_reason or reason
    assert ([(name, arguments) for name in names], reason) == (whole, choice.finish_reason)
    flat = [{"type": "function", **each} for each in functions]
    one = asked["tool_choice"]
    one = one if isinstance(one, str) else {"type": "function", **one["function"]}
    found = responded(client, "a", model="json", max_output_tokens=length, tools=flat, tool_choice=one)
    items = [each for each in found.output if each.type == "function_call"]
    assert [(each.name, each.arguments) for each in items] == whole
    assert found.output_text == ""
    assert found.status == ("incomplete" if reason == "length" else "completed")
    return *(whole or [(None, "")])[0], reason


def test_a_function_is_called(client: OpenAI) -> None:
    """One by its name or one of some, with arguments of its schema."""
    for tools, choice, reason in (
        (["add"], "required", "tool_calls"),
        (["add-b", "add", "none"], "required", "tool_calls"),
        (["none", "add-b"], {"type": "function", "function": {"name": "add-b"}}, "stop"),
        (["none"], {"type": "function", "function": {"name": "none"}}, "stop"),
    ):
        name, arguments, ended = called(client, tools, choice)
        assert ended == reason
        assert name is not None
        said = json.loads(arguments)
        assert {*said} <= {*ARGUMENTS[name].get("properties", {})}
        if name == "add":
            assert said["it"] in ("a", 'b"', "é}")
        if name == "add-b":
            assert said["n"] <= 99
    # It is cut within the name, and in front of the last brace.
    assert called(client, ["add-b", "add"], "required", length=2) == (None, "", "length")


def test_a_response_is_parsed(client: OpenAI) -> None:
    """As the type that the client is given says, whole and streaming."""
    asked: dict[str, Any] = {"model": "json", "input": "a", "max_output_tokens": 60, "text_format": Kind}
    whole = client.responses.parse(**asked).output_parsed
    assert isinstance(whole, Kind)
    with client.responses.stream(**asked) as stream:
        assert stream.get_final_response().output_parsed == whole
    found = responded(
        client, "a", model="json", max_output_tokens=60, text={"format": {"type": "json_object"}}
    )
    assert found.text.format.type == "json_object"
    check(found.output_text)


def test_a_tool_that_is_not_to_be_called(client: OpenAI) -> None:
    tool: Any = {"type": "function", "function": {"name": "add"}}
    plain = chat(client, model="json", max_tokens=9)
    assert plain.choices == chat(client, model="json", max_tokens=9, tools=[tool], tool_choice="none").choices
    with bad_request("tools", "add: parameters: schema: "):
        tool["function"]["parameters"] = {"type": "object", "minProperties": 3}
        chat(client, model="json", tools=[tool], tool_choice="required")


@pytest.mark.parametrize(
    ("asked", "param", "said"),
    [
        (
            {"response_format": {"type": "json_objects"}},
            "response_format",
            "'text', 'json_object' or 'json_schema'",
        ),
        (
            {"response_format": {"type": "json_object", "json_schema": {"name": "n", "schema": {}}}},
            "response_format",
            "json_schema: belongs",
        ),
        ({"response_format": {"type": "json_schema"}}, "response_format", 'needs {"schema": ...}'),
        ({"response_format": {"type": "json_object", "depth": 9}}, "response_format", "depth: is not"),
        (
            {**MODE, "extra_body": {"structured_outputs": {"json_object": True}}},
            "structured_outputs",
            "not beside a response_format",
        ),
        (
            {"extra_body": {"structured_outputs": {"json_object": False}}},
            "structured_outputs",
            "one of json, regex, choice and json_object",
        ),
        (
            {"extra_body": {"structured_outputs": {"json_object": True, "regex": "a"}}},
            "structured_outputs",
            "one of json, regex, choice and json_object",
        ),
    ],
)
def test_what_is_no_json_mode_is_named(client: OpenAI, asked: dict[str, Any], param: str, said: str) -> None:
    with bad_request(param, said):
        chat(client, **{"model": "json", "max_tokens": 8, **asked})
