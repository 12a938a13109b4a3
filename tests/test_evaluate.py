"""Evaluation, its table, its files and pictures."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import golden
from dparallel import evaluate, files, plots, registry
from dparallel.toy import tasks

import dparallel_ext as dx


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return registry.load()


@pytest.mark.slow
def test_evaluate_agrees_with_decoding_one_by_one(loaded: tuple[Any, Any]):
    model, tokenizer = loaded
    row = evaluate.evaluate("builtin:teacher", "entropy:0.5", problems=12, batch=5, loaded=loaded)
    right = passes = kept = 0
    for problem in itertools.islice(tasks.problems("held_out"), 12):
        prompt = torch.tensor([tokenizer.encode(problem.prompt).ids])
        out = dx.decode(model, prompt, gen_length=64, threshold=0.5, selector="entropy")
        right += tasks.is_correct(problem, tokenizer.decode(out.sequences[0, prompt.shape[1] :].tolist()))
        passes += out.forwards
        kept += [*out.responses[0].tolist(), model.eos_id].index(model.eos_id)
    assert row["accuracy"] == right / 12
    assert row["nfe_mean"] == pytest.approx(passes / 12)
    assert row["tokens_per_forward"] == pytest.approx(kept / passes)
    assert row["padded_tokens_per_forward"] == pytest.approx(64 * 12 / passes)
    assert row["block_length"] == 32
    assert row["seconds"] > 0


def test_one_token_a_pass_is_gen_length_passes(loaded: tuple[Any, Any]):
    row = evaluate.evaluate("builtin:teacher", evaluate.ONE, problems=2, loaded=loaded)
    assert row["nfe_mean"] == tasks.GEN_LENGTH
    assert row["padded_tokens_per_forward"] == 1.0 > row["tokens_per_forward"]


def test_a_block_causal_models_own_blocks_are_the_default(loaded: tuple[Any, Any]):
    sdar = golden.home / "sdar_tiny_a"
    assert registry.block_length(str(sdar)) == 8
    assert registry.block_length("builtin:teacher") == 32
    given = (dx.models.load(sdar), loaded[1])
    rows = [
        evaluate.evaluate("sdar", "quota:8", problems=1, loaded=given, block_length=size)
        for size in (None, 8, 4)
    ]
    assert [row["block_length"] for row in rows] == [8, 8, 4]
    passes = [row["nfe_mean"] for row in rows]
    assert passes[0] == passes[1] != passes[2]


@pytest.mark.parametrize(
    "text", ["", "entropy", "entropy:", "entropy:x", "speed:1", "quota:0.5", "entropy:nan"]
)
def test_a_policy_that_is_none_is_named(text: str):
    with pytest.raises(ValueError, match=r"policy: expected"):
        evaluate.parse_policy(text)


def test_policies_are_checked_before_anything_is_decoded():
    with pytest.raises(ValueError, match="policy"):
        next(iter(evaluate.sweep(["builtin:teacher"], ["entropy:0.5", "nonsense"])))


def test_models_are_found_by_name_or_path(tmp_path: Path):
    assert "builtin:teacher" in registry.builtins()
    assert registry.directory_of("builtin:teacher") == registry.directory_of(
        str(registry.BUILTIN / "teacher")
    )
    with pytest.raises(FileNotFoundError, match=r"model: 'builtin:nobody' .*builtin:teacher"):
        registry.load("builtin:nobody")
    with pytest.raises(FileNotFoundError, match="model: "):
        registry.load(str(tmp_path))


def test_models_that_ship_are_in_the_dtype_that_is_fast(monkeypatch: pytest.MonkeyPatch):
    """A CPU without bfloat16 products would take ten times as long; a dtype that is given is obeyed."""
    for fast, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(registry, "fast_bfloat16", lambda device=None, fast=fast: fast)
        assert registry.load("builtin:student")[0].dtype == dtype
    assert registry.load("builtin:student", dtype=torch.bfloat16)[0].dtype == torch.bfloat16
    directory = str(registry.directory_of("builtin:student"))
    assert registry.load(directory)[0].dtype == torch.bfloat16  # a checkpoint of one's own is as it is


def test_json_is_written_whole(tmp_path: Path):
    file = tmp_path / "new" / "rows.json"
    files.write_json(file, [{"a": 1}])
    with pytest.raises(TypeError):
        files.write_json(file, [{"a": object()}])
    assert json.loads(file.read_text()) == [{"a": 1}]
    assert list(file.parent.iterdir()) == [file]


def test_pictures_are_drawn(tmp_path: Path):
    base = {"problems": 5, "gen_length": 64}
    rows = [
        {**base, "model": "m", "policy": "one", "threshold": None, "nfe_mean": 64.0, "accuracy": 1.0},
        {**base, "model": "m", "policy": "entropy:0.5", "threshold": 0.5, "nfe_mean": 9.0, "accuracy": 0.8},
    ]
    plots.accuracy_against_passes(rows, tmp_path / "a.png")
    plots.response_by_pass(["a", "b", "·"] * 9, [1, 2, 3] * 9, tmp_path / "b.png", title="t")
    plots.response_by_pass([], [], tmp_path / "c.png")
    for name in ("a.png", "b.png", "c.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_no_two_labels_of_the_curves_overlap():
    rows = [
        {**row, "model": name}
        for name in ("teacher", "student")
        for row in json.loads((registry.BUILTIN / name / "held_out.json").read_text())
    ]
    (axes,) = plots.draw_accuracy(rows).axes
    boxes = [plots.text_box(text) for text in axes.texts]
    assert len(boxes) == sum(row["threshold"] is not None for row in rows) > 12
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    assert all(axes.bbox.contains(*box.min) and axes.bbox.contains(*box.max) for box in boxes)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not JSON"),
        ('{"model_type": ["llada"]}', r"config\.json: model_type \['llada'\] is none of"),
        ('{"model_type": "llada", "n_heads": 2}', r"config\.json: '\w+' is missing"),
    ],
)
def test_a_config_that_names_no_model_is_an_error_by_name(content: str, said: str, tmp_path: Path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=said):
        registry.block_length(str(tmp_path))
