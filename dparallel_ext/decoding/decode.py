"""Decode a masked diffusion language model, block by block, many tokens a pass.

What a pass is: `batch`. Which rule it commits by: here, from the arguments of `decode`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import arguments, policies
from ..arguments import shown, temperature_in_force, whole
from ..models import Model, Traits, for_decoding, traits, warn_beyond
from ..ops.inputs import check_sampling
from ..rules import Function, FunctionRule, Rule, parse
from .batch import AHEAD, Batch
from .schedule import CACHES, Schedule, make
from .sequence import Settings, whole_length
from .workspace import Trajectory

Prompts = Tensor | Sequence[Tensor] | Sequence[Sequence[int]] | Sequence[int] | Mapping[str, Any]
"""Of `decode`: token ids (B, P) or (P,), a list of (P,), or a tokenizer's output with its "input_ids"."""


@dataclass
class DecodeOutput:
    """What `decode` returns; `sequences, forwards = decode(...)` unpacks."""

    sequences: Tensor
    """(B, L) int64: prompts and what was decoded; shorter ones end in padding: `eos_id`, else the mask. So do
    the masks that a sequence was ended before."""
    nfe: Tensor
    """(B,) int64: forward passes that each sequence needed."""
    forwards: int
    """Forward passes that the call ran."""
    generated: Tensor
    """(B,) int64: tokens decoded; fewer than the response has where EOS or a stop sequence ended it."""
    kept: Tensor
    """(B,) int64: response tokens in front of EOS or a stop sequence; all where there is none."""
    lengths: Tensor
    """(B,) int64: of prompt and response together, EOS filling included, padding not."""
    prompt_lengths: Tensor
    """(B,) int64, masks that were filled included."""
    masked: Tensor
    """(B, L) bool: the places of the response, which held the masks that were to be filled: those after the
    prompt, and with `infill` those in it."""
    nfe_published: Tensor
    """(B,) int64: passes of the published loops, which run some that change nothing: with "prefix" and "dual"
    where a block was complete after its full pass, with "block" to prefill and to store each block."""
    trajectory: Trajectory | None = field(default=None, repr=False)
    logprobs: Tensor | None = field(default=None, repr=False)
    """(B, R) float32, with `logprobs`: log of the probability that each token of the response was
    drawn with, in the pass that committed it; NaN where none did (EOS filling, padding)."""

    @property
    def responses(self) -> list[Tensor]:
        """Each sequence's response, (R,) int64: the tokens at the places that held masks, in order.

        These are the gen_length tokens after the prompt (of block-causal models more, to the end of a block).
        With `infill`, those in the prompt come first, without the text between them: `sequences` has that.
        """
        return [row[held] for row, held in zip(self.sequences, self.masked, strict=True)]

    @property
    def tokens_per_forward(self) -> float:
        """Response tokens in front of EOS or a stop sequence (`kept`) per pass, over all sequences.

        0 where there was no pass. Only what `eos_id` and `stop` name can be told from the text.
        """
        return self._per_forward(self.kept)

    @property
    def padded_tokens_per_forward(self) -> float:
        """Tokens decoded per pass (`generated`), what follows EOS included; 0 where there was no pass."""
        return self._per_forward(self.generated)

    def _per_forward(self, tokens: Tensor) -> float:
        passes = int(self.nfe.sum())
        return int(tokens.sum()) / passes if passes else 0.0

    def __iter__(self) -> Iterator[Any]:
        return iter((self.sequences, self.forwards))


def decode(
    model: Any,
    prompt: Prompts,
    *,
    attention_mask: Any = None,
    gen_length: int | Sequence[int] | Tensor = 256,
    infill: bool = False,
    block_length: int | None = None,
    sub_block_length: int | None = None,
    steps: int | None = None,
    threshold: float | Tensor | None = None,
    selector: policies.Name | None = None,
    policy: Tensor | Function | None = None,
    rule: Rule | Function | str | None = None,
    min_commit: policies.Number = 1,
    max_commit: policies.Number | None = None,
    score: policies.Name | None = None,
    cache: str = "none",
    refresh: int | None = None,
    batch_invariant: bool = False,
    graphs: bool = True,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    suppress: Any = None,
    mask_id: int | None = None,
    eos_id: int | None = None,
    stop: Sequence[Sequence[int]] = (),
    seed: int | Tensor | None = None,
    streamer: Any = None,
    progress: bool = False,
    record: bool = False,
    logprobs: bool = False,
) -> DecodeOutput:
    """Decode `gen_length` tokens after each prompt.

    Args:
        model: one of ours (`dparallel_ext.models`), or anything whose call on input_ids (B, L) returns an
            object with `.logits` (B, L, V): Hugging Face models work as they are. Either may be compiled,
            adapted by PEFT or in a parallel wrapper, see `models.for_decoding`; a function says by its
            attribute `traits` what `models.Traits` names. It is called as it is: put it in eval mode first
            if it has dropout. `torch.autocast` holds for the calls of models that are not ours.
        prompt: (B, P) or (P,) int64; or a list of (P,) of any lengths. Tensors, numpy arrays and lists of ids
            will do, and what a tokenizer returns, with its attention_mask. Mask tokens stay as they are,
            unless `infill` is on. With one of our models it goes to the model's device.
        attention_mask: like `prompt`, bool or whole numbers, 0 where that is padded, on either side. Padding
            is taken out: it costs nothing and changes nothing.
        gen_length: tokens to decode, one number or one per sequence; the last block is shorter where
            block_length does not divide it. Block-causal models fill the last block to its end. Beyond the
            positions that the model's config names there is a warning.
        infill: the prompt's mask tokens are filled too, between given tokens, whether few are missing or most
            of a response (a warm start); `gen_length` may be 0. One list of blocks goes over all places that
            hold masks, and counts from the first; blocks without a mask are left out. Given tokens never
            change. The response, and the columns of a trajectory, are the places that held masks, in order.
            `eos_id` and `stop` are sought in the last run of masks alone: where more masks follow a given
            token, nothing ends in front of it, and the masks that an end leaves behind become padding. A
            streamer gets what stands in front of the first mask as its prompt, then given and decoded tokens
            in order. A block-causal model's blocks in front of the first mask are prefilled, later ones
            without a mask are computed with the next that has one; with gen_length 0 its last block stays as
            short as the prompt leaves it.
        block_length: tokens of a block; blocks are decoded left to right. Default: the model's own, where it
            is block-causal (blocks count from position 0), else 32. Block-causal models of ours attend by the
            blocks that are asked for, as in SDAR's published loop.
        sub_block_length: a divisor of block_length: of each block, the leftmost part of this length that has
            masks is filled first, the rest waits. Default: the model's own (Fast-dLLM v2), else block_length.
        steps: with `threshold` None, the fixed schedule: passes in all, the same number for each block,
            each committing its share of the block. None: one token a pass. Not with sub-blocks.
        threshold: the selector's parameter, a number or (B,); see `policies`. None: the fixed schedule.
        selector, min_commit, max_commit, score: the policy, each one value or one per sequence. They go with
            a `threshold`; its selector is "entropy" by default. The fixed schedule has `score` alone, by
            which it ranks; as published that is entropy with cache "prefix" or "dual", else confidence.
        policy: instead of all those: (B, 5) rows; or a function, as `rule`.
        rule: what decides beside or instead of the policy, see `rules`: a `rules.Rule`; its name, such as
            "credit", "sched:7.5" or "credit+confidence:0.8", whose part after the plus sign, like
            "entropy:0.5" alone, stands for selector and threshold; or a function
            (stats, masked, step) -> bool (B, W) over the columns of the block or sub-block, instead of a
            policy. At least one position commits all the same, and only masked ones.
        cache: "none", the whole sequence each pass; for our models also "prefix" (one full pass per
            block, then from the block on), "dual" (one full pass per block, then the block alone), and
            for block-causal ones "block" (each pass the block alone; finished blocks are exact). There, with
            sub-blocks, "dual" works inside the block: a pass over all of it until the sub-block's first token
            is known, then over the sub-block alone (Fast-dLLM v2's sub-block cache).
        refresh: with "dual", a full pass every `refresh` passes over a block, so that no entry grows stale.
        batch_invariant: each sequence in passes of its own, so that it comes out to the bit as alone. In
            shared passes the matrix library may round the same row otherwise in another batch.
        graphs: on a GPU, passes of our models are recorded as CUDA graphs and replayed. The tokens are the
            same without; nothing is recorded where a layer has hooks or adapters. Recordings stay with the
            model for the next calls of about this length and batch size, at most four and 1 GB of keys and
            values, until it is trained, moved or deleted.
        temperature: 0 is greedy, and so is what is below 1e-5; above it, tokens are Gumbel-max samples of
            softmax(logits / T). Above 2^100 (1.3e30) it is that.
        top_p, top_k: what may be sampled: the most probable ids (temperature first) before which at most
            `top_p` of the probability comes, and at most `top_k` of them. None, 1.0 and 0 leave nothing out.
            The rule judges the statistics of softmax(logits), whatever temperature, top_p and top_k are, and
            as confidence the probability of the sampled token there. Not read where temperature is 0.
        suppress: ids never to be decoded, left out of the softmax.
        mask_id: default: the model's `mask_token_id`.
        eos_id: if given, a sequence whose finished block holds it ends there: later blocks are not
            computed but filled with it. None, as published: every block is decoded.
        stop: sequences of tokens that end a response as eos_id does, wherever they lie in it.
        seed: a number: sequence b's samples are keyed by (seed, b); or (B,): by its own seed alone. None: a
            number from torch's generator, so that two calls differ and `torch.manual_seed` repeats them;
            nothing is taken from it where temperature is 0.
        streamer: an object with `put` and `end`, and perhaps `put_draft`, as transformers' streamers.
            Batch size 1.
        progress: a tqdm bar of committed tokens.
        record: keep the `trajectory`.
        logprobs: keep the `logprobs`: of each token log softmax(logits / T)[token] over the ids that could
            be drawn in the pass that committed it (not the mask token, `suppress`, nor what top_p and top_k
            leave out); where temperature is 0, log softmax(logits)[token]. In reinforcement learning they
            are the log-probabilities of the behaviour policy, given the positions that the rule chose: a
            token's importance ratio is exp(new - logprobs), where `new` is the same of the trained model in
            the same state (the tokens of an earlier `trajectory.step`, masks elsewhere; a pass against a
            cache saw older keys and values, so that cache "none" or "block" is what can be reproduced).

    Returns:
        DecodeOutput. A sequence that is complete is in no pass; each goes from block to block at its own
        pace. The published loops run some passes that change nothing: `nfe_published` counts them.

    Raises:
        ValueError: naming the argument that does not fit; or naming sequence and position where the
            logits hold NaN or leave no token to choose.
    """
    with torch.inference_mode():
        prompts = arguments.prompts(prompt, attention_mask)
        size = len(prompts)
        batch = start(
            model,
            prompts,
            gen_length,
            block_length,
            cache,
            mask_id,
            make_settings(
                traits(model),
                cache,
                size,
                steps=steps,
                threshold=threshold,
                selector=selector,
                policy=policy,
                rule=rule,
                min_commit=min_commit,
                max_commit=max_commit,
                score=score,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                suppress=suppress,
                eos_id=eos_id,
                stop=stop,
                seed=seed,
                record=record or logprobs,
            ),
            infill=infill,
            sub_block_length=sub_block_length,
            refresh=refresh,
            batch_invariant=batch_invariant,
            graphs=graphs,
        )
        if streamer is not None and size != 1:
            raise ValueError(f"streamer: expected a batch of 1, got {size}")
        run(batch, streamer, _bar(progress, sum(len(row.columns) for row in batch.rows)))
    # Tensors made in inference mode cannot enter autograd later; their copies can.
    x = batch.tokens.clone()
    masked = torch.zeros(x.shape, dtype=torch.bool)
    for places, row in zip(masked, batch.rows, strict=True):
        places[list(row.columns)] = True
    masked = masked.to(x.device)
    trajectory = batch.runner.trajectory.responses(masked) if record or logprobs else None
    if not size and isinstance(prompt, Tensor) and isinstance(gen_length, int):
        x, masked = (t.new_zeros((0, prompt.shape[1] + gen_length)) for t in (x, masked))
    numbers = [
        x.new_tensor([getattr(row, name) for row in batch.rows])
        for name in ("nfe", "generated", "kept", "length", "prompt", "published")
    ]
    nfe, generated, kept, lengths, prompt_lengths, published = numbers
    batch.keep()
    out = DecodeOutput(x, nfe, batch.forwards, generated, kept, lengths, prompt_lengths, masked, published)
    if trajectory is not None:
        out.trajectory = trajectory if record else None
        out.logprobs = trajectory.logprob if logprobs else None
    return out


def start(
    model: Any,
    prompts: list[Tensor],
    gen_length: int | Sequence[int] | Tensor,
    block_length: int | None,
    cache: str,
    mask_id: int | None,
    settings: Sequence[Settings],
    *,
    infill: bool = False,
    sub_block_length: int | None = None,
    refresh: int | None = None,
    schedule: Callable[[Schedule], Schedule] = lambda made: made,
    **more: Any,
) -> Batch:
    """The batch of a call, its arguments checked.

    settings: one for each prompt. schedule: makes what is followed of the cache mode's.
    """
    model = for_decoding(model)
    counts = arguments.numbers("gen_length", gen_length, len(prompts), 0)
    block_length, sub_block_length, mask_id, refresh = check_model(
        model, block_length, sub_block_length, cache, mask_id, refresh
    )
    check_settings(model, settings, block_length, sub_block_length)
    if isinstance(model, Model):
        prompts = [prompt.to(model.device) for prompt in prompts]
    arguments.check_ids("prompt", prompts, vocabulary(model))
    masked = [masks(prompt, mask_id) if infill else [] for prompt in prompts]
    causal = traits(model).block_length is not None
    lengths = [
        whole_length(len(prompt), count, block_length, causal)
        for prompt, count in zip(prompts, counts, strict=True)
    ]
    warn_beyond(model, "gen_length", max(lengths, default=0))
    eos_id = settings[0].eos_id if settings else None
    batch = Batch(
        model,
        len(prompts),
        max(lengths, default=0),
        schedule(make(cache, traits(model), block_length, sub_block_length, refresh)),
        mask_id,
        pad_id=mask_id if eos_id is None else eos_id,
        device=prompts[0].device if prompts else "cpu",
        **more,
    )
    each = zip(prompts, counts, settings, masked, strict=True)
    for lane, (prompt, count, own, columns) in enumerate(each):
        batch.admit(lane, prompt, count, own, masked=columns)
    return batch


def masks(prompt: Tensor, mask_id: int) -> list[int]:
    """The columns of `prompt` (P,) that hold the mask token, ascending."""
    columns: list[int] = (prompt == mask_id).nonzero()[:, 0].tolist()
    return columns


def vocabulary(model: Any) -> int | None:
    """Ids that the model's embedding knows; None where it cannot be asked."""
    if isinstance(model, Model):
        return model.shape.rows
    try:
        size = model.get_input_embeddings().num_embeddings
    except (AttributeError, NotImplementedError):
        return None
    return size if isinstance(size, int) else None


def check_mask(model: Any, mask_id: int) -> int:
    """`mask_id` as an int. Raises ValueError where the model has no such token."""
    mask, known = whole("mask_id", mask_id, 0), vocabulary(model)
    if known is not None and mask >= known:
        raise ValueError(f"mask_id: expected one of the model's {known} token ids, got {mask}")
    return mask


def check_settings(
    model: Any, settings: Sequence[Settings], block_length: int, sub_block_length: int
) -> None:
    """Raise ValueError for an EOS that the model does not have, and for a fixed schedule where a pass may
    fill a part of the block alone.
    """
    found, known = traits(model), vocabulary(model)
    for own in settings:
        if known is not None and own.eos_id is not None and own.eos_id >= known:
            raise ValueError(f"eos_id: expected one of the model's {known} token ids, got {own.eos_id}")
        if own.rule is not None and own.rule.edits and found.shift and found.block_length is not None:
            raise ValueError(
                f"rule: {type(own.rule).__name__} edits, which does not go with {type(model).__name__}: its "
                "blocks are begun by the block before"
            )
    for rule in {own.rule for own in settings if own.rule is not None}:
        rule.check(model, block_length)
    steps = next((own.steps for own in settings if own.steps is not None), None)
    in_parts = sub_block_length < block_length or (found.shift and found.block_length is not None)
    if steps is not None and in_parts:
        raise ValueError(
            "steps: the fixed schedule is for whole blocks; this one is filled part by part "
            f"(sub_block_length {sub_block_length}), so expected None, got {steps}"
        )


def check_model(
    model: Any,
    block_length: int | None,
    sub_block_length: int | None,
    cache: str,
    mask_id: int | None,
    refresh: int | None,
) -> tuple[int, int, int, int | None]:
    """block_length, sub_block_length and mask_id, by default the model's, and refresh.

    Raises ValueError where an argument does not fit the model.
    """
    found = traits(model)
    causal = found.block_length is not None
    block_length = whole(
        "block_length", found.block_length or 32 if block_length is None else block_length, 1
    )
    if cache not in CACHES:
        raise ValueError(f"cache: expected one of {CACHES}, got {cache!r}")
    if cache != "none" and not isinstance(model, Model):
        raise ValueError(
            f"cache: {cache!r} needs one of dparallel_ext.models (models.load, or models.wrap "
            f"for a loaded Hugging Face model), got {type(model).__name__}"
        )
    part = found.sub_block_length or block_length if sub_block_length is None else sub_block_length
    part = whole("sub_block_length", part, 1)
    if block_length % part:
        raise ValueError(f"sub_block_length: expected a divisor of block_length {block_length}, got {part}")
    within = causal and cache == "dual" and part < block_length
    if causal != (cache == "block") and cache != "none" and not within:
        if causal:
            fit = '"block" or "none" for a block-causal model, or "dual" where it is decoded by sub-blocks'
        else:
            fit = f'"none", "prefix" or "dual", since {type(model).__name__} is not block-causal'
        raise ValueError(f"cache: expected {fit}, got {cache!r}")
    if causal and block_length != found.block_length and not isinstance(model, Model):
        raise ValueError(
            f"block_length: the model attends by blocks of {found.block_length}, whatever is asked of it, "
            f"got {block_length}; one of dparallel_ext.models attends by what is given"
        )
    if refresh is not None:
        refresh = whole("refresh", refresh, 1)
        if cache != "dual":
            raise ValueError(f'refresh: belongs to cache "dual", got cache={cache!r}')
    mask = found.mask_id if mask_id is None else mask_id
    if mask is None:
        raise ValueError("mask_id: the model's config has no mask_token_id, so give one")
    return block_length, part, check_mask(model, mask), refresh


def run(batch: Batch, streamer: Any = None, bar: Any = None) -> None:
    """All passes."""
    x = batch.tokens
    sent = batch.rows[0].ahead if streamer is not None else 0
    if streamer is not None:
        streamer.put(x[:, :sent].cpu())
    drafts = hasattr(streamer, "put_draft")
    while live := batch.live:
        blocks = {b: batch.rows[b].block for b in live}
        decoded = sum(row.decoded for row in batch.rows)
        finished = batch.step(ahead=1 if drafts else AHEAD)
        if bar is not None:
            bar.update(sum(row.decoded for row in batch.rows) - decoded)
        if drafts:
            streamer.put_draft(x[:, sent:].cpu())
        for b in finished if streamer is not None else ():
            # The block, and then what was given, or is padding, in front of the next mask.
            for last in (blocks[b][1], batch.rows[b].ahead):
                if sent < last:
                    streamer.put(x[b, sent:last].cpu())
                    sent = last
        batch.enter(finished)
    if bar is not None:
        bar.close()
    if streamer is not None:
        streamer.end()


def _given(arguments: Mapping[str, Any]) -> list[str]:
    """The names of those that are not left at their default."""

    def default(name: str, value: Any) -> bool:
        return value is None or (name == "min_commit" and isinstance(value, int) and value == 1)

    return [name for name, value in arguments.items() if not default(name, value)]


def _rule(
    policy: Any, rule: Any, temperature: float, row: dict[str, Any]
) -> tuple[Rule | None, dict[str, Any]]:
    """The rule that `policy` or `rule` says, and the arguments for the policy row; `row` are those given."""
    if policy is not None:
        if rule is not None:
            raise ValueError("policy: give it alone, without rule")
        if given := _given(row):
            raise ValueError(f"policy: give it alone, without {given[0]}")
        if isinstance(policy, Tensor):
            return None, row
        if isinstance(policy, Rule) or not callable(policy):
            raise ValueError(f"policy: expected rows or a function, got {type(policy).__name__}")
        return FunctionRule(policy), row
    if isinstance(rule, str):
        named = [name for name in ("threshold", "selector", "steps") if row[name] is not None]
        rule, found = parse(rule, default=not named)
        if found and named:
            raise ValueError(f"rule: names a policy row, so give it without {named[0]}")
        row = {**row, **found}
    elif isinstance(rule, Rule):
        if rule.row is not None and not _given(row):
            row = {**row, **parse(rule.row)[1]}
    elif callable(rule):
        if given := _given(row):
            raise ValueError(f"rule: a function decides alone, so give it without {given[0]}")
        rule = FunctionRule(rule)
    elif rule is not None:
        raise ValueError(f"rule: expected a Rule, its name or a function, got {type(rule).__name__}")
    if rule is not None and rule.greedy and temperature > 0:
        raise ValueError(f"temperature: {type(rule).__name__} commits tokens of its own, so expected 0")
    return rule, row


def make_settings(
    found: Traits,
    cache: str,
    size: int,
    *,
    steps: int | None = None,
    threshold: Any = None,
    selector: policies.Name | None = None,
    policy: Tensor | Function | None = None,
    rule: Rule | Function | str | None = None,
    min_commit: policies.Number = 1,
    max_commit: policies.Number | None = None,
    score: policies.Name | None = None,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    suppress: Any = None,
    eos_id: int | None = None,
    stop: Sequence[Sequence[int]] = (),
    seed: int | Tensor | None = None,
    record: bool = False,
) -> list[Settings]:
    """The settings of `size` sequences from the arguments of `decode`, each one value or one per sequence."""
    temperature = temperature_in_force(temperature)
    row = {"threshold": threshold, "selector": selector, "steps": steps, "min_commit": min_commit}
    chosen, row = _rule(policy, rule, temperature, {**row, "max_commit": max_commit, "score": score})
    threshold, selector, steps = row["threshold"], row["selector"], row["steps"]
    if isinstance(policy, Tensor):
        rows = policy.cpu()  # so that its numbers are checked wherever they come from
        policies.check(rows, size)
    elif threshold is not None:
        if steps is not None:
            raise ValueError("steps: belongs to the fixed schedule, so not beside a threshold")
        selector = "entropy" if selector is None else selector
        rows = policies.make(
            selector,
            threshold,
            min_commit=min_commit,
            max_commit=max_commit,
            score=score,
            batch=size,
        )
        names = [selector] * size if isinstance(selector, str) else list(selector)
        for name, towards in (("entropy", -math.inf), ("confidence", math.inf)):
            if name in found.strict:
                here = torch.tensor([n == name for n in names], dtype=torch.bool)
                beyond = torch.nextafter(rows[:, 1], torch.tensor(towards))
                rows[:, 1] = torch.where(here, beyond, rows[:, 1])
    else:
        if steps is not None:
            steps = whole("steps", steps, 1)
        ignored = {"selector": selector, "min_commit": min_commit, "max_commit": max_commit}
        if given := _given(ignored):
            raise ValueError(
                f"{given[0]}: belongs to a threshold, and without one each pass commits the share of a fixed "
                f"schedule, got {ignored[given[0]]!r}"
            )
        if score is None:
            score = "entropy" if cache in ("prefix", "dual") else "confidence"
        rows = policies.make("quota", 1, score=score, batch=size)
    if still := (rows[:, 2] < 1).nonzero()[:, 0].tolist():  # its passes might commit nothing for ever
        raise ValueError(f"min_commit: expected a whole number >= 1, got 0 for sequence {still[0]}")
    if chosen is not None:
        for name in (policies.score_of(numbers) for numbers in rows.tolist()):
            if name in chosen.without:
                raise ValueError(f"selector: {type(chosen).__name__} has no {name} to rank by")
    if eos_id is not None:
        eos_id = whole("eos_id", eos_id, 0)
    if suppress is not None:
        suppress = arguments.token_ids("suppress", suppress).clone()  # an engine reads it later
    temperature, top_p, top_k = check_sampling(temperature, top_p, top_k)
    if seed is None:
        seed = drawn_seed(temperature)
    try:
        seeds = torch.as_tensor(seed)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"seed: expected an integer or int64 ({size},), got {seed!r}") from error
    if seeds.is_floating_point() or seeds.shape not in ((), (size,)):
        raise ValueError(
            f"seed: expected an integer or int64 ({size},), got {seeds.dtype} {tuple(seeds.shape)}"
        )
    # A seed of its own is a sequence's whole key; one for all goes with the place in the batch.
    keys = [(s, 0) for s in seeds.tolist()] if seeds.ndim else [(int(seeds), b) for b in range(size)]
    stops = []
    for sequence in stop if isinstance(stop, Iterable) and getattr(stop, "ndim", None) != 0 else [stop]:
        if getattr(sequence, "ndim", 0 if isinstance(sequence, int) else 1) == 0:
            raise ValueError(f"stop: expected sequences of token ids, got the number {shown(sequence)}")
        ids = arguments.token_ids("stop", sequence).tolist()
        if not ids:
            raise ValueError("stop: expected sequences of at least one token, got an empty one")
        stops.append(tuple(ids))
    schedule = steps if threshold is None else None
    return [
        Settings(
            tuple(numbers),
            schedule,
            temperature,
            suppress,
            key,
            eos_id,
            tuple(stops),
            top_p,
            top_k,
            chosen,
            record,
        )
        for numbers, key in zip(rows.tolist(), keys, strict=True)
    ]


def drawn_seed(temperature: float) -> int:
    """A seed from torch's generator on the CPU, which is left as it is where nothing is sampled."""
    return int(torch.randint(2**62, (), device="cpu")) if temperature > 0 else 0


def _bar(progress: bool, total: int) -> Any:
    if not progress:
        return None
    from tqdm import tqdm

    return tqdm(total=total, desc="decode", unit="token")
