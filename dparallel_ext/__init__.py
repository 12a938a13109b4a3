"""Decode language models many tokens at a time, on compiled kernels."""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder

import torch  # the compiled library links against torch's, so torch comes first

# A plain import would also take the library of another folder that is installed with -e.
if PathFinder.find_spec(f"{__name__}._C", __path__) is None:
    raise ImportError(
        f"{__path__[0]} has no compiled library for Python {sys.version_info[0]}.{sys.version_info[1]}. "
        "In the folder of the source Python finds the sources before an installed package: run "
        "`pip install -e .` there, or work in another folder."
    )
from . import compat, diffusion_gemma, models, ops, policies, reference, rules, speculation
from ._C import build_info, simd_level
from .automaton import Automaton
from .decoding import DecodeConfig, DecodeOutput, Trajectory, decode
from .engine import Completion, DraftEvent, Engine, EngineFull, EngineStats, Handle
from .masks import MaskedPair, semi_autoregressive_masks
from .ops import (
    accept,
    block_attention,
    certainty_forcing_loss,
    check_errors,
    commit_,
    distillation_loss,
    fp8_linear,
    kv_move,
    kv_write,
    linear,
    linear_certainty_forcing_loss,
    linear_distillation_loss,
    linear_kv_write,
    linear_swiglu,
    quantize_fp8,
    rms_norm,
    rope_table,
    row_stats,
    row_topk,
    select,
    swiglu,
    unmask_,
)
from .speculation import AdaptiveOutput, SpeculateOutput, adaptive_decode, speculate
from .types import AcceptOutput, CertaintyForcingLossOutput, CommitOutput, RowStats, RowTopK, UnmaskOutput

__version__ = "0.2.0"

__all__ = [
    "AcceptOutput",
    "AdaptiveOutput",
    "Automaton",
    "CertaintyForcingLossOutput",
    "CommitOutput",
    "Completion",
    "DecodeConfig",
    "DecodeOutput",
    "DraftEvent",
    "Engine",
    "EngineFull",
    "EngineStats",
    "Handle",
    "MaskedPair",
    "RowStats",
    "RowTopK",
    "SpeculateOutput",
    "Trajectory",
    "UnmaskOutput",
    "accept",
    "adaptive_decode",
    "block_attention",
    "build_info",
    "certainty_forcing_loss",
    "check_errors",
    "commit_",
    "compat",
    "decode",
    "diffusion_gemma",
    "distillation_loss",
    "fp8_linear",
    "kv_move",
    "kv_write",
    "linear",
    "linear_certainty_forcing_loss",
    "linear_distillation_loss",
    "linear_kv_write",
    "linear_swiglu",
    "models",
    "ops",
    "policies",
    "quantize_fp8",
    "reference",
    "rms_norm",
    "rope_table",
    "row_stats",
    "row_topk",
    "rules",
    "select",
    "semi_autoregressive_masks",
    "simd_level",
    "speculate",
    "speculation",
    "swiglu",
    "unmask_",
]

del torch
