"""The server of an autoregressive model: as of a diffusion model, and each text is `speculate`'s."""

from __future__ import annotations

import itertools
import json
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from asking import MODEL, PROMPTS, VOCABULARY, bad_request, joined
from dparallel import registry, tokenizer
from dparallel.cli import app
from dparallel.serving import runner, service
from drafters import model_of, riding
from openai import InternalServerError, OpenAI
from server_here import Here, post, serving
from typer.testing import CliRunner

import dparallel_ext as dx
from benchmarks.serving import Served

EOS = 1


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random weights with the tokenizer of the models that ship, and two end tokens, one of
    which it does write."""
    out = tmp_path_factory.mktemp("causal")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(registry.directory_of(MODEL) / file, out)
    plain, ids = model_of(vocab_size=VOCABULARY), tokenizer.load(out).encode(PROMPTS[0]).ids
    written = int(dx.speculate(plain, ids, gen_length=24).responses[0][13])
    dx.models.save(model_of(vocab_size=VOCABULARY, eos_token_id=[EOS, written]), out)
    return out


@pytest.fixture(scope="module")
def loaded(directory: Path) -> tuple[Any, Any]:
    return dx.models.load(directory), tokenizer.load(directory)


@pytest.fixture(scope="module", params=[None, "ngram", "recycling"])
def here(request: pytest.FixtureRequest, loaded: tuple[Any, Any], directory: Path) -> Iterator[Here]:
    # Of a given size: a measured one may be 0 where passes over drafts happen to be slow.
    drafts = {"drafter": request.param, "draft_size": 3} if request.param else {}
    engine = {**drafts, "lanes": 3, "page_size": 4}
    with serving(loaded, directory, engine=engine, name="causal") as running:
        yield running


@pytest.fixture(scope="module")
def client(here: Here) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{here.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


def said_by(loaded: tuple[Any, Any], prompt: str, **settings: Any) -> tuple[str, int, int]:
    """Text, tokens and passes of plain decoding."""
    model, tokens = loaded
    settings = {"gen_length": 64, **settings, "seed": [settings.get("seed", 0)]}
    found = dx.speculate(model, torch.tensor(tokens.encode(prompt).ids), **settings)
    response = found.responses[0][: int(found.kept[0])].tolist()
    return tokens.decode(response), len(response), int(found.nfe[0])


def ask(client: OpenAI, prompt: Any = PROMPTS[0], **settings: Any) -> Any:
    return client.completions.create(model="causal", prompt=prompt, **{"max_tokens": 24, **settings})


def test_answers_are_what_speculate_says(client: OpenAI, loaded: tuple[Any, Any], here: Here) -> None:
    """Of many at once, with seeds of their own; streaming or not; chats and completions."""
    asked = [
        {"prompt": prompt, "temperature": temperature, "seed": seed, "ignore_eos": ignored}
        for seed, prompt in enumerate(PROMPTS[:4])
        for temperature, ignored in ((0.0, True), (0.0, False), (0.9, False))
    ]

    def of(prompt: str, ignore_eos: bool, **own: Any) -> Any:
        return ask(client, prompt, **own, extra_body={"ignore_eos": ignore_eos})

    with ThreadPoolExecutor(6) as threads:
        answers = list(threads.map(lambda one: of(**one), asked))
    for one, answer in zip(asked, answers, strict=True):
        eos_id = -1 if one["ignore_eos"] else None
        own = {"temperature": one["temperature"], "seed": one["seed"], "eos_id": eos_id}
        text, count, passes = said_by(loaded, str(one["prompt"]), gen_length=24, **own)
        (choice,) = answer.choices
        assert (choice.text, choice.finish_reason) == (text, "stop" if count < 24 else "length")
        assert answer.usage.completion_tokens == count
        assert answer.usage.forward_passes <= passes
    assert {answer.usage.completion_tokens for answer in answers if answer.usage} > {24}
    two = ask(client, PROMPTS[:2], n=2, temperature=0.9, seed=7)
    expected = [
        said_by(loaded, PROMPTS[i // 2], gen_length=24, temperature=0.9, seed=7 + i % 2) for i in range(4)
    ]
    assert [choice.text for choice in two.choices] == [text for text, _, _ in expected]
    for _ in range(2):
        again = ask(client, " ".join(PROMPTS[:3]), max_tokens=1)
    assert again.usage.prompt_tokens_details.cached_tokens >= 8
    thrice = ask(client, " ".join(PROMPTS[:3]), max_tokens=1, n=3)  # a prompt counts once
    assert thrice.usage.prompt_tokens_details == again.usage.prompt_tokens_details
    chat = client.chat.completions.create(
        model="causal", messages=[{"role": "user", "content": PROMPTS[0]}], max_tokens=24
    )
    assert chat.choices[0].message.content == said_by(loaded, PROMPTS[0], gen_length=24)[0]
    assert not here.faults()


@pytest.mark.parametrize("kind", ["ppd", "hidden_transfer"])
def test_rows_that_ride_along_serve_too(kind: str, loaded: tuple[Any, Any], directory: Path) -> None:
    """Of requests at once and one after another, which share pages."""
    engine = {"drafter": riding(kind, loaded[0]), "draft_size": 9, "lanes": 3, "page_size": 4}
    with serving(loaded, directory, engine=engine, name="causal") as here:
        client = OpenAI(base_url=f"{here.url}/v1", api_key="none", max_retries=0, timeout=60)
        asked = [{"temperature": (0.0, 0.9)[i % 2], "seed": i} for i in range(6)]
        with ThreadPoolExecutor(6) as threads:
            answers = list(threads.map(lambda own: ask(client, PROMPTS[own["seed"] // 2], **own), asked))
        answers.append(ask(client, PROMPTS[0], **asked[0]))
        client.close()
        assert not here.faults()
    expected = [said_by(loaded, PROMPTS[own["seed"] // 2], gen_length=24, **own) for own in asked]
    for answer, (text, count, passes) in zip(answers, [*expected, expected[0]], strict=True):
        assert answer.choices[0].text == text
        assert answer.usage.completion_tokens == count
        assert answer.usage.forward_passes <= passes
    assert answers[-1].usage.prompt_tokens_details.cached_tokens >= 4


def test_text_streams_pass_by_pass(client: OpenAI, loaded: tuple[Any, Any]) -> None:
    asked = {"max_tokens": 24, "stream": True, "extra_body": {"ignore_eos": True, "stream_drafts": True}}
    chunks = list(ask(client, **asked))
    texts, reasons, count = joined(chunks)
    text, tokens, _ = said_by(loaded, PROMPTS[0], gen_length=24, eos_id=-1)
    assert (texts, reasons) == ({0: text}, {0: "length"})
    drafts = [chunk.choices[0].draft for chunk in chunks if hasattr(chunk.choices[0], "draft")]
    assert 1 < count <= len(drafts)
    assert [draft["pass"] for draft in drafts] == list(range(1, len(drafts) + 1))
    lengths = [len(draft["tokens"]) for draft in drafts]
    assert [draft["start"] for draft in drafts] == [0, *itertools.accumulate(lengths[:-1])]
    assert sum(lengths) == tokens == 24
    assert [draft["accepted"] + 1 for draft in drafts] == lengths


def test_stops_and_logprobs(client: OpenAI, loaded: tuple[Any, Any]) -> None:
    model, tokens = loaded
    prompt = tokens.encode(PROMPTS[0]).ids
    found = dx.speculate(model, prompt, gen_length=24, eos_id=-1, logprobs=True)
    assert found.logprobs is not None
    response = found.responses[0].tolist()
    answer = ask(client, prompt, logprobs=0, extra_body={"ignore_eos": True})
    given = answer.choices[0].logprobs.token_logprobs
    torch.testing.assert_close(torch.tensor(given), found.logprobs[0], rtol=0, atol=1e-4)
    penalties: dict[str, Any] = {"presence_penalty": 0.7, "frequency_penalty": 0.4}
    expected = said_by(loaded, PROMPTS[0], gen_length=24, repetition_penalty=1.3, **penalties)
    answer = ask(client, prompt, **penalties, extra_body={"repetition_penalty": 1.3})
    assert answer.choices[0].text == expected[0] != tokens.decode(response)
    stop = response[9]
    answer = ask(client, prompt, extra_body={"ignore_eos": True, "stop_token_ids": [stop]})
    assert answer.usage.completion_tokens == response.index(stop)
    assert answer.choices[0].finish_reason == "stop"
    words = tokens.decode(response).split()
    said = " ".join(words[4:6])
    answer = ask(client, prompt, stop=said, extra_body={"ignore_eos": True})
    assert answer.choices[0].text == tokens.decode(response).partition(said)[0]


@pytest.mark.parametrize(
    ("change", "param", "said"),
    [
        (
            {"extra_body": {"policy": "entropy:0.5"}},
            "policy",
            "belongs to decoding by blocks, and 'causal' goes",
        ),
        ({"extra_body": {"policy": "unheard_of"}}, "policy", "belongs to decoding by blocks"),
        ({"suffix": "so it is"}, "suffix", "belongs to decoding by blocks, and 'causal' goes"),
        ({"prompt": ""}, "prompt", "prompt: expected at least one token, got none"),
        ({"max_tokens": 500}, "max_tokens", "maximum context length is 256 tokens"),
        ({"prompt": [VOCABULARY]}, "prompt", f"expected token ids below {VOCABULARY}"),
    ],
)
def test_what_does_not_fit_is_refused(client: OpenAI, change: dict[str, Any], param: str, said: str) -> None:
    with bad_request(param, said):
        ask(client, **change)
    assert ask(client, max_tokens=2, suffix="").usage.completion_tokens <= 2


def test_an_empty_chat_is_refused(client: OpenAI) -> None:
    with bad_request("messages", "messages: expected at least one token, got none"):
        client.chat.completions.create(model="causal", messages=[{"role": "user", "content": ""}])


def test_text_offsets_are_places_in_the_text(client: OpenAI, loaded: tuple[Any, Any]) -> None:
    """Also behind special tokens, which `ignore_eos` lets through and the text leaves out."""
    tokens, passed_over = loaded[1], 0
    drawn = {"temperature": 2.0, "seed": 1, "n": 64, "extra_body": {"ignore_eos": True}}
    for choice in ask(client, **drawn, logprobs=0).choices:
        scored = choice.logprobs
        ids = [tokens.token_to_id(token.strip()) for token in scored.tokens]
        assert scored.text_offset == [len(tokens.decode(ids[:at])) for at in range(24)]
        for token, start in zip(scored.tokens, scored.text_offset, strict=True):
            special = token.strip().startswith("[")
            passed_over += special
            assert special or choice.text.startswith(token, start)
    assert passed_over


def test_echo_scores_the_prompt(
    client: OpenAI, loaded: tuple[Any, Any], here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As lm-evaluation-harness asks for it, with texts and with ids, whole and streaming."""
    model, tokens = loaded
    texts, ids = PROMPTS[:3], [tokens.encode(prompt).ids for prompt in PROMPTS[:3]]
    scored = {"max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
    answers = [ask(client, prompts, **scored, n=2).choices for prompts in (texts, ids)]
    for choice, other in zip(*answers, strict=True):
        own, text = ids[choice.index // 2], texts[choice.index // 2]
        assert (choice.text, choice.logprobs.tokens) == (other.text, other.logprobs.tokens)
        assert choice.logprobs.token_logprobs[:-1] == other.logprobs.token_logprobs[:-1]
        assert choice.text.startswith(text)
        with torch.inference_mode():
            expected = model(torch.tensor([own])).logits[0].double().log_softmax(-1)
        found = choice.logprobs
        written = found.tokens[: len(own) + (choice.finish_reason == "length")]
        assert "".join(written) == choice.text
        assert all(map(choice.text.startswith, written, found.text_offset))
        assert (found.token_logprobs[0], found.top_logprobs[0]) == (None, None)
        for at, token in enumerate(own[1:]):
            assert found.token_logprobs[at + 1] == pytest.approx(float(expected[at, token]), abs=1e-4)
            assert max(found.top_logprobs[at + 1].values()) == pytest.approx(
                float(expected[at].max()), abs=1e-4
            )
            assert found.token_logprobs[at + 1] in found.top_logprobs[at + 1].values()
        assert len(found.tokens) == len(own) + 1  # the response's token, or the end of text in its place
        assert found.token_logprobs[-1] == pytest.approx(float(expected[-1].max()), abs=1e-4)
    streamed = joined(ask(client, texts, **scored, n=2, stream=True))[0]
    assert [streamed[i] for i in range(6)] == [choice.text for choice in answers[0]]
    longer, alone = (ask(client, texts, echo=echo).choices for echo in (True, False))
    joint = [f"{text} {choice.text}".rstrip() for text, choice in zip(texts, alone, strict=True)]
    assert [choice.text for choice in longer] == joint
    plain = ask(client, texts[0], max_tokens=0, echo=True)
    assert (plain.choices[0].text, plain.choices[0].finish_reason) == (texts[0], "length")
    assert (plain.choices[0].logprobs, plain.usage.completion_tokens) == (None, 0)
    assert not here.faults()
    monkeypatch.setattr(service, "token_scores", lambda *arguments: 1 / 0)
    with pytest.raises(InternalServerError, match="the model failed on this request"):
        ask(client, texts[0], **scored)
    assert any("ZeroDivisionError" in line for line in here.faults())
    here.log.lines.clear()
    begun = [threading.Event() for _ in texts]

    def slow(model: Any, ids: list[int], top: int) -> Any:
        begun.pop().set()
        time.sleep(0.2)

    first = begun[-1]
    monkeypatch.setattr(service, "token_scores", slow)
    body = json.dumps({"model": "causal", "prompt": texts, **scored}).encode()
    with here.connect() as wire:
        wire.sendall(post("/v1/completions", body))
        assert first.wait(20)
    here.settles()
    assert len(begun) == 2  # prompts of a client that has left are not scored


def test_the_model_and_what_is_measured(client: OpenAI, here: Here) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.max_model_len) == ("causal", 256)  # type: ignore[attr-defined]
    served = Served(None, here.port, Path())  # type: ignore[arg-type]
    before = served.metrics()
    usage = ask(client, PROMPTS[5], extra_body={"ignore_eos": True}).usage
    after = served.metrics()

    def more(name: str) -> float:
        return after[f"dparallel_{name}_total"] - before[f"dparallel_{name}_total"]

    assert more("completed") == 1
    assert more("tokens") == usage.completion_tokens == 24
    assert more("forwards") == more("sequence_passes") == usage.forward_passes
    guesses = here.engine.stats.draft_forwards > 0
    assert (more("draft_forwards") > 0) == (more("drafted_tokens") > 0) == guesses
    assert more("accepted_tokens") == 24 - usage.forward_passes
    assert usage.tokens_per_pass == round(24 / usage.forward_passes, 3)


def test_the_command_serves_it(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[dx.DecodeConfig, int]] = []

    def run(self: runner.Server, sockets: Any = None) -> None:
        (model,) = self.service.models.values()
        engine = model.engine
        engine.submit([3, 4, 3, 4, 3], gen_length=12, eos_id=-1).result(60)
        found.append((engine.config, engine.stats.draft_forwards))

    monkeypatch.setattr(runner.Server, "run", run)

    def serve(*options: str, model: Any = directory) -> Any:
        return CliRunner().invoke(app, ["serve", "--port", "0", "--model", str(model), *options])

    for options, guesses in ((), False), (("--drafter", "ngram", "--draft-size", "3"), True):
        done = serve(*options)
        assert done.exit_code == 0, done.output
        config, drafts = found.pop()
        assert (config.rule, config.gen_length) == (None, 256)
        assert (drafts > 0) == guesses
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"temperature": 0.5, "gen_length": 20}))
    assert serve("--config", str(file)).exit_code == 0
    assert (found[0][0].temperature, found[0][0].gen_length) == (0.5, 20)
    for options, said in (
        (("--policy", "entropy:0.5"), "policy: belongs to masked diffusion; "),
        (("--mask-id", "3"), "mask_id: belongs to masked diffusion; "),
        (("--cache", "dual"), "cache: belongs to masked diffusion; "),
        (("--block-length", "8"), "block_length: belongs to masked diffusion; "),
        (("--drafter", "medusa"), "drafter: expected a Drafter, "),
        (("--drafter", "ngram", "--draft-size", "-1"), "draft_size: expected a whole number >= 0, got -1"),
    ):
        done = serve(*options)
        assert (done.exit_code, done.stderr.count("\n")) == (2, 1), done.output
        assert said in done.stderr
    done = serve("--drafter", "ngram", model=MODEL)
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert f"drafter: {MODEL} is a diffusion model, which takes none" in done.stderr
