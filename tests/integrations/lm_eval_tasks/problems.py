"""The documents of the tasks here, made on the spot."""

from __future__ import annotations

import itertools
import random
from typing import Any

from dparallel.toy import tasks


def documents(count: int, seed: int) -> list[dict[str, Any]]:
    """Held-out word problems; `endings` holds the last step and result of each, and wrong ones."""
    rows = []
    for number, problem in enumerate(itertools.islice(tasks.problems("held_out", seed), count)):
        *steps, last, result = problem.response.split(" . ")
        rng = random.Random(number)
        wrong = rng.sample([n for n in tasks.NUMBERS if n != problem.answer], 3)
        right = rng.randrange(4)
        numbers = [*wrong[:right], problem.answer, *wrong[right:]]
        endings = [
            f"{_replaced(last, problem.answer, n)} . {_replaced(result, problem.answer, n)}" for n in numbers
        ]
        rows.append(
            {
                "prompt": problem.prompt,
                "answer": str(problem.answer),
                "steps": "".join(f"{step} . " for step in steps).strip(),
                "endings": endings,
                "right": right,
            }
        )
    return rows


def held_out(count: int = 100, data_seed: int = 0, **_: Any) -> dict[str, Any]:
    """As the harness asks for a data set; `count` and `data_seed` may come by --metadata."""
    import datasets

    return {"test": datasets.Dataset.from_list(documents(count, data_seed))}


def _replaced(text: str, old: int, new: int) -> str:
    return " ".join(str(new) if word == str(old) else word for word in text.split())
