"""Chooses the number of nodes of a draft that gives the most tokens per second, as measured on this device.

A pass with n drafted rows takes L(n) seconds and emits tau(n) tokens; drafts have argmax tau(n) / L(n) nodes
(PPD, arXiv 2405.18628), where n = 0 is plain decoding. The text is the same for every size.
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
        """Nodes of the next draft of each of `lanes` sequences."""

    def drafting(self) -> AbstractContextManager[None]:
        """A context for making drafts, whose time it may measure."""

    def verifying(self) -> AbstractContextManager[None]:
        """A context for a pass, until its result is on the host, whose time it may measure."""

    def learn(self, asked: int, taken: int) -> None:
        """Note that `taken` nodes were accepted of a draft of at most `asked`."""


class Fixed:
    """Always the same number of nodes."""

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
    """The best size by running means of seconds and acceptance, with weight `PART` for a new value.

    Sizes are 0, the powers of two up to `most`, and `most`. Each is tried `TRIALS` times at first, and one
    every `EVERY` passes, since the best size changes with the text, the length and the batch.
    """

    EVERY, TRIALS, PART = 64, 2, 0.1

    def __init__(
        self,
        most: int,
        clock: Callable[[], float] = time.perf_counter,
        expected: Callable[[int], float] | None = None,
    ) -> None:
        """most: the largest size. clock: seconds. expected: see `drafter.Expecting`; None: as for chains."""
        self._clock, self._expected = clock, expected
        self._worth = [1.0, 1.0]
        """With `expected`: running means of accepted tokens, and of tokens expected to be accepted."""
        self.sizes = sorted({0, most, *(1 << bit for bit in range(most.bit_length()) if 1 << bit <= most)})
        self._seconds: dict[int, dict[int, list[float]]] = {}
        """Bit length of the number of sequences -> size -> [times used, mean seconds of draft and pass]."""
        self._accepted = [0.5] * most
        """For each depth: the share of drafts whose token there was accepted, of those accepted up to it. A
        draft that ends before a depth counts as not accepted there."""
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
        """The tokens that a pass with a draft of `nodes` nodes is expected to emit."""
        if self._expected is not None:
            accepted, expected = self._worth
            return 1.0 + accepted / expected * (self._expected(nodes) - 1.0)
        reached, total = 1.0, 1.0
        for share in self._accepted[:nodes]:
            reached *= share
            total += reached
        return total

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
        # The first pass of a size includes one-time costs, so the second replaces it.
        entry[1] = seconds if entry[0] <= 2 else entry[1] + self.PART * (seconds - entry[1])

    def learn(self, asked: int, taken: int) -> None:
        if self._expected is not None:
            for at, tokens in enumerate((float(taken), self._expected(asked) - 1.0)):
                self._worth[at] += self.PART * (tokens - self._worth[at])
        for at in range(min(asked, taken + 1)):
            self._accepted[at] += self.PART * ((at < taken) - self._accepted[at])


REMEMBERED = 16
"""The most drafters of a model whose measurements are kept."""

_measured: weakref.WeakKeyDictionary[Any, dict[Hashable, Measured]] = weakref.WeakKeyDictionary()


def sizer_for(drafter: Drafter) -> Measured:
    """A sizer for the drafter, without measurements."""
    return Measured(drafter.most, expected=drafter.expected if isinstance(drafter, Expecting) else None)


def measured(model: Any, drafter_given: Any, drafter: Drafter) -> Measured:
    """The sizer of earlier calls with this model and drafter, with their measurements.

    drafter_given: the call's argument `drafter`, hashable.
    """
    known = _measured.setdefault(model, {})
    sizer = known.pop(drafter_given, None) or sizer_for(drafter)
    known[drafter_given] = sizer
    while len(known) > REMEMBERED:
        del known[next(iter(known))]
    return sizer
