"""A request under way, between the engine and HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from dparallel_ext import Completion, DraftEvent, Handle

from .. import text
from .errors import ApiError, failed, stopping
from .metrics import ModelMetrics

log = logging.getLogger("uvicorn.dparallel")


@dataclass
class Choice:
    """One response of a request."""

    prompt: list[int]
    gen_length: int
    seed: int
    text: text.TextStream
    suffix: list[int]
    """Token ids that follow the response."""
    echo: str = ""
    """The text that comes in front of the response's."""
    echo_scores: Sequence[Score] = ()
    handle: Handle | None = None
    completion: Completion | None = None
    draft: Newest | None = None
    """The last draft in the queue, unless it was taken or a block came after it."""


@dataclass
class Newest:
    """A place in the queue for a draft; a newer draft of the same block replaces it, so a slow client gets
    fewer."""

    draft: DraftEvent


class Score(NamedTuple):
    """A token of a response, or of the prompt in front of it."""

    token: int
    logprob: float | None
    """In nats; None: nothing predicts it."""
    start: int
    """Where its text starts, in characters."""
    top: Sequence[tuple[int, float]] = ()
    """The most probable tokens of its place, and their log-probabilities, in descending order."""


class Piece(NamedTuple):
    """New content of a choice."""

    choice: int
    text: str = ""
    reason: str | None = None
    """The finish reason, at the choice's end."""
    draft: DraftEvent | None = None
    scores: Sequence[Score] = ()
    """Of the new tokens, if log-probabilities are requested."""


class Call:
    """The choices of one HTTP request, and their events in one queue.

    `submit` submits a choice to the engine, with a callback for its drafts. `fail` ends the call from
    outside; `close` cancels unfinished choices, and may be called again.
    """

    def __init__(
        self,
        aborted: asyncio.Future[None],
        metrics: ModelMetrics,
        choices: list[Choice],
        each: int,
        submit: Callable[[Choice, Callable[[DraftEvent], None]], Handle],
    ):
        self.aborted, self.metrics, self.choices, self.each = aborted, metrics, choices, each
        self.began = time.perf_counter()
        self.queue: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def post(index: int, event: Any) -> None:
            # The loop may have been closed.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._put, index, event)

        aborted.add_done_callback(self._abort)
        try:
            for index, choice in enumerate(choices):
                tell = functools.partial(post, index)
                choice.handle = submit(choice, tell)
                choice.handle.subscribe(tell)
        except BaseException:
            self.close()
            raise

    def _put(self, index: int, event: Any) -> None:
        choice = self.choices[index]
        if not isinstance(event, DraftEvent):
            choice.draft = None
        elif choice.draft is not None and choice.draft.draft.start == event.start:
            choice.draft.draft = event
            return
        else:
            event = choice.draft = Newest(event)
        self.queue.put_nowait((index, event))

    def fail(self, error: ApiError) -> None:
        self.queue.put_nowait((-1, error))

    def _abort(self, _: Any) -> None:
        self.fail(stopping())

    def close(self) -> None:
        self.aborted.remove_done_callback(self._abort)
        for choice in self.choices:
            if choice.handle is not None:
                choice.handle.cancel()  # which does nothing if it is over

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yield new content until every choice has ended. Raises ApiError."""
        metrics, left, seen = self.metrics, len(self.choices), False
        for index, choice in enumerate(self.choices):
            if choice.echo:
                yield Piece(index, choice.echo, scores=choice.echo_scores)
        while left:
            index, event = await self.queue.get()
            if isinstance(event, ApiError):
                raise event
            if isinstance(event, BaseException):
                log.error("a request failed", exc_info=event)
                raise failed()
            choice = self.choices[index]
            if isinstance(event, Newest):
                if choice.draft is event:
                    choice.draft = None
                if not choice.text.stopped:
                    yield Piece(index, draft=event.draft)
                continue
            if isinstance(event, Completion):
                left -= 1
                choice.completion = event
                rest, reason = choice.text.finish(), event.finish_reason
                if choice.text.stopped:
                    reason = "stop"
                elif reason == "cancelled":  # by the engine, not by this call
                    raise stopping()
                metrics.finished(event, choice.text.count)
                # Whoever counts on scores of prompt and response has one for the end, too, as of vLLM.
                scores = []
                if event.end is not None and choice.echo_scores and not choice.text.stopped:
                    token, logprob, top = event.end
                    scores.append(Score(token, logprob, len(choice.echo) + choice.text.length, top))
                yield Piece(index, rest, reason, scores=scores)
                continue
            if not seen:
                seen = True
                metrics.first_block.observe(time.perf_counter() - self.began)
            before, piece = choice.text.count, choice.text.put(event)
            assert choice.handle is not None
            if choice.text.stopped:
                choice.handle.cancel()
            logprobs = choice.handle.logprobs[before : choice.text.count]
            starts = [len(choice.echo) + start for start in choice.text.starts[before:]]
            # Fewer than tokens at a stop string, and none if not requested.
            best = choice.handle.top_logprobs[before : choice.text.count] or [[] for _ in logprobs]
            scores = [Score(*each) for each in zip(event, logprobs, starts, best, strict=False)]
            if piece or scores:
                yield Piece(index, piece, scores=scores)

    def usage(self) -> dict[str, Any]:
        """The "usage" of a call so far, with the passes of finished choices. A prompt counts once, however
        many choices it has."""
        firsts = self.choices[:: self.each]
        prompt = sum(len(choice.prompt) + len(choice.suffix) for choice in firsts)
        tokens = sum(choice.text.count for choice in self.choices)
        done = [(one.completion, one.text.count) for one in self.choices if one.completion is not None]
        passes = sum(completion.nfe for completion, _ in done)
        reused = sum(one.completion.reused for one in firsts if one.completion is not None)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": tokens,
            "total_tokens": prompt + tokens,
            "prompt_tokens_details": {"cached_tokens": reused},
            "forward_passes": passes,
            "tokens_per_pass": round(sum(count for _, count in done) / passes, 3) if passes else 0.0,
        }
