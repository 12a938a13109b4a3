"""Requests that come and go, decoded together: continuous admission, shared prefixes, bounded memory.

`decode` is for the prompts at hand; an `Engine` is for prompts that arrive while others are being decoded.
Its thread runs one pass after another over whatever is in its lanes; between passes it lets requests in and
out. What a request gets is what `decode` would give it alone.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from queue import SimpleQueue
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


Event = list[int] | Completion | BaseException


@dataclass(frozen=True)
class Draft:
    """What a pass has made of the block that it was over."""

    nfe: int
    """The passes that the request was in, this one included."""
    start: int
    """Where the block begins in the response. The tokens before it are final, those after it are masks."""
    tokens: list[int | None]
    """The response's tokens in the block, None where there is a mask; later passes change none of them."""


@dataclass(eq=False)
class Handle:
    """A request. Iterating yields the tokens of each finished block; `result` waits for all."""

    id: int
    _engine: Engine = field(repr=False)
    _prompt: Tensor = field(repr=False)
    _gen_length: int
    _masked: list[int] = field(repr=False)  # columns of the prompt that are filled too
    _settings: Settings = field(repr=False)
    _on_draft: Callable[[Draft], None] | None = field(default=None, repr=False)
    _submitted: float = field(default_factory=time.monotonic, repr=False)
    _admitted: float | None = field(default=None, repr=False)
    _lane: int | None = field(default=None, repr=False)
    _reused: int = field(default=0, repr=False)
    _shared: int = field(default=0, repr=False)  # positions whose pages the scheduler knows to be final
    _sent: int = field(default=0, repr=False)  # response tokens that were streamed
    _events: list[Event] = field(default_factory=list, repr=False)
    _callbacks: list[Callable[[Event], None]] = field(default_factory=list, repr=False)
    _changed: threading.Condition = field(default_factory=threading.Condition, repr=False)
    logprobs: list[float] = field(default_factory=list, repr=False)
    """One for each token streamed so far, where they were asked for; here before the tokens' own event."""

    @property
    def _asked(self) -> int:
        """Tokens that were asked for; a block-causal model fills its last block beyond them."""
        return len(self._masked) + self._gen_length

    @property
    def done(self) -> bool:
        """Whether the last event is there."""
        with self._changed:
            return bool(self._events) and not isinstance(self._events[-1], list)

    def subscribe(self, callback: Callable[[Event], None]) -> None:
        """Call `callback` with every event, those that have been first: a list of token ids for each finished
        block that has some, then once a Completion or an exception.

        It is called in the engine's thread, so it must be quick; what it raises is logged.
        """
        with self._changed:
            for event in self._events:
                _call(callback, event)
            self._callbacks.append(callback)

    def __iter__(self) -> Iterator[list[int]]:
        """Final tokens of each finished block, in order. Raises as `result` does."""
        events: SimpleQueue[Event] = SimpleQueue()
        self.subscribe(events.put)
        while isinstance(event := events.get(), list):
            yield event
        self._ended(event)

    def result(self, timeout: float | None = None) -> Completion:
        """Wait for the end.

        Raises what the request failed of; CancelledError; or TimeoutError after `timeout` seconds.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self.done, timeout):
                raise TimeoutError(f"request {self.id} has not ended in {timeout} s")
            return self._ended(self._events[-1])

    def cancel(self) -> None:
        """Leave the computation at the next pass. No error if the request is over."""
        self._engine._cancel(self)

    def _ended(self, event: Event) -> Completion:
        if isinstance(event, BaseException):
            raise event
        assert isinstance(event, Completion)
        if event.finish_reason == "cancelled":
            raise CancelledError(f"request {self.id} was cancelled")
        return event

    def _emit(self, event: Event) -> None:
        with self._changed:
            self._events.append(event)
            for callback in self._callbacks:
                _call(callback, event)
            self._changed.notify_all()


def _call(callback: Callable[[Any], None], event: Event | Draft) -> None:
    try:
        callback(event)
    except Exception:
        log.exception("a callback of Handle.subscribe or on_draft failed")


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
    `close` it.

    Raises:
        ValueError: naming the argument that does not fit.
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
        lanes, max_length = whole("lanes", lanes, 1), whole("max_length", max_length, 1)
        max_waiting = whole("max_waiting", max_waiting, 1)
        causal = traits(model).block_length is not None
        if cache is None:
            cache = "block" if causal else "dual"
        block_length, sub_block_length, mask_id, refresh = check_model(
            model, block_length, sub_block_length, cache, mask_id, refresh
        )
        if page_size is None:
            page_size = -(-32 // block_length) * block_length if causal else 32
        page_size = whole("page_size", page_size, 1)
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
        pages = whole("pages", lanes * per_lane if pages is None else pages, 1)
        self.model, self.cache, self.max_length, self.max_waiting = model, cache, max_length, max_waiting
        self.mask_id = mask_id
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
        self._slots = slots
        self._scheduler = Scheduler(lanes=lanes, pages=pages, page_size=page_size, share=share)
        self._share = share
        self._page_bytes = slots.slots[:, :, 0].numel() * slots.slots.element_size()
        self._running: dict[int, Handle] = {}  # by lane
        self._handles: dict[int, Handle] = {}  # by id: waiting or running
        self._cancelling: list[Handle] = []
        counted = ("completed", "failed", "cancelled", "sequence_passes", "tokens", "prompt_tokens")
        self._counts = dict.fromkeys(counted, 0)
        self._next_id = 0
        self._closing = False
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._thread = threading.Thread(target=self._run, name="dparallel engine", daemon=True)
        self._thread.start()

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
            so it must be quick; what it raises is logged. The tokens are the same without it.

        Raises:
            ValueError: naming the argument that does not fit, or a request that could never run.
            EngineFull: if max_waiting requests wait.
            RuntimeError: if the engine is closed.
        """
        ids = self._ids(prompt)
        gen_length = whole("gen_length", gen_length, 0)
        if seed is not None:
            seed = whole("seed", seed, -(2**63))
        batch, masked = self._batch, masks(ids, self.mask_id) if infill else []
        length = whole_length(len(ids), gen_length, batch.block_length, batch.causal)
        if length > self.max_length:
            raise ValueError(
                f"gen_length: prompt and response have {length} positions, max_length is {self.max_length}"
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
        with self._work:
            if self._closing:
                raise RuntimeError("the engine is closed")
            if self._scheduler.waiting >= self.max_waiting:
                raise EngineFull(f"{self.max_waiting} requests wait already (max_waiting)")
            handle = Handle(self._next_id, self, ids, gen_length, masked, settings, on_draft)
            # A page with a mask is not final, and with shifted logits the position before the first mask is
            # computed in any case: it gives the next token.
            known = layout.columns[0] if layout.columns else len(ids)
            reusable = ids[: max(0, known - batch.traits.shift)]
            self._scheduler.submit(handle.id, reusable.tolist(), length)
            self._handles[handle.id] = handle
            self._next_id += 1
            self._work.notify()
        return handle

    def _ids(self, prompt: Any) -> Tensor:
        rows = arguments.prompts(prompt) or [torch.zeros(0, dtype=torch.int64)]
        if len(rows) != 1:
            raise ValueError(f"prompt: expected one prompt (P,), got {len(rows)}; submit each by itself")
        arguments.check_ids("prompt", rows, self.model.shape.rows)
        return rows[0].cpu()

    @property
    def stats(self) -> EngineStats:
        with self._lock:
            s = self._scheduler.stats
            return EngineStats(
                waiting=self._scheduler.waiting,
                active=len(self._running),
                forwards=self._batch.forwards,
                reused_tokens=s.reused_tokens,
                pages=s.pages,
                pages_used=s.used,
                pages_kept=s.kept,
                page_bytes=self._page_bytes,
                **self._counts,
            )

    @property
    def closed(self) -> bool:
        """Whether it takes no more requests: since `close`, or since a fault of its own."""
        return self._closing

    def close(self, *, cancel: bool = False) -> None:
        """Take no more requests, end those there are (or cancel them), and wait for the thread."""
        with self._work:
            self._closing = True
            if cancel:
                self._cancelling += self._handles.values()
            self._work.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_unused: object) -> None:
        self.close(cancel=kind is not None)

    def _cancel(self, handle: Handle) -> None:
        with self._work:
            self._cancelling.append(handle)
            self._work.notify()

    # --- the engine's thread -----------------------------------------------------------------------

    def _run(self) -> None:
        try:
            device = self.model.device
            with torch.inference_mode(), torch.cuda.device(device if device.type == "cuda" else -1):
                while self._turn():
                    pass
        except BaseException as error:  # a fault of ours: nobody shall wait for a thread that is gone
            with self._lock:
                self._closing = True
                left, self._handles = list(self._handles.values()), {}
            for handle in left:
                handle._emit(error)
            raise

    def _turn(self) -> bool:
        """Let requests out and in, and run a pass; False when all is over."""
        with self._work:
            self._work.wait_for(lambda: self._handles or self._cancelling or self._closing)
            if self._closing and not self._handles:
                return False
            gone, self._cancelling = self._cancelling, []
        for handle in gone:
            if handle.id in self._handles:
                self._end(handle, "cancelled")
        self._admit()
        if self._running:
            self._pass()
        return True

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
            self._slots.assign(found.lane, found.pages)
            prompt = handle._prompt.to(self._batch.tokens.device)
            row = self._batch.admit(
                found.lane,
                prompt,
                handle._gen_length,
                handle._settings,
                masked=handle._masked,
                stored=found.reused,
            )
            with self._lock:
                self._counts["prompt_tokens"] += len(prompt) - len(handle._masked)
            if row.done:  # nothing to decode
                self._end(handle, "length")

    def _pass(self) -> None:
        """One pass over all lanes; if it fails, each request by itself, to find whose fault it is."""
        lanes = list(self._running)
        drafted = [
            (handle, self._batch.rows[lane].block)
            for lane, handle in self._running.items()
            if handle._on_draft is not None
        ]
        try:
            finished = self._step(lanes)
        except Exception as error:
            if len(lanes) == 1:
                return self._end(self._running[lanes[0]], error)
            finished = []
            for lane in lanes:
                try:
                    finished += self._step([lane])
                except Exception as own:
                    self._end(self._running[lane], own)
        for handle, block in drafted:
            self._draft(handle, *block)
        self._batch.enter(finished)
        for lane, handle in list(self._running.items()):
            row = self._batch.rows[lane]
            if self._share:
                self._publish(handle, row.stored)
            if lane in finished:
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

    def _draft(self, handle: Handle, start: int, end: int) -> None:
        """Show the block in columns [start, end) to who asked for drafts, unless the pass failed."""
        if handle.id not in self._handles:
            return
        assert handle._lane is not None
        assert handle._on_draft is not None
        row = self._batch.rows[handle._lane]
        first, last = row.index(start), min(row.index(end), handle._asked)
        ids = self._tokens(handle._lane, row.columns[first:last])
        tokens = [None if token == self.mask_id else token for token in ids]
        _call(handle._on_draft, Draft(row.nfe, first, tokens))

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
            handle._emit(fresh)

    def _end(self, handle: Handle, how: str | Exception) -> None:
        """The request is over: free its lane and pages, and tell whoever waits."""
        now, lane = time.monotonic(), handle._lane
        event: Event
        if isinstance(how, Exception):
            event = how
        else:
            row = None if lane is None else self._batch.rows[lane]
            admitted = now if handle._admitted is None else handle._admitted
            tokens = [] if row is None else self._response(handle)
            kept = self._logprobs(handle, 0, len(tokens)) if handle._settings.record else None
            event = Completion(
                tokens=tokens,
                logprobs=kept,
                finish_reason=how,
                nfe=0 if row is None else row.nfe,
                nfe_published=0 if row is None else row.published,
                prompt_length=len(handle._prompt),
                reused=handle._reused,
                seconds_waiting=admitted - handle._submitted,
                seconds=now - handle._submitted,
            )
        if lane is not None:
            self._batch.release(lane)
        with self._lock:
            self._scheduler.release(handle.id)
            del self._handles[handle.id]
            if lane is not None:
                del self._running[lane]
            kind = "failed" if isinstance(how, Exception) else how
            self._counts[kind if kind in self._counts else "completed"] += 1
        handle._emit(event)
