"""The log-probabilities of an answer, in the form of OpenAI's API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..text import INCOMPLETE


def chat_logprobs(tokens: Sequence[tuple[str, float]], top: bool) -> dict[str, Any]:
    """ "logprobs" of a chat completion, from the texts of tokens and their log-probabilities. `top`: each
    token is the most probable one of its place, and is listed as such too."""
    content = []
    for text, value in tokens:
        encoded = None if INCOMPLETE in text else list(text.encode())
        token = {"token": text, "logprob": finite(value), "bytes": encoded}
        content.append({**token, "top_logprobs": [token] if top else []})
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokens: Sequence[tuple[str, float | None]],
    starts: Sequence[int],
    best: Sequence[tuple[str, float] | None] | None,
) -> dict[str, Any]:
    """ "logprobs" of a completion. A prompt's first token has no log-probability.

    starts: where each token starts in the response's text, in characters.
    best: the most probable token of each place, where it is not the token itself; it is listed beside it.
    """
    listed = []
    for (text, value), other in zip(tokens, best or (), strict=best is not None):
        both = [*([other] if other else []), *([] if value is None else [(text, value)])]
        listed.append({text: finite(value) for text, value in both} or None)
    return {
        "tokens": [text for text, _ in tokens],
        "token_logprobs": [None if value is None else finite(value) for _, value in tokens],
        "text_offset": list(starts),
        "top_logprobs": None if best is None else listed,
    }


def finite(value: float) -> float:
    """`value`, at least -9999: JSON has no infinity, and OpenAI writes this for an impossible token."""
    return max(value, -9999.0)
