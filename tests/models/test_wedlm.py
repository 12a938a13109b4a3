"""WeDLM's family: logits of transformers' layers, known tokens first; files, and what does not go with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dparallel import registry
from dparallel.likelihood import log_likelihoods
from wedlm import EOS, KINDS, MASK, VOCABULARY, every_kind, ids, in_order, ours, theirs

import dparallel_ext as dx
from dparallel_ext import models
from dparallel_ext.cache import Span
from dparallel_ext.models import Traits, WeDLM

TRAITS = Traits(MASK, aligned_blocks=False, window=16)


@every_kind
@torch.no_grad()
def test_logits_are_those_of_the_rows_in_the_order_known_first(kind: str) -> None:
    x = ids(3, 40)
    x[0, [0, 3, 4, 9, 20, 39]] = MASK
    x[1, 30:] = MASK
    for row, logits in zip(x, ours(kind)(x).logits, strict=True):
        masked = row == MASK
        order = [*(~masked).nonzero()[:, 0].tolist(), *masked.nonzero()[:, 0].tolist()]
        expected = in_order(theirs(kind), row[order].tolist(), order)
        assert expected.std() > 1
        torch.testing.assert_close(logits[order], expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(ours(kind)(x[2:]).logits, theirs(kind)(x[2:]).logits, rtol=0, atol=1e-4)
    assert not torch.allclose(ours(kind)(x[:1]).logits, theirs(kind)(x[:1]).logits, atol=0.1)


@torch.no_grad()
def test_padding_is_not_seen() -> None:
    x = ids(2, 20)
    x[:, [7, 15]] = MASK
    seen = torch.ones(2, 20, dtype=torch.bool)
    seen[0, :5], seen[1, 16:] = False, False
    logits = ours()(x, attention_mask=seen).logits
    torch.testing.assert_close(logits[:1, 5:], ours()(x[:1, 5:]).logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(logits[1:, :16], ours()(x[1:, :16]).logits, rtol=0, atol=1e-4)
    assert logits.isfinite().all()


@torch.no_grad()
def test_a_pass_over_spans_sees_what_a_call_sees() -> None:
    """Of 150 tokens in three spans, the masks in the last, beside another sequence and padding."""
    x = ids(2, 150)
    x[0, [90, 91, 120, 121, 149]] = MASK
    x[1, 20:40] = MASK
    for cut in (86, 60):  # 64 tokens at most
        cache = ours().new_cache(2, 150)
        spans = [Span(0, 0, 40, 40), Span(0, 40, cut, cut), Span(1, 0, 40, 40)]
        spans += [Span(0, cut, 150, 150)] if cut == 86 else [Span(0, cut, 124, 124), Span(0, 124, 150, 150)]
        metadata = cache.metadata(spans, lambda n: n + 13)
        tokens = x[metadata.rows, metadata.positions]
        found = ours().head(ours().step(tokens, cache, metadata.known_first(tokens != MASK)))
        expected = ours()(x).logits
        rows = metadata.slot_mapping >= 0
        if cut == 86:
            other = expected[metadata.rows, metadata.positions]
            other[metadata.rows == 1] = ours()(x[1:, :40]).logits[0]
            torch.testing.assert_close(found[rows], other[rows], rtol=0, atol=1e-4)
        else:  # a mask in another span than known tokens behind it does not see them
            assert not torch.allclose(found[rows][-26:], expected[0, 124:], atol=0.1)


@every_kind
@torch.no_grad()
def test_a_checkpoint_is_read_and_written(kind: str, tmp_path: Path) -> None:
    theirs(kind).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "wedlm"
    model, x = models.load(tmp_path), ids(2, 19)
    assert type(model) is WeDLM
    assert (model.mask_id, model.eos_id, model.shape.block_length) == (MASK, EOS, None)
    assert (model.shape.qk_norm, model.shape.qkv_bias) == (kind == "qwen3", kind == "qwen2")
    assert not model.shape.o_bias
    assert models.traits(model) == models.traits(theirs(kind)) == TRAITS
    expected = model(x).logits
    torch.testing.assert_close(expected, theirs(kind)(x).logits, rtol=0, atol=1e-4)
    models.save(model, tmp_path / "again")
    again = models.load(tmp_path / "again", fuse=True)
    assert (type(again), again.mask_id, again.shape) == (WeDLM, MASK, model.shape)
    assert torch.equal(again(x).logits, expected)
    settings: dict[str, Any] = {"gen_length": 20, "rule": "distance:2"}
    assert torch.equal(*(dx.decode(each, x, **settings).sequences for each in (model, again)))


def test_what_the_published_config_leaves_out() -> None:
    config = {**theirs("qwen2").config.to_dict(), "model_type": "wedlm"}
    for name in ("attention_bias", "qk_norm", "head_dim"):
        config.pop(name, None)
    shape = WeDLM.shape_of(config)
    assert (shape.qkv_bias, shape.qk_norm, shape.head_dim) == (True, False, 8)
    assert WeDLM.released_mask_id(151936) == WeDLM.released_mask_id(152064) == 151665
    with pytest.raises(ValueError, match="config: qk_norm=3, expected true or false"):
        WeDLM.shape_of({**config, "qk_norm": 3})
    sliding = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    with pytest.raises(ValueError, match="use_sliding_window=True is not supported"):
        WeDLM.shape_of({**config, **sliding, "layer_types": None})


def test_what_is_for_other_models_is_refused(tmp_path: Path) -> None:
    model, x = ours(), ids(1, 4)
    behind = "model: WeDLM.* has its masks behind all known tokens"
    with pytest.raises(ValueError, match=behind):
        log_likelihoods(model, [[3, 4]], [[5]])
    with pytest.raises(ValueError, match=behind):
        dx.compat.generate(model, x, steps=4, gen_length=4, block_length=4)
    with pytest.raises(ValueError, match=behind):
        dx.compat.generate(model, x, steps=4, gen_length=4, block_length=4, cfg_scale=1.0)
    with pytest.raises(ValueError, match=behind):
        dx.adaptive_decode(model, x, verifier=model, gen_length=4)
    with pytest.raises(ValueError, match="drafter: WeDLM has its masks behind all known tokens"):
        dx.speculation.ModelDrafter(model)
    with pytest.raises(ValueError, match="model: WeDLM is a diffusion model"):
        dx.speculate(model, x)
    with pytest.raises(ValueError, match=r"cache: 'window' needs one of dparallel_ext\.models"):
        dx.decode(theirs(), x)
    theirs().save_pretrained(tmp_path)
    assert registry.is_causal(str(tmp_path)) is False


def test_the_traits_of_a_function_say_it() -> None:
    """A class of other traits with these is decoded alike."""
    causal = models.Qwen3({**ours().config, "model_type": "qwen3"}).eval()
    causal.load_state_dict(ours().state_dict())
    causal.traits = TRAITS  # type: ignore[assignment]
    settings: dict[str, Any] = {"gen_length": 20, "rule": "distance:2"}
    found = dx.decode(causal, ids(1, 9), **settings)
    assert torch.equal(found.sequences, dx.decode(ours(), ids(1, 9), **settings).sequences)
    assert len(KINDS) == 2
    assert int(found.sequences.max()) < VOCABULARY


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"window": -3}, "window: expected a whole number >= 1, got -3"),
        ({"window": "16"}, "window: expected a whole number >= 1, got '16'"),
        ({"block_length": 1.5}, "block_length: expected a whole number >= 1, got 1.5"),
        ({"block_length": 8, "sub_block_length": -1}, "sub_block_length: expected a whole number >= 1"),
        ({"shift": "yes"}, "shift: expected bool, got str"),
        ({"strict": "confidence"}, "strict: expected frozenset, got str"),
        *(
            ({"window": 16, name: True}, f"{name}: does not go with a window")
            for name in ("causal", "block_causal_too", "onward")
        ),
        ({"window": 16, "block_length": 8}, "block_length: does not go with a window"),
        ({"window": 16, "sub_block_length": 8}, "sub_block_length: does not go with a window"),
    ],
    ids=str,
)
def test_traits_that_no_model_has_are_refused(fields: dict[str, Any], said: str) -> None:
    """Stated by hand, they would decode senseless text, or for ever."""
    with pytest.raises(ValueError, match=said):
        Traits(MASK, **fields)
