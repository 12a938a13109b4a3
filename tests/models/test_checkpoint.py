"""Checkpoints as they are released: where they come from, their mask, what is refused by name."""

from __future__ import annotations

import json
import os
import struct
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import golden
from safetensors.torch import save_file
from torch import Tensor, nn

from dparallel_ext import models
from dparallel_ext.models import SDAR, SDLM, A2DQwen3, Dream, FastDLLM, LLaDA, WeDLM, files, stored

CONFIG = golden.json("llada_tiny_a", "config")
TENSORS = golden.tensors("llada_tiny_a")
Q = "model.transformer.blocks.0.q_proj.weight"


def write(directory: Path, tensors: dict[str, Tensor] | None = None, **changes: Any) -> Path:
    """LLaDA's tiny checkpoint, with changes to its config; a key whose value is ... is left out."""
    directory.mkdir(exist_ok=True)
    config = {key: value for key, value in {**CONFIG, **changes}.items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(config))
    save_file(TENSORS if tensors is None else tensors, directory / "model.safetensors")
    return directory


def put(directory: Path, name: str, content: Any) -> None:
    (directory / name).write_text(content if isinstance(content, str) else json.dumps(content))


# --- the mask -----------------------------------------------------------------------------------

ADDED = {"10": {"content": "<|endoftext|>"}, "20": {"content": "<|mask|>", "special": True}}


@pytest.mark.parametrize("config", [..., None])
@pytest.mark.parametrize(
    ("written", "mask"),
    [
        ({}, None),
        ({"generation_config.json": {"mask_token_id": 30}, "added_tokens.json": {"<|mask|>": 20}}, 30),
        ({"generation_config.json": {"mask_token_id": None}, "added_tokens.json": {"<|mask|>": 20}}, 20),
        ({"added_tokens.json": {"|<MASK>|": 21, "<|im_end|>": 3}}, 21),
        ({"added_tokens.json": {"<|MASK|>": 21, "<mask>": 22}}, None),  # which?
        ({"tokenizer_config.json": {"added_tokens_decoder": ADDED}}, 20),
        ({"tokenizer_config.json": {"added_tokens_decoder": ADDED, "mask_token": "<|endoftext|>"}}, 10),
        ({"tokenizer_config.json": {"mask_token": None}, "added_tokens.json": {"<|mdm_mask|>": 5}}, 5),
        ({"tokenizer.json": {"added_tokens": [{"id": 23, "content": "<|mdm_mask|>"}]}}, 23),
        ({"special_tokens_map.json": {"mask_token": {"content": "M"}}, "added_tokens.json": {"M": 7}}, 7),
        ({"special_tokens_map.json": {"mask_token": "M"}, "vocab.json": {"M": 8}}, 8),
        ({"special_tokens_map.json": {"mask_token": "M"}, "vocab.json": {"N": 8}}, None),
        ({"tokenizer_config.json": {"mask_token": "M"}, "tokenizer.json": {"model": {"vocab": {"M": 6}}}}, 6),
    ],
    ids=str,
)
def test_the_mask_of_the_files(
    tmp_path: Path, config: Any, written: dict[str, Any], mask: int | None
) -> None:
    write(tmp_path, mask_token_id=config)
    for name, content in written.items():
        put(tmp_path, name, content)
    assert files.mask_token_id(tmp_path) == mask


def test_config_json_comes_first_and_what_is_asked_for_before_it(tmp_path: Path) -> None:
    write(tmp_path)
    put(tmp_path, "generation_config.json", {"mask_token_id": 30})
    assert models.load(tmp_path).mask_id == CONFIG["mask_token_id"] == 511
    model = models.load(tmp_path, mask_id=0)
    assert model.mask_id == models.traits(model).mask_id == 0
    models.save(model, tmp_path / "again")
    assert models.load(tmp_path / "again").mask_id == 0
    write(tmp_path, mask_token_id=...)
    assert models.load(tmp_path).mask_id == 30
    for wrong in (512, -1, True, 1.5):
        with pytest.raises(ValueError, match=f"^mask_id: expected an id below 512, got {wrong}"):
            models.load(tmp_path, mask_id=wrong)  # type: ignore[arg-type]
    for value in ("30", True, [30], 1.5, -1):
        for name, content in (("generation_config.json", {}), ("config.json", CONFIG)):
            (tmp_path / "generation_config.json").unlink(missing_ok=True)
            put(tmp_path, name, {**content, "mask_token_id": value})
            with pytest.raises(ValueError, match=rf"{name}: mask_token_id=.*, expected an id or null"):
                models.load(tmp_path)
            assert models.load(tmp_path, mask_id=0).mask_id == 0
            write(tmp_path, mask_token_id=...)
    put(tmp_path, "generation_config.json", {"mask_token_id": 600})
    with pytest.raises(ValueError, match=r"the mask token of .*, unless mask_id is given: .* 512, got 600"):
        models.load(tmp_path)


QWEN = {
    **{"num_attention_heads": 2, "num_hidden_layers": 1, "hidden_size": 4, "intermediate_size": 4},
    **{"head_dim": 2, "num_key_value_heads": 1},
}


@pytest.mark.parametrize(
    ("family", "config", "mask"),
    [
        *((Dream, QWEN, 151666), (SDAR, QWEN, 151669), (A2DQwen3, QWEN, 151669)),
        *((FastDLLM, QWEN, 151665), (WeDLM, QWEN, 151665), (SDLM, QWEN, 151665), (LLaDA, CONFIG, 126336)),
    ],
)
def test_the_published_mask_where_nothing_names_one(
    family: type[models.Model], config: dict[str, Any], mask: int
) -> None:
    sizes = {
        "vocab_size": mask + 100,
        "d_model": 8,
        "mlp_hidden_size": 8,
        "n_layers": 1,
        "embedding_size": None,
    }
    config = {**config, **sizes, "mask_token_id": None}
    with torch.device("meta"):
        model = family(config)
        others = [family({**config, "vocab_size": size}) for size in (mask, mask + 513)]
    assert [model.mask_id, *(one.mask_id for one in others)] == [mask, None, None]
    name = next(name for name, one in models.FAMILIES.items() if one is family)

    def traits_of(config: Any, generation: Any = None) -> models.Traits:
        foreign = nn.Identity()
        foreign.config, foreign.generation_config = config, generation  # type: ignore[assignment]
        return models.traits(foreign)

    plain = SimpleNamespace(model_type=name, vocab_size=mask + 100, mask_token_id=None)
    assert traits_of(plain).mask_id == mask
    assert traits_of(plain, SimpleNamespace(mask_token_id=5)).mask_id == 5
    assert traits_of(SimpleNamespace(model_type=name, vocab_size=100)).mask_id is None
    assert traits_of(SimpleNamespace(model_type=name, mask_token_id=7)).mask_id == 7


def test_wrap_takes_the_mask_of_the_generation_config() -> None:
    hf_model = nn.Module()
    hf_model.config = {**CONFIG, "mask_token_id": None}  # type: ignore[assignment]
    hf_model.generation_config = SimpleNamespace(mask_token_id=4)  # type: ignore[assignment]
    hf_model.named_parameters = lambda: ((n, nn.Parameter(t)) for n, t in TENSORS.items())  # type: ignore
    assert models.wrap(hf_model).mask_id == 4


# --- configs ------------------------------------------------------------------------------------


def test_dropout_matters_in_training_alone(tmp_path: Path) -> None:
    """The published class of LLaDA's config has 0.1 for each."""
    dropout = dict.fromkeys(("attention_dropout", "residual_dropout", "embedding_dropout"), 0.1)
    x = torch.arange(12)[None]
    expected = golden.model("llada_tiny_a")(x).logits
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = models.load(write(tmp_path, **dropout))
        assert not model.training
        assert torch.equal(model(x).logits, expected)
    with pytest.warns(UserWarning, match=r"'residual_dropout': 0\.1.* is ignored"):
        model.train()
    Dream(golden.json("dream_tiny_a", "config") | {"attention_dropout": 0.1})


def test_null_is_as_good_as_nothing(tmp_path: Path) -> None:
    nulls = dict.fromkeys(("rms_norm_eps", "rope_theta", "n_kv_heads", "embedding_size", "eos_token_id"))
    absent = models.LLaDA({key: value for key, value in CONFIG.items() if key not in nulls})
    assert models.LLaDA({**CONFIG, **nulls}).shape == absent.shape
    dream = golden.json("dream_tiny_a", "config")
    nulls = dict.fromkeys(("rms_norm_eps", "rope_theta", "rope_scaling", "head_dim"))
    assert Dream({**dream, **nulls}).shape.rope_theta == 10000.0


def test_the_first_of_several_ends_is_eos(tmp_path: Path) -> None:
    assert models.load(write(tmp_path, eos_token_id=[7, 9])).eos_id == 7
    mask = models.load(write(tmp_path)).mask_id  # is never decoded, and so no end
    masked = models.load(write(tmp_path, eos_token_id=[mask, 9, 9]))
    assert (masked.eos_ids, masked.eos_id) == ((9,), 9)


def test_both_names_of_the_dtype_are_written(tmp_path: Path) -> None:
    models.save(models.load(write(tmp_path, dtype="float32")), tmp_path / "b", dtype=torch.bfloat16)
    written = json.loads((tmp_path / "b" / "config.json").read_text())
    assert written["dtype"] == written["torch_dtype"] == "bfloat16"


QWEN_KEYS = (
    "num_hidden_layers hidden_size num_attention_heads num_key_value_heads head_dim intermediate_size "
    "vocab_size max_position_embeddings rms_norm_eps rope_theta tie_word_embeddings"
)
KEYS = {
    "llada": "n_layers d_model n_heads n_kv_heads mlp_hidden_size mlp_ratio vocab_size embedding_size "
    "max_sequence_length rms_norm_eps rope_theta include_bias include_qkv_bias bias_for_layer_norm "
    "multi_query_attention weight_tying scale_logits rope_full_precision",
    "Dream": QWEN_KEYS,
    "sdar": f"{QWEN_KEYS} block_size attention_bias",
    "Fast_dLLM_Qwen": f"{QWEN_KEYS} bd_size",
    "llama": f"{QWEN_KEYS} original_max_position_embeddings attention_bias mlp_bias",
    "qwen2": f"{QWEN_KEYS} sliding_window use_sliding_window",
    "qwen3": f"{QWEN_KEYS} sliding_window use_sliding_window attention_bias",
}
"""The keys of numbers and flags of each family's config.json."""
WRONG: dict[str, list[Any]] = {
    "whole": [0, -1, True, 1.5, 4.0, "4", [4], {}, float("nan"), float("inf"), 2**60],
    "number": [
        0,
        -1.0,
        True,
        "1e-6",
        [1],
        {},
        float("nan"),
        float("inf"),
        -float("inf"),
        1e-300,
        1e300,
        10**400,
    ],
    "flag": ["false", 2, -1, 0.0, [], {}, float("nan")],
}


def config_of(family: str) -> dict[str, Any]:
    published = family.lower() if family in ("llada", "Dream", "sdar") else "dream"
    config = golden.json(f"{published}_tiny_a", "config")
    return {**config, "model_type": family, "bd_size": 32}


@pytest.mark.parametrize("family", list(KEYS))
def test_every_number_and_flag_is_checked_by_name(tmp_path: Path, family: str) -> None:
    config = config_of(family)
    put(tmp_path, "config.json", config)
    assert models.config_of(tmp_path)[1].heads == 4
    for key in KEYS[family].split():
        flag = key.startswith(("include", "bias", "multi", "weight", "scale", "tie", "use")) or (
            key in ("rope_full_precision", "attention_bias", "mlp_bias")
        )
        kind = "flag" if flag else "number" if key in ("rms_norm_eps", "rope_theta") else "whole"
        for value in WRONG[kind][key == "embedding_size" :]:  # there 0 is null, as published
            put(tmp_path, "config.json", {**config, key: value})
            with pytest.raises(ValueError, match=rf"^path: .*config\.json: {key}=.*, expected ") as caught:
                models.load(tmp_path)
            assert len(str(caught.value)) < len(str(tmp_path)) + 250
        put(tmp_path, "config.json", {**config, key: None})
        if key in ("n_kv_heads", "mlp_ratio", "embedding_size") or "max_" in key or "rope" in key:
            models.config_of(tmp_path)


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("llada", {"n_heads": 5}, "5 heads do not divide a width of 64"),
        ("llada", {"n_kv_heads": 3}, "3 key heads do not divide 4 heads"),
        ("llada", {"n_layers": 10**9}, "n_layers=1000000000, expected a whole number >= 1 and <= 1000"),
        ("llada", {"mlp_hidden_size": None, "mlp_ratio": None}, "'mlp_hidden_size' is missing or null"),
        ("llada", {"eos_token_id": [1, "x"]}, r"eos_token_id=\[1, 'x'\], expected an id below 512"),
        ("llada", {"eos_token_id": [1, 512]}, r"eos_token_id=\[1, 512\], expected an id below 512"),
        ("llada", {"n_layers": ...}, "'n_layers' is missing"),
        ("Dream", {"head_dim": None, "num_attention_heads": 5}, "5 heads do not divide a width of 64"),
        ("Dream", {"head_dim": 15}, "expected heads of even size, got 15"),
        ("Dream", {"num_key_value_heads": 3}, "3 key heads do not divide 4 heads"),
        ("Dream", {"rope_scaling": "yarn"}, "rope_scaling='yarn', expected an object"),
        ("Dream", {"rope_scaling": {"type": ["yarn"]}}, r"rope_scaling of type \['yarn'\] is not supported"),
        (
            "Dream",
            {"rope_theta": None, "rope_parameters": {"rope_theta": 0}},
            "rope_theta=0, expected a number",
        ),
        ("Dream", {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "by kinds of layers"),
        ("Dream", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        ("sdar", {"block_size": 10**9}, "block_size=1000000000, expected a whole number >= 1 and <= 4096"),
        ("sdar", {"hidden_size": ...}, "'hidden_size' is missing"),
        ("Fast_dLLM_Qwen", {"bd_size": 12}, "bd_size=12, expected a multiple of 8"),
    ],
    ids=str,
)
def test_numbers_that_do_not_go_together(
    tmp_path: Path, family: str, changes: dict[str, Any], said: str
) -> None:
    config = {key: value for key, value in {**config_of(family), **changes}.items() if value is not ...}
    put(tmp_path, "config.json", config)
    with pytest.raises(ValueError, match=rf"^path: .*config\.json: .*{said}"):
        models.load(tmp_path)


@pytest.mark.parametrize("given", [True, False])
def test_attention_bias_of_sdar_is_that_of_all_four_projections(given: bool) -> None:
    model = SDAR({**config_of("sdar"), "attention_bias": given})
    biases = {name for name in model.state_dict() if name.endswith("bias") and ".0." in name}
    assert biases == {f"model.layers.0.self_attn.{p}_proj.bias" for p in "qkvo" if given}


def test_what_null_and_zero_mean_to_the_published_code() -> None:
    for changes in (
        {"embedding_size": 0},
        {"include_bias": None},
        {"weight_tying": 0},
        {"scale_logits": None},
    ):
        assert LLaDA({**CONFIG, **changes}).shape == LLaDA(CONFIG).shape
    assert not LLaDA({**CONFIG, "rope_full_precision": None}).shape.rope_in_float32
    assert LLaDA({**CONFIG, "include_bias": 1, "bias_for_layer_norm": None}).shape.norm_bias


def test_json_that_is_read_two_ways_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    text = json.dumps(CONFIG)
    put(tmp_path, "config.json", text[:-1] + ', "n_heads": 4}')  # twice the same
    models.load(tmp_path)
    file = tmp_path / "config.json"
    for content, said in (
        (text[:-1] + ', "n_heads": 2}', "is not JSON: it has two values for 'n_heads'"),
        ('{"model_type": "\\ud800"}', "is not JSON: .*surrogates not allowed"),
        ("[" * 100_000, "is not JSON"),
        ("1" * 5000, "is not JSON"),
        ("null", "holds a NoneType, expected an object"),
    ):
        put(tmp_path, "config.json", content)
        with pytest.raises(ValueError, match=rf"^path: .*config\.json {said}"):
            models.load(tmp_path)
    file.write_bytes(text.encode("utf-16"))
    with pytest.raises(ValueError, match=r"config\.json is not UTF-8 text: byte 0"):
        models.load(tmp_path)
    put(tmp_path, "config.json", text)
    put(tmp_path, "generation_config.json", "{")
    with pytest.raises(ValueError, match=r"generation_config\.json is not JSON"):
        models.load(write(tmp_path, mask_token_id=None))
    monkeypatch.setattr(files, "MOST_BYTES", 1000)
    with pytest.raises(ValueError, match=r"config\.json has [\d,]+ bytes, expected 1,000 or fewer"):
        models.load(tmp_path)


# --- weights that are not there, or not what they seem ------------------------------------------


def test_nothing_is_read_before_every_tensor_is_seen_to_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("a tensor is read")

    monkeypatch.setattr(stored, "fetch", never)
    huge = {"d_model": 2**20, "mlp_hidden_size": 2**24, "vocab_size": 2**24, "embedding_size": None}
    with pytest.raises(ValueError, match=r"is \(176, 64\), expected \(16777216, 1048576\)"):
        models.load(write(tmp_path, **huge))
    with pytest.raises(ValueError, match=r"blocks\.10\..* is missing; and 868 more"):
        models.load(write(tmp_path, n_layers=100))
    tensors = {name: tensor for name, tensor in TENSORS.items() if name != "model.transformer.wte.weight"}
    with pytest.raises(ValueError, match=r"wte\.weight is missing"):
        models.load(write(tmp_path, tensors))


def test_tensors_of_one_type(tmp_path: Path) -> None:
    mixed = {**TENSORS, Q: TENSORS[Q].bfloat16()}
    with pytest.raises(ValueError, match=rf"{Q} BF16 and .* F32, expected tensors of one type"):
        models.load(write(tmp_path, mixed))
    assert models.load(tmp_path, dtype=torch.float32).dtype == torch.float32
    assert models.load(tmp_path, dtype=torch.float32, fuse=True).dtype == torch.float32
    for tensors in (mixed, TENSORS):
        stored = models.as_stored(write(tmp_path, tensors))  # to tell models apart, nothing is converted
        assert torch.equal(stored.state_dict()[Q], tensors[Q])
        assert models.fingerprint(stored) == models.fingerprint(models.load(tmp_path, dtype=torch.bfloat16))


def test_a_header_that_lies(tmp_path: Path) -> None:
    file = write(tmp_path) / "model.safetensors"
    content = file.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header, body = json.loads(content[8 : 8 + size]), content[8 + size :]
    others = next(entry["data_offsets"] for name, entry in header.items() if name not in (Q, "__metadata__"))
    for changes in (
        {"shape": [2**62, 4]},
        {"shape": [-1, 64]},
        {"data_offsets": [0, 2**62]},
        {"data_offsets": others},
        {"dtype": "nothing"},
        {"dtype": "F64"},
    ):
        changed = json.dumps({**header, Q: {**header[Q], **changes}}).encode()
        file.write_bytes(struct.pack("<Q", len(changed)) + changed + body)
        with pytest.raises(
            ValueError, match=r"path: .*model\.safetensors is not a readable safetensors file"
        ):
            models.load(tmp_path)
    for length in (0, size + 1, 2**32, 2**63, 2**64 - 1):
        file.write_bytes(struct.pack("<Q", length) + content[8:])
        with pytest.raises(ValueError, match=r"model\.safetensors is not a readable safetensors file"):
            models.load(tmp_path)


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        write(tmp_path)
        (tmp_path / name).unlink()
        for put_there in (os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)):
            put_there(tmp_path / name)
            with pytest.raises(FileNotFoundError, match=rf"no {name}"):
                models.load(tmp_path)
            os.rmdir(tmp_path / name) if put_there is os.mkdir else (tmp_path / name).unlink()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quant_method": "mxfp4"}, "quantization_config: mxfp4"),
        ({"quant_method": "gptq", "bits": 4}, "quantization_config: gptq"),
        ({"quant_method": "awq"}, "quantization_config: awq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quantization_config: bitsandbytes"),
        ({"quant_method": "compressed-tensors"}, "quantization_config: compressed-tensors"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quantization_config: modelopt"),
        ({"bits": 8}, "quantization_config: of an unknown method"),
    ],
    ids=str,
)
def test_quantised_checkpoints_are_refused_by_name(tmp_path: Path, config: Any, said: str) -> None:
    with pytest.raises(ValueError, match=rf"path: .* is quantised \({said}\)"):
        models.load(write(tmp_path, quantization_config=config))
    hf_model = nn.Linear(1, 1)
    hf_model.config = {**CONFIG, "quantization_config": config}  # type: ignore[assignment]
    with pytest.raises(ValueError, match=rf"hf_model: Linear is quantised \({said}\)"):
        models.wrap(hf_model)


def test_quantised_weights_that_no_config_tells_of(tmp_path: Path) -> None:
    models.load(write(tmp_path, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": False}))
    float8 = {**TENSORS, Q: TENSORS[Q].to(torch.float8_e4m3fn)}
    for dtype in (None, torch.float32):
        with pytest.raises(ValueError, match=rf"{Q} is F8_E4M3, expected .* 16 bits or more"):
            models.load(write(tmp_path, float8), dtype=dtype)
    scaled = {**float8, f"{Q}_scale_inv": torch.ones(1)}
    with pytest.raises(ValueError, match=r"is quantised \(it has .*q_proj\.weight_scale_inv"):
        models.load(write(tmp_path, scaled))
    packed = {name: tensor for name, tensor in TENSORS.items() if name != Q}
    packed[Q.replace("weight", "qweight")] = torch.zeros(2, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"is quantised \(it has .*q_proj\.qweight"):
        models.load(write(tmp_path, packed))
