"""Speculative decoding: an autoregressive model's own text, several tokens a pass.

`adaptive` is the exception: it decodes a diffusion model, verified by a mixture, to another text.
"""

from .adadecode import AdaDecode
from .adaptive import AdaptiveBatch, AdaptiveOutput, adaptive_decode
from .batch import CausalBatch
from .ddtree import TreeDrafter
from .dflash import DFlashDrafter, DFlashModel
from .draft import Draft
from .drafter import Drafter, DraftSession, Lane, Observation
from .eagle import EagleDrafter
from .hidden_transfer import HiddenTransfer
from .jump_forward import JumpForward
from .loading import NAMED, drafter_of, load
from .model_drafter import ModelDrafter
from .ngram import NGram
from .ppd import PromptTokens
from .recycling import Recycling
from .riders import RiderDrafter
from .self_drafter import SelfDrafter
from .sizing import Fixed, Measured, Sizer
from .speculate import SpeculateOutput, speculate
from .strided import StridedDrafter

__all__ = [
    "NAMED",
    "AdaDecode",
    "AdaptiveBatch",
    "AdaptiveOutput",
    "CausalBatch",
    "DFlashDrafter",
    "DFlashModel",
    "Draft",
    "DraftSession",
    "Drafter",
    "EagleDrafter",
    "Fixed",
    "HiddenTransfer",
    "JumpForward",
    "Lane",
    "Measured",
    "ModelDrafter",
    "NGram",
    "Observation",
    "PromptTokens",
    "Recycling",
    "RiderDrafter",
    "SelfDrafter",
    "Sizer",
    "SpeculateOutput",
    "StridedDrafter",
    "TreeDrafter",
    "adaptive_decode",
    "drafter_of",
    "load",
    "speculate",
]
