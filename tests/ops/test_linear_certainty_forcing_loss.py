"""The certainty-forcing loss of hidden states and a head: linear_certainty_forcing_loss."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import everywhere, refused
from test_certainty_forcing_loss import DTYPES
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext import reference
from dparallel_ext.ops.head import add_product


def rows_of(n: int, width: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden (2, n, width), head (vocab, width), labels half of which are right, active."""
    hidden, head = torch.randn(2, n, width), torch.randn(vocab, width) / width**0.5
    hidden, head = hidden.to(dtype), (3 * head).to(dtype)
    labels = torch.where(
        torch.rand(2, n) < 0.5, (hidden @ head.T).argmax(-1), torch.randint(0, vocab, (2, n))
    )
    return hidden, head, labels, torch.rand(2, n) < 0.6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chunk_rows", [1, 3, None])
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("trainable", [False, True])
@everywhere
def test_linear_equals_the_loss_of_its_logits(
    dtype: torch.dtype, chunk_rows: int | None, softcap: float | None, shift: bool, trainable: bool
) -> None:
    hidden, head, labels, active = rows_of(7, 16, 203, dtype)
    weight = torch.rand(labels.shape)
    a, w = hidden.clone().requires_grad_(), head.clone().requires_grad_(trainable)
    ours = dx.linear_certainty_forcing_loss(
        a, w, labels, active, weight=weight, softcap=softcap, shift=shift, chunk_rows=chunk_rows
    )
    ours.loss.backward()
    b, v = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    logits = b @ v.T
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if shift:  # as published
        theirs = dx.certainty_forcing_loss(logits[:, :-1], labels[:, 1:], active[:, 1:], weight=weight[:, 1:])
        assert torch.allclose(ours.nll[:, 1:], theirs.nll, atol=1e-5)
        assert not bool(ours.nll[:, 0].any())
    else:
        theirs = dx.certainty_forcing_loss(logits, labels, active, weight=weight)
        assert torch.equal(ours.correct, theirs.correct)
        assert torch.allclose(ours.entropy, theirs.entropy, atol=1e-5)
    theirs.loss.backward()
    assert ours.loss.item() == pytest.approx(theirs.loss.item(), rel=1e-5)
    assert torch.allclose(a.grad, b.grad, atol=1e-5)
    if trainable:
        assert torch.allclose(w.grad, v.grad, atol=1e-5)
    else:
        assert w.grad is None


@everywhere
def test_linear_names_the_row_of_the_whole() -> None:
    hidden, head, labels, _ = rows_of(5, 8, 30, torch.float32)
    active = torch.tensor([[False, True, True, False, True], [False, False, True, True, True]])
    labels[1, 3] = 30
    with refused("labels: row 8 is active, but its label is no id"):
        dx.linear_certainty_forcing_loss(hidden, head, labels, active, chunk_rows=2)


@pytest.mark.parametrize("softcap", [None, 3.0])
@everywhere
def test_linear_gradcheck(softcap: float | None) -> None:
    hidden, head, labels, active = rows_of(3, 4, 7, torch.float64)

    def fields(h: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        out = dx.linear_certainty_forcing_loss(h, w, labels, active, softcap=softcap, chunk_rows=2)
        return out.loss, out.nll, out.entropy

    assert torch.autograd.gradcheck(fields, (hidden.requires_grad_(), head.requires_grad_()))


@everywhere
def test_linear_in_bfloat16_and_without_active_rows() -> None:
    hidden, head, labels, active = rows_of(9, 64, 5003, torch.bfloat16)
    a = hidden.clone().requires_grad_()
    out = dx.linear_certainty_forcing_loss(a, head, labels, active, chunk_rows=4)
    out.loss.backward()
    exact = hidden.double().requires_grad_()
    reference.certainty_forcing_loss(exact @ head.double().T, labels, active).loss.backward()
    assert (a.grad.double() - exact.grad).norm() <= 0.02 * exact.grad.norm()
    none = dx.linear_certainty_forcing_loss(a, head, labels, torch.zeros_like(active))
    assert none.loss.item() == 0.0


@everywhere
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_the_gradient_of_the_head_is_summed_in_place(dtype: torch.dtype) -> None:
    a, b = torch.randn(300, 40).to(dtype), torch.randn(40, 50).to(dtype)
    total = torch.randn(300, 50, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    expected = total.double() + a.double() @ b.double()
    add_product(total, a, b)
    # On the CPU a 16-bit product is rounded before it is added; on a GPU it is not.
    rounded = dtype in (torch.bfloat16, torch.float16) and not total.is_cuda
    torch.testing.assert_close(
        total.double(), expected, rtol=0, atol=0.1 if rounded else 1e-12 if dtype == torch.float64 else 1e-4
    )


@everywhere
def test_linear_opcheck_and_compile() -> None:
    hidden, head, labels, active = rows_of(5, 8, 30, torch.float32)
    arguments = (hidden[0].requires_grad_(), head, labels[0], active[0], 0.5, 1.0, 0.0, 2)
    torch.library.opcheck(torch.ops.dparallel.linear_certainty_forcing_loss.default, arguments)
    saved = torch.ops.dparallel.linear_certainty_forcing_loss(*arguments)[3]
    given = (hidden[0].detach(), *arguments[1:], saved.detach(), torch.randn(5), torch.randn(5), True)
    torch.library.opcheck(torch.ops.dparallel.linear_certainty_forcing_loss_backward.default, given)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(h: Tensor) -> Tensor:
        return dx.linear_certainty_forcing_loss(2 * h, head, labels, active).loss

    h = hidden.detach().requires_grad_()
    (a,) = torch.autograd.grad(loss(h), h)
    (b,) = torch.autograd.grad(dx.linear_certainty_forcing_loss(2 * h, head, labels, active).loss, h)
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden": torch.zeros(2, 3, 4, dtype=torch.int64)}, "hidden: expected floating point"),
        ({"lm_head_weight": torch.zeros(5, 3)}, r"lm_head_weight: expected \(V, 4\)"),
        ({"lm_head_weight": torch.zeros(5, 4).half()}, "lm_head_weight: expected torch.float32"),
        ({"lm_head_weight": torch.zeros(0, 4)}, "lm_head_weight: expected at least one row"),
        (
            {"labels": torch.zeros(2, 2, dtype=torch.int64)},
            r"labels: expected int64 or int32 \(2, 3\)",
        ),
        ({"softcap": 0.0}, "softcap: expected"),
        ({"softcap": math.inf}, "softcap: expected a finite number"),
        ({"chunk_rows": 0}, "chunk_rows: expected"),
        ({"labels": torch.full((2, 3), 5)}, r"labels: row 0 is active, but its label is no id in \[0, 5\)"),
        ({"hidden": torch.full((2, 3, 4), math.nan)}, "row 0 holds NaN"),
    ],
)
def test_linear_bad_arguments_are_named(change: dict, said: str) -> None:
    good = {
        "hidden": torch.zeros(2, 3, 4),
        "lm_head_weight": torch.zeros(5, 4),
        "labels": torch.zeros(2, 3, dtype=torch.int64),
        "active": torch.ones(2, 3, dtype=torch.bool),
    }
    with pytest.raises(ValueError, match=said):
        dx.linear_certainty_forcing_loss(**{**good, **change})
