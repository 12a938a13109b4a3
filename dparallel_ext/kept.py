"""What is costly to make, kept beside a model for whoever needs the like next.

`decode` keeps here what its recorded passes work on. What is kept may not refer to the model: it is freed
with it, and when the model moves or is trained.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Hashable
from typing import Any

LIMIT = 4
BYTES = 2**30
"""How much is kept for one model; beyond it what was not used for longest is dropped."""

_lock = threading.Lock()
_of_model: weakref.WeakKeyDictionary[Any, dict[Hashable, tuple[Any, int]]] = weakref.WeakKeyDictionary()


def take(model: Any, key: Hashable) -> Any | None:
    """What was given under `key`, from now on the caller's alone; None where there is nothing."""
    with _lock:
        found, _ = _of_model.get(model, {}).pop(key, (None, 0))
        return found


def give(model: Any, key: Hashable, thing: Any, size: int) -> None:
    """Keep `thing`, of `size` bytes, until somebody takes it."""
    dropped = []  # freed when the lock is open again
    with _lock:
        things = _of_model.setdefault(model, {})
        dropped.append(things.pop(key, None))
        things[key] = thing, size
        while len(things) > LIMIT or sum(size for _, size in things.values()) > BYTES:
            dropped.append(things.pop(next(iter(things))))


def drop(model: Any) -> None:
    """Free what is kept for the model."""
    with _lock:
        dropped = _of_model.pop(model, None)
    del dropped
