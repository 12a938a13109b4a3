"""Files of AdaDecode's heads: what they hold, and what does not fit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from drafters import DEEP, deep_model, exits, model_of
from safetensors.torch import load_file, save_file
from test_adadecode import Heard
from test_speculate import plain

import dparallel_ext as dx
from dparallel_ext.speculation import AdaDecode, drafter_of

pytest_plugins = ["taping"]


@pytest.mark.parametrize("name", ["drafter.safetensors", "directory"])
def test_a_file_holds_all_of_it(tmp_path: Path, name: str) -> None:
    drafter, path = exits((1, 3), 0.25, 5), tmp_path / name
    drafter.save(path, torch.float32)
    for found in (dx.speculation.load(path), drafter_of(path), drafter_of(str(path))):
        assert isinstance(found, AdaDecode)
        assert found.options == drafter.options
        state = drafter.heads.state_dict()
        assert all(torch.equal(t, state[key]) for key, t in found.heads.state_dict().items())
        assert repr(found) == "AdaDecode(layers=[1, 3], gamma=0.25, most=5)"
    expected = plain(DEEP, drafter=drafter, draft_size=4)
    found = plain(DEEP, drafter=str(path), draft_size=4)
    assert torch.equal(found.drafted, expected.drafted)
    assert torch.equal(found.sequences, expected.sequences)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"exit_layers": [0]}, r"exit_layers: expected ascending numbers of layers of \[1, 5\), got \[0\]"),
        ({"exit_layers": [5]}, r"exit_layers: expected ascending numbers of layers of \[1, 5\), got \[5\]"),
        ({"exit_layers": [3, 1]}, "expected ascending numbers"),
        ({"exit_layers": [1, 1]}, "expected ascending numbers"),
        ({"exit_layers": []}, "expected ascending numbers"),
        ({"exit_layers": [True]}, "expected ascending numbers"),
        ({"exit_layers": 2}, "expected ascending numbers"),
        ({"exit_layers": None}, "expected ascending numbers"),
        ({"gamma": 1.5}, "adadecode_config: gamma=1.5, expected a number >= 0 and <= 1"),
        ({"gamma": math.nan}, "adadecode_config: gamma=nan, expected a number"),
        ({"most": 0}, "adadecode_config: most=0, expected a whole number >= 1"),
    ],
)
def test_a_config_that_does_not_fit_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    exits().save(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config["adadecode_config"] |= change
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as raised:
        dx.speculation.load(tmp_path)
    assert str(raised.value).startswith(f"path: {tmp_path}: ")
    del config["adadecode_config"]
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="'adadecode_config' is missing"):
        dx.speculation.load(tmp_path)


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    exits((1, 3)).save(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        "maps.0.weight": (32, 32),
        "maps.1.weight": (32, 32),
    }
    save_file({**tensors, "maps.1.weight": torch.zeros(3, 32)}, file)
    with pytest.raises(ValueError, match=r"maps\.1\.weight is \(3, 32\), expected \(32, 32\)"):
        dx.speculation.load(tmp_path)
    save_file({"maps.0.weight": tensors["maps.0.weight"]}, file)
    with pytest.raises(ValueError, match=r"does not fit its config: maps\.1\.weight is missing"):
        dx.speculation.load(tmp_path)


def test_what_does_not_go_with_the_model_is_refused_before_anything_runs() -> None:
    other = deep_model()
    with torch.no_grad():
        other.lm_head.weight[0] += 1
    for target, message in (
        (
            model_of(vocab_size=62, num_hidden_layers=5),
            "made for a vocabulary of 61 tokens, and the model has",
        ),
        (model_of(hidden_size=40, num_hidden_layers=5), "made for a model of width 32, and the model has 40"),
        (model_of(num_hidden_layers=6), "was made for a model of 5 layers, and the model has 6"),
        (other, "drafter was trained for another model"),
    ):
        with pytest.raises(ValueError, match=f"drafter: .*{message}"):
            plain(target, drafter=exits())
    for more, message in (
        ({"gamma": 2}, "gamma: expected a number from 0 to 1, got 2"),
        ({"gamma": "sure"}, "gamma: expected a number from 0 to 1, got 'sure'"),
        ({"gamma": math.nan}, "gamma: expected a number from 0 to 1, got nan"),
        ({"most": 0}, "most: expected a whole number >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            AdaDecode(exits().heads, **more)


def test_a_draft_begins_at_a_layer_that_there_is() -> None:
    class Late(Heard):
        def session(self, *given: Any, **more: Any) -> Any:
            session = super().session(*given, **more)
            propose = session.propose
            session.propose = lambda *asked: [draft._replace(start=5) for draft in propose(*asked)]
            return session

    with pytest.raises(
        ValueError, match=r"drafter: expected a draft that begins at a layer of \[0, 5\), got 5"
    ):
        plain(DEEP, drafter=Late(exits()), draft_size=2)
