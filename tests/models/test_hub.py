"""Models of the Hugging Face Hub: found, fetched, or named."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from dparallel import registry
from test_checkpoint import TENSORS, Q, write

from dparallel_ext import models
from dparallel_ext.models import files


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[Any]]:
    """A stand-in for huggingface_hub, whose cache is `snapshot`; what it was asked for, or what it raises."""
    asked: list[Any] = []

    def snapshot_download(name: str, *, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        if name == "GSAI-ML/LLaDA-8B-Instruct":
            return str(tmp_path / "snapshot")
        raise ConnectionError("Cannot reach the Hub:\n  HF_HUB_OFFLINE=1 is set")

    module = ModuleType("huggingface_hub")
    module.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    monkeypatch.chdir(tmp_path)
    files.fetched.cache_clear()
    yield asked
    files.fetched.cache_clear()


def test_a_model_of_the_hub(hub: list[Any], tmp_path: Path) -> None:
    write(tmp_path / "snapshot")
    shutil.copy(registry.directory_of("builtin:student") / "tokenizer.json", tmp_path / "snapshot")
    model = models.load("GSAI-ML/LLaDA-8B-Instruct")
    assert torch.equal(model.state_dict()[Q], TENSORS[Q])
    same, _ = registry.load("GSAI-ML/LLaDA-8B-Instruct")
    assert same.mask_id == 511
    assert registry.directory_of("GSAI-ML/LLaDA-8B-Instruct") == tmp_path / "snapshot"
    ((name, patterns),) = hub  # asked once
    assert name == "GSAI-ML/LLaDA-8B-Instruct"
    files_there = ["config.json", "model-00001-of-00006.safetensors", "vocab.json", "merges.txt"]
    others = ["pytorch_model.bin", "model.gguf", "original/consolidated.safetensors", "README.md"]
    for file in files_there + others:
        assert any(fnmatch(file, pattern) for pattern in patterns) is (file in files_there), file


def test_a_directory_comes_before_the_hub(hub: list[Any], tmp_path: Path) -> None:
    (tmp_path / "GSAI-ML").mkdir()
    write(tmp_path / "GSAI-ML" / "LLaDA-8B-Instruct")
    assert models.load("GSAI-ML/LLaDA-8B-Instruct").mask_id == 511
    for name in ("nowhere", "a/b/c", "/a/b", "./a/b", "../a", "a/b?", "~/b"):
        with pytest.raises(FileNotFoundError, match="no directory"):
            models.load(name)
    with pytest.raises(
        FileNotFoundError, match=r"expected a checkpoint's directory, got the file .*config\.json"
    ):
        models.load("GSAI-ML/LLaDA-8B-Instruct/config.json")
    with pytest.raises(
        FileNotFoundError, match=r"builtin:student; dparallel\.registry\.load loads the models that ship"
    ):
        models.load("builtin:student")
    with pytest.raises(FileNotFoundError, match=r"no directory ~/b; ~ .* os\.path\.expanduser"):
        models.load("~/b")
    assert not hub


def test_a_folder_of_the_hub_s_cache_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "snapshots").mkdir()
    write(tmp_path / "snapshots" / "1")
    with pytest.raises(FileNotFoundError, match=r"no config\.json in .* the folders in snapshots$"):
        models.load(tmp_path)
    assert models.load(tmp_path / "snapshots" / "1").mask_id == 511


def test_without_a_network_the_error_says_how_to_get_it(hub: list[Any]) -> None:
    said = (
        r"no directory some/model, and the Hugging Face Hub did not give .*ConnectionError: Cannot reach the "
        r"Hub: HF_HUB_OFFLINE=1 is set\. `hf download some/model --local-dir DIR`"
    )
    for _ in range(2):  # it may work the next time
        with pytest.raises(FileNotFoundError, match=said):
            models.load("some/model")
    with pytest.raises(FileNotFoundError, match=rf"model: 'some/model' is neither .*{said}"):
        registry.load("some/model")
    assert len(hub) == 3


def test_without_the_package_too(monkeypatch: pytest.MonkeyPatch, hub: list[Any]) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    said = r"no directory some/model\. .*`pip install huggingface_hub`.*`hf download some/model"
    with pytest.raises(FileNotFoundError, match=said):
        models.load("some/model")
