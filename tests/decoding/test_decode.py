"""decode beyond the golden cases: batches, caches, policies, streaming, stopping, bad input."""

from __future__ import annotations

import collections
import importlib
import itertools
import math
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import golden
from drafters import model_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import dparallel_ext as dx
from dparallel_ext import models, policies

MASK = 511
PROMPTS = torch.tensor([[115, 277, 342, 230], [29, 331, 41, 8], [3, 3, 9, 77]])


@pytest.fixture(scope="module")
def llada() -> models.Model:
    return golden.model("llada_tiny_a")


@pytest.fixture(scope="module")
def dream() -> models.Model:
    return golden.model("dream_tiny_a")


@pytest.fixture(autouse=True)
def _there(device: str, llada, dream, monkeypatch) -> None:
    """Every test of this file runs on every device."""
    llada.to(device)
    dream.to(device)
    monkeypatch.setattr(f"{__name__}.PROMPTS", PROMPTS.to(device))


class Fixed:
    """A 'model' with the same logits whatever it reads; counts its calls."""

    def __init__(self, logits: Tensor) -> None:
        self.logits, self.calls = logits, 0  # (L, V)

    def __call__(self, input_ids: Tensor) -> SimpleNamespace:
        self.calls += 1
        return SimpleNamespace(logits=self.logits[None, : input_ids.shape[1]].expand(len(input_ids), -1, -1))


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_sequence_does_not_depend_on_the_batch(llada, dream, cache: str, temperature: float) -> None:
    settings = {
        "gen_length": 24,
        "block_length": 8,
        "cache": cache,
        "temperature": temperature,
        "selector": ["entropy", "confidence", "quota"],
        "threshold": torch.tensor([2.0, 0.4, 3.0]),
    }
    for model in (llada, dream):
        whole = dx.decode(model, PROMPTS, seed=torch.tensor([5, 6, 7]), **settings)
        assert MASK not in whole.sequences
        assert whole.forwards == int(whole.nfe.max())
        for order in ([2, 0, 1], [1], [0, 0]):
            part = {**settings, "selector": [settings["selector"][i] for i in order]}
            part["threshold"] = settings["threshold"][order]
            out = dx.decode(model, PROMPTS[order], seed=torch.tensor([5, 6, 7])[order], **part)
            assert torch.equal(out.sequences, whole.sequences[order])
            assert torch.equal(out.nfe, whole.nfe[order])


def test_sampling_is_reproducible_and_seeds_matter(llada) -> None:
    def run(seed: int) -> Tensor:
        return dx.decode(
            llada, PROMPTS, gen_length=16, block_length=8, threshold=0.3, temperature=1.0, seed=seed
        ).sequences

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    alike = dx.decode(llada, PROMPTS[[0, 0]], gen_length=16, threshold=2.0, temperature=3.0, seed=1)
    assert not torch.equal(alike.sequences[0], alike.sequences[1])  # (seed, 0) and (seed, 1)


def test_unpacking_counts_and_autograd(llada) -> None:
    out = dx.decode(llada, PROMPTS, gen_length=16, block_length=8)
    sequences, forwards = out
    assert torch.equal(sequences, out.sequences)
    assert forwards == out.forwards == 16
    assert out.nfe.tolist() == [16, 16, 16]
    assert out.tokens_per_forward == 1.0
    assert torch.equal(sequences[:, :4], PROMPTS)
    llada(sequences).logits.sum().backward()  # what comes back is no inference tensor
    llada.zero_grad()


def test_the_schedule_shares_steps_out(llada) -> None:
    out = dx.decode(llada, PROMPTS[:1], gen_length=20, block_length=10, steps=8, record=True)
    assert out.forwards == 8
    steps = out.trajectory.step.view(2, 10)
    assert [steps[0].eq(i).sum().item() for i in range(1, 5)] == [3, 3, 2, 2]
    assert [steps[1].eq(i).sum().item() for i in range(5, 9)] == [3, 3, 2, 2]
    many = dx.decode(llada, PROMPTS[:1], gen_length=20, block_length=10, steps=64)
    assert many.forwards == 20  # never a pass that commits nothing


def test_what_is_not_asked_for_is_not_there(llada) -> None:
    settings = {"gen_length": 4, "block_length": 4}
    scored, kept = (dx.decode(llada, PROMPTS, **{name: True}, **settings) for name in ("logprobs", "record"))
    assert scored.trajectory is kept.logprobs is None
    assert torch.equal(scored.logprobs, kept.trajectory.logprob)


def test_the_fewest_commits_count_above_a_quota(llada) -> None:
    """And no pass is issued that they make needless."""
    settings = {"gen_length": 16, "block_length": 8, "selector": "quota", "min_commit": 3}
    out = dx.decode(llada, PROMPTS, threshold=1, **settings)
    assert out.nfe.tolist() == [6, 6, 6]
    assert torch.equal(out.sequences, dx.decode(llada, PROMPTS, threshold=3, **settings).sequences)


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_lengths_that_do_not_divide(llada, dream, cache: str) -> None:
    for model in (llada, dream):
        for gen_length, block_length in ((13, 5), (3, 32), (1, 1), (7, 7)):
            out = dx.decode(
                model, PROMPTS, gen_length=gen_length, block_length=block_length, threshold=2.0, cache=cache
            )
            assert out.sequences.shape == (3, 4 + gen_length)
            assert MASK not in out.sequences


def test_edges_of_the_batch(llada) -> None:
    assert dx.decode(llada, PROMPTS[:0], gen_length=8, record=True).sequences.shape == (0, 12)
    nothing = dx.decode(llada, PROMPTS, gen_length=0)
    assert torch.equal(nothing.sequences, PROMPTS)
    assert (nothing.forwards, nothing.tokens_per_forward) == (0, 0.0)
    one = dx.decode(llada, PROMPTS[0], gen_length=8, threshold=1.0)
    assert torch.equal(one.sequences, dx.decode(llada, PROMPTS[:1], gen_length=8, threshold=1.0).sequences)
    empty_prompt = dx.decode(llada, torch.zeros(2, 0, dtype=torch.int64), gen_length=8, threshold=2.0)
    assert empty_prompt.sequences.shape == (2, 8)


def test_dream_without_a_prompt(dream) -> None:
    for cache in ("none", "dual"):
        out = dx.decode(dream, torch.zeros(1, 0, dtype=torch.int64), gen_length=8, cache=cache)
        assert MASK not in out.sequences


def test_a_model_that_predicts_the_mask_token_ends(llada) -> None:
    logits = torch.randn(12, 40)
    logits[:, 7] = 100.0
    model = Fixed(logits)
    out = dx.decode(model, torch.tensor([1, 2]), gen_length=10, block_length=5, threshold=0.9, mask_id=7)
    assert 7 not in out.sequences
    assert out.forwards == model.calls <= 10


def test_bad_logits_are_named() -> None:
    logits = torch.randn(12, 40)
    logits[6] = math.nan
    with pytest.raises(ValueError, match="sequence 0 at position 6 holds NaN"):
        dx.decode(Fixed(logits), torch.tensor([1, 2]), gen_length=10, threshold=0.9, mask_id=7)


def test_needless_rows_of_the_head_are_not_computed(llada, monkeypatch) -> None:
    rows = []
    head = type(llada).head
    monkeypatch.setattr(type(llada), "head", lambda self, h: rows.append(h.shape) or head(self, h))
    dx.decode(llada, PROMPTS, gen_length=8, block_length=4, graphs=False)
    # A GPU computes whole windows, 12, so as not to wait for what is masked, filled up to 16.
    assert [shape[0] for shape in rows] == ([16] * 8 if PROMPTS.is_cuda else [12, 9, 6, 3] * 2)


def test_a_python_policy(llada) -> None:
    seen = []

    def two_best(stats: dx.RowStats, eligible: Tensor, step: Tensor) -> Tensor:
        seen.append((eligible.shape, step.tolist()))
        assert bool((stats.token[~eligible] == -1).all())
        return dx.select(stats, eligible, policies.make("quota", 2, batch=len(eligible)))

    settings = {"gen_length": 8, "block_length": 4}
    ours = dx.decode(llada, PROMPTS, policy=two_best, record=True, **settings)
    rows = dx.decode(llada, PROMPTS, policy=policies.make("quota", 2, batch=3), record=True, **settings)
    assert torch.equal(ours.sequences, rows.sequences)
    assert torch.equal(ours.trajectory.step, rows.trajectory.step)
    assert torch.equal(ours.trajectory.confidence, rows.trajectory.confidence)
    assert seen[0] == ((3, 4), [1, 1, 1])
    nothing = dx.decode(llada, PROMPTS, policy=lambda s, e, n: torch.zeros_like(e), **settings)
    assert nothing.forwards == 8  # at least one commits all the same
    everything = dx.decode(llada, PROMPTS, policy=lambda s, e, n: torch.ones_like(e), **settings)
    assert everything.forwards == 2
    sampled = [
        dx.decode(llada, PROMPTS, policy=p, temperature=0.7, seed=4, **settings).sequences
        for p in (two_best, policies.make("quota", 2, batch=3))
    ]
    assert torch.equal(*sampled)
    emptied = dx.decode(llada, PROMPTS, policy=lambda s, e, n: e.fill_(False), **settings)
    assert torch.equal(emptied.sequences, nothing.sequences)  # whatever it does with what it is given
    with pytest.raises(ValueError, match="policy: expected a bool Tensor"):
        dx.decode(llada, PROMPTS, policy=lambda s, e, n: None, **settings)


def test_the_trajectory_replays_the_decoding(llada) -> None:
    out = dx.decode(llada, PROMPTS, gen_length=16, block_length=8, threshold=2.0, record=True)
    step, confidence = out.trajectory.step, out.trajectory.confidence
    assert step.min() == 1
    assert torch.equal(step.amax(1), out.nfe)
    assert bool(((confidence > 0) & (confidence <= 1)).all())
    first = PROMPTS[:1].clone()
    board = torch.cat((first, torch.full((1, 16), MASK)), 1)
    p = llada(board).logits.softmax(-1)[0, 4:]
    at_first = step[0] == 1
    assert torch.allclose(confidence[0][at_first], p.amax(-1)[at_first], atol=1e-5)
    assert torch.equal(out.sequences[0, 4:][at_first], p.argmax(-1)[at_first])


def test_suppressed_ids_are_never_decoded(llada) -> None:
    plain = dx.decode(llada, PROMPTS, gen_length=16, threshold=1.0)
    banned = plain.sequences[:, 4:].unique().tolist()
    out = dx.decode(llada, PROMPTS, gen_length=16, threshold=1.0, suppress=banned)
    assert not set(out.sequences[:, 4:].flatten().tolist()) & set(banned)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "text"}, "prompt: expected int64 .* got str; encode it"),
        ({"suppress": [3, 512]}, r"suppress: expected token ids in \[0, 512\), got 512"),
        ({"suppress": [-1, 3]}, r"suppress: expected token ids in \[0, 512\), got -1"),
        ({"prompt": torch.zeros(2, 3)}, r"prompt: expected int64 \(P,\), got torch.float32 \(3,\)"),
        ({"prompt": torch.zeros(1, 2, 3, dtype=torch.int64)}, r"prompt: expected \(B, P\)"),
        ({"gen_length": -1}, "gen_length: expected a whole number >= 0"),
        ({"gen_length": 1.5}, "gen_length: expected a whole number >= 0"),
        ({"block_length": 0}, "block_length: expected a whole number >= 1"),
        ({"steps": 0}, "steps: expected a whole number >= 1"),
        ({"steps": 3}, "steps: expected a multiple of the 2 blocks"),
        ({"steps": 4, "threshold": 0.5}, "steps: belongs to the fixed schedule"),
        ({"threshold": "high"}, "threshold: expected a number"),
        ({"threshold": torch.zeros(2)}, r"threshold: expected a number or shape \(3,\)"),
        ({"selector": "best", "threshold": 0.5}, "selector: expected one of"),
        ({"selector": "entropy"}, "selector: belongs to a threshold"),
        ({"selector": "nonsense"}, "selector: belongs to a threshold.* got 'nonsense'"),
        ({"max_commit": 4}, "max_commit: belongs to a threshold"),
        (
            {"threshold": 0.5, "min_commit": [1, 0, 1]},
            "min_commit: expected a whole number >= 1, got 0 for sequence 1",
        ),
        ({"min_commit": torch.tensor([1, 2, 1])}, "min_commit: belongs to a threshold"),
        ({"selector": "confidence", "threshold": 90}, "threshold: expected a number >= 0 and <= 1"),
        (
            {"policy": lambda stats, *_: stats.confidence},
            r"policy: expected a bool Tensor \(3, 4\), got torch.float32",
        ),
        ({"policy": lambda *_: True}, r"policy: expected a bool Tensor \(3, 4\), got bool"),
        ({"policy": policies.make(batch=3), "max_commit": 2}, "policy: give it alone, without max_commit"),
        ({"policy": policies.make(batch=2)}, r"policy: expected float32 \(3, 5\)"),
        ({"policy": "entropy"}, "policy: expected rows or a function"),
        ({"policy": policies.make(batch=3), "threshold": 0.5}, "policy: give it alone"),
        ({"cache": "paged"}, "cache: expected one of"),
        ({"temperature": -1.0, "threshold": 0.5}, "temperature: expected a finite number"),
        ({"mask_id": -3}, "mask_id: expected a whole number >= 0"),
        ({"seed": torch.zeros(2, dtype=torch.int64), "temperature": 1.0}, "seed: expected an integer"),
        ({"model": "llada"}, "model: expected a module or function, got str"),
        ({"model": models.LLaDA}, "model: expected a module or function, got the class LLaDA"),
    ],
)
def test_bad_arguments_are_named(llada, change: dict, message: str) -> None:
    call = {"model": llada, "prompt": PROMPTS, "gen_length": 8, "block_length": 4, **change}
    with pytest.raises(ValueError, match=message):
        dx.decode(call.pop("model"), call.pop("prompt"), **call)


def test_positions_that_the_model_was_not_made_for_are_named(llada) -> None:
    most = models.max_positions(llada)
    assert most == llada.config["max_sequence_length"] == 512
    prompt = torch.ones(most - 8, dtype=torch.int64)
    settings = {"gen_length": 9, "threshold": 9.0, "block_length": 9}
    with pytest.warns(UserWarning, match=r"gen_length: 513 positions .* config says 512") as said:
        dx.decode(llada, prompt, **settings)
    assert said[0].filename == __file__
    with dx.Engine(llada, lanes=1, max_length=600) as engine, pytest.warns(UserWarning, match="513") as said:
        engine.submit(prompt, gen_length=9, threshold=9.0).cancel()
    assert said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dx.decode(llada, prompt, **{**settings, "gen_length": 8})
    assert models.max_positions(lambda ids: ids) is None
    hf = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=7))
    assert models.max_positions(hf) == 7


def test_models_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"mask_id: the model's config has no mask_token_id"):
        dx.decode(Fixed(torch.zeros(9, 9)), torch.tensor([1]))
    with pytest.raises(ValueError, match=r"model: expected its call to return an object with .logits"):
        dx.decode(lambda ids: 3, torch.tensor([1]), mask_id=0)
    with pytest.raises(ValueError, match=r"model: expected logits \(1, 5, V\)"):
        dx.decode(Fixed(torch.zeros(2, 9)), torch.tensor([1]), gen_length=4, mask_id=0)


def test_a_dtype_without_kernels_is_named_with_the_model(llada) -> None:
    wide, causal = (
        golden.model("llada_tiny_a", dtype=torch.float64),
        model_of(vocab_size=512).to(llada.device),
    )
    of_causal = model_of(vocab_size=512, dtype=torch.float64).to(llada.device)
    said = "expected weights in float32, bfloat16 or float16, got torch.float64; load it in another dtype"
    prompt = torch.tensor([[1, 2]])
    for name, call in (
        ("model", lambda: dx.decode(wide, prompt)),
        ("model", lambda: dx.Engine(wide)),
        ("model", lambda: dx.Engine(of_causal)),
        ("model", lambda: dx.speculate(of_causal, prompt)),
        ("model", lambda: dx.adaptive_decode(wide, prompt, verifier=causal)),
        ("verifier", lambda: dx.adaptive_decode(llada, prompt, verifier=of_causal)),
        ("drafter", lambda: dx.speculate(causal, prompt, drafter=of_causal)),
    ):
        with pytest.raises(ValueError, match=f"{name}: {said}"):
            call()
    foreign = Fixed(torch.zeros(5, 9, dtype=torch.float64))
    for call in (
        lambda: dx.decode(foreign, prompt[:, :1], gen_length=4, mask_id=0),
        lambda: dx.compat.generate(foreign, prompt[:, :1], gen_length=4, block_length=4, steps=4, mask_id=0),
    ):
        with pytest.raises(ValueError, match=r"model: its logits: expected .*, got torch\.float64"):
            call()


def test_a_pass_that_fails_changes_nothing(llada) -> None:
    """Of the batch: a caller may go on without the sequence that it failed of."""
    from dparallel_ext.decoding.decode import start_batch

    config = dx.DecodeConfig(threshold=1.0, gen_length=8, block_length=4)
    batch = start_batch(llada, list(PROMPTS), config)
    with torch.inference_mode():
        batch.step()
        tokens, rows = batch.tokens.clone(), [vars(row).copy() for row in batch.sequences]
        head, fail = llada.lm_head.weight[0].clone(), float("nan")
        llada.lm_head.weight[0] = fail
        with pytest.raises(ValueError, match="holds NaN"):
            batch.step()
        llada.lm_head.weight[0] = head
        assert torch.equal(batch.tokens, tokens)
        assert [vars(row) for row in batch.sequences] == rows
        batch.step()
        assert not torch.equal(batch.tokens, tokens)


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_sub_blocks_are_filled_from_left_to_right(llada, dream, cache: str) -> None:
    settings = {"gen_length": 30, "block_length": 12, "cache": cache, "threshold": 3.0, "record": True}
    for model in (llada, dream):
        whole = dx.decode(model, PROMPTS, **settings)
        again = dx.decode(model, PROMPTS, sub_block_length=12, **settings)
        assert torch.equal(whole.sequences, again.sequences)
        parts = dx.decode(model, PROMPTS, sub_block_length=4, **settings)
        for b in range(len(PROMPTS)):
            steps = parts.trajectory.step[b].split(4)  # 12 + 12 + 6: the last part is of 2
            assert all(int(x.max()) < int(y.min()) for x, y in itertools.pairwise(steps))
            assert any(len(x.unique()) < len(x) for x in steps)  # some in parallel
    with pytest.raises(ValueError, match="sub_block_length: expected a divisor of block_length 12, got 5"):
        dx.decode(llada, PROMPTS, sub_block_length=5, **settings)
    with pytest.raises(ValueError, match="steps: the fixed schedule is for whole blocks"):
        dx.decode(llada, PROMPTS, gen_length=24, block_length=12, sub_block_length=4, steps=6)


class Operators(TorchDispatchMode):
    """Counts the operators that are dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.found: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[func._schema.name.partition("::")[2]] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("more", [{}, {"record": True, "logprobs": True}], ids=str)
@pytest.mark.parametrize("count", [1, 5])
def test_numbers_go_to_the_device_together(
    monkeypatch: pytest.MonkeyPatch, llada: models.Model, count: int, more: dict[str, Any]
) -> None:
    """As many copies and looks for one sequence as for several, before the first pass and after the last."""
    decoding = importlib.import_module("dparallel_ext.decoding.decode")
    run, operators = decoding.run, Operators()
    begun: collections.Counter[str] = collections.Counter()

    def runs(*args: Any) -> None:
        begun.update(operators.found)
        run(*args)
        operators.found.clear()

    monkeypatch.setattr(decoding, "run", runs)
    prompts = [torch.arange(3, 9 + i).to(llada.device) for i in range(count)]
    with operators:
        dx.decode(llada, prompts, gen_length=16, block_length=8, graphs=False, **more)
    assert begun["aminmax"] == 1
    assert begun["_local_scalar_dense"] == begun["nonzero"] == 0
    # The numbers are made one tensor; which of the trajectory's columns are meant is found on the CPU.
    made = {name: operators.found[name] for name in ("lift_fresh", "_local_scalar_dense", "nonzero", "index")}
    found_out = len(more) // 2
    assert made == {"lift_fresh": 1, "_local_scalar_dense": found_out, "nonzero": found_out, "index": 0}
