"""Several tokens a pass of an autoregressive model, with its own text: draft, verify, accept, commit."""

from .batch import CausalBatch
from .draft import Draft
from .drafter import Drafter, DraftSession, Lane, drafter_of
from .ngram import NGram
from .sizing import Fixed, Measured, Sizer
from .speculate import SpeculateOutput, speculate
from .whole_models import ModelDrafter

__all__ = [
    "CausalBatch",
    "Draft",
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
    "speculate",
]
