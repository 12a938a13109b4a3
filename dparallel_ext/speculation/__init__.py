"""Several tokens a pass of an autoregressive model, with its own text: draft, verify, accept, commit."""

from .adadecode import AdaDecode
from .batch import CausalBatch
from .dflash import BlockDrafter, DraftModel
from .draft import Draft
from .drafter import Drafter, DraftSession, Lane
from .loading import NAMED, drafter_of, load
from .ngram import NGram
from .sizing import Fixed, Measured, Sizer
from .speculate import SpeculateOutput, speculate
from .whole_models import ModelDrafter

__all__ = [
    "NAMED",
    "AdaDecode",
    "BlockDrafter",
    "CausalBatch",
    "Draft",
    "DraftModel",
    "DraftSession",
    "Drafter",
    "Fixed",
    "Lane",
    "Measured",
    "ModelDrafter",
    "NGram",
    "Sizer",
    "SpeculateOutput",
    "drafter_of",
    "load",
    "speculate",
]
