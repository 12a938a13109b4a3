"""Rows that no model gives, with any policy, temperature, top_p, top_k and suppressed ids: the laws hold.

A law is tested by what the kernels themselves found, so that rounding has no say. The float64 reference,
which rounds otherwise, says whether the statistics are near and whether the token is one that may be drawn.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from conftest import LEVELS, Attack, assert_stats_close
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext import arguments, policies, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TEMPERATURES = (1e-45, 1e-38, 9.99e-6, 1e-5, 1e-3, 0.1, 0.7, 1.0, 2.0, 1e4, 1e30, 1e38, 1e300)
TOP_P = (0.0, 5e-324, 1e-10, 0.3, 0.9, 1 - 1e-16, 1.0)


@pytest.fixture(autouse=True)
def _level() -> Iterator[None]:
    before = dx.simd_level()
    yield
    dx._C.use_simd_level(before)


def numbers(rng: random.Random, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rng.randrange(2**40)))


def row(rng: random.Random, vocab: int, dtype: torch.dtype, *, bad: bool) -> Tensor:
    """Logits (V,)."""
    low, high = torch.finfo(dtype).min, torch.finfo(dtype).max
    tiny = torch.finfo(dtype).tiny
    z = numbers(rng, vocab)
    kind = rng.randrange(12)
    if kind == 0:
        z = torch.full((vocab,), rng.choice([low, high, 0.0, -0.0, 1.0, -60000.0]))
    elif kind == 1:  # over the whole range
        z = z.tanh() * high
    elif kind == 2:
        z = torch.tensor([rng.choice([low, high, 0.0, 1.0, -1.0, tiny, -tiny]) for _ in range(vocab)])
    elif kind == 3:  # far away
        z = z + rng.choice([-60000.0, 60000.0, 1000.0, -1000.0])
    elif kind == 4:
        z = z * tiny
    elif kind == 5:
        z = (z * 3).round()  # ties
    else:
        z = z * rng.choice([0.1, 1.0, 4.0, 20.0])
    z = z.clamp(low, high).to(dtype)
    for at in rng.sample(range(vocab), k=min(vocab, rng.choice([0, 0, 0, 1, 2, 5]))):
        z[at] = rng.choice([-math.inf, low, high, math.inf])
    if bad:
        if rng.random() < 0.5:
            z[rng.randrange(vocab)] = math.nan
        else:
            z[:] = -math.inf
    return z


def policy(rng: random.Random, width: int, least: int = 0) -> Tensor:
    """(1, 5): within the bounds of the tables, at them often; `least`: of min_commit."""
    name = rng.choice(list(policies.RULES))
    rule = policies.RULES[name]
    threshold = rng.choice([rule.low, min(rule.high, 1e30), rng.uniform(rule.low, min(rule.high, 6.0))])
    low = max(least, rng.choice([0, 1, 1, 1, 2, 3, policies.MOST]))
    return policies.make(
        name,
        float(math.ceil(threshold)) if rule.whole else threshold,
        min_commit=low,
        max_commit=rng.choice([None, None, max(low, 1), low + 1, low + width, 1e19, math.inf]),
        score=rng.choice([None, *policies.SCORES]) if rule.score is None else None,
    )


class Sampler(NamedTuple):
    temperature: float
    top_p: float | None
    top_k: int | None

    @classmethod
    def draw(cls, rng: random.Random, vocab: int) -> Sampler:
        return cls(
            rng.choice((0.0, 0.0, *TEMPERATURES)),
            rng.choice((None, None, *TOP_P)),
            rng.choice((None, None, 0, 1, 2, vocab, vocab + 1, 2**62)),
        )


def suppressed(rng: random.Random, vocab: int) -> list[int] | None:
    count = rng.choice([0, 0, 1, 3, vocab - 1, vocab] if rng.random() < 0.3 else [0, 0, 1])
    return rng.sample(range(vocab), k=min(count, vocab)) or None


def check_draws(logits: Tensor, drawn: dx.RowStats, mask_id: int, settings: dict[str, Any]) -> None:
    """That each sample could be the reference's; noise and nucleus are known but for their rounding."""
    sampler = Sampler(*(settings[name] for name in Sampler._fields))
    temperature = arguments.temperature_in_force(sampler.temperature)
    z = logits.double().clamp(max=torch.finfo(torch.float32).max)
    z[:, [i for i in {mask_id, *(settings["suppress"] or ())} if 0 <= i < z.shape[1]]] = -math.inf
    picked = drawn.sample[:, None]
    if temperature == 0:
        assert torch.equal(drawn.sample, z.argmax(1)), "greedy, ties to the lowest id"
        return
    keys = [torch.as_tensor(settings[k]).expand(len(z)) for k in ("seed", "sequence", "position", "step")]
    noise = reference.gumbel(keys[0], keys[1], keys[2], keys[3], z.shape[1])
    scaled = (z - z.amax(1, keepdim=True)) / temperature
    top_p = 1.0 if sampler.top_p is None else sampler.top_p
    inner, outer = (
        reference.nucleus(z, min(max(0.0, top_p + d), 1.0), sampler.top_k, temperature) for d in (-1e-5, 1e-5)
    )
    score = scaled + noise
    best = score.where(inner, -math.inf).amax(1)
    assert bool(outer.gather(1, picked).all()), "out of the nucleus"
    assert bool((score.gather(1, picked)[:, 0] >= best - 1e-3).all()), "not the best score"
    if torch.equal(inner, outer):
        expected = scaled.where(inner, -math.inf).log_softmax(1).gather(1, picked)[:, 0]
        assert_stats_close(drawn.sample_logprob, expected.float(), "sample_logprob")


def test_row_stats_are_the_references(attack: Attack) -> None:
    for rng in attack.cases(150):
        dx._C.use_simd_level(rng.choice(LEVELS))
        vocab, dtype = rng.choice([1, 2, 3, 8, 33, 100, 700, 2049, 20011]), rng.choice(DTYPES)
        logits = torch.stack([row(rng, vocab, dtype, bad=False) for _ in range(rng.randint(1, 4))])
        mask_id, suppress = rng.choice([None, rng.randrange(vocab)]), suppressed(rng, vocab)
        sampler = Sampler.draw(rng, vocab)
        key = {"seed": rng.randrange(2**62), "sequence": 3, "position": torch.arange(len(logits)), "step": 1}
        settings = {**sampler._asdict(), **key, "suppress": suppress}
        closed = {*(suppress or ())} | ({mask_id} if mask_id is not None else set())
        free = [i for i in range(vocab) if i not in closed]
        if bool((logits[:, free] == -math.inf).all(1).any()):
            with pytest.raises(ValueError, match=r"row \d leaves no token to choose"):
                dx.row_stats(logits, mask_id=mask_id, **settings)
            continue
        stats = dx.row_stats(logits, mask_id=mask_id, **settings)
        expected = reference.row_stats(logits, mask_id=mask_id, suppress=suppress)
        for name in ("token", "top1", "top2", "lse", "margin", "entropy", "max_logit", "log_sum"):
            assert_stats_close(getattr(stats, name), getattr(expected, name), name)
        check_draws(logits, stats, -1 if mask_id is None else mask_id, settings)


def same(a: dx.UnmaskOutput, b: dx.UnmaskOutput) -> bool:
    """To the bit, NaN equal to NaN."""
    pairs = [
        *zip(a.stats[:-1], b.stats[:-1], strict=True),
        (a.committed, b.committed),
        (a.remaining, b.remaining),
    ]
    return all(torch.equal(x.view(torch.int32), y.view(torch.int32)) for x, y in pairs)


class Board(NamedTuple):
    """The arguments of an `unmask_`."""

    tokens: Tensor
    """(B, L)"""
    logits: Tensor
    """(B, L, V)"""
    mask_id: int
    start: Tensor
    end: Tensor
    policy: Tensor
    listed: Tensor | None
    """(N,) flat positions"""
    suppress: list[int] | None

    @classmethod
    def draw(cls, rng: random.Random) -> Board:
        batch, length, vocab = rng.randint(1, 3), rng.randint(1, 9), rng.choice([1, 2, 5, 33, 257, 700])
        dtype = rng.choice(DTYPES)
        mask_id = rng.choice([rng.randrange(vocab), vocab - 1, vocab + 3])  # also one that has no logit
        size, spoiled = batch * length, rng.random() < 0.1
        tokens = [mask_id if rng.random() < 0.7 else rng.randrange(vocab) for _ in range(size)]
        logits = [row(rng, vocab, dtype, bad=spoiled and rng.random() < 0.3) for _ in range(size)]
        board = cls(
            torch.tensor(tokens).view(batch, length),
            torch.stack(logits).view(batch, length, vocab),
            mask_id,
            torch.tensor([rng.randint(-1, length) for _ in range(batch)]),
            torch.tensor([rng.randint(-1, length + 2) for _ in range(batch)]),
            torch.cat([policy(rng, length) for _ in range(batch)]),
            None,
            suppressed(rng, vocab),
        )
        if rng.random() < 0.5:
            return board
        beside = torch.tensor([rng.random() < 0.3 for _ in range(size)])
        return board._replace(listed=(board.needed.flatten() | beside).nonzero()[:, 0])

    @property
    def needed(self) -> Tensor:
        column = torch.arange(self.tokens.shape[1])
        inside = (column >= self.start[:, None]) & (column < self.end[:, None])
        return (self.tokens == self.mask_id) & inside

    def unmask(self, of: slice, **settings: Any) -> tuple[Tensor, dx.UnmaskOutput]:
        """Of some of the sequences: tokens and output."""
        batch, length = self.tokens.shape
        tokens, logits, positions = self.tokens[of].clone(), self.logits[of], None
        if self.listed is not None:
            first, last = of.start * length, of.stop * length
            positions = self.listed[(self.listed >= first) & (self.listed < last)]
            logits, positions = self.logits.flatten(0, 1)[positions], positions - first
        try:
            out = dx.unmask_(
                tokens,
                logits,
                mask_id=self.mask_id,
                start=self.start[of],
                end=self.end[of],
                policy=self.policy[of],
                positions=positions,
                suppress=self.suppress,
                sequence=torch.arange(batch)[of],
                **settings,
            )
        except ValueError:
            assert torch.equal(tokens, self.tokens[of]), "an error left something behind"
            raise
        return tokens, out

    def by_position(self, stats: dx.RowStats) -> dx.RowStats:
        """Fields (B, L), as if every position had its row."""

        def spread(values: Tensor) -> Tensor:
            blank = -1 if values.dtype == torch.int64 else math.nan
            full = values.new_full((self.tokens.numel(),), blank)
            return full.index_put((self.listed,), values).view(self.tokens.shape)

        return stats if self.listed is None else stats.map(spread)


def at_positions(stats: dx.RowStats, at: Tensor) -> dx.RowStats:
    return stats.map(lambda values: values.flatten()[at])


def test_unmask_keeps_its_laws(attack: Attack) -> None:
    for rng in attack.cases(120):
        dx._C.use_simd_level(rng.choice(LEVELS))
        board = Board.draw(rng)
        (batch, length), vocab = board.tokens.shape, board.logits.shape[-1]
        needed, rows, suppress = board.needed, board.policy, board.suppress or []
        settings: dict[str, Any] = Sampler.draw(rng, vocab)._asdict()
        settings |= {"seed": rng.randrange(2**62), "step": rng.randrange(100)}
        seen = board.logits.double()
        seen[..., suppress] = -math.inf
        open_ = seen.clone()
        open_[..., board.mask_id : board.mask_id + 1] = -math.inf
        broken = needed & (seen.isnan().any(-1) | (open_ == -math.inf).all(-1))
        whole = slice(0, batch)
        if bool(broken.any()):
            b, at = broken.nonzero()[0].tolist()
            with pytest.raises(ValueError, match=f"sequence {b} at position {at} "):
                board.unmask(whole, **settings)
            continue

        tokens, out = board.unmask(whole, **settings)
        changed, stats = tokens != board.tokens, board.by_position(out.stats)
        picked, masked, committed = tokens[changed], needed.sum(1), changed.sum(1)
        assert bool(((picked >= 0) & (picked < vocab) & (picked != board.mask_id)).all()), picked
        assert bool((open_[changed].gather(1, picked[:, None]) > -math.inf).all()), "of no probability"
        assert torch.equal(picked, stats.sample[changed])
        assert torch.equal(out.committed, committed)
        assert bool((committed >= rows[:, 2].double().minimum(masked.double())).all())
        assert bool((committed <= rows[:, 3]).all())
        assert torch.equal(out.remaining, masked - committed)
        assert bool(out.done) == (not bool(out.remaining.any()))
        chosen = reference.select(stats.confidence, stats.margin, stats.entropy, needed, rows)
        sums = [policies.SELECTORS[name] for name in ("entropy_bound", "frechet")]
        exact = ~torch.isin(rows[:, 0], torch.tensor(sums))  # sums that the reference rounds otherwise
        assert torch.equal(changed[exact], chosen[exact]), "not the best, or ties not to the lowest"

        at = needed.flatten().nonzero()[:, 0]
        if len(at):
            own = at_positions(stats, at)
            where = {"sequence": at // length, "position": at % length, "suppress": suppress}
            check_draws(board.logits.flatten(0, 1)[at], own, board.mask_id, {**settings, **where})
        for b in range(batch):
            alone, apart = board.unmask(slice(b, b + 1), **settings)
            assert torch.equal(alone[0], tokens[b]), "another result alone"
            assert torch.equal(apart.committed[0], out.committed[b])
        if settings["temperature"] < arguments.COLDEST:
            greedy, plain = board.unmask(whole, **{**settings, "temperature": 0.0})
            assert torch.equal(greedy, tokens)
            assert same(plain, out), "a temperature that is 0 changed a statistic"


class Pretender:
    """A model whose logits are rows of a list, chosen by the token, its position and the first token."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows  # (n, V)

    def __call__(self, x: Tensor) -> SimpleNamespace:
        column = torch.arange(x.shape[1])
        return SimpleNamespace(logits=self.rows[(x * 7 + column * 5 + x[:, :1] * 3) % len(self.rows)])


def test_every_decode_ends(attack: Attack) -> None:
    for rng in attack.cases(40):
        batch, vocab, dtype = rng.randint(1, 3), rng.choice([2, 5, 33, 200]), rng.choice(DTYPES)
        mask_id = rng.choice([vocab - 1, vocab + 1])
        prompts = [[rng.randrange(vocab - 1) for _ in range(rng.randint(1, 4))] for _ in range(batch)]
        suppress = [i for i in suppressed(rng, vocab) or () if vocab > 2] or None
        z = torch.stack([row(rng, vocab, dtype, bad=False) for _ in range(11)])
        model = Pretender(z)
        free = [i for i in range(vocab) if i not in {mask_id, *(suppress or ())}]
        settings: dict[str, Any] = {
            **Sampler.draw(rng, vocab)._asdict(),
            "gen_length": [rng.randint(0, 12) for _ in range(batch)],
            "block_length": rng.choice([1, 3, 4, 32]),
            "suppress": suppress,
            "mask_id": mask_id,
        }
        if rng.random() < 0.8:
            rows = torch.cat([policy(rng, 12, least=1) for _ in range(batch)])
        else:  # the fixed schedule
            rows = None
            settings["score"] = rng.choice([None, *policies.SCORES])
        seeds = torch.tensor([rng.randrange(2**62) for _ in range(batch)])
        whole = {**settings, "policy": rows, "seed": seeds, "record": True}
        usable = bool((z[:, free] > -math.inf).any(1).all())  # else a pass may meet a bad row, or none
        try:
            out = dx.decode(model, prompts, **whole)
        except ValueError:
            if usable:
                raise
            continue
        assert out.trajectory is not None
        for b, prompt in enumerate(prompts):
            response = out.responses[b].tolist()
            count = settings["gen_length"][b]
            assert len(response) == count
            assert set(response) <= set(free), "a token that nobody may decode"
            assert out.sequences[b, : len(prompt)].tolist() == prompt
            per_pass = out.trajectory.step[b, :count].bincount(minlength=int(out.nfe[b]) + 1)[1:]
            assert int(per_pass.sum()) == count
            assert bool((per_pass >= 1).all())
            if rows is not None:
                assert bool((per_pass <= rows[b, 3]).all())
            own = {**settings, "gen_length": count, "policy": None if rows is None else rows[b : b + 1]}
            alone = dx.decode(model, prompt, seed=seeds[b : b + 1], **own)
            assert alone.responses[0].tolist() == response, "another text alone"
        if settings["temperature"] < arguments.COLDEST:
            greedy = dx.decode(model, prompts, **{**whole, "temperature": 0.0})
            assert torch.equal(greedy.sequences, out.sequences)
            assert torch.equal(greedy.nfe, out.nfe)


def test_rows_of_policies_are_followed_or_refused(attack: Attack) -> None:
    """The two tables of bounds are one: what Python refuses, the op does, and the other way round."""
    junk = (math.nan, math.inf, -math.inf, 1e19, -1e19, 2.0**24, 2.0**24 + 2, -1.0, 0.0, -0.0, 0.5, 1.0, 1.5)
    for rng in attack.cases(300):
        rows = policy(rng, 6)
        for at in rng.sample(range(5), k=rng.choice([0, 1, 1, 2, 5])):
            whole = rng.random() < 0.5
            rows[0, at] = rng.randint(-1, 7) if whole else rng.choice([*junk, rng.uniform(-2, 2)])
            if rng.random() < 0.2:
                rows[0, at] = torch.nextafter(rows[0, at], torch.tensor(rng.choice([-math.inf, math.inf])))
        scores = torch.rand(3, 1, 6, generator=torch.Generator().manual_seed(rng.randrange(2**40)))
        eligible = torch.ones(1, 6, dtype=torch.bool)
        try:
            policies.check(rows, 1)
        except ValueError as error:
            field = str(error).split(":")[0]
            with pytest.raises(ValueError, match=f"{field}: expected .* in policy row 0"):
                torch.ops.dparallel.select(*scores, eligible, rows)
        else:
            commit = torch.ops.dparallel.select(*scores, eligible, rows)
            assert torch.equal(commit, reference.select(*scores, eligible, rows)) or rows[0, 0] == 5
