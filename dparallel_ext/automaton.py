"""The form of a response, for constrained decoding: a deterministic finite automaton over tokens.

Token by token it goes from state to state, from state 0 on; a response has the form if it ends in an
accepting state. Tokens that lead from every state to the same state are one class, so that the table stays
small where the vocabulary is large.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import check_tensor, described

NOWHERE = -1
"""The number in place of a state behind tokens with which no response of the form begins."""
FAR = 2**62
"""The distance of a state from which no accepting state can be reached; a power of two, since `F.pad` takes
a float."""


@dataclass(frozen=True, eq=False, repr=False)
class Automaton:
    """The responses of one form. Transitions from which no accepting state can be reached, and those of
    classes without a token, are removed. An automaton is equal to itself alone.

    Raises TypeError or ValueError naming the argument: for a tensor that does not fit, and for `accepting` if
    no response of at least a token has the form.
    """

    token_class: Tensor
    """(V,) int64 on the CPU: the class of each id, from 0 on; ids from V on are in no response."""
    transitions: Tensor
    """(S, K) int64 on the CPU: the state that each state's tokens of each class lead to; `NOWHERE`: none."""
    accepting: Tensor
    """(S,) bool on the CPU."""
    distance: Tensor = field(init=False)
    """(S,) int64: the fewest tokens that lead to an accepting state, or `FAR`."""
    _tables: dict[torch.device, Tables] = field(init=False, default_factory=dict)
    _without: dict[tuple[int, frozenset[int]], Automaton] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        for name, dtype, ndim in (
            ("token_class", torch.int64, 1),
            ("transitions", torch.int64, 2),
            ("accepting", torch.bool, 1),
        ):
            value = getattr(self, name)
            check_tensor(name, value)
            if value.dtype != dtype or value.ndim != ndim or value.device.type != "cpu":
                raise ValueError(
                    f"{name}: expected {dtype} of {ndim} dimensions on the CPU, got {described(value)} on "
                    f"{value.device}"
                )
        states, classes = self.transitions.shape
        _check_within("token_class", self.token_class, 0, classes)
        _check_within("transitions", self.transitions, NOWHERE, states)
        if self.accepting.shape != (states,):
            raise ValueError(f"accepting: expected ({states},), got {tuple(self.accepting.shape)}")
        empty = torch.bincount(self.token_class, minlength=classes) == 0
        transitions = self.transitions.masked_fill(empty, NOWHERE)
        distance = _distances(transitions, self.accepting)
        dead = (transitions >= 0) & (distance[transitions.clamp(min=0)] == FAR)
        transitions = transitions.masked_fill(dead, NOWHERE)
        if not states or not (transitions[0] >= 0).any():
            raise ValueError("accepting: expected a state that tokens lead to from state 0, got none")
        object.__setattr__(self, "transitions", transitions)
        object.__setattr__(self, "distance", distance)

    def __repr__(self) -> str:
        states, classes = self.transitions.shape
        return f"Automaton({states} states, {classes} classes of {len(self.token_class)} tokens)"

    def after(self, state: int, tokens: Iterable[int]) -> int:
        """The state that `tokens` lead to from `state`, or `NOWHERE`."""
        for token in tokens:
            if state == NOWHERE or token >= len(self.token_class):
                return NOWHERE
            state = int(self.transitions[state, self.token_class[token]])
        return state

    def ends(self, state: int, eos_ids: Iterable[int]) -> bool:
        """Whether a response may end in `state`, and nothing but one of `eos_ids` may follow."""
        if state == NOWHERE or not self.accepting[state]:
            return False
        follows = (self.transitions[state] >= 0)[self.token_class]
        follows[[token for token in eos_ids if 0 <= token < len(follows)]] = False
        return not follows.any()

    def without(self, ids: Iterable[int], vocab: int | None = None) -> Automaton:
        """The automaton of those responses that hold none of `ids`, and no id from `vocab` on (None: any id).
        It is the same object for the same ids. Raises ValueError if there is no such response.
        """
        size, classes = len(self.token_class), self.transitions.shape[1]
        size = size if vocab is None else min(size, vocab)
        left_out = frozenset(token for token in ids if 0 <= token < size)
        if not left_out and size == len(self.token_class):
            return self
        if (size, left_out) not in self._without:
            token_class = self.token_class[:size].clone()
            token_class[list(left_out)] = classes
            transitions = F.pad(self.transitions, (0, 1), value=NOWHERE)
            try:
                automaton = Automaton(token_class, transitions, self.accepting)
            except ValueError as error:
                raise ValueError(
                    "automaton: expected one with a response of tokens that the model decodes, got none"
                ) from error
            self._without.setdefault((size, left_out), automaton)
        return self._without[size, left_out]

    def tables(self, device: torch.device) -> Tables:
        """The automaton on a device; made once for each, since recorded passes read it."""
        if device in self._tables:
            return self._tables[device]
        leads = self.transitions >= 0
        used = leads.any(0)
        number = torch.where(used, used.cumsum(0) - 1, int(used.sum()))  # unused classes become one
        token_class = number[self.token_class]
        ids = token_class.argsort(stable=True)
        offsets = _ends(torch.bincount(token_class, minlength=int(used.sum()) + 1))[:-1]
        transitions = self.transitions[:, used]
        target = transitions[transitions >= 0]
        order = target.argsort(stable=True)
        origin, of_edge = (t[order].int() for t in (transitions >= 0).nonzero(as_tuple=True))
        onward = torch.where(transitions >= 0, self.distance[transitions.clamp(min=0)], FAR)
        into = _ends(torch.bincount(target, minlength=len(transitions)))
        tables = Tables(
            F.pad(token_class, (0, 1), value=int(used.sum())),
            ids[: int(offsets[-1])].int(),
            offsets,
            origin,
            of_edge,
            into,
            self.distance,
            F.pad(onward, (0, 1), value=FAR),
        )
        # Recordings do not keep the tables alive; and if another thread has made them meanwhile, those stay.
        return self._tables.setdefault(device, Tables(*(table.to(device) for table in tables)))


class Tables(NamedTuple):
    """An automaton of S states and E transitions on the model's device, with the K classes of tokens that
    lead anywhere."""

    token_class: Tensor
    """(V + 1,) int64: the class of each id; K for those that lead nowhere, and for an id that the automaton
    does not have, which counts as the last."""
    ids: Tensor
    """(M,) int32: the ids, class by class, ascending in each; without those that lead nowhere."""
    offsets: Tensor
    """(K + 1,) int64: where each class begins in `ids`, and the end of the last."""
    origin: Tensor
    """(E,) int32: the state that each transition comes from. They are ordered by the state that they lead
    to."""
    edge_class: Tensor
    """(E,) int32: the class of its tokens."""
    edge_offsets: Tensor
    """(S + 1,) int64: where the transitions to each state begin, and the end of the last."""
    distance: Tensor
    """(S,) int64"""
    onward: Tensor
    """(S, K + 1) int64: the distance behind a token of each class; `FAR` where none may follow."""

    def classes(self, ids: Tensor) -> Tensor:
        """(...) int64: the classes of ids (...)."""
        last = len(self.token_class) - 1
        return self.token_class[torch.where((ids >= 0) & (ids < last), ids, last)]

    def allowed(self, state: Tensor, left: Tensor) -> Tensor:
        """(..., K + 1) bool: the classes of tokens that may follow in `state` (...) and leave a response that
        can end within `left` (...) more tokens; where no class does, all classes that may follow."""
        onward = self.onward[state]
        fits = onward <= left[..., None]
        return fits | (~fits.any(-1, keepdim=True) & (onward < FAR))


def _ends(counts: Tensor) -> Tensor:
    """(N + 1,) int64: where each of N runs begins that follow each other, and the end of the last."""
    return F.pad(counts.cumsum(0), (1, 0))


def _check_within(name: str, values: Tensor, least: int, end: int) -> None:
    wrong = values[(values < least) | (values >= end)]
    if len(wrong):
        raise ValueError(f"{name}: expected numbers from {least} to {end - 1}, got {int(wrong[0])}")


def _distances(transitions: Tensor, accepting: Tensor) -> Tensor:
    """See `Automaton.distance`: breadth first, backwards from the accepting states."""
    origin, token_class = (transitions >= 0).nonzero(as_tuple=True)
    pairs = torch.unique(torch.stack((transitions[origin, token_class], origin)), dim=1)
    before: list[list[int]] = [[] for _ in range(len(transitions))]
    for target, source in pairs.T.tolist():
        before[target].append(source)
    distance = [0 if accepts else FAR for accepts in accepting.tolist()]
    queue = deque(state for state, far in enumerate(distance) if far == 0)
    while queue:
        state = queue.popleft()
        for source in before[state]:
            if distance[source] == FAR:
                distance[source] = distance[state] + 1
                queue.append(source)
    return torch.tensor(distance, dtype=torch.int64, device="cpu")
