"""Drafts without weights: the tokens that followed the text's last n-gram where it occurred before.

Source: A. Saxena, "Prompt Lookup Decoding" (2023); LLMA, arXiv 2304.04487.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from ..arguments import whole
from ..cache import KVCache
from ..models import Model
from .draft import Draft
from .drafter import Drafter, DraftSession, Lane


class NGram(Drafter):
    """Prompt lookup decoding: drafts the tokens that followed the latest earlier occurrence of the last
    `longest` tokens; if there is none, of the last `longest` - 1 tokens, and so on.

    most: the most tokens of a draft.
    """

    apart: Literal[True] = True

    def __init__(self, longest: int = 3, *, most: int = 16) -> None:
        self.longest = whole("longest", longest, 1)
        self.most = whole("most", most, 1)

    def __repr__(self) -> str:
        return f"NGram({self.longest}, most={self.most})"

    def session(self, model: Model, kv_cache: KVCache, lanes: int, *, graphs: bool = True) -> DraftSession:
        return _Session(self.longest, lanes)


class _Session(DraftSession):
    def __init__(self, longest: int, lanes: int) -> None:
        self._longest = longest
        self._ids: list[list[int]] = [[] for _ in range(lanes)]
        """For each lane, the tokens that are indexed."""
        self._ends: list[dict[tuple[int, ...], int]] = [{} for _ in range(lanes)]
        """For each lane: n-gram -> the index of the token after its latest occurrence."""

    def reset(self, lane: int) -> None:
        self._ids[lane], self._ends[lane] = [], {}

    def propose(self, lanes: Sequence[Lane], sizes: Sequence[int]) -> list[Draft]:
        return [self._draft(each, most) for each, most in zip(lanes, sizes, strict=True)]

    def _draft(self, lane: Lane, most: int) -> Draft:
        ids, ends = self._ids[lane.lane], self._ends[lane.lane]
        for token in lane.tokens[len(ids) :].tolist():
            for gram in self._grams(ids):
                ends[gram] = len(ids)
            ids.append(token)
        for gram in self._grams(ids):
            if (at := ends.get(gram)) is not None:
                continuation = ids[at : at + most]
                # The occurrence overlaps the end: a text that repeats itself.
                repeats = -(-most // len(continuation))
                return Draft(tuple((continuation * repeats)[:most]))
        return Draft()

    def _grams(self, ids: Sequence[int]) -> Iterator[tuple[int, ...]]:
        """The n-grams at the end of `ids`, the longest first."""
        return (tuple(ids[-size:]) for size in range(min(self._longest, len(ids)), 0, -1))
