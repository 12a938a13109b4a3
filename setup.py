"""Builds dparallel_ext._C with ninja: CPU kernels always, CUDA kernels where they can be.

DPARALLEL_CUDA decides: unset, CUDA is built when torch is a CUDA build and nvcc is there; 0 never;
1 always (nvcc alone suffices: the library still imports under a CPU-only torch); a list such as
"90a;120" always, for those architectures. What was built, and why, is printed, and `dparallel info`
says it later. What a build needs, and what it says when it fails, is in tools/toolchain.py.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "tools"))
import toolchain  # noqa: E402

toolchain.require_setuptools()  # else what comes next fails with a traceback
from setuptools import Extension, setup  # noqa: E402
from setuptools.command.build_ext import build_ext  # noqa: E402

SIMD_LEVELS = (
    {"portable": "x86-64", "avx2": "x86-64-v3", "avx512": "x86-64-v4"}
    if platform.machine() in ("x86_64", "AMD64")
    else {"portable": None}
)


class Ninja:
    """A build.ninja in the making, for a directory. Our own files are named relative to it, so that the
    directory and the sources can be moved together without a rebuild."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.lines = ["ninja_required_version = 1.3"]
        self.objects: list[str] = []

    def rule(self, name: str, command: str, deps: bool = True) -> None:
        self.lines += [f"rule {name}", f"  command = {command}", f"  description = {name} $out"]
        if deps:
            self.lines += ["  depfile = $out.d", "  deps = gcc"]

    def compile(self, rule: str, source: Path, flags: str = "", suffix: str = "", last: str = "") -> None:
        out = str(source.relative_to(ROOT)).replace("/", "_") + suffix + ".o"
        path = self.relative(source).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
        self.lines += [f"build {out}: {rule} {path}", f"  flags = {flags}", f"  last = {last}"]
        self.objects.append(out)

    def relative(self, path: Path) -> str:
        return os.path.relpath(path, self.directory)

    def include(self, *paths: str) -> str:
        """Of csrc."""
        return " ".join(f"-I{quote(self.relative(ROOT / 'csrc' / path))}" for path in paths)


def quote(text: object) -> str:
    """One word of a shell command in a build.ninja."""
    return shlex.quote(str(text)).replace("$", "$$")


def plan(directory: Path, library: str) -> tuple[str, str]:
    """The text of build.ninja and a line that says what it builds."""
    import pybind11

    torch, cxx, cuda = toolchain.survey()
    facts = {
        "COMPILER": toolchain.output_of(*cxx.split(), "--version").partition("\n")[0],
        "TORCH": torch.version,
        "BACKENDS": "cpu cuda" if cuda.nvcc else "cpu",
        "CUDA_TOOLKIT": cuda.toolkit,
        "CUDA_ARCHITECTURES": " ".join(cuda.architectures) or "none",
        "CUDA_REASON": cuda.reason,
    }
    defines = {name: quote(f"-DDPARALLEL_{name}={json.dumps(value)}") for name, value in facts.items()}

    # Only what needs torch, pybind11 or a fact sees it: the rest is not compiled again for another.
    ninja = Ninja(directory)
    # Products are rounded before they are added, as torch's are, but in kernels: on Arm, too.
    common = "-O3 -std=c++17 -fPIC -fvisibility=hidden -ffp-contract=off -Wall -Wextra -Wno-psabi"
    # An -march in CXXFLAGS, as conda's compilers have it, is not that of a kernel for one instruction set.
    own = f"$flags {os.environ.get('CXXFLAGS', '')} $last"
    ninja.rule(
        "cxx",
        f"{cxx} -MMD -MF $out.d {common} {ninja.include('include', 'cpu')} {own} -c $in -o $out",
    )
    # What takes longest begins first. More effort would make the bindings and what checks the arguments of
    # ops take half as long again to compile, and no call faster.
    python = f"-O1 -isystem {quote(pybind11.get_include())} -isystem {quote(sysconfig.get_path('include'))}"
    module = ROOT / "csrc" / "runtime" / "module.cpp"
    ninja.compile("cxx", module, python)
    facts_of = ROOT / "csrc" / "runtime" / "build_info.cpp"
    ninja.compile("cxx", facts_of, " ".join(defines.values()))
    with_cuda = "-DDPARALLEL_WITH_CUDA" if cuda.nvcc else defines["CUDA_REASON"]
    stable = f"-O1 -isystem {quote(torch.root / 'include')} -DTORCH_TARGET_VERSION=0x020a000000000000"
    ninja.compile("cxx", ROOT / "csrc" / "torch" / "library.cpp", f"{stable} {with_cuda}")
    runtime = set((ROOT / "csrc" / "runtime").glob("*.cpp")) - {module, facts_of}
    for source in [*sorted(runtime), *sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]:
        if not source.name.endswith("_kernel.cpp"):
            ninja.compile("cxx", source)
            continue
        for level, march in SIMD_LEVELS.items():
            flags = f"-ffp-contract=fast -DDPARALLEL_SIMD={level}"
            ninja.compile("cxx", source, flags, f".{level}", f"-march={march}" if march else "")

    if cuda.nvcc:
        # The library is a sixth as large. Drivers that run what CUDA 13 builds can read it.
        small = "--compress-mode=size" if toolchain.numbers(cuda.toolkit) >= (13, 0) else ""
        ninja.rule(
            "nvcc",
            f"{quote(cuda.nvcc)} -MMD -MF $out.d -O3 -std=c++17 -Xcompiler -fPIC,-fvisibility=hidden "
            f"-lineinfo {small} --threads 2 {' '.join(toolchain.gencode(cuda.architectures))} "
            f"{ninja.include('include', 'cuda')} -c $in -o $out",
        )
        for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
            ninja.compile("nvcc", source)
    # libtorch.so brings libtorch_cuda.so along where there is one, so that the weak stream symbol
    # resolves; nvcc links the static CUDA runtime, so that import needs no CUDA library.
    libraries = f"-L{quote(torch.root / 'lib')} -ltorch -ltorch_cpu -lc10"
    if cuda.nvcc:
        link = f"{quote(cuda.nvcc)} -shared -cudart static -Xlinker --no-as-needed $in {libraries} -o $out"
    elif sys.platform == "darwin":
        link = f"{cxx} -shared $in {libraries} -undefined dynamic_lookup -o $out"
    else:
        link = f"{cxx} -shared -Wl,--no-as-needed $in {libraries} -o $out"
    ninja.rule("link", link, deps=False)
    ninja.lines += [f"build {library}: link {' '.join(ninja.objects)}", f"default {library}", ""]
    built = "CPU (" + ", ".join(SIMD_LEVELS) + ")"
    built += f" and CUDA ({', '.join(cuda.architectures)})" if cuda.nvcc else " only"
    return "\n".join(ninja.lines), f"dparallel-ext: building {built}: {cuda.reason}"


def run_ninja(directory: Path) -> None:
    """Show what ninja says; where it fails, exit with what to do about the cause."""
    command = [sys.executable, "-m", "ninja", "-C", str(directory), *toolchain.jobs()]
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as ninja:
        for line in ninja.stdout:
            print(line, end="", file=sys.stderr, flush=True)
            lines.append(line)
    if ninja.returncode:
        sys.exit(f"dparallel-ext: the build failed. {toolchain.advice(''.join(lines))}")


class NinjaBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        torch = toolchain.require()
        tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}-torch{torch.version}"
        directory = ROOT / "build" / tag
        directory.mkdir(parents=True, exist_ok=True)
        library = Path(self.get_ext_filename(ext.name)).name
        text, summary = plan(directory, library)
        build_file = directory / "build.ninja"
        if not build_file.exists() or build_file.read_text() != text:
            build_file.write_text(text)
        print(summary, file=sys.stderr, flush=True)
        run_ninja(directory)
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        # A new file: a process that has the old library mapped keeps it.
        shutil.copy2(directory / library, output.with_suffix(".tmp"))
        os.replace(output.with_suffix(".tmp"), output)
        print(f"{summary.replace('building', 'built')}\n  {output}", file=sys.stderr, flush=True)


setup(ext_modules=[Extension("dparallel_ext._C", sources=[])], cmdclass={"build_ext": NinjaBuild})
