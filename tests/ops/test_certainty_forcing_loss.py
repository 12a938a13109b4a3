"""certainty_forcing_loss against the published loss (golden), its float64 oracle, and on hard rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import every_level, everywhere, golden
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext import reference

CASES = golden.json("loss_a", "cases")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GRADIENT_ERROR = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float64: 1e-12}


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
@every_level
def test_golden(case: dict, device: str) -> None:
    tensors = {name: t.to(device) for name, t in golden.tensors("loss_a", "cases").items()}
    total = 0.0
    for side in ("", "_rev"):
        logits = tensors[f"{case['name']}.logits{side}"].requires_grad_()
        mask, labels = tensors[f"{case['name']}.mask{side}"], tensors[f"{case['name']}.labels"]
        settings = {"temperature": case["temperature"], "entropy_weight": case["entropy_weight"]}
        out = dx.certainty_forcing_loss(logits, labels, mask, **settings)
        out.loss.backward()
        expected = tensors[f"{case['name']}.grad{side}"]
        assert (logits.grad - expected).abs().max() <= 1e-5
        total += float(out.loss.detach())
    assert total == pytest.approx(case["loss"], abs=1e-5, rel=1e-6)


def compare(logits: Tensor, labels: Tensor, active: Tensor, **settings: object) -> None:
    """Values within 2e-6 + 1e-6 |x|, gradients within the rounding of their dtype."""
    ours = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    theirs = logits.detach().double().requires_grad_()
    a = dx.certainty_forcing_loss(ours, labels, active, **settings)
    b = reference.certainty_forcing_loss(theirs, labels, active, **settings)
    assert torch.equal(a.correct, b.correct)
    for name in ("nll", "entropy"):
        x, y = getattr(a, name).double(), getattr(b, name)
        assert bool(((x - y).abs() <= 2e-6 + 1e-6 * y.abs()).all()), name
    assert a.loss.item() == pytest.approx(b.loss.item(), rel=4e-6, abs=4e-6)
    a.loss.backward()
    b.loss.backward()
    assert ours.grad is not None
    assert ours.grad.dtype == logits.dtype
    assert bool((ours.grad[~active] == 0).all())
    tolerance = GRADIENT_ERROR[logits.dtype]
    gap = (ours.grad.double() - theirs.grad).abs()
    tiny = 6e-8 if logits.dtype == torch.float16 else 1e-7  # float16's smallest step
    assert bool((gap <= tiny + tolerance * theirs.grad.abs()).all()), float(gap.max())


@given(
    dtype=st.sampled_from([*DTYPES, torch.float64]),
    batch=st.integers(0, 3),
    length=st.integers(0, 9),
    vocab=st.sampled_from([1, 2, 3, 31, 33, 64, 247, 2049, 16391]),
    scale=st.sampled_from([0.1, 1.0, 5.0, 20.0]),
    temperature=st.sampled_from([0.5, 1.0, 0.3, 2.0]),
    ce_temperature=st.sampled_from([1.0, 2.0, 0.7]),
    entropy_weight=st.sampled_from([0.0, 1.0, 2.0]),
    gate=st.sampled_from(["correct", "all", "own"]),
    weighted=st.booleans(),
    reduction=st.sampled_from(["mean", "sum"]),
    sliced=st.booleans(),
    seed=st.integers(0, 2**20),
)
@every_level
def test_equals_the_oracle(
    dtype, batch, length, vocab, scale, temperature, ce_temperature, entropy_weight, gate, weighted,
    reduction, sliced, seed,
):  # fmt: skip
    rng = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(batch, length + sliced, vocab, generator=rng)).to(dtype)
    labels = torch.randint(0, vocab, (batch, length), generator=rng)
    active = torch.rand(batch, length, generator=rng) < 0.6
    right = torch.rand(batch, length, generator=rng) < 0.5
    logits = logits[:, : logits.shape[1] - sliced]  # not contiguous, as Dream's shifted ones
    labels = torch.where(right, logits.argmax(-1) if vocab and length and batch else labels, labels)
    own = torch.rand(batch, length, generator=rng) < 0.5
    compare(
        logits,
        labels,
        active,
        temperature=temperature,
        ce_temperature=ce_temperature,
        entropy_weight=entropy_weight,
        gate=own if gate == "own" else gate,
        weight=torch.rand(batch, length, generator=rng) if weighted else None,
        reduction=reduction,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [126464, 262147])
@every_level
def test_real_vocabularies(dtype: torch.dtype, vocab: int) -> None:
    logits = (3 * torch.randn(1, 4, vocab)).to(dtype)
    logits[0, 1, 77] = 25.0
    labels = torch.tensor([[5, 77, vocab - 1, 3]])
    compare(logits, labels, torch.tensor([[True, True, True, False]]))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@every_level
def test_hard_rows(dtype: torch.dtype) -> None:
    vocab = 1003
    torch.manual_seed(1)
    near_certain = 0.5 * torch.randn(vocab)
    near_certain[9] = 20.0
    rows = torch.stack(
        [
            torch.randn(vocab) - 60,  # all negative
            60 * torch.sign(torch.randn(vocab)),  # +-60
            near_certain,
            torch.full((vocab,), 3.0),  # all equal: the lowest id is the argmax
            torch.where(torch.arange(vocab) == 4, 60.0, -60.0),  # certain: entropy 0
            torch.where(torch.arange(vocab) % 2 == 0, -math.inf, torch.randn(vocab)),
        ]
    )[None]
    labels = torch.tensor([[3, 0, 9, 0, 4, 1]])
    active = torch.ones(1, 6, dtype=torch.bool)
    compare(rows.to(dtype), labels, active)
    out = dx.certainty_forcing_loss(rows.to(dtype), labels, active)
    assert out.entropy[0, 4] < 1e-30
    assert out.correct.tolist()[0][2:5] == [True, True, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@everywhere
def test_masks_of_finite_numbers(dtype: torch.dtype) -> None:
    """Of the last ids, which are a chunk of their own on a GPU, and of whole rows."""
    fills = torch.tensor([-1e8, -1e9, -3e9, -1e10, -1e20, -1e30, torch.finfo(torch.bfloat16).min])
    rows = torch.randn(2, len(fills), 16384 + 300)
    rows[0, :, 16384:] = rows[1] = fills[:, None]
    rows[1, :4, 7] = -fills[:4]
    rows[1, 4:, 7] = 2 * fills[4:]
    labels, active = (
        torch.tensor([[3], [5]]).expand(2, len(fills)),
        torch.ones(2, len(fills), dtype=torch.bool),
    )
    for ce_temperature, temperature in ((1.0, 0.5), (2.0, 1.0), (1.0, 0.1), (0.3, 5.0)):
        settings = {"temperature": temperature, "ce_temperature": ce_temperature, "gate": "all"}
        compare(rows.to(dtype), labels, active, **settings)
        few = fills.view(1, -1, 1).expand(1, -1, 5)
        compare(few.to(dtype), labels[:1], active[:1], **settings)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("label", [1, 2])
@everywhere
def test_infinity_counts_as_the_largest_float32(dtype: torch.dtype, label: int) -> None:
    """In float64 it was NaN, or an error, and the gradient of a label at infinity was -1."""
    infinite = [math.inf] if dtype != torch.float64 else [math.inf, 1e300]
    for largest in infinite:
        for row in ([0.0, largest, 1.0, -math.inf], [0.0, largest, largest, 1.0]):
            z = torch.tensor([[0.0] * 5 + row], dtype=dtype, requires_grad=True)
            ours, theirs = (
                loss(z * 1, torch.tensor([5 + label]), torch.tensor([True]), gate="all", entropy_weight=0.5)
                for loss in (dx.certainty_forcing_loss, reference.certainty_forcing_loss)
            )
            assert torch.allclose(ours.nll.double(), theirs.nll.double())
            assert torch.allclose(ours.entropy.double(), theirs.entropy.double(), atol=1e-30)
            (grad,) = torch.autograd.grad(ours.loss, z)
            p = z.detach().double().clamp(max=torch.finfo(torch.float32).max).softmax(1)
            p[0, 5 + label] -= 1
            assert torch.allclose(grad.double(), p, atol=1e-12)


@everywhere
def test_entropy_near_certainty_does_not_cancel() -> None:
    """Relative, not only absolute, accuracy as the entropy goes to 0."""
    for gap in (10.0, 14.0, 18.0):
        logits = torch.zeros(1, 1, 5000)
        logits[..., 3] = gap
        one = torch.ones(1, 1, dtype=torch.bool)
        label = torch.full((1, 1), 3)
        ours = float(dx.certainty_forcing_loss(logits, label, one).entropy)
        exact = float(reference.certainty_forcing_loss(logits, label, one).entropy)
        assert ours == pytest.approx(exact, rel=1e-3, abs=0)  # float64 holds 1 + 1e-12 to 1e-4 of it


@everywhere
def test_no_active_and_no_correct_row() -> None:
    logits = torch.randn(2, 3, 50, requires_grad=True)
    labels = torch.zeros(2, 3, dtype=torch.int64)
    none = torch.zeros(2, 3, dtype=torch.bool)
    out = dx.certainty_forcing_loss(logits, labels, none)
    out.loss.backward()
    assert out.loss.item() == 0.0
    assert not bool(logits.grad.any())
    with torch.no_grad():
        logits[..., 0] = -50.0
    compare(logits, labels, ~none)
    assert not bool(dx.certainty_forcing_loss(logits, labels, ~none).correct.any())


@everywhere
def test_the_gate_is_detached_and_zero_weight_is_cross_entropy() -> None:
    logits, labels = torch.randn(1, 8, 20, requires_grad=True), torch.randint(0, 20, (1, 8))
    active = torch.ones(1, 8, dtype=torch.bool)
    ours = dx.certainty_forcing_loss(logits, labels, active, entropy_weight=0.0).loss
    (a,) = torch.autograd.grad(ours, logits)
    theirs = torch.nn.functional.cross_entropy(logits[0], labels[0])
    (b,) = torch.autograd.grad(theirs, logits)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    assert torch.allclose(a, b, atol=1e-7)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 0.7])
@pytest.mark.parametrize("vocab", [1, 5, 33])
@everywhere
def test_gradcheck(temperature: float, vocab: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, vocab, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, vocab, (2, 3))
    labels[0] = logits[0].argmax(-1)
    active = torch.tensor([[True, True, False], [True, False, True]])
    weight = torch.rand(2, 3, dtype=torch.float64)

    def fields(z: Tensor) -> tuple[Tensor, ...]:
        out = dx.certainty_forcing_loss(z, labels, active, temperature=temperature, weight=weight)
        return out.loss, out.nll, out.entropy

    assert torch.autograd.gradcheck(fields, (logits,))


@everywhere
def test_opcheck() -> None:
    labels, active = torch.randint(0, 9, (6,)), torch.rand(6) < 0.7
    for logits in (torch.randn(6, 9), torch.randn(2, 3, 9).to(torch.bfloat16)):
        arguments = (logits.requires_grad_(), labels, active, 0.5, 1.0)
        torch.library.opcheck(torch.ops.dparallel.certainty_forcing_loss.default, arguments)
        saved = torch.ops.dparallel.certainty_forcing_loss(*arguments)[3]
        rest = (saved, torch.randn(6), torch.randn(6))
        given = (*(a.detach() if isinstance(a, Tensor) else a for a in arguments), *rest)
        torch.library.opcheck(torch.ops.dparallel.certainty_forcing_loss_backward.default, given)
        torch.library.opcheck(torch.ops.dparallel.certainty_forcing_loss_backward_.default, given)


@everywhere
def test_compiles_without_a_graph_break() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(z: Tensor, y: Tensor, active: Tensor) -> Tensor:
        return dx.certainty_forcing_loss(2 * z, y, active).loss

    z, y = torch.randn(2, 5, 40, requires_grad=True), torch.randint(0, 40, (2, 5))
    active = torch.rand(2, 5) < 0.5
    (a,) = torch.autograd.grad(loss(z, y, active), z)
    (b,) = torch.autograd.grad(dx.certainty_forcing_loss(2 * z, y, active).loss, z)
    assert torch.equal(a, b)


# --- the gradient over the logits ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("vocab", [1, 33, 16391])
@pytest.mark.parametrize("sliced", [False, True])
@everywhere
def test_inplace_gives_the_same_gradient_in_the_memory_of_the_logits(
    dtype: torch.dtype, vocab: int, sliced: bool
) -> None:
    states = torch.randn(2, 5 + sliced, vocab).to(dtype)
    labels, active = torch.randint(0, vocab, (2, 5)), torch.rand(2, 5) < 0.6
    active[0, :2] = torch.tensor([True, False])

    def gradients(inplace: bool) -> tuple[Tensor, Tensor, Tensor]:
        leaf = states.clone().requires_grad_()
        logits = (2 * leaf)[:, : labels.shape[1]]
        logits.retain_grad()
        dx.certainty_forcing_loss(logits, labels, active, inplace=inplace).loss.backward()
        return leaf.grad, logits.grad, logits.detach()

    ours, own, memory = gradients(True)
    expected, expected_own, values = gradients(False)
    assert torch.equal(ours, expected)
    assert torch.equal(own, expected_own)
    assert torch.equal(memory, own)
    assert not torch.equal(values, expected_own)


@everywhere
def test_inplace_is_noticed_by_who_needs_the_logits() -> None:
    labels, active = torch.randint(0, 30, (4,)), torch.ones(4, dtype=torch.bool)
    leaf = torch.randn(4, 30, requires_grad=True)

    def loss_of(logits: Tensor) -> Tensor:
        return dx.certainty_forcing_loss(logits, labels, active, inplace=True).loss

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss_of(torch.tanh(leaf)).backward()  # whose gradient is taken of its output
    loss = loss_of(2 * leaf)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    for logits in (leaf, leaf[1:], leaf.view(2, 2, 30).flatten(0, 1)):
        rows = len(logits)
        with pytest.raises(ValueError, match="inplace: expected the output of an op as logits"):
            dx.certainty_forcing_loss(logits, labels[:rows], active[:rows], inplace=True)
    with pytest.raises(ValueError, match="logits: expected memory of its own for each element"):
        loss_of((2 * leaf)[:1].expand(4, 30))
    assert dx.certainty_forcing_loss(leaf.detach(), labels, active, inplace=True).loss.isfinite()


@everywhere
def test_inplace_adds_to_the_other_gradients_of_the_logits() -> None:
    labels, active = torch.randint(0, 30, (4,)), torch.ones(4, dtype=torch.bool)
    leaf, grads = torch.randn(4, 30), []
    for inplace in (False, True):
        x = leaf.clone().requires_grad_()
        logits = 2 * x
        (dx.certainty_forcing_loss(logits, labels, active, inplace=inplace).loss + logits.sum()).backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


@everywhere
def test_inplace_under_compile_is_the_compilers() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(z: Tensor) -> Tensor:
        return dx.certainty_forcing_loss(2 * z, labels, active, inplace=True).loss

    z, labels = torch.randn(5, 40, requires_grad=True), torch.randint(0, 40, (5,))
    active = torch.rand(5) < 0.5
    (a,) = torch.autograd.grad(loss(z), z)
    (b,) = torch.autograd.grad(dx.certainty_forcing_loss(2 * z, labels, active).loss, z)
    assert torch.equal(a, b)


@everywhere
def test_rows_that_are_not_active_are_never_read() -> None:
    logits, labels = torch.full((1, 4, 30), math.nan), torch.full((1, 4), -100)
    logits[0, 2], labels[0, 2] = torch.randn(30), 7
    active = torch.tensor([[False, False, True, False]])
    compare(logits.nan_to_num(0.0), labels.clamp(min=0), active)
    out = dx.certainty_forcing_loss(logits.requires_grad_(), labels, active)
    out.loss.backward()
    assert bool(logits.grad.isfinite().all())


@everywhere
def test_results_do_not_depend_on_the_batch_or_the_threads() -> None:
    logits, labels = torch.randn(3, 4, 40003), torch.randint(0, 40003, (3, 4))
    active = torch.ones(3, 4, dtype=torch.bool)
    whole = dx.certainty_forcing_loss(logits, labels, active)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = dx.certainty_forcing_loss(logits[1:2], labels[1:2], active[1:2])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(whole.nll[1:2], alone.nll)
    assert torch.equal(whole.entropy[1:2], alone.entropy)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"logits": torch.zeros(2, 3, 5, dtype=torch.int64)}, "logits: expected float32"),
        ({"logits": torch.zeros(2, 3, 0)}, r"logits: expected \(\.\.\., V\)"),
        ({"labels": torch.zeros(2, 4, dtype=torch.int64)}, r"labels: expected int64 or int32 \(2, 3\)"),
        ({"labels": torch.zeros(2, 3)}, "labels: expected int64"),
        ({"active": torch.ones(2, 3)}, "active: expected bool"),
        ({"weight": torch.ones(6)}, "weight: expected floating point"),
        ({"gate": "right"}, "gate: expected 'correct'"),
        ({"gate": torch.ones(2, 3)}, "gate: expected bool"),
        ({"gate": np.ones(2)}, "gate: expected 'correct', .* got array"),
        ({"temperature": np.ones(2)}, "temperature: expected a finite number"),
        ({"ce_temperature": "1"}, "ce_temperature: expected a finite number"),
        ({"entropy_weight": math.nan}, "entropy_weight: expected a finite number, got nan"),
        ({"temperature": 0.0}, "temperature: expected a number from 1e-5 to 1e5, got 0.0"),
        ({"temperature": 1e-38}, "temperature: expected a number from 1e-5 to 1e5"),
        ({"ce_temperature": 1e38}, "ce_temperature: expected a number from 1e-5 to 1e5"),
        ({"ce_temperature": math.nan}, "ce_temperature: expected"),
        ({"reduction": "none"}, "reduction: expected"),
        ({"labels": torch.full((2, 3), 5)}, r"labels: row 0 is active, but its label is no id in \[0, 5\)"),
        ({"labels": torch.full((2, 3), -100)}, r"labels: row 0 is active.*\(-100\) belong out of `active`"),
        ({"logits": torch.full((2, 3, 5), math.nan)}, "logits: row 0 holds NaN"),
        ({"logits": torch.full((2, 3, 5), -math.inf)}, "row 0 has no logit above -inf"),
    ],
)
def test_bad_arguments_are_named(change: dict, said: str) -> None:
    good = {
        "logits": torch.zeros(2, 3, 5),
        "labels": torch.zeros(2, 3, dtype=torch.int64),
        "active": torch.ones(2, 3, dtype=torch.bool),
    }
    with pytest.raises(ValueError, match=said):
        dx.certainty_forcing_loss(**{**good, **change})


def test_labels_as_they_come() -> None:
    """int32, and -100 where a row is not active, as of those that torch's cross entropy would ignore."""
    logits, labels = torch.randn(2, 3, 5), torch.randint(0, 5, (2, 3))
    labels[0, 1] = -100
    active = labels != -100
    expected = dx.certainty_forcing_loss(logits, labels.clamp(min=0), active)
    assert torch.equal(dx.certainty_forcing_loss(logits, labels.int(), active).loss, expected.loss)
    hidden, head = torch.eye(5), logits.flatten(0, 1)  # six words
    found = dx.linear_certainty_forcing_loss(
        hidden,
        head,
        labels[0].new_tensor([0, 1, -100, 5, 3]).int(),
        labels.new_tensor([1, 1, 0, 1, 1]).bool(),
        chunk_rows=2,
    )
    assert found.loss.isfinite()
    ce = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    assert torch.allclose(dx.certainty_forcing_loss(logits, labels, active, entropy_weight=0).loss, ce)
