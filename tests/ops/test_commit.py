"""commit_ against its reference, and what it makes of bad input."""

from __future__ import annotations

import pytest
import torch
from conftest import counters, everywhere, refused
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext import reference

MASK = 7


def equal(found: dx.CommitOutput, expected: dx.CommitOutput) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@given(st.integers(0, 4), st.integers(0, 90), st.randoms(use_true_random=False))
@everywhere
def test_against_the_plain_form(batch: int, length: int, rng) -> None:
    torch.manual_seed(rng.randrange(2**31))
    board = torch.randint(0, 12, (batch, 2 * length))
    board[torch.rand(batch, 2 * length) < 0.4] = MASK
    tokens = board[:, ::2] if rng.random() < 0.5 else board[:, :length]  # a strided view
    settings: dict = {"mask_id": MASK}
    if batch and rng.random() < 0.7:  # windows in any order, which overlap
        settings["lane"] = torch.randint(0, batch, (rng.randrange(7),))
    windows = len(settings.get("lane", tokens))
    if rng.random() < 0.8:
        settings["start"] = torch.randint(-3, length + 4, (windows,))
        settings["end"] = torch.randint(-3, length + 4, (windows,))
    rows: list[Tensor | None] = [None, None, None]
    if rng.random() < 0.8:
        listed = (torch.rand(batch * length) < 0.5).nonzero()[:, 0]
        indexed = rng.random() < 0.6
        shape = listed.shape if indexed else tokens.shape
        commit, token = torch.rand(shape) < 0.5, torch.randint(0, 12, shape)
        token[token == MASK] = -1
        rows = [listed if indexed else None, commit & (token >= 0), token]
    plain = tokens.clone()
    expected = reference.commit_(plain, *rows, **settings)
    assert equal(dx.commit_(tokens, *rows, **settings), expected)
    assert torch.equal(tokens, plain)
    assert equal(dx.commit_(tokens, **settings), reference.commit_(plain, **settings))


@everywhere
def test_many_rows_and_windows() -> None:
    """More than a block of a GPU has threads, and windows longer than a warp."""
    tokens = torch.full((3, 700), MASK)
    commit, token = torch.rand(3, 700) < 0.1, torch.randint(0, MASK, (3, 700))
    lane, start = torch.arange(70) % 3, torch.arange(70) * 10
    plain = tokens.clone()
    settings: dict = {"mask_id": MASK, "lane": lane, "start": start, "end": start + torch.arange(70) * 5}
    for given_rows in ([None, commit, token], [None, commit, token], [None, None, None]):
        expected = reference.commit_(plain, *given_rows, **settings)
        assert equal(dx.commit_(tokens, *given_rows, **settings), expected)
    assert torch.equal(tokens, plain)


@everywhere
def test_by_hand() -> None:
    tokens = torch.tensor([[MASK, 1, MASK, MASK], [2, 2, 2, 2]])
    commit = torch.tensor([True, True, False, True])
    out = dx.commit_(
        tokens,
        torch.tensor([0, 1, 2, 5]),
        commit,
        torch.tensor([4, 1, 9, 3]),
        mask_id=MASK,
        lane=torch.tensor([1, 0, 0]),
        start=torch.tensor([0, 0, 1]),
        end=torch.tensor([4, 99, 2]),
    )
    assert tokens.tolist() == [[4, 1, MASK, MASK], [2, 3, 2, 2]]
    assert out.remaining.tolist() == [0, 2, 0]
    assert out.first.tolist() == [4, 2, 2]  # where there is no mask the window's end
    assert out.changed.tolist() == [1, 1, 0]  # position 1 held that token already


@pytest.mark.parametrize("token", [MASK, -1])
@everywhere
def test_the_mask_token_is_not_written(token: int) -> None:
    tokens = torch.full((2, 3), MASK)
    commit, chosen = torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, 3, dtype=torch.int64)
    chosen[1, 1] = token
    with refused("token: .*sequence 1 at position 1"):
        dx.commit_(tokens, None, commit, chosen, mask_id=MASK)
    assert int(tokens[1, 1]) == MASK
    commit[1, 1] = False  # not read
    assert dx.commit_(tokens, None, commit, chosen, mask_id=MASK).remaining.tolist() == [0, 1]


def test_nothing_is_written_where_anything_is_bad() -> None:
    tokens = torch.full((2, 3), MASK)
    at, commit, token = torch.tensor([1, 4]), torch.ones(2, dtype=torch.bool), torch.tensor([5, 6])
    for change, said in (
        ({"positions": torch.tensor([1, 6])}, r"positions: expected in \[0, 6\), got 6 at 1"),
        ({"positions": torch.tensor([4, 1])}, "positions: expected strictly ascending"),
        ({"positions": torch.tensor([4, 4])}, "positions: expected strictly ascending"),
        ({"lane": torch.tensor([0, 2])}, r"lane: expected in \[0, 2\), got 2 at 1"),
        ({"lane": torch.tensor([0.5])}, "lane: expected int64"),
        ({"lane": torch.tensor([0]), "start": torch.tensor([0, 1])}, "start: expected an integer or int64"),
        ({"token": torch.tensor([5, MASK])}, "token: expected ids >= 0, and not the mask token 7, got 7"),
        ({"token": None}, "token: expected together with commit, got commit alone"),
        ({"commit": torch.ones(3, dtype=torch.bool)}, r"commit: expected torch.bool \(2,\)"),
        ({"commit": None, "token": None}, "positions: expected none without commit"),
        ({"mask_id": -1}, "mask_id: expected a whole number"),
    ):
        with pytest.raises(ValueError, match=said):
            dx.commit_(
                **{
                    "tokens": tokens,
                    "positions": at,
                    "commit": commit,
                    "token": token,
                    "mask_id": MASK,
                    **change,
                }
            )
        assert bool((tokens == MASK).all())


@everywhere
def test_opcheck_and_compile() -> None:
    tokens, lane = torch.full((2, 3), MASK), torch.tensor([1, 1, 0])
    at, commit, token = torch.tensor([1, 4]), torch.ones(2, dtype=torch.bool), torch.tensor([5, 6])
    edges = torch.zeros(3, dtype=torch.int64), torch.full((3,), 3)
    args = (tokens, at, commit, token, MASK, lane, *edges, counters(tokens, 5))
    torch.library.opcheck(torch.ops.dparallel.commit_.default, args)
    args = (tokens, None, None, None, MASK, None, *(e[:2] for e in edges), counters(tokens, 4))
    shapes = "test_schema", "test_faketensor"
    torch.library.opcheck(torch.ops.dparallel.commit_.default, args, test_utils=shapes)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def left(tokens: Tensor) -> Tensor:
        return dx.commit_(tokens, at, commit, token, mask_id=MASK).remaining + 1

    tokens = torch.full((2, 3), MASK)
    assert left(tokens).tolist() == [3, 3]
    assert tokens.flatten().tolist() == [MASK, 5, MASK, MASK, 6, MASK]
