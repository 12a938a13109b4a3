"""DiffusionGemma: transformers' own loop and ours, given the same random numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import dparallel_ext as dx

gemma = pytest.importorskip("transformers.models.diffusion_gemma.generation_diffusion_gemma")

CANVAS, VOCAB = 16, 300


@pytest.fixture(scope="module")
def model() -> Any:
    """Random weights, enlarged until the entropy bound bites and sequences stop, each at its own step."""
    import transformers as t

    torch.manual_seed(0)
    text = t.DiffusionGemmaTextConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        global_head_dim=16,
        num_experts=2,
        top_k_experts=1,
        moe_intermediate_size=32,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
        max_position_embeddings=512,
    )
    vision = t.Gemma4VisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
    )
    ids = {"image_token_id": 299, "boi_token_id": 298, "eoi_token_id": 297}
    config = t.DiffusionGemmaConfig(text_config=text, vision_config=vision, canvas_length=CANVAS, **ids)
    model = t.DiffusionGemmaForBlockDiffusion(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim >= 2:
                p *= 8
        model.model.decoder.embed_tokens.weight *= 3
    return model


def prompt(batch: int = 3) -> Tensor:
    return torch.randint(3, 290, (batch, 7), generator=torch.Generator().manual_seed(5))


def bound(value: float) -> Any:
    return gemma.EntropyBoundSamplerConfig(entropy_bound=value)


EARLY = {"max_denoising_steps": 16, "sampler_config": bound(3.0), "confidence_threshold": 2.0}
SETTINGS = [
    {"max_denoising_steps": 8},
    EARLY,
    {**EARLY, "stability_threshold": 0},
    {**EARLY, "stability_threshold": 2, "confidence_threshold": 3.0, "t_min": 0.1, "t_max": 0.3},
    {**EARLY, "eos_token_id": [11, 12, 13, 14, 15, 16, 17, 18], "pad_token_id": 0},
    {
        "max_denoising_steps": 6,
        "sampler_config": bound(40.0),
        "decoder_input_ids": torch.full((3, CANVAS), 9),
    },
]


def same(ours: Any, theirs: Any) -> None:
    assert torch.equal(ours.sequences, theirs.sequences)
    assert torch.equal(ours.tokens_per_forward, theirs.tokens_per_forward)  # so the steps, row by row


@pytest.mark.parametrize("settings", SETTINGS, ids=range(len(SETTINGS)))
@pytest.mark.parametrize("multinomial", [True, False])
def test_the_same_tokens_from_the_same_random_numbers(
    model, monkeypatch, settings: dict[str, Any], multinomial: bool
) -> None:
    """By transformers' random numbers in our loop, or by ours in its."""
    samples = []

    def recorded(*args: Any, **keys: Any) -> dx.RowStats:
        stats = dx.row_stats(*args, **keys)
        samples.append(stats.sample)
        return stats

    monkeypatch.setattr(dx.diffusion_gemma, "row_stats", recorded)
    torch.manual_seed(3)
    ours = dx.diffusion_gemma.generate(
        model, prompt(), multinomial=multinomial, max_new_tokens=2 * CANVAS, **settings
    )
    steps = len(samples)
    torch.manual_seed(3)
    if not multinomial:
        torch.randint(2**62, ())  # the key of our samples
        monkeypatch.setattr(torch, "multinomial", lambda *_, **__: samples.pop(0).view(-1, 1))
    theirs = model.generate(prompt(), max_new_tokens=2 * CANVAS, **settings)
    same(ours, theirs)
    assert ours.sequences.shape == (3, 7 + 2 * CANVAS)
    if not multinomial:
        assert not samples  # as many steps
    if settings is EARLY:
        assert steps < 2 * 16
        assert len(ours.tokens_per_forward.unique()) > 1


def test_the_samples_are_keyed_by_torchs_generator_and_are_samples(model, monkeypatch) -> None:
    drawn = []

    def recorded(*args: Any, **keys: Any) -> dx.RowStats:
        stats = dx.row_stats(*args, **keys)
        drawn.append((stats.sample == stats.token).float() - (stats.top1 - stats.lse).exp())
        return stats

    monkeypatch.setattr(dx.diffusion_gemma, "row_stats", recorded)
    tokens = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        tokens.append(dx.diffusion_gemma.generate(model, prompt(), max_new_tokens=20, **EARLY).sequences)
    assert torch.equal(tokens[0], tokens[1])
    assert not torch.equal(tokens[0], tokens[2])
    # The argmax comes up as often as its probability says; 0.02 is four standard errors.
    assert torch.stack(drawn).mean().abs() < 0.02


def test_the_logits_are_read_once(model, monkeypatch) -> None:
    """Neither the sampler's nor the stopping rule's own statistics are taken."""
    calls = []

    def recorded(logits: Tensor, **keys: Any) -> dx.RowStats:
        calls.append(logits.shape)
        return dx.row_stats(logits, **keys)

    def unexpected(*_: Any, **__: Any) -> None:
        raise AssertionError("a second read of the logits")

    monkeypatch.setattr(dx.diffusion_gemma, "row_stats", recorded)
    monkeypatch.setattr(torch.distributions, "Categorical", unexpected)
    monkeypatch.setattr(torch, "multinomial", unexpected)
    dx.diffusion_gemma.generate(model, prompt(2), max_new_tokens=CANVAS, max_denoising_steps=5)
    assert calls == [(2, CANVAS, VOCAB)] * 5


def test_bfloat16_processors_and_streamers(model) -> None:
    """The rest of the loop is transformers' own: what it takes, ours takes."""
    from transformers import LogitsProcessor, LogitsProcessorList

    class Never(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor, cur_step: Tensor) -> Tensor:
            scores = scores.clone()
            scores[..., 100:] = -torch.inf
            return scores

    class Streamer:
        def __init__(self) -> None:
            self.put, self.drafts = lambda value: None, []

        def put_draft(self, value: Tensor) -> None:
            self.drafts.append(value)

        def end(self) -> None:
            self.drafts.append(None)

    half = type(model)(model.config).eval()
    half.load_state_dict(model.state_dict())
    half.to(torch.bfloat16)
    results, drafts = [], []
    for ours in (True, False):
        streamer = Streamer()
        settings = {"max_new_tokens": CANVAS, "logits_processor": LogitsProcessorList([Never()]), **EARLY}
        torch.manual_seed(0)
        if ours:
            out = dx.diffusion_gemma.generate(
                half, prompt(1), multinomial=True, streamer=streamer, **settings
            )
        else:
            out = half.generate(prompt(1), streamer=streamer, **settings)
        results.append(out)
        drafts.append(streamer.drafts)
    same(*results)
    assert (results[0].sequences[:, 7:] < 100).all()
    assert len(drafts[0]) == len(drafts[1]) > 1
    assert all(torch.equal(a, b) for a, b in zip(drafts[0][:-1], drafts[1][:-1], strict=True))


def test_errors_name_their_cause_and_leave_the_model_as_it_was(model) -> None:
    with pytest.raises(ValueError, match="model: expected transformers' DiffusionGemmaForBlockDiffusion"):
        dx.diffusion_gemma.generate(torch.nn.Linear(2, 2), prompt())
    torch.manual_seed(0)
    before = model.generate(prompt(), max_new_tokens=CANVAS, max_denoising_steps=2).sequences
    with pytest.raises(ValueError, match="max_denoising_steps"):
        dx.diffusion_gemma.generate(model, prompt(), max_denoising_steps=0)

    def spoilt(module: Any, args: Any, output: Tensor) -> Tensor:
        output[1, 4] = torch.nan
        return output

    handle = model.lm_head.register_forward_hook(spoilt)
    with pytest.raises(ValueError, match=rf"row {CANVAS + 4} holds NaN"):
        dx.diffusion_gemma.generate(model, prompt(), max_new_tokens=CANVAS, max_denoising_steps=2)
    handle.remove()
    assert "_denoising_step" not in vars(model)
    torch.manual_seed(0)
    after = model.generate(prompt(), max_new_tokens=CANVAS, max_denoising_steps=2).sequences
    assert torch.equal(before, after)


def test_the_step_follows_the_names_of_the_installed_release(model, monkeypatch) -> None:
    """What a release calls the cache is its own affair; an argument that we use must be there by its name."""
    step, passed_on = dx.diffusion_gemma.denoising_step, []

    def renamed(base: Any, seed: Any, *, decoder_forward: Any, **keys: Any) -> Any:
        cache = next(key for key in ("past_key_values", "cache") if key in keys)

        def forward(*, memory: Any, **more: Any) -> Any:
            passed_on.append(memory)
            return decoder_forward(**{cache: memory}, **more)

        return step(base, seed, decoder_forward=forward, memory=keys.pop(cache), **keys)

    settings = {"max_new_tokens": CANVAS, "max_denoising_steps": 2}
    torch.manual_seed(0)
    expected = dx.diffusion_gemma.generate(model, prompt(), **settings)
    monkeypatch.setattr(dx.diffusion_gemma, "denoising_step", renamed)
    torch.manual_seed(0)
    same(dx.diffusion_gemma.generate(model, prompt(), **settings), expected)
    assert len(passed_on) == 2

    monkeypatch.setattr(type(model), "_denoising_step", lambda self, *, current_canvas, **_: None)
    with pytest.raises(ValueError, match=r"takes no \['decoder_forward', 'argmax_canvas'"):
        dx.diffusion_gemma.generate(model, prompt())


def test_under_adapters(model) -> None:
    peft = pytest.importorskip("peft")
    half = type(model)(model.config).eval()
    half.load_state_dict(model.state_dict())
    adapted = peft.get_peft_model(
        half, peft.LoraConfig(target_modules=".*language_model.*q_proj|.*decoder.*q_proj", r=2)
    ).eval()
    outputs = []
    for ours in (True, False):
        torch.manual_seed(0)
        settings = {"max_new_tokens": CANVAS, "max_denoising_steps": 4}
        if ours:
            outputs.append(dx.diffusion_gemma.generate(adapted, prompt(), multinomial=True, **settings))
        else:
            outputs.append(adapted.generate(prompt(), **settings))
    same(*outputs)
