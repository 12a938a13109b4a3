"""Adaptive parallel decoding (APD, arXiv 2506.00413): a diffusion model's drafts, judged by a mixture."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import EMULATED, golden
from dparallel import registry
from drafters import fast_dllm, model_of
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext import reference
from dparallel_ext.models import Model

MASK, SHARED = 511, 500
FAMILIES = ("llada_tiny_a", "dream_tiny_a", "sdar_tiny_a", "fast_dllm")
torch.manual_seed(0)
MODELS = {name: fast_dllm() if name == "fast_dllm" else golden.model(name) for name in FAMILIES}
LLADA = MODELS["llada_tiny_a"]
VERIFIER = model_of(vocab_size=SHARED)
"""It lacks the mask, and some ids more."""
PROMPTS = [torch.randint(0, SHARED, (n,), generator=torch.Generator().manual_seed(n)) for n in (3, 1, 20, 9)]
CASES = 3 if EMULATED else 6


@pytest.fixture(autouse=True)
def _there(device: str) -> None:
    """Every test of this file runs on every device."""
    for model in (*MODELS.values(), VERIFIER):
        model.to(device)


def adaptive(
    model: Model = LLADA, prompts: list[Tensor] = PROMPTS, verifier: Any = VERIFIER, **settings: Any
) -> dx.AdaptiveOutput:
    return dx.adaptive_decode(
        model, prompts, verifier=verifier, **{"gen_length": 24, "eos_id": -1, "mixture": 0.8, **settings}
    )


def plain(
    model: Model,
    verifier: Model,
    prompt: Tensor,
    gen_length: int,
    mixture: float,
    lookahead: int,
    *,
    temperature: float = 0.0,
    key: tuple[int, int] = (0, 0),
    suppress: tuple[int, ...] = (),
    eos: int = -1,
) -> tuple[list[int], int, int]:
    """The algorithm for one sequence in torch, everything computed anew: the text, passes, the verifier's."""
    text, length, passes, verified = prompt.tolist(), len(prompt) + gen_length, 0, 0
    shared = min(model.shape.embedding_size, verifier.shape.embedding_size)
    never = [id for id in (MASK, *suppress) if id < shared]

    def logits_of(one: Model, ids: list[int]) -> Tensor:
        return one(torch.tensor([ids], device=one.device)).logits[0, :, :shared].double().cpu()

    def choice(logits: Tensor, first: int) -> list[int]:
        logits[:, never] = -math.inf
        if temperature > 0:
            places = torch.arange(first, first + len(logits)).cpu()
            seed, sequence = (torch.full_like(places, number) for number in key)
            noise = reference.gumbel(seed, sequence, places, torch.zeros_like(places), shared)
            logits = logits / temperature + noise
        found: list[int] = logits.argmax(-1).tolist()
        return found

    while len(text) < length and (eos < 0 or eos not in text[len(prompt) :]):
        known, end = len(text), min(len(text) + lookahead, length)
        back = int(model.shift)
        drafts = logits_of(model, text + [MASK] * (end - known))[known - back : end - back]
        draft = choice(drafts.clone(), known)
        taken = 1
        if len(draft) > 1:
            judge = logits_of(verifier, text + draft)[known - 1 : end - 1]
            chosen = choice(mixture * drafts + (1 - mixture) * judge, known)
            while taken < len(draft) and draft[taken] == chosen[taken]:
                taken += 1
        passes, verified = passes + 1, verified + (len(draft) > 1)
        text += draft[:taken]
    if eos >= 0 and eos in text[len(prompt) :]:
        text = text[: len(prompt) + text[len(prompt) :].index(eos) + 1]
    return text, passes, verified


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_the_plain_form_of_the_algorithm(name: str, temperature: float) -> None:
    """Random cases, several sequences each at its own pace; a window of everything is no window."""
    model, saved = MODELS[name], 0
    for case in range(CASES):
        g = torch.Generator().manual_seed(100 * FAMILIES.index(name) + case)

        def draw(low: int, high: int, g: torch.Generator = g) -> int:
            return int(torch.randint(low, high, (), generator=g))

        prompts = [torch.randint(0, SHARED, (draw(1, 20),), generator=g) for _ in range(draw(1, 4))]
        lengths = [draw(0, 30) for _ in prompts]
        mixture = [0.0, 0.3, 0.7, 0.9, 0.95, 1.0][draw(0, 6)]
        lookahead, seed, suppress = [1, 2, 7, 64][draw(0, 4)], draw(0, 99), (7, 9, 505)
        common: dict[str, Any] = {"temperature": temperature, "suppress": suppress}
        out = adaptive(
            model,
            prompts,
            gen_length=lengths,
            mixture=mixture,
            lookahead=lookahead,
            window=[None, 64][draw(0, 2)],
            seed=seed,
            **common,
        )
        for b, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            text, passes, verified = plain(
                model, VERIFIER, prompt, length, mixture, lookahead, key=(seed, b), **common
            )
            assert out.sequences[b, : len(text)].tolist() == text, (case, b)
            assert (int(out.nfe[b]), int(out.verifier_nfe[b])) == (passes, verified), (case, b)
            assert int(out.generated[b]) == length
            saved += length - passes
        assert out.forwards == max(out.nfe.tolist())
        assert out.verifier_forwards <= out.forwards
    assert saved > CASES


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_at_a_mixture_of_1_all_that_is_drafted_is_committed(temperature: float) -> None:
    """At temperature 1 since the draft and its judge share their noise."""
    settings: dict[str, Any] = {"temperature": temperature, "seed": 3, "mixture": 1.0}
    out = adaptive(lookahead=5, **settings)
    assert out.nfe.tolist() == [5] * 4
    assert out.accepted.tolist() == out.drafted.tolist() == [20, 20, 20, 16]
    again, other = adaptive(lookahead=5, **settings), adaptive(lookahead=5, **{**settings, "seed": 4})
    assert torch.equal(again.sequences, out.sequences)
    assert torch.equal(other.sequences, out.sequences) == (temperature == 0)
    assert adaptive(**settings).nfe.tolist() == [1] * 4


def test_at_a_mixture_of_0_the_verifier_judges_alone() -> None:
    """What is committed beyond the first token of a pass is what it would have written."""
    few, more = range(2, SHARED), 0  # of two ids both often choose the same
    out = adaptive(mixture=0.0, record=True, lookahead=6, suppress=few)
    assert out.trajectory is not None
    assert out.passes is not None
    for b, prompt in enumerate(PROMPTS):
        text, steps = out.sequences[b, : len(prompt) + 24], out.trajectory.step[b].tolist()
        best = VERIFIER(text[None].to(VERIFIER.device)).logits[0, :, :2].argmax(-1).tolist()
        for at in range(1, 24):
            if steps[at] == steps[at - 1]:
                more += 1
                assert int(text[len(prompt) + at]) == best[len(prompt) + at - 1]
        brought = [steps.count(number) for number in range(1, int(out.nfe[b]) + 1)]
        assert brought == [one.accepted + 1 for one in out.passes[b]]
        assert all(one.drafted == one.accepted + len(one.refused) for one in out.passes[b])
    assert more == int(out.accepted.sum()) > 10


def test_the_first_token_is_committed_unverified() -> None:
    """With a verifier that agrees to nothing: a token a pass, the diffusion model's own choice."""
    verifier = model_of(vocab_size=SHARED).to(LLADA.device)
    with torch.no_grad():
        verifier.lm_head.weight.zero_()  # so that it wants token 0
    out = adaptive(verifier=verifier, mixture=0.0)
    text = PROMPTS[0].tolist()
    for left in range(24, 0, -1):
        logits = LLADA(torch.tensor([text + [MASK] * left])).logits[0, len(text), :SHARED]
        text.append(int(logits.argmax()))
    assert 0 not in text
    assert out.sequences[0, : len(text)].tolist() == text
    assert out.nfe.tolist() == [24] * 4
    assert out.verifier_nfe.tolist() == [23] * 4  # there is nothing to verify in the last pass
    assert out.accepted.tolist() == [0] * 23
    one = adaptive(lookahead=1)
    assert one.nfe.tolist() == [24] * 4
    assert (one.verifier_forwards, one.verifier_nfe.tolist()) == (0, [0] * 4)
    assert one.drafted.tolist() == []


@pytest.mark.parametrize("name", FAMILIES)
def test_a_pass_computes_the_window_and_the_masks_ahead(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions from N - W - (accepted last) + 1 on, to N + M, and nothing else after the first pass."""
    model, prompt, passes = MODELS[name], PROMPTS[2], list[tuple[int, int]]()
    step = model.step

    def spy(input_ids: Tensor, kv_cache: Any, metadata: Any, **more: Any) -> Tensor:
        positions = metadata.positions[metadata.slot_mapping >= 0].tolist()  # a GPU has padding behind them
        assert positions == list(range(positions[0], positions[-1] + 1))
        passes.append((positions[0], positions[-1] + 1))
        return step(input_ids, kv_cache, metadata, **more)

    monkeypatch.setattr(model, "step", spy)
    for window, lookahead in ((1, 4), (3, 100), (7, 6)):
        passes.clear()
        out = adaptive(model, [prompt], window=window, lookahead=lookahead, mixture=0.9, record=True)
        assert out.passes is not None
        known, taken = len(prompt), 0
        for number, (start, end) in enumerate(passes):
            assert end == min(known + lookahead, len(prompt) + 24)
            assert start == (max(0, known - window - taken + 1) if number else 0)
            taken = out.passes[0][number].accepted + 1
            known += taken
        assert known == len(prompt) + 24


def test_the_verifier_reads_no_sequence_without_a_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of sequences with one token left nothing is verified, and their prompts are not computed."""
    lanes, step = set[int](), VERIFIER.step

    def spy(input_ids: Tensor, kv_cache: Any, metadata: Any) -> Tensor:
        lanes.update(metadata.rows[metadata.slot_mapping >= 0].tolist())
        return step(input_ids, kv_cache, metadata)

    monkeypatch.setattr(VERIFIER, "step", spy)
    adaptive(gen_length=[1, 9, 1, 9], mixture=1.0, graphs=False)
    assert lanes == {1, 3}


def test_a_window_of_a_block_is_exact_for_a_block_causal_model() -> None:
    """And a short one of a model that sees both ways is not: what it keeps has grown stale."""
    model = MODELS["sdar_tiny_a"]
    assert model.block_length is not None
    for mixture in (0.8, 0.95):
        exact = adaptive(model, mixture=mixture, lookahead=10)
        for window in (model.block_length, 30):
            found = adaptive(model, mixture=mixture, lookahead=10, window=window)
            assert torch.equal(found.sequences, exact.sequences)
            assert torch.equal(found.nfe, exact.nfe)
    stale = adaptive(window=1, gen_length=40)
    assert not torch.equal(stale.sequences, adaptive(gen_length=40).sequences)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_sequence_comes_out_as_alone(temperature: float) -> None:
    settings: dict[str, Any] = {"temperature": temperature, "window": 2, "lookahead": 9, "mixture": 0.9}
    seeds = [5, 6, 7, 8]
    together = adaptive(seed=seeds, **settings)
    apart = adaptive(seed=seeds, batch_invariant=True, **settings)
    assert torch.equal(together.sequences, apart.sequences)
    assert apart.forwards == int(apart.nfe.sum()) > together.forwards == int(together.nfe.max())
    for b, prompt in enumerate(PROMPTS):
        alone = adaptive(prompts=[prompt], seed=seeds[b : b + 1], **settings)
        assert torch.equal(alone.sequences[0], together.sequences[b, : len(prompt) + 24])
        assert [int(alone.nfe), int(alone.verifier_nfe)] == [
            int(together.nfe[b]),
            int(together.verifier_nfe[b]),
        ]


def test_an_end_cuts_what_a_pass_has_accepted() -> None:
    """EOS or a stop sequence, wherever it lies in it: the text up to it is that of a decode that goes on."""
    whole = adaptive(mixture=1.0, lookahead=8)
    for b, prompt in enumerate(PROMPTS):
        text = whole.sequences[b, len(prompt) : len(prompt) + 24].tolist()
        for at in (0, 7, 9, 17):
            eos, kept = text[at], text.index(text[at])
            out = adaptive(prompts=[prompt], mixture=1.0, lookahead=8, eos_id=eos, record=True)
            assert out.passes is not None
            assert sum(one.accepted + 1 for one in out.passes[0]) == int(out.generated)
            assert all(one.drafted == one.accepted + len(one.refused) for one in out.passes[0])
            assert int(out.accepted.sum()) + int(out.nfe) == int(out.generated)
            assert out.sequences[0].tolist() == [*prompt.tolist(), *text[:kept], *[eos] * (24 - kept)]
            assert (int(out.kept), int(out.generated)) == (kept, kept + 1)
            assert int(out.nfe) == kept // 8 + 1
            stop = text[at : at + 2]
            kept = next(i for i in range(23) if text[i : i + 2] == stop)
            out = adaptive(prompts=[prompt], mixture=1.0, lookahead=8, stop=[stop])
            assert (int(out.kept), int(out.generated)) == (kept, kept + 2)
            assert int(out.nfe) == (kept + 1) // 8 + 1
    text, passes, _ = plain(LLADA, VERIFIER, PROMPTS[0], 24, 0.9, 24, eos=text[9])
    out = adaptive(prompts=PROMPTS[:1], mixture=0.9, eos_id=int(whole.sequences[-1, 9 + len(PROMPTS[-1])]))
    assert out.sequences[0, : len(text)].tolist() == text
    assert int(out.nfe) == passes
    own = golden.model("llada_tiny_a").to(LLADA.device)
    own.eos_ids = (int(whole.sequences[0, len(PROMPTS[0]) + 4]),)
    assert int(adaptive(own, PROMPTS[:1], mixture=1.0, eos_id=None).kept) <= 4


def test_both_may_have_the_mask_or_ids_that_the_other_lacks() -> None:
    """Neither the mask nor an id of one model alone is ever decoded."""
    wide = model_of(vocab_size=600).to(LLADA.device)
    for verifier in (wide, model_of(vocab_size=512).to(LLADA.device)):
        out = adaptive(verifier=verifier, mixture=0.9)
        text, passes, _ = plain(LLADA, verifier, PROMPTS[2], 24, 0.9, 24)
        assert out.sequences[2, : len(text)].tolist() == text
        assert int(out.nfe[2]) == passes
        assert int(torch.cat(out.responses).max()) < MASK


def test_a_verifier_by_its_name_or_path(tmp_path: Path) -> None:
    """It comes onto the model's device, in the model's dtype."""
    dx.models.save(VERIFIER, tmp_path)
    expected = adaptive()
    for path in (tmp_path, str(tmp_path)):
        assert torch.equal(adaptive(verifier=path).sequences, expected.sequences)
    dx.models.save(VERIFIER, tmp_path, dtype=torch.bfloat16)
    found = dx.speculation.adaptive.verifier_of(tmp_path, LLADA)
    assert (found.device, found.dtype) == (LLADA.device, LLADA.dtype)
    named = registry.load(registry.VERIFIER)[0].to(LLADA.device, LLADA.dtype)
    by_name = adaptive(verifier=registry.VERIFIER, prompts=[PROMPTS[0] % 9])
    assert torch.equal(by_name.sequences, adaptive(verifier=named, prompts=[PROMPTS[0] % 9]).sequences)


def test_a_bad_row_is_named_where_it_is_come_to() -> None:
    broken = golden.model("llada_tiny_a").to(LLADA.device)
    with torch.no_grad():
        broken.lm_head.weight[4] = math.nan
    with pytest.raises(ValueError, match=f"sequence 0 at position {len(PROMPTS[0])} holds NaN"):
        adaptive(broken)
    verifier = model_of(vocab_size=SHARED).to(LLADA.device)
    with torch.no_grad():
        verifier.lm_head.weight[4] = math.nan
    with pytest.raises(ValueError, match=f"sequence 0 at position {len(PROMPTS[0]) + 1} holds NaN"):
        adaptive(verifier=verifier)
    assert adaptive(verifier=verifier, lookahead=1).forwards == 24  # nothing to verify


def test_a_streamer_gets_the_tokens_as_they_are_committed() -> None:
    class Streamer:
        def __init__(self) -> None:
            self.got: list[list[int]] = []

        def put(self, value: Tensor) -> None:
            self.got.append(value.flatten().tolist())

        def end(self) -> None:
            self.got.append([])

    streamer = Streamer()
    out = adaptive(prompts=PROMPTS[:1], streamer=streamer, mixture=0.95, progress=False)
    assert streamer.got[0] == PROMPTS[0].tolist()
    assert list(itertools.chain(*streamer.got)) == out.sequences[0].tolist()
    assert len(streamer.got) == int(out.nfe) + 2


def test_nothing_asked_for_is_nothing() -> None:
    assert adaptive(prompts=[]).sequences.shape == (0, 0)
    out = adaptive(gen_length=0)
    assert out.forwards == out.verifier_forwards == 0
    assert out.lengths.tolist() == [len(prompt) for prompt in PROMPTS]


def test_positions_that_the_verifier_is_not_made_for_are_warned_of() -> None:
    verifier = model_of(vocab_size=SHARED, max_position_embeddings=16).to(LLADA.device)
    with pytest.warns(UserWarning, match="gen_length: 27 positions .* config says 16"):
        adaptive(prompts=PROMPTS[:1], verifier=verifier)


def test_in_16_bits_it_decodes() -> None:
    models = [golden.model("dream_tiny_a").bfloat16(), model_of(vocab_size=SHARED, dtype=torch.bfloat16)]
    model, verifier = (one.to(LLADA.device) for one in models)
    out = adaptive(model, verifier=verifier, mixture=0.9, window=4)
    assert out.generated.tolist() == [24] * 4


def test_numbers_may_be_of_torch() -> None:
    plain: dict[str, Any] = {"mixture": 0.5, "window": 3, "lookahead": 6}
    out = adaptive(**{name: torch.tensor(value) for name, value in plain.items()})
    assert torch.equal(out.sequences, adaptive(**plain).sequences)
    with dx.Engine(LLADA, verifier=VERIFIER, window=torch.tensor(3), lanes=1, max_length=64) as engine:
        assert engine.submit(PROMPTS[0], gen_length=8).result(60).tokens


def test_what_does_not_fit_is_named() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"mixture": 1.1}, "mixture: expected a number from 0 to 1, got 1.1"),
        ({"mixture": -0.1}, "mixture: expected a number from 0 to 1, got -0.1"),
        ({"mixture": math.nan}, "mixture: expected a number from 0 to 1, got nan"),
        ({"window": 0}, "window: expected a whole number >= 1, got 0"),
        ({"lookahead": 0}, "lookahead: expected a whole number >= 1, got 0"),
        ({"lookahead": 2.5}, "lookahead: expected a whole number >= 1, got 2.5"),
        ({"threshold": 0.5}, "threshold: with a verifier decoding goes left to right"),
        ({"block_length": 8}, "block_length: with a verifier decoding goes left to right"),
        ({"config": dx.DecodeConfig(block_length=8)}, "block_length: with a verifier decoding goes left to"),
        ({"cache": "dual"}, "cache: with a verifier decoding goes left to right.* got 'dual'"),
        ({"infill": True}, "infill: with a verifier"),
        ({"logprobs": True}, "logprobs: with a verifier"),
        ({"eos_id": 512}, "eos_id: expected one of the model's 512 token ids, got 512"),
        ({"eos_id": 511}, "eos_id: expected a token that can be decoded, got the mask token 511"),
        ({"eos_id": 505}, "verifier: it has 500 token ids, and the end token is 505"),
        ({"mask_id": 512}, "mask_id: expected one of the model's 512 token ids, got 512"),
        ({"suppress": [512]}, r"suppress: expected token ids in \[0, 512\), got 512"),
        ({"gen_length": [1, 2]}, "gen_length: expected a number or one for each of 4"),
        ({"streamer": object()}, "streamer: expected an object with the methods put and end, got <object"),
        ({"streamer": SimpleNamespace(put=print, end=print)}, "streamer: expected a batch of 1, got 4"),
        ({"rule": "unheard_of"}, "rule: with a verifier decoding goes left to right"),
        ({"verifier": LLADA}, "verifier: expected an autoregressive model of .*, got LLaDA"),
        ({"verifier": "nowhere"}, "verifier: no directory nowhere"),
        ({"verifier": "builtin:dflash"}, "verifier: expected a .* directory, got the file .*dflash"),
        ({"verifier": 3}, "verifier: expected an autoregressive model's path, or one of .*, got int"),
        ({"verifier": None}, "verifier: expected an autoregressive model's path, or one of .*, got NoneType"),
        ({"prompts": [torch.tensor([505])]}, "verifier: it has 500 token ids, and the prompt holds 505"),
        ({"prompts": [torch.tensor([512])]}, r"prompt: expected token ids in \[0, 512\), got 512"),
        ({"prompts": [PROMPTS[0][:0]]}, "prompt: expected at least one token, got none in sequence 0"),
        ({"model": VERIFIER}, "model: Qwen3 is autoregressive"),
        ({"model": lambda ids: ids}, "model: expected a masked diffusion model of dparallel_ext.models"),
    ]
    for settings, message in cases:
        with pytest.raises(ValueError, match=message):
            adaptive(**settings)
    with pytest.raises(TypeError, match="unexpected keyword argument 'gen_lenght'"):
        adaptive(gen_lenght=3)
