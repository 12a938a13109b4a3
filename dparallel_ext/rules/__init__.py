"""Rules decide which tokens a pass commits. `Rule` says how to write a rule; `policies` has rules that are
rows of numbers."""

from .credit import Credit
from .distance import Distance
from .early import Prophet, SchED
from .edit import Edit
from .end_of_text import EndOfText
from .leading import Leading
from .learned import Learned
from .levenshtein import Levenshtein
from .protocol import Decision, Function, FunctionRule, Rule, Where
from .soft import Soft
from .spec import KINDS, ONE, Kind, describe, file_of, menu, parse

__all__ = [
    "KINDS",
    "ONE",
    "Credit",
    "Decision",
    "Distance",
    "Edit",
    "EndOfText",
    "Function",
    "FunctionRule",
    "Kind",
    "Leading",
    "Learned",
    "Levenshtein",
    "Prophet",
    "Rule",
    "SchED",
    "Soft",
    "Where",
    "describe",
    "file_of",
    "menu",
    "parse",
]
