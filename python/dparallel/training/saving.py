"""How a trained model is written: as published, as an adapter, or by the trainer that holds its shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import dparallel_ext as dx
from dparallel_ext.models import Model

from .. import files

GATHER = "stage3_gather_16bit_weights_on_model_save"
"""The key of DeepSpeed's `zero_optimization` by which the shards of ZeRO-3 are put together in files."""


def check_deepspeed(trainer: Any) -> None:
    """Raise ValueError for a config of ZeRO-3 by which no weights would be saved."""
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    config = None if plugin is None else plugin.hf_ds_config
    if (
        config is not None
        and config.is_zero3()
        and not config.get_value(f"zero_optimization.{GATHER}", False)
    ):
        raise ValueError(f"deepspeed: zero_optimization: expected {GATHER} true, which saves weights")


def save_model(trainer: Any, model: Any, companions: files.Companions, directory: Path) -> None:
    """Write the trained model and its tokenizer: an adapter or shards (FSDP's, DeepSpeed's ZeRO-3) by the
    trainer, others as published."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    if not isinstance(model, Model) or trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled():
        trainer.save_model(str(directory))
    elif trainer.is_world_process_zero():
        # Before config.json, which makes it a checkpoint.
        companions.save_pretrained(directory)
        dx.models.save(model, directory, dtype=torch.bfloat16)
