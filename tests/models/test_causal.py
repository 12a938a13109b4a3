"""Autoregressive families: the logits of transformers' own classes, from checkpoints as these write them."""

from __future__ import annotations

import copy
import functools
import json
import warnings
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import torch.nn.functional as F
from dparallel.complete import complete
from dparallel.likelihood import log_likelihoods
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import dparallel_ext as dx
from dparallel_ext import compat, models
from dparallel_ext.cache import Span
from dparallel_ext.models import Llama, Ministral3, Mistral, Model, Qwen2, Qwen3, Qwen3MoE, Traits

transformers = pytest.importorskip("transformers")

FAMILIES: dict[str, type[Model]] = {
    **{"llama": Llama, "mistral": Mistral, "ministral3": Ministral3},
    **{"qwen2": Qwen2, "qwen3": Qwen3, "qwen3_moe": Qwen3MoE},
}
LINEAR = {"rope_type": "linear", "factor": 3.0}
LLAMA3 = {
    **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 24,
}
YARN = {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 20}
MINISTRAL = {
    **YARN,
    **{"original_max_position_embeddings": 12, "mscale": 1.0, "mscale_all_dim": 1.0},
    "llama_4_scaling_beta": 0.7,
}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True, "num_key_value_heads": None, "rope_parameters": LLAMA3}),
    ("llama", {"attention_bias": True, "head_dim": 16, "rope_parameters": LINEAR}),
    ("llama", {"mlp_bias": True, "rms_norm_eps": 1e-3, "rope_parameters": YARN}),
    ("mistral", {}),
    ("mistral", {"head_dim": 16, "tie_word_embeddings": True}),
    ("ministral3", {"rope_parameters": MINISTRAL}),
    ("ministral3", {"head_dim": 16, "rope_parameters": {**MINISTRAL, "llama_4_scaling_beta": 0}}),
    ("qwen2", {"rope_parameters": {**YARN, "beta_fast": 4, "beta_slow": 0.5, "truncate": False}}),
    ("qwen2", {"tie_word_embeddings": True, "use_sliding_window": True, "max_window_layers": 2}),
    ("qwen3", {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}}),
    ("qwen3", {"tie_word_embeddings": True, "attention_bias": True, "head_dim": 8}),
    ("qwen3", {"rope_parameters": {**YARN, "attention_factor": 1.5, "original_max_position_embeddings": 4}}),
    ("qwen3_moe", {}),
    ("qwen3_moe", {"norm_topk_prob": True, "mlp_only_layers": [1], "tie_word_embeddings": True}),
    ("qwen3_moe", {"decoder_sparse_step": 2, "num_experts_per_tok": 8, "attention_bias": True}),
]
each = pytest.mark.parametrize(("family", "changes"), CASES, ids=str)
every_family = pytest.mark.parametrize("family", FAMILIES)


def config_of(family: str, **changes: Any) -> Any:
    """transformers' config of a tiny model."""
    default = MINISTRAL if family == "ministral3" else {"rope_type": "default"}
    rope = {"rope_theta": 500.0, **changes.pop("rope_parameters", default)}
    sizes = {
        **{"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
        **{"eos_token_id": 2, "pad_token_id": 0, "rope_parameters": rope},
        **({"head_dim": 16} if family.startswith("qwen3") else {}),
    }
    if family == "mistral":
        sizes["sliding_window"] = None
    if family == "qwen3_moe":
        sizes |= {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
    return transformers.AutoConfig.for_model(family, **{**sizes, **changes})


def theirs_of(family: str, **changes: Any) -> Any:
    """transformers' model with random weights, large enough that all parts of the layers tell."""
    torch.manual_seed(0)
    config = config_of(family, **copy.deepcopy(changes))
    # Products of all experts together are of three dtypes alone.
    theirs = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.normal_(1.0 if "norm" in name else 0.0, 0.3)
    return theirs.eval()


def ids(batch: int, length: int) -> Tensor:
    return torch.randint(3, 97, (batch, length))


PADDING = torch.tensor([[1] * 40, [0] * 9 + [1] * 31, [1] * 28 + [0] * 12])
"""(3, 40): none, in front, behind."""


@functools.cache
def case(family: str) -> Any:
    """The first of the family's cases, for tests that do not change it."""
    return theirs_of(family)


# --- logits -------------------------------------------------------------------------------------


@each
@torch.no_grad()
def test_logits_are_those_of_transformers(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    theirs, x = theirs_of(family, **changes), ids(3, 40)
    theirs.save_pretrained(tmp_path)
    model = models.load(tmp_path)
    assert type(model) is FAMILIES[family]
    assert (model.dtype, model.mask_id, model.eos_id, model.eos_ids) == (torch.float32, None, 2, (2,))
    assert models.traits(model) == Traits(causal=True)
    expected = theirs(x).logits
    assert expected.std() > 1
    torch.testing.assert_close(model(x).logits, expected, rtol=0, atol=1e-4)
    logits = model(x, attention_mask=PADDING).logits
    assert logits.isfinite().all()
    seen = PADDING.bool()
    expected = theirs(x, attention_mask=PADDING).logits
    torch.testing.assert_close(logits[seen], expected[seen], rtol=0, atol=1e-4)
    cos, sin = theirs.model.rotary_emb(x.float(), torch.arange(64)[None])
    half = model.shape.head_dim // 2
    for ours, table in zip(model.new_cache(1, 64).rope, (cos, sin), strict=True):
        assert torch.equal(ours, table[0, :, :half])


@pytest.mark.parametrize("rope", [LINEAR, LLAMA3, YARN], ids=lambda rope: rope["rope_type"])
def test_scaled_rope_as_transformers_4_writes_it(rope: dict[str, Any]) -> None:
    """`rope_theta` beside `rope_scaling`, whose type is called "type" too."""
    new = config_of("llama", rope_parameters=rope).to_dict()
    old = {**new, "rope_theta": new["rope_parameters"]["rope_theta"], "rope_parameters": None}
    plain = Llama({**old, "rope_scaling": None}).shape
    assert plain.rope_scaling is None
    for kind in ("rope_type", "type"):
        scaling = {kind: rope["rope_type"], **{k: v for k, v in rope.items() if k != "rope_type"}}
        shape = Llama({**old, "rope_scaling": scaling}).shape
        assert shape == Llama(new).shape == Llama({**old, **new, "rope_scaling": scaling}).shape
        assert shape.rope_scaling is not None
        assert shape.rope_theta == plain.rope_theta == 500
    if "original_max_position_embeddings" in rope:  # by default the positions of the config
        del scaling["original_max_position_embeddings"]
        scaling = Llama({**old, "rope_scaling": scaling}).shape.rope_scaling
        assert scaling is not None
        assert scaling.original == 64


def test_the_scaling_of_queries_as_transformers_4_writes_it() -> None:
    config = config_of("ministral3").to_dict()
    expected = Ministral3(config).shape
    assert expected.query_scaling is not None
    scaling = config.pop("rope_parameters")
    assert Ministral3({**config, "rope_scaling": scaling}).shape == expected
    theta = scaling.pop("rope_theta")
    assert Ministral3({**config, "rope_scaling": scaling, "rope_theta": theta}).shape == expected


def test_defaults_of_ministral_3_are_those_of_transformers() -> None:
    published = transformers.Ministral3Config().to_dict()
    keys = ("head_dim", "num_key_value_heads", "rms_norm_eps", "rope_parameters")
    absent = {key: value for key, value in published.items() if key not in keys} | {"num_hidden_layers": 1}
    assert Ministral3.shape_of(absent) == Ministral3.shape_of({**published, "num_hidden_layers": 1})


@every_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@torch.no_grad()
def test_other_dtypes(family: str, dtype: torch.dtype) -> None:
    theirs, x = copy.deepcopy(case(family)).to(dtype), ids(2, 20)
    expected, logits = theirs(x).logits, models.wrap(theirs)(x).logits
    assert logits.dtype == dtype
    bound = {torch.bfloat16: 0.05, torch.float64: 1e-5}[dtype]
    assert (logits - expected).abs().max() < bound * expected.abs().max()


def test_code_that_a_wrapped_model_does_not_run_is_told() -> None:
    """Hooks and replaced forwards of the Hugging Face model: the tokens would be others without a word."""

    class Negated(transformers.Qwen3ForCausalLM):
        def forward(self, *args: Any, **keywords: Any) -> Any:
            return -super().forward(*args, **keywords).logits

    def hooked(model: Any) -> None:
        model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: 2 * output)

    def hooked_before(model: Any) -> None:
        model.lm_head.register_forward_pre_hook(lambda module, args: (-args[0],))

    def replaced(model: Any) -> None:
        plain = model.model.norm.forward
        model.model.norm.forward = functools.wraps(plain)(lambda x: 2 * plain(x))

    def derived(model: Any) -> None:
        model.__class__ = Negated

    for change, said in (
        (hooked, r"hf_model: Qwen3ForCausalLM: model\.layers\.0\.mlp: hooks, or a forward of its own"),
        (hooked_before, ": lm_head: hooks"),
        (replaced, r": model\.norm: hooks"),
        (derived, "Negated: the model: hooks"),
    ):
        theirs = copy.deepcopy(case("qwen3"))
        change(theirs)
        with pytest.warns(UserWarning, match=said):
            models.wrap(theirs)
    theirs = copy.deepcopy(case("qwen3"))
    theirs(ids(1, 3), output_hidden_states=True, output_attentions=True)  # hooks of transformers
    theirs.enable_input_require_grads()
    theirs.model.layers[0].compile(backend="eager")
    accelerate.dispatch_model(theirs, {"": "cpu"}, force_hooks=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        models.wrap(theirs)


# --- what a position sees -----------------------------------------------------------------------


@every_family
@torch.no_grad()
def test_a_position_sees_those_up_to_itself(family: str) -> None:
    model, x = models.wrap(case(family)), ids(1, 12)
    y = x.clone()
    y[0, 7] = (y[0, 7] + 1) % 97
    # An expert's product may round a row otherwise among other rows.
    changed = ((model(x).logits - model(y).logits).abs() > 1e-4).any(-1)[0]
    assert changed.tolist() == [False] * 7 + [True] * 5
    for length in (0, 1):
        assert model(ids(2, length)).logits.shape == (2, length, 97)


@torch.no_grad()
def test_padding_changes_nothing_on_either_side() -> None:
    model = models.wrap(copy.deepcopy(case("qwen3")).double())
    x, lengths = ids(3, 12), (12, 7, 1)
    behind = torch.tensor([[i < n for i in range(12)] for n in lengths])
    for mask in (behind, behind.flip(1)):
        padded = model.hidden(x, attention_mask=mask)
        assert padded.isfinite().all()
        for row in range(3):
            alone = model.hidden(x[row : row + 1, mask[row]])
            torch.testing.assert_close(padded[row : row + 1, mask[row]], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
def test_gradients_are_those_of_transformers(padded: bool) -> None:
    """With checkpoints of the layers too."""
    theirs, x = theirs_of("qwen2"), ids(3, 40)
    mask = PADDING if padded else None
    seen = PADDING[:, 1:] & PADDING[:, :-1]
    model = models.wrap(copy.deepcopy(theirs)).train()

    def loss(module: nn.Module) -> Tensor:
        logits = module(x, attention_mask=mask).logits[:, :-1]
        return F.cross_entropy(logits.transpose(1, 2), x[:, 1:].where(seen.bool(), -100))

    found = []
    for recompute in (None, {}, {"use_reentrant": True}):
        model.zero_grad()
        if recompute is not None:
            model.gradient_checkpointing_enable(recompute)
        loss(model).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    loss(theirs).backward()
    for name, p in theirs.named_parameters():
        assert torch.equal(found[1][name], found[0][name]), name
        for grads in found:
            torch.testing.assert_close(grads[name], p.grad, rtol=1e-3, atol=1e-4)


@every_family
@torch.no_grad()
def test_steps_write_what_transformers_generates(family: str) -> None:
    theirs, prompt = case(family), ids(1, 5)
    expected = theirs.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)[0]
    model = models.wrap(theirs)
    cache, tokens, start = model.new_cache(1, 17), prompt[0].tolist(), 0
    while len(tokens) < 17:
        metadata = cache.metadata(model.spans(0, start, len(tokens), 17), causal=model.causal)
        hidden = model.step(torch.tensor(tokens[start:]), cache, metadata)
        start = len(tokens)
        tokens.append(int(model.head(hidden[-1]).argmax()))
    assert tokens == expected.tolist()


@each
@torch.no_grad()
def test_steps_of_any_length_compute_the_hidden_states(family: str, changes: dict[str, Any]) -> None:
    model, x = models.wrap(theirs_of(family, **changes)), ids(2, 30)
    expected, cache = model.hidden(x), model.new_cache(2, 30)
    for passes in (((0, 0, 13), (1, 0, 4)), ((1, 4, 5), (0, 13, 30)), ((1, 5, 30),)):
        spans = [span for row, start, end in passes for span in model.spans(row, start, end, 30)]
        packed = torch.cat([x[row, start:end] for row, start, end in passes])
        hidden = model.step(packed, cache, cache.metadata(spans, causal=model.causal))
        states = torch.cat([expected[row, start:end] for row, start, end in passes])
        torch.testing.assert_close(hidden, states, rtol=0, atol=1e-4)


@pytest.mark.parametrize("at", [0, 1])
def test_a_pass_in_two_parts_is_the_pass_to_the_bit(at: int) -> None:
    """Where tokens are joined to the stream between the parts, their lower keys are never written."""
    model, tokens = models.wrap(case("qwen3")), ids(1, 9)[0]
    caches = [model.new_cache(1, 16) for _ in range(3)]
    with torch.no_grad():
        whole, halves = models.Taps((-1, 0, 1)), models.Taps((-1, 0, 1))
        made = caches[0].metadata([Span(0, 0, 9, 9)], causal=True)
        expected = model.step(tokens, caches[0], made, taps=whole)
        lower = model.run_layers(model.embedded(tokens), caches[1], made, 0, at, taps=halves)
        found = model.final_norm(model.run_layers(lower, caches[1], made, at, taps=halves))
        assert torch.equal(found, expected)
        assert torch.equal(caches[0].slots, caches[1].slots)
        assert whole.keys() == halves.keys()
        assert all(torch.equal(whole[layer], halves[layer]) for layer in whole)

        first = caches[2].metadata([Span(0, 0, 6, 6)], causal=True)
        lower = model.run_layers(model.embedded(tokens[:6]), caches[2], first, 0, at).sum
        born = torch.randn(3, model.shape.width)
        both = models.Stream(torch.cat([lower, born]))
        joined = model.final_norm(model.run_layers(both, caches[2], made, at))
        # A product of 6 rows may round a row otherwise than one of 9.
        torch.testing.assert_close(joined[:6], expected[:6], rtol=0, atol=1e-5)
        assert (joined[6:] - expected[6:]).abs().max() > 0.1
        assert not caches[2].slots[:at, :, :, :, 6:].any()
        assert caches[2].slots[at:, :, :, :, 6:9].any()


def test_spans() -> None:
    model = models.wrap(case("llama"))
    assert model.spans(3, 2, 9, 40) == [Span(3, 2, 9, 9)]
    assert model.spans(0, 2, 2, 40) == []


# --- checkpoints --------------------------------------------------------------------------------


@each
@torch.no_grad()
def test_transformers_reads_what_is_saved(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    theirs, x = theirs_of(family, **changes), ids(2, 30)
    theirs.save_pretrained(tmp_path / "a", max_shard_size="20KB")
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 1
    model = models.load(tmp_path / "a")
    models.save(model, tmp_path / "b")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b", experts_implementation="eager")
    assert type(again) is type(theirs)
    assert torch.equal(again(x).logits, theirs(x).logits)
    stored = load_file(tmp_path / "b" / "model.safetensors")
    assert ("lm_head.weight" in stored) is not changes.get("tie_word_embeddings", False)
    assert models.load(tmp_path / "b").shape == model.shape
    assert torch.equal(models.load(tmp_path / "b", fuse=True)(x).logits, model(x).logits)


@pytest.mark.parametrize("tied", [False, True])
@every_family
@torch.no_grad()
def test_wrap_shares_the_weights(family: str, tied: bool) -> None:
    theirs, x = theirs_of(family, tie_word_embeddings=tied), ids(2, 9)
    model = models.wrap(theirs)
    assert type(model) is FAMILIES[family]
    given = {name: p.data_ptr() for name, p in theirs.named_parameters(remove_duplicate=False)}
    assert {name: p.data_ptr() for name, p in model.named_parameters(remove_duplicate=False)} == given
    assert models.traits(theirs) == models.traits(model) == Traits(causal=True)
    next(iter(theirs.model.layers[1].mlp.parameters())).mul_(2)
    theirs.model.embed_tokens.weight.mul_(1.5)
    torch.testing.assert_close(model(x).logits, theirs(x).logits, rtol=0, atol=1e-4)


def test_wrap_refuses_a_head_of_its_own_that_the_config_ties(tmp_path: Path) -> None:
    """transformers 5 unties what a checkpoint stores with two contents; the config goes on to say tied."""
    theirs_of("qwen2", tie_word_embeddings=True).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = 2 * tensors["model.embed_tokens.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    said = r"tie_word_embeddings says that lm_head\.weight is the embedding, and it is stored with other"
    for give in (lambda: models.wrap(theirs), lambda: models.load(tmp_path)):
        with pytest.raises(ValueError, match=said):
            give()
    theirs.config.tie_word_embeddings = False
    x = ids(1, 5)
    torch.testing.assert_close(models.wrap(theirs)(x).logits, theirs(x).logits, rtol=0, atol=1e-4)


def test_tables_in_old_checkpoints_are_passed_over(tmp_path: Path) -> None:
    """Those of Llama 2 hold the frequencies of each layer."""
    case("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, tmp_path / "model.safetensors")
    x = ids(1, 9)
    torch.testing.assert_close(models.load(tmp_path)(x).logits, case("llama")(x).logits, rtol=0, atol=1e-4)
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(32)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"does not fit Llama: \S+q_proj\.bias is unexpected$"):
        models.load(tmp_path)


def test_a_mask_of_the_tokenizer_is_not_asked_for(tmp_path: Path) -> None:
    case("llama").save_pretrained(tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<mask>": 500}')
    assert models.load(tmp_path).mask_id is None
    assert models.load(tmp_path, mask_id=96).mask_id == 96
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "mask_token_id": 97}))
    with pytest.raises(ValueError, match=r"the mask token of .*, unless mask_id is given: .* 97, got 97"):
        models.load(tmp_path)


# --- what is refused ----------------------------------------------------------------------------


@every_family
def test_diffusion_refuses_autoregressive_models(family: str) -> None:
    theirs, prompt = case(family), ids(1, 4)
    said = r"^model: \w+ is autoregressive, .*dparallel_ext\.speculate"
    for model in (theirs, models.wrap(theirs), torch.nn.DataParallel(theirs)):
        with pytest.raises(ValueError, match=said):
            dx.decode(model, prompt, gen_length=8)
        with pytest.raises(ValueError, match=said):
            dx.decode(model, prompt, gen_length=8, mask_id=96, cache="none")
        with pytest.raises(ValueError, match=said):
            compat.generate(model, prompt, steps=8, gen_length=8, block_length=8, mask_id=96)
        with pytest.raises(ValueError, match=said):
            compat.generate(model, prompt, steps=8, gen_length=8, block_length=8, mask_id=96, cfg_scale=1.0)
        with pytest.raises(ValueError, match=said):
            compat.diffusion_generate(model, prompt, max_new_tokens=8, mask_token_id=96)
    with pytest.raises(ValueError, match="mask_id: belongs to masked diffusion"):
        dx.Engine(models.wrap(theirs), mask_id=96)
    with pytest.raises(ValueError, match=said):
        log_likelihoods(models.wrap(theirs), [[5, 6]], [[7]], mask_id=96)
    with pytest.raises(ValueError, match=said):
        next(complete("a name", models.wrap(theirs), None, ["a prompt"], dx.DecodeConfig()))


def test_a_module_that_holds_an_autoregressive_model_says_what_it_is() -> None:
    class Holder(nn.Module):
        def __init__(self, held: nn.Module) -> None:
            super().__init__()
            self.held = held

        def forward(self, input_ids: Tensor) -> Any:
            return self.held(input_ids)

    for held in (case("qwen3"), models.wrap(case("qwen3"))):
        model = Holder(held)
        with pytest.raises(
            ValueError, match=r"Holder holds a Qwen3\w* as held.*or causal.*or other \S+Traits$"
        ):
            dx.decode(model, ids(1, 4), gen_length=4, mask_id=96)
        model.traits = models.traits(held)
        with pytest.raises(ValueError, match="Holder is autoregressive"):
            dx.decode(model, ids(1, 4), gen_length=4, mask_id=96)


def test_a_model_that_was_made_to_see_both_ways_says_so() -> None:
    theirs = theirs_of("qwen3")
    with pytest.raises(ValueError, match=r"say so: model\.traits = dparallel_ext\.models\.Traits"):
        dx.decode(theirs, ids(1, 4), gen_length=4, mask_id=96)
    theirs.traits = Traits(mask_id=96)
    assert dx.decode(theirs, ids(1, 4), gen_length=4).sequences.shape == (1, 8)
