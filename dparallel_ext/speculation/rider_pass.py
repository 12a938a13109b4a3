"""Riders in a pass: rows that join it at a layer, see the nodes and riders before them, and guess tokens.

Up to that layer the pass runs without riders, so that earlier layers have none of their keys and values
(Hidden Transfer, arXiv 2404.12022); with layer 0 riders are there from the beginning (prompt tokens,
2405.18628; masks, 2604.11035).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..cache import AttentionMetadata, KVCache, PadTo, Span
from ..decoding.sequence_settings import SamplingGroup
from ..models import Model
from ..models.modules import Stream
from .draft import Draft
from .drafter import Adapting, Riders
from .sequence import CausalSequence


def inputs(
    riders: Riders,
    kv_cache: KVCache,
    sequences: Mapping[int, CausalSequence],
    drafts: Mapping[int, Draft],
    tree: bool,
    wanted: int,
    pad_to: PadTo,
) -> tuple[tuple[Tensor, ...], int]:
    """The tensors for `step` and `guesses`, and the number of tokens, padding included, before riders join.

    sequences: that of each draft. wanted: the number of rows whose logits are needed, riders included.
    """
    spans: list[Span] = []
    parents: list[tuple[int, ...]] = []
    node: list[int] = []
    number: list[int] = []
    order: list[int] = []
    first: list[int] = []
    offset = 0
    for b, draft in drafts.items():
        sequence = sequences[b]
        end = sequence.known + len(draft.tokens)
        spans.append(Span(b, sequence.num_cached, end, end))
        parents.append(draft.verified_rows)
        root = offset + sequence.known - sequence.num_cached - 1
        order += [*range(offset, root + 1 + len(draft.tokens))]
        row_of_rider = len(first) + 1 + len(draft.tokens)
        counts = draft.riders or [0] * (1 + len(draft.tokens))
        for place, count in enumerate(counts):
            first.append(row_of_rider)
            row_of_rider += count
            order += [-1] * count  # replaced below by the riders' indices
            node += [root + place] * count
            number += range(count)
        first += [0] * sum(counts)
        offset += end - sequence.num_cached
    if riders.layer:
        below = kv_cache.metadata(spans, pad_to, causal=not tree, parents=parents if tree else None)
        tensors, tokens = below.tensors, len(below.positions)
    else:
        tensors, tokens = (), offset if pad_to is None else pad_to(offset)
    rider = iter(range(tokens, tokens + len(node)))
    order = [next(rider) if place < 0 else place for place in order]
    if pad_to is not None:
        for numbers, size in ((order, len(order)), (first, wanted), (node, len(node)), (number, len(node))):
            numbers += [0] * (pad_to(size) - size)
    of_riders = (torch.tensor(numbers, device="cpu") for numbers in (node, number, order, first))
    return (*tensors, *of_riders), tokens


def step(
    model: Model,
    riders: Riders,
    kv_cache: KVCache,
    ids: Tensor,
    metadata: AttentionMetadata,
    joined: Sequence[Tensor],
) -> Tensor:
    """`Model.step` of the tokens `ids`, joined by riders: hidden states (N, width) of all rows of
    `metadata`."""
    *below, node, number, order, _ = joined
    stream = model.embedded(ids)
    if riders.layer:
        without = AttentionMetadata(metadata.max_q_len, metadata.max_kv_len, *below, causal=metadata.causal)
        stream = model.run_layers(stream, kv_cache, without, 0, riders.layer)
    joining = riders.embed(stream.sum[node], number)
    delta = None if stream.delta is None else torch.cat((stream.delta, torch.zeros_like(joining)))[order]
    stream = Stream(torch.cat((stream.x, joining))[order], delta)
    if isinstance(riders, Adapting):
        model = riders.through(model, (order >= len(ids))[:, None])
    return model.final_norm(model.run_layers(stream, kv_cache, metadata, riders.layer))


def guesses(
    riders: Riders,
    groups: Sequence[SamplingGroup],
    logits: Tensor,
    edges: Tensor,
    path: Tensor,
    count: Tensor,
    first: Tensor,
) -> Tensor:
    """(B, K) int64: the guesses of the riders of each lane's last accepted node.

    edges: (groups, 2, B) int64, rows [first, last) of each lane among the logits (M, V). path, count: of
    `accept`, (B, D) and (B,). first: (M,) int64, the row of each node's first rider among the logits.
    """
    leaf = path.gather(1, (count - 1).clamp(min=0)[:, None])[:, 0].clamp(min=0)
    begin = first[edges[:, 0].sum(0) + leaf]  # a lane is in one group, and its edges are 0 in the others
    rows = (begin[:, None] + torch.arange(riders.most, device=begin.device)).clamp(max=len(logits) - 1)
    tokens = [
        riders.guess(logits, rows, group.suppress).where((edge[1] > edge[0])[:, None], -1)
        for group, edge in zip(groups, edges, strict=True)
    ]
    return functools.reduce(torch.maximum, tokens)
