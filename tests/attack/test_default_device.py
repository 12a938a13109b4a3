"""`torch.set_default_device` is for the caller's own tensors: what the host computes stays on the CPU.

"meta" stands in for a GPU here: a tensor that strays onto it has no values, so every use raises.
"""

from __future__ import annotations

from collections.abc import Callable

import drafters
import pytest
import torch
from torch import Tensor

import dparallel_ext as dx

MODEL, PROMPT = drafters.fast_dllm(), torch.tensor([[1, 2, 3], [4, 5, 6]])
BLOCK_DRAFTER, EXITS = drafters.drafter_with("dflash"), drafters.exits()
RIDERS, EAGLE, STRIDED = drafters.riding("ppd"), drafters.eagle("eagle3"), drafters.strided()
PADDED = {"input_ids": [[0, 1, 2], [4, 5, 6]], "attention_mask": [[0, 1, 1], [1, 1, 1]]}
SAMPLED = {"temperature": 1.0, "seed": [1, 2], "suppress": [3], "stop": [[7, 8]], "record": True}
LOGITS = torch.linspace(-3, 3, 33).repeat(8, 1)


def served() -> Tensor:
    with dx.Engine(MODEL, lanes=2, max_length=64) as engine:
        return torch.tensor(engine.submit([1, 2, 3], gen_length=16).result().tokens, device="cpu")


CALLS: dict[str, Callable[[], Tensor]] = {
    "decode": lambda: dx.decode(MODEL, PROMPT, gen_length=32).sequences,
    "dual": lambda: dx.decode(MODEL, PADDED, gen_length=32, cache="dual", **SAMPLED).sequences,
    "speculate": lambda: dx.speculate(drafters.MODEL, PROMPT, gen_length=16, **SAMPLED).sequences,
    "recycling": lambda: dx.speculate(drafters.MODEL, PROMPT, drafter="recycling", gen_length=16).sequences,
    "dflash": lambda: dx.speculate(drafters.MODEL, PROMPT, drafter=BLOCK_DRAFTER, gen_length=16).sequences,
    "eagle": lambda: dx.speculate(drafters.MODEL, PROMPT, drafter=EAGLE, gen_length=16).sequences,
    "riders": lambda: dx.speculate(drafters.MODEL, PROMPT, drafter=RIDERS, gen_length=16).sequences,
    "strided": lambda: dx.speculate(drafters.MODEL, PROMPT, drafter=STRIDED, gen_length=16).sequences,
    "adadecode": lambda: dx.speculate(drafters.DEEP, PROMPT, drafter=EXITS, gen_length=16).sequences,
    "engine": served,
    "unmask_": lambda: (
        dx.unmask_(torch.full((1, 8), 32, device="cpu"), LOGITS[None], mask_id=32, threshold=3.0).committed
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_default_device_changes_nothing(name: str) -> None:
    expected = CALLS[name]()
    with torch.device("meta"):
        result = CALLS[name]()
    assert result.device.type == "cpu"
    assert torch.equal(result, expected)
