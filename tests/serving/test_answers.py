"""What the server answers, as the openai package sees it: texts, streams, drafts."""

from __future__ import annotations

import asyncio
import itertools
import json
import urllib.error
import urllib.request
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from asking import BLOCK, EOS, MODEL, PROMPT, PROMPTS, bad_request, chat, decoded, joined, raw
from dparallel import registry, text
from dparallel.configs import parse_policy
from dparallel.serving.call import Call, Choice
from dparallel.toy import tasks
from openai import AsyncOpenAI, OpenAI
from server_here import Here, serving

import dparallel_ext as dx
from benchmarks.serving import KEY

pytest_plugins = ["servers"]


def test_models_and_health(served: Here, client: OpenAI) -> None:
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
        ({"suffix": "sam " * 250}, "suffix"),
    ):
        with bad_request(param):
            client.completions.create(**{**asked, **change})


def test_max_tokens_ends_an_answer(client: OpenAI, student: tuple[Any, Any]) -> None:
    said, tokens, _ = decoded(student, PROMPT, gen_length=5)
    for name in ("max_tokens", "max_completion_tokens"):
        answer = chat(client, **{name: 5})
        assert answer.choices[0].message.content == said
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == tokens == 5


@pytest.mark.parametrize("policy", ["one", "confidence:0.9", "entropy_bound:0.1", "steps:16"])
def test_policies(client: OpenAI, student: tuple[Any, Any], policy: str) -> None:
    said, _, passes = decoded(student, PROMPT, **{"threshold": None, **parse_policy(policy)})
    answer = chat(client, extra_body={"policy": policy})
    assert answer.choices[0].message.content == said
    assert answer.usage.forward_passes == passes


def test_several_choices_and_seeds(client: OpenAI, student: tuple[Any, Any]) -> None:
    def ask(**settings: Any) -> list[str]:
        answer = chat(client, n=4, temperature=1.5, **settings)
        assert answer.usage.prompt_tokens == len(PROMPT.split())
        return [choice.message.content for choice in answer.choices]

    assert ask(seed=5) == ask(seed=5)
    assert ask(seed=6)[:3] == ask(seed=5)[1:]
    assert ask(seed=2**63 - 1)[1:] == ask(seed=-(2**63))[:3] != ask(seed=0)[:3]
    assert ask(seed=-5)[0] == decoded(student, PROMPT, seed=[-5], temperature=1.5)[0]
    assert len({*ask(), *ask()}) > 1


def test_prompts_that_are_alike_get_samples_of_their_own(client: OpenAI) -> None:
    """As several choices do; with a seed an answer is the same whatever other prompts the request has."""

    def ask(prompts: list[str], **settings: Any) -> list[str]:
        answer = client.completions.create(
            model=MODEL, prompt=prompts, max_tokens=16, temperature=2.0, **settings
        )
        return [choice.text for choice in answer.choices]

    assert len(set(ask([PROMPT] * 4))) > 1
    assert ask([PROMPT] * 4, seed=5) == ask([PROMPT], seed=5) * 4


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
    options = {"include_usage": True, "continuous_usage_stats": True}  # as GuideLLM's
    counts = [chunk.usage.completion_tokens for chunk in chat(client, stream=True, stream_options=options)]
    assert (counts, counts[0], counts[-1]) == (sorted(counts), 0, usage.completion_tokens)
    assert 0 < counts[2] < counts[-1]


def test_a_stream_on_the_wire(served: Here) -> None:
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


def test_the_async_client(served: Here, student: tuple[Any, Any]) -> None:
    async def run() -> list[Any]:
        async with AsyncOpenAI(base_url=f"{served.url}/v1", api_key="another", timeout=120) as client:
            ask = client.completions.create
            return await asyncio.gather(*(ask(model=MODEL, prompt=prompt) for prompt in PROMPTS[:8]))

    answers = asyncio.run(run())
    assert [answer.choices[0].text for answer in answers] == [decoded(student, p)[0] for p in PROMPTS[:8]]


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
    """Of each block, however many there have been, and none of a block whose text it has; the text is
    whole."""
    ids = student[1].encode("sam has 3 cups").ids

    async def run() -> list[Any]:
        tell: list[Callable[[Any], None]] = []
        handle: Any = SimpleNamespace(
            subscribe=tell.append, cancel=lambda: None, logprobs=[], top_logprobs=[]
        )
        aborted = asyncio.get_running_loop().create_future()
        nothing = SimpleNamespace(observe=lambda _: None)
        metrics: Any = SimpleNamespace(first_block=nothing, finished=lambda *_: None)
        choice = Choice([1], 4, 0, text.TextStream(student[1]), [])

        def submit(choice: Any, draft: Callable[[Any], None]) -> Any:
            tell.append(draft)
            return handle

        call = Call(aborted, metrics, [choice], 1, submit)
        on_draft, on_event = tell
        for nfe in range(1, 1001):
            on_draft(dx.DraftEvent(nfe, 0, [None, None]))
        on_event(ids[:2])
        for nfe in range(1001, 1501):  # of a block that adds no token to the text
            on_draft(dx.DraftEvent(nfe, 2, [None, None]))
        for nfe in range(1501, 2001):
            on_draft(dx.DraftEvent(nfe, 3, [None, None]))
        on_event(ids[2:])
        on_event(dx.Completion(ids, "length", 2000, 2000, 1, 0, 0.0, 0.0))
        await asyncio.sleep(0)
        assert call.queue.qsize() == 6
        return [piece async for piece in call.pieces()]

    pieces = asyncio.run(run())
    assert [piece.draft and piece.draft.nfe for piece in pieces] == [1000, None, 1500, 2000, None, None]
    assert "".join(piece.text for piece in pieces) == "sam has 3 cups"


def test_what_a_request_does_not_say_is_as_the_config(student: tuple[Any, Any]) -> None:
    model, tokenizer = student
    ids = tokenizer.encode(PROMPT).ids
    config = {"rule": "confidence:0.6", "temperature": 0.7, "top_k": 3, "seed": 5, "gen_length": 24}
    own = {**config, "block_length": BLOCK, "cache": "dual", "stop": [[9, 9, 9]]}
    with serving(student, engine=own) as here:

        def ask(**request: Any) -> list[int]:
            status, answer = here.ask({"model": MODEL, "prompt": ids, "logprobs": 0, **request})
            assert status == 200, answer
            return [answer["choices"][0]["text"], answer["usage"]["forward_passes"]]

        def expected(**fields: Any) -> list[Any]:
            asked = dx.DecodeConfig(**own, eos_id=model.eos_ids)
            rule = fields.pop("rule", asked.rule)
            out = dx.decode(model, ids, asked.with_rule(rule, **{**fields, "seed": [fields.get("seed", 5)]}))
            return [tokenizer.decode(out.responses[0][: int(out.kept)].tolist()), int(out.nfe)]

        assert ask() == ask() == expected()
        assert ask(seed=6, top_k=-1, top_p=0.5) == expected(seed=6, top_k=0, top_p=0.5)
        assert ask(top_p=0) == expected(temperature=0.0)  # the most probable id is always kept
        assert ask(temperature=0, max_tokens=16) == expected(temperature=0.0, gen_length=16)
        assert ask(temperature=0, policy="one") == expected(temperature=0.0, rule="one")
        assert ask(temperature=0, policy="credit") == expected(temperature=0.0, rule="credit")
        status, answer = here.ask({"model": MODEL, "prompt": ids, "policy": "credit"})
        assert (status, answer["error"]["param"]) == (400, "temperature")


def test_a_verifier_decodes_from_left_to_right() -> None:
    """As `adaptive_decode` does, by passes; what belongs to blocks is refused."""
    teacher = "builtin:teacher"
    model, tokenizer = registry.load(teacher)
    judge = registry.load_verifier(registry.VERIFIER, model, tokenizer)
    ids = tokenizer.encode(PROMPT).ids
    out = dx.adaptive_decode(model, ids, verifier=judge, mixture=0.7, gen_length=64, eos_id=EOS)
    said = tokenizer.decode(out.responses[0][: int(out.kept)].tolist())
    engine = {"verifier": registry.VERIFIER, "mixture": 0.7}
    with serving((model, tokenizer), registry.directory_of(teacher), engine, name=teacher) as running:
        described = json.loads(running.get(f"/v1/models/{teacher}")[1])
        assert [described[key] for key in ("kind", "policy", "verifier")] == [
            "diffusion",
            None,
            registry.VERIFIER,
        ]
        asked = {"model": teacher, "prompt": PROMPT, "max_tokens": 64}
        status, answer = running.ask(asked)
        assert (status, answer["choices"][0]["text"]) == (200, said)
        assert answer["usage"]["forward_passes"] == int(out.nfe)
        with OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=60) as asking:
            texts, reasons, pieces = joined(
                asking.completions.create(model=teacher, prompt=PROMPT, max_tokens=64, stream=True)
            )
        assert (texts, reasons) == ({0: said}, {0: "stop"})
        assert 1 < pieces <= int(out.nfe)
        for name, value in (("policy", "one"), ("suffix", "so it is"), ("logprobs", 0)):
            status, answer = running.ask({**asked, name: value})
            assert (status, answer["error"]["param"]) == (400, name)
        assert "dparallel_draft_forwards_total" in running.get("/metrics")[1].decode()
        assert not running.faults()
