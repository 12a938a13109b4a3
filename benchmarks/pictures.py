"""Pictures of a run's results, for its report and the README. Each function returns whether there was
anything to draw."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from dparallel.plots import load_pyplot, save

from .harness import OURS
from .records import curves_of_passes, grouped, own


def figure_of(width: float, height: float) -> tuple[Any, Any]:
    figure, axes = load_pyplot().subplots(figsize=(width, height), layout="constrained")
    return figure, axes


def draw_shares(results: dict[str, Any], path: Path) -> bool:
    kept = {
        case: ours["share"]
        for case, records in grouped(results).items()
        if (ours := own(records)) is not None and ours.get("share")
    }
    if not kept:
        return False
    figure, axes = figure_of(9, 1 + 0.24 * len(kept))
    axes.barh(list(kept)[::-1], [100 * share for share in kept.values()][::-1])
    axes.axvline(100, color="grey", linestyle="--")
    axes.set(xlabel="share of the floor, %")
    axes.tick_params(axis="y", labelsize=7)
    save(figure, path)
    return True


def draw_decodes(results: dict[str, Any], path: Path) -> bool:
    kept = [r for r in results["records"] if r.get("tokens") and "median" in r]
    if not kept:
        return False
    names = list(dict.fromkeys(r["case"].split(", ", 1)[1] for r in kept))
    contenders = list(dict.fromkeys(r["contender"] for r in kept))
    figure, axes = figure_of(9, 1.5 + 0.5 * len(names))
    for i, contender in enumerate(contenders):
        mine = [r for r in kept if r["contender"] == contender]
        at = [names.index(r["case"].split(", ", 1)[1]) + 0.8 * i / len(contenders) for r in mine]
        axes.barh(at, [r["tokens"] / r["median"] for r in mine], 0.8 / len(contenders), label=contender)
    axes.set_yticks([i + 0.25 for i in range(len(names))], names, fontsize=7)
    axes.set(xlabel="tokens a second")
    axes.invert_yaxis()
    axes.legend()
    save(figure, path)
    return True


def draw_attention(results: dict[str, Any], path: Path) -> bool:
    curves: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for r in results["records"]:
        shape = re.fullmatch(r"block_attention, (.*), length (\d+)", r["case"])
        if shape and "median" in r and r["condition"] == "graph":
            curve = curves.setdefault((shape[1], r["contender"]), [])
            curve.append((int(shape[2]), 1e6 * r["median"]))
    if not curves:
        return False
    figure, axes = figure_of(8, 5)
    names = list(dict.fromkeys(name for name, _ in curves))
    for (name, contender), points in curves.items():
        x, y = zip(*sorted(points), strict=True)
        line = "-" if contender == OURS else "--"
        axes.plot(x, y, line, marker="o", color=f"C{names.index(name)}", label=f"{name}, {contender}")
    axes.set(xlabel="length", ylabel="us", xscale="log", yscale="log", title="32 queries a sequence")
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
    save(figure, path)
    return True


def draw_rows(results: dict[str, Any], path: Path) -> bool:
    """The time of row_stats on a CPU against the number of rows: needed ones, and unneeded ones beside 32
    needed.
    """
    labels = {
        "row_stats, needed rows": "needed rows",
        "row_stats, 32 needed rows among others": "unneeded rows, beside 32 needed",
    }
    curves = {case: records for case, records in grouped(results).items() if case in labels}
    if not curves:
        return False
    figure, axes = figure_of(7, 4)
    for case, records in curves.items():
        axes.plot(
            [r["rows"] for r in records], [1e3 * r["median"] for r in records], "o-", label=labels[case]
        )
    needed = [r for r in curves.get("row_stats, needed rows", []) if r["floor"]]
    floors = [1e3 * r["floor"] for r in needed]
    axes.plot([r["rows"] for r in needed], floors, "--", color="grey", label="reading alone")
    axes.set(xlabel="rows of 126464 bfloat16 logits", ylabel="milliseconds", xscale="symlog", yscale="log")
    axes.legend()
    axes.grid(alpha=0.3)
    save(figure, path)
    return True


def draw_passes(results: dict[str, Any], path: Path) -> bool:
    """The time of a pass over one block on a CPU against the cached positions, with attention and without."""
    curves = curves_of_passes(results)
    if not curves:
        return False
    figure, axes = figure_of(7, 4)
    for number, (case, records) in enumerate(curves.items()):
        x, name = [r["rows"] for r in records], case.rpartition(", ")[2]
        whole = [1e3 * r["median"] for r in records]
        rest = [1e3 * (r["median"] - r["attention"]) for r in records]
        axes.plot(x, whole, "o-", color=f"C{number}", label=f"cache {name}")
        axes.plot(x, rest, "o--", color=f"C{number}", label=f"cache {name}, attention apart")
    axes.set(xlabel="cached positions", ylabel="milliseconds", xscale="log", ylim=(0, None))
    axes.legend()
    axes.grid(alpha=0.3)
    save(figure, path)
    return True
