"""row_stats against its float64 oracle, and on the rows that break others."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from conftest import EMULATED, LEVELS, assert_stats_close, counters, every_level, everywhere, refused
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(logits: Tensor, **settings: object) -> None:
    actual = dx.row_stats(logits, **settings)
    expected = reference.row_stats(logits, **settings)
    for name, a, e in zip(actual._fields, actual, expected, strict=True):
        assert_stats_close(a, e, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 2, 3, 31, 33, 247, 2047, 2049, 16385, 126464, 262144])
@every_level
def test_vocabulary_sizes(dtype: torch.dtype, vocab: int) -> None:
    rows = 3 if vocab > 20000 else 17
    for scale in (0.1, 1.0, 6.0):
        check((torch.randn(rows, vocab) * scale).to(dtype))
    if vocab > 3:
        check(torch.randn(rows, vocab).to(dtype), mask_id=vocab - 1, suppress=[0, vocab // 2])


@given(
    st.sampled_from(DTYPES),
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(2, 3000),
    st.floats(0.0, 30.0),
    st.floats(-200.0, 200.0),
    st.randoms(use_true_random=False),
)
@every_level
def test_random_shapes_strides_and_exclusions(dtype, batch, length, vocab, scale, shift, rng) -> None:
    torch.manual_seed(rng.randrange(2**31))
    padded = torch.randn(batch, length + 2, vocab + rng.randrange(9)) * scale + shift
    logits = padded.to(dtype)[:, 1 : 1 + length, :vocab]  # strided rows, odd alignment
    suppress = rng.sample(range(vocab), k=rng.randrange(min(4, vocab - 1)))
    free = [i for i in range(vocab) if i not in suppress]
    mask_id = rng.choice(free) if len(free) > 1 and rng.random() < 0.7 else None
    check(logits, suppress=suppress or None, mask_id=mask_id)


@everywhere
def test_rows_are_picked_and_others_never_read() -> None:
    logits = torch.full((6, 1000), math.nan)
    logits[[4, 1]] = torch.randn(2, 1000)
    check(logits, rows=torch.tensor([4, 1, 4]))
    assert dx.row_stats(logits, rows=torch.tensor([], dtype=torch.int64)).token.shape == (0,)
    three_d = torch.randn(2, 3, 50)
    check(three_d, rows=torch.tensor([5, 0]))


@every_level
def test_ties_go_to_the_lowest_id_wherever_they_fall() -> None:
    for vocab in (40, 5000, 40000):
        logits = torch.randn(4, vocab).clamp(max=2.0)
        for row, ids in enumerate([(0, vocab - 1), (7, 8), (vocab // 2, vocab // 2 + 1), (3, 35)]):
            logits[row, list(ids)] = 5.0
        stats = dx.row_stats(logits)
        assert stats.token.tolist() == [0, 7, vocab // 2, 3]
        assert torch.equal(stats.margin, torch.zeros(4))
        check(logits)


@pytest.mark.parametrize("dtype", DTYPES)
@every_level
def test_extreme_logits(dtype: torch.dtype) -> None:
    low, high = torch.finfo(dtype).min, torch.finfo(dtype).max
    rows = torch.randn(8, 515)
    rows[0] -= 60000  # all negative, far away
    rows[1] = -60.0
    rows[1, 9] = 60.0  # certain
    rows[2] = rows[2].sort().values  # ascending: the maximum moves in every tile
    rows[3] = -math.inf
    rows[3, 100] = -5.0  # one choice left
    rows[4, :300] = -math.inf
    rows[5] = 0.0  # uniform
    rows[6, 0], rows[6, 1] = low, high
    rows[7] = low
    logits = rows.to(dtype)
    check(logits)
    stats = dx.row_stats(logits)
    assert stats.confidence[1] == 1.0
    assert 0.0 <= float(stats.entropy[1]) < 1e-6
    assert 0.0 <= float(stats.entropy[3]) < 1e-30
    assert float(stats.top2[3]) == -math.inf
    assert abs(float(stats.entropy[5]) - math.log(515)) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [5, 300, 20000])
@every_level
def test_positive_infinity_is_the_limit(dtype: torch.dtype, vocab: int) -> None:
    logits = torch.randn(2, vocab).to(dtype)
    logits[0, 3] = math.inf
    logits[1, [2, vocab - 1]] = math.inf
    check(logits)
    stats = dx.row_stats(logits)
    assert stats.token.tolist() == [3, 2]
    assert stats.confidence.tolist() == [1.0, 0.5]
    assert stats.margin.tolist() == [1.0, 0.0]
    assert abs(float(stats.entropy[1]) - math.log(2)) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 40, 300, 20000])
@pytest.mark.parametrize("at", [0, -1])
@every_level
def test_bad_rows_are_named(dtype: torch.dtype, vocab: int, at: int) -> None:
    logits = torch.randn(4, vocab).to(dtype)
    logits[2, at] = math.nan
    with refused("row 2 holds NaN"):
        dx.row_stats(logits)
    logits[1:3] = -math.inf
    with refused("row 1 leaves no token to choose"):
        dx.row_stats(logits)
    logits[1, at] = math.nan  # NaN among -inf
    with refused("row 1 holds NaN"):
        dx.row_stats(logits)


@every_level
@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7F800001, 0x7FC00000, -0x400000], ids=hex)
@pytest.mark.parametrize("whole", [False, True])
def test_nan_of_any_bits(bits: int, whole: bool) -> None:
    """0x7fffffff is a GPU's NaN, -0x400000 an x86 CPU's."""
    logits = torch.randn(2, 1000)
    logits[1, slice(None) if whole else 777] = torch.tensor([bits]).to(torch.int32).view(torch.float32)
    with refused("row 1 holds NaN"):
        dx.row_stats(logits)
    with refused("row 1 holds NaN"):
        dx.certainty_forcing_loss(logits, torch.tensor([1, 2]), torch.ones(2, dtype=torch.bool))


def test_a_bad_row_is_no_memory_of_others() -> None:
    """Under torch.compile, which does not raise for it."""
    logits = torch.randn(3, 9)
    logits[1] = math.nan
    for _ in range(5):
        used = [torch.full(shape, 5.0) for shape in [(6,), (7, 3)] * 8]  # whose memory may come next
        used += [torch.full((2, 3), 5) for _ in range(8)]
        del used
        tokens, fields, error, _ = torch.ops.dparallel.row_stats(
            logits, None, -1, None, None, 0.0, 1.0, 0, None, None
        )
        assert tokens[:, 1].tolist() == [-1, -1]
        assert bool(fields[:, 1].isnan().all())
        assert int(error[1]) == 4 + 1


@everywhere
def test_the_mask_token_keeps_its_share_but_is_never_chosen() -> None:
    logits = torch.tensor([[1.0, 5.0, 2.0]])
    stats = dx.row_stats(logits, mask_id=1)
    assert stats.token.tolist() == [2]
    assert torch.allclose(stats.confidence, logits.softmax(1)[:, 2])
    with refused("row 0 leaves no token"):
        dx.row_stats(torch.zeros(1, 1), mask_id=0)
    with refused("row 0 leaves no token"):
        dx.row_stats(torch.zeros(1, 2), mask_id=0, suppress=[1])
    check(torch.randn(3, 9), mask_id=4, suppress=[4])  # suppressing the mask token takes its share


@everywhere
def test_suppressed_ids_leave_the_softmax() -> None:
    logits = torch.randn(3, 100)
    stats = dx.row_stats(logits, suppress=[99, 0, 0, 50])
    kept = torch.tensor([i for i in range(100) if i not in (0, 50, 99)])
    assert torch.allclose(stats.lse, logits[:, kept].logsumexp(1))
    assert torch.equal(stats.token, kept[logits[:, kept].argmax(1)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("vocab", "temperature"),
    [*itertools.product([2, 5, 64, 1001], [0.1, 1.0, 3.0]), (126464, 1.0)],
)
@every_level
def test_samples_match_the_oracle(dtype: torch.dtype, vocab: int, temperature: float) -> None:
    logits = (torch.randn(6, vocab) * 2).to(dtype)
    check(
        logits,
        temperature=temperature,
        seed=2**62 + 11,
        sequence=torch.arange(6),
        position=torch.arange(6) * 7,
        step=3,
        mask_id=1,
    )


@pytest.mark.parametrize("vocab", [16385, 126464, 262144])
@pytest.mark.parametrize("gap", [14.0, 16.5, 17.5, 18.0, 22.0, 26.0])
@everywhere
def test_a_near_certain_row_keeps_its_small_terms(vocab: int, gap: float) -> None:
    """Thousands of terms below float32's resolution of 1 add up: no sum may drop them one by one."""
    logits = 0.5 * torch.randn(3, vocab)
    logits[:, vocab // 3] = gap
    for temperature in (0.0, 1.336):
        settings = {"temperature": temperature, "seed": 3, "sequence": 0, "position": 0, "step": 0}
        actual = dx.row_stats(logits, **settings)
        expected = dx.reference.row_stats(logits, **settings)
        for name in ("lse", "confidence", "entropy", "sample_logprob"):
            assert_stats_close(getattr(actual, name), getattr(expected, name), name)


@everywhere
def test_samples_follow_softmax_at_the_temperature() -> None:
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.1, -0.4])
    temperature, n = 0.7, 40000
    stats = dx.row_stats(logits.expand(n, 6), temperature=temperature, seed=5)
    expected = (logits / temperature).softmax(0)
    observed = stats.sample.bincount(minlength=6) / n
    sigma = (expected * (1 - expected) / n).sqrt()
    assert bool(((observed - expected).abs() < 4.5 * sigma).all()), (observed, expected)
    log_p = (logits / temperature).log_softmax(0)
    assert torch.allclose(stats.sample_logprob, log_p[stats.sample], atol=1e-5)
    assert torch.allclose(stats.confidence, logits.softmax(0)[stats.sample], atol=1e-6)


@everywhere
def test_a_sample_depends_on_its_key_alone() -> None:
    logits = torch.randn(5, 700)
    key = {"seed": torch.arange(5), "sequence": torch.arange(5) + 9, "position": 4, "step": 2}
    whole = dx.row_stats(logits, temperature=1.0, **key).sample
    order = torch.tensor([3, 1, 4, 0, 2])
    shuffled = {k: v[order] if isinstance(v, Tensor) else v for k, v in key.items()}
    assert torch.equal(dx.row_stats(logits[order], temperature=1.0, **shuffled).sample, whole[order])
    flat = torch.zeros(200, 50)  # every part of the key matters
    base = dx.row_stats(flat, temperature=1.0, seed=1).sample
    for changed in ({"seed": 2}, {"seed": 1 + 2**32}, {"sequence": 1}, {"step": 1}):
        other = dx.row_stats(flat, temperature=1.0, **{"seed": 1, **changed}).sample
        assert (base != other).float().mean() > 0.9


@everywhere
def test_results_do_not_depend_on_the_batch_or_the_threads() -> None:
    logits = torch.randn(7, 50001).bfloat16()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = dx.row_stats(logits)
        torch.set_num_threads(2)
        two = dx.row_stats(logits)
    finally:
        torch.set_num_threads(threads)
    alone = [dx.row_stats(logits[i : i + 1]) for i in range(7)]
    for i, (a, b) in enumerate(zip(one[:-1], two[:-1], strict=True)):
        assert torch.equal(a, b)
        assert torch.equal(a, torch.cat([x[i] for x in alone]))


@everywhere
def test_shapes() -> None:
    for shape in [(50,), (0, 50), (2, 0, 50), (2, 3, 50), (2, 3, 4, 50)]:
        check(torch.randn(shape)) if 0 not in shape else None
        assert dx.row_stats(torch.randn(shape)).token.shape == shape[:-1]
    check(torch.randn(60, 40).t())  # the vocabulary is not contiguous
    check(torch.randn(3, 60)[:, ::2])
    check(torch.randn(1, 60).expand(4, 60))


@pytest.mark.parametrize(
    ("logits", "settings", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.float64), {}, "logits: expected float32"),
        (torch.zeros(2, 0), {}, "logits: expected .* V >= 1"),
        (torch.zeros(2, 3), {"rows": torch.tensor([2])}, r"rows: expected in \[0, 2\), got 2 at 0"),
        (torch.zeros(2, 3), {"rows": torch.tensor([0.5])}, "rows: expected int64"),
        (torch.zeros(2, 3), {"mask_id": 3}, "mask_id: expected an id below 3, got 3"),
        (torch.zeros(2, 3), {"mask_id": -1}, "mask_id: expected a whole number >= 0"),
        (torch.zeros(2, 3), {"suppress": [3]}, r"suppress: expected ids in \[0, 3\)"),
        (torch.zeros(2, 3), {"suppress": [1.5]}, "suppress: expected a whole number >= 0, got 1.5"),
        (torch.zeros(2, 3), {"suppress": torch.tensor([1.5])}, "suppress: expected a whole number"),
        (torch.zeros(2, 3), {"suppress": torch.tensor([3, 0])}, r"suppress: expected in \[0, 3\), got 3"),
        (torch.zeros(2, 3), {"ids": [3]}, "ids: expected a whole number <= 2"),
        (torch.zeros(2, 3), {"ids": torch.zeros(3, 1).long()}, r"ids: expected int64 \(K,\) or \(2, K\)"),
        (
            torch.zeros(2, 3),
            {"ids": torch.zeros(1)},
            r"ids: expected int64 \(K,\) or \(2, K\), got torch.float32",
        ),
        (torch.zeros(2, 3), {"temperature": 1.0, "step": None}, "step: expected an integer"),
        (torch.zeros(2, 3), {"temperature": 1.0, "seed": 2**63}, "seed: expected an integer of 64 bits"),
        (torch.zeros(2, 3), {"temperature": -1.0}, "temperature: expected a finite number"),
        (torch.zeros(2, 3), {"temperature": math.nan}, "temperature: expected a finite number"),
        (
            torch.zeros(2, 3),
            {"temperature": 1.0, "seed": torch.zeros(3, dtype=torch.long)},
            "seed: expected an integer",
        ),
    ],
)
def test_bad_arguments_are_named(logits: Tensor, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dx.row_stats(logits, **settings)


@everywhere
def test_opcheck_and_compile() -> None:
    logits = torch.randn(2, 3, 40)
    args = (logits, None, 5, torch.tensor([1, 2]), torch.tensor([4]), 0.0, 1.0, 0, None, counters(logits, 6))
    torch.library.opcheck(torch.ops.dparallel.row_stats.default, args)
    keys = torch.ones(2, 4, dtype=torch.long)
    ids = torch.tensor([[1, 2, 39], [0, 0, 7]])
    args = (logits, torch.tensor([4, 1]), -1, None, ids, 0.5, 0.9, 3, keys, counters(logits, 2))
    torch.library.opcheck(torch.ops.dparallel.row_stats.default, args)
    compiled = torch.compile(lambda x: dx.row_stats(x).entropy * 2, fullgraph=True, backend="eager")
    assert torch.equal(compiled(logits), dx.row_stats(logits).entropy * 2)


@pytest.mark.parametrize("dtype", DTYPES)
@every_level
def test_logits_of_given_ids(dtype: torch.dtype) -> None:
    """Of those that may not be chosen too, and in rows that are bad."""
    logits = (torch.randn(2, 3, 9001) * 5).to(dtype)
    logits[0, 1, 7], logits[1, 0, 9000] = math.inf, -math.inf
    few, own = torch.tensor([7, 9000, 7, 3]), torch.randint(0, 9001, (2, 3, 600))
    for ids in (few, own, own[..., :0]):
        stats = dx.row_stats(logits, ids=ids, mask_id=7, suppress=[3, 9000])
        expected = logits.float().clamp(max=torch.finfo(torch.float32).max)
        expected = expected.gather(2, ids.expand(2, 3, -1))
        assert torch.equal(stats.logits, expected)
        check(logits, ids=ids, mask_id=7, suppress=[3, 9000])
        for a, b in zip(stats[:-1], dx.row_stats(logits, mask_id=7, suppress=[3, 9000])[:-1], strict=True):
            assert torch.equal(a, b)
    rows = torch.tensor([4, 4, 0])
    check(logits, rows=rows, ids=few)
    check(logits, rows=rows, ids=torch.randint(0, 9001, (3, 2)))
    assert dx.row_stats(logits).logits is None
    assert torch.equal(dx.row_stats(logits, ids=[5, 6]).logits, logits[..., 5:7].float())
    assert dx.row_stats(logits[0, 0], ids=few).logits.shape == (4,)
    logits[0, 0, 5] = math.nan
    bad = dx.row_stats(logits, ids=torch.tensor([5, 6]), check=False).logits
    assert torch.equal(bad.isnan(), torch.tensor([[[1, 0], [0, 0], [0, 0]], [[0, 0]] * 3]).bool())


@everywhere
def test_ids_out_of_bounds() -> None:
    logits = torch.randn(2, 9)
    for bad in (-1, 9, 2**62, -(2**63)):
        ids = torch.tensor([3, bad])
        if EMULATED or logits.is_cuda:  # nobody has looked
            found = dx.row_stats(logits, ids=ids).logits
            assert torch.equal(found[:, 0], logits[:, 3])
            assert bool(found[:, 1].isnan().all())
        else:
            with pytest.raises(ValueError, match=rf"ids: expected in \[0, 9\), got {bad} at 1"):
                dx.row_stats(logits, ids=ids)
            of_rows = torch.tensor([[0, 1]] * (len(logits) - 1) + [[3, bad]])
            with pytest.raises(ValueError, match=rf"ids: expected in \[0, 9\), got {bad} at"):
                dx.row_stats(logits, ids=of_rows)


def cut(logits: Tensor, cuts: list[int], mask_id: int | None, suppress: list[int]) -> list[dx.RowStats]:
    """Statistics of parts of the vocabulary, each by its own ids."""
    found = []
    for first, end in zip([0, *cuts], [*cuts, logits.shape[-1]], strict=True):
        own_mask = mask_id - first if mask_id is not None and first <= mask_id < end else None
        own = [i - first for i in suppress if first <= i < end]
        part = logits[..., first:end]
        found.append(dx.row_stats(part, mask_id=own_mask, suppress=own, check=False))
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@everywhere
def test_statistics_of_parts_of_a_vocabulary_merge(dtype: torch.dtype) -> None:
    vocab = 6007 if EMULATED else 126464
    logits = torch.randn(9, vocab)
    logits[1] = logits[1] * 0.1 + 1000.0  # large: lse - entropy would have lost what is below 1e-4
    logits[2] *= 5.0
    logits[3] = -50000.0 + logits[3]
    logits[4, : vocab // 8] = -math.inf  # nothing in the first of eight parts
    logits[5] -= 20.0
    logits[5, [7, vocab - 3]] = 8.0  # a tie of two parts
    logits[6, vocab // 2] = math.inf
    logits[7] = -30.0
    logits[7, vocab - 1] = 30.0  # the mask token has it all
    logits[8, : vocab // 2] *= 0.01  # parts of another entropy
    logits = logits.to(dtype)
    last = vocab - 1
    for parts, mask_id, suppress in ((2, last, [9, 3]), (3, None, []), (8, last, []), (8, 5, [last, 0])):
        cuts = [vocab * i // parts for i in range(1, parts)]
        merged = dx.ops.merge_row_stats(cut(logits, cuts, mask_id, suppress), [0, *cuts])
        expected = reference.row_stats(logits, mask_id=mask_id, suppress=suppress or None)
        for name, a, b in zip(merged._fields, merged, expected, strict=True):
            assert_stats_close(a, b, name)
        assert merged.token[5] == 7
    exact = logits[1].double()
    exact = (exact * exact.softmax(0)).sum()
    assert abs(float(dx.row_stats(logits[1]).mean_logit) - exact) <= 2e-6 + 1e-6 * abs(exact)


@everywhere
def test_a_part_may_hold_nothing_to_choose() -> None:
    logits = torch.randn(3, 40)
    logits[1, :20] = logits[2, 39] = -math.inf
    parts = [(0, 20), (20, 39), (39, 40)]  # the last is the mask token alone
    shards = [
        dx.row_stats(logits[:, a:b], mask_id=39 - a if b == 40 else None, check=False) for a, b in parts
    ]
    assert shards[0].token[1] == shards[2].token[0] == -1
    assert shards[0].max_logit[1] == shards[0].lse[1] == -math.inf
    assert shards[2].lse[0] == logits[0, 39]
    order = [2, 0, 1]  # of the parts no matter which
    merged = dx.ops.merge_row_stats([shards[i] for i in order], [parts[i][0] for i in order])
    expected = reference.row_stats(logits, mask_id=39)
    for name, a, b in zip(merged._fields, merged, expected, strict=True):
        assert_stats_close(a, b, name)
    again = dx.ops.merge_row_stats([dx.ops.merge_row_stats(shards[:2], [0, 20]), shards[2]], [0, 39])
    for name, a, b in zip(again._fields, again, expected, strict=True):
        assert_stats_close(a, b, name)


@everywhere
def test_bad_rows_of_parts_are_named() -> None:
    logits = torch.randn(4, 40)
    logits[3], logits[2, 30] = -math.inf, math.nan
    with refused("row 2 holds NaN"):
        dx.ops.merge_row_stats(cut(logits, [20], None, []), [0, 20])
    with refused("row 1 leaves no token to choose"):
        dx.ops.merge_row_stats(cut(logits[[0, 3]], [20], None, []), [0, 20])
    stats = dx.row_stats(logits[:2])
    for shards, offsets, said in (
        ([], [], "offsets: expected one for each of 0 shards"),
        ([stats], [0, 1], "offsets: expected one for each of 1 shards, at least one, got 2"),
        ([stats, dx.row_stats(logits[:1])], [0, 40], r"got \(2,\) at 0 and \(1,\) at 1"),
        ([stats._replace(log_sum=None)], [0], "shards: expected max_logit and log_sum, .* none at 0"),
        ([stats], [-1], "offsets: expected a whole number >= 0"),
    ):
        with pytest.raises(ValueError, match=said):
            dx.ops.merge_row_stats(shards, offsets)


def test_the_instruction_set_can_be_lowered() -> None:
    before = dx.simd_level()
    dx._C.use_simd_level("portable")
    assert dx.simd_level() == "portable"
    dx._C.use_simd_level("avx512")  # where a machine has less, its best
    assert LEVELS.index(before) <= ["portable", "avx2", "avx512"].index(dx.simd_level())
    dx._C.use_simd_level(before)
    assert dx.simd_level() == before
    with pytest.raises(ValueError, match="level: expected portable, avx2 or avx512, got 'sse'"):
        dx._C.use_simd_level("sse")
