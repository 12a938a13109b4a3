"""The work of the engine's thread: it takes in requests and runs passes over them."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .._C import Scheduler
from ..cache import KVCache
from .handle import Completion, DraftEvent, Event, Events, Handle, Scored, TopLogprobs
from .kinds import AnyBatch, ModelKind, Region, RequestPlan

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Request:
    """A request and its progress, as the engine sees it."""

    handle: Handle
    events: Events
    """The handle's events."""
    plan: RequestPlan
    on_draft: Callable[[DraftEvent], None] | None
    submitted: float = field(default_factory=time.monotonic)
    admitted: float | None = None
    lane: int = -1
    """-1: none yet."""
    reused: int = 0
    shared: int = 0
    """Positions whose pages were published to the scheduler as final."""
    sent: int = 0
    """Response tokens streamed so far."""

    @property
    def id(self) -> int:
        return self.handle.id


class EngineCore:
    """Takes requests from their arrival to their end.

    Only the engine's thread calls `work` and its steps (receive, admit, advance, publish, end); any thread
    may call the rest.

    Args:
        kind: the kind of the model.
        batch: the batch that `kind` has made.
        kv_cache: the batch's cache, whose pages the scheduler assigns.
    """

    def __init__(self, kind: ModelKind, batch: AnyBatch, kv_cache: KVCache, scheduler: Scheduler) -> None:
        self.batch, self.scheduler, self._kv_cache = batch, scheduler, kv_cache
        self._kind = kind
        self.arrivals: list[Request] = []  # submitted, and not yet received by the engine's thread
        self.requests: dict[int, Request] = {}  # by id: received, waiting or running
        self.running: dict[int, Request] = {}  # by lane
        self._cancelling: list[int] = []  # ids
        self._calls: list[tuple[Callable[[], Any], Future[Any]]] = []  # to make between two passes
        counted = ("completed", "failed", "cancelled", "sequence_passes", "tokens", "prompt_tokens")
        self.counts = dict.fromkeys((*counted, "drafted_tokens", "accepted_tokens"), 0)
        self._refusal: str | None = None
        """Why it takes no more requests; None while it does."""
        self._fault: BaseException | None = None
        """The error that ended its thread, if any."""
        self.calling = math.inf
        """`time.monotonic()` when the thread entered the callback that it is in; inf outside callbacks."""
        # Reentrant, since a signal's handler may close the engine in the midst of a `submit`.
        self.lock = threading.RLock()

    @property
    def waiting(self) -> int:
        """Requests that are in no lane yet."""
        return len(self.arrivals) + int(self.scheduler.waiting)

    @property
    def closed(self) -> bool:
        """Whether it takes no more requests."""
        return self._refusal is not None

    def check_open(self) -> None:
        """Raise RuntimeError if it takes no more requests."""
        if self._refusal is not None:
            raise RuntimeError(self._refusal) from self._fault

    def close(self, cancel: bool) -> None:
        """Take no more requests; cancel: end the requests that it has before the next pass."""
        with self.lock:
            self._refusal = self._refusal or "the engine is closed"
            if cancel:
                self._cancelling += [*self.requests, *(request.id for request in self.arrivals)]
                for _, future in self._calls:
                    future.cancel()

    def call(self, function: Callable[[], Any]) -> Future[Any]:
        """The result to come of `function`, called between two passes. Raises RuntimeError if no more
        requests are taken."""
        future: Future[Any] = Future()
        with self.lock:
            self.check_open()
            self._calls.append((function, future))
        return future

    def cancel(self, id: int) -> None:
        """End a request before the next pass, if it is not over."""
        with self.lock:
            self._cancelling.append(id)

    def refuse_in_fork(self, refusal: str) -> None:
        """Fail all requests: this process is a fork, without the engine's thread, which may hold the lock."""
        self._refusal = refusal
        self.lock = threading.RLock()
        for request in [*self.requests.values(), *self.arrivals]:
            request.events.subscribers = []
            if not request.events.ended:
                request.events.add(RuntimeError(f"request {request.id}: {self._refusal}"))
        self.requests, self.running, self.arrivals, self._cancelling = {}, {}, [], []
        self._fail_calls(RuntimeError(self._refusal))

    def work(self) -> bool:
        """Run passes until no request is left; return whether more may come."""
        device = self.batch.model.device
        try:
            with torch.inference_mode(), torch.cuda.device(device if device.type == "cuda" else -1):
                while True:
                    with self.lock:
                        cancelled = self.receive()
                        call = self._calls.pop(0) if self._calls else None
                        if not self.requests and call is None:
                            return not self.closed
                    for request in cancelled:
                        self.end(request, "cancelled")
                    if call is not None:  # one between two passes, so that requests go on
                        self._make(*call)
                    self.admit()
                    if self.running:
                        self.advance()
        except BaseException as error:  # a bug: no caller may be left waiting for a dead thread
            self._fail_all(error)
            return False

    def _make(self, function: Callable[[], Any], future: Future[Any]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(_failure(error, "a call in the engine's thread"))

    def _fail_calls(self, error: Exception) -> None:
        calls, self._calls = self._calls, []
        for _, future in calls:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)

    def receive(self) -> list[Request]:
        """Take in the requests that have arrived; return the requests to cancel."""
        for request in self.arrivals:
            self.requests[request.id] = request
            plan = request.plan
            self.scheduler.submit(request.id, plan.prompt[: plan.reusable].tolist(), plan.length)
        self.arrivals = []
        ids, self._cancelling = self._cancelling, []
        return [self.requests[id] for id in ids if id in self.requests]

    def _fail_all(self, error: BaseException) -> None:
        """End all requests, since the thread ends with `error`."""
        log.critical("the engine's thread ends", exc_info=error)
        event = _failure(error, "the engine's thread ended")
        with self.lock:
            self._refusal = f"the engine is closed: its thread ended with {type(error).__name__}"
            self._fault = error
            left = {request.id: request for request in [*self.requests.values(), *self.arrivals]}
            for request in left.values():
                with contextlib.suppress(Exception):  # the scheduler may not know it
                    self.scheduler.release(request.id)
                request.events.add(event)
            self.counts["failed"] += len(left)
            self.requests, self.running, self.arrivals, self._cancelling = {}, {}, [], []
        self._fail_calls(event)
        for request in left.values():
            self._notify(request)

    def _notify(self, request: Request) -> None:
        """Call the request's subscribers with the events that they have not had.

        Raises RuntimeError if a callback raises anything, unless the request is over.
        """
        for subscriber in list(request.events.subscribers):
            while True:
                try:
                    if not self._call(request, subscriber.next, request.events.all):
                        break
                except RuntimeError:
                    if not request.events.ended:
                        raise

    def _call(self, request: Request, call: Callable[[Any], Any], argument: Any) -> Any:
        """Run the callback `call(argument)`. Raises RuntimeError if it raises anything, even SystemExit."""
        self.calling = time.monotonic()
        try:
            return call(argument)
        except BaseException as error:
            log.exception("a callback of Handle.subscribe or on_draft failed")
            raise RuntimeError(f"request {request.id}: a callback raised {type(error).__name__}") from error
        finally:
            self.calling = math.inf

    def admit(self) -> None:
        """Put waiting requests into free lanes."""
        while True:
            with self.lock:
                admitted = self.scheduler.admit()
                if admitted is None:
                    return
                request = self.requests[admitted.id]
                self.running[admitted.lane] = request
                request.lane, request.admitted = admitted.lane, time.monotonic()
                request.reused = request.shared = admitted.reused
                self.counts["prompt_tokens"] += len(request.plan.prompt) - len(request.plan.masked)
            try:
                self._kv_cache.assign(admitted.lane, admitted.pages)
                sequence = self._kind.admit(self.batch, admitted.lane, request.plan, admitted.reused)
            except BaseException as error:
                self.end(request, error)
            else:
                if sequence.done:  # nothing to decode
                    self.end(request, "length")

    def advance(self) -> None:
        """Run one pass over all lanes; if it fails, run each request by itself, and end the requests that
        fail."""
        opened = {lane: self.batch.sequences[lane].open for lane in self.running}
        try:
            finished = self._step(list(opened))
        except BaseException as error:
            if len(opened) == 1:
                return self.end(self.running[next(iter(opened))], error)
            finished = []
            for lane in opened:
                try:
                    finished += self._step([lane])
                except BaseException as lane_error:
                    self.end(self.running[lane], lane_error)
        self.batch.enter(finished)
        for lane, request in list(self.running.items()):
            try:
                self._report(request, opened[lane], lane in finished)
            except BaseException as error:
                self.end(request, error)

    def _report(self, request: Request, opened: Sequence[Region], finished: bool) -> None:
        """Report a pass to a request: its draft, the tokens of finished blocks, its end.

        opened: the request's regions that were open before the pass. finished: whether it completed a block.
        """
        sequence = self.batch.sequences[request.lane]
        if request.on_draft is not None:
            self._call(request, request.on_draft, self._draft(request, opened))
        self.publish(request, sequence.num_cached)
        if finished:
            self._stream(request)
            if sequence.done:
                stopped = sequence.stopped and sequence.kept < request.plan.asked
                self.end(request, "stop" if stopped or self._formed(request) else "length")

    def _formed(self, request: Request) -> bool:
        """Whether the response has its form so that no token could follow, though none says its end."""
        settings = request.plan.settings
        automaton = settings.automaton
        if automaton is None:
            return False
        return automaton.ends(automaton.after(0, self._response(request)), settings.eos_ids)

    def _step(self, lanes: list[int]) -> list[int]:
        finished = self.batch.step(lanes)
        sequences = [self.batch.sequences[lane] for lane in lanes]
        with self.lock:
            self.counts["sequence_passes"] += len(lanes)
            self.counts["drafted_tokens"] += sum(sequence.drafted for sequence in sequences)
            self.counts["accepted_tokens"] += sum(sequence.accepted for sequence in sequences)
        return finished

    def publish(self, request: Request, stored: int) -> None:
        """Let other requests share the pages of the first `stored` positions, which are final."""
        size = self._kv_cache.page_size
        if stored // size <= request.shared // size:
            return
        tokens = self.batch.tokens[request.lane, :stored].tolist()
        with self.lock:
            replaced = self.scheduler.store(request.id, tokens)
        for index, page in replaced:
            self._kv_cache.assign(request.lane, [page], index)
        request.shared = stored

    def _draft(self, request: Request, opened: Sequence[Region]) -> DraftEvent:
        sequence = self.batch.sequences[request.lane]
        start, end = self._kind.draft_columns(sequence, opened)
        first, last = sequence.index(start), min(sequence.index(end), request.plan.asked)
        columns = sequence.columns[first:last]
        ids: list[int] = _at(self.batch.tokens[request.lane], columns)
        tokens = [None if token == self.batch.mask_id else token for token in ids]
        draft = DraftEvent(
            self.batch.nfe[request.lane],
            first,
            tokens,
            sequence.drafted,
            sequence.accepted,
            list(sequence.refused),
        )
        if not request.plan.settings.record:
            return draft

        def known(values: Tensor) -> list[Any]:
            """The values (lanes, width) of the draft's tokens; None for masks."""
            numbers = _at(values[request.lane], columns)
            return [None if token is None else value for token, value in zip(tokens, numbers, strict=True)]

        trajectory = self.batch.trajectory
        return replace(draft, passes=known(trajectory.step), logprobs=known(trajectory.logprob))

    def _response(self, request: Request, first: int = 0) -> list[int]:
        """Final response tokens from number `first` on, without EOS or stop sequence."""
        sequence = self.batch.sequences[request.lane]
        final = len(sequence.columns) if sequence.done else sequence.index(sequence.block[0])
        return _at(
            self.batch.tokens[request.lane],
            sequence.columns[first : min(final, sequence.kept, request.plan.asked)],
        )

    def _logprobs(self, request: Request, first: int, last: int) -> list[float]:
        """Log-probabilities of tokens [first, last) of the response."""
        columns = self.batch.sequences[request.lane].columns[first:last]
        return _at(self.batch.trajectory.logprob[request.lane], columns)

    def _top(self, request: Request, first: int, last: int) -> list[TopLogprobs]:
        """The most probable tokens of the places of the same tokens; empty if they are not requested."""
        count, top = request.plan.settings.top_logprobs, self.batch.trajectory.top
        if not count or top is None:
            return []
        columns = self.batch.sequences[request.lane].columns[first:last]
        ids, logprobs = (_at(values[request.lane, :, :count], columns) for values in top)
        return [
            [(token, logprob) for token, logprob in zip(*place, strict=True) if token >= 0]
            for place in zip(ids, logprobs, strict=True)
        ]

    def _stream(self, request: Request) -> None:
        fresh = self._response(request, request.sent)
        # Hold back the last tokens if they may begin a stop sequence. Tokens sent earlier do not begin one.
        held = 0
        if not self.batch.sequences[request.lane].done:
            for stop in request.plan.settings.stop:
                for size in range(min(len(stop) - 1, len(fresh)), held, -1):
                    if tuple(fresh[-size:]) == stop[:size]:
                        held = size
                        break
        fresh = fresh[: len(fresh) - held]
        if fresh:
            if request.plan.settings.record:
                sent = request.sent, request.sent + len(fresh)
                request.handle.logprobs += self._logprobs(request, *sent)
                request.handle.top_logprobs += self._top(request, *sent)
            request.sent += len(fresh)
            with self.lock:
                self.counts["tokens"] += len(fresh)
            request.events.add(fresh)
            self._notify(request)

    def end(self, request: Request, how: str | BaseException) -> None:
        """End the request, unless it has ended: free its lane and pages, and send its last event.

        how: the finish reason, or the error that it failed with.
        """
        if request.id not in self.requests:
            return
        event: Event
        try:
            event = (
                self._completion(request, how) if isinstance(how, str) else _failure(how, "the model raised")
            )
        except Exception as error:
            event = error
        kind = event.finish_reason if isinstance(event, Completion) else "failed"
        if request.lane >= 0:
            self.batch.release(request.lane)
        with self.lock:
            self.scheduler.release(request.id)
            if request.lane >= 0:
                del self.running[request.lane]
            self.counts[kind if kind in self.counts else "completed"] += 1
            request.events.add(event)
            del self.requests[request.id]
        self._notify(request)

    def _completion(self, request: Request, reason: str) -> Completion:
        now, record = time.monotonic(), request.plan.settings.record
        tokens, logprobs, top = list[int](), list[float](), list[TopLogprobs]()
        nfe = published = draft_nfe = 0
        end = None
        if request.lane >= 0:
            sequence, tokens = self.batch.sequences[request.lane], self._response(request)
            if record:
                logprobs = self._logprobs(request, 0, len(tokens))
                top = request.handle.top_logprobs + self._top(request, request.sent, len(tokens))
            nfe, published = self.batch.nfe[request.lane], sequence.published
            draft_nfe = sequence.draft_nfe
            if record and sequence.stopped and len(tokens) < request.plan.asked:
                column = sequence.columns[len(tokens)]
                values = self.batch.tokens[request.lane], self.batch.trajectory.logprob[request.lane]
                of_place = self._top(request, len(tokens), len(tokens) + 1)
                end = Scored(int(values[0][column]), float(values[1][column]), *(of_place or [[]]))
        return Completion(
            tokens=tokens,
            logprobs=logprobs if record else None,
            top_logprobs=top if request.plan.settings.top_logprobs else None,
            finish_reason=reason,
            nfe=nfe,
            nfe_published=published,
            draft_nfe=draft_nfe,
            end=end,
            prompt_length=len(request.plan.prompt),
            reused=request.reused,
            seconds_waiting=(now if request.admitted is None else request.admitted) - request.submitted,
            seconds=now - request.submitted,
        )


def _at(values: Tensor, columns: Sequence[int]) -> list[Any]:
    """The values (width,) of `columns`, which are ascending."""
    if not columns:
        return []
    first, last = columns[0], columns[-1] + 1
    numbers = values[first:last].tolist()
    return [numbers[column - first] for column in columns]


def _failure(error: BaseException, what: str) -> Exception:
    """`error`; a RuntimeError that names it, if raising `error` itself would end the waiting thread."""
    if isinstance(error, Exception):
        return error
    failure = RuntimeError(f"{what}: {type(error).__name__}")
    failure.__cause__ = error
    return failure
