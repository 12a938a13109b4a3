"""Several tokens a pass of an autoregressive model, with its own text: draft, verify, accept, commit."""

from .batch import CausalBatch
from .dflash import BlockDrafter, DraftModel, load
from .draft import Draft
from .drafter import NAMED, Drafter, DraftSession, Lane, drafter_of
from .ngram import NGram
from .sizing import Fixed, Measured, Sizer
from .speculate import SpeculateOutput, speculate
from .whole_models import ModelDrafter

__all__ = [
    "NAMED",
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
