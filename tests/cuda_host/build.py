"""Builds what runs the CUDA kernels on the CPU, once for each state of the sources.

Object files and programs are kept in build/cuda_host under a hash of what they are made of: compiler,
command, source and every header. A second process that wants the same waits for the first. As a program it
builds what needs no package, while those are being installed: see the Makefile.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "cuda_host"
CXX = os.environ.get("CXX", "c++")
INCLUDES = " ".join(f"-I{path}" for path in (HERE, CSRC / "include", CSRC / "cuda", CSRC / "cpu"))

PLAIN = "-O1 -fPIC -fvisibility=hidden"
UNDEFINED = (
    "-fsanitize=undefined,float-cast-overflow -fno-sanitize-recover=all "
    "-fno-sanitize=null,object-size,vptr,pointer-overflow"
)
"""Without what says no more than the address's check."""
KERNELS = f"{PLAIN} -fsanitize=thread {UNDEFINED} -DDPARALLEL_CUDA_HOST"
"""Every access calls the host, which looks whether it is in memory, and for races: see races.cpp."""
CHECKED = f"-O1 -g1 -fsanitize=address {UNDEFINED} --param asan-instrumentation-with-call-threshold=0"
"""The CPU's kernels. Compiling costs more than running them: checks are calls."""
PORTABLE = "-DDPARALLEL_PORTABLE_ONLY"

Job = tuple[Path, str]
"""A source and its flags."""


def ops() -> list[str]:
    """Every op that has a CUDA kernel."""
    return sorted(source.stem for source in (CSRC / "cuda").glob("*.cu"))


def programs() -> Path:
    """The directory of `cases` and `faults`."""
    sources = sorted((HERE / "cases").glob("*.cpp"))
    host = [(source, f"{PLAIN} -DDPARALLEL_CUDA_HOST") for source in sources]  # makes cases
    objects = compiled(
        [
            (HERE / "faults.cpp", KERNELS),
            *cuda_kernels(),
            *cpu_kernels(),
            *host,
            *emulation("-fsanitize=address"),
        ]
    )

    def make(directory: Path) -> None:
        for name, parts in (("cases", objects[1:]), ("faults", [objects[0], *objects[-3:]])):
            run(CXX, "-fsanitize=address,undefined", *parts, "-o", directory / name)

    return kept("programs", map(str, objects), make)


def extension() -> Path:
    """The directory of a package `dparallel_ext` whose ops are the kernels, on the CPU's tensors."""
    import pybind11
    import torch

    torch_root = Path(torch.__file__).parent
    system = [torch_root / "include", pybind11.get_include(), sysconfig.get_path("include")]
    flags = " ".join([PLAIN, *(f"-isystem{path}" for path in system)])
    stable = "-DDPARALLEL_WITH_CUDA_HOST -DTORCH_TARGET_VERSION=0x020a000000000000"
    facts = dict.fromkeys(("COMPILER", "CUDA_TOOLKIT", "CUDA_ARCHITECTURES", "CUDA_REASON"), "")
    facts |= {"BACKENDS": "cuda_host", "TORCH": torch.__version__}
    flags += "".join(f' -DDPARALLEL_{name}="{value}"' for name, value in facts.items())
    torch_side = (CSRC / "torch" / "library.cpp", f"{flags} {stable}")
    tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}-torch{torch.__version__}"
    built, sources = built_runtime(ROOT / "build" / tag)
    runtime = [(source, f"{flags} -O0") for source in sources]
    level = (CSRC / "cpu" / "simd_level.cpp", f"{PLAIN} {PORTABLE}")  # the module asks for it
    objects = [*compiled([*cuda_kernels(), torch_side, level, *runtime, *emulation()]), *built]
    link = [CXX, "-shared", "-fsanitize=undefined", "-Wl,--no-as-needed"]
    libraries = [f"-L{torch_root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    python = sorted((ROOT / "dparallel_ext").rglob("*.py"))

    def make(directory: Path) -> None:
        package = directory / "dparallel_ext"
        shutil.copytree(ROOT / "dparallel_ext", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        run(*link, *objects, *libraries, "-o", package / "_C.so")

    made_of = (f"{each} {each.stat().st_mtime_ns}" for each in objects)
    return kept("extension", [*made_of, *(f"{p} {p.read_text()}" for p in python)], make)


def built_runtime(directory: Path) -> tuple[list[Path], list[Path]]:
    """The objects of csrc/runtime that setup.py has compiled there, whose bindings take longest of all, and
    the sources of which there is none, or an older one, or one that says what was built."""
    home = CSRC / "runtime"
    newest = max(file.stat().st_mtime for file in home.iterdir())
    objects, sources = list[Path](), list[Path]()
    for source in sorted(home.glob("*.cpp")):
        found = directory / f"csrc_runtime_{source.name}.o"
        fits = source.stem != "build_info" and found.exists() and found.stat().st_mtime > newest
        (objects if fits else sources).append(found if fits else source)
    return objects, sources


def cuda_kernels() -> list[Job]:
    return [(CSRC / "cuda" / f"{op}.cu", f"{KERNELS} -x c++") for op in ops()]


def cpu_kernels() -> list[Job]:
    """Of the same ops, portable."""
    flags = f"{CHECKED} {PORTABLE}"
    simd = sorted((CSRC / "cpu").glob("*_kernel.cpp"))
    return [
        *((CSRC / "cpu" / f"{name}.cpp", flags) for name in (*ops(), "simd_level")),
        *((source, f"{flags} -DDPARALLEL_SIMD=portable") for source in simd),
    ]


def emulation(memory: str = "") -> list[Job]:
    """What executes the kernels, and, with `memory`, sees accesses beyond it. Linked last: of functions that
    both have, the kernels' are taken."""
    flags = f"{PLAIN} -O2 -DDPARALLEL_CUDA_HOST"
    own = [(HERE / f"{name}.cpp", flags) for name in ("cuda_host", "launches")]
    return [*own, (HERE / "races.cpp", f"{flags} {memory}")]


def compiled(jobs: Iterable[Job]) -> list[Path]:
    """An object file for each job."""

    def compile_one(job: Job) -> Path:
        source, flags = job
        command = [CXX, "-std=c++17", "-w", "-fno-strict-aliasing", *flags.split(), *INCLUDES.split()]
        target = f"{source.stem}.o"
        made = kept(
            source.stem,
            [compiler(), headers(source.parent), *command, source.read_text()],
            lambda directory: run(*command, "-c", source, "-o", directory / target),
        )
        return made / target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compile_one, jobs))


def kept(name: str, made_of: Iterable[str], make: Callable[[Path], object]) -> Path:
    """The directory that `make` fills, made where there is none of the same `made_of`."""
    key = hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:16]
    directory = CACHE / f"{name}-{key}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{directory.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not directory.exists():
            partial = directory.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            make(partial)
            partial.rename(directory)
    return directory


@functools.cache
def headers(home: Path) -> str:
    """All that a source in `home` may include, as one text."""
    places = (*CSRC.glob("**/"), HERE, home)
    found = {path for place in places for pattern in ("*.h", "*.cuh") for path in place.glob(pattern)}
    found |= {*home.glob("*.cpp")} if home == CSRC / "torch" else set()  # library.cpp includes the others
    return "\0".join(f"{path} {path.read_text()}" for path in sorted(found))


@functools.cache
def compiler() -> str:
    return subprocess.run([CXX, "--version"], capture_output=True, text=True, check=True).stdout


def run(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True)


if __name__ == "__main__":
    programs()
