"""The most probable tokens of each place, beside the token that was drawn there."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import drafters
import pytest
import torch
from conftest import golden
from forms import a_form
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext import models, reference
from dparallel_ext.automaton import NOWHERE
from dparallel_ext.types import RowTopK

PROMPTS = [torch.tensor([5, 6, 7, 8]), torch.tensor([9, 10])]
SUPPRESS = [2, 9]
DRAWN: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8},
    {"temperature": 0.8, "top_k": 3},
    {"temperature": 0.3, "top_p": 0.5},
    {"temperature": 1.5, "top_p": 0.9, "top_k": 200},
]


@pytest.fixture(scope="module")
def llada() -> models.Model:
    return golden.model("llada_tiny_a")


def check(found: RowTopK, at: tuple[int, int], z: Tensor, drawn: dict[str, Any], mask: int | None) -> None:
    """The list at a place is that of the logits (V,) there."""
    z, count = z.double(), found.token.shape[-1]
    z[SUPPRESS] = -math.inf
    temperature = drawn.get("temperature", 0.0)
    lse = z.logsumexp(0)  # greedy: over the mask, too
    if mask is not None:
        z[mask] = -math.inf
    if temperature:
        allowed = reference.nucleus(z[None], drawn.get("top_p"), drawn.get("top_k"), temperature)[0]
        z = (z / temperature).where(allowed, -math.inf)
        lse = z.logsumexp(0)
    values, ids = z.sort(descending=True, stable=True)
    values = (values - lse)[:count]
    drawable = values > -math.inf
    torch.testing.assert_close(found.logprob[at].double(), values, rtol=0, atol=2e-4)
    assert found.token[at].tolist() == ids[:count].where(drawable, -1).tolist()


@pytest.mark.parametrize("drawn", DRAWN, ids=str)
def test_of_a_diffusion_model(llada: models.Model, drawn: dict[str, Any]) -> None:
    """Recomputed by a pass over the state in which each token was drawn."""
    settings = {"gen_length": 12, "suppress": SUPPRESS, "seed": 3, "threshold": 2.0, **drawn}
    out = dx.decode(llada, PROMPTS, record=True, logprobs=True, top_logprobs=5, **settings)
    plain = dx.decode(llada, PROMPTS, record=True, logprobs=True, **settings)
    assert torch.equal(out.sequences, plain.sequences)
    assert torch.equal(out.logprobs, plain.logprobs)
    assert out.trajectory is not None
    assert out.top_logprobs is not None
    assert plain.top_logprobs is None
    assert out.top_logprobs.token.shape == out.top_logprobs.logprob.shape == (2, 12, 5)
    for b, prompt in enumerate(PROMPTS):
        response, step = out.responses[b], out.trajectory.step[b]
        for turn in step.unique().tolist():
            state = torch.cat((prompt, response.where(step < turn, llada.mask_id)))
            with torch.no_grad():
                z = llada(state[None]).logits[0, len(prompt) :]
            for place in (step == turn).nonzero()[:, 0].tolist():
                check(out.top_logprobs, (b, place), z[place], drawn, llada.mask_id)


@pytest.mark.parametrize("way", [{}, {"threshold": 2.0, "max_commit": 1, "cache": "dual"}], ids=str)
def test_of_guessed_states(llada: models.Model, way: dict[str, Any]) -> None:
    """Under self-speculation they are those of plain decoding."""
    settings = {"gen_length": 12, "block_length": 6, "logprobs": True, "top_logprobs": 5, **way}
    plain, out = (dx.decode(llada, PROMPTS, draft_size=size, **settings) for size in (None, 3))
    assert int(out.nfe.sum()) < int(plain.nfe.sum())
    assert torch.equal(out.top_logprobs.token, plain.top_logprobs.token)
    torch.testing.assert_close(out.top_logprobs.logprob, plain.top_logprobs.logprob, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rule", ["credit", "edit:0.05,0.02", "soft:0.05,0.9,6", "leading"])
def test_by_a_rule(llada: models.Model, rule: str) -> None:
    """A token that a rule chose has the log-probability of its place in the list, if it is there."""
    settings: dict[str, Any] = {"gen_length": 16, "block_length": 8, "logprobs": True}
    out = dx.decode(llada, PROMPTS, rule=rule, top_logprobs=20, **settings)
    place = (out.top_logprobs.token == torch.stack(out.responses)[..., None]).nonzero()
    assert len(place) > 16
    listed = out.top_logprobs.logprob[tuple(place.T)]
    assert torch.equal(listed, out.logprobs[tuple(place[:, :2].T)])
    assert bool((out.top_logprobs.logprob.diff(dim=-1) <= 0).all())


@pytest.mark.parametrize("drawn", DRAWN, ids=str)
@pytest.mark.parametrize("drafter", [None, "ngram", "recycling"])
def test_of_an_autoregressive_model(drafter: str | None, drawn: dict[str, Any]) -> None:
    """Alone, with chains and with trees."""
    model = drafters.MODEL
    settings = {"gen_length": 12, "suppress": SUPPRESS, "seed": 3, "eos_id": -1, **drawn}
    draft = {"drafter": drafter, "draft_size": 6}
    out = dx.speculate(model, PROMPTS, logprobs=True, top_logprobs=4, **settings, **draft)
    assert out.top_logprobs is not None
    for b, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            z = model(torch.cat((prompt, out.responses[b]))[None]).logits[0, len(prompt) - 1 :]
        for place in range(12):
            check(out.top_logprobs, (b, place), z[place], drawn, None)


@pytest.mark.parametrize("kind", ["diffusion", "autoregressive"])
def test_of_an_engine(llada: models.Model, kind: str) -> None:
    """Streamed and whole, beside requests without, and behind what a lane held."""
    model = llada if kind == "diffusion" else drafters.MODEL
    call = dx.decode if kind == "diffusion" else dx.speculate
    own: dict[str, Any] = {"block_length": 4, "cache": "none"} if kind == "diffusion" else {}
    drawn: dict[str, Any] = {"gen_length": 10, "temperature": 0.7, "logprobs": True, "eos_id": -1}
    expected = [
        call(model, prompt, seed=[b], top_logprobs=b, **drawn, **own) for b, prompt in enumerate(PROMPTS * 2)
    ]
    with dx.Engine(model, lanes=2, max_length=32, **own) as engine:
        handles = [
            engine.submit(prompt, seed=b, top_logprobs=b, **drawn) for b, prompt in enumerate(PROMPTS * 2)
        ]
        stop = [int(expected[1].responses[0][6])]
        stopped = engine.submit(PROMPTS[1], seed=1, top_logprobs=1, **drawn | {"eos_id": stop})
        found = [handle.result(60) for handle in handles]
        ended = stopped.result(60)
    assert (found[0].top_logprobs, handles[0].top_logprobs) == (None, [])
    for b in (1, 2, 3):
        top = expected[b].top_logprobs
        assert handles[b].top_logprobs == found[b].top_logprobs
        assert found[b].tokens == expected[b].responses[0].tolist()
        ids = [[token for token, _ in place] for place in found[b].top_logprobs]
        assert ids == top.token[0].tolist()
        values = torch.tensor([[value for _, value in place] for place in found[b].top_logprobs])
        torch.testing.assert_close(values, top.logprob[0], rtol=0, atol=1e-4)
    assert len(ended.top_logprobs) == len(ended.tokens) <= 6
    place = len(ended.tokens)
    assert ended.end.token in stop
    assert ended.end.top_logprobs[0][0] == int(expected[1].top_logprobs.token[0, place, 0])


def test_of_places_that_no_pass_filled(llada: models.Model) -> None:
    settings: dict[str, Any] = {"gen_length": [12, 8], "block_length": 4, "logprobs": True, "top_logprobs": 3}
    plain = dx.decode(llada, PROMPTS, **settings)
    out = dx.decode(llada, PROMPTS, eos_id=int(plain.responses[0][1]), **settings)
    drawn = ~out.logprobs.isnan()
    assert 0 < int(drawn.sum()) < 20
    assert torch.equal((out.top_logprobs.token >= 0).all(-1), drawn)
    assert torch.equal(out.top_logprobs.logprob.isnan().all(-1), ~drawn)


@pytest.mark.parametrize("seed", range(4))
def test_of_a_form(seed: int) -> None:
    """Of an autoregressive model the tokens that may follow, which may be fewer than are asked for."""
    form = a_form(seed, 61, ends=(5, 9))
    settings: dict[str, Any] = {"gen_length": 12, "automaton": form, "logprobs": True, "top_logprobs": 20}
    out = dx.speculate(drafters.MODEL, PROMPTS, drafter="ngram", eos_id=[5, 9], **settings)
    short = 0
    for b, kept in enumerate(out.kept.tolist()):
        state = 0
        for place, drawn in enumerate(out.responses[b][:kept].tolist()):
            ids, values = (field[b, place] for field in out.top_logprobs)
            listed = ids[ids >= 0].tolist()
            assert (drawn, float(out.logprobs[b, place])) == (listed[0], float(values[0]))
            assert all(form.after(state, (token,)) != NOWHERE for token in listed)
            short += len(listed) < 20
            if len(listed) < 20:
                assert float(values[: len(listed)].exp().sum()) == pytest.approx(1.0, abs=1e-5)
            state = form.after(state, (drawn,))
    assert short or seed != 0


def test_few_ids() -> None:
    """A vocabulary of fewer ids than are asked for."""

    def model(ids: Tensor) -> Any:
        z = torch.arange(6.0).expand(*ids.shape, 6)
        return SimpleNamespace(logits=z)

    settings: dict[str, Any] = {"mask_id": 5, "threshold": 9.0, "logprobs": True, "top_logprobs": 20}
    out = dx.decode(model, PROMPTS[1] % 5, gen_length=2, **settings)
    assert out.top_logprobs.token[0, 0].tolist() == [4, 3, 2, 1, 0, *[-1] * 15]
    expected = torch.arange(6.0).log_softmax(0)[:5].flip(0)
    torch.testing.assert_close(out.top_logprobs.logprob[0, 0, :5], expected)
    assert out.top_logprobs.logprob[0, 0, 5:].tolist() == [-math.inf] * 15


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_logprobs": 1}, "top_logprobs: belongs to logprobs=True, got 1 without it"),
        (
            {"logprobs": True, "top_logprobs": 21},
            "top_logprobs: expected a whole number <= 20, got 21",
        ),
        (
            {"logprobs": True, "top_logprobs": -1},
            "top_logprobs: expected a whole number >= 0, got -1",
        ),
        ({"logprobs": True, "top_logprobs": True}, "top_logprobs: expected a whole number"),
    ],
)
def test_what_does_not_fit_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dx.DecodeConfig(**settings)
