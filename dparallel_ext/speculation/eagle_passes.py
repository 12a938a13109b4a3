"""The passes of drafters of the kinds EAGLE-3 and P-EAGLE; see `eagle`."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .._C import draft_trees
from ..cache import AttentionMetadata, KVCache, Span
from ..decoding.sequence_settings import grouped
from ..models import Model, own_precision, rope
from ..models.attention import PagedAttention
from ..ops import row_topk
from ..packed import Packing, bits_of, floats_of, unpack
from .blocks import Chains
from .draft import Draft
from .drafter import DraftKey, Lane, Observation, RecordedSession
from .eagle_model import EagleModel


class EagleSession(RecordedSession):
    """Keeps features under the block table of the target's cache, and keys and values of pairs by lane.

    Args:
        layers: the drafter's weights.
        drafting: makes drafts of the guesses.
    """

    def __init__(
        self, layers: EagleModel, drafting: Chains, model: Model, kv_cache: KVCache, lanes: int, graphs: bool
    ) -> None:
        self._layers, self._options, self._drafts = layers, layers.options, drafting
        super().__init__(layers, model, graphs)
        self.taps = self._options.taps_of(model.shape.layers)
        s, length = self._options.shape, kv_cache.length
        zeros = functools.partial(torch.zeros, dtype=model.dtype, device=model.device)
        self._table, self._page_size = kv_cache.block_table, kv_cache.page_size
        self._nowhere = kv_cache.slots.shape[2] * self._page_size
        """The row of `features` for tokens without a slot; the mask's is behind it."""
        self.features = zeros((self._nowhere + 2, s.width))
        slots = zeros((s.layers, 2, lanes, s.kv_heads, length, s.head_dim))
        table = rope.table(length, s.head_dim, s.rope_theta, s.rope_scaling, model.device)
        self.kv_cache = KVCache(slots, table)
        self._computed = [0] * lanes
        """For each lane, the pairs of known tokens whose keys and values are there."""
        self.size = self.features.nbytes + slots.nbytes
        self.begin()

    def begin(self) -> None:
        if self._layers.mask_hidden is not None:
            self.features[-1] = self._layers.fc(self._layers.mask_hidden)

    def reset(self, lane: int) -> None:
        super().reset(lane)
        self._computed[lane] = 0

    def observe(self, seen: Observation) -> None:
        slots = seen.metadata.slot_mapping
        self._write(slots, self._layers.fc(torch.cat(seen.taps, -1)))

    def moved(self, source: Tensor, target: Tensor) -> None:
        self._write(target.flatten(), self.features[source.flatten().clamp(min=0)])

    def _write(self, slots: Tensor, features: Tensor) -> None:
        self.features.index_copy_(0, slots.masked_fill(slots < 0, self._nowhere), features)

    def propose(self, lanes: Sequence[Lane], sizes: Sequence[int]) -> list[Draft]:
        # A text of one token has no feature yet, and so no pair.
        sizes = [size if len(lane.tokens) > 1 else 0 for lane, size in zip(lanes, sizes, strict=True)]
        counts = [min(size, self._options.block - 1) for size in sizes]
        going = [(lane, count) for lane, count in zip(lanes, counts, strict=True) if count]
        guesses, scores = self._guesses(*zip(*going, strict=True)) if going else ([], [])
        trees = draft_trees(scores, self._drafts.width, counts, sizes)
        return [self._drafts.draft(tree, guesses) for tree in trees]

    def _guesses(self, lanes: Sequence[Lane], counts: Sequence[int]) -> tuple[list[int], list[float]]:
        """The tokens of each lane's `counts` rows, `width` of each, and their log-probabilities."""
        mask_id = self._options.mask_id
        packing, (numbers, groups) = Packing(), grouped(lane.sampling.greedy for lane in lanes)
        spans: list[Span] = []
        ids: list[int] = []
        rows: list[int] = []
        positions: list[int] = []  # of features; the mask's has none
        source: list[int] = []
        for lane, count in zip(lanes, counts, strict=True):
            known = len(lane.tokens) - 1
            # The last pair is computed already where a pass has raised, but the draft needs its row.
            start = min(self._computed[lane.lane], known - 1)
            masks = 0 if mask_id is None else count - 1
            spans.append(Span(lane.lane, start, known + masks, known + masks))
            ids += [*lane.tokens[start + 1 :].tolist(), *[mask_id or 0] * masks]
            rows += [lane.lane] * (known - start + masks)
            positions += [*range(start, known), *[-1] * masks]
            source += range(len(ids) - 1 - masks, len(ids))
        at, size = torch.tensor(positions, device="cpu"), self._page_size
        slots = self._table[rows, at // size] * size + at % size
        padded, *bounds = self.kv_cache.put(packing, spans, self._pad_to)
        about = len(packing.shapes)
        packing.padded(ids, 0, padded)
        packing.padded(slots.masked_fill_(at < 0, self._nowhere + 1).tolist(), 0, padded)
        end = self._put_sources(packing, source)
        if mask_id is None:
            packing.padded(numbers, -1, end)
            order = self._put_steps(packing, lanes, counts, numbers, end, bounds)
        else:
            repeated = [number for number, count in zip(numbers, counts, strict=True) for _ in range(count)]
            packing.padded(repeated, -1, end)
            order = list(range(len(source)))
        best = self._run_pass(packing, (about, *bounds), groups)
        for lane in lanes:
            self._computed[lane.lane] = len(lane.tokens) - 1
        tokens, bits = best.cpu()[:, order].flatten(1)
        return tokens.tolist(), floats_of(bits).tolist()

    def _put_steps(
        self,
        packing: Packing,
        lanes: Sequence[Lane],
        counts: Sequence[int],
        groups: Sequence[int],
        end: int,
        bounds: list[int],
    ) -> list[int]:
        """Pack EAGLE-3's passes behind the first, each over a pair of the lanes that have a guess to go, and
        add their `max_q_len` and `max_kv_len` to `bounds`.

        groups: the number of each lane's. end: rows of the result of the first pass. Returns the row of each
        guess, lane by lane.
        """
        rows = [[row] for row in range(len(lanes))]
        going = list(range(len(lanes)))
        for step in range(1, max(counts)):
            before, going = going, [i for i in going if counts[i] > step]
            at = [len(lanes[i].tokens) - 2 + step for i in going]
            spans = [Span(lanes[i].lane, pair, pair + 1, pair + 1) for i, pair in zip(going, at, strict=True)]
            padded, *bound = self.kv_cache.put(packing, spans, self._pad_to)
            bounds += bound
            packing.padded([before.index(i) for i in going], 0, padded)
            packing.padded([groups[i] for i in going], -1, padded)
            for row, i in enumerate(going, end):
                rows[i].append(row)
            end += padded
        return [row for of_lane in rows for row in of_lane]

    def _compute(self, key: DraftKey, inputs: Tensor) -> Tensor:
        """(2, M, width) int64: the guesses of each row that is read, pass after pass, and the bits of their
        log-probabilities in float32, as in `blocks`."""
        tensors, layers, results = unpack(inputs, key.shapes), self._layers, []
        about, *all_bounds = key.numbers  # `about`: the number of tensors of a pass's metadata
        embed = self.model.embed if layers.embed_tokens is None else layers.embed_tokens
        targets = layers.d2t + torch.arange(len(layers.d2t), device=inputs.device)
        suppressed = key.suppressed(self.model.shape.embedding_size)
        never = {number: out[targets] for number, out in suppressed.items()}
        ids = stream = inputs
        for step, bounds in enumerate(zip(all_bounds[::2], all_bounds[1::2], strict=True)):
            metadata = AttentionMetadata(*bounds, *tensors[:about], causal=True)
            if step:
                keep, group, *tensors = tensors[about:]
                ids, feature = ids[keep, 0], stream[keep]
            else:
                ids, place, source, group, *tensors = tensors[about:]
                feature = self.features[place]
            with own_precision(self.model, self.model.device):
                stream, y = layers.rows(embed(ids), feature, PagedAttention(self.kv_cache, metadata))
                if not step:
                    stream, y = stream[source], y[source]
                logits = layers.lm_head(y)
            for number, tokens in never.items():
                logits.masked_fill_((group == number)[:, None] & tokens, -torch.inf)
            best = row_topk(logits, self._drafts.width, check=False)
            ids = targets[best.token.clamp(min=0)]  # a row without a choice has none behind it either
            results.append(torch.stack((ids, bits_of(best.logprob))))
        return torch.cat(results, 1)
