"""Whole models as drafters: a smaller autoregressive model, or a masked diffusion model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F

from ..arguments import whole
from ..cache import AttentionMetadata, KVCache, Span
from ..decoding.sequence_settings import grouped
from ..models import Model, native, own_precision
from ..ops import row_stats
from .draft import Draft
from .drafter import DraftSession, Lane

PADDING = 256
"""How far the vocabularies of a drafter and its target may differ: models of one tokenizer are padded to
different sizes, as Qwen2.5's to 151,936 and, from 7B on, to 152,064."""


class ModelDrafter:
    """Drafts with a model. An autoregressive model drafts token by token, each in a pass over one token a
    lane (arXiv 2211.17192). A masked diffusion model drafts in one pass over the text and a canvas of masks
    behind it, the most probable token at each mask (DiffuSpec, arXiv 2510.02358, without its search).

    Args:
        model: a native model with the target's tokenizer, on the target's device. Its vocabulary may have up
            to `PADDING` ids more or less than the target's: only ids that both have are drafted.
        most: the most tokens of a draft. None: 8 for an autoregressive model, 16 for a diffusion model.
        canvas: for a diffusion model, the masks behind the text, the draft's included, as far as there is
            room. Such models end their text where the canvas ends. None: as many as there is room for.
    """

    apart: Literal[True] = True

    def __init__(self, model: Any, *, most: int | None = None, canvas: int | None = None) -> None:
        inner = native(model, "drafter")
        if inner.window is not None or inner.prompt_block:
            behind = "in blocks behind its prompt" if inner.prompt_block else "behind all known tokens"
            raise ValueError(
                f"drafter: {type(inner).__name__} has its masks {behind}, and a diffusion model that drafts "
                "sees both ways or by blocks of one length"
            )
        if not inner.causal and inner.mask_id is None:
            raise ValueError("drafter: the diffusion model's config has no mask_token_id")
        self.model = inner
        self.most = (8 if inner.causal else 16) if most is None else whole("most", most, 1)
        self.canvas = None if canvas is None else whole("canvas", canvas, 1)

    def __repr__(self) -> str:
        return f"ModelDrafter({type(self.model).__name__}, most={self.most})"

    def check(self, model: Model) -> None:
        size, target_size = self.model.vocab_size, model.vocab_size
        if abs(size - target_size) > PADDING:
            raise ValueError(
                f"drafter: {type(self.model).__name__} has a vocabulary of {size} tokens, and the model "
                f"one of {target_size}; expected the model's tokenizer, of whose ids {PADDING} more or less "
                "may be padding"
            )
        if self.model.device != model.device:
            raise ValueError(f"drafter: expected on {model.device} as the model, got {self.model.device}")

    def session(self, model: Model, kv_cache: KVCache, lanes: int, *, graphs: bool = True) -> DraftSession:
        of = _Causal if self.model.causal else _Diffusion
        return of(self, model.shape.embedding_size, kv_cache, lanes)


class _Session(DraftSession):
    def __init__(self, drafter: ModelDrafter, target_size: int) -> None:
        self.drafter, self.model, self.target_size = drafter, drafter.model, target_size

    def _best(
        self,
        kv_cache: KVCache,
        metadata: AttentionMetadata,
        ids: Sequence[int],
        source: Sequence[int],
        lanes: Sequence[Lane],
    ) -> list[int]:
        """The most probable token that the target can choose, at rows `source` of a pass over the packed
        tokens `ids`. lanes: the lane of each of these rows. -1 for a bad row."""
        device, known = self.model.device, self.model.shape.embedding_size
        metadata = metadata.to(device)
        with own_precision(self.model, device):
            # An id that the target alone has is read as the drafter's last.
            x = self.model.step(torch.tensor(ids, device=device).clamp_(max=known - 1), kv_cache, metadata)
            logits = self.model.head(x[torch.tensor(source, device=device)])
        # An id that one of the two models alone has is no guess.
        logits = F.pad(logits[:, : self.target_size], (0, max(0, self.target_size - known)), value=-torch.inf)
        best = torch.full((len(source),), -1, device=device)
        mask_id = self.model.mask_id
        if mask_id is not None and mask_id >= self.target_size:
            mask_id = None  # no row has its logit
        numbers, groups = grouped(lane.sampling.greedy for lane in lanes)
        for number, group in enumerate(groups):
            at = torch.tensor([row for row, of in enumerate(numbers) if of == number], device=device)
            best[at] = row_stats(logits, rows=at, mask_id=mask_id, suppress=group.suppress, check=False).token
        return best.tolist()


class _Causal(_Session):
    """An autoregressive drafter. Its keys and values are in pages of their own, under the target's block
    table.
    """

    def __init__(self, drafter: ModelDrafter, target_size: int, target: KVCache, lanes: int) -> None:
        super().__init__(drafter, target_size)
        self._kv_cache = self.model.new_cache(target.slots.shape[2], target.page_size, target.block_table)
        self._pages = target
        """The target's cache, which makes the metadata, since it knows when pages are assigned."""
        self._cached: list[list[int]] = [[] for _ in range(lanes)]
        """For each lane, the tokens whose keys and values are cached."""

    def reset(self, lane: int) -> None:
        self._cached[lane] = []

    def propose(self, lanes: Sequence[Lane], sizes: Sequence[int]) -> list[Draft]:
        texts = [lane.tokens.tolist() for lane in lanes]
        for lane, text in zip(lanes, texts, strict=True):
            cached = self._cached[lane.lane]
            pairs = enumerate(zip(cached, text, strict=False))
            same = next((i for i, (old, new) in pairs if old != new), len(cached))
            del cached[min(same, len(text) - 1) :]  # refused tokens, and the root, which is always computed
        drafts: list[list[int]] = [[] for _ in lanes]
        for depth in range(max(sizes)):
            spans: list[Span] = []
            ids: list[int] = []
            source: list[int] = []
            going = [i for i, size in enumerate(sizes) if size > depth]
            for i in going:
                cached, whole_text = self._cached[lanes[i].lane], texts[i] + drafts[i]
                spans.append(Span(lanes[i].lane, len(cached), len(whole_text), len(whole_text)))
                ids += whole_text[len(cached) :]
                source.append(len(ids) - 1)
            metadata = self._pages.metadata(spans, causal=True)
            going_lanes = [lanes[i] for i in going]
            best = self._best(self._kv_cache, metadata, ids, source, going_lanes)
            for i, token in zip(going, best, strict=True):
                self._cached[lanes[i].lane] = texts[i] + drafts[i]
                drafts[i].append(max(0, token))  # a bad row has no best token, and any guess will do
        return [Draft(tuple(draft)) for draft in drafts]


class _Diffusion(_Session):
    def __init__(self, drafter: ModelDrafter, target_size: int, target: KVCache, lanes: int) -> None:
        super().__init__(drafter, target_size)
        self._kv_cache = self.model.new_cache(lanes, target.length, kept=False)

    def propose(self, lanes: Sequence[Lane], sizes: Sequence[int]) -> list[Draft]:
        assert self.model.mask_id is not None
        spans: list[Span] = []
        ids: list[int] = []
        source: list[int] = []
        for lane, size in zip(lanes, sizes, strict=True):
            text = lane.tokens.tolist()
            masks = lane.room if self.drafter.canvas is None else min(lane.room, self.drafter.canvas)
            length, first = len(text) + max(size, masks), len(ids)
            spans += self.model.spans(lane.lane, 0, length, length)
            ids += [*text, *[self.model.mask_id] * (length - len(text))]
            at = first + len(text) - int(self.model.shift)
            source += range(at, at + size)
        of_rows = [lane for lane, size in zip(lanes, sizes, strict=True) for _ in range(size)]
        best = iter(self._best(self._kv_cache, self._kv_cache.metadata(spans), ids, source, of_rows))
        return [Draft(tuple(max(0, next(best)) for _ in range(size))) for size in sizes]
