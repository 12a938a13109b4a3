"""Introspective strided decoding (I-DLM, arXiv 2604.11035): the model's masks ride in the verify pass.

    rows      [root, guess, ..., mask, mask, ...], each seeing the rows up to itself
    logits    at root and guesses: the model's choices, which verify; at the j-th mask behind a node: a guess
              of the token j places behind the node's choice

The published loop verifies up to N - 1 guesses in front of N - 1 masks. Behind a wrong guess the next pass
has nothing to verify. Here masks are riders (`riders`): with rows to spare they ride behind every guess. A
LoRA adapter may take part in their rows alone (the paper's R-ISD): the text is then that of a model that was
never trained for masks.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..arguments import instance, number, whole
from ..cache import KVCache
from ..models import IDLM, Model
from ..models.fields import Field, read
from .adapter import Adapter, LowRank, adapted
from .checkpoint import OURS, DraftCheckpoint
from .riders import MOST, RiderPlanner, RiderSession, checked_ranks, likeliest
from .trees import Ranks

KIND = "strided"


class MaskRiders:
    """Riders that are masks, see `drafter.Riders` and `drafter.Adapting`. They do not keep the model alive.

    parts: the layers of an adapter, by name. guesses: tokens that a mask guesses.
    """

    layer = 0

    def __init__(
        self, model: Model, mask_id: int, most: int, parts: Mapping[str, LowRank], guesses: int = 1
    ) -> None:
        self.most, self._mask, self._parts, self._guesses = most, mask_id, parts, guesses
        self._target = weakref.ref(model)
        self.begin()

    def begin(self) -> None:
        """Adapt the layers that the model has now; it may have been quantised or adapted."""
        model = self._target()
        self._adapted = adapted(model, self._parts) if model is not None and self._parts else None

    def embed(self, nodes: Tensor, numbers: Tensor) -> Tensor:
        model = self._target()
        assert model is not None  # the batch keeps it
        return model.embedded(torch.full_like(numbers, self._mask)).sum

    def guess(self, logits: Tensor, rows: Tensor, suppress: Tensor | None) -> Tensor:
        return likeliest(logits, rows, suppress, self._guesses)

    def through(self, model: Model, riding: Tensor) -> Model:
        for part in self._parts.values():
            part.only = riding
        return self._adapted or model


class StridedDrafter(RiderPlanner):
    """Drafts with masks of the model itself in the verify pass, as I-DLM does.

    Args:
        stride: N, the most tokens of a pass, from 2 to 17: a node has N - 1 masks at most. The released
            checkpoints are meant for 4.
        adapter: takes part in the masks' rows alone; `drafter_of("strided:PATH")` reads one.
        mask_id: default: the model's, or that of the released checkpoints, which I-DLM's adapter for Qwen3
            has too.
        chance: from 0 to 1, of a guess to be right where the guesses before it are; drafts have the best
            shape for it. 0.9 is the paper's for N = 4, and with it a `draft_size` of 2 (N - 1) has the
            published rows. Or the measured ranks of each mask, see `RiderPlanner`, as `dparallel drafter`
            writes them: drafts are then trees of guesses.

    Raises ValueError for other values.
    """

    def __init__(
        self,
        stride: int = 4,
        adapter: Adapter | None = None,
        *,
        mask_id: int | None = None,
        chance: float | Ranks = 0.9,
    ) -> None:
        if adapter is not None:
            instance("adapter", adapter, Adapter)
        self.stride, self.adapter = whole("stride", stride, 2, 17), adapter
        self.mask_id = mask_id if mask_id is None else whole("mask_id", mask_id, 0)
        masks = self.stride - 1
        if isinstance(chance, (list, tuple)):
            super().__init__(checked_ranks("chance", chance, masks))
        else:
            super().__init__(((number("chance", chance, 0.0, 1.0),),) * masks)
        self._guesses = max(map(len, self.ranks))
        nodes = sum(self._guesses**depth for depth in range(self.stride))
        self.most = min(MOST, nodes * self.stride - 1)  # each node has its masks

    def __repr__(self) -> str:
        adapter = self.adapter and self.adapter.source
        return f"{type(self).__name__}(stride={self.stride}, adapter={adapter!r})"

    def check(self, model: Model) -> None:
        """Raise ValueError for a model without a mask token, or whose layers the adapter does not fit."""
        mask_id = self._mask_of(model)
        if mask_id is None:
            raise ValueError(
                'drafter: "strided" is for models that guess ahead at masks, as I-DLM does, or for their '
                f"adapters; this {type(model).__name__} has no mask token, which its config, --mask-id or "
                "models.load(mask_id=) names"
            )
        if mask_id >= model.shape.embedding_size:
            raise ValueError(
                f"drafter: mask_id: expected an id of the model's {model.shape.embedding_size}, got {mask_id}"
            )
        if self.adapter is not None:
            self.adapter.check(model)
            head = model.checkpoint_name("lm_head")
            if head in self.adapter.pairs:
                raise ValueError(f"drafter: {self.adapter.source} adapts {head}, and all rows have one head")

    def _mask_of(self, model: Model) -> int | None:
        if self.mask_id is not None or model.mask_id is not None:
            return model.mask_id if self.mask_id is None else self.mask_id
        return None if self.adapter is None else IDLM.released_mask_id(model.shape.embedding_size)

    def session(self, model: Model, kv_cache: KVCache, lanes: int, *, graphs: bool = True) -> RiderSession:
        mask_id = self._mask_of(model)
        assert mask_id is not None
        parts = {} if self.adapter is None else self.adapter.of(model)
        masks = MaskRiders(model, mask_id, self.stride - 1, parts, self._guesses)
        return _Session(self, masks, lanes, parts)

    def save(self, path: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
        """Write the adapter as PEFT does, with stride, mask token and ranks beside it, see
        `write_checkpoint`. Raises ValueError if there is none."""
        if self.adapter is None:
            raise ValueError("adapter: expected one to write, got None")
        ours = {
            **self.adapter.origin.ours[OURS],
            "kind": KIND,
            "num_riders": self.stride - 1,
            "mask_token_id": self.mask_id,
            "ranks": self.ranks,
        }
        self.adapter.save(path, ours, dtype)


def drafter_of_masks(checkpoint: DraftCheckpoint) -> StridedDrafter:
    """The drafter that `StridedDrafter.save` wrote. Raises ValueError naming the config key that does not
    fit, and as `Adapter`."""
    ours = checkpoint.config[OURS]
    fields = {"num_riders": Field(int, most=16), "mask_token_id": Field(int, None, least=0)}
    values = read(ours, fields, within=OURS)
    riders = values["num_riders"]
    ranks = checked_ranks(f"config: {OURS}: ranks", ours.get("ranks"), riders)
    return StridedDrafter(riders + 1, Adapter(checkpoint), mask_id=values["mask_token_id"], chance=ranks)


class _Session(RiderSession):
    riders: MaskRiders

    def __init__(
        self, drafter: StridedDrafter, riders: MaskRiders, lanes: int, parts: Mapping[str, LowRank]
    ) -> None:
        weights = [t for part in parts.values() for t in (part.down, part.up)]
        self.size = sum(t.nbytes for t in weights)
        super().__init__(drafter, riders, lanes, weights)

    def begin(self) -> None:
        self.riders.begin()
