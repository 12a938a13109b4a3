"""`make bench`: run every bench_*.py with pytest-benchmark, write its JSON, a table and a picture.

The table and the picture are made from the JSON alone: `python -m benchmarks --from results.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="a directory")
    parser.add_argument("--from", dest="source", type=Path, help="results of an earlier run")
    parser.add_argument("--only", default="", help="pytest -k expression")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    results = options.source or options.out / "results.json"
    if options.source is None:
        command = [sys.executable, "-m", "pytest", str(HERE), "-o", "python_files=bench_*.py", "-q"]
        command += ["-k", options.only] if options.only else []
        command += [f"--benchmark-json={results}", "--benchmark-columns=min,median,rounds", "--no-header"]
        code = subprocess.call([*command, "--benchmark-group-by=group", "--benchmark-sort=name"])
        if code != 0:
            return code
    found = json.loads(results.read_text())
    text = summary(found)
    (options.out / "table.md").write_text(text)
    cost_curve(found, options.out / "cost.png")
    print(text)
    print(f"written: {results}, {options.out / 'table.md'}, {options.out / 'cost.png'}")
    return 0


def groups(found: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    made: dict[str, list[dict[str, Any]]] = {}
    for bench in found["benchmarks"]:
        made.setdefault(bench["group"], []).append(bench)
    return made


def milliseconds(bench: dict[str, Any]) -> float:
    """By CUDA events where those were used, else pytest-benchmark's median."""
    if "seconds" in bench["extra_info"]:
        return 1e3 * float(bench["extra_info"]["seconds"])
    return 1e3 * float(statistics.median(bench["stats"]["data"])) / bench["extra_info"].get("steps", 1)


def summary(found: dict[str, Any]) -> str:
    """A Markdown table: medians, ratios to ours in the same run, and the floor."""
    rows = ["| case | contender | median, ms | times ours | floor, ms |", "|---|---|--:|--:|--:|"]
    for group, benches in groups(found).items():
        named = [b for b in benches if "contender" in b["extra_info"]]
        if not named:
            continue
        ours = next(b for b in named if b["extra_info"]["contender"].startswith("dparallel_ext"))
        floor = f"{1e3 * ours['extra_info']['floor']:.3f}" if "floor" in ours["extra_info"] else ""
        times = {name: 1e3 * s for name, s in ours["extra_info"].get("baselines", {}).items()}
        times |= {b["extra_info"]["contender"]: milliseconds(b) for b in named}
        memory = {
            b["extra_info"]["contender"]: f", {b['extra_info']['megabytes']:.0f} MB more"
            for b in named
            if "megabytes" in b["extra_info"]
        }
        for name, time in times.items():
            ratio = "" if name.startswith("dparallel_ext") else f"{time / milliseconds(ours):.1f}"
            digits = 0 if time >= 100 else 3
            rows.append(f"| {group} | {name}{memory.get(name, '')} | {time:.{digits}f} | {ratio} | {floor} |")
    peaks = groups(found).get("linear_certainty_forcing_loss, peak memory", [])
    if peaks:
        sizes = ", ".join(f"{b['extra_info']['megabytes']:.0f} ({b['extra_info']['rows']})" for b in peaks)
        rows.append(
            f"\nlinear_certainty_forcing_loss, peak memory beyond the inputs in MB (of rows): {sizes}."
        )
    for bench in found["benchmarks"]:
        for name, of in bench["extra_info"].get("latencies", {}).items():
            said = ", ".join(f"p{share} {seconds:.2f} s" for share, seconds in of.items())
            rows.append(f"\n{bench['group']}, {name}: {said}.")
    machine = found["machine_info"]
    name = machine["cpu"].get("brand_raw", "unknown CPU")
    rows.append(f"\n{name}, {machine['threads']} threads, torch {machine['torch']}, {machine['simd']}.\n")
    return "\n".join(rows)


def cost_curve(found: dict[str, Any], path: Path) -> None:
    """row_stats' time against rows: needed ones, and unneeded ones beside 32 needed."""
    curves = {g: b for g, b in groups(found).items() if g.startswith("row_stats")}
    if not curves:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    labels = {
        "row_stats, needed rows": "needed rows",
        "row_stats, 32 needed rows among others": "unneeded rows, beside 32 needed",
    }
    for group, benches in curves.items():
        x = [b["extra_info"]["rows"] for b in benches]
        axes.plot(x, [milliseconds(b) for b in benches], marker="o", label=labels[group])
    needed = curves.get("row_stats, needed rows", [])
    x = [b["extra_info"]["rows"] for b in needed]
    axes.plot(x, [1e3 * b["extra_info"]["floor"] for b in needed], "--", color="grey", label="reading alone")
    axes.set(xlabel="rows of 126464 bfloat16 logits", ylabel="milliseconds", xscale="symlog", yscale="log")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    sys.exit(main())
