"""Recipes, dry runs; and the shortened study: passes fall at kept accuracy."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from dataclasses import make_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import run_trainer
import tokenizers
import torch
from conftest import ROOT
from dparallel import evaluate, registry, tokenizer
from dparallel.problems import read_prompts
from dparallel.training import distill, saving, trajectories
from dparallel.training.trainer import CertaintyForcingTrainer
from safetensors.torch import load_file
from transformers import TrainingArguments

import dparallel_ext as dx

RECIPES = ROOT / "recipes"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("training: {max_steps: 2.5}", "training: expected a whole number for max_steps, got 2.5"),
        ("training: {max_grad_norm: null}", "training: expected a number for max_grad_norm, got None"),
        (
            "training: {gradient_accumulation_steps: 0}",
            "gradient_accumulation_steps: expected a whole number >= 1",
        ),
        (
            "training: {per_device_train_batch_size: 0}",
            "per_device_train_batch_size: expected a whole number >= 1",
        ),
        ("training: {output_dir: elsewhere}", "training: expected no output_dir"),
        ("training: {push_to_hub: true}", "training: expected no push_to_hub"),
        ("training: {resume_from_checkpoint: x}", "training: expected no resume_from_checkpoint"),
        ("training: {save_only_model: true}", "training: expected no save_only_model"),
        ("training: {ignore_data_skip: true}", "training: expected no ignore_data_skip"),
        ("training: {optim: nope}", "training: nope is not a valid OptimizerNames"),
        ("training: {eval_strategy: steps}", "training: You have set .*eval_strategy"),
        ("training: {learning_rate: -1.0}", "training: Invalid learning rate: -1.0"),
        ("training: {report_to: clearml}", "training: report_to: ClearMLCallback requires"),
        ("training: {}\nexamples: many", "examples: expected a whole number >= 0, got 'many'"),
        ("training: {}\nmask_id: x", "mask_id: expected a whole number >= 0, got 'x'"),
        ("training: {}\ndata: 5", "expected a text for 'data', got 5"),
    ],
)
def test_what_a_recipe_cannot_have_is_named(content: str, said: str, answers: Path, tmp_path: Path):
    (tmp_path / "r.yaml").write_text(f"model: builtin:teacher\n{content}\n")
    with pytest.raises(ValueError, match=said):
        distill.run(distill.read(tmp_path / "r.yaml"), answers, tmp_path / "out", progress=False)


def test_an_empty_section_has_no_settings(tmp_path: Path):
    """A key with comments alone below it has the value null in YAML."""
    file = tmp_path / "r.yaml"
    file.write_text("model: builtin:teacher\ntraining:\ntrajectories:\n  # policy: one\ncollator:\nlora:\n")
    recipe = distill.read(file, training={"max_steps": 7})
    assert (recipe.training, recipe.trajectories, recipe.collator) == ({"max_steps": 7}, {}, {})
    assert recipe.lora is None
    assert distill.plan(recipe)["steps"] == 7


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_a_setting_that_transformers_renamed_has_either_name(name: str, monkeypatch: pytest.MonkeyPatch):
    """With the versions before and after: the dataclass here stands for the former."""
    recipe = distill.read(RECIPES / "builtin.yaml", training={name: True, f"{name}_kwargs": {"debug": True}})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        here = distill.arguments(recipe, "out")
    assert here.gradient_checkpointing
    assert here.gradient_checkpointing_kwargs == {"debug": True}
    known = {"output_dir", "report_to", "use_cpu", "bf16", *recipe.training} - {name, f"{name}_kwargs"}
    names = [*known, "gradient_checkpointing", "gradient_checkpointing_kwargs"]
    before = make_dataclass("Before", [(field, Any, None) for field in names])
    monkeypatch.setattr("dparallel.training.trainer.CertaintyForcingArguments", before)
    there = distill.arguments(recipe, "out")
    assert there.gradient_checkpointing
    assert there.gradient_checkpointing_kwargs == {"debug": True}


def test_a_run_goes_on_from_the_newest_checkpoint_that_is_whole(tmp_path: Path):
    contents = {"9": '{"global_step": 9}', "10": '{"global_step": 10}', "11": '{"global_', "x": "{}"}
    contents["12"] = contents["10"]  # a copy, which is none of step 12
    for number, content in contents.items():
        (tmp_path / f"checkpoint-{number}").mkdir()
        (tmp_path / f"checkpoint-{number}" / "trainer_state.json").write_text(content)
    (tmp_path / "checkpoint-13").mkdir()
    assert distill.last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert distill.saved_progress(tmp_path) == "checkpoint-10"


@pytest.mark.parametrize("fast", [False, True])
def test_a_cpu_trains_in_16_bits_where_that_is_fast(
    fast: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(distill.backends, "fast_bfloat16", lambda *_: fast)
    recipe = distill.Recipe("builtin:teacher", {"bf16": True, "use_cpu": True})
    assert distill.arguments(recipe, tmp_path).bf16 == fast


def test_a_dry_run_counts_the_rows_and_passes_of_a_micro_batch():
    training = {"per_device_train_batch_size": 4, "use_cpu": True, "max_steps": 1}
    recipe = distill.Recipe("builtin:teacher", training, collator={"total_length": 100})
    plan = distill.plan(recipe)
    shape = registry.load("builtin:teacher")[0].shape
    rows = 2 * 4 * 100  # both views
    expected = rows * (2 * 2 * shape.embedding_size + 2 * shape.width)
    assert (plan["tokens per sequence"], plan["bytes per process"]["loss"]) == (100, expected)
    assert plan["forward equivalents per micro-batch"] == 3
    for more, passes in (({"gradient_accumulation_steps": 2}, 4), ({"gradient_checkpointing": True}, 4)):
        plan = distill.plan(replace(recipe, training=training | more))
        assert plan["forward equivalents per micro-batch"] == passes


@pytest.mark.parametrize("epochs", [0.3, 1.5, 2])
def test_a_dry_run_counts_the_trainer_s_steps(epochs: float, tmp_path: Path):
    training = {"num_train_epochs": epochs, "per_device_train_batch_size": 8, "use_cpu": True}
    training |= {"gradient_accumulation_steps": 2, "save_strategy": "no", "disable_tqdm": True}
    recipe = distill.Recipe("builtin:teacher", training, examples=40)
    args = distill.arguments(recipe, tmp_path)
    trainer = CertaintyForcingTrainer(
        run_trainer.model(), args, train_dataset=run_trainer.rows(40), data_collator=trajectories.Collator(1)
    )
    trainer.train()
    assert distill.plan(recipe)["steps"] == trainer.state.global_step


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = trajectories.TrajectorySettings(policy="entropy_bound:0.1", shard=1000)
    prompts = read_prompts("builtin:60:5")
    return trajectories.generate(tmp_path_factory.mktemp("answers"), prompts, settings, progress=False)


@pytest.mark.slow
def test_distillation_makes_the_passes_fall_at_kept_accuracy(answers: Path, tmp_path: Path):
    """`make distill` shortened: at a threshold where the teacher takes 19 passes."""
    training = {"max_steps": 20, "per_device_train_batch_size": 8, "warmup_steps": 5, "logging_steps": 5}
    recipe = distill.read(RECIPES / "builtin.yaml", training={**training, "save_strategy": "no"})
    student = distill.run(recipe, answers, tmp_path / "student", progress=False)
    settings = {"problems": 60, "seed": 3}
    before = evaluate.evaluate(recipe.model, "entropy:0.4", **settings)
    after = evaluate.evaluate(str(student), "entropy:0.4", **settings)
    assert after["nfe_mean"] < 0.75 * before["nfe_mean"]
    assert after["accuracy"] > before["accuracy"] - 0.06  # three standard errors
    report = json.loads((student / "training.json").read_text())
    log = [entry for entry in report["log"] if "ce" in entry]
    assert log[-1]["entropy"] < 0.5 * log[0]["entropy"]
    assert report["recipe"]["training"]["max_steps"] == training["max_steps"]
    assert dx.models.load(student).dtype == torch.bfloat16


@pytest.mark.slow
def test_a_stopped_distillation_goes_on(answers: Path, tmp_path: Path):
    training = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4, "warmup_steps": 0}
    recipe = distill.read(RECIPES / "builtin.yaml", training=training)
    whole = distill.run(recipe, answers, tmp_path / "whole", progress=False)
    assert (whole / "checkpoint-4" / "tokenizer.json").exists()
    # A run whose last checkpoint is of step 2 goes on to 4.
    half = distill.read(RECIPES / "builtin.yaml", training={**training, "lr_scheduler_type": "constant"})
    short = distill.Recipe(**{**vars(half), "training": {**half.training, "max_steps": 2}})
    distill.run(short, answers, tmp_path / "two", progress=False)
    distill.run(half, answers, tmp_path / "two", progress=False)
    straight = distill.run(half, answers, tmp_path / "straight", progress=False)
    one, other = (load_file(d / "model.safetensors") for d in (tmp_path / "two", straight))
    assert all(torch.equal(one[name], other[name]) for name in one)
    distill.run(half, answers, straight, progress=False)  # which is finished
    assert {path.name for path in straight.glob("checkpoint-*")} == {"checkpoint-4"}
    again = load_file(straight / "model.safetensors")
    assert all(torch.equal(again[name], other[name]) for name in other)
    with pytest.raises(ValueError, match=r"max_steps, .* holds checkpoints of a run of 4 steps, .* got 2"):
        distill.run(short, answers, straight, progress=False)


def test_a_run_with_other_settings_is_refused(answers: Path, tmp_path: Path):
    """A checkpoint would bring its own weights and learning rates, under the name of the new recipe."""
    given = {"max_steps": 1, "save_steps": 1, "per_device_train_batch_size": 2, "warmup_steps": 0}
    recipe = distill.read(RECIPES / "builtin.yaml", training=given)
    distill.run(recipe, answers, tmp_path, progress=False)
    report = (tmp_path / "training.json").read_text()

    def changed(**training: Any) -> distill.Recipe:
        return replace(recipe, training={**recipe.training, **training})

    # transformers 5 has a newer name for gradient_checkpointing, which saves memory and changes nothing else.
    for name in ("gradient_checkpointing", "activation_checkpointing"):
        assert distill.identity(changed(**{name: True}), {}) == distill.identity(recipe, {})
    for other, said in (
        (changed(learning_rate=1.0), r"other settings: \{'training.learning_rate': 0.0005\}"),
        (changed(entropy_weight=2.0), r"other settings: \{'training.entropy_weight': 0.5\}"),
        (replace(recipe, lora=LORA), r"other settings: \{'lora': None\}"),
        (replace(recipe, collator={"total_length": 40}), r"other settings: \{'collator': \{\}\}"),
        (changed(per_device_train_batch_size=4), r"other settings: \{'sequences per step': 2\}"),
        (changed(gradient_accumulation_steps=2), r"other settings: \{'sequences per step': 2\}"),
    ):
        with pytest.raises(ValueError, match=said):
            distill.run(other, answers, tmp_path, progress=False)
    assert (tmp_path / "training.json").read_text() == report
    layout = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    distill.run(changed(**layout, logging_steps=1), answers, tmp_path, progress=False)
    settings = json.loads((answers / "settings.json").read_text())
    shutil.copytree(answers, tmp_path / "answers")
    (tmp_path / "answers" / "settings.json").write_text(json.dumps({**settings, "policy": "one"}))
    with pytest.raises(ValueError, match=r"other settings: .*'trajectories'"):
        distill.run(recipe, tmp_path / "answers", tmp_path, progress=False)
    record = tmp_path / "recipe.json"
    content = json.loads(record.read_text())
    assert content.pop("sequences per step") == 2
    for earlier in (json.dumps(content), None):  # versions that wrote no number of sequences, or no record
        record.unlink() if earlier is None else record.write_text(earlier)
        distill.run(recipe, answers, tmp_path, progress=False)


def test_a_run_is_over_once_its_student_is_there(
    answers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """`make distill` takes a run with a training.json for finished."""
    training = {"max_steps": 1, "per_device_train_batch_size": 2, "save_strategy": "no"}
    recipe = distill.read(RECIPES / "builtin.yaml", training=training)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(dx.models, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        distill.run(recipe, answers, tmp_path, progress=False)
    assert not (tmp_path / "training.json").exists()


def test_an_answer_ends_with_the_tokenizer_s_end_too(
    answers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As `trajectories` judged it: a model tuned for chats may end with a token that config.json lacks."""
    source = shutil.copytree(registry.directory_of("builtin:teacher"), tmp_path / "model")
    file = source / "tokenizer_config.json"
    file.write_text(file.read_text().replace('"eos_token": "[EOS]"', '"eos_token": "[UNK]"'))
    recipe = distill.read(RECIPES / "builtin.yaml", model=str(source), training={"max_steps": 1})
    collators: list[trajectories.Collator] = []

    def stop(self: Any, data_collator: trajectories.Collator, **_: Any) -> None:
        collators.append(data_collator)
        raise InterruptedError

    monkeypatch.setattr(CertaintyForcingTrainer, "__init__", stop)
    with pytest.warns(UserWarning, match="answers: "), pytest.raises(InterruptedError):
        distill.run(recipe, answers, tmp_path / "student", progress=False)
    known = tokenizer.load(source)
    eos, unknown = known.token_to_id("[EOS]"), known.token_to_id("[UNK]")
    assert collators[0].ends == (eos, unknown)
    # It may be the only one, and then pads, too.
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "eos_token_id": None}))
    with pytest.warns(UserWarning, match="answers: "), pytest.raises(InterruptedError):
        distill.run(recipe, answers, tmp_path / "student", progress=False)
    assert (collators[1].eos_id, collators[1].ends) == (unknown, (unknown,))
    file.write_text(file.read_text().replace('"eos_token": "[UNK]"', '"no_token": ""'))
    with (
        pytest.warns(UserWarning, match="answers: "),
        pytest.raises(ValueError, match="model: expected an end token"),
    ):
        distill.run(recipe, answers, tmp_path / "student", progress=False)


def test_a_recipe_may_do_without_bars(answers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[bool] = []

    def stop(self: Any, args: Any, **_: Any) -> None:
        seen.append(args.disable_tqdm)
        raise InterruptedError

    monkeypatch.setattr(CertaintyForcingTrainer, "__init__", stop)
    for without, progress in ((None, True), (False, False), (True, True)):
        recipe = distill.Recipe("builtin:teacher", {"disable_tqdm": without})
        with pytest.raises(InterruptedError):
            distill.run(recipe, answers, tmp_path / "student", progress=progress)
    assert seen == [False, True, True]


@pytest.mark.slow
def test_two_processes_distil_under_torchrun(answers: Path, tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    given = "max_steps: 3, save_steps: 1, per_device_train_batch_size: 2, disable_tqdm: true, seed: 3"
    recipe.write_text(f"model: builtin:teacher\ntraining: {{{given}}}\n")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    dparallel = str(Path(sys.executable).with_name("dparallel"))
    command = [dparallel, "distill", str(recipe), "--answers", str(answers), "--out", str(tmp_path / "two")]
    done = subprocess.run(
        [sys.executable, *launch, *command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    one = distill.run(
        distill.read(recipe, training={"per_device_train_batch_size": 4}),
        answers,
        tmp_path / "one",
        progress=False,
    )
    found, expected = (load_file(d / "model.safetensors") for d in (tmp_path / "two", one))
    base = load_file(registry.directory_of(registry.DEFAULT) / "model.safetensors")
    for name in expected:  # bfloat16, and Adam turns small differences into steps of the learning rate
        torch.testing.assert_close(found[name], expected[name], rtol=2e-2, atol=5e-4)
    assert any(not torch.equal(base[name], expected[name]) for name in base)


def test_what_was_wrapped_is_freed_before_the_process_group_ends():
    """An engine of DeepSpeed asks for its rank when it is freed."""
    calls: list[str] = []
    accelerator = make_dataclass("Accelerator", [])()
    accelerator.free_memory, accelerator.end_training = (
        lambda: calls.append("free"),
        lambda: calls.append("end"),
    )
    of_two = make_dataclass("Arguments", [("world_size", int)])(2)
    names = ("args", "accelerator", "model", "model_wrapped")
    trainer = make_dataclass("Trainer", names)(of_two, accelerator, "model", "wrapped")
    distill.finish(trainer)
    assert (calls, trainer.model_wrapped) == (["free", "end"], "model")


def test_shards_of_deepspeed_are_saved_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """ZeRO-3 leaves each process empty parameters, of which the trainer makes whole ones; without a key of
    DeepSpeed's config it cannot, which is told before the first step."""
    saved: list[str] = []
    trainer = make_dataclass("Trainer", ["is_fsdp_enabled"])(False)
    trainer.save_model = saved.append
    monkeypatch.setattr("transformers.integrations.is_deepspeed_zero3_enabled", lambda: True)
    saving.save_model(trainer, registry.load()[0], None, tmp_path)
    assert (saved, [*tmp_path.iterdir()]) == ([str(tmp_path)], [])
    for stage, gathers in ((2, False), (3, True), (3, False)):
        config = make_dataclass("Config", [])()
        config.is_zero3, config.get_value = lambda stage=stage: stage == 3, lambda *_, value=gathers: value
        plugin = make_dataclass("Plugin", ["hf_ds_config"])(config)
        state = make_dataclass("State", ["deepspeed_plugin"])(plugin)
        trainer.accelerator = make_dataclass("Accelerator", ["state"])(state)
        if stage == 2 or gathers:
            saving.check_deepspeed(trainer)
        else:
            with pytest.raises(
                ValueError, match="deepspeed: zero_optimization: expected stage3_gather_16bit"
            ):
                saving.check_deepspeed(trainer)


def test_answers_of_another_model_are_told(answers: Path, tmp_path: Path):
    """Of another model, by a warning; in tokens that are another text for this model, by an error."""
    recipe = distill.read(RECIPES / "builtin.yaml", training={"max_steps": 0, "save_strategy": "no"})

    def record(**settings: Any) -> Path:
        shutil.copytree(answers, tmp_path / "answers", dirs_exist_ok=True)
        content = json.loads((answers / "settings.json").read_text()) | settings
        (tmp_path / "answers" / "settings.json").write_text(json.dumps(content))
        return tmp_path / "answers"

    rows = trajectories.Trajectories(answers)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert distill.mismatch(recipe, rows.settings) is None
        same = {"model": str(tmp_path / "x" / ".." / "y")}
        assert distill.mismatch(replace(recipe, model=str(tmp_path / "y")), same) is None
    bad = replace(recipe, training={**recipe.training, "max_steps": 1}, collator={"total_length": 1})
    for settings, said in (
        ({"model": "org/base"}, "those of 'org/base', and the model that learns them is 'builtin:teacher'"),
        ({"mask_id": 3}, "those of 'builtin:teacher' with mask_id 3, and"),
    ):
        with pytest.warns(UserWarning, match=said), pytest.raises(ValueError, match="total_length"):
            distill.run(bad, record(**settings), tmp_path / "out", progress=False)
    vocabulary = tokenizer.load(registry.directory_of("builtin:teacher")).get_vocab()
    shifted = {word: (id + 1) % len(vocabulary) for word, id in vocabulary.items()}
    other = tokenizers.Tokenizer(tokenizers.models.WordLevel(shifted, "[UNK]"))
    with pytest.raises(ValueError, match=r"answers: .* those of 'builtin:teacher', and 'mine' has"):
        rows.check_tokenizer("mine", other)


def test_lengths_and_adapters_that_make_no_sense_are_named(answers: Path, tmp_path: Path):
    recipe = distill.read(RECIPES / "builtin.yaml", training={"max_steps": 1})
    shortest = min(prompt for _, prompt, _ in trajectories.Trajectories(answers).bounds)
    for changes, said in (
        ({"collator": {"total_length": -3}}, "total_length: expected a whole number >= 1, got -3"),
        ({"collator": {"total_length": "40"}}, "total_length: expected a whole number"),
        (
            {"collator": {"total_length": shortest}},
            "total_length: expected more tokens than the shortest prompt",
        ),
        ({"collator": {"response_length": 0}}, "response_length: expected a whole number >= 1, got 0"),
        ({"collator": {"total_length": 90, "response_length": 9}}, "expected one of them, got 90 and 9"),
        ({"lora": {**LORA, "alpha": 8}}, r"lora: no setting \['alpha'\] in peft.LoraConfig"),
        ({"lora": {**LORA, "r": "8"}}, "lora: PEFT refuses .*'r': '8'"),
        ({"lora": {**LORA, "bias": "most"}}, "lora: PEFT refuses .*most"),
        ({"lora": {"target_modules": ["q", "gat"]}}, "lora: target_modules has 'gat', which is no module of"),
        ({"lora": {"modules_to_save": ["head"]}}, "lora: modules_to_save has 'head', which is no module of"),
    ):
        with pytest.raises(ValueError, match=said):
            distill.run(replace(recipe, **changes), answers, tmp_path, progress=False)
    most = 256 - max(prompt for _, prompt, _ in trajectories.Trajectories(answers).bounds)
    for name, length, beyond in (
        ("total_length", 256, False),
        ("total_length", 257, True),
        ("response_length", most, False),
        ("response_length", most + 1, True),
    ):
        changes = {"collator": {name: length}, "lora": {"bias": "most"}}  # stops before it trains
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            with pytest.raises(ValueError, match="lora"):
                distill.run(replace(recipe, **changes), answers, tmp_path, progress=False)
        said = [str(w.message) for w in told if "positions" in str(w.message)]
        expected = (
            f"{name}: 257 positions of prompt and response, but the model's config says 256; text beyond"
        )
        assert [text.startswith(expected) for text in said] == [True] * beyond


def test_rows_of_like_length_can_go_together(answers: Path, tmp_path: Path):
    training = {"max_steps": 1, "save_strategy": "no", "per_device_train_batch_size": 2}
    # transformers 4 names it otherwise.
    new = "train_sampling_strategy" in TrainingArguments.__dataclass_fields__
    grouped = {"train_sampling_strategy": "group_by_length"} if new else {"group_by_length": True}
    recipe = distill.read(RECIPES / "builtin.yaml", training={**training, **grouped})
    distill.run(recipe, answers, tmp_path, progress=False)
    assert (tmp_path / "model.safetensors").exists()


def test_no_right_answer_is_an_error(tmp_path: Path):
    trajectories.generate(tmp_path / "none", [], trajectories.TrajectorySettings(), progress=False)
    with pytest.raises(ValueError, match="holds no right answer"):
        distill.run(distill.read(RECIPES / "builtin.yaml"), tmp_path / "none", tmp_path / "out")


LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0}


@pytest.mark.parametrize(
    ("section", "name"),
    [("collator", "total_length"), ("collator", "response_length"), ("trajectories", "gen_length")],
)
def test_a_dry_run_names_a_length_that_does_not_fit(section: str, name: str):
    recipe = replace(distill.read(RECIPES / "builtin.yaml"), **{section: {name: "long"}})
    with pytest.raises(ValueError, match=f"^{name}: expected a whole number >= 1, got 'long'"):
        distill.plan(recipe)


def test_a_dry_run_counts_the_answers_of_a_directory(answers: Path):
    recipe = distill.Recipe("builtin:teacher", {"num_train_epochs": 2, "per_device_train_batch_size": 1})
    right = len(trajectories.Trajectories(answers))
    planned = distill.plan(recipe, answers=answers)
    assert (planned["answers"], planned["steps"]) == (right, 2 * right)
    assert distill.plan(replace(recipe, examples=right + 1))["answers"] == right + 1
