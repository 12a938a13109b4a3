"""Checkpoints in several files, and what lies beside weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dparallel import registry
from drafters import model_of
from safetensors.torch import load_file, save_file
from test_checkpoint import TENSORS, Q, put, write
from torch import Tensor

from dparallel_ext import models, speculation
from dparallel_ext.models import Model, files


def test_a_snapshot_of_links_as_the_hub_s_cache_has_them(tmp_path: Path) -> None:
    blobs, snapshot = write(tmp_path / "blobs"), tmp_path / "snapshots" / "1"
    (blobs / "model.safetensors").unlink()
    names = sorted(TENSORS)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    index = {name: file for file, held in parts.items() for name in held}
    shard(blobs, {file: {name: TENSORS[name] for name in held} for file, held in parts.items()}, index)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(blobs.iterdir())):
        file.rename(blobs / f"{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert torch.equal(models.load(snapshot).state_dict()[Q], TENSORS[Q])


@pytest.mark.parametrize(
    "cut",
    [
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json"),
        *("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"),
    ],
)
def test_a_link_that_leads_nowhere_is_named(cut: str, tmp_path: Path) -> None:
    """A download was cut short: without the file it would be a checkpoint with other ends or prompts."""
    source, snapshot = registry.directory_of("builtin:student"), tmp_path / "snapshot"
    snapshot.mkdir()
    for file in source.iterdir():
        if file.name != cut:
            (snapshot / file.name).symlink_to(file)
    (snapshot / cut).symlink_to("../blobs/1")
    said = rf"{cut} is a link to \.\./blobs/1, which is not there; was a download cut short\?"
    read = registry.template_of if cut == "chat_template.jinja" else registry.load
    with pytest.raises(FileNotFoundError, match=rf"^model: .*snapshot/{said}"):
        read(str(snapshot))
    if cut in ("config.json", "model.safetensors"):
        with pytest.raises(FileNotFoundError, match=f"^path: .*{cut} is a link to"):
            models.load(snapshot)
        with pytest.raises(FileNotFoundError, match=f"^path: .*{cut} is a link to"):
            speculation.load(snapshot)


def shard(directory: Path, shards: dict[str, dict[str, Tensor]], index: dict[str, str]) -> None:
    for name, tensors in shards.items():
        save_file(tensors, directory / name)
    put(directory, "model.safetensors.index.json", {"weight_map": index})


def test_shards_hold_what_the_index_says(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    names = sorted(TENSORS)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    index = {name: file for file, held in parts.items() for name in held}
    shards = {file: {name: TENSORS[name] for name in held} for file, held in parts.items()}
    # A stale copy in the other shard, which would be read last.
    shards["b.safetensors"][names[0]] = torch.zeros_like(TENSORS[names[0]])
    shard(tmp_path, shards, index)
    assert torch.equal(models.load(tmp_path).state_dict()[names[0]], TENSORS[names[0]])
    del shards["a.safetensors"][names[2]]
    shard(tmp_path, shards, index)
    with pytest.raises(ValueError, match=f"{names[2]} is missing"):
        models.load(tmp_path)
    shards["a.safetensors"][names[2]] = TENSORS[names[2]]
    for wrong in ("../a.safetensors", "/a.safetensors", "..", "", "sub/a.safetensors", 3, None):
        shard(tmp_path, shards, {**index, names[0]: wrong})  # type: ignore[dict-item]
        with pytest.raises(ValueError, match=r"index\.json names .*, expected a file beside it"):
            models.load(tmp_path)
    for nowhere in ("c.safetensors", "x" * 300, "a\0b"):
        shard(tmp_path, shards, {**index, names[0]: nowhere})
        with pytest.raises(FileNotFoundError, match=r"index\.json names '.*, not in "):
            models.load(tmp_path)
    del index[names[0]]
    shard(tmp_path, shards, index)
    with pytest.raises(ValueError, match=f"b.safetensors and a.safetensors both hold {names[0]}"):
        models.load(tmp_path)


def test_one_file_comes_before_shards(tmp_path: Path) -> None:
    """As transformers reads them: the index may be that of an older save."""
    write(tmp_path)
    older = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
    shard(tmp_path, {"a.safetensors": older}, dict.fromkeys(TENSORS, "a.safetensors"))
    assert torch.equal(models.load(tmp_path).state_dict()[Q], TENSORS[Q])


def test_what_git_and_torch_left_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    put(tmp_path, "model.safetensors", pointer)
    with pytest.raises(ValueError, match=r"model\.safetensors is a Git LFS pointer; `git lfs pull`"):
        models.load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    put(tmp_path, "model-Q4_K_M.gguf", "")
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors .*; model-Q4_K_M\.gguf is not read"):
        models.load(tmp_path)
    (tmp_path / "model-Q4_K_M.gguf").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors .*; pytorch_model\.bin is not read"):
        models.load(tmp_path)
    put(tmp_path, "config.json", '{"model_type": ["llada"]}')
    with pytest.raises(ValueError, match="is none of"):
        models.load(tmp_path)
    put(tmp_path, "added_tokens.json", {"<|mask|>": "x"})
    with pytest.raises(ValueError, match=r"added_tokens\.json does not list its added tokens"):
        files.mask_token_id(tmp_path)


def test_a_tied_head_that_is_gathered_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor asked for."""
    model, head = model_of("llama", tie_word_embeddings=True), "lm_head.weight"
    monkeypatch.setattr(Model, "sharded", True)
    gathered = model.state_dict()
    assert head in gathered
    for state in (gathered, {name: tensor for name, tensor in gathered.items() if name != head}):
        models.save(model, tmp_path, state_dict=state)
        assert load_file(tmp_path / "model.safetensors").keys() == gathered.keys() - {head}
