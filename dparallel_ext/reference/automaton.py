"""The ops of constrained decoding."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..automaton import Tables
from ..types import RowStats
from .decoding import row_stats

_FIELDS = RowStats._fields[:-1]


def class_stats(logits: Tensor, ids: Tensor, offsets: Tensor) -> RowStats:
    """See `dparallel_ext.ops.class_stats`; (N, V) -> fields (N, K)."""
    spans = list(zip(offsets.tolist(), offsets.tolist()[1:], strict=False))
    of_classes = [_of_class(row, ids[begin:end].long()) for row in logits for begin, end in spans]
    columns = zip(*of_classes, strict=True) if of_classes else [()] * len(_FIELDS)
    shape = len(logits), len(spans)
    stats = []
    for name, column in zip(_FIELDS, columns, strict=True):
        dtype = torch.int64 if name in ("token", "sample") else torch.float32
        stats.append(torch.tensor(column, dtype=dtype, device=logits.device).view(shape))
    return RowStats(*stats)


def _of_class(row: Tensor, ids: Tensor) -> list[float]:
    ids = ids[(ids >= 0) & (ids < len(row))]
    z = row[ids]
    if bool(z.isnan().any()):
        return [-1 if name in ("token", "sample") else math.nan for name in _FIELDS]
    if not bool((z > -math.inf).any()):
        empty = {"token": -1, "sample": -1, "entropy": 0.0, "log_sum": 0.0}
        nothing = dict.fromkeys(("top1", "top2", "lse", "max_logit"), -math.inf)
        return [{**empty, **nothing}.get(name, math.nan) for name in _FIELDS]
    stats = row_stats(z[None])
    token = int(ids[stats.token])
    return [token if name in ("token", "sample") else float(getattr(stats, name)) for name in _FIELDS]


def best_path(
    scores: Tensor, begin: Tensor, end: Tensor, enter: Tensor, room: Tensor, tables: Tables
) -> tuple[Tensor, Tensor]:
    """See `dparallel_ext.ops.best_path`."""
    windows, cells, _ = scores.shape
    state, token_class = torch.full((windows, cells + 1), -1), torch.full((windows, cells), -1)
    edges = list(zip(tables.origin.tolist(), tables.edge_class.tolist(), strict=True))
    offsets, distance = tables.edge_offsets.tolist(), tables.distance.tolist()
    for w in range(windows):
        first, last, at = int(begin[w]), int(end[w]), int(enter[w])
        state[w] = at
        best = {at: 0.0}  # the sum of the best path to each state
        taken: list[dict[int, int]] = []  # its last edge, for each cell
        for score in scores[w, first:last].double().tolist():
            arrivals: dict[int, tuple[float, int]] = {}  # the best path to each state, and its last edge
            for target in range(len(distance)):
                for edge in range(offsets[target], offsets[target + 1]):
                    origin, of_edge = edges[edge]
                    total = best.get(origin, -math.inf) + score[of_edge]
                    if total > arrivals.get(target, (-math.inf, -1))[0]:
                        arrivals[target] = total, edge
            best = {target: total for target, (total, _) in arrivals.items()}
            taken.append({target: edge for target, (_, edge) in arrivals.items()})
        if not best:
            continue
        fits = {s: total for s, total in best.items() if distance[s] <= int(room[w])} or best
        at = min(s for s, total in fits.items() if total == max(fits.values()))
        state[w, max(first, last) :] = at
        for cell in reversed(range(first, last)):
            origin, token_class[w, cell] = edges[taken[cell - first][at]]
            state[w, cell] = at = origin
    return state.to(scores.device), token_class.to(scores.device)
