"""Requests that come and go, decoded together: continuous admission, shared prefixes, bounded memory.

`decode` and `speculate` are for prompts at hand; an `Engine` is for prompts that arrive while others are
being decoded. Its thread runs passes over the requests in its lanes; between passes it lets requests in and
out. A request gets the tokens that `decode`, `speculate` or `adaptive_decode` would give it alone.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Unpack

import torch
from torch import Tensor

from .. import arguments
from .._C import Scheduler
from ..arguments import shown, whole
from ..decoding.config import (
    DEFAULTS,
    ENGINE_FIELDS,
    DecodeConfig,
    DecodeKeywords,
    configured,
    names_fields,
)
from ..decoding.decode import Prompts
from ..decoding.fields import plain
from ..models import Model, native, warn_beyond
from ..speculation import Drafter
from .core import EngineCore, Request
from .handle import DraftEvent, Events, Handle
from .kinds import kind_of

log = logging.getLogger(__name__)

LARGEST = 2**31 - 1
"""The largest lanes, max_length, pages and page_size."""

PATIENCE = 5.0
"""Seconds that the program, when it ends, waits for a callback that does not return."""


class EngineFull(RuntimeError):
    """Raised by `Engine.submit` if `max_waiting` requests wait already, beside requests with a free lane."""


@dataclass(frozen=True)
class EngineStats:
    """A snapshot of an engine; counts are since it was made."""

    waiting: int
    """Requests not yet in a lane."""
    active: int
    """Requests in lanes."""
    completed: int
    failed: int
    cancelled: int
    forwards: int
    """Passes run."""
    sequence_passes: int
    """The sum over passes of the requests in each."""
    tokens: int
    """Response tokens of finished blocks."""
    draft_forwards: int
    """Calls of the drafter, or of the verifier."""
    drafted_tokens: int
    """Tokens that the drafter guessed, or that the verifier judged."""
    accepted_tokens: int
    """How many of these tokens were kept."""
    prompt_tokens: int
    """Prompt tokens of the requests let into lanes, without masks to fill."""
    reused_tokens: int
    """Prompt tokens whose keys and values were shared, and not computed again."""
    pages: int
    """Pages of the cache."""
    pages_used: int
    """Pages of requests in lanes."""
    pages_kept: int
    """Pages of finished prefixes that no request uses, dropped, least recently used first, when pages are
    needed."""
    page_bytes: int
    """Bytes of a page: keys and values of all layers."""
    closed: bool
    """Whether the engine takes no more requests, see `Engine.closed`."""


class Engine:
    """Decodes requests as they come, in one thread of its own.

    Args:
        model: one of ours (`dparallel_ext.models`), in evaluation mode, a diffusion model or an
            autoregressive one; wrapped or adapted as in `decode`. If its weights change, make another engine:
            this engine keeps keys and values of the weights before.
        config: how to decode requests that come without a config; default: `DecodeConfig()`. Where it names
            no cache, a diffusion model has "dual", a block-causal model "block" (`decode`: "none"), and WeDLM
            and SDLM "window". Its cache, block_length, sub_block_length, refresh, active_blocks, open_at,
            activate_at, batch_invariant, graphs and mask_id hold for every request. With an autoregressive
            model, or a verifier, fields about masks stay at their defaults, and `eos_id` None stands for the
            model's own end tokens, see `speculate`.
        drafter, draft_size: for an autoregressive model, see `speculate`. With a diffusion model `draft_size`
            is `decode`'s: each pass guesses the next ones, and the guesses have lanes and pages of their own.
        verifier, mixture, window, lookahead: for a diffusion model, which then decodes each request as
            `adaptive_decode` does; mixture None: 0.5. The verifier's keys and values have memory of their
            own, for `lanes` requests of max_length.
        lanes: requests that are decoded at once.
        max_length: positions that one request may have, prompt and response together.
        pages: memory for keys and values, in pages; default: enough for `lanes` requests of max_length. A
            request that finds too few free waits until others have ended; none fails for lack of memory.
        page_size: positions of a page. Default: 32, for block-causal models rounded up to a multiple of the
            block.
        max_waiting: the most requests that may wait, beside those for which a lane is free; `submit` then
            raises EngineFull.
        share: requests with a common prefix share the pages of that prefix, and the drafter's data in them;
            pages of finished requests are kept for this while there is room. Needs cache "window", or "block"
            with blocks that count from position 0 (not A2D's), or an autoregressive model. Shared keys and
            values equal those of a request alone but for rounding, so the default is on unless
            `batch_invariant` is.
        keywords: fields of `DecodeConfig`; they replace the config's.

    An engine is thread-safe, and a request that fails does not affect others. Use it in a `with` block, or
    `close` it. When the program ends, requests under way are cancelled; an engine that nobody refers to any
    more ends after its last request. A fork of the process has no engine: there `submit` raises RuntimeError,
    and so does the result of a request that was under way.

    Raises:
        ValueError: naming the argument that does not fit.
        TypeError: for a keyword that is no field.
        RuntimeError: if the program is ending.
    """

    @names_fields
    def __init__(
        self,
        model: Model,
        config: DecodeConfig | None = None,
        *,
        drafter: Drafter | str | Path | None = None,
        draft_size: int | None = None,
        verifier: Any = None,
        mixture: float | None = None,
        window: int | None = None,
        lookahead: int | None = None,
        lanes: int = 16,
        max_length: int = 2048,
        pages: int | None = None,
        page_size: int | None = None,
        max_waiting: int = 1024,
        share: bool | None = None,
        **keywords: Unpack[DecodeKeywords],
    ) -> None:
        config = configured("Engine", config, keywords)
        model = native(model)
        lanes = whole("lanes", lanes, 1, LARGEST)
        max_length = whole("max_length", max_length, 1, LARGEST)
        max_waiting = whole("max_waiting", max_waiting, 1)
        self.model = model
        self._kind = kind = kind_of(
            model,
            config,
            drafter=drafter,
            draft_size=draft_size,
            verifier=verifier,
            mixture=mixture,
            window=window,
            lookahead=lookahead,
        )
        self.config = kind.config
        """The config of requests that come without one; the engine's own fields hold the values in force."""
        self.cache, self.mask_id = kind.cache, kind.mask_id
        self._check(self.config)  # an unfit config fails here, not with the first request
        kind.settings(self.config.replace(seed=0))
        share, page_size = self._pages_of(share, page_size)
        per_lane = -(-max_length // page_size)
        pages = lanes * per_lane if pages is None else whole("pages", pages, 1, LARGEST)
        self.lanes, self.max_length, self.max_waiting = lanes, max_length, max_waiting
        try:
            table = torch.zeros((lanes, per_lane), dtype=torch.int64, device="cpu")
            with torch.inference_mode():
                kv_cache = kind.new_cache(pages, page_size, table)
                batch = kind.make_batch(lanes, max_length, kv_cache)
        except (RuntimeError, MemoryError) as error:
            raise ValueError(
                f"lanes, max_length, pages: {lanes} lanes of {max_length} positions and {pages} pages of "
                f"{page_size} do not fit into memory ({str(error).partition(chr(10))[0]})"
            ) from error
        self._page_size, self._pages = page_size, pages
        self._page_bytes = kv_cache.slots[:, :, 0].numel() * kv_cache.slots.element_size()
        scheduler = Scheduler(lanes=lanes, pages=pages, page_size=page_size, share=share)
        self.core = EngineCore(kind, batch, kv_cache, scheduler)
        self._start()

    def __reduce__(self) -> Any:
        raise TypeError("an Engine has a thread of its own and is neither copied nor pickled; make another")

    def _pages_of(self, share: bool | None, page_size: int | None) -> tuple[bool, int]:
        """Whether pages are shared, and their size. Raises ValueError if the two do not go together."""
        unit = self._kind.page_unit
        page_size = whole("page_size", -(-32 // unit) * unit if page_size is None else page_size, 1, LARGEST)
        unshared = "batch_invariant" if self.config.batch_invariant else self._kind.unshared
        if share is not None:
            arguments.instance("share", share, bool)
        share = unshared is None if share is None else share
        if share and unshared is not None:
            raise ValueError(
                "share: goes with cache 'block' or 'window' or an autoregressive model, and without "
                f"batch_invariant, got {unshared}"
            )
        if share and page_size % unit:
            raise ValueError(
                f"page_size: expected a multiple of the blocks of {unit} to share pages, got {page_size}"
            )
        return share, page_size

    def _start(self) -> None:
        self.request_ids = itertools.count()
        self._process = os.getpid()
        self._wakeups: SimpleQueue[Engine | None] = SimpleQueue()
        self._ended = threading.Lock()  # held until the thread is over; an interrupted `join` fails later
        self._ended.acquire()
        wakeups = self._wakeups
        reference = weakref.ref(self, lambda _: wakeups.put(None))
        self.thread = threading.Thread(
            target=_serve, args=(wakeups, self._ended, reference), name="dparallel engine", daemon=True
        )
        _threads.add(self._ended)
        try:
            self.thread.start()
        except RuntimeError:  # there are too many threads
            _threads.discard(self._ended)
            raise
        _engines[id(self)] = self
        if _exiting:
            self.close()
            raise RuntimeError("the program is ending, so no engine can start")

    @names_fields
    def submit(
        self,
        prompt: Prompts,
        config: DecodeConfig | None = None,
        *,
        on_draft: Callable[[DraftEvent], None] | None = None,
        **keywords: Unpack[DecodeKeywords],
    ) -> Handle:
        """Request `gen_length` tokens after `prompt`, ids (P,) as a tensor, an array or a list, or a
        tokenizer's output for one text. Returns at once.

        Samples are keyed by `seed` alone, as with one seed for each sequence in `decode`. With `infill`, the
        streamed tokens and the Completion's are the tokens at the places that held masks, in order; pages are
        shared up to the first mask, and behind it once they are final. With `logprobs`, see
        `Completion.logprobs`, and `Handle.logprobs` while tokens are streamed.

        config: how the prompt is decoded; default: the engine's. The engine's own fields (cache, block_length
            and so on, see `Engine`) are left out or equal.
        on_draft: called with a `DraftEvent` after every pass over the request; if the pass completed a block,
            the event of that block follows. It runs in the engine's thread, so it must be quick; if it raises
            anything, the request fails. It does not change the tokens, and no draft is kept.
        keywords: fields of `DecodeConfig`; they replace the config's.

        Raises:
            ValueError: naming the argument that does not fit, or that makes the request too long to ever run.
            TypeError: for a keyword that is no field.
            EngineFull: if max_waiting requests wait, beside those for which a lane is free.
            RuntimeError: if the engine is closed, or belongs to another process.
        """
        self.core.check_open()
        ids, config = self._prompt(prompt), self._request(config, keywords)
        (gen_length,) = arguments.per_sequence("gen_length", config.gen_length, 1, 0)
        if on_draft is not None:
            arguments.function("on_draft", on_draft)
        length = self._kind.length(len(ids), gen_length)
        if length > self.max_length:
            raise ValueError(
                f"gen_length: prompt and response have {length} positions, max_length is {self.max_length}"
            )
        needed, size, pages = -(-length // self._page_size), self._page_size, self._pages
        if needed > pages:
            raise ValueError(
                f"gen_length: {length} positions need {needed} pages of {size}, and there are {pages}"
            )
        for each in self._kind.models:
            warn_beyond(each, length)
        self._check(config)
        plan = self._kind.plan(ids, gen_length, config)
        with self.core.lock:
            self.core.check_open()
            # Arrivals get their lanes between two passes: until then, a request with a free lane is not
            # waiting.
            free = self.lanes - len(self.core.running)
            if self.core.waiting - free >= self.max_waiting:
                raise EngineFull(f"{self.max_waiting} requests wait already (max_waiting)")
            events = Events()
            handle = Handle(next(self.request_ids), events, self._cancel, self.thread)
            self.core.arrivals.append(Request(handle, events, plan, on_draft))
        self._wake()
        return handle

    def run(self, function: Callable[[], Any]) -> Future[Any]:
        """Call a function in the engine's thread, between two passes, in inference mode and with the model's
        GPU current: so code of your own can use the model without meeting a pass. Returns at once. Requests
        wait meanwhile, and the function must not wait for them. `close` finishes it, or cancels it before it
        begins.

        Raises:
            RuntimeError: if the engine is closed, or belongs to another process.
        """
        future = self.core.call(arguments.function("function", function))
        self._wake()
        return future

    def _request(self, config: DecodeConfig | None, keywords: Mapping[str, Any]) -> DecodeConfig:
        """The config of a request. Raises ValueError if it sets a field of the engine to another value."""
        asked = {**vars(configured("submit", config, {})), **keywords} if config is not None else {**keywords}
        self._kind.check(asked)
        for name in ENGINE_FIELDS:
            value, engine_value = plain(asked.pop(name, DEFAULTS[name])), getattr(self.config, name)
            if value not in (DEFAULTS[name], engine_value):
                raise ValueError(
                    f"{name}: belongs to the engine, which has {engine_value!r}, so expected that or "
                    f"nothing, got {shown(value)}"
                )
        if not isinstance(asked.get("seed"), (tuple, type(None))):
            asked["seed"] = whole("seed", asked["seed"], -(2**63))
        return configured("submit", self.config, asked)

    def _check(self, config: DecodeConfig) -> None:
        """Raise ValueError for a field that no engine supports."""
        if config.record:
            raise ValueError("record: an engine keeps no trajectory, so expected False (see on_draft)")

    def _prompt(self, prompt: Any) -> Tensor:
        rows = arguments.prompts(prompt) or [torch.zeros(0, dtype=torch.int64, device="cpu")]
        if len(rows) != 1:
            raise ValueError(f"prompt: expected one prompt (P,), got {len(rows)}; submit each by itself")
        ids = rows[0].to("cpu", copy=True)  # the caller may change the prompt while it waits
        arguments.check_ids("prompt", [ids], self.model.shape.embedding_size)
        return ids

    @property
    def stats(self) -> EngineStats:
        """The counts of now. Raises RuntimeError in a fork of its process."""
        if self._process != os.getpid():
            self.core.check_open()
        with self.core.lock:
            s = self.core.scheduler.stats
            return EngineStats(
                waiting=self.core.waiting,
                active=len(self.core.running),
                forwards=self.core.batch.forwards,
                draft_forwards=self.core.batch.draft_forwards,
                reused_tokens=s.reused_tokens,
                pages=s.pages,
                pages_used=s.used,
                pages_kept=s.kept,
                page_bytes=self._page_bytes,
                closed=self.closed,
                **self.core.counts,
            )

    @property
    def closed(self) -> bool:
        """Whether it takes no more requests, after `close` or an error in its thread."""
        return self.core.closed

    def close(self, *, cancel: bool = False) -> None:
        """Take no more requests, finish the current ones (or cancel them), and wait for the thread.

        Called from a callback, it does not wait. In a fork of the process it does nothing.
        """
        self._close(cancel)
        if threading.current_thread() is not self.thread:
            with self._ended:
                pass

    def _close(self, cancel: bool) -> None:
        self.core.close(cancel)
        self._wake()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_unused: object) -> None:
        """Finish the requests, or cancel them if the block raised, or if the wait is interrupted."""
        try:
            self.close(cancel=kind is not None)
        except BaseException:
            self._close(cancel=True)
            raise

    def _cancel(self, id: int) -> None:
        self.core.cancel(id)
        self._wake()

    def _wake(self) -> None:
        """Wake the thread, unless it has still to take the last wake-up."""
        if self._wakeups.empty():
            self._wakeups.put(self)

    def _refuse_in_fork(self) -> None:
        """Refuse all requests: this process is a fork, without the engine's thread, which may hold the
        locks."""
        self._ended, self._wakeups = threading.Lock(), SimpleQueue()
        self.core.refuse_in_fork(
            f"the engine belongs to process {self._process}, and this is a fork of it: make an engine here"
        )


def _serve(
    wakeups: SimpleQueue[Engine | None], ended: threading.Lock, _reference: weakref.ref[Engine]
) -> None:
    """The engine's thread. While it waits, it holds a weak reference alone, by which the engine's deletion
    wakes it too."""
    process = os.getpid()
    try:
        while (engine := wakeups.get()) is not None and engine.core.work():
            del engine
    finally:
        if os.getpid() != process:  # a callback forked and returned here; this thread must not go on
            os._exit(1)
        _threads.discard(ended)
        ended.release()


# --- the end of the program, and forks ---------------------------------------------------------------

_engines: weakref.WeakValueDictionary[int, Engine] = weakref.WeakValueDictionary()
_threads: set[threading.Lock] = set()
"""`Engine._ended` of each running thread, also of a thread that is freeing an engine nobody refers to."""
_exiting = False


def _open_engines() -> list[Engine]:
    engines = [reference() for reference in _engines.valuerefs()]
    return [engine for engine in engines if engine is not None]


@atexit.register
def close_engines() -> None:
    """Close the engines, since the interpreter aborts if a thread computes when it ends."""
    global _exiting
    _exiting = True
    engines = _open_engines()
    for engine in engines:
        engine._close(cancel=True)
    while _threads:
        stuck = sum(time.monotonic() - engine.core.calling > PATIENCE for engine in engines)
        if stuck >= len(_threads):
            log.warning("the program ends while a callback of a request has not returned")
            break
        time.sleep(0.002)


def _forked() -> None:
    _threads.clear()
    for engine in _open_engines():
        engine._refuse_in_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
