"""Engine: each request as `decode` gives it alone, whatever comes and goes beside it."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import resource
import threading
import time
import tracemalloc
from concurrent.futures import CancelledError
from typing import Any

import pytest
import torch
from engines import BLOCK, LLADA, MODELS, SDAR, Gate, alone, some_prompts, until
from hypothesis import given, settings
from hypothesis import strategies as st

import dparallel_ext as dx
from dparallel_ext import models


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 9),
    lanes=st.integers(1, 4),
    spare=st.integers(0, 8),
    way=st.sampled_from(
        [
            ("llada_tiny_a", "none"),
            ("llada_tiny_a", "prefix"),
            ("llada_tiny_a", "dual"),
            ("dream_tiny_a", "dual"),
            ("sdar_tiny_a", "block"),
            ("fast_dllm", "block"),
            ("fast_dllm", "dual"),
        ]
    ),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_request_gets_what_decode_gives_it_alone(seed, count, lanes, spare, way, dtype) -> None:
    """To the bit, at any number of lanes and pages, with settings of its own."""
    name, cache = way
    model, g = MODELS[name, dtype], torch.Generator().manual_seed(seed)
    shared: dict[str, Any] = {
        "sub_block_length": BLOCK // 2 if name == "fast_dllm" else None,
        "batch_invariant": True,
    }

    def one_of(*choices: Any) -> Any:
        return choices[int(torch.randint(len(choices), (), generator=g))]

    prompts = some_prompts(seed, count)
    own = [
        {
            "gen_length": one_of(0, 3, 8, 17, 24),
            "threshold": float(torch.rand((), generator=g)),
            "selector": one_of("confidence", "entropy", "factor"),
            "temperature": one_of(0.0, 0.9),
            "seed": one_of(1, 2, 3),
            "eos_id": one_of(None, 5, (5, 6)),
            "suppress": one_of(None, [1, 2, 3]),
            "stop": one_of((), ((7,), (8, 9))),
        }
        for _ in prompts
    ]
    with dx.Engine(
        model,
        cache=cache,
        block_length=BLOCK,
        lanes=lanes,
        max_length=64,
        page_size=BLOCK,
        pages=8 + spare,
        **shared,
    ) as engine:
        handles = [engine.submit(p, **settings) for p, settings in zip(prompts, own, strict=True)]
        for prompt, settings_, handle in zip(prompts, own, handles, strict=True):
            streamed = list(itertools.chain.from_iterable(handle))
            done = handle.result(60)
            expected, nfe = alone(model, prompt, cache, **shared, **settings_)
            assert streamed == done.tokens == expected
            assert done.nfe == nfe
            assert done.prompt_length == len(prompt)
            assert done.finish_reason == ("stop" if len(expected) < settings_["gen_length"] else "length")
        stats = engine.stats
    assert (stats.completed, stats.waiting, stats.active, stats.pages_used) == (count, 0, 0, 0)
    assert stats.tokens == sum(len(h.result().tokens) for h in handles)


@pytest.mark.parametrize(("name", "reused"), [("sdar_tiny_a", 64), ("fast_dllm", 64)])
def test_shared_prefixes_change_nothing_but_the_work(name: str, reused: int) -> None:
    model = MODELS[name, torch.float32]
    common = some_prompts(1, 1, 60)[0].new_tensor(range(64))
    prompts = [torch.cat((common, tail)) for tail in some_prompts(2, 12, 20)]
    settings: dict[str, Any] = {"gen_length": 16, "threshold": 0.3, "selector": "confidence"}
    expected = [alone(model, p, "block", **settings) for p in prompts]
    work = {}
    for share in (False, True):
        with dx.Engine(model, lanes=4, max_length=128, share=share) as engine:
            results = [h.result(60) for h in [engine.submit(p, **settings) for p in prompts]]
        assert [(r.tokens, r.nfe) for r in results] == expected
        stats = engine.stats
        assert stats.reused_tokens == sum(r.reused for r in results)
        work[share] = stats.prompt_tokens - stats.reused_tokens
    assert [r.reused for r in results] == [0] + [reused] * 11
    assert work[False] - work[True] == 11 * reused


def test_a_conversation_reuses_its_own_answer() -> None:
    with dx.Engine(SDAR, lanes=1, max_length=256, page_size=8) as engine:
        prompt = list(range(20))
        first = engine.submit(prompt, gen_length=28).result(60)
        assert len(first.tokens) == 28
        again = engine.submit([*prompt, *first.tokens, 1, 2, 3], gen_length=8).result(60)
    assert again.reused == 40  # the last block of the first answer was never stored: nothing followed it
    assert (
        again.tokens
        == alone(SDAR, torch.tensor([*prompt, *first.tokens, 1, 2, 3]), "block", gen_length=8)[0][:8]
    )


def test_what_finished_is_in_no_pass_and_what_waits_comes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    with dx.Engine(LLADA, cache="none", block_length=4, lanes=2, max_length=16) as engine:
        for gen_length in (4, 8, 4):
            engine.submit([1, 2, 3, 4], gen_length=gen_length)
        gate.passes.release(100)
    assert set(gate.counts) == {8 + 12} | set(gate.counts[:1]) | set(gate.counts[-1:])
    assert sum(gate.counts) == 4 * 8 + 8 * 12 + 4 * 8  # each request in its own passes, and no others
    stats = engine.stats
    assert (stats.sequence_passes, stats.tokens) == (16, 16)
    assert stats.forwards == len(gate.counts) in (8, 9)  # 9: the first began before the second was there


def test_memory_is_bounded_and_requests_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    with dx.Engine(LLADA, block_length=8, lanes=8, max_length=64, page_size=8, pages=5) as engine:
        handles = [engine.submit([1] * 8, gen_length=8) for _ in range(6)]  # two pages each
        gate.passes.release()  # the first pass may have begun with the first alone
        until(lambda: engine.stats.active == 2)
        stats = engine.stats
        assert (stats.pages, stats.pages_used, stats.waiting) == (5, 4, 4)
        slots = engine.core.batch.kv_cache
        assert slots is not None
        assert slots.slots.numel() * slots.slots.element_size() == 5 * stats.page_bytes
        with pytest.raises(ValueError, match=r"length: 48 positions need 6 pages of 8, and there are 5"):
            engine.submit([1] * 8, gen_length=40)
        gate.passes.release(1000)
        assert [h.result(60).tokens for h in handles] == [handles[0].result().tokens] * 6


def test_more_than_may_wait_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    with dx.Engine(LLADA, lanes=1, max_length=64, max_waiting=2) as engine:
        engine.submit([1], gen_length=8)
        until(lambda: engine.stats.active == 1)
        handles = [engine.submit([1], gen_length=8) for _ in range(2)]
        with pytest.raises(dx.EngineFull, match="2 requests wait already"):
            engine.submit([1], gen_length=8)
        gate.passes.release(1000)
        assert all(len(h.result(60).tokens) == 8 for h in handles)
        engine.submit([1], gen_length=8)


def test_what_has_a_free_lane_does_not_wait() -> None:
    """Requests that come faster than the engine's thread lets them in are refused only beyond lanes and
    places."""
    with dx.Engine(LLADA, lanes=3, max_length=64, max_waiting=2) as engine:
        with engine.core.lock:  # the thread lets nothing in
            handles = [engine.submit([1], gen_length=8) for _ in range(5)]
            with pytest.raises(dx.EngineFull, match="2 requests wait already"):
                engine.submit([1], gen_length=8)
        assert all(len(handle.result(60).tokens) == 8 for handle in handles)


def test_stop_sequences_are_never_streamed() -> None:
    """Not even their beginnings: what may be one is held back until it is known."""
    plain = alone(LLADA, torch.tensor([1, 2, 3]), "dual", gen_length=32)[0]
    stop = tuple(plain[14:18])  # across the end of the second block
    at = next(i for i in range(29) if tuple(plain[i : i + 4]) == stop)
    with dx.Engine(LLADA, block_length=8, lanes=1, max_length=64) as engine:
        handle = engine.submit([1, 2, 3], gen_length=32, stop=[stop, (510, 510, 510)])
        streamed = list(itertools.chain.from_iterable(handle))
    assert streamed == handle.result().tokens == plain[:at]
    assert handle.result().finish_reason == "stop"
    assert handle.result().nfe < 32  # the last block was never computed


def test_an_end_behind_the_tokens_asked_for_is_none() -> None:
    """A block-causal model fills its last block beyond them."""
    out = dx.decode(SDAR, prompts := some_prompts(3, 8), gen_length=1, block_length=BLOCK)
    ends = [[token for token in response.tolist()[1:] if token != response[0]] for response in out.responses]
    assert sum(map(bool, ends)) > 2
    with dx.Engine(SDAR, block_length=BLOCK, lanes=1, max_length=64) as engine:
        for prompt, response, behind in zip(prompts, out.responses, ends, strict=True):
            handle = engine.submit(prompt, gen_length=1, eos_id=behind[0] if behind else None)
            assert handle.result(60).tokens == response[:1].tolist()
            assert handle.result().finish_reason == "length"


@pytest.mark.slow
def test_thousands_of_requests_leave_no_memory_behind() -> None:
    def resident() -> int:
        gc.collect()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    tiny = models.LLaDA({**LLADA.config, "n_layers": 1}).eval()
    with dx.Engine(tiny, lanes=16, max_length=32, max_waiting=64, block_length=4) as engine:

        def flood(count: int) -> None:
            handles: list[dx.Handle] = []
            for _ in range(count):
                if len(handles) == 64:
                    handles.pop(0).result(60)
                handles.append(engine.submit([1, 2, 3], gen_length=4, threshold=9.0))
            for handle in handles:
                handle.result(60)

        flood(1000)
        before = resident()
        flood(3000)
        grown = resident() - before  # KiB
    assert engine.stats.completed == 4000
    assert engine.stats.pages_used == 0
    assert len(engine.core.requests) == len(engine.core.running) == 0
    assert grown < 2048  # a handle alone takes one for each request


@pytest.mark.parametrize(
    ("name", "cache"),
    [("llada_tiny_a", "dual"), ("dream_tiny_a", "dual"), ("sdar_tiny_a", "block"), ("fast_dllm", "block")],
)
def test_drafts(name: str, cache: str) -> None:
    """After every pass the block as it is: masks become tokens, which stay, up to the final block. What was
    recorded of a token is told with it."""
    model, settings = (
        MODELS[name, torch.float32],
        {"gen_length": 21, "threshold": 0.9, "selector": "confidence"},
    )
    prompts = some_prompts(1, 3)
    seen: list[list[dx.DraftEvent]] = [[] for _ in prompts]
    with dx.Engine(model, cache=cache, block_length=BLOCK, lanes=2, max_length=64) as engine:
        handles = [
            engine.submit(prompt, on_draft=drafts.append, logprobs=True, **settings)
            for prompt, drafts in zip(prompts, seen, strict=True)
        ]
        plain = engine.submit(prompts[0], **settings)
        for prompt, handle, drafts in zip(prompts, handles, seen, strict=True):
            tokens = handle.result(60).tokens
            assert (tokens, drafts[-1].nfe) == alone(model, prompt, cache, **settings)
            assert [draft.nfe for draft in drafts] == list(range(1, drafts[-1].nfe + 1))
            for before, after in itertools.pairwise(drafts):
                if before.start != after.start:
                    assert None not in before.tokens
                    assert after.start == before.start + len(before.tokens)
                else:
                    assert before.tokens.count(None) >= after.tokens.count(None)
            for draft in drafts:
                final = tokens[draft.start : draft.start + len(draft.tokens)]
                assert all(a in (None, b) for a, b in zip(draft.tokens, final, strict=True))
                assert draft.passes is not None
                assert draft.logprobs is not None
                for token, number, logprob in zip(draft.tokens, draft.passes, draft.logprobs, strict=True):
                    assert (token is None) == (number is None) == (logprob is None)
                    assert number is None or 1 <= number <= draft.nfe
            assert drafts[-1].start + len(drafts[-1].tokens) == 21
            assert drafts[-1].logprobs == handle.logprobs[drafts[-1].start :]
        assert any(None in draft.tokens for drafts in seen for draft in drafts)
        assert plain.result(60).tokens == handles[0].result(60).tokens
        assert (plain.result().logprobs, plain.logprobs) == (None, [])


@pytest.mark.parametrize(("name", "cache"), [("llada_tiny_a", "dual"), ("sdar_tiny_a", "block")])
def test_drafts_of_an_infill(name: str, cache: str) -> None:
    """The places that held masks, between given tokens and behind them."""
    model, drafts = MODELS[name, torch.float32], list[dx.DraftEvent]()
    mask = model.mask_id
    assert mask is not None
    prompt = [1, mask, 2, 3, *[mask] * 9, 4, mask, 5]
    with dx.Engine(model, cache=cache, block_length=BLOCK, lanes=1, max_length=64) as engine:
        tokens = engine.submit(prompt, gen_length=3, infill=True, on_draft=drafts.append).result(60).tokens
    assert len(tokens) == prompt.count(mask) + 3
    found: list[int | None] = []
    for draft in drafts:
        found[draft.start :] = draft.tokens
    assert found == tokens


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "text"}, r"prompt: expected int64 \(P,\)"),
        ({"prompt": torch.zeros(2, 2, dtype=torch.int64)}, r"prompt: expected one prompt \(P,\), got 2"),
        ({"prompt": [1.5]}, r"prompt: expected int64 \(P,\), got torch.float32"),
        ({"prompt": [512]}, r"prompt: expected token ids in \[0, 512\), got 512"),
        ({"gen_length": -1}, "gen_length: expected a whole number >= 0, got -1"),
        ({"gen_length": 64}, "gen_length: prompt and response have 65 positions, max_length is 64"),
        ({"gen_length": 10**15}, "gen_length: prompt and response have .* max_length is 64"),
        ({"gen_length": 48, "steps": 3}, "steps: expected a multiple of the 2 blocks, got 3"),
        ({"temperature": -1.0}, "temperature: expected a finite number >= 0"),
        ({"threshold": float("nan")}, "threshold: expected a number"),
        ({"selector": "best", "threshold": 0.5}, "selector: expected one of"),
        ({"suppress": [-1]}, r"suppress: expected token ids in \[0, 512\), got -1"),
        ({"stop": [[]]}, "stop: expected sequences of at least one token"),
        ({"stop": 5}, "stop: expected sequences of token ids, got the number 5"),
        ({"stop": None}, r"stop: expected int64 \(P,\) or a list of ids, got NoneType"),
        ({"suppress": [1.5]}, r"suppress: expected int64 \(P,\), got torch.float32"),
        ({"suppress": "ab"}, r"suppress: expected int64 \(P,\) or a list of ids, got str"),
        ({"suppress": [10**30]}, r"suppress: expected int64 \(P,\) or a list of ids"),
        ({"seed": "x"}, "seed: expected a whole number"),
        ({"seed": 2**63}, "seed: expected a whole number <= 9223372036854775807, got 9223372036854775808"),
        ({"top_p": "x", "temperature": 1.0}, "top_p: expected a number from 0 to 1, got 'x'"),
        ({"temperature": 10**400}, "temperature: expected a finite number >= 0, got 1000"),
        ({"selector": 5, "threshold": 0.5}, "selector: expected one of"),
        ({"on_draft": 5}, "on_draft: expected a function, got int"),
    ],
)
def test_bad_requests_are_named(change: dict[str, Any], message: str) -> None:
    with dx.Engine(LLADA, lanes=1, max_length=64) as engine:
        call = {"prompt": [1], "gen_length": 8, **change}
        with pytest.raises(ValueError, match=message):
            engine.submit(**call)
        assert len(engine.submit([1], gen_length=4).result(60).tokens) == 4


WHOLE = ["gen_length", "steps", "min_commit", "max_commit", "top_k", "eos_id", "seed"]


@pytest.mark.parametrize(
    "value", [10**9, 2**63, 10**30, 10**5000, -(10**5000)], ids=["1e9", "2^63", "1e30", "1e5000", "-1e5000"]
)
@pytest.mark.parametrize("name", WHOLE)
def test_numbers_of_any_size_are_named_before_anything_is_allotted(name: str, value: int) -> None:
    """Or they are in order: there may be so many steps, commits and seeds."""
    beside = {
        "min_commit": {"threshold": 0.5},
        "max_commit": {"threshold": 0.5},
        "top_k": {"temperature": 1.0},
    }
    harmless = {"steps": 2**63, "max_commit": 10**31, "top_k": 2**63, "seed": 2**63}
    call: dict[str, Any] = {"prompt": [1], "gen_length": 4, name: value, **beside.get(name, {})}
    with dx.Engine(LLADA, lanes=1, max_length=64) as engine:
        tracemalloc.start()
        try:
            if 0 < value < harmless.get(name, 0):
                assert len(engine.submit(**call).result(60).tokens) == 4
            else:
                with pytest.raises(ValueError, match=f"^{name}: .*(expected|max_length is 64)"):
                    engine.submit(**call)
            assert tracemalloc.get_traced_memory()[1] < 2**20
        finally:
            tracemalloc.stop()
        assert engine.stats.waiting == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": lambda ids: ids}, "model: expected one of dparallel_ext.models"),
        ({"lanes": 0}, "lanes: expected a whole number >= 1, got 0"),
        ({"max_length": 0}, "max_length: expected a whole number >= 1"),
        ({"pages": 0}, "pages: expected a whole number >= 1"),
        ({"page_size": 0}, "page_size: expected a whole number >= 1"),
        ({"max_waiting": 0}, "max_waiting: expected a whole number >= 1"),
        ({"lanes": 10**30}, "lanes: expected a whole number <= 2147483647, got 1000"),
        ({"max_length": 2**31}, "max_length: expected a whole number <= 2147483647, got 2147483648"),
        ({"pages": 10**15}, "pages: expected a whole number <= 2147483647"),
        ({"page_size": 10**5000}, "page_size: expected a whole number <= 2147483647, got int that cannot"),
        ({"max_waiting": 2**63}, "max_waiting: expected a whole number <= 9223372036854775807"),
        (
            {"lanes": 2**31 - 1, "max_length": 2**31 - 1},
            "lanes, max_length, pages: 2147483647 lanes of .* do not fit into memory",
        ),
        ({"cache": "dual"}, 'cache: expected "block" or "none" for a block-causal model'),
        ({"page_size": 12}, "page_size: expected a multiple of the blocks of 8"),
        ({"batch_invariant": True, "share": True}, "share: goes with .*, got batch_invariant"),
        ({"share": "no"}, "share: expected bool, got str"),
        ({"cache": "none", "share": True}, "share: goes with cache 'block' .*, got cache 'none'"),
    ],
)
def test_bad_engines_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dx.Engine(**{"model": SDAR, **change})


def test_an_engine_is_not_copied() -> None:
    with dx.Engine(SDAR, lanes=1, max_length=16) as engine:
        handle = engine.submit([1, 2], gen_length=8)
        for held, said in ((engine, "an Engine has a thread of its own"), (handle, "belongs to its Engine")):
            for make in (copy.copy, copy.deepcopy, pickle.dumps):
                with pytest.raises(TypeError, match=said):
                    make(held)
        done = handle.result()
        assert pickle.loads(pickle.dumps(done)) == copy.deepcopy(done) == done


def test_a_function_runs_between_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise SystemExit

    with dx.Engine(LLADA, lanes=1, max_length=64) as engine:
        request = engine.submit([1], gen_length=8)
        called = [engine.run(threading.current_thread) for _ in range(3)]
        assert {each.result(60) for each in called} == {engine.thread}
        assert engine.run(torch.is_inference_mode_enabled).result(60)
        failed = engine.run(fails).exception(60)
        assert (type(failed), type(failed and failed.__cause__)) == (RuntimeError, SystemExit)
        assert request.result(60).finish_reason == "length"
        with pytest.raises(ValueError, match="function: expected a function"):
            engine.run(3)  # type: ignore[arg-type]
        last = engine.run(lambda: time.sleep(0.02))
    assert last.done()  # leaving the block waits for it
    assert last.exception() is None
    with pytest.raises(RuntimeError, match="closed"):
        engine.run(fails)
    gate = Gate(monkeypatch)
    engine = dx.Engine(LLADA, lanes=1, max_length=64)
    engine.submit([1], gen_length=8)
    until(lambda: engine.stats.active == 1)
    waiting = engine.run(fails)
    closing = threading.Thread(target=engine.close, kwargs={"cancel": True})
    closing.start()
    until(lambda: engine.closed)
    gate.passes.release(100)
    closing.join(60)
    with pytest.raises(CancelledError):
        waiting.result(60)
