"""Drafts without weights: text about which the response's form leaves little choice.

Source: jump-forward decoding (L. Zheng et al., SGLang, arXiv 2312.07104), which appends text that is forced
without a pass. Here it is a draft, so that the model itself chooses the tokens of which the text is made.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Literal

from ..arguments import whole
from ..automaton import Automaton
from ..cache import KVCache
from ..models import Model
from .draft import Draft
from .drafter import Drafter, DraftSession, Lane


class JumpForward(Drafter):
    """Drafts along the automaton of a response that has one, as long as few tokens may follow: the token that
    leads nearest to the end of the form.

    choices: the most tokens that may follow where one of them is guessed.
    most: the most tokens of a draft.
    """

    apart: Literal[True] = True

    def __init__(self, choices: int = 16, *, most: int = 16) -> None:
        self.choices = whole("choices", choices, 1)
        self.most = whole("most", most, 1)

    def __repr__(self) -> str:
        return f"JumpForward({self.choices}, most={self.most})"

    def session(self, model: Model, kv_cache: KVCache, lanes: int, *, graphs: bool = True) -> DraftSession:
        return _Session(self.choices)


class _Session(DraftSession):
    def __init__(self, choices: int) -> None:
        self._choices = choices
        self._guesses: weakref.WeakKeyDictionary[Automaton, dict[int, int | None]]
        self._guesses = weakref.WeakKeyDictionary()
        """For each form: state -> the guess there."""

    def propose(self, lanes: Sequence[Lane], sizes: Sequence[int]) -> list[Draft]:
        return [self._draft(lane, most) for lane, most in zip(lanes, sizes, strict=True)]

    def _draft(self, lane: Lane, most: int) -> Draft:
        if lane.automaton is None:
            return Draft()
        guesses = self._guesses.setdefault(lane.automaton, {})
        state = lane.state
        tokens: list[int] = []
        while len(tokens) < most:
            if state not in guesses:
                guesses[state] = _nearest(lane.automaton, state, self._choices)
            token = guesses[state]
            if token is None:
                break
            tokens.append(token)
            state = lane.automaton.after(state, (token,))
        return Draft(tuple(tokens))


def _nearest(automaton: Automaton, state: int, choices: int) -> int | None:
    """The token behind which the fewest tokens lead to an accepting state; None where more tokens than
    `choices` may follow, or none.

    Of several tokens the last: vocabularies have the longer pieces of a text behind its shorter pieces.
    """
    target = automaton.transitions[state][automaton.token_class]  # (V,)
    tokens = (target >= 0).nonzero()[:, 0]
    if not 0 < len(tokens) <= choices:
        return None
    distance = automaton.distance[target[tokens]]
    return int(tokens[distance == distance.amin()][-1])
