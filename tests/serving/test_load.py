"""Many requests at once, large ones, clients that leave, requests that fail; and what the metrics say.

Each server is a process of its own on a free port of the loopback interface.
"""

from __future__ import annotations

import asyncio
import json
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import openai
import pytest
import torch
from asking import BLOCK, EOS, MODEL, PAGE, PROMPTS, VOCABULARY, chat, exchange, head, talk, until
from dparallel import text
from dparallel.serving.metrics import Metrics
from openai import AsyncOpenAI, OpenAI

import dparallel_ext as dx
from benchmarks.serving import KEY, Served, ask_all, percentile, server

pytest_plugins = ["servers"]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with server(MODEL, "--block-length", BLOCK, "--cache", "dual", "--cors-origin", PAGE) as running:
        yield running


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


@pytest.mark.slow
def test_too_many_requests(odd: Served) -> None:
    """Two lanes and four places to wait: of twelve at once some are refused, and told when to come again."""

    async def ask(client: AsyncOpenAI) -> Any:
        return await client.completions.create(model="odd", prompt=[5, 6], max_tokens=32)

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


def test_clients_that_leave_cancel(odd: Served, odd_client: OpenAI) -> None:
    before = odd.metrics()["dparallel_cancelled_total"]
    settings = {"model": "odd", "prompt": [[5, 6], [7, 8]], "max_tokens": 1900}
    stream = odd_client.completions.create(stream=True, **settings)
    next(iter(stream))
    stream.close()
    until(lambda: odd.metrics()["dparallel_cancelled_total"] == before + 2)
    body = json.dumps(settings).encode()
    with socket.create_connection(("127.0.0.1", odd.port), timeout=10) as wire:
        wire.sendall(head(f"Content-Length: {len(body)}") + body)
        until(lambda: odd.metrics()["dparallel_active"] == 2)
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
def test_200_clients_at_once(served: Served, student: tuple[Any, Any]) -> None:
    """None is lost, none mixed up, and memory does not grow with their number."""
    expected, held = decoded_together(*student), []
    assert len(set(expected)) > 150
    began = served.metrics()["dparallel_completed_total"]
    for clients in (200, 30):
        replies = ask_all(served, MODEL, PROMPTS[:clients])
        assert [reply.text for reply in replies] == expected[:clients]
        found = served.metrics()
        held.append(found["process_resident_memory_bytes"])
    assert found["dparallel_completed_total"] - began == 230
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


def test_metrics_of_requests_and_the_wait_that_follows() -> None:
    """Of each request the mean counts the seconds in its lane, by a sixteenth."""
    stats = dict.fromkeys((each.name for each in fields(dx.EngineStats)), 0)
    shared = Metrics()
    engines = {
        name: SimpleNamespace(stats=dx.EngineStats(**stats | {"waiting": waiting, "active": active}))
        for name, waiting, active in (("a", 3, 2), ("b", 0, 0), ("c", 1000, 1))
    }
    a, b, c = (shared.add(name, engine) for name, engine in engines.items())  # type: ignore[arg-type]
    done = dx.Completion(
        [1] * 6, "length", 4, 4, prompt_length=1, reused=0, seconds_waiting=16.0, seconds=33.0
    )
    a.finished(done, 6)
    assert a.mean == 2.0
    assert (a.wait(), b.wait(), c.wait(), shared.wait()) == (4, 1, 60, 60)
    for name, value in (("request_seconds", 33), ("waiting_seconds", 16), ("tokens_per_pass", 1.5)):
        assert shared.registry.get_sample_value(f"dparallel_{name}_sum", {"model": "a"}) == value
    assert shared.registry.get_sample_value("dparallel_waiting", {"model": "c"}) == 1000


def test_metrics(served: Served, client: OpenAI) -> None:
    before, usage = served.metrics(), chat(client).usage
    for path in ("nowhere", "v1/models/none"):  # counted together, so that no client makes up labels
        with pytest.raises(urllib.error.HTTPError, match=r"40[14]"):
            urllib.request.urlopen(f"{served.url}/{path}")
    after = served.metrics()

    def more(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert more("dparallel_http_requests_total{/v1/chat/completions,200}") == 1
    refused = [name for name in after if name.startswith("dparallel_http_requests_total{other,40")]
    assert sum(map(more, refused)) == 2
    assert not any("nowhere" in name for name in after)
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
