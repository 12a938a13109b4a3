"""Requests of any bytes: the server answers what is HTTP and JSON, names what is wrong, and goes on."""

from __future__ import annotations

import copy
import json
import random
import re
import string
from collections.abc import Iterator
from typing import Any

import pytest
from server_here import MODEL, Here, all_of, post, serving

PROMPT = "sam has 3 cups . each cup has 4 beads"
PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/responses")
FIRST = {"model": MODEL, "prompt": PROMPT, "max_tokens": 16}


@pytest.fixture(scope="module")
def here() -> Iterator[Here]:
    with serving(max_body=20000, max_choices=4) as running:
        yield running


@pytest.fixture(scope="module")
def expected(here: Here) -> Any:
    return here.ask(FIRST)[1]["choices"]


def check(here: Here, said: bytes) -> list[int]:
    """The statuses of what was answered."""
    statuses = [int(found) for found in re.findall(rb"(?:^|[}\n])HTTP/1\.1 (\d{3}) ", said)]
    assert all(status == 100 or status // 100 in (2, 4) or status == 503 for status in statuses), said[:2000]
    assert b"internal_error" not in said, said[:2000]
    assert not here.faults(), here.faults()[0]
    here.log.lines.clear()
    return statuses


def still_right(here: Here, expected: Any) -> None:
    status, answer = here.ask(FIRST)
    assert (status, answer["choices"]) == (200, expected)
    here.settles()


# --- bytes --------------------------------------------------------------------------------------

HEADERS = (
    "Host: x", "Host: ", "Connection: close", "Connection: keep-alive, upgrade", "Upgrade: websocket",
    "Expect: 100-continue", "Transfer-Encoding: chunked", "Transfer-Encoding: gzip", "Content-Length: 5",
    "Content-Length: -1", "Content-Length: 1e3",
    "Content-Length: 99999999999999999999999", "Content-Length: 0x10",
    "Content-Type: text/plain", "Content-Type: multipart/form-data; boundary=x", "Content-Type: \xff",
    "Content-Encoding: gzip", "Authorization: Bearer \xe9", "Origin: null", "Origin: http://a",
    "Accept-Encoding: *", "Range: bytes=0-", "Cookie: " + "a" * 3000, "X" * 400 + ": y", ": x", "bad header",
    "A: b\r\n folded", "A: \x00", "HTTP2-Settings: AAMAAABkAAQAAP__",
)  # fmt: skip
METHODS = ("GET", "POST", "HEAD", "PUT", "OPTIONS", "DELETE", "TRACE", "CONNECT", "PRI", "get", "P\xd6ST", "")
TARGETS = (
    *PATHS, "/", "*", "/health", "/metrics", "/v1/models", "/v1/models/" + "a" * 5000, "/v1/models/%00%ff",
    "/v1//completions/", "/../etc/passwd", "http://x/health", "//x", "/health?" + "a=b&" * 500, "/%", "x",
    "/openapi.json", "/docs", "/health\xff", "/he alth",
)  # fmt: skip


def chunked(rng: random.Random, body: bytes) -> bytes:
    out = b""
    while body:
        size = rng.randint(1, 400)
        part, body = body[:size], body[size:]
        name = rng.choice([b"%x", b"%X", b"000%x", b"%x;a=b"]) % len(part)
        out += name + b"\r\n" + part + rng.choice([b"\r\n"] * 9 + [b"", b"\n", b"xx\r\n"])
    return out + rng.choice(
        [b"0\r\n\r\n"] * 4 + [b"", b"0\r\n", b"-1\r\n\r\n", b"zz\r\n", b"0\r\nA: b\r\n\r\n"]
    )


def some_request(rng: random.Random) -> bytes:
    body = json.dumps({**FIRST, "max_tokens": rng.randint(1, 8), "stream": rng.random() < 0.3}).encode()
    if rng.random() < 0.3:
        return post(rng.choice(PATHS), body, close=rng.random() < 0.5)
    head = [
        f"{rng.choice(METHODS)} {rng.choice(TARGETS)} HTTP/{rng.choice(['1.1'] * 6 + ['1.0', '2.0', 'x'])}"
    ]
    head += rng.sample(HEADERS, rng.randint(0, 3))
    if rng.random() < 0.4:
        head.append("Transfer-Encoding: chunked")
        body = chunked(rng, body)
    elif rng.random() < 0.7:
        head.append(f"Content-Length: {len(body) + rng.choice([0, 0, 0, -5, 1, 5000, 10**9])}")
    if rng.random() < 0.7:
        head.append("Host: x")
    end = rng.choice(["\r\n"] * 8 + ["\n", "\r"])
    return end.join([*head, "", ""]).encode("latin-1") + body


def spoilt(rng: random.Random, sent: bytes) -> bytes:
    """With some bytes changed, left out, doubled or cut."""
    for _ in range(rng.randint(1, 3)):
        at, until = sorted(rng.randint(0, len(sent)) for _ in range(2))
        until = min(until, at + 30)
        how = rng.randint(0, 3)
        if how == 0:
            sent = sent[:at] + rng.randbytes(until - at) + sent[until:]
        elif how == 1:
            sent = sent[:at] + sent[until:]
        elif how == 2:
            sent = sent[:until] + sent[at:]
        else:
            sent = sent[:until]
    return sent


def some_bytes(rng: random.Random) -> bytes:
    kind = rng.random()
    if kind < 0.1:
        return rng.randbytes(rng.randint(1, 3000))
    if kind < 0.15:
        return b"\x16\x03\x01" + rng.randbytes(200)
    if kind < 0.2:
        return rng.choice([b"\r\n", b"\x00", b"a", b"POST "]) * rng.choice([1, 100, 20000])
    sent = b"".join(some_request(rng) for _ in range(rng.choice([1, 1, 1, 2, 5])))
    return spoilt(rng, sent) if rng.random() < 0.5 else sent


def test_bytes(attack: Any, here: Here, expected: Any) -> None:
    for rng in attack.cases(40):
        sent = some_bytes(rng)
        with here.connect(rng.choice([0.02, 0.02, 0.3])) as wire:
            try:
                while sent:
                    size = rng.choice([len(sent), len(sent), rng.randint(1, len(sent))])
                    wire.sendall(sent[:size])
                    sent = sent[size:]
            except OSError:
                pass  # it hung up in the middle
            said = all_of(wire)
        check(here, said)
        if attack.tried % 10 == 0:
            still_right(here, expected)
    still_right(here, expected)


# --- JSON ---------------------------------------------------------------------------------------

ODD = (
    None, True, False, 0, 1, -1, 2, 0.5, -0.0, 2**31, 2**63, -(2**63), 10**30, 1e308, 1e-320, float("inf"),
    float("nan"), "", "x", "\ud800", "\x00", "a" * 3000, "é\U0001f600", " ", [], [None], {}, {"a": 1}, [[]],
    ["a"], [1], [1.5], [[1, 2]], [True], ["a", 1],
    "entropy:0.5", "quota:3", "steps:8", "one", "confidence:nan",
    [{"role": "user", "content": "sam"}], [{"role": "user"}], [{}], {"include_usage": True}, "stop",
)  # fmt: skip
NAMES = (
    "model", "prompt", "messages", "suffix", "max_tokens", "max_completion_tokens", "n", "best_of",
    "temperature", "top_p", "top_k", "seed", "stop", "stop_token_ids", "ignore_eos", "stream",
    "stream_options",
    "stream_drafts", "policy", "logprobs", "top_logprobs", "echo", "tools", "logit_bias", "response_format",
    "tool_choice", "parallel_tool_calls", "input", "instructions", "max_output_tokens", "text", "include",
    "reasoning", "store",
    "chat_template_kwargs", "user", "metadata", "min_p", "unheard_of", "", "__class__", "\ud800",
)  # fmt: skip


def some_value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.random()
    if kind < 0.6 or depth > 3:
        return copy.deepcopy(rng.choice(ODD))
    if kind < 0.7:
        return rng.choice([1, -1]) * rng.randint(0, 10 ** rng.choice([1, 3, 20]))
    if kind < 0.8:
        return "".join(rng.choices(string.printable + "é\udc80", k=rng.randint(0, 40)))
    if kind < 0.9:
        return [some_value(rng, depth + 1) for _ in range(rng.randint(0, 4))]
    return {rng.choice(NAMES): some_value(rng, depth + 1) for _ in range(rng.randint(0, 3))}


def some_json(rng: random.Random) -> tuple[str, bytes]:
    path = rng.choice(PATHS)
    asked: dict[str, Any] = {"model": MODEL, "max_output_tokens" if path == PATHS[2] else "max_tokens": 4}
    messages = [{"role": "user", "content": "sam"}]
    asked |= dict(zip(PATHS, ({"prompt": "sam"}, {"messages": messages}, {"input": messages}), strict=True))[
        path
    ]
    for _ in range(rng.randint(0, 3)):
        asked[rng.choice(NAMES)] = some_value(rng)
    if rng.random() < 0.2 and (asked.get("messages") is messages or asked.get("input") is messages):
        messages.append({rng.choice(["role", "content", "name", "type", "x"]): some_value(rng)})
    body = json.dumps(asked, ensure_ascii=rng.random() < 0.7).encode("utf-8", "surrogatepass")
    kind = rng.random()
    if kind < 0.05:  # the same key twice
        body = body[:-1] + b', "max_tokens": 3, "model": ' + json.dumps(MODEL).encode() + b"}"
    elif kind < 0.1:
        body = body[: rng.randint(0, len(body))]
    elif kind < 0.15:
        depth = rng.choice([10, 500, 900, 5000])
        body = b'{"model": "x", "tools": ' + b"[" * depth + b"]" * rng.choice([depth, depth - 1]) + b"}"
    elif kind < 0.18:
        body = b'{"seed": ' + b"9" * rng.choice([25, 5000]) + b"}"
    elif kind < 0.2:
        body = rng.choice([b"\xef\xbb\xbf", b"\xff\xfe"]) + body
    elif kind < 0.22:
        body = body.decode("utf-8", "surrogatepass").encode("utf-16", "surrogatepass")
    return path, body


def test_json(attack: Any, here: Here, expected: Any) -> None:
    for rng in attack.cases(120):
        path, body = some_json(rng)
        said = here.exchange(post(path, body))
        statuses = check(here, said)
        assert len(statuses) == 1, said
        if statuses[0] != 200:
            error = json.loads(said.partition(b"\r\n\r\n")[2])["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert error["message"]
        if attack.tried % 40 == 0:
            still_right(here, expected)
    still_right(here, expected)
