"""Drafts of whole blocks: one pass over rows [root, mask, mask, ...] of a sequence guesses all their tokens.

The rows have the positions from the root's on. A row's logits are for its own position, and its likeliest
tokens there, whatever stands in front, make a chain or a tree (`ddtree`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic

import torch
from torch import Tensor, nn

from .._C import draft_trees
from ..arguments import instance
from ..cache import AttentionMetadata, KVCache, Span
from ..decoding.sequence_settings import grouped
from ..models import Model, fused_weights, own_precision
from ..ops import row_topk
from ..packed import Packing, bits_of, floats_of, unpack
from .checkpoint import write_checkpoint
from .draft import Draft
from .drafter import Drafter, DraftKey, Lane, Placed, RecordedSession, Weights


class Chains:
    """How a drafter of blocks makes drafts of its guesses: chains of the likeliest."""

    width = 1
    """The number of a row's likeliest guesses from which drafts are made; with 1 they are chains."""

    def draft(self, tokens: Sequence[int], parents: Sequence[int], chances: Sequence[float]) -> Draft:
        """The draft of a tree behind a root: each node's token, its parent, and how likely it is accepted."""
        return Draft(tuple(tokens))

    def drafts(
        self, best: Tensor, rows: Sequence[int], counts: Sequence[int], sizes: Sequence[int]
    ) -> list[Draft]:
        """A draft of at most `sizes[i]` nodes for each i, made of the guesses of its `counts[i]` rows.

        best: (2, M, width), the guesses of rows, and the bits of their log-probabilities. rows: which of them
        are read, for one i after the other.
        """
        tokens, bits = best.cpu()[:, rows].flatten(1)
        guesses, scores = tokens.tolist(), floats_of(bits).tolist()
        trees = draft_trees(scores, best.shape[2], [*counts], [*sizes])
        return [self.draft([guesses[i] for i in tree.cells], tree.parents, tree.chances) for tree in trees]


class BlockDrafter(Drafter):
    """A drafter of blocks."""

    drafting = Chains()
    """How its sessions make drafts, see also `ddtree`."""
    guesses = 16
    """The most guesses of a row."""


class TrainedBlockDrafter(BlockDrafter, Generic[Weights]):
    """A drafter of blocks with weights of its own, in layers like the target's.

    Args:
        model: the weights; in evaluation mode and without gradients from now on.
        source: names the drafter in errors.
    """

    model_class: type[Weights]
    options: Any
    """The options in the config.json of `model`, with a `shape` and a `block`, the rows of a block."""

    def __init__(self, model: Weights, source: str = "drafter") -> None:
        instance("model", model, self.model_class)
        self.model, self.source = model.eval().requires_grad_(False), source
        self.options = model.options
        self.most = self.options.block - 1
        self.guesses = min(self.guesses, self.options.shape.embedding_size)
        self.on = Placed(self.model)

    def fused(self, model: Model) -> Weights:
        """The weights in the dtype and on the device of the model, fused."""
        placed = self.on(model.device, model.dtype)
        layers: Any = placed.layers
        with torch.inference_mode(False), torch.no_grad():
            for block in layers:
                for group in block.groups():
                    fused_weights.join(group)
        return placed

    def save(self, path: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
        """Write config and weights, see `write_checkpoint`."""
        config: Any = self.model.config
        write_checkpoint(path, config, self.model.state_dict(), dtype)


class BlockSession(RecordedSession):
    """Drafts a block in one pass, whose keys and values nothing needs afterwards.

    Args:
        weights: the drafter's module, if it has one.
        kv_cache: the cache that the rows see, and write behind the root.
        block: rows of a block, the root among them.
        causal: a row of the block sees only the rows in front of it.
        drafting: makes drafts of the guesses.
    """

    def __init__(
        self,
        weights: nn.Module | None,
        model: Model,
        kv_cache: KVCache,
        *,
        block: int,
        mask_id: int,
        causal: bool = False,
        drafting: Chains,
        graphs: bool = True,
    ) -> None:
        super().__init__(weights, model, graphs)
        self.kv_cache = kv_cache
        self._block, self._mask_id, self._causal = block, mask_id, causal
        self._drafts, self._width = drafting, min(drafting.width, model.shape.embedding_size)

    def hidden(self, ids: Tensor, metadata: AttentionMetadata) -> Tensor:
        """Hidden states (N, width of the target) after the final norm, of the packed rows ids (N,) int64.
        Part of the pass, which may be recorded."""
        raise NotImplementedError

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (M, V) of hidden states (M, width of the target). Part of the pass."""
        return self.model.head(hidden)

    def propose(self, lanes: Sequence[Lane], sizes: Sequence[int]) -> list[Draft]:
        spans: list[Span] = []
        ids: list[int] = []
        source: list[int] = []
        counts: list[int] = []
        for lane, most in zip(lanes, sizes, strict=True):
            start, ends = len(lane.tokens) - 1, lane.length
            # All rows of a block see each other, unless they are causal: then none is needed behind the last
            # that is read.
            rows = min(self._block, ends - start, most + 1 if self._causal else ends)
            counts.append(min(most, rows - 1))
            source += range(len(ids) + 1, len(ids) + 1 + counts[-1])
            ids += [int(lane.tokens[-1]), *[self._mask_id] * (rows - 1)]
            spans.append(Span(lane.lane, start, start + rows, start + rows))
        packing, (numbers, groups) = Packing(), grouped(lane.sampling.greedy for lane in lanes)
        rows, max_q_len, max_kv_len = self.kv_cache.put(packing, spans, self._pad_to)
        packing.padded(ids, self._mask_id, rows)
        read = self._put_sources(packing, source)
        packing.padded([n for n, count in zip(numbers, counts, strict=True) for _ in range(count)], -1, read)
        best = self._run_pass(packing, (max_q_len, max_kv_len), groups)
        return self._drafts.drafts(best, range(len(source)), counts, sizes)

    def _compute(self, key: DraftKey, inputs: Tensor) -> Tensor:
        """(2, M, width) int64: the guesses of each row that is read, the likeliest first, and the bits of
        their log-probabilities in float32, which are -inf or NaN where a row has no more guesses."""
        *about_tokens, ids, source, group = unpack(inputs, key.shapes)
        max_q_len, max_kv_len = key.numbers
        metadata = AttentionMetadata(max_q_len, max_kv_len, *about_tokens, causal=self._causal)
        with own_precision(self.model, self.model.device):
            logits = self.head(self.hidden(ids, metadata)[source])
        for number, out in key.suppressed(logits.shape[1]).items():
            logits.masked_fill_((group == number)[:, None] & out, -torch.inf)
        best = row_topk(logits, self._width, mask_id=self._mask_id, check=False)
        return torch.stack((best.token, bits_of(best.logprob)))
