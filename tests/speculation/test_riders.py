"""Riders: rows of the verify pass that guess for the next; prompt tokens (PPD) and Hidden Transfer."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from dparallel.training.drafters import riders as training
from dparallel.training.drafters.common import Target
from drafters import MODEL, Knowing, model_of, riding
from safetensors.torch import load_file, save_file
from test_dflash import layer, norm
from test_speculate import PROMPTS, plain
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext.decoding.config import DecodeConfig
from dparallel_ext.decoding.settings import make_settings
from dparallel_ext.models import Model
from dparallel_ext.speculation import CausalBatch, Draft, DraftSession, Measured, RiderDrafter, drafter_of
from dparallel_ext.speculation.sizing import Fixed, sizer_for

pytest_plugins = ["taping"]

KINDS = ("ppd", "hidden_transfer")


# --- what riders guess, in plain torch ------------------------------------------------------------


def guessed(drafter: RiderDrafter, target: Model, tokens: Tensor) -> Tensor:
    """Logits (n, V) in float64 of riders behind the last of tokens (m,): rows of one causal sequence, which
    begin at a layer."""
    t = {name: p.double() for name, p in target.state_dict().items()}
    own, count = drafter.model, drafter.model.most
    x = t["model.embed_tokens.weight"][tokens]
    for i in range(target.shape.layers):
        if i == own.layer:
            if own.KIND == "ppd":
                x = torch.cat((x, own.prompt.double()))
            else:
                x = torch.cat((x, torch.stack([matrix.double() @ x[-1] for matrix in own.maps])))
        at = torch.arange(len(x))
        x = layer(t, f"model.layers.{i}.", x, at, at[:, None] >= at, target.shape.rope_theta, 1e-5)
    return norm(x[-count:], t["model.norm.weight"], 1e-5) @ t["lm_head.weight"].T


class Noted(DraftSession):
    """Rides at random behind drafts that know the text, or half of it; notes what was guessed of which."""

    most = 40

    def __init__(self, drafter: RiderDrafter, instead: Knowing, seed: int = 0) -> None:
        self.inner, self.instead, self.rng = drafter, instead, random.Random(seed)
        self.heard: dict[int, tuple[int, list[int]]] = {}
        self.texts: list[tuple[Tensor, int, list[int]]] = []

    def check(self, model: Any) -> None:
        self.inner.check(model)
        self.instead.check(model)

    def session(self, model: Any, kv_cache: Any, lanes: int, *, graphs: bool = True) -> Noted:
        self.riders = self.inner.session(model, kv_cache, lanes, graphs=graphs).riders
        return self

    def reset(self, lane: int) -> None:
        self.heard.pop(lane, None)

    def guessed(self, lane: int, riders: int, numbers: Sequence[int]) -> None:
        self.heard[lane] = riders, list(numbers)

    def propose(self, lanes: Any, sizes: Sequence[int]) -> list[Draft]:
        drafts = []
        for lane, size in zip(lanes, sizes, strict=True):
            if lane.lane in self.heard:
                riders, numbers = self.heard[lane.lane]
                self.texts.append((lane.tokens[:-1].clone(), riders, numbers))
                nodes = self.instead.propose([lane], [self.rng.randint(0, size)])[0]
            else:
                nodes = Draft()
            riders, left = [], size - len(nodes.tokens)
            for _ in range(1 + len(nodes.tokens)):
                riders.append(min(left, self.rng.choice([0, 1, 2, 3, 3])))
                left -= riders[-1]
            drafts.append(nodes._replace(riders=tuple(riders)))
        return drafts

    def compare(self, target: Model = MODEL) -> int:
        """Riders whose guesses are the likeliest tokens of the plain computation, in order."""
        count = 0
        for tokens, riders, numbers in self.texts:
            each = len(numbers) // 3
            assert each == (10 if riders else 0)
            logits = guessed(self.inner, target, tokens) if riders else torch.zeros(0, 1)
            for number in range(riders):
                of_rider = torch.tensor(numbers[number * each : (number + 1) * each])
                chosen, best = logits[number][of_rider], logits[number].topk(each).values
                assert bool((chosen >= best - 1e-3).all()), (len(tokens), number)
                count += 1
        return count


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_riders_guess_is_their_computation_in_plain_torch(kind: str, tree: bool) -> None:
    """Behind whichever node was the last accepted, however many rode with it."""
    expected = plain(gen_length=40)
    noted = Noted(riding(kind), Knowing(list(expected.sequences), tree=tree, right=0.7))
    for size in (4, 12):
        found = plain(gen_length=40, drafter=noted, draft_size=size)
        assert torch.equal(found.sequences, expected.sequences)
        assert found.nfe.sum() < expected.nfe.sum()
    assert noted.compare() > 100
    assert {riders for _, riders, _ in noted.texts} == {0, 1, 2, 3}


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_the_riders_in_plain_torch(kind: str) -> None:
    """KL to what the target says at the true tokens, each distance .8 times the one in front of it."""
    drafter = riding(kind)
    settings = {"batch": 3, "anchors": 4, "soften": 2.0}
    target = Target("it", MODEL, None, False)
    trainee: Any = (
        training.PromptTokensTrainee(target, training.PromptSettings(**settings))
        if kind == "ppd"
        else training.HiddenTransferTrainee(target, training.TransferSettings(layer=1, **settings))
    )
    trainee.module = drafter.model
    generator = torch.Generator().manual_seed(0)
    texts = [(torch.randint(10, 61, (n,), generator=generator), p) for n, p in ((14, 3), (9, 6), (20, 2))]
    placed = training.place(texts, 3, 4, generator)
    student, teacher, true = training.logits_of(drafter.model, MODEL, placed)
    seen = 0
    for b, a, i in placed.asked.nonzero().tolist():
        text, prompt = texts[b]
        at = int(placed.places[b, a])
        assert prompt - 1 <= at < at + 2 + i < len(text)
        torch.testing.assert_close(
            student[seen].double(), guessed(drafter, MODEL, text[: at + 1])[i], rtol=0, atol=1e-3
        )
        torch.testing.assert_close(teacher[seen], MODEL(text[None]).logits[0, at + 1 + i], rtol=0, atol=1e-3)
        assert true[seen] == text[at + 2 + i]
        seen += 1
    assert seen == len(student) > 20
    generator = torch.Generator().manual_seed(5)
    some = torch.randint(3, (3,), generator=generator).tolist()
    placed = training.place([texts[i] for i in some], 3, 4, generator)
    student, teacher, _ = (t.double() for t in training.logits_of(drafter.model, MODEL, placed))
    p, q = teacher.softmax(-1), (student / 2).softmax(-1)
    weights = [0.8**i for _, _, i in placed.asked.nonzero().tolist()]
    kl = (p * (p / q).log()).sum(-1).tolist()
    expected = sum(w * each for w, each in zip(weights, kl, strict=True)) / sum(weights)
    assert trainee.loss_of(texts, 5).item() == pytest.approx(expected, rel=1e-3)
    ranks = training.ranks_of(drafter.model, MODEL, texts)
    every = training.place(texts, 3, None)
    student, _, true = training.logits_of(drafter.model, MODEL, every)
    place = (student > student.gather(1, true[:, None])).sum(1)
    for i, row in enumerate(ranks):
        own = place[every.asked.nonzero()[:, 2] == i]
        assert list(row) == pytest.approx(
            [float((own == rank).float().mean()) for rank in range(10)], abs=1e-4
        )


@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_is_found(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Riders in another order, at another place, or of another node."""
    expected = plain()

    def embed(self: Any, nodes: Tensor, numbers: Tensor) -> Tensor:
        return original(self, nodes.roll(1, 0), 2 - numbers)

    original = type(riding(kind).model).embed
    monkeypatch.setattr(type(riding(kind).model), "embed", embed)
    noted = Noted(riding(kind), Knowing(list(expected.sequences), tree=True, right=0.7))
    found = plain(drafter=noted, draft_size=8)
    assert torch.equal(found.sequences, expected.sequences)  # whatever they guess
    with pytest.raises(AssertionError):
        noted.compare()


# --- the text is the model's own ------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_they_change_no_token(kind: str, temperature: float) -> None:
    settings: dict[str, Any] = {"temperature": temperature, "seed": 7, "gen_length": [14, 20, 1, 7]}
    expected = plain(**settings)
    drafter = riding(kind)
    for size in (None, 1, 2, 3, 4, 7, 16, 63, 99):
        found = plain(drafter=drafter, draft_size=size, **settings)
        assert torch.equal(found.sequences, expected.sequences), size
        assert bool((found.nfe <= expected.nfe).all())
        if size is not None and size > 3:
            assert found.nfe.sum() < expected.nfe.sum()
            assert found.accepted.sum() > 0
    for more in ({"batch_invariant": True}, {"suppress": [3, 17]}, {"logprobs": True}):
        expected = plain(**more, **settings)
        found = plain(drafter=drafter, draft_size=9, **more, **settings)
        assert torch.equal(found.sequences, expected.sequences), more
        if "logprobs" in more:
            torch.testing.assert_close(found.logprobs, expected.logprobs, equal_nan=True, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_hundreds_of_random_cases(kind: str) -> None:
    """Batches, sizes, ends inside a path, room, and riders behind any node."""
    rng = random.Random(1)
    for case in range(20):
        prompts = [torch.randint(10, 61, (rng.choice([1, 2, 7, 33]),)) for _ in range(rng.randint(1, 4))]
        settings: dict[str, Any] = {
            "gen_length": [rng.randint(0, 20) for _ in prompts],
            "temperature": rng.choice([0.0, 0.7, 1.5]),
            "seed": rng.randrange(10**6),
            "top_k": rng.choice([None, 5]),
            "eos_id": rng.choice([-1, None, rng.randrange(61)]),
            "suppress": rng.choice([None, [3, 17]]),
            "stop": rng.choice([(), [[rng.randrange(61)]], [[rng.randrange(61), rng.randrange(61)], [4]]]),
        }
        expected = dx.speculate(MODEL, prompts, **settings)
        knowing = Knowing(list(expected.sequences), tree=rng.random() < 0.5, right=0.8, seed=case)
        drafter: Any = Noted(riding(kind), knowing, case) if rng.random() < 0.6 else riding(kind)
        more = {"draft_size": rng.choice([1, 3, 8, 20]), "batch_invariant": rng.random() < 0.3}
        found = dx.speculate(MODEL, prompts, drafter=drafter, **more, **settings)
        assert torch.equal(found.sequences, expected.sequences), settings
        assert torch.equal(found.kept, expected.kept)
        assert torch.equal(found.generated, expected.generated)
        if isinstance(drafter, Noted) and settings["suppress"] is not None:
            assert not {3, 17} & {token for *_, numbers in drafter.texts for token in numbers}


@pytest.mark.parametrize("page_size", [1, 3, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_pages_of_any_size_in_any_order(kind: str, page_size: int) -> None:
    """Whose other slots may hold anything: a rider sees what was computed in its pass, or for true tokens."""
    expected = plain()
    width = expected.sequences.shape[1]
    count = len(PROMPTS) * -(-width // page_size)
    noted = Noted(riding(kind), Knowing(list(expected.sequences), tree=True))
    noted.check(MODEL)
    with torch.inference_mode():
        pages = torch.randperm(count + 3)[:count].view(len(PROMPTS), -1)
        cache = MODEL.new_cache(count + 3, page_size, pages)
        cache.slots.fill_(math.nan)
        batch = CausalBatch(MODEL, len(PROMPTS), width, drafter=noted, sizer=Fixed(9), kv_cache=cache)
        own = make_settings(DecodeConfig(), MODEL, "none", 1)[0]
        for lane, prompt in enumerate(PROMPTS):
            batch.admit(lane, prompt, 24, own)
        while batch.live:
            batch.step()
    for b, prompt in enumerate(PROMPTS):
        end = len(prompt) + 24
        assert torch.equal(batch.tokens[b, :end], expected.sequences[b, :end])
    assert noted.compare() > 40


@pytest.mark.parametrize("kind", KINDS)
def test_in_an_engine_with_shared_pages(kind: str) -> None:
    """And few pages, evicted and used again; a prefix that is there already has no pass that rides along."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randint(10, 60, (24,), generator=generator)
    prompts = [torch.cat((common, torch.randint(10, 60, (n,), generator=generator))) for n in range(1, 7)]
    prompts.append(prompts[0])
    expected = plain(prompts=prompts, gen_length=20)
    for drafter in (riding(kind), Noted(riding(kind), Knowing(list(expected.sequences), tree=True))):
        settings = {"lanes": 2, "max_length": 64, "page_size": 8, "pages": 14, "draft_size": 6}
        with dx.Engine(MODEL, drafter=drafter, **settings) as engine:
            results = [h.result(60) for h in [engine.submit(p, gen_length=20, eos_id=-1) for p in prompts]]
        assert [r.tokens for r in results] == [response.tolist() for response in expected.responses]
        assert [r.reused for r in results[2:]] == [24] * 5
    assert isinstance(drafter, Noted)
    assert drafter.compare() > 50


def test_long_prompts_attend_to_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt's pass has riders behind its last token, whatever way its attention goes."""
    prompts = [torch.randint(10, 61, (n,), generator=torch.Generator().manual_seed(n)) for n in (300, 7)]
    expected = plain(prompts=prompts, gen_length=12)
    for kind in KINDS:
        noted = Noted(riding(kind), Knowing(list(expected.sequences), tree=True))
        found = plain(prompts=prompts, gen_length=12, drafter=noted, draft_size=6)
        assert torch.equal(found.sequences, expected.sequences)
        assert noted.compare() > 5


@pytest.mark.parametrize("kind", KINDS)
def test_recorded_passes_are_the_same(kind: str, request: pytest.FixtureRequest) -> None:
    """On a tape in place of a GPU: nothing of riders waits for the device, or reads from the host."""
    settings: dict[str, Any] = {"gen_length": 40, "temperature": 0.7, "seed": 3, "prompts": PROMPTS[:3]}
    drafter = riding(kind)
    expected = plain(**settings)
    alone = plain(drafter=drafter, draft_size=6, **settings)
    taped = request.getfixturevalue("taped")
    found = plain(drafter=drafter, draft_size=6, **settings)
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(found.accepted, alone.accepted)  # and so what was guessed
    (graphs,) = taped
    assert graphs.recorder is not None
    assert graphs.replays > found.forwards / 3


def test_other_families_and_16_bits() -> None:
    for kind, (family, dtype) in itertools.product(
        KINDS, (("llama", torch.float32), ("qwen2", torch.bfloat16))
    ):
        model = model_of(family, dtype=dtype)
        found = plain(model, drafter=riding(kind, model), draft_size=8)
        same = [torch.equal(a, b) for a, b in zip(found.responses, plain(model).responses, strict=True)]
        assert sum(same) >= (4 if dtype == torch.float32 else 2)


def test_a_bad_rider_does_not_matter() -> None:
    """Plain decoding would not have computed it; what it guesses is nothing in particular."""
    drafter = riding("ppd")
    with torch.no_grad():
        drafter.model.prompt[1] = math.nan
    found = plain(drafter=drafter, draft_size=8)
    assert torch.equal(found.sequences, plain().sequences)


# --- what is asked, and counted -------------------------------------------------------------------


def test_riders_are_no_tokens_of_a_draft() -> None:
    """Depths are those of nodes; the pass over the prompt has riders, and is no draft."""
    found = plain(drafter=riding("ppd"), draft_size=6)
    assert len(found.drafted) <= 3
    assert found.draft_nfe.tolist() == [n - 1 for n in found.nfe.tolist()] or bool(
        (found.draft_nfe < found.nfe).all()
    )
    assert int(found.drafted[0]) <= int(found.draft_nfe.sum())
    seen: list[tuple[int, int]] = []

    class Counting(RiderDrafter):
        def session(self, *args: Any, **settings: Any) -> DraftSession:
            session = super().session(*args, **settings)
            propose = session.propose

            def counted(lanes: Any, sizes: Sequence[int]) -> list[Draft]:
                drafts = propose(lanes, sizes)
                seen.extend((size, draft.size) for size, draft in zip(sizes, drafts, strict=True))
                return drafts

            session.propose = counted  # type: ignore[method-assign]
            return session

    one = riding("ppd")
    plain(drafter=Counting(one.model, one.ranks), draft_size=11)
    assert max(size for size, _ in seen) == 11
    assert all(size >= rows for size, rows in seen)
    assert [rows for _, rows in seen[:3]] == [3, 3, 3]  # of prompts: riders alone
    assert max(rows for _, rows in seen) > 6


def test_sizes_go_by_what_the_drafter_expects() -> None:
    sizer = sizer_for(riding("ppd"))
    assert [sizer.tokens(n) for n in (0, 1)] == [pytest.approx(1.0), pytest.approx(riding("ppd").expected(1))]
    for _ in range(200):  # half of what is expected
        sizer.learn(16, 0)
        sizer.learn(16, 1)
    half = 0.5 / (riding("ppd").expected(16) - 1)
    for size in (4, 16, 63):
        assert sizer.tokens(size) - 1 == pytest.approx(half * (riding("ppd").expected(size) - 1), rel=0.2)
    assert Measured(8).tokens(3) == pytest.approx(1 + 0.5 + 0.25 + 0.125)


@pytest.mark.parametrize(
    ("draft", "message"),
    [
        (Draft(riders=(1,)), "drafter: expected from 0 to 0 riders behind a node of lane 0, got 1"),
        (
            Draft((1,), riders=(1,)),
            "expected riders of the root and each of 1 nodes of lane 0, got 1 numbers",
        ),
        (Draft((1,), riders=(3, 3)), "drafter: expected at most 5 nodes for lane 0, got 1 and 6 riders"),
        (Draft((1,), riders=(1, 4)), "drafter: expected from 0 to 3 riders behind a node of lane 0, got 4"),
        (Draft((1,), riders=(-1, 1)), "expected from 0 to 3 riders behind a node of lane 0, got -1"),
        (Draft((1,), riders=(2, 0)), "drafter: expected no nodes for lane 0 with its prompt, got 1"),
    ],
)
def test_what_is_no_draft_is_refused(draft: Draft, message: str) -> None:
    class Bad(Knowing):
        def propose(self, lanes: Any, sizes: Any) -> list[Draft]:
            return [draft]

    drafter = Bad([])
    prompts = PROMPTS[:1] if message.endswith("got 1") and "prompt" in message else PROMPTS[1:2]
    if "0 to 0" not in message:
        drafter.riders = riding("ppd").session(MODEL, None, 1).riders  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        plain(prompts=prompts, drafter=drafter, draft_size=5)


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["drafter.safetensors", "directory"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_holds_all_of_it(tmp_path: Path, kind: str, name: str) -> None:
    drafter, path = riding(kind), tmp_path / name
    drafter.save(path, torch.float32)
    for found in (dx.speculation.load(path), drafter_of(str(path))):
        assert isinstance(found, RiderDrafter)
        assert found.ranks == drafter.ranks
        assert found.model.layer == drafter.model.layer
        state = drafter.model.state_dict()
        assert all(torch.equal(t, state[key]) for key, t in found.model.state_dict().items())
        assert repr(found) == repr(drafter)
    expected = plain(drafter=drafter, draft_size=8)
    found = plain(drafter=path, draft_size=8)
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(found.accepted, expected.accepted)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("ppd", {"num_riders": 0}, "num_riders=0, expected a whole number >= 1"),
        ("ppd", {"num_riders": None}, "'num_riders' is null"),
        ("ppd", {"num_riders": 2}, "ranks: expected for each of 2 riders"),
        ("ppd", {"ranks": [[0.5], [0.5], [0.7, 0.7]]}, "shares of sum at most 1"),
        ("ppd", {"ranks": [[0.5], [0.5], ["a"]]}, "ranks: expected for each of 3 riders"),
        ("ppd", {"ranks": 3}, "ranks: expected for each of 3 riders"),
        ("ppd", {"ranks": [[math.nan], [0.5], [0.5]]}, "ranks: expected for each of 3 riders"),
        ("ppd", {"hidden_size": 31}, r"does not fit its config: prompt is \(3, 32\), expected \(3, 31\)"),
        ("hidden_transfer", {"layer": 2}, r"layer=2, expected one of \[1, 2\)"),
        ("hidden_transfer", {"layer": 0}, "layer=0, expected a whole number >= 1"),
        ("hidden_transfer", {"dparallel": {"kind": "ppd"}}, "prompt is missing; maps is unexpected"),
    ],
)
def test_a_config_that_does_not_fit_is_named(
    tmp_path: Path, kind: str, change: dict[str, Any], message: str
) -> None:
    riding(kind).save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message) as raised:
        dx.speculation.load(tmp_path)
    assert str(raised.value).startswith(f"path: {tmp_path}")


def test_files_and_models_that_do_not_fit_are_named(tmp_path: Path) -> None:
    drafter = riding("ppd")
    drafter.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["ranks"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r": ranks: expected for each of 3 riders .*, got None"):
        dx.speculation.load(tmp_path)
    drafter.save(tmp_path)
    weights = tmp_path / "model.safetensors"
    save_file({**load_file(weights), "more": torch.zeros(1)}, weights)
    with pytest.raises(ValueError, match="more is unexpected"):
        dx.speculation.load(tmp_path)
    other = model_of()
    with torch.no_grad():
        other.lm_head.weight[0] += 1
    for target, message in (
        (model_of(vocab_size=62), "was made for a vocabulary of 61 tokens, and the model has 62"),
        (model_of(hidden_size=40), "was made for a model of width 32, and the model has 40"),
        (model_of(num_hidden_layers=3), "was made for a model of 2 layers, and the model has 3"),
        (other, "was trained for another model"),
    ):
        with pytest.raises(ValueError, match=message):
            plain(target, drafter=drafter)
