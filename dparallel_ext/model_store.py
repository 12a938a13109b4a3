"""A store of costly objects beside a model, for the next call that needs the same.

`decode`, `speculate` and `adaptive_decode` keep the workspaces of their recorded passes here. An object is
freed with the model, and when the model moves or is trained; so it must not refer to the model.
"""

from __future__ import annotations

import atexit
import threading
import weakref
from collections.abc import Hashable
from typing import Any

LIMIT = 4
BYTES = 2**30
"""The most objects and bytes kept for one model; beyond them the least recently used is dropped."""

_lock = threading.Lock()
_entries: weakref.WeakKeyDictionary[Any, list[tuple[Hashable, Any, int]]] = weakref.WeakKeyDictionary()
"""Model -> (key, object, bytes), the least recently used first."""

atexit.register(_entries.clear)  # while the device still answers


def take(model: Any, key: Hashable) -> Any | None:
    """Take out the object that was put in last under `key`; None if there is none."""
    with _lock:
        entries = _entries.get(model, [])
        for index in reversed(range(len(entries))):
            if entries[index][0] == key:
                return entries.pop(index)[1]
    return None


def put(model: Any, key: Hashable, value: Any, size: int) -> None:
    """Keep an object of `size` bytes, until somebody takes it."""
    dropped = []  # freed after the lock is released
    with _lock:
        entries = _entries.setdefault(model, [])
        entries.append((key, value, size))
        while len(entries) > LIMIT or sum(size for *_, size in entries) > BYTES:
            dropped.append(entries.pop(0))


def drop(model: Any) -> None:
    """Free all objects kept for the model."""
    with _lock:
        dropped = _entries.pop(model, None)
    del dropped
