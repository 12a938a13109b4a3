"""The cases that `python -m benchmarks.gpu` times, most important first: two ceilings, every op, whole
decodes."""

from __future__ import annotations

import torch

from . import (
    bench_accept,
    bench_best_path,
    bench_block_attention,
    bench_certainty_forcing_loss,
    bench_class_stats,
    bench_commit,
    bench_decode,
    bench_distillation_loss,
    bench_fp8_linear,
    bench_keep_error,
    bench_kv_move,
    bench_kv_write,
    bench_linear,
    bench_linear_kv_write,
    bench_linear_swiglu,
    bench_rms_norm,
    bench_row_stats,
    bench_row_topk,
    bench_select,
    bench_swiglu,
    bench_unmask,
)
from .harness import Case, Work, random

# --- the card's two ceilings ---------------------------------------------------------------------


def copy(device: torch.device, small: bool, megabytes: int) -> Work:
    """torch's copy: reads `megabytes` and writes as many, far more than the L2 cache holds."""
    source = torch.randint(256, (megabytes * 2**20,), dtype=torch.uint8, device=device).view(torch.float32)
    target = torch.empty_like(source)
    return Work({"torch copy": lambda turn, at: target.copy_(source)}, [(2 * source.nbytes, 0, 1)])


def matmul(device: torch.device, small: bool, side: int) -> Work:
    a, b = random(device, side, side), random(device, side, side)
    return Work({"torch matmul": lambda turn, at: a @ b}, [(3 * a.nbytes, 2 * side**3, 1)])


COPY = Case("copy bandwidth", "", copy, {"megabytes": 2048}, ("warm",))
MATMUL = Case("bf16 matrix rate", "", matmul, {"side": 8192}, ("warm",))

# --- the list ------------------------------------------------------------------------------------

_attention, _decode, _step = bench_block_attention.case, bench_decode.case, bench_decode.step_case

CASES = (
    COPY,
    MATMUL,
    bench_unmask.case(32),
    bench_unmask.case(512),
    bench_certainty_forcing_loss.case(),
    bench_certainty_forcing_loss.linear_case(),
    bench_distillation_loss.case(0.0),
    bench_distillation_loss.case(1.0),
    bench_distillation_loss.linear_case(),
    _attention("LLaDA", 1, 512),
    _attention("LLaDA", 8, 512),
    _step("LLaDA-8B", 1),
    _decode("LLaDA-8B", "dual", 1),
    _decode("LLaDA-8B", "dual", 8),
    _decode("LLaDA-8B", "none", 1),
    bench_kv_write.case("LLaDA", 32),
    bench_rms_norm.case(32),
    bench_swiglu.case(32),
    bench_linear.case(32),
    bench_linear.case(1),
    bench_linear_swiglu.case(32),
    bench_linear_kv_write.case(32),
    bench_linear_kv_write.case(32, norms=True),
    bench_fp8_linear.case(32),
    bench_row_stats.case(32),
    bench_row_stats.case(512),
    bench_kv_move.case(1, 8),
    bench_row_topk.case(32),
    bench_select.CASE,
    bench_class_stats.case(32),
    bench_best_path.CASE,
    bench_commit.CASE,
    bench_keep_error.CASE,
    *(bench_accept.case(rows) for rows in bench_accept.ROWS),
    *(bench_block_attention.verify_case(rows) for rows in bench_block_attention.ROWS),
    _step("LLaDA-8B", 8),
    _decode("LLaDA-8B", "none", 8),
    *(_attention("LLaDA", batch, length) for batch, length in ((1, 4096), (1, 32768), (64, 512), (8, 4096))),
    *(_attention("Dream", batch, length) for batch, length in ((1, 512), (8, 512), (1, 32768), (64, 4096))),
    *(_attention("LLaDA", batch, length) for batch, length in ((64, 4096), (8, 32768))),
    bench_kv_write.case("LLaDA", 4096),
    bench_rms_norm.case(4096),
    bench_swiglu.case(4096),
    bench_fp8_linear.case(8),
    bench_kv_move.case(64, 8),
    bench_kv_move.case(1, 128),
    bench_row_topk.case(512),
    bench_row_topk.case(32, 16),
    bench_kv_write.case("SDAR", 32),
    bench_kv_write.case("Dream", 32),
    _step("Dream-7B", 1),
    _decode("Dream-7B", "dual", 1),
    _decode("Dream-7B", "dual", 8),
    _decode("Dream-7B", "none", 1),
    _decode("Dream-7B", "none", 8),
)  # fmt: skip
