"""The server as clients see it: the openai package, and bare sockets where that is too well-behaved.

Each server is a process of its own on a free port of the loopback interface.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import shutil
import signal
import socket
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
from dparallel import registry, serve, tasks, text
from dparallel.cli import app
from openai import AsyncOpenAI, OpenAI
from tokenizers import Tokenizer, decoders
from tokenizers import models as tokenizer_models
from typer.testing import CliRunner

import dparallel_ext as dx
from benchmarks.serving import KEY, Served, ask_all, percentile, server

MODEL, BLOCK, EOS = "builtin:student", 8, 1
PROMPTS = [p.prompt for p in itertools.islice(tasks.problems("held_out", seed=11), 200)]
VOCABULARY = len(tasks.vocabulary())
PROMPT = PROMPTS[0]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with server(MODEL, "--block-length", BLOCK, "--cache", "dual") as running:
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
        ({"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens", "not beside"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages", "one from the user"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages", "role"),
        ({"messages": [{"role": "user", "content": None}]}, "messages", "content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "parts"),
        ({"messages": [{"role": "user", "content": "a " * 300}]}, "messages", "at most 256 tokens"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]}, "tool_calls", "not supported"),
        ({"temperature": -0.1}, "temperature", "greater"),
        ({"temperature": 2.1}, "temperature", "less"),
        ({"temperature": "1"}, "temperature", "valid number"),
        ({"seed": 2**63}, "seed", "less than"),
        ({"n": 0}, "n", "greater"),
        ({"n": 65}, "n", "at most 64 responses, got 65"),
        ({"stop": ["a"] * 5}, "stop", "up to 4"),
        ({"stop": ""}, "stop", "none of them empty"),
        ({"stop": [1]}, "stop", "a string or up to 4"),
        ({"stream": "yes"}, "stream", "valid boolean"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream=true"),
        ({"logprobs": True}, "logprobs", "only false is supported"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "only [] is supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "only"),
        ({"top_p": 0.9}, "top_p", "only 1 is supported"),
        ({"frequency_penalty": 0.1}, "frequency_penalty", "only 0"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "only {} is supported"),
        ({"extra_body": {"min_p": 0.1}}, "min_p", "not supported"),
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
        ({"logprobs": 0}, "logprobs"),
        ({"echo": True}, "echo"),
        ({"suffix": ["x"]}, "suffix"),
        ({"best_of": 2}, "best_of"),
    ],
)
def test_bad_completions_are_named(client: OpenAI, settings: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as found:
        client.completions.create(**{"model": MODEL, "prompt": PROMPT, **settings})
    body: Any = found.value.body
    assert body["param"] == param
    assert body["message"].startswith(f"{param}: ") or body["message"].startswith(f"{param}.")


def test_neutral_values_are_accepted(client: OpenAI) -> None:
    harmless = {"user": "me", "metadata": {"a": "b"}, "safety_identifier": "x", "prompt_cache_key": "y"}
    chat(client, max_tokens=8, extra_body={**serve.NEUTRAL, **harmless, "unheard_of": None})


def test_requests_that_are_no_requests(served: Served) -> None:
    path, fine = "/v1/completions", {"model": MODEL, "prompt": "sam"}
    for body, said in (
        (b"{", "JSON"),
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
    assert raw(served, path, json.dumps(fine).encode(), **{"Content-Type": "text/plain"})[0] == 400
    assert raw(served, path)[0] == 405
    status, answer = raw(served, "/v1/embeddings", b"{}")
    assert status == 404
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in served.log.read_text()


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
        settings = serve.Settings("x", body_seconds=0.05)
        service: Any = SimpleNamespace(settings=settings, aborted=loop.create_future())
        service.metrics = SimpleNamespace(http=serve.Counter("x", "x", ["path", "status"], registry=None))
        gate, scope = serve.Gate(inner, service), {"type": "http", "path": "/health", "headers": []}
        begun = [{"type": "http.request", "body": b"{", "more_body": True}]

        async def receive() -> Any:
            return begun.pop() if begun else await asyncio.sleep(60)

        async def send(message: Any) -> None:
            raise AssertionError(message)

        with pytest.raises(serve.ApiError) as late:
            await gate(scope, receive, send)
        assert late.value.status_code == 408
        service.aborted.set_result(None)
        with pytest.raises(serve.ApiError) as stopped:
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
        settings = serve.Settings("x", max_length=64)
        place = registry.directory_of(MODEL)
        service = serve.Service(engine, model.shape.rows, tokenizer, place, settings)
        application = serve.make_app(service)
        async with application.router.lifespan_context(application):
            assert await ask(application, "GET", "/health", b"") == (200, {"status": "ok"})
            engine.close()
            assert await ask(application, "GET", "/health", b"") == (503, {"status": "closed"})
            body = json.dumps({"model": "x", "prompt": "sam"}).encode()
            status, answer = await ask(application, "POST", "/v1/completions", body)
            assert (status, answer["error"]["code"]) == (503, "closed")
            assert answer["error"]["type"] == "server_error"

    asyncio.run(run())


def test_too_many_requests(odd: Served) -> None:
    """Two lanes and four places to wait: of twelve at once some are refused, and told when to come again."""

    async def ask(client: AsyncOpenAI) -> Any:
        return await client.completions.create(model="odd", prompt=[5, 6], max_tokens=150)

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


@pytest.mark.parametrize("grace", [60, 0])
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_signals_in_mid_stream(odd_model: Path, grace: int, how: signal.Signals) -> None:
    """What runs is finished in the time of grace, or ends with an error; nothing new is taken."""
    options = ("--name", "odd", "--policy", "one", "--lanes", 1, "--grace", grace)
    with server(odd_model, *options) as served:
        client = OpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0, timeout=120)
        settings = {"model": "odd", "prompt": [5, 6], "max_tokens": 700 if grace else 1900}
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
            assert len(said.strip(text.INCOMPLETE)) == 699
        else:
            with pytest.raises(openai.APIError, match="shutting down") as found:
                list(stream)
            assert found.value.code == "shutting_down"
        code = served.process.wait(30)
        assert code == (-signal.SIGTERM if how == signal.SIGTERM else 0)
        assert "Traceback" not in served.log.read_text()


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


def test_200_clients_at_once(served: Served, student: tuple[Any, Any]) -> None:
    """None is lost, none mixed up, and memory does not grow with their number."""
    expected, held = decoded_together(*student), []
    assert len(set(expected)) > 150
    began = served.metrics()["dparallel_completed_total"]
    for _ in range(3):
        replies = ask_all(served, MODEL, PROMPTS)
        assert [reply.text for reply in replies] == expected
        found = served.metrics()
        held.append(found["process_resident_memory_bytes"])
    assert found["dparallel_completed_total"] - began == 600
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
    assert after["dparallel_pages_kept"] >= 0


# --- the command line ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--policy", "x"), "policy: expected"),
        (("--model", "nowhere"), "model: 'nowhere'"),
        (("--lanes", "0"), "lanes: expected"),
        (("--cache", "all"), "cache: expected"),
        (("--api-key", "a", "--api-key-file", "b"), "api_key: not beside"),
        (("--api-key-file", "nowhere"), "nowhere"),
    ],
)
def test_bad_options_are_one_line(args: tuple[str, ...], said: str) -> None:
    found = CliRunner().invoke(app, ["serve", *args])
    assert (found.exit_code, found.stderr.count("\n")) == (2, 1)
    assert said in found.stderr


def test_an_empty_file_of_keys_is_refused(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("\n \n")
    with pytest.raises(ValueError, match=r"api_key_file: .* holds no key"):
        serve.read_keys(tmp_path / "keys")
