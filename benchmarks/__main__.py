"""`make bench`: run every bench_*.py with pytest-benchmark, write its JSON, a table and pictures.

The table and the pictures are made from the JSON alone: `python -m benchmarks --from results.json`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from dparallel.files import write_text

from . import pictures, records, report

HERE = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="directory to write to")
    parser.add_argument(
        "--from", dest="source", type=Path, help="results.json of an earlier run, instead of a new run"
    )
    parser.add_argument("--only", default="", help="run what this pytest -k expression selects")
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
    figures = records.of_cpu(json.loads(results.read_text()))
    text = report.cpu_figures(figures) + "\n"
    write_text(options.out / "table.md", text)
    written = ["table.md"] if options.source else [results.name, "table.md"]
    for name, draw in (("rows.png", pictures.draw_rows), ("passes.png", pictures.draw_passes)):
        if draw(figures, options.out / name):
            written.append(name)
    if not options.only:  # `make bench-report` reads this file
        write_text(options.out / "cpu.json", records.dump(figures))
        written.append("cpu.json")
    print(text)
    print(f"{options.out}: {', '.join(written)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
