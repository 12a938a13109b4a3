"""States that hold the model's own predictions in place of masks."""

from __future__ import annotations

from pathlib import Path

import pytest
import run_trainer
import torch
from dparallel.training.trajectories import Collator
from test_trainer import models, trainer_of


@pytest.mark.parametrize("name", ["llada", "dream", "remote", "remote, scaled"])
def test_states_hold_the_model_s_own_predictions(name: str, tmp_path: Path):
    """In place of the masks of the active block, in some rows, of which then the whole block is active."""
    model, rows = models()[name], run_trainer.rows(12)
    for row in rows:
        row["input_ids"] = row["input_ids"][:6].repeat(2)
    trainer = trainer_of(model, tmp_path, block_length=4, on_policy=0.5)
    plain = trainer_of(model, tmp_path, block_length=4, on_policy=1e-9).views(Collator(1)(rows), 3)
    views = trainer.views(Collator(1)(rows), 3)
    assert torch.equal(views["input_ids"], plain["input_ids"])
    masked, mask_id = plain["active"], trainer.traits.mask_id
    own = views["filled"].any(1).view(2, 12).any(0).repeat(2)
    assert 3 <= int(own[:12].sum()) <= 9
    assert torch.equal(views["filled"], masked & own[:, None])
    both = masked[:12] | masked[12:]
    assert torch.equal(views["active"], torch.where(own[:, None], both.repeat(2, 1), masked))

    model.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    seen: list[bool] = []
    before = torch.get_rng_state()
    trainer.fill(model.train(), views)
    assert model.training
    assert seen == [False]
    assert torch.equal(torch.get_rng_state(), before)
    with torch.no_grad():
        logits = model(plain["input_ids"]).logits
    if name == "dream":
        logits = torch.cat((logits[:, :1], logits[:, :-1]), 1)
    logits[..., mask_id] = -torch.inf
    expected = torch.where(views["filled"], logits.argmax(-1), plain["input_ids"])
    assert torch.equal(views["input_ids"], expected)
    assert len(expected[views["filled"]].unique()) > 2 or name.startswith("remote")  # whose places are alike
