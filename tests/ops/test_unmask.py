"""unmask_ against its float64 oracle, for every policy, and on the cases that break others."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from conftest import (
    EMULATED,
    assert_stats_close,
    counters,
    every_level,
    everywhere,
    goes_on,
    refused,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext import policies, reference

MASK = 7


def rows_of(rng, batch: int, length: int) -> Tensor:
    """Policy rows of random rules, parameters and bounds."""
    made = []
    for _ in range(batch):
        selector = rng.choice(list(policies.SELECTORS))
        threshold = {
            "confidence": rng.uniform(0, 1),
            "entropy": rng.uniform(0, 4),
            "margin": rng.uniform(0, 1),
            "quota": rng.randint(1, length + 2),
            "factor": rng.uniform(0, 3),
            "entropy_bound": rng.uniform(0, 8),
            "frechet": rng.uniform(0, 1),
        }[selector]
        low = rng.choice([0, 1, 1, 2, 5])
        high = rng.choice([None, max(low, 1), low + 1, low + length])
        score = rng.choice(list(policies.SCORES)) if selector == "quota" else None
        made.append(policies.make(selector, threshold, min_commit=low, max_commit=high, score=score))
    return torch.cat(made) if made else torch.zeros(0, 5)


def windows_of(rng, batch: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lane, start and end of windows that do not overlap, in any order; some hold nothing."""
    found = []
    for b in range(batch):
        cuts = sorted(rng.sample(range(length + 1), k=min(length + 1, rng.randint(0, 5))))
        found += [(b, start, end) for start, end in itertools.pairwise(cuts) if rng.random() < 0.8]
        found += [(b, start, start - rng.randrange(3)) for start in cuts if rng.random() < 0.2]
    rng.shuffle(found)
    lane, start, end = torch.tensor(found, dtype=torch.int64).reshape(-1, 3).unbind(1)
    return lane, start, end


def too_near(stats: dx.RowStats, eligible: Tensor, policy: Tensor) -> bool:
    """Whether rounding could change what is selected: two scores, or a score and its bound, too near."""
    for b, (_, threshold, _, _, score) in enumerate(policy.double().tolist()):
        p, h, margin = (
            x[b][eligible[b]].double().sort().values for x in (stats.confidence, stats.entropy, stats.margin)
        )
        key = (p, h, margin)[int(score)]
        n = torch.arange(len(p), 0, -1)
        gaps = [key.diff(), key - threshold, p - (1 - threshold / (n + 1)), h.cumsum(0) - threshold]
        best_first = p.flip(0)
        gaps.append(best_first - (1 - best_first).cumsum(0) - threshold)
        if bool((torch.cat(gaps).abs() < 1e-4).any()):
            return True
    return False


@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(1, 3),
    st.integers(1, 12),
    st.integers(9, 400),
    st.booleans(),
    st.booleans(),
    st.randoms(use_true_random=False),
)
@every_level
def test_every_policy_against_the_oracle(dtype, batch, length, vocab, packed, sampled, rng) -> None:
    torch.manual_seed(rng.randrange(2**31))
    scale = torch.rand(batch, length, 1) * 8  # some rows sure, some not
    stride = length + rng.randrange(3)
    logits = (torch.randn(batch, stride, vocab + 3)[:, :length, :vocab] * scale).to(dtype)
    board = torch.randint(0, vocab, (batch, length * 2))
    tokens = board[:, ::2] if rng.random() < 0.5 else board[:, :length]  # a strided view
    tokens[torch.rand(batch, length) < 0.7] = MASK
    settings: dict = {"mask_id": MASK}
    if rng.random() < 0.5:
        lane, start, end = windows_of(rng, batch, length)
        settings["lane"] = lane
    else:
        lane = torch.arange(batch)
        start = torch.tensor([rng.randint(0, length) for _ in range(batch)])
        end = torch.tensor([rng.randint(0, length) for _ in range(batch)])
    policy = rows_of(rng, len(lane), length)
    settings |= {"start": start, "end": end, "policy": policy}
    if sampled:
        settings |= {
            "temperature": 0.8,
            "seed": 3,
            "step": torch.arange(len(lane)),
            "position_offset": 2,
        }
    before, other = tokens.clone(), tokens.clone()
    columns = torch.arange(length)
    open_ = (columns >= start[:, None]) & (columns < end[:, None]) & (tokens[lane] == MASK)  # (W, L)
    needed = torch.zeros_like(tokens, dtype=torch.bool).index_put((lane,), open_, accumulate=True)
    expected = reference.unmask_(other, logits, **settings)
    expected_stats = list(expected.stats)
    if packed:  # only the needed rows and some others, as an LM head on few rows would give them
        listed = (needed | (torch.rand(batch, length) < 0.3)).flatten().nonzero()[:, 0]
        settings["positions"] = listed
        logits = logits.reshape(-1, vocab)[listed]
        expected_stats = list(expected.stats.map(lambda x: x.flatten()[listed]))
    actual = dx.unmask_(tokens, logits, **settings)
    for name, a, e in zip(dx.RowStats._fields, actual.stats, expected_stats, strict=True):
        assert_stats_close(a, e, name)
    assert torch.equal(tokens[~needed], before[~needed])
    moves = policy[:, 2] > 0
    assert torch.equal((actual.committed > 0)[moves], open_.any(1)[moves])
    assert torch.equal(actual.committed + actual.remaining, open_.sum(1))
    changed = tokens != before
    assert torch.equal(tokens[changed], expected.stats.sample[changed])
    if too_near(expected.stats.map(lambda x: x[lane]), open_, policy):
        return  # float32 and float64 may order these differently
    assert torch.equal(tokens, other)
    assert torch.equal(actual.committed, expected.committed)
    assert bool(actual.done) == bool(expected.done)


@everywhere
def test_a_mixed_batch_equals_each_sequence_alone() -> None:
    batch, length, vocab = len(policies.SELECTORS), 10, 50
    logits = torch.randn(batch, length, vocab) * 4
    policy = torch.cat([policies.make(s, 1) for s in policies.SELECTORS])
    whole = torch.full((batch, length), MASK)
    out = dx.unmask_(whole, logits, mask_id=MASK, policy=policy)
    for b in range(batch):
        alone = torch.full((1, length), MASK)
        one = dx.unmask_(alone, logits[b : b + 1], mask_id=MASK, policy=policy[b : b + 1])
        assert torch.equal(alone[0], whole[b])
        assert int(one.committed[0]) == int(out.committed[b])


@everywhere
def test_windows_per_sequence_and_the_done_flag() -> None:
    logits = torch.randn(3, 6, 20)
    tokens = torch.full((3, 6), MASK)
    tokens[2] = 1  # nothing to do
    start, end = torch.tensor([1, 0, 0]), torch.tensor([3, 6, 6])
    out = dx.unmask_(tokens, logits, mask_id=MASK, start=start, end=end, selector="quota", threshold=2)
    assert out.committed.tolist() == [2, 2, 0]
    assert out.remaining.tolist() == [0, 4, 0]
    assert not bool(out.done)
    assert (tokens[0] == MASK).tolist() == [True, False, False, True, True, True]
    out = dx.unmask_(tokens, logits, mask_id=MASK, start=start, end=end, selector="quota", threshold=9)
    assert bool(out.done)
    assert out.remaining.tolist() == [0, 0, 0]
    again = tokens.clone()
    out = dx.unmask_(tokens, logits, mask_id=MASK, start=start, end=end)  # a finished window
    assert bool(out.done)
    assert out.committed.tolist() == [0, 0, 0]
    assert torch.equal(again, tokens)


@everywhere
def test_several_windows_of_a_sequence() -> None:
    """Each commits as if it were a sequence, by its own row and key; in any order."""
    logits, columns = torch.randn(2, 12, 30) * 3, torch.arange(12)
    lane, start, end = torch.tensor([1, 0, 1, 1]), torch.tensor([8, 0, 0, 4]), torch.tensor([12, 12, 4, 8])
    policy = torch.cat([policies.make("quota", 3), policies.make("entropy", 9), policies.make("factor", 1.5)])
    policy = torch.cat([policy, policies.make("quota", 1, max_commit=1)])
    settings: dict = {"mask_id": MASK, "temperature": 0.7, "seed": 5}
    for given_keys in ({}, {"sequence": torch.tensor([3, 4, 5, 6]), "step": torch.tensor([9, 8, 7, 6])}):
        whole = torch.full((2, 12), MASK)
        out = dx.unmask_(
            whole, logits, lane=lane, start=start, end=end, policy=policy, **settings, **given_keys
        )
        found = torch.full((2, 12), MASK)
        for w in range(4):
            own = {"sequence": lane[w : w + 1], **{k: v[w : w + 1] for k, v in given_keys.items()}}
            alone = torch.full((1, 12), MASK)
            edges = {"start": int(start[w]), "end": int(end[w])}
            logits_of = logits[int(lane[w])][None]
            one = dx.unmask_(alone, logits_of, policy=policy[w : w + 1], **edges, **settings, **own)
            inside = (columns >= start[w]) & (columns < end[w])
            found[int(lane[w])] = torch.where(inside, alone[0], found[int(lane[w])])
            assert int(one.committed[0]) == int(out.committed[w])
            assert int(one.remaining[0]) == int(out.remaining[w])
        assert torch.equal(whole, found)
        assert out.committed[[0, 3]].tolist() == [3, 1]
    # Reading goes on past windows that hold nothing, and rows in no window are not read.
    tokens = torch.full((2, 12), MASK)
    out = dx.unmask_(tokens, logits, mask_id=MASK, lane=torch.tensor([0, 0]), start=torch.tensor([5, 2]),
                     end=torch.tensor([5, 3]))  # fmt: skip
    assert out.committed.tolist() == [0, 1]
    assert (tokens != MASK).nonzero().tolist() == [[0, 2]]
    assert (out.stats.token >= 0).nonzero().tolist() == [[0, 2]]
    assert bool(out.done)
    out = dx.unmask_(tokens, logits, mask_id=MASK, lane=torch.tensor([], dtype=torch.int64))
    assert bool(out.done)
    assert bool((out.stats.token == -1).all())


@everywhere
def test_more_windows_than_a_warp() -> None:
    tokens, logits = torch.full((3, 120), MASK), torch.randn(3, 120, 20)
    other = tokens.clone()
    lane, start = torch.arange(90) % 3, torch.arange(90) // 3 * 4
    settings: dict = {"mask_id": MASK, "lane": lane, "start": start, "end": start + 3}
    settings["policy"] = policies.make("quota", 1, batch=90, device=tokens.device)
    out = dx.unmask_(tokens, logits, **settings)
    expected = reference.unmask_(other, logits, **settings)
    assert torch.equal(tokens, other)
    assert torch.equal(out.committed, expected.committed)
    assert torch.equal(out.remaining, expected.remaining)


@everywhere
def test_a_mask_token_beyond_the_vocabulary_excludes_no_id() -> None:
    for mask_id in (7, 2**32 + 5, 2**62):
        tokens = torch.full((1, 2), mask_id)
        logits = torch.zeros(1, 2, 7)
        logits[..., 5] = 9.0
        dx.unmask_(tokens, logits, mask_id=mask_id, selector="quota", threshold=2)
        assert tokens.tolist() == [[5, 5]]


@everywhere
def test_a_bad_row_is_its_windows_alone() -> None:
    logits = torch.randn(1, 6, 50)
    logits[0, 4] = math.nan
    tokens = torch.full((1, 6), MASK)
    lane, start, end = torch.tensor([0, 0]), torch.tensor([3, 0]), torch.tensor([6, 3])
    out = dx.unmask_(tokens, logits, mask_id=MASK, lane=lane, start=start, end=end, check=False)
    assert (out.error // 4).tolist()[0] == 4
    assert bool((tokens[0, 3:] == MASK).all())
    assert goes_on(tokens) == bool((tokens[0, :3] != MASK).any())
    with refused("sequence 0 at position 4"):
        dx.unmask_(tokens, logits, mask_id=MASK, lane=lane, start=start, end=end)


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (0, 0)])
@everywhere
def test_empty_batches(shape) -> None:
    tokens = torch.zeros(shape, dtype=torch.int64)
    out = dx.unmask_(tokens, torch.zeros(*shape, 9), mask_id=MASK)
    assert bool(out.done)
    assert out.committed.shape == (shape[0],)


@everywhere
def test_unneeded_rows_are_never_read() -> None:
    logits = torch.full((2, 8, 30), math.nan)
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    tokens[0, 3], tokens[1, 5], tokens[1, 7] = MASK, MASK, MASK
    logits[0, 3], logits[1, 5] = torch.randn(30), torch.randn(30)
    out = dx.unmask_(tokens, logits, mask_id=MASK, end=7)
    assert out.committed.tolist() == [1, 1]
    assert int(tokens[1, 7]) == MASK
    read = out.stats.token >= 0
    assert read.nonzero().tolist() == [[0, 3], [1, 5]]
    assert bool(out.stats.entropy[~read].isnan().all())


@everywhere
def test_positive_infinity_is_committed_with_certainty() -> None:
    logits = torch.randn(1, 2, 100)
    logits[0, 1, 42] = math.inf
    tokens = torch.full((1, 2), MASK)
    out = dx.unmask_(tokens, logits, mask_id=MASK, selector="confidence", threshold=1.0)
    assert tokens.tolist() == [[MASK, 42]]
    assert float(out.stats.confidence[0, 1]) == 1.0


@everywhere
def test_a_model_that_predicts_the_mask_token_cannot_stall() -> None:
    logits = torch.randn(2, 9, 40)
    logits[..., MASK] = 50.0
    tokens = torch.full((2, 9), MASK)
    for _ in range(9):
        out = dx.unmask_(tokens, logits, mask_id=MASK, selector="confidence", threshold=0.9)
    assert bool(out.done)
    assert not bool((tokens == MASK).any())


@everywhere
def test_ties_go_to_the_lowest_position() -> None:
    logits = torch.randn(1, 1, 60).expand(1, 8, 60)
    tokens = torch.full((1, 8), MASK)
    dx.unmask_(tokens, logits, mask_id=MASK, start=2, selector="quota", threshold=3)
    assert (tokens[0] == MASK).tolist() == [True, True, False, False, False, True, True, True]


@everywhere
def test_large_vocabularies_and_many_rows() -> None:
    logits = torch.randn(1, 3, 262147).bfloat16()
    tokens = torch.full((1, 3), 262146)
    other = tokens.clone()
    dx.unmask_(tokens, logits, mask_id=262146, selector="quota", threshold=2)
    policy = policies.make("quota", 2)
    reference.unmask_(other, logits, mask_id=262146, policy=policy)
    assert torch.equal(tokens, other)
    rows = 300 if EMULATED else 3000
    logits = torch.randn(1, rows, 17)
    tokens = torch.full((1, rows), MASK)
    other = tokens.clone()
    dx.unmask_(tokens, logits, mask_id=MASK, selector="confidence", threshold=0.5)
    reference.unmask_(other, logits, mask_id=MASK, policy=policies.make("confidence", 0.5))
    assert torch.equal(tokens, other)


@everywhere
def test_entropy_bound_equals_diffusion_gemmas_sampler() -> None:
    """On a fully masked canvas, against the sampler that transformers ships."""
    gemma = pytest.importorskip("transformers.models.diffusion_gemma.generation_diffusion_gemma")
    batch, length, vocab = 4, 32, 300
    counts = []
    for seed, bound in enumerate((0.1, 1.0, 5.0, 40.0)):
        torch.manual_seed(seed)
        logits = torch.randn(batch, length, vocab) * (torch.rand(batch, length, 1) * 8)
        logits[..., MASK] = -1e4  # to theirs it is an id like any other
        sampler = gemma.EntropyBoundSampler(
            gemma.EntropyBoundSamplerConfig(entropy_bound=bound), length, vocab, 48
        )
        canvas = torch.full((batch, length), MASK)
        accepted = sampler.accept_canvas(canvas, logits.argmax(-1), logits, cur_step=1)
        out = dx.unmask_(canvas, logits, mask_id=MASK, selector="entropy_bound", threshold=bound)
        assert torch.equal(canvas, accepted)
        counts += out.committed.tolist()
    assert min(counts) < 8 < max(counts)  # the bound bites, and not always


def followed(confidence: Tensor, margin: Tensor, entropy: Tensor, eligible: Tensor, row: Tensor) -> Tensor:
    """What the reference selects by a row that nobody has checked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policies, "check", lambda policy, batch: None)
        return reference.select(confidence, margin, entropy, eligible, row)


@everywhere
def test_opcheck() -> None:
    tokens, logits = torch.full((2, 4), MASK), torch.randn(2, 4, 30)
    start, end = torch.zeros(2, dtype=torch.int64), torch.full((2,), 4)
    policy, suppress = policies.make("entropy", 0.5, batch=2, device=start.device), torch.tensor([3])
    count = counters(logits, 13)  # two windows, three more, eight rows
    args = (tokens, logits, None, None, start, end, policy, MASK, suppress, 0.0, 1.0, 0, None, 0, count)
    torch.library.opcheck(torch.ops.dparallel.unmask_.default, args)
    lane, tokens = torch.tensor([1, 0]), torch.full((2, 4), MASK)
    args = (tokens, logits, None, lane, start, end, policy, MASK, None, 0.0, 1.0, 0, None, 0, count)
    torch.library.opcheck(torch.ops.dparallel.unmask_.default, args)


@everywhere
def test_an_empty_list_of_positions_is_not_the_lack_of_one() -> None:
    none, logits = torch.empty(0, dtype=torch.int64), torch.empty(0, 5)
    with refused("sequence 0 at position 0"):
        dx.unmask_(torch.full((1, 4), 3), logits, mask_id=3, positions=none)
    out = dx.unmask_(torch.zeros(1, 4, dtype=torch.int64), logits, mask_id=3, positions=none)
    assert bool(out.done)
