"""What the trainer of certainty forcing refuses, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import run_trainer
import torch
from conftest import golden
from dparallel.training.trainer import CertaintyForcingArguments, CertaintyForcingTrainer
from dparallel.training.trajectories import Collator
from test_trainer import Remote, RemoteConfig, trainer_of
from torch import nn
from transformers import TrainingArguments

import dparallel_ext as dx
from dparallel_ext.ops import errors


@pytest.fixture(autouse=True)
def own_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 4 leaves that of one run in the environment, for every run that follows."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)


def test_an_autoregressive_model_is_refused(tmp_path: Path):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = dx.models.Llama({**sizes, "vocab_size": 16, "mask_token_id": 15, "eos_token_id": 1})
    with pytest.raises(ValueError, match=r"model: Llama is autoregressive"):
        trainer_of(model, tmp_path)


def test_rows_of_different_lengths_need_an_attention_mask(tmp_path: Path):
    trainer = trainer_of(Remote(RemoteConfig()), tmp_path)
    with pytest.raises(ValueError, match="takes no attention_mask: give total_length"):
        trainer.views(Collator(1)(run_trainer.rows(4)), 0)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mask_ratio": -0.1}, "mask_ratio"),
        ({"mask_ratio": [0.5, 0.2]}, "mask_ratio"),
        ({"mask_ratio": "half"}, "mask_ratio"),
        ({"mask_ratio": [1.1, 1.2]}, "mask_ratio"),
        ({"entropy_weight": -1.0}, "entropy_weight"),
        ({"ce_weight": float("nan")}, "ce_weight"),
        ({"gate": "some"}, "gate"),
        ({"temperature": 0.0}, "temperature"),
        ({"block_length": 0}, "block_length"),
        ({"block_length": 2.5}, "block_length: expected a whole number >= 1, got 2.5"),
        ({"block_length": "4"}, "block_length"),
        ({"temperature": "0.5"}, "temperature"),
        ({"entropy_weight": "2"}, "entropy_weight"),
        ({"mask_ratio": True}, "mask_ratio"),
        ({"on_policy": 1.5}, "on_policy: expected a number"),
        ({"on_policy": "half"}, "on_policy: expected a number"),
        ({"max_steps": 0}, "max_steps: expected a whole number >= 1, got 0"),
        ({"max_steps": -2}, "max_steps"),
        ({"num_train_epochs": 0}, "num_train_epochs: expected a number above 0, got 0"),
        ({"num_train_epochs": -1.0}, "num_train_epochs"),
        ({"remove_unused_columns": True}, "remove_unused_columns: expected False"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor: expected 0"),
    ],
)
def test_settings_that_make_no_sense_are_named(settings: dict[str, Any], said: str, tmp_path: Path):
    with pytest.raises(ValueError, match=said):
        CertaintyForcingArguments(output_dir=str(tmp_path), **settings)


@pytest.mark.parametrize("name", ["compute_metrics", "compute_loss_func", "preprocess_logits_for_metrics"])
def test_functions_that_would_not_be_called_are_refused(name: str, tmp_path: Path):
    args = CertaintyForcingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    with pytest.raises(ValueError, match=f"{name}: expected None"):
        CertaintyForcingTrainer(run_trainer.model(), args, data_collator=Collator(1), **{name: print})


def test_arguments_of_another_kind_are_named(tmp_path: Path):
    model, args = run_trainer.model(), CertaintyForcingArguments(str(tmp_path), report_to=[], use_cpu=True)
    plain = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    with pytest.raises(ValueError, match="args: expected CertaintyForcingArguments, got TrainingArguments"):
        CertaintyForcingTrainer(model, plain)
    with pytest.raises(ValueError, match="model: expected a module, and no model_init"):
        CertaintyForcingTrainer(None, args, model_init=run_trainer.model)


def test_a_model_that_cannot_be_trained_is_refused(tmp_path: Path):
    """Its evaluation is not."""
    frozen = run_trainer.model().requires_grad_(False)
    for model, said in ((frozen, "none requires a gradient"), (run_trainer.model().quantize(), "quantised")):
        trainer = trainer_of(model, tmp_path)
        assert trainer.evaluate(run_trainer.rows(2))["eval_loss"] > 0
        with pytest.raises(ValueError, match=f"model: .*{said}"):
            trainer.train()


def test_a_model_without_a_mask_token_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="mask_token_id"):
        trainer_of(Remote(RemoteConfig(mask_token_id=None)), tmp_path)


@pytest.mark.parametrize("fault", ["NaN", "label"])
def test_what_a_gpu_finds_bad_ends_the_run_by_its_name(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """There a loss does not look; the trainer does when it logs, and in front of a step whose gradient is not
    finite."""
    monkeypatch.setattr(errors, "waits", lambda device: True)
    monkeypatch.setattr(errors, "pending", {})
    model = golden.model("llada_tiny_a", dtype=torch.float32)
    said = r"logits: row \d+ holds NaN"
    if fault == "NaN":
        model.lm_head.weight.data[5] = torch.nan
    else:
        said = r"labels: row \d+ is active, but its label is no id in \[0, 3\)"
        model.lm_head = nn.Linear(model.shape.width, 3, bias=False)
    trainer = trainer_of(model, tmp_path, max_steps=5, logging_steps=2, save_strategy="no")
    with pytest.raises(ValueError, match=said):
        trainer.train()
    assert trainer.state.global_step == {"NaN": 0, "label": 2}[fault]


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_gradient_that_is_not_finite_moves_no_weight(max_grad_norm: float, tmp_path: Path):
    """Of the last step it would be a student of NaN, and no word of it."""
    model = run_trainer.model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    next(p for p in model.parameters() if p.ndim == 1).register_hook(lambda grad: grad * torch.inf)
    trainer = trainer_of(model, tmp_path, max_steps=1, max_grad_norm=max_grad_norm)
    with pytest.raises(ValueError, match=r"the gradient's norm at step 1 is (nan|inf): training stops"):
        trainer.train()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not [*tmp_path.glob("checkpoint-*")]
