"""What a build finds and decides, what it says when it fails, and the package that comes of it."""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from dparallel import registry
from dparallel.cli import app
from packaging.requirements import Requirement
from torch._C import DispatchKey, DispatchKeySet
from typer.testing import CliRunner

import dparallel_ext as dx
from dparallel_ext import backends

sys.path.insert(0, str(ROOT / "tools"))
import build_backend
import cuda_check
import toolchain

CPU = toolchain.Torch(Path("torch"), "2.13.0+cpu", cuda=None, hip=None)
CUDA = toolchain.Torch(Path("torch"), "2.13.0+cu130", cuda="13.0", hip=None)

# What `nvcc --list-gpu-arch` of a release prints, each after "compute_": 13.0's as it printed them, the
# others' from what their ptxas takes.
OLD = "50 52 53 60 61 62 70 72 75 80 86 87 89 90"
NVCC = {
    "12.4": OLD,
    "12.6": OLD,
    "12.8": f"{OLD} 100 101 120",
    "13.0": "75 80 86 87 88 89 90 100 110 103 120 121",
}


@pytest.fixture
def nvcc(monkeypatch: pytest.MonkeyPatch):
    """Makes the nvcc of a release the one that is asked."""

    def pretend(release: str) -> str:
        says = {
            "--version": f"Cuda compilation tools, release {release}, V{release}.99\n",
            "--list-gpu-arch": "".join(f"compute_{number}\n" for number in NVCC[release].split()),
        }
        monkeypatch.setattr(toolchain, "output_of", lambda command, option: says[option])
        return "nvcc"

    return pretend


# --- architectures --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("release", "architectures", "ptx"),
    [
        ("12.4", ["80", "86", "89", "90a"], [80, 90]),
        ("12.6", ["80", "86", "89", "90a"], [80, 90]),
        ("12.8", ["80", "86", "89", "90a", "100", "120"], [80, 120]),
        ("13.0", ["80", "86", "89", "90a", "100", "120"], [80, 120]),
    ],
)
def test_architectures_are_those_that_nvcc_knows(nvcc, release, architectures, ptx):
    cuda = toolchain.decide_cuda(CUDA, "", nvcc(release))
    assert cuda.architectures == architectures
    assert cuda.toolkit == release
    assert ("100, 120" in cuda.reason) == (release < "12.8")
    options = toolchain.gencode(cuda.architectures)
    machine = [f"-gencode arch=compute_{a},code=sm_{a}" for a in architectures]
    assert options == machine + [f"-gencode arch=compute_{n},code=compute_{n}" for n in ptx]
    assert {re.search(r"compute_(\d+)", option).group(1) for option in options} <= set(NVCC[release].split())


def test_a_kernel_is_named_whatever_the_hash_before_it() -> None:
    """The hash is of the path that is compiled: here it reads as the length of a name."""
    space = "_ZN9dparallel4cuda45_GLOBAL__N__127847b2_12_row_stats_cu_b6efb60e"
    kernel = "18row_nucleus_kernelINS0_7Float16EEEvNS_12RowStatsArgsENS0_7ScratchE"
    assert cuda_check.short_name(space + kernel) == "row_nucleus_kernel<Float16>"


@pytest.mark.skipif(toolchain.find_nvcc() is None, reason="no nvcc here")
def test_the_nvcc_here_takes_the_options():
    """A dry run: what would be made, machine code of all and PTX of the lowest."""
    nvcc = toolchain.find_nvcc()
    options = " ".join(toolchain.gencode(toolchain.decide_cuda(CUDA, "", nvcc).architectures)).split()
    source = ROOT / "csrc" / "cuda" / "swiglu.cu"
    ran = subprocess.run([nvcc, "--dryrun", *options, "-c", source], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "kind=ptx,sm=80" in ran.stderr
    assert "kind=elf,sm=90a" in ran.stderr


def test_ptx_lets_gpus_between_and_after_run():
    """Of "90a;120" PTX for 90, without what 90a alone has: 10.0, 10.3 and 11.0 run it."""
    assert toolchain.gencode(["90a", "120"])[2:] == [
        "-gencode arch=compute_90,code=compute_90",
        "-gencode arch=compute_120,code=compute_120",
    ]
    assert toolchain.gencode(["90a"])[1:] == ["-gencode arch=compute_90,code=compute_90"]


def test_architectures_named_by_the_user(nvcc):
    cuda = toolchain.decide_cuda(CPU, "90a; 100,120", nvcc("12.8"))
    assert cuda.architectures == ["90a", "100", "120"]
    for wrong in ("120", "9.0", "sm_90", "80;native"):
        with pytest.raises(SystemExit, match=r"nvcc 12\.4 .*50, 52.*DPARALLEL_CUDA='"):
            toolchain.decide_cuda(CPU, wrong, nvcc("12.4"))


def test_why_there_is_no_cuda(nvcc):
    """Each reason goes into the build, for `dparallel info` and the first tensor on a GPU."""
    rocm = toolchain.Torch(Path("torch"), "2.13.0+rocm7", cuda=None, hip="7.0")
    for torch_found, setting, found, says in (
        (CUDA, "0", "nvcc", "DPARALLEL_CUDA=0"),
        (CPU, "", "nvcc", "a CPU build"),
        (rocm, "", "nvcc", "ROCm"),
        (CUDA, "", None, "NO NVCC"),
    ):
        cuda = toolchain.decide_cuda(torch_found, setting, found)
        assert cuda.nvcc is None
        assert cuda.architectures == []
        assert says in cuda.reason
    assert toolchain.decide_cuda(CPU, "1", nvcc("13.0")).nvcc
    with pytest.raises(SystemExit, match="no nvcc"):
        toolchain.decide_cuda(CPU, "1", None)


# --- what a build needs ---------------------------------------------------------------------------


def test_an_isolated_build_finds_the_torch_of_its_python():
    """As under pip: packages hidden, the environment's Python. Without the tools one message."""
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'tools')!r}); import toolchain\n"
        "assert 'torch' not in sys.modules; print(toolchain.find_torch()); toolchain.require()"
    )
    ran = subprocess.run([sys.executable, "-S", "-c", script], capture_output=True, text=True)
    assert str(Path(torch.__file__).parent) in ran.stdout
    assert torch.__version__ in ran.stdout
    assert ran.returncode == 1
    assert "this build needs setuptools, ninja, pybind11. Run\n\n    pip install .\n" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert len(ran.stderr.splitlines()) < 12


@pytest.mark.parametrize(
    ("found", "fetched"),
    [
        (None, ["torch>=2.10"]),
        (toolchain.Torch(Path("torch"), "2.9.1+cpu", None, None), ["torch>=2.10"]),
        (CPU, []),
        (toolchain.Torch(Path("torch"), "2.10.0a0+git1234", None, None), []),
    ],
)
@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_torch_is_asked_for_where_there_is_none(monkeypatch, capsys, found, fetched, kind):
    name = f"get_requires_for_build_{kind}"
    monkeypatch.setattr(toolchain, "find_torch", lambda: found)
    monkeypatch.setattr(build_backend.build_meta, name, lambda settings: ["setuptools"])
    assert getattr(build_backend, name)() == ["setuptools", *fetched]
    assert ("fetches one to build against" in capsys.readouterr().err) == bool(fetched)


@pytest.mark.parametrize("file", ["build_backend", "toolchain"])
def test_an_old_python_is_refused_before_anything_is_fetched(monkeypatch, file):
    """By pip, which reads the first, and by make, which runs the second."""
    monkeypatch.setattr(sys, "version_info", (3, 10, 13))
    with pytest.raises(SystemExit, match=r"needs Python 3\.11 or later, and .*python.* is 3\.10\.13\."):
        runpy.run_path(str(ROOT / "tools" / f"{file}.py"), run_name="__main__")


@pytest.mark.parametrize("file", ["tools/build_backend.py", "setup.py"])
@pytest.mark.parametrize("found", ["65.5.0", None])
def test_setuptools_that_will_not_do_is_named_with_all_that_is_missing(monkeypatch, found, file):
    """Before it is imported: Python's own venv brings an old one, or none."""

    def version(name: str) -> str:
        if name == "setuptools" and found:
            return found
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    named = f"setuptools 77 or later (found {found})" if found else "setuptools"
    with pytest.raises(SystemExit, match=f"this build needs {re.escape(named)}, ninja, pybind11. Run"):
        runpy.run_path(str(ROOT / file))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="one instruction set")
def test_kernels_are_for_their_instruction_set_whatever_cxxflags_say(monkeypatch, tmp_path):
    """conda's compilers set CXXFLAGS with an -march, which made all kernels those of the oldest CPU."""
    monkeypatch.setenv("CXXFLAGS", "-march=nocona -O2")
    monkeypatch.setenv("DPARALLEL_CUDA", "0")
    monkeypatch.setattr(sys, "argv", ["setup.py", "--name"])
    (tmp_path / "build.ninja").write_text(
        runpy.run_path(str(ROOT / "setup.py"))["plan"](tmp_path, "_C.so")[0]
    )
    listed = [sys.executable, "-m", "ninja", "-C", str(tmp_path), "-t", "commands", "_C.so"]
    said = subprocess.run(listed, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^.*-DDPARALLEL_SIMD=(\w+).*-march=(\S+)", said, re.MULTILINE)  # the last holds
    assert set(found) == {("portable", "x86-64"), ("avx2", "x86-64-v3"), ("avx512", "x86-64-v4")}


@pytest.mark.parametrize("build", [build_backend.build_wheel, build_backend.build_editable])
def test_what_is_missing_is_said_first(monkeypatch, tmp_path, build):
    """Before setuptools copies and lists each file."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SystemExit, match="no-such-compiler"):
        build(str(tmp_path))


def test_too_old_a_torch_is_named(monkeypatch):
    monkeypatch.setattr(toolchain, "find_torch", lambda: toolchain.Torch(Path("t"), "2.9.1", None, None))
    with pytest.raises(SystemExit, match=r"needs torch 2\.10 or later \(found 2\.9\.1\)\. Run"):
        toolchain.require()


def test_tools_that_do_not_run_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    with pytest.raises(SystemExit, match=r"no C\+\+ compiler 'no-such-compiler -O2'\. Install one"):
        toolchain.find_cxx()
    monkeypatch.setenv("CXX", "")
    if shutil.which("c++"):
        assert toolchain.find_cxx() == "c++"
    broken = tmp_path / "nvcc"
    broken.write_text("#!/bin/sh\necho cannot find libdevice >&2; exit 1\n")
    broken.chmod(0o755)
    with pytest.raises(SystemExit, match="nvcc --version` does not run: cannot find libdevice"):
        toolchain.decide_cuda(CUDA, "", str(broken))


def test_max_jobs(monkeypatch):
    """ninja would take 0 for no limit."""
    for setting, options in (("", []), (" 3 ", ["-j", "3"])):
        monkeypatch.setenv("MAX_JOBS", setting)
        assert toolchain.jobs() == options
    for setting in ("0", "-1", "abc", "1.5"):
        monkeypatch.setenv("MAX_JOBS", setting)
        with pytest.raises(SystemExit, match=f"MAX_JOBS: expected a whole number >= 1, got '{setting}'"):
            toolchain.survey()


# --- what the user sees ---------------------------------------------------------------------------


def kernels(key: str) -> set[str]:
    registered = torch._C._dispatch_get_registrations_for_dispatch_key(key)
    return {name for name in registered if name.startswith("dparallel::")}


def test_tensors_where_there_are_no_kernels():
    """Every op says so in a sentence. (The dispatcher is told the device, since there is none here.)"""
    missing = {
        "MPS": "kernels for the CPU and for CUDA alone",
        "XPU": "kernels for the CPU and for CUDA alone",
    }
    info = dx.build_info()
    if "cuda" not in info["backends"]:
        missing["CUDA"] = (
            f"no CUDA kernels in this build.*{re.escape(info['cuda_reason'])}.*nvcc.*pip install"
        )
    x, weight = torch.ones(2, 8), torch.ones(8)
    for key, says in missing.items():
        assert kernels(key) == kernels("CPU")
        with pytest.raises(RuntimeError, match=f"^dparallel_ext has {says}"):
            torch.ops.dparallel.rms_norm.default.redispatch(
                DispatchKeySet(getattr(DispatchKey, key)), x, None, weight, None, 1e-6
            )


def test_info_warns_of_a_gpu_without_kernels(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H100")
    monkeypatch.setattr(dx, "build_info", lambda: {"backends": "cpu", "cuda_reason": "NO NVCC was found"})
    ran = CliRunner().invoke(app, ["info"])
    assert "warning: tensors on a GPU will be refused: NO NVCC was found" in ran.stderr
    assert "H100" in ran.stdout


def test_sources_without_a_library_say_so(monkeypatch, tmp_path):
    """What Python in the folder of the source finds before the installed package."""
    (tmp_path / "unbuilt").mkdir()
    shutil.copy2(ROOT / "dparallel_ext" / "__init__.py", tmp_path / "unbuilt")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=r"unbuilt has no compiled library for Python 3\..*pip install -e"):
        importlib.import_module("unbuilt")


def test_sources_do_not_take_the_library_of_another_folder(monkeypatch, tmp_path):
    """It is offered to them where another folder is installed with -e, by a finder of setuptools' making."""

    class Finder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == "copied._C":
                return importlib.machinery.PathFinder.find_spec(name, path=list(dx.__path__))
            return None

    (tmp_path / "copied").mkdir()
    shutil.copy2(ROOT / "dparallel_ext" / "__init__.py", tmp_path / "copied")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Finder])
    with pytest.raises(ImportError, match=r"copied has no compiled library for Python 3\..*pip install -e"):
        importlib.import_module("copied")


@pytest.mark.skipif("cuda" in dx.build_info()["backends"], reason="CUDA kernels are built")
def test_a_device_without_kernels_is_told_of():
    reason = re.escape(dx.build_info()["cuda_reason"])
    assert reason
    with pytest.warns(UserWarning, match=f"no kernels for cuda in this build: .*there: {reason}"):
        backends.warn_without_kernels("cuda")
    with pytest.raises(ValueError, match="device: expected cpu, cuda or cuda:N, got 'mps'"):
        dx.models.load(registry.directory_of("builtin:student"), device="mps")


@pytest.mark.skipif("cuda" in dx.build_info()["backends"], reason="this build has CUDA kernels")
def test_loading_to_a_gpu_without_kernels_warns(monkeypatch):
    """Before the weights are read; that torch has no CUDA here, it says after."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with (
        pytest.warns(UserWarning, match="no kernels for cuda in this build: .*refuse tensors there: "),
        pytest.raises((RuntimeError, AssertionError)),
    ):
        dx.models.load(registry.directory_of("builtin:student"), device="cuda")


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_what_was_cleaned_is_built_again(tmp_path):
    for name in ("csrc", "tools", ".venv"):
        (tmp_path / name).mkdir()
    for name in ("requirements.txt", "setup.py", "pyproject.toml", ".venv/installed", ".venv/built"):
        (tmp_path / name).touch()
    make, builds = ["make", "-f", str(ROOT / "Makefile")], []
    for _ in range(2):
        install = subprocess.run([*make, "-n", "install"], cwd=tmp_path, capture_output=True, check=True)
        builds.append(b"building the extension" in install.stdout)
        subprocess.run([*make, "clean"], cwd=tmp_path, capture_output=True, check=True)
    assert builds == [False, True]


def test_version(monkeypatch, capsys):
    """`dparallel --version`, as `python -m dparallel`; it is pyproject.toml's."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    monkeypatch.setattr(sys, "argv", ["dparallel", "--version"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("dparallel", run_name="__main__")
    assert end.value.code in (0, None)
    assert capsys.readouterr().out == f"dparallel {project['version']}\n"
    assert dx.__version__ == project["version"]


# --- the package ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The sdist of a fresh copy of this tree, unpacked, with the objects that `make install` compiled.

    ninja compiles what does not fit them, and fails where a source or header is not there.
    """
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("sdist")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\0"
    ):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    script = f"import build_backend; build_backend.build_sdist({str(out)!r})"
    path = {**os.environ, "PYTHONPATH": str(copy / "tools")}
    subprocess.run([sys.executable, "-c", script], cwd=copy, env=path, check=True, capture_output=True)
    (archive,) = out.iterdir()
    with tarfile.open(archive) as tar:
        tar.extractall(out, filter="tar")
    unpacked = out / archive.name.removesuffix(".tar.gz")
    for built in (ROOT / "build").glob("*-torch*"):
        shutil.copytree(built, unpacked / "build" / built.name)
    library = f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    earlier = unpacked / "build" / library / "dparallel" / "no_more.py"
    earlier.parent.mkdir(parents=True)
    earlier.touch()
    return unpacked


def requirements_of(name: str) -> set[str]:
    """A distribution and all that it needs."""
    found, new = set(), {name}
    while new:
        name = new.pop()
        found.add(name)
        needs = [Requirement(text) for text in metadata.requires(name) or []]
        new |= {n.name for n in needs if n.marker is None or n.marker.evaluate({"extra": ""})} - found
    return found


def repack(name: str, directory: Path) -> None:
    """An installed distribution as a wheel again, so that pip needs no network."""
    distribution = metadata.distribution(name)
    stem = f"{distribution.name.replace('-', '_')}-{distribution.version}"
    with zipfile.ZipFile(directory / f"{stem}-py3-none-any.whl", "w") as wheel:
        for file in distribution.files or []:
            if file.suffix != ".pyc":
                script = "bin" in file.parts and ".." in file.parts
                wheel.write(file.locate(), f"{stem}.data/scripts/{file.name}" if script else str(file))


@pytest.mark.slow
def test_pip_install_of_the_sdist(sdist: Path, tmp_path: Path):
    """Plain `pip install` into an environment that has torch and safetensors alone; then decode there."""
    environment, wheels = tmp_path / "environment", tmp_path / "wheels"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    found = [
        metadata.distribution(name) for name in requirements_of("torch") | requirements_of("safetensors")
    ]
    # Some have a folder in common: those of a CUDA build of torch have "nvidia".
    tops = {each.locate_file(file.parts[0]) for each in found for file in each.files or []}
    for top in tops:
        if top.name not in ("..", "__pycache__"):
            (packages / top.name).symlink_to(top)
    wheels.mkdir()
    for name in ("setuptools", "ninja", "pybind11"):
        repack(name, wheels)
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--find-links", wheels]
    ran = subprocess.run([*pip, "--verbose", sdist], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr

    script = """
import json, sys, torch
import dparallel_ext as dx, dparallel
directory = dparallel.__path__[0] + "/toy/builtin/student"
model = dx.models.load(directory, dtype=torch.float32)
out = dx.decode(model, torch.arange(5, 29)[None], gen_length=32, threshold=0.3)
print(json.dumps([dx.__file__, dx.build_info(), out.responses[0].tolist(), out.nfe.tolist()]))
"""
    ran = subprocess.run(
        [python, "-I", "-W", "ignore", "-c", script], cwd=tmp_path, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    file, info, response, passes = json.loads(ran.stdout)
    assert Path(file).is_relative_to(environment)
    assert info == dx.build_info()
    model = dx.models.load(registry.directory_of("builtin:student"), dtype=torch.float32)
    ours = dx.decode(model, torch.arange(5, 29)[None], gen_length=32, threshold=0.3)
    assert response == ours.responses[0].tolist()
    assert passes == ours.nfe.tolist()

    installed = {str(p.relative_to(packages)) for p in packages.glob("dparallel*/**/*") if p.is_file()}
    assert "dparallel/no_more.py" not in installed
    for package, home in (("dparallel_ext", ROOT), ("dparallel", ROOT / "python")):
        for source in (home / package).glob("**/*"):
            if source.is_file() and source.suffix not in (".so", ".pyc"):
                assert str(source.relative_to(home)) in installed
