"""The published decoders' functions: their signatures, their tokens and their count of passes.

From dParallel's and Fast-dLLM's `generate.py`. `decode` does the same with fewer passes where a cache is
used: the published loops run a second pass for a block even if its first has completed it, and so do these.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .batch import Batch
from .decode import make_settings, run, start
from .models import traits
from .ops import select
from .passes import Policy
from .types import RowStats


def generate(
    model: Any,
    prompt: Tensor,
    steps: int = 128,
    gen_length: int = 128,
    block_length: int = 128,
    temperature: float = 0.0,
    remasking: str = "low_confidence",
    mask_id: int = 126336,
    threshold: float | None = None,
    selector: str = "entropy",
) -> tuple[Tensor, int]:
    """The whole sequence each pass. Returns tokens (B, P + gen_length) and the forward passes run.

    Args:
        threshold: with it, commit all with H <= threshold (`selector` "entropy", dParallel) or with
            p >= threshold (`selector` "confidence", Fast-dLLM), the best one in any case. Without it,
            the fixed schedule of `steps`.
        remasking: "low_confidence", or "random", which ranks by random numbers from torch's generator.

    Raises:
        ValueError: where the published code asserts (block_length divides gen_length, the number of
            blocks divides steps), and as `dparallel_ext.decode` does.
    """
    return _generate("none", **locals())


def generate_with_prefix_cache(
    model: Any,
    prompt: Tensor,
    steps: int = 128,
    gen_length: int = 128,
    block_length: int = 128,
    temperature: float = 0.0,
    remasking: str = "low_confidence",
    mask_id: int = 126336,
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
    mask_id: int = 126336,
    threshold: float | None = None,
    selector: str = "entropy",
) -> tuple[Tensor, int]:
    """One full pass per block, then the block alone, between kept prefix and suffix. See `generate`."""
    return _generate("dual", **locals())


def _generate(
    cache: str,
    *,
    model: Any,
    prompt: Tensor,
    steps: int,
    gen_length: int,
    block_length: int,
    temperature: float,
    remasking: str,
    mask_id: int,
    threshold: float | None,
    selector: str,
) -> tuple[Tensor, int]:
    if remasking not in ("low_confidence", "random"):
        raise ValueError(f"remasking: expected 'low_confidence' or 'random', got {remasking!r}")
    if block_length < 1 or gen_length % block_length:
        raise ValueError(f"block_length: expected a divisor of gen_length {gen_length}, got {block_length}")
    blocks = gen_length // block_length
    if blocks and steps % blocks:
        raise ValueError(f"steps: expected a multiple of the {blocks} blocks, got {steps}")
    with torch.inference_mode():
        rows = prompt[None] if prompt.ndim == 1 else prompt
        # The published noise comes from torch's generator, so that is what seeds ours.
        seed = int(torch.randint(2**62, ())) if temperature > 0 else 0
        settings = make_settings(
            traits(model),
            cache,
            len(rows),
            steps=steps if threshold is None else None,
            threshold=threshold,
            selector=selector,
            temperature=temperature,
            seed=seed,
        )
        prompts = list(rows.to(torch.int64))
        batch = start(model, prompts, gen_length, block_length, cache, mask_id, settings, published=True)
        if remasking == "random":
            batch.passes.policy = _randomly(batch)
        run(batch)
    return batch.tokens.clone(), batch.forwards


def _randomly(batch: Batch) -> Policy:
    """The sequences' own policies with uniform random numbers for confidences."""

    def policy(stats: RowStats, eligible: Tensor, step: Tensor) -> Tensor:
        return select(stats._replace(confidence=torch.rand_like(stats.confidence)), eligible, batch.policies)

    return policy
