"""Models by their names, and the dtype that they are loaded in."""

from __future__ import annotations

import json
import shutil
import time
import timeit
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from dparallel import evaluate, registry
from dparallel.problems import from_file
from dparallel.toy import tasks

from dparallel_ext import backends


def test_a_verifier_of_other_tokens_is_named():
    class Tokens(NamedTuple):
        words: dict[str, int]

        def get_vocab(self) -> dict[str, int]:
            return self.words

    model, tokenizer = registry.load("builtin:student")
    words = tokenizer.get_vocab()
    assert registry.load_verifier(registry.VERIFIER, model, tokenizer).causal
    names = {at: word for word, at in words.items()}
    swapped = {**words, names[7]: 8, names[8]: 7}
    with pytest.raises(ValueError, match=f"verifier: token 7 of builtin:verifier is '{names[7]}', and the"):
        registry.load_verifier(registry.VERIFIER, model, Tokens(swapped))
    for dtype in (torch.float32, torch.bfloat16):
        assert registry.load_verifier(registry.VERIFIER, model.to(dtype), tokenizer).dtype == dtype
    beyond = {**words, "more": len(words)}  # which the verifier does not have
    assert registry.load_verifier(registry.VERIFIER, model, Tokens(beyond)).causal


def test_models_are_found_by_name_or_path(tmp_path: Path):
    assert {registry.DEFAULT, registry.VERIFIER} <= {*registry.builtins()}
    assert registry.directory_of("builtin:teacher") == registry.directory_of(
        str(registry.BUILTIN / "teacher")
    )
    with pytest.raises(FileNotFoundError, match=r"model: 'builtin:nobody' .*builtin:teacher"):
        registry.load("builtin:nobody")
    with pytest.raises(FileNotFoundError, match="model: "):
        registry.load(str(tmp_path))


def test_the_end_that_the_tokenizer_alone_names(tmp_path: Path):
    """Commands measure and learn from texts up to the end at which `decode` and the server stop."""
    shutil.copytree(registry.directory_of("builtin:causal"), tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    for end, ends in ((None, (1,)), ([5], (5, 1)), ([5, 1], (5, 1))):
        (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": end}))
        model, _ = registry.load(tmp_path)
        assert (model.eos_id, model.eos_ids) == (ends[0], ends)
    (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    row = evaluate.evaluate_drafter(str(tmp_path), None, problems=from_file(data(tmp_path), gen_length=64))
    assert (row["accuracy"], row["nfe_mean"] < 64) == (1.0, True)


def data(directory: Path) -> Path:
    """A file of a problem."""
    problem = next(tasks.problems("held_out"))
    file = directory / "data.jsonl"
    file.write_text(json.dumps({"prompt": problem.prompt, "answer": f"#### {problem.answer}"}))
    return file


@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.jinja", "generation_config.json"])
def test_a_file_of_the_tokenizer_that_cannot_be_read_is_the_models(name: str, tmp_path: Path):
    shutil.copytree(registry.directory_of("builtin:causal"), tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_bytes(b"\xff")
    read = registry.template_of if name == "chat_template.jinja" else registry.load
    with pytest.raises(ValueError, match=f"^model: .*{name} is not UTF-8"):
        read(str(tmp_path))


def test_bfloat16_is_fast_where_a_clock_says_so():
    """It takes half of float32's time or less with instructions for it, and five times or more without."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.ones(256, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
        # Of the processor: what else runs here does not count.
        timer = timeit.Timer(lambda x=x, w=weight: F.linear(x, w), timer=time.process_time)
        seconds[dtype] = min(timer.repeat(number=4, repeat=7))
    assert backends.fast_bfloat16("cpu") == (seconds[torch.bfloat16] < 2 * seconds[torch.float32])


def test_an_empty_device_is_none():
    for call in (backends.fast_bfloat16, backends.warn_without_kernels):
        with pytest.raises(RuntimeError, match="Device string must not be empty"):
            call("")


def test_models_that_ship_are_in_the_dtype_that_is_fast(monkeypatch: pytest.MonkeyPatch):
    """A CPU without bfloat16 products would take longer; a dtype that is given is obeyed."""
    for fast, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(backends, "fast_bfloat16", lambda device=None, fast=fast: fast)
        assert registry.load("builtin:student")[0].dtype == dtype
    assert registry.load("builtin:student", dtype=torch.bfloat16)[0].dtype == torch.bfloat16
    directory = str(registry.directory_of("builtin:student"))
    assert registry.load(directory)[0].dtype == torch.bfloat16  # a checkpoint of one's own is as it is


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not JSON"),
        ('{"model_type": ["llada"]}', r"config\.json: model_type \['llada'\] is none of"),
        ('{"model_type": "llada", "n_heads": 2}', r"config\.json: '\w+' is missing"),
    ],
)
def test_a_config_that_names_no_model_is_an_error_by_name(content: str, said: str, tmp_path: Path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=rf"^model: .*{said}"):
        registry.traits_of(str(tmp_path))


def test_weights_that_cannot_be_read_are_an_error_by_name(tmp_path: Path):
    shutil.copytree(registry.directory_of("builtin:verifier"), tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"^model: .*model\.safetensors is not a readable safetensors file"):
        registry.load(tmp_path)
    with pytest.raises(ValueError, match=r"^model: .*is not a readable safetensors file"):
        registry.Loading().dtype_for(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"^model: no model\.safetensors"):
        registry.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"^verifier: no model\.safetensors"):
        registry.load_verifier(str(tmp_path), *registry.load("builtin:teacher"))
