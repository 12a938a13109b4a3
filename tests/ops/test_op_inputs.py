"""What every op makes of inputs: any strides, sizes of zero, indices out of bounds, memory that overlaps,
gradients. By its documented function, through torch.ops and under torch.compile alike."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import EMULATED, OF_AN_OP, everywhere, layouts
from op_examples import DTYPES, FUNCTIONS, MASK, OPS, copied, documented, examples, flat, op_of, same
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext import ops, policies

BY_VECTORS = ("rms_norm", "block_attention", "kv_write")
"""The ops that a GPU sums in another order where vectors of 16 bytes do not fit."""

BY_TORCH = ("linear_kv_write",)
"""On a CPU its product is torch's, whose order of sums depends on strides where there are several threads."""


def as_found(name: str, found: list[Any], expected: list[Any]) -> bool:
    """`same`, or to the rounding of their dtype the numbers of `BY_TORCH`, and by a GPU's kernels those of
    `BY_VECTORS`."""
    by_a_gpu = EMULATED or any(isinstance(t, Tensor) and t.is_cuda for t in expected)
    if name not in BY_TORCH and not (name in BY_VECTORS and by_a_gpu):
        return same(found, expected)
    return all(
        bool(((x - y).abs() <= 4 * torch.finfo(y.dtype).eps * y.abs().max()).all())
        if isinstance(y, Tensor) and y.is_floating_point()
        else same([x], [y])
        for x, y in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPS)
@everywhere
def test_ops_take_any_strides(name: str, dtype: torch.dtype) -> None:
    given = examples(dtype)[name]
    op, plain = op_of(name), copied(given)
    expected = flat(op(*plain))
    changed = {a.name for a in op.default._schema.arguments if a.is_write}
    for i, argument in enumerate(op.default._schema.arguments):
        if i >= len(given) or not isinstance(given[i], Tensor) or argument.name == "counters":
            continue
        for other in layouts(given[i]):
            if argument.name in changed and 0 in other.stride():
                continue  # see the test of memory that overlaps
            call = copied(given)
            call[i] = other
            assert as_found(name, flat(op(*call)), expected), argument.name
            assert as_found(name, call, plain), argument.name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FUNCTIONS)
@everywhere
def test_functions_take_any_strides(name: str, dtype: torch.dtype) -> None:
    function, given = documented(dtype)[name]
    plain = copied(tuple(given.values()))
    expected = flat(function(**dict(zip(given, plain, strict=True))))
    for argument, value in given.items():
        if not isinstance(value, Tensor):
            continue
        for other in layouts(value):
            if argument == "tokens" and 0 in other.stride():
                continue
            call = dict(zip(given, copied(tuple(given.values())), strict=True))
            call[argument] = other
            assert as_found(name, flat(function(**call)), expected), argument
            assert as_found(name, list(call.values()), plain), argument


@pytest.mark.parametrize("name", OPS)
@everywhere
def test_compiled_ops_take_any_strides(name: str) -> None:
    given = examples(torch.float32)[name]
    plain, op = copied(given), op_of(name)
    expected = flat(op(*plain))
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=False)
    def run(*arguments: Any) -> Any:
        return op(*arguments)

    for number in range(3):
        call = copied(given)
        for i, argument in enumerate(given):
            if isinstance(argument, Tensor) and op.default._schema.arguments[i].name != "counters":
                call[i] = list(layouts(argument))[number]
        assert as_found(name, flat(run(*call)), expected)
        assert as_found(name, call, plain)


@pytest.mark.parametrize("name", ["linear_kv_write", "unmask_ of windows"])
def test_functions_compile_for_any_size(name: str) -> None:
    """They compute with sizes, and read tables of numbers, that are symbols then."""
    function, given = documented(torch.float32)[name]
    call, plain = (dict(zip(given, copied(tuple(given.values())), strict=True)) for _ in range(2))
    torch._dynamo.reset()
    with torch.no_grad():
        run = torch.compile(lambda **a: function(**a), fullgraph=True, backend="aot_eager", dynamic=True)
        assert same(flat(run(**call)), flat(function(**plain)))
    assert same(list(call.values()), list(plain.values()))


@pytest.mark.parametrize("name", OPS)
@everywhere
def test_truth_is_any_byte_but_zero(name: str) -> None:
    """As in torch: a view of bytes as bools may hold others than 0 and 1."""
    given = examples(torch.float32)[name]
    bools = [i for i, a in enumerate(given) if isinstance(a, Tensor) and a.dtype == torch.bool]
    for byte in (2, 255) if bools else ():
        plain, call = copied(given), copied(given)
        for i in bools:
            call[i] = (plain[i].to(torch.uint8) * byte).view(torch.bool)
        assert same(flat(op_of(name)(*call)), flat(op_of(name)(*plain)))
        assert same(
            [a for i, a in enumerate(call) if i not in bools],
            [a for i, a in enumerate(plain) if i not in bools],
        )


@pytest.mark.parametrize("name", OPS)
def test_dtypes_and_shapes_are_checked(name: str) -> None:
    """An error names the argument, what came and what was expected, whoever calls."""
    given = examples(torch.float32)[name]
    for argument, place in zip(op_of(name).default._schema.arguments, range(len(given)), strict=False):
        if not isinstance(given[place], Tensor) or argument.name == "counters":
            continue
        call = copied(given)
        other = torch.int64 if given[place].is_floating_point() else torch.float64
        call[place] = given[place].to(other)
        with pytest.raises(OF_AN_OP, match=rf"^{argument.name}: expected .*, got {str(other)[6:]}"):
            op_of(name)(*call)
        if argument.name == "like":  # of any shape
            continue
        call[place] = given[place][(None,) * 4]
        with pytest.raises(OF_AN_OP, match=r"^\w+: expected .*, got "):
            op_of(name)(*call)


OUT_OF_BOUNDS = [
    ("row_stats", 1, [6, 0], r"rows: expected in \[0, 6\), got 6 at 0"),
    ("row_stats", 1, [0, -1], r"rows: expected in \[0, 6\), got -1 at 1"),
    ("row_stats", 3, [40], r"suppress: expected in \[0, 40\), got 40"),
    ("row_stats", 3, [-5, 1], r"suppress: expected in \[0, 40\), got -5"),
    ("row_stats", 3, [2, 1], "suppress: expected ascending ids"),
    ("row_stats", 4, [[0, 1, 2], [3, 40, 0]], r"ids: expected in \[0, 40\), got 40 at 4"),
    ("row_stats", 4, [-1], r"ids: expected in \[0, 40\), got -1"),
    ("row_topk", 2, [6, 0], r"rows: expected in \[0, 6\), got 6 at 0"),
    ("row_topk", 4, [2, 41], r"suppress: expected in \[0, 40\), got 41 at 1"),
    ("row_topk", 4, [2, 1], "suppress: expected ascending ids"),
    ("row_topk", 1, 33, "k: expected 1 to 32, got 33"),
    ("class_stats", 2, [0, 30, 41, 41], r"offsets: expected in \[0, 41\), got 41 at 2"),
    ("class_stats", 2, [0, 30, 20, 40], "offsets: expected ascending numbers"),
    ("best_path", 1, [0, 4], r"begin: expected in \[0, 4\), got 4 at 1"),
    ("best_path", 2, [-1, 3], r"end: expected in \[0, 4\), got -1 at 0"),
    ("best_path", 3, [0, 2], r"enter: expected in \[0, 2\), got 2 at 1"),
    ("best_path", 5, [0, 1, -1], r"origin: expected in \[0, 2\), got -1 at 2"),
    ("best_path", 6, [0, 2, 1], r"edge_class: expected in \[0, 2\), got 2 at 1"),
    ("best_path", 7, [0, 4, 3], r"edge_offsets: expected in \[0, 4\), got 4 at 1"),
    ("best_path", 7, [1, 0, 3], "edge_offsets: expected ascending numbers"),
    ("unmask_", 8, [2**40], "suppress: expected in"),
    ("unmask_", 3, [0, 2], r"lane: expected in \[0, 2\), got 2 at 1"),
    ("unmask_", 3, [-(2**62), 1], "lane: expected in"),
    (
        "unmask_",
        3,
        [1, 1],
        r"do not overlap, got \[0, 3\) and \[0, 2\), .* of sequence 1",
    ),
    ("commit_", 1, [0, 2, 6], r"positions: expected in \[0, 6\), got 6 at 2"),
    ("commit_", 5, [2, 0], r"lane: expected in \[0, 2\), got 2 at 0"),
    ("accept", 2, [-1, 0, 2, -1, 0, 0], r"parent: expected in \[0, 2\), got 2 at row 2 of lane 1"),
    ("accept", 3, [3, -1], r"q_start: expected in \[0, 7\), got -1 at 1"),
    ("accept", 4, [2**62, 3], r"q_end: expected in \[0, 7\), got 4611686018427387904 at 0"),
    ("accept", 3, [2, 0], r"do not overlap, got \[2, 6\) and \[0, 3\), lanes 0 and 1"),
    ("accept", 5, [0, -1], "room: expected >= 0, got -1 at 1"),
    ("accept", 8, [1, 40], r"suppress: expected in \[0, 40\), got 40"),
    ("accept", 13, 2, "max_q_len: expected at least 3, the rows of lane 0, got 2"),
    ("accept", 13, 2**31, r"max_q_len: expected in \[0, 2147483648\), got 2147483648"),
    ("kv_write", 5, [0, 1, 2, 3, 4, 9], r"positions: expected in \[0, 9\), got 9 at 5"),
    ("kv_write", 5, [0, -(2**62), 2, 3, 4, 5], "positions: expected in"),
    ("kv_write", 6, [0, 1, 2, 3, 4, 16], r"slot_mapping: expected in \[0, 16\), got 16 at 5"),
    ("kv_move", 1, [[1, 2], [16, -1]], r"source: expected in \[0, 16\), got 16 at 2"),
    ("kv_move", 2, [[0, 2**62], [9, 4]], r"target: expected in \[0, 16\), got 4611686018427387904 at 1"),
    ("kv_move", 2, [[0, 1], [1, 4]], "target: .* share no slot, got slot 1 in lanes 0 and 1"),
    ("block_attention", 3, [-1, 3], r"q_start: expected in \[0, 7\), got -1 at 0"),
    ("block_attention", 3, [3, 3], "q_start: expected no larger than q_end, got 3 above 2 at 0"),
    (
        "block_attention",
        3,
        [0, 1],
        r"segments that do not overlap, got \[0, 2\) and \[1, 6\), segments 0 and 1",
    ),
    ("certainty_forcing_loss", 4, 0.0, "ce_temperature: expected a number from 1e-5 to 1e5, got 0"),
    (
        "certainty_forcing_loss_backward_",
        3,
        math.inf,
        "temperature: expected a number from 1e-5 to 1e5, got inf",
    ),
    ("distillation_loss_backward", 5, math.nan, "l1_weight: expected a finite number >= 0, got nan"),
    ("block_attention", 4, [2, 7], r"q_end: expected in \[0, 7\), got 7 at 1"),
    ("block_attention", 5, [5, 9], r"kv_lens: expected in \[0, 9\), got 9 at 1"),
    ("block_attention", 5, [-1, 0], "kv_lens: expected in"),
    ("block_attention", 6, [[3, 1], [0, 4]], r"block_table: expected in \[0, 4\), got 4 at 1"),
    ("block_attention", 6, [[-1, 1], [0, 2]], r"block_table: expected in \[0, 4\), got -1 at 0"),
    ("block_attention", 7, -1, "max_q_len: expected >= 0, got -1"),
]


@pytest.mark.parametrize(("name", "place", "value", "said"), OUT_OF_BOUNDS)
def test_indices_are_checked(name: str, place: int, value: Any, said: str) -> None:
    call = copied(examples(torch.float32)[name])
    call[place] = torch.tensor(value, dtype=call[place].dtype) if isinstance(value, list) else value
    with pytest.raises(OF_AN_OP, match=said):
        op_of(name)(*call)


@pytest.mark.parametrize(("name", "place", "value", "said"), OUT_OF_BOUNDS[::5])
def test_indices_are_checked_under_compile(name: str, place: int, value: Any, said: str) -> None:
    call = copied(examples(torch.float32)[name])
    call[place] = torch.tensor(value, dtype=call[place].dtype) if isinstance(value, list) else value
    torch._dynamo.reset()
    run = torch.compile(lambda *a: op_of(name)(*a), fullgraph=True, backend="aot_eager")
    with pytest.raises(OF_AN_OP, match=said):
        run(*call)


@pytest.mark.parametrize(
    ("positions", "said"),
    [
        ([0, 6], r"positions: expected in \[0, 6\), got 6 at 1"),
        ([-1, 2], r"positions: expected in \[0, 6\), got -1 at 0"),
        ([2, 2], "positions: expected strictly ascending"),
        ([3, 2], "positions: expected strictly ascending"),
    ],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_positions_are_checked(positions: list[int], said: str, compiled: bool) -> None:
    def step(tokens: Tensor, logits: Tensor, at: Tensor) -> Tensor:
        return dx.unmask_(tokens, logits, mask_id=MASK, positions=at, policy=policy).committed

    policy, tokens = policies.make(batch=2), torch.full((2, 3), MASK)
    run = torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step
    kind = OF_AN_OP if compiled else ValueError
    with pytest.raises(kind, match=said):
        run(tokens, torch.randn(2, 9), torch.tensor(positions))
    assert bool((tokens == MASK).all())
    with pytest.raises(kind, match="positions: expected in"):  # was a division by zero
        run(tokens[:, :0], torch.randn(2, 9), torch.tensor([0, 1]))


def test_functions_check_indices_under_compile() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def entropy(logits: Tensor, rows: Tensor) -> Tensor:
        return dx.row_stats(logits, rows=rows).entropy

    logits = torch.randn(4, 9)
    assert torch.equal(entropy(logits, torch.tensor([3])), dx.row_stats(logits[3:]).entropy)
    with pytest.raises(OF_AN_OP, match=r"rows: expected in \[0, 4\), got 10000000000 at 0"):
        entropy(logits, torch.tensor([10**10]))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def token(logits: Tensor, ids: Tensor) -> Tensor:
        return dx.row_stats(logits, suppress=ids).token + dx.row_stats(logits, suppress=[8, 1, 8]).token

    ids = torch.tensor([7, 2, 7])
    expected = dx.row_stats(logits, suppress=[2, 7]).token + dx.row_stats(logits, suppress=[1, 8]).token
    assert torch.equal(token(logits, ids), expected)
    with pytest.raises(OF_AN_OP, match=r"suppress: expected in \[0, 9\), got 9"):
        token(logits, ids + 2)


@pytest.mark.parametrize("compiled", [False, True])
def test_scores_without_an_order_are_not_sorted(compiled: bool) -> None:
    score = torch.rand(1, 3000)
    call = [score, score, score.clone(), score < 2, policies.make()]
    call[2][:, 7::3] = torch.nan
    run = torch.compile(op_of("select"), fullgraph=True, backend="aot_eager")
    with pytest.raises(OF_AN_OP, match="entropy: NaN at eligible position 7 of sequence 0"):
        (run if compiled else op_of("select"))(*call)


@everywhere
def test_sizes_of_zero() -> None:
    none, ints = torch.empty(0, 9), torch.empty(0, dtype=torch.int64)
    assert dx.row_stats(torch.randn(3, 9), rows=ints).token.shape == (0,)
    assert dx.row_stats(none, rows=ints, temperature=1.0).sample.shape == (0,)
    for shape in ((0, 4), (3, 0)):
        stats = dx.row_stats(torch.empty(*shape, 9))
        assert dx.row_topk(torch.empty(*shape, 9), 2).token.shape == (*shape, 2)
        assert dx.select(stats, stats.token >= 0, policies.make(batch=shape[0])).shape == shape
        rows = dx.rms_norm(torch.empty(*shape, 8), torch.ones(8), eps=1e-5)
        assert rows.shape == dx.swiglu(torch.empty(*shape, 16)).shape == (*shape, 8)
        leaf = torch.empty(*shape, 9, requires_grad=True)
        loss = dx.certainty_forcing_loss(leaf, stats.token, stats.token > 0).loss
        loss.backward()
        assert float(loss.detach()) == 0.0
        assert float(dx.distillation_loss(leaf, leaf.detach().clone()).detach()) == 0.0
    for out, count in ((0, 3), (5, 0), (0, 0)):
        weight, scale = dx.quantize_fp8(torch.randn(out, 16))
        assert dx.fp8_linear(torch.randn(count, 16), weight, scale).shape == (count, out)
        assert dx.fp8_linear(torch.randn(count + 300, 16), weight, scale).shape == (count + 300, out)
    weight, scale = torch.empty(5, 0).to(torch.float8_e4m3fn), torch.ones(5)
    assert op_of("fp8_widen")(weight, scale, none).shape == (5, 0)
    assert not op_of("fp8_linear")(torch.empty(3, 0), weight, scale, None).any()
    with pytest.raises(OF_AN_OP, match="weight: expected gates and as many ups, got 0 rows"):
        op_of("linear_swiglu")(torch.randn(3, 16), torch.randn(0, 16), None, None)
    none_of_many = torch.full((1, 1), -1).expand(2**45, 1)[:, :0]
    dx.kv_move(torch.randn(1, 2, 1, 1, 4, 2), none_of_many, none_of_many)


@pytest.mark.parametrize("shape", [(0, 4, 8), (6, 0, 8), (6, 4, 0), (0, 0, 0)])
@everywhere
def test_attention_of_sizes_of_zero(shape: tuple[int, ...]) -> None:
    count, _, dim = shape
    q, k, v = torch.randn(shape), torch.randn(count, 2, dim), torch.randn(count, 2, dim)
    at, nowhere = torch.arange(count), torch.full((count,), -1)
    cos, sin = torch.ones(9, dim // 2), torch.zeros(9, dim // 2)
    for pages in (0, 2):
        k_cache, v_cache = torch.randn(2, pages, 2, 4, dim)
        tables = {"cos": cos, "sin": sin}
        dx.kv_write(q, k, v, k_cache, v_cache, positions=at, slot_mapping=at if pages else nowhere, **tables)
        for layers in (0, 2):
            dx.kv_move(torch.randn(layers, 2, pages, 2, 4, dim), *torch.full((2, 1, 1), pages - 1))
            dx.kv_move(torch.randn(layers, 2, pages, 0, 4, dim), nowhere[:, None], nowhere[:, None])
        for segments in (0, 1):
            begin, lengths = torch.zeros(2, segments, dtype=torch.int64)
            table = torch.zeros(segments, min(pages, 1), dtype=torch.int64)
            ranges = {"q_start": begin, "q_end": begin + count, "block_table": table}
            out = dx.block_attention(q, k_cache, v_cache, lengths, **ranges)
            assert out.shape == shape
            assert not out.any()  # nothing is seen
    four = dx.block_attention(torch.randn(0, 3, 4, 8), *torch.randn(2, 0, 2, 4, 8), nowhere[:0])
    assert four.shape == (0, 3, 4, 8)


def test_inputs_are_on_one_device() -> None:
    """torch computes nothing if one of them is on "meta": the results of the rest would be left unwritten."""
    for name, given in examples(torch.float32).items():
        arguments = op_of(name).default._schema.arguments
        for place, value in enumerate(given):
            if isinstance(value, Tensor) and arguments[place].name != "counters":
                call = copied(given)
                call[place] = value.to("meta")
                with pytest.raises(ValueError, match=r"^\w+: expected on (cpu|meta) as \w+, got (cpu|meta)$"):
                    op_of(name)(*call)
    functions = documented(torch.float32)
    for name in ("kv_write", "block_attention"):  # by torch in float64
        function, named = functions[name]
        heads = {
            n: t.double() for n, t in named.items() if n in ("q", "k", "v") or n.endswith(("cache", "norm"))
        }
        functions[f"{name} in float64"] = function, {**named, **heads}
    for function, named in functions.values():
        for name, value in named.items():
            if isinstance(value, Tensor) and name != "policy":  # which is read, and moved
                with pytest.raises(ValueError, match=r"^(\w+\.)?\w+: expected .*\bmeta\b"):
                    function(**{**named, name: value.to("meta")})
    x = torch.randn(5, 24)
    with pytest.raises(ValueError, match="weight: expected on cpu as x, got meta"):
        dx.linear(x, x.to("meta"))


def test_functions_name_an_argument_of_another_type() -> None:
    """Each tensor replaced by a text, and by None where it has no default; and numbers that are none."""
    tried = 0
    for function, given in documented(torch.float32).values():
        if function.__module__.startswith("dparallel_ext."):  # not a wrapper of op_examples
            defaults = inspect.signature(function).parameters
            for name, value in given.items():
                others = ("text", None) if defaults[name].default is inspect.Parameter.empty else ("text",)
                for other in others if isinstance(value, Tensor) else ():
                    with pytest.raises((TypeError, ValueError), match=rf"^(\w+\.)?{name}: expected"):
                        function(**{**given, name: other})
                    tried += 1
    assert tried > 60
    z, x, w = torch.randn(2, 3, 40), torch.randn(5, 24), torch.randn(7, 24)
    tokens, score, ids = torch.full((2, 3), MASK), torch.rand(2, 3), torch.zeros(2, 3, dtype=torch.int64)
    of_loss = {"labels": ids, "active": ids == 0}
    of_linear = {"hidden": torch.randn(2, 3, 24), "lm_head_weight": w, **of_loss}
    of_attention, of_cache = (documented(torch.float32)[name][1] for name in ("block_attention", "kv_write"))
    masks = dx.semi_autoregressive_masks
    linear_loss = dx.linear_certainty_forcing_loss
    calls: dict[str, Callable[[], Any]] = {
        "suppress": lambda: dx.row_stats(z, suppress=3.5),
        "ids": lambda: dx.row_stats(z, ids=3.5),
        "mask_id": lambda: dx.commit_(tokens, mask_id=10**30),
        "position_offset": lambda: dx.unmask_(tokens, z, mask_id=MASK, position_offset=0.5),
        "stats.confidence": lambda: dx.select("text", score > 0, policies.make(batch=2)),
        "eps": lambda: dx.rms_norm(x, x[0], eps="text"),
        "eps below 0": lambda: dx.rms_norm(x, x[0], eps=-1e-5),
        "eps of kv_write": lambda: dx.kv_write(**{**of_cache, "eps": math.nan}),
        "bias": lambda: dx.linear(x, w, "text"),
        "scale": lambda: dx.block_attention(**of_attention, scale="text"),
        "scale that is none": lambda: dx.block_attention(**of_attention, scale=math.nan),
        "length": lambda: dx.rope_table(-1, 8),
        "theta": lambda: dx.rope_table(9, 8, "text"),
        "weight": lambda: dx.quantize_fp8("text"),
        "hidden": lambda: linear_loss(**{**of_linear, "hidden": "text"}),
        "lm_head_weight": lambda: linear_loss(**{**of_linear, "lm_head_weight": "text"}),
        "input_ids": lambda: masks([1], ids, mask_id=MASK),
        "eps of masks": lambda: masks(ids, ids[:, 0], mask_id=MASK, eps="text"),
        "mask_ratio": lambda: masks(ids, ids[:, 0], mask_id=MASK, mask_ratio="text"),
    }
    for name, call in calls.items():
        with pytest.raises((TypeError, ValueError), match=f"^{name.partition(' ')[0]}: expected"):
            call()
    assert dx.certainty_forcing_loss(z, **of_loss, entropy_weight=10**30).loss > 0


@pytest.mark.filterwarnings("ignore:Sparse CSR|The PyTorch API of nested")
@pytest.mark.parametrize("kind", ["sparse_coo", "sparse_csr", "nested"])
def test_tensors_that_are_not_dense_are_named(kind: str) -> None:
    x, labels, head = torch.randn(4, 8), torch.tensor([0, 1, 2, 3]), torch.randn(9, 8)
    made = {
        "sparse_coo": lambda x: x.to_sparse(),
        "sparse_csr": lambda x: x.to_sparse_csr(),
        "nested": lambda x: torch.nested.nested_tensor(list(x)),
    }[kind]
    other, wanted = made(x), labels >= 0
    calls: dict[str, list[Callable[[], Any]]] = {
        "logits": [
            lambda: dx.row_stats(other),
            lambda: dx.row_topk(other, 2),
            lambda: dx.certainty_forcing_loss(other, labels, wanted),
        ],
        "student": [lambda: dx.distillation_loss(other, x)],
        "teacher": [lambda: dx.distillation_loss(x, other)],
        "labels": [lambda: dx.certainty_forcing_loss(x, other, wanted)],
        "hidden": [lambda: dx.linear_certainty_forcing_loss(other, head, labels, wanted)],
        "lm_head_weight": [lambda: dx.linear_certainty_forcing_loss(x, other, labels, wanted)],
        "x": [
            lambda: ops.rms_norm(other, x[0], eps=1e-5),
            lambda: dx.fp8_linear(other, *dx.quantize_fp8(head)),
        ],
        "gate": [lambda: ops.swiglu(other, x)],
        "up": [lambda: ops.swiglu(x, other)],
        "weight": [lambda: dx.quantize_fp8(other), lambda: ops.rms_norm(x, other, eps=1e-5)],
        "tokens": [lambda: dx.commit_(other, mask_id=1)],
        "q": [lambda: dx.block_attention(other, x, x, labels)],
    }
    for name, each in calls.items():
        for call in each:
            with pytest.raises(ValueError, match=f"{name}: expected a dense Tensor, got a {kind} one"):
                call()


@everywhere
def test_truth_is_no_number() -> None:
    z = torch.randn(2, 5)
    for name in ("seed", "sequence", "position", "step"):
        for value in (True, torch.tensor([True, False])):
            with pytest.raises(ValueError, match=f"{name}: expected an integer or int64"):
                dx.row_stats(z, temperature=1.0, **{name: value})
    with pytest.raises(ValueError, match="top_p: expected a number from 0 to 1, got True"):
        dx.row_stats(z, temperature=1.0, top_p=True)
    with pytest.raises(ValueError, match="suppress: expected token ids, got 5"):
        dx.row_stats(z, suppress=5)  # type: ignore[arg-type]


@everywhere
def test_changes_are_counted() -> None:
    """By the versions of tensors, so that autograd notices what it must not use."""
    for name in ("unmask_", "kv_write"):
        call = copied(examples(torch.float32)[name])
        op_of(name)(*call)
        changed = [a.is_write and a.name != "counters" for a in op_of(name).default._schema.arguments]
        versions = [a._version for a, written in zip(call, changed, strict=True) if written]
        assert min(versions) > 0
