"""Decode a masked diffusion language model, block by block, many tokens a pass.

The semantics are those of the published decoders (LLaDA, Fast-dLLM, dParallel): blocks left to right, in each
pass logits for the whole span, then a policy commits some of the block's masked positions. Only the work
differs: the LM head and the statistics touch the masked rows of the block alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import policies
from .models import KVCache, Model, traits
from .ops import check_errors, row_stats, select, unmask_
from .types import RowStats

CACHES = ("none", "prefix", "dual")

Policy = Callable[[RowStats, Tensor, Tensor], Tensor]
"""(stats (B, W), eligible (B, W) bool, step (B,) int64) -> (B, W) bool, over the W columns of the block."""


@dataclass
class Trajectory:
    """When each generated token was committed, and how sure the model was."""

    step: Tensor
    """(B, gen_length) int64: the sequence's pass that committed it, from 1; 0 where none did."""
    confidence: Tensor
    """(B, gen_length) float32: its probability in that pass; NaN where none did."""


@dataclass
class DecodeOutput:
    """What `decode` returns; `sequences, forwards = decode(...)` unpacks."""

    sequences: Tensor
    """(B, prompt + gen_length) int64: prompts and what was decoded."""
    nfe: Tensor
    """(B,) int64: forward passes that each sequence needed."""
    forwards: int
    """Forward passes that the call ran."""
    generated: Tensor
    """(B,) int64: tokens decoded; fewer than gen_length where EOS ended a sequence."""
    trajectory: Trajectory | None = field(default=None, repr=False)

    @property
    def tokens_per_forward(self) -> float:
        """Tokens decoded per pass, over all sequences; 0 where there was no pass."""
        passes = int(self.nfe.sum())
        return int(self.generated.sum()) / passes if passes else 0.0

    def __iter__(self) -> Iterator[Any]:
        return iter((self.sequences, self.forwards))


def decode(
    model: Any,
    prompt: Tensor,
    *,
    gen_length: int = 256,
    block_length: int = 32,
    steps: int | None = None,
    threshold: float | Tensor | None = None,
    selector: policies.Name = "entropy",
    policy: Tensor | Policy | None = None,
    min_commit: policies.Number = 1,
    max_commit: policies.Number | None = None,
    score: policies.Name | None = None,
    cache: str = "none",
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
        prompt: (B, P) or (P,) int64, prompts of one length. Mask tokens in it stay as they are.
        gen_length: tokens to decode; the last block is shorter where block_length does not divide it.
        block_length: tokens of a block; blocks are decoded left to right.
        steps: with `threshold` None, the fixed schedule: passes in all, the same number for each block,
            each committing its share of the block. None: one token a pass.
        threshold: the selector's parameter, a number or (B,); see `policies`. None: the fixed schedule.
        selector, min_commit, max_commit, score: the policy, each one value or one per sequence. The
            fixed schedule ranks by `score`; as published that is confidence, but entropy where
            `selector` is "entropy" and a cache is used.
        policy: instead of those: (B, 5) rows, or a function (stats, eligible, step) -> bool (B, W)
            over the block's columns. At least one position commits all the same, and only masked ones.
        cache: "none", the whole sequence each pass; for our models also "prefix" (one full pass per
            block, then from the block on) and "dual" (one full pass per block, then the block alone).
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
        DecodeOutput. With a cache, `forwards` is smaller than the published count where a block was
        complete after its full pass: the published loops run one more pass, which changes nothing.

    Raises:
        ValueError: naming the argument that does not fit; or naming sequence and position where the
            logits hold NaN or leave no token to choose.
    """
    with torch.inference_mode():
        loop = _Loop(model, prompt, gen_length, block_length, cache, mask_id)
        x, batch = loop.tokens, len(loop.tokens)
        plan = _plan(loop, batch, steps, threshold, selector, policy, min_commit, max_commit, score)
        if streamer is not None and batch != 1:
            raise ValueError(f"streamer: expected a batch of 1, got {batch}")
        loop.run(
            plan,
            temperature=temperature,
            suppress=suppress,
            eos_id=eos_id,
            seed=seed,
            streamer=streamer,
            bar=_bar(progress, batch * gen_length),
            record=record,
        )
        check_errors(x.device)
    # Tensors made in inference mode cannot enter autograd later; their copies can.
    trajectory = loop.trajectory and Trajectory(
        loop.trajectory.step.clone(), loop.trajectory.confidence.clone()
    )
    return DecodeOutput(x.clone(), loop.nfe.clone(), loop.forwards, loop.generated.clone(), trajectory)


class _Loop:
    """The state of one call: tokens, counts, and how logits are come by."""

    def __init__(
        self,
        model: Any,
        prompt: Tensor,
        gen_length: int,
        block_length: int,
        cache: str,
        mask_id: int | None,
    ) -> None:
        if not isinstance(prompt, Tensor) or prompt.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                "prompt: expected an int64 Tensor (B, P) or (P,), "
                f"got {getattr(prompt, 'dtype', type(prompt).__name__)} "
                "(prompts of different lengths are not supported yet)"
            )
        if prompt.ndim not in (1, 2):
            raise ValueError(f"prompt: expected (B, P) or (P,), got {tuple(prompt.shape)}")
        _whole("gen_length", gen_length, 0)
        _whole("block_length", block_length, 1)
        if cache not in CACHES:
            raise ValueError(f"cache: expected one of {CACHES}, got {cache!r}")
        if cache != "none" and not isinstance(model, Model):
            raise ValueError(
                f"cache: {cache!r} needs one of dparallel_ext.models (models.load, or models.wrap "
                f"for a loaded Hugging Face model), got {type(model).__name__}"
            )
        self.model, self.cache = model, cache
        self.traits = traits(model)
        found = self.traits.mask_id if mask_id is None else mask_id
        if found is None:
            raise ValueError("mask_id: the model's config has no mask_token_id, so give one")
        _whole("mask_id", found, 0)
        self.mask_id: int = found
        prompt = prompt.to(torch.int64)
        prompt = prompt[None] if prompt.ndim == 1 else prompt
        batch, self.prompt_length = prompt.shape
        blank = prompt.new_full((batch, gen_length), self.mask_id)
        self.tokens = torch.cat((prompt, blank), 1)  # (B, L)
        self.blocks = [
            (s, min(s + block_length, self.tokens.shape[1]))
            for s in range(self.prompt_length, self.tokens.shape[1], block_length)
        ]
        self.forwards = 0
        self.nfe = prompt.new_zeros(batch)
        self.generated = prompt.new_zeros(batch)
        self.trajectory: Trajectory | None = None
        self.slots: KVCache | None = None
        if cache != "none":
            self.slots = model.new_cache(batch, self.tokens.shape[1])

    def run(
        self,
        plan: _Plan,
        *,
        temperature: float = 0.0,
        suppress: Any = None,
        eos_id: int | None = None,
        seed: int | Tensor = 0,
        streamer: Any = None,
        bar: Any = None,
        record: bool = False,
        published: bool = False,
    ) -> None:
        """All blocks. `published`: fill the prompt's masks too, and run the published loops' extra pass
        where the full pass has completed a block."""
        x, batch = self.tokens, len(self.tokens)
        own_seed = isinstance(seed, Tensor) and seed.ndim == 1
        sampling = {
            "temperature": temperature,
            "suppress": suppress,
            "seed": seed,
            "sequence": x.new_zeros(batch) if own_seed else torch.arange(batch, device=x.device),
        }
        if record:
            shape = (batch, x.shape[1] - self.prompt_length)
            self.trajectory = Trajectory(x.new_zeros(shape), torch.full(shape, math.nan, device=x.device))
        if streamer is not None:
            streamer.put(x[:, : self.prompt_length].cpu())
        open_ = torch.ones(batch, dtype=torch.bool, device=x.device)  # not ended by EOS
        for start, end in self.blocks if batch else []:
            left = (x[:, start:end] == self.mask_id).sum(1)  # (B,)
            for turn in range(2 * (end - start) + 1):
                cached = self.cache != "none" and turn > 0
                span = (0, x.shape[1])
                if cached:
                    span = (start, end if self.cache == "dual" else x.shape[1])
                self.nfe += left > 0
                self.forwards += 1
                first, last = start, end
                if published and not cached:
                    first = 0
                if self.traits.shift and self.cache != "none" and turn == 0:
                    last = start + 1  # published: the full pass serves the block's first position
                before = x.clone() if record else x
                rows = self._commit(span, first, last, plan.rows(turn, start, end), sampling)
                now = (x[:, start:end] == self.mask_id).sum(1)
                if record:
                    self._record(before, start, end, rows)
                if bar is not None:
                    bar.update(int((left - now).sum()))
                if streamer is not None and hasattr(streamer, "put_draft"):
                    streamer.put_draft(x[:, start:].cpu())
                left = now
                wasteful = published and self.cache != "none" and turn == 0
                if not wasteful and not bool(left.any()):
                    break
            self.generated += open_ * (end - start)
            if streamer is not None:
                streamer.put(x[0, start:end].cpu())
            if eos_id is not None:
                open_ &= ~(x[:, start:end] == eos_id).any(1)
                x[:, end:].masked_fill_(~open_[:, None], eos_id)
                if not bool(open_.any()):
                    if streamer is not None and end < x.shape[1]:
                        streamer.put(x[0, end:].cpu())
                    break
        if bar is not None:
            bar.close()
        if streamer is not None:
            streamer.end()

    def _commit(
        self,
        span: tuple[int, int],
        first: int,
        last: int,
        policy: Tensor | Policy,
        sampling: dict[str, Any],
    ) -> tuple[Tensor, RowStats]:
        """One pass over the columns of `span`, committing among the masks in [first, last)."""
        x, length = self.tokens, self.tokens.shape[1]
        # Flat positions whose logits are needed. On a GPU the whole window, so as not to wait for it.
        if x.device.type == "cpu":
            row, column = (x[:, first:last] == self.mask_id).nonzero(as_tuple=True)
            column += first
        else:
            column = torch.arange(first, last, device=x.device).repeat(len(x))
            row = torch.arange(len(x), device=x.device).repeat_interleave(last - first)
        positions = row * length + column
        source = (column - 1).clamp_(min=span[0]) if self.traits.shift else column
        logits = self._logits(span, row, source - span[0])  # (N, V)
        if isinstance(policy, Tensor):
            out = unmask_(
                x,
                logits,
                mask_id=self.mask_id,
                start=first,
                end=last,
                policy=policy,
                positions=positions,
                step=self.nfe,
                **sampling,
            )
            return positions, out.stats
        eligible = x[:, first:last] == self.mask_id
        of_row: dict[str, Any] = {
            key: value[row] if isinstance(value, Tensor) and value.shape == (len(x),) else value
            for key, value in sampling.items()
            if key != "suppress"
        }
        stats = row_stats(
            logits,
            mask_id=self.mask_id,
            suppress=sampling["suppress"],
            position=column,
            step=self.nfe[row],
            **of_row,
        )
        spread = []
        for values in stats:
            blank = -1 if values.dtype == torch.int64 else math.nan
            whole = values.new_full(eligible.shape, blank)
            whole[row, column - first] = values
            spread.append(whole)
        by_column = RowStats(*spread)
        chosen = policy(by_column, eligible, self.nfe)
        if not isinstance(chosen, Tensor) or chosen.shape != eligible.shape:
            raise ValueError(
                f"policy: expected a bool Tensor {tuple(eligible.shape)}, "
                f"got {getattr(chosen, 'shape', type(chosen).__name__)}"
            )
        best = policies.make("quota", 1, batch=len(x), device=x.device)
        chosen = chosen.to(torch.bool) & eligible
        chosen |= ~chosen.any(1, keepdim=True) & select(by_column, eligible, best)
        window = x[:, first:last]
        window.copy_(torch.where(chosen, by_column.sample, window))
        return positions, stats

    def _logits(self, span: tuple[int, int], row: Tensor, source: Tensor) -> Tensor:
        """Logits (N, V) at batch rows `row` and columns `source` of the span, in one forward pass."""
        x = self.tokens[:, span[0] : span[1]]
        if x.device.type == "cpu" and self.slots is None and len(row):
            needed, row = row.unique(return_inverse=True)  # sequences that have nothing to commit stay out
            x = x if len(needed) == len(x) else x[needed]
        if not isinstance(self.model, Model):
            output = self.model(x)
            if not hasattr(output, "logits"):
                raise ValueError(
                    f"model: expected its call to return an object with .logits, got {type(output).__name__}"
                )
            if output.logits.shape[:-1] != x.shape:
                raise ValueError(
                    f"model: expected logits ({x.shape[0]}, {x.shape[1]}, V), "
                    f"got {tuple(output.logits.shape)}"
                )
            return output.logits[row, source]
        hidden = self.model.hidden(x, self.slots, span[0])
        return self.model.head(hidden[row, source])

    def _record(self, before: Tensor, start: int, end: int, rows: tuple[Tensor, RowStats]) -> None:
        assert self.trajectory is not None
        positions, stats = rows
        sure = torch.full(self.tokens.shape, math.nan, device=self.tokens.device)
        sure.view(-1)[positions] = stats.confidence
        changed = before[:, start:end] != self.tokens[:, start:end]
        at = slice(start - self.prompt_length, end - self.prompt_length)
        step, confidence = self.trajectory.step[:, at], self.trajectory.confidence[:, at]
        step.copy_(torch.where(changed, self.nfe[:, None], step))
        confidence.copy_(torch.where(changed, sure[:, start:end], confidence))


# --- what a pass commits ------------------------------------------------------------------------


@dataclass
class _Plan:
    """The policy of each pass: one and the same, or the fixed schedule's quota."""

    policy: Tensor | Policy | None
    quota: Callable[[int, int, int], Tensor | Policy] | None = None

    def rows(self, turn: int, start: int, end: int) -> Tensor | Policy:
        if self.policy is not None:
            return self.policy
        assert self.quota is not None
        return self.quota(turn, start, end)


def _plan(
    loop: _Loop,
    batch: int,
    steps: int | None,
    threshold: Any,
    selector: policies.Name,
    policy: Tensor | Policy | None,
    min_commit: policies.Number,
    max_commit: policies.Number | None,
    score: policies.Name | None,
) -> _Plan:
    device = loop.tokens.device
    if policy is not None:
        if threshold is not None or steps is not None:
            raise ValueError("policy: give it alone, without threshold or steps")
        if isinstance(policy, Tensor):
            policies.check(policy, batch)
            policy = policy.to(device)
        elif not callable(policy):
            raise ValueError(f"policy: expected rows or a function, got {type(policy).__name__}")
        return _Plan(policy)
    if threshold is not None:
        if steps is not None:
            raise ValueError("steps: belongs to the fixed schedule, so not beside a threshold")
        names = [selector] * batch if isinstance(selector, str) else list(selector)
        rows = policies.make(
            selector,
            threshold,
            min_commit=min_commit,
            max_commit=max_commit,
            score=score,
            batch=batch,
        )
        if loop.traits.strict_entropy:
            strict = torch.tensor([name == "entropy" for name in names], dtype=torch.bool)
            below = torch.nextafter(rows[:, 1], torch.tensor(-math.inf))
            rows[:, 1] = torch.where(strict, below, rows[:, 1])
        return _Plan(rows.to(device))
    per_block = None
    if steps is not None:
        _whole("steps", steps, 1)
        if loop.blocks and steps % len(loop.blocks):
            raise ValueError(f"steps: expected a multiple of the {len(loop.blocks)} blocks, got {steps}")
        per_block = steps // max(1, len(loop.blocks))
    if score is None:
        by_entropy = selector == "entropy" and loop.cache != "none"
        score = "entropy" if by_entropy else "confidence"

    def quota(turn: int, start: int, end: int) -> Tensor:
        share, rest = (1, 0) if per_block is None else divmod(end - start, per_block)
        k = max(1, share + (turn < rest))
        return policies.make("quota", k, score=score, batch=batch, device=device)

    return _Plan(None, quota)


def _whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected a whole number >= {least}, got {value!r}")


def _bar(progress: bool, total: int) -> Any:
    if not progress:
        return None
    from tqdm import tqdm

    return tqdm(total=total, desc="decode", unit="token")
