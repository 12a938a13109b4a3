"""Where responses of decode end: EOS and stop sequences."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
import torch
from conftest import golden
from test_decode import MASK, PROMPTS, Fixed

import dparallel_ext as dx
from dparallel_ext import models


@pytest.fixture(scope="module")
def llada() -> models.Model:
    return golden.model("llada_tiny_a")


@pytest.fixture(scope="module")
def dream() -> models.Model:
    return golden.model("dream_tiny_a")


@pytest.fixture(scope="module")
def sdar() -> models.Model:
    return golden.model("sdar_tiny_a")


@pytest.fixture(autouse=True)
def _there(device: str, llada, dream, sdar, monkeypatch) -> None:
    """Every test of this file runs on every device."""
    for model in (llada, dream, sdar):
        model.to(device)
    monkeypatch.setattr(f"{__name__}.PROMPTS", PROMPTS.to(device))


def test_eos_ends_a_sequence() -> None:
    logits = torch.full((14, 40), -9.0)
    logits[torch.arange(14), torch.arange(14) + 10] = 9.0  # position p says token p + 10
    logits[5, 1] = 20.0  # EOS at position 5, in the first block
    model = Fixed(logits)
    out = dx.decode(
        model, torch.tensor([3, 3]), gen_length=12, block_length=4, threshold=0.5, mask_id=0, eos_id=1
    )
    assert out.sequences.tolist() == [[3, 3, 12, 13, 14, 1, *[1] * 8]]
    assert (out.forwards, out.generated.tolist(), model.calls) == (1, [4], 1)
    assert (out.kept.tolist(), out.tokens_per_forward, out.padded_tokens_per_forward) == ([3], 3.0, 4.0)
    on = dx.decode(model, torch.tensor([3, 3]), gen_length=12, block_length=4, threshold=0.5, mask_id=0)
    assert on.sequences[0, 6:].tolist() == list(range(16, 24))  # as published: no early exit
    none = dx.decode(
        model, torch.tensor([3, 3]), gen_length=12, block_length=4, threshold=0.5, mask_id=0, eos_id=-1
    )
    assert torch.equal(none.sequences, on.sequences)


def test_eos_leaves_the_others_alone(llada) -> None:
    plain = dx.decode(llada, PROMPTS, gen_length=24, block_length=8, threshold=1.0)
    eos = int(plain.sequences[0, 6])  # in the first block of the first sequence
    out = dx.decode(llada, PROMPTS, gen_length=24, block_length=8, threshold=1.0, eos_id=eos)
    for b in range(3):
        alone = dx.decode(llada, PROMPTS[b], gen_length=24, block_length=8, threshold=1.0, eos_id=eos)
        assert torch.equal(alone.sequences[0], out.sequences[b])
        assert (int(alone.nfe), int(alone.generated)) == (int(out.nfe[b]), int(out.generated[b]))
    assert bool((out.sequences[0, 12:] == eos).all())


def test_stop_sequences_end_a_response_as_eos_does(llada) -> None:
    """Wherever they lie, across the end of a block too; what is behind that block is never computed."""
    settings = {"gen_length": 32, "block_length": 8}
    plain = dx.decode(llada, PROMPTS[0], **settings)
    response = plain.responses[0].tolist()
    for begin, size in ((0, 1), (3, 2), (6, 4), (15, 2), (14, 3)):
        stop = response[begin : begin + size]
        first = next(i for i in range(32) if response[i : i + size] == stop)
        out = dx.decode(llada, PROMPTS[0], stop=[[509, 509], stop], **settings)
        finished = -(-(first + size) // 8) * 8
        assert int(out.kept) == first
        assert int(out.generated) == int(out.nfe) == finished
        assert out.responses[0][:finished].tolist() == response[:finished]
        assert bool((out.responses[0][finished:] == MASK).all())
    assert int(plain.kept) == 32
    with pytest.raises(ValueError, match="stop: expected sequences of at least one token"):
        dx.decode(llada, PROMPTS[0], stop=[[]], **settings)


@pytest.mark.parametrize("threshold", [None, 0.0])
def test_the_end_that_is_complete_first_counts(llada, threshold: float | None) -> None:
    """As for a reader who goes token by token, in `decode` and an engine; EOS filling is no text."""
    settings: dict[str, Any] = {"gen_length": 16, "block_length": 8, "threshold": threshold, "cache": "none"}
    response = dx.decode(llada, PROMPTS[0], **settings).responses[0].tolist()
    at = next(i for i in range(2, 6) if response[i] not in response[:i] and response[i - 1] != response[i])
    before, end = response[at - 1 : at + 1]
    cases: list[tuple[dict[str, Any], int]] = [
        ({"eos_id": end, "stop": [[before, end, end]]}, at),  # the second is filling
        ({"eos_id": end, "stop": [response[at - 2 : at + 2]]}, at),
        ({"eos_id": end, "stop": [response[at - 1 : at + 1]]}, at - 1),  # they end together
        ({"stop": [response[at - 2 : at + 2], [end]]}, at),
    ]
    with dx.Engine(llada, block_length=8, cache="none", max_length=64) as engine:
        for ends, kept in cases:
            assert int(dx.decode(llada, PROMPTS[0], **settings, **ends).kept) == kept
            request = {**settings, **ends}
            assert engine.submit(PROMPTS[0], **request).result().tokens == response[:kept]


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("threshold", [None, 1.0, 3.0])
def test_eos_ends_a_sequence_once_what_is_in_front_is_final(
    llada, cache: str, threshold: float | None
) -> None:
    """The tokens in front of it, and its own, are those of a decode that goes on; passes are saved."""
    settings: dict = {"gen_length": 24, "block_length": 12, "cache": cache, "threshold": threshold}
    saved = 0
    for prompt in PROMPTS:
        on = dx.decode(llada, prompt, record=True, **settings)
        response = on.responses[0].tolist()
        for at in (3, 5, 15):
            eos = response[at]
            first = response.index(eos)
            out = dx.decode(llada, prompt, eos_id=eos, record=True, **settings)
            assert out.responses[0][: first + 1].tolist() == response[: first + 1]
            assert int(out.kept) == first
            # The last pass is the one that commits the last of them.
            step = on.trajectory.step[0]
            assert int(out.nfe) == int(step[: first + 1].max())
            late = out.trajectory.step[0] == 0
            assert bool((out.responses[0][late] == eos).all())
            assert int(out.generated) == 24 - int(late.sum())
            saved += int(on.nfe) - int(out.nfe)
    assert saved > 0


WAYS = [("llada", "none"), ("llada", "prefix"), ("llada", "dual"), ("dream", "dual"), ("sdar", "block")]


@pytest.mark.parametrize(("name", "cache"), WAYS)
@pytest.mark.parametrize("way", [{}, {"threshold": 1.0}, {"threshold": 1.0, "active_blocks": 2}], ids=str)
def test_any_of_several_end_tokens_ends_a_sequence(
    request: pytest.FixtureRequest, name: str, cache: str, way: dict[str, Any]
) -> None:
    """As the one alone that is first, in its passes; behind it is the first of them, whichever that was."""
    model = request.getfixturevalue(name)
    settings: dict = {"gen_length": 24, "block_length": 8, "cache": cache, "record": True, **way}
    ended = set()
    for prompt in PROMPTS[:2]:
        response = dx.decode(model, prompt, **settings).responses[0].tolist()
        absent = next(token for token in range(500) if token not in response)
        by_one = functools.cache(lambda eos, prompt=prompt: dx.decode(model, prompt, eos_id=eos, **settings))
        for ids in (response[5:7], response[9:6:-1], [absent, response[10]], [response[3], absent]):
            alone = [by_one(eos) for eos in ids]
            first = min(range(len(ids)), key=lambda i: int(alone[i].kept))
            out = dx.decode(model, prompt, eos_id=ids, **settings)
            assert out.trajectory is not None
            counts = ("kept", "nfe", "generated", "nfe_published")
            assert [int(getattr(out, field)) for field in counts] == [
                int(getattr(alone[first], field)) for field in counts
            ]
            late = out.trajectory.step[0] == 0
            tokens = alone[first].responses[0].masked_fill(late, ids[0])
            assert out.responses[0].tolist() == tokens.tolist()
            ended.add(first)
    assert len(ended) > 1


@pytest.mark.parametrize(("name", "cache"), WAYS)
def test_sequences_that_end_by_other_tokens_share_passes(
    request: pytest.FixtureRequest, name: str, cache: str
) -> None:
    """Each end token is sought in the sequences that end by it, and in no others."""
    model = request.getfixturevalue(name)
    settings: dict = {"gen_length": 24, "block_length": 8, "cache": cache, "threshold": 1.0}
    plain = [dx.decode(model, prompt, **settings).responses[0].tolist() for prompt in PROMPTS]
    asked: list[Any] = [plain[0][4:7], plain[0][6], plain[1][10:12], None, -1, [], plain[2][12:2:-4]]
    alone = [[dx.decode(model, prompt, eos_id=eos, **settings) for eos in asked] for prompt in PROMPTS]
    assert len({int(out.nfe) for outs in alone for out in outs}) > 2
    fixed = {"cache": cache, "block_length": 8, "max_length": 48, "lanes": 7}
    with dx.Engine(model, threshold=1.0, gen_length=24, **fixed) as engine:
        handles = [[engine.submit(prompt, eos_id=eos) for eos in asked] for prompt in PROMPTS]
        for outs, each in zip(alone, handles, strict=True):
            for out, handle in zip(outs, each, strict=True):
                done, kept = handle.result(60), min(24, int(out.kept))
                assert done.tokens == out.responses[0][:kept].tolist()
                assert (done.nfe, done.finish_reason == "stop") == (int(out.nfe), int(out.kept) < 24)


@pytest.mark.parametrize("ids", [5, [5], (5, 7), torch.tensor([5, 7]), torch.tensor(5)], ids=str)
def test_end_tokens_of_a_config(ids: Any) -> None:
    config = dx.DecodeConfig(eos_id=ids)
    assert config.eos_ids == (5, 7)[: len(config.eos_ids)]
    assert len(config.eos_ids) == (2 if len(torch.as_tensor(ids).shape) and len(ids) > 1 else 1)
    assert dx.DecodeConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    for none in (None, -1, [], ()):
        assert dx.DecodeConfig(eos_id=none).eos_ids == ()
