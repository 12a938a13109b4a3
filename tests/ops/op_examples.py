"""Arguments of every op: under torch.ops, and of its documented function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from conftest import counters
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext import policies

MASK = 3
DTYPES = [torch.float32, torch.bfloat16]


def examples(dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    """Arguments of each op under torch.ops. Some can be expanded: they are constant along a dimension."""
    z, q, x = torch.randn(2, 3, 40).to(dtype), torch.randn(6, 4, 8).to(dtype), torch.randn(5, 24).to(dtype)
    k, v = torch.randn(2, 6, 2, 8).to(dtype)
    k_cache, v_cache = torch.randn(2, 4, 2, 4, 8).to(dtype)
    tokens = torch.full((2, 3), MASK)
    tokens[0, 1] = 0
    start, end = torch.zeros(2, dtype=torch.int64), torch.tensor([3, 2])
    policy = policies.make("entropy", 4.0, batch=2, device=z.device)
    keys = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]])
    ids, rows = torch.tensor([1, 30]), torch.tensor([4, 1])
    score, eligible = torch.rand(2, 3), torch.tensor([[True, True, False], [True, True, False]])
    labels, active = torch.randint(0, 40, (6,)), torch.rand(6) < 0.7
    of_loss = (z, labels, active, 0.5, 1.0)
    saved = torch.ops.dparallel.certainty_forcing_loss(*of_loss)[3]
    backward = (*of_loss, saved, torch.ones(6), torch.randn(6))
    of_distillation = (z, z + torch.randn(2, 3, 40).to(dtype), active, 0.5, 1.0, 0.5)
    saved = torch.ops.dparallel.distillation_loss(*of_distillation)[1]
    of_its_backward = (*of_distillation, saved, torch.randn(6))
    weight, scale = dx.quantize_fp8(torch.randn(7, 24))
    cos, sin = dx.rope_table(9, 8, device=q.device)
    at = torch.tensor([0, 1, 2, 5, 6, 7])
    segments = (torch.tensor([0, 3]), torch.tensor([2, 6]), torch.tensor([5, 7]))
    table = torch.tensor([[3, 1], [0, 2]])
    return {
        "row_stats": (
            z, rows, MASK, ids, torch.tensor([[0, 39, MASK]] * 2), 0.7, 0.9, 20, keys, counters(z, 6),
        ),
        "row_topk": (z, 3, rows, MASK, ids, counters(z, 6)),
        "select": (score, score.clone(), score.clone(), eligible, policy),
        "class_stats": (z, torch.arange(40).int(), torch.tensor([0, 30, 30, 38])),
        "best_path": (
            -torch.rand(2, 3, 2), start, end, start.clone(), end + 1, torch.tensor([0, 1, 1]).int(),
            torch.tensor([0, 0, 1]).int(), torch.tensor([0, 1, 3]), torch.tensor([1, 0]),
        ),
        "unmask_": (
            tokens, z, None, torch.tensor([1, 0]), start, end, policy, MASK, ids, 0.7, 1.0, 0,
            keys[:, :3].contiguous(), 0, counters(z, 11),
        ),
        "commit_": (
            tokens.clone(), torch.tensor([0, 2, 4]), torch.tensor([True, False, True]),
            torch.tensor([5, 6, 7]), MASK, torch.tensor([1, 0]), start, end, counters(tokens, 4),
        ),
        "accept": (
            z.flatten(0, 1), torch.tensor([0, 5, 5, 0, 7, 7]), torch.tensor([-1, 0, 0, -1, 0, 0]),
            torch.tensor([3, 0]), torch.tensor([6, 3]), torch.tensor([2, 2]), torch.tensor([[5], [5]]), MASK,
            ids, 0.7, 0.9, 20, torch.arange(24).view(6, 4), 4, counters(z, 8),
        ),
        "certainty_forcing_loss": of_loss,
        "certainty_forcing_loss_backward": backward,
        "certainty_forcing_loss_backward_": backward,
        "distillation_loss": of_distillation,
        "distillation_loss_backward": of_its_backward,
        "distillation_loss_backward_": of_its_backward,
        "kv_write": (
            q, k, v, k_cache, v_cache, at, at + 8, cos, sin, x[0, :8].clone(), x[1, :8].clone(), 1e-5,
        ),
        "kv_move": (
            torch.randn(2, 2, 4, 2, 4, 8).to(dtype), torch.tensor([[1, 2], [8, -1]]),
            torch.tensor([[0, 1], [9, 4]]),
        ),
        "block_attention": (q, k_cache, v_cache, *segments, table, 6, 8, 0.3, False, None),
        "rms_norm": (x, x + 1, x[0].clone(), x[1].clone(), 1e-5),
        "swiglu": (x, x + 1),
        "linear": (x, torch.randn(7, 24).to(dtype), x[0, :7].clone()),
        "fp8_linear": (x, weight, scale, x[0, :7].clone()),
        "linear_swiglu": (x, weight[:6], scale[:6], x[0, :6].clone()),
        "linear_kv_write": (
            torch.randn(6, 24).to(dtype), torch.randn(64, 24).to(dtype), None, None, k_cache, v_cache, at,
            at + 8, cos, sin, x[0, :8].clone(), x[1, :8].clone(), 1e-5,
        ),
        "fp8_widen": (weight, scale, x),
    }  # fmt: skip


OPS = sorted(examples(torch.float32))


def documented(dtype: torch.dtype) -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """Functions and their arguments."""
    z, q, x = torch.randn(2, 3, 40).to(dtype), torch.randn(6, 4, 8).to(dtype), torch.randn(5, 24).to(dtype)
    k, v = torch.randn(2, 6, 2, 8).to(dtype)
    k_cache, v_cache = torch.randn(2, 4, 2, 4, 8).to(dtype)
    stats = dx.row_stats(z)
    weight, scale = dx.quantize_fp8(torch.randn(7, 24))
    cos, sin = dx.rope_table(9, 8, device=q.device)
    at, table = torch.tensor([0, 1, 2, 5, 6, 7]), torch.tensor([[3, 1], [0, 2]])
    eligible, tokens = torch.tensor([[True, True, False]] * 2), torch.full((2, 3), MASK)
    policy = policies.make("entropy", 4.0, batch=2, device=z.device)

    def select(confidence: Tensor, margin: Tensor, entropy: Tensor, **given: Tensor) -> Tensor:
        scores = {"confidence": confidence, "margin": margin, "entropy": entropy}
        return dx.select(stats._replace(**scores), **given)

    def loss(logits: Tensor, inplace: bool, **given: Tensor) -> tuple[Tensor, ...]:
        leaf = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        out = dx.certainty_forcing_loss(leaf * 1, inplace=inplace, **given)
        return (*out, *torch.autograd.grad(out.loss, leaf))

    def distillation(student: Tensor, inplace: bool, **given: Tensor) -> tuple[Tensor, ...]:
        leaf = student.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        loss = dx.distillation_loss(leaf * 1, inplace=inplace, l1_weight=0.5, **given)
        return loss, *torch.autograd.grad(loss, leaf)

    of_distillation = {"student": z, "teacher": z + 1 / (z + 5), "weight": torch.rand(2, 3) * eligible}
    of_loss = {"logits": z, "labels": torch.randint(0, 40, (2, 3)), "active": eligible}
    return {
        "row_stats": (dx.row_stats, {"logits": z, "rows": torch.tensor([4, 1]), "temperature": 0.5}),
        "row_stats of ids": (dx.row_stats, {"logits": z, "ids": torch.arange(30).view(2, 3, 5)}),
        "row_topk": (dx.row_topk, {"logits": z, "k": 3, "rows": torch.tensor([4, 1]), "mask_id": MASK}),
        "select": (select, {"confidence": stats.confidence, "margin": stats.margin, "entropy": stats.entropy,
                            "eligible": eligible, "policy": policy}),
        "unmask_": (dx.unmask_, {"tokens": tokens, "logits": z, "mask_id": MASK, "policy": policy,
                                 "start": torch.tensor([0, 1]), "end": torch.tensor([3, 3])}),
        "unmask_ of rows": (dx.unmask_, {"tokens": tokens, "logits": z.view(6, 40), "mask_id": MASK,
                                         "positions": torch.arange(6)}),
        "unmask_ of windows": (dx.unmask_, {"tokens": tokens, "logits": z, "mask_id": MASK,
                                            "lane": torch.tensor([1, 0, 1]), "start": torch.tensor([2, 0, 0]),
                                            "end": torch.tensor([3, 3, 2])}),
        "commit_": (dx.commit_, {"tokens": tokens, "positions": torch.tensor([1, 5]),
                                 "commit": torch.tensor([True, False]), "token": torch.tensor([4, MASK]),
                                 "mask_id": MASK, "lane": torch.tensor([1, 0, 1])}),
        "accept": (dx.accept, {"logits": z.view(6, 40), "draft": torch.full((6,), 7), "mask_id": MASK,
                               "parent": torch.tensor([-1, 0, 1, -1, 0, 0]), "q_start": torch.tensor([3, 0]),
                               "q_end": torch.tensor([6, 3]), "room": torch.tensor([2, 2]),
                               "eos_ids": torch.tensor([[5, 9], [5, 9]])}),
        "accept of samples": (dx.accept, {"logits": z.view(6, 40), "draft": torch.full((6,), 7),
                                          "parent": torch.tensor([-1, 0, 1, 2, 3, 4]),
                                          "q_start": torch.tensor([0]), "q_end": torch.tensor([6]),
                                          "temperature": 0.5, "keys": torch.arange(24).view(6, 4)}),
        "loss": (loss, {**of_loss, "inplace": False}),
        "loss inplace": (loss, {**of_loss, "inplace": True}),
        "distillation": (distillation, {**of_distillation, "inplace": False}),
        "distillation inplace": (distillation, {**of_distillation, "inplace": True}),
        "kv_write": (dx.kv_write, {"q": q, "k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache,
                                   "positions": at, "slot_mapping": at + 8, "cos": cos, "sin": sin,
                                   "q_norm": q[0, 0].clone(), "k_norm": k[0, 0].clone(), "eps": 1e-5}),
        "kv_move": (dx.kv_move, {"kv_cache": torch.randn(2, 2, 4, 2, 4, 8).to(dtype),
                                 "source": torch.tensor([[1, 2], [8, -1]]),
                                 "target": torch.tensor([[0, 1], [9, 4]])}),
        "block_attention": (dx.block_attention, {"q": q, "k_cache": k_cache, "v_cache": v_cache,
                                                 "kv_lens": torch.tensor([5, 7]), "block_table": table,
                                                 "q_start": torch.tensor([0, 3]),
                                                 "q_end": torch.tensor([2, 6])}),
        "rms_norm": (dx.rms_norm, {"x": x, "weight": x[0].clone(), "delta": x + 1, "bias": x[1].clone(),
                                   "eps": 1e-5}),
        "swiglu": (dx.swiglu, {"gate": x, "up": x + 1}),
        "fp8_linear": (dx.fp8_linear, {"x": x, "weight": weight, "scale": scale, "bias": x[0, :7].clone()}),
        "linear_swiglu": (dx.linear_swiglu, {"x": x, "weight": weight[:6], "scale": scale[:6]}),
        "linear_kv_write": (dx.linear_kv_write, {
            "x": torch.randn(6, 24).to(dtype), "weight": torch.randn(64, 24).to(dtype), "bias": None,
            "k_cache": k_cache, "v_cache": v_cache, "positions": at, "slot_mapping": at + 8, "cos": cos,
            "sin": sin, "q_norm": q[0, 0].clone(), "k_norm": k[0, 0].clone(), "eps": 1e-5,
        }),
        "fp8_linear of many": (dx.fp8_linear, {"x": x[:1].expand(300, 24).contiguous(), "weight": weight,
                                               "scale": scale}),
    }  # fmt: skip


FUNCTIONS = sorted(documented(torch.float32))


def op_of(name: str) -> Any:
    return getattr(torch.ops.dparallel, name)


def copied(given: tuple[Any, ...]) -> list[Any]:
    return [a.clone(memory_format=torch.contiguous_format) if isinstance(a, Tensor) else a for a in given]


def flat(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [t for part in result or () for t in flat(part)]


def same(a: list[Any], b: list[Any]) -> bool:
    """To the bit; a NaN, of a row that was not read, equals another."""
    for x, y in zip(a, b, strict=True):
        if isinstance(x, Tensor):
            x, y = (t.float() if t.is_floating_point() else t for t in (x, y))
            if not torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)):
                return False
    return True
