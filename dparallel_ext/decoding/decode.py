"""Decode a masked diffusion language model, block by block, many tokens a pass.

`config` says how, `settings` checks that against the model, and `batch` runs the passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Unpack

import torch
from torch import Tensor

from .. import arguments
from ..models import check_call, for_decoding, ids_device, warn_beyond
from ..types import RowTopK
from .batch import Batch
from .config import DecodeConfig, DecodeKeywords, configured, names_fields
from .schedule import Schedule
from .self_speculation import SelfSpeculation, batch_class, check_draft, states_to_guess
from .sequence_settings import SequenceSettings
from .settings import ResolvedConfig, check_model, check_settings, make_settings, vocabulary
from .workspace import Trajectory

AHEAD = 8
"""The most passes that the host issues before it reads their results, where no result could change them."""

Prompts = Tensor | Sequence[Tensor] | Sequence[Sequence[int]] | Sequence[int] | Mapping[str, Any]
"""Prompts of `decode`: ids (B, P) or (P,), a list of (P,), or a tokenizer's output with "input_ids"."""


@dataclass
class DecodeOutput:
    """The output of `decode`; `sequences, forwards = decode(...)` unpacks."""

    sequences: Tensor
    """(B, L) int64: prompts and decoded tokens. Padding, the first `eos_id` or else the mask token, follows
    shorter sequences and replaces the masks behind a sequence's end."""
    nfe: Tensor
    """(B,) int64: forward passes over each sequence."""
    forwards: int
    """Forward passes that the call ran."""
    generated: Tensor
    """(B,) int64: tokens decoded; fewer than the response has where EOS or a stop sequence ended it."""
    kept: Tensor
    """(B,) int64: response tokens in front of EOS or a stop sequence; all where there is none."""
    lengths: Tensor
    """(B,) int64: tokens of prompt and response together, EOS filling included, padding not."""
    prompt_lengths: Tensor
    """(B,) int64: tokens of the prompt, its masks included."""
    masked: Tensor
    """(B, L) bool: the places of the response. They held the masks to fill: the masks after the prompt, and
    with `infill` the masks in it."""
    nfe_published: Tensor
    """(B,) int64: passes of the published loops, which run some that change nothing: with "prefix" and "dual"
    where a block was complete after its full pass, with "block" to prefill and to store each block, with
    "window" (WeDLM) to prefill and to store the last tokens."""
    trajectory: Trajectory | None = field(default=None, repr=False)
    """With `record`: when each token of the response was committed, and how sure the model was."""
    logprobs: Tensor | None = field(default=None, repr=False)
    """(B, R) float32, with `logprobs`: the log-probability (nats) that each token of the response was drawn
    with, in the pass that committed it; NaN where none did (EOS filling, padding)."""
    top_logprobs: RowTopK | None = field(default=None, repr=False)
    """With `top_logprobs`: token (B, R, K) int64 and logprob (B, R, K) float32, the K most probable tokens of
    each place and their log-probabilities, in the pass that committed its token, in descending order. -1 and
    -inf where fewer could be drawn; -1 and NaN where no pass committed a token."""
    canvases: Tensor | None = field(default=None, repr=False)
    """(B,) int64, with `draft_size`: how many canvases the passes have computed for each sequence, one for
    the sequence itself and one for each copy of it that holds guesses."""

    @property
    def responses(self) -> list[Tensor]:
        """Each sequence's response, (R,) int64: the tokens at the places that held masks, in order.

        These are the gen_length tokens after the prompt (of block-causal models more, to the end of a block).
        With `infill`, the tokens at the prompt's masks come first, without the text between them: `sequences`
        has that.
        """
        return [row[held] for row, held in zip(self.sequences, self.masked, strict=True)]

    @property
    def tokens_per_forward(self) -> float:
        """Response tokens in front of EOS or a stop sequence (`kept`) per pass, over all sequences.

        0 where there was no pass. Without `eos_id` and `stop`, all response tokens count as text.
        """
        return self._per_forward(self.kept)

    @property
    def padded_tokens_per_forward(self) -> float:
        """Tokens decoded per pass (`generated`), the filling behind EOS included; 0 where there was no
        pass."""
        return self._per_forward(self.generated)

    def _per_forward(self, tokens: Tensor) -> float:
        passes = int(self.nfe.sum())
        return int(tokens.sum()) / passes if passes else 0.0

    def __iter__(self) -> Iterator[Any]:
        return iter((self.sequences, self.forwards))


@names_fields
def decode(
    model: Any,
    prompt: Prompts,
    config: DecodeConfig | None = None,
    *,
    draft_size: int | None = None,
    attention_mask: Any = None,
    streamer: Any = None,
    progress: bool = False,
    **keywords: Unpack[DecodeKeywords],
) -> DecodeOutput:
    """Decode `gen_length` tokens after each prompt.

    Args:
        model: one of ours (`dparallel_ext.models`), or anything whose call on input_ids (B, L) returns an
            object with `.logits` (B, L, V): Hugging Face models work as they are. Either may be compiled,
            adapted by PEFT or in a parallel wrapper, see `models.for_decoding`; a function may have an
            attribute `traits`, a `models.Traits`. It is called as it is: put it in eval mode first if it has
            dropout. `torch.autocast` applies to models that are not ours.
        prompt: token ids (B, P) or (P,), or a list of (P,) of any lengths, as tensors, numpy arrays or lists;
            or a tokenizer's output with its attention_mask. Mask tokens stay as they are, unless `infill` is
            on. Ids go to the model's device, if it has a `device`, as our models and Hugging Face's have.
        config: how the prompts are decoded; default: `DecodeConfig()`.
        draft_size: self-speculation (SSD, arXiv 2510.04147), see `self_speculation`: the same text in fewer
            passes, each over up to 1 + draft_size copies of a sequence, which hold guesses of what the next
            passes would commit (`DecodeOutput.canvases` counts the copies). Goes with policy rows, not with
            other rules; with cache "window" with a fixed number of tokens a pass. None and 0: nothing is
            guessed.
        attention_mask: bool or whole numbers, in the shape of `prompt`; 0 marks padding, on either side.
            Padding is taken out: it costs nothing and changes nothing.
        streamer: an object with `put` and `end`, as transformers' streamers, and perhaps `put_draft`. Needs a
            batch of one prompt.
        progress: show a tqdm bar of committed tokens.
        keywords: fields of `DecodeConfig`; they replace the config's.

    Returns:
        DecodeOutput. Each sequence goes from block to block at its own pace, and once complete is in no
        pass. The published loops run some passes that change nothing: `nfe_published` counts them too (with
        `draft_size`, the passes that there would be without it).

    Raises:
        ValueError: naming the argument that does not fit; or, if the logits hold NaN or leave no token to
            choose, naming sequence and position.
        TypeError: for a keyword that is no field.
    """
    config = configured("decode", config, keywords)
    with torch.inference_mode():
        prompts = arguments.prompts(prompt, attention_mask)
        size = len(prompts)
        shown = getattr(streamer, "put_draft", None)
        batch = start_batch(
            model, prompts, config, draft_size=draft_size, ahead=AHEAD if shown is None else 1
        )
        arguments.check_streamer(streamer, size)
        run(batch, streamer, progress, "decode", shown)
    canvases = {"canvases": batch.canvases} if isinstance(batch, SelfSpeculation) else {}
    out = DecodeOutput(**output_fields(batch, size, batch.tokens.device, config, **canvases))
    batch.keep()
    if not size and isinstance(prompt, Tensor) and isinstance(config.gen_length, int):
        shape = 0, prompt.shape[1] + config.gen_length
        out.sequences, out.masked = out.sequences.new_zeros(shape), out.masked.new_zeros(shape)
    return out


def output_fields(
    batch: Any, size: int, device: torch.device, config: DecodeConfig, **others: Sequence[int]
) -> dict[str, Any]:
    """The fields of the `DecodeOutput` of a batch's first `size` sequences, on `device`.

    batch: a `Batch`, or a `speculation.CausalBatch`; it is over. others: further numbers of the sequences, by
    their fields. Call it outside inference mode: tensors made there cannot enter autograd later.
    """
    sequences = batch.sequences[:size]
    tokens = batch.tokens[:size].clone()
    masked = torch.zeros(tokens.shape, dtype=torch.bool, device="cpu")
    for places, sequence in zip(masked, sequences, strict=True):
        places[sequence.prompt : sequence.length].fill_(True)
        if sequence.columns and sequence.columns[0] < sequence.prompt:  # masks of the prompt
            places[list(sequence.columns)] = True
    numbers: dict[str, Sequence[int]] = {
        "nfe": batch.nfe[:size],
        "generated": [sequence.decoded for sequence in sequences],
        "kept": [sequence.kept for sequence in sequences],
        "lengths": [sequence.length for sequence in sequences],
        "prompt_lengths": [sequence.prompt for sequence in sequences],
        "nfe_published": [sequence.published for sequence in sequences],
        **others,
    }
    # In one copy to the device.
    counts = torch.tensor([*numbers.values()], dtype=torch.int64, device="cpu").to(device)
    fields = {
        "sequences": tokens.to(device),
        "masked": masked.to(device),
        "forwards": batch.forwards,
        **dict(zip(numbers, counts, strict=True)),
    }
    if config.record or config.logprobs:
        trajectory = batch.trajectory.responses(masked, device, config.top_logprobs)
        fields |= {"trajectory": trajectory} if config.record else {}
        fields |= {"logprobs": trajectory.logprob} if config.logprobs else {}
        fields |= {"top_logprobs": trajectory.top}
    return fields


def start_batch(
    model: Any,
    prompts: list[Tensor],
    config: DecodeConfig,
    *,
    draft_size: int | None = None,
    ahead: int = AHEAD,
    schedule: Callable[[Schedule], Schedule] = lambda schedule: schedule,
) -> Batch:
    """The batch of a call of `decode`, its prompts admitted.

    ahead: see `Batch`. schedule: maps the cache mode's schedule to the schedule that is followed. Raises
    ValueError naming the argument that does not fit.
    """
    model = for_decoding(model)
    check_call(model)
    resolved, settings, guesses = resolve(model, config, len(prompts), draft_size)
    counts = arguments.per_sequence("gen_length", config.gen_length, len(prompts), 0)
    mask_id = resolved.mask_id
    arguments.check_ids("prompt", prompts, vocabulary(model))  # before they move: ids on the CPU need no wait
    masked: list[list[int]] = [[] for _ in prompts]
    if config.infill:
        masked = [masked_columns(prompt, mask_id) for prompt in arguments.moved(prompts, torch.device("cpu"))]
    if (device := ids_device(model)) is not None:
        prompts = arguments.moved(prompts, device)
    lengths = [
        resolved.schedule.length(len(prompt), count) for prompt, count in zip(prompts, counts, strict=True)
    ]
    warn_beyond(model, max(lengths, default=0))
    batch = batch_class(guesses)(
        model,
        len(prompts),
        max(lengths, default=0),
        schedule(resolved.schedule),
        mask_id,
        pad_id=next(iter(config.eos_ids), mask_id),
        device=prompts[0].device if prompts else "cpu",
        batch_invariant=config.batch_invariant,
        graphs=config.graphs,
        ahead=ahead,
    )
    each = zip(prompts, counts, settings, masked, strict=True)
    for lane, (prompt, count, setting, columns) in enumerate(each):
        batch.admit(lane, prompt, count, setting, masked=columns)
    return batch


def resolve(
    model: Any, config: DecodeConfig, size: int, draft_size: int | None
) -> tuple[ResolvedConfig, list[SequenceSettings], int]:
    """The cache mode and the like of a model under a config, the settings of `size` sequences, and the number
    of states that self-speculation guesses.

    The model may be one of `models.as_stored`. Raises ValueError naming the argument that does not fit.
    """
    resolved = check_model(config, model, "none")
    settings = make_settings(config, model, resolved.cache, size)
    check_settings(model, settings, resolved)
    if config.active_blocks > 1 and any(setting.one_block for setting in settings):
        raise ValueError(
            "active_blocks: several need a threshold or a rule, and none that edits or reads the whole "
            f"response, got {config.active_blocks}"
        )
    guesses = states_to_guess(draft_size, resolved.schedule)
    if guesses:
        check_draft(settings, resolved.schedule)
    return resolved, settings, guesses


def masked_columns(prompt: Tensor, mask_id: int) -> list[int]:
    """The columns of `prompt` (P,) that hold the mask token, ascending."""
    return (prompt == mask_id).nonzero()[:, 0].tolist()


def run(
    batch: Any,
    streamer: Any,
    progress: bool,
    name: str,
    put_draft: Callable[[Tensor], object] | None = None,
) -> None:
    """Run passes until every sequence is complete.

    batch: a `Batch`, or a `speculation.CausalBatch`. name: of the progress bar. put_draft: called after every
    pass with all that follows the tokens that the streamer has.
    """
    x = batch.tokens[:1]  # a streamer's batch has one sequence
    bar = progress_bar(progress, sum(len(sequence.columns) for sequence in batch.sequences), name)
    sent = end = decoded = 0
    if streamer is not None:
        sent = batch.sequences[0].ahead
        streamer.put(x[:, :sent].to("cpu", copy=True))  # it may keep and change what it gets
    while batch.live:
        if streamer is not None:
            _, end = batch.sequences[0].block
        finished = batch.step()
        if bar is not None:
            before, decoded = decoded, sum(sequence.decoded for sequence in batch.sequences)
            bar.update(decoded - before)
        if put_draft is not None:
            put_draft(x[:, sent:].to("cpu", copy=True))
        if streamer is not None and finished:
            # The block, then the given tokens or padding between it and the next mask.
            ahead = batch.sequences[0].ahead
            for last in (min(end, ahead), ahead):
                if sent < last:
                    streamer.put(x[0, sent:last].to("cpu", copy=True))
                    sent = last
        batch.enter(finished)
    if bar is not None:
        bar.close()
    if streamer is not None:
        streamer.end()


def progress_bar(progress: bool, total: int, name: str, unit: str = "token", **options: Any) -> Any:
    """A tqdm bar, if `progress`; else None."""
    if not progress:
        return None
    from tqdm import tqdm

    return tqdm(total=total, desc=name, unit=unit, **options)
