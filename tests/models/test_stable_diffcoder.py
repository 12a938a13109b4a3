"""Stable-DiffCoder: logits of transformers' Llama under a block-causal mask, tokens and passes of the
published loop, written again."""

from __future__ import annotations

import functools
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext import models
from dparallel_ext.models import Llama, StableDiffCoder

transformers = pytest.importorskip("transformers")

MASK, VOCABULARY, BLOCK = 5, 60, 4
CODE = {"AutoModelForCausalLM": "modeling_stable_diffcoder.StableDiffcoderForCausalLM"}
OLDER = {"AutoModelForCausalLM": "modeling_seed_diffcoder.SeedDiffcoderForCausalLM"}


@functools.cache
def theirs() -> Any:
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        **{"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rope_theta": 500000.0},
        **{"max_position_embeddings": 8192, "initializer_range": 0.2, "tie_word_embeddings": False},
    )
    config.auto_map = CODE
    return transformers.LlamaForCausalLM(config).eval()


@functools.cache
def ours() -> StableDiffCoder:
    model = models.wrap(theirs())
    assert isinstance(model, StableDiffCoder)
    return model


def logits_of(x: Tensor) -> Tensor:
    """(L, V) of x (L,), where a position sees its block of 4 and those before."""
    block = torch.arange(len(x)) // BLOCK
    seen = block[None] <= block[:, None]
    mask = torch.zeros(1, 1, len(x), len(x)).masked_fill(~seen, -torch.inf)
    with torch.no_grad():
        return theirs()(x[None], attention_mask=mask).logits[0]


def published(prompt: Tensor, gen_length: int, steps: int, threshold: float | None) -> tuple[list[int], int]:
    """The tokens that `generate_block` writes behind the prompt, and its count of passes. `steps` is each
    block's share."""
    x, passes, end = torch.cat([prompt, torch.full((gen_length,), MASK)]), 0, len(prompt) + gen_length
    for start in range(len(prompt) - len(prompt) % BLOCK, end, BLOCK):
        stop = min(start + BLOCK, end)
        held = int((x[start:stop] == MASK).sum())
        quotas = [held // steps + (i < held % steps) for i in range(steps)]
        while (masks := start + (x[start:stop] == MASK).nonzero()[:, 0]).numel():
            logits = logits_of(x[:stop])[masks]
            probabilities = logits.double().softmax(-1)
            probabilities[:, MASK] = -1  # our one difference: the mask token is never committed
            best, token = probabilities.max(-1)
            order = best.argsort(descending=True, stable=True)
            count = quotas.pop(0) if threshold is None else max(1, int((best >= threshold).sum()))
            x[masks[order[:count]]] = token[order[:count]]
            passes += 1
        passes += 1  # which stores the block
    return x[len(prompt) :].tolist(), passes


CASES = [
    (9, 12, None, 4),
    (8, 12, None, 4),
    (3, 8, None, 2),
    (1, 4, 0.3, 4),
    (6, 16, 0.2, 4),
    (11, 8, 0.9, 4),
]


@pytest.mark.parametrize(("length", "gen_length", "threshold", "steps"), CASES)
def test_tokens_and_passes_are_the_published_ones(
    length: int, gen_length: int, threshold: float | None, steps: int
) -> None:
    prompts = torch.randint(6, VOCABULARY, (4, length), generator=torch.Generator().manual_seed(length))
    blocks = -(-(length + gen_length) // BLOCK) - length // BLOCK
    how: dict[str, Any] = (
        {"steps": steps * blocks} if threshold is None else {"rule": f"confidence:{threshold}"}
    )
    expected = [published(prompt, gen_length, steps, threshold) for prompt in prompts]
    out = dx.decode(ours(), prompts, gen_length=gen_length, cache="block", **how)
    # It does not go on to the end of a block. The published loop does not count its prefill.
    assert [response.tolist() for response in out.responses] == [tokens for tokens, _ in expected]
    assert (out.nfe_published - int(length >= BLOCK)).tolist() == [passes for _, passes in expected]
    end = expected[0][0][gen_length // 2]
    with dx.Engine(ours(), gen_length=gen_length, eos_id=end, lanes=2, **how) as engine:
        handles = [engine.submit(prompt) for prompt in prompts]
        for handle, (tokens, _) in zip(handles, expected, strict=True):
            assert handle.result().tokens == list(itertools.takewhile(lambda token: token != end, tokens))


@pytest.mark.parametrize("cache", ["none", "block"])
def test_logits_and_other_caches(cache: Any) -> None:
    x = torch.randint(6, VOCABULARY, (2, 15))
    x[:, 9:] = MASK
    for row, logits in zip(x, ours()(x).logits, strict=True):
        torch.testing.assert_close(logits, logits_of(row), rtol=0, atol=1e-5)
    out = dx.decode(ours(), x[:, :9], gen_length=6, cache=cache, rule="confidence:0.3")
    expected = [published(row, 6, 4, 0.3)[0] for row in x[:, :9]]
    assert [response.tolist() for response in out.responses] == expected
    drafted = dx.decode(ours(), x[:, :9], gen_length=6, cache=cache, rule="confidence:0.3", draft_size=3)
    assert [response.tolist() for response in drafted.responses] == expected
    filled = dx.decode(ours(), x, gen_length=0, infill=True, cache=cache, rule="confidence:0.3")
    assert [response.tolist() for response in filled.responses] == expected


def test_a_checkpoint_is_known_by_the_code_that_it_names(tmp_path: Path) -> None:
    theirs().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    assert config["model_type"] == "llama"
    for code in (CODE, OLDER):
        file.write_text(json.dumps({**config, "auto_map": code}))
        model = models.load(tmp_path)
        assert type(model) is StableDiffCoder
        assert (model.mask_id, model.block_length) == (MASK, BLOCK)
        assert models.stored_traits(tmp_path).block_length == BLOCK
    models.save(model, tmp_path / "again")
    assert type(models.load(tmp_path / "again")) is StableDiffCoder
    file.write_text(json.dumps({key: value for key, value in config.items() if key != "auto_map"}))
    assert type(models.load(tmp_path)) is Llama
    file.write_text(json.dumps({**config, "auto_map": {"AutoModel": "modeling_other.Other"}}))
    with pytest.warns(
        UserWarning, match=r"modeling_other\.Other, which is not run: .* as Llama, auto.* family's model_type"
    ):
        models.load(tmp_path)


def test_a_call_of_the_published_class_is_causal() -> None:
    with pytest.raises(ValueError, match=r"LlamaForCausalLM is causal.*models\.wrap"):
        dx.decode(theirs(), torch.zeros(1, 3, dtype=torch.long), gen_length=4)
