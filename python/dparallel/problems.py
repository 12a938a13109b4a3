"""Problems: prompts with their right answers, of a file or the built-in task, and how answers are judged."""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dparallel_ext.arguments import warn, whole
from dparallel_ext.whole_files import as_path

from . import files, registry
from .checkers import Checker, checker_of, compares, without_number
from .text import Message, shown
from .toy import tasks


@dataclass(frozen=True)
class Prompt:
    """A prompt as text or as the messages of a chat, and the reference that the checker compares with."""

    text: str | list[Message]
    answer: str

    @property
    def shown(self) -> str:
        """The prompt as text: of messages their JSON."""
        return shown(self.text)


def read_prompts(
    source: str | Path,
    prompt_field: str = "prompt",
    answer_field: str | None = "answer",
    *,
    argument: str = "data",
) -> list[Prompt]:
    """Prompts of a file (`files.ROWS`), or of "builtin:N[:SEED]", N training problems of `tasks`.

    A prompt is a text, or a list of chat messages, {"role": ..., "content": ...} or ShareGPT's {"from": ...,
    "value": ...}: those in front of the assistant's last are the prompt. An answer is a text or a number, or
    a list of messages whose last is the assistant's. `answer_field` None: there are no answers, and a line
    that is no JSON is a prompt, too.
    Raises FileNotFoundError, or ValueError naming the argument, the line and the field that is missing or of
    another type, or a file without prompts.
    """
    source = str(as_path(argument, source, "a file or builtin:N"))
    if source.startswith("builtin:"):
        try:
            seeded = source if source.count(":") > 1 else f"{source}:77"
            count, seed = (int(part) for part in seeded.split(":")[1:])
            if not 1 <= count <= sys.maxsize:
                raise ValueError("no number of problems")
        except ValueError as error:
            raise ValueError(f"{argument}: expected builtin:N or builtin:N:SEED, got {source!r}") from error
        return of_task("train", seed, count)
    prompts = []
    for number, row in files.rows(argument, source, text_field=None if answer_field else prompt_field):
        place = f"{argument}: {source}:{number}"
        for option, name in (("prompt", prompt_field), ("answer", answer_field)):
            if name is not None and name not in row:
                raise ValueError(
                    f"{place} has no field {name!r}, only {sorted(row)}; --{option}-field names another"
                )
        answer = "" if answer_field is None else _answer(place, answer_field, row[answer_field])
        prompts.append(Prompt(_prompt(place, prompt_field, row[prompt_field]), answer))
    if not prompts:
        raise ValueError(f"{argument}: {source} holds no prompts")
    return prompts


def of_task(split: str, seed: int, count: int) -> list[Prompt]:
    """The first `count` problems of the built-in task, see `tasks.problems`."""
    stream = itertools.islice(tasks.problems(split, seed), count)
    return [Prompt(problem.prompt, str(problem.answer)) for problem in stream]


def _prompt(place: str, field: str, value: Any) -> str | list[Message]:
    """The prompt in a field: a text, or messages without the assistant's last."""
    if isinstance(value, str):
        return value
    messages = _messages(value)
    if messages is None:
        raise ValueError(f"{place}: expected str or a list of messages in {field!r}, got {value!r:.60}")
    asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    if not asked:
        raise ValueError(f"{place}: expected a message of another than the assistant in {field!r}")
    return asked


def _answer(place: str, field: str, value: Any) -> str:
    """The right answer in a field: a text, a number, or the last of messages."""
    if messages := _messages(value):
        last = messages[-1]
        if last["role"] != "assistant" or not isinstance(last.get("content"), str):
            raise ValueError(
                f"{place}: expected a text of the assistant at the end of {field!r}, got {value[-1]!r:.60}"
            )
        return str(last["content"])
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise ValueError(
            f"{place}: expected str or int or float or a list of messages in {field!r}, got {value!r:.60}"
        )
    return str(value)


SHAREGPT = {"human": "user", "gpt": "assistant"}
"""The names of ShareGPT's speakers -> those of roles; others bear the same name."""


def _messages(value: Any) -> list[Message] | None:
    """The messages of a chat, which name "role" and "content", or "from" and "value" as ShareGPT's; None for
    anything else."""
    if not (isinstance(value, list) and value and all(isinstance(each, dict) for each in value)):
        return None
    # Parquet gives each message the fields of all.
    messages = [{key: part for key, part in each.items() if part is not None} for each in value]
    for each in messages:
        if "role" not in each and isinstance(speaker := each.get("from"), str):
            each["role"], each["content"] = SHAREGPT.get(speaker, speaker), each.get("value")
            each.pop("from"), each.pop("value", None)
    return messages if all(isinstance(each.get("role"), str) for each in messages) else None


def digest_of(prompts: Sequence[Prompt]) -> str:
    """A hash of prompts and answers."""
    return hashlib.sha256(json.dumps([asdict(prompt) for prompt in prompts]).encode()).hexdigest()


@dataclass(frozen=True)
class Problems:
    """The problems that `evaluate` asks, and how it judges the answers."""

    prompts: tuple[Prompt, ...]
    checker: Checker
    gen_length: int | None
    """Tokens of a response; None: each model's default."""
    description: Mapping[str, Any]
    """The fields of results about them."""
    beyond_end: bool
    """Whether the tokens behind the end of a response are judged, too."""

    def length(self, model_name: str) -> int:
        """The tokens of a response of a model."""
        return registry.gen_length(model_name) if self.gen_length is None else self.gen_length


def held_out(count: int = 500, seed: int = 0) -> Problems:
    """The first `count` held-out problems of the built-in task, the same for every call with one `seed`."""
    count, seed = whole("problems", count, 0), whole("seed", seed, -(2**63))
    prompts = tuple(of_task("held_out", seed, count))
    description = {"problems": len(prompts), "seed": seed}
    return Problems(prompts, _is_right, tasks.GEN_LENGTH, description, beyond_end=True)


def _is_right(answer: str, response: str) -> bool:
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
    """The first `count` problems of a file, by default all, see `read_prompts` and `checker_of`. With the
    checker "none" they need no answers.

    gen_length: tokens of a response, see `Problems`. Raises as these two, and ValueError naming a number that
    does not fit.
    """
    for name, value in (("count", count), ("gen_length", gen_length)):
        if value is not None:
            whole(name, value, 1)
    right, answers = checker_of(checker), answer_field if compares(checker) else None
    prompts = tuple(read_prompts(data, prompt_field, answers)[:count])
    if other := without_number(checker, (prompt.answer for prompt in prompts)):
        warn(other)
    description = {"problems": len(prompts), "data": str(data), "checker": checker}
    description |= {"data_sha256": digest_of(prompts)}
    return Problems(prompts, right, gen_length, description, beyond_end=False)
