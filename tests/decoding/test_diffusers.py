"""DiffusionGemma as diffusers ships it: its pipeline's own tokens and ours, given the same random numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_diffusion_gemma import CANVAS, VOCAB, model, prompt  # noqa: F401 (model is a fixture)
from torch import Tensor

import dparallel_ext as dx

diffusers = pytest.importorskip("diffusers")

STEPS = 6
SCHEDULERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "entropy bound": ({"name": "EntropyBoundScheduler", "entropy_bound": 3.0}, {}),
    "entropy bound, stopping": (
        {"name": "EntropyBoundScheduler", "entropy_bound": 3.0},
        {"confidence_threshold": 2.0, "num_inference_steps": 16},
    ),
    "block refinement": ({"name": "BlockRefinementScheduler", "threshold": 0.3}, {}),
    "block refinement, editing": (
        {"name": "BlockRefinementScheduler", "threshold": 0.3, "editing_threshold": 0.2},
        {"temperature": 0.7},
    ),
    "ddim": ({"name": "DiscreteDDIMScheduler"}, {}),
    "ddim, corrector": ({"name": "DiscreteDDIMScheduler", "corrector_steps": 1}, {"temperature": 0.7}),
}


class Processor:
    """The part of a processor that the pipeline calls."""

    eos_token_id = None

    def apply_chat_template(self, messages: Any, **_: Any) -> dict[str, Tensor]:
        return {"input_ids": prompt(len(messages))}


@pytest.fixture(scope="module")
def pipelines(model: Any) -> dict[str, Any]:  # noqa: F811
    made = {}
    for case, (config, _) in SCHEDULERS.items():
        settings = {key: value for key, value in config.items() if key != "name"}
        scheduler = getattr(diffusers, config["name"])(**settings)
        made[case] = diffusers.DiffusionGemmaPipeline(model, scheduler, Processor())
        made[case].set_progress_bar_config(disable=True)
    return made


def run(case: str, call: Any, *more: Any, **named: Any) -> Tensor:
    settings = {
        "prompt": ["a", "b"],
        "gen_length": 2 * CANVAS,
        "num_inference_steps": STEPS,
        **SCHEDULERS[case][1],
    }
    generator = torch.Generator().manual_seed(3)
    return call(*more, **settings, generator=generator, output_type="seq", **named).sequences


@pytest.mark.parametrize("case", SCHEDULERS)
@pytest.mark.parametrize("multinomial", [True, False])
def test_the_same_tokens_from_the_same_random_numbers(
    pipelines: dict[str, Any], monkeypatch: pytest.MonkeyPatch, case: str, multinomial: bool
) -> None:
    """By diffusers' random numbers in our steps, or by ours in its."""
    pipeline, samples, greedy = pipelines[case], [], not SCHEDULERS[case][1].get("temperature")
    greedy = greedy and "bound" not in case
    before = dict(vars(pipeline.scheduler))

    def recorded(*args: Any, **keys: Any) -> dx.RowStats:
        stats = dx.row_stats(*args, **keys)
        samples.append(stats.sample)
        return stats

    monkeypatch.setattr(dx.diffusion_gemma, "row_stats", recorded)
    ours = run(case, dx.diffusion_gemma.run_pipeline, pipeline, multinomial=multinomial)
    assert vars(pipeline.scheduler).keys() == before.keys()
    assert ours.shape == (2, 2 * CANVAS)
    assert len(samples) == 0 if multinomial and SCHEDULERS[case][1].get("temperature") else len(samples) > 1
    assert "stopping" not in case or len(samples) < 2 * 16
    if multinomial or greedy:
        expected = run(case, pipeline) if multinomial else drawn_first(case, pipeline)
        assert torch.equal(ours, expected)
        return
    of_torch = torch.multinomial

    def replayed(probabilities: Tensor, num_samples: int, **keys: Any) -> Tensor:
        if probabilities.shape[-1] == VOCAB and len(probabilities) == 2 * CANVAS:
            return samples.pop(0).view(-1, 1)
        return of_torch(probabilities, num_samples, **keys)  # a corrector's, or the routes of DDIM

    monkeypatch.setattr(torch, "multinomial", replayed)
    assert torch.equal(ours, drawn_first(case, pipeline))
    assert not samples  # as many steps


def drawn_first(case: str, pipeline: Any) -> Tensor:
    """The pipeline, after the key of our samples was drawn from its generator."""

    def call(**settings: Any) -> Any:
        torch.randint(2**62, (), generator=settings["generator"])
        return pipeline(**settings)

    return run(case, call)


def test_the_entropy_bound_step_reads_the_logits_once(
    pipelines: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def recorded(logits: Tensor, **keys: Any) -> dx.RowStats:
        calls.append(logits.shape)
        return dx.row_stats(logits, **keys)

    def unexpected(*_: Any, **__: Any) -> None:
        raise AssertionError("a second read of the logits")

    monkeypatch.setattr(dx.diffusion_gemma, "row_stats", recorded)
    for owner, name in ((torch.distributions, "Categorical"), (torch, "multinomial"), (torch, "softmax")):
        monkeypatch.setattr(owner, name, unexpected)
    pipeline = pipelines["entropy bound"]
    run("entropy bound", dx.diffusion_gemma.run_pipeline, pipeline, confidence_threshold=None)
    assert calls == [(2, CANVAS, VOCAB)] * (2 * STEPS)


def test_a_pipeline_that_is_none_is_named(pipelines: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=r"pipeline: expected diffusers' DiffusionGemmaPipeline .*got Linear"
    ):
        dx.diffusion_gemma.run_pipeline(torch.nn.Linear(2, 2), prompt="a")
    pipeline = pipelines["ddim"]
    other = diffusers.DiffusionGemmaPipeline(pipeline.model, diffusers.DDPMScheduler(), Processor())
    with pytest.raises(ValueError, match="got DiffusionGemmaPipeline with DDPMScheduler"):
        dx.diffusion_gemma.run_pipeline(other, prompt="a")
