"""The CUDA kernels, executed on the CPU by tests/cuda_host, against the CPU's and the oracles.

Threads are fibers in random order, several blocks interleaved; memory is of exact size under
AddressSanitizer and UndefinedBehaviorSanitizer, races are looked for with --races, and launches that may
begin before the kernels before them are done have to wait for these. That this notices faults is tested with
planted ones. A build of the extension whose ops run these kernels on the CPU's tensors then goes through the
tests that every device goes through.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from cuda_host import build

pytestmark = pytest.mark.slow

# As in cases/main.cpp.
OPS_OF_CASES = re.findall(r'{"(\w+)", ', (build.HERE / "cases" / "main.cpp").read_text())


def run(program: Path, *args: object) -> subprocess.CompletedProcess[str]:
    settings = {
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
    }
    command = [str(program), *map(str, args)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=600, env={**os.environ, **settings}
    )


@pytest.fixture(scope="module")
def programs() -> Path:
    return build.programs()


def test_kernels_equal_the_cpus_and_stay_in_their_memory(programs: Path) -> None:
    """And the CPU's; of more losses, whose padding lanes are beyond the range of their exponentials; and of
    rows with +inf behind the largest finite number, which is the token."""
    for settings in ((0, 240), (100, 40, 3), (23, 20, 0)):
        result = run(programs / "cases", *settings)
        assert result.returncode == 0, result.stderr[-4000:]
        assert f"{settings[1]} cases, no difference" in result.stdout


def test_kernels_have_no_race(programs: Path) -> None:
    """Also in windows that overlap, where one may be written while another is listed."""
    for settings in ((200, 45), (533, 1, 2), (542, 1, 2)):
        result = run(programs / "cases", "--races", *settings)
        assert result.returncode == 0, result.stderr


def test_launches_that_fail_are_reported(programs: Path) -> None:
    """And leave no error for the next launch to be blamed for."""
    for number, op in enumerate(OPS_OF_CASES):
        result = run(programs / "cases", "--failing", 7, 12, number)
        assert result.returncode == 0, result.stderr
        assert int(re.findall(r"(\d+) failed", result.stdout)[0]) > 0, op


def test_ops_of_these_kernels_pass_the_tests_of_every_device(tmp_path: Path) -> None:
    """Against the float64 oracles, the published decoders' tokens, and torch's checks of custom ops."""
    package = build.extension()
    # What torch sees of an op is the same for every kernel behind it.
    same = "opcheck or compile or arguments_are_named or refused"
    slow = "samples_follow or gradcheck and (33 or linear) or golden_cases and (none or prefix)"
    slow += " or near_certain and 262144"
    # bfloat16 alone: the cases have every dtype, but no strides by which vectors do not fit.
    slow += " or dtype0 and not strides or dtype2 or dtype3 or torch.float"
    names = {*build.ops(), "compat", "op_inputs", "sampling"}
    files = [str(next((ROOT / "tests").glob(f"*/test_{name}.py"))) for name in sorted(names)]
    here = ["-o", f"pythonpath={package} {ROOT}", "-o", "addopts=", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *here, "-k", f"not ({same} or {slow})", "--tb=short", *files],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"},
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]
    assert int(re.findall(r"(\d+) passed", result.stdout)[-1]) >= 400


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("divergent_barrier", "a barrier that not every thread reaches"),
        ("misaligned", "misaligned load"),
        ("partial_shuffle", "shuffle with a partial mask"),
        ("race", ""),
        ("not_waited", ""),
        ("peer_gone", "shared memory of a block that has left"),
        ("peer_elsewhere", "no such block in the cluster"),
        ("peers_too_soon", ""),
        ("teams_confused", ""),
        ("counted_too_soon", ""),
        ("owned_by_another", ""),
        ("moved_too_soon", ""),
        ("ranked_too_soon", ""),
        ("peaked_too_soon", ""),
        ("last_child", ""),
        ("walked_too_soon", ""),
        ("read_too_soon", "a read before the kernels before are done"),
        ("copied_too_soon", "a read before the kernels before are done"),
        ("written_too_soon", "a write before the kernels before are done"),
        ("never_waits", "a thread of an early launch that does not wait"),
        ("room_changes", "the most shared memory of a kernel changes"),
        ("crowded_out", "more shared memory than a block may have"),
        ("no_blocks", "a launch of no blocks"),
    ],
)
def test_the_host_notices_a_faulty_kernel(programs: Path, fault: str, said: str) -> None:
    result = run(programs / "faults", fault)
    assert result.returncode != 0
    assert said in result.stderr


@pytest.mark.parametrize("fault", ["lost_update", "no_barrier", "arrives_first"])
def test_interleaved_blocks_show_what_blocks_in_turn_hide(programs: Path, fault: str) -> None:
    assert run(programs / "faults", fault, 1).returncode == 0
    for resident in (2, 8, 0):
        assert run(programs / "faults", fault, resident).returncode == 1


@pytest.mark.parametrize(
    "fault",
    [
        "lost_update",
        "no_barrier",
        "arrives_first",
        "no_release",
        "no_acquire",
        "race",
        "peers_too_soon",
        "teams_confused",
        "counted_too_soon",
        "moved_too_soon",
        "ranked_too_soon",
        "peaked_too_soon",
        "last_child",
    ],
)
def test_races_are_seen_in_any_order(programs: Path, fault: str) -> None:
    """Also a missing fence, which no order of the fibers can show, and blocks one after another."""
    for resident in (1, 8):
        result = run(programs / "faults", "--races", fault, resident)
        assert result.returncode == 3
        assert "a race" in result.stderr


def test_a_counter_that_is_not_reset_is_noticed(programs: Path) -> None:
    for resident in (1, 2, 8, 0):
        assert run(programs / "faults", "not_reset", resident).returncode == 1


def test_the_sanitizer_notices_an_overrun(programs: Path) -> None:
    for fault in ("overrun", "gathered_beyond"):
        result = run(programs / "faults", fault)
        assert result.returncode != 0
        assert "heap-buffer-overflow" in result.stderr


def test_a_sound_kernel_is_not_accused(programs: Path) -> None:
    for looks in ([], ["--races"]):
        for sound in (
            "copied", "peers", "teams", "counted", "owned", "moved", "ranked", "peaked", "linked", "gathered",
            "early", "roomy", "crowded", "too_many_blocks",
        ):  # fmt: skip
            assert run(programs / "faults", *looks, sound).returncode == 0
        for resident in (1, 2, 8, 0):
            assert run(programs / "faults", *looks, "sound", resident).returncode == 0


def test_kernels_without_their_barriers_are_found_out(programs: Path) -> None:
    result = run(programs / "cases", "--no-barriers", 0, 60)
    assert result.returncode in (1, 3)
    unwritten = "runtime error"  # of a value that nobody has written
    assert any(said in result.stderr for said in ("cases:", "cuda_host:", unwritten))
    for number, op in enumerate(OPS_OF_CASES):
        # Of a seed whose first cases are small and have barriers.
        result = run(programs / "cases", "--races", "--no-barriers", 51, 10, number)
        noticed = "a race" in result.stderr or unwritten in result.stderr
        assert noticed == (op not in ("kv_write", "swiglu")), op  # they have none
