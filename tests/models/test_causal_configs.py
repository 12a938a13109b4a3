"""Configs of autoregressive models: those of released checkpoints, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_causal import LLAMA3, MINISTRAL, case, config_of, transformers

from dparallel_ext import models
from dparallel_ext.models import Llama, Qwen2, Qwen3MoE

LLAMA_2 = {
    **{"hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 11008, "model_type": "llama"},
    **{"max_position_embeddings": 4096, "num_attention_heads": 32, "num_hidden_layers": 32},
    **{"num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None},
    **{"tie_word_embeddings": False, "vocab_size": 32000, "bos_token_id": 1, "eos_token_id": 2},
}


LLAMA_31 = {
    **LLAMA_2,
    **{"attention_bias": False, "mlp_bias": False, "intermediate_size": 14336, "num_key_value_heads": 8},
    **{"max_position_embeddings": 131072, "rope_theta": 500000.0, "vocab_size": 128256},
    "rope_scaling": {
        **{"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3"},
        "original_max_position_embeddings": 8192,
    },
    "eos_token_id": [128001, 128008, 128009],
}


QWEN_25 = {
    **{"hidden_act": "silu", "hidden_size": 3584, "intermediate_size": 18944, "model_type": "qwen2"},
    **{"max_position_embeddings": 32768, "max_window_layers": 28, "num_attention_heads": 28},
    **{"num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0},
    **{"sliding_window": 131072, "tie_word_embeddings": False, "use_sliding_window": False},
    **{"vocab_size": 152064, "bos_token_id": 151643, "eos_token_id": 151645},
    "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
}


QWEN_3 = {
    **{"attention_bias": False, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024},
    **{"intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28},
    **{"model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8},
    **{"rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None},
    **{
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
        "eos_token_id": 151645,
    },
}


@pytest.mark.parametrize(
    ("config", "parameters", "positions"),
    [
        (
            {**LLAMA_2, "max_sequence_length": 2048, "num_key_value_heads": ...},
            6_738_415_616,
            2048,
        ),  # Llama 1
        (LLAMA_2, 6_738_415_616, 4096),
        ({**LLAMA_2, "rope_scaling": {"type": "linear", "factor": 4.0}}, 6_738_415_616, 16384),  # Vicuna 16k
        (LLAMA_31, 8_030_261_248, 131072),
        (QWEN_25, 7_615_616_512, 131072),
        (QWEN_3, 596_049_920, 40960),
    ],
    ids=["llama 1", "llama 2", "linear", "llama 3.1", "qwen 2.5", "qwen 3"],
)
def test_configs_of_released_checkpoints(config: dict[str, Any], parameters: int, positions: int) -> None:
    config = {key: value for key, value in config.items() if value is not ...}
    with torch.device("meta"):
        model = models.FAMILIES[config["model_type"]](config)
        theirs = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**copy.deepcopy(config))
        )
    own = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    released = {name: tuple(p.shape) for name, p in theirs.state_dict().items()}
    if config["tie_word_embeddings"]:
        del released["lm_head.weight"]
    assert own == released
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert models.max_positions(model) == positions
    rotary = type(theirs.model.rotary_emb)(transformers.AutoConfig.for_model(**copy.deepcopy(config)))
    far = torch.arange(0, 40000, 997)
    cos, sin = rotary(torch.zeros(1), far[None])
    s = model.shape
    tables = models.rope.table(40000, s.head_dim, s.rope_theta, s.rope_scaling, torch.device("cpu"))
    for ours, table in zip(tables, (cos, sin), strict=True):
        assert torch.equal(ours[far], table[0, :, : s.head_dim // 2])


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (2, 2, (2,)),
        ([5, 7], None, (5, 7)),
        (5, [7, 5, 9], (5, 7, 9)),
        (None, [7, 9], (7, 9)),
        (None, 7, (7,)),
        (None, None, ()),
    ],
)
def test_every_end_is_known(config: Any, generation: Any, expected: tuple[int, ...], tmp_path: Path) -> None:
    theirs = copy.deepcopy(case("llama"))
    theirs.config.eos_token_id, theirs.generation_config.eos_token_id = config, generation
    theirs.save_pretrained(tmp_path / "a")
    loaded = models.load(tmp_path / "a")
    models.save(loaded, tmp_path / "b")
    for model in (loaded, models.load(tmp_path / "b"), models.wrap(theirs)):
        assert model.eos_ids == expected
        assert model.eos_id == (expected[0] if expected else None)


def test_files_of_weights_that_a_config_names_are_not_written_again(tmp_path: Path) -> None:
    theirs = copy.deepcopy(case("llama"))
    theirs.config.transformers_weights = "other.safetensors"
    models.save(models.wrap(theirs), tmp_path)
    assert "transformers_weights" not in models.load(tmp_path).config


def test_an_end_beyond_the_vocabulary_is_refused(tmp_path: Path) -> None:
    case("llama").save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 97]}')
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id has \[97\], .* below 97"):
        models.load(tmp_path)


SCALED = {"rope_type": "yarn", "factor": 4.0}
SLIDING = {"layer_types": None, "use_sliding_window": True, "max_window_layers": 1}


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ("llama", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types with 'sliding_att"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 2}, "layer_types with 'sliding_attention'"),
        ("qwen3", {"layer_types": "full_attention"}, "layer_types with 'full_attention' is not"),
        (
            "qwen2",
            {**SLIDING, "sliding_window": 8},
            "use_sliding_window=True is not supported: layers from max_window_layers=1 on would see 8",
        ),
        *(
            (
                "qwen3_moe",
                {
                    "use_sliding_window": True,
                    "sliding_window": 8,
                    "max_window_layers": 2,
                    "layer_types": kinds,
                },
                "use_sliding_window=True is not supported: layers from max_window_layers=0 on would see 8",
            )
            for kinds in ({}, {"layer_types": ["full_attention"] * 2})
        ),
        *(  # transformers takes a missing key for 4096
            (
                family,
                {**SLIDING, "sliding_window": ...},
                f"layers from max_window_layers={first} on would see 4096 positions",
            )
            for family, first in (("qwen2", 1), ("qwen3", 1), ("qwen3_moe", 0))
        ),
        ("qwen2", {"transformers_weights": "a.safetensors"}, "transformers_weights=.* is not supported"),
        ("qwen2", {"is_causal": False}, "is_causal=False is not supported, only True"),
        ("llama", {"is_causal": None}, "is_causal=None is not supported, only True"),
        ("qwen3", {"per_layer_config": {"0": {"head_dim": 8}}}, "per_layer_config={'0': .* not supp"),
        ("llama", {"sliding_window": 8}, "sliding_window=8 is not supported: Llama attends to all positions"),
        ("llama", {"attention_chunk_size": 8}, "attention_chunk_size=8 is not supported"),
        ("qwen3", {"num_key_value_heads": 3}, "3 key heads do not divide 4 heads"),
        ("qwen3", {"use_sliding_window": "no"}, "use_sliding_window='no', expected true or false"),
        ("llama", {"mlp_bias": 2}, "mlp_bias=2, expected true or false"),
        ("llama", {"head_dim": 15}, "expected heads of even size, got 15"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_parameters of type 'dyn",
        ),
        ("llama", {"rope_scaling": {"type": "longrope"}}, "type 'longrope' is not supported, only .*'yarn'"),
        ("llama", {"rope_scaling": {"type": ["yarn"]}}, r"rope_scaling of type \['yarn'\] is not supported"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "rope_scaling: 'factor' is missing"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling: factor=0, expected a n"),
        ("llama", {"rope_scaling": SCALED}, "rope_scaling and rope_parameters ask for different embeddings"),
        ("llama", {"rope_theta": 7.0}, "the rope_theta of rope_theta and rope_parameters differ"),
        (  # transformers reads rope_scaling alone, and takes the default base
            "llama",
            {"rope_scaling": {"type": "default"}},
            "the rope_theta of rope_scaling and rope_parameters differ: .*10000.0, .*500.0",
        ),
        (
            "llama",
            {"rope_parameters": SCALED, "max_position_embeddings": None},
            "rope_parameters: 'original_max_position_embeddings' is missing",
        ),
        ("llama", {"rope_parameters": {**SCALED, "rope_theta": 1}}, "rope_theta=1, expected more for yarn"),
        (
            "llama",
            {"rope_parameters": {**SCALED, "beta_fast": 1, "beta_slow": 2}},
            "rope_parameters: expected beta_fast >= beta_slow >= 1e-06, got 1 and 2",
        ),
        (
            "llama",
            {"rope_parameters": {**SCALED, "beta_slow": 1e-320}},
            "rope_parameters: expected beta_fast >= beta_slow >= 1e-06, got 32 and 9.99",
        ),
        (
            "llama",
            {"rope_parameters": {**LLAMA3, "low_freq_factor": 4}},
            "rope_parameters: expected low_freq_factor below high_freq_factor, got 4 and 4",
        ),
        ("qwen3", {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "by kinds of layers"),
        (
            "qwen2",
            {"quantization_config": {"quant_method": "awq"}},
            r"is quantised \(quantization_config: awq",
        ),
        ("qwen3", {"hidden_size": ...}, "'hidden_size' is missing"),
        (
            "ministral3",
            {"rope_scaling": {**MINISTRAL, "rope_theta": 500.0, "llama_4_scaling_beta": 0.1}},
            "the llama_4_scaling_beta of rope_parameters and rope_scaling differ: .*0.7, .*0.1",
        ),
    ],
    ids=str,
)
def test_configs_that_are_refused(family: str, changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    config = {**config_of(family).to_dict(), **changes}
    written = {key: value for key, value in config.items() if value is not ...}
    (tmp_path / "config.json").write_text(json.dumps(written))
    with pytest.raises(ValueError, match=rf"^path: \S+ ?.*{said}"):
        models.load(tmp_path)


def test_what_a_config_may_say_without_effect() -> None:
    plain = config_of("qwen2").to_dict()
    for changes in (
        {"sliding_window": 8, "use_sliding_window": False, "layer_types": None},
        {"sliding_window": 8, "use_sliding_window": True, "layer_types": None, "max_window_layers": 2},
        {"sliding_window": None, "use_sliding_window": True, "layer_types": None, "max_window_layers": 0},
        {"attention_bias": True},
    ):
        assert Qwen2({**plain, **changes}).shape == Qwen2(plain).shape
    llama = config_of("llama").to_dict()
    for changes in (
        {"sliding_window": llama["max_position_embeddings"]},
        {"sliding_window": 8, "layer_types": ["full_attention"] * llama["num_hidden_layers"]},
    ):
        assert Llama({**llama, **changes}).shape == Llama(llama).shape
    absent = {key: value for key, value in plain.items() if key != "rope_parameters"}
    experts = config_of("qwen3_moe").to_dict()
    assert Qwen3MoE({**experts, "is_causal": True, "per_layer_config": {}}).shape == Qwen3MoE(experts).shape
    assert Qwen2(absent).shape.rope_theta == 10000


@pytest.mark.parametrize(
    ("family", "kv_heads", "head_dim"),
    [
        *(("llama", 64, 8), ("mistral", 8, 8), ("ministral3", 8, 128), ("qwen2", 32, 8), ("qwen3", 32, 128)),
        *(("qwen3_moe", 4, 8), ("Dream", 32, 8), ("dream_reasoner", 32, 8), ("sdar", 32, 128)),
        *(("idlm", 32, 128), ("Fast_dLLM_Qwen", 32, 8), ("rnd1", 4, 128), ("sdlm", 32, 8)),
        ("a2d-qwen3", 32, 128),
    ],
)
def test_heads_that_a_config_does_not_name_are_as_published(
    family: str, kv_heads: int, head_dim: int
) -> None:
    config = config_of("qwen3_moe").to_dict() | {"hidden_size": 512, "num_attention_heads": 64}
    config |= {"is_causal": models.FAMILIES[family].causal, "sliding_window": None}
    absent = {key: value for key, value in config.items() if key not in ("num_key_value_heads", "head_dim")}
    shape = models.FAMILIES[family].shape_of(absent)
    assert (shape.kv_heads, shape.head_dim) == (kv_heads, head_dim)
