"""Responses of autoregressive models that have the form of an automaton, whatever is drafted."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from drafters import DEEP, MODEL, Knowing, drafter_with, eagle, exits, riding
from forms import a_form
from test_speculate import PROMPTS
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext.automaton import FAR, NOWHERE, Automaton
from dparallel_ext.models import Model

LENGTHS = [24, 30, 1, 11]


def plain(form: Automaton, prompt: Tensor, length: int, model: Model = MODEL) -> list[int]:
    """The greedy loop in float64, up to the length."""
    ids, state = prompt.tolist(), 0
    for left in reversed(range(length)):
        z = model(torch.tensor([ids])).logits[0, -1].detach().double()
        target = form.transitions[state][form.token_class]
        distance = torch.where(target >= 0, form.distance[target.clamp(min=0)], FAR)
        allowed = distance <= left
        allowed = allowed if allowed.any() else distance < FAR
        token = int(z[: len(allowed)].masked_fill(~allowed, -math.inf).argmax())
        ids.append(token)
        state = int(target[token])
    return ids[len(prompt) :]


def test_the_plain_loop() -> None:
    changed = 0
    for seed in range(12):
        form = a_form(seed, 61, ends=(5, 9))
        out = dx.speculate(MODEL, PROMPTS, gen_length=LENGTHS, automaton=form, eos_id=-1)
        for prompt, length, response in zip(PROMPTS, LENGTHS, out.responses, strict=True):
            assert response.tolist() == plain(form, prompt, length)
        free = dx.speculate(MODEL, PROMPTS, gen_length=LENGTHS, eos_id=-1)
        changed += not torch.equal(free.sequences, out.sequences)
    assert changed == 12


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_drafter_changes_no_token(temperature: float) -> None:
    fewer = 0
    for seed in range(4):
        form = a_form(seed, 61, ends=(5, 9))
        settings: dict[str, Any] = {"gen_length": LENGTHS, "temperature": temperature, "seed": 7}
        settings |= {"automaton": form, "logprobs": True}
        for model, drafters in (
            (MODEL, ["ngram", "recycling", drafter_with("dflash"), riding("ppd"), eagle("eagle3")]),
            (DEEP, [exits()]),
        ):
            expected = dx.speculate(model, PROMPTS, **settings)
            for response, kept, length in zip(expected.responses, expected.kept, LENGTHS, strict=True):
                state = form.after(0, response[: int(kept)].tolist())
                assert state != NOWHERE
                assert form.distance[state] == 0 or form.distance[0] > length
            texts = list(expected.sequences)
            knowing = [Knowing(texts), Knowing(texts, tree=True)]
            for drafter in [*drafters, *knowing]:
                found = dx.speculate(model, PROMPTS, drafter=drafter, draft_size=4, **settings)
                assert torch.equal(found.sequences, expected.sequences)
                torch.testing.assert_close(found.logprobs, expected.logprobs, equal_nan=True)
                fewer += int((expected.nfe - found.nfe).sum())
            with dx.Engine(model, lanes=2, drafter="ngram", draft_size=3) as engine:
                handles = [
                    engine.submit(
                        prompt, **{**settings, "gen_length": length, "seed": None if not temperature else 3}
                    )
                    for prompt, length in zip(PROMPTS, LENGTHS, strict=True)
                ]
                free = engine.submit(PROMPTS[0], gen_length=12)
                for handle, prompt, length in zip(handles, PROMPTS, LENGTHS, strict=True):
                    one = dx.speculate(model, prompt, **{**settings, "gen_length": length, "seed": [3]})
                    assert handle.result().tokens == one.responses[0][: int(one.kept[0])].tolist()
                alone = dx.speculate(model, PROMPTS[0], gen_length=12)
                assert free.result().tokens == alone.responses[0][: int(alone.kept[0])].tolist()
    assert fewer > 0
