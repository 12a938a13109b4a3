"""The options that commands share, checks of them, and errors in one line."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from dparallel_ext import rules
from dparallel_ext.speculation import adaptive

from .. import registry
from ..configs import POLICY, read_fields, take_drafter, take_mask, take_tuned

ModelOption = Annotated[
    str, typer.Option(help="builtin:NAME, a checkpoint directory, or ORG/NAME of the Hugging Face Hub")
]
MaskOption = Annotated[int | None, typer.Option(help="the mask token's id; default: the checkpoint's own")]
ChatOption = Annotated[
    bool | None,
    typer.Option(
        "--chat/--no-chat",
        help="put prompts into the checkpoint's chat template; default: if it has one (built-in: none)",
    ),
]
DeviceOption = Annotated[str | None, typer.Option(help="cpu (default), cuda or cuda:N")]
DtypeOption = Annotated[
    str, typer.Option(help="float32, bfloat16, float16, or auto: as stored; built-in: the fastest")
]
GEN_LENGTH = "tokens; default 64 built-in, else 256, or half of the model's positions if that is less"
GenLengthOption = Annotated[int | None, typer.Option(help=GEN_LENGTH)]
CHECKER = "hashes"
CheckerOption = Annotated[
    str | None,
    typer.Option(help=f"hashes, last_number, boxed, none or package.module:function; default: {CHECKER}"),
]
DATA = "JSON Lines, JSON or Parquet"
PromptFieldOption = Annotated[
    str, typer.Option(help="the field of the file that holds the prompt, a text or the messages of a chat")
]
AnswerFieldOption = Annotated[str, typer.Option(help="the field that holds the right answer")]
Fp8Option = Annotated[bool, typer.Option("--fp8", help="keep the layers' weights in 8 bits")]
POLICIES = rules.describe()
PolicyOption = Annotated[str | None, typer.Option(help=f"default: the config's, else {POLICY}; {POLICIES}")]
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        help="a JSON file of DecodeConfig's fields, or one that `dparallel tune` wrote; options override it"
    ),
]
DRAFTERS = (
    "for an autoregressive model: ngram, ngram:N, recycling, self (Nemotron-Labs-Diffusion, whose "
    "linear_spec_lora has a path of its own), strided (I-DLM; its adapter for Qwen3: strided:PATH), the path "
    "of a drafter or model, tree: before a drafter of blocks (self, DFlash, ParallelSpec, P-EAGLE); "
    "for builtin:causal also builtin:dflash, builtin:parallelspec, builtin:adadecode, builtin:ppd, "
    "builtin:hidden_transfer, builtin:student; default: none"
)
DrafterOption = Annotated[str | None, typer.Option(help=DRAFTERS)]
GuessesOption = Annotated[
    int | None,
    typer.Option(
        help="the most tokens of a draft; default: the fastest number, as measured. For diffusion models "
        "with a policy one, steps:N or quota:K: guesses of self-speculation; default: none"
    ),
]


VerifierOption = Annotated[
    str | None,
    typer.Option(
        help="an autoregressive model with the same tokens, such as builtin:verifier: the diffusion model "
        "decodes left to right, as far as it agrees (APD, lossy)"
    ),
]
MixtureOption = Annotated[
    float | None, typer.Option(help="with --verifier, the diffusion model's share; default 0.5")
]
WindowOption = Annotated[
    int | None, typer.Option(help="with --verifier, known tokens that a pass computes again; default: all")
]
LookaheadOption = Annotated[
    int | None, typer.Option(help="with --verifier, masks that a pass sees; default: all")
]


OUT_OF_MEMORY = "DefaultCPUAllocator: can't allocate memory"
"""Torch's words in a RuntimeError; without memory on a GPU it raises an error of another class."""


@contextmanager
def plain_errors(extra: str = "cli", kept: Callable[[], str] | None = None) -> Iterator[None]:
    """A context that reports bad input, a file that cannot be read or written, too little memory, or a
    missing package of `extra` in one line. Ctrl-C ends it with status 130 and, where there is `kept`, a line
    of what a run has kept."""
    try:
        yield
    except KeyboardInterrupt as error:
        traceback.clear_frames(error.__traceback__)  # as below
        if kept is not None and os.environ.get("RANK", "0") == "0":
            typer.echo("\n" * sys.stderr.isatty() + f"interrupted: {kept()}", err=True)
        raise typer.Exit(130) from None
    except BrokenPipeError:  # the reader of our output has closed it, which is no error
        raise
    except (ValueError, OSError, ImportError, MemoryError, RuntimeError) as error:
        message = str(error)
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or OUT_OF_MEMORY in message:
            reason = f" ({message.splitlines()[0]:.200})" if message else ""
            message = f"not enough memory{reason}; shorter texts and smaller batches take less"
        elif isinstance(error, RuntimeError):  # a fault, whose place is wanted
            raise
        traceback.clear_frames(error.__traceback__)  # so that progress bars end now, not below the line
        # Python names the module; transformers raises this error too, with a sentence as the name.
        if isinstance(error, ModuleNotFoundError) and (error.name or "").replace(".", "_").isidentifier():
            extras = ",".join(dict.fromkeys(("cli", extra_with(str(error.name), extra))))
            message = (
                f'no {error.name}; pip install "dparallel-ext[{extras}]" installs what this command needs'
            )
        elif isinstance(error, OSError) and error.strerror:
            message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        typer.echo(f"error: {' '.join(message.split())}", err=True)
        raise typer.Exit(2) from error


def extra_with(package: str, default: str) -> str:
    """The extra that installs a package: `default` where it does, or where none is known to."""
    with suppress(metadata.PackageNotFoundError):
        lines = metadata.requires("dparallel-ext") or ()
        named = (re.match(r"([\w.-]+).*extra == .([\w-]+)", line) for line in lines)
        extras = [
            found[2]
            for found in named
            if found and found[1].replace("-", "_").lower() == package.partition(".")[0]
        ]
        return default if default in extras or not extras else extras[0]
    return default


def goes_on(out: Path, kept: Callable[[Path], str | None]) -> Callable[[], str]:
    """A line for `plain_errors`: the part that an interrupted run has kept, and how it goes on."""

    def line() -> str:
        if (part := kept(out)) is None:
            return f"{out} keeps nothing yet; the same command begins anew"
        return f"{out} keeps {part}; the same command goes on from there"

    return line


def begins_anew(out: Path) -> Callable[[], str]:
    """A line for `plain_errors` of a command that writes a file at its end alone."""
    return lambda: f"{out} is as it was; the same command begins anew"


def check_text(**texts: str | None) -> None:
    """Raise ValueError for an argument whose bytes are no text in the locale's encoding: Python gives them as
    halves of surrogate pairs."""
    for name, text in texts.items():
        try:
            (text or "").encode()
        except UnicodeEncodeError as error:
            encoding = sys.getfilesystemencoding()
            raise ValueError(f"{name}: expected text in {encoding}, got {text!r:.80}") from error


def check_kind(model: str, causal: bool, **options: Any) -> None:
    """Raise ValueError for an option that is given (not None) and belongs to another kind of model."""
    for name, value in options.items():
        of_causal = name in ("drafter", "draft_size", "context")
        if value is None or of_causal == causal:
            continue
        if causal:
            raise ValueError(f"{name}: belongs to masked diffusion; {model} is autoregressive")
        raise ValueError(f"{name}: {model} is a diffusion model, which takes none")


def check_drafted(drafters: list[str] | None, draft_size: int | None) -> None:
    """Raise ValueError for a size of drafts that nothing would draft. Size 0 is plain decoding."""
    if draft_size and not drafters:
        raise ValueError(f"draft_size: belongs to --drafter for an autoregressive model, got {draft_size}")


def adaptive_numbers(verifier: str | None, others: dict[str, Any], **numbers: Any) -> dict[str, Any]:
    """The numbers that are given for `adaptive_decode`: mixture, window and lookahead.

    Raises ValueError for one that does not fit, or without a verifier, for an option among `others` with one,
    and for a verifier that is not autoregressive; FileNotFoundError where there is none.
    """
    numbers = {key: value for key, value in numbers.items() if value is not None}
    for key, value in others.items() if verifier else numbers.items():
        if value is not None:
            raise ValueError(
                f"{key}: {'not together with' if verifier else 'belongs to'} --verifier, got {value!r}"
            )
    if verifier:
        registry.check_verifier(verifier)
        adaptive.checked_numbers(**numbers)
    return numbers


def read_config(
    file: Path | None,
    models: list[str],
    loading: registry.Loading,
    drafters: list[str] | None,
    draft_size: int | None,
) -> tuple[dict[str, Any], registry.Loading, list[str] | None, int | None]:
    """The file's fields of `DecodeConfig`; and loading, whose mask may be the file's, drafters and draft
    size, from the options or the file."""
    content = read_fields(file)
    loading = replace(loading, mask_id=take_mask(content, loading.mask_id))
    if warning := take_tuned(content, file, models, loading):
        typer.echo(f"warning: {warning}", err=True)
    return content, loading, *take_drafter(content, drafters, draft_size)
