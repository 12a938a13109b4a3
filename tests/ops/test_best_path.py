"""best_path against its oracle: ties, windows of any cells, forms with and without a way."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import everywhere
from forms import a_form
from torch import Tensor

from dparallel_ext import reference
from dparallel_ext.automaton import NOWHERE, Automaton, Tables
from dparallel_ext.ops.best_path import best_path


def on(like: Tensor, form: Automaton) -> Tables:
    return form.tables(like.device)


def wide_form(states: int, classes: int, edges: int) -> Automaton:
    generator = torch.Generator("cpu").manual_seed(states)
    cells = torch.randperm(states * classes, generator=generator, device="cpu")[:edges]
    transitions = torch.full((states * classes,), NOWHERE, device="cpu")
    transitions[cells] = torch.randint(states, (edges,), generator=generator, device="cpu")
    accepting = torch.rand(states, generator=generator, device="cpu") < 0.3
    token_class = torch.arange(2 * classes, device="cpu") % classes
    return Automaton(token_class, transitions.view(states, classes), accepting | ~accepting.any())


def windows_of(seed: int, form: Automaton, windows: int, cells: int) -> tuple[Tensor, ...]:
    generator = torch.Generator("cpu").manual_seed(seed)

    def whole(high: int) -> Tensor:
        return torch.randint(high, (windows,), generator=generator, device="cpu")

    begin = whole(cells + 1)
    length = whole(cells + 1)
    return begin, (begin + length).clamp(max=cells), whole(len(form.distance)), whole(2 * cells)


@pytest.mark.parametrize("cells", [1, 5, 33])
@pytest.mark.parametrize("seed", range(6))
@everywhere
def test_best_path_against_the_oracle(seed: int, cells: int) -> None:
    """Sums of whole numbers are exact, so that ties have to be the same too."""
    form = wide_form(70, 40, 300) if seed == 0 else a_form(seed)
    tables = on(torch.empty(0), form)
    classes = len(tables.offsets) - 1
    scores = torch.randint(-3, 1, (4, cells, classes)).float()
    scores[torch.rand(scores.shape) < 0.3] = -math.inf
    scores[0, :, 0] = math.nan
    where = [t.to(scores.device) for t in windows_of(seed, form, 4, cells)]
    found, expected = best_path(scores, *where, tables), reference.best_path(scores, *where, tables)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@everywhere
def test_more_states_than_shared_memory_holds() -> None:
    form = wide_form(4200, 3, 9000)
    tables = on(torch.empty(0), form)
    scores = -torch.randint(5, (1, 3, 3)).float()
    where = [torch.tensor([n]) for n in (0, 3, 0, 9)]
    found, expected = best_path(scores, *where, tables), reference.best_path(scores, *where, tables)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@everywhere
def test_a_path_that_ends_in_time_is_preferred() -> None:
    """Class 0 stays in state 0, class 1 leads to state 1, which accepts."""
    form = Automaton(*(t.cpu() for t in (torch.tensor([0, 1]), torch.tensor([[0, 1], [NOWHERE] * 2]),
                                         torch.tensor([False, True]))))  # fmt: skip
    tables = on(torch.empty(0), form)
    scores = torch.tensor([[0.0, -9.0]]).expand(1, 4, 2).contiguous()
    begin, end, enter = torch.tensor([0]), torch.tensor([4]), torch.tensor([0])
    for room, last in ((1, 0), (0, 1)):
        state, token_class = best_path(scores, begin, end, enter, torch.tensor([room]), tables)
        assert token_class.tolist() == [[0, 0, 0, last]]
        assert state.tolist() == [[0, 0, 0, 0, last]]
    state, token_class = best_path(scores, begin, end, enter + 1, torch.tensor([5]), tables)
    assert (state.tolist(), token_class.tolist()) == ([[1] * 5], [[-1] * 4])  # no way on from state 1
    state, token_class = best_path(scores, end, end, enter + 1, torch.tensor([5]), tables)
    assert (state.tolist(), token_class.tolist()) == ([[1] * 5], [[-1] * 4])  # no cell to fill


@pytest.mark.parametrize("shape", [(0, 4), (2, 0)])
@everywhere
def test_sizes_of_zero(shape: tuple[int, int]) -> None:
    tables = on(torch.empty(0), a_form(3))
    none = torch.zeros(shape[0], dtype=torch.int64)
    state, token_class = best_path(torch.empty(*shape, len(tables.offsets) - 1), *[none] * 4, tables)
    assert (state.shape, token_class.shape) == ((shape[0], shape[1] + 1), shape)


@everywhere
def test_opcheck() -> None:
    tables = on(torch.empty(0), a_form(3))
    scores = -torch.rand(2, 4, len(tables.offsets) - 1)
    places = [torch.tensor(n) for n in ([0, 1], [4, 3], [0, 0], [9, 9])]
    edges = (tables.origin, tables.edge_class, tables.edge_offsets)
    torch.library.opcheck(torch.ops.dparallel.best_path.default, (scores, *places, *edges, tables.distance))
