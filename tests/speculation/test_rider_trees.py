"""Trees of riders: the best nodes, and the tokens that a plan of them brings."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest

from dparallel_ext.speculation.trees import Node, Tree, accepted_tokens, best_nodes, plan

pytest_plugins = ["taping"]


RANKS = ((0.5, 0.2, 0.1), (0.4, 0.25, 0.05), (0.3, 0.1, 0.2))


def trees_of(ranks: Any, depth: int, size: int) -> list[list[Node]]:
    """All trees of so many nodes, each with its value, in some topological order."""
    every = [[]]
    for _ in range(size):
        grown: dict[Any, list[Node]] = {}
        for nodes in every:
            paths: list[tuple[int, ...]] = [()]
            for node in nodes:
                paths.append((*paths[node.parent], node.rank))
            for parent, path in enumerate(paths):
                for rank in range(3):
                    if len(path) < depth and (*path, rank) not in paths:
                        value = math.prod(ranks[d][r] for d, r in enumerate((*path, rank)))
                        grown[frozenset([*paths, (*path, rank)])] = [
                            *nodes,
                            Node(parent, len(path), rank, value),
                        ]
        every = list(grown.values())
    return every


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_best_nodes_are_the_best_tree(depth: int) -> None:
    for size in range(7):
        found = best_nodes(RANKS, depth, size)
        possible = trees_of(RANKS, depth, size)
        if not possible:
            assert len(found) < size
            continue
        best = max(sum(node.value for node in nodes) for nodes in possible)
        assert sum(node.value for node in found) == pytest.approx(best)
        for number, node in enumerate(found, 1):
            assert node.parent < number
            above = 1.0 if node.parent == 0 else found[node.parent - 1].value
            assert node.value == pytest.approx(above * RANKS[node.depth][node.rank])


def test_no_other_trees_of_these_nodes_bring_more() -> None:
    """All numbers of nodes for each state, and all ways to ride, of a budget: two riders a chain at most."""
    ranks = RANKS[:2]
    for budget in range(1, 5):
        choices: list[list[Tree]] = []
        for state in range(3):
            choices.append([])
            for size in range(budget + 1):
                nodes = best_nodes(ranks, state, size)
                if len(nodes) < size:
                    continue
                for riders in itertools.product(range(3), repeat=1 + size):
                    if sum(riders) <= budget - size:
                        choices[-1].append(Tree(tuple(nodes), riders))
        best = max(accepted_tokens(trees) for trees in itertools.product(*choices))
        found = plan(ranks, budget)
        assert found.tokens - 1 == pytest.approx(best, abs=1e-6), budget
        for tree in found.trees:
            assert len(tree.nodes) + sum(tree.riders) <= budget


def test_tokens_of_a_plan_are_those_of_the_long_run() -> None:
    """A rider behind the root alone: a guess in every second pass, or with two rows in each."""
    for chance in (0.25, 0.9):
        assert plan(((chance,),), 1).tokens == pytest.approx(1 + chance / 2, abs=1e-9)
        assert plan(((chance,),), 3).tokens == pytest.approx(1 + chance, abs=1e-9)


def test_tokens_of_a_plan_are_those_of_a_walk() -> None:
    rng = random.Random(0)
    for budget in (3, 8, 30):
        found = plan(RANKS, budget)
        state, tokens, passes = 0, 0, 20000
        for _ in range(passes):
            tree, at = found.trees[state], 0
            while True:
                rank, depth = rng.random(), 0 if at == 0 else tree.nodes[at - 1].depth + 1
                children = [i for i, node in enumerate(tree.nodes, 1) if node.parent == at]
                shares = RANKS[depth] if depth < 3 else ()
                true = next((r for r in range(len(shares)) if rank < sum(shares[: r + 1])), None)
                child = next((i for i in children if tree.nodes[i - 1].rank == true), None)
                tokens += 1
                if child is None:
                    break
                at = child
            state = tree.riders[at]
        assert tokens / passes == pytest.approx(found.tokens, rel=0.02)


def test_more_rows_bring_more() -> None:
    tokens = [plan(RANKS, budget).tokens for budget in range(20)]
    assert tokens[0] == 1.0
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(tokens))
    nothing = plan(((0.0,) * 3,) * 3, 8)
    assert nothing.tokens == 1.0
    assert all(not tree.nodes for tree in nothing.trees)
