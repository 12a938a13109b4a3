"""What calls of decode keep for the next ones: recordings and memory, their bounds, and what lets them go."""

from __future__ import annotations

import functools
import gc
import threading
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from conftest import GPUS, golden
from tape import PROMPTS, TapeGraph, recordings
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext import model_store, models
from dparallel_ext.cache import bucket
from dparallel_ext.decoding import graphs as recording
from dparallel_ext.decoding import workspace
from dparallel_ext.decoding.graphs import LIMIT, CudaRecorder, Graphs, run_pass

pytest_plugins = ["taping"]


SETTINGS: dict[str, Any] = {"gen_length": 32, "block_length": 16, "cache": "dual", "steps": 16}


def plain(model: models.Model, prompts: Any, **settings: Any) -> Tensor:
    return dx.decode(model, prompts, graphs=False, **{**SETTINGS, **settings}).sequences


def test_a_second_decode_replays_from_its_first_pass(taped: list[Graphs]) -> None:
    """So does one of other lengths that are near, with other rules, and one that records its trajectory."""
    model = golden.model("llada_tiny_a")
    dx.decode(model, PROMPTS[0], **SETTINGS)
    (graphs,) = taped
    assert len(graphs.recordings) == recordings(graphs) == 2
    for length, more in ((11, {}), (9, {}), (16, {"steps": 8}), (11, {"steps": None, "threshold": 1.0})):
        before = graphs.replays
        out = dx.decode(model, PROMPTS[2][:length], **{**SETTINGS, **more})
        assert torch.equal(out.sequences, plain(model, PROMPTS[2][:length], **more))
        assert graphs.replays == before + out.forwards
    assert recordings(graphs) == 2
    groups: list[dict[str, Any]] = [
        {"record": True, "logprobs": True, "top_logprobs": 2},
        {"temperature": 0.8, "seed": 3},
        {"suppress": [5, 9]},
        {"gen_length": [30]},
    ]
    for way in groups:
        for _ in range(2):
            out = dx.decode(model, PROMPTS[0], **{**SETTINGS, **way})
        before = graphs.replays
        again = dx.decode(model, PROMPTS[0], **{**SETTINGS, **way})
        assert graphs.replays == before + again.forwards
        expected = dx.decode(model, PROMPTS[0], graphs=False, **{**SETTINGS, **way})
        for found in (out, again):
            assert torch.equal(found.sequences, expected.sequences)
            assert torch.equal(found.nfe, expected.nfe)
        if "record" in way:
            assert expected.trajectory is not None
            assert again.trajectory is not None
            assert torch.equal(again.trajectory.step, expected.trajectory.step)
            assert torch.equal(again.logprobs, expected.logprobs)
            assert all(map(torch.equal, again.top_logprobs, expected.top_logprobs))
    assert taped == [graphs]


def test_each_mask_token_has_recordings_of_its_own(taped: list[Graphs]) -> None:
    """And so has each cache, of one layer or of all."""
    model = golden.model("llada_tiny_a")
    ways: list[dict[str, Any]] = [{}, {"mask_id": 7}, {"cache": "none"}]
    for _ in range(2):
        for way in ways:
            out = dx.decode(model, PROMPTS[0], **{**SETTINGS, **way})
            assert torch.equal(out.sequences, plain(model, PROMPTS[0], **way))
    assert len(taped) == 3
    assert all(graphs.replays > 0 for graphs in taped)


def test_what_is_kept_is_bounded(taped: list[Graphs], monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = (golden.model("llada_tiny_a") for _ in range(2))

    def decode(lanes: int, of: models.Model = model) -> None:
        dx.decode(of, [PROMPTS[0]] * lanes, **SETTINGS)

    for lanes in range(1, model_store.LIMIT + 2):
        decode(lanes)
    decode(2, other)
    assert len(taped) == model_store.LIMIT + 2
    decode(2)
    decode(2, other)
    assert len(taped) == model_store.LIMIT + 2
    decode(1)  # the one not used for longest
    assert len(taped) == model_store.LIMIT + 3
    monkeypatch.setattr(model_store, "BYTES", 2 * 2 * 48 * model.shape.width * 4 * model.shape.layers - 1)
    decode(2)
    decode(2)  # larger than what is kept: as it was before
    assert len(taped) == model_store.LIMIT + 5
    assert taped[-1].replays > 0


def test_the_latest_is_taken_and_the_bytes_of_all_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_store, "BYTES", 10)
    model = golden.model("llada_tiny_a")
    for value in (1, 2):
        model_store.put(model, "same", value, 3)
    assert [model_store.take(model, "same") for _ in range(3)] == [2, 1, None]
    for value in (1, 2, 3):
        model_store.put(model, value, value, 4)
    assert [model_store.take(model, value) for value in (1, 2, 3)] == [None, 2, 3]


def test_recordings_are_of_their_own_ends_and_suppressed_ids(taped: list[Graphs]) -> None:
    """And nothing of the decode before is told of what is behind an end."""
    model = golden.model("llada_tiny_a")
    text = plain(model, PROMPTS[0])[0, len(PROMPTS[0]) :].tolist()
    ways: list[dict[str, Any]] = [{"eos_id": text[at]} for at in (3, 20)]
    ways += [{"suppress": ids} for ids in (text[:2], text[2:4])]
    for _ in range(3):
        for way in ways:
            out = dx.decode(model, PROMPTS[0], record=True, **SETTINGS, **way)
            expected = dx.decode(model, PROMPTS[0], graphs=False, record=True, **SETTINGS, **way)
            assert torch.equal(out.sequences, expected.sequences)
            assert int(out.nfe) == int(expected.nfe)
            assert out.trajectory is not None
            assert expected.trajectory is not None
            assert torch.equal(out.trajectory.step, expected.trajectory.step)
    assert len(taped) == 1


def test_there_is_room_for_so_many_bytes(taped: list[Graphs], monkeypatch: pytest.MonkeyPatch) -> None:
    model = golden.model("llada_tiny_a")
    of_cache = model.new_cache(1, bucket(len(PROMPTS[0]) + 32)).slots.nbytes
    monkeypatch.setattr(model_store, "BYTES", 2 * of_cache)
    for mask_id, made in ((511, 1), (7, 2), (8, 3), (7, 3), (8, 3), (511, 4)):
        dx.decode(model, PROMPTS[0], mask_id=mask_id, **SETTINGS)
        assert len(taped) == made


def test_a_function_as_a_rule_keeps_no_model_alive(taped: list[Graphs]) -> None:
    model = golden.model("llada_tiny_a")
    rule = functools.partial(lambda of, stats, masked, step: masked, model)
    dx.decode(model, PROMPTS[0], gen_length=8, block_length=8, rule=rule)
    gone = weakref.ref(model)
    del model, rule
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("how", ["deleted", "moved", "trained", "replaced"])
def test_what_is_kept_goes_with_the_weights(taped: list[Graphs], how: str) -> None:
    model = golden.model("llada_tiny_a")
    dx.decode(model, PROMPTS[0], **SETTINGS)
    recorded = weakref.ref(next(found for found in taped[0].recordings.values() if found is not None).result)
    taped[:] = []
    assert recorded() is not None
    if how == "deleted":
        del model
        gc.collect()
        assert recorded() is None
        return
    if how == "moved":
        model.to(torch.bfloat16)
        assert recorded() is None
    elif how == "trained":
        model.train().eval()
        assert recorded() is None
    else:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.data = torch.flip(parameter, [0]).contiguous()
        assert recorded() is not None
    for _ in range(2):
        out = dx.decode(model, PROMPTS[0], **SETTINGS)
        assert torch.equal(out.sequences, plain(model, PROMPTS[0]))
    assert recorded() is None
    assert all(graphs.recorder is not None for graphs in taped), "a recording failed"


def test_a_decode_that_raises_leaves_nothing_behind(taped: list[Graphs]) -> None:
    model = golden.model("llada_tiny_a")
    dx.decode(model, PROMPTS[0], **SETTINGS)
    was = model.norm.weight.data.clone()
    model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="holds NaN"):
        dx.decode(model, PROMPTS[0], **SETTINGS)
    model.norm.weight.data.copy_(was)
    for _ in range(2):
        out = dx.decode(model, PROMPTS[0], **SETTINGS)
        assert torch.equal(out.sequences, plain(model, PROMPTS[0]))
    assert len(taped) == 2


def test_two_threads_decode_with_one_model(taped: list[Graphs]) -> None:
    """Each with recordings of its own. Both are in the midst of it when each is."""
    model = golden.model("llada_tiny_a")
    expected = [plain(model, PROMPTS[place][:11]) for place in (0, 2)]
    meet = threading.Barrier(2)

    class Waits:
        def put(self, tokens: Tensor) -> None:
            meet.wait(60)

        def end(self) -> None:
            pass

    found: dict[int, Tensor] = {}

    def decode(place: int, prompt: Tensor) -> None:
        found[place] = dx.decode(model, prompt, streamer=Waits(), **SETTINGS).sequences

    for _ in range(2):
        threads = [threading.Thread(target=decode, args=(i, PROMPTS[2 * i][:11])) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(found.pop(place), expected[place]) for place in (0, 1))
    assert len(taped) == 2
    assert sum(graphs.replays for graphs in taped) == 4 * 16 - 4


def test_recorders_share_no_stream(taped: list[Graphs], monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as torch has enough: it gives out the same ones again in turn."""
    monkeypatch.setattr(recording, "recorders", weakref.WeakSet())
    made = [CudaRecorder(torch.device("cpu")) for _ in range(20)]
    del made[1::2]
    made += [CudaRecorder(torch.device("cpu")) for _ in range(22)]
    assert len({recorder.stream.cuda_stream for recorder in made}) == 32


@pytest.mark.parametrize("device", GPUS, indirect=True)
def test_recordings_of_a_gpu_outlive_a_decode(device: str, seen_graphs: list[Graphs]) -> None:
    """Not weights that move; and they take no more memory each time."""
    model = golden.model("llada_tiny_a", dtype=torch.bfloat16, device=device)
    prompts = [prompt.to(device) for prompt in PROMPTS]
    dx.decode(model, prompts, **SETTINGS)
    (graphs,) = seen_graphs
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.data = torch.flip(parameter, [0]).contiguous()
        expected = plain(model, prompts)
        reserved = []
        for around in range(4):
            before = graphs.replays
            out = dx.decode(model, prompts, **SETTINGS)
            assert graphs.recorder is not None, "a recording failed"
            assert torch.equal(out.sequences, expected)
            if around:
                assert graphs.replays == before + out.forwards
            reserved.append(torch.cuda.memory_reserved())
        assert reserved[1] == reserved[3]
    assert seen_graphs == [graphs]
    for length in range(40, 400, 40):  # more forms than are kept, and other buffers
        dx.decode(model, prompts, **{**SETTINGS, "gen_length": length, "steps": None})
    assert torch.equal(dx.decode(model, prompts, **SETTINGS).sequences, expected)
    assert all(found.recorder is not None for found in seen_graphs), "a recording failed"
    model.train().eval()
    del seen_graphs[:], graphs
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.equal(dx.decode(model, prompts, **SETTINGS).sequences, expected)


def run_on_cpu(graphs: Graphs, key: Any, inputs: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
    return run_pass(graphs, key, inputs, compute, device=torch.device("cpu"), held=None)


def test_forms_are_forgotten() -> None:
    """The least recently used form goes, and with it what its recording held."""

    class Count:
        taken = 0
        turn = staticmethod(nullcontext)

        def record(self, compute: Any, numbers: Tensor) -> tuple[Callable[[], None], Tensor]:
            self.taken += 1
            result = torch.zeros(1)
            return lambda: result.copy_(compute(numbers)), result  # type: ignore[return-value]

    recorder = Count()
    graphs = Graphs(recorder)
    graphs.drop_stale([0])

    def run(form: int, number: int) -> int:
        return int(run_on_cpu(graphs, form, torch.tensor([number]), lambda n: n.sum()[None].float() + form))

    for number in range(4):
        assert run(1000, number) == 1000 + number
    assert (recorder.taken, graphs.replays) == (1, 3)
    for form in range(LIMIT):
        assert run(form, 7) == form + 7
    assert len(graphs.recordings) == LIMIT
    run(1000, 1)
    assert recorder.taken == 1  # it was forgotten, so this pass ran as it is
    run(1000, 1)
    assert recorder.taken == 2
    for form in range(LIMIT):
        run(2000 + form, 7)
        run(1000, 1)
    run(1000, 1)
    assert recorder.taken == 2  # what is used is not
    graphs.drop_stale([1])
    assert not graphs.recordings
    run(1000, 1)
    graphs.drop_stale([1])
    assert graphs.recordings


@pytest.mark.parametrize("how", ["evicted", "moved"])
def test_a_pool_without_recordings_is_not_used_again(taped: list[Graphs], how: str) -> None:
    """torch's allocator refuses it, which would be the end of all recordings."""
    graphs = Graphs(CudaRecorder(torch.device("cpu")))
    graphs.drop_stale([])
    number = torch.ones(1, dtype=torch.int64)
    for around in range(3):
        for _ in range(3):
            assert int(run_on_cpu(graphs, "again", number, lambda n: n + 1)) == 2
        if how == "moved":
            graphs.drop_stale([around])
        else:
            for form in range(LIMIT):
                run_on_cpu(graphs, (around, form), number, lambda n: n + 1)
        assert "again" not in graphs.recordings
        assert not any(TapeGraph.pools.values())
    assert graphs.recorder is not None
    assert graphs.replays == 6
    assert len(TapeGraph.pools) == 3
    # A pool that a recording holds serves the next.
    for form in ("one", "two"):
        for _ in range(2):
            run_on_cpu(graphs, form, number, lambda n: n + 1)
    assert list(TapeGraph.pools.values()) == [0, 0, 0, 2]


def test_the_same_ids_to_suppress_are_the_same_tensor() -> None:
    space = workspace.Workspace.of(torch.zeros(1, 4, dtype=torch.int64), None)
    cpu = torch.device("cpu")
    first = space.suppress(torch.tensor([7, 2, 7]), cpu)
    assert first is not None
    assert first.tolist() == [2, 7]
    assert space.suppress(torch.tensor([2, 7]), cpu) is first
    assert space.suppress(torch.tensor([], dtype=torch.int64), cpu) is None
    for number in range(200):
        space.suppress(torch.tensor([number]), cpu)
    assert len(space.suppressed) <= 64
