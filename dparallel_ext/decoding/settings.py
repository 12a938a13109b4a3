"""Checks a `DecodeConfig` against a model, and makes the settings of sequences from it."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arguments import check_ids, shown, temperature_in_force, whole
from ..automaton import Automaton
from ..cache import WORD
from ..models import Model, check_diffusion, traits
from ..ops.inputs import check_sampling
from ..rules import Leading, Rule
from ..rules.constrained import Constrained
from .config import ACTIVE_BLOCK_FIELDS, PENALTIES, DecodeConfig, decider
from .schedule import Schedule, is_block_causal, make
from .sequence_settings import NO_PENALTIES, Penalties, SequenceSettings


class ResolvedConfig(NamedTuple):
    """The cache mode, schedule and mask of a config, with the model's defaults filled in."""

    cache: str
    schedule: Schedule
    mask_id: int

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of a `DecodeConfig` that are set here."""
        of_schedule = ("block_length", "sub_block_length", *ACTIVE_BLOCK_FIELDS)
        return {"cache": self.cache, "mask_id": self.mask_id} | {
            name: getattr(self.schedule, name) for name in of_schedule
        }


def check_model(config: DecodeConfig, model: Any, cache: str) -> ResolvedConfig:
    """The config's cache mode, blocks and mask, by default the model's.

    cache: the mode if neither config nor model has one. Raises ValueError naming the field that does not fit
    the model, and for an autoregressive model.
    """
    check_diffusion(model, decoding=True)
    model_traits, refresh = traits(model), config.refresh
    own_cache = model_traits.own_cache
    cache = config.cache or own_cache or cache
    block_causal = is_block_causal(model_traits, cache)
    if own_cache is not None and cache != own_cache:
        raise ValueError(
            f'cache: expected "{own_cache}", by which {type(model).__name__} fills masks, got {cache!r}'
        )
    block_length = config.block_length or model_traits.default_block_length
    if cache != "none" and not isinstance(model, Model):
        raise ValueError(
            f"cache: {cache!r} needs one of dparallel_ext.models (models.load, or models.wrap "
            f"for a loaded Hugging Face model), got {type(model).__name__}"
        )
    sub_block_length = config.sub_block_length or model_traits.sub_block_length or block_length
    if block_length % sub_block_length:
        raise ValueError(
            f"sub_block_length: expected a divisor of block_length {block_length}, got {sub_block_length}"
        )
    if own_cache == "window":
        if block_length > WORD:
            raise ValueError(f"block_length: expected a window of at most {WORD} masks, got {block_length}")
        if sub_block_length < block_length:
            raise ValueError(
                f"sub_block_length: a window is filled as a whole, so expected None, got {sub_block_length}"
            )
    fitting = ("none", "block") if block_causal else ("none", "prefix", "dual")
    sub_block_cache = block_causal and cache == "dual" and sub_block_length < block_length
    if own_cache is None and cache not in fitting and not sub_block_cache:
        if block_causal:
            fit = '"block" or "none" for a block-causal model, or "dual" where it is decoded by sub-blocks'
        else:
            fit = f'"none", "prefix" or "dual", since {type(model).__name__} is not block-causal'
        raise ValueError(f"cache: expected {fit}, got {cache!r}")
    if block_causal and block_length != model_traits.block_length and not isinstance(model, Model):
        raise ValueError(
            f"block_length: expected {model_traits.block_length}, by which this model attends, got "
            f"{block_length}; only models of dparallel_ext.models can attend by other blocks"
        )
    unit = model.routed_together if isinstance(model, Model) else None
    by_parts = {"sub_block_length": sub_block_length} if cache == "dual" else {}
    for name, length in {"block_length": block_length, **by_parts}.items():
        if unit is not None and length % unit:
            raise ValueError(
                f"{name}: expected a multiple of {unit}, since as many tokens of {type(model).__name__} "
                f"choose among the same experts, got {length}"
            )
    if refresh is not None and cache != "dual":
        raise ValueError(f'refresh: belongs to cache "dual", got cache={cache!r}')
    mask_id = mask_of(model, config.mask_id)
    active = {name: getattr(config, name) for name in ACTIVE_BLOCK_FIELDS}
    schedule = make(cache, model_traits, block_length, sub_block_length, refresh, **active)
    if config.active_blocks > 1 and schedule.in_parts:
        raise ValueError(
            f"active_blocks: expected 1, got {config.active_blocks}: several need blocks that are filled as "
            f"a whole, and {schedule.in_parts}"
        )
    return ResolvedConfig(cache, schedule, mask_id)


def make_settings(config: DecodeConfig, model: Any, cache: str, size: int) -> list[SequenceSettings]:
    """The settings of `size` sequences, for which the config has one value or one each.

    cache: the mode in force; "none" where an autoregressive model decodes from left to right. Raises
    ValueError if the config has values for another number of sequences, and for fields that do not fit the
    model or each other.
    """
    rule, steps, rows, selectors = decider(config, size, cache)
    model_traits, automaton = traits(model), config.automaton
    _make_strict(rows, selectors, model_traits.strict)
    if model_traits.window is not None and (config.infill or automaton is not None):
        raise ValueError(
            f"{'infill' if config.infill else 'automaton'}: does not go with {type(model).__name__}, whose "
            "masks are a window behind the text"
        )
    if model_traits.leading:
        rule = _leading(model, rule)
    left_to_right = model_traits.causal and cache != "block"
    if automaton is not None:
        mask_id = model_traits.mask_id if config.mask_id is None else config.mask_id
        never = [*(config.suppress or ()), *(() if mask_id is None or left_to_right else (mask_id,))]
        automaton = automaton.without(never, vocabulary(model))
        if not left_to_right:
            rule = _constrained(config, rule, automaton)
    if config.infill and model_traits.onward and is_block_causal(model_traits, cache):
        raise ValueError(
            f"infill: does not go with {type(model).__name__}, which sees given tokens from behind, got True"
        )
    if rule is not None and rule.in_order and config.infill:
        name = "a form (automaton)" if automaton is not None else type(rule).__name__
        raise ValueError(f"infill: does not go with {name}, which decides in order, got True")
    penalties = _penalties(config, model, left_to_right)
    temperature, top_p, top_k = check_sampling(config.temperature, config.top_p, config.top_k)
    seed = drawn_seed(temperature) if config.seed is None else config.seed
    if isinstance(seed, tuple) and len(seed) != size:
        raise ValueError(f"seed: expected an integer or int64 ({size},), got torch.int64 ({len(seed)},)")
    # A sequence's own seed is its whole key; a seed for all is combined with the place in the batch.
    keys = [(s, 0) for s in seed] if isinstance(seed, tuple) else [(seed, b) for b in range(size)]
    suppress = _suppressed(config, model)
    return [
        SequenceSettings(
            policy=tuple(numbers),
            steps=steps,
            temperature=temperature,
            suppress=suppress,
            key=key,
            eos_ids=config.eos_ids,
            stop=tuple(map(tuple, config.stop)),
            top_p=top_p,
            top_k=top_k,
            rule=rule,
            automaton=automaton,
            penalties=penalties,
            record=config.record or config.logprobs,
            top_logprobs=config.top_logprobs,
            scheduled=not selectors and rule is None and config.policy is None,
        )
        for numbers, key in zip(rows.tolist(), keys, strict=True)
    ]


def _penalties(config: DecodeConfig, model: Any, left_to_right: bool) -> Penalties:
    """The penalties in force. Raises ValueError for one that would change a diffusion model's text."""
    repetition, presence, frequency = (getattr(config, name) for name in PENALTIES)
    if repetition is None:
        repetition = model.repetition_penalty if left_to_right else 1.0
    penalties = Penalties(repetition, presence, frequency)
    for name, value, neutral in zip(PENALTIES, penalties, NO_PENALTIES, strict=True):
        if value != neutral and not left_to_right:
            name_of = type(model).__name__
            raise ValueError(f"{name}: belongs to an autoregressive model, not to {name_of}, got {value}")
    return penalties


def _make_strict(rows: Tensor, selectors: Sequence[str], strict: Collection[str]) -> None:
    """Move the thresholds of policy rows (B, 5) to the next float32, in place, where the selector is one of
    `strict`, whose published decoder compares strictly."""
    for name, towards in (("entropy", -math.inf), ("confidence", math.inf)):
        if name in strict and name in selectors:
            here = torch.tensor([each == name for each in selectors], dtype=torch.bool, device="cpu")
            beyond = torch.nextafter(rows[:, 1], torch.tensor(towards, device="cpu"))
            rows[:, 1] = torch.where(here, beyond, rows[:, 1])


def _suppressed(config: DecodeConfig, model: Any) -> Tensor | None:
    """The ids (n,) int64 that are never decoded. Raises ValueError for an id that the model does not have."""
    if config.suppress is None:
        return None
    ids = torch.tensor(config.suppress, dtype=torch.int64, device="cpu")
    # The ops check the ids of other models, whose rows of logits may be longer than `vocabulary` says.
    if isinstance(model, Model):
        check_ids("suppress", [ids], model.shape.embedding_size)
    return ids


def _constrained(config: DecodeConfig, rule: Rule | None, automaton: Automaton) -> Rule:
    """The rule of an automaton. Raises ValueError for a rule or a temperature that does not go with it."""
    if rule is not None:
        raise ValueError(f"rule: expected a policy row or none beside a form (automaton), got {shown(rule)}")
    if temperature_in_force(config.temperature) > 0:
        raise ValueError(
            "temperature: expected 0 beside a form (automaton), since a diffusion model's masks are "
            f"filled in the most probable way, got {config.temperature}"
        )
    return Constrained(automaton)


def _leading(model: Any, rule: Rule | None) -> Leading:
    """The rule of a model whose masks are committed from left to right. Raises ValueError for another."""
    if rule is None or isinstance(rule, Leading):
        return Leading()
    raise ValueError(
        f"rule: {type(rule).__name__} does not go with {type(model).__name__}, which commits from left to "
        f"right what a policy row chooses, so expected a policy row, as 'confidence:0.9', got {shown(rule)}"
    )


def drawn_seed(temperature: float) -> int:
    """A seed from torch's CPU generator; 0, with nothing drawn from it, where nothing is sampled."""
    return int(torch.randint(2**62, (), device="cpu")) if temperature > 0 else 0


def check_settings(model: Any, settings: Sequence[SequenceSettings], resolved: ResolvedConfig) -> None:
    """Raise ValueError for an EOS, a stop sequence or a rule's token that the model never decodes, a rule
    that does not fit the model, and a fixed schedule where blocks are filled part by part.
    """
    schedule = resolved.schedule
    for eos_ids, stop in {(setting.eos_ids, setting.stop) for setting in settings}:
        check_ends(eos_ids, stop, vocabulary(model), resolved.mask_id)
    for rule in {setting.rule for setting in settings if setting.rule is not None}:
        if rule.edits and schedule.prefill_predicts_next:
            raise ValueError(
                f"rule: {type(rule).__name__} edits, which does not go with {type(model).__name__}: its "
                "blocks are begun by the block before"
            )
        if schedule.known_first and rule.reads != "masked":
            raise ValueError(
                f"rule: {type(rule).__name__} reads more than the masks of its window, which does not go "
                f"with {type(model).__name__}: {schedule.in_parts}"
            )
        check_decodable("rule", rule.tokens, vocabulary(model), resolved.mask_id)
        if (rule.hidden or rule.soft) and not isinstance(model, Model):
            does = "reads hidden states" if rule.hidden else "makes soft tokens"
            raise ValueError(
                f"rule: {type(rule).__name__} {does}, which needs one of dparallel_ext.models "
                "(models.load, or models.wrap for a loaded Hugging Face model), "
                f"got {type(model).__name__}"
            )
        rule.check(model, schedule.block_length)
    steps = next((setting.steps for setting in settings if setting.steps is not None), None)
    if steps is not None and schedule.in_parts:
        raise ValueError(
            f"steps: the fixed schedule is for whole blocks, and {schedule.in_parts}, so expected "
            f"None, got {steps}"
        )


def check_ends(
    eos_ids: Sequence[int], stop: Sequence[Sequence[int]], known: int | None, mask_id: int | None
) -> None:
    """Raise ValueError for an EOS or a stop sequence that cannot come.

    known: the number of the model's ids. mask_id: the mask token, None for a model without.
    """
    check_decodable("eos_id", eos_ids, known, mask_id)
    check_decodable("stop", [token for sequence in stop for token in sequence], known, mask_id)


def check_decodable(name: str, ids: Sequence[int], known: int | None, mask_id: int | None) -> None:
    """Raise ValueError naming the argument for an id that the model never decodes: the model does not have
    it, or it is the mask token."""
    for token in ids:
        if known is not None and token >= known:
            raise ValueError(f"{name}: expected one of the model's {known} token ids, got {token}")
        if token == mask_id:
            raise ValueError(f"{name}: expected a token that can be decoded, got the mask token {token}")


def vocabulary(model: Any) -> int | None:
    """The number of ids that the model's embedding has; None where the model does not tell."""
    if isinstance(model, Model):
        return model.shape.embedding_size
    try:
        size = model.get_input_embeddings().num_embeddings
    except (AttributeError, NotImplementedError):
        return None
    return size if isinstance(size, int) else None


def mask_of(model: Any, mask_id: int | None) -> int:
    """`mask_id`, by default the model's own. Raises ValueError if there is none, or as `check_mask`."""
    mask = traits(model).mask_id if mask_id is None else mask_id
    if mask is None:
        raise ValueError(
            "mask_id: the model's config has no mask_token_id, and it states none as its attribute traits "
            "(dparallel_ext.models.Traits), so give one"
        )
    return check_mask(model, mask)


def check_mask(model: Any, mask_id: int, name: str = "mask_id") -> int:
    """`mask_id`, the argument `name`, as an int. Raises ValueError where the model has no such token."""
    mask, known = whole(name, mask_id, 0), vocabulary(model)
    if known is not None and mask >= known:
        raise ValueError(f"{name}: expected one of the model's {known} token ids, got {mask}")
    return mask
