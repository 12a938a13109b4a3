"""Baselines that people would use instead, in plain torch, written from the formulas; on any device.

A `Commit` takes (tokens (B, L), logits (B, L, V), mask_id, start, end) and fills masked positions of the
window [start, end) in place. Those here take the rule's parameter, too.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import dparallel_ext as dx

backend: str | None = "inductor"
"""The backend of torch.compile for every "compiled" contender: on a GPU, inductor generates Triton
kernels. None: nothing is compiled, where sizes are tiny and compiling would take minutes."""

Commit = Callable[[Tensor, Tensor, int, int, int], None]


@functools.cache
def compile_(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False, backend=backend) if backend else function


def forget_compiled() -> None:
    """The compiler has a limit of shapes for a function."""
    if backend:
        torch.compiler.reset()
    compile_.cache_clear()


def published(tokens: Tensor, logits: Tensor, mask_id: int, start: int, end: int, threshold: float) -> None:
    """One step as the published decoders do it: every row, in float64, with a Python loop over tokens.

    Commits the positions whose entropy is at most `threshold`, and the one of least entropy (dParallel, arXiv
    2509.26488).
    """
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


def published_quota(tokens: Tensor, logits: Tensor, mask_id: int, start: int, end: int, quota: int) -> None:
    """One step of the published fixed schedule (LLaDA, arXiv 2502.09992): commit the `quota` most confident
    positions of each window, by a softmax in float64.
    """
    p = logits.to(torch.float64).softmax(-1)  # (B, L, V)
    p[..., mask_id] = -1.0
    confidence, token = p.max(-1)
    masked = tokens == mask_id
    masked[:, :start] = False
    masked[:, end:] = False
    score = torch.where(masked, confidence, -torch.inf)
    for b in range(len(tokens)):
        best = score[b].topk(min(quota, int(masked[b].sum()))).indices
        tokens[b, best] = token[b, best]


def eager(tokens: Tensor, logits: Tensor, mask_id: int, start: int, end: int, threshold: float) -> None:
    """`published` as float32 torch does it best: the needed rows only, no loop."""
    commit(tokens, statistics, logits, mask_id, start, end, threshold)


def statistics(z: Tensor) -> tuple[Tensor, Tensor]:
    """The argmax and the entropy (N,) of rows of logits (N, V)."""
    z = z.float()
    lse = z.logsumexp(-1)
    return z.argmax(-1), lse - ((z - lse[:, None]).exp() * z).sum(-1)


def topk(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best ids of rows of logits (N, V) and their log-probabilities, both (N, k)."""
    best, token = z.topk(k, -1)
    return token, best.float() - z.float().logsumexp(-1, keepdim=True)


def move_slots(kv_cache: Tensor, source: Tensor, target: Tensor) -> None:
    """Move slots of kv_cache (layers, 2, pages, heads, page_size, D) by one gather and one scatter."""
    size = kv_cache.shape[4]
    moved = kv_cache[:, :, source // size, :, source % size]
    kv_cache[:, :, target // size, :, target % size] = moved


def commit(
    tokens: Tensor,
    stats: Callable[[Tensor], tuple[Tensor, Tensor]],
    logits: Tensor,
    mask_id: int,
    start: int,
    end: int,
    threshold: float,
) -> None:
    """`published` on the masked rows of the window, by `stats`, which gives a row's argmax and entropy."""
    window = tokens[:, start:end]
    masked = window == mask_id
    if not bool(masked.any()):
        return
    best, entropy = stats(logits[:, start:end][masked])
    score = entropy.new_full(window.shape, torch.inf)
    score[masked] = entropy
    keep = masked & ((score <= threshold) | (score == score.amin(1, keepdim=True)))
    window[keep] = best[keep[masked]]


def compiled(tokens: Tensor, logits: Tensor, mask_id: int, start: int, end: int, threshold: float) -> None:
    """`eager` with its statistics through torch.compile."""
    commit(tokens, compile_(statistics), logits, mask_id, start, end, threshold)


def confidence(z: Tensor, mask_id: int) -> tuple[Tensor, Tensor]:
    """The greatest probability of each row of logits (..., V), and its token; never the mask token."""
    z = z.float()
    masks = torch.arange(z.shape[-1], device=z.device) == mask_id
    best, token = torch.where(masks, -torch.inf, z).max(-1)
    return (best - z.logsumexp(-1)).exp(), token


def compiled_quota(tokens: Tensor, logits: Tensor, mask_id: int, start: int, end: int, quota: int) -> None:
    """`published_quota` in float32, on the window alone, without a loop, its statistics compiled."""
    window = tokens[:, start:end]
    sure, token = compile_(confidence)(logits[:, start:end], mask_id)
    best = torch.where(window == mask_id, sure, -torch.inf).topk(min(quota, window.shape[1]), 1).indices
    old = window.gather(1, best)
    window.scatter_(1, best, torch.where(old == mask_id, token.gather(1, best), old))


class Plain:
    """The weights of one of our models in plain torch, as the published code runs them.

    Called on x (B, Q) it returns the logits (B, Q, V) of every position. Without `start`, x holds whole
    sequences, whose keys and values it keeps. With it, x holds the positions [start, start + Q), which attend
    to the kept keys and values and overwrite their own. compiled: each layer goes through torch.compile.
    """

    def __init__(self, model: dx.models.Model, compiled: bool = False) -> None:
        self.model, state = model, model.state_dict()
        self.layer = compile_(layer) if compiled else layer
        self.kept: list[tuple[Tensor, Tensor]] = []

        def of(name: str, index: int = 0) -> tuple[Tensor, Tensor | None]:
            prefix = model.NAMES[name].format(index)
            return state[f"{prefix}.weight"], state.get(f"{prefix}.bias")

        names = [name for name in inspect.signature(layer).parameters if name in model.NAMES]
        self.layers = [{name: of(name, i) for name in names} for i in range(model.shape.layers)]
        self.embed, self.norm = of("embed")[0], of("norm")[0]
        self.head = (self.embed, None) if model.shape.tied else of("lm_head")

    def __call__(self, x: Tensor, start: int | None = None) -> Tensor:
        s, first = self.model.shape, start or 0
        at = torch.arange(first, first + x.shape[1], device=x.device)
        h = functional.embedding(x, self.embed)  # (B, Q, width)
        cos, sin = dx.rope_table(first + x.shape[1], s.head_dim, s.rope_theta, device=x.device)
        cos, sin = (t[first:].to(torch.float32 if s.rope_in_float32 else h.dtype) for t in (cos, sin))
        if start is None:
            self.kept = []
        for i, weights in enumerate(self.layers):
            old = None if start is None else self.kept[i]
            h, *new = self.layer(h, cos, sin, old, at, s.head_dim, s.eps, **weights)
            if start is None:
                self.kept.append((new[0], new[1]))
        h = rms_norm(h, self.norm, s.eps)
        logits = functional.linear(h, *self.head)
        if s.logit_scale != 1.0:
            logits = logits * s.logit_scale
        return torch.cat((logits[:, :1], logits[:, :-1]), 1) if self.model.shift else logits


def layer(
    x: Tensor, cos: Tensor, sin: Tensor, kept: Any, at: Tensor, head_dim: int, eps: float, *,
    norm1: Any, q: Any, k: Any, v: Any, o: Any, norm2: Any, gate: Any, up: Any, down: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """One layer of `Plain`: x (B, Q, width) at positions `at` (Q,) -> its output, of the same shape, and keys
    and values (B, Hkv, L, D).

    `at` is a tensor: were it a number, the layer would be compiled anew for every block.
    """
    linear = functional.linear
    y = rms_norm(x, norm1[0], eps)
    query, key, value = (linear(y, *w).unflatten(-1, (-1, head_dim)).transpose(1, 2) for w in (q, k, v))
    query, key = (rotate(t, cos, sin) for t in (query, key))
    if kept is not None:
        for old, new in zip(kept, (key, value), strict=True):
            old.index_copy_(2, at, new)
        key, value = kept
    grouped = query.shape[1] != key.shape[1]
    y = functional.scaled_dot_product_attention(query, key, value, enable_gqa=grouped)
    x = x + linear(y.transpose(1, 2).flatten(-2), *o)
    y = rms_norm(x, norm2[0], eps)
    return x + linear(functional.silu(linear(y, *gate)) * linear(y, *up), *down), key, value


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of x (..., width): normalised in float32, scaled in the dtype of x, as published."""
    y = x.float()
    return weight * (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split rotary embedding of x (..., Q, D) by cos, sin (Q, D / 2), computed in their dtype."""
    a, b = x.to(cos.dtype).chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


@torch.no_grad()
def published_decode(
    forward: Callable[..., Tensor],
    prompt: Tensor,
    mask_id: int,
    gen_length: int,
    block_length: int,
    commit: Commit,
    cache: str = "none",
) -> tuple[Tensor, int]:
    """The published loop. Returns tokens (B, P + gen_length) and the number of passes.

    forward: a `Plain`, or for cache "none" a function (x, start) -> logits of the whole sequence.
    cache: "none": each pass computes the whole sequence. "dual": each block takes one full pass, then passes
    over itself alone, at least one, as published, even where the full pass has completed it. The full pass
    of Dream fills the block's first position only.
    """
    alone = cache == "dual" and isinstance(forward, Plain) and forward.model.shift
    length = prompt.shape[1]
    x = torch.cat((prompt, prompt.new_full((len(prompt), gen_length), mask_id)), 1)
    forwards = 0
    for start in range(length, length + gen_length, block_length):
        end, turn = start + block_length, 0
        while turn == 0 or (turn == 1 and cache == "dual") or bool((x[:, start:end] == mask_id).any()):
            if cache == "dual" and turn > 0:
                commit(x[:, start:end], forward(x[:, start:end], start), mask_id, 0, block_length)
            else:
                commit(x, forward(x, None), mask_id, start, start + 1 if alone else end)
            turn += 1
            forwards += 1
    return x, forwards


def published_loss(logits: Tensor, labels: Tensor, active: Tensor) -> Tensor:
    """The certainty-forcing loss as published: softmax and entropy of the whole (B, T, V) logits."""
    z = logits.float()
    nll = functional.cross_entropy(z.transpose(1, 2), labels, reduction="none")
    entropy = -((z / 0.5).softmax(-1) * (z / 0.5).log_softmax(-1)).sum(-1)
    gated = active & (z.argmax(-1) == labels)
    ce = (nll * active).sum() / active.sum().clamp(min=1)
    return ce + 2.0 * (entropy * gated).sum() / gated.sum().clamp(min=1)


def eager_loss(logits: Tensor, labels: Tensor, active: Tensor) -> Tensor:
    """`published_loss` as float32 torch does it best: the active rows only."""
    return row_loss(logits[active], labels[active])


def row_loss(z: Tensor, y: Tensor) -> Tensor:
    """The certainty-forcing loss of rows of logits (N, V), all active, with labels y (N,)."""
    z = z.float()
    nll = functional.cross_entropy(z, y)
    log_q = (2.0 * z).log_softmax(-1)
    entropy = -(log_q.exp() * log_q).sum(-1)
    gated = z.argmax(-1) == y
    return nll + 2.0 * (entropy * gated).sum() / gated.sum().clamp(min=1)


def compiled_loss(logits: Tensor, labels: Tensor, active: Tensor) -> Tensor:
    """`eager_loss` with `row_loss` through torch.compile."""
    return compile_(row_loss)(logits[active], labels[active])


def divergence(student: Tensor, teacher: Tensor, l1: float) -> Tensor:
    """The sum over rows of logits (N, V) of KL(teacher || student) and `l1` times the L1 distance, in
    float32."""
    log_q, log_p = (z.float().log_softmax(-1) for z in (student, teacher))
    loss = functional.kl_div(log_q, log_p, log_target=True, reduction="sum")
    return loss + l1 * (log_q.exp() - log_p.exp()).abs().sum() if l1 else loss


def masked_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor) -> Tensor:
    """torch's attention of q (B, Q, H, D) to padded caches (B, Hkv, L, D), under a mask of their lengths."""
    seen = torch.arange(k_cache.shape[2], device=q.device) < lengths[:, None]
    return functional.scaled_dot_product_attention(
        q.transpose(1, 2), k_cache, v_cache, attn_mask=seen[:, None, None], enable_gqa=True
    ).transpose(1, 2)


def attention_by_sequence(q: Tensor, k_cache: Tensor, v_cache: Tensor, sizes: list[int]) -> Tensor:
    """torch's attention of one sequence after another, each to the slots that it sees: no mask, no
    padding."""
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
    slot_mapping: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> None:
    """Rotate q and k in float32, as LLaMA does, then write k and v to the caches by index_put."""
    cos, sin = (t[positions][:, None] for t in (cos, sin))  # (N, 1, D / 2)
    page, at = slot_mapping // k_cache.shape[2], slot_mapping % k_cache.shape[2]
    k_cache[page, :, at] = rotate(k, cos, sin)
    v_cache[page, :, at] = v
    q.copy_(rotate(q, cos, sin))
