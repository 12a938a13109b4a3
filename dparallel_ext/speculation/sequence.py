"""One sequence of an autoregressive model under decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from ..decoding.sequence import Settings


class SamplingGroup(NamedTuple):
    """How the choices of some sequences are made."""

    temperature: float
    top_p: float
    top_k: int
    suppress: Tensor | None
    """(n,) int64 on the device: ids that are never chosen."""

    @property
    def key(self) -> tuple[Any, ...]:
        return (*self[:3], id(self.suppress))


class OpenRegion(NamedTuple):
    """Columns [start, end) whose tokens are not known yet."""

    start: int
    end: int


class Verified(NamedTuple):
    """What a pass has made of a draft."""

    drafted: int
    """How many nodes the draft had."""
    accepted: int
    """How many of them were the model's own choice; these are the first tokens that the pass has brought."""
    refused: tuple[int, ...]
    """The tokens of the other nodes, in the draft's order."""


@dataclass
class CausalSequence:
    """What is known of it, and what it has taken. Columns are positions of the sequence."""

    prompt: int
    """Its tokens."""
    length: int
    """Of prompt and response."""
    settings: Settings
    suppress: Tensor | None
    """The settings', on the device."""
    eos_ids: tuple[int, ...] = ()
    known: int = 0
    """Tokens known, from the first; the last of them is the root of the next draft."""
    num_cached: int = 0
    """Positions, from the first, whose keys and values are in the cache: all known ones but the root, once
    the prompt has been computed."""
    nfe: int = 0
    """Passes of the model it was in."""
    draft_nfe: int = 0
    """Drafts that were made for it, if drafting takes a pass."""
    layers: int = 0
    """Layers of the model that were run for it, one after the other: in `nfe` and for drafts."""
    drafted: int = 0
    """Nodes of its last draft; 0 where the last pass was without."""
    accepted: int = 0
    """Of these, the tokens that were accepted."""
    refused: tuple[int, ...] = ()
    """The tokens of the nodes that were not accepted."""
    passes: list[Verified] = field(default_factory=list)
    """Of each pass, where the settings ask for a record."""
    kept: int = 0
    """Response tokens in front of what ended it; all where nothing did."""
    done: bool = False
    stopped: bool = False
    """Whether EOS or a stop sequence ended it."""

    @property
    def sampling(self) -> SamplingGroup:
        own = self.settings
        return SamplingGroup(own.temperature, own.top_p, own.top_k, self.suppress)

    @property
    def columns(self) -> range:
        """Of the response."""
        return range(self.prompt, self.length)

    def index(self, column: int) -> int:
        """Response tokens in front of a column."""
        return min(max(0, column - self.prompt), self.length - self.prompt)

    @property
    def open(self) -> tuple[OpenRegion, ...]:
        return () if self.done else (OpenRegion(self.known, self.length),)

    @property
    def block(self) -> tuple[int, int]:
        return self.known, self.length

    @property
    def room(self) -> int:
        """Tokens that it may still get."""
        return self.length - self.known

    @property
    def prefills(self) -> bool:
        """Whether more than the root has to be computed."""
        return self.known - self.num_cached > 1

    @property
    def generated(self) -> int:
        return self.known - self.prompt

    @property
    def published(self) -> int:
        """Passes of the published loop: the same."""
        return self.nfe

    def judged(self, draft: Verified) -> None:
        """Note what the pass has made of its draft."""
        self.drafted, self.accepted, self.refused = draft
        if self.settings.record:
            self.passes.append(draft)

    def first_end(self, ids: Sequence[int], first: int, new: int) -> tuple[int, int] | None:
        """Columns [begin, end) of the EOS or stop sequence that is complete first; None where none is.

        ids: the tokens from column `first` on, those from column `new` on new: it has to end among these.
        """
        found = []
        for stop in (*((eos,) for eos in self.eos_ids), *self.settings.stop):
            size = len(stop)
            for end in range(max(size, new - first + 1), len(ids) + 1):
                if tuple(ids[end - size : end]) == stop:
                    found.append((first + end, first + end - size))
                    break
        if not found:
            return None
        end, begin = min(found)  # of two that end together the longer
        return begin, end


IDLE = CausalSequence(0, 0, Settings((0.0, 1.0, 1.0, 1.0, 0.0)), None, done=True)
"""In a lane without a sequence."""
