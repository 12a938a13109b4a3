"""A2D: the logits of transformers' layers without a causal mask, and the published loops in plain torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dparallel.cli import app
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor
from typer.testing import CliRunner

import dparallel_ext as dx
from dparallel_ext import models
from dparallel_ext.models import A2DLlama, A2DQwen2, A2DQwen3, Model, Traits

pytest_plugins = ["taping"]
transformers = pytest.importorskip("transformers")

VOCABULARY, MASK, EOS, PAD = 300, 299, 2, 1
FAMILIES: dict[str, type[Model]] = {"qwen3": A2DQwen3, "qwen2": A2DQwen2, "llama": A2DLlama}
every_family = pytest.mark.parametrize("base", FAMILIES)
TRAITS = Traits(MASK, block_causal_too=True, aligned_blocks=False)


def theirs_of(base: str, **changes: Any) -> Any:
    """transformers' model with a published config's keys, as a class of dLLM's is derived from it."""
    sizes = {
        **{"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256},
        **{"eos_token_id": EOS, "pad_token_id": PAD, "rope_theta": 500.0, "attention_dropout": 0.0},
        **({"head_dim": 16} if base == "qwen3" else {}),
        **({} if base == "llama" else {"use_sliding_window": False, "layer_types": ["full_attention"] * 3}),
    }
    config = transformers.AutoConfig.for_model(base, **{**sizes, "tie_word_embeddings": True, **changes})
    kind = type(transformers.AutoModelForCausalLM.from_config(config))
    config_kind = type(f"A2D{type(config).__name__}", (type(config),), {"model_type": f"a2d-{base}"})
    kind = type(f"A2D{kind.__name__}", (kind,), {"config_class": config_kind})
    torch.manual_seed(0)
    theirs = kind(config_kind(**config.to_dict() | {"model_type": f"a2d-{base}"}))
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.normal_(1.0 if "norm" in name else 0.0, 0.3)
        theirs.lm_head.weight[MASK] *= 0.1  # dLLM's loop might commit it; here it never leads
    return theirs.eval()


@torch.no_grad()
def logits_of(theirs: Any, x: Tensor, seen: Tensor | None = None, **more: Any) -> Tensor:
    """Logits where position l sees the positions of `seen` (L, K) bool; None: all of them."""
    given = torch.ones(len(x), 1, x.shape[1], more.pop("width", x.shape[1]), dtype=torch.bool)
    mask = torch.where(given if seen is None else seen.expand_as(given), 0.0, -torch.inf)
    found: Tensor = theirs(x, attention_mask=mask, **more).logits
    return found


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, MASK, shape, generator=torch.Generator().manual_seed(seed))


def best_of(logits: Tensor, masked: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` columns of `masked` (L,) with the surest tokens, and these tokens."""
    logits = logits.double()
    x0 = logits.argmax(-1)
    p = logits.softmax(-1).gather(1, x0[:, None])[:, 0].where(masked, -torch.inf)
    chosen = p.sort(descending=True, stable=True).indices[:count]
    return chosen, x0[chosen]


# --- the models ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@every_family
@torch.no_grad()
def test_a_checkpoint_has_the_logits_of_its_base_without_a_mask(
    base: str, tied: bool, tmp_path: Path
) -> None:
    theirs, x = theirs_of(base, tie_word_embeddings=tied), ids(2, 19)
    theirs.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == f"a2d-{base}"
    model = models.load(tmp_path, mask_id=MASK)
    assert type(model) is FAMILIES[base]
    assert (model.mask_id, model.eos_id, model.block_length) == (MASK, EOS, None)
    assert models.traits(model) == TRAITS
    expected = logits_of(theirs, x)
    assert expected.std() > 1
    assert not torch.allclose(theirs(x).logits, expected, atol=0.1)  # a causal mask would tell
    torch.testing.assert_close(model(x).logits, expected, rtol=0, atol=1e-4)
    models.save(model, tmp_path / "again")
    again = models.load(tmp_path / "again")
    assert (type(again), again.mask_id, again.shape) == (type(model), MASK, model.shape)
    assert again.shape.tied is tied
    assert torch.equal(again(x).logits, model(x).logits)
    assert again.config["model_type"] == f"a2d-{base}"


@every_family
@torch.no_grad()
def test_wrap_shares_the_weights_of_a_loaded_model(base: str, recwarn: pytest.WarningsRecorder) -> None:
    theirs, x = theirs_of(base), ids(2, 9)
    theirs.generation_config.mask_token_id = MASK
    model = models.wrap(theirs)
    assert type(model) is FAMILIES[base]
    assert models.traits(theirs) == models.traits(model) == TRAITS
    given = {name: p.data_ptr() for name, p in theirs.named_parameters()}
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == given
    torch.testing.assert_close(model(x).logits, logits_of(theirs, x), rtol=0, atol=1e-4)
    assert not recwarn.list


def test_what_an_autoregressive_model_can_do_is_refused() -> None:
    model = models.wrap(theirs_of("qwen3"))
    with pytest.raises(ValueError, match=r"A2DQwen3 is .*diffusion"):
        dx.speculate(model, ids(1, 4))
    config = {**model.config, "layer_types": ["sliding_attention"] * 3}
    with pytest.raises(ValueError, match="layer_types with 'sliding_attention' is not supported"):
        A2DQwen3(config)


# --- MDLM ---------------------------------------------------------------------------------------


@torch.no_grad()
def mdlm(theirs: Any, prompt: Tensor, gen_length: int, size: int, steps: int, cache: str) -> Tensor:
    """LLaDA's loop, of which dLLM's is a copy; or Fast-dLLM's, which keeps the keys and values in front of
    the block ("prefix") and behind it ("dual") from each block's first pass on.

    steps: passes over each block, by LLaDA's counts. Keys are kept after RoPE, so that their order is free.
    """
    x = torch.nn.functional.pad(prompt, (0, gen_length), value=MASK)
    length = x.shape[1]
    for start in range(prompt.shape[1], length, size):
        end = min(start + size, length)
        base, rest = divmod(end - start, steps)
        first, past = 0, None
        for step in range(steps):
            masked = x[0, start:end] == MASK
            if not masked.any():
                break
            last = end if first and cache == "dual" else length
            held = transformers.DynamicCache()
            for layer, (keys, values) in enumerate(past or ()):
                kept = [*range(first), *range(last, length)]
                held.update(keys[:, :, kept], values[:, :, kept], layer)
            more = {"past_key_values": held, "position_ids": torch.arange(first, last)[None]}
            logits = logits_of(theirs, x[:, first:last], width=length, use_cache=True, **more)
            if step == 0 and cache != "none":
                past = [(layer.keys, layer.values) for layer in held.layers]
            chosen, tokens = best_of(logits[0, start - first : end - first], masked, base + (step < rest))
            x[0, start + chosen] = tokens
            first = start if cache != "none" else 0
    return x


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@every_family
def test_decode_gives_the_tokens_of_the_published_loop(base: str, cache: str) -> None:
    theirs = theirs_of(base)
    model = models.wrap(theirs)
    of_prompts = {}
    for length, size, steps in ((1, 8, 8), (7, 8, 3), (13, 16, 4), (22, 32, 5)):
        prompt = ids(1, length, seed=length)
        expected = mdlm(theirs, prompt, 32, size, steps, cache)
        settings = {"gen_length": 32, "block_length": size, "steps": steps * 32 // size, "mask_id": MASK}
        out = dx.decode(model, prompt, cache=cache, score="confidence", **settings)
        assert torch.equal(out.sequences, expected), (length, size, steps)
        assert out.nfe.tolist() == [steps * 32 // size]
        of_prompts[length] = expected[0, length:]
        if cache == "none":
            published, _ = dx.compat.generate(model, prompt, **settings)
            assert torch.equal(published, expected)
    assert len({tuple(response.tolist()) for response in of_prompts.values()}) == 4


def test_llada_decodes_as_many_tokens_a_pass_as_dllm_in_another_order() -> None:
    """What the docstring of `A2DQwen3` says of the counts, which dLLM computes by its linear schedule."""
    for masks in range(1, 33):
        for steps in range(1, 40):
            left, theirs = masks, []
            for step in range(steps):
                theirs.append(round(left / (steps - step)))
                left -= theirs[-1]
            base, rest = divmod(masks, steps)
            ours = [base + (step < rest) for step in range(steps)]
            assert left == 0
            assert sorted(filter(None, theirs)) == sorted(filter(None, ours))
            assert steps >= masks or masks % steps or theirs == ours


# --- files and the command line -------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the tokenizer's files of a release: special_tokens_map.json alone names the mask token's role."""
    directory = tmp_path_factory.mktemp("a2d")
    theirs_of("qwen3").save_pretrained(directory)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ends = {"<|endoftext|>": PAD, "<|im_end|>": EOS, "<|mask|>": MASK}
    vocabulary = {"?": 0} | ends | {text: 3 + i for i, text in enumerate(alphabet)}
    tokenizer = Tokenizer(BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(ends))
    tokenizer.save(str(directory / "tokenizer.json"))
    roles = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "mask_token": {"content": "<|mask|>"}}
    (directory / "special_tokens_map.json").write_text(json.dumps(roles))
    config = {"tokenizer_class": "Qwen2Tokenizer", "chat_template": "{{ messages[0].content }}:"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def test_the_tokenizers_files_name_the_mask(checkpoint: Path) -> None:
    assert models.load(checkpoint).mask_id == MASK
    assert models.load(checkpoint, mask_id=5).mask_id == 5
    assert A2DQwen2.published_mask_id is A2DLlama.published_mask_id is None


@pytest.mark.parametrize("cache", ["none", "prefix", "dual", "block"])
def test_the_command_line_decodes_a_checkpoint(checkpoint: Path, cache: str) -> None:
    args = ("--gen-length", 16, "--block-length", 8, "--policy", "quota:2", "--cache", cache, "--json")
    result = CliRunner().invoke(app, [*map(str, ("decode", "hello", "--model", checkpoint, *args))])
    assert result.exit_code == 0, result.output
    row = json.loads(result.stdout)
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    prompt = torch.tensor([tokenizer.encode("hello:").ids])  # as its template writes it
    settings: dict[str, Any] = {"gen_length": 16, "block_length": 8, "rule": "quota:2", "eos_id": EOS}
    out = dx.decode(models.load(checkpoint), prompt, cache=cache, **settings)
    text = tokenizer.decode(out.responses[0][: int(out.kept)].tolist())
    assert (row["response"], row["forwards"], row["tokens"]) == (text, out.forwards, int(out.kept))
    assert len(text) > 4
