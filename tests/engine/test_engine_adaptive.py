"""Engine with a verifier: each request as `adaptive_decode` gives it alone."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
import torch
from conftest import golden
from drafters import model_of
from engines import LLADA, MODELS, Gate, some_prompts, until
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext.decoding.settings import make_settings
from dparallel_ext.engine import DraftEvent
from dparallel_ext.models import Model

VERIFIER = model_of(vocab_size=500)
"""It lacks the mask, and some ids more."""
FAMILIES = ("llada_tiny_a", "dream_tiny_a", "sdar_tiny_a", "fast_dllm")


def alone(model: Model, prompt: Tensor, **settings: Any) -> tuple[list[int], int, int]:
    """Tokens in front of the end, and passes of both models."""
    settings["seed"] = [settings.get("seed", 0)]
    out = dx.adaptive_decode(model, [prompt], verifier=VERIFIER, **settings)
    return out.responses[0][: int(out.kept[0])].tolist(), int(out.nfe[0]), int(out.verifier_nfe[0])


def settings_of(rng: random.Random) -> dict[str, Any]:
    return {
        "gen_length": rng.choice([0, 1, 7, 20, 26]),
        "temperature": rng.choice([0.0, 0.0, 0.9]),
        "seed": rng.randrange(3),
        "top_k": rng.choice([None, 5]),
        "eos_id": rng.choice([-1, None, rng.randrange(500)]),
        "suppress": rng.choice([None, [3, 17, 505]]),
        "stop": rng.choice([(), [[rng.randrange(500)], [4, 5]]]),
    }


@pytest.mark.parametrize("case", range(8))
def test_a_request_gets_what_adaptive_decode_gives_it_alone(case: int) -> None:
    """With settings of its own, beside others, on few pages that are used again."""
    rng = random.Random(case)
    model = MODELS[FAMILIES[case % 4], torch.float32]
    prompts, own = some_prompts(case, 8), [settings_of(rng) for _ in range(8)]
    numbers = {
        "mixture": rng.choice([0.0, 0.8, 0.95]),
        "window": rng.choice([None, 2, 9]),
        "lookahead": rng.choice([None, 6]),
    }
    expected = [alone(model, prompt, **numbers, **its) for prompt, its in zip(prompts, own, strict=True)]
    page_size = rng.choice([4, 8, 32])
    with dx.Engine(
        model,
        verifier=VERIFIER,
        **numbers,
        lanes=rng.randint(1, 4),
        max_length=64,
        page_size=page_size,
        pages=-(-64 // page_size) + rng.randint(0, 6),
        batch_invariant=case >= 4,
    ) as engine:
        handles = [engine.submit(prompt, **its) for prompt, its in zip(prompts, own, strict=True)]
        for its, handle, (tokens, nfe, verified) in zip(own, handles, expected, strict=True):
            streamed = list(itertools.chain.from_iterable(handle))
            done = handle.result(60)
            assert streamed == done.tokens == tokens, its
            assert (done.nfe, done.draft_nfe) == (nfe, verified)
            assert done.finish_reason == ("stop" if len(tokens) < its["gen_length"] else "length")
        assert (engine.cache, engine.mask_id) == (None, None)
    stats = engine.stats
    assert (stats.completed, stats.waiting, stats.active, stats.pages_used) == (8, 0, 0, 0)
    assert stats.tokens == sum(len(tokens) for tokens, *_ in expected)
    assert stats.sequence_passes == sum(nfe for _, nfe, _ in expected) >= stats.forwards
    assert stats.draft_forwards <= sum(verified for *_, verified in expected)
    assert stats.accepted_tokens <= stats.drafted_tokens
    assert stats.reused_tokens == 0


def test_a_draft_holds_the_tokens_of_a_pass() -> None:
    prompt, drafts = some_prompts(3, 1)[0], list[DraftEvent]()
    with dx.Engine(LLADA, verifier=VERIFIER, mixture=0.9, eos_id=-1, lanes=1, max_length=64) as engine:
        done = engine.submit(prompt, gen_length=20, on_draft=drafts.append).result(60)
    assert [draft.nfe for draft in drafts] == list(range(1, done.nfe + 1))
    assert [token for draft in drafts for token in draft.tokens] == done.tokens
    assert [len(draft.tokens) for draft in drafts] == [draft.accepted + 1 for draft in drafts]
    assert all(draft.drafted == draft.accepted + len(draft.refused) for draft in drafts)
    assert sum(draft.accepted for draft in drafts) > 0


def test_a_request_that_fails_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others of its pass are as they were before it, and come out as alone."""
    verifier = model_of(vocab_size=500)
    with torch.no_grad():
        verifier.model.embed_tokens.weight[7] = math.nan
    good, bad = some_prompts(5, 1)[0], torch.tensor([3, 7])
    assert 7 not in good.tolist()
    settings: dict[str, Any] = {"gen_length": 20, "suppress": [7]}
    out = dx.adaptive_decode(LLADA, good, verifier=verifier, mixture=0.9, eos_id=-1, **settings)
    gate = Gate(monkeypatch)
    with dx.Engine(LLADA, verifier=verifier, mixture=0.9, eos_id=-1, lanes=2, max_length=64) as engine:
        handles = [engine.submit(prompt, **settings) for prompt in (good, bad)]
        gate.passes.release(1000)
        assert handles[0].result(60).tokens == out.responses[0].tolist()
        assert handles[0].result(60).nfe == int(out.nfe)
        with pytest.raises(ValueError, match="holds NaN"):
            handles[1].result(60)
        cancelled = engine.submit(good, **settings)
        cancelled.cancel()
        until(lambda: engine.stats.active == engine.stats.waiting == 0)
        assert engine.submit(good, **settings).result(60).tokens == out.responses[0].tolist()


def test_a_pass_that_raises_leaves_all_as_it_was() -> None:
    verifier = model_of(vocab_size=500)
    with torch.no_grad():
        verifier.model.embed_tokens.weight[7] = math.nan
    numbers = dx.speculation.adaptive.checked_options(0.9)
    batch = dx.speculation.AdaptiveBatch(
        LLADA, 2, 32, verifier=verifier, mask_id=511, batch_invariant=True, **numbers
    )
    (settings,) = make_settings(dx.DecodeConfig(suppress=[7], seed=0), LLADA, "none", 1)
    for lane, prompt in enumerate(([3, 5], [3, 7])):
        batch.admit(lane, torch.tensor(prompt), 20, settings)
    rows = [vars(row).copy() for row in batch.sequences]
    with torch.inference_mode(), pytest.raises(ValueError, match="sequence 1 at position 3 holds NaN"):
        batch.step()
    assert (batch.forwards, batch.draft_forwards) == (0, 0)
    assert [vars(row) for row in batch.sequences] == rows
    with torch.inference_mode():
        assert batch.step([0]) == [0]
    assert (batch.forwards, batch.sequences[0].known > 2, batch.sequences[1].known) == (1, True, 2)


def test_what_does_not_fit_is_named() -> None:
    causal = model_of()
    cases: list[tuple[Model, dict[str, Any], str]] = [
        (
            causal,
            {"verifier": VERIFIER},
            "verifier: belongs to diffusion models, and Qwen3 is autoregressive",
        ),
        (causal, {"window": 3}, "window: belongs to diffusion models, .* so expected None, got 3"),
        (LLADA, {"verifier": LLADA}, "verifier: expected an autoregressive model of .*, got LLaDA"),
        (LLADA, {"verifier": VERIFIER, "drafter": "ngram"}, "drafter: belongs to autoregressive models"),
        (
            LLADA,
            {"verifier": VERIFIER, "draft_size": 3},
            "draft_size: does not go with a verifier, so expected None, got 3",
        ),
        (LLADA, {"mixture": 0.5}, "mixture: belongs to a verifier, and there is none, so expected None"),
        (LLADA, {"verifier": VERIFIER, "mixture": 1.5}, "mixture: expected a number from 0 to 1, got 1.5"),
        (LLADA, {"verifier": VERIFIER, "window": 0}, "window: expected a whole number >= 1, got 0"),
        (
            LLADA,
            {"verifier": VERIFIER, "cache": "dual"},
            "cache: with a verifier decoding goes left to right",
        ),
        (LLADA, {"verifier": VERIFIER, "share": True}, "share: goes with cache 'block' .*, got a verifier"),
        (
            LLADA,
            {"verifier": VERIFIER, "eos_id": 505},
            "verifier: it has 500 token ids, and the end token is",
        ),
        (
            golden.model("llada_tiny_a"),
            {"verifier": VERIFIER, "mask_id": 512},
            "mask_id: expected one of the",
        ),
    ]
    for model, settings, message in cases:
        with pytest.raises(ValueError, match=message):
            dx.Engine(model, max_length=64, **settings)
    with dx.Engine(LLADA, verifier=VERIFIER, max_length=64) as engine:
        asked: list[tuple[list[int], dict[str, Any], str]] = [
            ([], {}, "prompt: expected at least one token, got none"),
            ([505], {}, "verifier: it has 500 token ids, and the prompt holds 505"),
            ([3], {"threshold": 0.5}, "threshold: with a verifier decoding goes left to right"),
            ([3], {"logprobs": True}, "logprobs: with a verifier"),
            ([3], {"eos_id": 511}, "eos_id: expected a token that can be decoded, got the mask token 511"),
            ([3], {"eos_id": 505}, "verifier: it has 500 token ids, and the end token is 505"),
        ]
        for prompt, settings, message in asked:
            with pytest.raises(ValueError, match=message):
                engine.submit(prompt, **{"gen_length": 8, **settings})
