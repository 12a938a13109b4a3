"""Families of 2026: iLLaDA and DreamReasoner, on random weights of transformers' Llama and Qwen3; and
Open-dCoder, on those of Qwen2."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext import models
from dparallel_ext.models import Dream, DreamReasoner, ILLaDA, Model

transformers = pytest.importorskip("transformers")

MASK, VOCABULARY, BLOCK = 5, 60, 4
SIZES = {
    **{"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2, "rope_theta": 1e6},
    **{"tie_word_embeddings": False, "max_position_embeddings": 512},
}


@functools.cache
def theirs(family: str) -> Any:
    torch.manual_seed(4)
    if family == "illada":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    if family == "open_dcoder":
        tied = {**SIZES, "tie_word_embeddings": True}
        return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**tied)).eval()
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, head_dim=8)).eval()


def written(family: str, directory: Path, **changes: Any) -> Path:
    """A checkpoint with the published config's keys."""
    theirs(family).save_pretrained(directory)
    file = directory / "config.json"
    config = {**json.loads(file.read_text()), "rope_parameters": None, "rope_theta": 1e6}
    config |= {"model_type": "illada", "layer_norm_eps": None, "resid_pdrop": 0.0}
    if family == "dream_reasoner":
        config |= {"model_type": "Dream", "block_size": BLOCK, "mask_token_id": MASK}
    if family == "open_dcoder":  # as published under the name qwen2, which the user replaces
        code = {"AutoModelForCausalLM": "modeling_qwen2.Qwen2ForCausalLM"}
        config |= {"model_type": "Dream", "auto_map": code, "mask_token_id": MASK}
    file.write_text(json.dumps({**config, **changes}))
    return directory


@functools.cache
def ours(family: str, directory: Path) -> Model:
    return models.load(written(family, directory))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoint")


def logits_of(family: str, x: Tensor) -> Tensor:
    """(L, V) of x (L,): all positions see each other, or those of their block of 4 and before."""
    block = torch.arange(len(x)) // (BLOCK if family == "dream_reasoner" else len(x))
    mask = torch.zeros(1, 1, len(x), len(x)).masked_fill(block[None] > block[:, None], -torch.inf)
    with torch.no_grad():
        return theirs(family)(x[None], attention_mask=mask).logits[0]


@pytest.mark.parametrize(
    ("family", "kind"), [("illada", ILLaDA), ("dream_reasoner", DreamReasoner), ("open_dcoder", Dream)]
)
def test_logits(family: str, kind: type[Model], directory: Path) -> None:
    model = ours(family, directory / family)
    assert type(model) is kind
    assert model.mask_id == MASK
    x = torch.randint(6, VOCABULARY, (2, 14))
    x[:, 9:] = MASK
    for row, logits in zip(x, model(x).logits, strict=True):
        torch.testing.assert_close(logits, logits_of(family, row), rtol=0, atol=1e-5)
    models.save(model, directory / "again")
    assert type(models.load(directory / "again")) is kind


@pytest.mark.parametrize("length", [1, 7, 8])
def test_dream_reasoners_tokens_and_passes_are_the_published_ones(length: int, directory: Path) -> None:
    """Those of `block_diffusion_generate` with `low_confidence_dynamic`, and its prefill."""
    model = ours("dream_reasoner", directory / "dream_reasoner")
    prompts = torch.randint(6, VOCABULARY, (3, length), generator=torch.Generator().manual_seed(length))
    out = dx.decode(model, prompts, gen_length=10, cache="block", rule="confidence:0.3")
    for prompt, response, passes in zip(prompts, out.responses, out.nfe_published.tolist(), strict=True):
        end = -(-(length + 10) // BLOCK) * BLOCK
        x, expected = torch.cat([prompt, torch.full((end - length,), MASK)]), int(length >= BLOCK)
        for start in range(length - length % BLOCK, end, BLOCK):
            while (masks := start + (x[start : start + BLOCK] == MASK).nonzero()[:, 0]).numel():
                probabilities = logits_of("dream_reasoner", x[: start + BLOCK])[masks].softmax(-1)
                probabilities[:, MASK] = -1  # our one difference: the mask token is never committed
                best, token = probabilities.max(-1)
                sure = best > 0.3
                sure[best.argmax()] = True
                x[masks[sure]] = token[sure]
                expected += 1
            expected += 1  # it stores the block
        assert (response.tolist(), passes) == (x[length:].tolist(), expected)


@pytest.mark.parametrize(("steps", "alg"), [(12, "entropy"), (5, "maskgit_plus"), (5, "topk_margin")])
def test_open_dcoders_tokens_are_the_published_ones(steps: int, alg: str, directory: Path) -> None:
    """Those of its `diffusion_generate`, which shifts the logits, at temperature 0."""
    prompt = torch.randint(6, VOCABULARY, (1, 6), generator=torch.Generator().manual_seed(steps))
    model = ours("open_dcoder", directory / "open_dcoder")
    got = dx.compat.diffusion_generate(model, prompt, max_new_tokens=12, steps=steps, alg=alg)
    x, times = torch.cat([prompt[0], torch.full((12,), MASK)]), torch.linspace(1, 1e-3, steps + 1)
    for step in range(steps):
        masks = (x == MASK).nonzero()[:, 0]
        p = logits_of("open_dcoder", x)[masks - 1].softmax(-1)
        count = int(len(masks) * (1 - times[step + 1] / times[step])) if step < steps - 1 else len(masks)
        best, second = p.topk(2).values.T
        ranks = {"entropy": (p * p.log()).sum(-1), "maskgit_plus": best, "topk_margin": best - second}[alg]
        chosen = ranks.topk(count).indices
        x[masks[chosen]] = p.argmax(-1)[chosen]
    assert MASK not in x
    assert got.tolist() == [x.tolist()]


def test_what_the_published_layers_are_otherwise_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"layer_norm_eps=1e-05 is not supported"):
        models.load(written("illada", tmp_path, layer_norm_eps=1e-5))
    scaling = {"rope_type": "yarn", "factor": 2.0}
    with pytest.raises(ValueError, match="yarn"):
        models.load(written("illada", tmp_path, rope_scaling=scaling))
