"""How many nodes a draft has: as many as bring the most tokens per second, measured where it runs.

A pass over n more rows takes L(n) seconds and brings tau(n) tokens; drafts are sized by argmax tau(n) / L(n)
(PPD, arXiv 2405.18628), n = 0 being plain decoding. The text is the same for every size.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

from .drafter import Drafter, Expecting


class Sizer(Protocol):
    def size(self, lanes: int) -> int:
        """Nodes to ask for, for each of so many sequences."""

    def drafting(self) -> AbstractContextManager[None]:
        """Held while drafts are made."""

    def verifying(self) -> AbstractContextManager[None]:
        """Held while a pass runs, until its result is on the host."""

    def learn(self, asked: int, taken: int) -> None:
        """Of a draft of at most `asked` nodes so many were accepted."""


class Fixed:
    """Always the same number."""

    def __init__(self, nodes: int) -> None:
        self.nodes = nodes

    def size(self, lanes: int) -> int:
        return self.nodes

    def drafting(self) -> AbstractContextManager[None]:
        return nullcontext()

    def verifying(self) -> AbstractContextManager[None]:
        return nullcontext()

    def learn(self, asked: int, taken: int) -> None:
        pass


class Measured:
    """By seconds and acceptance so far, both as running means, in which the new counts for a part.

    Sizes are 0 and the powers of two up to `most`, and `most`. Each is tried a few times at first, and again
    every `EVERY` passes, since what it is worth changes with the text, the length and the batch.
    """

    EVERY, TRIALS, PART = 64, 2, 0.1

    def __init__(
        self,
        most: int,
        clock: Callable[[], float] = time.perf_counter,
        expected: Callable[[int], float] | None = None,
    ) -> None:
        """expected: see `drafter.Expecting`; None: drafts are taken for chains."""
        self._clock, self._expected = clock, expected
        self._worth = [1.0, 1.0]
        """With `expected`: tokens that were accepted of drafts, and those that were expected to be."""
        self.sizes = sorted({0, most, *(1 << bit for bit in range(most.bit_length()) if 1 << bit <= most)})
        self._seconds: dict[int, dict[int, list[float]]] = {}
        """By the number of sequences and by size: times asked for, and the mean seconds of draft and pass."""
        self._accepted = [0.5] * most
        """Of each depth: the share of drafts whose token there was accepted, of those accepted up to it. A
        draft that is shorter than it might have been has no such token."""
        self._entry: list[float] = [0, 0.0]
        self._passes, self._drafting = 0, 0.0

    def size(self, lanes: int) -> int:
        known = self._seconds.setdefault((lanes - 1).bit_length(), {size: [0, 0.0] for size in self.sizes})
        self._passes += 1
        asked = min(self.sizes, key=lambda size: known[size][0])
        if known[asked][0] >= self.TRIALS:
            if self._passes % self.EVERY == 0:
                asked = self.sizes[self._passes // self.EVERY % len(self.sizes)]
            else:
                asked = max(self.sizes, key=lambda size: self.tokens(size) / known[size][1])
        self._entry, self._drafting = known[asked], 0.0
        return asked

    def tokens(self, nodes: int) -> float:
        """How many tokens a pass over a draft of so many nodes is expected to bring."""
        if self._expected is not None:
            accepted, said = self._worth
            return 1.0 + accepted / said * (self._expected(nodes) - 1.0)
        reached, found = 1.0, 1.0
        for share in self._accepted[:nodes]:
            reached *= share
            found += reached
        return found

    @contextmanager
    def drafting(self) -> Iterator[None]:
        begun = self._clock()
        yield
        self._drafting = self._clock() - begun

    @contextmanager
    def verifying(self) -> Iterator[None]:
        begun = self._clock()
        yield
        seconds, entry = self._clock() - begun + self._drafting, self._entry
        entry[0] += 1
        # The first of a size pays for what the others find made.
        entry[1] = seconds if entry[0] <= 2 else entry[1] + self.PART * (seconds - entry[1])

    def learn(self, asked: int, taken: int) -> None:
        if self._expected is not None:
            for at, tokens in enumerate((float(taken), self._expected(asked) - 1.0)):
                self._worth[at] += self.PART * (tokens - self._worth[at])
        for at in range(min(asked, taken + 1)):
            self._accepted[at] += self.PART * ((at < taken) - self._accepted[at])


REMEMBERED = 16
"""Drafters of a model whose measurements are kept."""

_measured: weakref.WeakKeyDictionary[Any, dict[Hashable, Measured]] = weakref.WeakKeyDictionary()


def sizer_for(drafter: Drafter) -> Measured:
    """A sizer that has not measured anything yet."""
    return Measured(drafter.most, expected=drafter.expected if isinstance(drafter, Expecting) else None)


def measured(model: Any, given: Any, drafter: Drafter) -> Measured:
    """What earlier calls with this model and drafter have measured, so that the next goes on from there.

    given: what stood for the drafter in the call, hashable.
    """
    known = _measured.setdefault(model, {})
    found = known.pop(given, None) or sizer_for(drafter)
    known[given] = found
    while len(known) > REMEMBERED:
        del known[next(iter(known))]
    return found
