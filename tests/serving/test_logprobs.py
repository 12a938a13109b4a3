"""Log-probabilities of an answer, of every endpoint."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from asking import BLOCK, EOS, MODEL, PROMPT, PROMPTS, chat
from dparallel import registry, text
from dparallel.serving import logprobs
from openai import OpenAI
from server_here import serving

import dparallel_ext as dx

pytest_plugins = ["servers"]


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
    with_top = chat(client, max_tokens=64, logprobs=True, top_logprobs=6, **asked).choices[0].logprobs.content
    assert [one.token for one in with_top] == [one.token for one in found]
    for one in with_top:
        assert len(one.top_logprobs) == min(6, settings.get("top_k", 6)) or settings.get("top_p")
        assert {each.token: each.logprob for each in one.top_logprobs}[one.token] == one.logprob
        assert all(bytes(each.bytes).decode() == each.token for each in one.top_logprobs)
        assert sorted(one.top_logprobs, key=lambda each: -each.logprob) == one.top_logprobs
        if not settings:  # the tokens are then the most probable ones
            assert one.top_logprobs[0].token == one.token
    streamed = []
    for chunk in chat(client, max_tokens=64, logprobs=True, stream=True, **asked):
        streamed += chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else []
    assert [one.token for one in streamed] == [one.token for one in found]
    # But for rounding: another request's last pass may be shared, see the test below.
    assert [one.logprob for one in streamed] == pytest.approx(values, abs=1e-4)
    prompt = {"model": MODEL, "prompt": PROMPT, "max_tokens": 64, **asked}
    whole = client.completions.create(logprobs=0, **prompt).choices[0]
    assert whole.text == said
    assert whole.logprobs.tokens == [one.token for one in found]
    assert whole.logprobs.token_logprobs == pytest.approx(values, abs=1e-4)
    starts = whole.logprobs.text_offset
    assert all(said.startswith(*pair) for pair in zip(whole.logprobs.tokens, starts, strict=True))
    assert whole.logprobs.top_logprobs is None
    two = client.completions.create(logprobs=2, **prompt).choices[0].logprobs
    for token, value, listed in zip(two.tokens, two.token_logprobs, two.top_logprobs, strict=True):
        assert listed[token] == value  # a third one if it is none of the two
        assert len(listed) in (1, 2, 2 + (token not in [*listed][:2]))
        assert [*listed.values()] == sorted(listed.values(), reverse=True)
    offsets = []
    for chunk in client.completions.create(logprobs=0, stream=True, **prompt):
        offsets += chunk.choices[0].logprobs.text_offset if chunk.choices[0].logprobs else []
    assert offsets == starts


def test_batch_invariant_answers_are_the_same_to_the_bit() -> None:
    """Log-probabilities too, in 16 bits, whole and streamed, whatever else is asked meanwhile."""
    loaded = registry.load(MODEL, dtype=torch.bfloat16)
    settings: dict[str, Any] = {"model": MODEL, "logprobs": 0, "max_tokens": 32, "n": 2, "temperature": 1.0}
    asked = [{**settings, "prompt": prompt, "seed": seed} for seed, prompt in enumerate(PROMPTS[:6])]
    with serving(loaded, engine={"batch_invariant": True}) as here:
        client = OpenAI(base_url=f"{here.url}/v1", api_key="-")

        def whole(body: dict[str, Any]) -> list[tuple[str, float]]:
            choices = client.completions.create(**body).choices
            scored = [choice.logprobs for choice in choices]
            return [pair for one in scored for pair in zip(one.tokens, one.token_logprobs, strict=True)]

        def streamed(body: dict[str, Any]) -> list[tuple[str, float]]:
            pairs: list[list[tuple[str, float]]] = [[], []]
            for chunk in client.completions.create(**body, stream=True):
                for choice in chunk.choices:
                    if one := choice.logprobs:
                        pairs[choice.index] += zip(one.tokens, one.token_logprobs, strict=True)
            return [*pairs[0], *pairs[1]]

        alone = [whole(body) for body in asked]
        with ThreadPoolExecutor(6) as pool:
            assert list(pool.map(streamed, asked)) == alone
            assert list(pool.map(whole, asked)) == alone


def test_logprobs_end_where_the_tokens_are_counted(client: OpenAI) -> None:
    stop = {"stop": ["= "], "max_tokens": 64}
    answer = client.completions.create(model=MODEL, prompt=[PROMPT, PROMPTS[1]], logprobs=1, n=2, **stop)
    assert sum(len(one.logprobs.tokens) for one in answer.choices) == answer.usage.completion_tokens
    for one in answer.choices:
        (first, *_), (value, *_) = one.logprobs.tokens, one.logprobs.token_logprobs
        assert one.logprobs.top_logprobs[0] == {first: value}
    assert all(one.logprobs is None for one in chat(client, logprobs=False).choices)


def test_logprobs_are_json() -> None:
    top = [[("a", float("-inf"))], [(text.INCOMPLETE, -2.0)]]
    one, other = logprobs.chat_logprobs([("a", float("-inf")), (text.INCOMPLETE, -1.0)], top)["content"]
    assert (one["logprob"], one["top_logprobs"][0]["logprob"], other["bytes"]) == (-9999.0, -9999.0, None)
    assert other["top_logprobs"][0]["bytes"] is None
    of_texts = logprobs.completion_logprobs([("a", -3.0)], [0], [[("b", -1.0), ("b", -2.0)]])["top_logprobs"]
    assert of_texts == [{"b": -1.0, "a": -3.0}]
