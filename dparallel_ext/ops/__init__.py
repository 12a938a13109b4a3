"""The compiled ops under checked, documented signatures, a file for each.

They are torch custom ops (torch.ops.dparallel.*) with CPU and, where built, CUDA kernels, and fake kernels
for torch.compile. Their float64 references are in `dparallel_ext.reference`.
"""

from . import no_gradient as _no_gradient  # noqa: F401  (makes backward passes raise)
from .accept import accept
from .block_attention import block_attention
from .certainty_forcing_loss import certainty_forcing_loss
from .commit import commit_
from .distillation_loss import distillation_loss
from .errors import check_errors
from .fp8_linear import fp8_linear, quantize_fp8
from .kv_move import kv_move
from .kv_write import kv_write, rope_table
from .linear import linear
from .linear_certainty_forcing_loss import linear_certainty_forcing_loss
from .linear_distillation_loss import linear_distillation_loss
from .linear_kv_write import linear_kv_write
from .linear_swiglu import linear_swiglu
from .rms_norm import rms_norm
from .row_stats import merge_row_stats, row_stats
from .row_topk import row_topk
from .select import select
from .swiglu import swiglu
from .unmask import unmask_
from .varlen_attention import varlen_attention

__all__ = [
    "accept",
    "block_attention",
    "certainty_forcing_loss",
    "check_errors",
    "commit_",
    "distillation_loss",
    "fp8_linear",
    "kv_move",
    "kv_write",
    "linear",
    "linear_certainty_forcing_loss",
    "linear_distillation_loss",
    "linear_kv_write",
    "linear_swiglu",
    "merge_row_stats",
    "quantize_fp8",
    "rms_norm",
    "rope_table",
    "row_stats",
    "row_topk",
    "select",
    "swiglu",
    "unmask_",
    "varlen_attention",
]
