"""A training run: the target answers prompts, a drafter learns from its answers, and is tested."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dparallel_ext as dx
from dparallel_ext import models
from dparallel_ext.arguments import one_of, whole
from dparallel_ext.speculation import Drafter
from dparallel_ext.speculation.speculate import causal_model, check_prompts
from dparallel_ext.whole_files import as_path

from ... import files, registry
from ...text import prompt_encoder
from .. import loop
from . import adadecode, blocks, riders
from .answers import BATCH, answers_of, kept_answers, prompts_of
from .common import Answer, DrafterSettings, SavableDrafter, Target, Trainee

TRAINEES: tuple[type[Trainee], ...] = (
    blocks.BlockTrainee,
    riders.PromptTokensTrainee,
    riders.HiddenTransferTrainee,
    riders.StridedTrainee,
    adadecode.ExitHeadsTrainee,
)
KINDS: dict[str, type[Trainee]] = {kind: trainee for trainee in TRAINEES for kind in trainee.SETTINGS.KINDS}


def settings_of(kind: str, **fields: Any) -> DrafterSettings:
    """The settings of a kind of drafter. Raises ValueError for an unknown kind, and for other kinds'
    settings."""
    of_kind = KINDS[one_of("kind", kind, KINDS)].SETTINGS
    for name in fields:
        if name not in of_kind.__dataclass_fields__:
            kinds = [other for other in KINDS if name in KINDS[other].SETTINGS.__dataclass_fields__]
            raise ValueError(f"{name}: belongs to {', '.join(kinds)}, not to {kind}")
    return of_kind(kind=kind, **fields)


def run(
    target: str,
    out: str | Path,
    data: str | None = None,
    settings: DrafterSettings | None = None,
    *,
    prompt_field: str = "prompt",
    evaluate: int = 500,
    save_every: int = 250,
    chat: bool | None = None,
    device: str | None = None,
    loaded: tuple[Any, Any] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train a drafter for `target`, or resume an interrupted run in `out`.

    `out` receives config.json and model.safetensors, or an adapter's files (bfloat16: the drafter,
    `speculate(drafter=out)`), training.json (the report) and, for resuming, answers-NNNNN.safetensors and,
    every `save_every` steps, state.pt. A resumed run continues exactly as if it had not been stopped; only
    `steps` may change.

    Args:
        target: an autoregressive model by its name for `registry.load`.
        data: prompts, see `problems.read_prompts`; default for models that ship: "builtin:4000".
        evaluate: prompts held out to test with: held-out problems of the built-in task, or prompts of the
            file.
        chat: see `registry.template_of`.
        loaded: (model, tokenizer), in place of loading the target; then without chat template, unless `chat`.

    Returns the report: settings, target, answers, parameters, bytes, seconds, loss (a curve), and held_out,
    see `judge`.

    Raises ValueError and FileNotFoundError naming the argument; a run that is refused writes nothing, or, if
    nothing can be learned from the answers, the answers alone.
    """
    settings = settings or blocks.BlockSettings()
    for name, value, least in (("evaluate", evaluate, 0), ("save_every", save_every, 1)):
        whole(name, value, least)
    if data is None:
        if not target.startswith("builtin:"):
            raise ValueError(
                f"data: expected a file with prompts such as {target} will be asked, got none; only models "
                "that ship learn from the built-in task by default"
            )
        data = "builtin:4000"
    with registry.naming("target", "model"):
        if loaded is None:
            files.apart(as_path("out", out), registry.directory_of(target))
        template = registry.template_of(target, chat) if chat or loaded is None else None
        loading = registry.Loading(device, registry.dtype_of(settings.dtype))
        model, tokenizer = loaded or loading.load(target)
        model = causal_model(model)
    encode = prompt_encoder(tokenizer, template)
    trainee = KINDS[settings.kind](Target(target, model, template, loaded is None), settings)
    learned, judged = prompts_of(data, prompt_field, encode, evaluate)
    check_prompts(model, [*learned, *judged])
    registry.check_positions(target, model, max(map(len, [*learned, *judged])) + settings.gen_length)
    _held_back(trainee, settings, len(learned))  # before anything is written
    with files.run_directory(out) as directory:
        answers = trainee.learnable(answers_of(directory, model, learned, settings, progress))
        with _frozen(model):
            drafter, report = _train(
                directory, trainee, model.device, answers, settings, save_every, progress
            )
        drafter.save(directory)
        report |= {"target": target, "data": data, "answers": len(answers)}
        report["bytes"] = (directory / trainee.file).stat().st_size
        if judged:
            report["held_out"] = judge(model, drafter, judged, settings.gen_length)
        files.write_json(directory / "training.json", report)
    return report


def saved_progress(directory: Path) -> str | None:
    """The state that an interrupted run in a directory has kept, in words; None if there is none."""
    return loop.saved_progress(directory) or kept_answers(directory)


@contextmanager
def _frozen(model: models.Model) -> Iterator[None]:
    """A context without gradients of the target's weights."""
    learning = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in learning:
            p.requires_grad_(False)
        yield
    finally:
        for p in learning:
            p.requires_grad_(True)


def _held_back(trainee: Trainee, settings: DrafterSettings, count: int) -> int:
    """The number of `count` answers that the trainee measures with. Raises ValueError for too few answers."""
    held_back = min(trainee.measured, count // 10)
    if trainee.measured and not held_back:
        raise ValueError(
            f"data: expected at least 10 answers, of which a tenth measures a drafter of kind "
            f"{settings.kind}, got {count}"
        )
    return held_back


def _train(
    directory: Path,
    trainee: Trainee,
    device: torch.device,
    answers: list[Answer],
    settings: DrafterSettings,
    save_every: int,
    progress: bool,
) -> tuple[SavableDrafter, dict[str, Any]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        module = trainee.build()
    trainee.module = module.to(device).train()
    held_back = _held_back(trainee, settings, len(answers))
    learned, measured = answers[: len(answers) - held_back], answers[len(answers) - held_back :]
    identity = json.loads(json.dumps({**asdict(settings), "config": trainee.config, "answers": len(answers)}))
    seconds, curve = loop.run(
        directory,
        module,
        trainee.matrices,
        lambda step: trainee.loss_of(learned, step),
        settings,
        identity,
        defaults={"dtype": "auto"},
        save_every=save_every,
        report_every=50,
        described=settings.kind,
        progress=progress,
    )
    report = {
        "settings": identity,
        "parameters": sum(p.numel() for p in module.parameters()),
        "seconds": round(seconds),
        "loss": curve,
    }
    return trainee.drafter(str(directory), measured), report


# --- the test -------------------------------------------------------------------------------------


def judge(
    target: models.Model, drafter: Drafter, prompts: Sequence[Tensor], gen_length: int
) -> dict[str, Any]:
    """Decode prompts to the end token, with drafts of the drafter's largest size in every pass.

    Returns prompts (their number); tokens (the mean of an answer, end token included); passes (the mean of an
    answer, the pass over the prompt included); tau: tokens of a pass with a draft, the model's own included;
    tokens_per_pass: over all passes; accepted: for each depth the share of the drafts reaching it that are
    right up to it; accepted_share: the share of all drafted tokens; layers: the layers run for a token, one
    after the other, as a share of the model's layers.
    """
    tokens = passes = drafts = layers = 0
    depth = torch.zeros(2, drafter.most, dtype=torch.int64)
    for first in range(0, len(prompts), BATCH):
        part = list(prompts[first : first + BATCH])
        out = dx.speculate(target, part, gen_length=gen_length, drafter=drafter, draft_size=drafter.most)
        tokens += int(out.generated.sum())
        passes += int(out.nfe.sum())
        drafts += int(out.draft_nfe.sum())
        layers += int(out.layers.sum())
        for row, counts in zip(depth, (out.drafted, out.accepted), strict=True):
            row[: len(counts)] += counts
    gained = int(depth[1].sum())
    depth = depth[:, : int((depth[0] > 0).sum())]
    return {
        "prompts": len(prompts),
        "tokens": tokens / len(prompts),
        "passes": passes / len(prompts),
        "tau": 1 + gained / max(1, drafts),
        "tokens_per_pass": tokens / max(1, passes),
        "accepted": [round(float(share), 4) for share in depth[1] / depth[0].clamp(min=1)],
        "accepted_share": gained / max(1, int(depth[0].sum())),
        "layers": layers / max(1, tokens) / target.shape.layers,
    }


def report_lines(report: dict[str, Any]) -> Iterator[str]:
    yield f"{report['settings']['kind']}: {report['parameters']:,} parameters, {report['bytes']:,} bytes"
    yield f"learned from {report['answers']} answers in {report['seconds']} s"
    held = report.get("held_out")
    if held is not None:
        yield (
            f"{held['prompts']} held out: {held['tau']:.2f} tokens a pass with a draft, "
            f"{held['tokens_per_pass']:.2f} with that over the prompt ({held['tokens']:.1f} tokens in "
            f"{held['passes']:.2f} passes)"
        )
        yield (
            f"{held['accepted_share']:.1%} of the drafted tokens accepted, {held['layers']:.3f} of the "
            "model's layers for a token"
        )
        yield "accepted by depth: " + " ".join(f"{share:.0%}" for share in held["accepted"])
