"""Responses of autoregressive models that have the form of an automaton, whatever is drafted."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from drafters import DEEP, MODEL, Knowing, drafter_with, eagle, exits, riding, strided
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
    for seed in range(6):
        form = a_form(seed, 61, ends=(5, 9))
        out = dx.speculate(MODEL, PROMPTS, gen_length=LENGTHS, automaton=form, eos_id=-1)
        for prompt, length, response in zip(PROMPTS, LENGTHS, out.responses, strict=True):
            assert response.tolist() == plain(form, prompt, length)
        free = dx.speculate(MODEL, PROMPTS, gen_length=LENGTHS, eos_id=-1)
        changed += not torch.equal(free.sequences, out.sequences)
    assert changed == 6


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_drafter_changes_no_token(temperature: float) -> None:
    fewer, named = 0, ("ngram", "recycling", "jump_forward")
    for seed in range(len(named)):
        form = a_form(seed, 61, ends=(5, 9))
        settings: dict[str, Any] = {"gen_length": LENGTHS, "temperature": temperature, "seed": 7}
        settings |= {"automaton": form, "logprobs": True}
        for model, drafters in (
            (MODEL, [*named, drafter_with("dflash"), riding("ppd"), strided(), eagle("eagle3")]),
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
            with dx.Engine(model, lanes=2, drafter=named[seed], draft_size=3) as engine:
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


def path_form(texts: list[list[int]], vocab: int = 61) -> Automaton:
    """Responses that are one of some texts: a state for each beginning of one, each token a class."""
    begins = {(): 0}
    for text in texts:
        for end in range(1, len(text) + 1):
            begins.setdefault(tuple(text[:end]), len(begins))
    transitions = torch.full((len(begins), vocab), NOWHERE)
    for begin, state in begins.items():
        if begin:
            transitions[begins[begin[:-1]], begin[-1]] = state
    accepting = torch.zeros(len(begins), dtype=torch.bool)
    accepting[[begins[tuple(text)] for text in texts]] = True
    return Automaton(torch.arange(vocab), transitions, accepting)


def test_text_without_a_choice_is_drafted_along_its_form() -> None:
    """Two texts that begin alike, and an end (5). The shorter is guessed, and the longer after a refusal."""
    alike, long, short = [3, 4, 8], [11, 12, 13, 14, 15, 5], [21, 22, 5]
    settings: dict[str, Any] = {"gen_length": 10, "eos_id": 5}
    settings["automaton"] = path_form([[*alike, *long], [*alike, *short]])
    prompts = [torch.cat((prompt, prompt)) for prompt in PROMPTS]  # none of one token, which is a root
    plain = dx.speculate(MODEL, prompts, **settings)
    out = dx.speculate(MODEL, prompts, **settings, drafter="jump_forward", draft_size=8, record=True)
    assert torch.equal(out.sequences, plain.sequences)
    assert out.passes is not None
    for kept, (first, second, *others) in zip(out.kept.tolist(), out.passes, strict=True):
        assert first.drafted == 0  # the pass that computes the prompt, and chooses 3
        assert second.drafted == 5  # 4, 8, 21, 22 and the end
        drafted = [(drafted, accepted) for drafted, accepted, _ in others]
        if kept == 5:
            assert (second.accepted, drafted) == (4, [])  # the end counts as the pass's own
        else:
            assert (second.accepted, drafted) == (2, [(5, 4)])  # 11 in place of 21; then 12 to the end


def test_free_text_is_not_drafted() -> None:
    """Where more tokens may follow than the drafter guesses among, or where there is no form."""
    free = dx.speculate(MODEL, PROMPTS, gen_length=12, drafter="jump_forward", draft_size=4)
    assert torch.equal(free.sequences, dx.speculate(MODEL, PROMPTS, gen_length=12).sequences)
    assert not free.drafted.any()
    wide = Automaton(torch.zeros(61).long(), torch.tensor([[0]]), torch.tensor([True]))
    for choices, drafts in ((60, False), (61, True)):
        drafter = dx.speculation.JumpForward(choices)
        out = dx.speculate(MODEL, PROMPTS, gen_length=12, automaton=wide, drafter=drafter, draft_size=4)
        assert bool(out.drafted.any()) == drafts


@pytest.mark.parametrize(("given", "said"), [({"choices": 0}, "choices"), ({"most": 0}, "most")])
def test_bounds_of_jump_forward(given: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=f"{said}: expected a whole number >= 1, got 0"):
        dx.speculation.JumpForward(**given)
