"""Trees of tokens that the model itself held likely in earlier passes: Token Recycling, arXiv 2408.08696.

    matrix    (V, k): behind each token the k tokens that the model held most probable when a pass last had
              logits behind it; nothing behind a token that no such row has had
    update    in every pass of the model, by every row with logits: the root's and the rows of all nodes, also
              of nodes that are then refused. Of rows with one token the last counts
    draft     a static tree, filled from the root on: the node of rank r behind a token has its r-th best
              token. Nodes without a token are left out, with all behind them

The paper's tree has 80 nodes, found by a search; here it is the n nodes of the highest products of `RANKS`,
best first, so the tree of each size is the beginning of the largest. Nothing is trained, and nothing depends
on the text: a matrix that has met a token in one request guesses what follows it in the next.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..cache import KVCache
from ..decoding.sequence_settings import grouped
from ..models import Model
from ..ops import row_topk
from ..packed import Packing, unpack
from .ddtree import NODES
from .draft import Draft
from .drafter import Drafter, DraftKey, DraftSession, Lane, Observation, RecordedSession
from .trees import Node, best_nodes

RANKS = (0.5, 0.12, 0.06, 0.04, 0.03, 0.02, 0.015, 0.01)
"""How often the model's choice is the best token of the matrix behind the token before, the second, ..."""
DEPTH = 8
"""The most tokens that a pass can accept."""


class Recycling(Drafter):
    """Token Recycling, see above: it needs no training, and goes with every model.

    A session has one matrix for all of its lanes. Other sequences, in the batch now or earlier, change a
    sequence's drafts and thus its number of passes, but never its text. `speculate` begins with an empty
    matrix; an Engine keeps its matrix from request to request.
    """

    most = NODES

    def __init__(self) -> None:
        self.nodes = best_nodes((RANKS,) * DEPTH, DEPTH, NODES)

    def __repr__(self) -> str:
        return "Recycling()"

    def expected(self, size: int) -> float:
        """The tokens that a pass emits on average if its draft has `size` nodes, by `RANKS`."""
        return 1.0 + sum(node.value for node in self.nodes[:size])

    def session(self, model: Model, kv_cache: KVCache, lanes: int, *, graphs: bool = True) -> DraftSession:
        return _Session(self.nodes, model, graphs)


class _Session(RecordedSession):
    def __init__(self, nodes: Sequence[Node], model: Model, graphs: bool) -> None:
        super().__init__(None, model, graphs)
        self._nodes, vocabulary = nodes, model.shape.embedding_size
        self._depth = 1 + max(node.depth for node in nodes)
        tree = [[node.parent for node in nodes], [node.rank for node in nodes]]
        self._parent, self._rank = torch.tensor(tree, device="cpu").to(model.device)
        self._width = min(len(RANKS), vocabulary)
        # (V + 1, k) int64. The last row is that of the token -1: behind a node without a token there is none.
        self.matrix = torch.full((vocabulary + 1, len(RANKS)), -1, device=model.device)
        self.size = self.matrix.nbytes

    def begin(self) -> None:
        self.matrix.fill_(-1)

    def observe(self, seen: Observation) -> None:
        token = seen.ids[seen.source]  # (M,)
        best = row_topk(seen.logits, self._width, check=False).token  # (M, k); -1: no more tokens, or NaN
        # Rows with one token all write the guesses of the last of them, so their order does not matter.
        row = torch.arange(len(token), device=token.device)
        last = row.new_zeros(len(self.matrix)).scatter_reduce_(0, token, row, "amax")
        self.matrix[token, : self._width] = best[last[token]]

    def propose(self, lanes: Sequence[Lane], sizes: Sequence[int]) -> list[Draft]:
        packing, (numbers, groups) = Packing(), grouped(lane.sampling.greedy for lane in lanes)
        count = len(lanes) if self._pad_to is None else self._pad_to(len(lanes))
        packing.padded([int(lane.tokens[-1]) for lane in lanes], -1, count)
        packing.padded(numbers, -1, count)
        trees = self._run_pass(packing, (), groups).tolist()
        return [self._draft(tree, size) for tree, size in zip(trees, sizes, strict=False)]

    def _compute(self, key: DraftKey, inputs: Tensor) -> Tensor:
        """(B, n) int64: the tokens of the largest tree's nodes behind each lane's root; -1: none."""
        roots, group = unpack(inputs, key.shapes)
        tokens = roots[:, None].expand(-1, 1 + len(self._nodes))
        for _ in range(self._depth):  # each round the nodes of one depth more are those behind their parents
            behind = self.matrix[tokens[:, self._parent], self._rank]
            tokens = torch.cat((roots[:, None], behind), 1)
        for number, out in key.suppressed(len(self.matrix)).items():
            behind = behind.masked_fill((group == number)[:, None] & out[behind], -1)
        return behind

    def _draft(self, tree: Sequence[int], size: int) -> Draft:
        """The first `size` nodes of a tree that have a token, and whose parents have."""
        tokens: list[int] = []
        parents: list[int] = []
        place = {0: 0}  # a node of the tree -> its number in the draft
        for number, (node, token) in enumerate(zip(self._nodes, tree, strict=True), 1):
            if token >= 0 and node.parent in place and len(tokens) < size:
                tokens.append(token)
                parents.append(place[node.parent])
                place[number] = len(tokens)
        return Draft(tuple(tokens), tuple(parents))
