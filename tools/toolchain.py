"""The tools that a build finds: torch, the compilers, the CUDA architectures; and advice where a build fails.

setup.py, the PEP 517 backend beside this file and cuda_check.py read it, before anything is installed:
the standard library alone.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


def dotted(release: Sequence[int]) -> str:
    """ "2.10" of (2, 10)."""
    return ".".join(map(str, release))


MINIMUM_PYTHON = (3, 11)
MINIMUM_TORCH = (2, 10)
TORCH_REQUIREMENT = f"torch>={dotted(MINIMUM_TORCH)}"
TOOLS = {"setuptools": (77,), "ninja": (), "pybind11": (2, 13)}
"""Package that a build needs beside torch -> its first release that will do."""
CUDA_ARCHITECTURES = ["80", "86", "89", "90a", "100", "120"]
INSTALL = "pip install ."
_TOOL_REQUIREMENTS = (f"'{name}>={dotted(least)}'" if least else name for name, least in TOOLS.items())
INSTALL_HERE = (
    f"pip install '{TORCH_REQUIREMENT}' {' '.join(_TOOL_REQUIREMENTS)}\n"
    "    pip install --no-build-isolation ."
)


# --- torch, and the rest of what is installed -----------------------------------------------------


def numbers(version: str) -> tuple[int, ...]:
    """(2, 13) of "2.13.0+cpu"."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


@dataclass(frozen=True)
class Torch:
    """The torch to build against. It is not imported: its CUDA libraries need not be there."""

    root: Path
    version: str
    cuda: str | None
    """The CUDA release that it was built for; None of a CPU build."""
    hip: str | None
    """The ROCm release, likewise."""

    @property
    def is_new_enough(self) -> bool:
        return numbers(self.version) >= MINIMUM_TORCH


_FIND = "import importlib.util as u; s = u.find_spec('torch'); print(s and s.origin or '')"


def find_torch() -> Torch | None:
    """The torch of this process, else of its Python: pip's isolated build hides the packages of the
    environment, but runs its Python, which sees them once what pip has set is taken away."""
    spec = importlib.util.find_spec("torch")
    origin = spec.origin if spec is not None else None
    if origin is None:
        hiding = ("PYTHONPATH", "PYTHONNOUSERSITE")
        environment = {name: value for name, value in os.environ.items() if name not in hiding}
        result = subprocess.run(
            [sys.executable, "-c", _FIND], env=environment, capture_output=True, text=True
        )
        origin = result.stdout.strip() or None
    if origin is None:
        return None
    root = Path(origin).resolve().parent
    facts = runpy.run_path(str(root / "version.py"))
    return Torch(root, facts["__version__"], facts.get("cuda"), facts.get("hip"))


def torch_to_fetch() -> list[str]:
    """The packages that an isolated build must install: torch, where there is none that is new enough.

    uv and `python -m build` run another Python than the environment's. There the build is against the
    newest torch; the stable ABI makes it serve every release from MINIMUM_TORCH on.
    """
    torch = find_torch()
    if torch is not None and torch.is_new_enough:
        return []
    print(
        f"dparallel-ext: this build sees no {TORCH_REQUIREMENT} in the environment and fetches one to build "
        "against. What is built runs with any such torch; --no-build-isolation builds against yours.",
        file=sys.stderr,
        flush=True,
    )
    return [TORCH_REQUIREMENT]


def missing_tools() -> list[str]:
    """The TOOLS that are not there, or are too old, in words."""
    missing = []
    for name, minimum in TOOLS.items():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
            continue
        if numbers(found) < minimum:
            missing.append(f"{name} {dotted(minimum)} or later (found {found})")
    return missing


def require_python() -> None:
    """Exit with a message unless this Python is new enough. pip would say so too, after fetching torch."""
    if sys.version_info < MINIMUM_PYTHON:
        least, found = dotted(MINIMUM_PYTHON), dotted(sys.version_info[:3])
        sys.exit(f"dparallel-ext needs Python {least} or later, and {sys.executable} is {found}.")


def require_setuptools() -> None:
    """Exit with a message, of Python or of all that is missing, unless there is a setuptools that will do."""
    require_python()
    if any(tool.startswith("setuptools") for tool in missing_tools()):
        require()


def require() -> Torch:
    """The torch to build against; exits with one message that names all that is missing."""
    require_python()
    if sys.platform == "win32":
        sys.exit("dparallel-ext builds on Linux and macOS; on Windows build it within WSL 2.")
    torch = find_torch()
    missing = missing_tools()
    if torch is None:
        missing.insert(0, "torch")
    elif not torch.is_new_enough:
        missing.insert(0, f"torch {dotted(MINIMUM_TORCH)} or later (found {torch.version})")
    if torch is None or missing:
        sys.exit(
            f"dparallel-ext: this build needs {', '.join(missing)}. Run\n\n    {INSTALL}\n\n"
            f"which fetches what a build needs, or install it yourself:\n\n    {INSTALL_HERE}\n"
        )
    return torch


# --- compilers ------------------------------------------------------------------------------------


def output_of(*command: str) -> str:
    """The output of a tool; exits with a line that names the tool where it does not run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        sys.exit(f"dparallel-ext: `{' '.join(command)}` does not run: {str(reason).strip()}")


def find_cxx() -> str:
    """The C++ compiler's command: CXX, else c++."""
    command = os.environ.get("CXX", "").strip() or "c++"
    if shutil.which(command.split()[0]) is None:
        sys.exit(
            f"dparallel-ext: there is no C++ compiler {command!r}. Install one (Debian and Ubuntu: apt "
            "install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install), or name it in CXX."
        )
    return command


def jobs() -> list[str]:
    """ninja's options for the number of compilers at once: MAX_JOBS, else as it chooses."""
    setting = os.environ.get("MAX_JOBS", "").strip()
    if not setting:
        return []
    if re.fullmatch(r"[1-9]\d{0,4}", setting) is None:
        sys.exit(f"dparallel-ext: MAX_JOBS: expected a whole number >= 1, got {setting!r}")
    return ["-j", setting]


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    candidates = [str(Path(home) / "bin" / "nvcc")] if home else []
    candidates += ["nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((nvcc for c in candidates if (nvcc := shutil.which(c))), None)


def known_architectures(nvcc: str) -> list[str]:
    """The architectures of an nvcc, "80" for compute_80; it does not list the forms with a suffix."""
    return re.findall(r"compute_(\d+)\b", output_of(nvcc, "--list-gpu-arch"))


def default_architectures(known: Sequence[str]) -> list[str]:
    """The CUDA_ARCHITECTURES that are among `known_architectures`."""
    return [a for a in CUDA_ARCHITECTURES if base(a) in known]


def base(architecture: str) -> str:
    """ "90" of "90a": without what only that very architecture runs."""
    return architecture.rstrip("af")


@dataclass(frozen=True)
class Cuda:
    """Whether CUDA kernels are built, for what, and why."""

    nvcc: str | None
    """None: they are not."""
    toolkit: str
    architectures: list[str]
    reason: str


def decide_cuda(torch: Torch, setting: str, nvcc: str | None) -> Cuda:
    """The CUDA part of the build, by DPARALLEL_CUDA (`setting`), torch and the nvcc that was found."""
    setting = setting.strip()

    def without(reason: str) -> Cuda:
        return Cuda(None, "none", [], reason)

    if setting == "0":
        return without("built with DPARALLEL_CUDA=0")
    if not setting and torch.hip is not None:
        return without(f"built against torch {torch.version} for ROCm, which has no kernels here")
    if not setting and torch.cuda is None:
        return without(f"built against torch {torch.version}, a CPU build (DPARALLEL_CUDA=1 builds CUDA too)")
    if nvcc is None:
        if setting:
            sys.exit(f"dparallel-ext: DPARALLEL_CUDA={setting}, but there is no nvcc: set CUDA_HOME or PATH.")
        return without(
            f"torch {torch.version} is a CUDA build, but NO NVCC was found (set CUDA_HOME or PATH)"
        )
    release = re.search(r"release ([\d.]+)", output_of(nvcc, "--version"))
    toolkit = release.group(1) if release else "unknown"
    known = known_architectures(nvcc)
    named = [] if setting in ("", "1") else [a for a in re.split(r"[;,\s]+", setting) if a]
    architectures = named or default_architectures(known)
    unknown = [a for a in named if not re.fullmatch(r"\d+[af]?", a) or base(a) not in known]
    if unknown or not architectures:
        sys.exit(
            f"dparallel-ext: nvcc {toolkit} ({nvcc}) knows the architectures {', '.join(known)}, "
            f"but not {', '.join(unknown or CUDA_ARCHITECTURES)}"
            + (f" of DPARALLEL_CUDA={setting!r}" if setting else "")
        )
    reason = f"DPARALLEL_CUDA={setting}" if setting else f"torch {torch.version} is a CUDA build"
    left_out = [] if named else [a for a in CUDA_ARCHITECTURES if a not in architectures]
    if left_out:
        reason += f"; nvcc {toolkit} does not know {', '.join(left_out)}: PTX serves those GPUs"
    return Cuda(nvcc, toolkit, architectures, reason)


def survey() -> tuple[Torch, str, Cuda]:
    """Torch, the C++ compiler and CUDA of this build. Exits with all that is missing or wrong."""
    torch, cxx = require(), find_cxx()
    jobs()
    return torch, cxx, decide_cuda(torch, os.environ.get("DPARALLEL_CUDA", ""), find_nvcc())


def gencode(architectures: Sequence[str]) -> list[str]:
    """nvcc's options: machine code of each architecture, and PTX, which the driver compiles.

    PTX of the lowest, without its suffix, lets GPUs between and after the list run; that of the highest
    gives later GPUs what it has beyond the lowest.
    """
    numbers = sorted({int(base(a)) for a in architectures})
    codes = [f"arch=compute_{a},code=sm_{a}" for a in architectures]
    codes += [f"arch=compute_{n},code=compute_{n}" for n in dict.fromkeys((numbers[0], numbers[-1]))]
    return [f"-gencode {code}" for code in codes]


def gpu_architecture(needed: bool) -> str:
    """The architecture of the GPU that torch sees first, "90a" of an H100, for `make gpu`. Where torch sees
    none: "", or if it is `needed` an exit with a line that says so."""
    require_python()
    if importlib.util.find_spec("torch") is None:
        sys.exit(f"dparallel-ext: {sys.executable} has no torch: `make gpu PYTHON=...` names one that has.")
    import torch

    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        return f"{major}{minor}" + "a" * (major == 9)
    if needed:
        sys.exit(
            f"dparallel-ext: torch {torch.__version__} of {sys.executable} sees no GPU. "
            "`make gpu GPU_FLAGS=--small` runs every case at tiny sizes without one."
        )
    return ""


# --- advice ---------------------------------------------------------------------------------------

_ADVICE = {
    r"No space left on device": "The disk is full: the build needs about 1 GB, here and in TMPDIR.",
    r"Killed|signal 9|virtual memory exhausted|[Cc]annot allocate memory|out of memory|std::bad_alloc": (
        "A compiler ran out of memory, or was killed for it: run fewer at once, with MAX_JOBS=1."
    ),
    r"unsupported (?:GNU|clang) version": (
        "nvcc does not take this C++ compiler as its host compiler: install one that its message allows, "
        "name it (NVCC_PREPEND_FLAGS='-ccbin g++-13'), or install a newer CUDA toolkit."
    ),
    r"Failed to preprocess host compiler properties|Host compiler .*not found": (
        "nvcc finds no C++ compiler to work with: put g++ on PATH, or name it "
        "(NVCC_PREPEND_FLAGS='-ccbin g++')."
    ),
    r"nvcc fatal\s+: (?:Value '\S+' is not defined for option 'std'|Unsupported gpu|Unknown option)": (
        "nvcc is too old for this: install CUDA 12.4 or later, or one that knows the architectures in "
        "DPARALLEL_CUDA."
    ),
    r"(?:cuda_\w+|crt/host_config)\.h: No such file|cannot find -lcudart": (
        "The CUDA toolkit is incomplete, nvcc without the CUDA runtime: install the whole toolkit "
        "(conda: cuda-cudart-dev too)."
    ),
    r"Python\.h(?:: No such file|' file not found)": (
        "Python's headers are missing (Debian and Ubuntu: apt install python3-dev; Fedora: python3-devel)."
    ),
    r"\b(?:torch|c10)/\S+\.h(?:: No such file|' file not found)|cannot find -l(?:torch|c10)": (
        "torch's headers or libraries are missing: install torch again."
    ),
    r"\bdparallel/\S+\.h(?:: No such file|' file not found)|missing and no known rule to make it": (
        "Sources of dparallel-ext itself are missing: fetch a complete copy."
    ),
    r"bad value .*x86-64-v|unknown target CPU|option .-std=|invalid value 'c\+\+|too old version of GCC": (
        "The C++ compiler is too old: install GCC 11, clang 13 or later, and name it in CXX."
    ),
    r"xcrun: error": "Apple's command line tools are missing: xcode-select --install.",
    r"cannot find -l(?:stdc\+\+|gcc|m\b)|execute .*cc1plus|(?:cstdint|vector)(?:: No such|' file not)": (
        "The C++ compiler is incomplete (Debian and Ubuntu: apt install build-essential)."
    ),
    r"FAILED: .*\.cu\.o": "A CUDA kernel does not compile; DPARALLEL_CUDA=0 builds for the CPU alone.",
}
"""Pattern of a compiler's output (ninja shows commands too) -> the remedy; the first that fits holds."""


def advice(output: str) -> str:
    """The remedy for a failed build, by the compilers' output."""
    remedies = (remedy for pattern, remedy in _ADVICE.items() if re.search(pattern, output))
    return next(remedies, "The first error above is the cause.")


if __name__ == "__main__":  # for the Makefile
    if sys.argv[1:2] == ["gpu"]:
        print(gpu_architecture(needed="--small" not in sys.argv))
    else:
        require_python()  # before it makes an environment of it
