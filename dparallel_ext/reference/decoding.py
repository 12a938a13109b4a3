"""From logits to tokens. `accept` and `unmask_` stand on `row_stats`, `unmask_` on `select` too."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import policies
from ..arguments import temperature_in_force
from ..types import NO_ERROR, AcceptOutput, CommitOutput, RowStats, RowTopK, UnmaskOutput

_LARGEST = torch.finfo(torch.float32).max
_KEY = ("seed", "sequence", "position", "step")
_FIELDS = RowStats._fields[:-1]


def row_stats(
    logits: Tensor,
    *,
    rows: Tensor | None = None,
    mask_id: int | None = None,
    suppress: Tensor | list[int] | None = None,
    ids: Tensor | None = None,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | Tensor = 0,
    sequence: int | Tensor = 0,
    position: int | Tensor | None = None,
    step: int | Tensor = 0,
) -> RowStats:
    """See `dparallel_ext.row_stats`. logits (..., V) -> fields (...), or (N,) with `rows` (N,)."""
    shape = logits.shape[:-1]
    z = logits.reshape(-1, logits.shape[-1])  # (R, V)
    if rows is not None:
        z, shape = z[rows], rows.shape
    z = z.double().clamp(max=_LARGEST)  # +inf counts as the largest float32
    gathered = None
    if ids is not None:
        columns = ids.expand(len(z), -1) if ids.ndim == 1 else ids.reshape(len(z), ids.shape[-1])
        gathered = z.gather(1, columns).float().reshape(*shape, ids.shape[-1])
    if suppress is not None:
        z[:, torch.as_tensor(suppress, dtype=torch.long)] = -math.inf
    open_ = z.clone()  # ids that may be chosen
    if mask_id is not None:
        open_[:, mask_id] = -math.inf
    bad = z.isnan().any(1) | (open_ == -math.inf).all(1)
    if bool(bad.any()):
        row = int(bad.nonzero()[0, 0])
        raise ValueError(f"logits: row {row} holds NaN, or no id it may choose has a finite logit")

    top = open_.topk(min(2, z.shape[1]), dim=1).values
    top1 = top[:, 0]
    top2 = top[:, 1] if z.shape[1] > 1 else torch.full_like(top1, -math.inf)
    token = (open_ == top1[:, None]).int().argmax(1)  # the lowest id of a tie
    m = z.amax(1)
    d = (z - m[:, None]).clamp(min=-1e4)
    e = d.exp()
    s, w = e.sum(1), (e * d).sum(1)
    p1, p2 = (top1 - m).exp() / s, (top2 - m).exp() / s
    sample, chosen, logprob = token, p1, top1 - m - s.log()
    temperature = temperature_in_force(temperature)
    if temperature > 0:
        n = z.shape[0]
        where = torch.arange(n) if position is None else position
        keys = [torch.as_tensor(k, device=z.device).expand(n) for k in (seed, sequence, where, step)]
        noise = gumbel(keys[0], keys[1], keys[2], keys[3], z.shape[1])
        scaled = (open_ - top1[:, None]) / temperature
        scaled = scaled.where(nucleus(open_, top_p, top_k, temperature), -math.inf)
        sample = (scaled + noise).argmax(1)
        picked = z.gather(1, sample[:, None])[:, 0]
        chosen = (picked - m).exp() / s
        logprob = scaled.log_softmax(1).gather(1, sample[:, None])[:, 0]

    def inf(x: Tensor) -> Tensor:
        return torch.where(x >= _LARGEST, math.inf, x)

    exact = (
        inf(top1), inf(top2), inf(m + s.log()), chosen, p1 - p2, s.log() - w / s, logprob, inf(m), s.log()
    )  # fmt: skip
    top1, top2, lse, confidence, margin, entropy, *rest = (x.float().reshape(shape) for x in exact)
    token, sample = token.reshape(shape), sample.reshape(shape)
    stats = RowStats(token, top1, top2, lse, confidence, margin, entropy, sample, *rest)
    return stats._replace(logits=gathered)


def row_topk(
    logits: Tensor,
    k: int,
    *,
    rows: Tensor | None = None,
    mask_id: int | None = None,
    suppress: Tensor | list[int] | None = None,
) -> RowTopK:
    """See `dparallel_ext.row_topk`."""
    shape = row_stats(logits, rows=rows, mask_id=mask_id, suppress=suppress).token.shape  # or an error
    z = logits.reshape(-1, logits.shape[-1])
    z = (z if rows is None else z[rows]).double().clamp(max=_LARGEST)
    if suppress is not None:
        z[:, torch.as_tensor(suppress, dtype=torch.long)] = -math.inf
    logprob = z.log_softmax(1)
    if mask_id is not None:
        z[:, mask_id] = -math.inf
    order = z.argsort(dim=1, descending=True, stable=True)[:, :k]  # ties to the lowest id
    none = z.gather(1, order) == -math.inf
    token, logprob = order.masked_fill(none, -1), logprob.gather(1, order).masked_fill(none, -math.inf)
    short = (0, k - order.shape[1])  # a vocabulary may have fewer than k ids
    token, logprob = F.pad(token, short, value=-1), F.pad(logprob, short, value=-math.inf)
    return RowTopK(token.view(*shape, k), logprob.float().view(*shape, k))


def nucleus(logits: Tensor, top_p: float | None, top_k: int | None, temperature: float = 1.0) -> Tensor:
    """(N, V) bool: whether an id may be sampled from softmax(logits / temperature), of logits (N, V). It may
    if it is among the top_k most probable ids (ties to the lowest id), and those more probable have at most
    top_p of the probability."""
    order = logits.argsort(dim=1, descending=True, stable=True)
    p = (logits / temperature).softmax(1).gather(1, order)
    allowed = torch.ones_like(p, dtype=torch.bool)
    if top_p is not None and top_p < 1:
        allowed &= p.cumsum(1) - p <= top_p
    if top_k:
        allowed[:, top_k:] = False
    return torch.zeros_like(allowed).scatter(1, order, allowed)


def gumbel(seed: Tensor, sequence: Tensor, position: Tensor, step: Tensor, vocab: int) -> Tensor:
    """Gumbel noise (N, V) float64 of the keys (N,) int64: Philox4x32-10 (Salmon et al., SC'11)."""
    low = 0xFFFFFFFF
    n, groups = len(seed), -(-vocab // 4)
    c = [
        torch.arange(groups, device=seed.device).expand(n, groups),
        (step & low)[:, None].expand(n, groups),
        (position & low)[:, None].expand(n, groups),
        (sequence & low)[:, None].expand(n, groups),
    ]
    k = [(seed & low)[:, None], ((seed >> 32) & low)[:, None]]
    for _ in range(10):
        (h0, l0), (h1, l1) = _multiply(0xD2511F53, c[0]), _multiply(0xCD9E8D57, c[2])
        c = [h1 ^ c[1] ^ k[0], l1, h0 ^ c[3] ^ k[1], l0]
        k = [(k[0] + 0x9E3779B9) & low, (k[1] + 0xBB67AE85) & low]
    words = torch.stack(c, dim=2).reshape(n, groups * 4)[:, :vocab]
    v = (words.double() + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-v))


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a 32 x 32 bit product, without overflowing int64."""
    low = (a & 0xFFFF) * b  # < 2^48
    high = (a >> 16) * b  # < 2^48
    total = low + ((high & 0xFFFF) << 16)
    return (high >> 16) + (total >> 32), total & 0xFFFFFFFF


def select(confidence: Tensor, margin: Tensor, entropy: Tensor, eligible: Tensor, policy: Tensor) -> Tensor:
    """See `dparallel_ext.select`: bool (B, L), the eligible positions each policy row commits."""
    policies.check(policy, len(eligible))
    commit = torch.zeros_like(eligible)
    for b, (selector, threshold, low, high, score) in enumerate(map(policies.in_force, policy.tolist())):
        by_score = (confidence, -entropy, margin)[int(score)][b]
        where = (eligible[b] & ~by_score.isnan()).nonzero()[:, 0]  # NaN cannot be ordered
        masked = len(where)
        if masked == 0:
            continue
        key = by_score[where].float()
        order = key.argsort(descending=True, stable=True)  # ties to the lowest position
        key = key[order]
        tau = torch.tensor(threshold, dtype=torch.float32)
        rank = torch.arange(1, masked + 1, device=key.device)
        match list(policies.SELECTORS)[int(selector)]:
            case "confidence" | "margin":
                n = int((key >= tau).sum())
            case "entropy":
                n = int((-key <= tau).sum())
            case "quota":
                n = int((rank <= tau).sum())
            case "factor":
                holds = key >= 1 - tau / (rank + 1)
                n = int(rank[holds].max()) if bool(holds.any()) else 0
            case "entropy_bound":
                preceding = torch.cat([key.new_zeros(1), (-key).cumsum(0)[:-1]])
                n = int((preceding <= tau).int().cumprod(0).sum())
            case "frechet":
                gap = key.double() - (1 - key.double()).cumsum(0)
                n = int((gap > tau).int().cumprod(0).sum())
        n = int(min(max(n, low), high, masked))
        commit[b, where[order[:n]]] = True
    return commit


def commit_(
    tokens: Tensor,
    positions: Tensor | None = None,
    commit: Tensor | None = None,
    token: Tensor | None = None,
    *,
    mask_id: int,
    lane: Tensor | None = None,
    start: int | Tensor = 0,
    end: int | Tensor | None = None,
) -> CommitOutput:
    """See `dparallel_ext.commit_`."""
    batch, length = tokens.shape
    before = tokens.clone()
    if commit is not None and token is not None:
        commit, token = commit.flatten(), token.flatten()
        if bool((commit & ((token == mask_id) | (token < 0))).any()):
            raise ValueError("token: expected ids >= 0, and not the mask token")
        at = torch.arange(batch * length, device=tokens.device) if positions is None else positions
        at = at[commit]
        tokens[at // max(length, 1), at % max(length, 1)] = token[commit]
    of = torch.arange(batch, device=tokens.device) if lane is None else lane
    low = torch.as_tensor(start, device=tokens.device).expand(len(of)).clamp(0, length)
    high = torch.as_tensor(length if end is None else end, device=tokens.device).expand(len(of))
    high = torch.maximum(high.clamp(max=length), low)
    column = torch.arange(length, device=tokens.device)
    inside = (column >= low[:, None]) & (column < high[:, None])  # (W, L)
    masks = inside & (tokens[of] == mask_id)
    first = torch.cat((column.where(masks, length), high[:, None]), 1).amin(1)
    return CommitOutput(masks.sum(1), first, (inside & (tokens != before)[of]).sum(1))


def unmask_(
    tokens: Tensor,
    logits: Tensor,
    *,
    mask_id: int,
    lane: Tensor | None = None,
    start: int | Tensor = 0,
    end: int | Tensor | None = None,
    policy: Tensor,
    positions: Tensor | None = None,
    suppress: Tensor | list[int] | None = None,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | Tensor = 0,
    sequence: int | Tensor | None = None,
    step: int | Tensor = 0,
    position_offset: int = 0,
) -> UnmaskOutput:
    """See `dparallel_ext.unmask_`; `policy` (W, 5) rows only."""
    batch, length = tokens.shape
    here = tokens.device
    lane = torch.arange(batch, device=here) if lane is None else lane
    windows, column = len(lane), torch.arange(length, device=here)
    first = torch.as_tensor(start, device=here).expand(windows)[:, None]
    last = torch.as_tensor(length if end is None else end, device=here).expand(windows)[:, None]
    open_ = (column >= first) & (column < last) & (tokens[lane] == mask_id)  # (W, L)
    window = torch.full((batch, length), -1, device=here)  # of each position
    for w, b in enumerate(lane.tolist()):
        if bool((window[b][open_[w]] >= 0).any()):
            raise ValueError("start: expected windows of a sequence that do not overlap")
        window[b][open_[w]] = w
    flat = (window >= 0).flatten().nonzero()[:, 0]
    rows = flat if positions is None else torch.searchsorted(positions, flat)
    of = window.flatten()[flat]

    def key(value: int | Tensor) -> Tensor:
        return torch.as_tensor(value, device=here).expand(windows)[of]

    stats = row_stats(
        logits,
        rows=rows,
        mask_id=mask_id,
        suppress=suppress,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=key(seed),
        sequence=key(lane if sequence is None else sequence),
        position=flat % max(length, 1) + position_offset,
        step=key(step),
    )

    def spread(values: Tensor, count: int, where: Tensor) -> Tensor:
        blank = -1 if values.dtype == torch.int64 else math.nan
        return values.new_full((count,), blank).index_put((where,), values)

    by = full = stats.map(lambda x: spread(x, batch * length, flat).reshape(batch, length))
    commit = select(by.confidence[lane], by.margin[lane], by.entropy[lane], open_, policy)  # (W, L)
    for w, b in enumerate(lane.tolist()):
        tokens[b] = torch.where(commit[w], by.sample[b], tokens[b])
    committed = commit.sum(1)
    remaining = open_.sum(1) - committed
    if positions is not None:
        full = stats.map(lambda x: spread(x, len(positions), rows))
    none = torch.full_like(committed, NO_ERROR)
    return UnmaskOutput(committed, remaining, (remaining == 0).all(), full, none)


def accept(
    logits: Tensor,
    draft: Tensor,
    parent: Tensor,
    q_start: Tensor,
    q_end: Tensor,
    *,
    room: int | Tensor | None = None,
    eos_ids: Tensor | None = None,
    mask_id: int | None = None,
    suppress: Tensor | list[int] | None = None,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    keys: Tensor | None = None,
    max_q_len: int | None = None,
) -> AcceptOutput:
    """See `dparallel_ext.accept`; a bad row has no statistics, like a row that is not read."""
    here, rows, lanes = logits.device, len(logits), len(q_start)
    most = torch.as_tensor(rows if room is None else room).expand(lanes).tolist()
    spans = [range(a, b) for a, b in zip(q_start.tolist(), q_end.tolist(), strict=True)]
    parents, drafts = parent.tolist(), draft.tolist()
    for b, span in enumerate(spans):
        for i, r in enumerate(span):
            if parents[r] not in (range(i) if i else (-1,)):
                raise ValueError(f"parent: expected an earlier row, got {parents[r]} at row {i} of lane {b}")
    open_ = logits.clone()  # (N, V) ids that may be chosen
    if suppress is not None:
        open_[:, torch.as_tensor(suppress, dtype=torch.long)] = -math.inf
    nan = open_.isnan().any(1)
    if mask_id is not None:
        open_[:, mask_id] = -math.inf
    code = torch.where(nan, 1, torch.where((open_ == -math.inf).all(1), 2, 0))
    read = torch.zeros(rows, dtype=torch.bool, device=here)
    for span, n in zip(spans, most, strict=True):
        read[span.start : span.stop] = n > 0
    good = (read & (code == 0)).nonzero()[:, 0]
    ints = torch.full((rows,), -1, device=here)
    stats = RowStats(*(ints if name in ("token", "sample") else ints * math.nan for name in _FIELDS))
    if len(good):
        key = {} if keys is None else dict(zip(_KEY, keys[good].unbind(1), strict=True))
        sampled = row_stats(
            logits, rows=good, mask_id=mask_id, suppress=suppress, temperature=temperature, top_p=top_p,
            top_k=top_k, **key,
        )  # fmt: skip
        stats = RowStats(
            *(a.index_put((good,), x) for a, x in zip(stats[:-1], sampled[:-1], strict=True))  # type: ignore[union-attr,arg-type]
        )
    choices, codes = stats.sample.tolist(), code.tolist()
    count, ended, error = [0] * lanes, [False] * lanes, [NO_ERROR] * lanes
    path = torch.full((lanes, rows if max_q_len is None else max_q_len), -1)
    tokens = path.clone()
    for b, span in enumerate(spans):
        row = 0 if span else None
        while row is not None and count[b] < most[b] and not ended[b]:
            choice, at = choices[span[row]], count[b]
            if choice < 0:
                error[b] = 4 * ((b << 31) + row) + codes[span[row]]
                count[b], path[b], tokens[b] = 0, -1, -1
                break
            path[b, at], tokens[b, at] = row, choice
            count[b], ended[b] = at + 1, eos_ids is not None and choice in eos_ids[b].tolist()
            children = (i for i, r in enumerate(span) if i and parents[r] == row)
            row = next((i for i in children if drafts[span[i]] == choice), None)
    return AcceptOutput(
        torch.tensor(count, dtype=torch.int64, device=here),
        path.to(here),
        tokens.to(here),
        torch.tensor(ended, dtype=torch.bool, device=here),
        stats,
        torch.tensor(error, dtype=torch.int64, device=here),
    )
