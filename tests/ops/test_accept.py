"""accept against its reference and row_stats, as a lossless step of decoding, and on bad input."""

from __future__ import annotations

import math
import random
from typing import NamedTuple

import pytest
import torch
from conftest import EMULATED, counters, every_level, everywhere, goes_on, refused
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext import reference
from dparallel_ext.types import NO_ERROR


class Forest(NamedTuple):
    """The trees of a verify pass."""

    draft: Tensor
    parent: Tensor
    q_start: Tensor
    q_end: Tensor


def forest(rng: random.Random, choice: Tensor, lanes: int, most: int, chains: bool = False) -> Forest:
    """Lanes of up to `most` of the rows that `choice` (N,) tells the choices of, in any order, with gaps.

    Most drafted tokens are the choice of their parent, some of several children alike.
    """
    draft, parent, spans = torch.randint(0, 50, choice.shape), torch.full(choice.shape, -9), []
    at, count = 0, len(choice)
    for _ in range(lanes):
        first = at = min(count, at + rng.choice([0, 0, 2]))
        for i in range(min(rng.randint(0, most), count - first)):
            p = -1 if i == 0 else i - 1 if chains else rng.randint(max(0, i - 4), i - 1)
            parent[at] = p
            if i and rng.random() < 0.85:
                draft[at] = choice[first + p]
            at += 1
        spans.append((first, at))
    rng.shuffle(spans)
    q_start, q_end = torch.tensor(spans, dtype=torch.int64).reshape(-1, 2).unbind(1)
    return Forest(draft, parent, q_start, q_end)


def same(found: dx.AcceptOutput, expected: dx.AcceptOutput) -> None:
    for name in ("count", "path", "tokens", "ended", "error"):
        a, b = getattr(found, name), getattr(expected, name)
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), f"{name}: {a} != {b}"


def keys_of(rows: int) -> Tensor:
    return torch.randint(0, 1000, (rows, 4))


@every_level
def test_random_trees_against_the_plain_form() -> None:
    """Also bad rows, end-of-text ids and room; the choices are row_stats' own."""
    counts: list[int] = []
    failed = ended = 0
    for case in range(20 if EMULATED else 150):
        out = of_random_trees(random.Random(case))
        counts += out.count.tolist()
        failed, ended = failed + int((out.error != NO_ERROR).sum()), ended + int(out.ended.sum())
    assert max(counts) >= (4 if EMULATED else 6)
    assert min(failed, ended) >= (1 if EMULATED else 10)


def of_random_trees(rng: random.Random) -> dx.AcceptOutput:
    torch.manual_seed(rng.randrange(2**31))
    dtype, lanes = rng.choice([torch.float32, torch.bfloat16, torch.float16]), rng.randint(0, 5)
    most, vocab, sampled = rng.randint(1, 14), rng.choice([2, 3, 17, 40, 399]), rng.random() < 0.5
    rows = lanes * rng.choice([most, most, most, most // 2])
    logits = (torch.randn(rows, vocab + 3)[:, :vocab] * 4).to(dtype)
    kept: dict = {"mask_id": rng.choice([None, 1]), "suppress": rng.choice([None, [0]])}
    kept = kept if vocab > 2 else {}
    if sampled:
        kept |= {"temperature": 0.8, "top_p": rng.choice([None, 0.9]), "top_k": rng.choice([None, 9])}
    keys = keys_of(rows)
    named = dict(zip(("seed", "sequence", "position", "step"), keys.unbind(1), strict=True))
    trees = forest(rng, dx.row_stats(logits, **kept, **named).sample, lanes, most, rng.random() < 0.3)
    for row in range(rows):
        if rng.random() < 0.03:
            logits[row, rng.randrange(vocab) if rng.random() < 0.5 else slice(None)] = rng.choice(
                [math.nan, -math.inf]
            )
    settings: dict = {**kept, "keys": keys if sampled else None}
    longest = int((trees.q_end - trees.q_start).max()) if lanes else 0
    settings["max_q_len"] = rng.choice([None, longest, longest + 3])
    if rng.random() < 0.5:
        settings["room"] = torch.tensor(
            [rng.choice([0, 1, 2, most + 1]) for _ in range(lanes)], dtype=torch.int64
        )
    if rng.random() < 0.5:
        settings["eos_ids"] = torch.randint(-1, vocab, (lanes, rng.choice([0, 1, 4])))
    found = dx.accept(logits, *trees, check=False, **settings)
    same(found, reference.accept(logits, *trees, **settings))

    stats, read = dx.row_stats(logits, check=False, **kept, **named), torch.zeros(rows, dtype=torch.bool)
    room = settings.get("room", torch.ones(lanes))
    for start, end, left in zip(trees.q_start, trees.q_end, room, strict=True):
        read[start:end] = bool(left > 0)
    for name, a, b in zip(stats._fields, found.stats, stats, strict=True):
        if a is None or b is None:
            assert a is b
            continue
        assert torch.equal(a[read].nan_to_num(7.0), b[read].nan_to_num(7.0)), name
        assert bool((a[~read] == -1).all() if a.dtype == torch.int64 else a[~read].isnan().all()), name
    return found


@everywhere
def test_a_lane_alone_and_among_others_is_the_same_to_the_bit() -> None:
    rng = random.Random(0)
    logits, keys = torch.randn(90, 3000), keys_of(90)
    named = dict(zip(("seed", "sequence", "position", "step"), keys.unbind(1), strict=True))
    trees = forest(rng, dx.row_stats(logits, temperature=1.0, **named).sample, 40, 6)
    out = dx.accept(logits, *trees, temperature=1.0, keys=keys, max_q_len=6)
    assert 3 <= int(out.count.max()) <= 6
    zero = torch.zeros(1, dtype=torch.int64)
    for b in range(40):
        rows = slice(int(trees.q_start[b]), int(trees.q_end[b]))
        own = [t[rows] for t in (logits, trees.draft, trees.parent)]
        one = dx.accept(*own, zero, zero + len(own[0]), temperature=1.0, keys=keys[rows], max_q_len=6)
        for name in ("count", "path", "tokens", "ended"):
            assert torch.equal(getattr(one, name)[0], getattr(out, name)[b])
        for a, c in zip(one.stats, out.stats, strict=True):
            assert a is c is None or torch.equal(a, c[rows])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@everywhere
def test_the_text_is_that_of_plain_decoding(temperature: float) -> None:
    """Whatever the draft: a language model that is a function of its last two tokens, three lanes at their
    own pace, until each ends or has no room left."""
    rng, vocab, eos = random.Random(1), 12, 3
    table = torch.randn(vocab, vocab, vocab) * 2

    def keys(sequence: int, position: int) -> list[int]:
        return [7, sequence, position, 0]

    def plain(sequence: int, text: list[int], room: int) -> list[int]:
        """One row a pass, by the sequence's own key."""
        text = list(text)
        for _ in range(room):
            key = torch.tensor([keys(sequence, len(text))])
            of = dict(zip(("seed", "sequence", "position", "step"), key.unbind(1), strict=True))
            row = table[text[-2], text[-1]][None]
            text.append(int(dx.row_stats(row, temperature=temperature, **of).sample))
            if text[-1] == eos:
                break
        return text

    total = emitted = 0
    for turn in range(6):
        prompts = [[rng.randrange(vocab) for _ in range(2 + b)] for b in range(3)]
        room = [rng.randint(1, 30) for _ in prompts]
        expected = [plain(b, p, n) for b, (p, n) in enumerate(zip(prompts, room, strict=True))]
        texts, left = [list(p) for p in prompts], list(room)
        while any(left):
            logits, draft, parent, keyed, spans = [], [], [], [], []
            for b, text in enumerate(texts):
                first = len(draft)
                behind: list[list[int]] = []  # what each row's choice follows
                for i in range(rng.randint(1, 8) if left[b] else 0):
                    p = -1 if i == 0 else rng.randrange(i)
                    before = text[:-1] if i == 0 else behind[p]
                    known = expected[b][len(before)] if len(before) < len(expected[b]) else 0
                    token = text[-1] if i == 0 else known if rng.random() < 0.7 else rng.randrange(vocab)
                    behind.append([*before, token])
                    logits.append(table[behind[i][-2], token])
                    draft.append(token)
                    parent.append(p)
                    keyed.append(keys(b, len(behind[i])))
                spans.append((first, len(draft)))
            q_start, q_end = torch.tensor(spans).unbind(1)
            out = dx.accept(
                torch.stack(logits), torch.tensor(draft), torch.tensor(parent), q_start, q_end,
                room=torch.tensor(left), eos_ids=torch.full((3, 1), eos), temperature=temperature,
                keys=torch.tensor(keyed),
            )  # fmt: skip
            for b, text in enumerate(texts):
                count = int(out.count[b])
                assert (count > 0) == (left[b] > 0)
                total, emitted = total + (count > 0), emitted + count
                text += out.tokens[b, :count].tolist()
                left[b] = 0 if bool(out.ended[b]) else left[b] - count
        assert texts == expected, turn
    assert emitted > 1.5 * total  # drafts were accepted


def by_hand() -> tuple[Tensor, ...]:
    """Rows whose choices are 5, 6, 7, 8, 9; a tree of two branches: 0 - 1 - 3 and 0 - 2 - 4."""
    logits = torch.zeros(5, 10)
    logits[torch.arange(5), torch.arange(5, 10)] = 3.0
    draft, parent = torch.tensor([0, 5, 5, 6, 7]), torch.tensor([-1, 0, 0, 1, 2])
    return logits, draft, parent, torch.tensor([0]), torch.tensor([5])


@pytest.mark.parametrize(
    ("draft", "path"),
    [
        ([0, 5, 5, 6, 7], [0, 1, 3]),  # of two children alike the lowest row
        ([0, 4, 5, 6, 7], [0, 2, 4]),
        ([0, 5, 5, 4, 7], [0, 1]),  # the other branch went on further
        ([5, 4, 4, 6, 7], [0]),  # the root's own token does not matter
        ([0, -1, 2**40 + 5, 6, 7], [0]),
    ],
)
@everywhere
def test_by_hand(draft: list[int], path: list[int]) -> None:
    logits, _, parent, *lanes = by_hand()
    out = dx.accept(logits, torch.tensor(draft), parent, *lanes)
    assert out.count.tolist() == [len(path)]
    assert out.path.tolist() == [path + [-1] * (5 - len(path))]
    assert out.tokens.tolist() == [[5 + row for row in path] + [-1] * (5 - len(path))]
    assert out.ended.tolist() == [False]
    assert out.stats.sample.tolist() == [5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    ("room", "eos", "count", "ended"),
    [
        (9, [-1, -1], 3, False),
        (2, [-1, -1], 2, False),
        (0, [5, 6], 0, False),
        (9, [8, -1], 3, True),  # the bonus token
        (9, [7, 6], 2, True),  # inclusive
        (2, [6, 8], 2, True),
        (1, [6, 8], 1, False),  # cut in front of it
        (9, [9, -1], 3, False),  # of a row that is not reached
        (2**62, [-5, 5], 1, True),
    ],
)
@everywhere
def test_cuts_by_hand(room: int, eos: list[int], count: int, ended: bool) -> None:
    out = dx.accept(*by_hand(), room=room, eos_ids=torch.tensor([eos]), max_q_len=7)
    assert out.count.tolist() == [count]
    assert out.tokens.tolist() == [[5, 6, 8][:count] + [-1] * (7 - count)]
    assert out.ended.tolist() == [ended]


@everywhere
def test_what_is_never_chosen() -> None:
    """A draft of the mask token or a suppressed id is never accepted."""
    logits, draft, parent, *lanes = by_hand()
    logits[:, [5, 6]] += 10.0
    logits[0, 1] = 2.0
    for token in (5, 6):
        out = dx.accept(logits, draft.fill_(token), parent, *lanes, mask_id=6, suppress=[5])
        assert out.tokens[0].tolist() == [1, -1, -1, -1, -1]
    out = dx.accept(logits, draft.fill_(1), parent, *lanes, mask_id=6, suppress=[5])
    assert out.path[0, :2].tolist() == [0, 1]


@everywhere
def test_a_vocabulary_of_llada_and_long_lanes() -> None:
    logits = torch.randn(5, 126464).bfloat16()
    choice = logits.float().argmax(1)
    draft = torch.tensor([0, *choice[:4]])
    lanes = torch.tensor([0]), torch.tensor([5])
    chain = torch.arange(5) - 1
    out = dx.accept(logits, draft, chain, *lanes)
    assert out.tokens[0].tolist() == choice.tolist()
    same(out, reference.accept(logits, draft, chain, *lanes))
    rows = 260 if EMULATED else 5000  # more than shared memory of a GPU holds
    logits = torch.randn(rows, 7)
    choice, parent = logits.argmax(1), (torch.arange(rows) - 2).clamp(min=0)
    parent[0] = -1
    draft = choice[parent.clamp(min=0)]
    out = dx.accept(logits, draft, parent, torch.tensor([0]), torch.tensor([rows]))
    assert out.path[0, :4].tolist() == [0, 1, 3, 5]
    assert int(out.count[0]) == 1 + rows // 2


@pytest.mark.parametrize(("bad", "said"), [(math.nan, "holds NaN"), (-math.inf, "leaves no token to choose")])
@everywhere
def test_a_bad_row_counts_on_the_path_alone(bad: float, said: str) -> None:
    logits, draft, parent, *_ = (torch.cat([t, t]) for t in by_hand())
    lanes = torch.tensor([0, 5]), torch.tensor([5, 10])
    logits[7], logits[9] = bad, bad  # the other branch of lane 1
    whole = dx.accept(logits, draft, parent, *lanes)
    assert whole.count.tolist() == [3, 3]
    assert whole.error.tolist() == [NO_ERROR, NO_ERROR]
    assert whole.stats.sample.tolist() == [5, 6, 7, 8, 9, 5, 6, -1, 8, -1]
    logits[8] = bad
    with refused(f"logits: row 3 of lane 1 {said}"):
        dx.accept(logits, draft, parent, *lanes)
    out = dx.accept(logits, draft, parent, *lanes, check=False)
    assert out.count.tolist() == [3, 0]
    assert out.tokens[1].tolist() == out.path[1].tolist() == [-1] * 10
    assert torch.equal(out.tokens[0], whole.tokens[0])
    assert out.error.tolist() == [NO_ERROR, 4 * (2**31 + 3) + (1 if bad != bad else 2)]
    # A cut in front of the row keeps the walk away from it, as it would plain decoding.
    for cut in ({"room": torch.tensor([9, 2])}, {"eos_ids": torch.tensor([[-1], [6]])}):
        assert dx.accept(logits, draft, parent, *lanes, **cut).count.tolist() == [3, 2]
    logits[5] = bad
    with refused(f"logits: row 0 of lane 1 {said}"):
        dx.accept(logits, draft, parent, *lanes)
    assert dx.accept(logits, draft, parent, *lanes, room=torch.tensor([9, 0])).count.tolist() == [3, 0]


@everywhere
def test_rows_that_emit_nothing_are_not_read() -> None:
    """Those of no lane, and of a lane without room."""
    logits, draft, parent, *_ = (torch.cat([t, t]) for t in by_hand())
    lanes = torch.tensor([6, 0, 3]), torch.tensor([8, 3, 3])
    parent[6:8] = torch.tensor([-1, 0])
    out = dx.accept(logits, draft, parent, *lanes, room=torch.tensor([0, 9, 9]))
    assert out.count.tolist() == [0, 2, 0]
    assert (out.stats.token >= 0).tolist() == [True] * 3 + [False] * 7
    assert out.stats.entropy.isnan().tolist() == [False] * 3 + [True] * 7


@pytest.mark.parametrize(("rows", "lanes"), [(0, 0), (0, 3), (4, 0), (4, 3)])
@everywhere
def test_sizes_of_zero(rows: int, lanes: int) -> None:
    """No rows, no lanes, and idle lanes alone."""
    ints = torch.zeros(max(rows, lanes), dtype=torch.int64)
    for most in (None, 0, 2):
        out = dx.accept(
            torch.randn(rows, 9), ints[:rows], ints[:rows], ints[:lanes] + rows, ints[:lanes] + rows,
            eos_ids=torch.zeros(lanes, 0, dtype=torch.int64), max_q_len=most,
        )  # fmt: skip
        width = rows if most is None else most
        assert out.path.shape == out.tokens.shape == (lanes, width)
        assert out.count.tolist() == [0] * lanes
        assert not bool(out.ended.any())
        assert bool((out.path == -1).all())
        assert out.stats.entropy.shape == (rows,)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"parent": [-1, 0, 0, 3, 2]}, r"parent: expected in \[0, 3\), got 3 at row 3 of lane 0"),
        ({"parent": [-1, 0, 0, -1, 2]}, r"parent: expected in \[0, 3\), got -1 at row 3 of lane 0"),
        ({"parent": [0, 0, 0, 1, 2]}, "parent: expected -1, of a root, got 0 at row 0 of lane 0"),
        ({"q_start": [-1]}, r"q_start: expected in \[0, 6\), got -1 at 0"),
        ({"q_end": [6]}, r"q_end: expected in \[0, 6\), got 6 at 0"),
        ({"q_start": [4], "q_end": [3]}, "q_start: expected no larger than q_end, got 4 above 3 at 0"),
        (
            {"q_start": [3, 5, 0], "q_end": [5, 5, 4]},
            r"q_start: expected lanes that do not overlap, got \[3, 5\) and \[0, 4\), lanes 0 and 2",
        ),
        ({"max_q_len": 4}, "max_q_len: expected at least 5, the rows of lane 0, got 4"),
        ({"max_q_len": -1}, "max_q_len: expected a whole number >= 0"),
        ({"room": [-1]}, "room: expected >= 0, got -1 at 0"),
        ({"room": [1, 2]}, r"room: expected an integer or int64 \(1,\)"),
        ({"eos_ids": [3]}, r"eos_ids: expected torch.int64 \(1, 1\), got torch.int64 \(1,\)"),
        ({"eos_ids": [[3.5]]}, r"eos_ids: expected torch.int64 \(1, 1\), got torch.float32"),
        ({"draft": [1, 2]}, r"draft: expected torch.int64 \(5,\), got torch.int64 \(2,\)"),
        ({"parent": [0.5] * 5}, r"parent: expected torch.int64 \(5,\), got torch.float32"),
        ({"q_end": [5, 5]}, r"q_end: expected torch.int64 \(1,\)"),
        ({"q_start": 0}, r"q_start: expected int64 \(B,\)"),
        ({"logits": [[[0.0]]]}, r"logits: expected \(N, V\), got \(1, 1, 1\)"),
        ({"temperature": 1.0}, r"keys: expected int64 \(5, 4\) at a temperature of 1, got None"),
        ({"temperature": 1.0, "keys": [[1, 2, 3, 4]]}, r"keys: expected torch.int64 \(5, 4\)"),
        ({"temperature": -1.0}, "temperature: expected a finite number >= 0"),
        ({"top_p": 1.5}, "top_p: expected a number from 0 to 1"),
        ({"mask_id": 10}, "mask_id: expected an id below 10"),
        ({"suppress": [10]}, r"suppress: expected ids in \[0, 10\)"),
    ],
)
def test_bad_arguments_are_named(change: dict, said: str) -> None:
    call = dict(zip(("logits", "draft", "parent", "q_start", "q_end"), by_hand(), strict=True))
    call["logits"][0, 0] = math.nan  # nothing has been read by then
    for name, value in change.items():
        keeps = name == "suppress" or not isinstance(value, list)
        call[name] = value if keeps else torch.tensor(value)
    with pytest.raises(ValueError, match=said):
        dx.accept(**call)


@everywhere
def test_past_the_checks_what_is_wrong_emits_nothing() -> None:
    """On a GPU nobody has looked at parents and lanes; whatever they are, the result is one."""
    if not goes_on(torch.zeros(1)):
        pytest.skip("the CPU refuses them")
    logits, draft, parent, *lanes = by_hand()
    for junk in (3, 4, -1, 2**62, -(2**62)):  # of row 3: nobody's child
        parent[3] = junk
        parent[0] = junk  # a root is one
        assert dx.accept(logits, draft, parent, *lanes).path[0, :3].tolist() == [0, 1, -1]
    parent[3], big = 1, 2**62
    starts = torch.tensor([-1, 0, 4, 0, 2, -big, big, 4, 3])
    ends = torch.tensor([3, 6, 3, 3, 4, big, big, 5, 3])
    out = dx.accept(logits, draft, parent, starts, ends)
    # Lane 4 overlaps lane 3, which is before it. Lane 7 is a root alone.
    assert out.count.tolist() == [0, 0, 0, 2, 0, 0, 0, 1, 0]
    assert out.tokens[3].tolist() == [5, 6, -1, -1, -1]
    assert out.error.tolist() == [NO_ERROR] * 9
    out = dx.accept(logits, draft, parent, *lanes, max_q_len=2, room=torch.tensor([5]))
    assert out.tokens.tolist() == [[5, 6]]
    assert (out.stats.token >= 0).tolist() == [True, True, False, False, False]
    assert dx.accept(logits, draft, parent, *lanes, room=torch.tensor([-1])).count.tolist() == [0]


@everywhere
def test_opcheck_and_compile() -> None:
    logits, draft, parent, *lanes = by_hand()
    eos, suppress, room = torch.tensor([[4, -1]]), torch.tensor([3]), torch.tensor([2])
    count = counters(logits, 6)
    args = logits, draft, parent, *lanes, room, eos, 2, suppress, 0.7, 1.0, 0, keys_of(5), 5, count
    torch.library.opcheck(torch.ops.dparallel.accept.default, args)
    args = logits, draft, parent, *lanes, None, None, -1, None, 0.0, 1.0, 0, None, 7, count
    shapes = "test_schema", "test_faketensor"
    torch.library.opcheck(torch.ops.dparallel.accept.default, args, test_utils=shapes)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def emitted(draft: Tensor) -> Tensor:
        return dx.accept(logits, draft, parent, *lanes, room=room, eos_ids=eos).tokens + 1

    assert emitted(draft).tolist() == [[6, 7, 0, 0, 0]]
