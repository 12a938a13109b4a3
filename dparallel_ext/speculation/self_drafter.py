"""Self-speculation of a model that predicts masks and the next token (Nemotron-Labs-Diffusion, NVIDIA, 2026).

    draft     rows [root, mask, ...] behind the text, which see each other: each mask's likeliest token
    verify    the same model, each position seeing the positions up to itself

The text is the autoregressive model's. The draft's keys and values lie where the verify pass writes its own.
A LoRA adapter (arXiv 2106.09685) may take part in the draft alone, as the published `linear_spec_lora` does.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..arguments import instance, whole
from ..cache import AttentionMetadata, KVCache
from ..models import Model, traits
from .adapter import Adapter, adapted
from .blocks import BlockDrafter, BlockSession

BLOCK = 32
"""Rows of a block in the published code, as in training."""


class SelfDrafter(BlockDrafter):
    """Drafts with the model itself, a block of masks in one pass: the published `linear_spec_generate`.

    Args:
        block: rows of a block, the root among them, from 2 to 512; at the end of a sequence, as many as it
            has room for.
        adapter: takes part in drafts. `load` reads a drafter with one.
    """

    def __init__(self, block: int = BLOCK, adapter: Adapter | None = None) -> None:
        if adapter is not None:
            instance("adapter", adapter, Adapter)
        self.block, self.adapter = whole("block", block, 2, 512), adapter
        self.most = self.block - 1

    def __repr__(self) -> str:
        adapter = self.adapter and self.adapter.source
        return f"{type(self).__name__}(block={self.block}, adapter={adapter!r})"

    def check(self, model: Model) -> None:
        """Raise ValueError for a model that predicts the next token alone, without a mask token, or whose
        layers the adapter does not fit."""
        if not traits(model).onward:
            raise ValueError(
                'drafter: "self" is for models that predict masks too, as Nemotron-Labs-Diffusion does, got '
                f"{type(model).__name__}"
            )
        if model.mask_id is None:
            raise ValueError('drafter: "self" needs a mask token, and the model\'s config names none')
        if self.adapter is not None:
            self.adapter.check(model)

    def session(self, model: Model, kv_cache: KVCache, lanes: int, *, graphs: bool = True) -> BlockSession:
        return _Session(self, model, kv_cache, graphs)


class _Session(BlockSession):
    def __init__(self, drafter: SelfDrafter, model: Model, kv_cache: KVCache, graphs: bool) -> None:
        assert model.mask_id is not None
        self._parts = {} if drafter.adapter is None else drafter.adapter.of(model)
        weights = nn.ParameterList([t for part in self._parts.values() for t in (part.down, part.up)])
        self.size = sum(t.nbytes for t in weights)
        super().__init__(
            weights,
            model,
            kv_cache,
            block=drafter.block,
            mask_id=model.mask_id,
            drafting=drafter.drafting,
            graphs=graphs,
        )
        self.begin()

    def begin(self) -> None:
        """Draft with the layers that the model has now; it may have been quantised or adapted."""
        self._adapted = adapted(self.model, self._parts) if self._parts else None

    @property
    def _drafting(self) -> Model:
        return self._adapted or self.model

    def hidden(self, ids: Tensor, metadata: AttentionMetadata) -> Tensor:
        return self._drafting.step(ids, self.kv_cache, metadata)

    def head(self, hidden: Tensor) -> Tensor:
        return self._drafting.head(hidden)
