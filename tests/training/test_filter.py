"""Filters: the oracle against a plain loop, what learns from what, the command, and the one that ships."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import golden
from dparallel import cli, evaluate, registry
from dparallel.problems import read_prompts
from dparallel.toy import train
from dparallel.training import filter, trajectories
from safetensors import safe_open
from typer.testing import CliRunner

import dparallel_ext as dx
from dparallel_ext import models
from dparallel_ext.rules import Learned

BLOCK, MASK = 16, 511
PROMPTS = [torch.arange(3, 14), torch.arange(40, 47), torch.arange(1, 30)]


@pytest.fixture(scope="module")
def llada() -> models.Model:
    return golden.model("llada_tiny_a")


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_the_oracle_is_its_loop(llada: models.Model, cache: str) -> None:
    """Against plain tensors; with cache "dual" that the notes are of the same passes in a batch and alone."""
    lengths = [40, 20, 5]
    out = dx.decode(llada, PROMPTS, gen_length=lengths, block_length=BLOCK, steps=None)
    answers = [
        (out.sequences[b, : len(p) + n], len(p))
        for b, (p, n) in enumerate(zip(PROMPTS, lengths, strict=True))
    ]
    settings: dict[str, Any] = {"block_length": BLOCK, "cache": cache, "progress": False}
    found, mean = filter.record(llada, answers, batch=2, **settings)
    total = 0
    for b, (y, first) in enumerate(answers):
        own = found.of(found.prompt == b)
        if cache != "none":
            alone, _ = filter.record(llada, [(y, first)], **settings)
            assert torch.equal(alone.right, own.right)
            total += len(alone.right)
            continue
        x, at = torch.where(torch.arange(len(y)) < first, y, MASK), 0
        for start in range(first, len(y), BLOCK):
            while bool((x[start : start + BLOCK] == MASK).any()):
                z = llada(x[None]).logits[0]
                z[:, MASK] = -math.inf
                right, masked = z.argmax(1) == y, x == MASK
                inside = (torch.arange(len(y)) >= start) & (torch.arange(len(y)) < start + BLOCK)
                size = int(inside.sum())
                assert own.right[at, :size].tolist() == right[inside].tolist()
                assert own.masked[at, :size].tolist() == masked[inside].tolist()
                assert not bool(own.right[at, size:].any() | own.masked[at, size:].any())
                assert own.read[at].tolist() == [i < size for i in range(BLOCK)]
                assert bool((own.confidence[at, size:] == 1).all())
                known = inside & masked & right
                x = torch.where(known if bool(known.any()) else inside & masked, y, x)
                at += 1
        assert at == len(own.right)
        assert torch.equal(x, y)
        total += at
    assert mean == total / 3
    assert total < sum(lengths)


def test_prompts_are_held_out_whole() -> None:
    prompts = [torch.tensor([i % 50, 3]) for i in range(200)]
    held = filter.hold_out(prompts, 0.1)
    assert int(held.sum()) == 20
    assert all(torch.equal(held[:50], held[i : i + 50]) for i in (50, 100, 150))
    backwards = filter.hold_out(prompts[::-1], 0.1)
    assert torch.equal(backwards.flip(0), held)
    for share, some in ((0.1, prompts[:2]), (0.9, prompts[:2]), (0.5, prompts[:1])):
        with pytest.raises(ValueError, match="held_out: expected a share that leaves prompts on both sides"):
            filter.hold_out(some, share)


def test_settings_keep_plain_numbers() -> None:
    """They are written as JSON."""
    settings = filter.FilterSettings(steps=torch.tensor(3), tau=torch.tensor(0.5), hidden=torch.tensor(4))  # type: ignore[arg-type]
    assert json.loads(json.dumps(asdict(settings))) == asdict(
        filter.FilterSettings(steps=3, tau=0.5, hidden=4)
    )


def test_training_learns_what_can_be_known_and_judges_by_held_out_prompts() -> None:
    """Right is what is surer than one half of its left neighbour; padding is not learned from."""
    confidence = torch.rand(1500, 8)
    right = confidence > 0.5 * confidence.roll(1, 1)
    read = torch.ones_like(right)
    read[:, 6:] = False
    prompt = torch.arange(1500) // 3
    records = filter.Records(prompt, confidence, right & read, read, read)
    held, settings = torch.arange(500) % 10 == 0, filter.FilterSettings(steps=300, hidden=16, lr=0.02)
    net, report = filter.train(records, held, settings, progress=False)
    assert report["passes"] == [1350, 150]
    assert report["prompts"] == [450, 50]
    (judged,) = (row for row in report["held_out"] if row["tau"] == 0.9)
    assert judged["accepted"] > 0.7
    assert judged["false_positive_rate"] < 0.03
    broken = records._replace(right=torch.where(held[prompt][:, None], ~right, right))
    other, worse = filter.train(broken, held, settings, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))
    assert worse["loss"][1] > 10 * report["loss"][1]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny")
    settings = train.ToySettings(steps=1, batch=2, width=32, layers=1, heads=2, mlp_width=32)
    return train.train(out, settings, progress=False, evaluate=0)


def test_the_command(tiny: Path, tmp_path: Path) -> None:
    """From answers to a file that decodes; a file that is there stays where the run fails."""

    def run(*args: object, code: int = 0) -> str:
        result = CliRunner().invoke(cli.app, [str(arg) for arg in args])
        assert result.exit_code == code, result.output
        return result.output

    answers, file = tmp_path / "answers", tmp_path / "new" / "filter.safetensors"
    data = ("--data", "builtin:12", "--gen-length", 64, "--policy", "steps:4", "--checker", "none")
    run("trajectories", answers, "--model", tiny, *data)
    said = run("filter", file, "--answers", answers, "--steps", 30, "--tau", 0.8, "--held-out", 0.25)
    assert "passes an answer" in said
    assert "over 9 prompts, tested on" in said
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    model = models.load(tiny)
    assert metadata["tau"] == "0.8"
    assert metadata["model"] == models.fingerprint(model)
    assert json.loads(metadata["settings"])["steps"] == 30
    assert json.loads(metadata["answers"])["model"] == str(tiny)
    report = json.loads(metadata["report"])
    assert report["prompts"] == [9, 3]
    assert 0.8 in [row["tau"] for row in report["held_out"]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = dx.decode(model, [5, 6, 7], gen_length=64, rule=f"learned:{file}")
    assert 2 <= out.forwards <= 64
    before = file.read_bytes()
    again = tmp_path / "again.safetensors"
    run("filter", again, "--answers", answers, "--steps", 30, "--tau", 0.8, "--held-out", 0.25)
    assert Learned(again) == Learned(file)
    refused = {
        ("--held-out", "0.01"): "held_out: expected a share that leaves prompts on both sides",
        ("--tau", "1"): "tau: expected a number between 0 and 1",
        ("--lr", "nan"): "lr: expected a finite number",
        ("--answers", tmp_path / "nowhere"): "answers: expected the directory of a run",
        ("--model", "nowhere"): "model: 'nowhere'",
    }
    for options, why in refused.items():
        assert why in run("filter", file, "--answers", answers, *options, code=2)
        assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    assert "out: " in run("filter", tmp_path, "--answers", answers, code=2)


def test_answers_of_a_block_causal_model_end_where_a_block_does() -> None:
    model, said = (
        golden.model("sdar_tiny_a"),
        "answers: expected a multiple of block_length 8 tokens, .* got 15",
    )
    with pytest.raises(ValueError, match=said):
        filter.record(model, [(torch.arange(16), 3), (torch.arange(15), 3)], block_length=8, progress=False)


def test_no_answer_is_no_filter(tiny: Path, tmp_path: Path) -> None:
    prompts = read_prompts("builtin:3")
    settings = trajectories.TrajectorySettings(str(tiny), "steps:2", checker="hashes", format="jsonl")
    answers = trajectories.generate(tmp_path / "answers", prompts, settings, progress=False)
    with pytest.raises(ValueError, match=r"answers: .* holds no right answer"):
        filter.run(answers, tmp_path / "filter", progress=False)
    assert not (tmp_path / "filter").exists()


def test_a_setting_of_the_answers_that_is_missing_is_named(tiny: Path, tmp_path: Path) -> None:
    settings = trajectories.TrajectorySettings(str(tiny), "steps:2", checker="none", format="jsonl")
    prompts = read_prompts("builtin:3")
    answers = trajectories.generate(tmp_path / "answers", prompts, settings, progress=False)
    content = json.loads((answers / "settings.json").read_text())
    for name in ("model", "cache", "block_length"):
        rest = {key: value for key, value in content.items() if key != name}
        for changed in (rest, {**rest, name: 0.5}):
            (answers / "settings.json").write_text(json.dumps(changed))
            with pytest.raises(ValueError, match=f"answers: expected {name} of type "):
                filter.run(answers, tmp_path / "filter", progress=False)


@pytest.mark.slow
def test_the_filter_that_ships_saves_passes() -> None:
    loaded = registry.load()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it was trained for this very model
        found = evaluate.evaluate("", "learned:builtin:teacher", problems=40, loaded=loaded)
    assert found["accuracy"] >= 0.9
    assert found["nfe_mean"] < 10  # confidence:0.7, which is as often right, needs 10.7
