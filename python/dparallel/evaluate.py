"""Accuracy against passes, over held-out problems of `tasks`, for models and policies."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext import rules
from dparallel_ext.rules import ONE as ONE
from dparallel_ext.rules import learned

from . import registry
from .text import prompt_encoder
from .toy import tasks


def parse_policy(text: str, *, files: bool = True) -> dict[str, Any]:
    """decode's arguments for what `rules.parse` takes: "one", "steps:N", "SELECTOR:THRESHOLD", "credit", ...

    files: whether it may name any file of this machine ("learned:PATH"), not those alone that ship
    ("learned:builtin:teacher").

    Raises ValueError, also for a number beyond its bounds.
    """
    file = rules.file_of(text)
    if not files and file is not None and file not in learned.NAMED:
        raise ValueError(
            "policy: expected a file that ships, learned:builtin:NAME, where a request names one"
        )
    try:
        rule, row = rules.parse(text)
    except ValueError as error:
        raise ValueError(str(error).replace("rule:", "policy:", 1)) from error
    return row if rule is None else {"rule": text}


def evaluate(
    model_name: str,
    policy: str,
    *,
    config: dx.DecodeConfig | None = None,
    problems: int = 500,
    seed: int = 0,
    batch: int = 100,
    block_length: int | None = None,
    cache: str | None = None,
    mask_id: int | None = None,
    chat: bool | None = None,
    device: str | None = None,
    fp8: bool = False,
    loaded: tuple[Any, Any] | None = None,
) -> dict[str, Any]:
    """Decode `problems` held-out problems, the same for every call with one `seed`, and check the answers.

    Every sequence is decoded to its full length, so that passes compare. `config`: how, but for the length
    and the rule, which `policy` says. `block_length` and `cache`: default the config's. `chat`: the problems
    go by the checkpoint's chat template; default: where it has one. A model that comes as `loaded` is asked
    without unless `chat` is true, which takes the template of `model_name`.

    Returns model, policy, threshold, problems, seed, accuracy, accuracy_interval (Wilson's, 95 %), nfe_mean
    (passes per answer), tokens_per_forward (those in front of EOS, the model's `eos_id`),
    padded_tokens_per_forward (all gen_length of them), seconds, gen_length, block_length, cache, chat, fp8.
    """
    threshold = parse_policy(policy).get("threshold")
    config = (config or dx.DecodeConfig()).with_rule(policy, gen_length=tasks.GEN_LENGTH)
    if block_length is not None:
        config = config.replace(block_length=block_length)
    if cache is not None:
        config = config.replace(cache=cache)
    for name, value, least in (("problems", problems, 0), ("batch", batch, 1)):
        if value < least:
            raise ValueError(f"{name}: expected a whole number >= {least}, got {value}")
    template = registry.template_of(model_name, chat) if chat or loaded is None else None
    model, tokenizer = loaded or registry.load(model_name, device=device, fp8=fp8, mask_id=mask_id)
    model, encode = dx.models.for_decoding(model), prompt_encoder(tokenizer, template)
    groups: dict[int, list[tuple[tasks.Problem, list[int]]]] = {}
    for problem in itertools.islice(tasks.problems("held_out", seed), problems):
        ids = encode(problem.prompt)
        groups.setdefault(len(ids), []).append((problem, ids))
    correct = passes = tokens = padded = 0
    began = time.perf_counter()
    for group in groups.values():
        for at in range(0, len(group), batch):
            part = group[at : at + batch]
            prompt = torch.tensor([ids for _, ids in part], device=model.device)
            out = dx.decode(model, prompt, config)
            responses = out.sequences[:, prompt.shape[1] :]
            answers = tokenizer.decode_batch(responses.tolist())
            correct += sum(tasks.is_correct(p, text) for (p, _), text in zip(part, answers, strict=True))
            passes += int(out.nfe.sum())
            tokens += kept_tokens(responses[:, : tasks.GEN_LENGTH], model.eos_id)
            padded += int(out.generated.sum())
    return {
        "model": model_name,
        "policy": policy,
        "threshold": threshold,
        "problems": problems,
        "seed": seed,
        "accuracy": correct / problems if problems else 0.0,
        "accuracy_interval": wilson(correct, problems),
        "nfe_mean": passes / problems if problems else 0.0,
        "tokens_per_forward": tokens / passes if passes else 0.0,
        "padded_tokens_per_forward": padded / passes if passes else 0.0,
        "seconds": round(time.perf_counter() - began, 3),
        "gen_length": tasks.GEN_LENGTH,
        "block_length": config.block_length or dx.models.traits(model).block_length or 32,
        "cache": config.cache or "none",
        "chat": template is not None,
        "fp8": model.quantized,
    }


def kept_tokens(responses: Tensor, eos_id: int | None) -> int:
    """Tokens of responses (B, R) that stand in front of EOS, over all of them."""
    return int((responses == (-1 if eos_id is None else eos_id)).cumsum(1).eq(0).sum())


def sweep(names: Iterable[str], texts: Iterable[str], **settings: Any) -> Iterable[dict[str, Any]]:
    """`evaluate` for every model and policy, each model loaded once; yields as it goes."""
    texts = list(texts)
    for text in texts:
        parse_policy(text)
    for name in names:
        options = {key: settings[key] for key in ("device", "fp8", "mask_id") if key in settings}
        chat = registry.template_of(name, settings.get("chat")) is not None
        loaded = registry.load(name, **options)
        for text in texts:
            yield evaluate(name, text, loaded=loaded, **{**settings, "chat": chat})


def wilson(right: int, trials: int) -> list[float]:
    """The 95 % score interval of a share (Wilson 1927)."""
    if not trials:
        return [0.0, 1.0]
    z, share = 1.959964, right / trials
    middle = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials**2)) / (1 + z * z / trials)
    return [max(0.0, middle - half), min(1.0, middle + half)]


def aup(rows: Iterable[dict[str, Any]], best: float) -> float:
    """Accuracy under parallelism of one model's rows (d3LLM, arXiv 2601.07568).

    The area under accuracy (in %) against padded tokens per pass, from the slowest row on, each accuracy y
    weighted min(exp(-3 (1 - y / best)), 1); rows more than 5 points below the slowest are left out.
    `best`: the highest accuracy (0 to 1) of all models that are compared.
    """
    points = sorted((row["padded_tokens_per_forward"], 100 * row["accuracy"]) for row in rows)
    points = [(x, y) for x, y in points if y >= points[0][1] - 5]
    if not points or best <= 0:
        return 0.0
    weighted = [(x, y * min(math.exp(-3 * (1 - y / (100 * best))), 1.0)) for x, y in points]
    area = points[0][0] * points[0][1]
    for (x0, y0), (x1, y1) in itertools.pairwise(weighted):
        area += (x1 - x0) * (y0 + y1) / 2
    return area


HEADING = f"{'model':<18} {'policy':<18} {'accuracy':>8} {'passes':>7} {'tokens/pass':>12} {'seconds':>8}"


def line(row: dict[str, Any]) -> str:
    """A result as a line under HEADING."""
    return (
        f"{row['model']:<18} {row['policy']:<18} {row['accuracy']:>8.1%} {row['nfe_mean']:>7.1f} "
        f"{row['tokens_per_forward']:>12.2f} {row['seconds']:>8.1f}"
    )
