"""The training loop of small models: Muon for the matrices, AdamW for the rest, and an average of the
weights.

An interrupted run is resumed with the same weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

import dparallel_ext as dx
from dparallel_ext.arguments import check_fields, number, whole

from .. import files

MOST_SEEDS = 2**40
"""The bound of seeds, so that the seed of a step fits the 64 bits of torch's generator."""
Optimizers = list[tuple[torch.optim.Optimizer, float]]
"""Optimizers and their full rates."""


@dataclass(frozen=True, kw_only=True)
class TrainingSchedule:
    """The steps and rates of a run, whose settings are a subclass with defaults.

    Raises ValueError naming the number that does not fit.
    """

    steps: int
    muon_lr: float
    adam_lr: float
    weight_decay: float
    warmup: int
    decay: float
    """Share of the steps, at the end, over which the learning rates fall to zero."""
    ema: float
    """Share of the averaged weights that a step keeps, once there are enough steps for it."""
    seed: int

    def __post_init__(self) -> None:
        check_fields(self, ("steps", "warmup"), whole, 1)
        check_fields(self, ("seed",), whole, 0, MOST_SEEDS - 1)
        check_fields(self, ("weight_decay", "decay"), number, 0, 1)
        check_between(self, ("muon_lr", "adam_lr", "ema"))


def check_between(settings: object, names: Iterable[str]) -> None:
    """Raise ValueError naming a field of settings that is not above 0 and below 1."""
    for name in names:
        check_fields(settings, (name,), number)
        if not 0 < (value := getattr(settings, name)) < 1:
            raise ValueError(f"{name}: expected a number between 0 and 1, got {value}")


STATE = ("settings", "step", "model", "optimizers", "average", "seconds", "curve", "recent")
"""Keys of a saved run."""


class TrainingRecord(NamedTuple):
    """The time and the loss of a run."""

    seconds: float
    curve: list[list[float]]
    """[step, mean loss since the entry before] of each report."""


def learning_rate(step: int, *, steps: int, warmup: int, decay: float) -> float:
    """The share of the full rate at a step: warm-up, a plateau, and a linear fall to zero."""
    fall = max(1, round(steps * decay))
    return min(1.0, (step + 1) / warmup, (steps - step) / fall)


def run(
    directory: Path,
    model: nn.Module,
    matrices: Iterable[nn.Parameter],
    loss_of: Callable[[int], Tensor],
    schedule: TrainingSchedule,
    settings: Mapping[str, Any],
    *,
    defaults: Mapping[str, Any] | None = None,
    save_every: int,
    report_every: int,
    described: str,
    progress: bool,
) -> TrainingRecord:
    """Train `model`, or resume the interrupted run in `directory`; the model then has the averaged weights.

    matrices: the parameters that Muon trains. loss_of: a step's loss, which depends only on the step's
    number. settings: identify the run; only "steps" may differ in a resumed run, and may not be fewer than it
    has done. defaults: values of settings that an older run's state does not have.

    Raises ValueError if `directory` holds a run with other settings or of more steps, or state.pt is not a
    run's state, for rows that a loss refuses, such as one with NaN, and for a loss or gradient that is not
    finite; no weight has then moved.
    """
    optimizers = make_optimizers(model, list(matrices), schedule)
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    first, seconds = 0, 0.0
    curve: list[list[float]] = []
    recent: list[float] = []
    state_file = directory / "state.pt"
    if state_file.exists():
        state = _read(state_file, next(model.parameters()).device, settings, defaults or {})
        model.load_state_dict(state["model"])
        for (optimizer, _), saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        average, first = state["average"], state["step"]
        seconds, curve, recent = state["seconds"], state["curve"], state["recent"]

    steps = tqdm(
        range(first, schedule.steps),
        initial=first,
        total=schedule.steps,
        desc=described,
        mininterval=5,
        disable=not progress,
    )
    clock = time.monotonic()
    for step in steps:
        rate = learning_rate(step, steps=schedule.steps, warmup=schedule.warmup, decay=schedule.decay)
        set_rates(optimizers, rate)
        loss = loss_of(step)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        recent.append(loss.item())
        dx.check_errors(loss.device)  # on a GPU, losses raise no errors by themselves
        if not math.isfinite(recent[-1] + norm.item()):
            raise ValueError(
                f"the loss of step {step + 1} is {recent[-1]:g} and its gradient's norm {norm.item():g}: "
                f"training stops, and {state_file} is as it was; lower rates may help"
            )
        for optimizer, _ in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        decay = min(schedule.ema, (step + 1) / (step + 10))
        with torch.no_grad():
            for name, p in model.named_parameters():
                average[name].lerp_(p, 1 - decay)
        if (step + 1) % report_every == 0:
            curve.append([step + 1, round(sum(recent) / len(recent), 5)])
            recent = []
            steps.set_postfix(loss=f"{curve[-1][1]:.4f}")
        if (step + 1) % save_every == 0 or step + 1 == schedule.steps:
            now = time.monotonic()
            seconds, clock = seconds + now - clock, now
            state = {
                "settings": dict(settings),
                "step": step + 1,
                "model": model.state_dict(),
                "optimizers": [o.state_dict() for o, _ in optimizers],
                "average": average,
                "seconds": seconds,
                "curve": curve,
                "recent": recent,
            }
            with files.replacing(state_file) as partial:
                torch.save(state, partial)
    model.load_state_dict(average, strict=False)
    return TrainingRecord(seconds, curve)


def saved_progress(directory: Path) -> str | None:
    """The last saved step of the run in a directory, in words; None if there is none."""
    try:
        state = torch.load(directory / "state.pt", weights_only=True, map_location="cpu", mmap=True)
        return f"step {state['step']}"
    except Exception:  # of many kinds; of a file that is no state nothing goes on
        return None


def make_optimizers(model: nn.Module, matrices: list[nn.Parameter], schedule: TrainingSchedule) -> Optimizers:
    """Muon for the matrices and AdamW for the other parameters, each with its full rate."""
    rest = [p for p in model.parameters() if not any(p is m for m in matrices)]
    optimizers: Optimizers = []
    if matrices:
        muon = torch.optim.Muon(
            matrices,
            lr=schedule.muon_lr,
            weight_decay=schedule.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        optimizers.append((muon, schedule.muon_lr))
    if rest:
        adam = torch.optim.AdamW(rest, lr=schedule.adam_lr, betas=(0.9, 0.98), weight_decay=0.0)
        optimizers.append((adam, schedule.adam_lr))
    return optimizers


def set_rates(optimizers: Optimizers, share: float) -> None:
    """Set each optimizer's rate to a share of its full one."""
    for optimizer, full in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = full * share


def _read(
    file: Path, device: torch.device, settings: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """The state of the run in a file. Raises ValueError, also for a run with other settings."""
    try:
        state: dict[str, Any] = torch.load(file, weights_only=True, map_location=device)
        if missing := [key for key in STATE if key not in state]:
            raise KeyError(*missing)
    except Exception as error:  # torch.load raises many kinds
        raise ValueError(
            f"out: {file} is not the state of a run ({type(error).__name__}: {error}); without it "
            "the run begins anew"
        ) from error
    before = {**defaults, **state["settings"]}
    if {**before, "steps": 0} != {**settings, "steps": 0}:
        other = {key: value for key, value in before.items() if settings.get(key) != value}
        raise ValueError(f"out: {file.parent} holds a run with other settings: {other}")
    if state["step"] > settings["steps"]:
        raise ValueError(
            f"steps: {file.parent} holds a run of {state['step']} steps, expected at least as many, got "
            f"{settings['steps']}"
        )
    return state
