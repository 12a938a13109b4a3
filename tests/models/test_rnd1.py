"""RND1: the logits of transformers' Qwen3-MoE without a mask, and the published sampler in plain torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext import models
from dparallel_ext.models import RND1, Traits

transformers = pytest.importorskip("transformers")

VOCABULARY, MASK, EOS = 97, 96, 2
CONFIG: dict[str, Any] = {
    **{"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256},
    **{"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "norm_topk_prob": True},
    **{"mlp_only_layers": [], "decoder_sparse_step": 1, "rope_theta": 1000.0, "tie_word_embeddings": False},
}
PUBLISHED = {
    **CONFIG,
    **{"model_type": "rnd1", "architectures": ["RND1LM"], "mask_token_id": MASK, "eos_token_id": EOS},
    **{"num_diffusion_steps": 256, "moe_backend": "hf", "is_causal": False, "use_cache": False},
    **{"rope_scaling": False, "sliding_window": False, "use_sliding_window": False},
}


def test_keys_that_a_config_does_not_have_are_as_published() -> None:
    """Of its config class, which has Qwen3-30B-A3B's numbers for them, not those of transformers' class."""
    named = {**PUBLISHED, "rope_theta": 1e6}
    absent = {key: value for key, value in named.items() if key not in ("rope_theta", "norm_topk_prob")}
    assert RND1.shape_of(absent) == RND1.shape_of(named)
    assert RND1.shape_of({**absent, "rope_parameters": {"rope_theta": 7.0}}).rope_theta == 7.0


@pytest.fixture(scope="module")
def theirs() -> Any:
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(**CONFIG)
    made = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    with torch.no_grad():
        for name, p in made.named_parameters():
            p.normal_(1.0 if "norm" in name else 0.0, 0.3)
        made.lm_head.weight[MASK] *= 0.1  # the published sampler might commit it; here it never leads
    return made.eval()


@pytest.fixture(scope="module")
def folder(theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rnd1")
    theirs.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(PUBLISHED))
    return folder


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, MASK, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_of(theirs: Any, x: Tensor) -> Tensor:
    """Logits where every position sees every other."""
    found: Tensor = theirs(x, attention_mask=torch.zeros(len(x), 1, *2 * x.shape[1:])).logits
    return found


@torch.no_grad()
def test_a_checkpoint_has_the_logits_of_qwen3_s_layers_without_a_mask(
    theirs: Any, folder: Path, tmp_path: Path
) -> None:
    model, x = models.load(folder), ids(2, 19)
    assert type(model) is RND1
    assert (model.mask_id, model.eos_id) == (MASK, EOS)
    assert models.traits(model) == Traits(MASK, shift=True)
    expected = logits_of(theirs, x)
    assert expected.std() > 1
    assert not torch.allclose(theirs(x).logits, expected, atol=0.1)  # a causal mask would tell
    torch.testing.assert_close(model(x).logits, expected, rtol=0, atol=1e-4)
    models.save(model, tmp_path / "again")
    again = models.load(tmp_path / "again")
    assert (type(again), again.shape) == (RND1, model.shape)
    assert torch.equal(again(x).logits, model(x).logits)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["rope_scaling"] is False


def published(theirs: Any, prompt: Tensor, count: int, behind: list[int], steps: int) -> tuple[Tensor, int]:
    """The published sampler, greedy and at temperature 1, for a prompt (P,), `count` masks and the tokens
    behind them: what becomes of all, and passes.

    Pass i of `steps` leaves masks with the largest entropies, floor(count * (1 - i / steps)) of them.
    """
    x, masked, passes = torch.cat((prompt, torch.tensor([MASK] * count + behind))), None, 0
    for left in range(steps - 1, -1, -1):
        masked = x == MASK
        if not masked.any():
            break
        logits = logits_of(theirs, x[None])[0].double().roll(1, 0)  # a row is for the token after it
        passes += 1
        entropy = torch.distributions.Categorical(logits=logits).entropy().where(masked, -torch.inf)
        kept = entropy.topk(int(count * (left / steps))).indices
        masked[kept] = False
        x = x.where(~masked, logits.argmax(-1))
    return x, passes


@pytest.mark.parametrize(("count", "steps"), [(12, 12), (12, 4), (24, 6), (16, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_tokens_and_passes_are_those_of_the_published_sampler(
    theirs: Any, folder: Path, count: int, steps: int, seed: int
) -> None:
    """Also with the padding token that the published `generate` has behind its masks."""
    model, prompts = models.load(folder), [ids(5, seed=seed), ids(9, seed=seed + 10)]
    settings: dict[str, Any] = {"block_length": count, "steps": steps, "score": "entropy"}
    texts = [torch.cat((prompt, torch.tensor([MASK] * count + [0]))) for prompt in prompts]
    alone = dx.decode(model, prompts, gen_length=count, **settings)
    padded = dx.decode(model, texts, gen_length=0, infill=True, **settings)
    for behind, out in ([], alone), ([0], padded):
        for b, prompt in enumerate(prompts):
            expected, passes = published(theirs, prompt, count, behind, steps)
            assert out.sequences[b, : len(expected)].tolist() == expected.tolist()
            assert int(out.nfe[b]) == passes == steps
    assert any(a.tolist() != b.tolist() for a, b in zip(alone.responses, padded.responses, strict=True))


@torch.no_grad()
def test_every_cache_and_an_engine_decode(theirs: Any, folder: Path) -> None:
    model, prompts = models.load(folder), [ids(n, seed=n) for n in (3, 8, 13)]
    settings: dict[str, Any] = {"gen_length": 16, "threshold": 0.1, "selector": "confidence"}

    def function(tokens: Tensor) -> Any:
        return theirs(tokens, attention_mask=torch.zeros(len(tokens), 1, *2 * tokens.shape[1:]))

    function.traits = models.traits(model)  # type: ignore[attr-defined]
    plain, other = (dx.decode(each, prompts, block_length=8, **settings) for each in (model, function))
    assert all(map(torch.equal, plain.responses, other.responses))
    assert plain.nfe.tolist() == other.nfe.tolist()
    assert max(plain.nfe.tolist()) < 16
    for cache in ("prefix", "dual"):
        cached = dx.decode(model, prompts, cache=cache, block_length=8, **settings)
        with dx.Engine(model, lanes=2, max_length=64, cache=cache, block_length=8) as engine:
            handles = [engine.submit(prompt, **settings) for prompt in prompts]
            for handle, response in zip(handles, cached.responses, strict=True):
                assert handle.result(60).tokens == response.tolist()
    with pytest.raises(ValueError, match=r"cache: .*block"):
        dx.decode(model, prompts, cache="block", **settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling.*yarn"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"num_experts": None}, "num_experts"),
        ({"num_experts_per_tok": 9}, "9 experts"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RND1({**PUBLISHED, **changes})
