"""Builds dparallel_ext._C with ninja: CPU kernels always, CUDA kernels where they can be.

DPARALLEL_CUDA decides: unset, CUDA is built when torch is a CUDA build and nvcc is there; 0 never;
1 always (nvcc alone suffices: the library still imports under a CPU-only torch); a list such as
"90a;120" always, for those architectures. What was built, and why, is printed.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
MINIMUM_TORCH = (2, 10)
CUDA_ARCHITECTURES = ["80", "86", "89", "90a", "100", "120"]
SIMD_LEVELS = (
    {"portable": "x86-64", "avx2": "x86-64-v3", "avx512": "x86-64-v4"}
    if platform.machine() in ("x86_64", "AMD64")
    else {"portable": None}
)
INSTALL = (
    "pip install 'torch>=2.10' 'setuptools>=77' wheel ninja pybind11 && pip install --no-build-isolation ."
)


def import_torch():
    try:
        import torch
    except ImportError:
        sys.exit(
            "dparallel-ext builds against the torch that it will run with, and this build environment "
            f"has none (an isolated build?). Run:\n\n    {INSTALL}\n"
        )
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < MINIMUM_TORCH:
        sys.exit(f"dparallel-ext needs torch >= 2.10, found {torch.__version__}. Run:\n\n    {INSTALL}\n")
    return torch


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    candidates = [str(Path(home) / "bin" / "nvcc")] if home else []
    candidates += ["nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((found for c in candidates if (found := shutil.which(c))), None)


def decide_cuda(torch) -> tuple[list[str], str | None, str]:
    """(architectures, nvcc, why); no architectures: CPU only."""
    setting, nvcc = os.environ.get("DPARALLEL_CUDA", "").strip(), find_nvcc()
    if setting == "0":
        return [], None, "DPARALLEL_CUDA=0"
    if setting:
        if nvcc is None:
            sys.exit(f"DPARALLEL_CUDA={setting}, but there is no nvcc: set CUDA_HOME or PATH.")
        named = [] if setting == "1" else [a for a in setting.replace(",", ";").split(";") if a]
        return named or CUDA_ARCHITECTURES, nvcc, f"DPARALLEL_CUDA={setting}"
    if torch.version.cuda is None:
        return [], None, f"torch {torch.__version__} is a CPU build (DPARALLEL_CUDA=1 forces CUDA)"
    if nvcc is None:
        return (
            [],
            None,
            (
                f"torch {torch.__version__} is a CUDA build but there is NO NVCC: set CUDA_HOME or PATH "
                "and build again, or tensors on a GPU will be refused"
            ),
        )
    return CUDA_ARCHITECTURES, nvcc, f"torch {torch.__version__} is a CUDA build and nvcc is {nvcc}"


def first_line(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]


def toolkit_version(nvcc: str) -> str:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return next(line.split("release ")[1].split(",")[0] for line in text.splitlines() if "release" in line)


class Ninja:
    """A build.ninja in the making."""

    def __init__(self) -> None:
        self.lines = ["ninja_required_version = 1.3"]
        self.objects: list[str] = []

    def rule(self, name: str, command: str, deps: bool = True) -> None:
        self.lines += [f"rule {name}", f"  command = {command}", f"  description = {name} $out"]
        if deps:
            self.lines += ["  depfile = $out.d", "  deps = gcc"]

    def compile(self, rule: str, source: Path, flags: str = "", suffix: str = "") -> None:
        out = str(source.relative_to(ROOT)).replace("/", "_") + suffix + ".o"
        self.lines += [f"build {out}: {rule} {self.escape(source)}", f"  flags = {flags}"]
        self.objects.append(out)

    @staticmethod
    def escape(path: object) -> str:
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def plan(torch, output: Path) -> tuple[str, str]:
    """The text of build.ninja and a line that says what it builds."""
    import pybind11

    architectures, nvcc, why = decide_cuda(torch)
    cxx = os.environ.get("CXX", "c++")
    torch_root = Path(torch.__file__).parent
    quote = "'{}'".format
    includes = [ROOT / "csrc" / "include", ROOT / "csrc" / "cpu"]
    system = [torch_root / "include", Path(pybind11.get_include()), sysconfig.get_path("include")]
    include_flags = " ".join([f"-I{quote(p)}" for p in includes] + [f"-isystem {quote(p)}" for p in system])

    ninja = Ninja()
    common = "-O3 -std=c++17 -fPIC -fvisibility=hidden -ffp-contract=fast -Wall -Wextra -Wno-psabi"
    ninja.rule("cxx", f"{cxx} -MMD -MF $out.d {common} {include_flags} $flags -c $in -o $out")
    for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
        if not source.name.endswith("_kernel.cpp"):
            ninja.compile("cxx", source)
            continue
        for level, march in SIMD_LEVELS.items():
            flags = f"-DDPARALLEL_SIMD={level}" + (f" -march={march}" if march else "")
            ninja.compile("cxx", source, flags, f".{level}")
    stable = "-DTORCH_TARGET_VERSION=0x020a000000000000"
    ninja.compile("cxx", ROOT / "csrc" / "torch_ops.cpp", stable + (" -DDPARALLEL_WITH_CUDA" if nvcc else ""))
    facts = {
        "COMPILER": first_line(cxx, "--version"),
        "TORCH": torch.__version__,
        "BACKENDS": "cpu cuda" if nvcc else "cpu",
        "CUDA_TOOLKIT": toolkit_version(nvcc) if nvcc else "none",
        "CUDA_ARCHITECTURES": " ".join(architectures) or "none",
    }
    defines = " ".join(f"'-DDPARALLEL_{name}=\"{value}\"'" for name, value in facts.items())
    for source in sorted((ROOT / "csrc" / "runtime").glob("*.cpp")):
        ninja.compile("cxx", source, defines)

    if nvcc:
        codes = [f"-gencode arch=compute_{a},code=sm_{a}" for a in architectures]
        newest = max(architectures, key=lambda a: int(a.rstrip("af")))
        if newest.isdigit():
            codes.append(f"-gencode arch=compute_{newest},code=compute_{newest}")
        ninja.rule(
            "nvcc",
            f"{quote(nvcc)} -MMD -MF $out.d -O3 -std=c++17 -Xcompiler -fPIC,-fvisibility=hidden "
            f"-lineinfo --threads 2 {' '.join(codes)} -I{quote(ROOT / 'csrc' / 'include')} "
            f"-I{quote(ROOT / 'csrc' / 'cuda')} -c $in -o $out",
        )
        for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
            ninja.compile("nvcc", source)
    # libtorch.so brings libtorch_cuda.so along where there is one, so that the weak stream symbol
    # resolves; nvcc links the static CUDA runtime, so that import needs no CUDA library.
    libraries = f"-L{quote(torch_root / 'lib')} -ltorch -ltorch_cpu -lc10"
    if nvcc:
        link = f"{quote(nvcc)} -shared -cudart static -Xlinker --no-as-needed $in {libraries} -o $out"
    elif sys.platform == "darwin":
        link = f"{cxx} -shared $in {libraries} -undefined dynamic_lookup -o $out"
    else:
        link = f"{cxx} -shared -Wl,--no-as-needed $in {libraries} -o $out"
    ninja.rule("link", link, deps=False)
    target = ninja.escape(output)
    ninja.lines += [f"build {target}: link {' '.join(ninja.objects)}", f"default {target}", ""]
    built = "CPU (" + ", ".join(SIMD_LEVELS) + ")"
    built += f" and CUDA ({', '.join(architectures)})" if nvcc else " only"
    return "\n".join(ninja.lines), f"dparallel-ext: building {built}: {why}"


class NinjaBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        torch = import_torch()
        tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}-torch{torch.__version__}"
        directory = ROOT / "build" / tag
        directory.mkdir(parents=True, exist_ok=True)
        library = directory / Path(self.get_ext_filename(ext.name)).name
        text, summary = plan(torch, library)
        build_file = directory / "build.ninja"
        if not build_file.exists() or build_file.read_text() != text:
            build_file.write_text(text)
        print(summary, file=sys.stderr, flush=True)
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        command = [sys.executable, "-m", "ninja", "-C", str(directory), *jobs]
        if subprocess.run(command, stdout=sys.stderr).returncode:
            sys.exit(
                f"dparallel-ext: the build failed; above is ninja's output. It needs:\n\n    {INSTALL}\n"
            )
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        # A new file: a process that has the old library mapped keeps it.
        shutil.copy2(library, output.with_suffix(".tmp"))
        os.replace(output.with_suffix(".tmp"), output)
        print(f"{summary.replace('building', 'built')}\n  {output}", file=sys.stderr, flush=True)


import_torch()
setup(ext_modules=[Extension("dparallel_ext._C", sources=[])], cmdclass={"build_ext": NinjaBuild})
