"""Trees of EAGLE-3's guesses: the dynamic trees of EAGLE-2, arXiv 2406.16858.

EAGLE-3 knows of a guess what stands in front of it, so each node has guesses of its own:

    node      a path of guesses; its score is the sum of their log-probabilities, each behind those in front
    level     the `width` best nodes of a depth, of those that the level before has made; each makes `width`
              nodes of the next depth
    draft     the n nodes of the highest scores of all that were made. A node's score is never above its
              parent's, so they form a tree

A pass computes all levels so far, since the nodes of one see only some of those before: n levels are
width x (1 + 2 + ... + n) pairs, where a chain of n guesses is n pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..cache import WORD, AttentionMetadata, Span
from ..packed import Packing, bits_of, floats_of
from ..types import RowTopK
from .ddtree import NODES
from .draft import Draft
from .drafter import DraftKey, Lane
from .eagle_passes import EagleSession


class _Level(NamedTuple):
    """The root or the nodes of a level, R of each of E trees."""

    score: Tensor
    """(E, R) float32"""
    number: Tensor
    """(E, R) int64: among all nodes that the tree's passes make; -1: the root."""
    seen: Tensor
    """(E, R, W) int64: words of bits, one for each node of the levels so far that a node sees."""


class _Rows(NamedTuple):
    """The pairs of the nodes of the levels so far, R of each of E trees."""

    token: Tensor
    """(E, R) int64"""
    feature: Tensor
    """(E, R, width of the drafter): the output of the parent's row."""
    seen: Tensor
    """(E, R, W), as of a `_Level`."""


class _Nodes(NamedTuple):
    """The nodes that a level's nodes have made, N of each of E trees."""

    token: Tensor
    score: Tensor
    parent: Tensor
    """(E, N) each; of the parent its number."""


class EagleTreeSession(EagleSession):
    """Drafts trees. A node's pair has the position of its depth, and one of the slots behind the text's."""

    def _spare(self) -> int:
        return self._drafts.width * (self._options.block - 2)

    def _put_steps(
        self,
        packing: Packing,
        lanes: Sequence[Lane],
        counts: Sequence[int],
        groups: Sequence[int],
        end: int,
        bounds: list[int],
    ) -> list[int]:
        """Pack the passes behind the first, one for each level whose nodes make guesses, as `EagleSession`
        does. Returns nothing."""
        width = self._drafts.width
        for level in range(1, max(counts)):
            rows = level * width
            # Of a level's nodes only the depth is known; `_compute` puts in what they see.
            parents = [node - node % width - width if node >= width else -1 for node in range(rows)]
            known = [len(lane.tokens) - 1 for lane in lanes]
            spans = [Span(lane.lane, at, at + rows, at + rows) for lane, at in zip(lanes, known, strict=True)]
            padded, *bound = self.kv_cache.put(packing, spans, self._pad_to, parents=[parents] * len(lanes))
            bounds += bound
            packing.padded(range(rows * len(lanes)), 0, padded)
            last = [row for i in range(1, len(lanes) + 1) for row in range(i * rows - width, i * rows)]
            packing.padded(last, 0, end * width)
            packing.padded([group for group in groups for _ in range(width)], -1, end * width)
        return []

    def _compute(self, key: DraftKey, inputs: Tensor) -> Tensor:
        """(3, E, n) int64, E at least the number of lanes: of each lane's best n nodes, best first, the
        token, the bits of the score in float32, and the parent: the root, 0, or a node from 1 on. Nodes that
        are none have the score -inf."""
        about, *bounds = key.numbers
        choose, (stream, y, group, tensors) = self._chooser(key, inputs.device), self._first(key, inputs)
        count, width = len(stream), self._drafts.width
        own = _own_bits(max(1, len(bounds) // 2 - 1) * width, inputs.device)
        stream, none = stream[:, None], torch.zeros((count, 1), dtype=torch.int64, device=inputs.device)
        level = _Level(none.float(), none - 1, none[..., None].expand(-1, -1, own.shape[1]))
        rows = _Rows(none[:, :0], stream[:, :0], level.seen[:, :0])
        made = [_guessed(level, choose(y, group))]
        for bound in zip(bounds[2::2], bounds[3::2], strict=True):
            metadata = AttentionMetadata(*bound, *tensors[: about + 1])
            keep, source, group, *tensors = tensors[about + 1 :]
            start, first = rows.token.shape[1], sum(nodes.token.shape[1] for nodes in made[:-1])
            score, best = made[-1].score.topk(width)
            parent = best // width
            seen = _picked(level.seen, parent) | own[start : start + width]
            level = _Level(score, first + best, seen)
            new = _Rows(made[-1].token.gather(1, best), _picked(stream, parent), seen)
            rows = _Rows(*(torch.cat(pair, 1) for pair in zip(rows, new, strict=True)))
            ids, feature, ancestors = (of_rows.flatten(0, 1)[keep] for of_rows in rows)
            assert metadata.ancestors is not None
            ancestors = ancestors[:, : metadata.ancestors.shape[1]]
            stream, y = self._rows(ids, feature, replace(metadata, ancestors=ancestors))
            stream = stream[source].view(count, width, -1)
            made.append(_guessed(level, choose(y[source], group)))
        return _best(_Nodes(*(torch.cat(values, 1) for values in zip(*made, strict=True))))

    def _read(
        self, best: Tensor, rows: Sequence[int], counts: Sequence[int], sizes: Sequence[int]
    ) -> list[Draft]:
        tokens, bits, parents = best.cpu()
        drafts = []
        for lane, size in enumerate(sizes):
            chances = [math.exp(score) for score in floats_of(bits[lane, :size]).tolist()]
            n = sum(chance > 0 for chance in chances)
            drafted = tokens[lane, :n].tolist(), parents[lane, :n].tolist(), chances[:n]
            drafts.append(self._drafts.draft(*drafted))
        return drafts


def _own_bits(count: int, device: torch.device) -> Tensor:
    """(count, W) int64: the word of each of so many nodes in which its own bit is set."""
    place = torch.arange(count, device=device)[:, None]
    word = torch.arange(-(-count // WORD), device=device)
    return torch.where(place // WORD == word, 1 << place % WORD, 0)


def _picked(values: Tensor, rows: Tensor) -> Tensor:
    """(E, K, D): rows (E, K) of values (E, R, D)."""
    return values.gather(1, rows[..., None].expand(-1, -1, values.shape[2]))


def _guessed(level: _Level, best: RowTopK) -> _Nodes:
    """The nodes of the guesses (E x R, width) behind a level's nodes."""
    score = level.score.flatten()[:, None] + best.logprob.clamp(max=0.0).nan_to_num(
        -math.inf, neginf=-math.inf
    )
    count, width = len(level.score), best.token.shape[1]
    parent = level.number.repeat_interleave(width, 1)
    return _Nodes(best.token.view(count, -1), score.view(count, -1), parent)


def _best(nodes: _Nodes) -> Tensor:
    """The result of `_compute`, of all nodes that were made. A parent is in front of its children, which have
    a later number and no higher score."""
    order = nodes.score.sort(dim=1, descending=True, stable=True).indices
    rank = order.argsort(1) + 1
    best = order[:, :NODES]
    above = nodes.parent.gather(1, best)
    parent = torch.where(above < 0, 0, rank.gather(1, above.clamp(min=0)))
    return torch.stack((nodes.token.gather(1, best), bits_of(nodes.score.gather(1, best)), parent))
