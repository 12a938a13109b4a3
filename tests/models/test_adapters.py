"""A model with PEFT's adapters gives the tokens that its own call gives, or is refused by name."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dparallel.likelihood import iter_log_likelihoods, log_likelihoods
from drafters import MODEL, model_of
from safetensors.torch import load_file
from test_wrappers import DREAM, PROMPT, called, compiled, expected, native, tokens
from torch import Tensor, nn

import dparallel_ext as dx
from dparallel_ext import compat, models
from dparallel_ext.models import Dream


@pytest.fixture(scope="module")
def peft() -> Any:
    return pytest.importorskip("peft")


def lora(peft: Any, **settings: Any) -> Any:
    given = {"r": 2, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    return peft.LoraConfig(**{"task_type": "CAUSAL_LM", **given, **settings})


def randomise(model: nn.Module) -> None:
    """So that whatever is trainable has an effect."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.mul_(0.5 + torch.rand_like(p))


METHODS: dict[str, Callable[[Any], Any]] = {
    "lora": lora,
    "dora": lambda peft: lora(peft, use_dora=True),
    "all-linear": lambda peft: lora(peft, target_modules="all-linear"),
    "embedding and head": lambda peft: lora(peft, target_modules=["embed_tokens", "lm_head"]),
    "whole modules": lambda peft: lora(peft, modules_to_save=["norm", "lm_head", "embed_tokens"]),
    "several layers as a whole": lambda peft: lora(
        peft, target_modules=["embed_tokens"], modules_to_save=["mlp", "self_attn"]
    ),
    "tokens": lambda peft: lora(peft, trainable_token_indices={"embed_tokens": [4, 17]}),
    "ia3": lambda peft: peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "norms": lambda peft: peft.LNTuningConfig(target_modules=["input_layernorm", "norm"]),
}


@pytest.mark.parametrize("method", METHODS)
def test_adapters_on_ours(method: str, peft: Any, tmp_path: Path) -> None:
    """By the checkpoint's names, in each cache as its call has it, saved and loaded again."""
    model = peft.get_peft_model(native(), METHODS[method](peft)).eval()
    randomise(model)
    assert not torch.equal(tokens(model), expected())
    assert torch.equal(tokens(model), tokens(called(model)))
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(native(), tmp_path)
    assert torch.equal(tokens(again, cache="dual"), tokens(model, cache="dual"))
    with model.disable_adapter():
        assert torch.equal(tokens(model, cache="dual"), expected("dual"))


def test_the_layers_of_llada_by_its_names(peft: Any) -> None:
    names = ["q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "blocks.0.ff_out"]
    model = native("llada_tiny_a")
    peft.get_peft_model(model, lora(peft, target_modules=names))
    adapted = {name.rpartition(".lora_A.")[0] for name, _ in model.named_parameters() if ".lora_A." in name}
    layer = {f"model.transformer.blocks.0.{name.removeprefix('blocks.0.')}" for name in names}
    assert {name for name in adapted if ".blocks.0." in name} == layer
    assert len(adapted) == 7 + 2 * 6


def test_several_adapters_are_followed(peft: Any, tmp_path: Path) -> None:
    model = peft.get_peft_model(native(), lora(peft)).eval()
    model.add_adapter("other", lora(peft))
    first = tokens(model, cache="dual")
    model.set_adapter("other")
    second = tokens(model, cache="dual")
    assert not torch.equal(first, second)
    assert torch.equal(tokens(model), tokens(called(model)))
    model.set_adapter("default")
    with dx.Engine(compiled(model), block_length=8) as engine:
        found = engine.submit(PROMPT[0], gen_length=8, threshold=0.5).result().tokens
    assert found == first[0, 9:].tolist()
    for adapted in (model, models.unwrap(model)):
        with pytest.raises(ValueError, match=r"model: its layers have adapters.*save_pretrained"):
            models.save(adapted, tmp_path)
    model.merge_adapter()
    assert torch.equal(tokens(model, cache="dual"), first)
    merged = model.merge_and_unload()
    assert isinstance(merged, Dream)
    assert merged.addresses() is not None  # nothing is left that keeps passes from being recorded
    assert torch.equal(tokens(merged, cache="dual"), first)
    models.save(compiled(merged), tmp_path)
    assert torch.equal(tokens(models.load(tmp_path), cache="dual"), first)


@pytest.mark.parametrize("kind", ["mixed", "tuner", "injected", "compiled"])
def test_the_ways_to_adapt(kind: str, peft: Any) -> None:
    config, base = lora(peft, task_type=None), native()
    model: Any = {
        "mixed": lambda: peft.get_peft_model(base, config, mixed=True),
        "tuner": lambda: peft.LoraModel(base, config, "default"),
        "injected": lambda: peft.inject_adapter_in_model(config, base),
        "compiled": lambda: compiled(peft.get_peft_model(base, config)),
    }[kind]()
    assert models.unwrap(model) is base
    found = tokens(model.eval())
    assert not torch.equal(found, expected())
    assert torch.equal(found, tokens(called(base)))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda p: p.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
            "PROMPT_TUNING.*virtual",
        ),
        (
            lambda p: p.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
            "PREFIX_TUNING.*virtual",
        ),
        (
            lambda p: p.PolyConfig(poly_type="poly", r=2, n_tasks=2, target_modules=["q_proj"]),
            "POLY.*as a whole",
        ),
        (lambda p: lora(p, alora_invocation_tokens=[3, 4]), "aLoRA.*as a whole"),
    ],
)
def test_methods_beyond_layers_are_refused_by_name(make: Callable[[Any], Any], said: str, peft: Any) -> None:
    model = peft.get_peft_model(native(), make(peft))
    for decode in (tokens, lambda m: tokens(m, cache="dual"), dx.Engine, models.wrap):
        with pytest.raises(ValueError, match=f"model: its adapter is of type {said}.*LoRA"):
            decode(model)


@torch.no_grad()
def test_adapters_of_experts(peft: Any, tmp_path: Path) -> None:
    """Those of transformers' model work in ours; but its modules are called otherwise, so `wrap` refuses."""
    transformers, x = pytest.importorskip("transformers"), torch.arange(9)[None]
    sizes: dict[str, Any] = {
        **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 4},
        **{"num_experts_per_tok": 2, "moe_intermediate_size": 24},
    }
    theirs = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**sizes)).eval()
    theirs.save_pretrained(tmp_path / "base")
    plain = theirs(x).logits
    adapted = peft.get_peft_model(theirs, lora(peft, target_modules="all-linear")).eval()
    randomise(adapted)
    expected = adapted(x).logits
    assert not torch.allclose(expected, plain, atol=1e-2)
    with pytest.raises(ValueError, match=r"hf_model: PEFT has adapted model\.layers\.0\.mlp\."):
        models.wrap(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    ours = peft.PeftModel.from_pretrained(models.load(tmp_path / "base"), tmp_path / "adapter").eval()
    torch.testing.assert_close(ours(x).logits, expected, rtol=0, atol=1e-4)
    merged = models.wrap(adapted.merge_and_unload())
    torch.testing.assert_close(merged(x).logits, expected, rtol=0, atol=1e-4)


def test_what_peft_passes_on_is_none_or_refused() -> None:
    model = native()
    assert torch.equal(model(PROMPT, labels=None, output_attentions=False).logits, model(PROMPT).logits)
    with pytest.raises(ValueError, match="labels: this model computes logits of input_ids alone"):
        model(PROMPT, labels=PROMPT)


def test_the_config_reads_as_attributes_and_stays_as_it_is() -> None:
    config = native().config
    assert (config.model_type, config.vocab_size) == ("Dream", 512)
    assert not hasattr(config, "nonsense")
    before = dict(config)
    config.use_cache = True
    assert dict(config) == before == config.to_dict() == dict(type(config).from_pretrained(DREAM))
    assert copy.deepcopy(config).model_type == "Dream"


@pytest.fixture(scope="module")
def hugging_face() -> Callable[[], nn.Module]:
    """Dream as transformers would have it: Qwen2's own modules, and attention in both directions."""
    transformers = pytest.importorskip("transformers")

    class Config(transformers.Qwen2Config):
        model_type = "Dream"

    class HuggingFace(transformers.Qwen2ForCausalLM):
        config_class = Config

        def forward(self, input_ids: Tensor, attention_mask: Any = None, **more: Any) -> Any:
            length = input_ids.shape[1]
            seen = torch.zeros(len(input_ids), 1, length, length)
            return super().forward(input_ids, attention_mask=seen, use_cache=False)

    def make() -> nn.Module:
        content = json.loads((DREAM / "config.json").read_text())
        model = HuggingFace(Config(**content, attn_implementation="eager")).eval()
        assert not any(model.load_state_dict(load_file(DREAM / "model.safetensors")))
        return model

    return make


def test_adapters_go_from_hugging_face_to_ours_and_back(
    hugging_face: Callable[[], nn.Module], peft: Any, tmp_path: Path
) -> None:
    settings = {"modules_to_save": ["lm_head"], "target_modules": ["q_proj", "o_proj", "gate_proj"]}
    theirs = peft.get_peft_model(hugging_face(), lora(peft, **settings)).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = peft.PeftModel.from_pretrained(native(), tmp_path / "theirs").eval()
    ours.save_pretrained(tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(hugging_face(), tmp_path / "ours").eval()
    saved = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours")]
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.equal(saved[0][name], tensor) for name, tensor in saved[1].items())
    with torch.no_grad():
        logits = [model(input_ids=PROMPT).logits for model in (theirs, ours, back)]
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-3)
    assert torch.equal(logits[0], logits[2])
    found = tokens(ours)
    assert not torch.equal(found, expected())
    assert torch.equal(tokens(theirs), found)  # which is called as it is
    one = compiled(theirs)
    assert models.for_decoding(one) is one
    assert models.traits(one) == models.traits(native())


def test_wrap_shares_the_layers_of_an_adapted_model(
    hugging_face: Callable[[], nn.Module], peft: Any, tmp_path: Path
) -> None:
    base = hugging_face()
    settings = {"modules_to_save": ["norm"], "trainable_token_indices": {"embed_tokens": [4, 17]}}
    theirs = peft.get_peft_model(base, lora(peft, **settings)).eval()
    randomise(theirs)
    theirs.add_adapter("other", lora(peft))
    theirs.save_pretrained(tmp_path, selected_adapters=["default"])
    same = peft.PeftModel.from_pretrained(native(), tmp_path)
    model = models.wrap(compiled(nn.DataParallel(theirs)))
    assert isinstance(model, Dream)
    shared = {p.data_ptr() for p in theirs.parameters()}
    assert {p.data_ptr() for p in model.parameters()} <= shared
    assert torch.equal(tokens(model, cache="dual"), tokens(same, cache="dual"))
    first = tokens(model)
    theirs.set_adapter("other")
    assert not torch.equal(tokens(model), first)
    assert torch.equal(tokens(model), tokens(theirs))
    with theirs.disable_adapter():
        assert torch.equal(tokens(model, cache="dual"), expected("dual"))
    theirs.set_adapter("default")
    several = peft.get_peft_model(hugging_face(), lora(peft, modules_to_save=["self_attn"]))
    said = r"PEFT has a copy of model\.layers\.0\.self_attn as a whole.* may name k_proj, o_proj, q_"
    with pytest.raises(ValueError, match=said):
        models.wrap(several)
    merged = models.wrap(theirs.merge_and_unload())
    assert merged.addresses() is not None
    assert torch.equal(tokens(merged), first)


def test_dropout_in_training_mode_brings_a_warning(peft: Any) -> None:
    model = peft.get_peft_model(native(), lora(peft, lora_dropout=0.5))
    said = "model: Dream is in training mode, and the dropout of .*lora_dropout"
    model.train()
    prompt = torch.tensor([[5, 6]])
    for call in (
        lambda: tokens(model),
        lambda: compat.diffusion_generate(model, prompt, max_new_tokens=4, steps=2),
        lambda: dx.Engine(model, lanes=1, max_length=16).close(),
    ):
        with pytest.warns(UserWarning, match=said):
            call()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokens(model.eval())
        tokens(native().train())  # ours has none


def test_a_warning_names_the_line_that_called() -> None:
    """However deep it is found, and under torch's decorators; Python shows one for each such line."""

    def random(model: models.Model) -> models.Model:
        model.add_module("extra", nn.Dropout(0.5))
        return model.train()

    model, causal = random(native()), random(model_of())
    prompt, settings = torch.tensor([[5, 6]]), {"gen_length": 4}
    calls: tuple[Callable[[], Any], ...] = (
        lambda: dx.decode(model, prompt, **settings),
        lambda: torch.no_grad()(dx.decode)(model, prompt, **settings),
        lambda: compat.diffusion_generate(model, prompt, max_new_tokens=4, steps=2),
        lambda: dx.Engine(model, lanes=1, max_length=16).close(),
        lambda: dx.speculate(causal, prompt, **settings),
        lambda: dx.speculate(MODEL, prompt, **settings, drafter=causal),
        lambda: dx.adaptive_decode(model, prompt, **settings, verifier=MODEL),
        lambda: dx.adaptive_decode(native(), prompt, **settings, verifier=causal),
        lambda: log_likelihoods(model, [[5]], [[6]]),
        lambda: [*iter_log_likelihoods(model, [[5]], [[6]])],
    )
    for number, call in enumerate(calls):
        with pytest.warns(UserWarning, match="is in training mode") as said:
            call()
        assert {each.filename for each in said} == {__file__}, number


@pytest.mark.parametrize("adapted", [False, True])
def test_reentrant_checkpoints_pass_the_gradients_on(adapted: bool, peft: Any) -> None:
    """Under adapters the embedding is frozen, and such checkpoints yield none unless an input wants one."""
    grads = []
    for kind in (None, False, True):
        torch.manual_seed(0)
        model: Any = native()
        if adapted:
            model = peft.get_peft_model(model, lora(peft))
        if kind is not None:
            model.gradient_checkpointing_enable({"use_reentrant": kind})
        model.train()
        model(input_ids=PROMPT).logits.square().mean().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for again in grads[1:]:
        for name, grad in grads[0].items():
            assert grad.abs().max() > 0, name
            torch.testing.assert_close(again[name], grad, rtol=1e-4, atol=1e-4)  # sums in another order


@pytest.mark.parametrize("adapted", [False, True])
def test_neftune_finds_the_embedding(adapted: bool, peft: Any) -> None:
    neftune = pytest.importorskip("transformers.integrations.neftune")
    model: Any = native().train()
    base = model
    if adapted:
        model = peft.get_peft_model(model, lora(peft))
    before = model(input_ids=PROMPT).logits
    handle = neftune.activate_neftune(model, 5.0)
    assert not torch.equal(model(input_ids=PROMPT).logits, before)  # noise, in training
    model.eval()
    assert torch.equal(model(input_ids=PROMPT).logits, before)
    neftune.deactivate_neftune(model, handle)
    assert not base.embed._forward_hooks
    assert base.get_output_embeddings() is base.lm_head
