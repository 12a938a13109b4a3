"""The law of the same tokens, to the bit: nothing but the matrix library rounds a row by its neighbours.

With products row by row, log-probabilities are the same alone, in batches, under drafters and in an engine.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import EMULATED
from drafters import MODEL, Knowing, deep_model, eagle, fast_dllm, model_of, riding
from engines import BLOCK, LLADA, SDAR
from torch import Tensor

import dparallel_ext as dx

pytestmark = pytest.mark.skipif(EMULATED, reason="of the CPU")


@pytest.fixture(autouse=True)
def _row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    product = F.linear

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        # Copies, since a product may round by the place of its row in memory, too.
        rows = [product(row[None].clone(), weight, bias) for row in x.reshape(-1, x.shape[-1])]
        return torch.cat([x.new_empty(0, len(weight)), *rows]).view(*x.shape[:-1], len(weight))

    monkeypatch.setattr(F, "linear", linear)


def prompts(rng: random.Random, vocab: int) -> list[Tensor]:
    """Some that begin alike, so that an engine shares pages."""
    common = [rng.randrange(10, vocab) for _ in range(20)]
    return [
        torch.tensor(
            common[: rng.randrange(20)] + [rng.randrange(10, vocab) for _ in range(1 + rng.randrange(9))]
        )
        for _ in range(4)
    ]


CAUSAL = {
    "qwen3": (MODEL, 0.8),
    "llama": (deep_model("llama"), 0.0),
    "qwen3_moe": (model_of("qwen3_moe"), 0.8),
}
"""Models and temperatures."""
DRAFTERS = ("plain", "ngram", "recycling", "chains", "trees", "riders", "eagle")


@pytest.mark.parametrize("name", CAUSAL)
def test_text_from_left_to_right(name: str) -> None:
    (model, temperature), asked, accepted = CAUSAL[name], prompts(random.Random(name), 61), 0
    own: dict[str, Any] = {"gen_length": 13, "temperature": temperature, "eos_id": -1, "logprobs": True}
    alone = [dx.speculate(model, [ids], seed=[i], **own) for i, ids in enumerate(asked)]
    texts = [each.sequences[0] for each in alone]
    expected = [(each.responses[0].tolist(), each.logprobs[0].tolist()) for each in alone]
    for way in DRAFTERS:
        drafter: Any = {
            "plain": None,
            "chains": Knowing(texts),
            "trees": Knowing(texts, tree=True),
            "riders": riding("ppd", model),
            "eagle": eagle("eagle3", model),
        }.get(way, way)
        shared = {"drafter": drafter, "draft_size": 5}
        out = dx.speculate(model, asked, seed=[*range(4)], **shared, **own)
        accepted += int(out.accepted.sum())
        with dx.Engine(model, lanes=3, max_length=64, page_size=4, **shared) as engine:
            handles = [engine.submit(ids, seed=i % 4, **own) for i, ids in enumerate([*asked, *asked])]
            found = [handle.result(60) for handle in handles]
        assert sum(each.reused for each in found) > 0
        for i, (tokens, logprobs) in enumerate(expected):
            assert (out.responses[i].tolist(), out.logprobs[i].tolist()) == (tokens, logprobs), way
            for each in (found[i], found[i + 4]):
                assert (each.tokens, each.logprobs) == (tokens, logprobs), way
    assert accepted > 20


DIFFUSION = {"llada": LLADA, "sdar": SDAR, "sdar_moe": model_of("sdar_moe"), "fast_dllm": fast_dllm()}
WAYS: list[tuple[str, dict[str, Any]]] = [
    *(("llada", {"cache": cache, "block_length": BLOCK}) for cache in ("none", "prefix", "dual")),
    ("llada", {"cache": "dual", "block_length": BLOCK, "active_blocks": 2}),
    ("sdar", {"cache": "block", "block_length": BLOCK}),
    ("sdar_moe", {"cache": "block", "block_length": BLOCK}),
    *(("fast_dllm", {"cache": cache, "sub_block_length": 4}) for cache in ("block", "dual")),
]


@pytest.mark.parametrize(("name", "way"), WAYS, ids=str)
def test_text_by_blocks(name: str, way: dict[str, Any]) -> None:
    model = DIFFUSION[name]
    asked = prompts(random.Random(str(way)), 60)
    for rule, temperature in (("confidence:0.05", 0.0), ("entropy:3", 0.8)):
        settings: dict[str, Any] = {
            "gen_length": 16,
            "rule": rule,
            "temperature": temperature,
            "logprobs": True,
        }
        expected = []
        for i, ids in enumerate(asked):
            out = dx.decode(model, [ids], seed=[i], **way, **settings)
            expected.append((out.responses[0][:16].tolist(), out.logprobs[0][:16].tolist()))
        out = dx.decode(model, asked, seed=[*range(4)], **way, **settings)
        with dx.Engine(model, lanes=3, max_length=64, page_size=16, **way) as engine:
            handles = [engine.submit(ids, seed=i % 4, **settings) for i, ids in enumerate([*asked, *asked])]
            found = [handle.result(60) for handle in handles]
        for i, (tokens, logprobs) in enumerate(expected):
            assert (out.responses[i][:16].tolist(), out.logprobs[i][:16].tolist()) == (tokens, logprobs)
            for each in (found[i], found[i + 4]):
                assert (each.tokens, each.logprobs) == (tokens, logprobs)
