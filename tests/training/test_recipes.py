"""Recipes as they ship, and what a recipe may hold."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import ROOT
from dparallel.training import distill

RECIPES = ROOT / "recipes"


@pytest.mark.parametrize(
    ("name", "parameters", "trainable", "steps"),
    [
        # 32 layers x 128 x (4 x (4096 + 4096) + 3 x (4096 + 12288)); 92,000 / 64 x 6
        ("llada_8b", 8_015_581_184, 32 * 128 * (4 * 8192 + 3 * 16384), 8628),
        # 28 layers x 32 x (q, o: 2 x 7168; k, v: 2 x 4096; 3 x (3584 + 18944)); 102,000 / 64 x 3
        ("dream_7b", 7_615_616_512, 28 * 32 * (2 * 7168 + 2 * 4096 + 3 * 22528), 4782),
    ],
)
def test_dry_runs_of_the_published_recipes(name: str, parameters: int, trainable: int, steps: int):
    plan = distill.plan(distill.read(RECIPES / f"{name}.yaml"), processes=8)
    assert (plan["parameters"], plan["trainable"], plan["steps"]) == (parameters, trainable, steps)
    assert plan["sequences per step"] == 64
    other = distill.plan(distill.read(RECIPES / f"{name}.yaml", model="builtin:teacher"))
    assert other["parameters"] == 1_848_768  # of the model that takes the recipe's place
    sizes = plan["bytes per process"]
    assert sizes["weights"] == 2 * parameters + 4 * trainable
    assert sizes["gradients"] + sizes["optimizer"] == 12 * trainable
    assert sizes["total"] == sum(size for key, size in sizes.items() if key != "total") < 24e9


def test_the_published_settings_are_those_of_the_recipes(tmp_path: Path):
    llada = distill.read(RECIPES / "llada_8b.yaml")
    dream = distill.read(RECIPES / "dream_7b.yaml")
    args = distill.arguments(llada, tmp_path)
    assert (args.entropy_weight, args.temperature, args.block_length, args.mask_ratio) == (2.0, 0.5, 32, 0.5)
    assert llada.collator == {"total_length": 384}
    args = distill.arguments(dream, tmp_path)
    assert (args.entropy_weight, args.temperature, args.block_length, args.mask_ratio) == (
        1.0,
        0.5,
        None,
        0.5,
    )
    assert dream.collator == {"response_length": 256}
    soft = distill.arguments(distill.read(RECIPES / "soft.yaml"), tmp_path)
    assert (soft.entropy_weight, soft.on_policy) == (0.0, 0.5)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: x", r"missing \['training'\]"),
        ("model: x\ntraining: {}\nlorra: 1", r"unknown \['lorra'\]"),
        ("- 1", "holds a list, expected a mapping"),
        ("a: [", "is not YAML"),
        ("a: &a [*a]", "is not YAML: maximum recursion"),
        ("model: x\n1: 2", "expected a text as a key, so in quotes, got 1"),
        ("model: x\ntraining: {on: 1}", "training: expected a text as a key, so in quotes, got True"),
        ("model: x\ntraining: {run_name: 2026-11-30}", r"training: run_name: .* got datetime\.date"),
        ("model: x\ntraining: 3", "expected a mapping for 'training', got 3"),
        ("model: x\ntraining: {}\ncollator: {length: 3}", r"collator has unknown \['length'\]"),
        ("model: x\ntraining: {}\ntrajectories: {gen: 3}", r"trajectories has unknown \['gen'\]"),
    ],
)
def test_a_bad_recipe_is_named(text: str, said: str, tmp_path: Path):
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=said):
        distill.read(file)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        distill.read("nowhere.yaml")


def test_a_setting_that_does_not_exist_is_named(tmp_path: Path):
    recipe = distill.read(RECIPES / "builtin.yaml", training={"entropy_wait": 2})
    with pytest.raises(ValueError, match=r"training: no setting \['entropy_wait'\]"):
        distill.arguments(recipe, tmp_path)


@pytest.mark.parametrize(
    ("name", "text"),
    [("learning_rate", "2e-5"), ("max_steps", "4"), ("data_seed", "1"), ("temperature", "5e-1")],
)
def test_a_number_that_yaml_takes_for_a_text_is_named(name: str, text: str, tmp_path: Path):
    file = tmp_path / "r.yaml"
    file.write_text(f"model: x\ntraining: {{{name}: {text!r}}}")
    with pytest.raises(
        ValueError, match=f"training: expected a .*number for {name}, got '{text}' \\(in YAML"
    ):
        distill.arguments(distill.read(file), tmp_path)
    file.write_text("model: x\ntraining: {learning_rate: 2.0e-5, lr_scheduler_type: linear, report_to: none}")
    assert distill.arguments(distill.read(file), tmp_path).learning_rate == 2e-5
