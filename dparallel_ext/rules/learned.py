"""Learn2PD (arXiv 2509.25188): a small network judges which columns of the block are predicted right.

It sees the confidences x (N,) of the active block's N columns in this pass, committed ones included:

    z = W2 relu(W1 x + b1) + b2;  commit the masked columns with sigmoid(z) > tau

and also the columns that the policy row commits, as published the most confident column alone. Columns
without logits in the pass (the prompt's tail in a block-causal model's block, columns that a short last block
lacks, the first one of a pass over the block alone where logits are shifted) have x = 1. The paper does not
name its activation. A ReLU rounds nothing, so that a batch cannot change a sequence. `dparallel filter`
trains such a network for a model.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arguments import number, warn
from ..models import fingerprint
from ..types import RowStats
from .filter_file import read_filter
from .protocol import Decision, Rule, Where


@dataclass(frozen=True)
class Learned(Rule):
    """Commits the columns that a trained filter judges right, see `dparallel filter`.

    A filter that was trained for another model gets a warning, not an error: for a finetuned model, say, it
    may be as good. Rules of equal content and tau are equal.

    Raises ValueError for a file that is no filter.
    """

    file: str | Path = field(compare=False)
    """A safetensors file, or a name in `filter_file.NAMED`."""
    tau: float | None = None
    """The probability above which a column counts as right; None: the file's own."""
    content: str = field(init=False, repr=False)
    weights: tuple[Tensor, ...] = field(init=False, repr=False, compare=False)
    model: str | None = field(init=False, repr=False, compare=False)
    """The `models.fingerprint` of the model that the filter was trained for."""

    reads = "block"
    row = "quota:1"

    def __post_init__(self) -> None:
        content, weights, metadata = read_filter(self.file)
        tau: Any = self.tau
        if tau is None:
            tau = metadata.get("tau")
            with contextlib.suppress(TypeError, ValueError):
                tau = float(tau)
        try:
            tau = number("tau", tau, 0, 1)
        except ValueError as error:
            raise ValueError(f"{error} for {self.file}") from None
        values = {"tau": tau, "content": content, "weights": weights, "model": metadata.get("model")}
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def block_length(self) -> int:
        return self.weights[0].shape[1]

    @property
    def bar(self) -> float:
        """The z whose sigmoid is tau."""
        tau = self.tau or 0.0
        return math.log(tau / (1 - tau)) if 0 < tau < 1 else math.copysign(math.inf, tau - 0.5)

    def check(self, model: Any, block_length: int) -> None:
        if block_length != self.block_length:
            raise ValueError(
                f"rule: {self.file} is for a block_length of {self.block_length}, got {block_length}"
            )
        model_hash = fingerprint(model)
        if model_hash and self.model and model_hash != self.model:
            warn(
                f"rule: {self.file} was trained for another model ({self.model}, and this is {model_hash}), "
                "so that it may commit too much or too little"
            )

    def new_state(self, lanes: int, columns: int, device: torch.device) -> tuple[Tensor, ...]:
        """The weights, at an address that does not change, as recorded passes need; no sequence changes
        them."""
        return tuple(weight.to(device, copy=True) for weight in self.weights)

    def reset(self, state: tuple[Tensor, ...], lane: int) -> None:
        pass

    def decide(self, stats: RowStats, where: Where, state: tuple[Tensor, ...]) -> Decision:
        w1, b1, w2, b2 = state
        z = linear(linear(by_place(stats.confidence, where, self.block_length, 1.0), w1, b1).relu(), w2, b2)
        right = z > self.bar  # (W, N)
        place = where.column - where.block[:, None]
        inside = (place >= 0) & (place < self.block_length)
        right = right.gather(1, place.clamp(0, self.block_length - 1)) & inside
        return Decision(where.by_policy(stats) | (where.masked & right))


def by_place(values: Tensor, where: Where, length: int, blank: float) -> Tensor:
    """(W, length): values (W, C), sorted into their places in the block; `blank` where there are none."""
    cell = torch.arange(length, device=values.device) + (where.block - where.start)[:, None]
    at = cell.clamp(0, values.shape[1] - 1)
    return torch.where(where.read.gather(1, at) & (cell == at), values.gather(1, at), blank)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (W, N) -> (W, M), with sums in a fixed order; a matrix product's order may depend on W."""
    terms = x[:, None] * weight
    while (count := terms.shape[2]) > 1:
        half = (count + 1) // 2
        rest = terms[..., half:]
        terms = terms[..., :half] + (F.pad(rest, (0, 1)) if count % 2 else rest)
    return terms[..., 0] + bias
