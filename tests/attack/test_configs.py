"""Random configs: `DecodeConfig` names what it refuses, and what it takes can be compared and written."""

from __future__ import annotations

import json
import math
import random
import re
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Attack, golden
from forms import a_form

import dparallel_ext as dx
from dparallel_ext import DecodeConfig, policies, rules
from dparallel_ext.decoding.config import DEFAULTS


def everything(stats: dx.RowStats, masked: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    return masked


LLADA = golden.model("llada_tiny_a")
PROMPTS = [[5, 6, 7], [8, 511]]
JUNK = [None, True, -1, 0, 1, 2, 1.5, math.nan, math.inf, 2**63, 10**400, "", "x", b"x", [], [[]], {}]
JUNK += [torch.tensor(1), torch.tensor([1.5]), torch.zeros(2, 2), np.array([1, 2]), range(3), object()]
SOUND: dict[str, list[Any]] = {
    "gen_length": [0, 3, 9, [4, 7], torch.tensor([2, 5])],
    "infill": [True],
    "block_length": [1, 4, np.int64(8)],
    "sub_block_length": [1, 2, 4],
    "steps": [1, 4, 12],
    "threshold": [0.0, 0.5, 3.0, torch.tensor([0.1, 0.9]), np.float32(1)],
    "selector": [*policies.SELECTORS, ["entropy", "quota"]],
    "policy": [
        policies.make("quota", 2, batch=2),
        policies.make(batch=2),
        lambda stats, masked, step: masked,
    ],
    "rule": [
        "one",
        "steps:4",
        "credit",
        "edit:0.8,0.9,3",
        "sched+entropy:0.5",
        rules.Credit(),
        rules.Edit(),
        "soft",
    ],
    "automaton": [a_form(1), a_form(2)],
    "min_commit": [1, 2, [1, 2]],
    "max_commit": [1, 3, math.inf, [2, 3]],
    "score": [*policies.SCORES],
    "cache": ["none", "prefix", "dual"],
    "refresh": [1, 2],
    "active_blocks": [1, 2, 3],
    "open_at": [0.0, 0.5, np.float32(1)],
    "activate_at": [0.0, 0.5, 1],
    "batch_invariant": [True, np.bool_(False)],
    "graphs": [False],
    "temperature": [0.0, 0.7, torch.tensor(2.0)],
    "top_p": [0.0, 0.5, 1.0],
    "top_k": [0, 1, np.int32(5)],
    "suppress": [[], [3, 4], torch.arange(9)],
    "repetition_penalty": [1.0, 1.2],
    "presence_penalty": [0, torch.tensor(0.5)],
    "frequency_penalty": [0.0, -1],
    "mask_id": [511, 3],
    "eos_id": [7, [7, 9], torch.tensor([5])],
    "stop": [[], [[1, 2], np.array([3])]],
    "seed": [0, -(2**63), [1, 2], torch.tensor([5, 6])],
    "record": [True],
    "logprobs": [True],
    "top_logprobs": [0, 3, np.int64(20)],
}


def draw(rng: random.Random) -> dict[str, Any]:
    names = rng.sample(list(DEFAULTS), rng.choice([1, 2, 3, 5]))
    return {name: rng.choice(JUNK if rng.random() < 0.1 else SOUND[name]) for name in names}


def refusal(error: ValueError) -> str:
    """The field that the message names."""
    name, _, said = str(error).partition(": ")
    assert name in DEFAULTS, f"no field is named in: {error}"
    assert said
    return name


def test_random_configs(attack: Attack) -> None:
    assert set(SOUND) == set(DEFAULTS)
    for rng in attack.cases(100):
        fields, seed = draw(rng), rng.randrange(2**40)
        call = {"gen_length": 6, **fields}
        try:
            config = DecodeConfig(**call)
        except ValueError as error:
            refusal(error)
            with pytest.raises(ValueError, match=f"^{re.escape(str(error))}$"):
                dx.decode(LLADA, PROMPTS, **call)
            continue
        assert config == DecodeConfig(**vars(config)) == config.replace()
        assert hash(config) == hash(DecodeConfig(**call))
        outcomes = []
        for given in (config, written(config)):
            torch.manual_seed(seed)
            try:
                out = dx.decode(LLADA, PROMPTS, given)
            except ValueError as error:
                outcomes.append((refusal(error), str(error)))
            else:
                outcomes.append((out.sequences.tolist(), out.nfe.tolist()))
        assert outcomes[0] == outcomes[1]


def written(config: DecodeConfig) -> DecodeConfig:
    """The config of its file; the config itself where it holds a function or an automaton."""
    if callable(config.policy) or config.automaton is not None:
        return config
    again = DecodeConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.to_dict() == config.to_dict()
    return again
