"""`generate` of LLaDA, Fast-dLLM and dParallel."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import policies
from ..arguments import number, one_of, temperature_in_force, whole
from ..decoding.config import DecodeConfig
from ..decoding.decode import start_batch
from ..decoding.schedule import Schedule, Window
from ..decoding.sequence import SequenceState
from ..decoding.settings import check_mask, drawn_seed
from ..models import Model, check_diffusion, traits, unwrap
from ..ops import select
from ..ops.row_stats import read_rows
from ..rules import Decision, Rule, Where
from ..types import RowStats
from .inputs import check_prompts, prompts_of, visible
from .logits import logits_of, report_rows

MASK_ID = 126336
"""LLaDA's mask token, the default of the published functions."""


def generate(
    model: Any,
    prompt: Tensor,
    steps: int = 128,
    gen_length: int = 128,
    block_length: int = 128,
    temperature: float = 0.0,
    remasking: str = "low_confidence",
    mask_id: int | None = None,
    threshold: float | None = None,
    selector: str = "entropy",
    *,
    attention_mask: Tensor | None = None,
    cfg_scale: float = 0.0,
    logits_eos_inf: bool = False,
    confidence_eos_eot_inf: bool = False,
    eos_id: int = 126081,
    eot_id: int = 126348,
    factor: float | None = None,
) -> tuple[Tensor, int]:
    """Decode with passes over the whole sequence (LLaDA's, Fast-dLLM's, dParallel's `generate`).

    Args:
        prompt: (B, P) int64.
        threshold: commit all positions with H <= threshold (`selector` "entropy", dParallel) or with
            p >= threshold (`selector` "confidence", Fast-dLLM), and the best one in any case. None: the fixed
            schedule of `steps`, which ranks by p, and in the functions with a cache by `selector`: by the
            entropy in dParallel's, by p in Fast-dLLM's.
        mask_id: default: the model's own if known, else LLaDA's, as published.
        remasking: "low_confidence", or "random", which ranks by random numbers from torch's generator.
        attention_mask: (B, P) bool or whole numbers, 0 where `prompt` is padded; padding stays in its place.
        cfg_scale: unsupervised classifier-free guidance (arXiv 2410.18514): above 0, each pass computes the
            sequence a second time with the prompt masked, and decodes by unconditional + (cfg_scale + 1)
            (conditional - unconditional).
        logits_eos_inf: never decode `eos_id` (LLaDA, appendix B.4).
        confidence_eos_eot_inf: take `eos_id` and `eot_id` out of the confidences, so that they are committed
            last (LLaDA, appendix B.4); as published, above temperature 0 `eot_id` alone.
        eos_id, eot_id: LLaDA's <|endoftext|> and <|eot_id|>.
        factor: in place of `threshold` and `selector`, commit the n surest positions, n the largest with
            p_(n) >= 1 - factor / (n + 1), and, as Fast-dLLM's loop does, all of them where only the least
            sure one fails.

    Returns:
        Tokens (B, P + gen_length) int64, and the number of forward passes.

    Raises:
        ValueError: where the published code asserts (block_length divides gen_length, the number of
            blocks divides steps), and as `dparallel_ext.decode` does.
    """
    if isinstance(steps, Tensor):
        raise ValueError("steps: expected a whole number, got a Tensor; give attention_mask by its name")
    prompt, cfg_scale = prompts_of("prompt", prompt, model), number("cfg_scale", cfg_scale)
    for name, token, read in (
        ("eos_id", eos_id, logits_eos_inf or confidence_eos_eot_inf),
        ("eot_id", eot_id, confidence_eos_eot_inf),
    ):
        whole(name, token, 0)
        ours = unwrap(model)
        if read and isinstance(ours, Model) and token >= ours.shape.embedding_size:
            raise ValueError(f"{name}: expected an id below {ours.shape.embedding_size}, got {token}")
    temperature = temperature_in_force(temperature)
    shared: dict[str, Any] = {
        "steps": steps,
        "gen_length": gen_length,
        "block_length": block_length,
        "temperature": temperature,
        "remasking": remasking,
        "mask_id": mask_id,
        "threshold": threshold,
        "selector": selector,
        "factor": factor,
        "suppress": [eos_id] if logits_eos_inf else None,
    }
    last: list[int] = []
    if confidence_eos_eot_inf:
        if threshold is not None and factor is None and selector != "confidence":
            raise ValueError(
                f"confidence_eos_eot_inf: {selector!r} is no rule of confidences, use selector='confidence'"
            )
        last = [eot_id] if temperature > 0 else [eos_id, eot_id]
    by_logits = cfg_scale > 0 or bool(last)
    if attention_mask is None:
        if by_logits:
            return _by_logits(model, prompt, cfg_scale=cfg_scale, last=last, **shared)
        return _generate("none", model=model, prompt=prompt, **shared)
    is_visible = visible(attention_mask, "prompt", prompt)
    rows = [row[columns] for row, columns in zip(prompt, is_visible, strict=True)]
    if by_logits:  # one sequence after another
        each = [_by_logits(model, row, cfg_scale=cfg_scale, last=last, **shared) for row in rows]
        responses, forwards = [tokens[0] for tokens, _ in each], max((ran for _, ran in each), default=0)
    else:
        padded, forwards = _generate("none", model=model, prompt=rows, **shared)
        responses = [tokens[: len(row) + gen_length] for tokens, row in zip(padded, rows, strict=True)]
    tokens = F.pad(prompt, (0, gen_length))
    tokens[F.pad(is_visible, (0, gen_length), value=True)] = torch.cat([tokens[:0, 0], *responses])
    return tokens, forwards


def generate_with_prefix_cache(
    model: Any,
    prompt: Tensor,
    steps: int = 128,
    gen_length: int = 128,
    block_length: int = 128,
    temperature: float = 0.0,
    remasking: str = "low_confidence",
    mask_id: int | None = None,
    threshold: float | None = None,
    selector: str = "entropy",
    *,
    factor: float | None = None,
) -> tuple[Tensor, int]:
    """`generate` with one full pass per block, then passes from the block's start on, which read the prefix's
    keys and values of the full pass (Fast-dLLM)."""
    prompt = prompts_of("prompt", prompt, model)
    return _generate("prefix", **locals())


def generate_with_dual_cache(
    model: Any,
    prompt: Tensor,
    steps: int = 128,
    gen_length: int = 128,
    block_length: int = 128,
    temperature: float = 0.0,
    remasking: str = "low_confidence",
    mask_id: int | None = None,
    threshold: float | None = None,
    selector: str = "entropy",
    *,
    factor: float | None = None,
) -> tuple[Tensor, int]:
    """`generate` with one full pass per block, then passes over the block alone, which read the prefix's and
    suffix's keys and values of the full pass (Fast-dLLM)."""
    prompt = prompts_of("prompt", prompt, model)
    return _generate("dual", **locals())


class _Options(NamedTuple):
    """The published functions' arguments beside model and prompt, checked."""

    steps: int
    gen_length: int
    block_length: int
    temperature: float
    remasking: str
    mask_id: int
    threshold: float | None
    selector: str
    factor: float | None = None
    suppress: list[int] | None = None

    @classmethod
    def of(cls, model: Any, **given: Any) -> _Options:
        """The options `given`, by their names. Raises ValueError naming the argument that does not fit, and
        for an autoregressive model."""
        check_diffusion(model)
        least = {"gen_length": 0, "block_length": 1, "steps": 1}
        options = cls(**{**given, **{name: whole(name, given[name], bound) for name, bound in least.items()}})
        steps, gen_length, block_length = options[:3]
        one_of("selector", options.selector, policies.SELECTORS)
        one_of("remasking", options.remasking, ("low_confidence", "random"))
        if gen_length % block_length:
            raise ValueError(
                f"block_length: expected a divisor of gen_length {gen_length}, got {block_length}"
            )
        blocks = gen_length // block_length
        if blocks and steps % blocks:
            raise ValueError(f"steps: expected a multiple of the {blocks} blocks, got {steps}")
        if options.factor is not None:
            factor = number("factor", options.factor)
            options = options._replace(factor=factor, threshold=factor, selector="factor")
        masks = options.mask_id, traits(model).mask_id, MASK_ID
        mask = next(mask for mask in masks if mask is not None)
        return options._replace(mask_id=check_mask(model, mask))


def _generate(cache: str, *, model: Any, prompt: Tensor | list[Tensor], **given: Any) -> tuple[Tensor, int]:
    options = _Options.of(model, **given)
    if options.threshold is None:
        # The published fixed schedule ranks by these scores.
        by_entropy = options.selector == "entropy" and cache in ("prefix", "dual")
        row: dict[str, Any] = {"steps": options.steps, "score": "entropy" if by_entropy else "confidence"}
    else:
        row = {"threshold": options.threshold, "selector": options.selector}
    rule = AsPublished(at_random=options.remasking == "random", to_the_last=options.factor is not None)
    config = DecodeConfig(
        gen_length=options.gen_length,
        block_length=options.block_length,
        cache=cache,
        temperature=options.temperature,
        suppress=options.suppress,
        mask_id=options.mask_id,
        rule=None if rule == AsPublished() else rule,
        **row,
    )
    with torch.inference_mode():
        batch = start_batch(model, list(prompt), config, schedule=functools.partial(_as_published, options))
        waiting: list[int] = []
        while batch.live:  # at the end of a block every sequence waits for the others
            waiting += batch.step()
            if not batch.live:
                batch.enter(waiting)
                waiting = []
    tokens = batch.tokens.clone()
    batch.keep()
    if isinstance(prompt, Tensor) and not len(prompt):
        tokens = prompt.new_empty((0, prompt.shape[1] + options.gen_length))
    return tokens, batch.forwards


def _as_published(options: _Options, schedule: Schedule) -> Schedule:
    """The schedule with the passes of the published loops that change nothing."""
    kind: Any = type(schedule)

    class Published(kind):
        def front_window(self, s: SequenceState) -> Window:
            """The window of the front block; a pass over the whole sequence fills the prompt's masks, too."""
            window: Window = super().front_window(s)
            return window._replace(start=0) if self.full(s) else window

        def is_over(self, s: SequenceState) -> bool:
            """Whether the front block is complete; one that its full pass has completed gets another pass,
            which a factor, without a mask to count, does not have."""
            return super().is_over(s) and (options.factor is not None or not self.published_passes(s))

    published: Schedule = Published(
        **{f.name: getattr(schedule, f.name) for f in dataclasses.fields(schedule)}
    )
    return published


@dataclasses.dataclass(frozen=True)
class AsPublished(Rule):
    """The policy row's choice, by random scores, or with the last mask that it leaves."""

    at_random: bool = False
    to_the_last: bool = False

    recorded = False

    def decide(self, stats: RowStats, where: Where, state: tuple[Tensor, ...]) -> Decision:
        chosen = where.by_policy(_at_random(stats) if self.at_random else stats)
        return Decision(_to_the_last(chosen, where.masked) if self.to_the_last else chosen)


def _to_the_last(chosen: Tensor, eligible: Tensor) -> Tensor:
    """`chosen` (W, C), and where it leaves a single one of the eligible positions, that one."""
    left = eligible & ~chosen
    return chosen | left & (left.sum(1, keepdim=True) == 1)


def _at_random(stats: RowStats) -> RowStats:
    """The statistics with uniform random numbers of torch's generator in place of each score."""
    score = torch.rand_like(stats.confidence)
    return stats._replace(confidence=score, margin=score, entropy=score)


def _by_logits(
    model: Any, prompt: Tensor, *, cfg_scale: float, last: list[int], **given: Any
) -> tuple[Tensor, int]:
    """LLaDA's loop for options that change the logits between model and rule: tokens (B, P + gen_length) and
    the number of passes.

    last: ids that are left out of the confidences.
    """
    options = _Options.of(model, **given)
    steps, gen_length, block_length, mask_id = *options[:3], options.mask_id
    rows = torch.atleast_2d(prompt)
    check_prompts("prompt", rows, model)
    batch, start_of = len(rows), rows.shape[1]
    blocks = gen_length // block_length
    share, rest = divmod(block_length, steps // blocks) if blocks else (0, 0)
    seed = drawn_seed(options.temperature)
    forwards = 0
    with torch.no_grad():
        x = F.pad(rows, (0, gen_length), value=mask_id)  # (B, L)
        known = x != mask_id
        for end in range(start_of + block_length, x.shape[1] + 1, block_length):
            step = 0
            while bool((x[:, end - block_length : end] == mask_id).any()):
                logits = logits_of(model, x)  # (B, L, V)
                if cfg_scale > 0:
                    without = logits_of(model, x.masked_fill(known, mask_id))
                    logits = without + (cfg_scale + 1) * (logits - without)
                forwards += 1
                eligible = x == mask_id
                eligible[:, end:] = False
                b, column = eligible.nonzero(as_tuple=True)
                read = logits[b, column]  # (N, V)
                stats, error = read_rows(
                    read,
                    mask_id=mask_id,
                    suppress=options.suppress,
                    temperature=options.temperature,
                    seed=seed,
                    sequence=b,
                    position=column,
                    step=forwards,
                )
                report_rows(error, b, column, x.shape[1])
                if options.remasking == "random":
                    stats = _at_random(stats)
                elif last:
                    # Rows that leave nothing but these ids are no error: their lse is -inf.
                    lse = read_rows(read, suppress=[*(options.suppress or []), *last], mask_id=mask_id)[0].lse
                    chosen = read.gather(1, stats.sample[:, None])[:, 0].float()
                    out = torch.isin(stats.sample, torch.tensor(last, device=x.device))
                    stats = stats._replace(confidence=(chosen - lse).exp().masked_fill(out, 0.0))
                if options.threshold is None:
                    rule = policies.make("quota", max(1, share + (step < rest)), batch=batch)
                else:
                    rule = policies.make(options.selector, options.threshold, batch=batch)
                spread = functools.partial(_spread, shape=x.shape, at=(b, column))
                by_column = stats.map(spread)
                chosen = select(by_column, eligible, rule)
                if options.factor is not None:
                    chosen = _to_the_last(chosen, eligible)
                x = torch.where(chosen, by_column.sample, x)
                step += 1
    return x, forwards


def _spread(values: Tensor, shape: Sequence[int], at: tuple[Tensor, Tensor]) -> Tensor:
    """`values` (N,) at the places `at` of a tensor of this shape, zero elsewhere."""
    return values.new_zeros(shape).index_put_(at, values)
