"""What is costly to make, kept beside a model for whoever needs the like next.

`decode` and `speculate` keep here what their recorded passes work on. What is kept may not refer to the
model: it is freed with it, and when the model moves or is trained.
"""

from __future__ import annotations

import atexit
import threading
import weakref
from collections.abc import Hashable
from typing import Any

LIMIT = 4
BYTES = 2**30
"""How much is kept for one model; beyond it what was not used for longest is dropped."""

_lock = threading.Lock()
_of_model: weakref.WeakKeyDictionary[Any, list[tuple[Hashable, Any, int]]] = weakref.WeakKeyDictionary()
"""For each model: what is kept under which key, and its bytes; the least recently used first."""

atexit.register(_of_model.clear)  # while the device still answers


def take(model: Any, key: Hashable) -> Any | None:
    """What was given last under `key`, from now on the caller's alone; None where there is nothing."""
    with _lock:
        things = _of_model.get(model, [])
        for at in reversed(range(len(things))):
            if things[at][0] == key:
                return things.pop(at)[1]
    return None


def give(model: Any, key: Hashable, thing: Any, size: int) -> None:
    """Keep `thing`, of `size` bytes, until somebody takes it."""
    dropped = []  # freed when the lock is open again
    with _lock:
        things = _of_model.setdefault(model, [])
        things.append((key, thing, size))
        while len(things) > LIMIT or sum(size for *_, size in things) > BYTES:
            dropped.append(things.pop(0))


def drop(model: Any) -> None:
    """Free what is kept for the model."""
    with _lock:
        dropped = _of_model.pop(model, None)
    del dropped
