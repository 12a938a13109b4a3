"""Accuracy against passes, over held-out problems of `tasks`, for models and policies."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import dparallel_ext as dx
from dparallel_ext import policies

from . import registry, tasks

ONE = "one"
"""The policy that commits one token a pass, the most confident."""


def parse_policy(text: str) -> dict[str, Any]:
    """decode's arguments for "one", "steps:N" (the fixed schedule of N passes) or "SELECTOR:THRESHOLD", such as
    "entropy:0.5". Raises ValueError."""
    if text == ONE:
        return {}
    selector, _, number = text.partition(":")
    if selector == "steps" and number.isdecimal():
        return {"steps": int(number)}
    try:
        threshold = float(number)
        policies.make(selector, threshold)
    except ValueError as error:
        raise ValueError(
            f"policy: expected {ONE!r}, steps:N or SELECTOR:THRESHOLD with a selector of {list(policies.SELECTORS)}, "
            f"got {text!r} ({error})"
        ) from error
    return {"selector": selector, "threshold": threshold}


def evaluate(
    model_name: str,
    policy: str,
    *,
    problems: int = 500,
    batch: int = 100,
    block_length: int = 32,
    cache: str = "none",
    device: str | None = None,
    loaded: tuple[Any, Any] | None = None,
) -> dict[str, Any]:
    """Decode `problems` held-out problems, the same ones for every call, and check their answers.

    Every sequence is decoded to its full length, so that passes compare.

    Returns model, policy, threshold, problems, accuracy, nfe_mean (passes per answer), tokens_per_forward,
    seconds, gen_length, block_length and cache.
    """
    settings = parse_policy(policy)
    model, tokenizer = loaded or registry.load(model_name, device=device)
    groups: dict[int, list[tuple[tasks.Problem, list[int]]]] = {}
    for problem in itertools.islice(tasks.problems("held_out"), problems):
        ids = tokenizer.encode(problem.prompt).ids
        groups.setdefault(len(ids), []).append((problem, ids))
    correct = passes = tokens = 0
    began = time.perf_counter()
    for group in groups.values():
        for at in range(0, len(group), batch):
            part = group[at : at + batch]
            prompt = torch.tensor([ids for _, ids in part], device=model.device)
            out = dx.decode(
                model,
                prompt,
                gen_length=tasks.GEN_LENGTH,
                block_length=block_length,
                cache=cache,
                **settings,
            )
            answers = tokenizer.decode_batch(out.sequences[:, prompt.shape[1] :].tolist())
            correct += sum(tasks.is_correct(p, text) for (p, _), text in zip(part, answers, strict=True))
            passes += int(out.nfe.sum())
            tokens += int(out.generated.sum())
    return {
        "model": model_name,
        "policy": policy,
        "threshold": settings.get("threshold"),
        "problems": problems,
        "accuracy": correct / problems if problems else 0.0,
        "nfe_mean": passes / problems if problems else 0.0,
        "tokens_per_forward": tokens / passes if passes else 0.0,
        "seconds": round(time.perf_counter() - began, 3),
        "gen_length": tasks.GEN_LENGTH,
        "block_length": block_length,
        "cache": cache,
    }


def sweep(names: Iterable[str], texts: Iterable[str], **settings: Any) -> Iterable[dict[str, Any]]:
    """`evaluate` for every model and policy, each model loaded once; yields as it goes."""
    texts = list(texts)
    for text in texts:
        parse_policy(text)
    for name in names:
        loaded = registry.load(name, device=settings.get("device"))
        for text in texts:
            yield evaluate(name, text, loaded=loaded, **settings)


def write_json(path: str | Path, rows: list[dict[str, Any]]) -> None:
    """Whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(rows, indent=1) + "\n")
    os.replace(partial, path)


def table(rows: Iterable[dict[str, Any]], title: str = "") -> Any:
    """A rich table of results."""
    from rich.table import Table

    made = Table(title=title or None)
    for heading in ("model", "policy"):
        made.add_column(heading)
    for heading in ("accuracy", "passes", "tokens/pass", "seconds"):
        made.add_column(heading, justify="right")
    for row in rows:
        made.add_row(
            row["model"],
            row["policy"],
            f"{row['accuracy']:.1%}",
            f"{row['nfe_mean']:.1f}",
            f"{row['tokens_per_forward']:.2f}",
            f"{row['seconds']:.1f}",
        )
    return made
