"""From a config and a model to the settings of sequences: `DecodeConfig` checked against the model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..arguments import whole
from ..models import Model, Traits, check_diffusion, traits
from ..ops.inputs import check_sampling
from .config import ACTIVE, DecodeConfig, decided
from .schedule import Schedule, make
from .sequence import Settings


class OfModel(NamedTuple):
    """What of a config hangs on the model, as it is in force."""

    cache: str
    schedule: Schedule
    mask_id: int

    @property
    def fields(self) -> dict[str, Any]:
        """Of a config, that say the same."""
        of_schedule = ("block_length", "sub_block_length", *ACTIVE)
        return {"cache": self.cache, "mask_id": self.mask_id} | {
            name: getattr(self.schedule, name) for name in of_schedule
        }


def check_model(config: DecodeConfig, model: Any, cache: str) -> OfModel:
    """What the config says of cache, blocks and mask, by default the model's.

    cache: where the config has none. Raises ValueError naming the field that does not fit the model, and for
    an autoregressive model.
    """
    check_diffusion(model)
    found, cache, refresh = traits(model), config.cache or cache, config.refresh
    causal = found.block_length is not None
    block_length = config.block_length or found.block_length or 32
    if cache != "none" and not isinstance(model, Model):
        raise ValueError(
            f"cache: {cache!r} needs one of dparallel_ext.models (models.load, or models.wrap "
            f"for a loaded Hugging Face model), got {type(model).__name__}"
        )
    part = config.sub_block_length or found.sub_block_length or block_length
    if block_length % part:
        raise ValueError(f"sub_block_length: expected a divisor of block_length {block_length}, got {part}")
    within = causal and cache == "dual" and part < block_length
    if causal != (cache == "block") and cache != "none" and not within:
        if causal:
            fit = '"block" or "none" for a block-causal model, or "dual" where it is decoded by sub-blocks'
        else:
            fit = f'"none", "prefix" or "dual", since {type(model).__name__} is not block-causal'
        raise ValueError(f"cache: expected {fit}, got {cache!r}")
    if causal and block_length != found.block_length and not isinstance(model, Model):
        raise ValueError(
            f"block_length: the model attends by blocks of {found.block_length}, whatever is asked of it, "
            f"got {block_length}; one of dparallel_ext.models attends by what is given"
        )
    if refresh is not None and cache != "dual":
        raise ValueError(f'refresh: belongs to cache "dual", got cache={cache!r}')
    mask = found.mask_id if config.mask_id is None else config.mask_id
    if mask is None:
        raise ValueError("mask_id: the model's config has no mask_token_id, so give one")
    active = {name: getattr(config, name) for name in ACTIVE}
    if config.active_blocks > 1 and (part < block_length or (found.shift and causal)):
        raise ValueError(
            "active_blocks: several are for blocks that are filled as a whole, and "
            + (f"this one is filled {part} by {part}" if part < block_length else "this model hands over")
            + f", so expected 1, got {config.active_blocks}"
        )
    schedule = make(cache, found, block_length, part, refresh, **active)
    return OfModel(cache, schedule, check_mask(model, mask))


def make_settings(config: DecodeConfig, found: Traits, cache: str, size: int) -> list[Settings]:
    """The settings of `size` sequences, of which the config has one value or one each.

    cache: the one in force. Raises ValueError where the config has values for another number of sequences.
    """
    rule, steps, rows, selectors = decided(config, size, cache)
    for name, towards in (("entropy", -math.inf), ("confidence", math.inf)):
        if name in found.strict and name in selectors:
            here = torch.tensor([each == name for each in selectors], dtype=torch.bool)
            beyond = torch.nextafter(rows[:, 1], torch.tensor(towards))
            rows[:, 1] = torch.where(here, beyond, rows[:, 1])
    temperature, top_p, top_k = check_sampling(config.temperature, config.top_p, config.top_k)
    seed = drawn_seed(temperature) if config.seed is None else config.seed
    if isinstance(seed, tuple) and len(seed) != size:
        raise ValueError(f"seed: expected an integer or int64 ({size},), got torch.int64 ({len(seed)},)")
    # A seed of its own is a sequence's whole key; one for all goes with the place in the batch.
    keys = [(s, 0) for s in seed] if isinstance(seed, tuple) else [(seed, b) for b in range(size)]
    suppress = None if config.suppress is None else torch.tensor(config.suppress, dtype=torch.int64)
    return [
        Settings(
            policy=tuple(numbers),
            steps=steps,
            temperature=temperature,
            suppress=suppress,
            key=key,
            eos_id=config.end_id,
            stop=tuple(map(tuple, config.stop)),
            top_p=top_p,
            top_k=top_k,
            rule=rule,
            record=config.record or config.logprobs,
            scheduled=not selectors and rule is None and config.policy is None,
        )
        for numbers, key in zip(rows.tolist(), keys, strict=True)
    ]


def drawn_seed(temperature: float) -> int:
    """A seed from torch's generator on the CPU, which is left as it is where nothing is sampled."""
    return int(torch.randint(2**62, (), device="cpu")) if temperature > 0 else 0


def check_settings(model: Any, settings: Sequence[Settings], of_model: OfModel) -> None:
    """Raise ValueError for an EOS that the model does not have, and for a fixed schedule where a pass may
    fill a part of the block alone.
    """
    found, known, schedule = traits(model), vocabulary(model), of_model.schedule
    for own in settings:
        if known is not None and own.eos_id is not None and own.eos_id >= known:
            raise ValueError(f"eos_id: expected one of the model's {known} token ids, got {own.eos_id}")
        if own.rule is not None and own.rule.edits and found.shift and found.block_length is not None:
            raise ValueError(
                f"rule: {type(own.rule).__name__} edits, which does not go with {type(model).__name__}: its "
                "blocks are begun by the block before"
            )
    for rule in {own.rule for own in settings if own.rule is not None}:
        rule.check(model, schedule.block_length)
    steps = next((own.steps for own in settings if own.steps is not None), None)
    in_parts = schedule.sub_block_length < schedule.block_length or (schedule.shift and schedule.causal)
    if steps is not None and in_parts:
        raise ValueError(
            "steps: the fixed schedule is for whole blocks; this one is filled part by part "
            f"(sub_block_length {schedule.sub_block_length}), so expected None, got {steps}"
        )


def vocabulary(model: Any) -> int | None:
    """Ids that the model's embedding knows; None where it cannot be asked."""
    if isinstance(model, Model):
        return model.shape.embedding_size
    try:
        size = model.get_input_embeddings().num_embeddings
    except (AttributeError, NotImplementedError):
        return None
    return size if isinstance(size, int) else None


def check_mask(model: Any, mask_id: int) -> int:
    """`mask_id` as an int. Raises ValueError where the model has no such token."""
    mask, known = whole("mask_id", mask_id, 0), vocabulary(model)
    if known is not None and mask >= known:
        raise ValueError(f"mask_id: expected one of the model's {known} token ids, got {mask}")
    return mask
