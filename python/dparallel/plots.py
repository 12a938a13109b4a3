"""The pictures: accuracy against passes, and one response by the pass that committed each token."""

from __future__ import annotations

import itertools
import math
import textwrap
from pathlib import Path
from typing import Any

from . import files


def load_pyplot() -> Any:
    """matplotlib's pyplot, with a backend that draws only into files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def accuracy_against_passes(rows: list[dict[str, Any]], path: str | Path) -> None:
    """Write a PNG with a curve for each model (colour) and rule (line); for many rules, a panel for each
    model.

    `rows`: results of `evaluate`; the bars are their accuracy_interval.
    """
    save(draw_accuracy(rows), path)


def draw_accuracy(rows: list[dict[str, Any]]) -> Any:
    """The figure that `accuracy_against_passes` writes."""
    pyplot = load_pyplot()
    models = list(dict.fromkeys(row["model"] for row in rows))
    rules = list(dict.fromkeys(_rule(row) for row in rows))
    if len(rules) <= len(LINES):
        figure, axes = pyplot.subplots(figsize=(9, 6), layout="constrained")
        styles = {
            (m, r): {"color": f"C{i}", "linestyle": LINES[j], "marker": "o"}
            for (i, m), (j, r) in itertools.product(enumerate(models), enumerate(rules))
        }
        _draw(figure, axes, rows, styles)
        return figure
    figure, panels = pyplot.subplots(
        max(1, len(models)), figsize=(11, 6.5 * max(1, len(models))), layout="constrained", squeeze=False
    )
    colours = pyplot.get_cmap("tab10").colors
    styles = {
        (m, r): {"color": colours[j % 10], "linestyle": "-", "marker": MARKERS[j // 10 % len(MARKERS)]}
        for m, (j, r) in itertools.product(models, enumerate(rules))
    }
    for model, axes in zip(models, panels[:, 0], strict=False):
        _draw(figure, axes, [row for row in rows if row["model"] == model], styles)
        axes.set_title(f"{model}: {axes.get_title()}")
    return figure


def _draw(figure: Any, axes: Any, rows: list[dict[str, Any]], styles: dict[tuple[str, str], Any]) -> None:
    """The curves of `rows`, each in the style of its model and rule."""
    for (model, rule), style in styles.items():
        points = [row for row in rows if row["model"] == model and _rule(row) == rule]
        if not points:
            continue
        points.sort(key=lambda row: row["nfe_mean"])
        x, y = [p["nfe_mean"] for p in points], [100 * p["accuracy"] for p in points]
        ends = [p.get("accuracy_interval", [p["accuracy"]] * 2) for p in points]
        # A share of 0 or 1 lies at an end of its interval, up to rounding.
        below = [max(0.0, at - 100 * low) for at, (low, _) in zip(y, ends, strict=True)]
        above = [max(0.0, 100 * high - at) for at, (_, high) in zip(y, ends, strict=True)]
        if rule.startswith(BY_DRAFTER):
            style["linestyle"] = ""  # points that have nothing in common are no curve
        axes.errorbar(x, y, yerr=[below, above], markersize=4, capsize=2, label=f"{model}, {rule}", **style)
    problems = sorted({row["problems"] for row in rows}) or [0]
    axes.set(
        xlabel=f"forward passes per answer of {rows[0]['gen_length'] if rows else 0} tokens",
        ylabel="accuracy, %",
        title=f"{' to '.join(map(str, dict.fromkeys((problems[0], problems[-1]))))} held-out problems; "
        "numbers are thresholds, bars 95 % intervals",
    )
    if any(row["nfe_mean"] > 30 for row in rows):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_ylim(bottom=max(0.0, min((100 * row["accuracy"] for row in rows), default=0) - 3), top=101)
    axes.grid(alpha=0.3)
    axes.legend(loc="best", fontsize=8)
    named = [(row, text) for row in rows if (text := _threshold(row))]
    colours = [styles[row["model"], _rule(row)]["color"] for row, _ in named]
    places = [(row["nfe_mean"], 100 * row["accuracy"]) for row, _ in named]
    _label(figure, axes, list(zip(places, [text for _, text in named], colours, strict=True)))


def _label(figure: Any, axes: Any, points: list[tuple[tuple[float, float], str, str]]) -> None:
    """Write the text of each (point, text, colour) near its point, where it covers no other text or point."""
    import numpy as np

    figure.draw_without_rendering()  # fixes the points' places on the page
    drawn = [line.get_xydata() for line in axes.lines]
    drawn += [segment for bars in axes.collections for segment in bars.get_segments()]
    dots = [
        np.linspace(start, end, 2 + int(np.abs(end - start).max() / 6))
        for path in map(axes.transData.transform, drawn)
        for start, end in itertools.pairwise(path)
    ]
    # Boxes on the page, [n, 2, 2]: the lower left and the upper right corner of each.
    legend = axes.get_legend().get_window_extent().get_points()
    taken = np.concatenate([legend[None], *(np.stack([dot - 2, dot + 2], axis=1) for dot in dots)])
    directions = [turn * math.pi / 8 for turn in (0, 8, 1, 7, 9, 15, 2, 6, 10, 14, 3, 5, 11, 13, 4, 12)]
    places = [
        (distance * math.cos(angle), distance * math.sin(angle))
        for distance in range(11, 120, 6)
        for angle in directions
    ]
    for point, text, colour in points:
        written = axes.annotate(
            text,
            point,
            xytext=(0, 0),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=7,
            color=colour,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.4, "shrinkA": 0, "shrinkB": 2},
        )
        on_point = text_box(written).padded(1)
        for place in places:
            box = on_point.translated(*(offset * figure.dpi / 72 for offset in place))
            inside = axes.bbox.contains(*box.min) and axes.bbox.contains(*box.max)
            covers = (box.min <= taken[:, 1]) & (box.max >= taken[:, 0])
            if inside and not covers.all(axis=1).any():
                taken = np.append(taken, box.get_points()[None], axis=0)
                written.xyann = place
                break
        else:
            written.remove()


def text_box(annotation: Any) -> Any:
    """The box of an annotation's text on the page, without its arrow."""
    from matplotlib.text import Text

    annotation.update_positions(annotation.figure.canvas.get_renderer())
    return Text.get_window_extent(annotation)


LINES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "v")
BY_DRAFTER = "by drafter"
"""The label of rows of an autoregressive model, in place of a rule."""


def _rule(row: dict[str, Any]) -> str:
    """A row's rule without its numbers, and the row's other settings."""
    names = "+".join(part.partition(":")[0] for part in str(row["policy"]).split("+"))
    names = BY_DRAFTER if "draft_mean" in row else names
    return ", ".join([names, *(f"{name} {value}" for name, value in row.get("config", {}).items())])


def _threshold(row: dict[str, Any]) -> str:
    """The numbers of a row's rule; "builtin:NAME", a filter that ships, is no number. Of a drafter its
    name."""
    if "draft_mean" in row:
        return str(row["policy"]).removeprefix("builtin:")
    parts = [part.partition(":")[2].split(",") for part in str(row["policy"]).split("+")]
    return "+".join(filter(None, (",".join(n for n in numbers if ":" not in n) for numbers in parts)))


def response_by_pass(words: list[str], steps: list[int], path: str | Path, *, title: str = "") -> None:
    """Write a PNG of a response, each token coloured by the pass that committed it, with the pass's
    number."""
    pyplot = load_pyplot()
    from matplotlib.colors import BoundaryNorm
    from matplotlib.ticker import MaxNLocator

    columns, total = 16, max(steps, default=1)
    lines = -(-len(words) // columns)
    figure, axes = pyplot.subplots(figsize=(13, 0.72 * lines + 1.5), layout="constrained")
    colours = pyplot.get_cmap("viridis")
    norm = BoundaryNorm([n + 0.5 for n in range(total + 1)], colours.N)  # a colour for each pass
    for i, (word, step) in enumerate(zip(words, steps, strict=True)):
        x, y = i % columns, -(i // columns)
        axes.add_patch(pyplot.Rectangle((x, y), 0.96, 0.9, color=colours(norm(step))))
        ink = "white" if norm(step) < 0.6 * colours.N else "black"
        axes.text(x + 0.48, y + 0.52, word, ha="center", va="center", color=ink, fontsize=10)
        axes.text(x + 0.93, y + 0.07, str(step), ha="right", va="bottom", color=ink, fontsize=6.5)
    axes.set(xlim=(0, columns), ylim=(1 - max(lines, 1), 1), title=textwrap.fill(title, 120))
    axes.axis("off")
    scale = pyplot.cm.ScalarMappable(norm, colours)
    marks = MaxNLocator(integer=True, min_n_ticks=1).tick_values(1, total)
    ticks = [tick for tick in marks if 1 <= tick <= total]
    figure.colorbar(scale, ax=axes, label="pass that committed it", ticks=ticks, fraction=0.02, pad=0.01)
    save(figure, path)


def save(figure: Any, path: str | Path) -> None:
    """Write a figure as a PNG, whole or not at all, and close it; make the directory if need be."""
    files.directory("plot", Path(path).parent)
    with files.replacing(path) as partial:
        # Without matplotlib's version in it, the same picture is the same file.
        figure.savefig(partial, dpi=130, format="png", metadata={"Software": None})
    load_pyplot().close(figure)
