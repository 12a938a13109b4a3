"""Answers of a form that the request gives: by pattern, by choices, by JSON schema."""

from __future__ import annotations

import concurrent.futures
import functools
import re
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from asking import EOS, MODEL, PROMPT, PROMPTS, bad_request, chat, decoded, joined
from dparallel import sandbox, structured
from dparallel.serving import service
from openai import OpenAI
from server_here import serving

import dparallel_ext as dx

pytest_plugins = ["servers"]

PATTERN = r"(first|finally) [a-z]+ has [0-9]+ [^#]*#### [0-9]+"


@pytest.fixture(scope="module")
def client() -> Iterator[OpenAI]:
    others: dict[str, Any] = {
        "builtin:causal": {"drafter": "ngram"},
        "builtin:teacher": {"verifier": "builtin:verifier"},
    }
    with (
        serving(others=others, engine={"lanes": 16}) as running,
        OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=120) as made,
    ):
        yield made


@functools.cache
def form_of(pattern: str, tokenizer: Any) -> dx.Automaton:
    return structured.automaton(pattern, structured.Vocabulary.of(tokenizer), [EOS])


def by_pattern(pattern: str) -> dict[str, Any]:
    return {"extra_body": {"structured_outputs": {"regex": pattern}}}


def test_an_answer_is_that_of_decode(client: OpenAI, student: tuple[Any, Any]) -> None:
    form = form_of(PATTERN, student[1])
    for prompt in PROMPTS[:3]:
        said, tokens, passes = decoded(student, prompt, automaton=form)
        assert re.fullmatch(PATTERN, said)
        answer = chat(client, prompt, **by_pattern(PATTERN))
        assert answer.choices[0].message.content == said
        assert (answer.usage.completion_tokens, answer.usage.forward_passes) == (tokens, passes)
        streamed = client.completions.create(
            model=MODEL, prompt=prompt, max_tokens=64, stream=True, **by_pattern(PATTERN)
        )
        assert joined(streamed)[0] == {0: said}


def test_one_of_some_choices(client: OpenAI) -> None:
    choices = ["#### 3", "#### 31", "sam"]
    for policy in ("one", "confidence:0.5"):
        body = {"structured_outputs": {"choice": choices}, "policy": policy}
        assert chat(client, extra_body=body).choices[0].message.content in choices
    # Of a schema without a type the library makes a pattern, too.
    schema = {
        "type": "json_schema",
        "json_schema": {"name": "n", "strict": True, "schema": {"type": "integer"}},
    }
    assert int(chat(client, response_format=schema).choices[0].message.content) >= 0
    body = {"structured_outputs": {"json": '{"enum": [3, 31]}'}}
    assert chat(client, extra_body=body).choices[0].message.content in ("3", "31")
    plain = chat(client, response_format={"type": "text"}).choices[0].message.content
    assert plain == chat(client).choices[0].message.content


@pytest.mark.parametrize("model", [MODEL, "builtin:causal"])
def test_a_whole_form_has_not_run_out_of_tokens(client: OpenAI, model: str) -> None:
    """Where it needs all of max_tokens, and no token could follow; else more would have been said."""
    for pattern, length, reason in (
        ("sam has [0-9] cups", 4, "stop"),
        ("sam has [0-9] cups", 5, "stop"),
        ("sam has [0-9] cups", 3, "length"),
        ("sam( has)* [0-9]( cups)*", 2, "length"),
    ):
        for ignoring in (False, True):
            body: dict[str, Any] = {"structured_outputs": {"regex": pattern}, "ignore_eos": ignoring}
            answer = chat(client, model=model, max_tokens=length, extra_body=body).choices[0]
            assert (re.fullmatch(pattern, answer.message.content) is None) == (length == 3)
            assert answer.finish_reason == ("length" if ignoring else reason)


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_of_an_autoregressive_model(client: OpenAI, temperature: float) -> None:
    asked = {"model": "builtin:causal", "max_tokens": 64, "temperature": temperature, "seed": 3, "n": 2}
    for prompt in PROMPTS[:2]:
        answer = client.completions.create(prompt=prompt, **asked, **by_pattern(PATTERN))
        for choice in answer.choices:
            assert re.fullmatch(PATTERN, choice.text), choice.text
            assert choice.finish_reason in ("stop", "length")


@pytest.mark.parametrize(
    ("asked", "param", "said"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format", "some text of the model's tokens"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "needs {"),
        (
            {"response_format": {"type": "text", "json_schema": {"name": "n", "schema": {}}}},
            "response_format",
            "belongs",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": {"type": "foo"}},
                }
            },
            "response_format",
            "schema: ",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": {"type": "object"}},
                }
            },
            "response_format",
            "it begins with '{', and no token does",
        ),
        ({"extra_body": {"structured_outputs": {"grammar": "x"}}}, "structured_outputs", "grammar: is not"),
        ({"extra_body": {"structured_outputs": {}}}, "structured_outputs", "one of json, regex, choice"),
        (
            {"extra_body": {"structured_outputs": {"regex": "a", "choice": ["a"]}}},
            "structured_outputs",
            "one of",
        ),
        ({"extra_body": {"structured_outputs": {"choice": []}}}, "structured_outputs", "at least 1"),
        ({**by_pattern("(")}, "structured_outputs", "pattern: "),
        (
            {
                "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}},
                **by_pattern("a"),
            },
            "structured_outputs",
            "not beside a response_format",
        ),
        ({"temperature": 0.5, **by_pattern("sam")}, "temperature", "expected 0 beside a form"),
        (
            {"extra_body": {"structured_outputs": {"regex": "sam"}, "policy": "credit"}},
            "policy",
            "got Credit",
        ),
        ({"model": "builtin:teacher", **by_pattern("sam")}, "structured_outputs", "with a verifier"),
    ],
)
def test_what_is_no_form_is_named(client: OpenAI, asked: dict[str, Any], param: str, said: str) -> None:
    with bad_request(param, said):
        chat(client, **asked)


def test_nothing_follows_an_answer_of_a_form(client: OpenAI) -> None:
    with bad_request("suffix", "suffix: does not go with a form"):
        client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=8, suffix=" .", **by_pattern("sam"))


def test_a_pattern_of_billions_of_states_is_refused(client: OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "SECONDS", 0.3)
    with bad_request("structured_outputs", "structured_outputs: pattern: it took more than"):
        chat(client, **by_pattern("(a|b)*a(a|b){30}"))
    assert chat(client, **by_pattern("sam|finally")).choices[0].message.content in ("sam", "finally")


def test_known_forms_wait_for_no_other_and_the_latest_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "FORMS", 2)
    made, going_on, waited = [], threading.Event(), threading.Event()
    going_on.set()
    with serving() as running, concurrent.futures.ThreadPoolExecutor() as threads:
        make = running.service.forms_sandbox.automaton_of

        def recorded(pattern: str) -> dict[str, Any]:
            made.append(pattern)
            if not going_on.is_set():
                waited.set()
                assert going_on.wait(60)
            return make(pattern)

        monkeypatch.setattr(running.service.forms_sandbox, "automaton_of", recorded)

        def ask(pattern: str) -> str:
            body = {
                "model": MODEL,
                "prompt": PROMPT,
                "max_tokens": 8,
                "structured_outputs": {"regex": pattern},
            }
            status, answer = running.ask(body)
            assert status == 200, answer
            return str(answer["choices"][0]["text"])

        for pattern in ("sam", "finally", "sam", "first", "sam"):  # "finally" is the one to go
            assert ask(pattern) == pattern
        assert made == ["sam", "finally", "first"]
        (model,) = running.service.models.values()
        assert [form.text for form in model.forms] == ["first", "sam"]
        going_on.clear()
        new = [threads.submit(ask, "finally") for _ in range(2)]
        assert waited.wait(60)
        try:
            assert ask("sam") == "sam"
        finally:
            going_on.set()
        assert [each.result() for each in new] == ["finally"] * 2
        assert made == ["sam", "finally", "first", "finally"]


def test_a_model_without_end_token_takes_no_form(odd_client: OpenAI) -> None:
    """Nothing could follow an answer that is complete."""
    with bad_request("structured_outputs", "has no end token"):
        odd_client.completions.create(model="odd", prompt=PROMPT, max_tokens=8, **by_pattern("a"))
