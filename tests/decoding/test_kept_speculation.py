"""What calls of speculate keep for the next ones, and what their recordings read."""

from __future__ import annotations

import copy
import gc
import itertools
import threading
import weakref
from pathlib import Path
from typing import Any

import drafters
import pytest
import torch
from conftest import GPUS, golden
from forms import a_form
from tape import PROMPTS
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext import models
from dparallel_ext.decoding.graphs import Graphs

pytest_plugins = ["taping"]


CAUSAL: dict[str, Any] = {"gen_length": 24, "eos_id": -1}


def drafter_of(kind: str | None) -> tuple[models.Model, Any]:
    """A model, and what drafts for it."""
    if kind in ("dflash", "parallelspec"):
        return (model := drafters.model_of()), drafters.drafter_with(kind, model)
    if kind in ("ppd", "hidden_transfer"):
        return (model := drafters.model_of()), drafters.riding(kind, model)
    if kind in ("eagle3", "p-eagle"):
        return (model := drafters.model_of()), drafters.eagle(kind, model)
    if kind == "strided":
        return (model := drafters.model_of()), drafters.strided(model)
    if kind == "adadecode":
        return (model := drafters.deep_model()), drafters.exits(target=model)
    return drafters.model_of(), drafters.model_of("llama") if kind == "model" else kind


OBSERVING = [
    *("dflash", "parallelspec", "eagle3", "p-eagle", "ppd", "hidden_transfer", "adadecode", "recycling"),
    "strided",
]
"""Drafters with a part in the model's passes."""


WITH_WEIGHTS = ["dflash", "p-eagle", "ppd", "adadecode"]


OWN_PASSES = ["dflash", "parallelspec", "eagle3", "p-eagle", "adadecode", "recycling"]


def lost(made: list[Graphs]) -> list[str]:
    """The operators of recordings that read memory which nobody keeps, now that their tapes do not."""
    read = []
    for found in (found for graphs in made for found in graphs.recordings.values() if found is not None):
        tape = found.replay.__self__.tape  # type: ignore[attr-defined]
        read += tape.read()
        tape.forget()
    assert read
    gc.collect()
    return [operator for memory, operator in read if memory.expired()]


@pytest.mark.parametrize(
    "way",
    [
        {"threshold": 2.0, "active_blocks": 3},
        {"rule": "credit+confidence:0.03", "active_blocks": 2},
        {"rule": "edit:0.03,0.05,4"},
        {"rule": "soft:0.05,0.9,6"},
        {"threshold": 0.1, "suppress": [3, 77], "eos_id": 5, "temperature": 0.7},
        {"threshold": 4.0, "automaton": 3},
        {"threshold": 2.0, "cache": "block"},
    ],
    ids=str,
)
def test_what_recordings_read_outlives_the_decode(taped: list[Graphs], way: dict[str, Any]) -> None:
    """The last by a mixture of experts."""
    settings = {"gen_length": 48, "block_length": 8, "cache": "dual", **way}
    if "automaton" in settings:
        settings["automaton"] = a_form(settings["automaton"])
    of_experts = settings["cache"] == "block"
    model = drafters.model_of("llada2_moe") if of_experts else golden.model("llada_tiny_a")
    dx.decode(model, PROMPTS, record=True, **settings)
    assert not lost(taped)


@pytest.mark.parametrize("device", GPUS, indirect=True)
@pytest.mark.parametrize("kind", [None, "ngram", "model", *OBSERVING])
def test_a_gpu_records_every_drafter(device: str, kind: str | None, seen_graphs: list[Graphs]) -> None:
    model, drafter = drafter_of(kind)
    model = copy.deepcopy(model).to(device)
    if kind == "model":
        drafter = copy.deepcopy(drafter).to(device)
    for temperature in (0.0, 0.8):
        settings = {**CAUSAL, "drafter": drafter, "temperature": temperature, "seed": 3}
        settings |= {"logprobs": True, "top_logprobs": 2}
        expected = dx.speculate(model, PROMPTS, graphs=False, **settings)
        for _ in range(2):
            out = dx.speculate(model, PROMPTS, **settings)  # its drafts may have other sizes
            assert torch.equal(out.sequences, expected.sequences)
            assert torch.equal(out.top_logprobs.token, expected.top_logprobs.token)
    assert seen_graphs
    assert all(graphs.recorder is not None for graphs in seen_graphs), "a recording failed"
    assert any(graphs.replays for graphs in seen_graphs)


@pytest.mark.parametrize("kind", [None, *OBSERVING])
def test_what_recordings_read_outlives_the_speculation(taped: list[Graphs], kind: str | None) -> None:
    model, drafter = drafter_of(kind)
    settings = {**CAUSAL, "drafter": drafter, "temperature": 0.8, "logprobs": True}
    for form in (a_form(1, 61, ends=(5, 9)), None) * 2:
        dx.speculate(model, PROMPTS, automaton=form, **settings)
    del form
    assert not lost(taped)


@pytest.mark.parametrize("kind", [None, "ngram", "model", *OBSERVING])
def test_a_second_speculate_replays(taped: list[Graphs], kind: str | None) -> None:
    """Its drafter's passes, too; after another text and samples between them."""
    model, drafter = drafter_of(kind)
    settings = CAUSAL | {"drafter": drafter, "draft_size": 4}
    first = dx.speculate(model, PROMPTS[0], **settings)
    made = len(taped)
    dx.speculate(model, PROMPTS[0] + 20, temperature=0.8, seed=3, suppress=[5], **settings)
    before = [(graphs.replays, set(graphs.recordings)) for graphs in taped]
    again = dx.speculate(model, PROMPTS[0], **settings)
    assert len(taped) == made == (2 if kind in OWN_PASSES else 1)
    expected = dx.speculate(model, PROMPTS[0], graphs=False, **settings)
    for found in (first, again):
        for name in ("sequences", "nfe", "drafted", "accepted", "layers"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name
    for graphs, (replays, forms) in zip(taped, before, strict=True):
        assert graphs.recorder is not None, "a recording failed"
        assert graphs.replays > replays
        # A form of the first that came once is recorded now; none is new.
        assert set(graphs.recordings) == forms
    replays = taped[0].replays  # of the model's passes
    third = dx.speculate(model, PROMPTS[0], **settings)
    assert torch.equal(third.sequences, expected.sequences)
    assert taped[0].replays == replays + third.forwards


def test_plain_passes_and_those_over_guesses_without_weights_share_what_is_kept(taped: list[Graphs]) -> None:
    model = drafters.model_of()
    for drafter in (None, "ngram", None, "ngram:2", model):
        found = dx.speculate(model, PROMPTS[0], drafter=drafter, draft_size=3, **CAUSAL)
        expected = dx.speculate(model, PROMPTS[0], graphs=False, **CAUSAL)
        assert torch.equal(found.sequences, expected.sequences)
    assert len(taped) == 1


@pytest.mark.parametrize(
    ("how", "kind"),
    [
        *itertools.product(["deleted", "replaced"], [None, "strided", *WITH_WEIGHTS]),
        *itertools.product(["drafter replaced"], WITH_WEIGHTS),
        *itertools.product(["moved"], [None, "strided"]),
    ],
)
def test_what_speculate_keeps_goes_with_the_weights(taped: list[Graphs], kind: str | None, how: str) -> None:
    model, drafter = drafter_of(kind)
    settings = CAUSAL | {"drafter": drafter, "draft_size": 4}
    for _ in range(2):
        dx.speculate(model, PROMPTS[0], **settings)
    recorded = [
        weakref.ref(found.result)
        for graphs in taped
        for found in graphs.recordings.values()
        if found is not None
    ]
    taped[:] = []
    assert all(result() is not None for result in recorded)
    assert recorded
    if how == "deleted":
        del model
        gc.collect()
        assert all(result() is None for result in recorded)
        return
    if how == "moved":
        model.to(torch.float64).to(torch.float32)
    elif how == "replaced":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()
    else:
        with torch.no_grad():
            for parameter in drafter.on(model.device, model.dtype).parameters():
                parameter.data = parameter.data.clone()
    expected = dx.speculate(model, PROMPTS[0], graphs=False, **CAUSAL).sequences
    for _ in range(2):
        assert torch.equal(dx.speculate(model, PROMPTS[0], **settings).sequences, expected)
    assert all(result() is None for result in recorded)


def test_a_speculate_that_raises_leaves_nothing_behind(taped: list[Graphs]) -> None:
    model = drafters.model_of()
    dx.speculate(model, PROMPTS[0], **CAUSAL)
    was = model.norm.weight.data.clone()
    model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="holds NaN"):
        dx.speculate(model, PROMPTS[0], **CAUSAL)
    model.norm.weight.data.copy_(was)
    for _ in range(2):
        out = dx.speculate(model, PROMPTS[0], **CAUSAL)
        assert torch.equal(out.sequences, dx.speculate(model, PROMPTS[0], graphs=False, **CAUSAL).sequences)
    assert len(taped) == 2


def test_two_threads_speculate_with_one_model(taped: list[Graphs]) -> None:
    """Each with recordings of its own. Both are in the midst of it when each is."""
    model = drafters.model_of()
    expected = [dx.speculate(model, PROMPTS[place], graphs=False, **CAUSAL).sequences for place in (0, 1)]
    meet, found = threading.Barrier(2), dict[int, Tensor]()

    class Waits:
        def put(self, tokens: Tensor) -> None:
            meet.wait(60)

        def end(self) -> None:
            pass

    def decode(place: int) -> None:
        found[place] = dx.speculate(model, PROMPTS[place], streamer=Waits(), **CAUSAL).sequences

    for _ in range(2):
        threads = [threading.Thread(target=decode, args=(place,)) for place in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(found.pop(place), expected[place]) for place in (0, 1))
    assert len(taped) == 2


def test_a_drafter_that_is_read_in_each_call_is_not_kept(taped: list[Graphs], tmp_path: Path) -> None:
    """Nobody else has it, so that nobody would take what is kept with it."""
    model, drafter = drafter_of("ppd")
    drafter.save(tmp_path)
    dx.speculate(model, PROMPTS[0], drafter=tmp_path, draft_size=4, **CAUSAL)
    recorded = weakref.ref(next(found for found in taped[0].recordings.values() if found is not None).result)
    taped[:] = []
    gc.collect()
    assert recorded() is None
