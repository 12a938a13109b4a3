"""The pictures: accuracy against passes, and one response by the pass that committed each token."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def accuracy_against_passes(rows: list[dict[str, Any]], path: str | Path) -> None:
    """A PNG with a curve per model (colour) and selector (line).

    `rows` are those of `evaluate`; the bars are their accuracy_interval.
    """
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    models = list(dict.fromkeys(row["model"] for row in rows))
    selectors = list(dict.fromkeys(_selector(row) for row in rows))
    for model, selector in ((m, s) for m in models for s in selectors):
        points = [row for row in rows if row["model"] == model and _selector(row) == selector]
        if not points:
            continue
        points.sort(key=lambda row: row["nfe_mean"])
        x, y = [p["nfe_mean"] for p in points], [100 * p["accuracy"] for p in points]
        ends = [p.get("accuracy_interval", [p["accuracy"]] * 2) for p in points]
        # A share of 0 or 1 lies at an end of its interval, up to rounding.
        below = [max(0.0, at - 100 * low) for at, (low, _) in zip(y, ends, strict=True)]
        above = [max(0.0, 100 * high - at) for at, (_, high) in zip(y, ends, strict=True)]
        colour, line = f"C{models.index(model)}", LINES[selectors.index(selector) % len(LINES)]
        axes.errorbar(
            x,
            y,
            yerr=[below, above],
            color=colour,
            linestyle=line,
            marker="o",
            markersize=4,
            capsize=2,
            label=f"{model}, {selector}",
        )
        for point, at in zip(points, zip(x, y, strict=True), strict=True):
            text = "" if point["threshold"] is None else f"{point['threshold']:g}"
            axes.annotate(text, at, textcoords="offset points", xytext=(4, -9), fontsize=6, color=colour)
    problems = rows[0]["problems"] if rows else 0
    axes.set(
        xlabel=f"forward passes per answer of {rows[0]['gen_length'] if rows else 0} tokens",
        ylabel="accuracy, %",
        title=f"{problems} held-out problems; numbers are thresholds, bars 95 % intervals",
    )
    if any(row["nfe_mean"] > 30 for row in rows):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_ylim(bottom=max(0.0, min((100 * row["accuracy"] for row in rows), default=0) - 3), top=101)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)
    _write(figure, path)


LINES = ("-", "--", ":", "-.")


def _selector(row: dict[str, Any]) -> str:
    return str(row["policy"]).partition(":")[0]


def response_by_pass(words: list[str], steps: list[int], path: str | Path, *, title: str = "") -> None:
    """A PNG of a response, each token coloured by the pass that committed it, with the pass's number."""
    pyplot = _pyplot()
    from matplotlib.colors import Normalize

    columns, total = 16, max(steps, default=1)
    lines = -(-len(words) // columns)
    figure, axes = pyplot.subplots(figsize=(13, 0.72 * lines + 1.5), layout="constrained")
    colours, norm = pyplot.get_cmap("viridis"), Normalize(1, max(total, 2))
    for i, (word, step) in enumerate(zip(words, steps, strict=True)):
        x, y = i % columns, -(i // columns)
        axes.add_patch(pyplot.Rectangle((x, y), 0.96, 0.9, color=colours(norm(step))))
        ink = "white" if norm(step) < 0.6 else "black"
        axes.text(x + 0.48, y + 0.52, word, ha="center", va="center", color=ink, fontsize=10)
        axes.text(x + 0.93, y + 0.07, str(step), ha="right", va="bottom", color=ink, fontsize=6.5)
    axes.set(xlim=(0, columns), ylim=(1 - max(lines, 1), 1), title=textwrap.fill(title, 120))
    axes.axis("off")
    scale = pyplot.cm.ScalarMappable(norm, colours)
    figure.colorbar(scale, ax=axes, label="pass that committed it", fraction=0.02, pad=0.01)
    _write(figure, path)


def _write(figure: Any, path: str | Path) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, format="png")
    _pyplot().close(figure)
