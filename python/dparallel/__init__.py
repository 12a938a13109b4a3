"""The layer above dparallel_ext: the command line, a server, training, evaluation, and models that ship."""

import sys
from importlib.abc import MetaPathFinder
from typing import Any

MOVED: dict[str, str] = {
    **{name: f"training.{name}" for name in ("distill", "trainer", "trajectories")},
    **{name: f"toy.{name}" for name in ("demo", "tasks", "train")},
    "proof": "toy.study",
}
"""Modules of earlier versions -> their names now."""


class Moved(MetaPathFinder):
    """Raises ImportError with the new name for a module that moved; the last finder that import asks."""

    def find_spec(self, name: str, *rest: Any) -> None:
        package, _, module = name.rpartition(".")
        if package == __name__ and module in MOVED:
            raise ImportError(f"{name} is {package}.{MOVED[module]} now", name=name)


sys.meta_path.append(Moved())
