"""One command that measures a GPU: tests, sanitizer, two ceilings of the card, every op, whole decodes.

    python -m benchmarks.gpu --out DIR --minutes 8

`make gpu` builds first. After each figure the command writes to DIR, each file whole or not at all:
`results.json` (every figure, with GPU, driver, versions, commit, date), `report.md` and its plots,
`tests.log` and the sanitizer's logs. The minutes are spread over the cases, the most important first; cases
for which they do not suffice are listed as left out, and the same command with the same DIR goes on there. A
process of its own measures: a case that crashes or hangs it is listed as failed, and the others run in a new
one.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from dparallel.files import write_text

import dparallel_ext as dx

from . import baselines, cases, harness, records, report
from .cases import CASES
from .harness import OURS, Case, Clock, OutOfTime, Work, result_of, time_contender

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, "-m", "benchmarks.gpu"]
STALL = 240.0
"""The seconds without a new figure after which a case counts as hung."""

# --- the run, written as it goes -----------------------------------------------------------------


class Run:
    """The results in DIR."""

    def __init__(self, out: Path, results: dict[str, Any]) -> None:
        self.out, self.results = out, results

    @classmethod
    def load(cls, out: Path) -> Run:
        return cls(out, records.load(out / "results.json"))

    def save(self) -> None:
        self.save_results()
        write_text(self.out / "report.md", report.markdown(self.results))

    def save_results(self) -> None:
        write_text(self.out / "results.json", records.dump(self.results))

    def add(self, **record: Any) -> None:
        self.results["records"].append(record)
        self.save_results()
        took = f"{1e6 * record['median']:.1f} us" if "median" in record else record["failed"]
        print(f"{record['case']}: {record['contender']}, {record.get('condition', '')}: {took}", flush=True)

    def leave_out(self, case: str, why: str) -> None:
        self.results["left_out"] = [o for o in self.results["left_out"] if o["case"] != case]
        self.results["left_out"].append({"case": case, "why": why})

    def ceiling(self, of: str, amount: str) -> float | None:
        """The measured bytes or FLOP (`amount`) a second of the ceiling `of`; None before it is measured."""
        for record in self.results["records"]:
            if record["case"] == of and "median" in record:
                return record[amount] / record["median"]
        return None

    def floor(self, phases: list[tuple[float, float, int]]) -> float | None:
        """The seconds of `phases` at the measured bandwidth and matrix rate; None before these are
        measured."""
        bytes_, flop = self.ceiling(cases.COPY.name, "bytes"), self.ceiling(cases.MATMUL.name, "flop")
        if bytes_ is None or flop is None:
            return None
        return sum(max(b / bytes_, f / flop) * times for b, f, times in phases)


def measure(run: Run, device: torch.device, small: bool, only: str, peers: str, deadline: float) -> None:
    """Measure every case that is not done and whose name matches `only`; of the peers, those whose names
    match `peers`.
    """
    if small:
        baselines.backend = None
        torch.set_num_threads(1)
    clock = Clock(device, deadline, small)
    ceilings = (cases.COPY, cases.MATMUL)
    chosen = [c for c in CASES if c in ceilings or re.search(only, c.name)]
    todo = [c for c in chosen if c.name not in run.results["done"]]
    for number, case in enumerate(todo):
        left = deadline - time.monotonic()
        if left <= 0:
            run.leave_out(case.name, "the minutes were over")
            continue
        run.results["running"] = case.name
        run.save()
        measure_case(run, clock, case, small, left / (8 * (len(todo) - number)), peers)
        run.results["running"] = None
        baselines.forget_compiled()
        if clock.cuda:
            torch.cuda.empty_cache()
    run.save()


def measure_case(run: Run, clock: Clock, case: Case, small: bool, share: float, peers: str = "") -> None:
    about = {"case": case.name, "op": case.op}
    try:
        work = case.build(clock.device, small)
        chosen = [name for name in work.run if OURS in name or OURS not in work.run or re.search(peers, name)]
        names = sorted(chosen, key=lambda name: name != OURS)
        expected = result_of(work, next(iter(work.run)))
    except Exception as error:
        run.results["done"].append(case.name)
        run.add(**about, contender=OURS, failed=f"{type(error).__name__}: {error}"[:500])
        clock.wait()  # after an error that broke the CUDA context, the process ends here
        return
    over = False
    for name in names:
        for condition in case.conditions:
            if condition.startswith("graph") and name not in work.graphs:
                continue
            try:
                if condition == case.conditions[0]:
                    peak = peak_memory(clock, work, name, expected)
                with work.under():
                    times = time_contender(clock, work, name, condition, min(1.0, share))
                dx.check_errors()
            except OutOfTime:
                over = True
                continue
            except Exception as error:
                failed = f"{type(error).__name__}: {error}"[:500]
                run.add(**about, contender=name, condition=condition, failed=failed)
                clock.wait()
                break
            record = records.figures(times, work.phases, run.floor(work.phases))
            extra = {"tokens": work.tokens} if work.tokens else {}
            extra |= {} if peak is None else {"peak_memory": peak}
            run.add(**about, contender=name, condition=condition, **record, **extra)
    if over:
        run.leave_out(case.name, "the minutes were over within it")
    else:
        run.results["done"].append(case.name)
        run.results["left_out"] = [o for o in run.results["left_out"] if o["case"] != case.name]


def peak_memory(clock: Clock, work: Work, name: str, expected: Any) -> int | None:
    """The bytes that a step allocates beyond its inputs (None on a CPU). Raises ValueError where its result
    does not agree with `expected`.
    """
    peak = None
    if clock.cuda:
        result_of(work, name)  # compiles
        clock.wait()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work.reset()
        with work.under():
            work.run[name](0, 0)
        peak = torch.cuda.max_memory_allocated() - before
    harness.check(work, name, expected)
    return peak


def once(device: torch.device) -> None:
    """Run our step of each case once, at small sizes, for the sanitizer to watch.

    No graphs are recorded: while one is, nothing can be allocated unless torch caches memory, which memcheck
    turns off. Whole decodes come last: racecheck breaks off in the first of them, within the matrix library.
    """
    for case in sorted(CASES, key=lambda case: case.op == "decode"):
        work = case.build(device, small=True)
        contender = next((name for name in (f"{OURS}, graphs=False", OURS) if name in work.run), None)
        if contender is not None:
            result_of(work, contender)
            dx.check_errors()
            print(case.name, flush=True)


# --- checks --------------------------------------------------------------------------------------


@contextlib.contextmanager
def running(
    command: list[str], environment: Mapping[str, str] = MappingProxyType({}), **settings: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that imports the packages of this checkout; if it runs still at the end, it is killed with
    all that it has started.
    """
    path = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    variables = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **environment}
    process = subprocess.Popen(command, cwd=ROOT, env=variables, start_new_session=True, **settings)
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def watched(
    command: list[str], log: Path, seconds: float, environment: Mapping[str, str] = MappingProxyType({})
) -> tuple[int | None, str]:
    """Run a command with its output in `log`; return its exit code (None: stopped after `seconds`) and the
    output.
    """
    code: int | None = None
    with (
        open(log, "w") as file,
        contextlib.suppress(subprocess.TimeoutExpired),
        running(command, environment, stdout=file, stderr=subprocess.STDOUT) as process,
    ):
        code = process.wait(timeout=max(1.0, seconds))
    return code, log.read_text(errors="replace")


def gpu_tests() -> list[Path]:
    """The test files that take a device: others import packages that a machine that only measures may
    lack."""
    files = sorted((ROOT / "tests").glob("*/test_*.py"))
    return [path for path in files if re.search(r"@every(where|_level)\b|device: str", path.read_text())]


def check(name: str, out: Path, seconds: float) -> dict[str, Any]:
    """Run the GPU tests, or a tool of compute-sanitizer, for at most `seconds`; return its record."""
    began, log = time.monotonic(), out / f"{name}.log"
    if name == "tests":
        command = [sys.executable, "-m", "pytest", *map(str, gpu_tests()), "-m", "gpu", "-vv", "--tb=short"]
        if importlib.util.find_spec("xdist"):  # one GPU serves many tests: most of their time is the host's
            command += ["-n", str(min(16, os.cpu_count() or 1))]
        code, text = watched(command, log, seconds)
        words = ("PASSED", "FAILED", "ERROR", "SKIPPED")
        counts = {word: len(re.findall(rf" {word} .*%\]|%\] {word} ", text)) for word in words}
        detail = ", ".join(f"{count} {word.lower()}" for word, count in counts.items() if count)
    else:
        tool = shutil.which("compute-sanitizer")
        if tool is None:
            absent = "no compute-sanitizer on PATH"
            return {"name": name, "status": "absent", "detail": absent, "seconds": 0.0}
        known = subprocess.run([tool, "--help"], capture_output=True, text=True).stdout
        option = next((o for o in ("--kernel-name", "--filter") if o in known), None)
        profiled = [option, "kns=dparallel"] if option else []  # our kernels only, not torch's
        command = [tool, "--tool", name, "--error-exitcode", "9", *profiled, *COMMAND]
        environment = {}
        if name == "memcheck":  # torch's memory cache would hide accesses beyond an allocation
            environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        code, text = watched([*command, "--once", "--out", str(out)], log, seconds, environment)
        summary = [line.strip("= ") for line in text.splitlines() if "SUMMARY" in line]
        detail = summary[-1] if summary else "no summary"
    status = "cut" if code is None else "passed" if code == 0 else "failed"
    return {"name": name, "status": status, "detail": detail, "seconds": time.monotonic() - began}


CHECKS = {"tests": 0.3, "memcheck": 0.1, "racecheck": 0.1}
"""The largest share of the minutes that each check may take."""


# --- the command ---------------------------------------------------------------------------------


def machine(device: torch.device) -> dict[str, Any]:
    cuda = device.type == "cuda"
    driver = "none"
    if cuda and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.strip() or "unknown"

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {
        "gpu": torch.cuda.get_device_name(device) if cuda else None,
        "driver": driver,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": version("triton"),
        "liger": version("liger-kernel"),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "simd": dx.simd_level(),
        "built": dx.build_info(),
    }


def commit_of(root: Path) -> str:
    """The commit, with "+changes" where files differ from it; "unknown" without git or .git."""
    if shutil.which("git") is None:
        return "unknown"

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True).stdout.strip()

    commit = git("rev-parse", "HEAD")
    return commit + ("+changes" if git("status", "--porcelain") else "") if commit else "unknown"


def begin(out: Path, device: torch.device, small: bool, commit: str) -> Run:
    """A new run, or the one in `out` where it is of the same machine, commit and sizes."""
    fresh: dict[str, Any] = {
        "schema": records.SCHEMA,
        "machine": machine(device),
        "commit": commit,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "small": small,
        "checks": [],
        "records": [],
        "done": [],
        "left_out": [],
        "running": None,
    }
    old = out / "results.json"
    if old.exists() and re.fullmatch("[0-9a-f]{40}", commit):
        results = records.load(old)
        if all(results[key] == fresh[key] for key in ("machine", "commit", "small")):
            return Run(out, results)
    return Run(out, fresh)


def supervise(out: Path, deadline: float, arguments: list[str]) -> None:
    """Measure in a process of its own, or in several, until every case is done, failed or left out."""
    file = out / "results.json"
    while True:
        minutes = max(0.0, deadline - time.monotonic()) / 60
        why = ""
        with running([*COMMAND, "--measure", f"--minutes={minutes:.4f}", *arguments]) as process:
            while process.poll() is None and not why:
                time.sleep(0.2)
                if time.time() - file.stat().st_mtime > STALL:
                    why = f"no figure in {STALL:.0f} s: hung"
        run = Run.load(out)
        case = run.results["running"]
        if case is None:
            if process.returncode:
                sys.exit(f"benchmarks.gpu: measuring ended with exit code {process.returncode}")
            return
        run.results["running"] = None
        run.results["done"].append(case)
        failed = why or f"the process ended with exit code {process.returncode}"
        run.add(case=case, op=next(c.op for c in CASES if c.name == case), contender=OURS, failed=failed)
        run.save()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="directory to write to")
    parser.add_argument("--minutes", type=float, default=30.0, help="the most minutes the command takes")
    parser.add_argument("--small", action="store_true", help="tiny sizes, no measurement; without a GPU too")
    parser.add_argument("--only", default="", help="run the cases and checks whose names match this regex")
    parser.add_argument("--peers", default="", help="of the peers, time those whose names match this regex")
    parser.add_argument(
        "--commit", help="the commit, 40 digits, where there is no .git; without it no earlier run goes on"
    )
    parser.add_argument(
        "--since",
        type=float,
        help="count the minutes from this time (seconds since 1970), as make gpu does",
    )
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    began = time.time() if options.since is None else options.since
    deadline = time.monotonic() + 60 * options.minutes - (time.time() - began)
    if not torch.cuda.is_available() and not options.small:
        parser.error("torch sees no GPU; --small runs every case at tiny sizes without one")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda" and "cuda" not in dx.build_info()["backends"]:
        parser.error(f"dparallel_ext was built without CUDA ({dx.build_info()}): make gpu builds it")
    if options.once:
        once(device)
        return 0
    if options.measure:
        measure(Run.load(options.out), device, options.small, options.only, options.peers, deadline)
        return 0
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    run = begin(options.out, device, options.small, options.commit or commit_of(ROOT))
    run.save()
    known = [c["name"] for c in run.results["checks"] if c["status"] == "passed"]
    for name, share in CHECKS.items():
        if device.type == "cuda" and name not in known and re.search(options.only, name):
            print(f"{name} ...", flush=True)
            seconds = min(share * 60 * options.minutes, deadline - time.monotonic())
            outcome = check(name, options.out, seconds)
            run.results["checks"] = [c for c in run.results["checks"] if c["name"] != name] + [outcome]
            run.save()
            print(f"{name}: {outcome['status']}, {outcome['detail']}", flush=True)
    passed_on = ["--out", str(options.out), "--only", options.only, "--peers", options.peers]
    passed_on += ["--small"] if options.small else []
    supervise(options.out, deadline, passed_on)
    results = records.load(options.out / "results.json")
    report.plots(results, options.out)
    print(report.markdown(results))
    print(f"written: {options.out}/results.json, report.md")
    bad = [r for r in results["records"] if "failed" in r and r["contender"] == OURS]
    bad += [c for c in results["checks"] if c["status"] == "failed"]
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
