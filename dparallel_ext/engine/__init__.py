"""Requests that come and go, decoded together: the engine, and the handle of a request."""

from .engine import Engine, EngineFull, EngineStats
from .handle import Completion, Draft, Handle

__all__ = ["Completion", "Draft", "Engine", "EngineFull", "EngineStats", "Handle"]
