"""Draft trees of riders: which guesses to verify, and behind which of them to ride (PPD, arXiv 2405.18628).

    a[d][r]   measured: how often the true token is the one of rank r among those guessed for depth d + 1
    value     of a node: the product of a along its path, the chance that it is accepted. The best tree of m
              nodes is the m nodes of the highest values (a parent's is never below its child's)
    stop      the chance that a node is the last that is accepted: its value less its children's
    state     s, the riders behind that last node: so deep the next tree may be. There is a tree for each

Of a budget of rows each tree has m nodes, and the riders have the rest. One rider more behind a node, its
s-th, is worth stop x (h[s] - h[s - 1]), where h is what a state is worth: PPD takes the value V[s] of its
tree; here it is the value over all passes to come (the relative value of the Markov decision process whose
states are s and whose reward is V[s]), which begins with PPD's and is iterated. The number m of each tree is
the one that brings the most tokens a pass in the steady state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._C import draft_trees

Ranks = tuple[tuple[float, ...], ...]
"""a[d][r]: how often the token of rank r among the guesses for depth d is the true one, from 0 to 1."""
ROUNDS, CLOSE = 200, 1e-7
"""The most rounds of the iteration, and the change at which it ends."""
SETTLED = 20
"""The logarithm to base 2 of the passes after which a chain of states is in its steady state."""


class Node(NamedTuple):
    """A guess of a tree: the token of `rank` among those for `depth`, from 0."""

    parent: int
    """Among the root, 0, and the nodes from 1."""
    depth: int
    rank: int
    value: float


class Tree(NamedTuple):
    """The nodes that a pass verifies, and the riders that guess for the next."""

    nodes: tuple[Node, ...]
    riders: tuple[int, ...]
    """The number of riders behind the root and behind each node."""


class Plan(NamedTuple):
    """The trees of a budget of rows."""

    trees: tuple[Tree, ...]
    """For each state: the number of riders behind the node whose choice is the root."""
    tokens: float
    """Tokens of a pass in the steady state, if `ranks` hold."""


def best_nodes(ranks: Ranks, depth: int, most: int) -> list[Node]:
    """The `most` nodes of the highest values, of depths below `depth`, highest first: each prefix is a tree,
    and the best of its size. Nodes of value 0 are left out."""
    width = max(map(len, ranks), default=1)
    padded = [(*row, *[0.0] * (width - len(row))) for row in ranks[:depth]]
    order = [sorted(range(width), key=row.__getitem__, reverse=True) for row in padded]
    scores = [
        math.log(row[rank]) if row[rank] > 0 else -math.inf
        for row, best in zip(padded, order, strict=True)
        for rank in best
    ]
    (tree,) = draft_trees(scores, width, [len(order)], [most])
    cells = (divmod(cell, width) for cell in tree.cells)
    return [
        Node(parent, at, order[at][place], value)
        for parent, (at, place), value in zip(tree.parents, cells, tree.chances, strict=True)
    ]


class _Candidates:
    """The best trees of 0, 1, ..., M nodes for a state: the value of each, and where it stops."""

    def __init__(self, ranks: Ranks, state: int, budget: int) -> None:
        self.nodes = best_nodes(ranks, state, budget)
        count = len(self.nodes)
        values = torch.tensor([node.value for node in self.nodes], dtype=torch.float64, device="cpu")
        self.worth = torch.cat((values.new_zeros(1), values.cumsum(0)))
        """(M + 1,) V: the tokens that are accepted of the tree of m nodes."""
        self.stop = torch.zeros(count + 1, count + 1, dtype=torch.float64, device="cpu")
        """(M + 1, M + 1): the chance that the tree of m nodes stops at the root or at each node."""
        self.stop[:, 0] = 1.0
        for number, node in enumerate(self.nodes, 1):
            self.stop[number:, number] += node.value
            self.stop[number:, node.parent] -= node.value
        self.stop.clamp_(min=0.0)
        self.left = budget - torch.arange(count + 1, device="cpu")
        """(M + 1,) the rows that are left for riders."""

    def riders(self, worth: Tensor) -> Tensor:
        """(M + 1, M + 1) int64: the number of riders behind the root and each node of each tree, as its rows
        allow.

        worth: (n,) the gain of the s-th rider behind a node if the node is the last.
        """
        worth = worth.cummin(0).values.clamp(min=0.0)  # a rider needs the riders in front of it
        gain = self.stop[:, :, None] * worth  # (M + 1, M + 1, n)
        gain = gain.flatten(1)
        best = gain.argsort(dim=1, descending=True, stable=True)
        place = torch.empty_like(best).scatter_(
            1, best, torch.arange(gain.shape[1], device="cpu").expand_as(best)
        )
        chosen = (place < self.left[:, None]) & (gain > 0)
        return chosen.unflatten(1, (-1, len(worth))).sum(-1)


def plan(ranks: Ranks, budget: int) -> Plan:
    """The trees of at most `budget` rows behind the root, nodes and riders, that bring the most tokens a
    pass in the steady state; `ranks`: a row for each rider that a node may have."""
    most = len(ranks)
    states = [_Candidates(ranks, state, budget) for state in range(most + 1)]
    h = torch.tensor([float(state.worth[-1]) for state in states], dtype=torch.float64, device="cpu")
    h = h - h[0]
    for _ in range(ROUNDS):
        step = h.diff()
        best = [state.worth + (state.stop * h[state.riders(step)]).sum(1) for state in states]
        new = torch.stack([each.max() for each in best])
        new = 0.5 * (new - new[0]) + 0.5 * h  # half a step, so that it cannot oscillate
        close = float((new - h).abs().max()) < CLOSE
        h = new
        if close:
            break
    trees = []
    for state, each in zip(states, best, strict=True):
        size = int(each.argmax())
        riders = state.riders(h.diff())[size, : size + 1].tolist()
        trees.append(Tree(tuple(state.nodes[:size]), tuple(riders)))
    return Plan(tuple(trees), 1.0 + accepted_tokens(trees))


def accepted_tokens(trees: Sequence[Tree]) -> float:
    """The tokens of a draft that passes with these trees, one for each state, accept in the long run."""
    count = len(trees)
    step = torch.zeros(count, count, dtype=torch.float64, device="cpu")
    worth = torch.zeros(count, dtype=torch.float64, device="cpu")
    for state, tree in enumerate(trees):
        stop = [1.0, *(node.value for node in tree.nodes)]
        for node in tree.nodes:
            stop[node.parent] -= node.value
        for chance, riders in zip(stop, tree.riders, strict=True):
            step[state, riders] += chance
        worth[state] = sum(node.value for node in tree.nodes)
    # The mean over passes exists for a chain that goes in circles, too. A chain that stays in its state in
    # half of its passes has the same mean, and settles: this is its distribution after 2^SETTLED passes.
    passes = 0.5 * (step + torch.eye(count, dtype=torch.float64, device="cpu"))
    for _ in range(SETTLED):
        passes = passes @ passes
    share = passes[0] / passes[0].sum()  # behind a prompt nothing has been guessed
    return float(share @ worth)
