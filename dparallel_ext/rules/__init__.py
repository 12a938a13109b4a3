"""Rules: what decides which tokens a pass commits. How to write one: `Rule`; rules as numbers: `policies`."""

from .credit import Credit
from .early import Prophet, SchED
from .edit import Edit
from .protocol import Decision, Function, FunctionRule, Rule, Where
from .spec import ONE, describe, parse

__all__ = [
    "ONE",
    "Credit",
    "Decision",
    "Edit",
    "Function",
    "FunctionRule",
    "Prophet",
    "Rule",
    "SchED",
    "Where",
    "describe",
    "parse",
]
