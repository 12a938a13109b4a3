"""`diffusion_generate` of Dream."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arguments import INTEGERS, described, function, number, shown, whole
from ..decoding.settings import check_mask, drawn_seed
from ..models import check_diffusion, for_decoding, traits
from ..ops.inputs import check_sampling
from ..ops.row_stats import read_rows
from .inputs import check_prompts, prompts_of, visible
from .logits import logits_of, report_rows

ALGORITHMS = ("origin", "maskgit_plus", "topk_margin", "entropy")
"""Dream's: positions at random; or by the largest probability, the largest margin p1 - p2, the least
entropy."""
_UNREAD = {"bos_token_id", "eos_token_id", "pad_token_id", "generation_kwargs", "transformers_version"}
"""Options of Dream's generation config that its loop does not read."""


@dataclass
class DreamOutput:
    """The output of `diffusion_generate` with `return_dict_in_generate`."""

    sequences: Tensor
    """(B, L) int64: prompts and responses."""
    history: tuple[Tensor, ...] | None = field(default=None, repr=False)
    """With `output_history`, the sequences (B, L) int64 after each step."""


def diffusion_generate(
    model: Any,
    inputs: Tensor,
    generation_config: Any = None,
    *,
    attention_mask: Tensor | None = None,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
    steps: int | None = None,
    eps: float | None = None,
    alg: str | None = None,
    alg_temp: float | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    num_return_sequences: int | None = None,
    output_history: bool | None = None,
    return_dict_in_generate: bool | None = None,
    mask_token_id: int | None = None,
    generation_tokens_hook_func: Callable[[int | None, Tensor, Tensor | None], Tensor] | None = None,
    generation_logits_hook_func: Callable[[int, Tensor, Tensor], Tensor] | None = None,
    **others: Any,
) -> Tensor | DreamOutput:
    """Dream's `model.diffusion_generate`: a schedule of `steps` passes over the whole response at once.

    The times t_i go from 1 down to `eps` in equal steps. Step i commits the share 1 - t_(i+1) / t_i of the
    masks, the last step all. Unlike in `decode`, positions are ranked by the distribution that tokens are
    drawn from: temperature, then top_p, then top_k, also at temperature 0 (ties are cut at exactly top_k).

    Args:
        inputs: (B, P) int64. Masks in it are filled too.
        generation_config: an object whose attributes replace arguments that are None. Without them, the
            published defaults: steps 512, eps 1e-3, alg "origin", temperature 0, and 20 new tokens.
        attention_mask: (B, P), 0 where `inputs` is padded.
        max_length: tokens of prompt and response together, in place of max_new_tokens.
        alg: one of `ALGORITHMS`.
        alg_temp: above 0, positions are drawn with softmax(ranks / alg_temp), by torch's generator.
        generation_tokens_hook_func: x = f(step, x, logits), called first with step and logits None.
        generation_logits_hook_func: logits = f(step, x, logits), with shifted logits (B, L, V).

    Returns:
        (B, L) int64, or a DreamOutput with return_dict_in_generate.

    Raises:
        ValueError: naming the argument that does not fit; options of other loops (threshold, block_length,
            dual_cache: see `decode`) are such arguments.
    """

    if left := {name: value for name, value in others.items() if name not in _UNREAD and value is not None}:
        name, value = next(iter(left.items()))
        raise ValueError(f"{name}: not an option of Dream's diffusion_generate (see `decode`), got {value!r}")
    inputs = prompts_of("inputs", inputs, model, (2,))
    options = _read_options(
        model,
        inputs.shape[1],
        generation_config,
        max_new_tokens=max_new_tokens,
        max_length=max_length,
        steps=steps,
        eps=eps,
        alg=alg,
        alg_temp=alg_temp,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        num_return_sequences=num_return_sequences,
        output_history=output_history,
        return_dict_in_generate=return_dict_in_generate,
        mask_token_id=mask_token_id,
    )
    mask, steps, copies = options.mask, options.steps, options.copies
    x = inputs.repeat_interleave(copies, 0)  # (B, P)
    padding = None
    if attention_mask is not None:
        is_visible = visible(attention_mask, "inputs", inputs)
        check_prompts("inputs", inputs[is_visible], model)
        padding = is_visible.repeat_interleave(copies, 0)
        padding = F.pad(padding, (0, options.new), value=True)
    else:
        check_prompts("inputs", inputs, model)
    look_at_tokens = _hook("generation_tokens_hook_func", generation_tokens_hook_func, of_tokens=True)
    look_at_logits = _hook("generation_logits_hook_func", generation_logits_hook_func, of_tokens=False)
    seed = drawn_seed(options.temperature)
    history = []
    with torch.no_grad():
        times = torch.linspace(1, options.eps, steps + 1, device=x.device)
        x = look_at_tokens(None, F.pad(x, (0, options.new), value=mask), None)
        for i in range(steps):
            masked = x == mask if padding is None else (x == mask) & padding
            logits = look_at_logits(i, x, logits_of(model, x, padding))
            share = 1 - times[i + 1] / times[i] if i < steps - 1 else torch.ones((), device=x.device)
            if options.alg == "origin":
                chosen = masked.clone()
                chosen[masked] = torch.rand(int(masked.sum()), device=x.device) < share
                _, sample = _ranked(logits, chosen, options, seed, i)
            else:
                rank, sample = _ranked(logits, masked, options, seed, i)
                chosen = _best(rank, masked, share, options.alg_temp)
            x = look_at_tokens(i, torch.where(chosen, sample, x), logits)
            if options.output_history:
                history.append(x.clone())
    if not options.return_dict_in_generate:
        return x
    return DreamOutput(x, tuple(history) if options.output_history else None)


def _hook(name: str, hook: Any, *, of_tokens: bool) -> Callable[..., Tensor]:
    """The hook, of x (B, L) or of logits (B, L, V); a call raises ValueError naming the argument where it
    returns another shape or kind. None stands for a hook that changes nothing."""
    if hook is None:
        return lambda step, x, logits: x if of_tokens else logits
    function(name, hook)

    def call(step: int | None, x: Tensor, logits: Tensor | None) -> Tensor:
        argument, result = x if of_tokens else logits, hook(step, x, logits)
        assert argument is not None
        fits = isinstance(result, Tensor) and result.shape == argument.shape
        if not fits or not (result.dtype in INTEGERS if of_tokens else result.is_floating_point()):
            got = described(result) if isinstance(result, Tensor) else shown(result)
            raise ValueError(
                f"{name}: expected it to return {argument.dtype} {tuple(argument.shape)} as it was given, "
                f"got {got}"
            )
        return result.to(torch.int64) if of_tokens else result

    return call


class _Options(NamedTuple):
    alg: str
    steps: int
    eps: float
    alg_temp: float
    temperature: float
    top_p: float | None
    top_k: int | None
    mask: int
    copies: int
    """Responses to each prompt."""
    new: int
    """Tokens of a response."""
    output_history: bool
    return_dict_in_generate: bool


def _read_options(model: Any, length: int, generation_config: Any, **arguments: Any) -> _Options:
    """`diffusion_generate`'s arguments, else the attributes of the config, else the published defaults.

    length: tokens of the prompts.
    """
    if generation_config is not None and not any(hasattr(generation_config, name) for name in arguments):
        keywords = "; give its items as keywords" if isinstance(generation_config, Mapping) else ""
        raise ValueError(
            "generation_config: expected an object with attributes such as steps, got "
            f"{type(generation_config).__name__}{keywords}"
        )

    def option(name: str, default: Any) -> Any:
        value = arguments[name]
        if value is None:
            value = getattr(generation_config, name, None)
        return default if value is None else value

    alg = option("alg", "origin")
    if not isinstance(alg, str) or alg not in ALGORITHMS:
        raise ValueError(f"alg: expected one of {ALGORITHMS}, got {shown(alg)}; for thresholds see `decode`")
    steps = whole("steps", option("steps", 512), 1)
    eps = number("eps", option("eps", 1e-3))
    if eps >= 1:
        raise ValueError(f"eps: expected a number from 0 and below 1, got {eps!r}")
    alg_temp = number("alg_temp", option("alg_temp", 0.0))
    top_p, top_k = option("top_p", None), option("top_k", None)
    temperature = check_sampling(option("temperature", 0.0), top_p, top_k)[0]
    check_diffusion(model)
    mask = option("mask_token_id", traits(model).mask_id)
    if mask is None:
        raise ValueError("mask_token_id: the model's config has none, so give one")
    mask = check_mask(for_decoding(model), mask, "mask_token_id")
    copies = whole("num_return_sequences", option("num_return_sequences", 1), 1)
    new = option("max_new_tokens", None)
    if new is None:
        total = whole("max_length", option("max_length", 20), 1)
        new = total - length if arguments["max_length"] is not None or total != 20 else 20
        if new <= 0:
            raise ValueError(f"max_length: expected more than the {length} tokens of inputs, got {total}")
    new = whole("max_new_tokens", new, 0)
    history, as_dict = option("output_history", False), option("return_dict_in_generate", False)
    return _Options(
        *(alg, steps, eps, alg_temp, temperature, top_p, top_k, mask, copies, new), history, as_dict
    )


def _ranked(logits: Tensor, rows: Tensor, options: _Options, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Ranks (B, L) float32 and tokens drawn (B, L) int64, at `rows` (B, L) bool; elsewhere -inf and 0."""
    b, column = rows.nonzero(as_tuple=True)
    z = logits[b, column].float()  # (N, V)
    if options.temperature > 0:
        z = z / options.temperature
    top_p, top_k = options.top_p, options.top_k
    if (top_p is not None and top_p < 1) or top_k:
        z = _nucleus(z, top_p, top_k, options.mask)
    stats, error = read_rows(
        z,
        mask_id=options.mask,
        temperature=float(options.temperature > 0),
        seed=seed,
        sequence=b,
        position=column,
        step=step,
    )
    report_rows(error, b, column, rows.shape[1])
    # With one id left, H is 0, as published: the kernels count each other id as e^-87, 1e-31 in all.
    entropy = stats.entropy.masked_fill(stats.entropy < 1e-30, 0.0)
    if options.alg == "topk_margin":
        # The mask token is a rival of the likeliest, as published; `stats.margin` compares admissible ids.
        mask = z[:, options.mask].clamp(max=torch.finfo(z.dtype).max)
        over_mask = (stats.top1 - stats.lse).exp() - (mask - stats.lse).exp()
        rank = torch.minimum(stats.margin, over_mask)
    else:
        rank = -entropy if options.alg == "entropy" else stats.confidence
    ranks = rank.new_full(rows.shape, -torch.inf).index_put_((b, column), rank)
    return ranks, stats.sample.new_zeros(rows.shape).index_put_((b, column), stats.sample)


def _nucleus(z: Tensor, top_p: float | None, top_k: int | None, mask: int) -> Tensor:
    """z (N, V) with -inf for the ids that top_p and top_k leave out; ties go to the lowest id. The
    likeliest id stays, and if that is the mask token, which is never decoded, the next one too."""
    ordered, order = z.sort(dim=1, descending=True, stable=True)
    p = ordered.softmax(1)
    out = p.cumsum(1) - p > (1.0 if top_p is None else top_p)
    if top_k:
        out[:, top_k:] = True
    out[:, 0] = False
    out[:, :2] &= order[:, :1] != mask
    return z.masked_fill(torch.zeros_like(out).scatter(1, order, out), -torch.inf)


def _best(ranks: Tensor, masked: Tensor, share: Tensor, alg_temp: float) -> Tensor:
    """(B, L) bool: a share of the masked positions, by the best ranks, or drawn by ranks if alg_temp > 0."""
    counts = masked.sum(1)
    if bool((counts != counts[:1]).any()):
        raise ValueError(f"inputs: expected as many masks in each sequence, got {counts.tolist()}")
    many = int(counts.sum() / max(1, len(counts)) * share)  # as published: in float32, truncated
    if many == 0:
        return torch.zeros_like(masked)
    if alg_temp > 0:
        # What torch.multinomial draws without replacement, the largest p / Exp(1), of logarithms: a small
        # alg_temp leaves most p no float32, and multinomial then draws positions without a mask.
        scaled = (ranks.double() - ranks.amax(1, keepdim=True)) / alg_temp
        noise = torch.empty_like(ranks).exponential_().double().log()
        ranks = (scaled - noise).clamp(min=torch.finfo(torch.float64).min).where(masked, -torch.inf)
    at = ranks.argsort(dim=1, descending=True, stable=True)[:, :many]
    return torch.zeros_like(masked).scatter(1, at, True)
