"""Mixtures of experts: as transformers computes them, and stored expert by expert, as published."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import everywhere
from safetensors.torch import load_file, save_file
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext import models
from dparallel_ext.models import LLaDAMoE, Qwen3MoE, SDARMoE
from dparallel_ext.models.experts import in_parts, waits

transformers = pytest.importorskip("transformers")

VOCABULARY, MASK, BLOCK = 97, 96, 4
SIZES: dict[str, Any] = {
    **{"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256},
    **{"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "norm_topk_prob": True},
    **{"mlp_only_layers": [1], "tie_word_embeddings": False},
}
SDAR_CONFIG = {**SIZES, "model_type": "sdar_moe", "block_size": BLOCK, "mask_token_id": MASK}


LLADA_CONFIG = {
    **{"model_type": "llada", "architectures": ["LLaDAMoEModelLM"], "vocab_size": VOCABULARY},
    **{"hidden_size": 32, "dense_intermediate_size": 48, "expert_intermediate_size": 24},
    **{"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "rms_norm_eps": 1e-6},
    **{"num_experts": 8, "num_experts_per_tok": 3, "moe_layer_freq": [1, 0, 1], "norm_topk_prob": None},
    **{"qk_layernorm": True, "shared_expert_intermediate_size": None, "rope_theta": 50000},
    **{"tie_word_embeddings": False, "partial_rotary_factor": 1, "mask_token_id": MASK},
}
FAMILIES: list[tuple[type[models.Model], dict[str, Any]]] = [
    (Qwen3MoE, {**SIZES, "model_type": "qwen3_moe"}),
    (SDARMoE, SDAR_CONFIG),
    (LLaDAMoE, LLADA_CONFIG),
]


def theirs_of(**changes: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(**{**SIZES, **changes})
    theirs = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.normal_(1.0 if "norm" in name else 0.0, 0.3)
    return theirs.eval()


def sdar_of(theirs: Any, folder: Path) -> SDARMoE:
    """A model of SDAR's with the weights of transformers' model, from files."""
    theirs.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(SDAR_CONFIG))
    model = models.load(folder)
    assert type(model) is SDARMoE
    return model


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 96, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_a_diffusion_model_of_experts(tmp_path: Path) -> None:
    """The layers are Qwen3's with another mask, and every cache and the engine give the same text."""
    theirs, x = theirs_of(), ids(2, 19)
    model = sdar_of(theirs, tmp_path)
    assert (model.block_length, model.mask_id) == (BLOCK, MASK)
    assert [block.sparse for block in model.blocks] == [True, False, True]
    block = torch.arange(19) // BLOCK
    seen = (block[:, None] >= block).expand(2, 1, 19, 19)
    expected = theirs(x, attention_mask=torch.where(seen, 0.0, -torch.inf)).logits
    assert expected.std() > 1
    torch.testing.assert_close(model(x).logits, expected, rtol=0, atol=1e-4)
    prompts = [ids(n, seed=n) for n in (3, 8, 13)]
    settings: dict[str, Any] = {"gen_length": 16, "threshold": 0.9, "selector": "confidence"}
    plain = dx.decode(model, prompts, **settings)
    cached = dx.decode(model, prompts, cache="block", **settings)
    assert torch.equal(plain.sequences, cached.sequences)
    assert torch.equal(plain.nfe, cached.nfe)
    with dx.Engine(model, lanes=2, max_length=64) as engine:
        handles = [engine.submit(prompt, **settings) for prompt in prompts]
        for handle, response in zip(handles, plain.responses, strict=True):
            assert handle.result(60).tokens == response[:16].tolist()


def test_a_diffusion_model_of_experts_in_which_all_see_all(tmp_path: Path) -> None:
    """LLaDA-MoE: Qwen3's layers without a mask, and probabilities that are not scaled to a sum of 1."""
    of_heads = {"head_dim": 8, "num_key_value_heads": 4, "rope_theta": 50000.0, "norm_topk_prob": False}
    theirs, x = theirs_of(**of_heads), ids(2, 19)
    theirs.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLADA_CONFIG))
    model = models.load(tmp_path)
    assert type(model) is LLaDAMoE

    @torch.no_grad()
    def of_theirs(tokens: Tensor) -> Any:
        return theirs(tokens, attention_mask=torch.zeros(len(tokens), 1, *2 * tokens.shape[1:]))

    expected = of_theirs(x).logits
    assert expected.std() > 1
    with torch.no_grad():
        torch.testing.assert_close(model(x).logits, expected, rtol=0, atol=1e-4)
    of_theirs.traits = models.Traits(MASK)  # type: ignore[attr-defined]
    settings: dict[str, Any] = {
        "gen_length": 16,
        "block_length": 8,
        "threshold": 0.1,
        "selector": "confidence",
    }
    plain, other = (dx.decode(each, ids(2, 9, seed=3), **settings) for each in (model, of_theirs))
    assert torch.equal(plain.sequences, other.sequences)
    assert plain.nfe.tolist() == other.nfe.tolist()
    assert max(plain.nfe.tolist()) < 16
    for cache in ("prefix", "dual"):
        assert dx.decode(model, ids(2, 9, seed=3), cache=cache, **settings).sequences.shape == (2, 25)
    models.save(model, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["model_type"] == "llada"
    again = models.load(tmp_path / "again")
    assert type(again) is LLaDAMoE
    assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))


def test_the_mask_token_of_a_model_of_experts_that_is_not_ours() -> None:
    """It has LLaDA's model_type, and another mask token."""

    class Remote(torch.nn.Module):
        config = transformers.PretrainedConfig(vocab_size=157184, num_experts=64)

        def forward(self, tokens: Tensor) -> Tensor:
            return torch.nn.functional.one_hot(tokens, 157184).float()

    Remote.config.model_type = "llada"
    assert models.traits(Remote()).mask_id == 156895


@torch.no_grad()
def test_drafts_are_verified_losslessly() -> None:
    model = models.wrap(theirs_of())
    prompts = [ids(5).repeat(4), ids(7, seed=1)]
    plain = dx.speculate(model, prompts, gen_length=24)
    fast = dx.speculate(model, prompts, gen_length=24, drafter="ngram", draft_size=4)
    assert torch.equal(plain.sequences, fast.sequences)
    assert fast.forwards <= plain.forwards


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_one_product_for_all_experts(device: str, dtype: torch.dtype) -> None:
    """What a GPU computes is what is computed expert by expert, but for rounding; also of experts that no
    token takes, and of no token."""
    model, changed = Qwen3MoE({**SIZES, "model_type": "qwen3_moe"}).to(device, dtype), 0
    experts, router = model.blocks[0].experts, model.blocks[0].router
    for rows in (0, 1, 2, 33):
        x = torch.randn(rows, 32, dtype=dtype)
        one_by_one = _by("one_by_one", experts, x, *router(x))
        together = experts(x, *router(x)) if x.is_cuda else _by("grouped", experts, x, *router(x))
        assert together.dtype == dtype
        bound = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
        torch.testing.assert_close(together, one_by_one, rtol=0, atol=bound)
        changed += bool((together != 0).any())
    assert changed == 3


def _by(way: str, experts: Any, *given: Tensor) -> Tensor:
    """The mixture by the method `way`, wherever it is computed."""
    with pytest.MonkeyPatch.context() as patched:
        for name in ("one_by_one", "grouped"):
            patched.setattr(type(experts), name, getattr(type(experts), way))
        found: Tensor = experts(*given)
    return found


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [LLaDAMoE, SDARMoE])
@torch.no_grad()
def test_every_device_decodes(device: str, family: Any, dtype: torch.dtype) -> None:
    """In every mode, a short sequence, and one so long that its packed keys are attended to."""
    torch.manual_seed(0)
    config = {**(LLADA_CONFIG if family is LLaDAMoE else SDAR_CONFIG), "max_position_embeddings": 512}
    exact = family(config).eval()
    model = copy.deepcopy(exact).to(device, dtype)
    x = ids(2, 19)
    expected, bound = exact(x.cpu()).logits, 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(model(x.to(device)).logits.float().cpu(), expected, rtol=0, atol=bound)
    prompts = [ids(9).to(device), ids(260, seed=3).to(device)]
    for cache in ("none", "block") if family is SDARMoE else ("none", "prefix", "dual"):
        settings: dict[str, Any] = {"gen_length": 8, "block_length": 4, "selector": "quota", "threshold": 2}
        tokens = dx.decode(model, prompts, cache=cache, **settings).sequences
        for text, prompt in zip(tokens, prompts, strict=True):
            assert torch.equal(text[: len(prompt)], prompt)
            assert not (text[: len(prompt) + 8] == MASK).any()


class OnGpu(Tensor):
    """A tensor that says so."""

    is_cuda = True  # type: ignore[assignment]


@torch.no_grad()
def test_a_gpu_s_product_is_not_asked_for_rows_that_it_does_not_read() -> None:
    """Their bytes must be multiples of 16."""
    for changes in ({"moe_intermediate_size": 20}, {"hidden_size": 36}):
        model = Qwen3MoE({**SIZES, "model_type": "qwen3_moe", **changes}).bfloat16()
        experts, router = model.blocks[0].experts, model.blocks[0].router
        x = torch.randn(9, model.shape.width, dtype=torch.bfloat16)
        chosen = router(x)
        with pytest.raises(RuntimeError, match="multiple of 16 bytes"):
            _by("grouped", experts, x, *chosen)
        assert torch.equal(experts(x.as_subclass(OnGpu), *chosen).as_subclass(Tensor), experts(x, *chosen))


@pytest.mark.parametrize(
    ("capability", "dtype", "changes", "expected"),
    [
        ((9, 0), torch.bfloat16, {}, False),
        ((10, 3), torch.bfloat16, {}, False),
        ((8, 0), torch.bfloat16, {}, True),
        ((12, 0), torch.bfloat16, {}, True),
        ((9, 0), torch.float16, {}, True),
        ((9, 0), torch.float32, {}, True),
        ((9, 0), torch.bfloat16, {"moe_intermediate_size": 20}, True),
        ((9, 0), torch.bfloat16, {"hidden_size": 36}, True),
        ((9, 0), torch.bfloat16, {"num_experts": 1024}, True),
    ],
)
def test_where_passes_wait_for_the_device(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    dtype: torch.dtype,
    changes: dict[str, int],
    expected: bool,
) -> None:
    """On a GPU those, and on a CPU all; never those of a model whose config names experts that no layer
    has."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    config = {**SIZES, "model_type": "qwen3_moe", **changes}
    with torch.device("meta"):
        model = Qwen3MoE(config).to(dtype)
        dense = Qwen3MoE({**config, "mlp_only_layers": [0, 1, 2]})
    assert model.waits
    assert not dense.waits
    assert model.shape.experts is not None
    assert waits(model.shape.experts, model.embed.weight.as_subclass(OnGpu)) == expected


def test_gradients_are_those_of_transformers() -> None:
    theirs, x = theirs_of(), ids(2, 9)
    model = models.wrap(theirs_of()).train()
    for each in (theirs, model):
        each(x).logits.logsumexp(-1).sum().backward()
    found = dict(model.named_parameters())
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(found[name].grad, p.grad, rtol=1e-4, atol=1e-4, msg=name)


def test_an_empty_batch_has_gradients_of_zero() -> None:
    """As torch's linear layers and embeddings have them; processes that train together wait for each one."""
    for family, config in FAMILIES:
        model = family(config)
        model(ids(0, 9)).logits.sum().backward()
        for name, p in model.named_parameters():
            assert p.grad is not None, name
            assert not p.grad.any(), name


def test_training_under_autocast() -> None:
    """In bfloat16, with weights in float32."""
    model, x = models.wrap(theirs_of()).train(), ids(2, 9)
    expected = model(x).logits.logsumexp(-1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(x).logits.float().logsumexp(-1)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.3)
    found.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# --- files ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_it_is_saved_as_it_was_published(tmp_path: Path) -> None:
    """Expert by expert, so that transformers and other readers find every tensor; the same after a load."""
    theirs, x = theirs_of(), ids(1, 9)
    theirs.save_pretrained(tmp_path / "theirs")
    stored = load_file(tmp_path / "theirs/model.safetensors")
    assert "model.layers.0.mlp.experts.7.up_proj.weight" in stored
    model = models.load(tmp_path / "theirs")
    models.save(model, tmp_path / "ours")
    again = load_file(tmp_path / "ours/model.safetensors")
    assert stored.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in stored.items())
    reread = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    torch.testing.assert_close(reread(x).logits, theirs(x).logits, rtol=0, atol=1e-4)
    fresh = Qwen3MoE(model.config)
    fresh.load_state_dict(again)  # as a trainer resumes
    assert all(torch.equal(p, fresh.state_dict()[name]) for name, p in model.state_dict().items())
    halved = models.load(tmp_path / "ours", dtype=torch.bfloat16)
    assert {p.dtype for p in halved.parameters()} == {torch.bfloat16}


def test_experts_may_be_stored_together(tmp_path: Path) -> None:
    theirs = theirs_of()
    theirs.save_pretrained(tmp_path)
    save_file(
        {name: p.detach().clone() for name, p in theirs.named_parameters()}, tmp_path / "model.safetensors"
    )
    found = dict(models.load(tmp_path).named_parameters())
    for name, p in theirs.named_parameters():
        assert torch.equal(found[name], p), name


def test_to_look_at_a_checkpoint_copies_no_expert(tmp_path: Path) -> None:
    """The copies would be nearly all of its bytes."""
    theirs_of().save_pretrained(tmp_path)
    stored, model = models.as_stored(tmp_path), models.load(tmp_path)
    assert models.fingerprint(stored) == models.fingerprint(model)
    assert (stored.dtype, stored.eos_ids) == (model.dtype, model.eos_ids)
    unread = {name for name, p in stored.named_parameters() if p.is_meta}
    assert unread == {name for name, _ in model.named_parameters() if ".experts." in name} != set()
    with pytest.raises(ValueError, match=r"model: expected weights, but .*experts.* is on the meta device"):
        models.save(stored, tmp_path)
    assert models.fingerprint(models.load(tmp_path)) == models.fingerprint(model)


def test_a_tensor_that_does_not_fit_is_named(tmp_path: Path) -> None:
    theirs_of().save_pretrained(tmp_path)
    file, name = tmp_path / "model.safetensors", "model.layers.2.mlp.experts.5.gate_proj.weight"
    tensors = load_file(file)
    others = {**tensors, "model.layers.1.mlp.experts.0.up_proj.weight": torch.ones(24, 32)}
    for changed, message in (
        ({key: value for key, value in tensors.items() if key != name}, f"{name} is missing"),
        ({**tensors, name: torch.ones(24, 31)}, rf"{name} is \(24, 31\), expected \(24, 32\)"),
        ({**tensors, name: tensors[name].half()}, f"{name} F16 and .* F32, expected tensors of one type"),
        ({**tensors, name: tensors[name].int()}, f"{name} is I32, expected a floating-point type"),
        (others, r"layers\.1\.mlp\.experts\.0\.up_proj\.weight is unexpected"),
    ):
        save_file(changed, file)
        with pytest.raises(ValueError, match=message):
            models.load(tmp_path)


def test_experts_of_a_state_dict_that_do_not_fit_are_named(tmp_path: Path) -> None:
    """As by `load`; an expert of another shape was filled by broadcasting."""
    theirs_of().save_pretrained(tmp_path)
    tensors, name = load_file(tmp_path / "model.safetensors"), "model.layers.2.mlp.experts.5.gate_proj.weight"
    model = Qwen3MoE({**SIZES, "model_type": "qwen3_moe"})
    for shape in ((32,), (24, 31)):
        with pytest.raises(RuntimeError, match=rf"{name} is {re.escape(str(shape))}, expected \(24, 32\)"):
            model.load_state_dict({**tensors, name: torch.ones(shape)}, strict=False)
    del tensors[name]
    with pytest.raises(RuntimeError, match=rf"Missing key.*{name}"):
        model.load_state_dict(tensors)
    assert name in model.load_state_dict(tensors, strict=False).missing_keys


@torch.no_grad()
def test_a_model_without_memory_takes_the_tensors_of_a_file(tmp_path: Path) -> None:
    theirs, x = theirs_of(), ids(1, 9)
    theirs.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = Qwen3MoE({**SIZES, "model_type": "qwen3_moe"})
    model.load_state_dict(load_file(tmp_path / "model.safetensors"), assign=True)
    torch.testing.assert_close(model(x).logits, theirs(x).logits, rtol=0, atol=1e-4)


def test_shapes_of_logits_without_numbers() -> None:
    """On the meta device, where no token can be sent to its experts."""
    for family, config in FAMILIES:
        with torch.device("meta"):
            model, x = family(config), torch.zeros(2, 9, dtype=torch.int64)
        assert model(x).logits.shape == (2, 9, VOCABULARY)


def test_names_of_parts() -> None:
    whole = torch.arange(24.0).view(2, 4, 3)
    parts = in_parts("model.layers.0.mlp.experts.gate_up_proj", whole)
    assert list(parts) == [
        f"model.layers.0.mlp.experts.{expert}.{part}_proj.weight"
        for expert in (0, 1)
        for part in ("gate", "up")
    ]
    assert torch.equal(torch.stack(list(parts.values())).view(2, 4, 3), whole)
    for name in ("model.layers.0.mlp.down_proj", "lm_head.weight", "model.layers.0.mlp.experts.bias"):
        assert in_parts(name, whole) == {name: whole}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": None}, "'num_experts' is null"),
        ({"num_experts": None, "num_local_experts": "8"}, "num_local_experts='8', expected a whole number"),
        ({"num_experts": 0}, "num_experts=0, expected a whole number >= 1"),
        ({"num_experts_per_tok": 9}, "9 experts for a token, and there are 8"),
        ({"num_experts_per_tok": None}, "'num_experts_per_tok' is null"),
        ({"moe_intermediate_size": "24"}, "moe_intermediate_size='24', expected a whole number"),
        ({"norm_topk_prob": 2}, "norm_topk_prob=2, expected true or false"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step=0, expected a whole number >= 1"),
        ({"mlp_only_layers": 1}, "mlp_only_layers=1, expected a list of layers"),
        ({"mlp_only_layers": ["1"]}, r"mlp_only_layers=\['1'\], expected a list of layers"),
        ({"use_regular_causal": True}, "use_regular_causal=True is not supported, only False"),
    ],
)
def test_a_config_that_does_not_fit_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"config: {message}"):
        SDARMoE({**SDAR_CONFIG, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qk_layernorm": False}, "qk_layernorm=False is not supported, only True"),
        ({"norm_topk_prob": True}, "norm_topk_prob=True is not supported, only False"),
        ({"moe_router_enable_expert_bias": True}, "moe_router_enable_expert_bias=True is not supported"),
        ({"moe_router_score_function": "sigmoid"}, "moe_router_score_function='sigmoid' is not supported"),
        ({"router_num_group": 2}, "router_num_group=2 is not supported, only None"),
        ({"router_topk_group": 1}, "router_topk_group=1 is not supported, only None"),
        (
            {"shared_expert_intermediate_size": 8},
            "shared_expert_intermediate_size=8, expected a whole number",
        ),
        ({"num_experts_per_tok": 9}, "9 experts for a token, and there are 8"),
        ({"expert_intermediate_size": None}, "'expert_intermediate_size' is null"),
        ({"moe_layer_freq": [1, 0]}, r"moe_layer_freq=\[1, 0\], expected 1 or 0 for each of 3 layers"),
        ({"moe_layer_freq": 1}, "moe_layer_freq=1, expected 1 or 0"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
    ],
)
def test_a_config_of_llada_moe_that_does_not_fit_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"config: {message}"):
        LLaDAMoE({**LLADA_CONFIG, **changes})


def test_experts_are_not_quantised() -> None:
    model = SDARMoE(SDAR_CONFIG)
    with pytest.raises(ValueError, match="model: expected one without mixtures of experts"):
        model.quantize()
    assert not model.quantized


@torch.no_grad()
def test_a_model_of_experts_that_has_none_is_quantised() -> None:
    """Its config names experts, and no layer has them."""
    torch.manual_seed(0)
    model, x = SDARMoE({**SDAR_CONFIG, "mlp_only_layers": [0, 1, 2]}).eval(), ids(2, 9)
    expected = model(x).logits
    assert model.quantize().quantized
    torch.testing.assert_close(model(x).logits, expected, rtol=0, atol=0.2 * float(expected.std()))
