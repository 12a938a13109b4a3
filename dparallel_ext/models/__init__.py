"""Native models that read published checkpoints as they are."""

from .base import KVCache, Model, Output, Traits, traits
from .checkpoint import FAMILIES, load, save, wrap
from .dream import Dream
from .llada import LLaDA

__all__ = [
    "FAMILIES",
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
