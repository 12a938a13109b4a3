"""The options that commands share, and checks of them."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from dparallel_ext import rules
from dparallel_ext.models.config import BLOCK_LENGTH
from dparallel_ext.speculation import adaptive

from .. import registry
from ..configs import POLICY, read_fields, take_drafter, take_mask, take_tuned

ModelOption = Annotated[
    str, typer.Option(help="builtin:NAME, a checkpoint directory, or ORG/NAME of the Hugging Face Hub")
]
MaskOption = Annotated[int | None, typer.Option(help="the mask token's id; default: the checkpoint's own")]
BlockLengthOption = Annotated[int | None, typer.Option(help=f"default: the model's own, else {BLOCK_LENGTH}")]
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
GEN_LENGTH_HELP = "tokens; default 64 built-in, else 256, or half of the model's positions if that is less"
GenLengthOption = Annotated[int | None, typer.Option(help=GEN_LENGTH_HELP)]
CHECKER = "hashes"
CheckerOption = Annotated[
    str | None,
    typer.Option(help=f"hashes, last_number, boxed, none or package.module:function; default: {CHECKER}"),
]
DATA_HELP = "JSON Lines, JSON or Parquet"
PromptFieldOption = Annotated[
    str, typer.Option(help="the field of the file that holds the prompt, a text or the messages of a chat")
]
AnswerFieldOption = Annotated[str, typer.Option(help="the field that holds the right answer")]
Fp8Option = Annotated[bool, typer.Option("--fp8", help="keep the layers' weights in 8 bits")]
POLICY_HELP = rules.describe()
PolicyOption = Annotated[
    str | None, typer.Option(help=f"default: the config's, else {POLICY}; {POLICY_HELP}")
]
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        help="a JSON file of DecodeConfig's fields, or one that `dparallel tune` wrote; options override it"
    ),
]
DRAFTER_HELP = (
    "for an autoregressive model: ngram, ngram:N, recycling, self (Nemotron-Labs-Diffusion, whose "
    "linear_spec_lora has a path of its own), strided (I-DLM; its adapter for Qwen3: strided:PATH), the path "
    "of a drafter or model, tree: before a drafter of blocks (self, DFlash, ParallelSpec) or an EAGLE head; "
    "for builtin:causal also builtin:dflash, builtin:parallelspec, builtin:adadecode, builtin:ppd, "
    "builtin:hidden_transfer, builtin:student; default: none"
)
DrafterOption = Annotated[str | None, typer.Option(help=DRAFTER_HELP)]
DraftSizeOption = Annotated[
    int | None,
    typer.Option(
        help="the most tokens of a draft; default: the fastest number, as measured. For diffusion models "
        "with a policy row, as one or entropy:0.5: guesses of self-speculation; default: none"
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
    """Raise ValueError for an option that is given (not None) and belongs to another kind of model. A mask
    token may be a drafter's, as of masks that ride in a verify pass."""
    if causal and options.get("drafter"):
        options["mask_id"] = None
    for name, value in options.items():
        of_causal = name in ("drafter", "draft_size", "context", "report")
        if value is None or of_causal == causal:
            continue
        if causal:
            hint = "" if registry.is_causal(model, "block") else ", unless with --cache block"
            raise ValueError(f"{name}: belongs to masked diffusion; {model} is autoregressive{hint}")
        if name == "draft_size":  # such a model takes one: what it lacks is a size to tune
            text = f"is tuned for an autoregressive model, and {model} is a diffusion model"
            raise ValueError(f"{name}: {text}; `dparallel evaluate --draft-size` measures it there")
        raise ValueError(f"{name}: {model} is a diffusion model, which takes none")


def check_drafted(drafters: list[str] | None, draft_size: int | None) -> None:
    """Raise ValueError for a size of drafts that nothing would draft. Size 0 is plain decoding."""
    if draft_size and not drafters:
        raise ValueError(f"draft_size: belongs to --drafter for an autoregressive model, got {draft_size}")


def adaptive_options(verifier: str | None, others: dict[str, Any], **options: Any) -> dict[str, Any]:
    """The options that are given for `adaptive_decode`: mixture, window and lookahead.

    Raises ValueError for an option that does not fit or comes without a verifier, for any of `others` beside
    a verifier, and for a verifier that is not autoregressive; FileNotFoundError for a verifier that is not
    there.
    """
    options = {key: value for key, value in options.items() if value is not None}
    for key, value in others.items() if verifier else options.items():
        if value is not None:
            raise ValueError(
                f"{key}: {'not together with' if verifier else 'belongs to'} --verifier, got {value!r}"
            )
    if verifier:
        registry.check_verifier(verifier)
        adaptive.checked_options(**options)
    return options


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
