"""Requests that come and go, decoded together: continuous admission, shared prefixes, bounded memory.

`decode` is for the prompts at hand; an `Engine` is for prompts that arrive while others are being decoded.
Its thread runs one pass after another over whatever is in its lanes; between passes it lets requests in and
out. What a request gets is what `decode` would give it alone.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import logging
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any

import torch
from torch import Tensor

from . import arguments
from ._C import Scheduler
from .arguments import whole
from .batch import Batch
from .decode import Prompts, check_model, check_settings, make_settings, masks
from .models import Model, for_decoding, traits, warn_beyond
from .rows import Settings, lay_out, whole_length
from .rules import Function, Rule

log = logging.getLogger(__name__)

LARGEST = 2**31 - 1
"""Of the numbers that an engine's memory is made of."""

PATIENCE = 5.0
"""Seconds that the end of the program waits for a callback that does not return."""


class EngineFull(RuntimeError):
    """As many requests wait as may."""


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


@dataclass(frozen=True)
class EngineStats:
    """A snapshot of an engine; counts are since it was made."""

    waiting: int
    active: int
    completed: int
    failed: int
    cancelled: int
    forwards: int
    """Passes run."""
    sequence_passes: int
    """Passes times the requests in each."""
    tokens: int
    """Response tokens of finished blocks."""
    prompt_tokens: int
    """Of the requests let in, without the masks that are filled."""
    reused_tokens: int
    """Of those, how many were not computed again."""
    pages: int
    """All there are."""
    pages_used: int
    """By requests in lanes."""
    pages_kept: int
    """Finished prefixes that no request uses; given up, least recently used first, when pages are needed."""
    page_bytes: int
    """Memory of a page, all layers, keys and values."""
    closed: bool
    """Whether the engine takes no more requests, see `Engine.closed`."""


Event = list[int] | Completion | Exception


@dataclass(frozen=True)
class Draft:
    """What a pass has made of the block that it was over."""

    nfe: int
    """The passes that the request was in, this one included."""
    start: int
    """Where the block begins in the response. The tokens before it are final, those after it are masks."""
    tokens: list[int | None]
    """The response's tokens in the block, None where there is a mask. Rules that edit may change them."""


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
        subscriber = _Subscriber(_callable("callback", callback))
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


def _callable(name: str, value: Any) -> Any:
    if not callable(value):
        raise ValueError(f"{name}: expected a function, got {type(value).__name__}")
    return value


class Engine:
    """Decodes requests as they come, in one thread of its own.

    Args:
        model: one of ours (`dparallel_ext.models`), in evaluation mode; wrapped or adapted as in `decode`.
        cache: as in `decode`; default "block" for block-causal models, else "dual".
        block_length, sub_block_length: as in `decode`, of every request.
        lanes: requests that are decoded at once.
        max_length: positions that one request may have, prompt and response together.
        pages: memory for keys and values, in pages; default: what `lanes` requests of max_length need. A
            request that finds too few waits until others have ended: none fails for want of memory.
        page_size: positions of a page. Default: for block-causal models the multiple of the block that is
            nearest to 32 from above, else 32.
        max_waiting: requests that may wait; one more is refused with EngineFull.
        share: with cache "block", requests that begin alike share the pages of that beginning, those of
            finished requests included as long as there is room. Keys and values do not depend on who computed
            them but for rounding, so this is off where `batch_invariant` is on.
        batch_invariant, graphs, refresh, mask_id: as in `decode`.

    An engine is thread-safe. What one request fails of concerns no other. Use it in a `with` block, or
    `close` it. At the end of the program, whatever ends it, what is still under way is cancelled; an engine
    that nobody refers to any more ends after its last request. A fork of the process has no engine: there
    `submit` raises RuntimeError, and so does the result of a request that was under way.

    Raises:
        ValueError: naming the argument that does not fit.
        RuntimeError: if the program ends already.
    """

    def __init__(
        self,
        model: Model,
        *,
        cache: str | None = None,
        block_length: int | None = None,
        sub_block_length: int | None = None,
        lanes: int = 16,
        max_length: int = 2048,
        pages: int | None = None,
        page_size: int | None = None,
        max_waiting: int = 1024,
        share: bool | None = None,
        batch_invariant: bool = False,
        graphs: bool = True,
        refresh: int | None = None,
        mask_id: int | None = None,
    ) -> None:
        model = for_decoding(model)
        if not isinstance(model, Model):
            raise ValueError(
                "model: expected one of dparallel_ext.models (models.load, or models.wrap for a loaded "
                f"Hugging Face model), got {type(model).__name__}"
            )
        lanes = whole("lanes", lanes, 1, LARGEST)
        max_length = whole("max_length", max_length, 1, LARGEST)
        max_waiting = whole("max_waiting", max_waiting, 1)
        causal = traits(model).block_length is not None
        if cache is None:
            cache = "block" if causal else "dual"
        block_length, sub_block_length, mask_id, refresh = check_model(
            model, block_length, sub_block_length, cache, mask_id, refresh
        )
        if page_size is None:
            page_size = -(-32 // block_length) * block_length if causal else 32
        page_size = whole("page_size", page_size, 1, LARGEST)
        if share is None:
            share = cache == "block" and not batch_invariant
        elif share and (cache != "block" or batch_invariant):
            why = "batch_invariant" if batch_invariant else f"cache {cache!r}"
            raise ValueError(f"share: goes with cache 'block' and without batch_invariant, got {why}")
        if share and page_size % block_length:
            raise ValueError(
                f"page_size: expected a multiple of the blocks of {block_length} to share pages, "
                f"got {page_size}"
            )
        per_lane = -(-max_length // page_size)
        pages = lanes * per_lane if pages is None else whole("pages", pages, 1, LARGEST)
        self.model, self.cache, self.max_length, self.max_waiting = model, cache, max_length, max_waiting
        self.mask_id = mask_id
        try:
            table = torch.zeros((lanes, per_lane), dtype=torch.int64)
            with torch.inference_mode():
                slots = model.new_cache(pages, page_size, table, kept=cache != "none")
                self._batch = Batch(
                    model,
                    lanes,
                    max_length,
                    block_length,
                    cache,
                    mask_id,
                    pad_id=mask_id,
                    device=model.device,
                    sub_block_length=sub_block_length,
                    refresh=refresh,
                    batch_invariant=batch_invariant,
                    graphs=graphs,
                    slots=slots,
                )
        except (RuntimeError, MemoryError) as error:
            raise ValueError(
                f"lanes, max_length, pages: {lanes} lanes of {max_length} positions and {pages} pages of "
                f"{page_size} do not fit into memory ({str(error).partition(chr(10))[0]})"
            ) from error
        self._slots, self._pages = slots, pages
        self._scheduler = Scheduler(lanes=lanes, pages=pages, page_size=page_size, share=share)
        self._share = share
        self._page_bytes = slots.slots[:, :, 0].numel() * slots.slots.element_size()
        self._arrivals: list[Handle] = []  # that the engine's thread has not seen
        self._handles: dict[int, Handle] = {}  # by id: those it has, waiting or running
        self._running: dict[int, Handle] = {}  # by lane
        self._cancelling: list[Handle] = []
        counted = ("completed", "failed", "cancelled", "sequence_passes", "tokens", "prompt_tokens")
        self._counts = dict.fromkeys(counted, 0)
        self._ids = itertools.count()
        self._refusal: str | None = None
        """Why it takes no more requests."""
        self._fault: BaseException | None = None
        """What ended its thread, if it was not `close`."""
        self._process, self._forked = os.getpid(), False
        self._calling = math.inf
        """Since when its thread is in a callback."""
        # Reentrant, since a signal's handler may close the engine in the midst of a `submit`.
        self._lock = threading.RLock()
        self._bell: SimpleQueue[Engine | None] = SimpleQueue()
        self._ended = threading.Lock()  # held until the thread is over; `join` errs once it was interrupted
        self._ended.acquire()
        bell = self._bell
        gone = weakref.ref(self, lambda _: bell.put(None))
        self._thread = threading.Thread(
            target=_serve, args=(bell, self._ended, gone), name="dparallel engine", daemon=True
        )
        _threads.add(self._ended)
        try:
            self._thread.start()
        except RuntimeError:  # there are too many
            _threads.discard(self._ended)
            raise
        _engines[id(self)] = self
        if _leaving:
            self.close()
            raise RuntimeError("the program ends: no engine can begin")

    def submit(
        self,
        prompt: Prompts,
        *,
        gen_length: int = 256,
        infill: bool = False,
        steps: int | None = None,
        threshold: float | None = None,
        selector: str | None = None,
        rule: Rule | Function | str | None = None,
        min_commit: int = 1,
        max_commit: int | None = None,
        score: str | None = None,
        temperature: float = 0.0,
        top_p: float | None = None,
        top_k: int | None = None,
        suppress: Any = None,
        eos_id: int | None = None,
        stop: Sequence[Sequence[int]] = (),
        seed: int | None = None,
        logprobs: bool = False,
        on_draft: Callable[[Draft], None] | None = None,
    ) -> Handle:
        """Ask for `gen_length` tokens after `prompt` (P,) int64: a tensor, an array, a list of ids, or a
        tokenizer's output for one text.

        The other arguments are those of `decode` for one sequence; a sample's key is `seed` alone, as with
        one seed for each sequence there. With `infill`, what is streamed and what a Completion holds are the
        tokens at the places that held masks, in order; pages are shared up to the first of them, and after it
        once they are final. Returns at once.

        logprobs: keep the log-probability of each token, in `Completion.logprobs` and as they come in
            `Handle.logprobs`; for what they are good, see `decode`.
        on_draft: called with a `Draft` after every pass that the request is in. Where the pass has completed
            a block, the event of that block follows. No draft is kept. It is called in the engine's thread,
            so it must be quick; if it raises anything, the request fails. The tokens are the same without it.

        Raises:
            ValueError: naming the argument that does not fit, or a request that could never run.
            EngineFull: if max_waiting requests wait.
            RuntimeError: if the engine is closed, or is another process's.
        """
        self._check_open()
        ids = self._prompt(prompt)
        gen_length = whole("gen_length", gen_length, 0)
        if seed is not None:
            seed = whole("seed", seed, -(2**63))
        if on_draft is not None:
            _callable("on_draft", on_draft)
        batch, masked = self._batch, masks(ids, self.mask_id) if infill else []
        length = whole_length(len(ids), gen_length, batch.block_length, batch.causal)
        if length > self.max_length:
            raise ValueError(
                f"gen_length: prompt and response have {length} positions, max_length is {self.max_length}"
            )
        needed, size, pages = -(-length // self._slots.page_size), self._slots.page_size, self._pages
        if needed > pages:
            raise ValueError(
                f"gen_length: {length} positions need {needed} pages of {size}, and there are {pages}"
            )
        warn_beyond(self.model, "gen_length", length, stacklevel=2)
        (settings,) = make_settings(
            traits(self.model),
            self.cache,
            1,
            steps=steps,
            threshold=threshold,
            selector=selector,
            rule=rule,
            min_commit=min_commit,
            max_commit=max_commit,
            score=score,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            suppress=suppress,
            eos_id=eos_id,
            stop=stop,
            seed=None if seed is None else torch.tensor([seed]),
            record=logprobs,
        )
        layout = lay_out(len(ids), gen_length, batch.block_length, batch.causal, settings.steps, masked)
        check_settings(self.model, [settings], batch.block_length, batch.sub_block_length)
        if settings.suppress is not None:
            arguments.check_ids("suppress", [settings.suppress.cpu().reshape(-1)], self.model.shape.rows)
        # A page with a mask is not final, and with shifted logits the position before the first mask is
        # computed in any case: it gives the next token.
        known = layout.columns[0] if layout.columns else len(ids)
        reusable = max(0, known - batch.traits.shift)
        with self._lock:
            self._check_open()
            if self._waiting >= self.max_waiting:
                raise EngineFull(f"{self.max_waiting} requests wait already (max_waiting)")
            handle = Handle(
                next(self._ids), self, ids, gen_length, masked, length, reusable, settings, on_draft
            )
            self._arrivals.append(handle)
        self._ring()
        return handle

    @property
    def _waiting(self) -> int:
        return len(self._arrivals) + int(self._scheduler.waiting)

    def _check_open(self) -> None:
        if self._refusal is not None:
            raise RuntimeError(self._refusal) from self._fault

    def _prompt(self, prompt: Any) -> Tensor:
        rows = arguments.prompts(prompt) or [torch.zeros(0, dtype=torch.int64)]
        if len(rows) != 1:
            raise ValueError(f"prompt: expected one prompt (P,), got {len(rows)}; submit each by itself")
        ids = rows[0].to("cpu", copy=True)  # the caller may change the prompt while it waits
        arguments.check_ids("prompt", [ids], self.model.shape.rows)
        return ids

    @property
    def stats(self) -> EngineStats:
        if self._forked:
            self._check_open()
        with self._lock:
            s = self._scheduler.stats
            return EngineStats(
                waiting=self._waiting,
                active=len(self._running),
                forwards=self._batch.forwards,
                reused_tokens=s.reused_tokens,
                pages=s.pages,
                pages_used=s.used,
                pages_kept=s.kept,
                page_bytes=self._page_bytes,
                closed=self.closed,
                **self._counts,
            )

    @property
    def closed(self) -> bool:
        """Whether it takes no more requests: since `close`, or since a fault of its own."""
        return self._refusal is not None

    def close(self, *, cancel: bool = False) -> None:
        """Take no more requests, end those there are (or cancel them), and wait for the thread.

        From a callback it does not wait. In a fork of the process there is nothing to close.
        """
        self._close(cancel)
        if threading.current_thread() is not self._thread:
            with self._ended:
                pass

    def _close(self, cancel: bool) -> None:
        with self._lock:
            self._refusal = self._refusal or "the engine is closed"
            if cancel:
                self._cancelling += [*self._handles.values(), *self._arrivals]
        self._ring()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_unused: object) -> None:
        self.close(cancel=kind is not None)

    def _cancel(self, handle: Handle) -> None:
        with self._lock:
            self._cancelling.append(handle)
        self._ring()

    def _ring(self) -> None:
        """Let the thread look at what has changed; if it has not come since the last ring, it will."""
        if self._bell.empty():
            self._bell.put(self)

    def _disown(self) -> None:
        """This is a fork of the engine's process. There is no thread here, and it may have held the locks."""
        self._refusal = f"the engine is process {self._process}'s, of which this is a fork: make another here"
        self._forked = True
        self._lock, self._ended, self._bell = threading.RLock(), threading.Lock(), SimpleQueue()
        for handle in [*self._handles.values(), *self._arrivals]:
            handle._subscribers = []
            if not handle.done:
                handle._add(RuntimeError(f"request {handle.id}: {self._refusal}"))
        self._handles, self._running, self._arrivals, self._cancelling = {}, {}, [], []

    # --- the engine's thread -----------------------------------------------------------------------

    def _work(self) -> bool:
        """Run passes until no request is left; returns whether there may come more."""
        device = self.model.device
        try:
            with torch.inference_mode(), torch.cuda.device(device if device.type == "cuda" else -1):
                while True:
                    with self._lock:
                        gone = self._receive()
                        if not self._handles:
                            return not self.closed
                    for handle in gone:
                        self._end(handle, "cancelled")
                    self._admit()
                    if self._running:
                        self._pass()
        except BaseException as error:  # a fault of ours: nobody shall wait for a thread that is gone
            self._break(error)
            return False

    def _receive(self) -> list[Handle]:
        """Take in what arrived; returns those that are to be cancelled."""
        for handle in self._arrivals:
            self._handles[handle.id] = handle
            self._scheduler.submit(handle.id, handle._prompt[: handle._reusable].tolist(), handle._length)
        self._arrivals = []
        gone, self._cancelling = self._cancelling, []
        return gone

    def _break(self, error: BaseException) -> None:
        """The thread ends with `error`, and all requests with it."""
        log.critical("the engine's thread ends", exc_info=error)
        event = _failure(error, "the engine's thread ended")
        with self._lock:
            self._refusal = f"the engine is closed: its thread ended with {type(error).__name__}"
            self._fault = error
            left = {handle.id: handle for handle in [*self._handles.values(), *self._arrivals]}
            for handle in left.values():
                with contextlib.suppress(Exception):  # the scheduler may not know it
                    self._scheduler.release(handle.id)
                handle._add(event)
            self._counts["failed"] += len(left)
            self._handles, self._running, self._arrivals, self._cancelling = {}, {}, [], []
        for handle in left.values():
            self._tell(handle)

    def _tell(self, handle: Handle) -> None:
        """Let the subscribers have what they have not had.

        Raises RuntimeError where a callback raises anything, unless the request is over.
        """
        for subscriber in list(handle._subscribers):
            while True:
                try:
                    if not self._call(handle, subscriber.next, handle._events):
                        break
                except RuntimeError:
                    if not handle.done:
                        raise

    def _call(self, handle: Handle, call: Callable[[Any], Any], argument: Any) -> Any:
        """`call(argument)`, a callback. Raises RuntimeError where it raises anything, SystemExit too."""
        self._calling = time.monotonic()
        try:
            return call(argument)
        except BaseException as error:
            log.exception("a callback of Handle.subscribe or on_draft failed")
            raise RuntimeError(f"request {handle.id}: a callback raised {type(error).__name__}") from error
        finally:
            self._calling = math.inf

    def _admit(self) -> None:
        while True:
            with self._lock:
                found = self._scheduler.admit()
                if found is None:
                    return
                handle = self._handles[found.id]
                self._running[found.lane] = handle
                handle._lane, handle._admitted = found.lane, time.monotonic()
                handle._reused = handle._shared = found.reused
                self._counts["prompt_tokens"] += len(handle._prompt) - len(handle._masked)
            try:
                self._slots.assign(found.lane, found.pages)
                row = self._batch.admit(
                    found.lane,
                    handle._prompt.to(self._batch.tokens.device),
                    handle._gen_length,
                    handle._settings,
                    masked=handle._masked,
                    stored=found.reused,
                )
            except BaseException as error:
                self._end(handle, error)
            else:
                if row.done:  # nothing to decode
                    self._end(handle, "length")

    def _pass(self) -> None:
        """One pass over all lanes; if it fails, each request by itself, to find whose fault it is."""
        blocks = {lane: self._batch.rows[lane].block for lane in self._running}
        try:
            finished = self._step(list(blocks))
        except BaseException as error:
            if len(blocks) == 1:
                return self._end(self._running[next(iter(blocks))], error)
            finished = []
            for lane in blocks:
                try:
                    finished += self._step([lane])
                except BaseException as own:
                    self._end(self._running[lane], own)
        self._batch.enter(finished)
        for lane, handle in list(self._running.items()):
            try:
                self._report(handle, blocks[lane], lane in finished)
            except BaseException as error:
                self._end(handle, error)

    def _report(self, handle: Handle, block: tuple[int, int], finished: bool) -> None:
        """What a pass over the block in columns [start, end) has made of it."""
        assert handle._lane is not None
        row = self._batch.rows[handle._lane]
        if handle._on_draft is not None:
            self._call(handle, handle._on_draft, self._draft(handle, *block))
        if self._share:
            self._publish(handle, row.stored)
        if finished:
            self._stream(handle)
            if row.done:
                self._end(handle, "stop" if row.stopped and row.kept < handle._asked else "length")

    def _step(self, lanes: list[int]) -> list[int]:
        finished = self._batch.step(lanes)
        with self._lock:
            self._counts["sequence_passes"] += len(lanes)
        return finished

    def _publish(self, handle: Handle, stored: int) -> None:
        """Let others share the pages of the first `stored` positions, which are final."""
        assert handle._lane is not None
        size = self._slots.page_size
        if stored // size <= handle._shared // size:
            return
        tokens = self._batch.tokens[handle._lane, :stored].tolist()
        with self._lock:
            replaced = self._scheduler.store(handle.id, tokens)
        for index, page in replaced:
            self._slots.assign(handle._lane, [page], index)
        handle._shared = stored

    def _draft(self, handle: Handle, start: int, end: int) -> Draft:
        assert handle._lane is not None
        row = self._batch.rows[handle._lane]
        first, last = row.index(start), min(row.index(end), handle._asked)
        ids = self._tokens(handle._lane, row.columns[first:last])
        return Draft(row.nfe, first, [None if token == self.mask_id else token for token in ids])

    def _response(self, handle: Handle) -> list[int]:
        """Tokens of finished blocks, in front of what ended them."""
        assert handle._lane is not None
        row = self._batch.rows[handle._lane]
        final = len(row.columns) if row.done else row.index(row.block[0])
        return self._tokens(handle._lane, row.columns[: min(final, row.kept, handle._asked)])

    def _tokens(self, lane: int, columns: Sequence[int]) -> list[int]:
        """What stands in `columns`, which are ascending."""
        if not columns:
            return []
        first, last = columns[0], columns[-1] + 1
        ids: list[int] = self._batch.tokens[lane, first:last].tolist()
        return [ids[column - first] for column in columns]

    def _logprobs(self, handle: Handle, first: int, last: int) -> list[float]:
        """Of tokens [first, last) of the response."""
        if first == last:
            return []
        assert handle._lane is not None
        columns = self._batch.rows[handle._lane].columns[first:last]
        start, end = columns[0], columns[-1] + 1
        found: list[float] = self._batch.passes.trajectory.logprob[handle._lane, start:end].tolist()
        return [found[column - start] for column in columns]

    def _stream(self, handle: Handle) -> None:
        assert handle._lane is not None
        row, response = self._batch.rows[handle._lane], self._response(handle)
        # What a stop sequence may begin with is held back until it is known whether it does.
        held = 0
        if not row.done:
            for stop in handle._settings.stop:
                for size in range(min(len(stop) - 1, len(response)), held, -1):
                    if tuple(response[-size:]) == stop[:size]:
                        held = size
                        break
        fresh = response[handle._sent : len(response) - held]
        if fresh:
            if handle._settings.record:
                handle.logprobs += self._logprobs(handle, handle._sent, handle._sent + len(fresh))
            handle._sent += len(fresh)
            with self._lock:
                self._counts["tokens"] += len(fresh)
            handle._add(fresh)
            self._tell(handle)

    def _end(self, handle: Handle, how: str | BaseException) -> None:
        """The request is over, unless it was before: free its lane and pages, and tell whoever waits."""
        if handle.id not in self._handles:
            return
        event: Event
        try:
            event = (
                self._completion(handle, how) if isinstance(how, str) else _failure(how, "the model raised")
            )
        except Exception as error:
            event = error
        kind = event.finish_reason if isinstance(event, Completion) else "failed"
        if handle._lane is not None:
            self._batch.release(handle._lane)
        with self._lock:
            self._scheduler.release(handle.id)
            if handle._lane is not None:
                del self._running[handle._lane]
            self._counts[kind if kind in self._counts else "completed"] += 1
            handle._add(event)
            del self._handles[handle.id]
        self._tell(handle)

    def _completion(self, handle: Handle, reason: str) -> Completion:
        now, row = time.monotonic(), None if handle._lane is None else self._batch.rows[handle._lane]
        admitted = now if handle._admitted is None else handle._admitted
        tokens = [] if row is None else self._response(handle)
        return Completion(
            tokens=tokens,
            logprobs=self._logprobs(handle, 0, len(tokens)) if handle._settings.record else None,
            finish_reason=reason,
            nfe=0 if row is None else row.nfe,
            nfe_published=0 if row is None else row.published,
            prompt_length=len(handle._prompt),
            reused=handle._reused,
            seconds_waiting=admitted - handle._submitted,
            seconds=now - handle._submitted,
        )


def _failure(error: BaseException, what: str) -> Exception:
    """`error`, or what says so of one that would end the thread of whoever waits for the request."""
    if isinstance(error, Exception):
        return error
    made = RuntimeError(f"{what}: {type(error).__name__}")
    made.__cause__ = error
    return made


def _serve(bell: SimpleQueue[Engine | None], ended: threading.Lock, _gone: weakref.ref[Engine]) -> None:
    """An engine's thread. While there is no request it does not keep the engine, whose end rings too."""
    process = os.getpid()
    try:
        while (engine := bell.get()) is not None and engine._work():
            del engine
    finally:
        if os.getpid() != process:  # a callback forked and came back, to a thread that there is no way out of
            os._exit(1)
        _threads.discard(ended)
        ended.release()


# --- the end of the program, and forks ---------------------------------------------------------------

_engines: weakref.WeakValueDictionary[int, Engine] = weakref.WeakValueDictionary()
_threads: set[threading.Lock] = set()
"""`Engine._ended` of each thread that is there; one that has just dropped its engine frees its memory."""
_leaving = False


def _open_engines() -> list[Engine]:
    found = [reference() for reference in _engines.valuerefs()]
    return [engine for engine in found if engine is not None]


@atexit.register
def _leave() -> None:
    """Close the engines: the interpreter's end aborts a thread that computes."""
    global _leaving
    _leaving = True
    left = _open_engines()
    for engine in left:
        engine._close(cancel=True)
    while _threads:
        stuck = sum(time.monotonic() - engine._calling > PATIENCE for engine in left)
        if stuck >= len(_threads):
            log.warning("the program ends, and a callback of a request has not returned")
            break
        time.sleep(0.002)


def _forked() -> None:
    _threads.clear()
    for engine in _open_engines():
        engine._disown()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
