"""Decode a masked diffusion language model, block by block, many tokens a pass.

What a pass is: `batch`. Which rule it commits by: here, from the arguments of `decode`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import policies
from .batch import CACHES, Batch, Policy, Row, Rules, Trajectory
from .models import Model, traits
from .ops import check_errors


@dataclass
class DecodeOutput:
    """What `decode` returns; `sequences, forwards = decode(...)` unpacks."""

    sequences: Tensor
    """(B, L) int64: prompts and what was decoded; shorter ones end in padding: `eos_id`, else the mask."""
    nfe: Tensor
    """(B,) int64: forward passes that each sequence needed."""
    forwards: int
    """Forward passes that the call ran."""
    generated: Tensor
    """(B,) int64: tokens decoded; fewer than gen_length where EOS ended a sequence."""
    lengths: Tensor
    """(B,) int64: of prompt and response together, EOS filling included, padding not."""
    prompt_lengths: Tensor
    """(B,) int64"""
    nfe_published: Tensor
    """(B,) int64: passes of the published loops, which run some that change nothing: with "prefix" and "dual"
    where a block was complete after its full pass, with "block" to prefill and to store each block."""
    trajectory: Trajectory | None = field(default=None, repr=False)

    @property
    def responses(self) -> list[Tensor]:
        """Each sequence's response, (gen_length,) int64."""
        ends = zip(self.prompt_lengths.tolist(), self.lengths.tolist(), strict=True)
        return [row[a:b] for row, (a, b) in zip(self.sequences, ends, strict=True)]

    @property
    def tokens_per_forward(self) -> float:
        """Tokens decoded per pass, over all sequences; 0 where there was no pass."""
        passes = int(self.nfe.sum())
        return int(self.generated.sum()) / passes if passes else 0.0

    def __iter__(self) -> Iterator[Any]:
        return iter((self.sequences, self.forwards))


def decode(
    model: Any,
    prompt: Tensor | Sequence[Tensor],
    *,
    attention_mask: Tensor | None = None,
    gen_length: int | Sequence[int] = 256,
    block_length: int | None = None,
    steps: int | None = None,
    threshold: float | Tensor | None = None,
    selector: policies.Name = "entropy",
    policy: Tensor | Policy | None = None,
    min_commit: policies.Number = 1,
    max_commit: policies.Number | None = None,
    score: policies.Name | None = None,
    cache: str = "none",
    refresh: int | None = None,
    batch_invariant: bool = False,
    temperature: float = 0.0,
    suppress: Any = None,
    mask_id: int | None = None,
    eos_id: int | None = None,
    seed: int | Tensor = 0,
    streamer: Any = None,
    progress: bool = False,
    record: bool = False,
) -> DecodeOutput:
    """Decode `gen_length` tokens after each prompt.

    Args:
        model: one of ours (`dparallel_ext.models`), or anything whose call on input_ids (B, L) returns an
            object with `.logits` (B, L, V): Hugging Face models work as they are. It is called as it
            is: put it in eval mode first if it has dropout.
        prompt: (B, P) or (P,) int64; or a list of (P,) of any lengths. Mask tokens stay as they are.
        attention_mask: (B, P) bool or whole numbers, 0 where `prompt` is padded, on either side. Padding
            is taken out: it costs nothing and changes nothing.
        gen_length: tokens to decode, one number or one per sequence; the last block is shorter where
            block_length does not divide it. Block-causal models fill the last block to its end.
        block_length: tokens of a block; blocks are decoded left to right. Default: the model's own, where it
            is block-causal (blocks count from position 0), else 32.
        steps: with `threshold` None, the fixed schedule: passes in all, the same number for each block,
            each committing its share of the block. None: one token a pass.
        threshold: the selector's parameter, a number or (B,); see `policies`. None: the fixed schedule.
        selector, min_commit, max_commit, score: the policy, each one value or one per sequence. The
            fixed schedule ranks by `score`; as published that is confidence, but entropy where
            `selector` is "entropy" and a cache is used.
        policy: instead of those: (B, 5) rows, or a function (stats, eligible, step) -> bool (B, W)
            over the block's columns. At least one position commits all the same, and only masked ones.
        cache: "none", the whole sequence each pass; for our models also "prefix" (one full pass per
            block, then from the block on), "dual" (one full pass per block, then the block alone), and
            for block-causal ones "block" (each pass the block alone; finished blocks are exact).
        refresh: with "dual", a full pass every `refresh` passes over a block, so that no entry grows stale.
        batch_invariant: each sequence in passes of its own, so that it comes out to the bit as alone. In
            shared passes the matrix library may round the same row otherwise in another batch.
        temperature: 0 is greedy; above it, tokens are Gumbel-max samples of softmax(logits / T).
        suppress: ids never to be decoded, left out of the softmax.
        mask_id: default: the model's `mask_token_id`.
        eos_id: if given, a sequence whose finished block holds it ends there: later blocks are not
            computed but filled with it. None, as published: every block is decoded.
        seed: a number: sequence b's samples are keyed by (seed, b); or (B,): by its own seed alone.
        streamer: an object with `put` and `end`, and perhaps `put_draft`, as transformers' streamers.
            Batch size 1.
        progress: a tqdm bar of committed tokens.
        record: keep the `trajectory`.

    Returns:
        DecodeOutput. A sequence that is complete is in no pass; each goes from block to block at its own
        pace. The published loops run some passes that change nothing: `nfe_published` counts them.

    Raises:
        ValueError: naming the argument that does not fit; or naming sequence and position where the
            logits hold NaN or leave no token to choose.
    """
    with torch.inference_mode():
        prompts = _prompts(prompt, attention_mask)
        size = len(prompts)
        batch = start(
            model,
            prompts,
            gen_length,
            block_length,
            cache,
            mask_id,
            eos_id=eos_id,
            refresh=refresh,
            batch_invariant=batch_invariant,
            record=record,
        )
        rules = make_rules(batch, steps, threshold, selector, policy, min_commit, max_commit, score)
        if streamer is not None and size != 1:
            raise ValueError(f"streamer: expected a batch of 1, got {size}")
        bar = _bar(progress, sum(row.length - row.prompt for row in batch.rows))
        run(
            batch,
            rules,
            temperature=temperature,
            suppress=suppress,
            eos_id=eos_id,
            seed=seed,
            streamer=streamer,
            bar=bar,
        )
        check_errors(batch.tokens.device)
    # Tensors made in inference mode cannot enter autograd later; their copies can.
    found = batch.trajectory
    trajectory = found and Trajectory(found.step.clone(), found.confidence.clone())
    x = batch.tokens.clone()
    if not size and isinstance(prompt, Tensor) and isinstance(gen_length, int):
        x = x.new_zeros((0, prompt.shape[1] + gen_length))
    numbers = [
        x.new_tensor([getattr(row, name) for row in batch.rows])
        for name in ("nfe", "generated", "length", "prompt", "published")
    ]
    nfe, generated, lengths, prompt_lengths, published = numbers
    return DecodeOutput(x, nfe, batch.forwards, generated, lengths, prompt_lengths, published, trajectory)


def start(
    model: Any,
    prompts: list[Tensor],
    gen_length: int | Sequence[int],
    block_length: int | None,
    cache: str,
    mask_id: int | None,
    *,
    eos_id: int | None = None,
    refresh: int | None = None,
    **more: Any,
) -> Batch:
    """The batch of a call, its arguments checked."""
    found = traits(model)
    given = list(gen_length) if isinstance(gen_length, Sequence) else [gen_length]
    for count in given:
        _whole("gen_length", count, 0)
    counts = given if isinstance(gen_length, Sequence) else given * len(prompts)
    if len(counts) != len(prompts):
        raise ValueError(
            f"gen_length: expected a number or one for each of {len(prompts)}, got {len(counts)}"
        )
    if block_length is None:
        block_length = found.block_length or 32
    _whole("block_length", block_length, 1)
    if cache not in CACHES:
        raise ValueError(f"cache: expected one of {CACHES}, got {cache!r}")
    if cache != "none" and not isinstance(model, Model):
        raise ValueError(
            f"cache: {cache!r} needs one of dparallel_ext.models (models.load, or models.wrap "
            f"for a loaded Hugging Face model), got {type(model).__name__}"
        )
    causal = found.block_length is not None
    if causal != (cache == "block") and cache != "none":
        fit = (
            '"block" or "none" for a block-causal model'
            if causal
            else '"block" for block-causal models alone'
        )
        raise ValueError(f"cache: expected {fit}, got {cache!r}")
    if causal and block_length != found.block_length:
        raise ValueError(
            f"block_length: the model attends by blocks of {found.block_length} (model.block_length), "
            f"got {block_length}"
        )
    if refresh is not None:
        _whole("refresh", refresh, 1)
        if cache != "dual":
            raise ValueError(f'refresh: belongs to cache "dual", got cache={cache!r}')
    mask = found.mask_id if mask_id is None else mask_id
    if mask is None:
        raise ValueError("mask_id: the model's config has no mask_token_id, so give one")
    _whole("mask_id", mask, 0)
    pad = mask if eos_id is None else eos_id
    return Batch(model, prompts, counts, block_length, cache, mask, pad_id=pad, refresh=refresh, **more)


def run(
    batch: Batch,
    rules: Rules,
    *,
    temperature: float = 0.0,
    suppress: Any = None,
    eos_id: int | None = None,
    seed: int | Tensor = 0,
    streamer: Any = None,
    bar: Any = None,
) -> None:
    """All passes. In the published loops every sequence waits at the end of a block for the others."""
    x = batch.tokens
    own_seed = isinstance(seed, Tensor) and seed.ndim == 1
    sampling = {
        "temperature": temperature,
        "suppress": suppress,
        "seed": seed,
        "sequence": x.new_zeros(len(x)) if own_seed else torch.arange(len(x), device=x.device),
    }
    if streamer is not None:
        streamer.put(x[:, : batch.rows[0].prompt].cpu())
    waiting: list[int] = []
    while live := batch.live:
        blocks = {b: batch.rows[b].block for b in live}
        left = sum(batch.rows[b].left for b in live)
        finished = batch.step(rules, sampling)
        if bar is not None:
            bar.update(left - sum(batch.rows[b].left for b in live))
        if streamer is not None and hasattr(streamer, "put_draft"):
            streamer.put_draft(x[:, blocks[0][0] :].cpu())
        for b in finished:
            first, last = blocks[b]
            if streamer is not None:
                streamer.put(x[b, first:last].cpu())
            if eos_id is not None and bool((x[b, first:last] == eos_id).any()):
                batch.end(b, eos_id)
                if streamer is not None and last < x.shape[1]:
                    streamer.put(x[b, last:].cpu())
        waiting += finished
        if not (batch.published and batch.live):
            batch.enter(waiting)
            waiting = []
    if bar is not None:
        bar.close()
    if streamer is not None:
        streamer.end()


def _prompts(prompt: Tensor | Sequence[Tensor], attention_mask: Tensor | None) -> list[Tensor]:
    """B prompts (P,) int64 of any lengths."""
    whole = isinstance(prompt, Tensor)
    given = [prompt] if isinstance(prompt, Tensor) else list(prompt)
    for one in given:
        if not isinstance(one, Tensor) or one.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                "prompt: expected an int64 Tensor (B, P) or (P,), or a list of (P,), "
                f"got {getattr(one, 'dtype', type(one).__name__)}"
            )
        if one.ndim not in ((1, 2) if whole else (1,)):
            raise ValueError(f"prompt: expected (B, P) or (P,), got {tuple(one.shape)}")
    if attention_mask is not None:
        if not isinstance(prompt, Tensor) or attention_mask.shape != prompt.shape or prompt.ndim != 2:
            raise ValueError(
                f"attention_mask: expected the shape of prompt (B, P), got {tuple(attention_mask.shape)}"
            )
        kept = attention_mask.to(torch.bool)
        return [row[keep].to(torch.int64) for row, keep in zip(prompt, kept, strict=True)]
    if isinstance(prompt, Tensor):
        return list(prompt.to(torch.int64).unbind(0)) if prompt.ndim == 2 else [prompt.to(torch.int64)]
    return [one.to(torch.int64) for one in given]


def make_rules(
    batch: Batch,
    steps: int | None,
    threshold: Any,
    selector: policies.Name,
    policy: Tensor | Policy | None,
    min_commit: policies.Number,
    max_commit: policies.Number | None,
    score: policies.Name | None,
) -> Rules:
    """What each pass commits by: one policy for all passes, or the fixed schedule's quota."""
    device, size = batch.tokens.device, len(batch.rows)
    if policy is not None:
        if threshold is not None or steps is not None:
            raise ValueError("policy: give it alone, without threshold or steps")
        if isinstance(policy, Tensor):
            policies.check(policy, size)
            policy = policy.to(device)
        elif not callable(policy):
            raise ValueError(f"policy: expected rows or a function, got {type(policy).__name__}")
        given = policy
        return lambda rows: given
    if threshold is not None:
        if steps is not None:
            raise ValueError("steps: belongs to the fixed schedule, so not beside a threshold")
        names = [selector] * size if isinstance(selector, str) else list(selector)
        made = policies.make(
            selector,
            threshold,
            min_commit=min_commit,
            max_commit=max_commit,
            score=score,
            batch=size,
        )
        for name, towards in (("entropy", -math.inf), ("confidence", math.inf)):
            if name in batch.traits.strict:
                here = torch.tensor([n == name for n in names], dtype=torch.bool)
                beyond = torch.nextafter(made[:, 1], torch.tensor(towards))
                made[:, 1] = torch.where(here, beyond, made[:, 1])
        made = made.to(device)
        return lambda rows: made
    if steps is not None:
        _whole("steps", steps, 1)
        for row in batch.rows:
            if row.blocks and steps % len(row.blocks):
                raise ValueError(f"steps: expected a multiple of the {len(row.blocks)} blocks, got {steps}")
    if score is None:
        by_entropy = selector == "entropy" and batch.cache in ("prefix", "dual")
        score = "entropy" if by_entropy else "confidence"
    ranked = score

    def quota(row: Row) -> int:
        if row.done or steps is None:
            return 1
        start, end = row.block
        share, rest = divmod(end - start, steps // len(row.blocks))
        return max(1, share + (row.turn < rest))

    def schedule(rows: Sequence[Row]) -> Tensor:
        counts = torch.tensor([quota(row) for row in rows], dtype=torch.float32)
        return policies.make("quota", counts, score=ranked, batch=size, device=device)

    return schedule


def _whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected a whole number >= {least}, got {value!r}")


def _bar(progress: bool, total: int) -> Any:
    if not progress:
        return None
    from tqdm import tqdm

    return tqdm(total=total, desc="decode", unit="token")
