"""Recorded passes of mixtures of experts: as `test_graphs`, and only where the host does not wait."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import drafters
import pytest
import torch
from conftest import GPUS
from tape import PROMPTS, TINY
from test_recorded_passes import kernels_of
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext import models
from dparallel_ext.decoding import padding
from dparallel_ext.decoding.graphs import Graphs
from dparallel_ext.models import experts

pytest_plugins = ["taping"]


MIXTURES: list[tuple[str, dict[str, Any]]] = [
    ("sdar_moe", {"cache": "block"}),
    ("sdar_moe", {"cache": "none", "temperature": 0.7, "seed": 5}),
    ("lladamoe", {"cache": "none"}),
    ("lladamoe", {"cache": "dual", "rule": "credit+entropy:3.5"}),
    ("lladamoe", {"cache": "dual", "draft_size": 3}),
    ("rnd1", {"cache": "dual", "threshold": 3.0}),
    ("llada2_moe", {"cache": "block", "rule": "edit:0.03,0.03"}),
    ("llada2_moe", {"cache": "block", "rule": "soft:0.05,0.9,6"}),
    ("llada2_moe", {"cache": "block", "threshold": 3.0}),
    ("llada2.2", {"cache": "none", "threshold": 3.0}),
    ("llada2.2", {"cache": "block", "rule": "levenshtein:0.05,0.05,4,7,9", "suppress": [5, 11]}),
    ("qwen3_moe", {}),
    ("qwen3_moe", {"drafter": "ngram", "draft_size": 4}),
]


def text_of(model: models.Model, prompts: list[Tensor], way: dict[str, Any], **settings: Any) -> Tensor:
    if model.causal:
        return dx.speculate(model, prompts, gen_length=24, eos_id=-1, **way, **settings).sequences
    return dx.decode(model, prompts, gen_length=24, block_length=8, **way, **settings).sequences


@pytest.mark.parametrize(("family", "way"), MIXTURES)
def test_experts_are_chosen_in_replays(
    taped: list[Graphs], monkeypatch: pytest.MonkeyPatch, family: str, way: dict[str, Any]
) -> None:
    """Each token's, of other prompts too than those whose passes were recorded."""
    model, forward = drafters.model_of(family), experts.Router.forward
    taken: list[list[Tensor]] = []
    expected = []

    def seen(self: experts.Router, x: Tensor, *together: Tensor) -> tuple[Tensor, Tensor]:
        share, chosen = forward(self, x, *together)
        taken[-1].append(chosen)
        return share, chosen

    texts = PROMPTS, [prompt.flip(0) % 50 + 7 for prompt in PROMPTS]
    with monkeypatch.context() as patched:
        patched.setattr(experts.Router, "forward", seen)
        for prompts in texts:
            taken.append([])
            expected.append(text_of(model, prompts, way, graphs=False))
    assert not torch.equal(taken[0][0], taken[1][0])
    assert not taped
    for prompts, tokens in zip(texts, expected, strict=True):
        before = sum(graphs.replays for graphs in taped)
        assert torch.equal(text_of(model, prompts, way), tokens)
        assert sum(graphs.replays for graphs in taped) >= before + 2
    assert all(graphs.recorder is not None for graphs in taped), "a recording failed"


@pytest.mark.parametrize("device", GPUS, indirect=True)
@pytest.mark.parametrize(("family", "way"), MIXTURES)
def test_a_gpu_records_mixtures_of_experts(
    device: str, family: str, way: dict[str, Any], seen_graphs: list[Graphs]
) -> None:
    """Where one product serves all experts and asks the host for nothing."""
    for dtype in (torch.bfloat16, torch.float32):
        model = drafters.model_of(family).to(device, dtype)
        prompts = [each.to(device) for each in PROMPTS]
        expected = text_of(model, prompts, way, graphs=False)
        for _ in range(2):
            assert torch.equal(text_of(model, prompts, way), expected)
        assert all(graphs.recorder is not None for graphs in seen_graphs), "a recording failed"
        replays = sum(graphs.replays for graphs in seen_graphs)
        can = dtype == torch.bfloat16 and torch.cuda.get_device_capability()[0] in (9, 10)
        assert (replays >= 2) if can else (replays == 0)
        seen_graphs.clear()


@pytest.mark.parametrize("family", ["sdar_moe", "qwen3_moe"])
def test_an_engine_replays_mixtures_of_experts(taped: list[Graphs], family: str) -> None:
    model = drafters.model_of(family)
    size: dict[str, Any] = {"lanes": 2, "max_length": 80, "page_size": 8}
    size |= {"drafter": "ngram", "draft_size": 4} if model.causal else {}
    prompts = PROMPTS * 2
    found = []
    for graphs in (False, True):
        with dx.Engine(model, graphs=graphs, **size) as engine:
            handles = [engine.submit(prompt, gen_length=24, eos_id=-1) for prompt in prompts]
            found.append([handle.result(60).tokens for handle in handles])
    assert found[0] == found[1]
    (graphs_seen,) = taped
    assert graphs_seen.recorder is not None, "a recording failed"
    assert graphs_seen.replays > 10


@pytest.mark.parametrize("why", ["expert by expert", "another GPU"])
@pytest.mark.parametrize(("family", "way"), [MIXTURES[0], MIXTURES[3], MIXTURES[-1]])
def test_experts_for_which_the_host_waits_are_not_recorded(
    taped: list[Graphs],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    why: str,
    family: str,
    way: dict[str, Any],
) -> None:
    """Nor is it tried: their passes run as they are."""
    if why == "expert by expert":
        monkeypatch.setattr(experts, "by_one_product", lambda sizes, like: False)
    else:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 6))
    model = drafters.model_of(family)
    assert padding.recorded_rows(model) == 0
    expected = text_of(model, PROMPTS, way, graphs=False)
    for _ in range(2):
        assert torch.equal(text_of(model, PROMPTS, way), expected)
    assert taped
    assert all(graphs.small == graphs.replays == len(graphs.recordings) == 0 for graphs in taped)  # type: ignore[attr-defined]
    assert not caplog.text


def test_a_recording_of_experts_one_by_one_fails(
    taped: list[Graphs], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The tape tells what the tests above would not: a number that a recording may not read."""
    model = drafters.model_of("sdar_moe")
    monkeypatch.setattr(experts.Experts, "grouped", experts.Experts.one_by_one)
    expected = text_of(model, PROMPTS, {"cache": "block"}, graphs=False)
    assert torch.equal(text_of(model, PROMPTS, {"cache": "block"}), expected)
    assert "tolist" in caplog.text
    assert taped[0].recorder is None


CHANGES: dict[str, Callable[[models.Model], object]] = {
    "a router": lambda model: setattr(
        model.blocks[1].router, "weight", torch.nn.Parameter(model.blocks[1].router.weight.flip(0))
    ),
    "experts": lambda model: setattr(
        model.blocks[2].experts, "down_proj", torch.nn.Parameter(model.blocks[2].experts.down_proj.flip(0))
    ),
    "a shared expert": lambda model: setattr(
        model.blocks[1].shared.up_proj.weight, "data", model.blocks[1].shared.up_proj.weight.flip(0)
    ),
    "a bias": lambda model: setattr(
        model.blocks[2].router, "expert_bias", model.blocks[2].router.expert_bias.flip(0)
    ),
    "fused": lambda model: model.fuse(),
    "experts in place": lambda model: model.blocks[2].experts.gate_up_proj.neg_(),
    "a bias in place": lambda model: model.blocks[1].router.expert_bias.copy_(torch.arange(8) % 3),
    "a hook": lambda model: model.blocks[1].router.register_forward_hook(
        lambda module, x, out: (out[0], out[1].flip(-1))
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_experts_that_changed_are_seen(taped: list[Graphs], change: str) -> None:
    """What lies elsewhere is recorded again, what changed in place is read, and a hook runs."""
    model, way = drafters.model_of("llada2_moe"), {"cache": "block"}
    first = text_of(model, PROMPTS, way)
    (graphs,) = taped
    before, replays = [found for found in graphs.recordings.values() if found is not None], graphs.replays
    assert before
    assert replays
    CHANGES[change](model)
    second = text_of(model, PROMPTS, way)
    assert torch.equal(second, text_of(model, PROMPTS, way, graphs=False))
    assert torch.equal(first, second) == (change == "fused")
    assert taped == [graphs]
    left = [found for found in before if any(found is other for other in graphs.recordings.values())]
    assert len(left) == (len(before) if "in place" in change else 0)
    assert (graphs.replays == replays) == (change == "a hook")


def test_of_experts_those_that_a_token_takes_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of SDAR-30B-A3B's layer, eight of 128."""
    monkeypatch.setattr(models.Model, "waits", False)
    sizes = {"hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128}
    moe = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
    with torch.device("meta"):
        found = [
            padding.recorded_rows(
                models.SDARMoE({**TINY["sdar"], **sizes, **moe, "intermediate_size": width})
            )
            for width in (768, 6144)
        ]
        dense = padding.recorded_rows(models.SDAR({**TINY["sdar"], **sizes, "intermediate_size": 6144}))
    assert found == [dense, dense]


@pytest.mark.parametrize("family", ["sdar_moe", "llada2_moe"])
def test_the_kernels_of_a_layer_with_experts(
    taped: list[Graphs], monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Attention as above, a router, its pairs in order, two products, and a sum; LLaDA2's router has groups,
    and beside the experts is one that is shared."""

    def model_of(layers: int) -> models.Model:
        sparse = {"mlp_only_layers": [], "first_k_dense_replace": 0}
        return drafters.model_of(family, num_hidden_layers=layers, **sparse)

    layer, _ = kernels_of(monkeypatch, model_of, "block")
    expected = Counter(rms_norm=2, linear=3, kv_write=1, block_attention=1)
    expected += Counter(sort=1, arange=1, searchsorted=1, floor_divide=1, index=1)
    expected += Counter({"_grouped_mm": 2, "swiglu": 1, "index_copy_": 1, "mul": 1, "sum": 1})
    if family == "sdar_moe":
        expected += Counter(softmax=1, topk=1, sum=1, div=1, to=1)
        assert layer.total() == 23
    else:
        expected += Counter(to=2, sigmoid=1, add=1)
        expected += Counter(topk=3, sum=1, ones=1, scatter_=1, masked_fill=1)
        expected += Counter(gather=1, sum=1, add=1, div=1, mul=1)
        expected += Counter(linear=2, swiglu=1, add=1, to=1)
        assert layer.total() == 39
    assert layer == expected
