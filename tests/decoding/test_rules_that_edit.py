"""Rules that edit: tokens replaced, taken back, turned into masks again."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import golden
from test_infill import fast_dllm
from test_rules import MASK, PROMPTS, Sharp, argmax, best
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext import models
from dparallel_ext.rules import Decision, Edit, Rule, Where


@pytest.fixture(scope="module")
def llada() -> models.Model:
    return golden.model("llada_tiny_a")


def check_edits(model: Any, rule: Rule, after: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> None:
    """That `rule` is the loop of a rule that edits, with a given token in the midst of the response.

    after: logits in float64, tokens, and whether a place is in the block and its token is given (L,) -> the
        tokens (L,) after a pass.
    """
    for prompt in PROMPTS:
        canvas = torch.cat((prompt, torch.full((32,), MASK)))
        canvas[len(prompt) + 5] = 17
        x, passes, given = canvas.clone(), 0, canvas != MASK
        for start in range(len(prompt), len(x), 16):
            inside = torch.zeros(len(x), dtype=torch.bool)
            inside[start : start + 16] = True
            more, before = 0, x.clone()
            while bool((x[inside] == MASK).any()) or bool((x != before).any()):
                if not bool((x[inside] == MASK).any()):
                    if more == rule.edits:
                        break
                    more += 1
                passes, before = passes + 1, x.clone()
                x = after(model(x[None]).logits[0].double(), x, inside, given)
        out = dx.decode(model, canvas, gen_length=0, infill=True, block_length=16, rule=rule, mask_id=MASK)
        assert torch.equal(out.sequences[0], x)
        assert int(out.nfe) == passes


@pytest.mark.parametrize("edits", [1, 3, 16])
@pytest.mark.parametrize("by", [0.4, 0.6, 1.0])
def test_edit_is_its_loop(llada: models.Model, by: float, edits: int) -> None:
    """A given token never changes."""
    edited = 0

    def after(z: Tensor, x: Tensor, inside: Tensor, given: Tensor) -> Tensor:
        nonlocal edited
        token, masked = argmax(z), inside & (x == MASK)
        p = z.softmax(1).gather(1, token[:, None])[:, 0]
        commit = masked & (p > 0.5)
        if bool(masked.any()):
            commit |= best(p, masked) & ~commit.any()
        change = inside & ~masked & ~given & (p > 0.4) & (token != x)
        edited += int(change.sum())
        return torch.where(commit | change, token, x)

    check_edits(Sharp(llada, by), Edit(0.5, 0.4, edits), after)
    assert edited


@dataclass(frozen=True)
class Backtrack(Rule):
    """Commits what is likely, and takes back what is not likely any more, as WINO does (arXiv 2507.18578)."""

    likely: float = 0.3
    back: float = 0.3
    edits: int = 1
    reads = "block"

    def decide(self, stats: Any, where: Where, state: Any) -> Decision:
        p = (where.logits(where.token[..., None])[..., 0] - stats.lse).exp()
        return Decision(where.masked & (stats.confidence >= self.likely), remask=p < self.back)


@dataclass(frozen=True)
class Doubtful(Backtrack):
    """Takes back one token a pass; `also`: and asks to replace that very token."""

    also: bool = False

    def decide(self, stats: Any, where: Where, state: Any) -> Decision:
        decision = super().decide(stats, where, state)
        commit, back = decision.commit, decision.remask
        assert commit is not None
        assert back is not None
        back = back & where.decoded & (commit.sum(1, keepdim=True) > 1)
        one = back & (back.cumsum(1) == 1)
        return Decision(commit, remask=one, edit=one if self.also else None)


def test_a_token_that_is_taken_back_is_not_replaced(llada: models.Model) -> None:
    settings: dict[str, Any] = {"gen_length": 32, "block_length": 16, "record": True}

    def decode(back: float, also: bool = False) -> dx.DecodeOutput:
        return dx.decode(llada, PROMPTS, rule=Doubtful(likely=0.8, back=back, also=also), **settings)

    out, both, never = decode(0.9), decode(0.9, also=True), decode(0.0)
    assert not torch.equal(out.trajectory.step, never.trajectory.step)
    assert torch.equal(both.sequences, out.sequences)
    assert torch.equal(both.trajectory.step, out.trajectory.step)


def test_edits_thresholds_are_strict() -> None:
    """As published: what is exactly as probable as a threshold is neither committed nor edited."""

    def model(ids: Tensor) -> SimpleNamespace:
        logits = torch.full((*ids.shape, 10), -math.inf)
        low = 3 if bool((ids == 9).any()) else 6
        logits[..., low : low + 2] = 0.0  # each has the probability 0.5
        return SimpleNamespace(logits=logits)

    progress: list[float] = []

    class Noted(Edit):
        def decide(self, stats: Any, where: Where, state: Any) -> Decision:
            progress.append(float(where.progress))
            return super().decide(stats, where, state)

    for bar, passes, token in ((0.5, 5, 3), (0.49, 3, 6)):
        out = dx.decode(model, [[1, 2]], mask_id=9, gen_length=4, rule=Noted(bar, bar))
        assert (out.responses[0].tolist(), int(out.nfe)) == ([token] * 4, passes)
    assert progress[:5] == pytest.approx([0, 1 / 3, 2 / 3, 1, 1])  # a pass beyond the schedule's
    # So an end that may still be edited ends nothing.
    for eos in (None, 3):
        out = dx.decode(model, [[1, 2]], mask_id=9, gen_length=4, eos_id=eos, rule=Edit(0.5, 0.49))
        assert (out.responses[0].tolist(), int(out.kept), int(out.nfe)) == ([6] * 4, 4, 6)


@dataclass(frozen=True)
class Writes(Rule):
    """Writes one token into every mask and over every decoded token."""

    written: int

    reads, edits = "block", 2

    def decide(self, stats: Any, where: Where, state: Any) -> Decision:
        return Decision(where.masked, torch.full_like(stats.token, self.written), where.decoded)


@pytest.mark.parametrize("written", [MASK, -1, 600, 5])
def test_an_edit_to_an_impossible_token_leaves_what_is_there(llada: models.Model, written: int) -> None:
    """And of the masks the most confident is committed, as without a rule."""
    settings: dict[str, Any] = {"gen_length": 16, "block_length": 8, "suppress": [5]}
    out = dx.decode(llada, PROMPTS, rule=Writes(written), **settings)
    assert torch.equal(out.sequences, dx.decode(llada, PROMPTS, **settings).sequences)


@pytest.mark.parametrize("edits", [1, 4])
@pytest.mark.parametrize("by", [0.6, 1.0])
def test_remasking_is_its_loop(llada: models.Model, by: float, edits: int) -> None:
    """A given token never becomes a mask."""
    taken: list[int] = []
    turns: Counter[int] = Counter()

    def after(z: Tensor, x: Tensor, inside: Tensor, given: Tensor) -> Tensor:
        token, masked, p = argmax(z), inside & (x == MASK), z.softmax(1)
        sure = p.gather(1, token[:, None])[:, 0]
        commit = masked & (sure >= 0.3)
        decoded, turn = inside & ~masked & ~given, turns[int(inside.nonzero()[0])]
        turns[int(inside.nonzero()[0])] += 1
        back = (decoded & (p.gather(1, x[:, None])[:, 0] < 0.3)).nonzero()[:, 0]
        if bool(masked.any()):
            commit |= best(sure, masked) & ~commit.any()
            back = back[: int(commit.sum()) - 1 + max(0, int(decoded.sum()) - turn)]
        taken.append(len(back))
        return torch.where(commit, token, x).index_fill(0, back, MASK)

    check_edits(Sharp(llada, by), Backtrack(edits=edits), after)
    assert max(taken) > 1


@dataclass(frozen=True)
class Revoke(Rule):
    """Takes back the least likely tokens, fewer than the pass before has committed: WINO's measure (arXiv
    2507.18578), by which a pass may leave more masks than it found."""

    likely: float = 0.4
    back: float = 0.5
    edits: int = 1
    reads = "block"

    def new_state(self, lanes: int, columns: int, device: torch.device) -> tuple[Tensor, ...]:
        return (torch.zeros((lanes, 1), dtype=torch.int64, device=device),)

    def decide(self, stats: Any, where: Where, state: Any) -> Decision:
        sure = torch.where(where.masked, stats.confidence, -1.0)
        first = sure.argsort(dim=1, descending=True, stable=True).argsort(dim=1) == 0
        commit = where.masked & ((sure >= self.likely) | first)
        made = commit.sum(1, keepdim=True)
        p = (where.logits(where.token[..., None])[..., 0] - stats.lse).exp()
        p = torch.where(where.decoded, p, 2.0)
        rank = p.argsort(dim=1, stable=True).argsort(dim=1)
        before = torch.where(where.turn[:, None] == 0, 1, state[0][where.lane])
        state[0][where.lane] = made
        back = (p < self.back) & (made > 1) & (rank < before - 1)
        return Decision(commit, remask=back, complete=torch.ones_like(where.turn, dtype=torch.bool))


def test_a_pass_may_take_back_more_than_it_commits(llada: models.Model) -> None:
    """As long as n passes leave n tokens."""
    model, grown = Sharp(llada, 0.6), 0
    for prompt in PROMPTS:
        x, passes = torch.cat((prompt, torch.full((32,), MASK))), 0
        for start in (len(prompt), len(prompt) + 16):
            inside = torch.zeros(len(x), dtype=torch.bool)
            inside[start : start + 16] = True
            before = 1
            while bool((x[inside] == MASK).any()):
                z, passes = model(x[None]).logits[0].double(), passes + 1
                token, masked, p = argmax(z), inside & (x == MASK), z.softmax(1)
                sure = p.gather(1, token[:, None])[:, 0]
                commit = masked & (sure >= 0.4)
                commit |= best(sure, masked) & ~commit.any()
                doubt = p.gather(1, x[:, None])[:, 0].masked_fill(~inside | masked, 2.0)
                made = int(commit.sum())
                back = doubt.argsort(stable=True)[: before - 1 if made > 1 else 0]
                back = back[doubt[back] < 0.5]
                grown += len(back) > made
                x, before = torch.where(commit, token, x).index_fill(0, back, MASK), made
        out = dx.decode(model, prompt, gen_length=32, block_length=16, rule=Revoke(), mask_id=MASK)
        assert torch.equal(out.sequences[0], x)
        assert int(out.nfe) == passes
    assert grown


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llada_tiny_a", {}),
        ("llada_tiny_a", {"cache": "prefix"}),
        ("llada_tiny_a", {"cache": "dual", "refresh": 2}),
        ("llada_tiny_a", {"sub_block_length": 2}),
        ("llada_tiny_a", {"rule": Backtrack(0.3, 0.2), "temperature": 0.8, "seed": [1, 2, 3]}),
        ("dream_tiny_a", {}),
        ("dream_tiny_a", {"cache": "prefix"}),
        ("dream_tiny_a", {"cache": "dual", "refresh": 2}),
        ("sdar_tiny_a", {"block_length": 4}),
    ],
)
def test_a_rule_that_always_remasks_ends(name: str, settings: dict[str, Any]) -> None:
    """After n passes a block has n tokens, but for `edits` passes over a block without a mask."""
    model = golden.model(name, dtype=torch.float32)
    prompts = [torch.arange(3, 14), torch.arange(40, 47), torch.arange(1, 30)]
    settings = {"rule": Backtrack(0.0, 2.0, 2), "gen_length": 16, "block_length": 8, **settings}
    out = dx.decode(model, prompts, **settings)
    mask_id = models.traits(model).mask_id
    assert not any(bool((response == mask_id).any()) for response in out.responses)
    assert int(out.nfe.max()) <= 24 * (1 + 2)
    if "seed" not in settings:
        assert int(out.nfe.min()) > 4
    if name == "dream_tiny_a" and "refresh" in settings:  # no pass is without a token to commit
        assert out.nfe.tolist() == [12] * 3
    seeds = settings.pop("seed", [None] * 3)
    for i, prompt in enumerate(prompts):
        alone = dx.decode(model, prompt, **settings, seed=seeds[i] if seeds[i] is None else [seeds[i]])
        assert torch.equal(alone.responses[0], out.responses[i])
        assert int(alone.nfe) == int(out.nfe[i])


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_edit_leaves_a_token_without_logits(cache: str) -> None:
    """Dream's logits of a block's first column are from the position before: passes from the block on have
    none."""
    settings: dict[str, Any] = {"gen_length": 8, "block_length": 8, "rule": Edit(0.5, 0.0, 6), "record": True}
    model = golden.model("dream_tiny_a", dtype=torch.float32)
    for first in range(3, 9):
        steps = dx.decode(model, torch.arange(first, 20), cache=cache, **settings).trajectory.step[0]
        assert int(steps[0]) == 1  # of the full pass, which fills this one
        assert int(steps.max()) > 2


def test_a_block_that_another_begins_cannot_be_edited() -> None:
    with pytest.raises(ValueError, match="rule: Edit edits, which does not go with"):
        dx.decode(fast_dllm(), PROMPTS, gen_length=8, rule="edit")


def test_soft_tokens_are_for_models_of_ours(llada: models.Model) -> None:
    with pytest.raises(ValueError, match=r"rule: Soft makes soft tokens, .* got Sharp"):
        dx.decode(Sharp(llada, 1.0), PROMPTS[0], gen_length=8, mask_id=MASK, rule="soft")
    with pytest.raises(ValueError, match="temperature: Soft commits tokens of its own, so expected 0"):
        dx.decode(llada, PROMPTS[0], gen_length=8, rule="soft", temperature=0.5)
