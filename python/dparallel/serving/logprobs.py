"""The log-probabilities of an answer, in the form of OpenAI's API."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..text import INCOMPLETE


def chat_logprobs(
    tokens: Sequence[tuple[str, float | None]], top: Sequence[Sequence[tuple[str, float]]]
) -> dict[str, Any]:
    """ "logprobs" of a chat completion, from the texts and log-probabilities of its tokens, and of the most
    probable tokens of each place."""
    content = [
        {**_token(text, value), "top_logprobs": [_token(*each) for each in of_place]}
        for (text, value), of_place in zip(tokens, top, strict=True)
        if value is not None
    ]
    return {"content": content, "refusal": None}


def _token(text: str, value: float) -> dict[str, Any]:
    encoded = None if INCOMPLETE in text else list(text.encode())
    return {"token": text, "logprob": finite(value), "bytes": encoded}


def completion_logprobs(
    tokens: Sequence[tuple[str, float | None]],
    starts: Sequence[int],
    top: Sequence[Sequence[tuple[str, float]]] | None,
) -> dict[str, Any]:
    """ "logprobs" of a completion. A prompt's first token has no log-probability.

    starts: where each token starts in the response's text, in characters.
    top: the most probable tokens of each place, in descending order; the token itself is listed with them. Of
        tokens with the same text, such as parts of characters, the most probable is.
    """
    listed = []
    for (text, value), of_place in zip(tokens, top or (), strict=top is not None):
        both: dict[str, float] = {}
        for each, its in [*of_place, *([] if value is None else [(text, value)])]:
            both.setdefault(each, finite(its))
        listed.append(both or None)
    return {
        "tokens": [text for text, _ in tokens],
        "token_logprobs": [None if value is None else finite(value) for _, value in tokens],
        "text_offset": list(starts),
        "top_logprobs": None if top is None else listed,
    }


class GrowingLists:
    """An object of lists as JSON, whose lists grow together; a list that is None is null."""

    def __init__(self, lists: Mapping[str, Sequence[Any] | None]) -> None:
        self._parts: dict[str, list[str] | None] = {
            name: None if values is None else [] for name, values in lists.items()
        }
        self.add(lists)

    def add(self, lists: Mapping[str, Sequence[Any] | None]) -> None:
        """Append to each list."""
        for name, values in lists.items():
            if values and (parts := self._parts[name]) is not None:
                parts.append(as_json(values)[1:-1])

    def text(self) -> str:
        """The object."""
        lists = (
            f'"{name}":' + ("null" if parts is None else f"[{','.join(parts)}]")
            for name, parts in self._parts.items()
        )
        return f"{{{','.join(lists)}}}"


def as_json(value: Any) -> str:
    """`value` as a server answers it."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def finite(value: float) -> float:
    """`value`, at least -9999: JSON has no infinity, and OpenAI writes this for an impossible token."""
    return max(value, -9999.0)
