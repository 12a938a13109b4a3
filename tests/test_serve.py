"""The server as clients see it: the openai package, and bare sockets where that is too well-behaved.

Each server is a process of its own on a free port of the loopback interface.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import http.client
import itertools
import json
import logging
import re
import resource
import shutil
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
import torch
from dparallel import registry, tasks, templates, text
from dparallel.cli import app
from dparallel.serving import connections, protocol, runner
from dparallel.serving.app import Gate, make_app
from dparallel.serving.errors import ApiError
from dparallel.serving.protocol import ChatRequest, CompletionRequest
from dparallel.serving.runner import listen, unusable
from dparallel.serving.service import Call, Choice, Service
from dparallel.serving.settings import KEY_VARIABLE, Settings, find_keys, read_keys
from openai import AsyncOpenAI, OpenAI
from prometheus_client import Counter
from pydantic import ValidationError
from server_here import all_of, answer_of, post, serving
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from typer.testing import CliRunner

import dparallel_ext as dx
from benchmarks.serving import KEY, Served, ask_all, percentile, server

MODEL, BLOCK, EOS = "builtin:student", 8, 1
PROMPTS = [p.prompt for p in itertools.islice(tasks.problems("held_out", seed=11), 200)]
VOCABULARY = len(tasks.vocabulary())
PROMPT = PROMPTS[0]
PAGE = "https://page.example"


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with server(MODEL, "--block-length", BLOCK, "--cache", "dual", "--cors-origin", PAGE) as running:
        yield running


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0, timeout=120) as made:
        yield made


@pytest.fixture(scope="module")
def student() -> tuple[Any, Any]:
    return registry.load(MODEL)


@pytest.fixture(scope="module")
def odd_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student without an end token, with NaN for token 0, and with a character of three bytes over each
    two of its tokens: token i is the end of one and the beginning of the next."""
    out = tmp_path_factory.mktemp("odd")
    shutil.copytree(registry.directory_of(MODEL), out, dirs_exist_ok=True)
    model = dx.models.load(out)
    with torch.no_grad():
        model.embed.weight[0] = torch.nan
    dx.models.save(model, out)
    config = json.loads((out / "config.json").read_text())
    config |= {"eos_token_id": None, "max_sequence_length": 2048}
    (out / "config.json").write_text(json.dumps(config))
    (out / "tokenizer_config.json").write_text("{}")
    byte_of = {c: b for b, c in enumerate_bytes()}
    assert len(byte_of) == 256
    names = {b: c for c, b in byte_of.items()}
    vocabulary = {}
    for i in range(VOCABULARY):
        first, *rest = chr(0x4E00 + i).encode()
        vocabulary["".join(names[b] for b in [*rest, first])] = i
    made = Tokenizer(tokenizer_models.WordLevel(vocabulary, unk_token=next(iter(vocabulary))))
    made.decoder = decoders.ByteLevel()
    made.save(str(out / "tokenizer.json"))
    return out


def enumerate_bytes() -> Iterator[tuple[int, str]]:
    """The characters that stand for bytes in byte-level BPE, as GPT-2's."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in shown]
    yield from ((b, chr(b)) for b in shown)
    yield from ((b, chr(256 + i)) for i, b in enumerate(hidden))


@pytest.fixture(scope="module")
def odd(odd_model: Path) -> Iterator[Served]:
    """A small and slow server: one token a pass, and responses that only end at their length."""
    options = ("--name", "odd", "--policy", "one", "--lanes", 2, "--max-waiting", 4)
    with server(odd_model, *options, "--max-choices", 3, "--max-body", 20000) as running:
        yield running


@pytest.fixture(scope="module")
def odd_client(odd: Served) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{odd.url}/v1", api_key=KEY, max_retries=0, timeout=120) as made:
        yield made


def decoded(student: tuple[Any, Any], prompt: str, **settings: Any) -> tuple[str, int, int]:
    """Text, tokens and passes of `decode`."""
    model, tokenizer = student
    settings = {"gen_length": 64, "threshold": 0.5, **settings}
    ids = torch.tensor(tokenizer.encode(prompt).ids)
    out = dx.decode(model, ids, block_length=BLOCK, cache="dual", eos_id=EOS, **settings)
    tokens = [*out.responses[0].tolist(), EOS]
    tokens = tokens[: tokens.index(EOS)]
    return tokenizer.decode(tokens), len(tokens), int(out.nfe)


def chat(client: OpenAI, prompt: str = PROMPT, **settings: Any) -> Any:
    messages = [{"role": "user", "content": prompt}]
    return client.chat.completions.create(**{"model": MODEL, "messages": messages, **settings})


def joined(stream: Any) -> tuple[dict[int, str], dict[int, str], int]:
    """Of a stream: texts and finish reasons by choice, and the number of pieces with text."""
    texts: dict[int, str] = {}
    reasons: dict[int, str] = {}
    count = 0
    for chunk in stream:
        for choice in chunk.choices:
            piece = choice.text if hasattr(choice, "text") else choice.delta.content
            texts[choice.index] = texts.get(choice.index, "") + (piece or "")
            count += bool(piece)
            if choice.finish_reason:
                assert choice.index not in reasons
                reasons[choice.index] = choice.finish_reason
    return texts, reasons, count


def until(true: Callable[[], bool], seconds: float = 20) -> None:
    ends = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ends
        time.sleep(0.05)


def raw(served: Served, path: str, body: bytes | None = None, **headers: str) -> tuple[int, Any]:
    """Status and JSON of a request of any shape."""
    sent = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json", **headers}
    request = urllib.request.Request(served.url + path, body, {k: v for k, v in sent.items() if v})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def exchange(
    served: Served, method: str, path: str, body: Any = None, key: str | None = KEY, **headers: str
) -> tuple[int, Any, bytes]:
    """Status, headers and body of a request with these headers alone."""
    sent = {"Authorization": f"Bearer {key}"} if key else {}
    wire = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
    try:
        wire.request(method, path, None if body is None else json.dumps(body).encode(), {**sent, **headers})
        answer = wire.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        wire.close()


# --- answers ------------------------------------------------------------------------------------


def test_models_and_health(served: Served, client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "dparallel"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-5")
    assert raw(served, "/health", Authorization="") == (200, {"status": "ok"})


@pytest.mark.parametrize("prompt", PROMPTS[:3])
def test_greedy_answers_are_those_of_decode(client: OpenAI, student: tuple[Any, Any], prompt: str) -> None:
    said, tokens, passes = decoded(student, prompt)
    answer = chat(client, prompt)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", said, "stop")
    usage = answer.usage
    assert usage.prompt_tokens == len(prompt.split())
    assert (usage.completion_tokens, usage.total_tokens) == (tokens, tokens + usage.prompt_tokens)
    assert usage.forward_passes == passes
    assert usage.tokens_per_pass == pytest.approx(tokens / passes, abs=1e-3)
    assert usage.prompt_tokens_details.cached_tokens == 0
    assert answer.object == "chat.completion"
    completed = client.completions.create(model=MODEL, prompt=prompt, max_tokens=64)
    assert completed.choices[0].text == said
    assert completed.usage == usage
    assert completed.object == "text_completion"


def test_the_last_user_message_is_the_prompt(client: OpenAI, student: tuple[Any, Any]) -> None:
    parts = [{"type": "text", "text": PROMPT[:20]}, {"type": "text", "text": PROMPT[20:]}]
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": PROMPTS[1]},
        {"role": "assistant", "content": "yes", "refusal": None},
        {"role": "user", "content": parts, "name": "me"},
    ]
    answer = client.chat.completions.create(model=MODEL, messages=messages, user="me", top_p=1)
    assert answer.choices[0].message.content == decoded(student, PROMPT)[0]


def test_prompts_as_texts_and_as_ids(client: OpenAI, student: tuple[Any, Any]) -> None:
    texts = PROMPTS[:3]
    ids = [student[1].encode(one).ids for one in texts]
    expected = [decoded(student, one)[0] for one in texts]
    for prompts in (texts, ids):
        answer = client.completions.create(model=MODEL, prompt=prompts)
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        assert [choice.text for choice in answer.choices] == expected
        assert answer.usage.prompt_tokens == sum(map(len, ids))
    assert client.completions.create(model=MODEL, prompt=ids[0]).choices[0].text == expected[0]


def test_a_suffix_is_what_the_answer_leads_to(client: OpenAI, student: tuple[Any, Any]) -> None:
    """Decoded between the two, and cut at EOS; the suffix counts as prompt."""
    model, tokenizer = student
    words = decoded(student, PROMPT)[0].split()
    prompt, suffix = " ".join([PROMPT, *words[:3]]), " ".join(words[9:])
    settings: dict[str, Any] = {"block_length": BLOCK, "cache": "dual", "threshold": 0.5, "eos_id": EOS}
    for length in (6, 20):
        before, after = (tokenizer.encode(one).ids for one in (prompt, suffix))
        out = dx.decode(
            model, [*before, *[model.mask_id] * length, *after], gen_length=0, infill=True, **settings
        )
        kept = int(out.kept)
        asked = {"model": MODEL, "prompt": prompt, "suffix": suffix, "max_tokens": length}
        answer = client.completions.create(**asked)
        assert answer.choices[0].text == tokenizer.decode(out.responses[0][:kept].tolist())
        assert answer.choices[0].finish_reason == ("length" if kept == length else "stop")
        usage = answer.usage
        assert (usage.prompt_tokens, usage.completion_tokens) == (len(before) + len(after), kept)
        assert usage.forward_passes == int(out.nfe)
        assert joined(client.completions.create(stream=True, **asked))[0] == {0: answer.choices[0].text}
    plain = client.completions.create(model=MODEL, prompt=prompt, suffix="", max_tokens=6)
    assert plain.choices[0].text == decoded(student, prompt, gen_length=6)[0]
    for change, param in (
        ({"suffix": "[MASK]"}, "suffix"),
        ({"prompt": "[MASK]"}, "suffix"),
        ({"max_tokens": 240}, "max_tokens"),
        ({"suffix": 3}, "suffix"),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            client.completions.create(**{**asked, **change})
        assert refused.value.param == param


def test_max_tokens_ends_an_answer(client: OpenAI, student: tuple[Any, Any]) -> None:
    said, tokens, _ = decoded(student, PROMPT, gen_length=5)
    for name in ("max_tokens", "max_completion_tokens"):
        answer = chat(client, **{name: 5})
        assert answer.choices[0].message.content == said
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == tokens == 5


@pytest.mark.parametrize("policy", ["one", "confidence:0.9", "entropy_bound:0.1", "steps:16"])
def test_policies(client: OpenAI, student: tuple[Any, Any], policy: str) -> None:
    from dparallel.evaluate import parse_policy

    said, _, passes = decoded(student, PROMPT, **{"threshold": None, **parse_policy(policy)})
    answer = chat(client, extra_body={"policy": policy})
    assert answer.choices[0].message.content == said
    assert answer.usage.forward_passes == passes


def test_several_choices_and_seeds(client: OpenAI) -> None:
    def ask(**settings: Any) -> list[str]:
        answer = chat(client, n=4, temperature=1.5, **settings)
        assert answer.usage.prompt_tokens == len(PROMPT.split())
        return [choice.message.content for choice in answer.choices]

    assert ask(seed=5) == ask(seed=5)
    assert ask(seed=6)[:3] == ask(seed=5)[1:]
    assert ask(seed=-(2**63)) == ask(seed=0)
    assert len({*ask(), *ask()}) > 1


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "seed": 3, "n": 3}, {"stop": ["#", "."]}])
def test_streams_join_to_the_whole(client: OpenAI, settings: dict[str, Any]) -> None:
    whole = chat(client, **settings)
    texts, reasons, count = joined(chat(client, stream=True, **settings))
    assert texts == {choice.index: choice.message.content for choice in whole.choices}
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}
    assert count > len(texts)
    prompts = {"model": MODEL, "prompt": [PROMPT, PROMPTS[1]], **settings}
    completed = client.completions.create(**prompts)
    texts, _, count = joined(client.completions.create(stream=True, **prompts))
    assert texts == {choice.index: choice.text for choice in completed.choices}
    assert len(texts) == 2 * settings.get("n", 1)
    assert count > len(texts)


def test_the_chunks_of_a_stream(client: OpenAI) -> None:
    usage = chat(client).usage
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert (chunks[0].choices[0].delta.role, chunks[0].choices[0].delta.content) == ("assistant", "")
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert (chunks[-1].choices, chunks[-1].usage) == ([], usage)
    assert all(chunk.usage is None for chunk in chat(client, stream=True))


def test_a_stream_on_the_wire(served: Served) -> None:
    body = json.dumps({"model": MODEL, "prompt": PROMPT, "stream": True}).encode()
    head = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{served.url}/v1/completions", body, head)
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        assert answer.headers["Cache-Control"] == "no-cache"
        events = answer.read().decode()
    assert events.endswith("data: [DONE]\n\n")
    *chunks, _ = (event.removeprefix("data: ") for event in events.split("\n\n")[:-1])
    assert all(json.loads(chunk)["object"] == "text_completion" for chunk in chunks)


@pytest.mark.parametrize("stop", ["####", "= ", [" cups", "= 12"], ["nowhere"], "first", ".", []])
def test_stop_strings(client: OpenAI, student: tuple[Any, Any], stop: Any) -> None:
    """In the text, wherever the tokens and the blocks end; the tokens count up to it."""
    whole, _, _ = decoded(student, PROMPT)
    found = [s for s in ([stop] if isinstance(stop, str) else stop) if s in whole]
    end, start = min(((whole.find(s) + len(s), whole.find(s)) for s in found), default=(len(whole),) * 2)
    answer = chat(client, stop=stop)
    assert answer.choices[0].message.content == whole[:start]
    assert answer.choices[0].finish_reason == "stop"
    words = whole.split()  # a space comes with the word after it
    count = next(n for n in range(len(words) + 1) if len(" ".join(words[:n])) >= end)
    assert answer.usage.completion_tokens == count
    assert joined(chat(client, stop=stop, stream=True))[0][0] == whole[:start]


def test_the_async_client(served: Served, student: tuple[Any, Any]) -> None:
    async def run() -> list[Any]:
        async with AsyncOpenAI(base_url=f"{served.url}/v1", api_key="another", timeout=120) as client:
            ask = client.completions.create
            return await asyncio.gather(*(ask(model=MODEL, prompt=prompt) for prompt in PROMPTS[:8]))

    answers = asyncio.run(run())
    assert [answer.choices[0].text for answer in answers] == [decoded(student, p)[0] for p in PROMPTS[:8]]


def test_characters_over_several_blocks(odd_client: OpenAI) -> None:
    """Every character is over two tokens, so it also is wherever a block ends."""
    settings = {"model": "odd", "prompt": [5, 6, 7], "max_tokens": 100}
    whole = odd_client.completions.create(**settings)
    said = whole.choices[0].text
    assert whole.usage.completion_tokens == 100
    assert len(said.strip(text.INCOMPLETE)) == 99
    assert set(said.strip(text.INCOMPLETE)) <= {chr(0x4E00 + i) for i in range(VOCABULARY)}
    pieces = [chunk.choices[0].text for chunk in odd_client.completions.create(stream=True, **settings)]
    assert "".join(pieces) == said
    assert sum(map(bool, pieces)) >= 4
    assert all(text.INCOMPLETE not in piece for piece in pieces[1:-2])


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "param", "said"),
    [
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": True}, "max_tokens", "valid integer"),
        ({"max_tokens": 1.5}, "max_tokens", "valid integer"),
        ({"max_tokens": 1000}, "max_tokens", "at most 256 tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "got 5 and 6"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages", "one from the user"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages", "role"),
        ({"messages": [{"role": "user", "content": None}]}, "messages", "content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "parts"),
        ({"messages": [{"role": "user", "content": "a " * 300}]}, "messages", "at most 256 tokens"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]}, "tool_calls", "only []"),
        ({"messages": [{"role": "user", "content": "a", "audio": {}}]}, "audio", "not supported"),
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
        ({"logprobs": True, "top_logprobs": 2}, "top_logprobs", "only 0 is supported"),
        ({"logprobs": 1}, "logprobs", "valid boolean"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "only [] is supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "only"),
        ({"top_p": 0.0}, "top_p", "greater than 0"),
        ({"top_p": 1.1}, "top_p", "less than or equal to 1"),
        ({"frequency_penalty": 0.1}, "frequency_penalty", "only 0"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "only {} is supported"),
        ({"extra_body": {"min_p": 0.1}}, "min_p", "only 0 is supported"),
        ({"extra_body": {"top_k": -2}}, "top_k", "greater"),
        ({"extra_body": {"top_k": 1.5}}, "top_k", "valid integer"),
        ({"extra_body": {"guided_regex": "a"}}, "guided_regex", "is not supported"),
        ({"extra_body": {"stop_token_ids": [VOCABULARY]}}, "stop_token_ids", "token ids below"),
        ({"extra_body": {"stop_token_ids": [-1]}}, "stop_token_ids", "greater"),
        ({"extra_body": {"stop_token_ids": [1] * 33}}, "stop_token_ids", "at most 32"),
        ({"extra_body": {"ignore_eos": 1}}, "ignore_eos", "valid boolean"),
        ({"extra_body": {"stream_drafts": True}}, "stream_drafts", "stream=true"),
        ({"extra_body": {"policy": "entropy"}}, "policy", "expected 'one'"),
        ({"extra_body": {"policy": "quota:0.5"}}, "policy", "whole number"),
        ({"extra_body": {"policy": "steps:3"}}, "policy", "multiple of the 8 blocks"),
    ],
)
def test_bad_requests_are_named(client: OpenAI, settings: dict[str, Any], param: str, said: str) -> None:
    with pytest.raises(openai.BadRequestError) as found:
        chat(client, **settings)
    body: Any = found.value.body
    assert body["param"] == param
    assert said in body["message"]
    assert body["type"] == "invalid_request_error"


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
    with pytest.raises(openai.BadRequestError) as found:
        client.completions.create(**{"model": MODEL, "prompt": PROMPT, **settings})
    body: Any = found.value.body
    assert body["param"] == param
    assert body["message"].startswith(f"{param}: ") or body["message"].startswith(f"{param}.")


@pytest.mark.parametrize("which", [0, -1])
def test_neutral_values_are_accepted(client: OpenAI, which: int) -> None:
    harmless = {**dict.fromkeys(protocol.HARMLESS, "x"), "unheard_of": None}

    def one_of_each(neutral: protocol.Neutral) -> dict[str, Any]:
        return {name: values[which] for name, values in neutral.items()}

    messages = [{"role": "user", "content": PROMPT, **one_of_each(protocol.MESSAGE)}]
    asked = {**one_of_each(protocol.CHAT), **harmless, "messages": messages}
    plain = chat(client, max_tokens=8, max_completion_tokens=8).choices[0].message.content
    assert chat(client, max_tokens=8, extra_body=asked).choices[0].message.content == plain
    assert chat(client, max_tokens=8, stream_options={"include_usage": False}).choices[0]
    options = {"include_usage": True, **one_of_each(protocol.STREAM_OPTIONS)}
    assert joined(chat(client, max_tokens=8, stream=True, stream_options=options))[0] == {0: plain}
    asked = {**one_of_each(protocol.COMPLETION), **harmless, "best_of": 2}
    answer = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=8, n=2, extra_body=asked)
    assert [choice.text for choice in answer.choices] == [plain, plain]


def test_what_is_not_neutral_is_named() -> None:
    for name in protocol.CHAT:
        found = protocol.refused({"user": "me", name: "something else"}, protocol.CHAT)
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
        assert (protocol.refused({name: value}, protocol.CHAT) or "")[0] == name
    # That which says most about what the client is after comes first.
    found = protocol.refused({"logprobs": 1, "echo": True}, protocol.COMPLETION)
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


def test_bodies_by_content_type(served: Served, student: tuple[Any, Any]) -> None:
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


# --- clients of other servers -------------------------------------------------------------------


def events_of(answer: bytes) -> list[dict[str, Any]]:
    """The chunks of a stream, as benchmarks read it: by blank lines, each a data line of JSON."""
    *chunks, done, rest = answer.decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert all(chunk.startswith("data: ") for chunk in chunks)
    return [json.loads(chunk.removeprefix("data: ")) for chunk in chunks]


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_requests_of_vllm_bench_serve(served: Served, student: tuple[Any, Any], ignore_eos: bool) -> None:
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


def test_requests_of_lm_eval(served: Served, student: tuple[Any, Any]) -> None:
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


# --- log-probabilities --------------------------------------------------------------------------


def scored(student: tuple[Any, Any], prompt: str, **settings: Any) -> tuple[list[str], list[float]]:
    """Words and log-probabilities of the tokens of `decode`, up to the end token."""
    model, tokenizer = student
    ids = torch.tensor(tokenizer.encode(prompt).ids)
    out = dx.decode(
        model,
        ids,
        gen_length=64,
        block_length=BLOCK,
        cache="dual",
        threshold=0.5,
        eos_id=EOS,
        logprobs=True,
        **settings,
    )
    kept = int(out.kept[0])
    assert out.logprobs is not None
    return [tokenizer.id_to_token(t) for t in out.responses[0][:kept].tolist()], out.logprobs[
        0, :kept
    ].tolist()


SAMPLED = [{}, {"temperature": 1.0, "seed": 5}, {"temperature": 1.5, "seed": 5, "top_p": 0.8, "top_k": 4}]


@pytest.mark.parametrize("settings", SAMPLED)
def test_logprobs(client: OpenAI, student: tuple[Any, Any], settings: dict[str, Any]) -> None:
    """Of the committed tokens, as `decode` has them, whole and streaming, of both endpoints."""
    ours = {**settings, "seed": torch.tensor([settings["seed"]])} if "seed" in settings else settings
    words, values = scored(student, PROMPT, **ours)
    said = " ".join(words)
    top_k = {"extra_body": {"top_k": settings["top_k"]}} if "top_k" in settings else {}
    asked = {**{key: value for key, value in settings.items() if key != "top_k"}, **top_k}
    whole = chat(client, max_tokens=64, logprobs=True, top_logprobs=0, **asked).choices[0]
    assert whole.message.content == said
    found = whole.logprobs.content
    assert [one.token.strip() for one in found] == words
    assert "".join(one.token for one in found) == said
    assert [bytes(one.bytes).decode() for one in found] == [one.token for one in found]
    assert [one.logprob for one in found] == pytest.approx(values, abs=1e-4)
    assert all(one.top_logprobs == [] for one in found)
    streamed = []
    for chunk in chat(client, max_tokens=64, logprobs=True, stream=True, **asked):
        streamed += chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else []
    assert streamed == found
    prompt = {"model": MODEL, "prompt": PROMPT, "max_tokens": 64, **asked}
    whole = client.completions.create(logprobs=0, **prompt).choices[0]
    assert whole.text == said
    assert whole.logprobs.tokens == [one.token for one in found]
    assert whole.logprobs.token_logprobs == [one.logprob for one in found]
    starts = whole.logprobs.text_offset
    assert all(said.startswith(*pair) for pair in zip(whole.logprobs.tokens, starts, strict=True))
    assert whole.logprobs.top_logprobs is None
    offsets = []
    for chunk in client.completions.create(logprobs=0, stream=True, **prompt):
        offsets += chunk.choices[0].logprobs.text_offset if chunk.choices[0].logprobs else []
    assert offsets == starts


def test_logprobs_end_where_the_tokens_are_counted(client: OpenAI) -> None:
    stop = {"stop": ["= "], "max_tokens": 64}
    answer = client.completions.create(model=MODEL, prompt=[PROMPT, PROMPTS[1]], logprobs=1, n=2, **stop)
    assert sum(len(one.logprobs.tokens) for one in answer.choices) == answer.usage.completion_tokens
    for one in answer.choices:
        (first, *_), (value, *_) = one.logprobs.tokens, one.logprobs.token_logprobs
        assert one.logprobs.top_logprobs[0] == {first: value}
    assert all(one.logprobs is None for one in chat(client, logprobs=False).choices)


def test_logprobs_are_json() -> None:
    assert protocol.chat_logprobs([("a", float("-inf"))])["content"][0]["logprob"] == -9999.0
    assert protocol.chat_logprobs([(text.INCOMPLETE, -1.0)])["content"][0]["bytes"] is None


# --- drafts -------------------------------------------------------------------------------------


def of_drafts(chunks: Any) -> tuple[list[Any], dict[int, list[Any]]]:
    """Of a stream: the chunks without a draft, and the drafts by choice."""
    drafts: dict[int, list[Any]] = {}
    others = []
    for chunk in chunks:
        draft = getattr(chunk.choices[0], "draft", None) if chunk.choices else None
        if draft is None:
            others.append(chunk)
        else:
            drafts.setdefault(chunk.choices[0].index, []).append(draft)
    return others, drafts


def test_drafts(client: OpenAI, student: tuple[Any, Any]) -> None:
    """After each pass the block with its masks, until it is there; who does not know drafts sees none."""
    said, count, passes = decoded(student, PROMPT)
    asked = {"stream": True, "extra_body": {"stream_drafts": True}}
    chunks = list(chat(client, max_tokens=64, **asked))
    assert all(
        not (chunk.choices[0].delta.content or "") for chunk in chunks if hasattr(chunk.choices[0], "draft")
    )
    plain, found = of_drafts(chunks)
    assert joined(plain)[0] == {0: said} == joined(chunks)[0]
    drafts = found[0]
    numbers = [one["pass"] for one in drafts]
    assert numbers == sorted(set(numbers))  # some may be left out where this test is slow
    assert numbers[-1] == passes
    assert {one["length"] for one in drafts} == {64}
    assert {one["start"] % BLOCK for one in drafts} == {0}
    final: list[Any] = []
    for one in drafts:
        final[one["start"] :] = one["tokens"]
    assert any(None in one["tokens"] for one in drafts)
    assert None not in final
    assert "".join(final[:count]) == said
    assert set(final[count:]) == {final[count]}  # the end token, which the text leaves out
    for before, after in itertools.pairwise(drafts):
        if before["start"] == after["start"]:
            assert all(a in (None, b) for a, b in zip(before["tokens"], after["tokens"], strict=True))
        else:
            assert None not in before["tokens"]
    two = client.completions.create(model=MODEL, prompt=PROMPTS[:2], n=2, **asked)
    plain, found = of_drafts(two)
    assert sorted(found) == [0, 1, 2, 3]
    assert joined(plain)[0] == {i: decoded(student, PROMPTS[i // 2])[0] for i in range(4)}


def test_drafts_in_front_of_a_suffix(client: OpenAI) -> None:
    """They hold the response alone, not what follows it in the block."""
    asked = {"model": MODEL, "prompt": PROMPT, "suffix": "so it is", "max_tokens": 5, "stream": True}
    plain, found = of_drafts(client.completions.create(**asked, extra_body={"stream_drafts": True}))
    assert {(one["start"], one["length"], len(one["tokens"])) for one in found[0]} == {(0, 5, 5)}
    said = joined(plain)[0][0]
    assert "".join(found[0][-1]["tokens"]).partition(tasks.EOS)[0].strip() == said


def test_drafts_under_the_clients_own_accumulator(client: OpenAI, student: tuple[Any, Any]) -> None:
    messages: Any = [{"role": "user", "content": PROMPT}]
    with client.chat.completions.stream(
        model=MODEL, messages=messages, extra_body={"stream_drafts": True}
    ) as stream:
        pieces = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(pieces) == final.choices[0].message.content == decoded(student, PROMPT)[0]
    assert final.choices[0].finish_reason == "stop"


def test_a_slow_client_gets_the_newest_draft(student: tuple[Any, Any]) -> None:
    """However many there have been, and none of a block whose text it has; the text is whole."""
    ids = student[1].encode("sam has 3 cups").ids

    async def run() -> list[Any]:
        tell: list[Callable[[Any], None]] = []
        handle: Any = SimpleNamespace(subscribe=tell.append, cancel=lambda: None, logprobs=[])
        service: Any = SimpleNamespace(aborted=asyncio.get_running_loop().create_future())
        nothing = SimpleNamespace(observe=lambda _: None)
        service.metrics = SimpleNamespace(first_block=nothing, finished=lambda *_: None)
        choice = Choice([1], 4, 0, text.TextStream(student[1]), [])

        def submit(choice: Any, draft: Callable[[Any], None]) -> Any:
            tell.append(draft)
            return handle

        call = Call(service, [choice], 1, submit)
        on_draft, on_event = tell
        for nfe in range(1, 1001):
            on_draft(dx.Draft(nfe, 0, [None, None]))
        on_event(ids[:2])
        for nfe in range(1001, 2001):
            on_draft(dx.Draft(nfe, 2, [None, None]))
        on_event(ids[2:])
        on_event(dx.Completion(ids, "length", 2000, 2000, 1, 0, 0.0, 0.0))
        await asyncio.sleep(0)
        assert call.queue.qsize() == 5
        return [piece async for piece in call.pieces()]

    pieces = asyncio.run(run())
    assert [piece.draft and piece.draft.nfe for piece in pieces] == [1000, None, 2000, None, None]
    assert "".join(piece.text for piece in pieces) == "sam has 3 cups"


# --- bodies, paths and pages --------------------------------------------------------------------


def test_requests_that_are_no_requests(served: Served) -> None:
    path, fine = "/v1/completions", {"model": MODEL, "prompt": "sam"}
    for body, said in (
        (b"{", "body: expected JSON (Expecting property name enclosed in double quotes at character 1)"),
        (b"[1]", "body: "),
        (b"[" * 100000, "parsing the body"),
        (b"\xff", "parsing the body"),
        (b'{"model": "x"', "JSON"),
        (b"{}", "model: Field required"),
        (json.dumps({**fine, "prompt": "\ud800"}).encode(), "surrogate"),
        (json.dumps({**fine, "stop": "\ud800"}).encode(), "surrogate"),
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
    assert "Traceback" not in served.log.read_text()


def test_paths_and_methods(served: Served) -> None:
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


def test_web_pages(served: Served, odd: Served) -> None:
    """Those of `--cors-origin` may ask, with the key, and see why they are refused; others may not."""
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    path, body = "/v1/completions", {"model": MODEL, "prompt": "sam", "max_tokens": 2}
    status, headers, _ = exchange(served, "OPTIONS", path, key=None, Origin=PAGE, **asks)
    assert (status, headers["Access-Control-Allow-Origin"]) == (200, PAGE)
    assert "authorization" in headers["Access-Control-Allow-Headers"]
    json_of = {"Content-Type": "application/json"}
    for key, expected in ((KEY, 200), ("wrong", 401)):
        status, headers, _ = exchange(served, "POST", path, body, key=key, Origin=PAGE, **json_of)
        assert (status, headers["Access-Control-Allow-Origin"]) == (expected, PAGE)
    for server_, origin in ((served, "https://else.example"), (odd, PAGE)):
        _, headers, _ = exchange(server_, "OPTIONS", path, key=None, Origin=origin, **asks)
        assert "Access-Control-Allow-Origin" not in headers
        _, headers, _ = exchange(server_, "GET", "/v1/models", Origin=origin)
        assert "Access-Control-Allow-Origin" not in headers


def test_models_of_another_name(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="model: expected 'builtin:student', got 'gpt-5'"):
        chat(client, model="gpt-5")


def test_keys(served: Served) -> None:
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


def talk(served: Served, *parts: bytes, end: bool = False) -> bytes:
    """What a server says to these bytes, until it has been silent for a while or hangs up."""
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as wire:
        for part in parts:
            wire.sendall(part)
        if end:
            return b""
        said = b""
        wire.settimeout(10)
        while b"\r\n\r\n" not in said or not re.search(rb"\r\n\r\n.*}", said, re.S):
            got = wire.recv(65536)
            if not got:
                break
            said += got
        return said


def head(length: str, key: str = KEY) -> bytes:
    lines = f"Host: x\r\nAuthorization: Bearer {key}\r\nContent-Type: application/json\r\n{length}\r\n\r\n"
    return f"POST /v1/completions HTTP/1.1\r\n{lines}".encode()


def test_bodies_that_are_too_large(odd: Served) -> None:
    with pytest.raises(openai.APIStatusError) as found:
        OpenAI(base_url=f"{odd.url}/v1", api_key=KEY, max_retries=0).completions.create(
            model="odd", prompt="x" * 30000
        )
    assert found.value.status_code == 413
    assert found.value.body["code"] == "request_too_large"  # type: ignore[index]
    # Refused before any of it is sent.
    assert b" 413 " in talk(odd, head("Content-Length: 20001"))
    assert b" 401 " in talk(odd, head("Content-Length: 20001", "wrong"))
    # Without a length, as soon as it is too much, though more is to come.
    chunk = b"1000\r\n" + b" " * 4096 + b"\r\n"
    assert b" 413 " in talk(odd, head("Transfer-Encoding: chunked"), *[chunk] * 5)
    # What is just small enough passes, in chunks too.
    body = json.dumps({"model": "odd", "prompt": [5], "max_tokens": 2}).encode().ljust(20000)
    chunks = [b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:9000], body[9000:])]
    assert b" 200 " in talk(odd, head("Transfer-Encoding: chunked"), *chunks, b"0\r\n\r\n")
    # A length that promises more than comes.
    before = odd.metrics()
    talk(odd, head("Content-Length: 500"), b'{"model":', end=True)
    # And one that comes with more: the rest is another request, and not a good one.
    exact = json.dumps({"model": "odd", "prompt": [5], "max_tokens": 2}).encode()
    assert b" 200 " in talk(odd, head(f"Content-Length: {len(exact)}"), exact + b"x" * 50)
    assert odd.metrics()["dparallel_completed_total"] == before["dparallel_completed_total"] + 1


def test_a_body_must_arrive_in_time() -> None:
    """Straight at the gate, whose limit here is short."""

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["more_body"]:
            pass

    async def run() -> None:
        loop = asyncio.get_running_loop()
        settings = Settings("x", body_seconds=0.05)
        service: Any = SimpleNamespace(settings=settings, aborted=loop.create_future())
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
        settings = Settings("x", max_length=64)
        place = registry.directory_of(MODEL)
        service = Service(engine, model.shape.rows, tokenizer, place, settings)
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


@pytest.mark.slow
def test_too_many_requests(odd: Served) -> None:
    """Two lanes and four places to wait: of twelve at once some are refused, and told when to come again."""

    async def ask(client: AsyncOpenAI) -> Any:
        return await client.completions.create(model="odd", prompt=[5, 6], max_tokens=80)

    async def run(retries: int) -> list[Any]:
        url = f"{odd.url}/v1"
        async with AsyncOpenAI(base_url=url, api_key=KEY, max_retries=retries, timeout=120) as client:
            return await asyncio.gather(*(ask(client) for _ in range(12)), return_exceptions=True)

    answers = asyncio.run(run(0))
    refused = [one for one in answers if isinstance(one, Exception)]
    assert 1 <= len(refused) <= 10
    for error in refused:
        assert isinstance(error, openai.RateLimitError)
        assert 1 <= int(error.response.headers["Retry-After"]) <= 60
    said = {one.choices[0].text for one in answers if not isinstance(one, Exception)}
    assert len(said) == 1
    # Who heeds it gets through.
    assert {one.choices[0].text for one in asyncio.run(run(20))} == said


# --- faults -------------------------------------------------------------------------------------


def test_clients_that_leave_cancel(odd: Served, odd_client: OpenAI) -> None:
    before = odd.metrics()["dparallel_cancelled_total"]
    settings = {"model": "odd", "prompt": [[5, 6], [7, 8]], "max_tokens": 1900}
    stream = odd_client.completions.create(stream=True, **settings)
    next(iter(stream))
    stream.close()
    until(lambda: odd.metrics()["dparallel_cancelled_total"] == before + 2)
    with pytest.raises(openai.APITimeoutError):
        odd_client.with_options(timeout=0.5).completions.create(**settings)
    until(lambda: odd.metrics()["dparallel_cancelled_total"] == before + 4)
    found = odd.metrics()
    assert found["dparallel_active"] == found["dparallel_waiting"] == found["dparallel_pages_used"] == 0
    assert found["dparallel_http_requests_total{/v1/completions,499}"] == 1


def test_a_stop_string_ends_the_computation(odd: Served, odd_client: OpenAI) -> None:
    whole = odd_client.completions.create(model="odd", prompt=[5, 6], max_tokens=64)
    stop = whole.choices[0].text.strip(text.INCOMPLETE)[3]
    cut = odd_client.completions.create(model="odd", prompt=[5, 6], max_tokens=64, stop=stop)
    assert cut.usage.completion_tokens < 64
    assert cut.usage.forward_passes < 64
    until(lambda: odd.metrics()["dparallel_active"] == 0)


def test_a_request_that_fails_concerns_no_other(odd: Served, odd_client: OpenAI) -> None:
    """Token 0 makes NaN of its sequence's logits."""
    alone = odd_client.completions.create(model="odd", prompt=[5, 6], max_tokens=200).choices[0].text
    before = odd.metrics()["dparallel_failed_total"]
    stream = iter(odd_client.completions.create(model="odd", prompt=[5, 6], max_tokens=200, stream=True))
    said = next(stream).choices[0].text
    with pytest.raises(openai.InternalServerError) as found:
        odd_client.completions.create(model="odd", prompt=[5, 0], max_tokens=64)
    assert found.value.body == {
        "message": "the model failed on this request",
        "type": "server_error",
        "param": None,
        "code": "internal_error",
    }
    with pytest.raises(openai.APIError, match="the model failed on this request"):
        list(odd_client.completions.create(model="odd", prompt=[5, 0], max_tokens=64, stream=True))
    assert said + "".join(chunk.choices[0].text for chunk in stream) == alone
    assert odd.metrics()["dparallel_failed_total"] == before + 2
    assert "NaN" in odd.log.read_text()  # for who runs the server


@pytest.mark.slow
@pytest.mark.parametrize("grace", [60, 0])
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_signals_in_mid_stream(odd_model: Path, grace: int, how: signal.Signals) -> None:
    """What runs is finished in the time of grace, or ends with an error; nothing new is taken."""
    options = ("--name", "odd", "--policy", "one", "--lanes", 1, "--grace", grace)
    with server(odd_model, *options) as served:
        client = OpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0, timeout=120)
        settings = {"model": "odd", "prompt": [5, 6], "max_tokens": 300 if grace else 1900}
        stream = iter(client.completions.create(stream=True, **settings))
        said = next(stream).choices[0].text
        served.process.send_signal(how)
        until(lambda: "Shutting down" in served.log.read_text())
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", served.port), timeout=5)
        if grace:
            chunks = list(stream)
            said += "".join(chunk.choices[0].text for chunk in chunks)
            assert chunks[-1].choices[0].finish_reason == "length"
            assert len(said.strip(text.INCOMPLETE)) == 299
        else:
            with pytest.raises(openai.APIError, match="shutting down") as found:
                list(stream)
            assert found.value.code == "shutting_down"
        code = served.process.wait(30)
        assert code == (-signal.SIGTERM if how == signal.SIGTERM else 0)
        assert "Traceback" not in served.log.read_text()


@pytest.mark.slow
def test_a_waiting_request_is_told_of_the_end(odd_model: Path) -> None:
    with server(odd_model, "--name", "odd", "--policy", "one", "--grace", 0.2) as served:

        async def run() -> list[Any]:
            url = f"{served.url}/v1"
            async with AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=60) as client:
                ask = client.completions.create
                asked = [
                    asyncio.ensure_future(ask(model="odd", prompt=[5, i], max_tokens=1900))
                    for i in range(1, 4)
                ]
                while served.metrics()["dparallel_active"] < 3:
                    await asyncio.sleep(0.05)
                served.process.terminate()
                return await asyncio.gather(*asked, return_exceptions=True)

        for error in asyncio.run(run()):
            assert isinstance(error, openai.InternalServerError)
            assert (error.status_code, error.code) == (503, "shutting_down")


# --- many at once -------------------------------------------------------------------------------


@pytest.mark.slow
def test_200_clients_at_once(served: Served, student: tuple[Any, Any]) -> None:
    """None is lost, none mixed up, and memory does not grow with their number."""
    expected, held = decoded_together(*student), []
    assert len(set(expected)) > 150
    began = served.metrics()["dparallel_completed_total"]
    for _ in range(2):
        replies = ask_all(served, MODEL, PROMPTS)
        assert [reply.text for reply in replies] == expected
        found = served.metrics()
        held.append(found["process_resident_memory_bytes"])
    assert found["dparallel_completed_total"] - began == 400
    assert found["dparallel_active"] == found["dparallel_waiting"] == found["dparallel_pages_used"] == 0
    assert held[-1] - held[0] < 32 * 2**20
    for field in ("first", "seconds"):
        times = [getattr(reply, field) for reply in replies]
        assert 0 < percentile(times, 0.5) <= percentile(times, 0.95) < 120


def decoded_together(model: Any, tokenizer: Any) -> list[str]:
    """What one call of `decode` makes of all prompts."""
    ids = [torch.tensor(tokenizer.encode(prompt).ids) for prompt in PROMPTS]
    out = dx.decode(model, ids, gen_length=64, block_length=BLOCK, cache="dual", threshold=0.5, eos_id=EOS)
    return [tokenizer.decode(response.tolist()) for response in out.responses]


def test_metrics(served: Served, client: OpenAI) -> None:
    before, usage = served.metrics(), chat(client).usage
    after = served.metrics()

    def more(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert more("dparallel_http_requests_total{/v1/chat/completions,200}") == 1
    assert more("dparallel_completed_total") == 1
    assert more("dparallel_tokens_total") == usage.completion_tokens
    assert more("dparallel_prompt_tokens_total") == usage.prompt_tokens
    assert more("dparallel_forwards_total") == more("dparallel_sequence_passes_total") == usage.forward_passes
    assert more("dparallel_reused_tokens_total") == 0
    for name in ("first_block_seconds", "request_seconds", "waiting_seconds", "tokens_per_pass"):
        assert more(f"dparallel_{name}_count") == 1
        assert after[f"dparallel_{name}_bucket{{+Inf}}"] == after[f"dparallel_{name}_count"]
    assert more("dparallel_first_block_seconds_sum") < more("dparallel_request_seconds_sum") + 0.1
    assert more("dparallel_tokens_per_pass_sum") == pytest.approx(
        usage.completion_tokens / usage.forward_passes
    )
    assert after["dparallel_pages"] > 0
    assert after["dparallel_closed"] == 0
    assert after["dparallel_pages_kept"] >= 0


# --- slow, silent and many ----------------------------------------------------------------------


def test_half_sent_requests_keep_nobody_out() -> None:
    """160 of each kind where 128 files may be open: /health answers throughout, and a text is right after."""
    kinds = (b"POST /v1/completions HT", head("Content-Length: 500") + b'{"mod', b"")
    with server(MODEL, "--block-length", BLOCK, "--cache", "dual", files=128) as served:
        before = exchange(served, "POST", "/v1/completions", FIRST)
        with contextlib.ExitStack() as held:
            for number in range(160 * len(kinds)):
                wire = held.enter_context(socket.create_connection(("127.0.0.1", served.port), timeout=10))
                with contextlib.suppress(OSError):
                    wire.sendall(kinds[number // 160])
                if number % 8 == 7:
                    assert exchange(served, "GET", "/health", key=None)[0] == 200
            after = exchange(served, "POST", "/v1/completions", FIRST)
            assert (before[0], after[0]) == (200, 200)
            assert json.loads(after[2])["choices"] == json.loads(before[2])["choices"]
        lines = [line for line in served.log.read_text().splitlines() if "/health" not in line]
        assert len(lines) < 30, lines
        assert max(map(len, lines)) < 200
        until(lambda: served.metrics()["process_open_fds"] < 40)


FIRST = {"model": MODEL, "prompt": PROMPT, "max_tokens": 8}


def test_each_connection_has_an_end() -> None:
    """Silent ones, those with half a head, those that trickle, and those that do not take their answers."""
    with serving(body_seconds=0.4, send_buffer=4096) as here:
        began = time.monotonic()
        silent, half, trickling = (here.connect() for _ in range(3))
        greedy = socket.socket()
        greedy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        greedy.connect(("127.0.0.1", here.port))
        half.sendall(b"POST /v1/completions HTTP/1.1\r\nHo")
        greedy.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 60)
        late = here.connect()
        late.sendall(post("/v1/completions", b"{}")[:-1])
        assert b" 408 " in all_of(late)
        with pytest.raises(OSError, match=r"reset|Broken pipe"):  # noqa: PT012
            for _ in range(200):
                trickling.sendall(b"a")
                time.sleep(0.05)
        assert all_of(silent) == all_of(half) == b""
        until(lambda: not here.server.server_state.connections, 10)
        assert time.monotonic() - began < 8
        for wire in (silent, half, trickling, greedy, late):
            wire.close()
        assert here.ask(FIRST)[0] == 200
        assert not here.faults()


def test_more_requests_than_connections_are_for(odd_model: Path) -> None:
    """Some stay free: who is too much is told so, and /health answers."""
    loaded = registry.load(str(odd_model))
    with serving(loaded, odd_model, {"cache": "none"}, max_connections=6, max_length=2048) as here:
        slow = json.dumps({"model": MODEL, "prompt": [5, 6], "max_tokens": 1500, "policy": "one"}).encode()
        with contextlib.ExitStack() as held:
            for _ in range(3):
                held.enter_context(here.connect()).sendall(post("/v1/completions", slow))
            until(lambda: here.service.engine.stats.active == 3)
            for _ in range(20):  # they make place for each other
                held.enter_context(here.connect()).sendall(b"POST")
            status, answer = here.ask({**FIRST, "prompt": [5, 6]})
            assert (status, answer["error"]["code"]) == (429, "full")
            assert here.get("/health")[0] == 200
            assert here.service.engine.stats.active == 3
        here.settles()
        assert here.ask({**FIRST, "prompt": [5, 6]})[0] == 200


def test_connections_beyond_the_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [(256, 4096)]
    monkeypatch.setattr("resource.getrlimit", lambda _: limits[0])
    most = connections.most_connections(None)
    assert 100 < most < 256 - connections.SPARE
    assert connections.most_connections(most - 20) == most - 20
    with pytest.raises(
        ValueError, match=rf"max_connections: .* since 256 files may be open .*, got {most + 20}"
    ):
        connections.most_connections(most + 20)
    limits[0] = (32, 4096)
    with pytest.raises(ValueError, match=r"max_connections: expected at most 0, since 32 files"):
        connections.most_connections(None)
    limits[0] = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    assert connections.most_connections(None) == connections.MOST


def test_the_log_is_bounded() -> None:
    """In the length of a line, and in lines of a kind; what is left out is counted."""
    found: list[logging.LogRecord] = []
    bound = connections.Bounded()

    def log(second: float, name: str, message: str, *args: Any) -> bool:
        record = logging.makeLogRecord(
            {"name": name, "msg": message, "args": args, "created": 1000.0 + second}
        )
        found.append(record)
        return bound.filter(record)

    assert sum(log(i / 1000, "uvicorn.error", "Invalid HTTP request received.") for i in range(2000)) < 530
    assert log(2, "uvicorn.error", "Another %s", "x" * 10000)
    assert len(found[-1].getMessage()) == 500
    asked = ("127.0.0.1:1", "GET", "/" + "a" * 9000, "1.1")
    assert sum(log(3, "uvicorn.access", '%s - "%s %s HTTP/%s" %d', *asked, 200) for _ in range(1000)) == 500
    assert log(3, "uvicorn.access", '%s - "%s %s HTTP/%s" %d', *asked, 401)
    assert len(found[-1].getMessage()) < 300
    assert log(4, "uvicorn.access", '%s - "%s %s HTTP/%s" %d', *asked, 200)
    assert "(500 more such lines were left out)" in found[-1].getMessage()
    assert log(9, "uvicorn.error", "Invalid HTTP request received.")
    assert "more such lines were left out" in found[-1].getMessage()


def test_garbage_behind_a_request_is_no_fault() -> None:
    """A body that is no body, behind a head that is answered at once; and after an answer."""
    bad = b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"
    with serving(keys=("k",)) as here:
        for sent in (
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n" + bad,
            b"GET /health HTTP/1.1\r\nHost: x\r\n" + bad,
            b"HEAD /health HTTP/1.1\r\nHost: x\r\n\r\nrubbish\r\n\r\n",
            b"\x16\x03\x01\r\n\r\n",
        ):
            assert re.findall(rb"HTTP/1.1 (\d+) ", here.exchange(sent))[-1] == b"400"
        assert answer_of(here.exchange(sent))[1]["error"]["type"] == "invalid_request_error"
        assert not here.faults()


# --- texts that take long -----------------------------------------------------------------------


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
    began = time.perf_counter()
    made.encode_batch([long])
    alone = time.perf_counter() - began
    assert alone > 0.1
    model = registry.load(str(odd_model))[0]
    with serving((model, made), place, max_length=2**15) as here:
        stopping, answers = threading.Event(), []

        def send() -> None:
            while not stopping.is_set():
                answers.append(here.ask({"model": MODEL, "prompt": long}))

        senders = [threading.Thread(target=send) for _ in range(2)]
        for sender in senders:
            sender.start()
        time.sleep(0.1)
        times, ends = [], time.monotonic() + 1.5
        while time.monotonic() < ends:
            began = time.perf_counter()
            assert here.get("/health")[0] == 200
            times.append(time.perf_counter() - began)
        stopping.set()
        for sender in senders:
            sender.join()
        assert percentile(times, 0.5) < alone / 4, (times, alone)
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
            assert (
                answer["error"]["message"]
                == f"{param}: expected at most 8192 characters, for 256 tokens, got 8193"
            )
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
    with pytest.raises(ValidationError, match="expected at most 4096 prompts, got 200000"):
        CompletionRequest.model_validate({"model": "x", "prompt": [[1]] * 200000})


# --- chat templates -----------------------------------------------------------------------------

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
    monkeypatch.setattr(templates, "SECONDS", 0.2)
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
    with serving(student) as here:
        status, answer = here.ask({**asked, "chat_template_kwargs": {"enable_thinking": True}}, path)
        assert (status, answer["error"]["param"]) == (400, "chat_template_kwargs")


def test_a_template_without_end_stops_nobody(with_template: Path, student: tuple[Any, Any]) -> None:
    """Other prompts are encoded meanwhile, and the server ends in its time of grace."""
    path, asked = "/v1/chat/completions", {"model": MODEL, "messages": [{"role": "user", "content": PROMPT}]}
    endless = json.dumps({**asked, "chat_template_kwargs": {"loop_it": True}}).encode()
    with serving(student, with_template, grace=0.2) as here, contextlib.ExitStack() as held:
        wires = [held.enter_context(here.connect()) for _ in range(10)]
        for wire in wires:
            wire.sendall(post(path, endless))
        until(lambda: here.gate.answering == 10)
        began = time.monotonic()
        assert here.ask({**FIRST, "max_tokens": 2})[0] == 200
        assert time.monotonic() - began < 2
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
    fields = described["components"]["schemas"]["ErrorFields"]
    assert set(fields["required"]) == set(ApiError(400, "").body["error"])


def test_what_a_request_does_not_say_is_as_the_config(student: tuple[Any, Any]) -> None:
    model, tokenizer = student
    ids = tokenizer.encode(PROMPT).ids
    ended = text.endings(registry.directory_of(MODEL), tokenizer)
    config = {"rule": "confidence:0.6", "temperature": 0.7, "top_k": 3, "seed": 5, "gen_length": 24}
    own = {**config, "block_length": BLOCK, "cache": "dual", "stop": [[9, 9, 9]]}
    with serving(student, engine=own) as here:

        def ask(**request: Any) -> list[int]:
            status, answer = here.ask({"model": MODEL, "prompt": ids, "logprobs": 0, **request})
            assert status == 200, answer
            return [answer["choices"][0]["text"], answer["usage"]["forward_passes"]]

        def expected(**fields: Any) -> list[Any]:
            stop = [*own["stop"], *ended["stop"]]
            asked = dx.DecodeConfig(**{**own, "stop": stop, "eos_id": ended["eos_id"]})
            rule = fields.pop("rule", asked.rule)
            out = dx.decode(model, ids, asked.with_rule(rule, **{**fields, "seed": [fields.get("seed", 5)]}))
            return [tokenizer.decode(out.responses[0][: int(out.kept)].tolist()), int(out.nfe)]

        assert ask() == ask() == expected()
        assert ask(seed=6, top_k=-1, top_p=0.5) == expected(seed=6, top_k=0, top_p=0.5)
        assert ask(temperature=0, max_tokens=16) == expected(temperature=0.0, gen_length=16)
        assert ask(temperature=0, policy="one") == expected(temperature=0.0, rule="one")
        assert ask(temperature=0, policy="credit") == expected(temperature=0.0, rule="credit")
        status, answer = here.ask({"model": MODEL, "prompt": ids, "policy": "credit"})
        assert (status, answer["error"]["param"]) == (400, "temperature")


# --- the command line ---------------------------------------------------------------------------


def test_a_file_of_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its fields are the engine's and the requests'; options stand instead of them."""
    found: list[dx.DecodeConfig] = []

    def run(self: runner.Server, sockets: Any = None) -> None:
        found.append(self.service.engine.config)

    monkeypatch.setattr(runner.Server, "run", run)
    file = tmp_path / "config.json"

    def serve(content: dict[str, Any], *options: str) -> dx.DecodeConfig:
        file.write_text(json.dumps(content))
        done = CliRunner().invoke(app, ["serve", "--port", "0", "--config", str(file), *options])
        assert done.exit_code == 0, done.output
        return found.pop()

    content = {
        "threshold": 0.8,
        "selector": "confidence",
        "min_commit": 2,
        "cache": "prefix",
        "block_length": 16,
    }
    config = serve(content)
    assert content.items() <= config.to_dict().items()
    assert (config.rule, config.gen_length) == (None, 64)
    config = serve(content, "--policy", "margin:0.5", "--block-length", "8", "--cache", "none")
    assert (config.rule, config.threshold, config.min_commit) == ("margin:0.5", None, 1)
    assert (config.block_length, config.cache) == (8, "none")
    config = serve({"gen_length": 20, "temperature": 0.5})
    assert (config.rule, config.gen_length, config.temperature) == ("entropy:0.5", 20, 0.5)
    for wrong, message in (
        ({"treshold": 0.5}, "config: {file}: expected fields of DecodeConfig, got 'treshold'. Did you mean"),
        ({"threshold": "x"}, "config: {file}: threshold: expected a number"),
        ({"cache": "block"}, "cache: expected"),
        ({"record": True}, "record: an engine keeps no trajectory"),
        ({"gen_length": [5, 6]}, "gen_length: expected a number or one for each of 1, got 2"),
    ):
        file.write_text(json.dumps(wrong))
        done = CliRunner().invoke(app, ["serve", "--port", "0", "--config", str(file)])
        assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
        assert message.format(file=file) in done.stderr


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--policy", "x"), "policy: expected"),
        (("--model", "nowhere"), "model: 'nowhere'"),
        (("--lanes", "0"), "lanes: expected"),
        (("--cache", "all"), "cache: expected"),
        (("--api-key", "a", "--api-key-file", "b"), "api_key: not beside"),
        (("--api-key-file", "nowhere"), "nowhere"),
        (("--api-key", ""), "api_key: expected a key"),
        (("--api-key", "  "), "api_key: expected a key"),
        (("--api-key", "--fp8"), "api_key: expected a key, got the option --fp8"),
        (("--api-key-file", ""), "api_key_file: "),
        (("--host", ""), "host: expected a name or an address (0.0.0.0: every one), got an empty one"),
        (("--name", " "), "name: expected the model's name, got an empty one"),
        (("--model", ""), "model: "),
        (("--device", ""), "device: expected"),
        (("--port", "99999"), "port: expected 0 to 65535, got 99999"),
        (("--port", "-1"), "port: expected 0 to 65535, got -1"),
        (("--host", "a..b"), "host: 'a..b' does not resolve"),
        (("--host", "192.0.2.1"), "host: '192.0.2.1' is no address of this machine"),
        (("--log-level", "loud"), "log_level: expected one of"),
        (("--grace", "-1"), "grace: expected seconds >= 0, got -1"),
        (("--max-choices", "0"), "max_choices: expected a whole number >= 1, got 0"),
        (("--grace", "nan"), "grace: expected seconds >= 0, got nan"),
        (("--grace", "inf"), "grace: expected seconds >= 0, got inf"),
        (("--max-length", "0"), "max_length: expected a whole number >= 1, got 0"),
        (
            ("--max-length", str(2**20 + 1)),
            "max_length: expected a whole number >= 1 and <= 1048576, got 1048577",
        ),
        (("--max-body", "-1"), "max_body: expected a whole number >= 1, got -1"),
        (("--max-connections", "1"), "max_connections: expected a whole number >= 2, got 1"),
        (("--max-connections", "1000000"), "max_connections: expected at most"),
        (("--max-waiting", "0"), "max_waiting: expected a whole number >= 1, got 0"),
        (("--lanes", str(10**20)), "lanes"),
        (("--block-length", "0"), "block_length: expected a whole number >= 1, got 0"),
        (("--mask-id", "-1"), "mask_id: expected an id below"),
        (("--policy", "confidence:nan"), "policy: expected"),
        (("--policy", "steps:0"), "policy: expected"),
        (("--cors-origin", "example.org"), "cors_origin: expected '*' or an origin"),
        (("--cors-origin", "https://example.org/page"), "cors_origin: expected '*' or an origin"),
        (("--cors-origin", "https://Example.org"), "cors_origin: expected '*' or an origin"),
    ],
)
def test_bad_options_are_one_line(args: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: Any) -> None:
        raise AssertionError("it serves")

    monkeypatch.setattr(runner.Server, "run", run)
    found = CliRunner().invoke(app, ["serve", *args])
    assert (found.exit_code, found.stderr.count("\n")) == (2, 1)
    assert said in found.stderr


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf\r\n", b"# nothing\r\n  # yet"])
def test_an_empty_file_of_keys_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "keys").write_bytes(content)
    with pytest.raises(ValueError, match=r"api_key_file: .* holds no key"):
        read_keys(tmp_path / "keys")


def test_a_file_of_keys_as_people_write_it(tmp_path: Path) -> None:
    """With a byte order mark, of Windows, with blanks and comments."""
    file = tmp_path / "keys"
    file.write_bytes("\ufeffsk-1\r\n\r\n# of the tests\r\n  sk-2\t # mine\r\nsk#3 \rключ".encode())
    assert read_keys(file) == ("sk-1", "sk-2", "sk#3", "ключ")
    for content, said in ((b"a\x00b", "key 1 has others"), (b"\xff\xfea\x00", "is not UTF-8 text")):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=said):
            read_keys(file)
    with pytest.raises(ValueError, match="api_key_file"):
        read_keys(tmp_path)


def test_keys_of_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("file")
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert find_keys(None, None) == ()
    monkeypatch.setenv(KEY_VARIABLE, " sk-1\nsk-2 ")
    assert find_keys(None, None) == ("sk-1", "sk-2")
    assert find_keys(" given ", None) == ("given",)
    assert find_keys(None, tmp_path / "keys") == ("file",)
    monkeypatch.setenv(KEY_VARIABLE, " ")
    found = CliRunner().invoke(app, ["serve"])
    assert (found.exit_code, found.stderr) == (
        2,
        "error: DPARALLEL_API_KEY: expected a key, got an empty one\n",
    )


def test_a_port_that_is_taken_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        found = CliRunner().invoke(app, ["serve", "--port", str(port)])
    assert (found.exit_code, found.stderr.count("\n")) == (2, 1)
    assert f"port: {port} of '127.0.0.1' is in use already" in found.stderr


def test_a_port_on_which_another_listens_first_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that begin at once both get the port, and the slower one learns it with its model loaded."""
    (faster,) = listen("127.0.0.1", 0)
    with faster:
        port = faster.getsockname()[1]
        (slower,) = listen("127.0.0.1", port)
        faster.listen()
        monkeypatch.setattr(runner, "listen", lambda *_: [slower])
        found = CliRunner().invoke(
            app, ["serve", "--model", MODEL, "--log-level", "error", "--port", str(port)]
        )
    assert found.exit_code == 2
    assert found.stderr.splitlines()[-1].startswith(f"error: port: {port} of '127.0.0.1' is in use already")
    assert "Traceback" not in found.output


def test_a_missing_extra_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import dparallel

    monkeypatch.delattr(dparallel, "serving")
    for name in [name for name in sys.modules if name.startswith("dparallel.serving")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    found = CliRunner().invoke(app, ["serve"])
    assert (found.exit_code, found.stderr.count("\n")) == (2, 1)
    assert 'no fastapi; pip install ".[cli,serve]"' in found.stderr


def test_addresses_of_a_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every one that the machine has, at one port; names that do not resolve are named."""
    for host in ("localhost", "127.0.0.1", ""):
        sockets = listen(host, 0)
        assert len({one.getsockname()[1] for one in sockets}) == 1
        assert any(one.family == socket.AF_INET for one in sockets)
        for one in sockets:
            one.close()

    def unknown(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(ValueError, match=r"host: 'nowhere' does not resolve \(.*not known"):
        listen("nowhere", 0)
    said = str(unusable("h", 80, OSError(errno.EACCES, "Permission denied")))
    assert said == "port: 80 of 'h' cannot be had (Permission denied)"
