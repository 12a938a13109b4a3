"""The command `decode`."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from dparallel_ext.arguments import whole
from dparallel_ext.decoding.config import with_ends

from .. import files, registry
from ..configs import config_with_policy, config_without_policy, with_seeds
from ..console import plain_errors
from ..problems import read_prompts
from ..text import Message
from .common import (
    DATA_HELP,
    GEN_LENGTH_HELP,
    BlockLengthOption,
    ChatOption,
    ConfigOption,
    DeviceOption,
    DrafterOption,
    DraftSizeOption,
    DtypeOption,
    Fp8Option,
    LookaheadOption,
    MaskOption,
    MixtureOption,
    ModelOption,
    PolicyOption,
    PromptFieldOption,
    VerifierOption,
    WindowOption,
    adaptive_options,
    check_drafted,
    check_kind,
    check_text,
    read_config,
)


def decode(
    prompt: Annotated[list[str] | None, typer.Argument(help="prompts")] = None,
    file: Annotated[Path | None, typer.Option(help=f"a text file of a prompt a line, or {DATA_HELP}")] = None,
    prompt_field: PromptFieldOption = "prompt",
    batch: Annotated[int, typer.Option(help="prompts decoded together")] = 1,
    model: ModelOption = registry.DEFAULT,
    config: ConfigOption = None,
    policy: PolicyOption = None,
    gen_length: Annotated[
        int | None,
        typer.Option(help=f"{GEN_LENGTH_HELP}; with --infill 0"),
    ] = None,
    infill: Annotated[
        bool,
        typer.Option(
            "--infill", help="fill the prompt's mask tokens too; print prompt and response; implies --no-chat"
        ),
    ] = False,
    suffix: Annotated[
        str | None,
        typer.Option(help="text after the response, which fills the gap before it; implies --no-chat"),
    ] = None,
    block_length: BlockLengthOption = None,
    cache: Annotated[
        str | None,
        typer.Option(
            help="none (default), prefix, dual, block (block-causal), or window (WeDLM's, SDLM's default)"
        ),
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="0 (default), or below 1e-5: greedy")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="nucleus sampling: from the ids that have this probability")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="sample from this many ids, the most probable; 0: all")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="prompt number i, from 0, is sampled with seed + i; default: random")
    ] = None,
    drafter: DrafterOption = None,
    draft_size: DraftSizeOption = None,
    verifier: VerifierOption = None,
    mixture: MixtureOption = None,
    window: WindowOption = None,
    lookahead: LookaheadOption = None,
    mask_id: MaskOption = None,
    chat: ChatOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    fp8: Fp8Option = False,
    stream: Annotated[bool, typer.Option("--stream", help="show the unmasking")] = False,
    html: Annotated[
        Path | None, typer.Option(help="write a page of one file here, to look through the passes")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="a JSON object a line")] = False,
) -> None:
    """Decode prompts with the built-in model or a checkpoint."""
    from ..complete import complete, complete_left_to_right, speculating, verifying
    from ..live import LiveText
    from ..recording import Recording

    with plain_errors():
        if html is not None:
            files.writable("html", html)
        check_text(suffix=suffix)
        whole("batch", batch, 1)
        calls = prompts_of(prompt or [], file, prompt_field, batch, stream)
        loading = registry.Loading(device, registry.dtype_of(dtype), fp8, mask_id)
        content, loading, drafters, draft_size = read_config(
            config, [model], loading, None if drafter is None else [drafter], draft_size
        )
        drafter = drafters[0] if drafters else None
        infill = infill or bool(content.get("infill"))
        content.setdefault("gen_length", 0 if infill and not suffix else registry.gen_length(model))
        causal = registry.is_causal(model, cache or content.get("cache"))
        of_diffusion = {"suffix": suffix or None, "policy": policy, "verifier": verifier}
        check_kind(model, causal, drafter=drafter, mask_id=loading.mask_id, **of_diffusion)
        if causal:
            check_drafted(drafters, draft_size)
        others = {"policy": policy, "suffix": suffix or None, "draft_size": draft_size}
        of_verifier = adaptive_options(verifier, others, mixture=mixture, window=window, lookahead=lookahead)
        options: dict[str, Any] = {
            "gen_length": gen_length,
            "infill": infill,
            "block_length": block_length,
            "cache": cache,
        }
        options |= {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
        if causal or verifier:
            decoding = config_without_policy(content, **options)
        else:
            decoding = config_with_policy(content, policy, **options)
        if decoding.seed is None:
            torch.seed()  # else every process would draw the same samples
        # A text with gaps is no chat message, so it gets a template only with --chat.
        template = registry.template_of(model, False if chat is None and (infill or suffix) else chat)
        loaded, tokenizer = loading.load(model)
        decoding = with_ends(decoding, loaded.eos_ids)
        decoder = None
        if causal:
            decoder = speculating(loaded, drafter, draft_size)
        elif verifier is not None:
            decoder = verifying(loaded, tokenizer, verifier, of_verifier)
        recording = None if html is None else Recording("dparallel decode")
        unchecked = suffix or ""  # until the first answer; an error before that is one line alone
        for number, texts in enumerate(calls):
            console = Console(stderr=as_json)  # with --json the standard output is JSON alone
            live = None
            if stream:
                live = LiveText(console, tokenizer, loaded.mask_id, 0.1, causal=decoder is not None)
            shared: dict[str, Any] = {"template": template, "live": live, "recording": recording}
            numbers_of_texts = range(number * batch, number * batch + len(texts))
            request = model, loaded, tokenizer, texts, with_seeds(decoding, numbers_of_texts)
            if decoder is None:
                rows = complete(*request, suffix=suffix, draft_size=draft_size, **shared)
            else:
                rows = complete_left_to_right(*request, decoder, **shared)
            for row in rows:
                asked_text = row["prompt"] if isinstance(row["prompt"], str) else ""
                warn_of_unknown_words(model, tokenizer, prompt=asked_text, suffix=unchecked)
                unchecked = ""
                show_response(row, as_json)
        if html is not None and recording is not None:
            files.write_text(html, recording.html())


def prompts_of(
    prompts: list[str], file: Path | None, prompt_field: str, batch: int, stream: bool
) -> list[list[str | list[Message]]]:
    """The prompts of each call of `decode`, at most `batch`: the given ones, then those of the file."""
    for text in prompts:
        check_text(prompt=text)
        with suppress(OSError, ValueError):  # a text that can be no path
            if Path(text).is_file():
                typer.echo(f"warning: prompt: {text!r} names a file; --file decodes its prompts", err=True)
    if stream and batch > 1:
        raise ValueError(f"stream: shows one prompt at a time, so not together with --batch {batch}")
    texts: list[str | list[Message]] = [*prompts]
    if file is not None:
        texts += [prompt.text for prompt in read_prompts(file, prompt_field, None, argument="file")]
    if not texts:
        raise ValueError("prompt: expected one, as an argument or with --file")
    return [texts[first : first + batch] for first in range(0, len(texts), batch)]


def warn_of_unknown_words(model: str, tokenizer: Any, **texts: str) -> None:
    known = "; it knows the words of its task alone" if model.startswith("builtin:") else ""
    for name, text in texts.items():
        if unknown := registry.unknown_words(tokenizer, text):
            words = ", ".join(map(repr, dict.fromkeys(unknown)))
            typer.echo(f"warning: {model} has no token for {words} of the {name}{known}", err=True)


def show_response(row: dict[str, Any], as_json: bool) -> None:
    shown = row.get("text", row["response"])
    if not shown.strip():
        typer.echo("warning: the response is empty", err=True)
    kept, passes = row["tokens"], row["forwards"]
    rate = kept / passes if passes else 0.0
    if as_json:
        typer.echo(json.dumps({**row, "tokens_per_forward": rate}))
    else:
        typer.echo(shown)
        tokens, forwards = counted(kept, "token"), counted(passes, "pass", "es")
        if "verifications" in row:
            forwards += f" and {row['verifications']} of the verifier"
        typer.echo(f"{tokens} in {forwards}, {rate:.1f} a pass", err=True)


def counted(number: int, name: str, plural: str = "s") -> str:
    """The number with its name, as "1 pass" and "2 passes"."""
    return f"{number} {name}{'' if number == 1 else plural}"
