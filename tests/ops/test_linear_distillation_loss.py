"""The distillation loss of hidden states and heads: linear_distillation_loss."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import everywhere, refused
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext import reference


def heads_of(n: int, width: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """hidden (2, n, width), head (vocab, width), the teacher's of another width, weight (2, n)."""
    other = width + 3
    hidden, head = torch.randn(2, n, width), 3 * torch.randn(vocab, width) / width**0.5
    teacher, teacher_head = torch.randn(2, n, other), 3 * torch.randn(vocab, other) / other**0.5
    weight = torch.rand(2, n) * (torch.rand(2, n) < 0.7)
    return hidden.to(dtype), head.to(dtype), teacher.to(dtype), teacher_head.to(dtype), weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chunk_rows", [1, 3, None])
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("own_head", [False, True])
@pytest.mark.parametrize("trainable", [False, True])
@everywhere
def test_linear_equals_the_loss_of_its_logits(
    dtype: torch.dtype, chunk_rows: int | None, softcap: float | None, own_head: bool, trainable: bool
) -> None:
    hidden, head, teacher, teacher_head, weight = heads_of(7, 16, 203, dtype)
    if own_head:
        teacher = torch.randn(2, 7, 16).to(dtype)
    settings = {"weight": weight, "temperature": 1.5, "l1_weight": 0.5}
    a, w = hidden.clone().requires_grad_(), head.clone().requires_grad_(trainable)
    ours = dx.linear_distillation_loss(
        a, w, teacher, None if own_head else teacher_head, softcap=softcap, chunk_rows=chunk_rows, **settings
    )
    ours.backward()
    b, v = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    student, other = b @ v.T, teacher @ (v.detach() if own_head else teacher_head).T
    if softcap:
        student, other = (softcap * torch.tanh(x / softcap) for x in (student, other))
    theirs = dx.distillation_loss(student, other, **settings)
    theirs.backward()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert torch.allclose(a.grad, b.grad, atol=1e-5)
    assert w.grad is None if not trainable else torch.allclose(w.grad, v.grad, atol=2e-5)


@everywhere
def test_linear_names_the_row_of_the_whole() -> None:
    hidden, head, teacher, teacher_head, _ = heads_of(5, 8, 30, torch.float32)
    weight = torch.tensor([[0.0, 1.0, 1.0, 0.0, 1.0], [0.0, 0.0, 1.0, 1.0, 1.0]])
    teacher[1, 3] = math.nan
    hidden[1, 0] = math.nan  # not read
    with refused("teacher: row 8 holds NaN"):
        dx.linear_distillation_loss(hidden, head, teacher, teacher_head, weight=weight, chunk_rows=2)


@pytest.mark.parametrize("softcap", [None, 3.0])
@everywhere
def test_linear_gradcheck(softcap: float | None) -> None:
    hidden, head, teacher, teacher_head, weight = heads_of(3, 4, 7, torch.float64)

    def loss(h: Tensor, w: Tensor) -> Tensor:
        return dx.linear_distillation_loss(
            h, w, teacher, teacher_head, weight=weight, l1_weight=0.5, softcap=softcap, chunk_rows=2,
            reduction="none",
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, (hidden.requires_grad_(), head.requires_grad_()))


@everywhere
def test_linear_in_bfloat16_and_without_rows() -> None:
    hidden, head, teacher, teacher_head, weight = heads_of(9, 64, 5003, torch.bfloat16)
    a = hidden.clone().requires_grad_()
    dx.linear_distillation_loss(a, head, teacher, teacher_head, weight=weight, chunk_rows=4).backward()
    exact = hidden.double().requires_grad_()
    logits = exact @ head.double().T, teacher.double() @ teacher_head.double().T
    reference.distillation_loss(*logits, weight=weight).backward()
    assert (a.grad.double() - exact.grad).norm() <= 0.02 * exact.grad.norm()
    none = dx.linear_distillation_loss(a, head, teacher, teacher_head, weight=torch.zeros_like(weight))
    assert none.item() == 0.0
    empty = dx.linear_distillation_loss(a[:, :0], head, teacher[:, :0], teacher_head)
    empty.backward()
    assert empty.item() == 0.0


@everywhere
def test_linear_opcheck_and_compile() -> None:
    hidden, head, teacher, teacher_head, weight = heads_of(5, 8, 30, torch.float32)
    given = (hidden[0].requires_grad_(), head, teacher[0], teacher_head, weight[0] != 0)
    settings = (0.7, 1.0, 0.5, 0.0, 2)
    torch.library.opcheck(torch.ops.dparallel.linear_distillation_loss.default, (*given, *settings))
    saved = torch.ops.dparallel.linear_distillation_loss(*given, *settings)[1].detach()
    given = (hidden[0].detach(), *given[1:])
    torch.library.opcheck(
        torch.ops.dparallel.linear_distillation_loss_backward.default,
        (*given, *settings, saved, torch.randn(5), True),
    )

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(h: Tensor) -> Tensor:
        return dx.linear_distillation_loss(2 * h, head, teacher, teacher_head, weight=weight)

    h = hidden.detach().requires_grad_()
    (a,) = torch.autograd.grad(loss(h), h)
    expected = dx.linear_distillation_loss(2 * h, head, teacher, teacher_head, weight=weight)
    (b,) = torch.autograd.grad(expected, h)
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden": torch.zeros(2, 3, 4).long()}, "hidden: expected floating point"),
        ({"lm_head_weight": torch.zeros(5, 3)}, r"lm_head_weight: expected \(V, 4\)"),
        ({"lm_head_weight": torch.zeros(0, 4)}, "lm_head_weight: expected at least one row"),
        ({"teacher_hidden": torch.zeros(2, 2, 4)}, r"teacher_hidden: expected torch.float32 \(2, 3, 4\)"),
        ({"teacher_hidden": torch.zeros(2, 3, 6)}, r"lm_head_weight: expected \(V, 6\) matching teacher_hid"),
        ({"teacher_lm_head_weight": torch.zeros(5, 3)}, r"teacher_lm_head_weight: expected \(V, 4\)"),
        ({"teacher_lm_head_weight": torch.zeros(6, 4)}, "teacher_lm_head_weight: expected 5 rows"),
        ({"weight": torch.ones(6)}, r"weight: expected floating point \(2, 3\) matching hidden"),
        ({"softcap": 0.0}, "softcap: expected"),
        ({"chunk_rows": 0}, "chunk_rows: expected"),
        ({"kl_weight": math.nan}, "kl_weight: expected"),
        ({"hidden": torch.full((2, 3, 4), math.nan)}, "student: row 0 holds NaN"),
    ],
)
def test_linear_bad_arguments_are_named(change: dict, said: str) -> None:
    hidden = torch.zeros(2, 3, 4)
    good = {"hidden": hidden, "lm_head_weight": torch.zeros(5, 4), "teacher_hidden": hidden}
    with pytest.raises(ValueError, match=said):
        dx.linear_distillation_loss(**{**good, **change})
