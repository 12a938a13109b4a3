"""Checkpoints, configs and inputs that models refuse by name."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import golden
from test_models import both, config_of, ids, write

import dparallel_ext as dx
from dparallel_ext import models
from dparallel_ext.cache import Span
from dparallel_ext.models import Dream, LLaDA, Model


@both
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", "{name} is missing"),
        ("extra", "more.weight is unexpected"),
        ("misshapen", r"{name} is \(2, 3\), expected \(64, 64\)"),
        ("integer", "{name} is I8, expected a floating-point type"),
    ],
)
def test_tensor_that_does_not_fit(name: str, change: str, message: str, tmp_path: Path) -> None:
    tensors = golden.tensors(name)
    key = {
        "llada_tiny_a": "model.transformer.blocks.2.q_proj.weight",
        "dream_tiny_a": "model.layers.2.self_attn.q_proj.weight",
    }[name]
    if change == "missing":
        del tensors[key]
    elif change == "extra":
        tensors["more.weight"] = torch.zeros(1)
    elif change == "misshapen":
        tensors[key] = torch.zeros(2, 3)
    else:
        tensors[key] = tensors[key].to(torch.int8)
    with pytest.raises(ValueError, match=message.format(name=key)) as caught:
        models.load(write(tmp_path, config_of(name), tensors))
    assert str(tmp_path) in str(caught.value)


def test_many_faults_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path, config_of("llada_tiny_a"), {"a": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"does not fit LLaDA: .* is missing; and 26 more"):
        models.load(path)


def test_unreadable(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no directory .*nowhere"):
        models.load(tmp_path / "nowhere")
    for value in (None, 3):
        with pytest.raises(ValueError, match=f"path: expected a directory or ORG/NAME, got {value}"):
            models.load(value)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match=r"no config\.json in .*[^e]$"):
        models.load(tmp_path)
    gguf = tmp_path / "model.gguf"
    gguf.touch()
    for path in (gguf, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"; model\.gguf is not read, save_pretrained of transf"):
            models.load(path)
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(
        FileNotFoundError, match=r"no config\.json in .*, but an adapter, which `dparallel merge`"
    ):
        models.load(tmp_path)
    shutil.copy(golden.home / "llada_tiny_a" / "config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        models.load(tmp_path)
    whole = (golden.home / "llada_tiny_a" / "model.safetensors").read_bytes()
    for size in (0, 5, 1000, len(whole) - 1):
        (tmp_path / "model.safetensors").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"model\.safetensors is not a readable"):
            models.load(tmp_path)
    for content, message in (("{", "is not JSON"), ("[]", "holds a list")):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            models.load(tmp_path)


def test_what_is_no_dtype_and_no_model_is_named(tmp_path: Path) -> None:
    model = golden.model("llada_tiny_a")
    for dtype in (torch.int8, "bfloat16"):
        said = f"dtype: expected a floating-point type such as torch.bfloat16, got {dtype!r}"
        with pytest.raises(ValueError, match=said):
            golden.model("llada_tiny_a", dtype=dtype)
        with pytest.raises(ValueError, match=said):
            models.save(model, tmp_path / "saved", dtype=dtype)
    with pytest.raises(ValueError, match=r"model: expected one of dparallel_ext\.models, got Linear"):
        models.save(torch.nn.Linear(1, 1), tmp_path / "saved")
    with pytest.raises(ValueError, match="state_dict: expected Mapping, got list"):
        models.save(model, tmp_path / "saved", state_dict=[])  # type: ignore[arg-type]
    state = model.state_dict()
    name = min(state)
    for tensors, said in (
        ({}, f"expected the model's tensors, but {name} is missing; "),
        ({**state, "another": state[name]}, "expected the model's tensors, but another is unexpected"),
    ):
        with pytest.raises(ValueError, match=f"state_dict: {said}"):
            models.save(model, tmp_path / "saved", state_dict=tensors)
    assert not (tmp_path / "saved").exists() or not [*(tmp_path / "saved").iterdir()]
    models.save(model, tmp_path / "again", state_dict={**state, name: state[name] + 1})
    assert torch.equal(models.load(tmp_path / "again").state_dict()[name], state[name] + 1)
    assert not (tmp_path / "saved").exists()
    with pytest.raises(ValueError, match="device: expected cpu, cuda or cuda:N, got '9223372036854775808'"):
        golden.model("llada_tiny_a", device=2**63)


def test_none_in_place_of_a_model_is_named(tmp_path: Path) -> None:
    for call in (
        lambda: dx.decode(None, [1]),
        lambda: dx.speculate(None, [1]),
        lambda: dx.adaptive_decode(None, [1], verifier=None),
        lambda: dx.compat.generate(None, torch.tensor([1])),
        lambda: dx.Engine(None),  # type: ignore[arg-type]
        lambda: models.save(None, tmp_path),  # type: ignore[arg-type]
        lambda: models.traits(None),
    ):
        with pytest.raises(ValueError, match=r"^model: expected .*, got NoneType"):
            call()
    with pytest.raises(ValueError, match=r"hf_model: NoneType has no \.config"):
        models.wrap(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"drafter: expected one of .*, got NoneType"):
        dx.speculation.ModelDrafter(None)


def test_weights_that_are_elsewhere_are_those_of_the_argument() -> None:
    with torch.device("meta"):
        away = Dream(config_of("dream_tiny_a"))
    with pytest.raises(ValueError, match="drafter: expected all its weights in this process"):
        dx.speculation.ModelDrafter(away)
    with pytest.raises(ValueError, match="verifier: expected all its weights in this process"):
        dx.adaptive_decode(golden.model("llada_tiny_a"), [1], verifier=away)
    with pytest.raises(ValueError, match="hf_model: expected all its weights in this process"):
        models.wrap(away)


@pytest.mark.parametrize("model_type", ["mamba", None, "dream"])
def test_unknown_model_type(model_type: str | None, tmp_path: Path) -> None:
    path = write(tmp_path, config_of("llada_tiny_a", model_type=model_type), {})
    known = re.escape(str(list(models.FAMILIES)))
    message = rf"model_type {model_type!r} is none of {known}"
    with pytest.raises(ValueError, match=message):
        models.load(path)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        (LLaDA, {"alibi": True}, "alibi=True"),
        (LLaDA, {"rope": False}, "rope=False"),
        (LLaDA, {"activation_type": "swiglu"}, "activation_type='swiglu'"),
        (LLaDA, {"block_type": "sequential"}, "block_type='sequential'"),
        (LLaDA, {"block_group_size": 3}, "block_group_size=3"),
        (LLaDA, {"layer_norm_type": "default"}, "layer_norm_type='default'"),
        (LLaDA, {"layer_norm_with_affine": False}, "layer_norm_with_affine=False"),
        (LLaDA, {"attention_layer_norm": True}, "attention_layer_norm=True"),
        (LLaDA, {"input_emb_norm": True}, "input_emb_norm=True"),
        (LLaDA, {"n_kv_heads": 3}, "3 key heads do not divide 4 heads"),
        (LLaDA, {"n_heads": 64}, "expected heads of even size, got 1"),
        (LLaDA, {"embedding_size": 500}, "500 embedding rows"),
        (LLaDA, {"mask_token_id": 512}, "mask_token_id=512, expected an id below 512"),
        (LLaDA, {"mask_token_id": True}, "mask_token_id=True, expected an id below 512"),
        (LLaDA, {"eos_token_id": []}, r"eos_token_id=\[\]"),
        (LLaDA, {"eos_token_id": ["x"]}, r"eos_token_id=\['x'\]"),
        (LLaDA, {"n_heads": None}, "'n_heads' is null"),
        (LLaDA, {"d_model": "64"}, "d_model='64', expected a whole number >= 1"),
        (LLaDA, {"rope_theta": 0}, "rope_theta=0, expected a number >= 1"),
        (Dream, {"vocab_size": None}, "'vocab_size' is null"),
        (Dream, {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        (Dream, {"use_sliding_window": True}, "use_sliding_window=True"),
        (Dream, {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling of type 'yarn'"),
        (Dream, {"rope_parameters": {"rope_type": "linear"}}, "rope_parameters of type 'linear'"),
    ],
    ids=str,
)
def test_config_that_is_not_supported(family: type[Model], changes: dict[str, Any], message: str) -> None:
    name = "llada_tiny_a" if family is LLaDA else "dream_tiny_a"
    with pytest.raises(ValueError, match=f"config: .*{message}"):
        family(config_of(name, **changes))


@pytest.mark.parametrize("key", ["n_layers", "block_type", "rope", "include_bias", "weight_tying"])
def test_config_that_lacks_a_key(key: str) -> None:
    config = config_of("llada_tiny_a")
    del config[key]
    with pytest.raises(ValueError, match=f"config: '{key}' is missing"):
        LLaDA(config)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([[1, 2]], TypeError, "input_ids: expected a Tensor, got list"),
        (torch.zeros(3, dtype=torch.int64), ValueError, r"expected int64 \(B, L\)"),
        (torch.zeros(1, 3), ValueError, r"got torch\.float32 \(1, 3\)"),
        (torch.tensor([[1, 512]]), ValueError, r"expected ids in \[0, 512\), got 512"),
        (torch.tensor([[-7, 3]]), ValueError, r"expected ids in \[0, 512\), got -7"),
    ],
)
def test_bad_input_ids(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        golden.model("llada_tiny_a")(given)


@torch.no_grad()
def test_bad_positions() -> None:
    model = golden.model("llada_tiny_a")
    cache = model.new_cache(2, 8)
    for start, end, visible in ((-1, 4, 8), (5, 9, 8), (9, 10, 8), (4, 8, 9)):
        with pytest.raises(ValueError, match="exceed the cache of 8"):
            cache.metadata([Span(0, start, end, visible)])
    with pytest.raises(ValueError, match="sequence 2, but the cache is for 2"):
        cache.metadata([Span(2, 0, 4, 8)])
    metadata = cache.metadata([Span(0, 0, 4, 8), Span(1, 2, 3, 8)])
    with pytest.raises(ValueError, match=r"input_ids: expected \(5,\), got \(4,\)"):
        model.step(ids(1, 4)[0], cache, metadata)
    with pytest.raises(ValueError, match=r"input_ids: expected int64 \(N,\)"):
        model.step(ids(1, 5), cache, metadata)


def test_bad_attention_masks() -> None:
    model = golden.model("llada_tiny_a")
    for mask in (torch.ones(1, 4), torch.ones(2, 3, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"attention_mask: expected bool or whole numbers \(2, 4\)"):
            model(ids(2, 4), attention_mask=mask)
    with pytest.raises(ValueError, match="a visible position in every row, got none in row 1"):
        model(ids(2, 4), attention_mask=torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0]]))
    with pytest.raises(TypeError, match="attention_mask: expected a Tensor, got list"):
        model(ids(2, 4), attention_mask=[[1, 1, 1, 1]] * 2)


def test_ids_out_of_range_are_named_whatever_embeds_them() -> None:
    """An embedding of a user's own may take negative ids from its end, and has other errors for others."""

    class Table(torch.nn.Embedding):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return self.weight[input]

    model = LLaDA(config_of("llada_tiny_a"))
    size, width = model.embed.weight.shape
    for table in (model.embed, Table(size, width), torch.nn.Embedding(size + 8, width)):
        model.embed = table
        for wrong in (-1, size):
            for dtype in (torch.int64, torch.int32):
                with pytest.raises(
                    ValueError, match=rf"input_ids: expected ids in \[0, {size}\), got {wrong}"
                ):
                    model(torch.tensor([[1, wrong]], dtype=dtype))
        assert model(torch.zeros(2, 0, dtype=torch.int64)).logits.shape == (2, 0, model.shape.vocab_size)
