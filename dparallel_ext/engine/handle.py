"""What a request's owner holds: its events as they come, and its end."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

from .. import arguments


@dataclass(frozen=True)
class Completion:
    """What became of a request."""

    tokens: list[int]
    """The response in front of EOS or a stop sequence: with `infill` the tokens at the prompt's masks, then
    at most gen_length tokens."""
    finish_reason: str
    """"length", "stop" (EOS or a stop sequence) or "cancelled"."""
    nfe: int
    """Forward passes that the request was in."""
    nfe_published: int
    """Passes of the published loop, see `DecodeOutput`."""
    prompt_length: int
    """Masks that were to be filled included."""
    reused: int
    """Positions of the prompt whose keys and values an earlier request had computed."""
    seconds_waiting: float
    """From `submit` until it was let in."""
    seconds: float
    """From `submit` to the end."""
    logprobs: list[float] | None = None
    """One for each of `tokens`, where they were asked for: see `decode`."""
    draft_nfe: int = 0
    """Drafts made for it; no drafter, none."""


Event = list[int] | Completion | Exception


@dataclass(frozen=True)
class Draft:
    """What a pass has made of the block that it was over; of an autoregressive model the tokens that it has
    brought, all of them final."""

    nfe: int
    """The passes that the request was in, this one included."""
    start: int
    """Where the block begins in the response. The tokens before it are final, those after it are masks."""
    tokens: list[int | None]
    """The response's tokens in the block, None where there is a mask. Rules that edit may change them."""
    drafted: int = 0
    """Tokens that a drafter had guessed for the pass."""
    accepted: int = 0
    """Of these, how many were the model's own choice: the first of `tokens`."""
    refused: list[int] = field(default_factory=list)
    """The guesses that the model did not take, as the drafter gave them."""
    passes: list[int | None] | None = None
    """Where `logprobs` are asked for: of each of `tokens` the pass that committed it, None of a mask."""
    logprobs: list[float | None] | None = None
    """Where they are asked for: of each of `tokens`, None of a mask."""


class Subscriber:
    """Gets a handle's events, each once and in order, from whichever thread finds that there are more."""

    def __init__(self, callback: Callable[[Event], None]) -> None:
        self.callback, self.told, self._busy = callback, 0, threading.Lock()

    def next(self, events: list[Event]) -> bool:
        """Call with the next event. False where there is none, or another thread is at it and looks again."""
        if self.told == len(events) or not self._busy.acquire(blocking=False):
            return False
        try:
            if self.told < len(events):
                self.told += 1
                self.callback(events[self.told - 1])
            return True
        finally:
            self._busy.release()


class Events:
    """A request's events: the engine adds them, and whoever waits or has subscribed gets them."""

    # Lists that only grow and queues, and no lock: a waiting thread may be interrupted anywhere, a callback
    # may call anything, and a fork may happen at any moment.
    def __init__(self) -> None:
        self.all: list[Event] = []
        self.subscribers: list[Subscriber] = []
        self.waiters: list[SimpleQueue[None]] = []

    @property
    def ended(self) -> bool:
        """Whether the last event is there."""
        return bool(self.all) and not isinstance(self.all[-1], list)

    def add(self, event: Event) -> None:
        self.all.append(event)
        for woken in list(self.waiters):
            woken.put(None)


@dataclass(eq=False)
class Handle:
    """A request. Iterating yields the tokens of each finished block, of an autoregressive model those of each
    pass; `result` waits for all."""

    id: int
    events: Events = field(repr=False)
    _cancel: Callable[[int], None] = field(repr=False)  # a method of the engine, which stays as long
    _thread: threading.Thread = field(repr=False)  # the engine's, which cannot wait
    logprobs: list[float] = field(default_factory=list, repr=False)
    """One for each token streamed so far, where they were asked for; here before the tokens' own event."""

    @property
    def done(self) -> bool:
        """Whether the last event is there."""
        return self.events.ended

    def subscribe(self, callback: Callable[[Event], None]) -> None:
        """Call `callback` with every event: a list of token ids for each finished block that has some, then
        once a Completion or an exception.

        With the events that have been it is called here, and what it raises, `subscribe` raises. With those
        to come it is called in the engine's thread, so it must be quick. There it may submit, cancel and
        close, but wait for no request; if it raises anything, that is logged, and the request fails with a
        RuntimeError.
        """
        subscriber = Subscriber(arguments.function("callback", callback))
        while subscriber.next(self.events.all):
            pass
        self.events.subscribers.append(subscriber)
        try:
            while subscriber.next(self.events.all):  # what came in between
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
        """Wait for the end.

        Raises what the request failed of; CancelledError; or TimeoutError after `timeout` seconds.
        """
        if timeout is not None and not (isinstance(timeout, (int, float)) and timeout == timeout):
            raise ValueError(f"timeout: expected seconds or None, got {timeout!r}")
        self._wait(lambda: self.done, timeout)
        return self._ended(self.events.all[-1])

    def cancel(self) -> None:
        """Leave the computation at the next pass. No error if the request is over."""
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
