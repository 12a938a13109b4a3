"""Decode an autoregressive model to its own text, several tokens a pass if a drafter guesses them.

`batch` runs the passes; `drafter` is the protocol of drafters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor

from .. import arguments
from ..decoding.config import DEFAULTS, DecodeConfig, DecodeKeywords, configured, names_fields, with_ends
from ..decoding.decode import DecodeOutput, Prompts, output_fields, run
from ..decoding.fields import plain
from ..decoding.settings import check_ends, make_settings
from ..models import Model, native, warn_beyond
from .batch import CausalBatch
from .drafter import Apart, Drafter
from .loading import NAMED, drafter_of
from .sequence import Verified
from .sizing import Fixed, Sizer, remembered_sizer, sizer_for

DIFFUSION_FIELDS = (
    *("infill", "block_length", "sub_block_length", "steps", "threshold", "selector", "policy", "rule"),
    *("min_commit", "max_commit", "score", "cache", "refresh", "active_blocks", "open_at", "activate_at"),
    "mask_id",
)
"""Fields of `DecodeConfig` about masked diffusion."""


@dataclass
class SpeculateOutput(DecodeOutput):
    """The output of `speculate`, as `decode`'s; `nfe` and `forwards` count the model's passes, not the
    drafter's.
    """

    draft_nfe: Tensor = field(kw_only=True)
    """(B,) int64: drafts made for each sequence."""
    draft_forwards: int = field(kw_only=True)
    """Calls of the drafter."""
    drafted: Tensor = field(kw_only=True)
    """(D,) int64: drafts, over all sequences, that reached depth 1, 2, ..., D."""
    accepted: Tensor = field(kw_only=True)
    """(D,) int64: how many of these drafts had the model's own choice at this depth."""
    layers: Tensor = field(kw_only=True)
    """(B,) int64: layers of the model run for each sequence, one after the other: all of them in each pass,
    unless some have run for the draft (AdaDecode)."""
    passes: list[list[Verified]] | None = field(default=None, repr=False)
    """With `record`, for each sequence and pass the drafted, accepted and refused tokens."""

    @property
    def accepted_per_draft(self) -> float:
        """The mean number of accepted tokens of a draft, without the model's own token that each pass
        adds."""
        drafts = int(self.drafted[0]) if len(self.drafted) else 0
        return int(self.accepted.sum()) / drafts if drafts else 0.0


@names_fields
def speculate(
    model: Any,
    prompt: Prompts,
    config: DecodeConfig | None = None,
    *,
    drafter: Drafter | str | Path | None = None,
    draft_size: int | None = None,
    attention_mask: Any = None,
    streamer: Any = None,
    progress: bool = False,
    **keywords: Unpack[DecodeKeywords],
) -> SpeculateOutput:
    """Decode up to `gen_length` tokens after each prompt with an autoregressive model.

    The text is the model's own: at temperature 0 the argmax after every token, above it a sample whose noise
    is keyed by seed, sequence and position. A drafter changes the number of passes, not the text: only
    guesses that are the model's choice stay. (The matrix library may round a row differently beside other
    rows, so of two logits that are equal but for rounding, either may win.)

    Args:
        model: an autoregressive model of `dparallel_ext.models`: Llama, Qwen2, Qwen3; `models.wrap` makes one
            from a loaded Hugging Face model.
        prompt: see `decode`; each has at least one token.
        config: how the prompts are decoded; default: `DecodeConfig()`. Fields about masks (block_length,
            threshold, rule, cache and the like) belong to `decode` alone.
        drafter: guesses tokens, see `speculation`: a `Drafter`; "ngram", prompt lookup ("ngram:N" compares up
            to N tokens); "recycling", trees of the model's own earlier candidates; "self" or "strided", masks
            of a model that was trained for them too; the path of a drafter with weights (`dparallel drafter`
            trains one; `speculation.load` reads it, and what is published of DFlash, EAGLE-3 and P-EAGLE),
            with "tree:" before the path of a drafter of blocks or an EAGLE head for trees of its guesses; or
            a model of `dparallel_ext.models` with the same tokenizer, autoregressive or of diffusion. None:
            plain decoding. Recordings on a GPU are kept for the next call with the same model, if it is
            plain, its drafter has no part in the model's passes, or the drafter is the same object, by itself
            or by its name.
        draft_size: the most nodes and riders of a draft; beyond the drafter's own `most` it changes nothing.
            None: the number that gives the most tokens per second, by measured times and acceptance; the text
            is the same, but the number of passes is reproducible only with a fixed size. Without a drafter it
            has no effect.
        attention_mask: see `decode`.
        streamer: an object with `put` and `end`, as transformers' streamers. Needs a batch of one prompt.
        progress: show a tqdm bar of tokens.
        keywords: fields of `DecodeConfig`; they replace the config's. `eos_id`: None: the model's own end
            tokens, as in transformers' `generate`; one or several replace them; -1: none.

    Returns:
        SpeculateOutput. A sequence that has ended is in no pass, and is filled with the end token.

    Raises:
        ValueError: naming the argument that does not fit; or, if the logits hold NaN or leave no token to
            choose, naming sequence and position.
        TypeError: for a keyword that is no field.
    """
    check_causal(keywords)  # before a rule's text is read: there is none that would do
    config = configured("speculate", config, keywords)
    check_causal(vars(config))
    with torch.inference_mode():
        prompts = arguments.prompts(prompt, attention_mask)
        device = prompts[0].device if prompts else torch.device("cpu")
        prompts = arguments.moved(prompts, torch.device("cpu"))
        size = len(prompts)
        model = causal_model(model)
        config = with_checked_ends(model, config)
        drafter_given = NAMED.get(drafter, drafter) if isinstance(drafter, str) else drafter
        drafter = drafter_of(drafter_given, model.device, model.dtype)
        if drafter is not None:
            drafter.check(model)
        counts = arguments.per_sequence("gen_length", config.gen_length, size, 0)
        settings = make_settings(config, model, "none", size)
        check_prompts(model, prompts)
        arguments.check_streamer(streamer, size)
        lengths = [len(ids) + count for ids, count in zip(prompts, counts, strict=True)]
        warn_beyond(model, max(lengths, default=0))
        batch = CausalBatch(
            model,
            size,
            max(lengths, default=0),
            drafter=drafter,
            sizer=sizer_of(
                drafter, draft_size, lambda drafter: remembered_sizer(model, drafter_given, drafter)
            ),
            pad_id=next(iter(config.eos_ids), 0),
            batch_invariant=config.batch_invariant,
            graphs=config.graphs,
            ahead=1,
        )
        for lane, request in enumerate(zip(prompts, counts, settings, strict=True)):
            batch.admit(lane, *request)
        run(batch, streamer, progress, "speculate")
        if drafter is drafter_given or isinstance(drafter, Apart):  # else the next call has another
            batch.keep()
    numbers = {name: [getattr(each, name) for each in batch.sequences] for name in ("draft_nfe", "layers")}
    return SpeculateOutput(
        **output_fields(batch, size, device, config, **numbers),
        **verified_fields(batch, config),
        draft_forwards=batch.draft_forwards,
    )


def verified_fields(batch: CausalBatch, config: DecodeConfig) -> dict[str, Any]:
    """The fields about verified drafts of the outputs of `speculate` and `adaptive_decode`."""
    fields: dict[str, Any] = {
        name: torch.tensor(numbers, dtype=torch.int64, device="cpu")
        for name, numbers in vars(batch.counts).items()
    }
    return fields | {"passes": [sequence.passes for sequence in batch.sequences] if config.record else None}


def causal_model(model: Any) -> Model:
    """`model` without wrappers. Raises ValueError unless it is a native autoregressive model."""
    inner = native(model, expected="an autoregressive one")
    if not inner.causal:
        raise ValueError(
            f"model: {type(inner).__name__} is a diffusion model, whose masks `dparallel_ext.decode` fills; "
            "expected an autoregressive one"
        )
    return inner


def check_causal(fields: Mapping[str, Any]) -> None:
    """Raise ValueError for a field of `DecodeConfig` that does not apply to an autoregressive model."""
    check_unset(fields, DIFFUSION_FIELDS, "belongs to masked diffusion; an autoregressive model takes none")


def check_unset(fields: Mapping[str, Any], names: Iterable[str], why: str) -> None:
    """Raise ValueError, saying why, if one of these fields of `DecodeConfig` has not its default."""
    for name in names:
        if (value := plain(fields.get(name, DEFAULTS[name]))) != DEFAULTS[name]:
            raise ValueError(f"{name}: {why}, got {arguments.shown(value)}")


def check_prompts(model: Model, prompts: Sequence[Tensor]) -> None:
    """Raise ValueError for ids that the model does not have, and for a prompt without a token."""
    arguments.check_ids("prompt", prompts, model.shape.embedding_size)
    for number, ids in enumerate(prompts):
        if not len(ids):
            raise ValueError(f"prompt: expected at least one token, got none in sequence {number}")


def with_checked_ends(model: Model, config: DecodeConfig, mask_id: int | None = None) -> DecodeConfig:
    """The config with the end tokens in force. Raises ValueError for an end token or a stop sequence that the
    model never decodes."""
    check_ends(config.eos_ids, config.stop, model.shape.embedding_size, mask_id)
    return with_ends(config, model.eos_ids)


def sizer_of(
    drafter: Drafter | None, draft_size: int | None, make_sizer: Callable[[Drafter], Sizer] = sizer_for
) -> Sizer:
    """The sizer of a call. make_sizer: makes the sizer of a drafter if no size is given."""
    if draft_size is not None:
        return Fixed(arguments.whole("draft_size", draft_size, 0))
    return Fixed(0) if drafter is None else make_sizer(drafter)
