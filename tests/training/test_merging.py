"""Adapters that distillation trains, and merging them into checkpoints."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import ROOT, golden
from dparallel import evaluate, registry
from dparallel.problems import read_prompts
from dparallel.training import adapters, distill, drafters, trajectories
from safetensors.torch import load_file, save_file

import dparallel_ext as dx

RECIPES = ROOT / "recipes"


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = trajectories.TrajectorySettings(policy="entropy_bound:0.1", shard=1000)
    prompts = read_prompts("builtin:60:5")
    return trajectories.generate(tmp_path_factory.mktemp("answers"), prompts, settings, progress=False)


LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0}


def lora_recipe(**training: Any) -> distill.Recipe:
    given = {"max_steps": 3, "save_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    recipe = distill.read(RECIPES / "builtin.yaml", training={**given, "warmup_steps": 0, **training})
    return distill.Recipe(**{**vars(recipe), "lora": LORA})


@pytest.fixture(scope="module")
def adapter(answers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return distill.run(lora_recipe(), answers, tmp_path_factory.mktemp("adapter"), progress=False)


def test_an_adapter_is_on_the_published_targets(adapter: Path):
    found = load_file(adapter / "adapter_model.safetensors")
    layers = registry.load()[0].shape.layers
    assert len(found) == 2 * layers * 7
    prefix = "base_model.model.model.transformer.blocks.0."  # as on the Hugging Face model
    names = {n.removeprefix(prefix).partition(".")[0] for n in found if n.startswith(prefix)}
    assert names == {"q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out"}
    assert max(float(t.abs().max()) for n, t in found.items() if "lora_B" in n) > 1e-3


def test_merging_adds_the_product_and_keeps_the_layout(adapter: Path, tmp_path: Path):
    out = adapters.merge(adapter, tmp_path / "merged")
    base = load_file(registry.directory_of(registry.DEFAULT) / "model.safetensors")
    merged, low = load_file(out / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    assert set(merged) == set(base)
    changed = 0
    for name, weight in base.items():
        module = "base_model.model." + name.removesuffix(".weight")
        if f"{module}.lora_A.weight" in low:
            a, b = (low[f"{module}.lora_{x}.weight"].float() for x in "AB")
            torch.testing.assert_close(
                merged[name].float(), weight.float() + 2.0 * (b @ a), rtol=1e-2, atol=1e-3
            )
            changed += not torch.equal(merged[name], weight)
        else:
            assert torch.equal(merged[name], weight)
    assert changed == len(low) // 2
    assert (out / "tokenizer.json").exists()
    assert (registry.directory_of(registry.DEFAULT) / "held_out.json").exists()
    assert not (out / "held_out.json").exists()  # the base's accuracy
    assert not (adapter / "held_out.json").exists()
    assert evaluate.evaluate(str(out), "entropy:0.5", problems=2)["problems"] == 2
    with pytest.raises(ValueError, match="model: expected builtin:NAME, a directory or ORG/NAME, got ''"):
        adapters.merge(adapter, tmp_path / "none", model="")
    # Adapters were once written by our own names of the modules.
    old, model = tmp_path / "old", registry.load()[0]
    shutil.copytree(adapter, old)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config |= {"target_modules": list(adapters.LORA_TARGETS), "exclude_modules": None}
    config["base_model_name_or_path"] = "nowhere"
    (old / "adapter_config.json").write_text(json.dumps(config))
    names = {
        model.checkpoint_name(name): name
        for i in range(model.shape.layers)
        for name in (f"blocks.{i}.{t}" for t in adapters.LORA_TARGETS if t in model.NAMES)
    }
    renamed = {}
    for key, tensor in low.items():
        module, lora, rest = key.removeprefix("base_model.model.").partition(".lora_")
        renamed[f"base_model.model.{names[module]}{lora}{rest}"] = tensor
    save_file(renamed, old / "adapter_model.safetensors")
    again = adapters.merge(old, tmp_path / "again", model="builtin:teacher")
    same = load_file(again / "model.safetensors")
    assert all(torch.equal(same[name], merged[name]) for name in merged)


@pytest.mark.parametrize("family", ["sdar_moe", "llada2_moe"])
def test_adapters_of_mixtures_of_experts(family: str, tmp_path: Path) -> None:
    """By default on the layers that the family has; those of experts, which PEFT merges, are refused."""
    sizes = {
        **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
        **{"n_group": 2, "topk_group": 1, "num_shared_experts": 1, "model_type": family},
    }
    model = dx.models.FAMILIES[family](sizes)
    dx.models.save(model, tmp_path / "base")
    adapted = adapters.with_lora(model, {"init_lora_weights": False}, str(tmp_path / "base")).eval()
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    layers = {name.partition(".lora_")[0].rpartition(".")[2] for name in trained}
    attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
    shared = {"query_key_value", "dense", "gate_proj", "up_proj", "down_proj"}
    assert layers == (attention if family == "sdar_moe" else shared)
    adapted.save_pretrained(tmp_path / "adapter")
    merged = dx.models.load(adapters.merge(tmp_path / "adapter", tmp_path / "out"))
    x = torch.arange(9)[None]
    torch.testing.assert_close(merged(x).logits, adapted(x).logits, rtol=0, atol=1e-4)
    experts = {"target_modules": [], "target_parameters": ["experts.down_proj"]}
    adapted = peft.get_peft_model(dx.models.load(tmp_path / "base"), peft.LoraConfig(**experts))
    adapted.save_pretrained(tmp_path / "experts")
    with pytest.raises(ValueError, match=r"it changes parameters .*experts\.down_proj.*merge_and_unload"):
        adapters.merge(tmp_path / "experts", tmp_path / "other", model=str(tmp_path / "base"))


@pytest.mark.slow
def test_an_adapter_run_goes_on_where_it_stopped(answers: Path, adapter: Path, tmp_path: Path):
    distill.run(
        lora_recipe(max_steps=2, save_steps=2, lr_scheduler_type="constant"),
        answers,
        tmp_path,
        progress=False,
    )
    distill.run(lora_recipe(lr_scheduler_type="constant"), answers, tmp_path, progress=False)
    straight = distill.run(
        lora_recipe(lr_scheduler_type="constant"), answers, tmp_path / "straight", progress=False
    )
    one, other = (load_file(d / "adapter_model.safetensors") for d in (tmp_path, straight))
    for name in one:
        torch.testing.assert_close(one[name], other[name])


def test_modules_to_save_may_have_our_names():
    """In LLaDA the head has the name of each layer's last matrix, which is not meant."""
    model = adapters.with_lora(registry.load()[0], {**LORA, "modules_to_save": ["lm_head", "embed"]}, "base")
    kept = [name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name]
    assert [name.partition(".modules_to_save")[0] for name in kept] == [
        "base_model.model.model.transformer.wte",
        "base_model.model.model.transformer.ff_out",
    ]


def test_no_run_writes_over_the_checkpoint_that_it_reads(adapter: Path, answers: Path, tmp_path: Path):
    base = shutil.copytree(registry.directory_of("builtin:teacher"), tmp_path / "base")
    causal = shutil.copytree(registry.directory_of("builtin:causal"), tmp_path / "causal")
    (tmp_path / "link").symlink_to(base)
    before = {file: file.read_bytes() for file in (*base.iterdir(), *causal.iterdir())}
    recipe = replace(distill.read(RECIPES / "builtin.yaml"), model=str(base))
    said = "out: expected another directory than the model's, got "
    for out in (base, tmp_path / "link"):
        with pytest.raises(ValueError, match=said):
            adapters.merge(adapter, out, model=str(base))
        with pytest.raises(ValueError, match=said):
            distill.run(recipe, answers, out, progress=False)
    with pytest.raises(ValueError, match=said):
        drafters.run(str(causal), causal, "builtin:20", progress=False)
    assert before == {file: file.read_bytes() for file in (*base.iterdir(), *causal.iterdir())}


def test_no_checkpoint_is_merged_into_an_adapter_s_directory(adapter: Path, tmp_path: Path):
    """Which would be an adapter to some readers, and a checkpoint to others."""
    own = shutil.copytree(adapter, tmp_path / "own")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "adapter_config.json").touch()
    for out in (own, tmp_path / "other"):
        before = sorted(out.iterdir())
        with pytest.raises(ValueError, match="out: expected a directory without an adapter's files, got"):
            adapters.merge(own, out)
        assert sorted(out.iterdir()) == before


def test_an_adapter_that_does_not_fit_is_named(adapter: Path, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"no adapter_config\.json in [^ ]*$"):
        adapters.merge(tmp_path, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"a whole checkpoint, with nothing to merge"):
        adapters.merge(registry.directory_of("builtin:teacher"), tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"^model: 'nowhere' is neither"):
        adapters.merge(adapter, tmp_path / "out", model="nowhere")
    moved = shutil.copytree(adapter, tmp_path / "moved") / "adapter_config.json"
    moved.write_text(json.dumps(json.loads(moved.read_text()) | {"base_model_name_or_path": "gone"}))
    with pytest.raises(FileNotFoundError, match=r"names 'gone' as its base, and .*: 'gone' is neither"):
        adapters.merge(moved.parent, tmp_path / "out")
    base = shutil.copytree(registry.directory_of("builtin:teacher"), tmp_path / "base")
    for name in ("tokenizer.json", "model.safetensors"):
        (base / name).unlink()
        (base / name).symlink_to("../blobs/1")
        with pytest.raises(FileNotFoundError, match=rf"^model: .*base/{name} is a link to \.\./blobs/1"):
            adapters.merge(adapter, tmp_path / "out", model=str(base))
        (base / name).unlink()
    with pytest.raises(ValueError, match=r"is for no module of"):
        adapters.merge(adapter, tmp_path / "out", model=str(golden.home / "dream_tiny_a"))
    for name, content, said in (
        ("adapter_config.json", b"{", "is not LoRA's"),
        ("adapter_config.json", b"[]", "is not LoRA's"),
        ("adapter_config.json", b'{"peft_type": "NONE"}', "is not LoRA's"),
        ("adapter_model.safetensors", b"half", "is not a readable safetensors file"),
    ):
        shutil.rmtree(tmp_path / "broken", ignore_errors=True)
        shutil.copytree(adapter, tmp_path / "broken")
        (tmp_path / "broken" / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"adapter: .*{name} {said}"):
            adapters.merge(tmp_path / "broken", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"modules_to_save": ["lm_head", "embed_tokens", "norm", "input_layernorm"], "use_dora": True},
        {"bias": "all", "use_rslora": True},
        {"trainable_token_indices": [4, 17]},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    ],
    ids=["modules_to_save", "bias", "tokens", "embedding and head"],
)
def test_whatever_a_lora_adapter_holds_is_merged(settings: dict[str, Any], tmp_path: Path):
    base = golden.home / "dream_tiny_a"
    config = peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], **settings})
    adapted = peft.get_peft_model(dx.models.load(base, dtype=torch.float32), config)
    gen = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in adapted.parameters():
            p.add_(torch.randn(p.shape, generator=gen), alpha=0.3 if p.requires_grad else 0)
        tokens = torch.tensor([[4, 17, 230, 95, 8, 301, 44, 7]])
        expected = adapted.eval()(tokens).logits
        adapted.save_pretrained(tmp_path / "adapter")
        out = adapters.merge(tmp_path / "adapter", tmp_path / "out", model=str(base))
        found = dx.models.load(out, dtype=torch.float32)(tokens).logits
        plain = dx.models.load(base, dtype=torch.float32)(tokens).logits
    assert (plain - expected).abs().max() > 0.1 * expected.abs().max()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(
    "settings",
    [{"modules_to_save": ["embed_tokens"]}, {"target_modules": ["embed_tokens"]}],
    ids=["whole", "lora"],
)
def test_an_adapter_of_one_end_of_a_tied_model_is_refused(settings: dict[str, Any], tmp_path: Path):
    """PEFT changes the embedding alone, and a checkpoint with tied ends cannot hold that."""
    config = json.loads((golden.home / "dream_tiny_a" / "config.json").read_text())
    torch.manual_seed(0)
    dx.models.save(dx.models.Dream({**config, "tie_word_embeddings": True}), tmp_path / "base")
    lora = peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **settings})
    peft.get_peft_model(dx.models.load(tmp_path / "base"), lora).save_pretrained(tmp_path / "adapter")
    with pytest.raises(
        ValueError, match=r"adapter: .*embed_tokens.* changes one of the embedding and the head"
    ):
        adapters.merge(tmp_path / "adapter", tmp_path / "out", model=str(tmp_path / "base"))
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:Adapter .default.")
def test_an_adapter_that_peft_does_not_merge_is_named(tmp_path: Path):
    base = golden.home / "dream_tiny_a"
    lora = peft.LoraConfig(r=2, target_modules=["o_proj"], lora_bias=True)  # o_proj has no bias
    peft.get_peft_model(dx.models.load(base), lora).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"adapter: PEFT does not merge it: .*bias"):
        adapters.merge(tmp_path / "adapter", tmp_path / "out", model=str(base))
    assert not (tmp_path / "out").exists()
