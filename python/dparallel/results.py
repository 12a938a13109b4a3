"""Results of `evaluate`: their file, lines and tables of them, and figures that compare them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from . import files

SHOWN = {"model", "policy", "problems", "accuracy", "accuracy_interval", "nfe_mean", "seconds"}
"""Fields that results have had in all versions."""


def read_results(file: str | Path) -> list[dict[str, Any]]:
    """The results that an earlier run wrote. Raises ValueError for a file that holds anything else."""
    rows = files.json_list("json", file)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or (missing := SHOWN - row.keys()):
            lacks = (
                f"one without {sorted(missing)[0]}" if isinstance(row, dict) else f"a {type(row).__name__}"
            )
            raise ValueError(f"json: {file}, entry {number}: expected a result of `evaluate`, got {lacks}")
    return rows


HEADING = f"{'accuracy':>8} {'passes':>6} {'to EOS':>7} {'tok/pass':>8} {'seconds':>7} {'model':<15} policy"


def settings_text(row: Mapping[str, Any]) -> str:
    """A result's policy, and the other fields of its config, as text."""
    fields = ", ".join(f"{name} {value}" for name, value in row.get("config", {}).items())
    return str(row["policy"]) + (f", {fields}" if fields else "")


def result_line(row: Mapping[str, Any]) -> str:
    """A result as a line under HEADING; the fields that may be long come last. Fields that rows of older
    versions lack are blank."""
    to_eos = f"{row['nfe_to_eos']:.1f}" if "nfe_to_eos" in row else ""
    tokens = f"{row['tokens_per_forward']:.2f}" if "tokens_per_forward" in row else ""
    return (
        f"{row['accuracy']:>8.1%} {row['nfe_mean']:>6.1f} {to_eos:>7} {tokens:>8} {row['seconds']:>7.1f} "
        f"{row['model']:<15} {settings_text(row)}"
    )


def acceptance_text(row: Mapping[str, Any]) -> str:
    """A result's drafted and accepted tokens by position, as text."""
    lines = ["position   drafted  accepted   share  of all"]
    first = row["drafted"][0] if row["drafted"] else 0
    for at, (asked, taken) in enumerate(zip(row["drafted"], row["accepted"], strict=True), 1):
        lines.append(f"{at:>8} {asked:>9} {taken:>9} {taken / asked:>7.1%} {taken / first:>7.1%}")
    without = row["accepted_per_draft"]
    lines.append(
        f"tokens of a draft that are accepted: {without:.2f}; with the pass's own token {without + 1:.2f}"
    )
    asked, taken = sum(row["drafted"]), sum(row["accepted"])
    lines.append(f"share of drafted tokens that are accepted: {taken / max(1, asked):.1%}")
    if "layers" in row:
        lines.append(f"layers of the model run for a token: {row['layers']:.3f} of all")
    if row.get("same_texts") is not None:
        tokens, gaps = row["nfe_mean"] * row["tokens_per_forward"] * row["problems"], row.get("gaps")
        lines.append(f"texts equal to plain decoding's: {row['same_texts']} of {row['problems']}")
        if gaps:
            lines.append(
                f"the others differ first where the two best logits are {gaps[0]:g} to {gaps[-1]:g} apart, "
                f"{len(gaps) / tokens * 10_000:.2f} times in 10,000 tokens"
            )
    return "\n".join(lines)


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Results as tables in Markdown: of policies, and of drafters."""
    rows = list(rows)
    drafted = [row for row in rows if "drafted" in row]
    others = [row for row in rows if "drafted" not in row]
    return "\n".join(make(part) for make, part in ((_policies, others), (_drafters, drafted)) if part)


def _drafters(rows: Iterable[Mapping[str, Any]]) -> str:
    lines = [
        "| model | drafter | problems | accuracy | texts as plain | passes | drafts | tokens a pass | "
        "accepted of a draft | seconds |",
        "|--|--|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        same = "" if row.get("same_texts") is None else f"{row['same_texts']:,}"
        drafts, accepted = f"{row['draft_mean']:.2f}", f"{row['accepted_per_draft']:.2f}"
        if not row["drafted"]:
            drafts = accepted = ""
        lines.append(
            f"| {row['model'].removeprefix('builtin:')} | `{settings_text(row)}` | {row['problems']} "
            f"| {row['accuracy']:.1%} | {same} | {row['nfe_mean']:.2f} | {drafts} "
            f"| {row['tokens_per_forward']:.2f} | {accepted} | {row['seconds']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def _policies(rows: Iterable[Mapping[str, Any]]) -> str:
    rows = list(rows)
    guessed = any("canvases_mean" in row for row in rows)
    verified = any("verifier_mean" in row for row in rows)
    lines = [
        "| model | rule | problems | accuracy | 95 % interval | passes | to EOS | tokens a pass to EOS |",
        "|--|--|--:|--:|--|--:|--:|--:|",
    ]
    if guessed:
        lines = [lines[0] + " canvases | texts as without | seconds |", lines[1] + "--:|--:|--:|"]
    if verified:
        lines = [lines[0] + " verifier's passes |", lines[1] + "--:|"]
    for row in rows:
        low, high = row["accuracy_interval"]
        rule = f"`{row['policy']}`" + settings_text(row).removeprefix(row["policy"])
        to_eos = ["", ""]
        if row.get("nfe_to_eos"):
            tokens = row["tokens_per_forward"] * row["nfe_mean"]
            to_eos = [f"{row['nfe_to_eos']:.2f}", f"{tokens / row['nfe_to_eos']:.2f}"]
        lines.append(
            f"| {row['model'].removeprefix('builtin:')} | {rule} | {row['problems']} | {row['accuracy']:.1%} "
            f"| {low:.1%} to {high:.1%} | {row['nfe_mean']:.2f} | {' | '.join(to_eos)} |"
        )
        if guessed:
            same = "" if row.get("same_texts") is None else f"{row['same_texts']:,}"
            canvases = row.get("canvases_mean", row["nfe_mean"])
            lines[-1] += f" {canvases:.2f} | {same} | {row['seconds']:.1f} |"
        if verified:
            lines[-1] += f" {row['verifier_mean']:.2f} |" if "verifier_mean" in row else "  |"
    return "\n".join(lines) + "\n"


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
