"""What people would use instead, in plain torch, written from the formulas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def published(tokens: Tensor, logits: Tensor, mask_id: int, start: int, end: int, threshold: float) -> None:
    """One step as the published decoders do it: every row, float64, and a Python loop over tokens."""
    masked = tokens == mask_id
    masked[:, :start] = False
    masked[:, end:] = False
    best = logits.argmax(-1)  # (B, L)
    p = logits.to(torch.float64).softmax(-1)  # (B, L, V)
    entropy = -(p * torch.log(p + 1e-10)).sum(-1)
    score = torch.where(masked, -entropy, -torch.inf)
    chosen = torch.zeros_like(masked)
    for b in range(len(tokens)):
        if not bool(masked[b].any()):
            continue
        order = score[b].topk(int(masked[b].sum())).indices
        for rank, position in enumerate(order.tolist()):
            if rank == 0 or -score[b, position] <= threshold:
                chosen[b, position] = True
    tokens[chosen] = best[chosen]


def eager(tokens: Tensor, logits: Tensor, mask_id: int, start: int, end: int, threshold: float) -> None:
    """The best float32 torch: the needed rows only, no loop."""
    commit(tokens, statistics, logits, mask_id, start, end, threshold)


def statistics(z: Tensor) -> tuple[Tensor, Tensor]:
    """argmax and entropy of rows (N, V)."""
    z = z.float()
    lse = z.logsumexp(-1)
    return z.argmax(-1), lse - ((z - lse[:, None]).exp() * z).sum(-1)


def commit(
    tokens: Tensor,
    stats: Callable[[Tensor], tuple[Tensor, Tensor]],
    logits: Tensor,
    mask_id: int,
    start: int,
    end: int,
    threshold: float,
) -> None:
    window = tokens[:, start:end]
    masked = window == mask_id
    if not bool(masked.any()):
        return
    best, entropy = stats(logits[:, start:end][masked])
    score = torch.full(window.shape, torch.inf)
    score[masked] = entropy
    keep = masked & ((score <= threshold) | (score == score.amin(1, keepdim=True)))
    window[keep] = best[keep[masked]]


_compiled: Any = None


def compiled(tokens: Tensor, logits: Tensor, mask_id: int, start: int, end: int, threshold: float) -> None:
    """torch.compile of the above."""
    global _compiled
    if _compiled is None:
        _compiled = torch.compile(statistics, dynamic=False)
    commit(tokens, _compiled, logits, mask_id, start, end, threshold)


def published_decode(
    model: Any, prompt: Tensor, gen_length: int, block_length: int, threshold: float, cache: str = "none"
) -> tuple[Tensor, int]:
    """The published loop, batch 1, with the same forward pass as ours and its full LM head.

    "none": the whole sequence each pass. "dual": one full pass a block, then the block alone, with the
    published extra pass of a block that its full pass has completed.
    """
    length, mask_id = prompt.shape[1], model.mask_id
    x = torch.cat((prompt, prompt.new_full((1, gen_length), mask_id)), 1)
    forwards = 0
    with torch.no_grad():
        slots = model.new_cache(1, x.shape[1]) if cache == "dual" else None
        for start in range(length, length + gen_length, block_length):
            end, turn = start + block_length, 0
            while turn == 0 or (turn == 1 and slots is not None) or bool((x[:, start:end] == mask_id).any()):
                if slots is not None and turn > 0:
                    plan = slots.plan(model.spans(0, start, end, x.shape[1]))
                    logits = model.head(model.step(x[0, start:end], slots, plan))[None]
                    published(x[:, start:end], logits, mask_id, 0, block_length, threshold)
                elif slots is not None:
                    plan = slots.plan(model.spans(0, 0, x.shape[1], x.shape[1]))
                    logits = model.head(model.step(x[0], slots, plan))[None]
                    published(x, logits, mask_id, start, end, threshold)
                else:
                    logits = model.head(model.hidden(x))
                    published(x, logits, mask_id, start, end, threshold)
                turn += 1
                forwards += 1
    return x, forwards


def published_quota_decode(
    model: Any, prompt: Tensor, gen_length: int, block_length: int, quota: int
) -> Tensor:
    """The published loop without a cache, committing the `quota` most confident tokens a pass."""
    length, mask_id = prompt.shape[1], model.mask_id
    x = torch.cat((prompt, prompt.new_full((1, gen_length), mask_id)), 1)
    with torch.no_grad():
        for start in range(length, length + gen_length, block_length):
            end = start + block_length
            while bool((x[:, start:end] == mask_id).any()):
                p = model(x).logits.double().softmax(-1)  # (1, L, V)
                p[..., mask_id] = -1.0
                confidence, token = p.max(-1)
                masked = x == mask_id
                masked[:, end:] = False
                score = torch.where(masked, confidence, -torch.inf)
                best = score.topk(quota, dim=1).indices
                x[0, best[0]] = token[0, best[0]]
    return x


def published_loss(logits: Tensor, labels: Tensor, active: Tensor) -> Tensor:
    """The certainty-forcing loss as published: softmax and entropy of the whole (B, T, V) tensor."""
    z = logits.float()
    nll = functional.cross_entropy(z.transpose(1, 2), labels, reduction="none")
    entropy = -((z / 0.5).softmax(-1) * (z / 0.5).log_softmax(-1)).sum(-1)
    gated = active & (z.argmax(-1) == labels)
    ce = (nll * active).sum() / active.sum().clamp(min=1)
    return ce + 2.0 * (entropy * gated).sum() / gated.sum().clamp(min=1)


def eager_loss(logits: Tensor, labels: Tensor, active: Tensor) -> Tensor:
    """The best float32 torch: the active rows only."""
    return row_loss(logits[active], labels[active])


def row_loss(z: Tensor, y: Tensor) -> Tensor:
    """Of rows (N, V), all active."""
    z = z.float()
    nll = functional.cross_entropy(z, y)
    log_q = (2.0 * z).log_softmax(-1)
    entropy = -(log_q.exp() * log_q).sum(-1)
    gated = z.argmax(-1) == y
    return nll + 2.0 * (entropy * gated).sum() / gated.sum().clamp(min=1)


_compiled_loss: Any = None


def compiled_loss(logits: Tensor, labels: Tensor, active: Tensor) -> Tensor:
    """torch.compile of the above."""
    global _compiled_loss
    if _compiled_loss is None:
        _compiled_loss = torch.compile(row_loss, dynamic=False)
    return _compiled_loss(logits[active], labels[active])


def masked_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor) -> Tensor:
    """Padded batch: torch's attention of q (B, Q, H, D) to caches (B, Hkv, L, D) under a mask."""
    seen = torch.arange(k_cache.shape[2], device=q.device) < lengths[:, None]
    return functional.scaled_dot_product_attention(
        q.transpose(1, 2), k_cache, v_cache, attn_mask=seen[:, None, None], enable_gqa=True
    ).transpose(1, 2)


def attention_by_sequence(q: Tensor, k_cache: Tensor, v_cache: Tensor, sizes: list[int]) -> Tensor:
    """No mask and no padding: torch's attention of each sequence to the slots that it sees."""
    return torch.cat(
        [
            functional.scaled_dot_product_attention(
                q[b : b + 1].transpose(1, 2),
                k_cache[b : b + 1, :, :length],
                v_cache[b : b + 1, :, :length],
                enable_gqa=True,
            ).transpose(1, 2)
            for b, length in enumerate(sizes)
        ]
    )


def rotate_and_put(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    slots: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> None:
    """The rotary embedding in float32 as LLaMA's, then the cache by index_put."""
    c, s = (t[positions][:, None] for t in (cos, sin))  # (N, 1, D / 2)

    def rotate(x: Tensor) -> Tensor:
        a, b = x.float().chunk(2, -1)
        return torch.cat((a * c - b * s, b * c + a * s), -1).to(x.dtype)

    page, at = slots // k_cache.shape[2], slots % k_cache.shape[2]
    k_cache[page, :, at] = rotate(k)
    v_cache[page, :, at] = v
    q.copy_(rotate(q))
