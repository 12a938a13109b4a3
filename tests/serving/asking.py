"""How the tests here ask a server: the openai package, urllib and bare sockets; and what `decode` says."""

from __future__ import annotations

import http.client
import itertools
import json
import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from dparallel.toy import tasks
from openai import BadRequestError, OpenAI
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from server_here import BLOCK, EOS, MODEL, Here

import dparallel_ext as dx
from benchmarks.serving import KEY, Served

PROMPTS = [p.prompt for p in itertools.islice(tasks.problems("held_out", seed=11), 200)]
VOCABULARY = len(tasks.vocabulary())
PROMPT = PROMPTS[0]
PAGE = "https://page.example"
FIRST = {"model": MODEL, "prompt": PROMPT, "max_tokens": 8}


def enumerate_bytes() -> Iterator[tuple[int, str]]:
    """The characters that stand for bytes in byte-level BPE, as GPT-2's."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in shown]
    yield from ((b, chr(b)) for b in shown)
    yield from ((b, chr(256 + i)) for i, b in enumerate(hidden))


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


EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
ORDER = re.compile(
    "created in_progress "
    "(output_item.added (content_part.added (output_text.delta )+output_text.done content_part.done "
    "|(function_call_arguments.delta )*function_call_arguments.done )output_item.done )+"
    "(completed|incomplete) "
)


def responded(client: OpenAI, given: Any = PROMPT, **settings: Any) -> Any:
    """A response, whole, and the same as it streams: both are of the client's types, and the events come in
    their order."""
    asked: dict[str, Any] = {"model": MODEL, "input": given, **settings}
    whole = client.responses.create(**asked)
    events = [event.to_dict() for event in client.responses.create(**asked, stream=True)]
    of_items: dict[str, list[Any]] = {}
    for number, event in enumerate(events):
        EVENTS.validate_python(event)
        assert event["sequence_number"] == number
        if "output_index" in event:
            of_items.setdefault(str(event["output_index"]), []).append(event)
    names = [event["type"].removeprefix("response.") for event in events]
    assert ORDER.fullmatch(" ".join([*names, ""])), names
    last = events[-1]["response"]
    for item, said in zip(last["output"], of_items.values(), strict=True):
        assert said[-1]["item"] == item
        assert {event.get("item_id", item["id"]) for event in said} == {item["id"]}
        text = "".join(event.get("delta", "") for event in said)
        assert text == (item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"])
        assert all(text == event[key] for event in said for key in ("text", "arguments") if key in event)

    def lasting(response: dict[str, Any]) -> dict[str, Any]:
        output = [{**item, "id": "", "call_id": ""} for item in response["output"]]
        return {**response, "id": "", "created_at": 0, "completed_at": 0, "output": output}

    assert lasting(whole.to_dict()) == lasting(last)
    Response.model_validate(last)
    assert last["status"] == names[-1]
    return whole


@contextmanager
def bad_request(param: str, said: str = "") -> Iterator[None]:
    """A request is refused by a 400 whose text begins with the parameter's name and has `said` in it."""
    with pytest.raises(BadRequestError) as error:
        yield
    body: Any = error.value.body
    assert (body["param"], body["type"]) == (param, "invalid_request_error")
    assert body["message"].startswith((f"{param}: ", f"{param}."))
    assert said in body["message"]


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


def raw(served: Here | Served, path: str, body: bytes | None = None, **headers: str) -> tuple[int, Any]:
    """Status and JSON of a request of any shape."""
    sent = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json", **headers}
    request = urllib.request.Request(served.url + path, body, {k: v for k, v in sent.items() if v})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def exchange(
    served: Here | Served, method: str, path: str, body: Any = None, key: str | None = KEY, **headers: str
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


def talk(served: Here | Served, *parts: bytes, end: bool = False) -> bytes:
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
