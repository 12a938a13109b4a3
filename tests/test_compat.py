"""decode and compat against what the published decoders gave: tokens, and passes, of every golden case."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import STAND_IN

import dparallel_ext as dx
from dparallel_ext import compat, models

GOLDEN = Path(__file__).parent / "golden"
PUBLISHED = {
    "none": compat.generate,
    "prefix": compat.generate_with_prefix_cache,
    "dual": compat.generate_with_dual_cache,
}
FAMILIES = [("llada_tiny_a", c) for c in PUBLISHED] + [("dream_tiny_a", "none")]


def cases(name: str, cache: str) -> list[dict]:
    return [c for c in json.loads((GOLDEN / name / "cases.json").read_text()) if c["cache"] == cache]


@pytest.mark.parametrize(("name", "cache"), FAMILIES)
def test_golden_cases(name: str, cache: str, device: str) -> None:
    model = models.load(GOLDEN / name, device=device)
    found = cases(name, cache)
    assert len(found) >= 60
    for case in found[:: 20 if STAND_IN else 1]:
        prompt = torch.tensor([case["prompt"]])
        shared = {key: case[key] for key in ("gen_length", "block_length", "threshold", "selector")}
        tokens, nfe = PUBLISHED[cache](model, prompt, steps=case["steps"], mask_id=511, **shared)
        assert tokens[0, len(case["prompt"]) :].tolist() == case["tokens"], case
        assert nfe == case["nfe"], case

        steps = case["steps"] if case["threshold"] is None else None
        out = dx.decode(model, prompt, steps=steps, cache=cache, record=True, **shared)
        assert out.sequences[0, len(case["prompt"]) :].tolist() == case["tokens"], case
        # decode leaves out the pass that changes nothing, where a block was complete after its first.
        assert out.trajectory is not None
        last = out.trajectory.step.view(-1, case["block_length"]).amax(1)  # (blocks,)
        turns = last.diff(prepend=torch.zeros(1, dtype=torch.int64))
        wasted = int((turns == 1).sum()) if cache != "none" else 0
        assert out.forwards == int(out.nfe[0]) == case["nfe"] - wasted, case


@pytest.mark.parametrize("name", ["llada_tiny_a", "dream_tiny_a"])
def test_a_foreign_model_gives_the_same(name: str) -> None:
    """Any module whose call returns .logits; Dream is known by its config's model_type."""

    class Foreign(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = models.load(GOLDEN / name)
            self.config = type("Config", (), self.inner.config)()

        def forward(self, input_ids: torch.Tensor) -> object:
            return self.inner(input_ids)

    foreign = Foreign()
    for case in cases(name, "none")[::7]:
        shared = {key: case[key] for key in ("gen_length", "block_length", "threshold", "selector")}
        out = dx.decode(foreign, torch.tensor(case["prompt"]), **shared)
        assert out.sequences[0, len(case["prompt"]) :].tolist() == case["tokens"]
        assert out.forwards == case["nfe"]
    with pytest.raises(ValueError, match=r"cache: 'dual' needs one of dparallel_ext.models"):
        dx.decode(foreign, torch.tensor([1]), cache="dual")


def test_random_remasking_and_temperature_follow_torchs_generator() -> None:
    model = models.load(GOLDEN / "llada_tiny_a")
    prompt = torch.tensor([[5, 6, 7]])

    def run(seed: int, **kwargs: object) -> list[int]:
        torch.manual_seed(seed)
        tokens, nfe = compat.generate(model, prompt, 16, 16, 8, mask_id=511, **kwargs)
        assert nfe == 16
        assert 511 not in tokens
        return tokens[0].tolist()

    for kwargs in ({"remasking": "random"}, {"temperature": 1.0}):
        assert run(1, **kwargs) == run(1, **kwargs)
        assert len({tuple(run(s, **kwargs)) for s in range(6)}) > 1


def test_the_prompts_masks_are_filled_as_published() -> None:
    model = models.load(GOLDEN / "llada_tiny_a")
    prompt = torch.tensor([[5, 511, 7]])
    tokens, _ = compat.generate(model, prompt, 8, 8, 8, mask_id=511, threshold=3.5)
    assert 511 not in tokens
    out = dx.decode(model, prompt, gen_length=8, block_length=8, threshold=3.5)
    assert out.sequences[0, 1] == 511  # decode leaves the prompt alone


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"gen_length": 10, "block_length": 4}, "block_length: expected a divisor of gen_length 10"),
        ({"gen_length": 8, "block_length": 4, "steps": 3}, "steps: expected a multiple of the 2 blocks"),
        ({"remasking": "best"}, "remasking: expected"),
    ],
)
def test_what_the_published_code_asserts_is_a_clear_error(kwargs: dict, message: str) -> None:
    model = models.load(GOLDEN / "llada_tiny_a")
    with pytest.raises(ValueError, match=message):
        compat.generate(model, torch.tensor([[1]]), mask_id=511, **kwargs)
