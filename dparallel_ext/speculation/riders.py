"""Drafters that guess and verify in one pass: a draft's nodes have riders, rows that guess the next tokens.

This module has the parts that all kinds share. They differ in how a rider's row is made, each in a file: from
an embedding of its own (`ppd`), by a map of its node's stream at a middle layer (`hidden_transfer`), or from
the embedding of the mask token (`strided`). The next draft is a tree of the tokens that the riders of the
last accepted node rank first; its shape is the best for the measured ranks (`trees`).

All three papers verify greedy texts exactly. At a temperature PPD accepts typical tokens, which is lossy, and
I-DLM accepts by the ratio of two distributions. Here samples are matched instead, so that texts are the
model's own at every temperature.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..arguments import instance
from ..cache import KVCache
from ..models import Model
from ..models.fields import LAYERS, VOCABULARY, WIDTH, Field, read
from ..models.modules import shapes_only
from ..ops import row_topk
from .checkpoint import DraftCheckpoint, Origin, check_target, write_checkpoint
from .draft import Draft
from .drafter import DraftSession, Lane, Placed, Riders
from .trees import Ranks, plan

MOST = 63
"""The most rows of a draft: with the root they are 64."""
GUESSES = 10
"""Tokens that a rider guesses, the most probable first."""


class RiderModel(nn.Module):
    """The trained weights of riders of one kind, see `drafter.Riders`."""

    KIND: ClassVar[str]
    most: int
    """The most riders of a node."""
    layer: int
    """The layer before which riders join the pass."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Raises ValueError naming the key of config.json that does not fit."""
        super().__init__()
        sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_target_layers": LAYERS}
        values = read(config, {**sizes, "num_riders": Field(int, most=16)})
        self.config = dict(config)
        self.origin = Origin.of(config)
        self.vocabulary, self.width = values["vocab_size"], values["hidden_size"]
        self.target_layers, self.most = values["num_target_layers"], values["num_riders"]
        self.layer = 0

    def embed(self, nodes: Tensor, numbers: Tensor) -> Tensor:
        """Riders' streams (..., width); nodes (..., width), numbers (...)."""
        raise NotImplementedError

    def guess(self, logits: Tensor, rows: Tensor, suppress: Tensor | None) -> Tensor:
        return likeliest(logits, rows, suppress, GUESSES)


def likeliest(logits: Tensor, rows: Tensor, suppress: Tensor | None, count: int) -> Tensor:
    """`drafter.Riders.guess`: of each rider the `count` likeliest tokens, the most probable first; K is
    `count` times its riders, or less in a small vocabulary."""
    count = min(count, logits.shape[-1])
    best = row_topk(logits, count, rows=rows.flatten(), suppress=suppress, check=False)
    return best.token.view(len(rows), -1)


def rider_config(model: Model, riders: int, origin: Origin, **fields: Any) -> dict[str, Any]:
    """The content of config.json of a drafter for `model`; fields: keys of its kind."""
    s = model.shape
    return {
        "hidden_size": s.width,
        "num_riders": riders,
        "num_target_layers": s.layers,
        "vocab_size": s.embedding_size,
        **fields,
        **origin.ours,
    }


class RiderPlanner:
    """Plans drafts of riders by their `ranks`: for each rider of a chain, how often the true token is its
    most probable one, the second, and so on, as shares from 0 to 1."""

    most = MOST
    """As `Drafter.most`, riders included."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.plan = functools.cache(functools.partial(plan, ranks))

    def expected(self, size: int) -> float:
        """The tokens that a pass emits on average if its draft has `size` rows, by the ranks."""
        return self.plan(min(size, self.most)).tokens


class RiderDrafter(RiderPlanner):
    """Guesses by riders of the verify pass: PPD and Hidden Transfer. `load` reads one from a file, which
    `dparallel drafter` trains.

    Args:
        model: the trained weights; in evaluation mode and without gradients from now on.
        ranks: see `RiderPlanner`; up to `GUESSES` shares for each rider.
        source: names the drafter in errors.
    """

    def __init__(self, model: RiderModel, ranks: Ranks, source: str = "drafter") -> None:
        instance("model", model, RiderModel)
        super().__init__(checked_ranks("ranks", ranks, model.most))
        self.model, self.source = model.eval().requires_grad_(False), source
        self.on = Placed(self.model)

    def __repr__(self) -> str:
        return f"RiderDrafter({self.model.KIND}, riders={self.model.most}, layer={self.model.layer})"

    def check(self, model: Model) -> None:
        """Raise ValueError for a model of another vocabulary, other sizes or other weights."""
        riders = self.model
        sizes = {"vocabulary": riders.vocabulary, "width": riders.width, "layers": riders.target_layers}
        check_target(self.source, riders.origin, model, **sizes)

    def session(self, model: Model, kv_cache: KVCache, lanes: int, *, graphs: bool = True) -> DraftSession:
        riders = self.on(model.device, model.dtype)
        return RiderSession(self, riders, lanes, riders.parameters())

    def save(self, path: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
        """Write the drafter, see `write_checkpoint`."""
        config = {**self.model.config, "ranks": [list(row) for row in self.ranks]}
        write_checkpoint(path, config, self.model.state_dict(), dtype)


def checked_ranks(argument: str, ranks: Any, riders: int) -> Ranks:
    """`ranks` as tuples, see `RiderPlanner`. Raises ValueError naming the argument unless they are shares for
    each rider."""
    rows = ranks if isinstance(ranks, (list, tuple)) else ()
    fits = len(rows) == riders and all(
        isinstance(row, (list, tuple))
        and 1 <= len(row) <= GUESSES
        and all(isinstance(share, int | float) and 0 <= share <= 1 for share in row)
        and sum(row) <= 1 + 1e-6
        for row in rows
    )
    if not fits:
        raise ValueError(
            f"{argument}: expected for each of {riders} riders up to {GUESSES} shares of sum at most 1, "
            f"got {ranks!r:.80}"
        )
    return tuple(tuple(float(share) for share in row) for row in rows)


def drafter_of_riders(of: type[RiderModel], checkpoint: DraftCheckpoint) -> RiderDrafter:
    """The drafter in a file. Raises ValueError naming the config key, or the tensors, that do not fit."""
    with shapes_only():
        model = of(checkpoint.config)
    ranks = checked_ranks("config: ranks", checkpoint.config.get("ranks"), model.most)
    checkpoint.fill(model)
    return RiderDrafter(model, ranks, checkpoint.source)


class RiderSession(DraftSession):
    """weights: those of the riders."""

    recorded = True
    riders: Riders

    def __init__(self, drafter: RiderPlanner, riders: Riders, lanes: int, weights: Iterable[Tensor]) -> None:
        self._drafter, self.riders, self._weights = drafter, riders, [*weights]
        self._guesses: list[list[list[int]]] = [[] for _ in range(lanes)]
        """For each lane and depth of the next draft, the guessed tokens, the most probable first."""

    def reset(self, lane: int) -> None:
        self._guesses[lane] = []

    def addresses(self) -> Sequence[int]:
        return [weight.data_ptr() for weight in self._weights]

    def guessed(self, lane: int, riders: int, numbers: Sequence[int]) -> None:
        each = len(numbers) // self.riders.most
        self._guesses[lane] = [list(numbers[i * each : (i + 1) * each]) for i in range(riders)]

    def propose(self, lanes: Sequence[Lane], sizes: Sequence[int]) -> list[Draft]:
        return [self._draft(self._guesses[each.lane], size) for each, size in zip(lanes, sizes, strict=True)]

    def _draft(self, guesses: list[list[int]], size: int) -> Draft:
        nodes, riders = self._drafter.plan(size).trees[len(guesses)]
        # A bad row, and a row with too few tokens to choose from, has -1; any guess will do.
        tokens = tuple(max(0, guesses[node.depth][node.rank]) for node in nodes)
        return Draft(tokens, tuple(node.parent for node in nodes), riders=riders)
