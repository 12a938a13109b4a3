"""DiffusionGemma as transformers and diffusers ship it, with samplers that read the logits once."""

from __future__ import annotations

import importlib
import inspect
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import policies
from .arguments import COLDEST
from .models import for_decoding, unwrap
from .ops import check_errors, row_stats, select
from .types import RowStats


def generate(model: Any, input_ids: Tensor, *, multinomial: bool = False, **settings: Any) -> Any:
    """`model.generate` of transformers' DiffusionGemma, with our statistics and `entropy_bound` selection.

    Each denoising step of transformers reads the logits (B, C, V) of the canvas for the samples (a softmax in
    float32), the argmax, the entropies of the sampler and once more those of the stopping rule. Here
    `row_stats` takes all of these in one read, `select` accepts the lowest entropies whose preceding sum is
    within the bound (EB-sampler, arXiv 2505.24857), and the same entropies decide about stopping. The rest is
    transformers' own: encoder, caches, temperature schedule, logits processors, streamers, eos and padding.

    Args:
        model: a DiffusionGemmaForBlockDiffusion, also wrapped or under PEFT's adapters, as in `decode`. Not
            for several threads at once: its step is replaced while the call lasts.
        input_ids: (B, P) int64.
        multinomial: draw the samples by `torch.multinomial`, as transformers does: the same tokens from the
            same `torch.manual_seed`, at the price of its softmax. Otherwise they are Gumbel-max samples of
            the same distribution, keyed by one number of torch's generator, sequence, position and step.
        settings: arguments of `model.generate`: max_new_tokens, max_denoising_steps, t_min, t_max, ...

    Returns:
        The output of `model.generate`.

    Raises:
        ValueError: if the model has no denoising step to replace, or one whose arguments have other names
            than in the releases of transformers that this is written for; and (on a GPU when the call ends)
            if its logits hold NaN or leave no token to choose.
    """
    model, base = for_decoding(model), unwrap(model)
    if not hasattr(base, "_denoising_step"):
        raise ValueError(
            "model: expected transformers' DiffusionGemmaForBlockDiffusion (its _denoising_step is what is "
            f"replaced), got {type(model).__name__}"
        )
    taken = inspect.signature(base._denoising_step).parameters
    missing = [name for name in OUR_ARGUMENTS if name not in taken]
    if missing:
        raise ValueError(
            f"model: the _denoising_step of this release of transformers takes no {missing}, which "
            "diffusion_gemma.generate needs"
        )
    seed = None if multinomial else int(torch.randint(2**62, ()))
    with _replaced(base, "_denoising_step", partial(denoising_step, base, seed)):
        output = model.generate(input_ids, **settings)
    check_errors(input_ids.device)
    return output


def run_pipeline(pipeline: Any, *, multinomial: bool = False, **settings: Any) -> Any:
    """`pipeline(**settings)` of diffusers' DiffusionGemmaPipeline, with a scheduler that reads logits once.

    `EntropyBoundScheduler` reads a step's logits (B, C, V) for the samples and once more for the entropies;
    `BlockRefinementScheduler` and `DiscreteDDIMScheduler` read them for the probabilities and for the argmax
    or the samples. Here `row_stats` gives all of these at once. Commits, noise, correctors and the loop are
    diffusers' own. So is the pipeline's stopping rule, which reads the logits again;
    `confidence_threshold=None` leaves it out. Greedy decoding (`temperature=0`) gives diffusers' own tokens.

    Args:
        pipeline: a DiffusionGemmaPipeline. Not for several threads at once: a method of its scheduler is
            replaced while the call lasts.
        multinomial: draw the samples by `torch.multinomial`, as diffusers does: the same tokens from the same
            generator. Otherwise they are Gumbel-max samples of the same distribution, keyed by one number of
            the generator, sequence, position and step.
        settings: arguments of the pipeline: prompt, gen_length, num_inference_steps, generator, ...

    Returns:
        The output of the pipeline.

    Raises:
        ValueError: if the pipeline has none of the three schedulers, and (on a GPU when the call ends) if its
            logits hold NaN or leave no token to choose.
    """
    scheduler = getattr(pipeline, "scheduler", None)
    kind = type(scheduler)
    if kind.__name__ not in SCHEDULERS or not kind.__module__.startswith("diffusers."):
        raise ValueError(
            f"pipeline: expected diffusers' DiffusionGemmaPipeline with a scheduler of {list(SCHEDULERS)}, "
            f"got {type(pipeline).__name__} with {kind.__name__}"
        )
    generator = settings.get("generator")
    seed = None
    if not multinomial:
        device = None if generator is None else generator.device
        seed = int(torch.randint(2**62, (), generator=generator, device=device))
    method, function = SCHEDULERS[kind.__name__]
    replacement = partial(function, scheduler, getattr(scheduler, method), seed, itertools.count())
    with _replaced(scheduler, method, replacement):
        output = pipeline(**settings)
    check_errors(pipeline.model.device)
    return output


@contextmanager
def _replaced(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """A context in which the method `name` of `owner` is `function`."""
    setattr(owner, name, function)
    try:
        yield
    finally:
        delattr(owner, name)


def _drawn(logits: Tensor, seed: int, step: int, position: Tensor, temperature: float = 1.0) -> RowStats:
    """Statistics of logits (B, C, V) with Gumbel-max samples; `position` broadcasts to (B, C)."""
    batch, length = logits.shape[:2]
    return row_stats(
        logits,
        temperature=temperature,
        seed=seed,
        sequence=torch.arange(batch, device=logits.device).repeat_interleave(length),
        position=position.to(torch.int64).expand(batch, length).flatten(),
        step=step,
    )


def _multinomial(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """(B, C) int64, drawn from softmax(logits) as transformers and diffusers draw."""
    probabilities = torch.softmax(logits, dim=-1, dtype=torch.float32).flatten(0, 1)
    return torch.multinomial(probabilities, num_samples=1, generator=generator).view(logits.shape[:2])


def _within_bound(stats: RowStats, entropy_bound: float) -> Tensor:
    """(B, C) bool: the lowest entropies whose preceding sum is within the bound."""
    batch, device = len(stats.entropy), stats.entropy.device
    bound = policies.make("entropy_bound", entropy_bound, batch=batch, device=device)
    return select(stats, torch.ones_like(stats.sample, dtype=torch.bool), bound)


def denoising_step(
    model: Any,
    seed: int | None,
    *,
    decoder_forward: Callable[..., Any],
    current_canvas: Tensor,
    argmax_canvas: Tensor,
    input_ids: Tensor,
    decoder_position_ids: Tensor,
    self_conditioning_logits: Tensor | None,
    mask_mapping: dict[str, Tensor],
    finished_denoising: Tensor,
    cur_step: int,
    sampler: Any,
    logits_processor: Any,
    diffusion_stopping_criteria: Any,
    **keywords: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The next canvas (B, C), the argmax (B, C), the logits (B, C, V) to condition on, and (B,) bool: whether
    each sequence has finished.
    """
    torch.compiler.cudagraph_mark_step_begin()
    raw = decoder_forward(
        decoder_input_ids=current_canvas,
        self_conditioning_logits=self_conditioning_logits,
        decoder_attention_mask=mask_mapping,
        decoder_position_ids=decoder_position_ids,
        **keywords,  # the cache among them, by whatever name
    ).logits
    # A tensor, as in transformers, so that the temperature is rounded to float32 at the same point.
    step = torch.tensor(cur_step, dtype=torch.int32, device=raw.device)
    logits = logits_processor(input_ids, raw, cur_step=step)  # (B, C, V)
    batch = len(current_canvas)
    if seed is None:
        stats = row_stats(logits)
        sample = _multinomial(logits)
    else:
        stats = _drawn(logits, seed, cur_step, decoder_position_ids)
        sample = stats.sample
    accepted = _within_bound(stats, sampler.entropy_bound)
    canvas = torch.where(accepted, sample, sampler.initialize_canvas(batch, raw.device))
    argmax, conditioning = stats.token, logits.to(model.model.decoder.embed_tokens.weight.dtype)
    if diffusion_stopping_criteria is not None:
        if self_conditioning_logits is not None and finished_denoising.any():
            done = finished_denoising[:, None]
            canvas = torch.where(done, current_canvas, canvas)
            argmax = torch.where(done, argmax_canvas, argmax)
            conditioning = torch.where(done[..., None], self_conditioning_logits, conditioning)
        finished_denoising |= _stops(diffusion_stopping_criteria, argmax, stats.entropy)
    return canvas, argmax, conditioning, finished_denoising


def _stops(criteria: Any, argmax: Tensor, entropy: Tensor) -> Tensor:
    """(B,) bool: the argmax (B, C) is as in the last steps, and the mean entropy is below the threshold."""
    history = criteria.argmax_canvas_history  # (steps, B, C), None as a canvas begins
    if history is None:
        history = argmax.new_full((criteria.stability_threshold, *argmax.shape), -1)
    stable = (history == argmax).all(-1).all(0)
    criteria.argmax_canvas_history = torch.cat((history, argmax[None]))[1:]
    return stable & (entropy.mean(-1) < criteria.confidence_threshold)


OUR_ARGUMENTS = [
    name
    for name, parameter in inspect.signature(denoising_step).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
]
"""The arguments that `denoising_step` uses by name; it passes on all others."""


# --- diffusers' schedulers ----------------------------------------------------------------------


def _entropy_bound_step(
    scheduler: Any,
    original: Callable[..., Any],
    seed: int | None,
    count: Iterator[int],
    model_output: Tensor,
    timestep: int | Tensor,
    sample: Tensor,
    *,
    entropy_bound: float | None = None,
    generator: torch.Generator | None = None,
    return_dict: bool = True,
) -> Any:
    """EntropyBoundScheduler.step: the lowest entropies within the bound keep their samples, the rest becomes
    noise.
    """
    config, steps = scheduler.config, scheduler.num_inference_steps
    temperature = config.t_min + (config.t_max - config.t_min) * ((steps - int(timestep)) / steps)
    logits = model_output / temperature  # (B, C, V)
    if seed is None:
        stats = row_stats(logits)
        drawn = _multinomial(logits, generator)
        # Only the logits of the drawn tokens are read again.
        sure = (logits.gather(-1, drawn[..., None])[..., 0].float() - stats.lse).exp()
    else:
        stats = _drawn(logits, seed, next(count), torch.arange(sample.shape[1], device=sample.device))
        drawn, sure = stats.sample, stats.confidence
    accepted = _within_bound(stats, float(config.entropy_bound if entropy_bound is None else entropy_bound))
    noise = torch.randint(0, logits.shape[-1], sample.shape, device=sample.device, generator=generator)
    output = torch.where(accepted, drawn, noise), accepted, drawn, sure, logits
    if not return_dict:
        return output
    module = importlib.import_module("diffusers.schedulers.scheduling_entropy_bound")
    return module.EntropyBoundSchedulerOutput(*output)


def _sample_from_logits(
    scheduler: Any,
    original: Callable[..., tuple[Tensor, Tensor]],
    seed: int | None,
    count: Iterator[int],
    logits: Tensor,
    *,
    temperature: float,
    generator: torch.Generator | None,
    **keywords: Any,
) -> tuple[Tensor, Tensor]:
    """(B, C) tokens and their probabilities, for schedulers that choose by these.

    Only BlockRefinementScheduler passes `keywords`: use_multinomial, top_k and top_p. Its probabilities are
    those at the temperature; DiscreteDDIMScheduler's are the model's.
    """
    if 0 <= temperature < COLDEST or not keywords.get("use_multinomial", True):
        stats = row_stats(logits)
        return stats.token, stats.confidence
    filtered = (keywords.get("top_k") or 0) > 0 or (keywords.get("top_p") or 1.0) < 1.0
    if seed is None or filtered or temperature < 0:
        return original(logits, temperature=temperature, generator=generator, **keywords)
    position = torch.arange(logits.shape[1], device=logits.device)
    stats = _drawn(logits, seed, next(count), position, temperature)
    return stats.sample, stats.sample_logprob.exp() if keywords else stats.confidence


SCHEDULERS: dict[str, tuple[str, Callable[..., Any]]] = {
    "EntropyBoundScheduler": ("step", _entropy_bound_step),
    "BlockRefinementScheduler": ("_sample_from_logits", _sample_from_logits),
    "DiscreteDDIMScheduler": ("_sample_from_logits", _sample_from_logits),
}
"""Schedulers of diffusers' DiffusionGemmaPipeline -> the method to replace, and its replacement."""
