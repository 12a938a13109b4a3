"""Memory of arguments that are changed in place: of their own, whatever their strides."""

from __future__ import annotations

import functools
import itertools
import random
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from conftest import OF_AN_OP, everywhere
from op_examples import MASK, copied, documented, examples, op_of, same

import dparallel_ext as dx
from dparallel_ext.ops.memory import own_memory


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("unmask_", "tokens"),
        ("commit_", "tokens"),
        ("kv_write", "q"),
        ("kv_write", "k_cache"),
        ("kv_write", "v_cache"),
        ("kv_move", "kv_cache"),
        ("certainty_forcing_loss_backward_", "logits"),
        ("distillation_loss_backward_", "student"),
    ],
)
@everywhere
def test_memory_that_overlaps_is_not_changed(name: str, argument: str) -> None:
    given = examples(torch.float32)[name]
    place = [a.name for a in op_of(name).default._schema.arguments].index(argument)
    shape = given[place].shape
    windows = given[place].clone().flatten().as_strided(shape, [1] * len(shape))
    for overlapping in (given[place][:1].clone().expand(shape), windows):
        before, call = overlapping.clone(), copied(given)
        call[place] = overlapping
        with pytest.raises(OF_AN_OP, match=f"{argument}: expected memory of its own for each element"):
            op_of(name)(*call)
        assert torch.equal(overlapping, before)
        assert same(call[:place] + call[place + 1 :], copied(given[:place] + given[place + 1 :]))


@everywhere
def test_no_other_argument_has_the_memory_of_one_that_is_changed() -> None:
    """Not even of another dtype: indices that change after they were checked would lead anywhere."""
    pairs = 0
    for name, given in examples(torch.float32).items():
        arguments = zip(op_of(name).default._schema.arguments, given, strict=False)
        tensors = [
            (place, a.is_write)
            for place, (a, value) in enumerate(arguments)
            if isinstance(value, torch.Tensor) and a.name != "counters"
        ]
        for (place, is_changed), (its, _) in itertools.permutations(tensors, 2):
            if not is_changed:
                continue
            call = copied(given)
            memory = torch.zeros(call[place].nbytes + call[its].nbytes, dtype=torch.uint8)
            for at in (place, its):  # the later values are whole
                values = call[at]
                call[at] = memory[: values.nbytes].view(values.dtype).view(values.shape).copy_(values)
            with pytest.raises(OF_AN_OP, match=r"\w+: expected memory of its own, .* got some of \w+"):
                op_of(name)(*call)
            pairs += 1
    assert pairs > 60


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def of_kv_write(dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of kv_write."""
    _, given = documented(torch.float32)["kv_write"]
    heads = ("q", "k", "v", "k_cache", "v_cache", "q_norm", "k_norm")
    return {name: value.to(dtype) if name in heads else value for name, value in given.items()}


@DTYPES
@everywhere
def test_arguments_of_kv_write_do_not_share_memory(dtype: torch.dtype) -> None:
    given = of_kv_write(dtype)
    with pytest.raises(ValueError, match="v_cache: expected memory of its own"):
        dx.kv_write(**{**given, "v_cache": given["k_cache"]})
    with pytest.raises(ValueError, match=r"q: expected memory of its own, .* got some of k"):
        dx.kv_write(**{**given, "q": given["k"]})


@everywhere
def test_tokens_that_overlap_are_refused_by_the_function() -> None:
    tokens = torch.full((1, 3), MASK).expand(2, 3)
    with pytest.raises(ValueError, match="tokens: expected memory of its own"):
        dx.unmask_(tokens, torch.randn(2, 3, 9), mask_id=MASK)


@DTYPES
@everywhere
def test_arguments_of_kv_write_share_no_element(dtype: torch.dtype) -> None:
    given = of_kv_write(dtype)
    pages, heads, size, dim = given["k_cache"].shape
    whole = torch.zeros(2 * pages + 1, heads, size, dim, dtype=dtype)
    # A row behind the other's, or half of one.
    rows = torch.zeros(len(given["q"]) + 1, given["q"].shape[1], dim, dtype=dtype)
    for changed, name, of in (
        ({"k_cache": whole[: pages + 1][:pages], "v_cache": whole[1 : pages + 1]}, "v_cache", "k_cache"),
        ({"q": rows[1:], "k": rows[:-1, : given["k"].shape[1]]}, "q", "k"),
        ({"q": rows[:-1], "v": rows.flatten()[dim:][: given["v"].numel()].view_as(given["v"])}, "q", "v"),
    ):
        before = {key: value.clone() for key, value in changed.items()}
        with pytest.raises(ValueError, match=rf"{name}: expected memory of its own, .* got some of {of}"):
            dx.kv_write(**{**given, **changed})
        assert all(torch.equal(value, before[key]) for key, value in changed.items())
    for name in ("q", "k", "v"):
        for cache in ("k_cache", "v_cache"):
            place = whole[:pages].flatten()[4 : 4 + given[name].numel()].view_as(given[name])
            with pytest.raises(ValueError, match=rf"{cache}: expected memory of its own, .* some of {name}"):
                dx.kv_write(**{**given, cache: whole[:pages], name: place})
    wide = torch.zeros(pages, heads, size, dim, 2, dtype=dtype)
    place = wide.flatten()[: given["q"].numel()].view_as(given["q"])
    with pytest.raises(ValueError, match=r"k_cache: expected memory of its own, .* some of q"):
        dx.kv_write(**{**given, "k_cache": wide[..., 0], "q": place})
    # Rows of one buffer, and pages that take turns, have no element in common.
    fused = torch.randn(len(given["q"]), given["q"].shape[1] + 2 * heads, dim, dtype=dtype)
    q, k, v = fused.split((given["q"].shape[1], heads, heads), 1)
    dx.kv_write(**{**given, "q": q, "k": k, "v": v, "k_cache": whole[:-1:2], "v_cache": whole[1::2]})


@DTYPES
@everywhere
def test_whatever_strides_the_arguments_of_kv_write_have(dtype: torch.dtype) -> None:
    """Their elements, one by one, say whether they overlap."""
    rng, refused = random.Random(5), 0
    where = {"positions": torch.arange(3), "slot_mapping": torch.arange(3)}
    where["cos"], where["sin"] = dx.rope_table(9, 2, device=where["positions"].device)
    for _ in range(300):
        memory = torch.zeros(400, dtype=dtype)
        views = []
        for heads in (4, 2):
            strides = rng.choice(
                [(2 * heads, 2, 1), (12, 2, 1), (24, 2, 1), (30, 7, 1), (2, 24, 1), (36, 5, 2)]
            )
            views.append(memory.as_strided((3, heads, 2), strides, rng.randrange(60)))
        numbers = [
            {
                view.storage_offset() + sum(i * s for i, s in zip(at, view.stride(), strict=True))
                for at in itertools.product(*map(range, view.shape))
            }
            for view in views
        ]
        q, k = views
        call = functools.partial(dx.kv_write, v=torch.zeros(3, 2, 2, dtype=dtype), **where)
        caches = {name: torch.zeros(1, 2, 3, 2, dtype=dtype) for name in ("k_cache", "v_cache")}
        # Else the kernel has a copy, and nothing is shared.
        contiguous = (k.stride(2) == 1 and k.stride(1) == 2) or dtype == torch.float64
        if numbers[0].isdisjoint(numbers[1]) or not contiguous:
            call(q, k, **caches)
            continue
        refused += 1
        with pytest.raises(ValueError, match=r"q: expected memory of its own, .* got some of k"):
            call(q, k, **caches)
    assert 30 < refused < 270


@everywhere
def test_what_is_read_is_not_what_is_changed() -> None:
    for name in ("distillation_loss", "distillation_loss_backward_"):
        student, _, *others = examples(torch.float32)[name]
        memory = torch.randn(len(student) + 1, *student.shape[1:], device=student.device)
        if name == "distillation_loss":
            others.append(True)  # inplace
        wide = torch.randn(*student.shape, 2, device=student.device)
        for changed, read in (
            (student, student),
            (student, student[:1].expand_as(student)),
            (memory[:-1], memory[1:]),
            (wide[..., 0], wide.flatten()[: student.numel()].view_as(student)),  # the first is copied
        ):
            with pytest.raises(OF_AN_OP, match=r"student: expected memory of its own, .* some of teacher"):
                op_of(name)(changed, read, *others)
    ids = torch.full((8,), 5)
    ids[:4] = MASK
    with pytest.raises(ValueError, match=r"tokens: expected memory of its own, .* got some of token"):
        dx.commit_(ids[:4].view(2, 2), commit=ids[:4] == MASK, token=ids[1:5], mask_id=MASK)
    dx.commit_(ids[:4].view(2, 2), commit=ids[:4] == MASK, token=ids[4:], mask_id=MASK)
    assert ids.tolist() == [5] * 8
    call = copied(examples(torch.float32)["linear_kv_write"])
    names = [argument.name for argument in op_of("linear_kv_write").default._schema.arguments]
    x, cache = call[0], call[names.index("k_cache")]
    for name in ("k_cache", "v_cache"):
        memory = torch.zeros(x.numel() + cache.numel(), device=x.device)
        shared = [*call]
        shared[0] = memory[: x.numel()].view_as(x)
        shared[names.index(name)] = memory[x.numel() - 1 :][: cache.numel()].view_as(cache)
        with pytest.raises(OF_AN_OP, match=rf"{name}: expected memory of its own, .* got some of x"):
            op_of("linear_kv_write")(*shared)
    op_of("linear_kv_write")(*call)


def test_elements_that_lie_askew() -> None:
    """Some bytes of one are another's, though not all."""
    memory = bytearray(160)
    tokens, token = (torch.frombuffer(memory, dtype=torch.int64, count=9, offset=at) for at in (0, 68))
    with pytest.raises(ValueError, match=r"tokens: expected memory of its own, .* got some of token"):
        dx.commit_(tokens[None], commit=tokens == 0, token=token, mask_id=0)
    # The same as the functions ask for it in float64.
    one = torch.frombuffer(memory, dtype=torch.float64, count=1, offset=16)
    for at in range(33):
        other = torch.frombuffer(memory, dtype=torch.float32, count=1, offset=at)
        for changed, read in ((one, other), (other, one)):
            with pytest.raises(ValueError, match="some of b") if 12 < at < 24 else nullcontext():
                own_memory({"a": changed}, {"b": read})
