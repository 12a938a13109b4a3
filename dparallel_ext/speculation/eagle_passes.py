"""The passes of drafters of the kinds EAGLE-3 and P-EAGLE; see `eagle`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..cache import AttentionMetadata, KVCache, Span
from ..decoding.sequence_settings import grouped
from ..models import Model, own_precision, rope
from ..models.attention import PagedAttention
from ..ops import row_topk
from ..packed import Packing, bits_of, unpack
from ..types import RowTopK
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
        s, length = self._options.shape, kv_cache.length + self._spare()
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

    def _spare(self) -> int:
        """The slots of a lane beyond its positions."""
        return 0

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
        going = [(lane, n) for lane, n in zip(lanes, sizes, strict=True) if n and len(lane.tokens) > 1]
        made = self._made(*zip(*going, strict=True)) if going else []
        drafts = dict(zip([lane.lane for lane, _ in going], made, strict=True))
        return [drafts.get(lane.lane, Draft()) for lane in lanes]

    def _made(self, lanes: Sequence[Lane], sizes: Sequence[int]) -> list[Draft]:
        """A draft for each of the lanes, of at most so many nodes."""
        packing, (numbers, groups) = Packing(), grouped(lane.sampling.greedy for lane in lanes)
        counts = [min(size, self._options.block - 1) for size in sizes]
        about, source, bounds = self._put_first(packing, lanes, counts)
        end = self._put_sources(packing, source)
        if self._options.mask_id is None:
            packing.padded(numbers, -1, end)
            rows = self._put_steps(packing, lanes, counts, numbers, end, bounds)
        else:
            repeated = [number for number, count in zip(numbers, counts, strict=True) for _ in range(count)]
            packing.padded(repeated, -1, end)
            rows = [*range(len(source))]
        best = self._run_pass(packing, (about, *bounds), groups)
        for lane in lanes:
            self._computed[lane.lane] = len(lane.tokens) - 1
        return self._read(best, rows, counts, sizes)

    def _put_first(
        self, packing: Packing, lanes: Sequence[Lane], counts: Sequence[int]
    ) -> tuple[int, list[int], list[int]]:
        """Pack the first pass: the known pairs that are not computed, and P-EAGLE's masks.

        counts: the depth of each lane's draft. Returns the number of tensors of its metadata, the rows whose
        logits are read, and its `max_q_len` and `max_kv_len`.
        """
        mask_id = self._options.mask_id
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
        return about, source, bounds

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
        about, *bounds = key.numbers
        choose, (stream, y, group, tensors) = self._chooser(key, inputs.device), self._first(key, inputs)
        best = [choose(y, group)]
        for bound in zip(bounds[2::2], bounds[3::2], strict=True):
            metadata = AttentionMetadata(*bound, *tensors[:about], causal=True)
            keep, group, *tensors = tensors[about:]
            stream, y = self._rows(best[-1].token[keep, 0], stream[keep], metadata)
            best.append(choose(y, group))
        return torch.cat([torch.stack((token, bits_of(logprob))) for token, logprob in best], 1)

    def _read(
        self, best: Tensor, rows: Sequence[int], counts: Sequence[int], sizes: Sequence[int]
    ) -> list[Draft]:
        """The drafts in the result of `_compute`. rows: what `_put_steps` has returned."""
        return self._drafts.drafts(best, rows, counts, sizes)

    def _first(self, key: DraftKey, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Run the first pass. The output of the layers and its norm (M, width), for the rows that are read;
        their groups; the tensors of later passes."""
        about, max_q_len, max_kv_len, *_ = key.numbers  # `about`: the number of tensors of the metadata
        tensors = unpack(inputs, key.shapes)
        metadata = AttentionMetadata(max_q_len, max_kv_len, *tensors[:about], causal=True)
        ids, place, source, group, *tensors = tensors[about:]
        stream, y = self._rows(ids, self.features[place], metadata)
        return stream[source], y[source], group, tensors

    def _rows(self, ids: Tensor, feature: Tensor, metadata: AttentionMetadata) -> tuple[Tensor, Tensor]:
        """The output of the layers and its norm (N, width), of pairs (N,) and (N, width)."""
        layers = self._layers
        embed = self.model.embed if layers.embed_tokens is None else layers.embed_tokens
        with own_precision(self.model, self.model.device):
            return layers.rows(embed(ids), feature, PagedAttention(self.kv_cache, metadata))

    def _chooser(self, key: DraftKey, device: torch.device) -> Callable[[Tensor, Tensor], RowTopK]:
        """choose(y, group): the guesses (M, width) behind normed outputs (M, width), likeliest first, as ids
        of the target, and their log-probabilities, which are -inf or NaN where a row has no more guesses.
        group: (M,), the number of each row's."""
        layers = self._layers
        targets = layers.d2t + torch.arange(len(layers.d2t), device=device)
        suppressed = key.suppressed(self.model.shape.embedding_size)
        never = {number: out[targets] for number, out in suppressed.items()}

        def choose(y: Tensor, group: Tensor) -> RowTopK:
            with own_precision(self.model, self.model.device):
                logits = layers.lm_head(y)
            for number, tokens in never.items():
                logits.masked_fill_((group == number)[:, None] & tokens, -torch.inf)
            best = row_topk(logits, self._drafts.width, check=False)
            # A row without a choice has none behind it either.
            return best._replace(token=targets[best.token.clamp(min=0)])

        return choose
