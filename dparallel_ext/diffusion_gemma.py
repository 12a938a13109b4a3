"""DiffusionGemma as transformers ships it, its sampler and stopping rule on one read of the logits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import policies
from .models import for_decoding, unwrap
from .ops import check_errors, row_stats, select


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
        settings: those of `model.generate`: max_new_tokens, max_denoising_steps, t_min, t_max, ...

    Returns:
        What `model.generate` returns.

    Raises:
        ValueError: where the model has no denoising step to replace, and (on a GPU when the call ends) where
            its logits hold NaN or leave no token to choose.
    """
    model, base = for_decoding(model), unwrap(model)
    if not hasattr(base, "_denoising_step"):
        raise ValueError(
            "model: expected transformers' DiffusionGemmaForBlockDiffusion (its _denoising_step is what is "
            f"replaced), got {type(model).__name__}"
        )
    seed = None if multinomial else int(torch.randint(2**62, ()))
    base._denoising_step = partial(_denoising_step, base, seed)
    try:
        output = model.generate(input_ids, **settings)
    finally:
        del base._denoising_step
    check_errors(input_ids.device)
    return output


def _denoising_step(
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
    past_key_values: Any,
    finished_denoising: Tensor,
    cur_step: int,
    sampler: Any,
    logits_processor: Any,
    diffusion_stopping_criteria: Any,
    **more: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The next canvas (B, C), the argmax, the logits (B, C, V) to condition on, and which have finished."""
    torch.compiler.cudagraph_mark_step_begin()
    raw = decoder_forward(
        decoder_input_ids=current_canvas,
        self_conditioning_logits=self_conditioning_logits,
        decoder_attention_mask=mask_mapping,
        past_key_values=past_key_values,
        decoder_position_ids=decoder_position_ids,
        **more,
    ).logits
    # A tensor, as in transformers: so the temperature is rounded to float32 in the same place.
    step = torch.tensor(cur_step, dtype=torch.int32, device=raw.device)
    logits = logits_processor(input_ids, raw, cur_step=step)  # (B, C, V)
    batch, length = current_canvas.shape
    if seed is None:
        stats = row_stats(logits)
        probabilities = torch.softmax(logits, dim=-1, dtype=torch.float32).flatten(0, 1)
        sample = torch.multinomial(probabilities, num_samples=1).view(batch, length)
    else:
        stats = row_stats(
            logits,
            temperature=1.0,
            seed=seed,
            sequence=torch.arange(batch, device=raw.device).repeat_interleave(length),
            position=decoder_position_ids.to(torch.int64).expand(batch, length).flatten(),
            step=cur_step,
        )
        sample = stats.sample
    bound = policies.make("entropy_bound", sampler.entropy_bound, batch=batch, device=raw.device)
    accepted = select(stats, torch.ones_like(sample, dtype=torch.bool), bound)
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
    """(B,) bool: the argmax (B, C) is that of the last steps, and the mean entropy is below the threshold."""
    history = criteria.argmax_canvas_history  # (steps, B, C), None as a canvas begins
    if history is None:
        history = argmax.new_full((criteria.stability_threshold, *argmax.shape), -1)
    stable = (history == argmax).all(-1).all(0)
    criteria.argmax_canvas_history = torch.cat((history, argmax[None]))[1:]
    return stable & (entropy.mean(-1) < criteria.confidence_threshold)
