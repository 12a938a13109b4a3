"""Prompts with their right answers, from files."""

from __future__ import annotations

import itertools
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from . import files
from .toy import tasks


@dataclass(frozen=True)
class Prompt:
    """A training prompt as text, and the reference that the checker compares with."""

    text: str
    answer: str


def read_prompts(source: str, prompt_field: str = "prompt", answer_field: str = "answer") -> list[Prompt]:
    """Prompts of a JSONL or Parquet file, or of "builtin:N[:SEED]", N training problems of `tasks`.

    A prompt is a text; an answer is a text or a number. Raises FileNotFoundError, or ValueError naming the
    line and the field that is missing or of another type, or a file without prompts.
    """
    if source.startswith("builtin:"):
        try:
            seeded = source if source.count(":") > 1 else f"{source}:77"
            count, seed = (int(part) for part in seeded.split(":")[1:])
            if not 1 <= count <= sys.maxsize:
                raise ValueError("no number of problems")
        except ValueError as error:
            raise ValueError(f"data: expected builtin:N or builtin:N:SEED, got {source!r}") from error
        stream = itertools.islice(tasks.problems("train", seed=seed), count)
        return [Prompt(p.prompt, str(p.answer)) for p in stream]
    file = Path(source)
    if not os.path.isfile(file):  # Path.is_file raises for a name that is too long
        there = f"{file} is no file" if os.path.exists(file) else f"no file {source:.200}"
        raise FileNotFoundError(f"data: {there}")
    prompts = []
    for number, row in files.rows("data", file):
        for name, kinds in ((prompt_field, (str,)), (answer_field, (str, int, float))):
            if name not in row:
                raise ValueError(f"data: {file}:{number} has no field {name!r}, only {sorted(row)}")
            if not isinstance(row[name], kinds) or isinstance(row[name], bool):
                raise ValueError(
                    f"data: {file}:{number}: expected {' or '.join(kind.__name__ for kind in kinds)} in "
                    f"{name!r}, got {row[name]!r:.60}"
                )
        prompts.append(Prompt(row[prompt_field], str(row[answer_field])))
    if not prompts:
        raise ValueError(f"data: {file} holds no prompts")
    return prompts
