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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from .. import arguments
from .._C import Scheduler
from ..arguments import whole
from ..batch import Batch
from ..decode import Prompts, check_model, check_settings, make_settings, masks
from ..models import Model, for_decoding, traits, warn_beyond
from ..rows import Settings, lay_out, whole_length
from ..rules import Function, Rule
from .handle import Completion, Draft, Event, Events, Handle

log = logging.getLogger(__name__)

LARGEST = 2**31 - 1
"""Of the numbers that an engine's memory is made of."""

PATIENCE = 5.0
"""Seconds that the end of the program waits for a callback that does not return."""


class EngineFull(RuntimeError):
    """As many requests wait as may."""


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


@dataclass(eq=False)
class Request:
    """What the engine knows of a request."""

    handle: Handle
    events: Events
    """The handle's."""
    prompt: Tensor
    gen_length: int
    masked: list[int]
    """Columns of the prompt that are filled too."""
    length: int
    """Positions of prompt and response."""
    reusable: int
    """Positions in front, whose keys and values others may have computed."""
    settings: Settings
    on_draft: Callable[[Draft], None] | None
    submitted: float = field(default_factory=time.monotonic)
    admitted: float | None = None
    lane: int | None = None
    reused: int = 0
    shared: int = 0
    """Positions whose pages the scheduler knows to be final."""
    sent: int = 0
    """Response tokens that were streamed."""

    @property
    def id(self) -> int:
        return self.handle.id

    @property
    def asked(self) -> int:
        """Tokens that were asked for; a block-causal model fills its last block beyond them."""
        return len(self.masked) + self.gen_length


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
        self._arrivals: list[Request] = []  # that the engine's thread has not seen
        self._requests: dict[int, Request] = {}  # by id: those it has, waiting or running
        self._running: dict[int, Request] = {}  # by lane
        self._cancelling: list[int] = []  # ids
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
            arguments.function("on_draft", on_draft)
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
            events = Events()
            handle = Handle(next(self._ids), events, self._cancel, self._thread)
            self._arrivals.append(
                Request(handle, events, ids, gen_length, masked, length, reusable, settings, on_draft)
            )
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
                self._cancelling += [*self._requests, *(request.id for request in self._arrivals)]
        self._ring()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_unused: object) -> None:
        self.close(cancel=kind is not None)

    def _cancel(self, id: int) -> None:
        """End a request at the next pass, if it is not over: for its handle."""
        with self._lock:
            self._cancelling.append(id)
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
        for request in [*self._requests.values(), *self._arrivals]:
            request.events.subscribers = []
            if not request.events.ended:
                request.events.add(RuntimeError(f"request {request.id}: {self._refusal}"))
        self._requests, self._running, self._arrivals, self._cancelling = {}, {}, [], []

    # --- the engine's thread -----------------------------------------------------------------------

    def _work(self) -> bool:
        """Run passes until no request is left; returns whether there may come more."""
        device = self.model.device
        try:
            with torch.inference_mode(), torch.cuda.device(device if device.type == "cuda" else -1):
                while True:
                    with self._lock:
                        gone = self._receive()
                        if not self._requests:
                            return not self.closed
                    for request in gone:
                        self._end(request, "cancelled")
                    self._admit()
                    if self._running:
                        self._pass()
        except BaseException as error:  # a fault of ours: nobody shall wait for a thread that is gone
            self._break(error)
            return False

    def _receive(self) -> list[Request]:
        """Take in what arrived; returns those that are to be cancelled."""
        for request in self._arrivals:
            self._requests[request.id] = request
            self._scheduler.submit(request.id, request.prompt[: request.reusable].tolist(), request.length)
        self._arrivals = []
        ids, self._cancelling = self._cancelling, []
        return [self._requests[id] for id in ids if id in self._requests]

    def _break(self, error: BaseException) -> None:
        """The thread ends with `error`, and all requests with it."""
        log.critical("the engine's thread ends", exc_info=error)
        event = _failure(error, "the engine's thread ended")
        with self._lock:
            self._refusal = f"the engine is closed: its thread ended with {type(error).__name__}"
            self._fault = error
            left = {request.id: request for request in [*self._requests.values(), *self._arrivals]}
            for request in left.values():
                with contextlib.suppress(Exception):  # the scheduler may not know it
                    self._scheduler.release(request.id)
                request.events.add(event)
            self._counts["failed"] += len(left)
            self._requests, self._running, self._arrivals, self._cancelling = {}, {}, [], []
        for request in left.values():
            self._tell(request)

    def _tell(self, request: Request) -> None:
        """Let the subscribers have what they have not had.

        Raises RuntimeError where a callback raises anything, unless the request is over.
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
        """`call(argument)`, a callback. Raises RuntimeError where it raises anything, SystemExit too."""
        self._calling = time.monotonic()
        try:
            return call(argument)
        except BaseException as error:
            log.exception("a callback of Handle.subscribe or on_draft failed")
            raise RuntimeError(f"request {request.id}: a callback raised {type(error).__name__}") from error
        finally:
            self._calling = math.inf

    def _admit(self) -> None:
        while True:
            with self._lock:
                found = self._scheduler.admit()
                if found is None:
                    return
                request = self._requests[found.id]
                self._running[found.lane] = request
                request.lane, request.admitted = found.lane, time.monotonic()
                request.reused = request.shared = found.reused
                self._counts["prompt_tokens"] += len(request.prompt) - len(request.masked)
            try:
                self._slots.assign(found.lane, found.pages)
                row = self._batch.admit(
                    found.lane,
                    request.prompt.to(self._batch.tokens.device),
                    request.gen_length,
                    request.settings,
                    masked=request.masked,
                    stored=found.reused,
                )
            except BaseException as error:
                self._end(request, error)
            else:
                if row.done:  # nothing to decode
                    self._end(request, "length")

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
        for lane, request in list(self._running.items()):
            try:
                self._report(request, blocks[lane], lane in finished)
            except BaseException as error:
                self._end(request, error)

    def _report(self, request: Request, block: tuple[int, int], finished: bool) -> None:
        """What a pass over the block in columns [start, end) has made of it."""
        assert request.lane is not None
        row = self._batch.rows[request.lane]
        if request.on_draft is not None:
            self._call(request, request.on_draft, self._draft(request, *block))
        if self._share:
            self._publish(request, row.stored)
        if finished:
            self._stream(request)
            if row.done:
                self._end(request, "stop" if row.stopped and row.kept < request.asked else "length")

    def _step(self, lanes: list[int]) -> list[int]:
        finished = self._batch.step(lanes)
        with self._lock:
            self._counts["sequence_passes"] += len(lanes)
        return finished

    def _publish(self, request: Request, stored: int) -> None:
        """Let others share the pages of the first `stored` positions, which are final."""
        assert request.lane is not None
        size = self._slots.page_size
        if stored // size <= request.shared // size:
            return
        tokens = self._batch.tokens[request.lane, :stored].tolist()
        with self._lock:
            replaced = self._scheduler.store(request.id, tokens)
        for index, page in replaced:
            self._slots.assign(request.lane, [page], index)
        request.shared = stored

    def _draft(self, request: Request, start: int, end: int) -> Draft:
        assert request.lane is not None
        row = self._batch.rows[request.lane]
        first, last = row.index(start), min(row.index(end), request.asked)
        ids = self._tokens(request.lane, row.columns[first:last])
        return Draft(row.nfe, first, [None if token == self.mask_id else token for token in ids])

    def _response(self, request: Request) -> list[int]:
        """Tokens of finished blocks, in front of what ended them."""
        assert request.lane is not None
        row = self._batch.rows[request.lane]
        final = len(row.columns) if row.done else row.index(row.block[0])
        return self._tokens(request.lane, row.columns[: min(final, row.kept, request.asked)])

    def _tokens(self, lane: int, columns: Sequence[int]) -> list[int]:
        """What stands in `columns`, which are ascending."""
        if not columns:
            return []
        first, last = columns[0], columns[-1] + 1
        ids: list[int] = self._batch.tokens[lane, first:last].tolist()
        return [ids[column - first] for column in columns]

    def _logprobs(self, request: Request, first: int, last: int) -> list[float]:
        """Of tokens [first, last) of the response."""
        if first == last:
            return []
        assert request.lane is not None
        columns = self._batch.rows[request.lane].columns[first:last]
        start, end = columns[0], columns[-1] + 1
        found: list[float] = self._batch.passes.trajectory.logprob[request.lane, start:end].tolist()
        return [found[column - start] for column in columns]

    def _stream(self, request: Request) -> None:
        assert request.lane is not None
        row, response = self._batch.rows[request.lane], self._response(request)
        # What a stop sequence may begin with is held back until it is known whether it does.
        held = 0
        if not row.done:
            for stop in request.settings.stop:
                for size in range(min(len(stop) - 1, len(response)), held, -1):
                    if tuple(response[-size:]) == stop[:size]:
                        held = size
                        break
        fresh = response[request.sent : len(response) - held]
        if fresh:
            if request.settings.record:
                request.handle.logprobs += self._logprobs(request, request.sent, request.sent + len(fresh))
            request.sent += len(fresh)
            with self._lock:
                self._counts["tokens"] += len(fresh)
            request.events.add(fresh)
            self._tell(request)

    def _end(self, request: Request, how: str | BaseException) -> None:
        """The request is over, unless it was before: free its lane and pages, and tell whoever waits."""
        if request.id not in self._requests:
            return
        event: Event
        try:
            event = (
                self._completion(request, how) if isinstance(how, str) else _failure(how, "the model raised")
            )
        except Exception as error:
            event = error
        kind = event.finish_reason if isinstance(event, Completion) else "failed"
        if request.lane is not None:
            self._batch.release(request.lane)
        with self._lock:
            self._scheduler.release(request.id)
            if request.lane is not None:
                del self._running[request.lane]
            self._counts[kind if kind in self._counts else "completed"] += 1
            request.events.add(event)
            del self._requests[request.id]
        self._tell(request)

    def _completion(self, request: Request, reason: str) -> Completion:
        now, row = time.monotonic(), None if request.lane is None else self._batch.rows[request.lane]
        admitted = now if request.admitted is None else request.admitted
        tokens = [] if row is None else self._response(request)
        return Completion(
            tokens=tokens,
            logprobs=self._logprobs(request, 0, len(tokens)) if request.settings.record else None,
            finish_reason=reason,
            nfe=0 if row is None else row.nfe,
            nfe_published=0 if row is None else row.published,
            prompt_length=len(request.prompt),
            reused=request.reused,
            seconds_waiting=admitted - request.submitted,
            seconds=now - request.submitted,
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
