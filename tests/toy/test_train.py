"""Training the built-in model: the objective, determinism, resuming; and the model that ships."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dparallel import evaluate, registry
from dparallel.toy import tasks, train
from dparallel.training import loop
from safetensors.torch import load_file

import dparallel_ext as dx
from dparallel_ext.rules import ONE

TINY = train.ToySettings(steps=6, batch=4, width=32, layers=1, heads=2, mlp_width=32, warmup=2)


def run(out: Path, settings: train.ToySettings = TINY, **more: object) -> dict[str, torch.Tensor]:
    train.train(out, settings, progress=False, evaluate=0, **more)  # type: ignore[arg-type]
    return load_file(out / "model.safetensors")


@pytest.mark.slow
def test_training_lowers_the_loss_and_writes_a_checkpoint(tmp_path: Path):
    settings = replace(TINY, steps=200, batch=4, muon_lr=1e-2, adam_lr=1e-2)
    train.train(tmp_path, settings, progress=False, evaluate=3)
    report = json.loads((tmp_path / "training.json").read_text())
    losses = [loss for _, loss in report["loss"]]
    assert losses[-1] < 0.9 * losses[0]
    assert report["settings"] == asdict(settings)
    assert report["held_out"]["problems"] == 3
    model = dx.models.load(tmp_path)
    assert model.dtype == torch.bfloat16
    assert model.mask_id == tasks.vocabulary().index(tasks.MASK)


def test_same_settings_same_model_and_a_stopped_run_goes_on_as_if_it_had_not(tmp_path: Path):
    whole = run(tmp_path / "whole")
    again = run(tmp_path / "again")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    # Stopped between two saves: the state of step 4 is what is left.
    calls = itertools.count()
    original = train.batch_of

    def stopping(settings: train.ToySettings, step: int) -> tuple[torch.Tensor, int]:
        if next(calls) == 5:
            raise KeyboardInterrupt
        return original(settings, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "batch_of", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "part", save_every=4)
    assert torch.load(tmp_path / "part" / "state.pt", weights_only=True)["step"] == 4
    assert not (tmp_path / "part" / "model.safetensors").exists()
    resumed = run(tmp_path / "part", save_every=2)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    other = run(tmp_path / "other", replace(TINY, seed=1))
    assert any(not torch.equal(whole[name], other[name]) for name in whole)


def test_the_autoregressive_objective_is_the_cross_entropy_up_to_the_first_eos(monkeypatch: Any):
    """With it, and without the EOS that fills the rows up; in float32 on every machine."""
    monkeypatch.setattr(train.backends, "fast_bfloat16", lambda *_: False)
    torch.manual_seed(0)
    model = dx.models.Qwen3(train.causal_config(TINY))
    train.initialise(model)
    ids, prompt = train.batch_of(TINY, 0)
    eos = tasks.vocabulary().index(tasks.EOS)
    with torch.no_grad():
        logp = model(ids).logits.log_softmax(-1)
        ends = [row.tolist().index(eos) for row in ids]
        each = [-logp[b, at - 1, ids[b, at]] for b, end in enumerate(ends) for at in range(prompt, end + 1)]
        loss = train.next_token_loss(model, ids, prompt, eos)
    assert float(loss) == pytest.approx(float(torch.stack(each).mean()), rel=1e-5)


def test_rates_rise_stay_and_fall():
    rates = [loop.learning_rate(step, steps=20, warmup=4, decay=0.25) for step in range(20)]
    assert rates == [0.25, 0.5, 0.75, *[1.0] * 13, 0.8, 0.6, 0.4, 0.2]
    assert loop.learning_rate(19, steps=20, warmup=1, decay=0.0) == 1.0


def test_the_seconds_of_all_saves_are_summed_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By a clock that ticks whenever it is read: at the beginning, and at the saves of steps 2, 4 and 6."""
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=itertools.count().__next__))
    run(tmp_path, save_every=2)
    assert json.loads((tmp_path / "training.json").read_text())["seconds"] == 3
    run(tmp_path, replace(TINY, steps=10), save_every=2)
    assert json.loads((tmp_path / "training.json").read_text())["seconds"] == 5


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_ends_the_run_and_spoils_no_weight(tmp_path: Path, kind: str):
    calls, original = itertools.count(), train.masked_diffusion_loss

    def overflowing(*args: Any, **kwargs: Any) -> Any:
        loss = original(*args, **kwargs)
        if next(calls) < 4:
            return loss
        return loss * math.inf if kind == "loss" else loss + 1e-30 * (loss - loss.detach()).sqrt()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "masked_diffusion_loss", overflowing)
        with pytest.raises(ValueError, match=r"the loss of step 5 is .*: training stops, and .*state\.pt"):
            run(tmp_path / "part", save_every=4)
    assert torch.load(tmp_path / "part" / "state.pt", weights_only=True)["step"] == 4
    whole, resumed = run(tmp_path / "whole"), run(tmp_path / "part", save_every=2)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_run_with_other_settings_is_not_overwritten(tmp_path: Path):
    run(tmp_path)
    with pytest.raises(ValueError, match="other settings"):
        run(tmp_path, replace(TINY, width=64))
    with pytest.raises(
        ValueError, match=r"steps: .* holds a run of 6 steps, expected at least as many, got 5"
    ):
        run(tmp_path, replace(TINY, steps=5))


def test_the_objective_is_llada_s():
    """1/t-weighted cross entropy of masked tokens over the response length, written out plainly."""
    torch.manual_seed(0)
    model = dx.models.LLaDA(train.model_config(TINY))
    train.initialise(model)
    ids, prompt = train.batch_of(TINY, 0)
    seen = []

    def hidden(noisy: torch.Tensor, **more: object) -> torch.Tensor:
        seen.append(noisy)
        return type(model).hidden(model, noisy, **more)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(model, "hidden", hidden)
        loss = train.masked_diffusion_loss(model, ids, [prompt], seed=5)
        noisy = seen[0]
        logits = model(noisy).logits.double()
    generator = torch.Generator().manual_seed(5)
    batch = len(ids)
    t = (torch.randperm(batch, generator=generator) + torch.rand(batch, generator=generator)) / batch
    masked = noisy == model.mask_id
    assert masked[:, :prompt].sum() == 0
    assert masked.any()
    assert torch.equal(noisy[~masked], ids[~masked])
    expected = 0.0
    for b in range(batch):
        nll = F.cross_entropy(logits[b], ids[b], reduction="none")
        expected += float(nll[masked[b]].sum() / max(float(t[b]), 1e-2))
    expected /= batch * (ids.shape[1] - prompt)
    assert float(loss) == pytest.approx(expected, rel=2e-2)  # bfloat16 against float64


def test_mask_ratios_are_uniform():
    """Over many batches the share of masked response tokens spreads evenly over (0, 1)."""
    generator_shares = []
    model = dx.models.LLaDA(train.model_config(TINY))
    for seed in range(200):
        seen: list[torch.Tensor] = []

        def hidden(noisy: torch.Tensor, seen: list[torch.Tensor] = seen) -> torch.Tensor:
            seen.append(noisy)
            return type(model).hidden(model, noisy)

        ids, prompt = train.batch_of(TINY, 0)
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.setattr(model, "hidden", hidden)
            train.masked_diffusion_loss(model, ids, [prompt], seed=seed)
        generator_shares += (seen[0][:, prompt:] == model.mask_id).double().mean(1).tolist()
    counts = torch.histc(torch.tensor(generator_shares), bins=4, min=0, max=1)
    assert bool((counts > 150).all()), counts  # of 800, 200 each expected
    assert bool((counts < 250).all()), counts


@pytest.mark.parametrize(
    ("name", "value"),
    [("warmup", 0), ("muon_lr", "fast"), ("adam_lr", 1), ("ema", float("nan")), ("decay", 2), ("heads", 64)],
)
def test_a_setting_that_does_not_fit_is_named(name: str, value: object):
    with pytest.raises(ValueError, match=f"^{name}: expected "):
        train.ToySettings(**{name: value})  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_shipped_model_is_right_and_has_passes_left_to_save():
    """Its recorded accuracy meets the aim, and a fresh sample bears it out."""
    directory = registry.directory_of(registry.DEFAULT)
    assert sum(f.stat().st_size for f in directory.iterdir()) <= 8e6
    recorded = json.loads((directory / "training.json").read_text())
    assert train.ToySettings(**recorded["settings"]) == train.ToySettings()
    assert recorded["held_out"]["problems"] == 2000
    assert recorded["held_out"]["nfe_mean"] == tasks.GEN_LENGTH
    assert recorded["held_out"]["accuracy"] >= 0.95
    loaded = registry.load()
    one = evaluate.evaluate("", ONE, problems=8, loaded=loaded)
    fast = evaluate.evaluate("", "entropy:0.5", problems=40, loaded=loaded)
    assert one["accuracy"] >= 0.8  # five standard errors below 95% would be 0.71
    assert fast["accuracy"] >= 0.88
    assert 8 < fast["nfe_mean"] < 32


def test_transformers_tokenizer_and_our_model_make_the_two_line_example_of_the_readme():
    model, tokenizer = registry.load()
    problem = next(tasks.problems("held_out"))
    prompt = torch.tensor([tokenizer.encode(problem.prompt).ids])
    sequences, forwards = dx.decode(model, prompt, gen_length=64, threshold=0.5)
    assert tasks.is_correct(problem, tokenizer.decode(sequences[0, prompt.shape[1] :].tolist()))
    assert forwards < 40


def test_its_autoregressive_sibling_and_the_drafters_that_ship() -> None:
    """The recorded figures, borne out by a fresh sample; transformers reads it, and gives the same text."""
    directory = registry.directory_of("builtin:causal")
    recorded = json.loads((directory / "training.json").read_text())
    assert recorded["settings"] == asdict(train.ToySettings(steps=1500, causal=True))
    assert recorded["held_out"]["problems"] == 2000
    assert recorded["held_out"]["accuracy"] >= 0.97
    loaded = registry.load("builtin:causal", dtype=torch.float32)
    plain: list[evaluate.Answer] = []
    row = evaluate.evaluate_drafter("builtin:causal", None, problems=30, loaded=loaded, answers=plain)
    assert row["accuracy"] >= 0.95
    for name, least in (
        ("builtin:dflash", 6),
        ("builtin:parallelspec", 3),
        ("builtin:adadecode", 4),
        ("builtin:ppd", 2),
        ("builtin:hidden_transfer", 3),
        ("ngram", 1),
    ):
        answers: list[evaluate.Answer] = []
        size = 16 if name in ("builtin:ppd", "builtin:hidden_transfer") else None
        row = evaluate.evaluate_drafter(
            "builtin:causal", name, draft_size=size, problems=30, loaded=loaded, answers=answers
        )
        assert answers == plain
        assert row["tokens_per_forward"] > least, name
        if name == "builtin:adadecode":
            assert sum(row["accepted"]) > 0.95 * sum(row["drafted"])
            assert row["layers"] < 0.6
        else:
            assert row["layers"] == pytest.approx(1 / row["tokens_per_forward"])
        if name in registry.DRAFTERS:
            assert registry.DRAFTERS[name].stat().st_size <= 4e6
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    for answer in plain[:3]:
        found = theirs.generate(torch.tensor([answer.prompt]), max_new_tokens=64, do_sample=False)
        assert found[0, len(answer.prompt) : -1].tolist() == answer.tokens
