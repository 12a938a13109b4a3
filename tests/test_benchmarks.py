"""`python -m benchmarks.gpu` at tiny sizes, what it leaves behind, and the pages made from results."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import select
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import torch._dynamo  # imported by an emulated GPU's first operator, where it fails
from conftest import ROOT
from dparallel.files import write_text
from emulated_gpu import GPU, emulated_gpu
from tape import Tape
from torch import Tensor

import dparallel_ext as dx
from benchmarks import baselines, bench_decode, cases, gpu, harness, records, report, systems
from dparallel_ext.decoding.graphs import Graphs
from dparallel_ext.models import Model
from dparallel_ext.ops import streams

pytest_plugins = ["taping"]

COMMIT = "0" * 40


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a whole run at tiny sizes, in processes of its own."""
    directory = tmp_path_factory.mktemp("gpu")
    command = [sys.executable, "-m", "benchmarks.gpu", "--small", "--out", str(directory), "--minutes", "9"]
    command += ["--commit", COMMIT, "--only", "[a-z]+[ _,]"]  # cases: the checks have tests of their own
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return directory


@pytest.fixture
def found(out: Path) -> dict[str, Any]:
    return records.load(out / "results.json")


@pytest.mark.slow
def test_every_case_was_run(found: dict[str, Any]) -> None:
    assert found["done"] == [case.name for case in cases.CASES]
    assert found["left_out"] == []
    assert found["running"] is None
    assert [r for r in found["records"] if "failed" in r] == []
    assert found["small"]
    assert found["commit"] == COMMIT


def test_every_record_is_whole(found: dict[str, Any]) -> None:
    made = {(r["case"], r["contender"], r["condition"]) for r in found["records"]}
    assert len(made) == len(found["records"])
    for record in found["records"]:
        assert record["p10"] <= record["median"] <= record["p90"]
        assert record["repeats"] >= 2
        assert record["bytes"] > 0
        if record["case"] not in (cases.COPY.name, cases.MATMUL.name):
            assert record["floor"] > 0
            assert record["share"] == pytest.approx(record["floor"] / record["median"])
    for case in cases.CASES:
        conditions = {c for name, who, c in made if name == case.name and who == harness.OURS}
        assert conditions == (set(case.conditions) if case.op else set())


def test_every_op_has_a_case_with_peers(found: dict[str, Any]) -> None:
    compiled = {source.stem for source in (ROOT / "csrc" / "cuda").glob("*.cu")}
    measured = {case.op.rstrip("_") for case in cases.CASES}
    assert compiled | {"linear_certainty_forcing_loss", "decode"} <= measured
    for case in cases.CASES:
        others = {r["contender"] for r in found["records"] if r["case"] == case.name} - {harness.OURS}
        assert others, case.name


def test_the_report_tells_everything(out: Path, found: dict[str, Any]) -> None:
    text = (out / "report.md").read_text()
    for case in cases.CASES:
        assert case.name in text
    for target in report.TARGETS:
        assert target.text in text
    assert "not measured" not in text  # every target finds its cases
    assert "**missed**" not in text  # tiny sizes are not judged
    assert "liger: not installed" in text or found["machine"]["liger"]
    assert "these are not measurements" in text or found["machine"]["gpu"]
    for name in found["plots"]:
        assert (out / name).read_bytes()[:4] == b"\x89PNG"
        assert f"({name})" in text
    assert found["plots"] == ["share.png", "decode.png", "attention.png"]


@pytest.mark.parametrize("name", bench_decode.MODELS)
@pytest.mark.parametrize("cache", ["none", "dual"])
def test_the_decodes_compared_are_the_same(name: str, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 every contender commits the same tokens, in as many passes as the floor counts; on weights
    in 8 bits perhaps others, in as many."""
    device, counts = torch.device("cpu"), []
    model = bench_decode.model_of(name, device, True).float()
    prompts = torch.randint(0, 1000, (3, 19))
    step = Model.step

    def counted(self: Model, ids: Tensor, *given: Any) -> Tensor:
        counts.append(len(ids))
        return step(self, ids, *given)

    monkeypatch.setattr(Model, "step", counted)
    monkeypatch.setattr(baselines, "backend", "aot_eager")  # traced as for inductor, which then compiles
    baselines.compile_.cache_clear()
    decoders = bench_decode.decoders(model, prompts, 64, cache)
    expected = decoders["published"](8)
    passes = [times for _, _, times in bench_decode.decode(device, True, name, cache, 3, 19, 64).phases]
    with torch.inference_mode():
        whole = torch.randint(0, 1000, (3, 83))
        eager, compiled = (baselines.Plain(model, compiled=by)(whole) for by in (False, True))
    if not torch.allclose(eager, compiled, atol=1e-3):
        # torch 2.13 under ATEN_CPU_CAPABILITY=avx2, on a machine that has more: wrong keys.
        warnings.warn("torch.compile computes another layer here: it is no contender", stacklevel=1)
        decoders.pop("compiled")
    for who, run in decoders.items():
        counts.clear()
        tokens = run(8)
        if "8-bit" in who:
            assert tokens.shape == expected.shape
        else:
            assert torch.equal(tokens, expected), who
        if who.startswith(harness.OURS):
            assert [counts.count(3 * 83), counts.count(3 * 32)] == passes, who
    bench_decode.model_of.cache_clear()
    baselines.compile_.cache_clear()


def test_it_needs_nothing_installed_but_torch() -> None:
    packages = str(Path(torch.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": packages}
    command = [sys.executable, "-S", "-m", "benchmarks.gpu", "--help"]  # -S: without installed checkouts
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "usage: python -m benchmarks.gpu" in ran.stdout


def test_a_gpu_runs_the_tests_that_take_a_device() -> None:
    names = {path.name for path in gpu.gpu_tests()}
    assert {"test_unmask.py", "test_errors.py", "test_compat.py", "test_varlen.py"} < names
    assert names.isdisjoint({"test_answers.py", "test_causal.py"})  # of "every family"


def test_a_gpu_s_tests_need_little_installed() -> None:
    """What they import at once, helpers too: others wait until a test asks for them, or may be missing."""
    local = {path.stem: path for path in (ROOT / "tests").glob("**/*.py")}
    todo, read, needed = [ROOT / "tests" / "conftest.py", *gpu.gpu_tests()], set(), set()
    while todo:
        path = todo.pop()
        read.add(path)
        for statement in ast.parse(path.read_text()).body:
            names = []
            if isinstance(statement, ast.Import):
                names = [alias.name for alias in statement.names]
            elif isinstance(statement, ast.ImportFrom) and statement.module:
                names = [statement.module]
            for name in (name.partition(".")[0] for name in names):
                if name not in local:
                    needed.add(name)
                elif local[name] not in read:
                    todo.append(local[name])
    others = needed - sys.stdlib_module_names - {"benchmarks", "dparallel", "dparallel_ext"}
    assert others == {"hypothesis", "numpy", "pytest", "safetensors", "torch"}


def run(out: Path, *arguments: str) -> dict[str, Any]:
    command = ["--small", "--out", str(out), "--commit", COMMIT, "--only", "select", *arguments]
    assert gpu.main(command) == 0
    return records.load(out / "results.json")


def test_a_run_that_is_cut_says_so_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process of its own would measure is measured here."""

    def here(command: list[str]) -> contextlib.nullcontext[SimpleNamespace]:
        code = gpu.main(command[command.index("benchmarks.gpu") + 1 :])
        return contextlib.nullcontext(SimpleNamespace(poll=lambda: code, returncode=code))

    monkeypatch.setattr(gpu, "running", here)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # what a small run changes
    monkeypatch.setattr(baselines, "backend", baselines.backend)
    cut = run(tmp_path, "--minutes", "5", "--since", str(time.time() - 301))  # spent on the build
    chosen = [cases.COPY.name, cases.MATMUL.name, "select, batch 64, 512 positions"]
    assert [o["case"] for o in cut["left_out"]] == chosen
    assert "the minutes were over" in (tmp_path / "report.md").read_text()
    whole = run(tmp_path, "--minutes", "5")
    assert whole["done"] == chosen
    assert whole["left_out"] == []
    assert whole["date"] == cut["date"]
    again = run(tmp_path, "--minutes", "5")
    assert again["records"] == whole["records"]  # nothing is measured twice


@pytest.mark.parametrize("end", ["crash", "hang"])
def test_a_case_that_ends_its_process_is_listed_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    begun = gpu.begin(tmp_path, torch.device("cpu"), True, COMMIT)
    begun.save()
    programs = ["import time; time.sleep(99)" if end == "hang" else "import os; os.abort()", "pass"]
    started, running = [], gpu.running

    def start(command: list[str]) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
        started.append(command)
        if len(started) == 1:
            begun.results["running"] = "select, batch 64, 512 positions"
            begun.save()
        return running([sys.executable, "-c", programs[len(started) - 1]])

    monkeypatch.setattr(gpu, "running", start)
    monkeypatch.setattr(gpu, "STALL", 2.0 if end == "hang" else 60.0)
    gpu.supervise(tmp_path, deadline=float("inf"), arguments=[])
    found = records.load(tmp_path / "results.json")
    assert len(started) == 2
    assert found["running"] is None
    assert found["done"] == ["select, batch 64, 512 positions"]
    (record,) = found["records"]
    assert (": hung" if end == "hang" else "exit code -6") in record["failed"]
    assert record["failed"] in (tmp_path / "report.md").read_text()


def test_a_process_that_is_cut_ends_with_all_that_it_has_started() -> None:
    """Or what the sanitizer runs would share the GPU with the measurements."""
    with gpu.running(["sh", "-c", "sleep 600 & echo; wait"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
    # The end of the output: nobody can write any more.
    assert select.select([process.stdout], [], [], 60.0)[0]
    process.stdout.close()


def test_a_contender_that_fails_does_not_hide_the_others(tmp_path: Path) -> None:
    device = torch.device("cpu")
    begun = gpu.begin(tmp_path, device, True, COMMIT)
    right = torch.ones(3)

    def refuse(turn: int, at: int) -> torch.Tensor:
        raise RuntimeError("no")

    contenders = {
        "eager": lambda turn, at: right,
        harness.OURS: lambda turn, at: right * 2,
        "compiled": refuse,
    }
    case = harness.Case(
        "c", "select", lambda **_: harness.Work(contenders, [(8, 0, 1)], agree=torch.equal), {}, ("warm",)
    )
    gpu.measure_case(begun, harness.Clock(device, float("inf"), True), case, True, 1.0)
    by = {r["contender"]: r for r in begun.results["records"]}
    assert by[harness.OURS]["failed"] == "ValueError: its result is not that of eager"
    assert by["compiled"]["failed"] == "RuntimeError: no"
    assert by["eager"]["median"] > 0


def test_the_floor_is_the_longer_of_moving_and_computing(tmp_path: Path) -> None:
    begun = gpu.begin(tmp_path, torch.device("cpu"), True, COMMIT)
    assert begun.floor([(1, 1, 1)]) is None  # no ceiling was measured
    for name, amount in ((cases.COPY.name, "bytes"), (cases.MATMUL.name, "flop")):
        begun.results["records"].append({"case": name, "contender": "torch", "median": 2.0, amount: 200.0})
    assert begun.floor([(300, 100, 1), (10, 50, 4)]) == pytest.approx(3.0 + 4 * 0.5)


def test_peers_are_chosen_by_name(tmp_path: Path) -> None:
    device = torch.device("cpu")
    begun = gpu.begin(tmp_path, device, True, COMMIT)
    names = ("published", harness.OURS, f"{harness.OURS}, 8-bit weights", "eager")
    contenders = dict.fromkeys(names, lambda turn, at: torch.ones(3))
    case = harness.Case("c", "select", lambda **_: harness.Work(contenders, [(8, 0, 1)]), {}, ("warm",))
    gpu.measure_case(begun, harness.Clock(device, float("inf"), True), case, True, 1.0, peers="^eager")
    assert [r["contender"] for r in begun.results["records"]] == [harness.OURS, names[2], "eager"]


def test_a_graph_is_recorded_as_a_decode_s_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without launches that make counters for each of its own."""
    for name in ("Stream", "current_stream", "stream", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    clock = harness.Clock(torch.device("cpu"), float("inf"), True)
    monkeypatch.setattr(clock, "cuda", True)
    monkeypatch.setattr(clock, "wait", lambda: None)
    like = SimpleNamespace(device=torch.device("cuda"))
    shared: list[Tensor | None] = []
    monkeypatch.setattr(streams, "counter_buffers", {})
    monkeypatch.setattr(streams, "capturing", lambda device: len(shared) == 2)
    monkeypatch.setattr(streams, "stream_of", lambda device: 1)
    monkeypatch.setattr(torch, "zeros", lambda size, dtype, device: torch.empty(size, dtype=dtype))
    clock.graph(lambda: shared.append(streams.counters_for(like, 5)))  # type: ignore[arg-type]
    assert len({id(counters) for counters in shared}) == 1


WITH_GRADIENTS = {case.name for case in cases.CASES if case.op.endswith("_loss")}
ON_A_GPU = {
    (case.op, case.make): case
    for case in reversed(cases.CASES)
    if case.op != "decode" and case.name not in WITH_GRADIENTS
}


@pytest.mark.parametrize("case", ON_A_GPU.values(), ids=lambda case: case.name)
def test_a_gpu_runs_every_case_and_its_graphs_wait_for_nothing(
    case: harness.Case, taped: list[Graphs], monkeypatch: pytest.MonkeyPatch
) -> None:
    """But gradients, which the emulated GPU does not compute, and decodes (test_every_device.py)."""
    of_cpu = {"__new__": lambda cls, device=None: torch.default_generator}
    generator = type("Generator", (torch.Generator,), of_cpu)
    monkeypatch.setattr(baselines, "backend", None)
    with emulated_gpu():
        monkeypatch.setattr(torch, "Generator", generator)
        work = case.build(GPU, True)
        expected = harness.result_of(work, next(iter(work.run)))
        for name in work.run:
            assert work.agree(harness.result_of(work, name), expected), name
            dx.check_errors()
        assert harness.OURS in work.graphs or not case.op
        for name in work.run.keys() & work.graphs:
            with work.under(), Tape():
                for turn in range(work.sets):
                    work.run[name](turn, turn)


def test_it_runs_without_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert gpu.commit_of(tmp_path) == "unknown"  # no checkout
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    assert gpu.commit_of(ROOT) == "unknown"


def test_memcheck_sees_every_allocation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Torch's allocator would give out parts of one, whose ends the tool does not see."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text('#!/bin/sh\necho "SUMMARY: caching $PYTORCH_NO_CUDA_MEMORY_CACHING"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = [gpu.check(name, tmp_path, 10.0) for name in ("memcheck", "racecheck")]
    assert [c["detail"] for c in found] == ["SUMMARY: caching 1", "SUMMARY: caching"]
    assert [c["status"] for c in found] == ["passed", "passed"]


def test_without_a_gpu_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main(["--out", "nowhere"])
    assert "--small" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_make_gpu_says_so_before_it_builds() -> None:
    command = ["make", "--silent", "gpu", f"PYTHON={sys.executable}", "GPU_FLAGS=--only none"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode
    assert ran.stdout == ""
    said, of_make = ran.stderr.strip().split("\n")
    assert re.fullmatch(r"dparallel-ext: torch \S+ of .* sees no GPU\. .*--small.*", said)
    assert of_make.startswith("make: ***")
    small = [sys.executable, "tools/toolchain.py", "gpu", "--out", "x", "--small"]
    assert subprocess.run(small, cwd=ROOT, capture_output=True, text=True, check=True).stdout == "\n"


# --- from results to the README ------------------------------------------------------------------


def test_targets_are_judged() -> None:
    def record(contender: str, condition: str, median: float, **more: Any) -> dict[str, Any]:
        return {
            "case": "unmask_, 32 rows",
            "contender": contender,
            "condition": condition,
            "median": median,
            **more,
        }

    records = [
        record("published", "cold", 1e-3),
        record(harness.OURS, "cold", 3e-5),
        record(harness.OURS, "graph", 7e-6),
    ]
    rows = report.targets({"records": records, "small": False}).splitlines()
    assert rows[2] == "| unmask_, 32 rows, from a graph | at most 10 us | 7.00 us | met |"
    assert rows[3].endswith("| at least 0.75 | | not measured |")
    assert rows[4].endswith("| at least 50 | 33.3 | **missed** |")


def benchmark(group: str, contender: str | None, times: list[float], **extra: Any) -> dict[str, Any]:
    info = {**extra, **({"contender": contender} if contender else {})}
    return {"group": group, "name": "test_it[a]", "extra_info": info, "stats": {"data": times}}


PYTEST_BENCHMARK = {
    "datetime": "2026-01-02T03:04:05+00:00",
    "commit_info": {"id": COMMIT, "dirty": False},
    "machine_info": {"cpu": {"brand_raw": "A CPU"}, "threads": 2, "torch": "2.13", "simd": "avx2"},
    "benchmarks": [
        benchmark("unmask, 32 rows", "published", [0.02, 0.04, 0.03], floor=0.0001),
        benchmark("unmask, 32 rows", "dparallel_ext", [0.0006, 0.0005, 0.0004], floor=0.0001),
        benchmark("decode", "dparallel_ext (20/20)", [0.5, 0.6, 0.7], baselines={"published": 0.9}),
        benchmark("serve", "dparallel_ext", [2.0], latencies={"ours": {"50": 0.25, "99": 1.5}}),
        benchmark("row_stats, needed rows", None, [0.001], rows=4, floor=0.0005),
        benchmark("linear_certainty_forcing_loss, peak memory", None, [1.0], rows=64, megabytes=114.2),
    ],
}


def test_the_page_is_made_from_files(tmp_path: Path, found: dict[str, Any]) -> None:
    page, results, cpu = tmp_path / "docs" / "benchmarks.md", tmp_path / "results", tmp_path / "cpu.json"
    page.parent.mkdir()
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    arguments = ["--root", str(tmp_path), "--results", str(results), "--cpu", str(cpu)]
    with pytest.raises(SystemExit, match="no results"):
        report.main(arguments)
    write_text(cpu, records.dump(records.of_cpu(PYTEST_BENCHMARK)))
    assert report.main(arguments) == 0
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "| unmask, 32 rows | 0.500 | 0.100 | 20 % | published 60.0 |" in text
    assert "| decode (20/20) | 600 |  |  | published 1.50 |" in text
    assert "in MB (of rows): 114 (64)." in text
    assert "serve, ours: p50 0.25 s, p99 1.50 s." in text
    assert "A CPU, 2 threads, torch 2.13, avx2; commit 000000000, 2026-01-02." in text
    assert "row_stats, needed rows" not in text  # the picture has these
    assert (tmp_path / "docs" / "rows.png").exists()
    assert "No GPU figure" in text
    measured = {**found, "small": False, "machine": {**found["machine"], "gpu": "A GPU", "driver": "1"}}
    write_text(results / "gpu.json", records.dump(measured))
    write_text(results / "small.json", records.dump({**found, "date": "9999"}))  # never shown
    assert report.main(arguments) == 0
    text = page.read_text()
    assert "A GPU, driver 1" in text
    assert "No GPU figure" not in text
    assert "unmask_, 32 rows, graph |" in text
    assert "graph, warm |" not in text
    assert "unmask_, 32 rows, warm |" not in text  # it is measured cold too
    assert (tmp_path / "docs" / "share.png").exists()
    assert report.between(text) == report.block(*records.newest(results))
    assert report.main(arguments) == 0
    assert page.read_text() == text
    newer = json.loads((results / "cpu.json").read_text()) | {"date": "2027"}
    write_text(results / "cpu.json", records.dump(newer))
    assert report.main(arguments) == 0
    assert json.loads((results / "cpu.json").read_text())["date"] == "2027"  # `make bench` ran before


def test_the_pages_show_the_committed_results() -> None:
    cpu, gpu_run = records.newest()
    shown = {name: report.between((ROOT / name).read_text()) for name in ("README.md", "docs/benchmarks.md")}
    assert report.between((ROOT / "docs/systems.md").read_text()) == systems.table(), "make bench-report"
    assert shown["docs/benchmarks.md"] == report.block(cpu, gpu_run), "make bench-report"
    assert cpu is not None
    assert gpu_run is not None
    assert shown["README.md"] == report.headlines(cpu, gpu_run, *report.decodes()), "make bench-report"
    tables = []
    for page in (ROOT / "docs").glob("*.md"):
        text = page.read_text()
        assert report.with_tables(text) == text, "make bench-report"
        tables += report.TABLE.findall(text)
        assert text.count(".json:begin") == text.count(".json:end") == len(report.TABLE.findall(text))
    assert sorted(tables) == ["apd", "rules", "self_speculation", "speculation", "trees"]


def test_results_come_back_as_written(tmp_path: Path, found: dict[str, Any]) -> None:
    write_text(tmp_path / "a.json", records.dump(found))
    assert records.load(tmp_path / "a.json") == found


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema": 0}, "expected schema 1, got 0"),
        ({"records": None}, "expected records, a list, got None"),
        ({"records": [{"case": "a", "contender": "b"}]}, "expected median in each record"),
        ({"records": [{"case": "a", "failed": "x"}]}, "expected contender in each record"),
    ],
)
def test_results_that_do_not_fit_are_named(
    tmp_path: Path, found: dict[str, Any], change: dict[str, Any], said: str
) -> None:
    (tmp_path / "a.json").write_text(json.dumps({**found, **change}))
    with pytest.raises(ValueError, match=said):
        records.load(tmp_path / "a.json")


def test_a_page_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="figures:begin"):
        report.between("nothing")
