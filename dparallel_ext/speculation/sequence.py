"""One sequence of an autoregressive model under decoding."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from ..decoding.sequence_settings import SamplingGroup, SequenceSettings

UNKNOWN = -1
"""The number in place of a token that is not known yet."""


class OpenRegion(NamedTuple):
    """The columns [start, end) whose tokens are not known yet."""

    start: int
    end: int


class Verified(NamedTuple):
    """The result of verifying a draft. The last token that a pass adds to the text counts as the pass's own,
    even if it was guessed, as an end of the text may be: a pass adds `accepted` + 1 tokens."""

    drafted: int
    """Nodes of the draft."""
    accepted: int
    """Nodes that were the model's own choice: the first of the tokens that the pass adds to the text."""
    refused: tuple[int, ...]
    """The tokens of the nodes that are not in the text, in the draft's order: the model did not choose them,
    or they are behind an end of the text."""


@dataclass
class CausalSequence:
    """How far one sequence is decoded. Columns are positions of the sequence."""

    prompt: int
    """Tokens of the prompt."""
    length: int
    """The most tokens of prompt and response."""
    settings: SequenceSettings
    sampling: SamplingGroup
    """See `SequenceSettings.sampling`."""
    state: int = 0
    """The state of the settings' automaton behind the known tokens."""
    known: int = 0
    """Known tokens, prompt included; the last of them is the root of the next draft."""
    num_cached: int = 0
    """Positions, from 0 on, whose keys and values are in the cache: all known ones but the root, once the
    prompt has been computed."""
    nfe: int = 0
    """Passes of the model over the sequence."""
    draft_nfe: int = 0
    """Drafts made for the sequence."""
    layers: int = 0
    """Layers of the model run for the sequence, one after the other, in passes and for drafts."""
    drafted: int = 0
    """Nodes of the last pass's draft; 0 if it had none."""
    accepted: int = 0
    """Nodes of the last pass's draft that were accepted."""
    refused: tuple[int, ...] = ()
    """The tokens of its nodes that were not accepted."""
    passes: list[Verified] = field(default_factory=list)
    """For each pass, if the settings record it."""
    kept: int = 0
    """Response tokens in front of EOS or a stop sequence; all if there is none."""
    done: bool = False
    stopped: bool = False
    """Whether EOS or a stop sequence ended it."""

    @property
    def columns(self) -> range:
        """Columns of the response."""
        return range(self.prompt, self.length)

    def index(self, column: int) -> int:
        """Response tokens in front of a column."""
        return min(max(0, column - self.prompt), self.length - self.prompt)

    @property
    def ahead(self) -> int:
        """The column of the first token that is not known."""
        return self.known

    @property
    def open(self) -> tuple[OpenRegion, ...]:
        return () if self.done else (OpenRegion(self.known, self.length),)

    @property
    def block(self) -> tuple[int, int]:
        return self.known, self.length

    @property
    def room(self) -> int:
        """The most tokens that may still come."""
        return self.length - self.known

    @property
    def prefills(self) -> bool:
        """Whether more than the root has to be computed."""
        return self.known - self.num_cached > 1

    @property
    def decoded(self) -> int:
        """Tokens decoded so far."""
        return self.known - self.prompt

    @property
    def published(self) -> int:
        """Passes of the published loop, which are the same here."""
        return self.nfe

    def judged(self, draft: Verified) -> None:
        """Note the result of the last pass's draft."""
        self.drafted, self.accepted, self.refused = draft
        if self.settings.record:
            self.passes.append(draft)


_SETTINGS = SequenceSettings((0.0, 1.0, 1.0, 1.0, 0.0))
IDLE = CausalSequence(0, 0, _SETTINGS, _SETTINGS.sampling(None), done=True)
"""The placeholder in a lane without a sequence."""
