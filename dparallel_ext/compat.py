"""The published decoders' functions: their signatures, their tokens and their count of passes.

From LLaDA's, Fast-dLLM's and dParallel's `generate.py` and Dream's `generation_utils.py`. `decode` does the
same with fewer passes where a cache is used: the published loops run a second pass for a block even if its
first has completed it, and so do these.

What differs: the mask token is never decoded, ties go to the lowest position and token, statistics are in
float32 (LLaDA's in float64, Dream's in the dtype of the logits), and at a temperature above 0 samples follow
the same distribution by Gumbel noise of our own, keyed by one number of torch's generator.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import policies
from .arguments import temperature_in_force, whole
from .decoding.batch import AHEAD
from .decoding.config import DecodeConfig
from .decoding.decode import start
from .decoding.schedule import Schedule, Window
from .decoding.sequence import SequenceState
from .decoding.settings import check_mask, drawn_seed
from .models import Model, for_decoding, own_precision, traits, unwrap
from .ops import row_stats, select
from .ops.inputs import check_sampling
from .rules import Decision, Rule, Where
from .types import RowStats

MASK_ID = 126336
"""Of LLaDA, which the published functions take by default."""


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
) -> tuple[Tensor, int]:
    """The whole sequence each pass. Returns tokens (B, P + gen_length) and the forward passes run.

    Args:
        threshold: with it, commit all with H <= threshold (`selector` "entropy", dParallel) or with
            p >= threshold (`selector` "confidence", Fast-dLLM), the best one in any case. Without it,
            the fixed schedule of `steps`.
        mask_id: default: the model's own where it is known, else LLaDA's, as published.
        remasking: "low_confidence", or "random", which ranks by random numbers from torch's generator.
        attention_mask: (B, P) bool or whole numbers, 0 where `prompt` is padded; padding stays where it is.
        cfg_scale: unsupervised classifier-free guidance (arXiv 2410.18514): above 0, each pass computes the
            sequence also with the prompt masked, and decodes by unconditional + (cfg_scale + 1)
            (conditional - unconditional).
        logits_eos_inf: never decode `eos_id` (LLaDA, appendix B.4).
        confidence_eos_eot_inf: take `eos_id` and `eot_id` out of the confidences, so that they are committed
            last (LLaDA, appendix B.4); as published, above temperature 0 `eot_id` alone.
        eos_id, eot_id: LLaDA's <|endoftext|> and <|eot_id|>.

    Raises:
        ValueError: where the published code asserts (block_length divides gen_length, the number of
            blocks divides steps), and as `dparallel_ext.decode` does.
    """
    if isinstance(steps, Tensor):
        raise ValueError("steps: expected a whole number, got a Tensor; give attention_mask by its name")
    if not 0 <= cfg_scale < float("inf"):
        raise ValueError(f"cfg_scale: expected a finite number >= 0, got {cfg_scale!r}")
    for name, token, read in (
        ("eos_id", eos_id, logits_eos_inf or confidence_eos_eot_inf),
        ("eot_id", eot_id, confidence_eos_eot_inf),
    ):
        whole(name, token, 0)
        ours = unwrap(model)
        if read and isinstance(ours, Model) and token >= ours.shape.rows:
            raise ValueError(f"{name}: expected an id below {ours.shape.rows}, got {token}")
    temperature = temperature_in_force(temperature)
    shared: dict[str, Any] = {
        "steps": steps,
        "gen_length": gen_length,
        "block_length": block_length,
        "temperature": temperature,
        "remasking": remasking,
        "mask_id": _mask_of(model, mask_id),
        "threshold": threshold,
        "selector": selector,
        "suppress": [eos_id] if logits_eos_inf else None,
    }
    last: list[int] = []
    if confidence_eos_eot_inf:
        if threshold is not None and selector != "confidence":
            raise ValueError(
                f"confidence_eos_eot_inf: {selector!r} is no rule of confidences, use selector='confidence'"
            )
        last = [eot_id] if temperature > 0 else [eos_id, eot_id]
    by_logits = cfg_scale > 0 or bool(last)
    if attention_mask is None:
        if by_logits:
            return _by_logits(model, prompt, cfg_scale=cfg_scale, last=last, **shared)
        return _generate("none", model=model, prompt=prompt, **shared)
    if attention_mask.shape != prompt.shape or prompt.ndim != 2:
        raise ValueError(
            f"attention_mask: expected the shape of prompt (B, P), got {tuple(attention_mask.shape)}"
        )
    kept = attention_mask.to(torch.bool)
    rows = [row[keep] for row, keep in zip(prompt, kept, strict=True)]
    if by_logits:  # one by one
        each = [_by_logits(model, row, cfg_scale=cfg_scale, last=last, **shared) for row in rows]
        found, forwards = [tokens[0] for tokens, _ in each], max((ran for _, ran in each), default=0)
    else:
        padded, forwards = _generate("none", model=model, prompt=rows, **shared)
        found = [tokens[: len(row) + gen_length] for tokens, row in zip(padded, rows, strict=True)]
    tokens = F.pad(prompt.to(torch.int64), (0, gen_length))
    tokens[F.pad(kept, (0, gen_length), value=True)] = torch.cat([tokens[:0, 0], *found])
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
) -> tuple[Tensor, int]:
    """One full pass per block, then from the block's start on, against the kept prefix. See `generate`."""
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
) -> tuple[Tensor, int]:
    """One full pass per block, then the block alone, between kept prefix and suffix. See `generate`."""
    return _generate("dual", **locals())


def _generate(
    cache: str,
    *,
    model: Any,
    prompt: Tensor | list[Tensor],
    steps: int,
    gen_length: int,
    block_length: int,
    temperature: float,
    remasking: str,
    mask_id: int | None,
    threshold: float | None,
    selector: str,
    suppress: list[int] | None = None,
) -> tuple[Tensor, int]:
    _check(steps, gen_length, block_length, remasking)
    if selector not in policies.SELECTORS:
        raise ValueError(f"selector: expected one of {list(policies.SELECTORS)}, got {selector!r}")
    if threshold is None:
        # The published fixed schedule ranks so.
        by_entropy = selector == "entropy" and cache in ("prefix", "dual")
        row: dict[str, Any] = {"steps": steps, "score": "entropy" if by_entropy else "confidence"}
    else:
        row = {"threshold": threshold, "selector": selector}
    config = DecodeConfig(
        gen_length=gen_length,
        block_length=block_length,
        cache=cache,
        temperature=temperature,
        suppress=suppress,
        mask_id=_mask_of(model, mask_id),
        rule=AtRandom() if remasking == "random" else None,
        **row,
    )
    with torch.inference_mode():
        rows = [prompt] if isinstance(prompt, Tensor) and prompt.ndim == 1 else list(prompt)
        batch = start(model, [ids.to(torch.int64) for ids in rows], config, schedule=_as_published)
        waiting: list[int] = []
        while batch.live:  # at the end of a block every sequence waits for the others
            waiting += batch.step(ahead=AHEAD)
            if not batch.live:
                batch.enter(waiting)
                waiting = []
    tokens = batch.tokens.clone()
    batch.keep()
    return tokens, batch.forwards


def _mask_of(model: Any, mask_id: int | None) -> int:
    """The mask that is given, else the model's own, else LLaDA's. Raises ValueError by name."""
    own = traits(model).mask_id
    return check_mask(model, (MASK_ID if own is None else own) if mask_id is None else mask_id)


def _as_published(schedule: Schedule) -> Schedule:
    """The schedule with the published loops' detours."""
    kind: Any = type(schedule)

    class Published(kind):
        def front_window(self, s: SequenceState) -> Window:
            """A pass over the whole sequence fills the prompt's masks, too."""
            found: Window = super().front_window(s)
            return found._replace(start=0) if self.full(s) else found

        def is_over(self, s: SequenceState) -> bool:
            """A block that its full pass has completed gets another pass."""
            return super().is_over(s) and not self.published_passes(s)

    made: Schedule = Published(**{f.name: getattr(schedule, f.name) for f in dataclasses.fields(schedule)})
    return made


class AtRandom(Rule):
    """The policy row with uniform random numbers of torch's generator for confidences."""

    recorded = False

    def decide(self, stats: RowStats, where: Where, state: tuple[Tensor, ...]) -> Decision:
        stats = stats._replace(confidence=torch.rand_like(stats.confidence))
        return Decision(where.by_policy(stats))


def _check(steps: int, gen_length: int, block_length: int, remasking: str) -> None:
    if remasking not in ("low_confidence", "random"):
        raise ValueError(f"remasking: expected 'low_confidence' or 'random', got {remasking!r}")
    if block_length < 1 or gen_length % block_length:
        raise ValueError(f"block_length: expected a divisor of gen_length {gen_length}, got {block_length}")
    blocks = gen_length // block_length
    if blocks and steps % blocks:
        raise ValueError(f"steps: expected a multiple of the {blocks} blocks, got {steps}")


def _by_logits(
    model: Any,
    prompt: Tensor,
    *,
    cfg_scale: float,
    last: list[int],
    steps: int,
    gen_length: int,
    block_length: int,
    temperature: float,
    remasking: str,
    mask_id: int,
    threshold: float | None,
    selector: str,
    suppress: list[int] | None,
) -> tuple[Tensor, int]:
    """LLaDA's loop where it changes the logits between the model and the rule: (B, P + gen_length), passes.

    last: ids that are left out of the confidences.
    """
    _check(steps, gen_length, block_length, remasking)
    rows = prompt[None] if prompt.ndim == 1 else prompt
    batch, start_of = len(rows), rows.shape[1]
    blocks = gen_length // block_length
    share, rest = divmod(block_length, steps // blocks) if blocks else (0, 0)
    seed = drawn_seed(temperature)
    forwards = 0
    with torch.no_grad():
        x = F.pad(rows.to(torch.int64), (0, gen_length), value=mask_id)  # (B, L)
        given = x != mask_id
        for end in range(start_of + block_length, x.shape[1] + 1, block_length):
            turn = 0
            while bool((x[:, end - block_length : end] == mask_id).any()):
                logits = _logits(model, x)  # (B, L, V)
                if cfg_scale > 0:
                    without = _logits(model, x.masked_fill(given, mask_id))
                    logits = without + (cfg_scale + 1) * (logits - without)
                forwards += 1
                eligible = x == mask_id
                eligible[:, end:] = False
                b, column = eligible.nonzero(as_tuple=True)
                read = logits[b, column]  # (N, V)
                stats = row_stats(
                    read,
                    mask_id=mask_id,
                    suppress=suppress,
                    temperature=temperature,
                    seed=seed,
                    sequence=b,
                    position=column,
                    step=forwards,
                )
                confidence = stats.confidence
                if remasking == "random":
                    confidence = torch.rand_like(confidence)
                elif last:
                    lse = row_stats(read, suppress=[*(suppress or []), *last], mask_id=mask_id).lse
                    chosen = read.gather(1, stats.sample[:, None])[:, 0].float()
                    out = torch.isin(stats.sample, torch.tensor(last, device=x.device))
                    confidence = (chosen - lse).exp().masked_fill(out, 0.0)
                if threshold is None:
                    rule = policies.make("quota", max(1, share + (turn < rest)), batch=batch)
                else:
                    rule = policies.make(selector, threshold, batch=batch)
                spread = functools.partial(_spread, shape=x.shape, at=(b, column))
                by_column = stats._replace(confidence=confidence).map(spread)
                x = torch.where(select(by_column, eligible, rule), by_column.sample, x)
                turn += 1
    return x, forwards


def _spread(values: Tensor, shape: Sequence[int], at: tuple[Tensor, Tensor]) -> Tensor:
    """Of the given shape, zero elsewhere."""
    return values.new_zeros(shape).index_put_(at, values)


def _logits(model: Any, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """(B, L, V), those of column p for the token of column p; of padding, 0."""
    if attention_mask is not None and not bool(attention_mask.all()):
        logits: Tensor | None = None
        for b, kept in enumerate(attention_mask):
            row = _logits(model, x[b, kept][None])[0]
            if logits is None:
                logits = row.new_zeros((*x.shape, row.shape[-1]))
            logits[b, kept] = row
        assert logits is not None
        return logits
    called = for_decoding(model)
    with own_precision(called, x.device):
        output = called(x)
    if not hasattr(output, "logits"):
        raise ValueError(
            f"model: expected its call to return an object with .logits, got {type(output).__name__}"
        )
    logits = output.logits
    return torch.cat((logits[:, :1], logits[:, :-1]), 1) if traits(model).shift else logits


# --- Dream ----------------------------------------------------------------------------------------

ALGORITHMS = ("origin", "maskgit_plus", "topk_margin", "entropy")
"""Dream's: random positions; those of the largest probability, margin p1 - p2, or the least entropy."""
_UNREAD = {"bos_token_id", "eos_token_id", "pad_token_id", "generation_kwargs", "transformers_version"}
"""Options of Dream's generation config that its loop does not read."""


@dataclass
class DreamOutput:
    """What `diffusion_generate` returns with `return_dict_in_generate`."""

    sequences: Tensor
    """(B, L) int64"""
    history: tuple[Tensor, ...] | None = field(default=None, repr=False)
    """With `output_history`, the sequences after each step."""


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
    """Dream's `model.diffusion_generate`: its schedule, over the whole response at once, of `steps` passes.

    In step i, of times t_i from 1 down to `eps` in equal steps, a share 1 - t_(i+1) / t_i of the masks is
    committed, in the last all. Unlike in `decode`, positions are ranked by the distribution that tokens are
    drawn from: temperature, then top_p, then top_k, also at temperature 0 (ties are cut at exactly top_k).

    Args:
        inputs: (B, P) int64. Masks in it are filled too.
        generation_config: an object whose attributes of these names stand where an argument is None;
            beyond it the published defaults: steps 512, eps 1e-3, alg "origin", temperature 0, and 20 new
            tokens.
        attention_mask: (B, P), 0 where `inputs` is padded.
        max_length: instead of max_new_tokens, of prompt and response together.
        alg: one of `ALGORITHMS`.
        alg_temp: above 0, positions are drawn with softmax(ranks / alg_temp), by torch's generator.
        generation_tokens_hook_func, generation_logits_hook_func: x = f(step, x, logits), at first with None
            for step and logits, and logits = f(step, x, logits); logits (B, L, V) as shifted.

    Returns:
        (B, L) int64, or a DreamOutput with return_dict_in_generate.

    Raises:
        ValueError: naming the argument that does not fit, options of other loops (threshold, block_length,
            dual_cache: see `decode`) included.
    """

    def option(name: str, given: Any, default: Any) -> Any:
        if given is None:
            given = getattr(generation_config, name, None)
        return default if given is None else given

    if left := {name: value for name, value in others.items() if name not in _UNREAD and value is not None}:
        name, value = next(iter(left.items()))
        raise ValueError(f"{name}: not an option of Dream's diffusion_generate (see `decode`), got {value!r}")
    if not isinstance(inputs, Tensor) or inputs.ndim != 2 or inputs.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"inputs: expected int64 (B, P), got {getattr(inputs, 'shape', type(inputs).__name__)}"
        )
    alg = option("alg", alg, "origin")
    if alg not in ALGORITHMS:
        raise ValueError(f"alg: expected one of {ALGORITHMS}, got {alg!r}; for thresholds see `decode`")
    steps = option("steps", steps, 512)
    whole("steps", steps, 1)
    eps = option("eps", eps, 1e-3)
    if not 0 <= eps < 1:
        raise ValueError(f"eps: expected a number from 0 and below 1, got {eps!r}")
    alg_temp = option("alg_temp", alg_temp, 0.0)
    if not 0 <= alg_temp < float("inf"):
        raise ValueError(f"alg_temp: expected a finite number >= 0, got {alg_temp!r}")
    temperature = option("temperature", temperature, 0.0)
    top_p, top_k = option("top_p", top_p, None), option("top_k", top_k, None)
    temperature = check_sampling(temperature, top_p, top_k)[0]
    mask = option("mask_token_id", mask_token_id, traits(model).mask_id)
    if mask is None:
        raise ValueError("mask_token_id: the model's config has none, so give one")
    whole("mask_token_id", mask, 0)
    copies = option("num_return_sequences", num_return_sequences, 1)
    whole("num_return_sequences", copies, 1)
    x = inputs.to(torch.int64).repeat_interleave(copies, 0)  # (B, P)
    new = option("max_new_tokens", max_new_tokens, None)
    if new is None:
        total = option("max_length", max_length, 20)
        whole("max_length", total, 1)
        new = total - x.shape[1] if max_length is not None or total != 20 else 20
        if new <= 0:
            raise ValueError(f"max_length: expected more than the {x.shape[1]} tokens of inputs, got {total}")
    whole("max_new_tokens", new, 0)
    padding = None
    if attention_mask is not None:
        if attention_mask.shape != inputs.shape:
            raise ValueError(
                f"attention_mask: expected the shape of inputs {tuple(inputs.shape)}, "
                f"got {tuple(attention_mask.shape)}"
            )
        padding = attention_mask.to(x.device, torch.bool).repeat_interleave(copies, 0)
        padding = F.pad(padding, (0, new), value=True)
    look_at_tokens = generation_tokens_hook_func or (lambda step, x, logits: x)
    look_at_logits = generation_logits_hook_func or (lambda step, x, logits: logits)
    seed = drawn_seed(temperature)
    history = []
    with torch.no_grad():
        times = torch.linspace(1, eps, steps + 1, device=x.device)
        x = look_at_tokens(None, F.pad(x, (0, new), value=mask), None)
        for i in range(steps):
            masked = x == mask if padding is None else (x == mask) & padding
            logits = look_at_logits(i, x, _logits(model, x, padding))
            share = 1 - times[i + 1] / times[i] if i < steps - 1 else torch.ones((), device=x.device)
            if alg == "origin":
                chosen = masked.clone()
                chosen[masked] = torch.rand(int(masked.sum()), device=x.device) < share
                _, sample = _ranked(logits, chosen, mask, temperature, top_p, top_k, alg, seed, i)
            else:
                rank, sample = _ranked(logits, masked, mask, temperature, top_p, top_k, alg, seed, i)
                chosen = _best(rank, masked, share, alg_temp)
            x = look_at_tokens(i, torch.where(chosen, sample, x), logits)
            if option("output_history", output_history, False):
                history.append(x.clone())
    if not option("return_dict_in_generate", return_dict_in_generate, False):
        return x
    return DreamOutput(x, tuple(history) if option("output_history", output_history, False) else None)


def _ranked(
    logits: Tensor,
    rows: Tensor,
    mask: int,
    temperature: float,
    top_p: float | None,
    top_k: int | None,
    alg: str,
    seed: int,
    step: int,
) -> tuple[Tensor, Tensor]:
    """Ranks (B, L) float32, -inf where `rows` (B, L) are not, and the tokens drawn (B, L)."""
    b, column = rows.nonzero(as_tuple=True)
    z = logits[b, column].float()  # (N, V)
    if temperature > 0:
        z = z / temperature
    if (top_p is not None and top_p < 1) or top_k:
        z[:, mask] = -torch.inf  # it could be all that is left
        z = _nucleus(z, top_p, top_k)
    stats = row_stats(
        z,
        mask_id=mask,
        temperature=float(temperature > 0),
        seed=seed,
        sequence=b,
        position=column,
        step=step,
    )
    # Where one token is left H is 0, as published: the kernels count each other id at e^-87, 1e-31 in all.
    entropy = stats.entropy.masked_fill(stats.entropy < 1e-30, 0.0)
    rank = {"topk_margin": stats.margin, "entropy": -entropy}.get(alg, stats.confidence)
    ranks = rank.new_full(rows.shape, -torch.inf).index_put_((b, column), rank)
    return ranks, stats.sample.new_zeros(rows.shape).index_put_((b, column), stats.sample)


def _nucleus(z: Tensor, top_p: float | None, top_k: int | None) -> Tensor:
    """z (N, V) with -inf for what top_p and top_k leave out; ties go to the lowest id."""
    ordered, order = z.sort(dim=1, descending=True, stable=True)
    p = ordered.softmax(1)
    out = p.cumsum(1) - p > (1.0 if top_p is None else top_p)
    if top_k:
        out[:, top_k:] = True
    out[:, 0] = False
    return z.masked_fill(torch.zeros_like(out).scatter(1, order, out), -torch.inf)


def _best(ranks: Tensor, masked: Tensor, share: Tensor, alg_temp: float) -> Tensor:
    """bool (B, L): a share of the masked positions, the best ranks first or drawn by them."""
    counts = masked.sum(1)
    if bool((counts != counts[:1]).any()):
        raise ValueError(f"inputs: expected as many masks in each sequence, got {counts.tolist()}")
    many = int(counts.sum() / max(1, len(counts)) * share)  # as published: in float32, cut off
    if many == 0:
        return torch.zeros_like(masked)
    if alg_temp > 0:
        at = torch.multinomial((ranks / alg_temp).softmax(1), many)
    else:
        at = ranks.argsort(dim=1, descending=True, stable=True)[:, :many]
    return torch.zeros_like(masked).scatter(1, at, True)
