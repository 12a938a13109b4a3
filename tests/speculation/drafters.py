"""Drafters for tests: they know the text, or half of it, and guess in every shape."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dparallel_ext.speculation import Draft, Lane


class Knowing:
    """Guesses the tokens of `texts` (one for each lane, prompt and all), each right with probability `right`,
    in chains or in random trees."""

    taps: tuple[int, ...] = ()

    def __init__(
        self,
        texts: Sequence[Tensor],
        *,
        right: float = 0.8,
        tree: bool = False,
        most: int = 12,
        ragged: bool = True,
        seed: int = 0,
    ) -> None:
        self.texts, self.right, self.tree, self.most = [t.tolist() for t in texts], right, tree, most
        self.rng, self.ragged = random.Random(seed), ragged

    def check(self, model: Any) -> None:
        self.vocabulary = model.shape.rows

    def session(self, model: Any, kv_cache: Any, lanes: int, *, graphs: bool = True) -> Knowing:
        return self

    def reset(self, lane: int) -> None:
        pass

    def observe(self, metadata: Any, taps: Sequence[Tensor]) -> None:
        pass

    def moved(self, source: Tensor, target: Tensor) -> None:
        pass

    def propose(self, lanes: Sequence[Lane], sizes: Sequence[int]) -> list[Draft]:
        return [self._draft(lane, most) for lane, most in zip(lanes, sizes, strict=True)]

    def _draft(self, lane: Lane, most: int) -> Draft:
        text, known = self.texts[lane.lane], len(lane.tokens)
        tokens: list[int] = []
        parents: list[int] = []
        depths = [0]
        for node in range(self.rng.randint(0, most) if self.ragged else most):
            parent = self.rng.randint(max(0, node - 3), node) if self.tree else node
            at = known + depths[parent]
            depths.append(depths[parent] + 1)
            knows = at < len(text) and self.rng.random() < self.right
            tokens.append(text[at] if knows else self.rng.randrange(self.vocabulary))
            parents.append(parent)
        return Draft(tuple(tokens), tuple(parents) if self.tree else None)
