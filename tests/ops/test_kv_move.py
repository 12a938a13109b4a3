"""kv_move against its reference: random paths, overlaps, pages, strides; bad input moves nothing."""

from __future__ import annotations

import pytest
import torch
from conftest import EMULATED, everywhere
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def cache_of(
    dtype: torch.dtype, pages: int, page: int, heads: int = 2, dim: int = 8, layers: int = 2
) -> Tensor:
    """No two elements are alike, in any of the dtypes, but those of a page's heads and layers."""
    cache = torch.arange(layers * 2 * pages * heads * page * dim).view(layers, 2, pages, heads, page, dim)
    return (cache % 251 - 125).to(dtype)


def paths(seed: int, lanes: int, count: int, slots: int) -> tuple[Tensor, Tensor]:
    """Lanes of slots of their own: sources may be targets, and sources of several; some are passed over."""
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(slots, generator=g)[: lanes * count].view(lanes, count)
    at = torch.randint(max(count, 1), (lanes, count), generator=g)
    source, target = order.gather(1, at), order
    nowhere = torch.rand(2, lanes, count, generator=g) < 0.15
    return source.masked_fill(nowhere[0], -1), target.masked_fill(nowhere[1], -(2**40))


@given(
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from(DTYPES),
    lanes=st.integers(0, 4),
    count=st.sampled_from([0, 1, 2, 7, 33, 256]),
    page=st.sampled_from([1, 5, 16, 64]),
    heads=st.integers(1, 3),
    dim=st.sampled_from([0, 1, 6, 8, 64]),
    by_token=st.booleans(),
)
@everywhere
def test_it_does_what_its_reference_does(seed, dtype, lanes, count, page, heads, dim, by_token) -> None:
    ours = cache_of(dtype, -(-lanes * count // page) + 2, page, heads, dim)
    if by_token:  # (..., page_size, heads, D) in memory
        ours = ours.transpose(3, 4).contiguous().transpose(3, 4)
    by_reference, untouched = ours.clone(), ours.clone()
    source, target = paths(seed, lanes, count, ours.shape[2] * page)
    dx.kv_move(ours, source.to(ours.device), target.to(ours.device))
    reference.kv_move(by_reference, source.to(ours.device), target.to(ours.device))
    assert torch.equal(ours, by_reference)
    for lane in range(lanes):  # and alone as in the batch
        dx.kv_move(
            untouched, source[lane : lane + 1].to(ours.device), target[lane : lane + 1].to(ours.device)
        )
    assert torch.equal(untouched, by_reference)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", ["down", "up", "turned", "cycle", "spread", "in place"])
@everywhere
def test_a_path_is_read_before_it_is_written(path: str, dtype: torch.dtype) -> None:
    """Whatever order its entries are in."""
    count = 256 if not EMULATED else 40
    cache = cache_of(dtype, 3, 128, dim=16)
    before = cache.clone()
    at = torch.arange(count)
    source, target = {
        "down": (at + 1, at),  # an accepted path: later slots to earlier ones
        "up": (at, at + 1),
        "turned": (at, at.flip(0)),
        "cycle": (at, at.roll(1)),
        "spread": (torch.full_like(at, count // 2), at),  # one source, which is a target too
        "in place": (at, at),
    }[path]
    dx.kv_move(cache, source[None], target[None])
    flat, old = (t.permute(2, 4, 0, 1, 3, 5).flatten(0, 1) for t in (cache, before))  # (slots, ...)
    old = old.clone()
    old[target] = old[source]
    assert torch.equal(flat, old)


@everywhere
def test_content_is_moved_to_the_bit() -> None:
    """NaN and its payload, infinities, -0."""
    bits = torch.randint(-(2**15), 2**15, (2, 2, 2, 2, 4, 8), dtype=torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        cache = bits.clone().view(dtype)
        dx.kv_move(cache, torch.tensor([[0, 5]]), torch.tensor([[7, 0]]))
        expected = bits.clone()
        reference.kv_move(expected, torch.tensor([[0, 5]]), torch.tensor([[7, 0]]))
        assert torch.equal(cache.view(torch.int16), expected)


@everywhere
def test_opcheck() -> None:
    arguments = cache_of(torch.float32, 3, 8), torch.tensor([[3, 4], [9, -1]]), torch.tensor([[4, 3], [8, 2]])
    torch.library.opcheck(torch.ops.dparallel.kv_move, arguments)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("kv_cache", torch.zeros(3, 2, 8, 4), ValueError, "expected 6 dimensions"),
        ("kv_cache", torch.zeros(2, 3, 4, 2, 8, 8), ValueError, r"expected \(layers, 2, pages"),
        ("kv_cache", torch.zeros(2, 2, 4, 2, 0, 8), ValueError, r"page_size >= 1, got \(2, 2, 4, 2, 0, 8\)"),
        ("kv_cache", torch.zeros(2, 2, 4, 2, 8, 8).int(), ValueError, "expected float32, bfloat16"),
        ("kv_cache", None, TypeError, "expected a Tensor, got NoneType"),
        ("source", [[1, 2, 3], [4, 5, 6]], TypeError, "expected a Tensor, got list"),
        ("source", torch.zeros(3).long(), ValueError, r"expected int64 \(B, M\), got torch.int64 \(3,\)"),
        ("source", torch.zeros(2, 3), ValueError, r"expected torch.int64 \(2, 3\), got torch.float32"),
        ("target", torch.zeros(2, 2).long(), ValueError, r"expected torch.int64 \(2, 3\)"),
        ("source", [[1, 2, 32], [4, 5, 6]], ValueError, r"expected in \[0, 32\), got 32 at 2"),
        ("target", [[1, 2, 3], [2**40, 5, 6]], ValueError, r"expected in \[0, 32\), got 1099511627776 at 3"),
        ("target", [[9, 9, 3], [4, 5, 6]], ValueError, "each slot once, got slot 9 twice in lane 0"),
        ("target", [[9, 8, 7], [9, 5, 6]], ValueError, "share no slot, got slot 9 in lanes 0 and 1"),
        ("target", [[9, 5, 7], [10, 11, 12]], ValueError, "share no slot, got slot 5 in lanes 0 and 1"),
    ],
)
def test_bad_arguments_are_named(name: str, value: object, error: type, message: str) -> None:
    """And nothing has moved."""
    sound = {"kv_cache": cache_of(torch.float32, 4, 8), "source": torch.tensor([[1, 2, 3], [4, 5, 6]])}
    sound["target"] = sound["source"] + 10
    before = sound["kv_cache"].clone()
    if isinstance(value, list) and error is ValueError:
        value = torch.tensor(value)
    with pytest.raises(error, match=f"^{name}: .*{message}"):
        dx.kv_move(**{**sound, name: value})
    assert torch.equal(sound["kv_cache"], before)


def test_what_is_passed_over_is_shared_by_nobody() -> None:
    cache = cache_of(torch.float32, 4, 8)
    before = cache.clone()
    source = torch.tensor([[1, 2, -1], [1, 9, 3]])
    target = torch.tensor([[-1, 2, 9], [-1, 9, -5]])
    dx.kv_move(cache, source, target)
    assert torch.equal(cache, before)


@everywhere
def test_a_lane_has_a_limit() -> None:
    cache, at = cache_of(torch.bfloat16, 2, 1030, 1, 2, 1), torch.arange(2049)[None]
    with pytest.raises(ValueError, match="source: expected at most 2048 entries a lane, got 2049"):
        dx.kv_move(cache, at, at)
    at = at[:, :2048]
    by_reference = cache.clone()
    dx.kv_move(cache, at, at.flip(1))
    reference.kv_move(by_reference, at, at.flip(1))
    assert torch.equal(cache, by_reference)


def test_it_has_no_gradient() -> None:
    leaf = cache_of(torch.float32, 1, 8).requires_grad_()
    with pytest.raises(ValueError, match="kv_cache: requires a gradient"):
        dx.kv_move(leaf, torch.tensor([[1]]), torch.tensor([[2]]))
