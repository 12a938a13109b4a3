"""A run's results: reading, writing and looking up records."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from .harness import OURS

RESULTS = Path(__file__).resolve().parent / "results"
SCHEMA = 1


def dump(results: dict[str, Any]) -> str:
    """A run as JSON, with a line for each record."""
    lists = {key: value for key, value in results.items() if key in ("records", "checks", "left_out")}
    rest = json.dumps({k: v for k, v in results.items() if k not in lists}, indent=1)[:-2]
    for key, value in lists.items():
        rows = ",\n  ".join(json.dumps(row) for row in value)
        rest += f',\n "{key}": [' + (f"\n  {rows}\n ]" if rows else "]")
    return rest + "\n}\n"


_NUMBER = (int, float)
_RECORD = {"median": _NUMBER, "p10": _NUMBER, "p90": _NUMBER, "repeats": int}
_RUN = {"machine": dict, "commit": str, "date": str, "small": bool, "checks": list, "records": list}
_RUN |= {"done": list, "left_out": list}


def load(path: Path) -> dict[str, Any]:
    """Read a run's results. Raises ValueError naming what does not fit the schema."""
    results = json.loads(path.read_text())
    if results.get("schema") != SCHEMA:
        raise ValueError(f"{path.name}: expected schema {SCHEMA}, got {results.get('schema')!r}")
    for key, kind in _RUN.items():
        if not isinstance(results.get(key), kind):
            raise ValueError(f"{path.name}: expected {key}, a {kind.__name__}, got {results.get(key)!r}")
    for record in results["records"]:
        wanted = {"case": str, "contender": str, **({"failed": str} if "failed" in record else _RECORD)}
        for key, kind in wanted.items():
            if not isinstance(record.get(key), kind):
                raise ValueError(f"{path.name}: expected {key} in each record, got {record}")
    return results


def figures(
    times: list[float], phases: list[tuple[float, float, int]], floor: float | None
) -> dict[str, Any]:
    """The figures of a record: median and spread of `times`, in seconds, and the floor beside them."""
    ordered = sorted(times)

    def at(share: float) -> float:
        return ordered[round(share * (len(ordered) - 1))]

    median = statistics.median(times)
    return {
        "median": median,
        "p10": at(0.1),
        "p90": at(0.9),
        "repeats": len(times),
        "bytes": sum(b * n for b, _, n in phases),
        "flop": sum(f * n for _, f, n in phases),
        "floor": floor,
        "share": floor / median if floor else None,
    }


def of_cpu(content: dict[str, Any]) -> dict[str, Any]:
    """A run, made from what is worth keeping of pytest-benchmark's JSON."""
    records = []
    for bench in content["benchmarks"]:
        extra = bench["extra_info"]
        about = {"case": bench["group"], "op": bench["name"].split("[")[0]}
        record = {
            **about,
            "contender": extra.get("contender", OURS),
            **figures(bench["stats"]["data"], [], extra.get("floor")),
        }
        kept = ("rows", "megabytes", "latencies", "attention")
        records.append(record | {k: extra[k] for k in kept if k in extra})
        for name, seconds in extra.get("baselines", {}).items():
            records.append({**about, "contender": name, **figures([seconds], [], extra.get("floor"))})
    info = content["machine_info"]
    machine = {key: info[key] for key in ("threads", "torch", "simd")}
    machine |= {"gpu": None, "cpu": info["cpu"].get("brand_raw", "unknown CPU")}
    commit = content.get("commit_info", {})
    return {
        "schema": SCHEMA,
        "machine": machine,
        "commit": str(commit.get("id", "unknown")) + ("+changes" if commit.get("dirty") else ""),
        "date": content["datetime"],
        "small": False,
        "checks": [],
        "records": records,
        "done": [],
        "left_out": [],
    }


def newest(results: Path = RESULTS) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The newest run of a CPU and the newest of a GPU, those of `--small` left out; None where there is
    none."""
    runs = [run for path in sorted(results.glob("*.json")) if not (run := load(path))["small"]]
    runs.sort(key=lambda run: run["date"])
    cpu = [run for run in runs if run["machine"]["gpu"] is None]
    gpu = [run for run in runs if run["machine"]["gpu"] is not None]
    return (cpu or [None])[-1], (gpu or [None])[-1]


def grouped(results: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Records by "case, condition"."""
    by_case: dict[str, list[dict[str, Any]]] = {}
    for record in results["records"]:
        condition = record.get("condition")
        by_case.setdefault(record["case"] + (f", {condition}" if condition else ""), []).append(record)
    return by_case


def own(records: list[dict[str, Any]]) -> dict[str, Any] | None:
    return next((r for r in records if r["contender"].startswith(OURS) and "median" in r), None)


def curves_of_passes(results: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The records of bench_engine's test_step, by case: passes over one block against `rows` cached
    positions.
    """
    return {case: rs for case, rs in grouped(results).items() if all("attention" in r for r in rs)}
