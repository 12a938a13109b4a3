"""Which drafter is meant: a name, a file of weights of any kind, a model."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..arguments import number, shown, whole
from ..models import FAMILIES
from ..models import load as load_model
from ..models.files import locate, read_json
from . import adadecode, dflash, eagle, strided
from .adapter import Adapter
from .blocks import BlockDrafter
from .checkpoint import OURS, DraftCheckpoint, Origin, is_single_file, read_checkpoint
from .ddtree import TreeDrafter
from .drafter import Apart, Drafter, PredictsAcceptance
from .hidden_transfer import HiddenTransfer
from .jump_forward import JumpForward
from .model_drafter import ModelDrafter
from .ngram import NGram
from .ppd import PromptTokens
from .recycling import Recycling
from .riders import drafter_of_riders
from .self_drafter import SelfDrafter
from .strided import StridedDrafter

KINDS: dict[str, Callable[[DraftCheckpoint], Drafter]] = {
    **dict.fromkeys(dflash.CAUSAL, dflash.drafter_of_blocks),
    **{of.KIND: functools.partial(drafter_of_riders, of) for of in (PromptTokens, HiddenTransfer)},
    adadecode.KIND: adadecode.drafter_of_heads,
    eagle.KIND: eagle.drafter_of_eagle,
    "lora": lambda checkpoint: SelfDrafter(adapter=Adapter(checkpoint)),
    strided.KIND: strided.drafter_of_masks,
}
"""Kind that a file names -> a function that makes a drafter of it, or raises ValueError."""
PUBLISHED = {"lora": {"peft_type"}, eagle.KIND: {*eagle.MARKS}, "dflash": {"dflash_config"}}
"""Kind of a published file -> the keys of its config, of which any tells the kind."""
NAMED: dict[str, Path | Drafter] = {
    "recycling": Recycling(),
    "jump_forward": JumpForward(),
    "self": SelfDrafter(),
    "strided": StridedDrafter(),
}
"""Drafters that have a name, as "builtin:dflash": `dparallel.registry` names the drafters and models that
ship; a drafter of your own has the name that you give it here."""


def load(path: str | Path) -> Drafter:
    """Read a drafter with weights: a directory with config.json and model.safetensors, the directory of a
    LoRA adapter, or one .safetensors file, of any of `KINDS`.

    A directory may be one of the published DFlash checkpoints (z-lab), or a published EAGLE-3 or P-EAGLE head
    in safetensors (SafeAILab, SpecForge, ModelOpt, NeMo, speculators), by ORG/NAME too, see `models.locate`.
    Layers that see a window of the text alone, and the options that DFlash2 and EAGLE-3.1 add, are not
    supported.

    Raises:
        FileNotFoundError: naming the missing file or directory.
        ValueError: naming the config key, or the missing, extra, misshapen or unreadable tensors.
    """
    checkpoint = read_checkpoint(path)
    try:
        kind = Origin.of(checkpoint.config).kind
        if kind is None:  # a published file
            kind = _published_kind(checkpoint.config)
            if kind is None:
                marks = sorted(mark for marks in PUBLISHED.values() for mark in marks)
                raise ValueError(
                    "config: expected that of a published DFlash, EAGLE-3 or P-EAGLE drafter or of a LoRA "
                    f"adapter, with one of {marks}, got {sorted(checkpoint.config)!r:.200}"
                )
        if kind not in KINDS:
            raise ValueError(f"config: {OURS}: kind={kind!r:.80}, expected one of {list(KINDS)}")
        return KINDS[kind](checkpoint)
    except ValueError as error:
        message = str(error)
        if message.startswith("config: "):
            message = f"{path}: {message.removeprefix('config: ')}"
        raise ValueError(f"path: {message}") from error


def drafter_of(
    value: Any, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> Drafter | None:
    """A drafter; the name of one ("ngram", "ngram:4", or one of `NAMED`); the path of a drafter with weights
    (see `load`), or of a model that drafts, or ORG/NAME, loaded onto `device` and in `dtype`; or such a
    model. "tree:" in front of the name or path of a drafter of blocks: trees of its guesses (`ddtree`,
    `eagle_trees`). "strided:" in front of the path of a LoRA adapter: masks with the adapter ride in the
    verify pass (`strided`). None stays None.

    Raises ValueError for anything else, and as `load` and `models.load`.
    """
    if isinstance(value, str):
        value = NAMED.get(value, value)
    if value is None:
        return None
    if isinstance(value, Drafter) and not isinstance(value, (str, Path, type)):
        return _checked(value)
    if isinstance(value, torch.nn.Module):
        return ModelDrafter(value)
    if isinstance(value, str):
        name, colon, argument = value.partition(":")
        if name == "ngram":
            if colon and not (argument.isdecimal() and len(argument) < 19 and int(argument)):
                raise ValueError(f'drafter: expected "ngram" or "ngram:N", got {shown(value)}')
            return NGram(int(argument)) if colon else NGram()
        if name == "tree" and argument:
            blocks = drafter_of(argument, device)
            if not isinstance(blocks, BlockDrafter):
                raise ValueError(
                    f'drafter: expected a drafter of blocks behind "tree:", got {shown(argument)}'
                )
            return TreeDrafter(blocks)
        if name == "strided" and argument:
            of = drafter_of(argument, device)
            adapter = getattr(of, "adapter", None)
            if type(of) not in (SelfDrafter, StridedDrafter) or adapter is None:
                raise ValueError(
                    f'drafter: expected the path of a LoRA adapter behind "strided:", got {shown(argument)}'
                )
            return of if isinstance(of, StridedDrafter) else StridedDrafter(adapter=adapter)
    if isinstance(value, Path) or (isinstance(value, str) and _is_path(value)):
        try:
            if _is_model(value):
                return ModelDrafter(load_model(value, device=device, dtype=dtype))
            return load(value)
        except (FileNotFoundError, ValueError) as error:
            raise ValueError(f"drafter: {str(error).removeprefix('path: ')}") from error
    raise ValueError(
        f"drafter: expected a Drafter, a name ({', '.join(['ngram', *NAMED])}), the path of one, a model, or "
        f"None for plain decoding, got {shown(value)}{_lacks(value)}"
    )


def _checked(drafter: Drafter) -> Drafter:
    """The drafter. Raises ValueError naming an attribute, or a result, that does not fit."""
    whole("drafter: most", drafter.most, 0)
    if isinstance(drafter, Apart) and drafter.apart is not True:
        raise ValueError(f"drafter: apart: expected True or no such attribute, got {shown(drafter.apart)}")
    if isinstance(drafter, PredictsAcceptance):
        number("drafter: expected", drafter.expected(drafter.most))
    return drafter


def _lacks(value: Any) -> str:
    """The members of a drafter that an object lacks, in words; "" for another kind of object."""
    lacking = [name for name in ("most", "check", "session") if not hasattr(value, name)]
    return f", which has no {' and no '.join(lacking)}" if 0 < len(lacking) < 3 else ""


def _is_path(text: str) -> bool:
    return bool(text) and ("/" in text or text.endswith(".safetensors") or os.path.exists(text))


def _is_model(path: str | Path) -> bool:
    """Whether a directory, or ORG/NAME, holds a language model, and not a drafter, whose config may name a
    family too."""
    config = {} if is_single_file(Path(path)) else read_json(locate(path) / "config.json")
    drafts = OURS in config or _published_kind(config) is not None
    return str(config.get("model_type")) in FAMILIES and not drafts


def _published_kind(config: dict[str, Any]) -> str | None:
    """The kind of a published drafter, from its config.json."""
    return next((kind for kind, marks in PUBLISHED.items() if not marks.isdisjoint(config)), None)
