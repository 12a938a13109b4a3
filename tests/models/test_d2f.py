"""LLaDA and Dream as D2F and CDLM train them: blocks behind a prompt that is one block, against D2F's loop
in plain torch, and against a function that attends so."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dparallel.likelihood import log_likelihoods
from test_a2d import MASK, ids, logits_of, theirs_of
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext import models
from dparallel_ext.models import Model, Traits

pytest_plugins = ["taping"]
transformers = pytest.importorskip("transformers")

SIZE = 8
"""Of blocks."""
BASES = {"llada": "llama", "dream": "qwen2"}
LLADA = {
    **{"model_type": "llada", "n_layers": 3, "d_model": 32, "n_heads": 4, "n_kv_heads": 2},
    **{"mlp_hidden_size": 48, "vocab_size": 300, "embedding_size": 300, "rms_norm_eps": 1e-6},
    **{"rope_theta": 500.0, "max_sequence_length": 256, "include_bias": False, "weight_tying": False},
    **{"block_type": "llama", "activation_type": "silu", "layer_norm_type": "rms", "rope": True},
    **{"mask_token_id": MASK, "eos_token_id": None, "prompt_block": True},
}
each_family = pytest.mark.parametrize("family", BASES)


@functools.cache
def both(family: str) -> tuple[Any, Model]:
    """A model of transformers whose attention takes any mask, and ours with its weights."""
    theirs = theirs_of(BASES[family], tie_word_embeddings=False)
    stored = theirs.state_dict()
    if family == "dream":
        config = {**theirs.config.to_dict(), "model_type": "Dream", "mask_token_id": MASK}
        config |= {
            "prompt_block": True,
            "rope_parameters": None,
            "rope_theta": 500.0,
            "layer_types": None,
            "eos_token_id": None,
        }
        ours: Model = models.Dream(config)
        ours.load_state_dict(stored)
    else:
        ours = models.LLaDA(LLADA)
        pairs = [(models.LLaDA.NAMES[name], models.A2DLlama.NAMES[name]) for name in models.LLaDA.NAMES]
        layered = {(a.format(n), b.format(n)) for a, b in pairs for n in range(3)}
        ours.load_state_dict({f"{a}.weight": stored[f"{b}.weight"] for a, b in layered})
    return theirs, ours.eval()


def blocks_of(prompt: int, length: int) -> Tensor:
    """(L,) the block of each column; the prompt is block -1."""
    return (torch.arange(length) - prompt).div(SIZE, rounding_mode="floor").clamp(min=-1)


def predictions(family: str, x: Tensor, prompt: int) -> Tensor:
    """(L, V) the logits for each column of x (L,), of which each sees the blocks up to its own."""
    block = blocks_of(prompt, len(x))
    logits = logits_of(both(family)[0], x[None], block[:, None] >= block)[0]
    return torch.cat((logits[:1], logits[:-1])) if family == "dream" else logits


def d2f(
    family: str, prompt: Tensor, blocks: int, tau: float, add: float, activate: float, eos: int | None = None
) -> tuple[Tensor, int]:
    """The response and passes of D2F's `_generate_block_single`: any number of blocks may be open."""
    x, first, passes, ended = prompt, len(prompt), 0, False
    opened = 0

    def share(block: int) -> float:
        """The decoded part of a block; the prompt is decoded."""
        if block < 0:
            return 1.0
        return 1 - int((x[first + block * SIZE :][:SIZE] == MASK).sum()) / SIZE

    while True:
        if opened < blocks and not ended and share(opened - 1) >= add:
            x, opened = torch.nn.functional.pad(x, (0, SIZE), value=MASK), opened + 1
        if not (x == MASK).any():
            return x[first:], passes
        p, token = predictions(family, x, first).double().softmax(1).max(1)
        commit = (x == MASK) & (p > tau)
        for block in range(opened):
            columns = torch.zeros_like(commit)
            columns[first + block * SIZE : first + (block + 1) * SIZE] = True
            masked = columns & (x == MASK)
            if share(block - 1) >= activate and masked.any() and not (masked & commit).any():
                commit[p.where(masked, -1).argmax()] = True
        x, passes = x.where(~commit, token), passes + 1
        ended = ended or (eos is not None and bool((x[first:] == eos).any()))


PROMPTS = [ids(length, seed=length) for length in (1, 7, 8, 21)]


def settings_of(tau: float, add: float, activate: float, most: int) -> dict[str, Any]:
    thresholds = {"selector": "confidence", "threshold": tau, "open_at": add, "activate_at": activate}
    return {"block_length": SIZE, "active_blocks": most, **thresholds}


@pytest.mark.parametrize(("tau", "add", "activate"), [(0.3, 0.1, 0.95), (0.2, 0.5, 0.5), (0.25, 0.3, 0.9)])
@each_family
def test_d2fs_tokens_and_passes(family: str, tau: float, add: float, activate: float) -> None:
    _, model = both(family)
    settings = settings_of(tau, add, activate, 5)
    expected = [d2f(family, prompt, 5, tau, add, activate) for prompt in PROMPTS]
    out = dx.decode(model, PROMPTS, gen_length=5 * SIZE, **settings)
    assert [r.tolist() for r in out.responses] == [tokens.tolist() for tokens, _ in expected]
    assert out.nfe.tolist() == [passes for _, passes in expected]
    assert torch.equal(out.nfe_published, out.nfe)  # its next pass stores what is complete, as ours does
    one = dx.decode(model, PROMPTS, gen_length=5 * SIZE, **{**settings, "active_blocks": 1})
    assert not torch.equal(one.nfe, out.nfe)
    with dx.Engine(
        model, lanes=2, **{name: settings[name] for name in settings if name != "selector"}
    ) as engine:
        handles = [engine.submit(prompt, gen_length=5 * SIZE, selector="confidence") for prompt in PROMPTS]
        assert [handle.result(60).tokens for handle in handles] == [t.tolist() for t, _ in expected]


@each_family
def test_d2fs_text_up_to_an_end(family: str) -> None:
    """It opens no block once an end is decoded, wherever that is; the text in front is the same."""
    tau, add, activate = 0.3, 0.1, 0.95
    for prompt in PROMPTS:
        eos = int(d2f(family, prompt, 5, tau, add, activate)[0][19])
        expected = d2f(family, prompt, 5, tau, add, activate, eos)[0].tolist()
        out = dx.decode(
            both(family)[1], prompt, gen_length=5 * SIZE, eos_id=eos, **settings_of(tau, add, activate, 5)
        )
        kept = int(out.kept)
        assert kept == expected.index(eos) < 20
        assert out.responses[0][:kept].tolist() == expected[:kept]


WAYS: list[dict[str, Any]] = [
    *({"steps": 15}, {"steps": 6, "gen_length": 19}, {"threshold": 2.0}, {"rule": "credit+entropy:3"}),
    *({"rule": "edit:0.2,0.3,4"}, {"threshold": 2.5, "active_blocks": 2}, {"threshold": 3.0, "eos_id": 7}),
    {"threshold": 4.0, "temperature": 0.8, "seed": 4, "top_p": 0.9, "suppress": [5, 9]},
]


def as_function(family: str, prompt: int) -> Any:
    """The same attention as a function, to which all else is LLaDA's plain loop over whole sequences."""

    def function(x: Tensor) -> Any:
        return SimpleNamespace(logits=torch.stack([predictions(family, row, prompt) for row in x]))

    function.traits = Traits(MASK)  # type: ignore[attr-defined]
    return function


@pytest.mark.parametrize("way", WAYS, ids=str)
@each_family
def test_every_way_to_decode(family: str, way: dict[str, Any]) -> None:
    way = {"gen_length": 24, "block_length": SIZE, **way}
    for prompt in PROMPTS[1:]:
        expected = dx.decode(as_function(family, len(prompt)), prompt, **way)
        out = dx.decode(both(family)[1], prompt, **way)
        assert torch.equal(out.sequences, expected.sequences)
        assert torch.equal(out.nfe, expected.nfe)


@pytest.mark.parametrize("own", [{"steps": 20}, {"rule": "one"}, {"threshold": 2.0}], ids=str)
@each_family
def test_self_speculation_keeps_the_text(family: str, own: dict[str, Any]) -> None:
    model, own = both(family)[1], {"gen_length": 20, **own}
    plain = dx.decode(model, PROMPTS, block_length=5, **own)
    fewer = dx.decode(model, PROMPTS, block_length=5, draft_size=3, **own)
    assert torch.equal(fewer.sequences, plain.sequences)
    assert int(fewer.nfe.sum()) < int(plain.nfe.sum())
    # A pass over a block of Dream's has the position in front of it, too, and so lies in up to three pages.
    with dx.Engine(model, lanes=2, page_size=4, draft_size=3, block_length=5) as engine:
        handles = [engine.submit(prompt, **own) for prompt in PROMPTS]
        assert [handle.result(60).tokens for handle in handles] == [r.tolist() for r in plain.responses]


@each_family
def test_masks_in_a_prompt(family: str) -> None:
    """All in front of the first mask is one block, and blocks count from there."""
    prompt = torch.cat((PROMPTS[1], torch.tensor([MASK, MASK]), PROMPTS[2]))
    way: dict[str, Any] = {"gen_length": 11, "block_length": SIZE, "infill": True, "threshold": 2.0}
    expected = dx.decode(as_function(family, 7), prompt, **way)
    out = dx.decode(both(family)[1], prompt, **way)
    assert torch.equal(out.sequences, expected.sequences)


@each_family
def test_the_mask_matters(family: str) -> None:
    """Without the config's word the model sees both ways, and decodes something else."""
    _, model = both(family)
    config = {name: value for name, value in model.config.items() if name != "prompt_block"}
    plain = type(model)(config).eval()
    plain.load_state_dict(model.state_dict())
    assert models.traits(model) == replace(models.traits(plain), prompt_block=True)
    way: dict[str, Any] = {"gen_length": 24, "block_length": SIZE, "threshold": 2.0}
    found = dx.decode(model, PROMPTS[3], **way)  # cache "block" is its default
    assert not torch.equal(found.sequences, dx.decode(plain, PROMPTS[3], **way).sequences)
    with pytest.raises(ValueError, match=f"since {type(plain).__name__} is not block-causal"):
        dx.decode(plain, PROMPTS[3], cache="block", **way)
    plain.traits = models.traits(model)  # type: ignore[assignment]
    assert torch.equal(found.sequences, dx.decode(plain, PROMPTS[3], **way).sequences)


@each_family
def test_a_checkpoint_says_so(family: str, tmp_path: Path) -> None:
    models.save(both(family)[1], tmp_path)
    model = models.load(tmp_path)
    assert model.prompt_block
    assert models.traits(model) == replace(models.stored_traits(tmp_path), mask_id=MASK)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "prompt_block": 2}))
    with pytest.raises(ValueError, match="prompt_block=2, expected true or false"):
        models.load(tmp_path)


def test_another_family_s_config_says_so() -> None:
    config = {**theirs_of("llama").config.to_dict(), "mask_token_id": MASK, "eos_token_id": None}
    config |= {"rope_parameters": None, "rope_theta": 500.0, "prompt_block": True}
    assert models.traits(models.ILLaDA({**config, "model_type": "illada"})).prompt_block
    with pytest.raises(ValueError, match="block_causal_too: does not go with a prompt_block"):
        models.traits(models.A2DLlama(config))


def test_what_is_for_other_models_is_refused() -> None:
    model, x = both("llada")[1], ids(1, 4)
    behind = "model: LLaDA has its masks in blocks behind its prompt"
    with pytest.raises(ValueError, match=behind):
        log_likelihoods(model, [[3, 4]], [[5]])
    with pytest.raises(ValueError, match=behind):
        dx.compat.generate(model, x, steps=4, gen_length=4, block_length=4)
    with pytest.raises(ValueError, match=behind):
        dx.adaptive_decode(model, x, verifier=model, gen_length=4)
    with pytest.raises(ValueError, match="drafter: LLaDA has its masks in blocks behind its prompt"):
        dx.speculation.ModelDrafter(model)
    with pytest.raises(ValueError, match=r'cache: expected "block", by which LLaDA fills masks, got .none.'):
        dx.decode(model, x, gen_length=4, cache="none")
    stated = as_function("llada", 4)
    stated.traits = models.traits(model)
    with pytest.raises(ValueError, match=r"cache: 'block' needs one of dparallel_ext\.models"):
        dx.decode(stated, x, gen_length=4)
    for other in ({"window": 4}, {"causal": True}, {"block_length": 4}, {"block_causal_too": True}):
        with pytest.raises(ValueError, match="does not go with"):
            Traits(prompt_block=True, **other)
    with pytest.raises(ValueError, match="prompt_block: expected bool, got int"):
        Traits(prompt_block=1)  # type: ignore[arg-type]
