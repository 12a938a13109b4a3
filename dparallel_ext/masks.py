"""The states that certainty forcing trains on (dParallel, arXiv 2509.26488)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import INTEGERS, check_tensor, described, instance, number, whole


class MaskedPair(NamedTuple):
    """A state and its complement: each token of the active block is masked in one of the two."""

    input_ids: Tensor
    """(B, T) int64: the model's input."""
    active: Tensor
    """(B, T) bool: the masked tokens of the active block, over which the loss is taken."""
    reverse_input_ids: Tensor
    """(B, T) int64: the input with the complementary mask in the block."""
    reverse_active: Tensor
    """(B, T) bool: the masked tokens of the active block in `reverse_input_ids`."""
    block: Tensor
    """(B,) int64: the active block's number, -1 for a row without a response."""


def semi_autoregressive_masks(
    input_ids: Tensor,
    prompt_lengths: Tensor,
    *,
    mask_id: int,
    block_length: int | None = 32,
    aligned: bool = False,
    mask_ratio: float | Tensor = 0.5,
    lengths: Tensor | None = None,
    eps: float = 1e-3,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> MaskedPair:
    """Mask each row for training: its prompt and earlier blocks stay, one random block is partly masked,
    later blocks are masked (dParallel, arXiv 2509.26488).

    The block is drawn uniformly from the blocks of the row's response, the last of which may be short; each
    of its tokens is masked with probability (1 - eps) mask_ratio + eps. Every row draws its own block and
    mask. (The published loop writes each row's mask over all rows, so it is right at batch size 1 alone.)

    As published, EOS that pads responses to a common length is part of the response and learned. To leave
    padding out, give `lengths`.

    Args:
        input_ids: (B, T) int64, prompts and responses.
        prompt_lengths: (B,) int64: the column where each row's response begins.
        mask_id: the mask token.
        block_length: tokens of a block, from the end of the prompt on; None: the whole response is one block
            (Dream as published).
        aligned: whether blocks count from column 0 instead, as those of most block-causal models do
            (`models.Traits.aligned_blocks`): the first block of a response may be the rest of a block that
            begins in the prompt.
        mask_ratio: a number or (B,), in [0, 1].
        lengths: (B,) int64: the column where each row's response ends; default T. Columns beyond it stay.
        eps: see above, in [0, 1].
        generator: makes the random numbers, on any device; default: torch's. With one generator for each row,
            a row's block and mask depend neither on the other rows nor on padding.

    Returns:
        MaskedPair.

    Raises:
        ValueError: naming the argument that does not fit.
        TypeError: for input_ids that are no tensor.
    """
    check_tensor("input_ids", input_ids)
    if input_ids.ndim != 2 or input_ids.dtype != torch.int64:
        raise ValueError(f"input_ids: expected int64 (B, T), got {described(input_ids)}")
    batch, length = input_ids.shape
    device = input_ids.device
    start = _lengths("prompt_lengths", prompt_lengths, batch, length, device)
    end = start.new_full((batch,), length)
    if lengths is not None:
        end = _lengths("lengths", lengths, batch, length, device)
    mask_id = whole("mask_id", mask_id, 0)
    if block_length is not None:
        block_length = whole("block_length", block_length, 1)
    instance("aligned", aligned, bool)
    eps = number("eps", eps, 0, 1)
    try:
        ratio = torch.as_tensor(mask_ratio, dtype=torch.float32, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"mask_ratio: expected a number or ({batch},), got {mask_ratio!r}") from error
    if ratio.shape not in ((), (batch,)) or not bool(((ratio >= 0) & (ratio <= 1)).all()):
        raise ValueError(f"mask_ratio: expected numbers in [0, 1], one or ({batch},), got {mask_ratio}")

    if isinstance(generator, Sequence):
        if len(generator) != batch:
            raise ValueError(
                f"generator: expected one, or one for each of {batch} rows, got {len(generator)}"
            )
        for each in generator:
            instance("generator", each, torch.Generator)
        rows = [torch.rand(1 + length, generator=g, device=g.device).to(device) for g in generator]
        draws = torch.stack(rows) if rows else torch.zeros(0, 1 + length, device=device)
    else:
        if generator is not None:
            instance("generator", generator, torch.Generator)
        on = device if generator is None else generator.device
        draws = torch.rand(batch, 1 + length, generator=generator, device=on).to(device)

    size = block_length or max(1, length)
    origin = start - start % size if aligned else start  # (B,): where the response's first block begins
    blocks = torch.where(start < end, (end - origin + size - 1) // size, 0)
    block = (draws[:, 0] * blocks).long().minimum(blocks - 1)  # -1 where there is none
    column = torch.arange(length, device=device)
    first = (origin + block * size)[:, None]
    inside = (start[:, None] <= column) & (column < end[:, None]) & (block >= 0)[:, None]  # (B, T)
    later = inside & (column >= first + size)
    within = inside & (column >= first) & ~later
    probability = ((1 - eps) * ratio + eps).expand(batch)[:, None]
    active = within & (draws[:, 1:] < probability)
    reverse = within & ~active
    return MaskedPair(
        input_ids.masked_fill(active | later, mask_id),
        active,
        input_ids.masked_fill(reverse | later, mask_id),
        reverse,
        block,
    )


def _lengths(name: str, value: Tensor, batch: int, length: int, device: torch.device) -> Tensor:
    if not isinstance(value, Tensor) or value.shape != (batch,) or value.dtype not in INTEGERS:
        raise ValueError(f"{name}: expected int64 ({batch},), got {described(value)}")
    if batch and (int(value.min()) < 0 or int(value.max()) > length):
        raise ValueError(f"{name}: expected lengths in [0, {length}], got {value.tolist()[:8]}")
    return value.to(device, torch.int64)
