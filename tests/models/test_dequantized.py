"""Checkpoints with weights of 8 bits and scales, and language models within models that see images."""

from __future__ import annotations

import functools
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext import models

transformers = pytest.importorskip("transformers")

SIZES = {
    **{"vocab_size": 90, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
}
Q = "model.layers.0.self_attn.q_proj.weight"
BLOCKS = {"quant_method": "fp8", "weight_block_size": [64, 64], "activation_scheme": "dynamic"}
STATIC = {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"}
GROUP = {"num_bits": 8, "type": "float", "symmetric": True}


def compressed(**weights: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": {**GROUP, **weights}}}
    groups["group_1"] = {"targets": ["lm_head"], "weights": GROUP}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups}


@functools.cache
def qwen3() -> Any:
    torch.manual_seed(0)
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES)).bfloat16().eval()


def quantised(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The weight in 8 bits and a scale for each block of (rows, columns), block by block."""
    rows, columns = block
    scales = torch.empty(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
    values = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    for r, c in [(r, c) for r in range(scales.shape[0]) for c in range(scales.shape[1])]:
        place = slice(r * rows, (r + 1) * rows), slice(c * columns, (c + 1) * columns)
        scales[r, c] = weight[place].float().abs().max() / 448
        values[place] = (weight[place].float() / scales[r, c]).to(torch.float8_e4m3fn)
    return values, scales


def write(
    directory: Path, hf_model: Any, settings: Any, block: tuple[int, int], *, end: str, flat: bool = False
) -> dict[str, Tensor]:
    """Save the model with its layers' weights in 8 bits; returns what each stands for, in float32."""
    config = {**hf_model.config.to_dict(), "quantization_config": settings}
    (directory / "config.json").write_text(json.dumps(config))
    tensors, expected = dict(hf_model.state_dict()), {}
    for name, weight in list(tensors.items()):
        if "layers" in name and name.endswith("_proj.weight") and "vision" not in name:
            values, scales = quantised(weight, block)
            by_row = scales.repeat_interleave(block[0], 0)[: len(values)]
            by_place = by_row.repeat_interleave(block[1], 1)[:, : values.shape[1]]
            expected[name] = values.float() * by_place
            scales = scales.reshape(() if scales.numel() == 1 else -1) if flat else scales
            tensors |= {name: values, f"{name}{end}": scales}
            for leaf in ("input_scale", "activation_scale", "k_scale"):
                tensors[name.replace("weight", leaf)] = torch.ones(())
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return expected


WHOLE = 192, 192  # no weight has more rows or columns


@pytest.mark.parametrize(
    ("settings", "block", "end", "flat"),
    [
        (BLOCKS, (64, 64), "_scale_inv", False),
        ({**BLOCKS, "weight_block_size": [80, 50]}, (80, 50), "_scale_inv", False),  # cut at the edges
        (STATIC, WHOLE, "_scale_inv", True),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, WHOLE, "_scale", True),
        ({"quant_method": "fbgemm_fp8"}, (1, 192), "_scale", False),
        (compressed(strategy="channel"), (1, 192), "_scale", True),
        (compressed(strategy="block", block_structure=[64, 64]), (64, 64), "_scale", False),
    ],
    ids=["blocks", "cut blocks", "static", "modelopt", "fbgemm", "channels", "compressed blocks"],
)
def test_weights_of_8_bits_with_scales(
    tmp_path: Path, settings: dict[str, Any], block: tuple[int, int], end: str, flat: bool
) -> None:
    hf_model = qwen3()
    expected = write(tmp_path, hf_model, settings, block, end=end, flat=flat)
    model = models.load(tmp_path)
    assert model.dtype == torch.bfloat16
    assert len(expected) == 14
    assert "quantization_config" not in model.config
    state = model.state_dict()
    for name, tensor in {**hf_model.state_dict(), **expected}.items():
        assert torch.equal(state[name], tensor.bfloat16()), name
    wide = models.load(tmp_path, dtype=torch.float32, fuse=True)
    assert wide.dtype == torch.float32
    assert torch.equal(wide.state_dict()[Q], expected[Q])
    stored = models.as_stored(tmp_path)
    assert stored.state_dict()[Q].is_meta  # to look at a checkpoint takes no memory
    assert (
        models.fingerprint(stored) == models.fingerprint(model) == models.fingerprint(models.wrap(hf_model))
    )


@pytest.mark.parametrize("settings", [BLOCKS, STATIC], ids=["blocks", "static"])
def test_they_are_those_that_transformers_reads(tmp_path: Path, settings: dict[str, Any]) -> None:
    whole = settings is STATIC
    write(tmp_path, qwen3(), settings, WHOLE if whole else (64, 64), end="_scale_inv", flat=whole)
    keywords = {key: value for key, value in settings.items() if key != "quant_method"}
    config = transformers.FineGrainedFP8Config(**keywords, dequantize=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, dtype=torch.bfloat16
    )
    ours, expected = models.load(tmp_path).state_dict(), theirs.state_dict()
    wrapped = models.wrap(theirs).state_dict()  # its config still tells of 8 bits
    assert ours.keys() == wrapped.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(ours[name], tensor)
        assert torch.equal(wrapped[name], tensor)


def test_scales_that_do_not_fit(tmp_path: Path) -> None:
    write(tmp_path, qwen3(), BLOCKS, (32, 64), end="_scale_inv")
    with pytest.raises(ValueError, match=r"_scale_inv is \(4, 3\) for a weight .*each block of \[64, 64\]"):
        models.load(tmp_path)
    with pytest.raises(ValueError, match=r"each block of \[64, 64\]"):
        models.as_stored(tmp_path)
    file, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    tensors = load_file(file)
    for size, said in (([0, 64], "the config names no size"), ([64], "names no size"), ([32, 64], None)):
        settings = {**BLOCKS, "weight_block_size": size}
        config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": settings}))
        with pytest.raises(ValueError, match=said) if said else nullcontext():
            models.load(tmp_path)
    save_file({**tensors, Q: tensors[Q][None]}, file)
    with pytest.raises(ValueError, match=r"is \(4, 2\) for a weight \(1, 128, 128\), expected one scale"):
        models.load(tmp_path)
    save_file({name: t for name, t in tensors.items() if name != f"{Q}_scale_inv"}, file)
    with pytest.raises(ValueError, match=r"q_proj[.]weight is F8_E4M3, expected a floating-point type"):
        models.load(tmp_path)
    tensors = {name: t.to(torch.int8) if t.itemsize == 1 else t for name, t in tensors.items()}
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"is quantised \(it has .*_scale_inv"):
        models.load(tmp_path)


# --- the language model within a model that sees images -----------------------------------------


def mistral3(tied: bool, model_type: str = "ministral3") -> Any:
    torch.manual_seed(1)
    text = {**SIZES, "model_type": model_type, "sliding_window": None, "tie_word_embeddings": tied}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"model_type": "pixtral", "head_dim": 16, "image_size": 64, "patch_size": 16}
    config = transformers.Mistral3Config(text_config=text, vision_config=vision, tie_word_embeddings=tied)
    return transformers.Mistral3ForConditionalGeneration(config).eval()


@pytest.mark.parametrize(
    ("tied", "family"), [(True, "ministral3"), (False, "ministral3"), (False, "mistral")]
)
def test_the_language_model_of_mistral_3(tmp_path: Path, tied: bool, family: str) -> None:
    hf_model = mistral3(tied, family)
    hf_model.save_pretrained(tmp_path)
    ids = torch.randint(11, 90, (2, 9))
    expected = hf_model(ids).logits
    config = json.loads((tmp_path / "config.json").read_text())
    for told in (tied, None):  # a released config may not say whether the head is tied
        for part in (config, config["text_config"]):
            part["tie_word_embeddings"] = told
        (tmp_path / "config.json").write_text(json.dumps(config))
        model = models.load(tmp_path)
        assert type(model) is models.FAMILIES[family]
        assert model.shape.tied is tied
        torch.testing.assert_close(model(ids).logits, expected, atol=2e-6, rtol=0)
    assert models.stored_traits(tmp_path).causal
    wrapped = models.wrap(hf_model)
    torch.testing.assert_close(wrapped(ids).logits, expected, atol=2e-6, rtol=0)
    assert torch.equal(wrapped.embed.weight, model.embed.weight)
    assert models.traits(hf_model).causal
    with pytest.raises(ValueError, match="autoregressive"):
        dx.decode(hf_model, ids, gen_length=4)
    ours = dx.speculate(model, ids, gen_length=6, eos_id=-1).responses
    theirs = hf_model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert [response.tolist() for response in ours] == theirs[:, 9:].tolist()
    models.save(model, tmp_path / "text")  # which is no model that sees images
    alone = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "text")
    torch.testing.assert_close(alone(ids).logits, expected, atol=2e-6, rtol=0)


def test_as_released_in_8_bits(tmp_path: Path) -> None:
    hf_model = mistral3(tied=False).bfloat16()
    expected = write(tmp_path, hf_model, STATIC, WHOLE, end="_scale_inv", flat=True)
    state = models.load(tmp_path).state_dict()
    assert len(expected) == 14
    for name, tensor in expected.items():
        assert torch.equal(state[name.replace("model.language_model", "model")], tensor.bfloat16())


def test_an_adapter_of_a_model_that_sees_images() -> None:
    peft = pytest.importorskip("peft")
    hf_model, ids = mistral3(tied=True), torch.randint(11, 90, (1, 7))
    lora = peft.LoraConfig(target_modules=r".*language_model.*q_proj", r=2, init_lora_weights=False)
    adapted = peft.get_peft_model(hf_model, lora).eval()
    torch.testing.assert_close(models.wrap(adapted)(ids).logits, adapted(ids).logits, atol=2e-6, rtol=0)


def test_without_its_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral3", "text_config": None}))
    with pytest.raises(ValueError, match=r"path: .*config\.json: text_config=None, expected an object"):
        models.load(tmp_path)
