"""Native models that read published checkpoints as they are."""

from ..cache import KVCache
from .base import Model, Output, Traits, traits
from .checkpoint import FAMILIES, load, save, wrap
from .dream import Dream
from .llada import LLaDA
from .sdar import SDAR

__all__ = [
    "FAMILIES",
    "SDAR",
    "Dream",
    "KVCache",
    "LLaDA",
    "Model",
    "Output",
    "Traits",
    "load",
    "save",
    "traits",
    "wrap",
]
