"""Gradients through ops: those that an op does not have are refused by name, in every mode of torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import everywhere
from op_examples import OPS, copied, documented, examples, flat, op_of, same
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext import ops

WITHOUT_GRADIENT = [name for name in OPS if name not in ("certainty_forcing_loss", "distillation_loss")]


@pytest.mark.parametrize("name", WITHOUT_GRADIENT)
@everywhere
def test_a_gradient_that_an_op_does_not_have_is_refused(name: str) -> None:
    """Nothing is silently None, nor right but for a term."""
    given = examples(torch.float32)[name]
    for i, argument in enumerate(op_of(name).default._schema.arguments[: len(given)]):
        value = given[i]
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            continue
        call = copied(given)
        call[i] = value.clone().requires_grad_()
        with torch.no_grad():
            expected = flat(op_of(name)(*copied(tuple(call))))
        if argument.is_write or not op_of(name).default._schema.returns:
            with pytest.raises(ValueError, match=f"{argument.name}: requires a gradient"):
                op_of(name)(*call)
            continue
        found = flat(op_of(name)(*call))
        assert same([t.detach() for t in found], expected)
        for t in found:
            if t.is_floating_point() and t.numel():
                with pytest.raises(NotImplementedError, match=f"dparallel::{name} has no gradient"):
                    (t.sum() + call[i].sum()).backward(retain_graph=True)


@everywhere
def test_functions_refuse_a_gradient() -> None:
    for name in ("row_stats", "unmask_", "accept", "block_attention"):
        function, given = documented(torch.float32)[name]
        which = "q" if name == "block_attention" else "logits"
        leaf = given[which].clone().requires_grad_()
        out = function(**{**given, which: leaf * 2})
        of_floats = out if isinstance(out, Tensor) else (out if name == "row_stats" else out.stats).entropy
        with pytest.raises(NotImplementedError, match=f"dparallel::{name} has no gradient"):
            (of_floats.nan_to_num().sum() + leaf.sum()).backward()
    function, given = documented(torch.float32)["kv_write"]
    with pytest.raises(ValueError, match="k: requires a gradient"):
        function(**{**given, "k": given["k"].requires_grad_()})


@pytest.mark.filterwarnings("ignore:Error detected in")
def test_a_gradient_is_refused_under_compile() -> None:
    _, given = documented(torch.float32)["block_attention"]
    q = given.pop("q").requires_grad_()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(q: Tensor) -> Tensor:
        return dx.block_attention(q * 2, **given).sum() + q.sum()

    with pytest.raises(Exception, match="dparallel::block_attention has no gradient"):
        loss(q).backward()
    with torch.no_grad():
        assert torch.equal(loss(q), dx.block_attention(q * 2, **given).sum() + q.sum())


@everywhere
def test_a_second_gradient_of_a_loss_is_refused() -> None:
    z, labels, teacher = torch.randn(2, 3, 40), torch.randint(0, 40, (2, 3)), torch.randn(2, 3, 40)
    leaf = z.requires_grad_()
    for inplace in (False, True):
        certainty = dx.certainty_forcing_loss(leaf * 2, labels, labels > 5, inplace=inplace).loss
        for loss in (certainty, dx.distillation_loss(leaf * 2, teacher, inplace=inplace)):
            (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
            with pytest.raises(NotImplementedError, match="has no gradient"):
                grad.square().sum().backward()


@everywhere
@pytest.mark.parametrize("name", ["row_stats", "unmask_", "accept", "block_attention"])
def test_a_tangent_is_refused(name: str) -> None:
    """Of forward-mode differentiation: a custom op drops it, and the derivative would be 0."""
    function, given = documented(torch.float32)[name]
    which = "q" if name == "block_attention" else "logits"
    with pytest.raises(ValueError, match=f"{which}: has a tangent"):
        torch.func.jvp(
            lambda t: function(**{**given, which: t}), (given[which],), (torch.ones_like(given[which]),)
        )


@everywhere
def test_a_tangent_of_a_layer_or_a_loss_is_refused() -> None:
    x, labels, head = torch.randn(6, 5), torch.randint(0, 5, (6,)), torch.randn(9, 5)
    given = labels, labels >= 0
    calls: dict[str, Callable[[Tensor], Any]] = {
        "logits": lambda z: dx.certainty_forcing_loss(z, *given).loss,
        "student": lambda z: dx.distillation_loss(z, x),
        "teacher": lambda z: dx.distillation_loss(x, z),
        "hidden": lambda z: dx.linear_certainty_forcing_loss(z, head, *given).loss,
        "lm_head_weight": lambda z: dx.linear_certainty_forcing_loss(head, z, *given).loss,
        "x": lambda z: ops.rms_norm(z, x[0], eps=1e-5),
        "delta": lambda z: ops.rms_norm(x, x[0], eps=1e-5, delta=z),
        "gate": lambda z: ops.swiglu(z, z),
        "up": lambda z: ops.swiglu(x, z),
    }
    for name, call in calls.items():
        with torch.no_grad(), pytest.raises(ValueError, match=f"{name}: has a tangent"):
            torch.func.jvp(call, (x,), (torch.randn(6, 5),))


LOSSES: dict[str, Callable[..., Tensor]] = {
    "logits": lambda z, labels: dx.certainty_forcing_loss(z, labels, labels >= 0).loss,
    "student": lambda z, labels: dx.distillation_loss(z, z.detach()),
    "hidden": lambda z, labels: (
        dx.linear_certainty_forcing_loss(z, torch.ones(9, 5, device=z.device), labels, labels >= 0).loss
    ),
}


@everywhere
@pytest.mark.parametrize("name", LOSSES)
def test_transforms_of_a_loss_are_named(name: str) -> None:
    loss, z, labels = LOSSES[name], torch.randn(2, 3, 5), torch.randint(0, 5, (2, 3))
    for transform, said in (
        (torch.func.grad(loss), "a gradient of torch.func"),
        (torch.func.jacrev(loss), "a gradient of torch.func"),
        (torch.vmap(loss), "torch.vmap"),
        (torch.vmap(torch.func.grad(loss)), "a gradient of torch.func"),
    ):
        with pytest.raises(ValueError, match=f"{name}: is under {said}, which"):
            transform(z, labels)
    with pytest.raises(ValueError, match=r"labels: is under torch\.vmap"):
        torch.vmap(lambda labels: LOSSES["logits"](z[0], labels))(labels)


@everywhere
def test_transforms_of_a_weight_are_named() -> None:
    z, head, labels, weights = (
        torch.randn(3, 5),
        torch.randn(9, 5),
        torch.randint(0, 5, (3,)),
        torch.rand(2, 3),
    )
    given = labels, labels >= 0
    calls: list[Callable[[Tensor], Tensor]] = [
        lambda w: dx.certainty_forcing_loss(z, *given, weight=w).loss,
        lambda w: dx.linear_certainty_forcing_loss(z, head, *given, weight=w).loss,
        lambda w: dx.distillation_loss(z, z, weight=w),
        lambda w: dx.linear_distillation_loss(z, head, z, weight=w),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"weight: is under torch\.vmap, which"):
            torch.vmap(call)(weights)
        with pytest.raises(ValueError, match=r"weight: is under a gradient of torch\.func, which"):
            torch.func.grad(call)(weights[0])
        with pytest.raises(ValueError, match="weight: has a tangent"):
            torch.func.jvp(call, (weights[0],), (weights[1],))


@everywhere
def test_a_gradient_of_torch_func_passes_by_statistics() -> None:
    """Of logits that are detached; those that are not have no gradient to give."""
    z = torch.randn(2, 5)
    grad = torch.func.grad(lambda z: (z.sum(1) * dx.row_stats(z.detach()).entropy).sum())(z)
    assert torch.equal(grad, dx.row_stats(z).entropy[:, None].expand(2, 5))
    with pytest.raises(ValueError, match=r"logits: is under a gradient of torch\.func"):
        torch.func.grad(lambda z: dx.row_stats(z).entropy.sum())(z)
