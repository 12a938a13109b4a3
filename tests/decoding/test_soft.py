"""Rules that make soft tokens of several ids: masks and decoded tokens that the model sees as mixtures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from conftest import golden
from test_rules import MASK, PROMPTS, argmax
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext import models
from dparallel_ext.cache import Span
from dparallel_ext.rules import Decision, Rule, Where


@pytest.fixture(scope="module")
def llada() -> models.Model:
    return golden.model("llada_tiny_a", dtype=torch.float32)


@dataclass(frozen=True)
class Mixed(Rule):
    """Commits what is likely. Masks are seen as mixtures of the mask and the `k` likeliest tokens; with
    `edits`, decoded tokens of the block as mixtures of these alone, and they follow the predictions, as in
    EvoToken-DLM (arXiv 2601.07351)."""

    k: int = 2
    likely: float = 0.6
    left: float = 0.6
    reads: Any = "masked"
    edits: int = 0
    greedy = True
    soft = True

    def new_state(self, lanes: int, columns: int, device: torch.device) -> tuple[Tensor, ...]:
        ids = torch.zeros((lanes, columns, self.k), dtype=torch.int64, device=device)
        return ids.float(), ids

    def decide(self, stats: Any, where: Where, state: Any) -> Decision:
        z, ids = where.cells.spread(where.rows.float(), torch.nan).topk(self.k, -1)
        p = (z - stats.lse[..., None]).exp()
        commit = where.masked & (stats.confidence >= self.likely)
        # Of tokens that are committed too: where nothing is edited they are seen as they are all the same.
        mask = (where.open & ~commit)[..., None]
        where.remember(state[0], torch.where(mask, 1 - self.left, 1.0) * p / p.sum(-1, keepdim=True))
        where.remember(state[1], ids)
        if not self.edits:
            return Decision(commit)
        every = torch.ones_like(where.turn, dtype=torch.bool)
        return Decision(commit, edit=where.decoded, complete=every)


def seen(model: models.Model, x: Tensor, shares: Tensor, ids: Tensor) -> Tensor:
    """Logits (L, V) float64 of tokens x (L,) of which `shares` (L, K) are given to `ids` (L, K)."""
    table = model.embedded(torch.arange(MASK + 1)).sum.double()
    mixed = (1 - shares.sum(1, keepdim=True)) * table[x] + (shares[..., None] * table[ids]).sum(1)
    kv_cache = model.new_cache(1, len(x))
    metadata = kv_cache.metadata([Span(0, 0, len(x), len(x))], None)
    stream = model.run_layers(models.Stream(mixed.float()), kv_cache, metadata)
    return model.head(model.final_norm(stream)).double()


def windows(first: int, last: int, block: int, x: Tensor, open_blocks: int) -> Iterator[tuple[int, int]]:
    """The front block of x, and those behind it, up to `open_blocks`."""
    for start in range(first, last, block):
        if open_blocks and bool((x[start : start + block] == MASK).any()):
            open_blocks -= 1
            yield start, start + block


@torch.no_grad()
def plain(
    model: models.Model, prompt: Tensor, rule: Mixed, block: int, open_blocks: int
) -> tuple[Tensor, int]:
    x = torch.cat((prompt, torch.full((24,), MASK)))
    column, passes = torch.arange(len(x)), 0
    shares, ids = torch.zeros((len(x), rule.k), dtype=torch.float64), torch.zeros((len(x), rule.k)).long()
    while fills := list(windows(len(prompt), len(x), block, x, open_blocks)):
        passes += 1
        inside = torch.zeros(len(x), dtype=torch.bool)
        for start, end in fills:
            inside[start:end] = True
        read = column >= len(prompt) if rule.reads == "response" else inside
        soft = read if rule.edits else read & (x == MASK)
        z = seen(model, x, shares * soft[:, None], ids)
        token, masked, p = argmax(z), inside & (x == MASK), z.softmax(1)
        sure = p.gather(1, token[:, None])[:, 0]
        commit = masked & (sure >= rule.likely)
        front = masked & (column < fills[0][1])
        forced = torch.zeros_like(commit)
        if not bool((commit & front).any()):
            forced[sure.masked_fill(~front, -1).argmax()] = True
        likeliest, which = p.topk(rule.k, -1)
        still = (x == MASK) & ~commit
        whole = torch.where(still, 1 - rule.left, 1.0)[:, None] * likeliest / likeliest.sum(1, keepdim=True)
        known = read & (x == MASK) if rule.reads == "masked" else read
        shares, ids = torch.where(known[:, None], whole, shares), torch.where(known[:, None], which, ids)
        change = commit | forced
        if rule.edits:
            change |= inside & (x != MASK)
        x = torch.where(change, token, x)
    return x, passes


@pytest.mark.parametrize(
    ("rule", "block", "open_blocks"),
    [
        (Mixed(), 12, 1),
        (Mixed(k=3, likely=0.5), 24, 1),
        (Mixed(reads="response", likely=0.5), 12, 1),
        (Mixed(likely=0.7), 12, 2),
        (Mixed(reads="block", edits=1), 12, 1),
        (Mixed(k=3, reads="block", edits=1), 8, 1),
    ],
)
def test_mixtures_are_their_loop(llada: models.Model, rule: Mixed, block: int, open_blocks: int) -> None:
    settings: dict[str, Any] = {"gen_length": 24, "block_length": block, "active_blocks": open_blocks}
    out = dx.decode(llada, PROMPTS, rule=rule, open_at=0.0, **settings)
    hard = dx.decode(llada, PROMPTS, rule=f"confidence:{rule.likely}", open_at=0.0, **settings)
    assert not torch.equal(out.sequences, hard.sequences)
    for prompt, response, nfe in zip(PROMPTS, out.responses, out.nfe.tolist(), strict=True):
        x, passes = plain(llada, prompt, rule, block, open_blocks)
        assert torch.equal(response, x[len(prompt) :])
        assert nfe == passes


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llada_tiny_a", {"cache": "prefix", "rule": Mixed(reads="response")}),
        ("llada_tiny_a", {"cache": "dual", "rule": Mixed(), "active_blocks": 2}),
        ("dream_tiny_a", {"cache": "dual", "rule": Mixed(reads="block", edits=1)}),
        ("sdar_tiny_a", {"cache": "block", "rule": Mixed()}),
        ("sdar_tiny_a", {"cache": "block", "rule": Mixed(reads="block", edits=1)}),
    ],
)
def test_mixtures_do_not_depend_on_the_batch(name: str, settings: dict[str, Any]) -> None:
    """Nor does a request among others, whose tokens are hard, or soft in another way."""
    model = golden.model(name, dtype=torch.float32)
    settings = {"block_length": 8, "gen_length": 16, **settings}
    together = dx.decode(model, PROMPTS, **settings)
    alone = [dx.decode(model, prompt, **settings) for prompt in PROMPTS]
    for b, each in enumerate(alone):
        assert torch.equal(each.responses[0], together.responses[b])
        assert int(each.nfe) == int(together.nfe[b])
    rule = settings.pop("rule")
    with dx.Engine(model, lanes=3, **settings) as engine:
        others = ("entropy:3", "credit") if "active_blocks" in settings else ("entropy:3", "soft:0.05,0.9,6")
        first, *_ = [engine.submit(PROMPTS[0], rule=way) for way in (rule, *others)]
        assert first.result(30).tokens == alone[0].responses[0][:16].tolist()


@dataclass(frozen=True)
class Odd(Mixed):
    """Names ids that there are not, with shares of 0."""

    def decide(self, stats: Any, where: Where, state: Any) -> Decision:
        where.remember(state[1], torch.where(where.open, -7, 1 << 40)[..., None].expand(-1, -1, self.k))
        return Decision(where.masked & (stats.confidence >= self.likely))


def test_a_token_without_shares_is_as_it_is(llada: models.Model) -> None:
    settings: dict[str, Any] = {"gen_length": 16, "block_length": 8}
    out = dx.decode(llada, PROMPTS, rule=Odd(), **settings)
    hard = dx.decode(llada, PROMPTS, rule="confidence:0.6", **settings)
    assert torch.equal(out.sequences, hard.sequences)
    assert torch.equal(out.nfe, hard.nfe)


@dataclass(frozen=True)
class State(Mixed):
    """A state of other shapes and types."""

    kinds: tuple[tuple[tuple[int, ...], torch.dtype], ...] = ()

    def new_state(self, lanes: int, columns: int, device: torch.device) -> tuple[Tensor, ...]:
        return tuple(torch.zeros((lanes, columns, *more), dtype=dtype) for more, dtype in self.kinds)


@pytest.mark.parametrize(
    "kinds",
    [
        (),
        (((), torch.float64),),
        (((2,), torch.float32),),
        (((2,), torch.float32), ((3,), torch.int64)),
        (((2,), torch.float32), ((2,), torch.int32)),
        (((2, 1), torch.float32), ((2, 1), torch.int64)),
    ],
)
def test_a_state_that_makes_no_soft_tokens_is_refused(llada: models.Model, kinds: Any) -> None:
    with pytest.raises(ValueError, match=r"State: new_state: expected, .* soft tokens, .* \(3, .*, K\), got"):
        dx.decode(llada, PROMPTS, gen_length=8, rule=State(kinds=kinds))
