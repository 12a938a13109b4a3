"""Checkpoints with faults: each becomes a model that computes, or an error of ours that names it."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import golden
from dparallel import registry, text
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext import models

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}\n{% endfor %}"
SPECIAL = {"<|endoftext|>": 500, "<|im_end|>": 501, "<|mask|>": 511}
KINDS = ["llada", "sharded", "dream", "sdar", "fast", "llama"]
ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 32}


def put(directory: Path, name: str, content: Any) -> None:
    said = content if isinstance(content, str) else json.dumps(content)
    (directory / name).write_text(said, encoding="utf-8")


def byte_level(directory: Path, decoder: bool) -> None:
    """The files of Qwen2's tokenizer: 256 bytes and two merges."""
    words = [*sorted(ByteLevel.alphabet()), "he", "hel"]
    put(directory, "vocab.json", {word: i for i, word in enumerate(words)})
    put(directory, "merges.txt", "#version: 0.2\nh e\nhe l\n")
    roles = {"eos_token": "<|endoftext|>", "mask_token": "<|mask|>"}
    config: dict[str, Any] = {"tokenizer_class": "Qwen2Tokenizer"}
    if decoder:
        listed = {str(i): {"content": t, "special": True, "lstrip": False} for t, i in SPECIAL.items()}
        config |= {"added_tokens_decoder": listed, "chat_template": TEMPLATE, **roles}
    else:
        put(directory, "added_tokens.json", SPECIAL)
        more = {"additional_special_tokens": ["<|im_end|>"]}
        put(directory, "special_tokens_map.json", {**roles, **more})
    put(directory, "tokenizer_config.json", config)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each family, and one in shards, with all the files that are read."""
    made = {}
    for kind in KINDS:
        directory = made[kind] = tmp_path_factory.mktemp(kind)
        family = {"sharded": "llada", "fast": "dream", "llama": "dream"}.get(kind, kind)
        tensors = golden.tensors(f"{family}_tiny_a")
        config = golden.json(f"{family}_tiny_a", "config")
        put(directory, "generation_config.json", {"eos_token_id": [1, 500], "mask_token_id": 511})
        if family == "llada":
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(registry.BUILTIN / "student" / name, directory)
            put(directory, "chat_template.jinja", TEMPLATE)
        else:
            byte_level(directory, decoder=kind != "dream")
        if kind == "fast":
            config |= {"model_type": "Fast_dLLM_Qwen", "bd_size": 8}
            put(directory, "chat_template.json", {"chat_template": {"default": TEMPLATE, "tool_use": "x"}})
        if kind == "llama":
            config |= {"model_type": "llama", "rope_scaling": ROPE, "attention_bias": False}
            tensors = {name: t for name, t in tensors.items() if not name.endswith("bias")}
        put(directory, "config.json", config)
        if kind == "sharded":
            names = sorted(tensors)
            parts = {f"model-{i}.safetensors": names[i::2] for i in (0, 1)}
            for file, held in parts.items():
                save_file({name: tensors[name] for name in held}, directory / file)
            index = {name: file for file, held in parts.items() for name in held}
            put(directory, "model.safetensors.index.json", {"metadata": {}, "weight_map": index})
        else:
            save_file(tensors, directory / "model.safetensors")
    return made


# --- what is done to them -----------------------------------------------------------------------


def hostile(rng: random.Random) -> Any:
    deep: Any = 1
    for _ in range(rng.choice([1, 50])):
        deep = rng.choice([[deep], {"a": deep}])
    return rng.choice(
        [0, -1, 1, 2, 3, 7, 8, 64, 255, 511, 512, 4097, 10**9, 2**31, 2**32, 2**63, 10**30, -(2**63), 10**400,
         0.5, 1.0, -0.0, 1e-300, 1e300, float("nan"), float("inf"), -float("inf"),
         None, True, False, "", "4", "x", "a" * 300, "\u2028\ud800", "../config.json", "/etc/passwd", "..",
         [], [1], [1, "x"], [[1]], [None], {}, {"a": 1}, {"content": 3}, deep]
    )  # fmt: skip


def change(rng: random.Random, content: Any) -> Any:
    """`content` with one part of it replaced, removed, added or taken from elsewhere."""
    if not isinstance(content, dict | list) or not content or rng.random() < 0.02:
        return hostile(rng)
    keys = list(content) if isinstance(content, dict) else list(range(len(content)))
    key = rng.choice(keys)
    deeper = isinstance(content[key], dict | list) and content[key]
    if deeper and rng.random() < 0.85:
        content[key] = change(rng, content[key])
        return content
    match rng.randrange(7):
        case 0:
            del content[key]
        case 1 if isinstance(content, dict):
            content[str(hostile(rng))[:50] if rng.random() < 0.5 else key + "x"] = content.pop(key)
        case 2:
            content[key] = content[rng.choice(keys)]
        case _:
            content[key] = hostile(rng)
    return content


def change_json(rng: random.Random, file: Path) -> None:
    content = change(rng, json.loads(file.read_text()))
    said = json.dumps(content)
    if rng.random() < 0.05 and isinstance(content, dict) and content:
        said = said[:-1] + f", {json.dumps(rng.choice(list(content)))}: {json.dumps(hostile(rng))}}}"
    file.write_text(said)


def change_bytes(rng: random.Random, file: Path) -> None:
    content = bytearray(file.read_bytes())
    at = rng.randrange(len(content) + 1)
    match rng.randrange(6):
        case 0:
            del content[at:]
        case 1:
            content[at : at + 1] = rng.randbytes(rng.choice([1, 4, 100]))
        case 2:
            content[at:at] = rng.randbytes(rng.choice([1, 8]))
        case 3:
            del content[at : at + rng.choice([1, 10, 1000])]
        case 4:
            content[:] = rng.choice(
                [
                    b"",
                    b"\0" * 100,
                    b"\xff\xfe{\0}\0",
                    b"\xef\xbb\xbf{}",
                    b"[" * 100_000,
                    b"version https://git-lfs.github.com/spec/v1\n",
                    b"1" * 10_000,
                    b"null",
                ]
            )
        case 5:
            for _ in range(rng.choice([1, 3, 20])):
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def change_place(rng: random.Random, file: Path) -> None:
    """Something that is no file in the file's place."""
    file.unlink()
    match rng.randrange(5):
        case 0:
            file.mkdir()
        case 1:
            file.symlink_to(file)
        case 2:
            file.symlink_to("nowhere")
        case 3:
            os.mkfifo(file)
        case 4:
            file.symlink_to("/dev/zero")


def change_header(rng: random.Random, file: Path) -> None:
    content = file.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header, body = content[8 : 8 + size], content[8 + size :]
    if rng.random() < 0.9:
        found = json.loads(header)
        names = [name for name in found if name != "__metadata__"]
        name = rng.choice(names)
        match rng.randrange(5):
            case 0:
                found[name]["dtype"] = rng.choice(
                    ["BF16", "F16", "F64", "F8_E4M3", "I64", "BOOL", "F4", "x", 3]
                )
            case 1:
                found[name]["shape"] = rng.choice(
                    [[], [0], [2**62, 4], [0, 2**62], [-1], [1] * 70, "x", None]
                )
            case 2:
                found[name]["data_offsets"] = found[rng.choice(names)]["data_offsets"]
            case 3:
                found[rng.choice([*names, "more.weight", "a" * 300])] = found.pop(name)
            case _:
                found = change(rng, found)
        header = json.dumps(found).encode()
        size = len(header)
    else:
        size = rng.choice([0, 1, size - 1, size + 1, 2**32, 2**63, 2**64 - 1, len(content)])
    file.write_bytes(struct.pack("<Q", size) + header + body)


def change_body(rng: random.Random, file: Path) -> None:
    content = bytearray(file.read_bytes())
    (size,) = struct.unpack("<Q", content[:8])
    length = rng.choice([4, 400, 40_000])
    at = 8 + size + 4 * rng.randrange((len(content) - 8 - size - length) // 4)
    value = rng.choice([float("nan"), float("inf"), -float("inf"), 3e38, 1e-42, 0.0])
    content[at : at + length] = struct.pack("<f", value) * (length // 4)
    file.write_bytes(content)


def damage(rng: random.Random, directory: Path) -> str:
    """Change one file in the directory, by a way that goes with it; the change in words."""
    file = rng.choice(sorted(directory.iterdir()))
    weights = file.suffix == ".safetensors"
    ways: list[Callable[[random.Random, Path], None]] = [change_bytes]
    ways += 4 * [change_json] if file.suffix == ".json" else []
    ways += [change_header, change_header, change_body] if weights else []
    ways += [change_place] if rng.random() < 0.3 else []
    way = rng.choice(ways)
    whole = file.read_bytes()  # the file is a link to the sound one
    file.unlink()
    file.write_bytes(whole)
    way(rng, file)
    return f"{way.__name__}({file.name})"


# --- what must come of it -----------------------------------------------------------------------


@contextmanager
def bounded(seconds: int, megabytes: int) -> Iterator[None]:
    """Within it, memory beyond what the process has now is scarce, and time too."""

    def late(*_: object) -> None:
        raise AssertionError(f"it takes more than {seconds} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + megabytes * 2**20, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def decoded(directory: Path) -> tuple[models.Model, Tensor]:
    """The model, and what it makes of a prompt."""
    name = str(directory)
    model, tokenizer = registry.load(name)
    encode = text.prompt_encoder(tokenizer, registry.template_of(name))
    length = min(8, registry.traits_of(name).default_block_length)
    prompt = torch.tensor([encode("hello 3")[:20] or [0]])
    if model.causal:  # which is not decoded here
        return model, torch.cat((prompt, model(prompt).logits.argmax(-1)), 1)
    out = dx.decode(model, prompt, gen_length=length, block_length=length, eos_id=model.eos_ids)
    tokenizer.decode(out.sequences[0].tolist())
    return model, out.sequences


@pytest.mark.parametrize("kind", KINDS)
def test_one_fault(kind: str, sound: dict[str, Path], attack: Any, tmp_path: Path) -> None:
    where = tmp_path / "checkpoint"
    known = [
        str(where),
        "chat template of checkpoint",
        "prompt: expected token ids",
        "input_ids: expected ids",
    ]
    for rng in attack.cases(40):
        shutil.rmtree(where, ignore_errors=True)
        where.mkdir()
        for file in sound[kind].iterdir():
            (where / file.name).symlink_to(file)
        done, error = damage(rng, where), None
        try:
            with bounded(20, 1500):
                model, sequences = decoded(where)
        except BaseException as caught:
            error = caught
        if error is None:
            assert model.causal or not bool((sequences[:, -4:] == model.mask_id).any()), done
            continue
        weights = ["NaN", "finite"] if "safetensors" in done else []  # found by decode, row by row
        ours = type(error) in (ValueError, FileNotFoundError)
        if not (ours and any(part in str(error) for part in known + weights)):
            raise AssertionError(f"{done}: {error!r:.300}") from error


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_fault_each_decodes(kind: str, sound: dict[str, Path]) -> None:
    model, sequences = decoded(sound[kind])
    assert sequences.shape[1] > 8
    assert model.mask_id == json.loads((sound[kind] / "config.json").read_text())["mask_token_id"]
