"""Rules under every cache, against a plain transformer in float64 that keeps its keys and values in lists."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import golden
from test_rules import Planner
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext.models import Model
from dparallel_ext.rules import Prophet, SchED

MASK = 511
CLOSE = 1e-4
"""Cases in which a decision is closer than this are left out: float32 may decide otherwise."""
WAYS = [(name, cache) for name in ("llada_tiny_a", "dream_tiny_a") for cache in ("none", "prefix", "dual")]
WAYS += [("sdar_tiny_a", "none"), ("sdar_tiny_a", "block")]


class Plain:
    """A model's layers in float64. `kept`: each layer's keys and values (L, kv_heads, D), as passes leave
    them."""

    def __init__(self, model: Model, length: int) -> None:
        self.model, s = model, model.shape
        shape = length, s.kv_heads, s.head_dim
        self.kept = [[torch.full(shape, math.nan, dtype=torch.float64) for _ in "kv"] for _ in model.blocks]

    def linear(self, x: Tensor, layer: Any) -> Tensor:
        y = x @ layer.weight.double().T
        return y if layer.bias is None else y + layer.bias.double()

    def norm(self, x: Tensor, norm: Any) -> Tensor:
        y = x / (x.square().mean(-1, keepdim=True) + self.model.shape.eps).sqrt() * norm.weight.double()
        return y if norm.bias is None else y + norm.bias.double()

    def turned(self, x: Tensor, positions: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        speed = self.model.shape.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = (positions[:, None] * speed)[:, None]
        a, b = x[..., :half], x[..., half:]
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)

    @torch.no_grad()
    def __call__(self, ids: list[int], start: int, end: int, seen: Callable[[int], int]) -> Tensor:
        """Final hidden states (end - start, D) of positions [start, end); position p sees [0, seen(p))."""
        model, s = self.model, self.model.shape
        positions = torch.arange(start, end)
        visible = torch.arange(len(ids)) < torch.tensor([[seen(p)] for p in range(start, end)])
        x = model.embed.weight.double()[torch.tensor(ids[start:end])]
        for block, (kept_keys, kept_values) in zip(model.blocks, self.kept, strict=True):
            y = self.norm(x, block.norm1)
            q, k, v = (
                self.linear(y, layer).unflatten(-1, (-1, s.head_dim)) for layer in (block.q, block.k, block.v)
            )
            if s.qk_norm:
                q, k = self.norm(q, block.q_norm), self.norm(k, block.k_norm)
            kept_keys[start:end], kept_values[start:end] = self.turned(k, positions), v
            keys, values = (
                kept.nan_to_num().repeat_interleave(s.heads // s.kv_heads, 1)
                for kept in (kept_keys, kept_values)
            )
            scores = torch.einsum("qhd,khd->hqk", self.turned(q, positions), keys) / s.head_dim**0.5
            share = scores.masked_fill(~visible, -math.inf).softmax(-1)
            x = x + self.linear(torch.einsum("hqk,khd->qhd", share, values).flatten(1), block.o)
            y = self.norm(x, block.norm2)
            gate = self.linear(y, block.gate)
            x = x + self.linear(gate * gate.sigmoid() * self.linear(y, block.up), block.down)
        return self.norm(x, model.norm)

    @torch.no_grad()
    def head(self, x: Tensor) -> Tensor:
        return self.linear(x, self.model.lm_head) * self.model.shape.logit_scale


class Case:
    """One sequence, decoded by a rule's formula; `closest` is how close its closest decision was."""

    def __init__(
        self, model: Model, prompt: list[int], length: int, block: int, cache: str, rule: Any
    ) -> None:
        self.model, self.prompt, self.block, self.cache, self.rule = model, prompt, block, cache, rule
        causal = model.block_length is not None
        self.asked = end = len(prompt) + length
        self.ids = prompt + [MASK] * ((-(-end // block) * block if causal else end) - len(prompt))
        self.origin = len(prompt) // block * block if causal else len(prompt)
        self.closest, self.passes, self.early = math.inf, 0, 0
        self.last: dict[int, int] = {}

    def least(self, value: float, bar: float) -> bool:
        """value >= bar"""
        self.closest = min(self.closest, abs(value - bar))
        return value >= bar

    def seen(self, position: int) -> int:
        """The end of the positions that a position sees."""
        if self.model.block_length is None:
            return len(self.ids)
        return min((position // self.block + 1) * self.block, len(self.ids))

    def decode(self, entropy: float) -> None:
        plain, length, first = Plain(self.model, len(self.ids)), len(self.ids), len(self.prompt)
        shift = int(self.model.shift)
        for begin in range(self.origin, length, self.block):
            start, end, turn = max(begin, first), min(begin + self.block, length), 0
            while MASK in self.ids[start:end]:
                low, high = self.computed(start, end, turn)
                states = plain(self.ids, low, high, self.seen)
                has = range(start, end) if self.cache in ("dual", "block") else range(max(low, first), high)
                hidden = {c: states[max(c - shift - low, 0)] for c in has}
                rows = {c: plain.head(x) for c, x in hidden.items()}
                masked = [c for c in range(start, end) if self.ids[c] == MASK]
                if shift and turn == 0 and masked[0] == start and self.cache in ("prefix", "dual"):
                    masked = masked[:1]  # as published, Dream's full pass fills one position
                self.passes, turn = self.passes + 1, turn + 1
                two = {c: row.index_fill(0, torch.tensor(MASK), -math.inf).topk(2) for c, row in rows.items()}
                gaps = {c: float(values[0] - values[1]) for c, (values, _) in two.items()}
                tokens = {c: int(ids[0]) for c, (_, ids) in two.items()}
                planned = isinstance(self.rule, Planner)
                chosen = self.planned(masked, hidden, rows) if planned else self.sure(masked, rows, entropy)
                if not planned and self.ends(gaps, tokens):
                    chosen, self.early = [c for c in has if self.ids[c] == MASK], self.early + 1
                for c in chosen:
                    self.closest = min(self.closest, gaps[c])
                    self.ids[c] = tokens[c]

    def sure(self, masked: list[int], rows: dict[int, Tensor], entropy: float) -> list[int]:
        """The masks of an entropy up to a bar, at least the one of the least."""
        odds = {c: rows[c].log_softmax(0) for c in masked}
        surprise = {c: -float((odds[c].exp() * odds[c]).sum()) for c in masked}
        return [c for c in masked if self.least(entropy, surprise[c])] or self.first(surprise)

    def planned(self, masked: list[int], hidden: dict[int, Tensor], rows: dict[int, Tensor]) -> list[int]:
        """The masks that a planner commits by their hidden states, at least the one of most confidence."""
        columns = masked if self.rule.reads == "masked" else [c for c in rows if self.ids[c] == MASK]
        weight, bar = self.rule.weight.double(), self.rule.bar
        chosen = [c for c in columns if self.least(float(hidden[c] @ weight), bar)]
        self.early += len(set(chosen) - set(masked))
        if set(chosen) & set(masked):
            return chosen
        doubt = {
            c: -float(rows[c].index_fill(0, torch.tensor(MASK), -math.inf).max() - rows[c].logsumexp(0))
            for c in masked
        }
        return chosen + self.first(doubt)

    def first(self, score: dict[int, float]) -> list[int]:
        """The column of the least score."""
        best, *others = sorted(score, key=lambda c: score[c])
        self.closest = min([self.closest, *(score[c] - score[best] for c in others)])
        return [best]

    def computed(self, start: int, end: int, turn: int) -> tuple[int, int]:
        """The positions that pass `turn` over the block [start, end) computes. What a block-causal model has
        stored is exact, so that here it is computed anew."""
        if self.cache == "none" or (self.cache != "block" and turn == 0):
            return 0, len(self.ids)
        if self.cache == "block":
            return 0, end
        return start, len(self.ids) if self.cache == "prefix" else end

    def ends(self, gaps: dict[int, float], tokens: dict[int, int]) -> bool:
        """Whether the rule fills all masks in this pass."""
        rule, first = self.rule, len(self.prompt)
        steps = len(self.ids) - first
        if isinstance(rule, Prophet):
            answer = range(first + rule.start, min(first + rule.start + rule.width, self.asked))
            share = self.passes / steps
            bar = rule.bars[0 if share < 0.33 else 1 if share < 0.67 else 2]
            seen = bool(answer) and all(c in gaps for c in answer)
            return seen and self.least(sum(gaps[c] for c in answer) / len(answer), bar)
        left = [c for c in gaps if self.ids[c] == MASK]
        t = (self.passes - 1) / (steps - 1)
        bar = rule.low + (rule.high - rule.low) * (1 + math.cos(math.pi * t)) / 2
        changed = sum(self.last.get(c) != tokens[c] for c in left)
        self.last |= tokens
        stable = changed <= rule.changes * len(left)
        return self.least(sum(gaps[c] for c in left) / len(left), bar) and stable and t >= rule.floor


@pytest.mark.parametrize(("name", "cache"), WAYS)
def test_early_rules_are_their_formulas_under_every_cache(name: str, cache: str) -> None:
    """Prompts and responses of odd lengths, in one batch; a mean gap counts where the pass has logits."""
    model, compared, early = golden.model(name), 0, 0
    prompts = [torch.randint(0, MASK, (n,), generator=torch.Generator().manual_seed(n)) for n in (3, 1, 14)]
    rules = [
        Prophet(2, width=3, bars=(0.5, 0.35, 0.2)),
        Prophet(9, bars=(0.3, 0.2, 0.1)),
        SchED(0.5, 0.1, "cosine"),
        SchED(0.45, 0.2, "cosine", floor=0.2, changes=0.6),
    ]
    for rule in rules:
        for block, lengths in ((4, [17, 9, 2]), (8, [13, 8, 21])):
            settings: dict[str, Any] = {"block_length": block, "cache": cache, "rule": rule, "mask_id": MASK}
            out = dx.decode(model, prompts, gen_length=lengths, threshold=3.0, **settings)
            for b, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
                case = Case(model, prompt.tolist(), length, block, cache, rule)
                case.decode(3.0)
                if case.closest > CLOSE:
                    assert out.sequences[b, : len(case.ids)].tolist() == case.ids, (rule, block, b)
                    assert int(out.nfe[b]) == case.passes, (rule, block, b)
                    compared, early = compared + 1, early + case.early
    assert compared >= 20
    assert early


@pytest.mark.parametrize(("name", "cache"), WAYS)
def test_a_planner_sees_the_hidden_states_under_every_cache(name: str, cache: str) -> None:
    """A linear head of them, in ragged batches and in an engine."""
    model, compared, early = golden.model(name), 0, 0
    prompts = [torch.randint(0, MASK, (n,), generator=torch.Generator().manual_seed(n)) for n in (3, 1, 14)]
    for reads in ("masked", "response"):
        for block, lengths, bar in ((4, [17, 9, 2], 0.3), (8, [13, 8, 21], -0.2)):
            rule = Planner(model.shape.width, bar, reads)
            settings: dict[str, Any] = {"block_length": block, "cache": cache}
            out = dx.decode(model, prompts, gen_length=lengths, rule=rule, **settings)
            with dx.Engine(model, lanes=2, suppress=None, **settings) as engine:
                handles = [
                    engine.submit(prompt, gen_length=length, rule=rule)
                    for prompt, length in zip(prompts, lengths, strict=True)
                ]
                done = [handle.result(30) for handle in handles]
            for b, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
                case = Case(model, prompt.tolist(), length, block, cache, rule)
                case.decode(0.0)
                if case.closest > CLOSE:
                    assert out.sequences[b, : len(case.ids)].tolist() == case.ids, (rule, block, b)
                    assert done[b].tokens == case.ids[len(prompt) :][:length]
                    assert int(out.nfe[b]) == done[b].nfe == case.passes
                    compared, early = compared + 1, early + case.early
    assert compared >= 8
    assert early or cache in ("dual", "block")
