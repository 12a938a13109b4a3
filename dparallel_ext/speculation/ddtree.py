"""Trees for drafters of blocks: DDTree, arXiv 2604.12989. EAGLE-3 has others, see `eagle_trees`.

A pass of the drafter (`blocks`) says of each row of its block how likely each token is there, whatever stands
in front of it. The chain of the rows' argmaxes uses one token of each. Here the draft is a tree:

    node      a path of guesses, one of each row up to its own; its score is the sum of their
              log-probabilities, so its chance to be accepted is the product of the marginals
    draft     the n nodes of the highest scores, found best first (`csrc/runtime/draft_trees.h`): a node is
              never likelier than its parent, so they form a tree, and each beginning of them does

The model verifies all paths in one pass, so the text stays its own. The rows of a block do not know each
other's choice: the marginals are of texts that may differ, and a path may mix them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

from ..arguments import instance, whole
from ..cache import KVCache
from ..models import Model
from .blocks import BlockDrafter, Chains
from .draft import Draft
from .drafter import DraftSession

NODES = 64
"""The most nodes of a draft."""
WIDTH = 8
"""The default number of guesses of a row."""


class TreeDrafter(Chains):
    """Drafts trees of the guesses of a drafter of blocks.

    Args:
        blocks: a `DFlashDrafter`, a `SelfDrafter` or an `EagleDrafter`.
        width: from 1 to 16, the guesses of a row that nodes are made of, the likeliest; 1: drafts are chains.

    Raises ValueError for another width, and for more guesses than the drafter's vocabulary has tokens.
    """

    most = NODES

    def __init__(self, blocks: BlockDrafter, *, width: int = WIDTH) -> None:
        instance("blocks", blocks, BlockDrafter)
        self.blocks, self.width = blocks, whole("width", width, 1, blocks.guesses)
        self._trees = [0] * NODES
        """For each n, the number of trees that had an n-th node ..."""
        self._chances = [0.0] * NODES
        """... and the sum of that node's chances of being accepted."""

    def __repr__(self) -> str:
        return f"TreeDrafter({self.blocks!r}, width={self.width})"

    def check(self, model: Model) -> None:
        """Raise as the check of `blocks`."""
        self.blocks.check(model)

    def session(self, model: Model, kv_cache: KVCache, lanes: int, *, graphs: bool = True) -> DraftSession:
        blocks = copy.copy(self.blocks)
        blocks.drafting = self
        return blocks.session(model, kv_cache, lanes, graphs=graphs)

    def expected(self, size: int) -> float:
        """Tokens of a pass whose draft has `size` nodes, as the chances of the trees so far predict them."""
        pairs = zip(self._chances[:size], self._trees, strict=False)
        return 1.0 + sum(chance / trees for chance, trees in pairs if trees)

    def draft(self, tokens: Sequence[int], parents: Sequence[int], chances: Sequence[float]) -> Draft:
        for at, chance in enumerate(chances):
            self._trees[at] += 1
            self._chances[at] += chance
        return Draft(tuple(tokens), tuple(parents))
