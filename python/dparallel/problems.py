"""Problems: prompts with their right answers, of a file or the built-in task, and how answers are judged."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dparallel_ext.arguments import whole
from dparallel_ext.models.files import as_path

from . import files, registry
from .checkers import Checker, checker_of
from .toy import tasks


@dataclass(frozen=True)
class Prompt:
    """A prompt as text, and the reference that the checker compares with."""

    text: str
    answer: str


def read_prompts(
    source: str | Path, prompt_field: str = "prompt", answer_field: str = "answer"
) -> list[Prompt]:
    """Prompts of a JSONL or Parquet file, or of "builtin:N[:SEED]", N training problems of `tasks`.

    A prompt is a text; an answer is a text or a number. Raises FileNotFoundError, or ValueError naming the
    line and the field that is missing or of another type, or a file without prompts.
    """
    source = str(as_path("data", source, "a JSONL or Parquet file, or builtin:N"))
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


@dataclass(frozen=True)
class Problems:
    """What `evaluate` asks, and how it judges the answers."""

    prompts: tuple[Prompt, ...]
    checker: Checker
    gen_length: int | None
    """Tokens of a response; None: each model's default."""
    description: Mapping[str, Any]
    """What results say about them."""
    beyond_end: bool
    """Whether what follows the end of a response is judged, too."""

    def length(self, model_name: str) -> int:
        """The tokens of a response of a model."""
        return registry.gen_length(model_name) if self.gen_length is None else self.gen_length


def held_out(count: int = 500, seed: int = 0) -> Problems:
    """The first `count` held-out problems of the built-in task, the same for every call with one `seed`."""
    count, seed = whole("problems", count, 0), whole("seed", seed, -(2**63))
    stream = itertools.islice(tasks.problems("held_out", seed), count)
    prompts = tuple(Prompt(problem.prompt, str(problem.answer)) for problem in stream)
    description = {"problems": len(prompts), "seed": seed}
    return Problems(prompts, _is_number, tasks.GEN_LENGTH, description, beyond_end=True)


def _is_number(answer: str, response: str) -> bool:
    return tasks.extract_answer(response) == int(answer)


def from_file(
    data: str | Path,
    checker: str = "hashes",
    *,
    count: int | None = None,
    gen_length: int | None = None,
    prompt_field: str = "prompt",
    answer_field: str = "answer",
) -> Problems:
    """The first `count` problems of a file, by default all, see `read_prompts` and `checker_of`.

    gen_length: tokens of a response, see `Problems`. Raises as these two, and ValueError naming a number that
    does not fit.
    """
    for name, value in (("count", count), ("gen_length", gen_length)):
        if value is not None:
            whole(name, value, 1)
    right, prompts = checker_of(checker), tuple(read_prompts(data, prompt_field, answer_field)[:count])
    digest = hashlib.sha256(json.dumps([asdict(prompt) for prompt in prompts]).encode()).hexdigest()
    description = {"problems": len(prompts), "data": str(data), "checker": checker, "data_sha256": digest}
    return Problems(prompts, right, gen_length, description, beyond_end=False)
