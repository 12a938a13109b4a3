"""speculate: whatever is guessed, the text is the model's own; plain, it is transformers' generate."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import golden
from drafters import MODEL, SIZES, Knowing, model_of
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext import models, speculation
from dparallel_ext.decoding.config import DecodeConfig
from dparallel_ext.decoding.sequence_settings import SamplingGroup
from dparallel_ext.decoding.settings import make_settings
from dparallel_ext.models import Model
from dparallel_ext.speculation import (
    CausalBatch,
    Draft,
    ModelDrafter,
    NGram,
)
from dparallel_ext.speculation.sizing import Fixed

PROMPTS = [torch.randint(10, 61, (n,), generator=torch.Generator().manual_seed(n)) for n in (3, 1, 20, 70)]


def plain(model: Model = MODEL, prompts: list[Tensor] = PROMPTS, **settings: Any) -> dx.SpeculateOutput:
    return dx.speculate(model, prompts, **{"gen_length": 24, "eos_id": -1, **settings})


def drafters(texts: list[Tensor]) -> list[tuple[str, Any]]:
    return [
        ("ngram", "ngram"),
        ("ngram of 1", NGram(1, most=3)),
        ("chains", Knowing(texts)),
        ("trees", Knowing(texts, tree=True)),
        ("wide trees", Knowing(texts, tree=True, most=90, right=0.4)),
        ("nonsense", Knowing(texts, right=0.0)),
    ]


def test_a_record_says_what_became_of_each_guess() -> None:
    """Of every pass: the tokens that it has brought, the guesses among them, and those that it refused."""
    texts = plain().sequences
    for name, drafter in [("plain", None), *drafters([row[row >= 0] for row in texts])]:
        kept = plain(drafter=drafter, draft_size=5, record=True, logprobs=True)
        bare = plain(drafter=drafter, draft_size=5)
        assert torch.equal(kept.sequences, bare.sequences), name
        assert (bare.trajectory, bare.passes) == (None, None)
        assert kept.trajectory is not None
        assert kept.passes is not None
        assert kept.logprobs is not None
        torch.testing.assert_close(kept.trajectory.logprob, kept.logprobs, equal_nan=True)
        torch.testing.assert_close(kept.trajectory.confidence.log(), kept.logprobs, rtol=0, atol=1e-5)
        refused = 0
        for steps, passes, nfe in zip(kept.trajectory.step, kept.passes, kept.nfe.tolist(), strict=True):
            assert len(passes) == nfe
            assert torch.equal(steps, steps.sort().values)
            brought = torch.bincount(steps, minlength=nfe + 1)[1:].tolist()
            assert brought == [one.accepted + 1 for one in passes], name
            assert all(one.drafted == one.accepted + len(one.refused) for one in passes), name
            refused += sum(len(one.refused) for one in passes)
        assert (refused > 0) == (name != "plain"), name


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("end", ["eos", "stop"])
def test_guesses_behind_an_end_count_as_refused(end: str, tree: bool) -> None:
    """A pass brings its accepted guesses and one token more, the guess that ends the text, if any."""
    whole = plain(prompts=PROMPTS[2:3]).sequences
    response = whole[0, 20:].tolist()
    last = next(i for i in range(8, 24) if response[i] not in response[:i])
    ending: dict[str, Any] = {"eos_id": response[last]} if end == "eos" else {"stop": [[response[last]]]}
    inside = 0
    for size in range(1, 13):
        drafter = Knowing(list(whole), right=1.0, ragged=False, tree=tree, most=size, seed=size)
        found = plain(prompts=PROMPTS[2:3], drafter=drafter, draft_size=size, record=True, **ending)
        assert found.passes is not None
        (passes,) = found.passes
        assert int(found.generated) == last + 1 == sum(each.accepted + 1 for each in passes)
        assert int(found.accepted.sum()) == sum(each.accepted for each in passes)
        assert all(each.drafted == each.accepted + len(each.refused) for each in passes[:-1])
        at = passes[-1]
        behind = at.drafted - at.accepted - len(at.refused)
        assert behind in (0, 1)  # the guess that ended the text is neither
        inside += behind and len(at.refused) > 0
    assert inside > 2


def test_refused_are_the_nodes_beside_the_way() -> None:
    chain, tree = Draft((4, 5, 6)), Draft((4, 7, 5, 8, 5), (0, 0, 1, 1, 2))
    assert [chain.refused(path) for path in ([9], [4, 9], [4, 5, 6, 9], [4, 5, 6])] == [
        (4, 5, 6),
        (5, 6),
        (),
        (),
    ]
    assert [tree.refused(path) for path in ([9], [4, 8, 9], [7, 5, 9], [4, 9])] == [
        (4, 7, 5, 8, 5),
        (7, 5, 5),
        (4, 5, 8),
        (7, 5, 8, 5),
    ]
    assert Draft().refused([3]) == ()
    # Of siblings that guess the same one is on the way.
    assert Draft((4, 4, 5), (0, 0, 1)).refused([4, 5, 1]) == (4,)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_plain_decoding_is_transformers_greedy_generate(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    sizes = {**SIZES, "eos_token_id": [5, 9], "pad_token_id": 0}
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(family, **sizes)
    ).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            if p.ndim == 2:
                p.normal_(std=0.4)
    ours = models.wrap(theirs)
    assert next(iter(ours.parameters())).data_ptr() in {p.data_ptr() for p in theirs.parameters()}
    generated = [
        theirs.generate(prompt[None], max_new_tokens=40, do_sample=False, pad_token_id=0)[0]
        for prompt in PROMPTS
    ]
    for drafter in (None, "ngram"):
        found = dx.speculate(ours, PROMPTS, gen_length=40, drafter=drafter)
        for b, text in enumerate(generated):
            assert torch.equal(found.sequences[b, : len(text)], text), (drafter, b)
            response = text[len(PROMPTS[b]) :].tolist()
            ended = next((i for i, token in enumerate(response) if token in (5, 9)), len(response))
            assert int(found.kept[b]) == ended


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_drafter_changes_no_token(family: str, temperature: float) -> None:
    model = MODEL if family == "qwen3" else model_of(family)
    settings = {"temperature": temperature, "seed": 7, "gen_length": [24, 30, 1, 11]}
    expected = plain(model, **settings)
    assert expected.nfe.tolist() == [24, 30, 1, 11]
    texts = list(expected.sequences)
    for name, drafter in drafters(texts):
        for size in (None, 1, 5):
            found = plain(model, drafter=drafter, draft_size=size, **settings)
            assert torch.equal(found.sequences, expected.sequences), (name, size)
            assert torch.equal(found.kept, expected.kept)
            assert bool((found.nfe <= expected.nfe).all())
        if name in ("chains", "trees"):
            assert found.nfe.sum() < expected.nfe.sum()
            assert found.tokens_per_forward > expected.tokens_per_forward


def test_hundreds_of_random_cases() -> None:
    """Batches, sizes of draft, temperatures, ends: what is decoded is what plain decoding gives."""
    rng = random.Random(0)
    for _ in range(60):
        lanes = rng.randint(1, 4)
        prompts = [torch.randint(10, 61, (rng.choice([1, 2, 7, 33]),)) for _ in range(lanes)]
        settings: dict[str, Any] = {
            "gen_length": [rng.randint(0, 20) for _ in prompts],
            "temperature": rng.choice([0.0, 0.7, 1.5]),
            "seed": rng.randrange(10**6),
            "top_k": rng.choice([None, 5]),
            "top_p": rng.choice([None, 0.9]),
            "eos_id": rng.choice([-1, None, rng.randrange(61)]),
            "suppress": rng.choice([None, [3, 17]]),
            "stop": rng.choice([(), [[rng.randrange(61)]], [[rng.randrange(61), rng.randrange(61)], [4]]]),
            "logprobs": rng.random() < 0.3,
        }
        expected = dx.speculate(MODEL, prompts, **settings)
        drafter = Knowing(
            list(expected.sequences), tree=rng.random() < 0.5, right=rng.random(), seed=rng.randrange(99)
        )
        more = {"draft_size": rng.choice([None, 2, 8]), "batch_invariant": rng.random() < 0.3}
        found = dx.speculate(MODEL, prompts, drafter=drafter, **more, **settings)
        assert torch.equal(found.sequences, expected.sequences), settings
        assert torch.equal(found.kept, expected.kept)
        assert torch.equal(found.generated, expected.generated)
        if settings["logprobs"]:
            torch.testing.assert_close(found.logprobs, expected.logprobs, equal_nan=True, rtol=0, atol=1e-4)


@pytest.mark.parametrize("page_size", [1, 3, 16])
@pytest.mark.parametrize("tree", [False, True])
def test_pages_of_any_size_in_any_order(page_size: int, tree: bool) -> None:
    expected = plain()
    width = expected.sequences.shape[1]
    per_lane = -(-width // page_size)
    pages = torch.randperm(len(PROMPTS) * per_lane + 3)[: len(PROMPTS) * per_lane].view(len(PROMPTS), -1)
    with torch.inference_mode():
        cache = MODEL.new_cache(len(PROMPTS) * per_lane + 3, page_size, pages)
        cache.slots.fill_(math.nan)
        drafter = Knowing(list(expected.sequences), tree=tree)
        drafter.check(MODEL)
        batch = CausalBatch(MODEL, len(PROMPTS), width, drafter=drafter, sizer=Fixed(9), kv_cache=cache)
        settings = DecodeConfig()
        for lane, prompt in enumerate(PROMPTS):
            own = make_settings(settings, MODEL, "none", 1)[0]
            batch.admit(lane, prompt, 24, own)
        while batch.live:
            batch.step()
    for b, prompt in enumerate(PROMPTS):
        assert torch.equal(
            batch.tokens[b, : len(prompt) + 24], expected.sequences[b, : len(prompt) + 24].cpu()
        )


def test_a_sequence_is_what_it_is_alone() -> None:
    for temperature in (0.0, 0.9):
        together = plain(temperature=temperature, seed=[1, 2, 3, 4], drafter="ngram", draft_size=4)
        for b, prompt in enumerate(PROMPTS):
            alone = plain(prompts=[prompt], temperature=temperature, seed=[b + 1])
            length = int(alone.lengths[0])
            assert torch.equal(alone.sequences[0], together.sequences[b, :length])


def test_a_drafter_that_writes_to_its_tokens_changes_no_text() -> None:
    """A lane's tokens are a copy: prompt and text stay, and the next draft is made from the true ones."""

    class Writing(Knowing):
        def propose(self, lanes: Any, sizes: Any) -> list[Draft]:
            drafts = super().propose(lanes, sizes)
            for lane in lanes:
                lane.tokens.fill_(7)
            return drafts

    texts = plain().sequences
    known = [row[row >= 0] for row in texts]
    out = plain(drafter=Writing(known, right=1.0, ragged=False), draft_size=5)
    assert torch.equal(out.sequences, texts)
    assert int(out.accepted.sum()) == int(out.drafted.sum()) > 0


def test_ends_of_a_text() -> None:
    """EOS ids, several and the model's own; stop sequences, over the border of two passes; all cut a path."""
    full = plain(prompts=PROMPTS[:1])
    response = full.responses[0].tolist()
    texts = list(full.sequences)
    for size in (0, 1, 3, 23):
        settings: dict[str, Any] = {"prompts": PROMPTS[:1], "drafter": Knowing(texts, right=1.0)}
        settings["draft_size"] = size
        for at in (0, 4, 7):
            ends = response.index(response[at])
            found = plain(eos_id=response[at], **settings)
            assert int(found.kept[0]) == ends
            assert found.responses[0].tolist() == [*response[:ends], *[response[at]] * (24 - ends)]
            assert int(found.generated[0]) == ends + 1
            several = plain(eos_id=[60, response[at]], **settings)
            assert several.responses[0].tolist() == [*response[: ends + 1], *[60] * (23 - ends)]
            assert int(several.kept[0]) == ends
        pair = response[6:8]
        begin = next(i for i in range(23) if response[i : i + 2] == pair)
        found = plain(stop=[pair, [60, 60, 60]], **settings)
        assert int(found.kept[0]) == begin
        assert found.responses[0].tolist()[: begin + 2] == response[: begin + 2]


def test_the_models_own_ends_count_where_none_is_named() -> None:
    model = model_of(eos_token_id=[MODEL_FIRST := int(plain(prompts=PROMPTS[:1]).responses[0][4]), 60])
    found = dx.speculate(model, PROMPTS[:1], gen_length=24)
    assert int(found.kept[0]) == plain(prompts=PROMPTS[:1]).responses[0].tolist().index(MODEL_FIRST)
    assert int(dx.speculate(model, PROMPTS[:1], gen_length=24, eos_id=-1).kept[0]) == 24


def test_it_counts_what_drafts_are_worth() -> None:
    texts = list(plain().sequences)
    found = plain(drafter=Knowing(texts, right=1.0, ragged=False), draft_size=4)
    assert len(found.drafted) == len(found.accepted) == 4
    assert torch.equal(found.drafted, found.accepted)
    assert found.drafted.tolist() == sorted(found.drafted.tolist(), reverse=True)
    # The prompt's pass emits one token (a prompt of one token is a root itself), and each of the others five,
    # save that the last has no more room.
    assert found.nfe.tolist() == [6, 5, 6, 6]
    assert found.draft_nfe.tolist() == [5, 5, 5, 5]
    assert found.accepted_per_draft == pytest.approx((18 + 19 + 18 + 18) / 20)
    nothing = plain(drafter=Knowing(texts, right=0.0), draft_size=4)
    assert nothing.accepted_per_draft < 0.2


def test_streaming_gives_each_token_once_in_order() -> None:
    class Streamer:
        def __init__(self) -> None:
            self.parts: list[list[int]] = []
            self.ended = False

        def put(self, ids: Tensor) -> None:
            self.parts.append(ids.flatten().tolist())

        def end(self) -> None:
            self.ended = True

    expected = plain(prompts=PROMPTS[:1])
    streamer = Streamer()
    drafter = Knowing(list(expected.sequences))
    plain(prompts=PROMPTS[:1], drafter=drafter, draft_size=5, streamer=streamer)
    assert streamer.parts[0] == PROMPTS[0].tolist()
    assert [token for part in streamer.parts for token in part] == expected.sequences[0].tolist()
    assert max(map(len, streamer.parts[1:])) > 1
    assert streamer.ended
    with pytest.raises(ValueError, match="streamer: expected a batch of 1, got 4"):
        plain(streamer=streamer)


def test_a_drafter_of_ones_own_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    drafter = Knowing(list(plain().sequences))
    monkeypatch.setitem(speculation.NAMED, "knowing", drafter)
    assert speculation.drafter_of("knowing") is drafter
    out = plain(drafter="knowing", draft_size=4)
    assert torch.equal(out.sequences, plain().sequences)
    assert out.nfe.sum() < plain().nfe.sum()
    with pytest.raises(ValueError, match=r"drafter: expected a Drafter, a name .*knowing"):
        plain(drafter="unknown")


def test_a_model_of_the_hub_drafts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As a model in a directory does."""
    models.save(model_of("qwen2"), tmp_path / "drafter")
    monkeypatch.setattr(models.files, "fetched", lambda name: {"org/name": tmp_path / "drafter"}[name])
    drafter = speculation.drafter_of("org/name")
    assert isinstance(drafter, ModelDrafter)
    assert torch.equal(plain(drafter=drafter).sequences, plain().sequences)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_whole_models_draft(temperature: float) -> None:
    """The model itself, whose greedy drafts are all right at temperature 0, and another."""
    settings: dict[str, Any] = {"temperature": temperature, "seed": 3, "gen_length": [24, 5, 17, 24]}
    expected = plain(**settings)
    itself = plain(drafter=MODEL, draft_size=4, **settings)
    assert torch.equal(itself.sequences, expected.sequences)
    if temperature == 0:
        assert torch.equal(itself.accepted, itself.drafted)
        assert itself.nfe.tolist() == [6, 1, 5, 6]
    other = plain(drafter=ModelDrafter(model_of("llama")), **settings)
    assert torch.equal(other.sequences, expected.sequences)


def test_a_model_drafts_what_can_be_chosen() -> None:
    """Neither suppressed ids nor rows of its embedding behind the vocabulary."""
    diffusion = golden.model("llada_tiny_a", dtype=torch.float32)
    target, padded = model_of(vocab_size=500), model_of("llama", vocab_size=500)
    diffusion.vocab_size = 500  # the other 12 rows of its embedding are padding
    with torch.no_grad():  # nearly every second row prefers 505, then 8, then 7
        for drafter, rows in ((diffusion, (7, 8, 505)), (padded, (7, 8))):
            for number, row in enumerate(rows):
                drafter.lm_head.weight[row] = (40 + number) * drafter.lm_head.weight[9]
    for drafter in (diffusion, padded):
        for suppress in ((), (7,), (7, 8)):
            out = dx.speculate(
                target, PROMPTS, gen_length=12, drafter=drafter, draft_size=4, suppress=suppress, record=True
            )
            assert out.passes is not None
            refused = {token for passes in out.passes for one in passes for token in one.refused}
            assert refused.isdisjoint(suppress)
            assert max(refused) < 500
            assert len(suppress) == 2 or refused & {7, 8}


def test_diffusion_models_draft() -> None:
    """Shifted and block-causal ones too."""
    for name in ("llada_tiny_a", "dream_tiny_a", "sdar_tiny_a"):
        diffusion = golden.model(name)
        target = model_of(vocab_size=diffusion.shape.embedding_size)
        target.vocab_size = diffusion.vocab_size
        prompts = [torch.randint(10, 61, (n,)) for n in (1, 6, 40)]
        expected = plain(target, prompts)
        for canvas in (None, 1, 12):
            drafter = ModelDrafter(diffusion, most=6, canvas=canvas)
            found = plain(target, prompts, drafter=drafter, draft_size=6)
            assert torch.equal(found.sequences, expected.sequences), (name, canvas)
            assert int(found.drafted.sum()) > 0
        with pytest.raises(ValueError, match=r"drafter: .* has a vocabulary of .* and the model one of 61"):
            plain(drafter=diffusion)


@pytest.mark.parametrize("size", [400, 650])
def test_a_drafter_of_another_padding_drafts_what_both_models_have(size: int) -> None:
    """Qwen2.5's models have one tokenizer and vocabularies of two sizes. The text has ids of the model alone,
    in the prompt, among the suppressed and in the response."""
    target = model_of(vocab_size=512)
    prompts = [torch.tensor([5, 499, 6, 511]), torch.tensor([7])]
    settings: dict[str, Any] = {"gen_length": 12, "suppress": (3, 500), "eos_id": -1}
    expected = dx.speculate(target, prompts, **settings)
    assert max(int(response.max()) for response in expected.responses) >= 400
    diffusion = model_of("sdar", vocab_size=size, mask_token_id=size - 1, block_size=4)
    for drafter in (model_of("llama", vocab_size=size), diffusion):
        with torch.no_grad():  # most rows prefer the last id
            drafter.lm_head.weight[size - 2] = 40 * drafter.lm_head.weight[9]
        out = dx.speculate(target, prompts, drafter=drafter, draft_size=4, record=True, **settings)
        assert torch.equal(out.sequences, expected.sequences)
        assert out.passes is not None
        assert int(out.drafted.sum()) > 0
        assert max(token for passes in out.passes for one in passes for token in one.refused) < 512
        with dx.Engine(target, drafter=drafter, draft_size=4, lanes=2, max_length=32) as engine:
            handles = [engine.submit(ids.tolist(), **settings) for ids in prompts]
            for handle, response in zip(handles, expected.responses, strict=True):
                assert handle.result().tokens == response.tolist()


def test_a_draft_that_failed_is_made_again_from_the_whole_text() -> None:
    """A drafter that is the model itself is right wherever it has seen the text."""
    itself = ModelDrafter(model_of(), most=4)
    step, calls = itself.model.step, list[int]()

    def failing(*args: Any, **more: Any) -> Tensor:
        calls.append(len(args[0]))
        if len(calls) == 1:
            raise RuntimeError("no such luck")
        return step(*args, **more)

    itself.model.step = failing  # type: ignore[method-assign]
    batch = CausalBatch(MODEL, 1, 60, drafter=itself)
    own = make_settings(DecodeConfig(), MODEL, "none", 1)[0]
    with torch.inference_mode():
        batch.admit(0, PROMPTS[2], 24, own)
        batch.step()
        with pytest.raises(RuntimeError, match="no such luck"):
            batch.step()
        while batch.live:
            batch.step()
    assert calls[:2] == [21, 21]
    assert batch.counts.drafted == batch.counts.accepted


def test_nothing_to_do() -> None:
    assert dx.speculate(MODEL, []).sequences.shape == (0, 0)
    found = dx.speculate(MODEL, PROMPTS, gen_length=0, drafter="ngram")
    assert found.nfe.tolist() == [0] * 4
    assert [len(r) for r in found.responses] == [0] * 4


def test_in_16_bits_texts_are_nearly_the_same() -> None:
    """Rows are rounded otherwise beside others, so where two logits are near another token may win."""
    model = model_of(dtype=torch.bfloat16)
    expected = plain(model)
    found = plain(model, drafter=Knowing(list(expected.sequences)), draft_size=6)
    same = [torch.equal(a, b) for a, b in zip(found.responses, expected.responses, strict=True)]
    assert sum(same) >= 2


def test_prompt_lookup_takes_the_latest_occurrence_of_the_longest_end() -> None:
    """Where that overlaps the end, the text repeats itself. A lane begins anew with each sequence."""
    session, greedy = NGram(2).session(MODEL, MODEL.new_cache(1, 40), 1), SamplingGroup(0.0, 1.0, 0, None)

    def draft(*ids: int) -> tuple[int, ...]:
        session.reset(0)
        (found,) = session.propose([speculation.Lane(0, torch.tensor(ids), 40, greedy, (0, 0))], [5])
        return found.tokens

    assert draft(7, 7) == (7, 7, 7, 7, 7)
    assert draft(1, 2, 1, 2, 1) == (2, 1, 2, 1, 2)
    assert draft(1, 2, 3, 9, 2, 4, 1, 2) == (3, 9, 2, 4, 1)  # though 2 alone came later
    assert draft(2, 3, 2, 4, 2) == (4, 2, 4, 2, 4)
    assert draft(6, 2) == ()


def test_prompt_lookup_compares_no_more_than_the_text_has() -> None:
    """Whatever N is: it once counted down from N for each token, which here would take years."""
    out = plain(MODEL, drafter="ngram:999999999999999999", draft_size=3)
    expected = plain(MODEL, drafter=NGram(40), draft_size=3)
    assert torch.equal(out.sequences, expected.sequences)
    assert out.nfe.tolist() == expected.nfe.tolist()
