"""The files of a checkpoint: finding, reading and writing them."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..whole_files import PARTIAL, as_path, flush, in_turn, replacing

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""ORG/NAME, the form of a model's name on the Hugging Face Hub."""
NEEDED = [
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "*.py",  # never run here; a student that is trained from the checkpoint is shipped with it
]
"""The files that are fetched from the Hub."""
MASK_TOKENS = ("<|mdm_mask|>", "<|mask|>", "<|MASK|>", "|<MASK>|", "[MASK]", "<mask>")
"""Mask tokens of released tokenizers that do not declare their mask token."""


def locate(path: str | Path) -> Path:
    """The directory of a checkpoint: `path`, or a snapshot of the Hugging Face Hub's model of this name.

    A directory always comes first. `huggingface_hub`, if installed, takes a snapshot from its cache or
    fetches it, and follows HF_HUB_OFFLINE, HF_HOME and HF_TOKEN.

    Raises FileNotFoundError, which says how to get a model of the Hub; ValueError for a value that is no
    path.
    """
    directory, name = as_path("path", path, "a directory or ORG/NAME"), str(path)
    if os.path.isdir(directory):  # Path.is_dir raises for a name that is too long
        return directory
    if os.path.isfile(directory):
        hint = unread_weights([directory])
        raise FileNotFoundError(f"path: expected a checkpoint's directory, got the file {name:.200}{hint}")
    if name.startswith("builtin:"):
        raise FileNotFoundError(
            f"path: no directory {name}; dparallel.registry.load loads the models that ship"
        )
    if not HUB_ID.fullmatch(name):
        home = "; ~ stays as it is here, and os.path.expanduser replaces it" if name.startswith("~") else ""
        raise FileNotFoundError(f"path: no directory {name:.200}{home}")
    return fetched(name)


@functools.cache  # One process reads one state of a repository, even if that changes.
def fetched(name: str) -> Path:
    """The snapshot of the Hub's model of this name. Raises FileNotFoundError."""
    by_hand = f"`hf download {name} --local-dir DIR` fetches it where there is a network; then load DIR"
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise FileNotFoundError(
            f"path: no directory {name}. Is it a model of the Hugging Face Hub? "
            f"`pip install huggingface_hub`, and it is fetched when it is loaded; or {by_hand}"
        ) from error
    try:
        return Path(snapshot_download(name, allow_patterns=NEEDED))
    except Exception as error:  # the package's own, its HTTP client's, and the file system's
        reason = " ".join(str(error).split())
        raise FileNotFoundError(
            f"path: no directory {name}, and the Hugging Face Hub did not give a model of that name: "
            f"{type(error).__name__}: {reason[:300].rstrip('.')}. {by_hand}"
        ) from error


MOST_BYTES = 2**28
"""The most bytes of a file that is read whole; released tokenizer.json files have up to a tenth of it."""


def read_text(file: Path) -> str:
    """The text of a file. Raises ValueError naming the file that is not UTF-8, too large or a pointer."""
    refuse_pointer(file)
    try:
        size = file.stat().st_size
        if size > MOST_BYTES:
            raise ValueError(f"path: {file} has {size:,} bytes, expected {MOST_BYTES:,} or fewer")
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"path: {file} is not UTF-8 text: byte {error.start}, {error.reason}") from error
    except OSError as error:
        raise ValueError(f"path: {file} cannot be read: {error.strerror}") from error


def is_there(file: Path) -> bool:
    """Whether there is such a file.

    Raises FileNotFoundError for a link that leads nowhere, as the Hub's cache has them where a download was
    cut short: without that file the checkpoint would pass for another one.
    """
    if os.path.isfile(file):  # Path.is_file raises for a name that is too long
        return True
    if os.path.islink(file) and not os.path.exists(file):
        raise FileNotFoundError(
            f"path: {file} is a link to {os.readlink(file)}, which is not there; was a download cut short?"
        )
    return False


def read_json(file: Path, *, required: bool = False) -> dict[str, Any]:
    """The object in a JSON file; an empty one if there is no file, unless it is required.

    Raises FileNotFoundError, also for a link that leads nowhere, or ValueError naming the file, and a key
    with two values.
    """
    if not is_there(file):
        if required:
            hint = ""
            if (file.parent / "adapter_config.json").is_file():
                hint = ", but an adapter, which `dparallel merge` adds to its base"
            elif (file.parent / "snapshots").is_dir():
                hint = ", but the Hub's cache of a model, whose checkpoints are the folders in snapshots"
            else:
                hint = unread_weights(file.parent.glob("*"))
            raise FileNotFoundError(f"path: no {file.name} in {file.parent}{hint}")
        return {}
    text = read_text(file)
    try:
        content = json.loads(text, object_pairs_hook=_object)
        check_text(text, content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"path: {file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"path: {file} holds a {type(content).__name__}, expected an object")
    return content


def unread_weights(found: Iterable[Path]) -> str:
    """What an error adds where one of these files has weights in a format that is not read; else ""."""
    names = sorted(file.name for file in found if file.suffix in (".bin", ".gguf"))
    return f"; {names[0]} is not read, save_pretrained of transformers writes safetensors" if names else ""


def check_text(text: str, content: Any) -> None:
    """Raise ValueError if a string of JSON has half of a surrogate pair, which no tokenizer takes."""
    if re.search(r"\\u[dD][89a-fA-F]", text):
        json.dumps(content, ensure_ascii=False).encode()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = [key for key, value in pairs if json.dumps(value) != json.dumps(content[key])]
        if twice:
            raise ValueError(f"it has two values for {twice[0]!r:.200}")
    return content


def refuse_pointer(file: Path) -> None:
    """Raise ValueError if the file is a pointer of Git LFS, or cannot be read."""
    try:
        with file.open("rb") as opened:
            start = opened.read(42)
    except OSError as error:
        raise ValueError(f"path: {file} cannot be read: {error.strerror}") from error
    if start == b"version https://git-lfs.github.com/spec/v1":
        raise ValueError(f"path: {file} is a Git LFS pointer; `git lfs pull` fetches the file itself")


@contextmanager
def readable(file: Path, argument: str = "path") -> Iterator[None]:
    """A context that turns errors of safetensors and the system into a ValueError that names argument and
    file."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{argument}: {file} is not a readable safetensors file: {error}") from error


def special_tokens(directory: Path) -> dict[str, str]:
    """The tokens with a role, by the names of their roles: {"eos_token": "<|endoftext|>", ...}.

    They are read from tokenizer_config.json; if that lists no added tokens, special_tokens_map.json overrides
    it, as in transformers.
    """
    config = read_json(directory / "tokenizer_config.json")
    if not config.get("added_tokens_decoder"):
        config |= read_json(directory / "special_tokens_map.json")
    texts = {key: token_text(value) for key, value in config.items() if key.endswith("_token")}
    return {key: text for key, text in texts.items() if text}


def token_text(token: Any) -> str | None:
    """The text of a token, which a file holds as text or as {"content": text}; None for anything else."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None


def more_special_tokens(directory: Path) -> set[str]:
    """The texts of additional_special_tokens. Raises ValueError naming the file that lists anything else."""
    names = ["tokenizer_config.json"]
    if not read_json(directory / names[0]).get("added_tokens_decoder"):
        names.insert(0, "special_tokens_map.json")  # as in `special_tokens`
    for name in names:
        listed = read_json(directory / name).get("additional_special_tokens")
        if listed:
            texts = [token_text(token) for token in listed] if isinstance(listed, list) else [None]
            if None in texts:
                raise ValueError(
                    f"path: {directory / name}: additional_special_tokens={listed!r:.80}, expected a list of "
                    "tokens"
                )
            return {text for text in texts if text}
    return set()


def added_tokens(directory: Path) -> dict[str, dict[str, Any]]:
    """The tokens beside the vocabulary, by their text: {"id": int, "special": bool, "lstrip": bool, ...}.

    They are read from tokenizer_config.json, else tokenizer.json, else added_tokens.json, whose tokens with a
    role are special. Raises ValueError naming the file that does not hold such a list.
    """
    file = directory / "tokenizer_config.json"
    listed = read_json(file).get("added_tokens_decoder")
    try:
        if listed:
            tokens = [{**token, "id": int(index)} for index, token in listed.items()]
        elif is_there(directory / "tokenizer.json"):
            file = directory / "tokenizer.json"
            tokens = [dict(token) for token in read_json(file).get("added_tokens") or ()]
        else:
            file = directory / "added_tokens.json"
            special = {*special_tokens(directory).values(), *more_special_tokens(directory)}
            tokens = [
                {"content": text, "id": index, "special": text in special, "normalized": text not in special}
                for text, index in read_json(file).items()
            ]
        by_text = {token["content"]: token for token in tokens}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if str(error).startswith("path: "):
            raise
        raise ValueError(f"path: {file} does not list its added tokens as expected: {error!r}") from error
    for text, token in by_text.items():
        if not isinstance(text, str) or not is_id(token.get("id")):
            raise ValueError(
                f"path: {file} does not list its added tokens as expected: {text!r:.80} with the id "
                f"{token.get('id')!r:.80}"
            )
    return by_text


MOST_IDS = 2**24


def is_id(value: Any) -> bool:
    """Whether a value of a JSON file is a token's id."""
    return type(value) is int and 0 <= value < MOST_IDS


def mask_token_id(directory: Path, key: str = "mask_token_id") -> int | None:
    """The mask's id in config.json, else generation_config.json, else the tokenizer's files, else None.

    In config.json `key` comes before mask_token_id; of the tokenizer's files, mask_token, then an added token
    named in `MASK_TOKENS`.

    Raises ValueError naming the file.
    """
    usual = ("mask_token_id", "config.json"), ("mask_token_id", "generation_config.json")
    for key_, name in dict.fromkeys(((key, "config.json"), *usual)):
        token: int | None = read_json(directory / name).get(key_)
        if token is not None:
            if not is_id(token):
                raise ValueError(
                    f"path: {directory / name}: {key_}={token!r:.80}, expected an id or null, unless "
                    "mask_id is given"
                )
            return token
    added = added_tokens(directory)
    text = special_tokens(directory).get("mask_token")
    if text is None:
        ids = {added[name]["id"] for name in MASK_TOKENS if name in added}
        return ids.pop() if len(ids) == 1 else None
    if text in added:
        return int(added[text]["id"])
    model = read_json(directory / "tokenizer.json").get("model")
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    if not isinstance(vocabulary, dict):
        vocabulary = read_json(directory / "vocab.json")
    return vocabulary.get(text)


def generation_end_ids(directory: Path) -> list[int]:
    """The ids of eos_token_id, an id, a list of ids, or null, in generation_config.json. Raises ValueError
    naming the file."""
    file = directory / "generation_config.json"
    value = read_json(file).get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(map(is_id, ids)):
        raise ValueError(f"path: {file}: eos_token_id={value!r:.80}, expected ids or null")
    return ids


PACKED = {
    *("qweight", "qzeros", "g_idx", "scales", "weight_scale", "weight_scale_inv", "weight_scale_2"),
    *("weight_packed", "weight_shape", "weight_zero_point", "input_scale", "absmax", "quant_map", "SCB"),
}
"""Last parts of names that only tensors of quantised checkpoints have."""


def refuse_quantised(config: Mapping[str, Any], names: Iterable[str], source: str) -> None:
    """Raise ValueError, naming the method or the tensors, if a config or names of tensors show that the
    checkpoint is quantised.
    """
    expected = (
        "expected weights of 16 bits or more, which Model.quantize turns into 8, or floats of 8 with scales, "
        "as the methods fp8, fbgemm_fp8, modelopt and compressed-tensors store them"
    )
    for key in ("quantization_config", "compression_config"):
        settings = config.get(key)
        if not settings:
            continue
        settings = settings if isinstance(settings, Mapping) else {"quant_method": settings}
        method = settings.get("quant_method")
        method = getattr(method, "value", method)  # transformers' enum
        if settings.get("dequantize"):  # as it was loaded
            continue
        if method == "bitsandbytes" and not (settings.get("load_in_8bit") or settings.get("load_in_4bit")):
            continue
        raise ValueError(f"{source} is quantised ({key}: {method or 'of an unknown method'}); {expected}")
    packed = sorted(name for name in names if name.rpartition(".")[2] in PACKED)
    if packed:
        raise ValueError(f"{source} is quantised (it has {', '.join(packed[:2])}, ...); {expected}")


def replace_model(
    directory: Path,
    config: Mapping[str, Any],
    write: Callable[[Path], object],
    names: Sequence[str] = ("config.json", "model.safetensors"),
) -> None:
    """Write the config, and the weights by `write`, to files of these names. Each appears whole or not at
    all, the config last, and at no moment are weights there with another model's config. Threads and
    processes that write into one directory do so one after another."""
    file, weights = (directory / name for name in names)
    with in_turn(directory / f"model.lock{PARTIAL}"), replacing(file) as new_file:
        new_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        flush(new_file)
        with replacing(weights) as new_weights:
            write(new_weights)
            shutil.copymode(new_file, new_weights)  # safetensors lets only the owner read it
            flush(new_weights)
            if file.exists() and file.read_bytes() != new_file.read_bytes():
                file.unlink()
