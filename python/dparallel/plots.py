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
    """A PNG with a curve per model and selector; `rows` are those of `evaluate`."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    curves: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        curves.setdefault(f"{row['model']}, {row['policy'].partition(':')[0]}", []).append(row)
    for label, points in sorted(curves.items()):
        points.sort(key=lambda row: row["nfe_mean"])
        x, y = [p["nfe_mean"] for p in points], [100 * p["accuracy"] for p in points]
        axes.plot(x, y, marker="o", label=label)
        for point, at in zip(points, zip(x, y, strict=True), strict=True):
            text = "" if point["threshold"] is None else f"{point['threshold']:g}"
            axes.annotate(text, at, textcoords="offset points", xytext=(5, -11), fontsize=8)
    problems = rows[0]["problems"] if rows else 0
    axes.set(
        xlabel=f"forward passes per answer of {rows[0]['gen_length'] if rows else 0} tokens",
        ylabel="accuracy, %",
        title=f"{problems} held-out problems; numbers are thresholds",
    )
    axes.set_ylim(top=101)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)
    _write(figure, path)


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
