"""`make distill`: distils the teacher, measures the curves, and chooses the best student.

    answers      the teacher answers training problems; its right answers are kept
    sweep        a short run for each beta and mask ratio, measured on validation problems
    finals       the best certainty-forcing setting and the best with cross entropy alone, at equal budgets
                 over several seeds; and the teacher
    curves       accuracy against passes, with intervals, over problems that no choice was made with
    student      the final run with the fewest passes at the teacher's accuracy on the validation problems

Every stage writes files, and is skipped if they are there, so an interrupted run is resumed.
"""

from __future__ import annotations

import itertools
import json
import shutil
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from dparallel_ext.rules import ONE

from .. import files, plots, results
from .. import sweep as sweeping
from ..console import goes_on, plain_errors
from ..problems import read_prompts
from ..training import distill, trajectories
from . import train

TEACHER_POLICIES = (
    [ONE]
    + [f"entropy:{t}" for t in (0.5, 0.6, 0.7, 0.8)]
    + [f"confidence:{t}" for t in (0.9, 0.8, 0.7)]
    + [f"entropy_bound:{t}" for t in (0.6, 1.0, 2.0)]
)
STUDENT_POLICIES = (
    [f"entropy:{t}" for t in (0.3, 0.5, 0.7, 0.9, 1.1, 1.4)]
    + [f"confidence:{t}" for t in (0.8, 0.6, 0.5)]
    + [f"entropy_bound:{t}" for t in (1.0,)]
)
SWEEP_POLICIES = [f"entropy:{t}" for t in (0.3, 0.5, 0.7, 1.0)]
VALIDATION = 1
"""The seed of the held-out problems that choices are made with; the curves are over those of seed 0."""
BETAS = (0.0, 0.5, 1.0, 2.0)
RATIOS: tuple[Any, ...] = (0.5, [0.0, 1.2])
WITHIN = 0.01
"""The share of right answers that a student may lose: a percentage point."""
THRESHOLDS = ("entropy", "confidence")
"""The policies with a threshold for each token, as in the paper; entropy_bound has one for a sum."""

Row = dict[str, Any]


def passes_at(rows: Iterable[Row], accuracy: float) -> float:
    """The fewest passes per answer at `accuracy` or more, interpolated linearly between thresholds."""
    best = float("inf")
    rules: dict[str, list[Row]] = {}
    for row in rows:
        rules.setdefault(row["policy"].partition(":")[0], []).append(row)
    for points in rules.values():
        points.sort(key=lambda row: row["nfe_mean"])
        best = min([best, *(p["nfe_mean"] for p in points if p["accuracy"] >= accuracy)])
        for a, b in itertools.pairwise(points):
            if a["accuracy"] < accuracy <= b["accuracy"]:
                share = (accuracy - a["accuracy"]) / (b["accuracy"] - a["accuracy"])
                best = min(best, a["nfe_mean"] + share * (b["nfe_mean"] - a["nfe_mean"]))
    return best


def of_rules(rows: Iterable[Row], rules: Iterable[str]) -> list[Row]:
    return [row for row in rows if row["policy"].partition(":")[0] in rules]


def spent(out: Path) -> float:
    """Seconds of training and evaluation that the files below `out` record."""
    total = 0.0
    for file in out.rglob("*.json"):
        content = json.loads(file.read_text()) if "student" not in file.relative_to(out).parts else None
        if file.name == "training.json" and content is not None:
            total += content["seconds"]
        elif isinstance(content, list):
            total += sum(row["seconds"] for row in content)
    return total


@dataclass(frozen=True)
class Stages:
    """The stages of a study, and what they share; a stage is skipped if its files are there."""

    out: Path
    recipe_file: str | Path
    base: distill.Recipe
    problems: int
    """Problems of the curves."""
    validation: int
    """Problems that choices are made with."""
    say: Callable[[str], None]
    began: float = field(default_factory=time.monotonic)

    def tell(self, text: str) -> None:
        self.say(f"[{(time.monotonic() - self.began) / 60:5.1f} min] {text}")

    def answered(self) -> int:
        """Let the teacher answer the training problems; return the number of right answers."""
        settings = trajectories.TrajectorySettings(**{"model": self.base.model, **self.base.trajectories})
        prompts = read_prompts(self.base.data)
        trajectories.generate(self.out / "answers", prompts, settings)
        count = len(trajectories.Trajectories(self.out / "answers"))
        self.tell(f"answers: {count} of {len(prompts)} right")
        return count

    def trained(self, name: str, changes: dict[str, Any]) -> Path:
        directory = self.out / name
        if not (directory / "training.json").exists():
            recipe = distill.read(self.recipe_file, model=self.base.model, training=changes)
            distill.run(recipe, self.out / "answers", directory, progress=False)
            for checkpoint in directory.glob("checkpoint-*"):
                shutil.rmtree(checkpoint)
        return directory

    def judged(self, file: Path, name: str, policies: list[str], last: bool = False) -> list[Row]:
        """Results on the validation problems, or, with `last`, on the problems of the curves; read from the
        file if it exists."""
        count, seed = (self.problems, 0) if last else (self.validation, VALIDATION)
        if not file.exists():
            files.write_json(file, [*sweeping.sweep([name], policies, problems=count, seed=seed)])
        rows: list[Row] = json.loads(file.read_text())
        return rows

    def tried(self, bar: float, ratio: Any, beta: float, steps: int) -> dict[str, Any]:
        """Do a short run of the sweep; return its settings, passes and results."""
        name = f"sweep/beta-{beta:g}-ratio-{'-'.join(map(str, ratio)) if isinstance(ratio, list) else ratio}"
        changes = {"entropy_weight": beta, "mask_ratio": ratio, "max_steps": steps}
        directory = self.trained(name, changes)
        rows = self.judged(directory / "validation.json", str(directory), SWEEP_POLICIES)
        result = {"entropy_weight": beta, "mask_ratio": ratio, "passes": passes_at(rows, bar), "rows": rows}
        self.tell(f"{name}: {result['passes']:.2f} passes at {bar:.1%}")
        return result

    def final(self, bar: float, name: str, changes: dict[str, Any]) -> dict[str, Any]:
        directory = self.trained(name, changes)
        chosen_by = self.judged(directory / "validation.json", str(directory), SWEEP_POLICIES)
        rows = self.judged(directory / "held_out.json", str(directory), STUDENT_POLICIES, last=True)
        validation = passes_at(chosen_by, bar)
        self.tell(f"{name}: {validation:.2f} passes at {bar:.1%}, validation")
        return {"directory": str(directory), "validation": validation, "rows": rows}


def run(
    out: str | Path,
    recipe_file: str | Path,
    *,
    seeds: int,
    steps: int | None,
    sweep_steps: int,
    problems: int,
    validation: int,
    betas: Iterable[float] = BETAS,
    ratios: Iterable[Any] = RATIOS,
    data: str | None = None,
    model: str | None = None,
    train_teacher: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Run all stages; return the content of report.json.

    The teacher is the recipe's, or `model`, or, with `train_teacher`, trained from scratch first.
    """
    out, began = Path(out), time.monotonic()
    if train_teacher:
        model = str(out / "teacher")
        if not (out / "teacher" / "training.json").exists():
            train.train(model)
    replaced = {"data": data, "model": model}
    base = distill.read(recipe_file, **{key: value for key, value in replaced.items() if value is not None})
    stages = Stages(out, recipe_file, base, problems, validation, say, began)

    answers = stages.answered()
    checked = stages.judged(out / "teacher-validation.json", base.model, [ONE])
    bar = checked[0]["accuracy"] - WITHIN
    stages.tell(f"teacher, validation, one token a pass: {checked[0]['accuracy']:.1%}")
    sweep = [stages.tried(bar, *each, sweep_steps) for each in itertools.product(ratios, betas)]
    choices = {
        "cross entropy": min((s for s in sweep if s["entropy_weight"] == 0), key=lambda s: s["passes"]),
        "certainty forcing": min((s for s in sweep if s["entropy_weight"] > 0), key=lambda s: s["passes"]),
    }
    finals: dict[str, list[dict[str, Any]]] = {}
    for seed, (objective, choice) in itertools.product(range(seeds), choices.items()):
        changes = {k: choice[k] for k in ("entropy_weight", "mask_ratio")} | {"seed": seed}
        changes |= {} if steps is None else {"max_steps": steps}
        name = f"finals/{objective.replace(' ', '-')}-{seed}"
        finals.setdefault(objective, []).append(stages.final(bar, name, changes))
    teacher = stages.judged(out / "teacher.json", base.model, TEACHER_POLICIES, last=True)
    best = min((run for runs in finals.values() for run in runs), key=lambda run: run["validation"])
    shutil.copytree(best["directory"], out / "student", dirs_exist_ok=True)
    groups = {"teacher": [teacher]} | {name: [run["rows"] for run in runs] for name, runs in finals.items()}
    report = summary(groups, best["rows"]) | {
        "student": best["directory"],
        "sweep": [{k: v for k, v in s.items() if k != "rows"} for s in sweep],
        "chosen": {name: {k: c[k] for k in ("entropy_weight", "mask_ratio")} for name, c in choices.items()},
        "answers": answers,
        "problems": problems,
        "minutes": round(spent(out) / 60),
    }
    write(report, out)
    say(markdown(report))
    return report


def write(report: dict[str, Any], out: Path) -> None:
    """Write report.json, curves.png and report.md."""
    files.write_json(out / "report.json", report)
    shown = [row for row in report["table"] if not row["policy"].startswith("entropy_bound")]
    plots.accuracy_against_passes(shown, out / "curves.png")
    files.write_text(out / "report.md", markdown(report))


def summary(groups: dict[str, list[list[Row]]], student: list[Row]) -> dict[str, Any]:
    """Each group's accuracy and passes per policy (mean and range over its runs), AUP, and the targets."""
    top = max(row["accuracy"] for runs in groups.values() for rows in runs for row in rows)
    teacher = groups["teacher"][0]
    slowest = next(row for row in teacher if row["policy"] == ONE)
    bar = slowest["accuracy"] - WITHIN

    table = []
    for name, runs in groups.items():
        for same in zip(*runs, strict=True):
            accuracy = [row["accuracy"] for row in same]
            trials = sum(row["problems"] for row in same)
            right = sum(round(row["accuracy"] * row["problems"]) for row in same)
            table.append(
                {
                    "model": name,
                    **{key: same[0][key] for key in ("policy", "threshold", "problems", "gen_length")},
                    "runs": len(same),
                    "accuracy": statistics.mean(accuracy),
                    "accuracy_of_runs": [min(accuracy), max(accuracy)],
                    "accuracy_interval": results.wilson(right, trials),
                    "nfe_mean": statistics.mean(row["nfe_mean"] for row in same),
                }
            )
    areas = {
        name: {rule: [results.aup(of_rules(rows, [rule]), top) for rows in runs] for rule in THRESHOLDS}
        for name, runs in groups.items()
    }
    return {
        "table": table,
        "aup": areas,
        "bar": bar,
        "passes_one_token": slowest["nfe_mean"],
        "passes_at_bar": {
            name: {
                "threshold": [passes_at(of_rules(rows, THRESHOLDS), bar) for rows in runs],
                "any policy": [passes_at(rows, bar) for rows in runs],
            }
            for name, runs in groups.items()
        },
        "student_passes_at_bar": passes_at(student, bar),
    }


def markdown(report: dict[str, Any]) -> str:
    bar, slowest = report["bar"], report["passes_one_token"]
    lines = [
        f"Fewest passes at an accuracy of at least {bar:.1%} (the teacher's at one token a pass, less a "
        f"point), over {report['problems']} held-out problems:",
        "",
        "| model | setting | passes with a threshold, each run | fewer than one a token "
        "| fewer than the teacher | with any policy, each run | AUP, entropy | AUP, confidence |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    teacher = report["passes_at_bar"]["teacher"]["threshold"][0]
    for name, passes in report["passes_at_bar"].items():
        chosen = report["chosen"].get(name)
        setting = f"beta {chosen['entropy_weight']:g}, ratio {chosen['mask_ratio']}" if chosen else ""
        aup = [f"{statistics.mean(report['aup'][name][rule]):.0f}" for rule in THRESHOLDS]
        each, any_policy = (", ".join(f"{p:.2f}" for p in passes[by]) for by in ("threshold", "any policy"))
        mean = statistics.mean(passes["threshold"])
        fewer = f"{slowest / mean:.1f}x | {teacher / mean:.1f}x"
        lines.append(f"| {name} | {setting} | {each} | {fewer} | {any_policy} | {aup[0]} | {aup[1]} |")
    lines += [
        "",
        "| model | policy | accuracy | 95 % interval | of runs | passes |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for row in report["table"]:
        low, high = row["accuracy_interval"]
        least, most = row["accuracy_of_runs"]
        of_runs = f"{least:.1%} to {most:.1%}" if row["runs"] > 1 else ""
        lines.append(
            f"| {row['model']} | {row['policy']} | {row['accuracy']:.1%} | {low:.1%} to {high:.1%} "
            f"| {of_runs} | {row['nfe_mean']:.2f} |"
        )
    lines += ["", "| beta | mask ratio | passes at the bar (sweep, validation problems) |", "|--:|---|--:|"]
    lines += [f"| {s['entropy_weight']:g} | {s['mask_ratio']} | {s['passes']:.2f} |" for s in report["sweep"]]
    lines += ["", f"{report['minutes']} minutes of training and evaluation."]
    return "\n".join(lines) + "\n"


def saved_progress(out: Path) -> str | None:
    """The stages in a directory whose files are there, in words; None if there is none."""
    return "the stages that are complete" if any(out.rglob("*.json")) else None


def main(
    out: Path = Path("out/distill"),
    recipe: Path = Path("recipes/builtin.yaml"),
    model: Annotated[str | None, typer.Option(help="the teacher; default: the recipe's")] = None,
    train_teacher: Annotated[
        bool, typer.Option("--train-teacher", help="from scratch first (76 minutes)")
    ] = False,
    seeds: int = 3,
    steps: Annotated[int | None, typer.Option(help="of the final runs; default: the recipe's")] = None,
    sweep_steps: int = 200,
    problems: int = 2000,
    validation: Annotated[int, typer.Option(help="problems to make choices with")] = 300,
) -> None:
    """Distil the teacher, measure the curves, and choose the best student."""
    settings: dict[str, Any] = {"seeds": seeds, "steps": steps, "sweep_steps": sweep_steps, "model": model}
    settings |= {"problems": problems, "validation": validation, "train_teacher": train_teacher}
    with plain_errors("train", goes_on(out, saved_progress)):
        run(out, recipe, **settings)


if __name__ == "__main__":
    typer.run(main)
