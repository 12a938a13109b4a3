"""The pictures of results, and what their labels hide."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from dparallel import plots, registry


def test_pictures_are_drawn(tmp_path: Path):
    base = {"problems": 5, "gen_length": 64}
    rows = [
        {**base, "model": "m", "policy": "one", "threshold": None, "nfe_mean": 64.0, "accuracy": 1.0},
        {**base, "model": "m", "policy": "entropy:0.5", "threshold": 0.5, "nfe_mean": 9.0, "accuracy": 0.8},
    ]
    plots.accuracy_against_passes(rows, tmp_path / "a.png")
    plots.response_by_pass(["a", "b", "·"] * 9, [1, 2, 3] * 9, tmp_path / "b.png", title="t")
    plots.response_by_pass([], [], tmp_path / "c.png")
    for name in ("a.png", "b.png", "c.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_no_two_labels_of_the_curves_overlap():
    rows = [
        {**row, "model": name}
        for name in ("teacher", "student")
        for row in json.loads((registry.BUILTIN / name / "held_out.json").read_text())
    ]
    (axes,) = plots.draw_accuracy(rows).axes
    boxes = [plots.text_box(text) for text in axes.texts]
    assert len(boxes) == sum(row["threshold"] is not None for row in rows) > 12
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    assert all(axes.bbox.contains(*box.min) and axes.bbox.contains(*box.max) for box in boxes)


def test_the_legend_hides_no_point_and_drafters_are_points_with_names():
    docs = Path(__file__).parents[1] / "docs"
    for name in ("rules", "speculation"):
        figure = plots.draw_accuracy(json.loads((docs / f"{name}.json").read_text()))
        for axes in figure.axes:
            legend = axes.get_legend().get_window_extent()
            points = [p for each in axes.containers for p in each[0].get_xydata()]
            assert not any(legend.contains(*axes.transData.transform(point)) for point in points)
    (drafters,) = [each for each in axes.containers if each.get_label() == "builtin:causal, by drafter"]
    assert drafters[0].get_linestyle() == "None"
    assert {"plain", "ngram", "dflash", "student"} <= {text.get_text() for text in axes.texts}


def test_many_rules_have_a_panel_for_each_model():
    base = {"problems": 5, "gen_length": 64, "nfe_mean": 9.0, "accuracy": 0.9}
    names = [
        "one",
        "entropy:0.5",
        "credit+frechet:0.25",
        "edit:0.9,0.9",
        "margin:0.5",
        "sched:14,8+entropy:0.5",
    ]
    rows = [{**base, "model": m, "policy": name} for m in "ab" for name in names]
    rows.append({**base, "model": "a", "policy": "entropy:0.5", "config": {"active_blocks": 2}})
    figure = plots.draw_accuracy(rows)
    assert [len(axes.get_legend().get_texts()) for axes in figure.axes] == [7, 6]
    said = {text.get_text() for text in figure.axes[0].texts}
    assert said == {"0.5", "0.25", "0.9,0.9", "14,8+0.5"}
