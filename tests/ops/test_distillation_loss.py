"""distillation_loss against the float64 oracle and torch's kl_div, and on hard rows."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import every_level, everywhere, refused
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MOST = torch.finfo(torch.float32).max  # as which +inf counts
GRADIENT_ERROR = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float64: 1e-12}


def compare(student: Tensor, teacher: Tensor, **settings: float | Tensor | None) -> None:
    """Each row's divergence within 2e-6 + 1e-6 |x|, gradients within the rounding of their dtype."""
    ours = student.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    theirs = student.detach().double().clamp(max=MOST).requires_grad_()
    a = dx.distillation_loss(ours, teacher, reduction="none", **settings)
    b = reference.distillation_loss(theirs, teacher, reduction="none", **settings)
    size = settings.get("kl_weight", 1.0) + 2 * settings.get("l1_weight", 0.0)
    assert bool(((a.double() - b).abs() <= max(size, 1) * 2e-6 + 1e-6 * b).all())
    summed = dx.distillation_loss(student, teacher, **settings)
    assert summed.item() == pytest.approx(a.sum().item(), rel=1e-6, abs=1e-12)
    a.sum().backward()
    b.sum().backward()
    assert ours.grad.dtype == student.dtype
    over = (ours.grad.double() - theirs.grad).abs() - GRADIENT_ERROR[student.dtype] * theirs.grad.abs()
    over -= rounding(student, teacher, size, **settings)
    assert bool((over <= (6e-8 if student.dtype == torch.float16 else 0.0)).all())


def rounding(
    student: Tensor, teacher: Tensor, size: float, weight: Tensor | None = None, temperature: float = 1.0,
    l1_weight: float = 0.0, kl_weight: float = 1.0,
) -> Tensor:  # fmt: skip
    """How far a gradient may be off by that of q and p, and of the sign where they differ by less."""
    q, p = ((x.double().clamp(max=MOST) / temperature).softmax(-1) for x in (student, teacher))
    off = (1e-14 if student.dtype == torch.float64 else 5e-7) * size * (q + p + 2e-3)
    doubt = q * ((q != p) & ((q - p).abs() <= 1e-6 * q) & (q > 1e-9))
    off += 2 * l1_weight * (doubt + q * doubt.sum(-1, keepdim=True))
    return off / temperature if weight is None else off / temperature * weight[..., None]


@given(
    dtype=st.sampled_from([*DTYPES, torch.float64]),
    batch=st.integers(0, 3),
    length=st.integers(0, 5),
    vocab=st.sampled_from([1, 2, 3, 31, 33, 64, 247, 2049, 16391]),
    scale=st.sampled_from([0.1, 1.0, 5.0, 20.0]),
    near=st.sampled_from([0.0, 0.05, 1.0]),
    temperature=st.sampled_from([1.0, 0.3, 2.0]),
    weights=st.sampled_from([(1.0, 0.0), (0.0, 1.0), (0.5, 2.0), (0.0, 0.0)]),
    weighted=st.booleans(),
    sliced=st.booleans(),
    seed=st.integers(0, 2**20),
)
@every_level
def test_equals_the_oracle(
    dtype, batch, length, vocab, scale, near, temperature, weights, weighted, sliced, seed
):
    rng = torch.Generator().manual_seed(seed)
    teacher, noise = torch.randn(2, batch, length + sliced, vocab, generator=rng)
    student = ((1 - near) * teacher + near * noise) * scale
    teacher = teacher[:, : length + sliced] * scale
    weight = torch.rand(batch, length, generator=rng) * (torch.rand(batch, length, generator=rng) < 0.7)
    compare(
        student.to(dtype)[:, : student.shape[1] - sliced],  # not contiguous
        teacher.to(dtype)[:, sliced:] if near == 1.0 else teacher.to(dtype)[:, : teacher.shape[1] - sliced],
        temperature=temperature,
        kl_weight=weights[0],
        l1_weight=weights[1],
        weight=weight if weighted else None,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [126464, 262147])
@every_level
def test_real_vocabularies(dtype: torch.dtype, vocab: int) -> None:
    teacher = (3 * torch.randn(1, 4, vocab)).to(dtype)
    teacher[0, 1, 77] = 25.0
    student = teacher + torch.randn(1, 4, vocab).to(dtype)
    student[0, 2, vocab - 1] = 25.0
    weight = torch.tensor([[0.5, 1.0, 2.0, 0.0]])
    compare(student, teacher, weight=weight)
    compare(student, teacher, weight=weight, kl_weight=0.0, l1_weight=1.0)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@every_level
def test_hard_rows(dtype: torch.dtype) -> None:
    vocab = 5003
    torch.manual_seed(1)
    sure = torch.where(torch.arange(vocab) == 4, 60.0, -60.0)
    near_certain = 0.5 * torch.randn(vocab)
    near_certain[9] = 20.0
    suppressed = torch.where(torch.arange(vocab) % 2 == 0, -math.inf, torch.randn(vocab))
    behind = torch.randn(vocab)  # whole tiles that neither gives anything
    behind[:2500] = -math.inf
    least = max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)
    rows = torch.stack(
        [
            torch.randn(vocab) - 60,
            60 * torch.sign(torch.randn(vocab)),
            near_certain,
            torch.full((vocab,), 3.0),
            sure,
            suppressed,
            behind,
            torch.where(suppressed == -math.inf, least, suppressed),  # as some masks say it
            torch.where(behind == -math.inf, least, behind),
        ]
    ).to(dtype)
    noise = torch.randn(rows.shape).to(dtype)
    for l1_weight in (0.0, 1.0):
        compare(rows, rows, l1_weight=l1_weight)
        compare(torch.where(rows > least, rows + noise, rows), rows, l1_weight=l1_weight)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("vocab", [1, 2, 33, 5003, 40001])
@every_level
def test_equal_rows_are_exactly_0(dtype: torch.dtype, vocab: int) -> None:
    for scale in (0.1, 1.0, 30.0):
        rows = (scale * torch.randn(3, vocab)).to(dtype)
        rows[1, 0] = math.inf if dtype != torch.float64 else 1e4
        leaf = rows.clone().requires_grad_()
        found = dx.distillation_loss(leaf, rows, temperature=0.7, l1_weight=1.0, reduction="none")
        assert found.tolist() == [0.0] * 3
        found.sum().backward()
        assert not bool(leaf.grad.any())


@everywhere
def test_small_divergences_do_not_cancel() -> None:
    """Of rows that are sure: relative, not only absolute, accuracy."""
    for gap in (10.0, 14.0, 18.0):
        student, teacher = torch.zeros(2, 1, 5000)
        student[:, 3], teacher[:, 3] = gap, gap + 1
        exact = reference.distillation_loss(student, teacher).item()
        assert dx.distillation_loss(student, teacher).item() == pytest.approx(exact, rel=1e-3, abs=0)


@everywhere
def test_is_torchs_kl_and_the_total_variation() -> None:
    student, teacher = torch.randn(6, 50, requires_grad=True), torch.randn(6, 50)
    log_q, log_p = ((x / 2.0).log_softmax(-1) for x in (student, teacher))
    kl = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="sum")
    l1 = (log_q.exp() - log_p.exp()).abs().sum()
    for kl_weight, l1_weight, theirs in ((1.0, 0.0, kl), (0.0, 1.0, l1)):
        weights = {"kl_weight": kl_weight, "l1_weight": l1_weight}
        ours = dx.distillation_loss(student, teacher, temperature=2.0, **weights)
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
        (a,), (b,) = (torch.autograd.grad(x, student, retain_graph=True) for x in (ours, theirs))
        assert torch.allclose(a, b, atol=1e-6)


@everywhere
def test_the_teacher_has_no_gradient_and_the_weight_has() -> None:
    student, teacher, weight = torch.randn(3, 9), torch.randn(3, 9), torch.tensor([0.5, 0.0, 2.0])
    for t in (student, teacher, weight):
        t.requires_grad_()
    loss = dx.distillation_loss(student, teacher, weight=weight)
    found = torch.autograd.grad(loss, (student, teacher, weight), allow_unused=True)
    assert found[1] is None
    assert torch.equal(found[2] > 0, torch.tensor([True, False, True]))  # a row of weight 0 is not read
    assert not bool(found[0][1].any())


@everywhere
def test_rows_of_weight_0_are_never_read() -> None:
    student, teacher = torch.randn(2, 4, 30)
    weight = torch.tensor([0.0, 0.0, 0.3, 0.0])
    expected = dx.distillation_loss(student, teacher, weight=weight, l1_weight=1.0)
    student[0], teacher[1], student[3] = math.nan, math.nan, -math.inf
    leaf = student.requires_grad_()
    loss = dx.distillation_loss(leaf, teacher, weight=weight, l1_weight=1.0)
    loss.backward()
    assert torch.equal(loss.detach(), expected)
    assert torch.equal(leaf.grad.any(-1), weight > 0)
    assert bool(leaf.grad.isfinite().all())


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.3, 0.7)])
@pytest.mark.parametrize("vocab", [1, 5, 33])
@everywhere
def test_gradcheck(weights: tuple[float, float], vocab: int) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 3, vocab, dtype=torch.float64)
    weight = torch.tensor([[1.0, 0.2, 0.0], [0.5, 0.0, 2.0]], dtype=torch.float64)

    settings = {"temperature": 0.8, "kl_weight": weights[0], "l1_weight": weights[1]}

    def loss(z: Tensor) -> Tensor:
        return dx.distillation_loss(z, teacher, weight=weight, **settings)

    assert torch.autograd.gradcheck(loss, (student.requires_grad_(),))


@everywhere
def test_opcheck() -> None:
    active = torch.rand(6) < 0.7
    for shape, dtype in (((6, 9), torch.float32), ((2, 3, 9), torch.bfloat16)):
        student, teacher = torch.randn(2, *shape).to(dtype)
        for weights in ((1.0, 0.0), (0.5, 0.5)):
            arguments = (student.requires_grad_(), teacher, active, 0.7, *weights)
            torch.library.opcheck(torch.ops.dparallel.distillation_loss.default, arguments)
            saved = torch.ops.dparallel.distillation_loss(*arguments)[1]
            given = (student.detach(), *arguments[1:], saved, torch.randn(6))
            torch.library.opcheck(torch.ops.dparallel.distillation_loss_backward.default, given)
            torch.library.opcheck(torch.ops.dparallel.distillation_loss_backward_.default, given)


@everywhere
def test_compiles_without_a_graph_break() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(z: Tensor, inplace: bool) -> Tensor:
        return dx.distillation_loss(2 * z, teacher, weight=weight, l1_weight=0.5, inplace=inplace)

    z, teacher, weight = torch.randn(2, 5, 40, requires_grad=True), torch.randn(2, 5, 40), torch.rand(2, 5)
    (b,) = torch.autograd.grad(dx.distillation_loss(2 * z, teacher, weight=weight, l1_weight=0.5), z)
    for inplace in (False, True):
        (a,) = torch.autograd.grad(loss(z, inplace), z)
        assert torch.equal(a, b)


# --- the gradient over the student's logits -----------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("vocab", [1, 33, 16391])
@pytest.mark.parametrize("sliced", [False, True])
@everywhere
def test_inplace_gives_the_same_gradient_in_the_memory_of_the_student(
    dtype: torch.dtype, vocab: int, sliced: bool
) -> None:
    states, teacher = torch.randn(2, 2, 5 + sliced, vocab).to(dtype)
    teacher, weight = teacher[:, :5], torch.tensor([[1.0, 0.0, 1.0, 0.5, 0.0], [0.0, 1.0, 1.0, 0.0, 2.0]])

    def gradients(inplace: bool) -> tuple[Tensor, Tensor, Tensor]:
        leaf = states.clone().requires_grad_()
        logits = (2 * leaf)[:, :5]
        logits.retain_grad()
        dx.distillation_loss(logits, teacher, weight=weight, l1_weight=0.3, inplace=inplace).backward()
        return leaf.grad, logits.grad, logits.detach()

    before = teacher.clone()
    (ours, own, memory), (expected, expected_own, values) = gradients(True), gradients(False)
    assert torch.equal(ours, expected)
    assert torch.equal(own, expected_own)
    assert torch.equal(memory, own)
    assert not torch.equal(values, expected_own)
    assert torch.equal(teacher, before)


@everywhere
def test_inplace_spares_a_teacher_in_the_same_storage() -> None:
    """Rows t of a sequence learn from rows t + 1: written over, they would be read as teachers next."""
    leaf, grads = torch.randn(2, 6, 40), []
    for inplace in (False, True):
        x = leaf.clone().requires_grad_()
        logits = 2 * x
        dx.distillation_loss(logits[:, 1:], logits[:, :-1], inplace=inplace).backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


@everywhere
def test_inplace_is_noticed_by_who_needs_the_logits() -> None:
    leaf, teacher = torch.randn(4, 30, requires_grad=True), torch.randn(4, 30)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        dx.distillation_loss(torch.tanh(leaf), teacher, inplace=True).backward()
    with pytest.raises(ValueError, match="inplace: expected the output of an op as logits"):
        dx.distillation_loss(leaf, teacher, inplace=True)
    with pytest.raises(ValueError, match="student: expected memory of its own for each element"):
        dx.distillation_loss((2 * leaf)[:1].expand(4, 30), teacher, inplace=True)
    assert dx.distillation_loss(leaf.detach(), teacher, inplace=True).isfinite()


@everywhere
def test_results_do_not_depend_on_the_batch_or_the_threads() -> None:
    student, teacher = torch.randn(2, 3, 4, 40003)
    whole = dx.distillation_loss(student, teacher, l1_weight=1.0, reduction="none")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = dx.distillation_loss(student[1:2], teacher[1:2], l1_weight=1.0, reduction="none")
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(whole[1:2], alone)


# --- what is refused ----------------------------------------------------------------------------


NOTHING = (
    "student: row {} gives no probability .* to an id to which the teacher gives some: the divergence is inf"
)
BAD_ROWS = [  # of which side, how many ids from the first on hold what, and what is said
    ("student", 1, math.nan, "student: row 4 holds NaN"),
    ("teacher", 1, math.nan, "teacher: row 4 holds NaN"),
    ("student", 5000, -math.inf, "student: row 4 has no logit above -inf"),
    ("teacher", 5000, -math.inf, "teacher: row 4 has no logit above -inf"),
    ("student", 1, -math.inf, NOTHING.format(4)),
    ("student", 1, math.inf, NOTHING.format(4)),
    ("student", 4999, -math.inf, NOTHING.format(4)),
]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize(("side", "count", "value", "said"), BAD_ROWS)
@every_level
def test_bad_rows_are_named(dtype: torch.dtype, side: str, count: int, value: float, said: str) -> None:
    rows = {"student": torch.randn(2, 4, 5000).to(dtype), "teacher": torch.randn(2, 4, 5000).to(dtype)}
    rows["teacher"][1, 0, 2] = 3.0
    rows[side][1, 0, :count] = value
    rows[side][1, 2] = math.nan  # comes later
    with refused(said):
        dx.distillation_loss(**rows)
    with refused(said):
        dx.distillation_loss(**rows, weight=torch.tensor([[0.0] * 4, [1.0, 0.0, 1.0, 0.0]]))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@every_level
def test_an_infinite_divergence_is_named_however_unlikely(dtype: torch.dtype) -> None:
    """Wherever in the row it is: the rule does not hang on how a row is cut. L1 is finite there."""
    student, teacher = torch.randn(2, 1, 40001).to(dtype)
    teacher[0, 20000] = 400.0  # all else has a probability of 0 in float32
    ways = [-math.inf] if dtype == torch.float16 else [-math.inf, torch.finfo(torch.bfloat16).min]
    for at, nothing in itertools.product((0, 19999, 20001, 40000), ways):
        holed, both, above = student.clone(), teacher.clone(), teacher.clone()
        holed[0, at] = nothing
        with refused(NOTHING.format(0)):
            dx.distillation_loss(holed, teacher)
        compare(holed, teacher, kl_weight=0.0, l1_weight=1.0)
        for way in ways:
            both[0, at] = way
            compare(holed, both)
            compare(student, both)
        holed[0, at] = above[0, at] = math.inf  # beside which all else has nothing
        assert dx.distillation_loss(holed, above).item() < 1e-30
        with refused(NOTHING.format(0)):
            dx.distillation_loss(holed, teacher)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"student": torch.zeros(2, 3, 5, dtype=torch.int64)}, "student: expected float32"),
        ({"student": torch.zeros(2, 3, 0)}, r"student: expected \(\.\.\., V\)"),
        ({"teacher": torch.zeros(2, 3, 4)}, r"teacher: expected torch.float32 \(2, 3, 5\) on cpu as the stu"),
        ({"teacher": torch.zeros(2, 3, 5).double()}, "teacher: expected torch.float32"),
        ({"teacher": torch.zeros(2, 3, 5).bool()}, "teacher: expected float32"),
        ({"weight": torch.ones(6)}, r"weight: expected floating point \(2, 3\)"),
        ({"weight": torch.ones(2, 3, dtype=torch.int64)}, "weight: expected floating point"),
        ({"weight": 1.0}, "weight: expected floating point .* got float"),
        ({"temperature": 0.0}, "temperature: expected a number from 1e-5 to 1e5, got 0.0"),
        ({"temperature": math.nan}, "temperature: expected"),
        ({"kl_weight": -1.0}, "kl_weight: expected a finite number >= 0, got -1.0"),
        ({"l1_weight": math.inf}, "l1_weight: expected a finite number >= 0, got inf"),
        ({"reduction": "mean"}, r"reduction: expected one of \['sum', 'none'\], got 'mean'"),
        ({"reduction": np.array(["sum", "none"])}, r"reduction: expected one of .*, got array"),
        ({"temperature": np.array([1.0, 2.0])}, "temperature: expected a finite number"),
    ],
)
def test_bad_arguments_are_named(change: dict, said: str) -> None:
    good = {"student": torch.zeros(2, 3, 5), "teacher": torch.zeros(2, 3, 5)}
    with pytest.raises(ValueError, match=said):
        dx.distillation_loss(**{**good, **change})
    with pytest.raises(TypeError, match="student: expected a Tensor, got list"):
        dx.distillation_loss([0.0], good["teacher"])
