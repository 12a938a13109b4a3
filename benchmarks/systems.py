"""docs/systems.md: every system that the package implements, on one task, as `dparallel evaluate` measured
it.

`make bench-report` writes the page from docs/rules.json, speculation.json, trees.json, self_speculation.json
and apd.json, which the commands on that page make, and from the training reports beside the models that ship.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dparallel.plots import save

from .pictures import figure_of

ROOT = Path(__file__).resolve().parent.parent
BUILTIN = ROOT / "python/dparallel/toy/builtin"


@dataclass(frozen=True)
class System:
    name: str
    paper: str
    file: str
    """Its row is in docs/FILE.json."""
    model: str
    policy: str
    """The policy of its row; for speculation the drafter."""
    lacks: str
    """A part of the paper that the package lacks."""
    config: tuple[tuple[str, Any], ...] = ()
    trained: str | None = None
    """The path of its training report, without .json, in the directory of the models that ship."""


SYSTEMS = (
    System("one token a pass (LLaDA)", "2502.09992", "rules", "teacher", "one", ""),
    System("threshold (Fast-dLLM)", "2505.22618", "rules", "teacher", "confidence:0.9", ""),
    System("entropy bound (EB-Sampler)", "2505.24857", "rules", "teacher", "entropy_bound:0.6", ""),
    System("profile of confidences (Fast-dLLM++)", "2606.02955", "rules", "teacher", "frechet:0.25", ""),
    System("CreditDecoding", "2510.06133", "rules", "teacher", "credit+confidence:0.9", ""),
    System("SchED", "2512.02892", "rules", "teacher", "sched:20,0",
           "bars of another model do not carry over"),
    System("several blocks (d3LLM, D2F)", "2601.07568, 2508.09192", "rules", "teacher", "entropy:0.5",
           "their distillation", (("block_length", 16), ("active_blocks", 2))),
    System("Learn2PD", "2509.25188", "rules", "teacher", "learned:builtin:teacher,0.97", ""),
    System("editing (LLaDA2.1)", "2602.08676", "rules", "teacher", "edit:0.9,0.9",
           "a model that is trained to correct itself"),
    System("self-speculation (SSD)", "2510.04147", "self_speculation", "teacher", "one",
           "", (("draft_size", 4),)),
    System("adaptive decoding (APD)", "2506.00413", "apd", "teacher", "builtin:verifier",
           "", (("mixture", 0.5),), trained="verifier/training"),
    System("dParallel, entropy", "2509.26488", "rules", "student", "entropy:0.5", "",
           trained="student/training"),
    System("autoregressive, alone", "", "speculation", "causal", "plain", ""),
    System("prompt lookup", "2304.04487", "speculation", "causal", "ngram", ""),
    System("Token Recycling", "2408.08696", "speculation", "causal", "recycling", "the prompt's rows"),
    System("ParallelSpec", "2410.05589", "speculation", "causal", "builtin:parallelspec",
           "", trained="causal/parallelspec"),
    System("AdaDecode", "2506.03700", "speculation", "causal", "builtin:adadecode", "",
           trained="causal/adadecode"),
    System("PPD", "2405.18628", "speculation", "causal", "builtin:ppd", "", trained="causal/ppd"),
    System("Hidden Transfer, FIRP", "2404.12022, 2410.20488", "speculation", "causal",
           "builtin:hidden_transfer", "", trained="causal/hidden_transfer"),
    System("DFlash", "2602.06036", "speculation", "causal", "builtin:dflash",
           "sliding windows", trained="causal/dflash"),
    System("DDTree, 64 nodes from DFlash", "2604.12989", "trees", "causal", "tree:builtin:dflash",
           "more than 64 nodes", (("draft_size", 64),), trained="causal/dflash"),
    System("diffusion drafter (DiffuSpec)", "2510.02358", "speculation", "causal", "builtin:student",
           "its search over paths", trained="student/training"),
)  # fmt: skip


def row_of(system: System) -> dict[str, Any]:
    """The row of a system, of several the one over the most problems. Raises LookupError where there is
    none."""
    rows = json.loads((ROOT / "docs" / f"{system.file}.json").read_text())
    fits = [
        row
        for row in rows
        if (row["model"], row["policy"]) == (f"builtin:{system.model}", system.policy)
        and {k: v for k, v in row["config"].items() if v} == dict(system.config)
    ]
    if not fits:
        raise LookupError(f"docs/{system.file}.json: no row of {system.name}")
    return max(fits, key=lambda row: row["problems"])


def setting_of(system: System) -> str:
    """The policy or drafter of a system's row, and the other fields of its config."""
    fields = [f"{name} {value}" for name, value in system.config]
    return ", ".join([f"`{system.policy}`", *fields])


def training_of(system: System) -> tuple[str, str]:
    """The number of trained parameters and the minutes of training, as text."""
    if system.trained is None:
        return "", ""
    report = json.loads((BUILTIN / f"{system.trained}.json").read_text())
    minutes = report.get("seconds")
    numbers = report.get("parameters")
    return f"{numbers:,}" if numbers else "all", f"{minutes / 60:.0f}" if minutes else ""


def table() -> str:
    lines = [
        "| system | paper | model | policy or drafter | passes | tokens a pass | right | texts as without "
        "| of | trained numbers | minutes | not here |",
        "|--|--|--|--|--:|--:|--:|--:|--:|--:|--:|--|",
    ]
    for system in SYSTEMS:
        row, (numbers, minutes) = row_of(system), training_of(system)
        tokens = "" if row.get("tokens_per_forward") is None else f"{row['tokens_per_forward']:.2f}"
        same = row.get("same_texts")
        identical = "" if same is None or system.policy == "plain" else f"{same:,}"
        passes, right, of = f"{row['nfe_mean']:.2f}", f"{row['accuracy']:.1%}", f"{row['problems']:,}"
        if "verifier_mean" in row:
            passes += f" and {row['verifier_mean']:.2f} of the verifier"
        cells = [system.name, system.paper, system.model, setting_of(system), passes, tokens]
        cells += [right, identical, of, numbers, minutes, system.lacks]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(path: Path) -> None:
    """Passes of each system as bars, its accuracy and tokens a pass beside them."""
    rows = [row_of(system) for system in SYSTEMS]
    passes = [row["nfe_mean"] for row in rows]
    colours = ["#0b5cad" if row["model"] == "builtin:causal" else "#2a9d8f" for row in rows]
    figure, axes = figure_of(9, 0.36 * len(SYSTEMS) + 1)
    axes.barh(range(len(rows)), passes, color=colours, height=0.62)
    for at, (row, count) in enumerate(zip(rows, passes, strict=True)):
        caption = f"{count:.1f} passes, {row['accuracy']:.1%} right"
        if "verifier_mean" in row:
            caption += f"; {row['verifier_mean']:.1f} passes of the verifier beside"
        axes.text(count * 1.04, at, caption, va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [system.name for system in SYSTEMS], fontsize=8.5)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(1.5, 260)
    axes.set_xlabel(
        "passes of the model for an answer (green: diffusion, blue: autoregressive, its own text)"
    )
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)
