"""The data of a drafter's training and test: prompts, and the target's own answers to them, as ids in
files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

import dparallel_ext as dx
from dparallel_ext import models
from dparallel_ext.models import files as checkpoints

from ... import files
from ...problems import Prompt, of_task, read_prompts
from ...text import Encoder
from ..filter import hold_out
from .common import Answer, DrafterSettings

BATCH = 128
"""Sequences answered at once."""
SHARD = 512
"""Answers in a file: the most that an interrupted run loses."""


def prompts_of(data: str, prompt_field: str, encode: Encoder, held: int) -> tuple[list[Tensor], list[Tensor]]:
    """Token ids of the prompts to learn from, and of the prompts held out to test with."""

    def ids(prompts: Sequence[Prompt]) -> list[Tensor]:
        return [torch.tensor(encode(prompt.text), dtype=torch.int64) for prompt in prompts]

    drawn = ids(read_prompts(data, prompt_field, None))
    if data.startswith("builtin:"):
        return drawn, ids(of_task("held_out", 0, held))
    if not held:
        return drawn, []
    try:
        held_out = hold_out(drawn, held / max(1, len(drawn))).tolist()
    except ValueError as error:
        different = len({(*prompt.tolist(),) for prompt in drawn})
        raise ValueError(
            f"evaluate: expected a number that leaves prompts of {data} to learn from and others to test "
            f"with, got {held} of {len(drawn)}, {different} of them different"
        ) from error
    return (
        [prompt for prompt, out in zip(drawn, held_out, strict=True) if not out],
        [prompt for prompt, out in zip(drawn, held_out, strict=True) if out],
    )


def answers_of(
    directory: Path,
    model: models.Model,
    prompts: list[Tensor],
    settings: DrafterSettings,
    progress: bool,
) -> list[Answer]:
    """The target's answers, read from the directory if they are there; answers that are too short are left
    out."""
    identity: dict[str, Any] = {"target": models.fingerprint(model), "gen_length": settings.gen_length}
    if settings.temperature:
        identity |= {"temperature": settings.temperature, "seed": settings.seed}
    if settings.dtype != "auto":
        identity |= {"dtype": settings.dtype}
    parts = [prompts[first : first + SHARD] for first in range(0, len(prompts), SHARD)]
    bar = tqdm(total=len(prompts), desc="answers", unit="prompt", disable=not progress)
    long_enough: list[Answer] = []
    for number, part in enumerate(parts):
        file = directory / f"answers-{number:05d}.safetensors"
        digest = hashlib.sha256(b"".join(ids.numpy().tobytes() for ids in part)).hexdigest()
        content = json.dumps({**identity, "prompts": [len(part), digest]})
        answers = _read_answers(file, content)
        if answers is None:
            answers = [
                answer
                for first in range(0, len(part), BATCH)
                for answer in answer_all(model, part[first : first + BATCH], settings, number * SHARD + first)
            ]
            tensors = {
                "ids": torch.cat([ids for ids, _ in answers]).int(),
                "prompt": torch.tensor([length for _, length in answers]),
                "length": torch.tensor([len(ids) for ids, _ in answers]),
            }
            with files.replacing(file) as partial:
                partial.write_bytes(safetensors.torch.save(tensors, {"of": content}))
        long_enough += [(ids, length) for ids, length in answers if len(ids) - length >= 2]
        bar.update(len(part))
    bar.close()
    if not long_enough:
        raise ValueError("data: the target's answers have fewer than two tokens, and nothing can be learned")
    return long_enough


def kept_answers(directory: Path) -> str | None:
    """The files of answers in a directory, in words; None if there is none."""
    count = len([*directory.glob("answers-*.safetensors")])
    return f"{count} file{'s' * (count > 1)} of answers" if count else None


def answer_all(
    model: models.Model, prompts: Sequence[Tensor], settings: DrafterSettings, first: int = 0
) -> list[Answer]:
    """The target's answers, up to and with the end token; first: the number of the first prompt, for
    seeds."""
    out = dx.speculate(
        model,
        list(prompts),
        gen_length=settings.gen_length,
        temperature=settings.temperature,
        seed=[settings.seed * 1_000_003 + first + i for i in range(len(prompts))],
    )
    ends = [len(prompt) + int(n) for prompt, n in zip(prompts, out.generated, strict=True)]
    return [
        (row[:end].cpu(), len(prompt)) for row, end, prompt in zip(out.sequences, ends, prompts, strict=True)
    ]


def _read_answers(file: Path, content: str) -> list[Answer] | None:
    """The answers in a file; None if it does not exist. Raises ValueError for a file of another run."""
    if not file.exists():
        return None
    with checkpoints.readable(file, "out"), safe_open(file, framework="pt") as opened:
        identity = (opened.metadata() or {}).get("of")
        ids, prompt, length = (opened.get_tensor(name) for name in ("ids", "prompt", "length"))
    if identity != content:
        raise ValueError(f"out: {file} holds answers of another run: {identity}, expected {content}")
    return list(zip(ids.long().split(length.tolist()), prompt.tolist(), strict=True))
