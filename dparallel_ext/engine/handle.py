"""What a request's owner holds: its events as they come, and its end."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from torch import Tensor

from .. import arguments
from ..rows import Settings

if TYPE_CHECKING:
    from .engine import Engine


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


Event = list[int] | Completion | Exception


@dataclass(frozen=True)
class Draft:
    """What a pass has made of the block that it was over."""

    nfe: int
    """The passes that the request was in, this one included."""
    start: int
    """Where the block begins in the response. The tokens before it are final, those after it are masks."""
    tokens: list[int | None]
    """The response's tokens in the block, None where there is a mask; later passes change none of them."""


class _Subscriber:
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


@dataclass(eq=False)
class Handle:
    """A request. Iterating yields the tokens of each finished block; `result` waits for all."""

    # Lists that only grow and queues, and no lock: a waiting thread may be interrupted anywhere, a callback
    # may call anything, and a fork may happen at any moment.
    id: int
    _engine: Engine = field(repr=False)
    _prompt: Tensor = field(repr=False)
    _gen_length: int
    _masked: list[int] = field(repr=False)  # columns of the prompt that are filled too
    _length: int = field(repr=False)  # positions of prompt and response
    _reusable: int = field(repr=False)  # positions in front, whose keys and values others may have computed
    _settings: Settings = field(repr=False)
    _on_draft: Callable[[Draft], None] | None = field(default=None, repr=False)
    _submitted: float = field(default_factory=time.monotonic, repr=False)
    _admitted: float | None = field(default=None, repr=False)
    _lane: int | None = field(default=None, repr=False)
    _reused: int = field(default=0, repr=False)
    _shared: int = field(default=0, repr=False)  # positions whose pages the scheduler knows to be final
    _sent: int = field(default=0, repr=False)  # response tokens that were streamed
    _events: list[Event] = field(default_factory=list, repr=False)
    _subscribers: list[_Subscriber] = field(default_factory=list, repr=False)
    _waiters: list[SimpleQueue[None]] = field(default_factory=list, repr=False)
    logprobs: list[float] = field(default_factory=list, repr=False)
    """One for each token streamed so far, where they were asked for; here before the tokens' own event."""

    @property
    def _asked(self) -> int:
        """Tokens that were asked for; a block-causal model fills its last block beyond them."""
        return len(self._masked) + self._gen_length

    @property
    def done(self) -> bool:
        """Whether the last event is there."""
        return bool(self._events) and not isinstance(self._events[-1], list)

    def subscribe(self, callback: Callable[[Event], None]) -> None:
        """Call `callback` with every event: a list of token ids for each finished block that has some, then
        once a Completion or an exception.

        With the events that have been it is called here, and what it raises, `subscribe` raises. With those
        to come it is called in the engine's thread, so it must be quick. There it may submit, cancel and
        close, but wait for no request; if it raises anything, that is logged, and the request fails with a
        RuntimeError.
        """
        subscriber = _Subscriber(arguments.function("callback", callback))
        while subscriber.next(self._events):
            pass
        self._subscribers.append(subscriber)
        try:
            while subscriber.next(self._events):  # what came in between
                pass
        except BaseException:
            self._subscribers.remove(subscriber)
            raise

    def __iter__(self) -> Iterator[list[int]]:
        """Final tokens of each finished block, in order. Raises as `result` does."""
        for at in itertools.count():
            self._wait(lambda at=at: len(self._events) > at)  # type: ignore[misc]
            event = self._events[at]
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
        return self._ended(self._events[-1])

    def cancel(self) -> None:
        """Leave the computation at the next pass. No error if the request is over."""
        if not self.done:
            self._engine._cancel(self)

    def _wait(self, ready: Callable[[], bool], timeout: float | None = None) -> None:
        if ready():
            return
        if threading.current_thread() is self._engine._thread:
            raise RuntimeError(f"request {self.id}: a callback in the engine's thread cannot wait for it")
        end = None if timeout is None else time.monotonic() + min(timeout, threading.TIMEOUT_MAX / 2)
        woken: SimpleQueue[None] = SimpleQueue()
        self._waiters.append(woken)
        try:
            while not ready():
                woken.get(timeout=None if end is None else max(0, end - time.monotonic()))
        except Empty:
            raise TimeoutError(f"request {self.id} has not ended in {timeout} s") from None
        finally:
            self._waiters.remove(woken)

    def _ended(self, event: Event) -> Completion:
        if isinstance(event, Exception):
            raise event
        assert isinstance(event, Completion)
        if event.finish_reason == "cancelled":
            raise CancelledError(f"request {self.id} was cancelled")
        return event

    def _add(self, event: Event) -> None:
        self._events.append(event)
        for woken in list(self._waiters):
            woken.put(None)
