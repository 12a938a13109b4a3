"""Sampling: what top_p and top_k leave, seeds, and the log-probabilities of the tokens that were drawn."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import EMULATED, assert_stats_close, every_level, everywhere, golden, refused
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext import models, reference

PROMPTS = [torch.tensor([5, 6, 7]), torch.tensor([9, 8, 7, 6, 5, 4]), torch.tensor([11])]
MASK = 511


@pytest.fixture(scope="module")
def llada() -> models.Model:
    return golden.model("llada_tiny_a")


def logits_of(rows: int, vocab: int, dtype: torch.dtype, *, coarse: bool) -> Tensor:
    z = torch.randn(rows, vocab) * 3
    return (z.round() if coarse else z).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [1, 2, 40, 1001, 5000])
@every_level
def test_samples_of_the_nucleus_match_the_oracle(dtype: torch.dtype, vocab: int) -> None:
    """Also where many logits are equal, and the mask token or a suppressed id is the most probable."""
    for coarse in (False, True):
        logits = logits_of(6, vocab, dtype, coarse=coarse)
        if vocab > 2:
            logits[0, vocab - 1], logits[1, 0] = 20.0, 20.0
        shared = {"mask_id": vocab - 1, "suppress": [0]} if vocab > 2 else {}
        shared |= {
            "temperature": 0.8,
            "seed": 2**62 + 7,
            "sequence": torch.arange(6),
            "position": 3,
            "step": 2,
        }
        for top_p, top_k in ((0.0, None), (0.3, 0), (0.95, None), (None, 1), (1.0, 7), (0.9, 20)):
            actual = dx.row_stats(logits, top_p=top_p, top_k=top_k, **shared)
            expected = reference.row_stats(logits, top_p=top_p, top_k=top_k, **shared)
            for name, a, e in zip(actual._fields, actual, expected, strict=True):
                assert_stats_close(a, e, name)


@everywhere
def test_llada_and_dream_sized_rows() -> None:
    for vocab, dtype in ((126464, torch.bfloat16), (152064, torch.float32))[EMULATED:]:
        logits = logits_of(3, vocab, dtype, coarse=False)
        shared = {"temperature": 1.2, "top_p": 0.95, "mask_id": vocab - 1, "seed": 3}
        for top_k in (None, 5000):
            actual = dx.row_stats(logits, top_k=top_k, **shared)
            expected = reference.row_stats(logits, top_k=top_k, **shared)
            assert torch.equal(actual.sample, expected.sample)
            # An id more or less at the edge is some 1e-6 of the probability.
            assert torch.allclose(actual.sample_logprob, expected.sample_logprob, atol=1e-5)


@everywhere
def test_equal_logits_are_kept_from_the_lowest_id() -> None:
    """Exactly top_k of them; and so many that at most top_p comes before the last."""
    rows, vocab = 100, 10
    flat = torch.zeros(rows, vocab)

    def drawn(**kept: Any) -> list[int]:
        return dx.row_stats(flat, temperature=1.0, seed=1, **kept).sample.unique().tolist()

    assert drawn(top_k=3) == [0, 1, 2]
    assert drawn(top_p=0.45) == [0, 1, 2, 3, 4]
    assert drawn(top_p=0.45, top_k=2) == [0, 1]
    assert drawn(top_p=0.45, mask_id=1, suppress=[0]) == [2, 3, 4, 5]  # of the eight others
    assert drawn(top_p=0.0) == drawn(top_k=1) == [0]
    assert drawn(top_k=99) == drawn(top_p=1.0) == list(range(vocab))


@everywhere
def test_the_noise_is_the_same_restricted_to_what_is_kept() -> None:
    """A token that is drawn from all ids, and kept, is the one drawn from the kept ones."""
    logits = torch.randn(300, 50)
    key = {"temperature": 1.0, "seed": 4}
    whole, cut = dx.row_stats(logits, **key), dx.row_stats(logits, top_p=0.6, **key)
    neutral = dx.row_stats(logits, top_p=1.0, top_k=0, **key)
    assert all(torch.equal(a, b) for a, b in zip(whole[:-1], neutral[:-1], strict=True))
    kept = reference.nucleus(logits.double(), 0.6, None)
    among = kept.gather(1, whole.sample[:, None])[:, 0]
    assert 0.3 < among.float().mean() < 0.9
    assert torch.equal(whole.sample[among], cut.sample[among])
    assert bool(kept.gather(1, cut.sample[:, None]).all())
    for name in ("token", "top1", "lse", "margin", "entropy"):  # of all ids, as the rules judge
        assert torch.equal(getattr(whole, name), getattr(cut, name))
    assert torch.allclose(cut.confidence, logits.softmax(1).gather(1, cut.sample[:, None])[:, 0], atol=1e-6)


@everywhere
def test_samples_follow_the_restricted_softmax() -> None:
    logits, n = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.1, -0.4]), 20000
    stats = dx.row_stats(logits.expand(n, 6), temperature=0.7, top_p=0.9, mask_id=4, seed=5)
    open_ = logits.double().clone()
    open_[4] = -math.inf
    kept = reference.nucleus(open_[None] / 0.7, 0.9, None)[0]
    assert 1 < int(kept.sum()) < 5
    expected = (open_ / 0.7).where(kept, -math.inf).softmax(0)
    observed = stats.sample.bincount(minlength=6) / n
    sigma = (expected * (1 - expected) / n).sqrt()
    assert bool(((observed - expected).abs() <= 4.5 * sigma).all()), (observed, expected)
    assert torch.allclose(stats.sample_logprob.double(), expected.log()[stats.sample], atol=1e-5)


@everywhere
def test_unmask_draws_from_the_nucleus() -> None:
    tokens, logits = torch.full((3, 8), MASK), torch.randn(3, 8, 600) * 2
    tokens[1, 2] = 5
    settings = {"mask_id": MASK, "temperature": 0.9, "top_p": 0.7, "top_k": 40, "seed": 2, "step": 4}
    rows = dx.policies.make("quota", 3, batch=3)
    copy = tokens.clone()
    out = dx.unmask_(tokens, logits, policy=rows, start=1, **settings)
    expected = reference.unmask_(copy, logits, policy=rows, start=1, **settings)
    assert torch.equal(tokens, copy)
    for name, a, e in zip(out.stats._fields, out.stats, expected.stats, strict=True):
        assert_stats_close(a, e, name)


FILTERS: list[dict[str, Any]] = [{}, {"top_p": 0.5}, {"top_p": 5e-324}, {"top_k": 3}, {"top_k": 2**62}]


@every_level
def test_a_tiny_temperature_is_greedy() -> None:
    """To the bit, whatever else is asked for."""
    logits = torch.randn(2, 5, 700) * 4
    logits[0] = logits[0].round()  # ties
    tokens = torch.full((2, 5), MASK)
    plain = dx.row_stats(logits, mask_id=MASK)
    expected = tokens.clone()
    dx.unmask_(expected, logits, mask_id=MASK, selector="quota", threshold=3)
    for temperature in (5e-324, 1e-45, 1e-38, 1e-10, 9.99e-6):
        for kept in FILTERS:
            drawn = {"temperature": temperature, "seed": 3, **kept}
            stats = dx.row_stats(logits, mask_id=MASK, **drawn)
            assert all(torch.equal(a, b) for a, b in zip(stats[:-1], plain[:-1], strict=True))
            found = tokens.clone()
            dx.unmask_(found, logits, mask_id=MASK, selector="quota", threshold=3, **drawn)
            assert torch.equal(found, expected)
    assert not torch.equal(dx.row_stats(logits, mask_id=MASK, temperature=1.0).sample, plain.sample)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@every_level
def test_rows_at_the_ends_of_a_dtype(dtype: torch.dtype) -> None:
    """Logits / T overflow, or swallow the noise: there is a token all the same, and it is the oracle's."""
    low, high = torch.finfo(dtype).min, torch.finfo(dtype).max
    for vocab in (3, 600, 20000):
        rows = torch.randn(8, vocab)
        rows[0] = low
        rows[1] = high
        rows[2] = (rows[2] / 6).clamp(-1, 1) * high
        rows[3] = torch.where(rows[3] > 0, high, low)
        rows[4] = torch.where(rows[4] > 0, low, 1.0)
        rows[5] -= 30000
        rows[6, vocab // 2] = high
        rows[7, vocab // 2] = math.inf
        logits = rows.to(dtype)
        for temperature in (1e-5, 0.3, 1e5, 1e38, 1e300):
            for kept in FILTERS if vocab < 20000 else FILTERS[:1]:
                drawn = {"temperature": temperature, "seed": 5, "suppress": [0], **kept}
                actual, expected = dx.row_stats(logits, **drawn), reference.row_stats(logits, **drawn)
                assert torch.equal(actual.sample, expected.sample), (vocab, temperature, kept)
                for name in ("token", "confidence", "entropy", "lse"):
                    assert_stats_close(getattr(actual, name), getattr(expected, name), name)


@everywhere
def test_scores_far_from_zero_keep_their_noise() -> None:
    """Above 2^24 a float32 does not hold a whole number, and these logits differ by half of that."""
    n = 500 if EMULATED else 4000
    logits = torch.tensor([2.0**24, 2.0**24 - 1, 2.0**24, 2.0**24 - 1]).expand(n, 4)
    stats = dx.row_stats(logits, temperature=1.0, seed=5)
    observed = stats.sample.bincount(minlength=4) / n
    expected = (logits[0].double() - 2**24).softmax(0).float()
    sigma = (expected * (1 - expected) / n).sqrt()
    assert bool(((observed - expected).abs() < 4.5 * sigma).all()), (observed, expected)


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_but_a_token_is_committed(dtype: torch.dtype) -> None:
    logits = torch.full((2, 4, 600), torch.finfo(dtype).min, dtype=dtype)
    logits[1, 2:] = torch.randn(600).to(dtype) * 1000
    for temperature in (1e-38, 1e-5, 0.5, 1.0, 1e38):
        for kept in FILTERS:
            tokens = torch.full((2, 4), MASK)
            settings = {"temperature": temperature, "selector": "quota", "threshold": 4, **kept}
            out = dx.unmask_(tokens, logits, mask_id=MASK, suppress=[0, 599], **settings)
            assert bool(out.done)
            assert bool(((tokens > 0) & (tokens < 599) & (tokens != MASK)).all()), tokens


@everywhere
def test_where_nothing_is_left_to_draw() -> None:
    """The mask token alone in the vocabulary, every other id suppressed, or of no probability."""
    alone, two = torch.zeros(1, 1, 1), torch.tensor([[[1.0, -math.inf, 2.0]]])
    for logits, suppress in ((alone, None), (torch.zeros(1, 1, 3), [0, 1]), (two, [0]), (two, [0, 1, 2])):
        mask_id = logits.shape[-1] - 1
        for temperature in (0.0, 1e-38, 1.0, 1e38):
            for kept in FILTERS:
                tokens = torch.full((1, 1), mask_id)
                with refused("sequence 0 at position 0 leaves no token to choose"):
                    dx.unmask_(
                        tokens, logits, mask_id=mask_id, suppress=suppress, temperature=temperature, **kept
                    )
                assert tokens.tolist() == [[mask_id]]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"top_p": 1.5}, r"top_p: expected a number from 0 to 1, got 1.5"),
        ({"top_p": -0.1}, r"top_p: expected a number from 0 to 1"),
        ({"top_p": math.nan}, r"top_p: expected a number from 0 to 1"),
        ({"top_k": -1}, r"top_k: expected a whole number >= 0 \(0 keeps all\), got -1"),
        ({"top_k": 2.5}, r"top_k: expected a whole number >= 0"),
        ({"temperature": -1.0}, r"temperature: expected a finite number >= 0"),
    ],
)
def test_bad_arguments_are_named(llada: models.Model, kwargs: dict[str, Any], message: str) -> None:
    settings = {"temperature": 1.0, **kwargs}
    with pytest.raises(ValueError, match=message):
        dx.row_stats(torch.zeros(1, 4), **settings)
    with pytest.raises(ValueError, match=message):
        dx.decode(llada, PROMPTS[0], gen_length=4, **settings)


WAYS: list[dict[str, Any]] = [
    {"threshold": 2.0},
    {"threshold": 0.3, "selector": "confidence", "cache": "dual"},
    {"steps": 8, "cache": "prefix"},
]


@pytest.mark.parametrize("way", WAYS)
def test_alone_in_a_batch_and_in_an_engine(llada: models.Model, way: dict[str, Any]) -> None:
    """The same tokens and log-probabilities for the same seed, beside greedy requests and others."""
    drawn = {"temperature": 0.9, "top_p": 0.8, "top_k": 50}
    shared = {"gen_length": 16, **way}
    seeds = torch.tensor([7, 8, 9])
    batch = dx.decode(llada, PROMPTS, block_length=8, seed=seeds, logprobs=True, **drawn, **shared)
    assert batch.logprobs is not None
    assert MASK not in torch.cat(batch.responses)
    free = dx.decode(llada, PROMPTS, block_length=8, seed=seeds, temperature=0.9, **shared)
    assert not torch.equal(free.sequences, batch.sequences)
    cache = way.get("cache", "none")
    submitted = {name: value for name, value in shared.items() if name != "cache"}
    with dx.Engine(llada, lanes=4, max_length=32, cache=cache, block_length=8) as engine:
        handles = [
            engine.submit(p, seed=int(s), logprobs=True, **drawn, **submitted)
            for p, s in zip(PROMPTS, seeds, strict=True)
        ]
        greedy = engine.submit(PROMPTS[0], **submitted)
        found = [h.result(60) for h in handles]
        assert greedy.result(60).logprobs is None
    for b, (prompt, completion) in enumerate(zip(PROMPTS, found, strict=True)):
        alone = dx.decode(
            llada, prompt, block_length=8, seed=seeds[b : b + 1], logprobs=True, **drawn, **shared
        )
        assert alone.responses[0].tolist() == batch.responses[b].tolist() == completion.tokens
        assert alone.logprobs is not None
        assert torch.allclose(alone.logprobs[0], batch.logprobs[b], atol=1e-4)
        assert torch.allclose(torch.tensor(completion.logprobs), batch.logprobs[b], atol=1e-4)
        assert handles[b].logprobs == completion.logprobs


def test_greedy_rows_do_not_read_them(llada: models.Model) -> None:
    plain = dx.decode(llada, PROMPTS, gen_length=16, threshold=2.0)
    out = dx.decode(llada, PROMPTS, gen_length=16, threshold=2.0, top_p=0.1, top_k=1)
    assert torch.equal(plain.sequences, out.sequences)
    assert torch.equal(plain.nfe, out.nfe)
    # nor those of a temperature that is as good as 0, which takes no seed either
    state = torch.get_rng_state()
    cold = dx.decode(llada, PROMPTS, gen_length=16, threshold=2.0, temperature=1e-38, top_p=0.1)
    assert torch.equal(plain.sequences, cold.sequences)
    assert torch.equal(state, torch.get_rng_state())
    # and drawing from one id is greedy
    one = dx.decode(llada, PROMPTS, gen_length=16, threshold=2.0, temperature=0.7, top_k=1)
    assert torch.equal(plain.sequences, one.sequences)


def test_without_a_seed_two_calls_differ(llada: models.Model) -> None:
    settings: dict[str, Any] = {"gen_length": 16, "temperature": 2.0}

    def both(**seed: Any) -> tuple[list[int], list[int]]:
        torch.manual_seed(5)
        runs = [dx.decode(llada, PROMPTS[0], **settings, **seed).responses[0].tolist() for _ in range(2)]
        return runs[0], runs[1]

    first, second = both()
    assert first != second
    assert both() == (first, second)
    assert both(seed=None) == (first, second)
    one, again = both(seed=0)
    assert one == again
    torch.manual_seed(5)
    with dx.Engine(llada, lanes=2, max_length=32, cache="none") as engine:
        runs = [engine.submit(PROMPTS[0], **settings).result(60).tokens for _ in range(2)]
    assert runs == [first, second]
    state = torch.get_rng_state()
    dx.decode(llada, PROMPTS[0], gen_length=4)
    assert torch.equal(state, torch.get_rng_state()), "a greedy call took from torch's generator"


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("way", [*WAYS[:1], {"policy": "function"}])
def test_logprobs_are_those_of_the_passes(
    llada: models.Model, temperature: float, way: dict[str, Any]
) -> None:
    """Recomputed as a trainer does: a pass over the state in which each token was drawn."""
    if way.get("policy"):
        way = {"policy": lambda stats, eligible, step: eligible & (stats.confidence > 0.02)}
    drawn = {"temperature": temperature, "top_p": 0.9, "top_k": 200, "seed": 3, "suppress": [2, 9]}
    out = dx.decode(llada, PROMPTS[:2], gen_length=12, record=True, logprobs=True, **drawn, **way)
    assert out.logprobs is not None
    assert out.logprobs.shape == (2, 12)
    assert out.logprobs.dtype == torch.float32
    assert out.trajectory is not None
    for b, prompt in enumerate(PROMPTS[:2]):
        response, step = out.responses[b], out.trajectory.step[b]
        for turn in step.unique().tolist():
            state = torch.cat((prompt, response.where(step < turn, MASK)))
            with torch.no_grad():
                z = llada(state[None]).logits[0, len(prompt) :].double()
            z[:, [2, 9]] = -math.inf
            if temperature:
                z[:, MASK] = -math.inf
                z /= temperature
                z = z.where(reference.nucleus(z, 0.9, 200), -math.inf)
            expected = z.log_softmax(1).gather(1, response[:, None])[:, 0]
            here = step == turn
            assert torch.allclose(out.logprobs[b, here].double(), expected[here], atol=1e-4)


def test_what_no_pass_drew_has_no_logprob(llada: models.Model) -> None:
    plain = dx.decode(llada, PROMPTS, gen_length=[16, 8, 16], block_length=4, temperature=0.9, seed=1)
    eos = int(plain.responses[0][2])
    out = dx.decode(
        llada,
        PROMPTS,
        gen_length=[16, 8, 16],
        block_length=4,
        temperature=0.9,
        seed=1,
        eos_id=eos,
        logprobs=True,
    )
    assert out.logprobs is not None
    assert int(out.generated[0]) == 4
    assert out.logprobs.isfinite().sum(1).tolist() == out.generated.tolist()
    assert bool(out.logprobs[0, 4:].isnan().all())
    assert bool(out.logprobs[1, 8:].isnan().all())
    assert out.trajectory is None
    assert plain.logprobs is None


def test_a_lane_forgets_what_it_held(llada: models.Model) -> None:
    """Requests one after another in one lane: each has its own log-probabilities."""
    settings: dict[str, Any] = {"gen_length": 12, "temperature": 0.9, "logprobs": True}
    with dx.Engine(llada, lanes=1, max_length=32, cache="none", block_length=4) as engine:
        found = [engine.submit(p, seed=b, **settings).result(60) for b, p in enumerate(PROMPTS)]
        none = engine.submit(PROMPTS[0], gen_length=0, logprobs=True).result(60)
    assert none.logprobs == []
    for b, (prompt, completion) in enumerate(zip(PROMPTS, found, strict=True)):
        alone = dx.decode(llada, prompt, block_length=4, seed=torch.tensor([b]), **settings)
        assert completion.tokens == alone.responses[0].tolist()
        assert alone.logprobs is not None
        assert torch.allclose(torch.tensor(completion.logprobs), alone.logprobs[0], atol=1e-4)
