"""AdaDecode: the text of the whole model, drafts as in plain torch, each layer once for each row."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from drafters import DEEP, deep_model, exits, model_of
from test_dflash import layer, norm
from test_speculate import PROMPTS, plain
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext.cache import AttentionMetadata
from dparallel_ext.decoding.config import DecodeConfig
from dparallel_ext.decoding.settings import make_settings
from dparallel_ext.models import Model, Stream
from dparallel_ext.speculation import AdaDecode, CausalBatch, Draft, Lane
from dparallel_ext.speculation.sizing import Fixed

pytest_plugins = ["taping"]

HEADS = [(2,), (1, 3), (1, 2, 4)]
LAYERS = DEEP.shape.layers


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("layers", HEADS)
def test_it_changes_no_token(layers: tuple[int, ...], temperature: float) -> None:
    settings: dict[str, Any] = {"temperature": temperature, "seed": 7, "gen_length": [14, 20, 1, 7]}
    expected = plain(DEEP, **settings)
    for gamma in (0.0, 0.4, 1.0):
        drafter = exits(layers, gamma)
        sizes: list[dict[str, Any]] = [{}, {"draft_size": 1}, {"draft_size": 99}] if gamma == 0.4 else []
        for more in (*sizes, {"draft_size": 5, "batch_invariant": True}):
            found = plain(DEEP, drafter=drafter, **more, **settings)
            assert torch.equal(found.sequences, expected.sequences), (gamma, more)
            assert torch.equal(found.kept, expected.kept)
            assert bool((found.nfe <= expected.nfe).all())
        drafted, accepted = int(found.drafted.sum()), int(found.accepted.sum())
        assert (accepted > 0) == (gamma < 1)
        assert (accepted < drafted) == (gamma < 1)  # some is refused too


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_other_families_and_16_bits(family: str) -> None:
    model = deep_model(family)
    found = plain(model, drafter=exits((1, 3), 0.2, target=model), draft_size=6)
    assert torch.equal(found.sequences, plain(model).sequences)
    assert int(found.accepted.sum()) > 0
    model = model.to(torch.bfloat16)
    found = plain(model, drafter=exits((1, 3), 0.2, target=model), draft_size=6)
    same = [torch.equal(a, b) for a, b in zip(found.responses, plain(model).responses, strict=True)]
    assert sum(same) >= 2


def random_cases(count: int) -> int:
    """Batches, sizes of draft, temperatures, ends; returns how many differ from plain decoding."""
    rng = random.Random(1)
    torch.manual_seed(0)
    others = 0
    for _ in range(count):
        prompts = [torch.randint(10, 61, (rng.choice([1, 2, 7, 33]),)) for _ in range(rng.randint(1, 4))]
        settings: dict[str, Any] = {
            "gen_length": [rng.randint(0, 20) for _ in prompts],
            "temperature": rng.choice([0.0, 0.7, 1.5]),
            "seed": rng.randrange(10**6),
            "top_k": rng.choice([None, 5]),
            "top_p": rng.choice([None, 0.9]),
            "eos_id": rng.choice([-1, None, rng.randrange(61)]),
            "suppress": rng.choice([None, [3, 17]]),
            "stop": rng.choice([(), [[rng.randrange(61)]], [[rng.randrange(61), rng.randrange(61)], [4]]]),
        }
        expected = dx.speculate(DEEP, prompts, **settings)
        drafter = exits(rng.choice(HEADS), rng.choice([0.0, 0.2, 0.5, 0.9]), rng.choice([1, 3, 8]))
        more = {"draft_size": rng.choice([None, 2, 8]), "batch_invariant": rng.random() < 0.3}
        found = dx.speculate(DEEP, prompts, drafter=drafter, **more, **settings)
        others += not (
            torch.equal(found.sequences, expected.sequences)
            and torch.equal(found.kept, expected.kept)
            and torch.equal(found.generated, expected.generated)
        )
    return others


def test_random_cases() -> None:
    assert random_cases(40) == 0


def test_a_kept_key_of_a_refused_token_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault, planted: a slot of the first layers that a draft has written once is not written again."""
    written = set[int]()

    class Once(PatchedLayers):
        def around(self, metadata: AttentionMetadata, start: int, stop: int) -> AttentionMetadata:
            if start > 0 or stop == LAYERS:
                return metadata
            slots = metadata.slot_mapping.tolist()
            kept = torch.tensor([-1 if slot in written else slot for slot in slots])
            written.update(slots)
            return AttentionMetadata(**{**vars(metadata), "slot_mapping": kept})

    expected = plain(DEEP)
    assert torch.equal(plain(DEEP, drafter=exits((2,), 0.0), draft_size=4).sequences, expected.sequences)
    monkeypatch.setattr(Model, "run_layers", Once())
    assert not torch.equal(plain(DEEP, drafter=exits((2,), 0.0), draft_size=4).sequences, expected.sequences)


class PatchedLayers:
    """In the place of `Model.run_layers`: changes its metadata."""

    def __init__(self) -> None:
        self.original = Model.run_layers

    def __get__(self, model: Model, owner: type) -> Any:
        def run(stream: Stream, kv_cache: Any, metadata: Any, start: int = 0, stop: Any = None, **more: Any):
            end = len(model.blocks) if stop is None else stop
            metadata = self.around(metadata, start, end)
            return self.original(model, stream, kv_cache, metadata, start, stop, **more)

        return run

    def around(self, metadata: AttentionMetadata, start: int, stop: int) -> AttentionMetadata:
        raise NotImplementedError


@pytest.mark.parametrize("layers", HEADS)
def test_each_layer_computes_each_row_once(layers: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a prompt, and of every root and drafted token: `layers` counts the calls one after the other."""
    calls: list[tuple[int, int, list[tuple[int, int]]]] = []

    class Seen(PatchedLayers):
        def around(self, metadata: AttentionMetadata, start: int, stop: int) -> AttentionMetadata:
            rows = zip(metadata.rows.tolist(), metadata.positions.tolist(), strict=True)
            calls.append((start, stop, list(rows)))
            return metadata

    monkeypatch.setattr(Model, "run_layers", Seen())
    found = plain(DEEP, drafter=exits(layers, 0.3), draft_size=4)
    computed = [Counter[tuple[int, int]]() for _ in range(LAYERS)]
    run = [0] * len(PROMPTS)
    for start, stop, rows in calls:
        assert len(set(rows)) == len(rows)
        for at in range(start, stop):
            computed[at].update(rows)
        for lane in {lane for lane, _ in rows}:
            run[lane] += stop - start
    assert all(each == computed[0] for each in computed)
    # All prompts, and root and nodes of each draft; the last token that there is room for is none's root.
    asked = sum(map(len, PROMPTS)) + int(found.nfe.sum()) - len(PROMPTS) + int(found.drafted.sum())
    assert computed[0].total() == asked
    assert found.layers.tolist() == run
    assert {start for start, *_ in calls} == {0, *layers}


def test_it_counts_the_layers_that_are_run() -> None:
    expected = plain(DEEP)
    assert expected.layers.tolist() == [LAYERS * 24] * 4
    never = plain(DEEP, drafter=exits((2,), 1.0), draft_size=4)
    assert never.layers.tolist() == expected.layers.tolist()
    assert never.nfe.tolist() == expected.nfe.tolist()
    always = plain(DEEP, drafter=exits((2,), 0.0), draft_size=4, gen_length=40)
    for b in range(4):
        whole = int(always.nfe[b] - always.draft_nfe[b])
        drafted = int(always.layers[b]) - LAYERS * whole - (LAYERS - 2) * int(always.draft_nfe[b])
        assert drafted % 2 == 0
        # A run of the first layers for each root and each drafted token.
        assert int(always.draft_nfe[b]) < drafted // 2 <= 5 * int(always.draft_nfe[b])


# --- the drafts in plain torch --------------------------------------------------------------------


def heads_in_plain_torch(drafter: AdaDecode, target: Model, tokens: Sequence[int]) -> list[Tensor]:
    """Of each head the distribution (V,) behind the last of the tokens, in float64."""
    w = {name: t.double() for name, t in target.state_dict().items()}
    maps = [t.double() for t in drafter.heads.state_dict().values()]
    x, found = w["model.embed_tokens.weight"][torch.tensor(tokens)], []
    places = torch.arange(len(tokens))
    seen = places[:, None] >= places
    for i in range(drafter.options.layers[-1]):
        x = layer(w, f"model.layers.{i}.", x, places, seen, target.shape.rope_theta, 1e-5)
        if i + 1 in drafter.options.layers:
            matrix = maps[drafter.options.layers.index(i + 1)]
            logits = norm(x[-1] @ matrix.T, w["model.norm.weight"], 1e-5) @ w["lm_head.weight"].T
            found.append(logits.softmax(-1))
    return found


class Heard:
    """A drafter whose drafts are noted."""

    def __init__(self, drafter: AdaDecode) -> None:
        self.inner, self.most = drafter, drafter.most
        self.heard: list[tuple[Tensor, int, Draft]] = []

    def check(self, model: Any) -> None:
        self.inner.check(model)

    def session(self, model: Any, kv_cache: Any, lanes: int, *, graphs: bool = True) -> Any:
        session = self.inner.session(model, kv_cache, lanes, graphs=graphs)
        propose = session.propose

        def noted(lanes: Sequence[Lane], sizes: Sequence[int]) -> list[Draft]:
            found = propose(lanes, sizes)
            for lane, size, draft in zip(lanes, sizes, found, strict=True):
                self.heard.append((lane.tokens.clone(), size, draft))
            return found

        session.propose = noted  # type: ignore[method-assign]
        return session


@pytest.mark.parametrize("layers", HEADS)
def test_drafts_are_those_of_plain_torch(layers: tuple[int, ...]) -> None:
    """The first sure head's best token, up to the first token that none is sure of."""
    drafter = exits(layers, 0.3)
    heard = Heard(drafter)
    plain(DEEP, drafter=heard, draft_size=4)
    tokens = 0
    for text, size, draft in heard.heard:
        known, guessed = text.tolist(), list[int]()
        start, run, behind = layers[-1], 0, [0] * len(layers)
        while True:
            guess = None
            for head, share in enumerate(heads_in_plain_torch(drafter, DEEP, known)):
                run += layers[head] - (layers[head - 1] if head else 0)
                behind[head] = len(guessed) + 1
                best = float(share.max())
                assert abs(best - 0.3) > 1e-5
                if best > 0.3 and len(guessed) < size:
                    guess = int(share.argmax())
                    break
            if guess is None:
                break
            guessed.append(guess)
            known.append(guess)
        assert draft == Draft(tuple(guessed), start=start, layers=run)
        tokens += len(guessed)
    assert tokens > 20


def agreeing_model() -> Model:
    model = model_of(num_hidden_layers=3)
    with torch.no_grad():
        for part in (model.blocks[2].o, model.blocks[2].down):
            part.weight.zero_()  # the last layer adds nothing
    return model


def agreeing_exits(model: Model) -> AdaDecode:
    """One head, which says what the whole model does."""
    drafter = exits((2,), 0.0, 5, target=model)
    torch.nn.init.eye_(drafter.heads.maps[0].weight)
    return drafter


def test_samples_are_drawn_with_the_models_noise() -> None:
    """Where a head says what the model does, its guess is the model's choice at any temperature."""
    model = agreeing_model()
    drafter = agreeing_exits(model)
    for more in ({}, {"top_k": 4}, {"top_p": 0.8, "suppress": [3, 17]}):
        settings: dict[str, Any] = {"temperature": 1.2, "seed": [3, 4, 5, 6], **more}
        found = plain(model, drafter=drafter, draft_size=5, **settings)
        assert torch.equal(found.sequences, plain(model, **settings).sequences)
        assert torch.equal(found.accepted, found.drafted)
        assert found.nfe.tolist() == [5, 4, 5, 5]


def test_nothing_is_drafted_behind_an_end() -> None:
    """Where the heads are right, no drafted token is in vain, and none is an end."""
    model = agreeing_model()
    drafter = agreeing_exits(model)
    full = plain(model)
    ends = 0
    said = torch.cat([*full.responses]).unique().tolist()
    for eos in (*said[::3], next(i for i in range(61) if i not in said)):
        heard = Heard(drafter)
        found = plain(model, drafter=heard, draft_size=5, eos_id=eos)
        assert torch.equal(found.sequences, plain(model, eos_id=eos).sequences)
        assert torch.equal(found.accepted, found.drafted)
        assert all(eos not in draft.tokens for *_, draft in heard.heard)
        ends += int((found.kept < 24).sum())
    assert ends > 10
    assert torch.equal(full.sequences, plain(model, drafter=drafter, draft_size=5).sequences)


# --- pages, ends, engines, recordings -------------------------------------------------------------


@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_pages_of_any_size_in_any_order(page_size: int) -> None:
    expected = plain(DEEP)
    width = expected.sequences.shape[1]
    per_lane = -(-width // page_size)
    count = len(PROMPTS) * per_lane
    torch.manual_seed(page_size)
    pages = torch.randperm(count + 3)[:count].view(len(PROMPTS), -1)
    own = make_settings(DecodeConfig(), DEEP, "none", 1)[0]
    with torch.inference_mode():
        cache = DEEP.new_cache(count + 3, page_size, pages)
        cache.slots.fill_(math.nan)
        drafter = exits((1, 3), 0.2)
        batch = CausalBatch(DEEP, len(PROMPTS), width, drafter=drafter, sizer=Fixed(4), kv_cache=cache)
        for _ in range(2):  # lanes are used again
            for lane, prompt in enumerate(PROMPTS):
                batch.admit(lane, prompt, 24, own)
            while batch.live:
                batch.step()
            for b, prompt in enumerate(PROMPTS):
                end = len(prompt) + 24
                assert torch.equal(batch.tokens[b, :end], expected.sequences[b, :end])


def test_ends_inside_a_path() -> None:
    """EOS and stop sequences, wherever the text has them."""
    full = plain(DEEP, prompts=PROMPTS[:1])
    response = full.responses[0].tolist()
    for at in range(12):
        for gamma in (0.0, 0.4):
            settings: dict[str, Any] = {"prompts": PROMPTS[:1], "drafter": exits((2,), gamma, 8)}
            ends = response.index(response[at])
            found = plain(DEEP, eos_id=response[at], draft_size=8, **settings)
            assert found.responses[0].tolist() == [*response[:ends], *[response[at]] * (24 - ends)]
            pair = response[at : at + 2]
            begin = next(i for i in range(23) if response[i : i + 2] == pair)
            found = plain(DEEP, stop=[pair], draft_size=8, **settings)
            assert int(found.kept[0]) == begin


def test_lanes_at_any_stage_share_a_batch() -> None:
    """Prompts are computed beside drafts, and each sequence is what it is alone; without its neighbours'
    passes, to the bit."""
    own = make_settings(DecodeConfig(logprobs=True), DEEP, "none", 1)[0]
    alone = [
        plain(DEEP, prompts=[prompt], drafter=exits(), draft_size=4, logprobs=True) for prompt in PROMPTS
    ]
    with torch.inference_mode():
        for apart in (False, True):
            batch = CausalBatch(DEEP, 4, 100, drafter=exits(), sizer=Fixed(4), batch_invariant=apart)
            for lane, prompt in enumerate(PROMPTS):
                batch.admit(lane, prompt, 24, own)
                batch.step()
                batch.step()
            while batch.live:
                batch.step()
            for lane, (prompt, one) in enumerate(zip(PROMPTS, alone, strict=True)):
                end = len(prompt) + 24
                assert torch.equal(batch.tokens[lane, :end], one.sequences[0])
                got = batch.trajectory.logprob[lane, len(prompt) : end]
                assert one.logprobs is not None
                assert torch.equal(got, one.logprobs[0]) or not apart
                torch.testing.assert_close(got, one.logprobs[0], rtol=0, atol=1e-4)


def test_an_engine_shares_pages() -> None:
    """Few of them, evicted and used again."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randint(10, 60, (24,), generator=generator)
    prompts = [torch.cat((common, torch.randint(10, 60, (n,), generator=generator))) for n in range(1, 7)]
    expected = plain(DEEP, prompts=prompts, gen_length=20)
    settings: dict[str, Any] = {"lanes": 2, "max_length": 64, "page_size": 8, "pages": 14, "draft_size": 4}
    for layers in HEADS:
        with dx.Engine(DEEP, drafter=exits(layers, 0.2), **settings) as engine:
            results = [h.result(60) for h in [engine.submit(p, gen_length=20, eos_id=-1) for p in prompts]]
        texts = [response.tolist() for response in expected.responses]
        assert [result.tokens for result in results] == texts
        assert [result.reused for result in results[2:]] == [24] * 4
        # What another has decoded is reused too: its first layers are the drafts' work.
        longer = [
            torch.cat((prompt, torch.tensor(text))) for prompt, text in zip(prompts, texts, strict=True)
        ]
        more = plain(DEEP, prompts=longer, gen_length=9)
        with dx.Engine(DEEP, drafter=exits(layers, 0.2), **settings | {"pages": 64}) as engine:
            for prompt in prompts:
                engine.submit(prompt, gen_length=20, eos_id=-1).result(60)
            results = [engine.submit(p, gen_length=9, eos_id=-1).result(60) for p in longer]
        assert [result.tokens for result in results] == [response.tolist() for response in more.responses]
        assert all(result.reused >= 40 for result in results)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_recorded_passes_are_the_same(temperature: float, request: pytest.FixtureRequest) -> None:
    """On a tape in place of a GPU: parts of drafts, and verify passes that begin at a layer."""
    settings: dict[str, Any] = {"draft_size": 4, "gen_length": 40, "temperature": temperature, "seed": 2}
    prompts = [PROMPTS[0], PROMPTS[2]]
    expected = plain(DEEP, prompts=prompts, suppress=[3], drafter=exits((1, 3), 0.2), **settings)
    taped = request.getfixturevalue("taped")
    found = plain(DEEP, prompts=prompts, suppress=[3], drafter=exits((1, 3), 0.2), **settings)
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(found.accepted, expected.accepted)
    assert torch.equal(found.layers, expected.layers)
    assert len(taped) == 2
    assert all(graphs.replays > 5 for graphs in taped)
    taped.clear()
    plain(DEEP, prompts=prompts, graphs=False, drafter=exits(), **settings)
    assert not taped


def test_a_failed_pass_leaves_the_sequences_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = plain(DEEP, prompts=PROMPTS[2:3])
    own = make_settings(DecodeConfig(), DEEP, "none", 1)[0]
    batch = CausalBatch(DEEP, 1, 60, drafter=exits((1, 3), 0.0), sizer=Fixed(4))
    failed = list[int]()

    class Failing(PatchedLayers):
        def __init__(self, after: int) -> None:
            super().__init__()
            self.left = after

        def around(self, metadata: AttentionMetadata, start: int, stop: int) -> AttentionMetadata:
            self.left -= 1
            if self.left < 0:
                failed.append(start)
                raise RuntimeError("no such luck")
            return metadata

    with torch.inference_mode():
        batch.admit(0, PROMPTS[2], 24, own)
        batch.step()
        for after in range(7):  # five runs of layer 0, then layers 1 and 2, then the rest
            before = batch.sequences[0].known, batch.sequences[0].layers, batch.sequences[0].draft_nfe
            with monkeypatch.context() as patch:
                patch.setattr(Model, "run_layers", Failing(after))
                with pytest.raises(RuntimeError, match="no such luck"):
                    batch.step()
            assert (
                batch.sequences[0].known,
                batch.sequences[0].layers,
                batch.sequences[0].draft_nfe,
            ) == before
        while batch.live:
            batch.step()
    assert failed == [0, 0, 0, 0, 0, 1, 3]
    assert torch.equal(batch.tokens[0, :44], expected.sequences[0])


def test_a_bad_row_is_named_and_one_off_the_path_does_not_matter() -> None:
    model = deep_model()
    texts = plain(model, PROMPTS[:2]).sequences.tolist()
    drafter = exits((2,), 0.0, target=model)
    clean = plain(model, PROMPTS[:2], drafter=drafter, draft_size=4)
    assert clean.sequences.tolist() == texts
    at = next(
        at
        for at in range(len(PROMPTS[1]) + 1, len(PROMPTS[1]) + 24)
        if texts[1][at] not in texts[1][:at] and texts[1][at] not in texts[0][: at + 2]
    )
    with torch.no_grad():
        model.embed.weight[texts[1][at]] = math.nan
    for size in (0, 3):
        with pytest.raises(ValueError, match=f"sequence 1 at position {at + 1} holds NaN"):
            plain(model, PROMPTS[:2], drafter=exits((2,), 0.0, target=model), draft_size=size)
