"""Finds and loads models by name: models that ship with the package, or checkpoint directories."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dparallel_ext import backends, models, simd_level, speculation
from dparallel_ext.models import files
from dparallel_ext.rules import filter_file
from dparallel_ext.whole_files import as_path

from . import text, tokenizer
from .toy import tasks

BUILTIN = Path(tasks.__file__).parent / "builtin"
DEFAULT = "builtin:teacher"
VERIFIER = "builtin:verifier"
"""A small autoregressive model that verifies for the others in `adaptive_decode`."""


def builtins() -> list[str]:
    """Names of the models that ship with the package."""
    return [f"builtin:{path.parent.name}" for path in sorted(BUILTIN.glob("*/config.json"))]


@contextlib.contextmanager
def naming(argument: str, of_callee: str) -> Iterator[None]:
    """A context whose errors name `argument`, in place of the argument `of_callee` of the functions called in
    it."""
    try:
        yield
    except (FileNotFoundError, ValueError) as error:
        name, colon, rest = str(error).partition(": ")
        if name != of_callee:
            raise
        raise type(error)(f"{argument}{colon}{rest}") from error


def directory_of(name: str) -> Path:
    """The checkpoint directory of "builtin:NAME", of a path, or of ORG/NAME (see `models.locate`).

    Raises FileNotFoundError, and ValueError for a config.json that `models.config_of` refuses.
    """
    as_path("model", name, "builtin:NAME, a directory or ORG/NAME")
    with naming("model", "path"):
        try:
            builtin = name.startswith("builtin:")
            directory = BUILTIN / name.removeprefix("builtin:") if builtin else models.locate(name)
            models.config_of(directory)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"path: {name!r} is neither one of {builtins()} nor a directory with a config.json "
                f"({str(error).removeprefix('path: ')})"
            ) from error
    return directory


DRAFTERS = {
    f"builtin:{file.stem}": file
    for file in sorted((BUILTIN / "causal").glob("*.safetensors"))
    if file.stem != "model"
}
"""Name -> file of the drafters of builtin:causal, for `speculate` and the command line."""
speculation.NAMED.update(DRAFTERS | {name: BUILTIN / name.removeprefix("builtin:") for name in builtins()})

FILTER = "filter.safetensors"
"""The file in a built-in model's directory that "learned:builtin:NAME" reads."""
filter_file.NAMED.update(
    {f"builtin:{path.parent.name}": path for path in sorted(BUILTIN.glob(f"*/{FILTER}"))}
)


def template_of(name: str, chat: bool | None = None) -> text.Template | None:
    """The chat template for a model's prompts. `chat`: use one; default: if the checkpoint has one.

    Raises ValueError if `chat` is true and there is none, or if the checkpoint's does not compile.
    """
    with naming("model", "path"):
        template = text.chat_template(directory_of(name)) if chat is not False else None
    if chat and template is None:
        raise ValueError(f"chat: the checkpoint {name!r} has no chat template")
    return template


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_of(name: str | None) -> torch.dtype | None:
    """The dtype of this name; None for "auto" or None, the default of `load`. Raises ValueError."""
    if name in (None, "auto"):
        return None
    if str(name) not in DTYPES:
        raise ValueError(f"dtype: expected auto, {', '.join(DTYPES)}, got {name!r:.80}")
    return DTYPES[str(name)]


def device_name(device: torch.device | str | None = None) -> str:
    """A device in words, to tell devices apart whose measurements differ."""
    place = models.device_of(device)
    if place.type == "cuda":
        return torch.cuda.get_device_name(place)
    return f"{platform.machine()} CPU, {simd_level()}, threads: {torch.get_num_threads()}"


def traits_of(name: str) -> models.Traits:
    """A model's traits, without its mask token, by its config.json alone. Raises FileNotFoundError and
    ValueError, naming the model."""
    return models.stored_traits(directory_of(name))


def is_causal(name: str, cache: str | None = None) -> bool:
    """Whether a model is decoded autoregressively; of a model that predicts masks too the cache mode says it.
    Raises as `traits_of`."""
    traits = traits_of(name)
    return traits.causal and not (traits.onward and cache == "block")


def gen_length(name: str) -> int:
    """The default number of tokens of a response: 256, or half of the model's positions if that is less; of
    models that ship their task's. Raises as `traits_of`.
    """
    if name.startswith("builtin:"):
        return tasks.GEN_LENGTH
    most = models.max_positions(models.config_of(directory_of(name))[0])
    return 256 if most is None else max(1, min(256, most // 2))


def check_positions(name: str, model: models.Model, positions: int) -> None:
    """Raise ValueError if a model that ships would decode beyond the positions that it was trained on.

    Some other checkpoints can decode there (rotary embeddings extrapolate), so for these `decode` only warns.
    """
    most = models.max_positions(model)
    if name.startswith("builtin:") and most is not None and positions > most:
        raise ValueError(
            f"gen_length: prompt and response have {positions} tokens, but {name} was trained on {most}"
        )


def encoder_of(
    name: str, model: models.Model, tokenizer: Any, template: text.Template | None, gen_length: int
) -> text.Encoder:
    """A function that encodes a prompt, see `text.prompt_encoder`, and then raises as `check_positions`."""
    encode = text.prompt_encoder(tokenizer, template)

    def checked(prompt: str | list[text.Message]) -> list[int]:
        ids = encode(prompt)
        check_positions(name, model, len(ids) + gen_length)
        return ids

    return checked


def unknown_words(tokenizer: Any, text: str) -> list[str]:
    """The words of a text that a word-level tokenizer, such as the built-in models', does not know."""
    unknown = getattr(getattr(tokenizer, "model", None), "unk_token", None)
    if unknown is None:
        return []
    encoded = tokenizer.encode(text)
    tokens = zip(encoded.tokens, encoded.offsets, strict=True)
    return [text[start:end] for token, (start, end) in tokens if token == unknown]


def load(
    name: str | Path = DEFAULT,
    *,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    fp8: bool = False,
    mask_id: int | None = None,
) -> tuple[models.Model, Any]:
    """Load (model, `tokenizers.Tokenizer`) by name; `fp8`: see `Model.quantize`, `mask_id`: `models.load`.

    `dtype`: default the checkpoint's; for models that ship, float32 where bfloat16 is slow. The model's
    `eos_ids` are those of `models.load`, and the tokenizer's eos_token.

    Raises FileNotFoundError and ValueError, naming the argument.
    """
    name = str(name)
    directory, place = directory_of(name), models.device_of(device)
    with naming("model", "path"):
        loaded = tokenizer.load(directory)
    fuse = True if name.startswith("builtin:") else None  # they are small enough not to be mapped
    dtype = _dtype_at(name, place, dtype)
    with naming("model", "path"):
        model = models.load(directory, device=place, dtype=dtype, fuse=fuse, mask_id=mask_id)
    end_as_tokenizer(model, directory, loaded)
    return model.quantize() if fp8 else model, loaded


def end_as_tokenizer(model: models.Model, directory: Path, tokenizer: Any) -> None:
    """Add the tokenizer's eos_token to the model's `eos_ids`.

    A model that was tuned for chats may end with it alone, while config.json still has its base's. Raises
    ValueError if the model has no embedding for it, or a file of `directory` does not read.
    """
    with naming("model", "path"):
        text = files.special_tokens(directory).get("eos_token")
    end, rows = tokenizer.token_to_id(text) if text else None, model.shape.embedding_size
    if end is not None and end >= rows:
        raise ValueError(
            f"model: the eos_token {text!r:.80} of {directory} has the id {end}, expected one below {rows}"
        )
    model.end_at((*model.eos_ids, *([] if end is None else [end])))


def _dtype_at(name: str, device: torch.device, dtype: torch.dtype | None) -> torch.dtype | None:
    """The dtype to convert weights to; None: they stay as they are stored."""
    slow = dtype is None and name.startswith("builtin:") and not backends.fast_bfloat16(device)
    return torch.float32 if slow else dtype


@dataclass(frozen=True)
class Loading:
    """How models are loaded: the keywords of `load`."""

    device: str | None = None
    dtype: torch.dtype | None = None
    fp8: bool = False
    mask_id: int | None = None

    def load(self, name: str) -> tuple[models.Model, Any]:
        """`load` a model. Raises as it does."""
        return load(name, **vars(self))

    def dtype_for(self, name: str) -> torch.dtype:
        """The dtype that a model has once it is loaded, by the headers of its files. Raises as `load`."""
        dtype = _dtype_at(name, models.device_of(self.device), self.dtype)
        return dtype or self.stored(name).dtype

    def weights(self, name: str) -> dict[str, Any]:
        """`weights_of` a model once it is loaded. Raises as `load`."""
        return {"dtype": _dtype_name(self.dtype_for(name)), "fp8": self.fp8}

    def stored(self, name: str) -> models.Model:
        """`models.as_stored` of a model, by which options can be checked before it is loaded. Raises as
        `load`."""
        with naming("model", "path"):
            return models.as_stored(directory_of(name), mask_id=self.mask_id)

    def conditions(self, name: str) -> dict[str, Any]:
        """`conditions_of` a model once it is loaded. Raises as `load`."""
        device, mask_id = models.device_of(self.device).type, self.stored(name).mask_id
        return {"device": device, "mask_id": mask_id, **self.weights(name)}


def weights_of(model: models.Model) -> dict[str, Any]:
    """The fields of results and of `tune`'s files about a model's weights: "dtype", its name, and "fp8",
    whether the layers' are in 8 bits."""
    return {"dtype": _dtype_name(model.dtype), "fp8": model.quantized}


def conditions_of(model: models.Model) -> dict[str, Any]:
    """The fields of results about how their model was loaded, since tokens depend on it: the kind of its
    device, its mask token, and `weights_of` it."""
    return {"device": model.device.type, "mask_id": model.mask_id, **weights_of(model)}


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_verifier(name: str, model: str | None = None) -> None:
    """Raise FileNotFoundError or ValueError unless `name` is an autoregressive model, by its config alone;
    and, where a model is named, if an id that both have is another token in each."""
    with naming("verifier", "model"):
        causal = is_causal(name)
    if not causal:
        raise ValueError(f"verifier: expected an autoregressive model, got {name}, a diffusion model")
    if model is not None:
        directories = directory_of(name), directory_of(model)
        sizes = (models.config_of(directory)[1].embedding_size for directory in directories)
        with naming("model", "path"):
            tokenizers = map(tokenizer.load, directories)
            check_same_tokens(name, min(sizes), *tokenizers)


def check_same_tokens(name: str, shared: int, of_verifier: Any, of_model: Any) -> None:
    """Raise ValueError if an id below `shared` is another token in the verifier's tokenizer than in the
    model's. name: the verifier's."""
    theirs, ours = (
        {id: token for token, id in each.get_vocab().items() if id < shared}
        for each in (of_verifier, of_model)
    )
    for id in sorted(theirs.keys() & ours.keys()):
        if theirs[id] != ours[id]:
            raise ValueError(
                f"verifier: token {id} of {name} is {theirs[id]!r}, and the model's is {ours[id]!r}"
            )


def load_drafter(name: str | None, device: torch.device, dtype: torch.dtype) -> speculation.Drafter | None:
    """The drafter of this name for a model on a device and in a dtype, for responses without a form.

    Raises as `speculation.drafter_of`, and ValueError for a drafter that needs a form.
    """
    drafter = speculation.drafter_of(name, device, dtype)
    if isinstance(drafter, speculation.JumpForward):
        raise ValueError(
            f"drafter: {name} drafts along the form of a response, and here responses have none; requests to "
            "`dparallel serve` may have one"
        )
    return drafter


def load_verifier(name: str, model: models.Model, known: Any) -> models.Model:
    """Load the verifier `name` for `adaptive_decode` of a model, onto its device and in its dtype; `known`:
    its tokenizer.

    Raises as `load`, and ValueError if an id that both have is another token in each.
    """
    with naming("verifier", "model"):
        verifier, verifier_tokenizer = load(name, device=str(model.device), dtype=model.dtype)
    shared = min(model.shape.embedding_size, verifier.shape.embedding_size)
    check_same_tokens(name, shared, verifier_tokenizer, known)
    return verifier
