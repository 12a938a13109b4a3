"""Self-speculation (SSD, arXiv 2510.04147): the text of the schedule alone, in fewer passes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import golden, refused
from drafters import fast_dllm
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext.decoding.decode import start_batch
from dparallel_ext.decoding.runner import Runner
from dparallel_ext.decoding.sequence import IDLE
from dparallel_ext.models import Model

MASK = 511
WAYS = [
    ("llada_tiny_a", "none"),
    ("llada_tiny_a", "prefix"),
    ("llada_tiny_a", "dual"),
    ("dream_tiny_a", "none"),
    ("dream_tiny_a", "prefix"),
    ("dream_tiny_a", "dual"),
    ("sdar_tiny_a", "none"),
    ("sdar_tiny_a", "block"),
    ("fast_dllm", "none"),
    ("fast_dllm", "block"),
    ("fast_dllm", "dual"),
]


torch.manual_seed(0)
MODELS: dict[str, Model] = {
    name: fast_dllm() if name == "fast_dllm" else golden.model(name) for name, _ in WAYS
}
CASES = 7
BARS = {"confidence": 1.0, "margin": 1.0, "entropy": 4.0, "factor": 2.0, "entropy_bound": 6.0}
"""Selectors, and thresholds up to which they tell masks apart."""


@pytest.fixture(autouse=True)
def _there(device: str) -> None:
    """Every test of this file runs on every device."""
    for model in MODELS.values():
        model.to(device)


def random_case(g: torch.Generator, name: str, cache: str) -> tuple[list[Tensor], dict[str, Any]]:
    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=g))

    prompts = [torch.randint(0, 500, (draw(1, 20),), generator=g) for _ in range(draw(1, 4))]
    block_length = [4, 8, 12, 32][draw(0, 4)]
    case: dict[str, Any] = {
        "gen_length": [draw(0, 26) for _ in prompts],
        "block_length": block_length,
        "score": [None, "confidence", "entropy", "margin"][draw(0, 4)],
        "temperature": [0.0, 0.0, 0.7][draw(0, 3)],
        "seed": draw(0, 99),
        "batch_invariant": draw(0, 4) == 0,
        "suppress": [7, 9] if draw(0, 3) == 0 else None,
    }
    if draw(0, 2):
        ends = torch.randint(0, 500, (3,), generator=g).tolist()
        case |= {"eos_id": ends[::2], "stop": [ends[1:2], ends[1:]]}
    kind = draw(0, 6)
    if name == "fast_dllm":
        case |= {"block_length": [8, 16][draw(0, 2)], "sub_block_length": [2, 4][draw(0, 2)]}
        kind = -1 if kind in (1, 2) else kind
    if kind == 0:
        case |= {"selector": "quota", "threshold": float(draw(1, 4))}
    elif kind == 1 and block_length == 12:
        case |= {"sub_block_length": 4}
    elif kind == 2:
        case |= {"gen_length": 24, "block_length": 8}
        blocks = {-(-(len(p) % 8 * (name == "sdar_tiny_a") + 24) // 8) for p in prompts}
        case["steps"] = 5 * math.lcm(*blocks)  # a block's first passes commit two, its last one
    elif kind == 3:
        for prompt in prompts:
            prompt[torch.rand(len(prompt), generator=g) < 0.4] = MASK
        case |= {"infill": True}
    elif kind > 3:
        selector, most = list(BARS.items())[draw(0, len(BARS))]
        case |= {"selector": selector, "threshold": most * draw(1, 10) / 10, "score": None}
        case |= {"min_commit": draw(1, 3), "max_commit": [None, 3][draw(0, 2)]}
    if cache == "dual":
        case["refresh"] = [None, None, 1, 3][draw(0, 4)]
    return prompts, case


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_text_is_that_of_the_schedule_alone(way: tuple[str, str]) -> None:
    """Random cases: every field but the passes, of which there are fewer, and all that was committed."""
    (name, cache), saved = way, 0
    for seed in range(CASES):
        g = torch.Generator().manual_seed(1000 * WAYS.index(way) + seed)
        prompts, case = random_case(g, name, cache)
        size = int(torch.randint(1, 9, (), generator=g))
        shared = {"cache": cache, "record": True, "logprobs": True, **case}
        plain = dx.decode(MODELS[name], prompts, **shared)
        out = dx.decode(MODELS[name], prompts, draft_size=size, **shared)
        for field in ("sequences", "generated", "kept", "lengths", "prompt_lengths", "masked"):
            assert torch.equal(getattr(out, field), getattr(plain, field)), (seed, field)
        assert torch.equal(out.nfe_published, plain.nfe_published)
        assert bool((out.nfe <= plain.nfe).all())
        assert bool((out.canvases >= out.nfe).all())
        assert bool((out.canvases <= (1 + size) * out.nfe).all())
        if not case["batch_invariant"]:
            assert out.forwards == int(out.nfe.max())
        check_trajectories(out, plain)
        saved += int((plain.nfe - out.nfe).sum())
    assert saved > 4


def check_trajectories(out: dx.DecodeOutput, plain: dx.DecodeOutput, every_pass: bool = True) -> None:
    """The same, but that several passes of the one are one of the other.

    every_pass: none has only tokens behind an end, which are padding later.
    """
    assert out.trajectory is not None
    assert plain.trajectory is not None
    for name in ("confidence", "logprob"):
        one, other = (getattr(each.trajectory, name) for each in (out, plain))
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, equal_nan=True)
    for b, (one, other) in enumerate(zip(out.trajectory.step, plain.trajectory.step, strict=True)):
        assert torch.equal(one == 0, other == 0)
        order = other[other > 0].argsort(stable=True)
        passes = one[one > 0][order]
        assert bool((passes.diff() >= 0).all())  # in the order of the schedule
        numbers, nfe = passes.unique().tolist(), int(out.nfe[b])
        assert (numbers == list(range(1, nfe + 1))) or (not every_pass and max(numbers) <= nfe)


def reference(
    logits_of: Callable[[Tensor], Tensor], canvas: Tensor, start: int, block_length: int, draft_size: int
) -> tuple[Tensor, int, int]:
    """SSD in plain torch, of one sequence: canvas (L,), filled; passes; canvases."""
    canvas, passes, canvases = canvas.clone(), 0, 0

    def step(logits: Tensor, canvas: Tensor, end: int) -> list[tuple[int, int]]:
        """Positions and tokens of the block's masks, the surest first."""
        logits[:, MASK] = -torch.inf
        confidence, token = logits.softmax(-1).max(-1)
        masked = [p for p in range(end) if canvas[p] == MASK]
        order = sorted(masked, key=lambda p: (-float(confidence[p]), p))
        return [(p, int(token[p])) for p in order]

    for first in range(start, len(canvas), block_length):
        end, draft = min(first + block_length, len(canvas)), list[tuple[int, int]]()
        while bool((canvas[:end] == MASK).any()):
            left = int((canvas[:end] == MASK).sum())
            draft = draft[: min(draft_size, left - 1)]
            states = [canvas]
            for position, token in draft:
                states.append(states[-1].clone())
                states[-1][position] = token
            logits = logits_of(torch.stack(states))  # one pass
            passes, canvases = passes + 1, canvases + len(states)
            for i, state in enumerate(states):
                decision, *draft_after = step(logits[i].clone(), state, end)
                canvas = state.clone()
                canvas[decision[0]] = decision[1]
                if i == len(draft) or decision != draft[i]:
                    break
            draft = draft_after
    return canvas, passes, canvases


@pytest.mark.parametrize("name", ["llada_tiny_a", "dream_tiny_a"])
@torch.inference_mode()
def test_it_is_the_published_rule(name: str) -> None:
    """Tokens, passes and canvases, against the rule in plain torch."""
    model, g = MODELS[name], torch.Generator().manual_seed(5)

    def logits_of(canvases: Tensor) -> Tensor:
        logits = model(canvases).logits.float()
        return torch.cat((logits[:, :1], logits[:, :-1]), 1) if type(model).shift else logits

    for draft_size in (1, 2, 5, 31):
        prompt = torch.randint(0, 500, (6,), generator=g)
        canvas = torch.cat((prompt, torch.full((20,), MASK)))
        out = dx.decode(model, prompt, gen_length=20, block_length=12, draft_size=draft_size)
        tokens, passes, canvases = reference(logits_of, canvas.to(model.device), 6, 12, draft_size)
        assert out.sequences[0].tolist() == tokens.tolist()
        assert (int(out.nfe), int(out.canvases)) == (passes, canvases)
        assert passes < 20


class Canned:
    """Logits (L, V) that the masks do not change, unless `change` says so of canvases (B, L)."""

    def __init__(self, logits: Tensor, change: Callable[[Tensor, Tensor], None] | None = None) -> None:
        self.logits, self.change = logits, change

    def __call__(self, input_ids: Tensor) -> SimpleNamespace:
        logits = self.logits.to(input_ids.device)[None].repeat(len(input_ids), 1, 1)
        if self.change is not None:
            self.change(input_ids, logits)
        return SimpleNamespace(logits=logits)


def decoded(model: Any, **more: Any) -> dx.DecodeOutput:
    return dx.decode(model, torch.zeros(2, dtype=torch.int64), mask_id=9, eos_id=-1, **more)


@pytest.mark.parametrize("tie", [False, True])
def test_where_the_order_holds_every_state_is_accepted(tie: bool) -> None:
    """Confidences that all are 1.0 tie: the lowest position comes first, in the draft as in the passes."""
    logits = torch.full((26, 10), -100.0)
    logits[torch.arange(26), torch.arange(26) % 7] = 100.0 if tie else torch.linspace(-99.0, -95.0, 26)
    for draft_size in (1, 3, 4, 30):
        out = decoded(Canned(logits), gen_length=24, block_length=12, draft_size=draft_size)
        assert out.responses[0].tolist() == [column % 7 for column in range(2, 26)]
        assert int(out.nfe) == 2 * (1 + math.ceil(11 / (draft_size + 1)))  # a block begins without a draft
        assert int(out.canvases) == 2 * 12
        assert out.tokens_per_forward == 24 / int(out.nfe)
    assert int(decoded(Canned(logits), gen_length=24, block_length=12, draft_size=0).nfe) == 24


def test_a_threshold_passes_over_states() -> None:
    """Each pass commits two tokens that become sure together, where the draft guesses one after the other.

    Above temperature 0 the noise is keyed by the number of the pass, and a state behind two guesses has
    another."""
    logits = torch.zeros(26, 10)
    logits[torch.arange(26), torch.arange(26) % 7] = torch.linspace(5.0, 4.0, 26)  # p: 0.94 to 0.86

    def in_pairs(ids: Tensor, logits: Tensor) -> None:
        for own, rows in zip(ids, logits, strict=True):
            known = int((own != 9).long().cumprod(0).sum())
            rows[known : known + 2] *= 4

    model, shared = Canned(logits, in_pairs), {"gen_length": 24, "block_length": 12, "record": True}
    for temperature in (0.0, 0.01):
        threshold = {"rule": "confidence:0.99", "temperature": temperature, "seed": 3}
        plain = decoded(model, **shared, **threshold)
        assert int(plain.nfe) == 2 * 6
        for draft_size, passes in ((1, 6), (2, 4), (3, 4), (4, 3), (11, 2)):
            out = decoded(model, draft_size=draft_size, **shared, **threshold)
            assert torch.equal(out.sequences, plain.sequences)
            assert torch.equal(out.nfe_published, plain.nfe_published)
            assert int(out.nfe) == 2 * (6 if temperature else passes)
            check_trajectories(out, plain)


@pytest.mark.parametrize("refresh", [2, 3])
def test_a_state_is_not_come_to_early_by_a_pass_over_other_positions(refresh: int) -> None:
    """Whether a pass of Fast-dLLM v2 computes its whole block depends on how many there were."""
    g = torch.Generator().manual_seed(8)
    prompts = [torch.randint(0, 500, (n,), generator=g) for n in (5, 11)]
    shared: dict[str, Any] = {"gen_length": 32, "block_length": 16, "sub_block_length": 8, "cache": "dual"}
    shared |= {"refresh": refresh, "selector": "entropy_bound", "threshold": 2.0}
    plain = dx.decode(MODELS["fast_dllm"], prompts, **shared)
    out = dx.decode(MODELS["fast_dllm"], prompts, draft_size=7, **shared)
    assert torch.equal(out.sequences, plain.sequences)
    assert torch.equal(out.nfe_published, plain.nfe_published)


def test_a_token_at_another_place_than_guessed_is_refused() -> None:
    """All tokens are alike, so that places alone tell states apart: the order is part of the text."""
    logits = torch.zeros(8, 10)
    logits[:, 3] = torch.linspace(5.0, 4.0, 8)

    def last_first(
        ids: Tensor, logits: Tensor
    ) -> None:  # once column 2 is filled, the last mask is the surest
        for own, rows in zip(ids, logits, strict=True):
            if own[2] != 9:
                rows[:, 3] = rows[:, 3].flip(0)

    out = decoded(Canned(logits, last_first), gen_length=6, draft_size=2, record=True)
    plain = decoded(Canned(logits, last_first), gen_length=6, record=True)
    assert out.trajectory is not None
    assert plain.trajectory is not None
    assert plain.trajectory.step[0].tolist() == [1, 6, 5, 4, 3, 2]
    # Pass 1 without a draft; pass 2 refuses the guess of column 3 and takes column 7; 3 takes the rest.
    assert out.trajectory.step[0].tolist() == [1, 4, 3, 3, 3, 2]
    assert int(out.nfe) == 4
    assert int(out.canvases) == 1 + 3 + 3 + 1


def test_a_state_that_decoding_never_comes_to_may_be_bad() -> None:
    logits = torch.zeros(8, 10)
    logits[:, 3] = torch.linspace(5.0, 4.0, 8)

    def bad(ids: Tensor, logits: Tensor) -> None:
        for own, rows in zip(ids, logits, strict=True):
            if own[2] != 9:
                rows[:, 3] = rows[:, 3].flip(0)
            if own[3] != 9 and own[7] == 9:
                rows[:] = torch.nan

    out = decoded(Canned(logits, bad), gen_length=6, draft_size=2)
    assert out.responses[0].tolist() == [3] * 6
    assert int(out.nfe) == 4

    def worse(ids: Tensor, logits: Tensor) -> None:
        logits[(ids != 9).sum(1) >= 6] = torch.nan

    prompts = torch.zeros((2, 2), dtype=torch.int64)
    with refused("logits: sequence 0 at position 6 holds NaN"):
        dx.decode(Canned(logits, worse), prompts, mask_id=9, gen_length=6, draft_size=2)


def test_a_pass_that_fails_leaves_the_keys_that_were_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second pass over guesses fails once all is computed: its keys and values lie where those of the
    accepted state were, and the pass without guesses reads the sequence's own."""
    read_counts, fails = Runner.read_counts, itertools.cycle([False, True])

    def fail(runner: Runner, sequences: Any, results: Any) -> Any:
        counts = read_counts(runner, sequences, results)
        if any(sequence is not IDLE for sequence in sequences[1:]) and next(fails):
            raise ValueError("a guess")
        return counts

    shared: dict[str, Any] = {"gen_length": 0, "infill": True, "logprobs": True, "cache": "dual"}
    shared |= {"block_length": 16, "sub_block_length": 4}
    g = torch.Generator().manual_seed(44)
    prompt = torch.randint(0, 500, (32,), generator=g)
    # A sub-block that begins with a given token is computed alone from its first pass on.
    prompt[torch.rand(32, generator=g) < 0.5] = MASK
    plain = dx.decode(MODELS["fast_dllm"], prompt, **shared)
    monkeypatch.setattr(Runner, "read_counts", fail)
    out = dx.decode(MODELS["fast_dllm"], prompt, draft_size=3, **shared)
    assert torch.equal(out.sequences, plain.sequences)
    assert int(out.nfe) < int(plain.nfe)
    torch.testing.assert_close(out.logprobs, plain.logprobs, rtol=0, atol=1e-4)


def test_no_memory_for_states_that_no_pass_can_guess() -> None:
    """The states of a block of 4 are at most 4, whatever is asked."""
    model = MODELS["llada_tiny_a"]
    config = {"gen_length": 8, "block_length": 4, "cache": "dual"}
    most = dx.decode(model, [1, 2], draft_size=3, **config)
    out = dx.decode(model, [1, 2], draft_size=10**12, **config)
    assert torch.equal(out.sequences, most.sequences)
    assert (int(out.nfe), int(out.canvases)) == (int(most.nfe), int(most.canvases))
    fixed = {"block_length": 4, "cache": "dual", "lanes": 1, "max_length": 10}
    with dx.Engine(model, draft_size=10**12, **fixed) as engine:
        assert engine.submit([1, 2], gen_length=8).result().nfe == int(most.nfe)


def test_states_share_the_pages_of_finished_blocks() -> None:
    """A guessed state has one page of its own, whatever the length."""
    model, prompts = MODELS["sdar_tiny_a"], [torch.arange(21), torch.arange(3)]
    config = dx.DecodeConfig(gen_length=[20, 9], cache="block", eos_id=-1)
    with torch.inference_mode():
        batch = start_batch(model, prompts, config, draft_size=3)
        assert batch.kv_cache is not None
        assert batch.kv_cache.slots.shape[2] == 2 * 6 + 2 * 3
        while live := batch.live:
            pages = {b: batch.kv_cache.block_table[b].clone() for b in live}
            blocks = {b: batch.sequences[b].block[0] // 8 for b in live}
            before = batch.kv_cache.slots.clone()
            drafted = {b: batch.canvases[b] for b in live}  # type: ignore[attr-defined]
            cached = {b: batch.sequences[b].num_cached for b in live}
            finished = batch.step()
            for b in live:
                final = pages[b][: cached[b] // 8]
                assert torch.equal(batch.kv_cache.slots[:, :, final], before[:, :, final])
                for lane in batch.states(b)[1 : batch.canvases[b] - drafted[b]]:  # type: ignore[attr-defined]
                    own = batch.kv_cache.block_table[lane] != pages[b]
                    assert own.nonzero()[:, 0].tolist() == [blocks[b]]
                    assert int(batch.kv_cache.block_table[lane][blocks[b]]) >= 12
            batch.enter(finished)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_an_engine_guesses_too(way: tuple[str, str]) -> None:
    """Requests that come and go, in lanes and pages of any size, get their text and their passes alone."""
    name, cache = way
    model, g = MODELS[name], torch.Generator().manual_seed(WAYS.index(way))
    fixed: dict[str, Any] = {"cache": cache, "block_length": 8}
    if name == "fast_dllm":
        fixed["sub_block_length"] = 4
    common, length = torch.randint(0, 500, (11,), generator=g), 48
    requests = []
    for request in range(5):
        tail = torch.randint(0, 500, (int(torch.randint(1, 12, (), generator=g)),), generator=g)
        own = {"gen_length": int(torch.randint(8, 24, (), generator=g)), "seed": request}
        own |= {"temperature": [0.0, 0.7][request % 2], "logprobs": True}
        if request > 2:
            own |= {"rule": ["entropy_bound:2", "confidence:0.6"][request - 3]}
        prompt = torch.cat((common, tail)) if request % 2 else tail
        plain, alone = (dx.decode(model, prompt, draft_size=n, **own, **fixed) for n in (0, 4))
        requests.append((prompt, own, plain, alone))
    for page_size in (None, 5):
        shared = cache == "block" and page_size != 5
        size: dict[str, Any] = {"lanes": 2, "max_length": length, "page_size": page_size, "share": shared}
        passes = [0, 0]
        with dx.Engine(model, draft_size=4, **size, **fixed) as engine:
            asked = []
            for prompt, own, *_ in requests:
                drafts: list[dx.DraftEvent] = []
                asked.append((drafts, engine.submit(prompt, on_draft=drafts.append, **own)))
            for (_, own, plain, alone), (drafts, handle) in zip(requests, asked, strict=True):
                found = handle.result()
                assert found.tokens == plain.responses[0][: own["gen_length"]].tolist()
                assert found.nfe == int(alone.nfe) == drafts[-1].nfe
                assert found.nfe_published == int(plain.nfe_published)
                accepted = sum(draft.accepted for draft in drafts)
                assert accepted == int(plain.nfe) - found.nfe  # each guess is a pass of the schedule
                assert sum(draft.drafted - draft.accepted - len(draft.refused) for draft in drafts) == 0
                passes = [passes[0] + found.nfe, passes[1] + int(plain.nfe)]
            stats = engine.stats
        assert stats.drafted_tokens > stats.accepted_tokens > 0
        assert passes[0] < passes[1]


def test_an_engine_guesses_nothing_behind_an_end() -> None:
    """A state that an EOS completes is the last, though an engine leaves masks behind it, as guesses do."""
    model, prompt, saved = MODELS["llada_tiny_a"], torch.arange(5), 0
    block: dict[str, Any] = {"block_length": 24, "cache": "none"}
    text = dx.decode(model, prompt, gen_length=24, **block).responses[0].tolist()
    with dx.Engine(model, draft_size=4, lanes=1, max_length=32, **block) as engine:
        for eos_id in text[1:4]:
            own = {"gen_length": 24, "eos_id": eos_id}
            found = engine.submit(prompt, **own).result()
            plain = dx.decode(model, prompt, **own, **block)
            alone = dx.decode(model, prompt, draft_size=4, **own, **block)
            assert found.tokens == plain.responses[0][: int(plain.kept)].tolist()
            assert found.nfe == int(alone.nfe)
            assert found.nfe_published == int(plain.nfe_published)
            saved += int(plain.nfe) - found.nfe
    assert saved > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"rule": "credit"}, "draft_size: .*the rule Credit"),
        ({"rule": "sched:7.5"}, "draft_size: .*the rule "),
        ({"policy": lambda stats, masked, step: masked}, "draft_size: .*the rule FunctionRule"),
        ({"rule": "quota:2", "active_blocks": 2}, "draft_size: goes with active_blocks=1 alone, got 2"),
        ({"draft_size": -1}, "draft_size: expected a whole number >= 0, got -1"),
        ({"draft_size": 1.5}, "draft_size: "),
    ],
)
def test_what_does_not_go_with_it_is_refused(arguments: dict[str, Any], said: str) -> None:
    model, arguments = MODELS["llada_tiny_a"], {"gen_length": 8, "draft_size": 2, **arguments}
    with pytest.raises(ValueError, match=said):
        dx.decode(model, [1, 2], **arguments)
    with pytest.raises(ValueError, match=said):
        dx.Engine(model, lanes=1, max_length=16, **arguments)


def test_a_streamer_gets_the_text() -> None:
    class Streamer:
        def __init__(self) -> None:
            self.sent: list[int] = []
            self.drafts = 0

        def put(self, value: Tensor) -> None:
            self.sent += value.flatten().tolist()

        def put_draft(self, value: Tensor) -> None:
            assert value.shape[0] == 1
            self.drafts += 1

        def end(self) -> None:
            pass

    streamer = Streamer()
    model: Model = MODELS["llada_tiny_a"]
    out = dx.decode(model, [1, 2, 3], gen_length=20, block_length=8, draft_size=3, streamer=streamer)
    assert streamer.sent == out.sequences[0].tolist()
    assert streamer.drafts == int(out.nfe) < 20
