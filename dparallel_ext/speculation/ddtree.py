"""Trees for drafters of blocks: DDTree, arXiv 2604.12989.

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

from collections.abc import Sequence

from .._C import DraftTree
from ..arguments import whole
from ..ops.row_topk import MOST as WIDEST
from .adapter import Adapter
from .blocks import Chains
from .dflash import BlockDrafter, DraftModel
from .draft import Draft
from .self_drafter import BLOCK, SelfDrafter

NODES = 64
"""The most nodes of a draft."""
WIDTH = 8
"""The default number of guesses of a row."""


class Trees(Chains):
    """A base in front of a drafter of blocks: the drafts become trees.

    width: from 1 to `most`, the guesses of a row that nodes are made of, the likeliest; 1: drafts are chains.
    Raises ValueError for another width.
    """

    def grow(self, width: int, most: int = WIDEST) -> None:
        self.width, self.most = whole("width", width, 1, most), NODES
        self._trees = [0] * NODES
        """For each n, the number of trees that had an n-th node ..."""
        self._chances = [0.0] * NODES
        """... and the sum of that node's chances of being accepted."""

    def expected(self, size: int) -> float:
        """Tokens of a pass whose draft has `size` nodes, as the chances of the trees so far predict them."""
        pairs = zip(self._chances[:size], self._trees, strict=False)
        return 1.0 + sum(chance / trees for chance, trees in pairs if trees)

    def draft(self, tree: DraftTree, guesses: Sequence[int]) -> Draft:
        for at, chance in enumerate(tree.chances):
            self._trees[at] += 1
            self._chances[at] += chance
        return super().draft(tree, guesses)._replace(parents=tuple(tree.parents))


class TreeDrafter(Trees, BlockDrafter):
    """Drafts trees from the blocks of a drafter's weights.

    Args:
        model, source: see `BlockDrafter`.
        width: from 1 to 16, the guesses of a row that nodes are made of, the likeliest; 1: drafts are chains.

    Raises ValueError for another width, or more guesses than the vocabulary has tokens.
    """

    def __init__(self, model: DraftModel, source: str = "drafter", *, width: int = WIDTH) -> None:
        super().__init__(model, source)
        self.grow(width, min(WIDEST, self.options.shape.embedding_size))


class SelfTrees(Trees, SelfDrafter):
    """Drafts trees from the masks of the model itself, see `SelfDrafter`.

    width: see `TreeDrafter`; a smaller vocabulary bounds it.
    """

    def __init__(self, block: int = BLOCK, adapter: Adapter | None = None, *, width: int = WIDTH) -> None:
        super().__init__(block, adapter)
        self.grow(width)
