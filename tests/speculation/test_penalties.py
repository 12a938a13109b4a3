"""Penalties of the tokens that a text already has, of autoregressive models."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import drafters
import pytest
import torch
import transformers
from conftest import golden
from forms import a_form
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext import models
from dparallel_ext.decoding.graphs import Graphs

pytest_plugins = ["taping"]

MODEL = drafters.MODEL
PROMPTS = [torch.tensor([5, 6, 7, 8, 5]), torch.tensor([9, 10])]
PENALTIES: list[dict[str, float]] = [
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7},
    {"presence_penalty": 1.5},
    {"frequency_penalty": -0.4},
    {"repetition_penalty": 1.1, "presence_penalty": -0.5, "frequency_penalty": 0.3},
]


def written(prompt: Tensor, steps: int, changed: dict[str, float], model: models.Model = MODEL) -> list[int]:
    """The greedy text, a token at a time, by the formulas of CTRL and of OpenAI's documentation."""
    return _written((*prompt.tolist(),), steps, (*changed.items(),), model)


@functools.cache
def _written(
    prompt: tuple[int, ...], steps: int, changed: tuple[tuple[str, float], ...], model: models.Model
) -> list[int]:
    given = dict(changed)
    repetition = given.get("repetition_penalty", 1.0)
    presence, frequency = (given.get(f"{name}_penalty", 0.0) for name in ("presence", "frequency"))
    ids = [*prompt]
    for _ in range(steps):
        with torch.no_grad():
            z = model(torch.tensor([ids])).logits[0, -1].double()
        for token in {*ids}:
            z[token] = z[token] / repetition if z[token] > 0 else z[token] * repetition
        response = ids[len(prompt) :]
        for token in {*response}:
            z[token] -= response.count(token) * frequency + presence
        ids.append(int(z.argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("changed", PENALTIES, ids=str)
@pytest.mark.parametrize("kind", [None, "ngram", "recycling", "ppd", "adadecode"])
def test_the_text_is_that_of_the_formulas(kind: str | None, changed: dict[str, float]) -> None:
    """A token at a time, and with chains, trees, riders and the model's own first layers."""
    model = drafters.DEEP if kind == "adadecode" else MODEL
    made = {"ppd": lambda: drafters.riding("ppd"), "adadecode": drafters.exits}
    settings = {"drafter": made.get(kind, lambda: kind)(), "draft_size": 7, "gen_length": 24, "eos_id": -1}
    out = dx.speculate(model, PROMPTS, **settings, **changed)
    expected = [written(each, 24, changed, model) for each in PROMPTS]
    assert [each.tolist() for each in out.responses] == expected
    plain = dx.speculate(model, PROMPTS, **settings)
    assert not torch.equal(out.sequences, plain.sequences)


@pytest.mark.parametrize("drafter", [None, "recycling"])
def test_passes_are_recorded(taped: list[Graphs], drafter: str | None) -> None:
    """Though none can be issued ahead of what the text has; others in the same call change nothing."""
    settings: dict[str, Any] = {"gen_length": 24, "eos_id": -1, "drafter": drafter, "draft_size": 3}
    for changed in PENALTIES[::4]:
        out = dx.speculate(MODEL, PROMPTS, **settings, **changed)
        assert [each.tolist() for each in out.responses] == [written(each, 24, changed) for each in PROMPTS]
    assert all(graphs.recorder is not None for graphs in taped), "a recording failed"
    assert sum(graphs.replays for graphs in taped) > 32


@pytest.mark.parametrize("drafter", [None, "ngram"])
def test_generate_of_transformers_gives_the_same_text(tmp_path: Path, drafter: str | None) -> None:
    """Given, and by generation_config.json, of a wrapped model and of one that is loaded."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 61}
    theirs = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes, **heads, pad_token_id=0)).eval()
    greedy: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    call: dict[str, Any] = {"gen_length": 24, "eos_id": -1, "drafter": drafter, "draft_size": 5}
    plain = models.wrap(theirs)
    theirs.generation_config.repetition_penalty = 1.4
    theirs.save_pretrained(tmp_path / "theirs")
    models.save(models.load(tmp_path / "theirs"), tmp_path / "ours")
    own = models.wrap(theirs), *(models.load(tmp_path / name) for name in ("theirs", "ours"))
    for prompt in PROMPTS:
        text = theirs.generate(prompt[None], attention_mask=torch.ones_like(prompt)[None], **greedy)
        given = dx.speculate(plain, prompt, repetition_penalty=1.4, **call)
        for out in (given, *(dx.speculate(model, prompt, **call) for model in own)):
            assert torch.equal(out.sequences, text)
        without = dx.speculate(plain, prompt, **call).sequences
        assert torch.equal(dx.speculate(own[1], prompt, repetition_penalty=1.0, **call).sequences, without)
        assert not torch.equal(without, text)


def test_a_penalty_of_a_file_that_does_not_fit_is_named(tmp_path: Path) -> None:
    models.save(MODEL, tmp_path)
    (tmp_path / "generation_config.json").write_text('{"repetition_penalty": 0}')
    with pytest.raises(ValueError, match=r"repetition_penalty: expected a number from 0.01 to 100, got 0"):
        models.load(tmp_path)


@pytest.mark.parametrize("form", [None, a_form(1, 61, ends=(5, 9))], ids=["free", "of a form"])
def test_requests_have_their_own(form: Any) -> None:
    """In an engine, sampled too, beside others, with log-probabilities of what was drawn from."""
    own: list[dict[str, Any]] = [{}, *PENALTIES, {"temperature": 0.9, "frequency_penalty": 1.0, "top_k": 20}]
    shared: dict[str, Any] = {"gen_length": 16, "eos_id": [5, 9], "automaton": form, "logprobs": True}
    alone = [
        dx.speculate(MODEL, prompt, seed=[3], **shared, **settings) for settings in own for prompt in PROMPTS
    ]
    with dx.Engine(MODEL, lanes=3, max_length=64, drafter="ngram", draft_size=4) as engine:
        handles = [engine.submit(p, seed=3, **shared, **settings) for settings in own for p in PROMPTS]
        for handle, expected in zip(handles, alone, strict=True):
            done, kept = handle.result(60), int(expected.kept[0])
            assert done.tokens == expected.responses[0][:kept].tolist()
            torch.testing.assert_close(
                torch.tensor(done.logprobs), expected.logprobs[0, :kept], rtol=0, atol=1e-4
            )


def test_a_logit_stays_finite_or_impossible() -> None:
    """Also where a penalty goes beyond float32."""
    model = drafters.model_of(eos_token_id=[5, 9])
    with torch.no_grad():
        model.lm_head.weight.mul_(1e36)
    out = dx.speculate(
        model, PROMPTS, gen_length=6, eos_id=-1, repetition_penalty=100.0, suppress=[1, 2], logprobs=True
    )
    assert not torch.isin(torch.cat(out.responses), torch.tensor([1, 2])).any()
    assert not out.logprobs.isnan().any()


def test_a_diffusion_model_takes_none() -> None:
    model = golden.model("llada_tiny_a")
    named = r"presence_penalty: belongs to an autoregressive model, not to LLaDA, got 0.5"
    with pytest.raises(ValueError, match=named):
        dx.decode(model, PROMPTS, gen_length=8, presence_penalty=0.5)
    with dx.Engine(model, lanes=1, max_length=32) as engine, pytest.raises(ValueError, match=named):
        engine.submit(PROMPTS[0], gen_length=8, presence_penalty=0.5)
    with pytest.raises(ValueError, match="frequency_penalty: with a verifier"):
        dx.adaptive_decode(model, PROMPTS, verifier=MODEL, frequency_penalty=1.0)
    neutral = {"repetition_penalty": 1.0, "presence_penalty": 0.0}
    assert torch.equal(
        dx.decode(model, PROMPTS, gen_length=8, **neutral).sequences,
        dx.decode(model, PROMPTS, gen_length=8).sequences,
    )
