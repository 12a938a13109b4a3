"""Engine with autoregressive models: each request as `speculate` gives it alone, whatever guesses."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from drafters import DEEP, KINDS, MODEL, Knowing, drafter_with, exits, model_of, riding
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext.cache import Span
from dparallel_ext.models import Model, Taps
from dparallel_ext.speculation import Draft, Lane, ModelDrafter, Observation, TreeDrafter


def prompts_of(seed: int, count: int, longest: int = 30, first: int = 10) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (count,), generator=g).tolist()
    return [torch.randint(first, 61, (n,), generator=g) for n in lengths]


def alone(prompt: Tensor, model: Model = MODEL, **settings: Any) -> tuple[list[int], int]:
    """Tokens in front of the end, and passes."""
    settings["seed"] = [settings.get("seed", 0)]
    found = dx.speculate(model, [prompt], **settings)
    return found.responses[0][: int(found.kept[0])].tolist(), int(found.nfe[0])


def text_of(prompt: Tensor, tokens: Sequence[int]) -> Tensor:
    return torch.cat((prompt, torch.tensor(tokens, dtype=torch.int64)))


def settings_of(rng: random.Random) -> dict[str, Any]:
    return {
        "gen_length": rng.choice([0, 1, 7, 20, 26]),
        "temperature": rng.choice([0.0, 0.0, 0.9, 1.4]),
        "seed": rng.randrange(3),
        "top_k": rng.choice([None, 5]),
        "eos_id": rng.choice([-1, None, rng.randrange(61)]),
        "suppress": rng.choice([None, [3, 17]]),
        "stop": rng.choice([(), [[rng.randrange(61)]], [[rng.randrange(61), rng.randrange(61)], [4]]]),
        "logprobs": rng.random() < 0.3,
    }


@pytest.mark.parametrize("case", range(8))
def test_a_request_gets_what_speculate_gives_it_alone(case: int) -> None:
    """With settings of its own, beside others, on few pages that are shared, evicted and used again."""
    rng = random.Random(case)
    beginnings = prompts_of(case, 3, 40)
    prompts = [
        torch.cat((rng.choice(beginnings)[: rng.randint(1, 40)], tail))
        for tail in prompts_of(case + 100, 9, 12)
    ]
    own = [settings_of(rng) for _ in prompts]
    expected = [alone(prompt, **settings) for prompt, settings in zip(prompts, own, strict=True)]
    texts = [text_of(prompt, tokens) for prompt, (tokens, _) in zip(prompts, expected, strict=True)]
    drafter = [None, "ngram", Knowing(texts), Knowing(texts, tree=True)][case % 4]
    page_size = rng.choice([4, 8, 32])
    with dx.Engine(
        MODEL,
        drafter=drafter,
        draft_size=rng.choice([None, 3, 9]),
        lanes=rng.randint(1, 4),
        max_length=80,
        page_size=page_size,
        pages=-(-80 // page_size) + rng.randint(0, 6),
        batch_invariant=case == 6,
    ) as engine:
        handles = [engine.submit(p, **settings) for p, settings in zip(prompts, own, strict=True)]
        for settings, handle, (tokens, nfe) in zip(own, handles, expected, strict=True):
            streamed = list(itertools.chain.from_iterable(handle))
            done = handle.result(60)
            assert streamed == done.tokens == tokens, settings
            assert done.nfe <= nfe
            assert (done.nfe == nfe) or drafter is not None
            assert done.finish_reason == ("stop" if len(tokens) < settings["gen_length"] else "length")
            assert (done.logprobs is not None) == settings["logprobs"]
    stats = engine.stats
    assert (stats.completed, stats.waiting, stats.active, stats.pages_used) == (9, 0, 0, 0)
    assert stats.tokens == sum(len(tokens) for tokens, _ in expected)
    assert (stats.draft_forwards > 0) == (drafter is not None)
    assert stats.accepted_tokens <= stats.drafted_tokens


@pytest.mark.parametrize("drafter", [None, "ngram", "recycling", "chains", "trees"])
def test_shared_prefixes_change_nothing_but_the_work(drafter: Any) -> None:
    common = prompts_of(1, 1, 31)[0].repeat(70)[:64]
    prompts = [torch.cat((common, tail)) for tail in prompts_of(2, 8, 20)]
    expected = [alone(prompt, gen_length=16)[0] for prompt in prompts]
    texts = [text_of(prompt, tokens) for prompt, tokens in zip(prompts, expected, strict=True)]
    if drafter in ("chains", "trees"):
        drafter = Knowing(texts, tree=drafter == "trees")
    work = {}
    for share in (False, True):
        with dx.Engine(MODEL, drafter=drafter, lanes=3, max_length=128, share=share) as engine:
            results = [h.result(60) for h in [engine.submit(p, gen_length=16) for p in prompts]]
        assert [r.tokens for r in results] == expected
        stats = engine.stats
        assert stats.reused_tokens == sum(r.reused for r in results)
        work[share] = stats.prompt_tokens - stats.reused_tokens
    assert [r.reused for r in results] == [0] + [64] * 7
    assert work[False] - work[True] == 7 * 64


def test_all_but_the_last_token_of_a_prompt_can_be_reused() -> None:
    """Its row gives the next token. So whole pages of a prompt of whole pages are one fewer, and the same
    prompt again is no prefill but for that page."""
    prompt = prompts_of(4, 1)[0].repeat(30)[:32]
    expected = alone(prompt, gen_length=8)[0]
    with dx.Engine(MODEL, lanes=1, max_length=64, page_size=8) as engine:
        results = [engine.submit(prompt, gen_length=8).result(60) for _ in range(2)]
        longer = engine.submit(text_of(prompt, [11]), gen_length=8).result(60)
    assert [r.tokens for r in results] == [expected] * 2
    assert [r.reused for r in results] == [0, 24]
    assert longer.reused == 32
    assert longer.tokens == alone(text_of(prompt, [11]), gen_length=8)[0]


def test_a_conversation_reuses_its_own_answer() -> None:
    prompt = prompts_of(7, 1)[0].repeat(20)[:20]
    with dx.Engine(MODEL, drafter="ngram", lanes=1, max_length=256, page_size=8, eos_id=-1) as engine:
        first = engine.submit(prompt, gen_length=29).result(60)
        again = text_of(prompt, [*first.tokens, 11, 12, 13])
        second = engine.submit(again, gen_length=8).result(60)
    assert second.reused == 48  # the answer's last token was in no pass, and 48 positions before it were
    assert second.tokens == alone(again, gen_length=8, eos_id=-1)[0]


class Remembering(Knowing):
    """Keeps what it has seen of each position, as a drafter with weights keeps its context: in pages under
    the model's block table. Before each draft it looks whether all of the sequence is there, and right."""

    taps = (0, 1)

    def __init__(self, model: Model, texts: Sequence[Tensor], **settings: Any) -> None:
        super().__init__(texts, **settings)
        self.model, self.looks, self.resets = model, 0, list[int]()

    def session(self, model: Any, kv_cache: Any, lanes: int, *, graphs: bool = True) -> Remembering:
        self.kv_cache = kv_cache
        pages, size = kv_cache.slots.shape[2], kv_cache.page_size
        self.seen = torch.full((pages * size, len(self.taps), model.shape.width), math.nan)
        return self

    def reset(self, lane: int) -> None:
        self.resets.append(lane)

    def observe(self, seen: Observation) -> None:
        self.seen[seen.metadata.slot_mapping] = torch.stack(seen.taps, 1).float()

    def moved(self, source: Tensor, target: Tensor) -> None:
        there = source >= 0
        self.seen[target[there]] = self.seen[source[there]]

    def propose(self, lanes: Sequence[Lane], sizes: Sequence[int]) -> list[Draft]:
        for lane in lanes:
            count, size = len(lane.tokens) - 1, self.kv_cache.page_size
            places = torch.arange(count)
            slots = self.kv_cache.block_table[lane.lane][places // size] * size + places % size
            torch.testing.assert_close(self.seen[slots], self.context(lane.tokens[:-1]), rtol=1e-4, atol=1e-4)
            self.looks += 1
        return super().propose(lanes, sizes)

    def context(self, ids: Tensor) -> Tensor:
        """What the model gives of them in a pass by themselves."""
        cache, taps = self.model.new_cache(1, len(ids)), Taps(self.taps)
        metadata = cache.metadata([Span(0, 0, len(ids), len(ids))], causal=True)
        self.model.step(ids, cache, metadata, taps=taps)
        return torch.stack([taps[layer] for layer in self.taps], 1)


@pytest.mark.parametrize("tree", [False, True])
def test_a_shared_page_holds_what_a_drafter_keeps_of_it_too(tree: bool) -> None:
    """Of a prefix that another request has computed, or that two have at once, whoever's page it then is."""
    common = prompts_of(1, 1, 31)[0].repeat(40)[:24]
    prompts = [torch.cat((common, tail)) for tail in prompts_of(2, 5, 12)]
    prompts += [prompts[0], prompts[0]]  # the same response twice at once: the second's pages are given back
    expected = [alone(prompt, gen_length=20, eos_id=-1)[0] for prompt in prompts]
    texts = [text_of(prompt, tokens) for prompt, tokens in zip(prompts, expected, strict=True)]
    prompts.append(texts[0][:-3])  # on from an answer
    expected.append(alone(prompts[-1], gen_length=20, eos_id=-1)[0])
    drafter = Remembering(MODEL, texts, tree=tree)
    with dx.Engine(
        MODEL, drafter=drafter, draft_size=5, lanes=3, max_length=80, page_size=8, pages=32, eos_id=-1
    ) as engine:
        results = [h.result(60) for h in [engine.submit(p, gen_length=20) for p in prompts]]
    assert [r.tokens for r in results] == expected
    assert [r.reused >= 24 for r in results] == [False] + [True] * 7
    assert results[-1].reused >= 40
    assert drafter.looks > 30
    assert len(drafter.resets) == len(prompts)


def drafters_of(kind: str) -> Any:
    if kind in KINDS:
        return drafter_with(kind)
    return ModelDrafter(model_of("llama", num_hidden_layers=1), most=4)


@pytest.mark.parametrize("kind", [*KINDS, "model"])
def test_drafters_guess_the_same_whoever_has_computed_the_pages(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a text they guess what they guess after it alone, on pages of their own, of others, and on such
    as were another's before."""
    common = prompts_of(1, 1, 31)[0].repeat(40)[:37]
    lengths = [(37, 3), (37, 9), (20, 4), (37, 3), (30, 1), (20, 4), (12, 5)]
    prompts = [torch.cat((common[:n], prompts_of(n + m, 1, m + 1, 20)[0])) for n, m in lengths]
    prompts += prompts[:3]
    own: dict[str, Any] = {"gen_length": 21, "eos_id": -1, "suppress": [60]}
    seen: dict[tuple[int, ...], list[tuple[int, ...]]] = {}

    def guesses(drafter: Any) -> Any:
        """The same drafter, whose drafts are seen."""
        session = drafter.session

        def noted(*args: Any, **more: Any) -> Any:
            made = session(*args, **more)
            propose = made.propose

            def proposed(lanes: Sequence[Lane], sizes: Sequence[int]) -> list[Draft]:
                drafts: list[Draft] = propose(lanes, sizes)
                for lane, draft in zip(lanes, drafts, strict=True):
                    seen.setdefault(tuple(lane.tokens.tolist()), []).append(draft.tokens)
                return drafts

            made.propose = proposed
            return made

        monkeypatch.setattr(drafter, "session", noted)
        return drafter

    expected = [
        dx.speculate(MODEL, [p], drafter=guesses(drafters_of(kind)), draft_size=4, seed=[0], **own)
        .responses[0]
        .tolist()
        for p in prompts
    ]
    assert expected == [alone(prompt, **own)[0] for prompt in prompts]
    size: dict[str, Any] = {"max_length": 64, "page_size": 4, "pages": 34}
    for lanes in (1, 2):
        with dx.Engine(
            MODEL, drafter=guesses(drafters_of(kind)), draft_size=4, lanes=lanes, **size
        ) as engine:
            found = [h.result(60) for h in [engine.submit(prompt, **own) for prompt in prompts]]
        assert [done.tokens for done in found] == expected
        assert sum(done.reused for done in found) > 100
    assert len(seen) > 80
    for text, drafts in seen.items():
        # The longest is a draft of each length, since none is cut by how much room is left.
        longest = max(drafts, key=len)
        assert all(draft == longest[: len(draft)] for draft in drafts), text


@pytest.mark.parametrize(
    "kind",
    ["ngram", *KINDS, *(f"tree:{kind}" for kind in KINDS), "ppd", "hidden_transfer", "adadecode", "model"],
)
def test_every_pass_of_a_request_is_as_with_the_drafter_alone(kind: str) -> None:
    """Its drafts, what is accepted and refused of them, and its end, on pages that others had before."""
    rng, target = random.Random(kind), DEEP if kind == "adadecode" else MODEL
    makers: dict[str, Any] = {
        "ngram": lambda: "ngram",
        "ppd": lambda: riding("ppd"),
        "hidden_transfer": lambda: riding("hidden_transfer"),
        "adadecode": lambda: exits((1, 3), 0.2),
        **{f"tree:{of}": lambda of=of: TreeDrafter(drafter_with(of), width=5) for of in KINDS},
    }
    drafter = makers.get(kind, lambda: drafters_of(kind))()
    prompts = [prompt.repeat(rng.choice([1, 2])) for prompt in prompts_of(5, 6)]
    own = [{**settings_of(rng), "logprobs": True, "top_logprobs": 2} for _ in prompts]
    sizes: dict[str, Any] = {"max_length": 90, "page_size": 4, "pages": 48, "lanes": 2, "share": False}
    with dx.Engine(target, drafter=drafter, draft_size=9, **sizes) as engine:
        seen: list[list[dx.DraftEvent]] = [[] for _ in prompts]
        handles = [
            engine.submit(prompt, on_draft=drafts.append, **settings)
            for prompt, settings, drafts in zip(prompts, own, seen, strict=True)
        ]
        for prompt, settings, handle, drafts in zip(prompts, own, handles, seen, strict=True):
            call: dict[str, Any] = {**settings, "seed": [settings["seed"]], "record": True}
            found = dx.speculate(target, [prompt], drafter=drafter, draft_size=9, **call)
            done, kept = handle.result(60), int(found.kept[0])
            assert done.tokens == found.responses[0][:kept].tolist() == alone(prompt, target, **settings)[0]
            assert (done.nfe, done.draft_nfe) == (int(found.nfe[0]), int(found.draft_nfe[0]))
            assert done.finish_reason == ("stop" if kept < settings["gen_length"] else "length")
            assert found.passes is not None
            assert found.logprobs is not None
            assert done.logprobs is not None
            passes = [(draft.drafted, draft.accepted, tuple(draft.refused)) for draft in drafts]
            assert passes == [tuple(each) for each in found.passes[0]]
            for value, expected in zip(done.logprobs, found.logprobs[0][:kept].tolist(), strict=True):
                assert value == pytest.approx(expected, abs=1e-4)
            ids = [[token for token, _ in place] for place in done.top_logprobs]
            assert ids == found.top_logprobs.token[0, :kept].tolist()
    assert engine.stats.drafted_tokens > engine.stats.accepted_tokens


def test_streaming_and_drafts() -> None:
    """After every pass the tokens that it has brought, in order, and what was guessed of them."""
    prompts = prompts_of(3, 4)
    expected = [alone(prompt, gen_length=21, eos_id=-1)[0] for prompt in prompts]
    texts = [text_of(prompt, tokens) for prompt, tokens in zip(prompts, expected, strict=True)]
    seen: list[list[dx.DraftEvent]] = [[] for _ in prompts]
    with dx.Engine(MODEL, drafter=Knowing(texts), draft_size=4, lanes=2, max_length=64, eos_id=-1) as engine:
        handles = [
            engine.submit(prompt, gen_length=21, on_draft=drafts.append)
            for prompt, drafts in zip(prompts, seen, strict=True)
        ]
        for handle, drafts, tokens in zip(handles, seen, expected, strict=True):
            parts = list(handle)
            assert list(itertools.chain(*parts)) == tokens
            assert [draft.tokens for draft in drafts] == parts
            assert [draft.start for draft in drafts] == [0, *itertools.accumulate(map(len, parts[:-1]))]
            assert [draft.nfe for draft in drafts] == list(range(1, len(parts) + 1))
            assert [len(draft.tokens) for draft in drafts] == [draft.accepted + 1 for draft in drafts]
            assert all(draft.accepted <= draft.drafted <= 4 for draft in drafts)
            # None while a prompt of several tokens is computed, and none where one token has room.
            assert len(parts) - handle.result().draft_nfe in (0, 1, 2)
    stats = engine.stats
    drafts = list(itertools.chain(*seen))
    assert stats.drafted_tokens == sum(draft.drafted for draft in drafts) > 0
    assert stats.accepted_tokens == sum(draft.accepted for draft in drafts) > 0
    assert stats.sequence_passes == len(drafts)
    assert stats.forwards < len(drafts)  # two at a time


@pytest.mark.parametrize("size", [0, 1, 5])
def test_stop_sequences_are_never_streamed(size: int) -> None:
    """Not even their beginnings, wherever passes end."""
    prompt = prompts_of(3, 1)[0]
    plain = alone(prompt, gen_length=32, eos_id=-1)[0]
    stop = tuple(plain[14:18])
    at = next(i for i in range(29) if tuple(plain[i : i + 4]) == stop)
    near = [*stop[:3], 60 if stop[3] != 60 else 59]
    drafter = Knowing([text_of(prompt, plain)], right=1.0, ragged=False)
    with dx.Engine(MODEL, drafter=drafter, draft_size=size, lanes=1, max_length=64, eos_id=-1) as engine:
        streamed = list(
            itertools.chain.from_iterable(engine.submit(prompt, gen_length=32, stop=[stop, near]))
        )
        whole = engine.submit(prompt, gen_length=32, stop=[near])
        assert list(itertools.chain.from_iterable(whole)) == plain
        end = engine.submit(prompt, gen_length=32, eos_id=plain[9]).result(60)
    assert streamed == plain[:at]
    assert (end.tokens, end.finish_reason) == (plain[: plain.index(plain[9])], "stop")


def test_the_models_own_ends_count_where_none_is_named() -> None:
    prompt = prompts_of(3, 1)[0]
    plain = alone(prompt, gen_length=24, eos_id=-1)[0]
    model = model_of(eos_token_id=[plain[4], 60])
    with dx.Engine(model, lanes=1, max_length=64) as engine:
        assert engine.submit(prompt, gen_length=24).result(60).tokens == plain[: plain.index(plain[4])]
        assert engine.submit(prompt, gen_length=24, eos_id=-1).result(60).tokens == plain
    with dx.Engine(model, lanes=1, max_length=64, eos_id=-1) as engine:
        assert engine.submit(prompt, gen_length=24).result(60).tokens == plain


def test_log_probabilities_are_those_of_speculate() -> None:
    prompts = prompts_of(9, 3)
    with dx.Engine(MODEL, drafter="ngram", draft_size=4, lanes=3, max_length=64, eos_id=-1) as engine:
        handles = [engine.submit(p, gen_length=16, temperature=0.8, seed=1, logprobs=True) for p in prompts]
        for prompt, handle in zip(prompts, handles, strict=True):
            found = dx.speculate(
                MODEL, [prompt], gen_length=16, temperature=0.8, seed=[1], eos_id=-1, logprobs=True
            )
            assert found.logprobs is not None
            done = handle.result(60)
            assert done.logprobs == handle.logprobs
            torch.testing.assert_close(torch.tensor(done.logprobs), found.logprobs[0], rtol=0, atol=1e-4)
