"""Log-likelihoods of answers: exact ones, and estimates."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import pytest
import torch
from conftest import golden
from dparallel import registry
from dparallel.likelihood import Likelihood, answer_masks, iter_log_likelihoods, log_likelihoods
from dparallel.toy import tasks

import dparallel_ext as dx
from dparallel_ext import models
from dparallel_ext.models import Model
from dparallel_ext.ops.head import CHUNK_BYTES


def small(family: type[Model], **changes: Any) -> Model:
    """Random weights and a vocabulary of 12; SDAR's blocks have 4 tokens, Fast-dLLM v2's 8."""
    torch.manual_seed(0)
    config = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 12,
        "mask_token_id": 11,
        "block_size": 4,
        "bd_size": 8,
        **changes,
    }
    model = family(config).eval()
    with torch.no_grad():
        model.lm_head.weight *= 8  # so that predictions differ
    return model


BIDIRECTIONAL = {
    "llada": golden.model("llada_tiny_a", dtype=torch.float32),
    "dream": small(models.Dream),
}


BLOCK_CAUSAL = {"sdar": small(models.SDAR), "fast_dllm": small(models.FastDLLM)}


MODELS = BIDIRECTIONAL | BLOCK_CAUSAL


def logprobs(model: Model, ids: list[int], position: int) -> torch.Tensor:
    """(V,) float64, of the token at `position`, by one plain forward pass."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, max(position - model.shift, 0)]
    return logits.double().log_softmax(-1)


def left_to_right(model: Model, prompt: list[int], answer: list[int]) -> Likelihood:
    """The chain rule, one plain pass for each token."""
    ids, total, greedy = prompt + answer, 0.0, True
    for at in range(len(prompt), len(ids)):
        size = model.block_length
        end = len(ids) if size is None else at - at % size + size
        found = logprobs(model, ids[:at] + [model.mask_id] * (end - at), at)
        total += float(found[ids[at]])
        found[model.mask_id] = -math.inf
        greedy &= int(found.argmax()) == ids[at]
    return Likelihood(total, greedy)


def expectation(model: Model, prompt: list[int], answer: list[int]) -> float:
    """LLaDA's bound: E over l and over the masks of l tokens."""
    length, total = len(answer), 0.0
    for count in range(1, length + 1):
        subsets = list(itertools.combinations(range(length), count))
        for masked in subsets:
            ids = prompt + [model.mask_id if i in masked else t for i, t in enumerate(answer)]
            term = sum(float(logprobs(model, ids, len(prompt) + i)[answer[i]]) for i in masked)
            total += term * length / count / len(subsets) / length
    return total


def some(model: Model, *lengths: tuple[int, int]) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and answers of such lengths."""
    g = torch.Generator().manual_seed(len(lengths))
    high = min(model.mask_id, model.shape.embedding_size)

    def draw(n: int) -> list[int]:
        return torch.randint(0, high, (n,), generator=g).tolist()

    return [draw(p) for p, _ in lengths], [draw(n) for _, n in lengths]


LENGTHS = [(0, 3), (5, 5), (7, 1), (8, 6), (9, 0), (16, 4)]


@pytest.mark.parametrize("name", MODELS)
def test_left_to_right_is_the_chain_rule(name: str) -> None:
    model = MODELS[name]
    prompts, answers = some(model, *LENGTHS)
    prompts += [prompts[3]] * 3  # shares its finished blocks, and beginnings of its answer
    answers += [answers[3], [*answers[3][:3], 1, 2], list(reversed(answers[3]))]
    results = log_likelihoods(model, prompts, answers, method="left_to_right", batch_size=4)
    for prompt, answer, result in zip(prompts, answers, results, strict=True):
        expected = left_to_right(model, prompt, answer)
        assert result.logprob == pytest.approx(expected.logprob, abs=2e-4)
        assert result.greedy == expected.greedy


@pytest.mark.parametrize("name", BLOCK_CAUSAL)
def test_block_causal_likelihoods_sum_to_one(name: str) -> None:
    """Over all answers of two tokens, inside a block and across its edge; one of them is greedy."""
    model = BLOCK_CAUSAL[name]
    answers = [list(pair) for pair in itertools.product(range(model.shape.embedding_size), repeat=2)]
    for prompt in ([3, 1, 4, 1, 5], [3, 1, 4], [3, 1, 4, 1, 5, 9, 2]):
        found = log_likelihoods(model, [prompt] * len(answers), answers, batch_size=200)
        assert sum(math.exp(one.logprob) for one in found) == pytest.approx(1, abs=1e-4)
        assert sum(bool(one.greedy) for one in found) == 1


@pytest.mark.parametrize("name", ["llada", "sdar"])
def test_results_come_one_by_one_outside_of_inference_mode(name: str) -> None:
    """A consumer may train, or stop, between two results."""
    prompts, answers = some(MODELS[name], (5, 2), (4, 1), (6, 2))
    results = iter_log_likelihoods(MODELS[name], prompts, answers, batch_size=1)
    assert next(results)[0] == 0
    assert not torch.is_inference_mode_enabled()


def test_block_causal_default_and_block_length() -> None:
    model = BLOCK_CAUSAL["sdar"]
    prompts, answers = some(model, (5, 6))
    by_default = log_likelihoods(model, prompts, answers)
    assert by_default == log_likelihoods(model, prompts, answers, method="left_to_right")
    wider = small(models.SDAR, block_size=8)
    assert log_likelihoods(model, prompts, answers, block_length=8) == log_likelihoods(
        wider, prompts, answers
    )
    assert by_default != log_likelihoods(wider, prompts, answers)


@pytest.mark.parametrize("name", MODELS)
def test_short_answers_get_the_exact_expectation(name: str) -> None:
    model = MODELS[name]
    prompts, answers = some(model, (0, 3), (6, 4), (3, 1))
    found = log_likelihoods(model, prompts, answers, method="monte_carlo", samples=15, batch_size=5)
    for prompt, answer, one in zip(prompts, answers, found, strict=True):
        assert one.logprob == pytest.approx(expectation(model, prompt, answer), abs=2e-4)


@pytest.mark.parametrize("name", ["llada", "fast_dllm"])
def test_monte_carlo_converges(name: str) -> None:
    """The mean over seeds comes to the expectation, as fast as it should; one seed says the same twice."""
    model = MODELS[name]
    prompts, answers = some(model, (4, 5))
    expected = expectation(model, prompts[0], answers[0])

    def estimate(seed: int, batch_size: int = 16) -> float:
        options: dict[str, Any] = {"method": "monte_carlo", "samples": 16, "greedy": False, "seed": seed}
        return log_likelihoods(model, prompts, answers, batch_size=batch_size, **options)[0].logprob

    found = torch.tensor([estimate(seed) for seed in range(60)], dtype=torch.float64)
    assert float(found.std()) > 0
    assert abs(float(found.mean()) - expected) < 4 * float(found.std()) / 60**0.5
    assert estimate(7) == pytest.approx(float(found[7]), abs=1e-5)
    assert estimate(7, batch_size=3) == pytest.approx(float(found[7]), abs=1e-4)


def test_counts_are_stratified_and_uniform() -> None:
    """As published: the counts of masks are spread evenly over 1..L; over all seeds each is as likely."""
    for length, samples in ((5, 15), (40, 8), (7, 128), (300, 128)):
        counts = [answer_masks(length, samples, seed).masked.sum(1) for seed in range(20)]
        for each in counts:
            assert len(each) == min(samples, 2**length - 1)
            assert int(each.min()) >= 1
            assert int(each.max()) <= length
        if 2**length - 1 > samples:
            spread = Counter(counts[0].tolist())
            assert max(spread.values()) <= -(-samples // length)
            assert len(spread) == min(length, samples)
    drawn = torch.stack([answer_masks(40, 8, seed).masked for seed in range(400)]).double()
    assert float((drawn.mean((0, 1)) - 20.5 / 40).abs().max()) < 0.05  # every position, as often
    masks = answer_masks(40, 8, 0)
    assert torch.equal(masks.weight > 0, masks.masked)
    total = masks.weight.sum(1)  # of each sample: L / l * l / n
    assert torch.allclose(total, torch.full_like(total, 40 / 8))


def test_expected_weight_of_every_token_is_one_over_expected_masks() -> None:
    """If every prediction were log p = -1, the bound would be -L, whichever masks are drawn."""
    for length, samples in ((1, 1), (3, 7), (3, 5), (30, 16)):
        weight = answer_masks(length, samples, 0).weight
        assert float(weight.sum()) == pytest.approx(length)


@pytest.mark.parametrize("name", ["llada", "dream"])
def test_greedy_is_what_decoding_gives(name: str) -> None:
    model = BIDIRECTIONAL[name]
    prompts, _ = some(model, (6, 1), (9, 1), (0, 1))
    answers = [
        dx.decode(model, torch.tensor(p, dtype=torch.int64), gen_length=n, block_length=n)
        .responses[0]
        .tolist()
        # Without a prompt all masks are alike: which of several came first would be a matter of rounding.
        for p, n in zip(prompts, (4, 7, 1), strict=True)
    ]
    options: dict[str, Any] = {"method": "monte_carlo", "samples": 2}
    assert all(one.greedy for one in log_likelihoods(model, prompts, answers, **options))
    wrong = [
        [(token + 1) % 11 if i == n % len(answer) else token for i, token in enumerate(answer)]
        for n, answer in enumerate(answers)
    ]
    assert not any(one.greedy for one in log_likelihoods(model, prompts, wrong, **options))
    assert all(one.greedy is None for one in log_likelihoods(model, prompts, wrong, greedy=False, **options))


@pytest.mark.parametrize("family", [models.SDAR, models.FastDLLM, models.Dream])
def test_the_mask_is_no_greedy_choice(family: type[Model]) -> None:
    """Where the mask has the largest logit, the best other token is decoded."""
    model, prompt = small(family), [1, 2, 3, 4, 5]
    ids = prompt + [model.mask_id] * (1 if model.block_length is None else 3)
    with torch.no_grad():
        model.lm_head.weight[model.mask_id] = 9 * model.hidden(torch.tensor([ids]))[0, 5 - model.shift]
    found = logprobs(model, ids, 5)
    assert int(found.argmax()) == model.mask_id
    best = int(found[: model.mask_id].argmax())
    assert dx.decode(model, [prompt], gen_length=1).responses[0][0] == best
    for token in range(model.mask_id):
        (one,) = log_likelihoods(model, [prompt], [[token]], method="left_to_right")
        assert one.greedy == (token == best)


def test_one_pass_for_one_token_however_many_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four one-token answers to one prompt are one masked sequence; and the head sees one row."""
    both, sdar, fast_dllm = BIDIRECTIONAL["llada"], BLOCK_CAUSAL["sdar"], BLOCK_CAUSAL["fast_dllm"]
    for model, batch in ((both, 16), (both, 1), (sdar, 16), (fast_dllm, 16)):
        tokens, rows = [], []
        step, head = model.step, model.head
        monkeypatch.setattr(
            model, "step", lambda ids, *rest, s=step, t=tokens: (t.append(len(ids)), s(ids, *rest))[1]
        )
        monkeypatch.setattr(model, "head", lambda x, h=head, r=rows: (r.append(len(x)), h(x))[1])
        size = model.block_length
        prompt = [1] * (6 if size is None else size + 2)
        log_likelihoods(model, [prompt] * 4, [[7], [8], [9], [10]], greedy=False, batch_size=batch)
        assert tokens == ([7] if size is None else [size, size])
        assert rows == [1]


def test_rolling_text_costs_one_block_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished blocks are computed once; a pass holds no more than its tokens, and the head a chunk."""
    import dparallel.likelihood as likelihood

    model = BLOCK_CAUSAL["sdar"]
    prompts, answers = some(model, (0, 37))
    expected = left_to_right(model, prompts[0], answers[0])
    tokens, rows = [], []
    step, head = model.step, model.head
    monkeypatch.setattr(likelihood, "PASS_TOKENS", 40)
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 12 * 4 * 3)
    monkeypatch.setattr(model, "step", lambda ids, *rest: (tokens.append(len(ids)), step(ids, *rest))[1])
    monkeypatch.setattr(model, "head", lambda x: (rows.append(len(x)), head(x))[1])
    (found,) = log_likelihoods(model, prompts, answers)
    assert found.logprob == pytest.approx(expected.logprob, abs=2e-4)
    assert sum(tokens) == 36 + 37 * 4
    assert max(tokens) <= 40
    assert max(rows) <= 3


def test_16_bit_rows_are_filled_up() -> None:
    model = golden.model("sdar_tiny_a", dtype=torch.bfloat16)
    exact = golden.model("sdar_tiny_a", dtype=torch.float32)
    prompts, answers = some(model, (5, 6), (11, 3), (2, 9))
    for method in ("left_to_right", "monte_carlo"):
        found = log_likelihoods(model, prompts, answers, method=method, samples=8)
        expected = log_likelihoods(exact, prompts, answers, method=method, samples=8)
        for one, other in zip(found, expected, strict=True):
            assert one.logprob == pytest.approx(other.logprob, rel=0.02)


def test_teacher_prefers_right_answers() -> None:
    model, tokenizer = registry.load("builtin:teacher")
    right = wrong = 0.0
    for problem in itertools.islice(tasks.problems("held_out", 3), 4):
        prompt = tokenizer.encode(problem.prompt).ids
        answers = [
            tokenizer.encode(problem.response.replace(f"#### {problem.answer}", f"#### {number}")).ids
            for number in (problem.answer, (problem.answer + 7) % 100)
        ]
        first, second = log_likelihoods(model.float(), [prompt] * 2, answers, samples=16, greedy=False)
        right, wrong = right + first.logprob, wrong + second.logprob
        assert first.logprob > second.logprob + 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "exact"}, "method: expected one of"),
        ({"method": ""}, "method: expected one of .* got ''"),
        ({"samples": 0}, "samples: expected a whole number >= 1, got 0"),
        ({"batch_size": 2.0}, "batch_size: expected a whole number >= 1, got 2.0"),
        ({"block_length": 8}, "block_length: only for block-causal models"),
        ({"mask_id": 512}, "mask_id: expected one of the model's 512 token ids, got 512"),
        ({"mask_id": -1}, "mask_id: expected a whole number >= 0, got -1"),
        ({"mask_id": 1.5}, r"mask_id: expected a whole number >= 0, got 1\.5"),
        ({"prompts": [[1], [2]]}, "answers: expected one for each of 2 prompts, got 1"),
        ({"answers": [[512]]}, r"answers\[0\]: expected token ids in \[0, 512\), got 512"),
        ({"answers": [[3, -1]]}, r"answers\[0\]: expected token ids in \[0, 512\), got -1"),
        ({"prompts": [[[1]]]}, r"prompts\[0\]: expected int64 \(P,\), got torch"),
        ({"answers": [[0.5]]}, r"answers\[0\]: expected int64 \(P,\), got torch"),
    ],
)
def test_bad_arguments(options: dict[str, Any], said: str) -> None:
    given = {"prompts": [[1]], "answers": [[2]], **options}
    with pytest.raises(ValueError, match=said):
        iter_log_likelihoods(BIDIRECTIONAL["llada"], **given)
    with pytest.raises(ValueError, match=r"model: expected one of dparallel_ext\.models"):
        iter_log_likelihoods(lambda ids: None, [[1]], [[2]])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"model: expected weights in float32, .*, got torch\.float64"):
        iter_log_likelihoods(golden.model("llada_tiny_a", dtype=torch.float64), [[1]], [[2]])
    with pytest.raises(ValueError, match="block_length: expected a whole number >= 1, got 0"):
        iter_log_likelihoods(golden.model("sdar_tiny_a"), [[1]], [[2]], block_length=0)
