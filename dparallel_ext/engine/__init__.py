"""Requests that come and go, decoded together: the engine, and the handle of a request."""

from .engine import Engine, EngineFull, EngineStats
from .handle import Completion, DraftEvent, Handle

__all__ = ["Completion", "DraftEvent", "Engine", "EngineFull", "EngineStats", "Handle"]
