"""The handle of a request: its events as they come, and its result."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

from .. import arguments

TopLogprobs = list[tuple[int, float]]
"""The most probable tokens of a place and their log-probabilities (nats), in descending order, see
`DecodeConfig.top_logprobs`."""


class Scored(NamedTuple):
    """A token, its log-probability (nats), and with `top_logprobs` the most probable tokens of its place."""

    token: int
    logprob: float
    top_logprobs: TopLogprobs


@dataclass(frozen=True)
class Completion:
    """The result of a request."""

    tokens: list[int]
    """Response tokens in front of EOS or a stop sequence: with `infill` the tokens at the prompt's masks,
    then at most gen_length tokens."""
    finish_reason: str
    """"length", "stop" (EOS, a stop sequence, or a form behind which only EOS could come) or "cancelled"."""
    nfe: int
    """Forward passes over the request."""
    nfe_published: int
    """Passes of the published loop, see `DecodeOutput`."""
    prompt_length: int
    """Tokens of the prompt, its masks included."""
    reused: int
    """Positions of the prompt whose keys and values an earlier request had computed."""
    seconds_waiting: float
    """From `submit` until the request got a lane."""
    seconds: float
    """From `submit` to the end."""
    logprobs: list[float] | None = None
    """With `logprobs`, the log-probability (nats) of each of `tokens`, see `DecodeConfig.logprobs`."""
    draft_nfe: int = 0
    """Calls of the drafter, or of the verifier, for the request; 0 without either."""
    top_logprobs: list[TopLogprobs] | None = None
    """With `top_logprobs`, for each of `tokens` the most probable tokens of its place."""
    end: Scored | None = None
    """With `logprobs`, the token behind `tokens` that ended the response, EOS or the first of a stop
    sequence; None where it ended by its length."""


Event = list[int] | Completion | Exception


@dataclass(frozen=True)
class DraftEvent:
    """The open block after a pass; with an autoregressive model, or a verifier, the tokens of the pass, all
    of them final."""

    nfe: int
    """Passes over the request so far, this one included."""
    start: int
    """Index in the response where the block begins. Tokens before it are final; behind it are masks."""
    tokens: list[int | None]
    """The response's tokens in the block, None for a mask. Rules that edit may change them."""
    drafted: int = 0
    """Tokens that the drafter, or self-speculation, guessed for the pass, or that the verifier judged."""
    accepted: int = 0
    """How many of these tokens were kept. From left to right they are the first of `tokens`, whose last one
    counts as the pass's own."""
    refused: list[int] = field(default_factory=list)
    """The tokens that were not kept: not chosen, or behind an end of the text, in their order."""
    passes: list[int | None] | None = None
    """With `logprobs`, the pass that committed each of `tokens`, None for a mask."""
    logprobs: list[float | None] | None = None
    """With `logprobs`, the log-probability (nats) of each of `tokens`, None for a mask."""


class Subscriber:
    """Gets a handle's events, each once and in order, in whichever thread finds new ones first."""

    def __init__(self, callback: Callable[[Event], None]) -> None:
        self.callback, self.delivered, self._busy = callback, 0, threading.Lock()

    def next(self, events: list[Event]) -> bool:
        """Call back with the next event. False if there is none, or if another thread is calling, which will
        look for more."""
        if self.delivered == len(events) or not self._busy.acquire(blocking=False):
            return False
        try:
            if self.delivered < len(events):
                self.delivered += 1
                self.callback(events[self.delivered - 1])
            return True
        finally:
            self._busy.release()


class Events:
    """A request's events: the engine adds them, and waiting threads and subscribers get them."""

    # Without a lock, of lists that only grow and of queues: a waiting thread may be interrupted anywhere, a
    # callback may call anything, and a fork may happen at any moment.
    def __init__(self) -> None:
        self.all: list[Event] = []
        self.subscribers: list[Subscriber] = []
        self.waiters: list[SimpleQueue[None]] = []

    @property
    def ended(self) -> bool:
        """Whether the last event has come."""
        return bool(self.all) and not isinstance(self.all[-1], list)

    def add(self, event: Event) -> None:
        """Append an event, and wake who waits."""
        self.all.append(event)
        for woken in list(self.waiters):
            woken.put(None)


@dataclass(eq=False)
class Handle:
    """A request. Iterating yields the tokens of each finished block, with an autoregressive model of each
    pass; `result` waits for the end."""

    id: int
    events: Events = field(repr=False)
    _cancel: Callable[[int], None] = field(repr=False)  # a method of the engine, which it keeps alive
    _thread: threading.Thread = field(repr=False)  # the engine's, which must not wait
    logprobs: list[float] = field(default_factory=list, repr=False)
    """With `logprobs`, the log-probability (nats) of each token streamed; added before the tokens' event."""
    top_logprobs: list[TopLogprobs] = field(default_factory=list, repr=False)
    """With `top_logprobs`, likewise the most probable tokens of its place."""

    def __reduce__(self) -> Any:
        raise TypeError("a Handle belongs to its Engine and is neither copied nor pickled; take its result()")

    @property
    def done(self) -> bool:
        """Whether the request is over."""
        return self.events.ended

    def subscribe(self, callback: Callable[[Event], None]) -> None:
        """Call `callback` with every event: a list of token ids for each finished block that has some, then
        once a Completion or an exception.

        Past events are delivered here, and `subscribe` raises what the callback raises. Later events are
        delivered in the engine's thread, so the callback must be quick. There it may submit, cancel and
        close, but not wait for a request; an error that it raises is logged, and the request fails with a
        RuntimeError.
        """
        subscriber = Subscriber(arguments.function("callback", callback))
        while subscriber.next(self.events.all):
            pass
        self.events.subscribers.append(subscriber)
        try:
            while subscriber.next(self.events.all):  # events that came in between
                pass
        except BaseException:
            self.events.subscribers.remove(subscriber)
            raise

    def __iter__(self) -> Iterator[list[int]]:
        """Final tokens of each finished block, in order. Raises as `result` does."""
        for at in itertools.count():
            self._wait(lambda at=at: len(self.events.all) > at)  # type: ignore[misc]
            event = self.events.all[at]
            if not isinstance(event, list):
                self._ended(event)
                return
            yield event

    def result(self, timeout: float | None = None) -> Completion:
        """Wait for the end of the request.

        Raises the error that the request failed with; CancelledError if it was cancelled; TimeoutError after
        `timeout` seconds; RuntimeError in the engine's thread, which must not wait.
        """
        if timeout is not None and not (isinstance(timeout, (int, float)) and timeout == timeout):
            raise ValueError(f"timeout: expected seconds or None, got {timeout!r}")
        self._wait(lambda: self.done, timeout)
        return self._ended(self.events.all[-1])

    def cancel(self) -> None:
        """End the request before the next pass; does nothing if it is over."""
        if not self.done:
            self._cancel(self.id)

    def _wait(self, ready: Callable[[], bool], timeout: float | None = None) -> None:
        if ready():
            return
        if threading.current_thread() is self._thread:
            raise RuntimeError(f"request {self.id}: a callback in the engine's thread cannot wait for it")
        end = None if timeout is None else time.monotonic() + min(timeout, threading.TIMEOUT_MAX / 2)
        woken: SimpleQueue[None] = SimpleQueue()
        self.events.waiters.append(woken)
        try:
            while not ready():
                woken.get(timeout=None if end is None else max(0, end - time.monotonic()))
        except Empty:
            raise TimeoutError(f"request {self.id} has not ended in {timeout} s") from None
        finally:
            self.events.waiters.remove(woken)

    def _ended(self, event: Event) -> Completion:
        if isinstance(event, Exception):
            raise event
        assert isinstance(event, Completion)
        if event.finish_reason == "cancelled":
            raise CancelledError(f"request {self.id} was cancelled")
        return event
