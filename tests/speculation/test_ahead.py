"""What the host does beside the passes of an autoregressive model, and passes that it issues ahead."""

from __future__ import annotations

import random
from typing import Any

import drafters
import pytest
import torch
from forms import a_form
from tape import PROMPTS, recordings
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext import speculation
from dparallel_ext.decoding import padding
from dparallel_ext.decoding.graphs import Graphs
from dparallel_ext.decoding.settings import make_settings
from dparallel_ext.speculation import runner

pytest_plugins = ["taping"]


def causal(prompts: list[Tensor], **settings: Any) -> tuple[speculation.CausalBatch, Any]:
    """A batch that runs ahead, and what admits a prompt into a lane."""
    model = drafters.MODEL
    batch = speculation.CausalBatch(model, len(prompts), 64, ahead=1, **settings)
    own = make_settings(dx.DecodeConfig(), model, "none", 1)[0]
    return batch, lambda lane: batch.admit(lane, prompts[lane], 24, own)


@pytest.mark.parametrize("lanes", [1, 3])
def test_the_host_issues_a_pass_before_it_looks_at_the_one_before(
    taped: list[Graphs], monkeypatch: pytest.MonkeyPatch, lanes: int
) -> None:
    """And it looks once a pass."""
    said: list[tuple[str, int]] = []
    results: list[Tensor] = []
    run, tolist = runner.run_pass, Tensor.tolist

    def runs(*args: Any, **settings: Any) -> Tensor:
        said.append(("run", len(results)))
        results.append(run(*args, **settings))
        return results[-1]

    def looks(self: Tensor) -> Any:
        said.extend(("look", at) for at, result in enumerate(results) if result is self)
        return tolist(self)

    monkeypatch.setattr(runner, "run_pass", runs)
    monkeypatch.setattr(Tensor, "tolist", looks)
    dx.speculate(drafters.MODEL, PROMPTS[:lanes], gen_length=6, eos_id=-1)
    passes = [each for at in range(1, 6) for each in (("run", at), ("look", at - 1))]
    assert said == [("run", 0), *passes, ("look", 5)]


@pytest.mark.parametrize("drafter", [None, "ngram"])
def test_the_host_reads_few_numbers_of_tensors(
    taped: list[Graphs], monkeypatch: pytest.MonkeyPatch, drafter: Any
) -> None:
    """Of a device each is a way there and back. Of a pass it is the result; on the CPU one is the table of
    pages, and a drafter reads the text."""
    reads: list[str] = []

    def counted(name: str) -> Any:
        real = getattr(Tensor, name)

        def reading(self: Tensor) -> Any:
            reads.append(name)
            return real(self)

        return reading

    for name in ("tolist", "item", "__int__", "__index__", "__bool__", "__float__"):
        monkeypatch.setattr(Tensor, name, counted(name))
    model = drafters.MODEL
    batch = speculation.CausalBatch(model, 1, 64, drafter=speculation.drafter_of(drafter))
    own = make_settings(dx.DecodeConfig(stop=[[60, 60]]), model, "none", 1)[0]
    with torch.inference_mode():
        batch.admit(0, torch.arange(3, 14).repeat(2), 24, own)
        for _ in range(8):
            before, replays, known = len(reads), taped[0].replays, recordings(taped[0])
            batch.step()
            if taped[0].replays > replays and recordings(taped[0]) == known:
                assert len(reads) - before <= (2 if drafter is None else 3), reads[before:]
    assert taped[0].replays > 2 + recordings(taped[0])


def test_what_runs_ahead_is_what_waits(taped: list[Graphs], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends in the midst, other lengths, samples: the tokens, and the passes that are counted."""
    rng = random.Random(1)
    for _ in range(25):
        prompts = [torch.randint(10, 61, (rng.choice([1, 2, 7, 33]),)) for _ in range(rng.randint(1, 4))]
        settings: dict[str, Any] = {
            "gen_length": [rng.randint(0, 20) for _ in prompts],
            "temperature": rng.choice([0.0, 0.9]),
            "seed": rng.randrange(10**6),
            "eos_id": rng.choice([-1, None, rng.randrange(61)]),
            "stop": rng.choice([(), [[rng.randrange(61)]], [[rng.randrange(61), rng.randrange(61)], [4]]]),
            "automaton": rng.choice([None, None, a_form(rng.randrange(99), 61, ends=(5, 9))]),
            "record": rng.random() < 0.5,
            "graphs": rng.random() < 0.8,
        }
        found = dx.speculate(drafters.MODEL, prompts, **settings)
        with monkeypatch.context() as patch:
            patch.setattr(padding, "runs_ahead", lambda device: False)
            expected = dx.speculate(drafters.MODEL, prompts, **settings)
        for name, value in vars(expected).items():
            if isinstance(value, Tensor):
                torch.testing.assert_close(getattr(found, name), value, rtol=0, atol=0)
        assert (found.forwards, found.passes) == (expected.forwards, expected.passes)
        if settings["record"]:
            assert found.trajectory is not None
            assert expected.trajectory is not None
            assert torch.equal(found.trajectory.step, expected.trajectory.step)
            torch.testing.assert_close(
                found.trajectory.logprob, expected.trajectory.logprob, equal_nan=True, rtol=0, atol=1e-5
            )


def test_passes_that_were_issued_are_for_the_sequences_that_they_were_of(
    taped: list[Graphs], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences come and go, take turns, and a pass fails as it is issued or as its result is read, while
    another is on its way."""
    alone = [
        dx.speculate(drafters.MODEL, prompt, gen_length=24, eos_id=-1).sequences[0] for prompt in PROMPTS
    ]
    batch, admit = causal(PROMPTS)

    def failing(call: Any, passes: int) -> Any:
        """`call`, which raises once, after so many passes."""
        fails = iter([*[False] * passes, True, *[False] * 99])

        def called(*args: Any, **settings: Any) -> Any:
            if next(fails):
                raise RuntimeError("no such luck")
            return call(*args, **settings)

        return called

    monkeypatch.setattr(runner, "run_pass", failing(runner.run_pass, 15))
    monkeypatch.setattr(runner.Issued, "read", failing(runner.Issued.read, 12))
    with torch.inference_mode():
        admit(0)
        assert batch.step() == [0]
        admit(1)
        for _ in range(2):
            assert batch.step() == [0, 1]
        assert batch.step([1]) == [1]
        assert batch.step() == [0, 1]  # what was issued is for one of them
        batch.release(1)
        assert batch.step() == [0]
        admit(1)
        for _ in range(2):  # its first two tokens are the same
            assert batch.step() == [0, 1]
        batch.release(1)
        admit(1)
        assert batch.step() == [0, 1]  # what was issued is for the lane's last sequence
        admit(2)
        failed = 0
        while batch.live:
            was = [(row.known, row.nfe) for row in batch.sequences]
            try:
                batch.step()
            except RuntimeError:
                failed += 1
                assert was == [(row.known, row.nfe) for row in batch.sequences]
        assert failed == 2
    for b, text in enumerate(alone):
        length = batch.sequences[b].known
        assert torch.equal(batch.tokens[b, :length], text[:length])
        assert batch.sequences[b].nfe == batch.sequences[b].decoded


def test_a_bad_row_behind_an_end_does_not_matter(taped: list[Graphs]) -> None:
    """The pass that was issued before the end was seen is not looked at; in front of it the row is named."""
    model = drafters.model_of()
    text = dx.speculate(model, PROMPTS[0], gen_length=24, eos_id=-1).responses[0].tolist()
    at = next(at for at in range(4, 24) if text[at] not in [*PROMPTS[0].tolist(), *text[:at]])
    with torch.no_grad():
        model.embed.weight[text[at]] = torch.nan
    out = dx.speculate(model, PROMPTS[:1] * 2, gen_length=[24, at], eos_id=text[at])
    assert out.kept.tolist() == [at, at]
    with pytest.raises(ValueError, match=f"sequence 0 at position {len(PROMPTS[0]) + at + 1} holds NaN"):
        dx.speculate(model, PROMPTS[0], gen_length=24, eos_id=-1)
