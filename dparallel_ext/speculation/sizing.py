"""Chooses the number of nodes of a draft that gives the most tokens per second, as measured on this device.

A pass with n drafted rows takes L(n) seconds and emits tau(n) tokens; drafts have argmax tau(n) / L(n) nodes
(PPD, arXiv 2405.18628), where n = 0 is plain decoding. The text is the same for every size.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

from .drafter import Drafter, PredictsAcceptance


class Sizer(Protocol):
    """Chooses the number of nodes of drafts."""

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


class Measurements:
    """Times and acceptance of passes with drafts of up to `most` nodes. It refers to no drafter."""

    def __init__(self, most: int) -> None:
        self.worth = [1.0, 1.0]
        """With `PredictsAcceptance`: running means of accepted tokens, and of tokens expected to be
        accepted."""
        self.seconds: dict[int, dict[int, list[float]]] = {}
        """Bit length of the number of sequences -> size -> [times used, mean seconds of draft and pass]."""
        self.accepted = [0.5] * most
        """For each depth: the share of drafts whose token there was accepted, of those accepted up to it. A
        draft that ends before a depth counts as not accepted there."""
        self.passes = 0


class Measured:
    """The best size by running means of seconds and acceptance, with weight `PART` for a new value.

    Sizes are 0, the powers of two up to `most`, and `most`. Each size is tried `TRIALS` times at first, and
    every `EVERY` passes one size is tried again, since the best size changes with the text, the length and
    the batch.
    """

    EVERY, TRIALS, PART = 64, 3, 0.1

    def __init__(
        self,
        most: int,
        clock: Callable[[], float] = time.perf_counter,
        expected: Callable[[int], float] | None = None,
        known: Measurements | None = None,
    ) -> None:
        """most: the largest size. clock: seconds. expected: see `drafter.PredictsAcceptance`; None: as for
        chains. known: earlier measurements with the same `most`, to which this adds its own; default: none.
        """
        self._clock, self._expected = clock, expected
        self.sizes = sorted({0, most, *(1 << bit for bit in range(most.bit_length()) if 1 << bit <= most)})
        self.known = Measurements(most) if known is None else known
        self._entry: list[float] = [0, 0.0]
        self._drafting = 0.0

    def size(self, lanes: int) -> int:
        unused = {size: [0, 0.0] for size in self.sizes}
        known = self.known.seconds.setdefault((lanes - 1).bit_length(), unused)
        self.known.passes += 1
        asked = min(self.sizes, key=lambda size: known[size][0])
        if known[asked][0] >= self.TRIALS:
            if self.known.passes % self.EVERY == 0:
                asked = self.sizes[self.known.passes // self.EVERY % len(self.sizes)]
            else:
                asked = max(self.sizes, key=lambda size: self.tokens(size) / known[size][1])
        self._entry, self._drafting = known[asked], 0.0
        return asked

    def tokens(self, nodes: int) -> float:
        """The tokens that a pass with a draft of `nodes` nodes is expected to emit."""
        # A drafter of trees that was loaded anew expects nothing before its first draft.
        if self._expected is not None and self._expected(self.sizes[-1]) > 1.0:
            accepted, expected = self.known.worth
            return 1.0 + accepted / expected * (self._expected(nodes) - 1.0)
        reached, total = 1.0, 1.0
        for share in self.known.accepted[:nodes]:
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
        # The first pass of a size includes one-time costs, and on a GPU the second is recorded: so the last
        # trial replaces them. The seconds come before the count, since other threads divide by the seconds of
        # sizes that were tried.
        tried = entry[0] >= self.TRIALS
        entry[1] = entry[1] + self.PART * (seconds - entry[1]) if tried else seconds
        entry[0] += 1

    def learn(self, asked: int, taken: int) -> None:
        if self._expected is not None:
            for at, tokens in enumerate((float(taken), self._expected(asked) - 1.0)):
                self.known.worth[at] += self.PART * (tokens - self.known.worth[at])
        for at in range(min(asked, taken + 1)):
            self.known.accepted[at] += self.PART * ((at < taken) - self.known.accepted[at])


REMEMBERED = 16
"""The most drafters of a model whose measurements are kept."""

_measured: weakref.WeakKeyDictionary[Any, dict[Hashable, tuple[weakref.ref[Any] | None, Measurements]]] = (
    weakref.WeakKeyDictionary()
)
"""Model -> the name of a drafter, or an object's id -> that object, and the measurements. It keeps neither
drafters nor models alive."""
_lock = threading.Lock()


def sizer_for(drafter: Drafter, known: Measurements | None = None) -> Measured:
    """A sizer for the drafter; known: earlier measurements with it."""
    expected = drafter.expected if isinstance(drafter, PredictsAcceptance) else None
    return Measured(drafter.most, expected=expected, known=known)


def remembered_sizer(model: Any, drafter_given: Any, drafter: Drafter) -> Measured:
    """A sizer that goes on from the measurements of earlier calls with this model and drafter.

    drafter_given: the call's argument `drafter`, from which `drafter` was made.
    """
    named = isinstance(drafter_given, (str, Path))
    try:
        reference = None if named else weakref.ref(drafter_given)
    except TypeError:  # its class has __slots__, so nothing would tell when it is gone
        return sizer_for(drafter)
    key = drafter_given if named else id(drafter_given)
    with _lock:
        by_drafter = _measured.setdefault(model, {})
        before, known = by_drafter.pop(key, (None, None))
        same = before is None or before() is drafter_given  # an id may come again
        if not (same and known and len(known.accepted) == drafter.most):
            known = Measurements(drafter.most)
        by_drafter[key] = reference, known
        while len(by_drafter) > REMEMBERED:
            del by_drafter[next(iter(by_drafter))]
    return sizer_for(drafter, known)
