"""Recordings of decodes, for the page of `page.recorded`: `dparallel decode --html`, `evaluate --html`.

A recording holds problems, each with the answers of some models and rules. An answer has the events of the
server's stream of drafts, see `serving.answer.draft_of`: for masked diffusion one event, whose `passes` name
the pass that committed each token; for an autoregressive model one event for each pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from dparallel_ext import DecodeConfig, DecodeOutput
from dparallel_ext.speculation import SpeculateOutput

from . import page, text
from .configs import policy_of


class Recording:
    """Answers in the order in which they are added; a problem's answers are shown side by side."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.problems: dict[str, list[dict[str, Any]]] = {}

    def add(self, prompt: str, answer: dict[str, Any]) -> None:
        self.problems.setdefault(prompt, []).append(answer)

    def html(self) -> str:
        """The page, as one file that needs no other."""
        problems = [{"prompt": prompt, "tracks": tracks} for prompt, tracks in self.problems.items()]
        return page.recorded({"title": self.title, "problems": problems})


def answer_of(
    out: DecodeOutput,
    i: int,
    texts: text.TokenTexts,
    *,
    model: str,
    how: str,
    kept: int,
    length: int,
    note: str = "",
    seconds: float | None = None,
    infill: bool = False,
) -> dict[str, Any]:
    """The answer of sequence i of an output with a trajectory.

    model, how: the model's name, and how it decodes, in words. kept: tokens in front of the end. length:
    tokens requested. note: a remark. seconds: of the decode. infill: the prompt held masks, so it is shown
    too.
    """
    assert out.trajectory is not None
    ids = out.responses[i][:length].tolist()
    steps: list[int] = out.trajectory.step[i, :length].tolist()
    logprobs = [None if math.isnan(value) else value for value in out.trajectory.logprob[i, :length].tolist()]
    passes = int(out.nfe[i])
    kind = "autoregressive" if isinstance(out, SpeculateOutput) else "diffusion"
    fields = {"model": model, "how": how, "note": note, "passes": passes, "seconds": seconds}
    fields |= {"kind": kind, "kept": kept, "length": length}
    if isinstance(out, SpeculateOutput):
        assert out.passes is not None
        events = []
        for number, verified in enumerate(out.passes[i], 1):
            start, end = steps.index(number), len(steps) - steps[::-1].index(number)
            tokens = [texts(ids[at], first=at == 0) for at in range(start, end)]
            event = {"pass": number, "start": start, "tokens": tokens, "logprobs": logprobs[start:end]}
            refused = [texts(token) for token in verified.refused]
            events.append(
                event | {"drafted": verified.drafted, "accepted": verified.accepted, "refused": refused}
            )
        return fields | {"events": events, "length": int(out.generated[i])}
    if infill:
        return fields | _in_place(out, i, texts, ids, steps, logprobs)
    tokens = [texts(token, first=at == 0) for at, token in enumerate(ids)]
    only_event = {"pass": passes, "start": 0, "tokens": tokens, "passes": steps, "logprobs": logprobs}
    return fields | {"events": [only_event]}


def _in_place(
    out: DecodeOutput,
    i: int,
    texts: text.TokenTexts,
    ids: Sequence[int],
    steps: Sequence[int],
    logprobs: Sequence[float | None],
) -> dict[str, Any]:
    """Events, kept and length of an answer among given tokens, which are there before the first pass."""
    sequence: list[int] = out.sequences[i, : int(out.lengths[i])].tolist()
    masked: list[bool] = out.masked[i, : len(sequence)].tolist()
    words = [texts(token, first=at == 0) for at, token in enumerate(sequence)]
    decoded = iter(zip(steps, logprobs, strict=True))
    each = [next(decoded, (None, None)) if mask else (None, None) for mask in masked]
    known = [None if mask else word for mask, word in zip(masked, words, strict=True)]
    filled = [word if mask else None for mask, word in zip(masked, words, strict=True)]
    events = [
        {"pass": 0, "start": 0, "tokens": known},
        {
            "pass": int(out.nfe[i]),
            "start": 0,
            "tokens": filled,
            "passes": [step for step, _ in each],
            "logprobs": [logprob for _, logprob in each],
        },
    ]
    return {"events": events, "kept": None, "length": len(sequence)}


def how_of(config: DecodeConfig, **fields: Any) -> str:
    """How masks are filled, in words; `fields`: other settings by name, None ones left out."""
    settings = {"cache": config.cache, "blocks of": config.block_length, "temperature": config.temperature}
    others = [f"{name} {value}" for name, value in {**settings, **fields}.items() if value]
    return ", ".join([policy_of(config) or "a rule without a name", *others])
