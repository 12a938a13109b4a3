"""Settings of one sequence, masked or autoregressive, and groups of sequences that choose tokens alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ..automaton import Automaton
from ..rules import Rule


class Penalties(NamedTuple):
    """What the logits of tokens that the text already has are changed by, see `DecodeConfig`."""

    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0


NO_PENALTIES = Penalties()


@dataclass(frozen=True)
class SequenceSettings:
    """How one sequence is decoded."""

    policy: tuple[float, ...]
    """A row of `policies.FIELDS`."""
    steps: int | None = None
    """Passes of the fixed schedule, which sets the policy row's quota."""
    temperature: float = 0.0
    suppress: Tensor | None = None
    """(n,) int64, ids never to be decoded."""
    key: tuple[int, int] = (0, 0)
    """Seed and sequence number, which key the samples."""
    eos_ids: tuple[int, ...] = ()
    """Tokens that end the response."""
    stop: tuple[tuple[int, ...], ...] = ()
    """Sequences of tokens that end it too."""
    top_p: float = 1.0
    top_k: int = 0
    """Limits of sampling, see `ops.row_stats`; 1 and 0: none."""
    rule: Rule | None = None
    """The rule that decides, with or without the policy."""
    automaton: Automaton | None = None
    """The form of the response; of a diffusion model it is in `rule` too, which keeps it."""
    penalties: Penalties = NO_PENALTIES
    """Of an autoregressive model."""
    record: bool = False
    """Whether passes record its `workspace.Trajectory`."""
    top_logprobs: int = 0
    """How many of the most probable tokens of each place are kept; above 0 passes record `Trajectory.top`."""
    scheduled: bool = False
    """Whether the fixed schedule decides how many tokens a pass commits."""

    @property
    def reads_text(self) -> bool:
        """Whether what may be chosen depends on the tokens in front, of an autoregressive model."""
        return self.automaton is not None or self.penalties != NO_PENALTIES

    @property
    def one_block(self) -> bool:
        """Whether its rule or schedule can have only one block open."""
        rule = self.rule
        of_rule = rule is not None and (rule.edits > 0 or rule.reads == "response" or rule.in_order)
        return self.scheduled or self.steps is not None or of_rule

    def first_ending(self, ids: Sequence[int], first: int, new: int) -> tuple[int, int] | None:
        """Columns [begin, end) of the EOS or stop sequence whose last token comes first among the columns
        from `new` on, the longer of two that end together; None if there is none.

        ids: the tokens from column `first` on.
        """
        endings = []
        for stop in (*((eos,) for eos in self.eos_ids), *self.stop):
            size = len(stop)
            for end in range(max(size, new - first + 1), len(ids) + 1):
                if tuple(ids[end - size : end]) == stop:
                    endings.append((first + end, first + end - size))
                    break
        if not endings:
            return None
        end, begin = min(endings)
        return begin, end

    def sampling(self, suppress: Tensor | None) -> SamplingGroup:
        """How the sequence's tokens are chosen; suppress: its ids to suppress, on the device, one tensor for
        all sequences of a batch with the same ids."""
        return SamplingGroup(self.temperature, self.top_p, self.top_k, suppress, self.rule)


class SamplingGroup(NamedTuple):
    """How the tokens of some sequences are chosen."""

    temperature: float
    top_p: float
    top_k: int
    suppress: Tensor | None
    """(n,) int64 on the device: ids that are never chosen."""
    rule: Rule | None = None
    """Decides what a pass over masks commits; None: policy rows do."""

    @property
    def key(self) -> tuple[Any, ...]:
        """A key of the group, equal for groups of the same settings."""
        return (*self[:3], id(self.suppress), self.rule)

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of `row_stats`, `unmask_` and `accept`."""
        temperature, top_p, top_k, suppress, _ = self
        return {"temperature": temperature, "top_p": top_p, "top_k": top_k, "suppress": suppress}

    @property
    def greedy(self) -> SamplingGroup:
        """The same at temperature 0."""
        return SamplingGroup(0.0, 1.0, 0, self.suppress)


def grouped(groups: Iterable[SamplingGroup]) -> tuple[list[int], tuple[SamplingGroup, ...]]:
    """The different groups, second; first, for each of `groups`, its number among them."""
    different: dict[tuple[Any, ...], tuple[int, SamplingGroup]] = {}
    numbers = [different.setdefault(group.key, (len(different), group))[0] for group in groups]
    return numbers, tuple(group for _, group in different.values())
