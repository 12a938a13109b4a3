"""Prompts in, responses out, as the text that `dparallel decode` prints."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import dparallel_ext as dx
from dparallel_ext.arguments import whole
from dparallel_ext.models import Model, check_diffusion

from . import registry, text
from .live import LiveText
from .recording import Recording, answer_of, how_of

Decoded = TypeVar("Decoded", bound=dx.DecodeOutput)


def complete(
    name: str,
    model: Model,
    tokenizer: Any,
    prompts: list[str | list[text.Message]],
    config: dx.DecodeConfig,
    *,
    template: text.Template | None = None,
    suffix: str | None = None,
    draft_size: int | None = None,
    live: LiveText | None = None,
    recording: Recording | None = None,
) -> Iterator[dict[str, Any]]:
    """Decode prompts together; yield each one's prompt, response, tokens, forwards and, with `infill`, text.

    `name`: the model's. `suffix`: text after the response. `draft_size`: see `decode`. `recording`: receives
    the answers.

    Raises ValueError naming the argument that does not fit.
    """
    check_diffusion(model, decoding=True)
    encode, mask = text.prompt_encoder(tokenizer, template), model.mask_id
    if mask is None:
        raise ValueError(f"mask_id: the files of {name} name no mask token, so give --mask-id")
    ids, infill = [encode(prompt) for prompt in prompts], config.infill
    count = whole("gen_length", config.gen_length, 1 if suffix else 0)  # tokens that decode appends
    if suffix:
        after = tokenizer.encode(suffix, add_special_tokens=False).ids
        ids, count = [[*prompt_ids, *[mask] * count, *after] for prompt_ids in ids], 0
    gaps = [prompt_ids.count(mask) if infill or suffix else 0 for prompt_ids in ids]
    if infill and not count and not all(gaps):
        token = tokenizer.id_to_token(mask)
        raise ValueError(f"prompt: expected a mask token, {token}, where --infill is to fill it")
    registry.check_positions(name, model, max(map(len, ids), default=0) + count)
    config = config.replace(gen_length=count, infill=infill or bool(suffix), record=recording is not None)
    decode = functools.partial(dx.decode, model, draft_size=draft_size)
    with registry.naming("infill" if infill else "suffix", "infill"):
        out, seconds = timed(decode, ids, config, live)
    texts = text.TokenTexts(tokenizer)
    for i, (prompt, tokens, passes) in enumerate(zip(prompts, out.responses, out.nfe.tolist(), strict=True)):
        # A block-causal model fills its last block beyond gen_length.
        kept = min(int(out.kept[i]), gaps[i] + count)
        response = tokenizer.decode(tokens[:kept].tolist())
        if recording is not None:
            how = how_of(config, guesses=draft_size)
            shown: dict[str, Any] = {"model": name, "how": how, "seconds": seconds, "infill": infill}
            answer = answer_of(out, i, texts, kept=kept, length=gaps[i] + count, **shown)
            recording.add(text.shown(prompt), answer)
        row = {"prompt": prompt, "response": response, "tokens": kept, "forwards": passes}
        yield {**row, "text": tokenizer.decode(in_place(out, i, kept))} if infill else row


class LeftToRight(NamedTuple):
    """Decoding from left to right, by `speculate` or `adaptive_decode`."""

    decode: Callable[..., dx.DecodeOutput]
    """(prompts, config, streamer=) -> the output."""
    how: str
    """What it does, in words, for a recording."""
    counted: tuple[str, str]
    """A key of each row, and the output's field of B numbers that it takes."""


def speculating(model: Model, drafter: str | None, draft_size: int | None) -> LeftToRight:
    """Decoding by an autoregressive model; its rows have their number of "drafts".

    Raises as `registry.load_drafter`.
    """
    loaded = registry.load_drafter(drafter, model.device, model.dtype)
    decode = functools.partial(dx.speculate, model, drafter=loaded, draft_size=draft_size)
    how = "a token a pass" if drafter is None else f"{drafter} guesses ahead"
    return LeftToRight(decode, how, ("drafts", "draft_nfe"))


def verifying(model: Model, tokenizer: Any, verifier: str, options: Mapping[str, Any]) -> LeftToRight:
    """Decoding by a diffusion model with a verifier; its rows have the verifier's passes as "verifications".

    options: mixture, window and lookahead, as far as they are given. Raises as `registry.load_verifier`.
    """
    loaded = registry.load_verifier(verifier, model, tokenizer)
    decode = functools.partial(dx.adaptive_decode, model, verifier=loaded, **options)
    how = ", ".join([f"{verifier} agrees", *(f"{key} {value}" for key, value in options.items())])
    return LeftToRight(decode, how, ("verifications", "verifier_nfe"))


def complete_left_to_right(
    name: str,
    model: Model,
    tokenizer: Any,
    prompts: list[str | list[text.Message]],
    config: dx.DecodeConfig,
    decoder: LeftToRight,
    *,
    template: text.Template | None = None,
    live: LiveText | None = None,
    recording: Recording | None = None,
) -> Iterator[dict[str, Any]]:
    """`complete` from left to right. Raises ValueError naming the argument that does not fit."""
    encode = text.prompt_encoder(tokenizer, template)
    ids = [encode(prompt) for prompt in prompts]
    count = whole("gen_length", config.gen_length, 0)
    registry.check_positions(name, model, max(map(len, ids), default=0) + count)
    out, seconds = timed(decoder.decode, ids, config.replace(record=recording is not None), live)
    texts, (key, field) = text.TokenTexts(tokenizer), decoder.counted
    for i, (prompt, tokens) in enumerate(zip(prompts, out.responses, strict=True)):
        kept = int(out.kept[i])
        if recording is not None:
            shared: dict[str, Any] = {"seconds": seconds, "length": len(tokens)}
            answer = answer_of(out, i, texts, model=name, how=decoder.how, kept=kept, **shared)
            recording.add(text.shown(prompt), answer)
        row = {"prompt": prompt, "response": tokenizer.decode(tokens[:kept].tolist()), "tokens": kept}
        yield {**row, "forwards": int(out.nfe[i]), key: int(getattr(out, field)[i])}


def timed(
    decode: Callable[..., Decoded], prompts: Sequence[Any], config: dx.DecodeConfig, live: LiveText | None
) -> tuple[Decoded, float | None]:
    """The output of `decode`, see `LeftToRight`, and its seconds if it had one prompt and showed no passes
    meanwhile; else None."""
    with live or contextlib.nullcontext():
        began = time.perf_counter()
        out = decode(prompts, config, streamer=live)
        seconds = time.perf_counter() - began
    return out, seconds if len(prompts) == 1 and live is None else None


def in_place(out: dx.DecodeOutput, i: int, kept: int) -> list[int]:
    """The tokens of sequence i, given and decoded, without decoded ones after the first `kept`."""
    left_out = set(out.masked[i].nonzero()[kept:, 0].tolist())
    tokens = out.sequences[i, : int(out.lengths[i])].tolist()
    return [token for at, token in enumerate(tokens) if at not in left_out]
