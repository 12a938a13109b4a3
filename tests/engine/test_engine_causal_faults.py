"""What fails in an engine of an autoregressive model, and whom it concerns; what it refuses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import CancelledError
from typing import Any

import pytest
import torch
from conftest import golden
from drafters import MODEL, Knowing, model_of
from engines import Gate, until
from test_engine_causal import alone, prompts_of

import dparallel_ext as dx
from dparallel_ext.speculation import Draft, Lane


@pytest.mark.parametrize("logprobs", [False, True])
def test_cancelled_requests_leave_at_the_next_pass(logprobs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    with dx.Engine(MODEL, lanes=1, max_length=64, eos_id=-1, logprobs=logprobs) as engine:
        running, waiting, last = (engine.submit([11, 12], gen_length=24) for _ in range(3))
        parts = iter(running)
        until(lambda: engine.stats.active == 1)
        gate.passes.release(3)
        assert [len(next(parts)) for _ in range(3)] == [1, 1, 1]
        waiting.cancel()
        running.cancel()
        gate.passes.release(100)
        with pytest.raises(CancelledError, match="request 1 was cancelled"):
            waiting.result(60)
        with pytest.raises(CancelledError):
            list(parts)
        assert last.result(60).finish_reason == "length"
    assert (engine.stats.cancelled, engine.stats.completed, engine.stats.pages_used) == (2, 1, 0)
    assert len(gate.counts) <= 3 + 1 + 24


@pytest.mark.parametrize("drafter", [None, "ngram", "recycling"])
def test_nan_of_one_request_concerns_no_other(drafter: str | None) -> None:
    model = model_of()
    with torch.no_grad():
        model.embed.weight[60] = math.nan
    prompts = [prompt.clamp(max=59) for prompt in prompts_of(5, 6)]
    own: dict[str, Any] = {"gen_length": 16, "eos_id": -1, "suppress": [60]}
    expected = [alone(prompt, model, **own)[0] for prompt in prompts]
    with dx.Engine(model, drafter=drafter, draft_size=3, lanes=3, max_length=64, page_size=4) as engine:
        bad = [engine.submit([11, 12, 13, 14, 60, 12], **own) for _ in range(2)]
        good = [engine.submit(prompt, **own) for prompt in prompts]
        for handle in bad:
            with pytest.raises(ValueError, match=r"logits: sequence \d at position 6 holds NaN"):
                handle.result(60)
        assert [handle.result(60).tokens for handle in good] == expected
    stats = engine.stats
    assert (stats.failed, stats.completed, stats.pages_used) == (2, 6, 0)


def test_what_a_drafter_fails_of_fails_those_it_drafts_for() -> None:
    """And the others, and the engine, go on."""

    class Broken(Knowing):
        def _draft(self, lane: Lane, most: int) -> Draft:
            if 13 in lane.tokens.tolist():
                raise ZeroDivisionError("no such luck")
            return Draft()

    with dx.Engine(MODEL, drafter=Broken([]), draft_size=2, lanes=2, max_length=64, eos_id=-1) as engine:
        bad, good = (
            engine.submit(prompt, gen_length=8, suppress=[13]) for prompt in ([11, 13, 14], [11, 12])
        )
        with pytest.raises(ZeroDivisionError, match="no such luck"):
            bad.result(60)
        tokens = alone(torch.tensor([11, 12]), gen_length=8, eos_id=-1, suppress=[13])[0]
        assert good.result(60).tokens == tokens


def test_what_a_drafter_fails_of_behind_a_pass_ends_no_other_request() -> None:
    """Nor does a request hang that the pass has completed."""

    class Broken(Knowing):
        def guessed(self, lane: int, riders: int, numbers: Sequence[int]) -> None:
            if lane == 1:
                raise ZeroDivisionError("no such luck")

    with dx.Engine(MODEL, drafter=Broken([]), draft_size=2, lanes=3, max_length=64, eos_id=-1) as engine:
        with engine.core.lock:  # they begin together
            handles = [engine.submit([11, 12], gen_length=1) for _ in range(3)]
        failed = 0
        for handle in handles:
            try:
                assert len(handle.result(60).tokens) == 1
            except ZeroDivisionError:
                failed += 1
        assert failed == 1


class Foreign(Knowing):
    def check(self, model: Any) -> None:
        raise ValueError("drafter: made for another vocabulary")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threshold": 0.5}, "threshold: belongs to masked diffusion"),
        ({"cache": "block"}, "cache: belongs to masked diffusion"),
        ({"block_length": 8}, "block_length: belongs to masked diffusion"),
        ({"rule": "entropy:0.5"}, "rule: belongs to masked diffusion"),
        ({"mask_id": 3}, "mask_id: belongs to masked diffusion"),
        ({"record": True}, "record: an engine keeps no trajectory, so expected False"),
        ({"eos_id": 61}, "eos_id: expected one of the model's 61 token ids, got 61"),
        ({"suppress": [61]}, r"suppress: expected token ids in \[0, 61\), got 61"),
        ({"drafter": "medusa"}, "drafter: expected a Drafter, .*got .medusa"),
        ({"drafter": Foreign([])}, "drafter: made for another vocabulary"),
        ({"draft_size": -1, "drafter": "ngram"}, "draft_size: expected a whole number >= 0"),
        ({"share": True, "batch_invariant": True}, "share: goes with .* got batch_invariant"),
        ({"model": golden.model("llada_tiny_a"), "drafter": "ngram"}, "drafter: belongs to autoregressive"),
    ],
)
def test_bad_engines_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dx.Engine(**{"model": MODEL, "lanes": 1, "max_length": 64, **change})


def test_bad_requests_are_named() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"prompt": []}, "prompt: expected at least one token, got none"),
        ({"prompt": [61]}, r"prompt: expected token ids in \[0, 61\), got 61"),
        ({"gen_length": 64}, "gen_length: prompt and response have 65 positions, max_length is 64"),
        ({"infill": True}, "infill: belongs to masked diffusion"),
        ({"cache": "block"}, "cache: belongs to masked diffusion"),
        ({"steps": 4}, "steps: belongs to masked diffusion"),
        ({"config": dx.DecodeConfig(rule="credit")}, "rule: belongs to masked diffusion"),
        ({"eos_id": 61}, "eos_id: expected one of the model's 61 token ids, got 61"),
        ({"eos_id": -2}, "eos_id: expected a whole number >= -1"),
        ({"stop": [[1, 61]]}, "stop: expected one of the model's 61 token ids, got 61"),
        ({"suppress": [99]}, r"suppress: expected token ids in \[0, 61\), got 99"),
        ({"batch_invariant": True}, "batch_invariant: belongs to the engine, which has False"),
    ]
    with dx.Engine(MODEL, lanes=1, max_length=64) as engine:
        assert (engine.cache, engine.mask_id) == (None, None)
        for change, message in cases:
            with pytest.raises(ValueError, match=message):
                engine.submit(**{"prompt": [11], "gen_length": 8, **change})
        assert engine.submit([11], gen_length=4, eos_id=-1).result(60).nfe == 4
        assert engine.submit([11], gen_length=0).result(60).tokens == []
