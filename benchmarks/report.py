"""From results to what is read: tables, plots, targets, and the pages made of them.

`make bench-report` (python -m benchmarks.report) copies the CPU run of `make bench` to benchmarks/results,
if it is newer than the run there. From the newest results there, and from docs/*.json, it writes the text
between the markers of docs/benchmarks.md, docs/systems.md and README.md, the tables of what `dparallel
evaluate` measured in other pages, and the pictures in docs/.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dparallel.files import write_text
from dparallel.results import read_results
from dparallel.results import table as measured

from . import pictures, systems
from .harness import OURS
from .records import RESULTS, curves_of_passes, dump, grouped, load, newest, own

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- figures:begin -->", "<!-- figures:end -->"
TABLE = re.compile(r"<!-- (\w+)\.json:begin -->\n.*?<!-- \1\.json:end -->", re.DOTALL)
"""A table of what `dparallel evaluate` wrote to docs/NAME.json, as its --markdown has it."""


# --- targets -------------------------------------------------------------------------------------


class Lookup:
    """The figures of a run by case, contender and condition; KeyError where one is missing."""

    def __init__(self, results: dict[str, Any]) -> None:
        self._of = {
            (r["case"], r["contender"], r["condition"]): r for r in results["records"] if "median" in r
        }

    def __call__(self, case: str, condition: str, contender: str = OURS) -> dict[str, Any]:
        return self._of[case, contender, condition]

    def times(self, case: str, condition: str, other: str = "published") -> float:
        """How many times as long the contender `other` takes as ours."""
        return self(case, condition, other)["median"] / self(case, condition)["median"]

    def rate(self, case: str) -> float:
        """Tokens a second."""
        return self(case, "warm")["tokens"] / self(case, "warm")["median"]

    def share(self, case: str, *conditions: str) -> float:
        """The share of the floor under the first of `conditions` that was measured."""
        condition = next((c for c in conditions if (case, OURS, c) in self._of), conditions[-1])
        value = self(case, condition)["share"]
        if value is None:
            raise KeyError("the floor of " + case)
        return value


@dataclass(frozen=True)
class Target:
    text: str
    sense: str
    """"at most" or "at least"."""
    limit: float
    unit: str
    of: Callable[[Lookup], float]


_DUAL = "decode 256 tokens, LLaDA-8B, cache dual, batch {}"
_LINEAR = "linear_certainty_forcing_loss, 8192 rows"
TARGETS = (
    Target("unmask_, 32 rows, from a graph", "at most", 10, "us",
           lambda t: 1e6 * t("unmask_, 32 rows", "graph")["median"]),
    Target("unmask_, 512 rows: share of copy bandwidth", "at least", 0.75, "",
           lambda t: t.share("unmask_, 512 rows", "graph")),
    Target("unmask_, 32 rows: times faster than the published procedure", "at least", 50, "",
           lambda t: t.times("unmask_, 32 rows", "cold")),
    Target("unmask_, 512 rows: times faster than the published procedure", "at least", 50, "",
           lambda t: t.times("unmask_, 512 rows", "cold")),
    Target("decode step, LLaDA-8B, cache dual, batch 1, context 512: times reading the weights once",
           "at most", 1.3, "", lambda t: 1 / t.share("decode step, LLaDA-8B, cache dual, batch 1", "warm")),
    Target("decode, batch 8: times the tokens a second of batch 1", "at least", 6, "",
           lambda t: t.rate(_DUAL.format(8)) / t.rate(_DUAL.format(1))),
    Target("decode, batch 1: times faster than the published procedure in as many passes", "at least", 3, "",
           lambda t: t.times(_DUAL.format(1), "warm")),
    Target("decode, batch 1: tokens a second", "at least", 1000, "", lambda t: t.rate(_DUAL.format(1))),
    Target("certainty_forcing_loss, 4096 rows: share of copy bandwidth", "at least", 0.8, "",
           lambda t: t.share("certainty_forcing_loss, 4096 rows", "graph", "cold")),
    Target("linear_certainty_forcing_loss: times its matrix products", "at most", 1.25, "",
           lambda t: 1 / t.times(_LINEAR, "cold", "matrix products alone")),
)  # fmt: skip


def targets(results: dict[str, Any]) -> str:
    """A table of the targets: the limit, the measured value, met or missed."""
    lookup, rows = Lookup(results), ["| target | asked | measured | |", "|---|--:|--:|---|"]
    for target in TARGETS:
        try:
            value: float | None = target.of(lookup)
        except KeyError:
            value = None
        asked = f"{target.sense} {target.limit:g} {target.unit}".strip()
        if value is None:
            rows.append(f"| {target.text} | {asked} | | not measured |")
            continue
        met = value <= target.limit if target.sense == "at most" else value >= target.limit
        verdict = "small sizes" if results["small"] else "met" if met else "**missed**"
        rows.append(f"| {target.text} | {asked} | {f'{number(value)} {target.unit}'.strip()} | {verdict} |")
    return "\n".join(rows)


# --- tables --------------------------------------------------------------------------------------


def number(x: float) -> str:
    """A number as text, with about three digits."""
    digits = next((d for d, least in enumerate((100, 10, 1)) if abs(x) >= least), 3)
    return f"{x:,.{digits}f}"


def table(results: dict[str, Any], unit: str = "us") -> str:
    """A table with a row for each case: our time beside the floor, and the others' as multiples of ours."""
    scale = {"us": 1e6, "ms": 1e3}[unit]
    rows = [f"| case | ours, {unit} | floor, {unit} | share | others, times ours |", "|---|--:|--:|--:|---|"]
    for case, records in grouped(results).items():
        ours = own(records)
        if ours is None or "rows" in ours:  # with "rows": a point of a curve, not a case
            continue
        floor = "" if ours.get("floor") is None else number(scale * ours["floor"])
        share = "" if ours.get("share") is None else f"{100 * ours['share']:.0f} %"
        others = ", ".join(
            f"{r['contender']} {number(r['median'] / ours['median'])}{memory(r)}"
            if "median" in r
            else f"{r['contender']} failed"
            for r in records
            if r is not ours
        )
        note = ours["contender"].removeprefix(OURS).strip()
        name = f"{case} {note}".strip().replace(" ,", ",")
        rows.append(
            f"| {name} | {number(scale * ours['median'])}{memory(ours)} | {floor} | {share} | {others} |"
        )
    return "\n".join(rows)


def memory(record: dict[str, Any]) -> str:
    return f" ({record['megabytes']:.0f} MB)" if "megabytes" in record else ""


def cpu_figures(results: dict[str, Any]) -> str:
    """The text on a CPU's figures."""
    peaks = [r for r in results["records"] if r["case"].endswith("peak memory") and "rows" in r]
    machine = results["machine"]
    lines = [table(results, "ms")]
    if peaks:
        sizes = ", ".join(f"{r['megabytes']:.0f} ({r['rows']})" for r in peaks)
        lines.append(
            f"linear_certainty_forcing_loss, peak memory beyond the inputs in MB (of rows): {sizes}."
        )
    lines += [passes(case, records) for case, records in curves_of_passes(results).items()]
    for r in results["records"]:
        for name, of in r.get("latencies", {}).items():
            shares = ", ".join(f"p{share} {seconds:.2f} s" for share, seconds in of.items())
            lines.append(f"{r['case']}, {name}: {shares}.")
    about = ", ".join((machine["cpu"], f"{machine['threads']} threads", f"torch {machine['torch']}"))
    lines.append(f"{about}, {machine['simd']}; commit {results['commit'][:9]}, {results['date'][:10]}.")
    return "\n\n".join(lines)


def passes(case: str, records: list[dict[str, Any]]) -> str:
    """A sentence on a pass's time against the number of cached positions, with its attention apart."""
    whole = [1e3 * r["median"] for r in records]
    attention = [1e3 * r["attention"] for r in records]
    rest = [a - b for a, b in zip(whole, attention, strict=True)]
    return (
        f"{case}: {number(whole[0])} ms at {records[0]['rows']} positions, {number(whole[-1])} ms at "
        f"{records[-1]['rows']}, of which attention {number(attention[0])} and {number(attention[-1])} ms; "
        f"the rest stays within {number(min(rest))} and {number(max(rest))} ms."
    )


def about_gpu(results: dict[str, Any]) -> str:
    machine = results["machine"]
    where = machine["gpu"] or "the CPU (small sizes: these are not measurements)"
    parts = [where, f"driver {machine['driver']}", f"CUDA {machine['cuda']}", f"torch {machine['torch']}"]
    return f"{', '.join(parts)}; commit {results['commit'][:9]}, {results['date'][:10]}."


def ceilings(results: dict[str, Any]) -> str:
    rates = []
    for record in results["records"]:
        if "median" in record and record["case"] == "copy bandwidth":
            rates.append(
                f"copy bandwidth {record['bytes'] / record['median'] / 1e12:.2f} TB/s, read and written"
            )
        if "median" in record and record["case"] == "bf16 matrix rate":
            rates.append(f"bf16 matrix rate {record['flop'] / record['median'] / 1e12:.0f} TFLOP/s")
    return "; ".join(rates)


def without_repeats(results: dict[str, Any]) -> dict[str, Any]:
    """The results without ceilings, and without warm figures of cases that are measured cold too."""
    cold = {r["case"] for r in results["records"] if r.get("condition") == "cold"}
    kept = [
        r
        for r in results["records"]
        if r["case"] not in ("copy bandwidth", "bf16 matrix rate")
        and r.get("condition") != "graph, warm"
        and not (r.get("condition") == "warm" and r["case"] in cold)
    ]
    return {**results, "records": kept}


def gpu_figures(results: dict[str, Any]) -> str:
    """The text on a GPU's figures: the targets, and each case cold or from a graph."""
    parts = [about_gpu(results), f"Ceilings: {ceilings(results)}." if ceilings(results) else ""]
    parts += [targets(results), table(without_repeats(results))]
    return "\n\n".join(part for part in parts if part)


def markdown(results: dict[str, Any]) -> str:
    """The report of a run."""
    machine, parts = results["machine"], ["# Measurements", about_gpu(results)]
    absent = [name for name in ("triton", "liger") if not machine.get(name)]
    peers = [f"{name} {machine[name]}" for name in ("triton", "liger") if machine.get(name)]
    peers += [f"{name}: not installed, so not a peer" for name in absent]
    parts.append("; ".join(peers) + ". `compiled` is torch.compile, whose GPU kernels are Triton's.")
    if ceilings(results):
        parts.append(f"Ceilings: {ceilings(results)}.")
    if results["checks"]:
        rows = [
            f"| {c['name']} | {c['status']} | {c['detail']} | {c['seconds']:.0f} |" for c in results["checks"]
        ]
        parts += ["## Checks", "\n".join(["| check | | what it said | s |", "|---|---|---|--:|", *rows])]
    parts += ["## Targets", targets(results), "## Cases", table(results)]
    parts += [f"![{name}]({name})" for name in results.get("plots", [])]
    rows = [
        "| case | contender | condition | median, us | p10 | p90 | repeats | peak MB |",
        "|---|---|---|" + "--:|" * 5,
    ]
    for r in results["records"]:
        if "median" in r:
            peak = f"{r['peak_memory'] / 2**20:.0f}" if "peak_memory" in r else ""
            times = " | ".join(number(1e6 * r[key]) for key in ("median", "p10", "p90"))
            rows.append(
                f"| {r['case']} | {r['contender']} | {r['condition']} | {times} | {r['repeats']} | {peak} |"
            )
    parts += ["## Every figure", "\n".join(rows)]
    failed = [r for r in results["records"] if "failed" in r]
    if failed:
        parts += ["## Failed", "\n".join(f"- {r['case']}, {r['contender']}: {r['failed']}" for r in failed)]
    left = [f"- {o['case']}: {o['why']}" for o in results["left_out"]]
    parts += ["## Left out", "\n".join(left) if left else "Nothing."]
    if results.get("running"):
        parts.append(f"Not finished: the run was within {results['running']}.")
    return "\n\n".join(parts) + "\n"


def plots(results: dict[str, Any], out: Path) -> None:
    """Draw the plots (share of the floor, decodes, attention against length), and write the results and the
    report, which name them.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        results["plots"] = []
    else:
        drawn = {
            "share.png": pictures.draw_shares,
            "decode.png": pictures.draw_decodes,
            "attention.png": pictures.draw_attention,
        }
        results["plots"] = [name for name, draw in drawn.items() if draw(results, out / name)]
    write_text(out / "results.json", dump(results))
    write_text(out / "report.md", markdown(results))


# --- the pages -----------------------------------------------------------------------------------


def block(cpu: dict[str, Any] | None, gpu: dict[str, Any] | None) -> str:
    """The text between the markers of docs/benchmarks.md."""
    parts = [] if cpu is None else ["## On a CPU", cpu_figures(cpu)]
    if cpu is not None and any(r["case"] == "row_stats, needed rows" for r in cpu["records"]):
        parts.append("![Time of row_stats against rows](rows.png)")
    if cpu is not None and curves_of_passes(cpu):
        parts.append("![Time of a pass against cached positions](passes.png)")
    parts.append("## On a GPU")
    if gpu is None:
        parts.append("No GPU figure is given, since none has been measured.")
    else:
        parts += [gpu_figures(gpu), "![Share of the floor](share.png)"]
    return "\n\n".join(parts)


def headlines(
    cpu: dict[str, Any], gpu: dict[str, Any], rules: list[dict[str, Any]], drafters: list[dict[str, Any]]
) -> str:
    """The README's table: five figures, each with its machine and the command that makes it."""

    def of(rows: list[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
        return next(row for row in rows if wanted.items() <= row.items())

    def passes_of(model: str, policy: str) -> dict[str, Any]:
        return of(rules, model=f"builtin:{model}", policy=policy, config={}, problems=2000)

    on_gpu = Lookup(gpu)
    slowest, student = passes_of("teacher", "one"), passes_of("student", "entropy:0.5")
    plain, drafted = of(drafters, policy="plain"), of(drafters, policy="builtin:dflash")
    whole = "16 passes, prompt 512, 128 new tokens, cache dual, float32"
    records = next(r for case, r in grouped(cpu).items() if case.startswith(whole))
    ours, published = own(records), of(records, contender="published")
    assert ours is not None
    batch, loss = _DUAL.format(1), "certainty_forcing_loss, 4096 rows"
    rows = [
        (
            "passes for an answer, a token a pass and after certainty forcing",
            f"{slowest['nfe_mean']:.0f} and {student['nfe_mean']:.2f}, "
            f"{slowest['accuracy']:.1%} and {student['accuracy']:.1%} of {student['problems']:,} right",
            "models that ship",
            "[rules, measured](docs/rules_measured.md)",
        ),
        (
            "passes for a text of an autoregressive model, alone and with a drafter",
            f"{plain['nfe_mean']:.1f} and {drafted['nfe_mean']:.2f}, "
            f"{drafted['same_texts']:,} of {drafted['problems']:,} texts the same",
            "models that ship",
            "[speculation](docs/speculation.md)",
        ),
        (
            "speed-up over the published code, decoding in as many passes",
            f"{published['median'] / ours['median']:.1f}, every token the same",
            "CPU",
            "`make bench`",
        ),
        (
            "the same in LLaDA-8B's shapes",
            f"{on_gpu.times(batch, 'warm'):.2f}, {on_gpu.rate(batch):,.0f} tokens a second (weights random)",
            "H200",
            "`make gpu`",
        ),
        (
            "speed-up over the published code, `certainty_forcing_loss` and its gradient",
            f"{on_gpu.times(loss, 'cold'):.0f}, {on_gpu.share(loss, 'graph', 'cold'):.0%} of copy bandwidth",
            "H200",
            "`make gpu`",
        ),
    ]
    lines = ["| figure | measured | on | command |", "|---|---|---|---|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    verdicts = targets(gpu)
    met, missed = verdicts.count("| met |"), verdicts.count("**missed**")
    summary = f"Of {met + missed} targets on the H200 {met} are met; the others, and where we lose, are in"
    return "\n".join([*lines, "", summary, "[benchmarks](docs/benchmarks.md)."])


def decodes() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows that `dparallel evaluate` measured, of rules and of drafters."""
    rules, drafters = (
        json.loads((ROOT / "docs" / f"{n}.json").read_text()) for n in ("rules", "speculation")
    )
    return rules, drafters


def between(text: str) -> str:
    """The text between the markers. Raises ValueError unless there is one of each, in order."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"expected {BEGIN} and {END} once each, in this order")
    return text.split(BEGIN)[1].split(END)[0].strip()


def with_block(text: str, figures: str) -> str:
    between(text)
    return f"{text.split(BEGIN)[0]}{BEGIN}\n\n{figures}\n\n{END}{text.split(END)[1]}"


def with_tables(text: str) -> str:
    """The text with the tables of docs/*.json between its markers."""

    def filled(found: re.Match[str]) -> str:
        file = f"{found[1]}.json"
        rows = measured(read_results(ROOT / "docs" / file))
        return f"<!-- {file}:begin -->\n\n{rows}\n<!-- {file}:end -->"

    return TABLE.sub(filled, text)


def write(path: Path, figures: str) -> None:
    write_text(path, with_block(path.read_text(), figures))
    print(f"written: {path}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--cpu", type=Path, default=ROOT / "out/bench/cpu.json", help="the CPU run that `make bench` wrote"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory of the committed results")
    parser.add_argument("--root", type=Path, default=ROOT, help="where README.md and docs/ are")
    options = parser.parse_args(argv)
    cpu, gpu = newest(options.results)
    if options.cpu.exists() and (cpu is None or load(options.cpu)["date"] > cpu["date"]):
        cpu = load(options.cpu)
        write_text(options.results / "cpu.json", dump(cpu))
    if cpu is None and gpu is None:
        sys.exit(f"benchmarks.report: no results in {options.results}; `make bench` or `make gpu` makes some")
    docs = options.root / "docs"
    if cpu is not None:
        pictures.draw_rows(cpu, docs / "rows.png")
        pictures.draw_passes(cpu, docs / "passes.png")
    if gpu is not None:
        pictures.draw_shares(without_repeats(gpu), docs / "share.png")
    write(docs / "benchmarks.md", block(cpu, gpu))
    if (docs / "systems.md").exists():
        systems.draw(docs / "systems.png")
        write(docs / "systems.md", systems.table())
    for page in docs.glob("*.md"):
        if (text := page.read_text()) != (new := with_tables(text)):
            write_text(page, new)
            print(f"written: {page}")
    if cpu is not None and gpu is not None:
        readme = options.root / "README.md"
        if readme.exists():
            write(readme, headlines(cpu, gpu, *decodes()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
