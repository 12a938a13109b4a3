"""Rules against plain forms of their formulas, in batches, beside each other, and where they are wrong; their
texts are in test_rule_texts.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import golden
from test_infill import fast_dllm
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext import models
from dparallel_ext.rules import Credit, Decision, Prophet, Rule, SchED, Where

MASK = 511
PROMPTS = [torch.arange(3, 14), torch.arange(40, 47), torch.arange(1, 30)]


@pytest.fixture(scope="module")
def llada() -> models.Model:
    return golden.model("llada_tiny_a")


@dataclass
class Sharp:
    """A 'model' of any sureness: `llada`'s logits, times `by`."""

    model: Any
    by: float
    config: Any = None

    def __call__(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.model(input_ids).logits * self.by)


def plain(model: Any, prompt: Tensor, length: int, block: int, decide: Any) -> tuple[Tensor, int]:
    """The decoding loop; with logits in float64, decide(z, x, masked, step) -> commit (L,), token (L,)."""
    x = torch.cat((prompt, torch.full((length,), MASK)))
    step = 0
    for start in range(len(prompt), len(x), block):
        window = torch.zeros(len(x), dtype=torch.bool)
        window[start : start + block] = True
        while bool((x[window] == MASK).any()):
            step += 1
            z = model(x[None]).logits[0].double()
            commit, token = decide(z, x, window & (x == MASK), step)
            x = torch.where(commit & (x == MASK), token, x)
    return x, step


def argmax(z: Tensor) -> Tensor:
    """The best token but the mask."""
    return z.index_fill(1, torch.tensor([MASK]), -math.inf).argmax(1)


def best(score: Tensor, masked: Tensor) -> Tensor:
    """One-hot: the masked position with the largest score."""
    chosen = torch.zeros_like(masked)
    chosen[score.masked_fill(~masked, -math.inf).argmax()] = True
    return chosen


@pytest.mark.parametrize("by", [0.4, 0.6, 1.0])
@pytest.mark.parametrize("row", ["confidence:0.5", "entropy:1.0"])
def test_credit_is_the_dense_form(llada: models.Model, row: str, by: float) -> None:
    """With a matrix (L, V) of credit in float64."""
    model = Sharp(llada, by)
    for prompt in PROMPTS:
        credit = torch.zeros(len(prompt) + 32, 512, dtype=torch.float64)

        def decide(
            z: Tensor, x: Tensor, masked: Tensor, step: int, c: Tensor = credit
        ) -> tuple[Tensor, Tensor]:
            p = z.softmax(1)
            token = argmax(z)
            c[masked] *= 0.8
            at = masked.nonzero()[:, 0]
            c[at, token[at]] += p[at, token[at]] ** 0.2
            raised = z + 0.7 * c.log1p()
            p, token = raised.softmax(1), argmax(raised)
            confidence = p.gather(1, token[:, None])[:, 0]
            entropy = -(p * raised.log_softmax(1)).sum(1)
            if row.startswith("entropy"):
                return masked & (entropy <= 1.0) | best(-entropy, masked), token
            return masked & (confidence >= 0.5) | best(confidence, masked), token

        expected, passes = plain(model, prompt, 32, 16, decide)
        out = dx.decode(
            model, prompt, gen_length=32, block_length=16, rule=f"credit+{row}", mask_id=MASK, suppress=None
        )
        assert torch.equal(out.sequences[0], expected)
        assert int(out.nfe) == passes


@pytest.mark.parametrize(("tau", "penalty"), [(0.4, 0.02), (3.0, 0.02), (3.0, 0.3), (0.0, 0.05)])
@pytest.mark.parametrize("by", [0.6, 1.0])
def test_distance_is_its_formula(llada: models.Model, tau: float, penalty: float, by: float) -> None:
    model, several, moved = Sharp(llada, by), 0, 0
    for prompt in PROMPTS:

        def decide(z: Tensor, x: Tensor, masked: Tensor, step: int) -> tuple[Tensor, Tensor]:
            nonlocal moved
            entropy = -(z.softmax(1) * z.log_softmax(1)).sum(1)
            score = entropy + penalty * (torch.arange(len(x)) - int(masked.int().argmax()))
            below = masked & (score < tau)
            moved += not torch.equal(best(-score, masked), best(-entropy, masked))
            return below if below.any() else best(-score, masked), argmax(z)

        expected, passes = plain(model, prompt, 32, 16, decide)
        settings: dict[str, Any] = {"gen_length": 32, "block_length": 16, "mask_id": MASK}
        out = dx.decode(model, prompt, rule=f"distance:{tau},{penalty}", **settings)
        assert torch.equal(out.sequences[0], expected)
        assert int(out.nfe) == passes
        several += passes < 32
    assert moved
    assert (several > 0) == (tau > 0)


@pytest.mark.parametrize(
    ("by", "row"),
    [(0.6, "confidence:0.4"), (1.0, "confidence:0.8"), (0.6, "entropy:2.0"), (1.0, "entropy:0.5"), (1.0, "")],
)
def test_leading_is_its_formula(llada: models.Model, row: str, by: float) -> None:
    """Masks in front of the first that the row (by default its own) does not choose, or else the first; the
    row alone commits others, too."""
    model, counts = Sharp(llada, by), set()
    selector, _, threshold = (row or "confidence:0.9").partition(":")
    for prompt in PROMPTS:

        def decide(z: Tensor, x: Tensor, masked: Tensor, step: int) -> tuple[Tensor, Tensor]:
            at = masked.nonzero()[:, 0].tolist()
            p, entropy = z.softmax(1).amax(1), -(z.softmax(1) * z.log_softmax(1)).sum(1)
            sure = p >= float(threshold) if selector == "confidence" else entropy <= float(threshold)
            run = next((i for i, column in enumerate(at) if not sure[column]), len(at))
            counts.add((min(run, 3), int(sure[at].sum()) > run))
            commit = torch.zeros_like(masked)
            commit[at[: max(1, run)]] = True
            return commit, argmax(z)

        expected, passes = plain(model, prompt, 32, 16, decide)
        settings: dict[str, Any] = {"gen_length": 32, "block_length": 16, "mask_id": MASK, "record": True}
        out = dx.decode(model, prompt, rule=f"leading+{row}" if row else "leading", **settings)
        assert torch.equal(out.sequences[0], expected)
        assert int(out.nfe) == passes
        assert out.trajectory is not None
        assert out.trajectory.step[0].tolist() == sorted(out.trajectory.step[0].tolist())
    assert {run for run, _ in counts} >= {0, 1}
    assert any(more for _, more in counts)
    out = dx.decode(model, prompt, rule="leading+quota:1", **settings)  # SDAR's strategy "sequential"
    assert out.trajectory is not None
    assert out.trajectory.step[0].tolist() == [*range(1, 33)]


@pytest.mark.parametrize("kind", ["linear", "cosine", "exponential"])
@pytest.mark.parametrize("by", [0.6, 1.0])
def test_sched_is_its_formula(llada: models.Model, kind: Any, by: float) -> None:
    model, total, fired = Sharp(llada, by), 32, 0
    rule = SchED(high=0.35 * by, low=0.05 * by, kind=kind, k=3.0)
    bars = {
        "linear": lambda t: rule.high + (rule.low - rule.high) * t,
        "cosine": lambda t: rule.low + (rule.high - rule.low) * (1 + math.cos(math.pi * t)) / 2,
        "exponential": lambda t: rule.low + (rule.high - rule.low) * math.exp(-3 * t),
    }
    for prompt in PROMPTS:
        last = torch.full((len(prompt) + total,), -1)

        def decide(
            z: Tensor, x: Tensor, masked: Tensor, step: int, last: Tensor = last
        ) -> tuple[Tensor, Tensor]:
            two = z.index_fill(1, torch.tensor([MASK]), -math.inf).topk(2, dim=1).values
            token, left = argmax(z), x == MASK
            changed = int((left & (token != last)).sum())
            last.copy_(token)
            if changed == 0 and (two[:, 0] - two[:, 1])[left].mean() >= bars[kind]((step - 1) / (total - 1)):
                return left, token
            return best(z.softmax(1).gather(1, token[:, None])[:, 0], masked), token

        expected, passes = plain(model, prompt, total, 16, decide)
        out = dx.decode(model, prompt, gen_length=total, block_length=16, rule=rule, mask_id=MASK)
        assert torch.equal(out.sequences[0], expected)
        assert int(out.nfe) == passes
        fired += passes < total
    assert fired


def gaps_of_4(predicted: Callable[[Tensor], Tensor]) -> Any:
    """A function as the model; the logits (1, L, 9) of `predicted(ids)` (L,) are 4, all others 0."""

    def model(input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=4.0 * F.one_hot(predicted(input_ids[0]), 9).float()[None])

    return model


@pytest.mark.parametrize(
    ("rule", "length", "passes"),
    [
        (SchED(high=7.5, low=2.5), 11, 8),  # t = 7/10, and 7.5 - 5 * 0.7 = 4; a float32 of 0.7 would miss it
        (SchED(high=8.0, low=0.0), 10, 6),  # t = 5/9, after 4/9
        (SchED(high=4.0, low=4.0), 10, 2),  # in the first pass every prediction is new
        (SchED(high=4.0, low=4.0, changes=1.0), 10, 1),
        (SchED(high=4.0, low=4.0, floor=1.0), 10, 10),
        (SchED(high=4.1, low=4.1), 10, 10),
        (Prophet(0, bars=(4.0, 9.0, 9.0)), 100, 1),
        (Prophet(0, bars=(9.0, 4.0, 9.0)), 100, 33),  # 33/100 is no longer below 0.33
        (Prophet(0, bars=(9.0, 9.0, 4.0)), 100, 67),
        (Prophet(8, bars=(4.0, 4.0, 4.0)), 12, 1),  # the response has four of the five columns
        (Prophet(12, bars=(4.0, 4.0, 4.0)), 12, 12),  # and here none
    ],
)
def test_early_rules_meet_their_bars_exactly(rule: Rule, length: int, passes: int) -> None:
    model, settings = gaps_of_4(torch.ones_like), {"gen_length": length, "block_length": length}
    out = dx.decode(model, torch.tensor([1, 2]), rule=rule, mask_id=8, **settings)
    assert int(out.nfe) == passes


def test_scheds_share_of_changes_is_met_exactly() -> None:
    """In the second pass 13 of 22 predictions are others than in the first."""

    def predicted(ids: Tensor) -> Tensor:
        return 1 + ((ids == 8).sum() < 23).long() * (torch.arange(len(ids)) < 15)

    settings: dict[str, Any] = {"gen_length": 23, "block_length": 23, "mask_id": 8}
    for changes, passes in ((13 / 22, 2), (12.9 / 22, 3)):
        rule = SchED(high=4.0, low=4.0, changes=changes)
        out = dx.decode(gaps_of_4(predicted), torch.tensor([1]), rule=rule, **settings)
        assert int(out.nfe) == passes


@pytest.mark.parametrize("by", [0.6, 1.0])
def test_prophet_is_its_formula(llada: models.Model, by: float) -> None:
    model, total, passes_run = Sharp(llada, by), 24, []
    rule = Prophet(10, bars=(0.6 * by, 0.4 * by, 0.2 * by))
    high, middle, low = rule.bars
    for prompt in PROMPTS:
        answer = slice(len(prompt) + 10, len(prompt) + 15)

        def decide(
            z: Tensor, x: Tensor, masked: Tensor, step: int, answer: slice = answer
        ) -> tuple[Tensor, Tensor]:
            two = z.index_fill(1, torch.tensor([MASK]), -math.inf).topk(2, dim=1).values
            token = argmax(z)
            bar = high if step / total < 0.33 else middle if step / total < 0.67 else low
            if (two[answer, 0] - two[answer, 1]).mean() >= bar:
                return x == MASK, token
            return best(z.softmax(1).gather(1, token[:, None])[:, 0], masked), token

        expected, passes = plain(model, prompt, total, 12, decide)
        out = dx.decode(model, prompt, gen_length=total, block_length=12, rule=rule, mask_id=MASK)
        assert torch.equal(out.sequences[0], expected)
        assert int(out.nfe) == passes
        passes_run.append(passes)
    assert min(passes_run) < total, passes_run


def test_a_rule_may_have_nothing_to_read() -> None:
    """A block of one column, whose only logits are from the position before: `where` has a window without
    cells."""
    windows: list[int] = []

    class Turned(Rule):
        reads, edits = "block", 2

        def decide(self, stats: Any, where: Where, state: Any) -> Decision:
            late = where.turn[:, None] > 0
            windows.append(where.column.shape[1])
            return Decision(where.masked & late, edit=where.decoded & late)

    model = golden.model("dream_tiny_a", dtype=torch.float32)
    out = dx.decode(model, [1, 2], gen_length=3, block_length=1, cache="prefix", rule=Turned())
    assert int(out.nfe) == 3 * 2
    assert windows == [1, 0] * 3


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("cache", ["none", "prefix"])
def test_end_of_text_is_its_formula(llada: models.Model, cache: str, several: bool) -> None:
    """All masks from the first sure EOS on become EOS, in later blocks too, and the rest follows the row."""
    floor, fired = 0.02, 0
    for prompt in PROMPTS:
        full = dx.decode(llada, prompt, gen_length=32, block_length=16, rule="entropy:3")
        eos = [int(full.responses[0][at]) for at in ([20, 12] if several else [12])]

        def decide(
            z: Tensor, x: Tensor, masked: Tensor, step: int, eos: list[int] = eos
        ) -> tuple[Tensor, Tensor]:
            nonlocal fired
            p, token = z.softmax(1), argmax(z)
            confidence, entropy = p.gather(1, token[:, None])[:, 0], -(p * z.log_softmax(1)).sum(1)
            commit = masked & (entropy <= 3) | best(-entropy, masked)
            is_end = torch.isin(token, torch.tensor(eos))
            ends = ((x == MASK) & is_end & (confidence >= floor)).nonzero()[:, 0]
            if len(ends):
                fired += 1
                behind = (x == MASK) & (torch.arange(len(x)) >= ends[0])
                own = token[ends[0]].clone()
                commit, token = commit | behind, torch.where(behind, eos[0], token)
                token[ends[0]] = own
            return commit, token

        rule = f"eot:{'/'.join(map(str, eos))},{floor}+entropy:3"
        out = dx.decode(llada, prompt, gen_length=32, block_length=16, rule=rule, cache=cache)
        if cache == "none":
            expected, passes = plain(llada, prompt, 32, 16, decide)
            assert torch.equal(out.sequences[0], expected)
            assert int(out.nfe) == passes
            assert fired
        assert int(out.nfe) <= int(full.nfe)


@dataclass(frozen=True)
class Planner(Rule):
    """Commits where a linear head of the hidden state is above `bar`, as an unmasking planner does."""

    width: int
    bar: float = 0.0
    reads: Any = "masked"

    hidden = True

    @property
    def weight(self) -> Tensor:
        """(width,) float32"""
        return torch.randn(self.width, generator=torch.Generator().manual_seed(7)) * self.width**-0.5

    def new_state(self, lanes: int, columns: int, device: torch.device) -> tuple[Tensor, ...]:
        return (self.weight.to(device),)

    def reset(self, state: tuple[Tensor, ...], lane: int) -> None:
        pass

    def decide(self, stats: dx.RowStats, where: Where, state: tuple[Tensor, ...]) -> Decision:
        return Decision(where.open & ((where.hidden.float() * state[0]).sum(-1) > self.bar))


@dataclass(frozen=True)
class HeadsAgree(Rule):
    """Compares the logits of every cell with those of its hidden state; commits by the policy row."""

    model: Any
    reads: Any = "response"
    seen: list[int] = field(default_factory=list, compare=False)

    hidden, recorded = True, False

    def decide(self, stats: dx.RowStats, where: Where, state: tuple[Tensor, ...]) -> Decision:
        logits = where.cells.spread(where.rows, math.nan)
        torch.testing.assert_close(self.model.head(where.hidden), logits, equal_nan=True)
        assert bool((where.hidden.isnan().all(-1) == ~where.read).all())
        assert where.hidden.dtype == self.model.dtype
        self.seen.append(int(where.read.sum()))
        return Decision()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("llada_tiny_a", {"cache": "none", "block_length": 8, "active_blocks": 3}),
        ("llada_tiny_a", {"cache": "dual", "block_length": 8, "active_blocks": 2, "refresh": 3}),
        ("dream_tiny_a", {"cache": "prefix", "block_length": 8, "infill": True}),
        ("dream_tiny_a", {"cache": "dual", "block_length": 8, "batch_invariant": True}),
        ("sdar_tiny_a", {"cache": "block", "block_length": 8, "sub_block_length": 4}),
        ("sdar_tiny_a", {"cache": "dual", "block_length": 8, "sub_block_length": 4}),
        ("fast_dllm", {"cache": "block"}),
        ("fast_dllm", {"cache": "dual", "sub_block_length": 4}),
    ],
)
@torch.no_grad()
def test_the_head_of_hidden_states_gives_the_logits(
    name: str, way: dict[str, Any], dtype: torch.dtype
) -> None:
    """In every cell with statistics, and in no other."""
    model = fast_dllm().to(dtype) if name == "fast_dllm" else golden.model(name, dtype=dtype)
    several = way.get("active_blocks", 1) > 1
    for reads in ("masked", "block") if several else ("masked", "block", "response"):
        rule = HeadsAgree(model, reads)
        settings: dict[str, Any] = {"threshold": 3.0, "gen_length": [24, 20, 5], **way}
        by_row = dx.decode(model, PROMPTS, **settings)
        out = dx.decode(model, PROMPTS, rule=rule, **settings)
        assert rule.seen
        if reads == "masked":
            assert torch.equal(out.sequences, by_row.sequences)
            assert torch.equal(out.nfe, by_row.nfe)


def test_hidden_states_are_asked_for_by_name(llada: models.Model) -> None:
    @dataclass(frozen=True)
    class Silent(Planner):
        hidden = False

    with pytest.raises(ValueError, match=r"Where.hidden: expected a rule with hidden = True"):
        dx.decode(llada, PROMPTS, gen_length=8, rule=Silent(llada.shape.width))
    with pytest.raises(ValueError, match=r"rule: Planner reads hidden states, .* got Sharp"):
        dx.decode(Sharp(llada, 1.0), PROMPTS[0], gen_length=8, mask_id=MASK, rule=Planner(64))
    with pytest.raises(ValueError, match=r"draft_size: .* got the rule Planner"):
        dx.decode(llada, PROMPTS, gen_length=8, rule=Planner(llada.shape.width), draft_size=2)


RULES = [
    "edit:0.03,0.04,5",
    "soft:0.05,0.9,6",
    "levenshtein:0.03,0.04,5,439,40",
    "distance:3,0.1",
    "leading+confidence:0.03",
    "credit+confidence:0.03",
    "credit+entropy:3",
    "sched:0.3,0.05",
    "prophet:4",
    "eot:439,0.02+entropy:3",
    "entropy:3",
]


@pytest.mark.parametrize("rule", [*RULES, Planner(64)])
@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_a_sequence_does_not_depend_on_the_batch(llada: models.Model, rule: Any, cache: str) -> None:
    settings: dict[str, Any] = {"block_length": 8, "cache": cache, "rule": rule, "batch_invariant": True}
    together = dx.decode(llada, PROMPTS, gen_length=[24, 20, 5], **settings)
    assert not bool((together.sequences == MASK)[together.masked].any())
    for b, (prompt, length) in enumerate(zip(PROMPTS, [24, 20, 5], strict=True)):
        alone = dx.decode(llada, prompt, gen_length=length, **settings)
        assert torch.equal(alone.responses[0], together.responses[b])
        assert int(alone.nfe) == int(together.nfe[b])


def test_requests_with_rules_of_their_own(llada: models.Model) -> None:
    """In one engine, in the same passes."""
    ways: list[dict[str, Any]] = [{"rule": rule} for rule in RULES] + [{"threshold": 2.0}, {}]
    ways += [
        {"rule": Planner(llada.shape.width)},
        {"rule": lambda stats, masked, step: masked},
        {"rule": "sched:0.3,0.05", "temperature": 0.8, "seed": 3},
    ]
    with dx.Engine(llada, cache="dual", block_length=8, lanes=4) as engine:
        handles = [engine.submit(PROMPTS[0], gen_length=24, **way) for way in ways]
        for way, handle in zip(ways, handles, strict=True):
            if "seed" in way:
                way["seed"] = torch.tensor([way["seed"]])
            alone = dx.decode(llada, PROMPTS[0], gen_length=24, cache="dual", block_length=8, **way)
            assert handle.result(30).tokens == alone.responses[0].tolist()
            assert handle.result(30).nfe == int(alone.nfe)


@dataclass(frozen=True)
class Counts(Rule):
    """Commits a position in the pass that its column says, by what it remembers; reads the whole block."""

    reads = "block"

    def new_state(self, lanes: int, columns: int, device: torch.device) -> tuple[Tensor, ...]:
        return (torch.zeros((lanes, columns), dtype=torch.int64, device=device),)

    def decide(self, stats: dx.RowStats, where: Where, state: tuple[Tensor, ...]) -> Decision:
        assert bool((where.read == (stats.token >= 0)).all())
        assert bool((where.token[where.read & ~where.open] != MASK).all())
        seen = where.recall(state[0]) + 1
        where.remember(state[0], seen)
        first = where.column - where.start[:, None]
        return Decision(seen > first, torch.full_like(stats.token, 7))


def test_what_a_rule_remembers_begins_anew_with_each_sequence(llada: models.Model) -> None:
    with dx.Engine(llada, cache="none", block_length=8, lanes=1) as engine:
        for _ in range(2):
            done = engine.submit(PROMPTS[0], gen_length=16, rule=Counts()).result(30)
            assert done.tokens == [7] * 16
            assert done.nfe == 16


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_a_pass_that_fails_leaves_everything_as_it_was(llada: models.Model, batch_invariant: bool) -> None:
    """One request's error makes the engine run the pass again for each by itself: nothing is remembered,
    committed or counted twice, though the others' part of the pass was done."""

    def bad(stats: dx.RowStats, masked: Tensor, step: Tensor) -> Tensor:
        raise RuntimeError("on purpose")

    settings: dict[str, Any] = {"cache": "dual", "block_length": 8, "batch_invariant": batch_invariant}
    ways: list[dict[str, Any]] = [{"rule": Counts()}, {"rule": Credit()}, {}]
    with dx.Engine(llada, lanes=4, **settings) as engine:
        handles = [engine.submit(PROMPTS[0], gen_length=24, **way) for way in ways]
        failing = engine.submit(PROMPTS[1], gen_length=24, rule=bad)
        for way, handle in zip(ways, handles, strict=True):
            alone = dx.decode(llada, PROMPTS[0], gen_length=24, **settings, **way)
            assert handle.result(30).tokens == alone.responses[0].tolist()
            assert handle.result().nfe == int(alone.nfe)
        with pytest.raises(RuntimeError, match="on purpose"):
            failing.result(30)
    if batch_invariant:
        assert engine.stats.forwards == sum(handle.result().nfe for handle in handles)
