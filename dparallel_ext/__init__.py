"""Decode diffusion language models many tokens at a time, on compiled kernels."""

from __future__ import annotations

import torch  # the compiled library links against torch's, so torch comes first

from . import compat, diffusion_gemma, models, policies, reference, rules
from ._C import build_info, simd_level
from .attention import block_attention, kv_write, rope_table
from .decode import DecodeOutput, decode
from .engine import Completion, Draft, Engine, EngineFull, EngineStats, Handle
from .layers import fp8_linear, quantize_fp8, rms_norm, swiglu
from .loss import CertaintyForcingLoss, certainty_forcing_loss, linear_certainty_forcing_loss
from .masks import MaskedPair, semi_autoregressive_masks
from .ops import check_errors, row_stats, select, unmask_
from .types import RowStats, UnmaskOutput
from .workspace import Trajectory

__version__ = "0.1.0"

__all__ = [
    "CertaintyForcingLoss",
    "Completion",
    "DecodeOutput",
    "Draft",
    "Engine",
    "EngineFull",
    "EngineStats",
    "Handle",
    "MaskedPair",
    "RowStats",
    "Trajectory",
    "UnmaskOutput",
    "block_attention",
    "build_info",
    "certainty_forcing_loss",
    "check_errors",
    "compat",
    "decode",
    "diffusion_gemma",
    "fp8_linear",
    "kv_write",
    "linear_certainty_forcing_loss",
    "models",
    "policies",
    "quantize_fp8",
    "reference",
    "rms_norm",
    "rope_table",
    "row_stats",
    "rules",
    "select",
    "semi_autoregressive_masks",
    "simd_level",
    "swiglu",
    "unmask_",
]

del torch
