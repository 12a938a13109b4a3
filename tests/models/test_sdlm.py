"""SDLM's family: logits of transformers' Qwen2 under the published masks; files, and what does not go with
it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dparallel import registry
from dparallel.likelihood import log_likelihoods
from dparallel.tune import own_choices
from sdlm import MASK, VOCABULARY, ids, of_a_call, ours, theirs
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext import models
from dparallel_ext.cache import Span
from dparallel_ext.models import SDLM, Qwen2, Qwen3, Traits

TRAITS = Traits(MASK, shift=True, strict=frozenset({"confidence", "entropy"}), aligned_blocks=False, window=4)
PUBLISHED = {
    **{"architectures": ["SDLMQwen2ForCausalLM"], "attention_dropout": 0.0, "attn_implementation": "sdpa"},
    **{"block_size": 4, "bos_token_id": 151643, "causal_attn": False, "eos_token_id": 151643},
    **{"hidden_act": "silu", "hidden_size": 5120, "initializer_range": 0.02, "intermediate_size": 27648},
    **{"max_position_embeddings": 131072, "max_window_layers": 64, "model_type": "qwen2"},
    **{"num_attention_heads": 40, "num_hidden_layers": 64, "num_key_value_heads": 8, "rms_norm_eps": 1e-05},
    **{"rope_theta": 1000000.0, "sliding_window": 131072, "text_mask_token": "<text_mask>"},
    **{"text_mask_token_id": 151665, "tie_word_embeddings": False, "torch_dtype": "bfloat16"},
    **{"use_cache": True, "use_sliding_window": False, "vocab_size": 151666},
}
"""The keys and values of SDLM-32B-D4's config.json."""


def some_rows() -> Tensor:
    x = ids(6, 40)
    x[0, 30:] = MASK
    x[1, 39] = MASK
    x[2, [3, 4, 9, 20, 22, 39]] = MASK
    x[3, 1:] = MASK
    x[4, 17:20] = x[4, 21:26] = x[4, 37:39] = MASK
    return x


@torch.no_grad()
def test_logits_are_those_under_the_published_mask() -> None:
    """For a sequence without a cache: runs of masks with the token in front, also between known tokens."""
    x = some_rows()
    for row, logits in zip(x, ours()(x).logits, strict=True):
        expected = of_a_call(theirs(), row)
        assert expected.std() > 1
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(ours()(x[5:]).logits, theirs()(x[5:]).logits, rtol=0, atol=1e-4)
    assert not torch.allclose(ours()(x[:1]).logits, theirs()(x[:1]).logits, atol=0.1)


@torch.no_grad()
def test_padding_is_not_seen() -> None:
    x = some_rows()[[0, 1]]
    seen = torch.ones(2, 40, dtype=torch.bool)
    seen[0, :5], seen[1, 36:] = False, False
    logits = ours()(x, attention_mask=seen).logits
    torch.testing.assert_close(logits[:1, 5:], ours()(x[:1, 5:]).logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(logits[1:, :36], ours()(x[1:, :36]).logits, rtol=0, atol=1e-4)
    assert logits.isfinite().all()


@torch.no_grad()
def test_a_pass_over_spans_sees_what_a_call_sees() -> None:
    """Of 150 tokens in five spans, the window in the last, beside another sequence and padding."""
    x = ids(2, 150)
    x[0, 143:] = MASK
    x[1, 36:40] = MASK
    cache = ours().new_cache(2, 150)
    ends = (0, 20, 40, 60, 86)
    spans = [Span(0, start, end, end) for start, end in itertools.pairwise(ends)]
    spans += [Span(1, 0, 40, 40), Span(0, 86, 150, 150)]  # two more are padding
    metadata = cache.metadata(spans, lambda n: n + 13)
    tokens = x[metadata.rows, metadata.positions]
    known = metadata.positions < torch.tensor([142, 35])[metadata.rows]
    found = ours().head(ours().step(tokens, cache, metadata.known_first(known, both_ways=True)))
    expected = ours()(x).logits[metadata.rows, metadata.positions]
    expected[metadata.rows == 1] = ours()(x[1:, :40]).logits[0]
    rows = metadata.slot_mapping >= 0
    torch.testing.assert_close(found[rows], expected[rows], rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [4, 8])
@torch.no_grad()
def test_a_checkpoint_is_read_and_written(size: int, tmp_path: Path) -> None:
    theirs(size).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["model_type"], config["block_size"], "mask_token_id" in config) == ("qwen2", size, False)
    model, x = models.load(tmp_path), some_rows()
    assert type(model) is SDLM
    assert (model.mask_id, model.window, model.shape.window, model.block_length) == (MASK, size, size, None)
    assert (model.shape.qkv_bias, model.shape.o_bias) == (True, False)
    assert models.traits(model) == models.traits(theirs(size))
    assert models.traits(ours(4)) == TRAITS
    expected = model(x).logits
    assert own_choices(str(tmp_path))["block_length"] == (size,)
    models.save(model, tmp_path / "again")
    again = models.load(tmp_path / "again", fuse=True)
    assert (type(again), again.mask_id, again.shape) == (SDLM, MASK, model.shape)
    assert torch.equal(again(x).logits, expected)
    settings: dict[str, Any] = {"gen_length": 20, "rule": "confidence:0.3"}
    assert torch.equal(*(dx.decode(each, x[5], **settings).sequences for each in (model, again)))


def test_the_mask_token_has_a_key_of_its_own(tmp_path: Path) -> None:
    """Which comes before mask_token_id, wherever that is, as in the published code."""
    of = theirs(4, mask_token_id=7)
    of.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"mask_token_id": 8}')
    for model in (models.load(tmp_path), models.wrap(of), SDLM(of.config.to_dict())):
        assert model.mask_id == model.config["mask_token_id"] == MASK
    assert models.traits(of).mask_id == MASK
    other = models.load(tmp_path, mask_id=3)
    models.save(other, tmp_path / "again")
    assert other.mask_id == models.load(tmp_path / "again").mask_id == 3


def test_the_published_config() -> None:
    assert models.family_of(PUBLISHED) is SDLM
    with torch.device("meta"):
        model = SDLM({**PUBLISHED, "num_hidden_layers": 1})
    assert (model.mask_id, model.eos_id, model.window) == (151665, 151643, 4)
    assert (model.vocab_size, model.shape.head_dim, model.shape.eps) == (151666, 128, 1e-05)
    first_release = {**PUBLISHED, "casual_attn": False, "block_size": 8}
    assert SDLM.shape_of(first_release).window == 8
    without = {key: value for key, value in PUBLISHED.items() if key != "text_mask_token_id"}
    assert models.family_of(without) is Qwen2
    assert models.family_of({**PUBLISHED, "model_type": "qwen3"}) is Qwen3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"causal_attn": True}, "config: causal_attn=True is not supported, only False"),
        ({"casual_attn": True}, "config: casual_attn=True is not supported, only False"),
        ({"block_size": 0}, "config: block_size=0, expected a whole number >= 1 and <= 64"),
        ({"block_size": 65}, "config: block_size=65, expected a whole number >= 1 and <= 64"),
        ({"text_mask_token_id": 151666}, "config: text_mask_token_id=151666, expected an id below 151666"),
        ({"text_mask_token_id": "x"}, "config: text_mask_token_id='x', expected an id below 151666"),
        ({"use_sliding_window": True, "max_window_layers": 1}, "use_sliding_window=True is not supported"),
    ],
    ids=str,
)
def test_other_configs_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SDLM({**PUBLISHED, **changes})


def test_what_is_for_other_models_is_refused(tmp_path: Path) -> None:
    model, x = ours(), ids(1, 4)
    behind = "model: SDLM.* has its masks behind all known tokens"
    with pytest.raises(ValueError, match=behind):
        log_likelihoods(model, [[3, 4]], [[5]])
    with pytest.raises(ValueError, match=behind):
        dx.compat.generate(model, x, steps=4, gen_length=4, block_length=4)
    with pytest.raises(ValueError, match=behind):
        dx.adaptive_decode(model, x, verifier=model, gen_length=4)
    with pytest.raises(ValueError, match="drafter: SDLM has its masks behind all known tokens"):
        dx.speculation.ModelDrafter(model)
    with pytest.raises(ValueError, match="model: SDLM is a diffusion model"):
        dx.speculate(model, x)
    with pytest.raises(ValueError, match=r"cache: 'window' needs one of dparallel_ext\.models"):
        dx.decode(theirs(), x)
    theirs().save_pretrained(tmp_path)
    assert registry.is_causal(str(tmp_path)) is False


def test_the_traits_of_a_function_say_it() -> None:
    """A class of other traits with these is decoded alike."""
    causal = models.Qwen2(ours().config).eval()
    causal.load_state_dict(ours().state_dict())
    causal.traits = TRAITS  # type: ignore[assignment]
    settings: dict[str, Any] = {"gen_length": 20, "rule": "confidence:0.3"}
    found = dx.decode(causal, ids(1, 9), **settings)
    assert torch.equal(found.sequences, dx.decode(ours(), ids(1, 9), **settings).sequences)
    assert int(found.sequences.max()) < VOCABULARY
