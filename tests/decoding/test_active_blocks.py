"""Several active blocks: against a plain loop, in batches, engines, graphs; and what is refused."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import golden
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext import models
from dparallel_ext.decoding.graphs import Graphs

pytest_plugins = ["taping"]

MASK = 511
PROMPTS = [torch.arange(3, 14), torch.arange(40, 47), torch.arange(1, 30)]
LENGTHS = [40, 24, 37]
SEVERAL = [(2, 0.1, 0.95), (3, 0.5, 0.5), (4, 0.0, 1.0), (5, 0.3, 0.0)]


@pytest.fixture(scope="module")
def llada() -> models.Model:
    return golden.model("llada_tiny_a", dtype=torch.float32)


def plain(
    model: Any, prompt: Tensor, length: int, size: int, tau: float, active: int, open_at: float, full: float
) -> tuple[Tensor, int]:
    """The loop of d3LLM and D2F, whole sequences, by confidence; tokens and passes."""
    x = torch.cat((prompt, torch.full((length,), MASK)))
    blocks = [(a, min(a + size, len(x))) for a in range(len(prompt), len(x), size)]

    def share(block: tuple[int, int]) -> float:
        own = x[block[0] : block[1]]
        return 1 - int((own == MASK).sum()) / len(own)

    front, opened, passes = 0, 1, 0
    while front < len(blocks):
        while opened < len(blocks) and opened - front < active and share(blocks[opened - 1]) >= open_at:
            opened += 1
        z = model(x[None]).logits[0].double().index_fill(1, torch.tensor([MASK]), -math.inf)
        p, token = model(x[None]).logits[0].double().softmax(1), z.argmax(1)
        p = p.gather(1, token[:, None])[:, 0]
        commit = torch.zeros(len(x), dtype=torch.bool)
        for index in range(front, opened):
            start, end = blocks[index]
            masked = x[start:end] == MASK
            chosen = masked & (p[start:end] >= tau)
            must = index == front or share(blocks[index - 1]) >= full
            if must and masked.any() and not chosen.any():
                chosen[p[start:end].masked_fill(~masked, -1).argmax()] = True
            commit[start:end] = chosen
        x = torch.where(commit, token, x)
        passes += 1
        while front < len(blocks) and share(blocks[front]) == 1:
            front += 1
        opened = max(opened, front + 1)
    return x, passes


@pytest.mark.parametrize(("active", "open_at", "full"), SEVERAL)
def test_the_plain_loop(llada: models.Model, active: int, open_at: float, full: float) -> None:
    fewer = 0
    for prompt, length in zip(PROMPTS, LENGTHS, strict=True):
        for tau in (0.03, 0.05, 0.9):
            settings: dict[str, Any] = {"gen_length": length, "block_length": 8, "selector": "confidence"}
            settings |= {"threshold": tau, "active_blocks": active, "open_at": open_at, "activate_at": full}
            expected, passes = plain(llada, prompt, length, 8, tau, active, open_at, full)
            out = dx.decode(llada, prompt, **settings)
            assert torch.equal(out.sequences[0], expected)
            assert int(out.nfe) == passes
            one = dx.decode(llada, prompt, **{**settings, "active_blocks": 1})
            fewer += int(one.nfe) - passes
    assert fewer > 0


WAYS: list[tuple[str, dict[str, Any]]] = [
    ("llada_tiny_a", {"cache": "none", "threshold": 2.0}),
    ("llada_tiny_a", {"cache": "prefix", "threshold": 0.04, "selector": "confidence"}),
    ("llada_tiny_a", {"cache": "dual", "rule": "credit+confidence:0.03"}),
    ("llada_tiny_a", {"cache": "dual", "threshold": 2.5, "refresh": 2, "temperature": 0.7}),
    ("dream_tiny_a", {"cache": "dual", "threshold": 2.0}),
    ("sdar_tiny_a", {"cache": "block", "threshold": 2.0}),
]


@pytest.mark.parametrize(("name", "way"), WAYS)
def test_a_sequence_is_what_it_is_alone_and_in_an_engine(name: str, way: dict[str, Any]) -> None:
    model = golden.model(name, dtype=torch.float32)
    several = {"block_length": 8, "active_blocks": 3, "open_at": 0.2, "activate_at": 0.7}
    engine_wide = {key: way[key] for key in ("cache", "refresh") if key in way} | several
    own = {key: value for key, value in way.items() if key not in engine_wide}
    seeds = torch.tensor([5, 6, 7])
    out = dx.decode(model, PROMPTS, gen_length=LENGTHS, seed=seeds, **several, **way)
    with dx.Engine(model, lanes=2, **engine_wide) as engine:
        handles = [
            engine.submit(prompt, gen_length=length, seed=int(seed), **own)
            for prompt, length, seed in zip(PROMPTS, LENGTHS, seeds, strict=True)
        ]
        for b, (prompt, length, handle) in enumerate(zip(PROMPTS, LENGTHS, handles, strict=True)):
            alone = dx.decode(model, prompt, gen_length=length, seed=seeds[b : b + 1], **several, **way)
            assert torch.equal(out.responses[b], alone.responses[0])
            assert int(out.nfe[b]) == int(alone.nfe)
            assert handle.result(30).tokens == alone.responses[0].tolist()[:length]
            assert not (out.responses[b] == MASK).any()


@pytest.mark.parametrize(("name", "way"), WAYS)
def test_one_block_is_what_it_was(name: str, way: dict[str, Any]) -> None:
    model = golden.model(name, dtype=torch.float32)
    settings = {"gen_length": LENGTHS, "block_length": 8, "seed": 3, "record": True, **way}
    before = dx.decode(model, PROMPTS, **settings)
    out = dx.decode(model, PROMPTS, active_blocks=1, open_at=0.0, activate_at=0.0, **settings)
    assert torch.equal(out.sequences, before.sequences)
    assert torch.equal(out.nfe, before.nfe)
    assert torch.equal(out.trajectory.step, before.trajectory.step)  # type: ignore[union-attr]


@pytest.mark.parametrize("at", [0, 3, 4, 6, 8, 11, 12])
def test_an_end_behind_the_front_block(at: int) -> None:
    """EOS in any open block ends the sequence in the pass after which no mask is in front of it."""

    def model(ids: Tensor) -> SimpleNamespace:
        """Sure of the response's tokens up to EOS; of one more with each pass."""
        logits = torch.zeros(*ids.shape, 10)
        sure = torch.arange(16) < max(at + 1, 1 + int((ids[0, 2:] != 9).sum()))
        logits[:, 2:, 5] = 9.0 * sure
        logits[:, 2 + at, 5:7] = torch.tensor([0.0, 9.0])
        return SimpleNamespace(logits=logits)

    settings: dict[str, Any] = {"gen_length": 16, "block_length": 4, "active_blocks": 3, "open_at": 0.0}
    settings |= {"mask_id": 9, "selector": "confidence", "threshold": 0.9, "record": True, "logprobs": True}
    out = dx.decode(model, [[1, 2]], eos_id=6, **settings)
    assert out.responses[0].tolist() == [5] * at + [6] * (16 - at)
    assert (int(out.kept), int(out.generated)) == (at, at + 1)
    assert int(out.nfe) == (1 if at < 12 else 2)  # the fourth block opens after the first pass
    check_records(out)


def check_records(out: dx.DecodeOutput) -> None:
    """The tokens that were decoded have records, and the padding behind an end has none."""
    assert out.trajectory is not None
    assert out.logprobs is not None
    recorded = out.trajectory.step > 0
    assert torch.equal(recorded.sum(1), out.generated)
    assert torch.equal(~out.trajectory.confidence.isnan(), recorded)
    assert torch.equal(~out.logprobs.isnan(), recorded)


BLOCKS_AT_ONCE: list[dict[str, Any]] = [
    {"active_blocks": 4, "open_at": 0.0, "activate_at": 0.0},
    {"rule": dx.rules.Prophet(0, width=1, bars=(0.0, 0.0, 0.0))},  # fills all masks in its first pass
]


@pytest.mark.parametrize("way", BLOCKS_AT_ONCE, ids=["active", "response"])
@pytest.mark.parametrize("end", ["eos_id", "stop"])
def test_tokens_behind_an_end_leave_no_record(llada: models.Model, way: dict[str, Any], end: str) -> None:
    """Passes have committed tokens of blocks behind the one that holds the end, and padding replaces them."""
    settings: dict[str, Any] = {"gen_length": 48, "block_length": 8, "threshold": 1.0, "record": True, **way}
    free = dx.decode(llada, PROMPTS[0], **settings)
    token = int(free.responses[0][4])
    ends = {"eos_id": token} if end == "eos_id" else {"stop": [[token]]}
    out = dx.decode(llada, PROMPTS[0], logprobs=True, **settings, **ends)
    behind = int(out.kept) // 8 * 8 + 8
    assert bool((free.trajectory.step[0, behind:] <= out.nfe).any())  # type: ignore[union-attr]
    check_records(out)


def test_a_stream_and_an_end(llada: models.Model) -> None:
    """Blocks are streamed in order, and nothing follows the block that EOS is found in."""

    class Streamer:
        def __init__(self) -> None:
            self.ids: list[int] = []

        def put(self, ids: Tensor) -> None:
            self.ids += ids.reshape(-1).tolist()

        def end(self) -> None:
            pass

    several: dict[str, Any] = {"gen_length": 48, "block_length": 8, "threshold": 2.0, "active_blocks": 4}
    streamer = Streamer()
    out = dx.decode(llada, PROMPTS[0], streamer=streamer, **several)
    assert streamer.ids == out.sequences[0].tolist()
    eos = int(out.responses[0][10])  # perhaps not its first place
    ended = dx.decode(llada, PROMPTS[0], eos_id=eos, **several)
    response = ended.responses[0].tolist()
    assert response.index(eos) == int(ended.kept)
    end = int(ended.kept) // 8 * 8 + 8
    assert response[end:] == [eos] * (48 - end)
    assert int(ended.nfe) <= int(out.nfe)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"active_blocks": 0}, "active_blocks: expected a whole number >= 1, got 0"),
        ({"open_at": 1.5}, "open_at: expected a number from 0 to 1, got 1.5"),
        ({"activate_at": -0.1}, "activate_at: expected a number from 0 to 1, got -0.1"),
        ({"threshold": None}, "active_blocks: several need a threshold or a rule"),
        ({"threshold": None, "steps": 40}, "active_blocks: several need a threshold or a rule"),
        ({"threshold": None, "rule": "credit+steps:40"}, "active_blocks: several need a threshold or a rule"),
        ({"threshold": None, "rule": "edit:0.9,0.9"}, "active_blocks: several need a threshold or a rule"),
        ({"threshold": None, "rule": "sched:7,2+entropy:1"}, "active_blocks: several need a threshold"),
        ({"sub_block_length": 4}, "active_blocks: .* filled as a whole, and these are filled 4 by 4"),
    ],
)
def test_what_does_not_go_together(llada: models.Model, change: dict[str, Any], message: str) -> None:
    settings = {"gen_length": 40, "block_length": 8, "threshold": 1.0, "active_blocks": 2, **change}
    with pytest.raises(ValueError, match=message):
        dx.decode(llada, PROMPTS[0], **settings)


def test_recorded_passes_compute_the_logits_of_open_blocks_alone(
    llada: models.Model, taped: list[Graphs], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many blocks may be open: by ones, twos and fours, as recordings have them."""
    rows, head = set(), models.Model.head

    def seen(self: models.Model, x: Tensor) -> Tensor:
        rows.add(len(x))
        return head(self, x)

    monkeypatch.setattr(models.Model, "head", seen)
    settings: dict[str, Any] = {"gen_length": 64, "block_length": 8, "threshold": 0.5, "cache": "dual"}
    settings |= {"open_at": 0.3, "activate_at": 0.6}
    out = dx.decode(llada, PROMPTS[0], active_blocks=8, **settings)
    assert {8, 16, 32} <= rows <= {8, 16, 32, 64}
    assert any(graphs.replays for graphs in taped)
    monkeypatch.undo()  # on the CPU the logits of masks alone are computed
    assert torch.equal(out.sequences, dx.decode(llada, PROMPTS[0], active_blocks=8, **settings).sequences)


def test_an_engine_opens_one_block_of_what_is_for_one(llada: models.Model) -> None:
    several = {"block_length": 8, "cache": "dual"}
    with dx.Engine(llada, active_blocks=3, **several) as engine:
        for way in ({}, {"rule": "edit:0.03,0.04,5"}, {"rule": "sched:0.3,0.05"}):
            found = engine.submit(PROMPTS[0], gen_length=40, **way).result(30)
            alone = dx.decode(llada, PROMPTS[0], gen_length=40, **several, **way)
            assert (found.tokens, found.nfe) == (alone.responses[0].tolist(), int(alone.nfe))


@pytest.mark.parametrize("rule", ["distance:0,0", "leading+entropy:0"])
def test_a_rule_moves_only_in_blocks_that_must(llada: models.Model, rule: str) -> None:
    """With nothing below the threshold a pass commits one token, in the front block."""
    settings = {"gen_length": 16, "block_length": 8, "rule": rule}
    settings |= {"active_blocks": 2, "open_at": 0.0, "activate_at": 1.0}
    assert int(dx.decode(llada, PROMPTS[0], **settings).nfe) == 16


@pytest.mark.parametrize("way", [{"selector": "quota", "threshold": 2}, {"rule": "credit+quota:1"}])
def test_a_quota_is_for_blocks_that_must_move(llada: models.Model, way: dict[str, Any]) -> None:
    settings = {"gen_length": LENGTHS, "block_length": 8, **way}
    one = dx.decode(llada, PROMPTS, **settings)
    out = dx.decode(llada, PROMPTS, active_blocks=3, open_at=0.0, activate_at=1.0, **settings)
    assert "rule" in way or torch.equal(out.sequences, one.sequences)  # credit has seen the blocks before
    assert torch.equal(out.nfe, one.nfe)
    sooner = dx.decode(llada, PROMPTS, active_blocks=3, open_at=0.0, activate_at=0.5, **settings)
    assert int(sooner.nfe.sum()) < int(one.nfe.sum())
