"""Pure-torch float64 references of the compiled ops, written to be read; a file for each family of ops.

Tests compare every kernel with them, and `kv_write` and `block_attention` compute float64 by them, which no
kernel of theirs has. They are slow and allocate freely.
"""

from .attention import block_attention, kv_move, kv_write
from .automaton import best_path, class_stats
from .decoding import accept, commit_, gumbel, nucleus, row_stats, row_topk, select, unmask_
from .layers import fp8_linear, linear, linear_kv_write, linear_swiglu, rms_norm, swiglu
from .loss import certainty_forcing_loss, distillation_loss

__all__ = [
    "accept",
    "best_path",
    "block_attention",
    "certainty_forcing_loss",
    "class_stats",
    "commit_",
    "distillation_loss",
    "fp8_linear",
    "gumbel",
    "kv_move",
    "kv_write",
    "linear",
    "linear_kv_write",
    "linear_swiglu",
    "nucleus",
    "rms_norm",
    "row_stats",
    "row_topk",
    "select",
    "swiglu",
    "unmask_",
]
