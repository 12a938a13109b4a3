"""Compile every CUDA kernel for the architectures that nvcc knows, without a GPU, and hold it to its budget.

Prints registers, shared memory, spills and the bytes of machine code per kernel; fails on a spill, or where a
kernel uses more than csrc/cuda/budgets.json allows. Another nvcc than the one that the file names allots
registers otherwise: it is told what exceeds them, and only a kernel that does not compile is a fault.
`--update` rewrites the file.

A kernel is compiled again only when it has changed: the file says by a hash of which sources, headers and
nvcc its numbers were made, and what has been measured since is kept in build/cuda_check. `--all` compiles
them all.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import toolchain

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "csrc" / "cuda"
BUDGETS = SOURCES / "budgets.json"
MEASURED = ROOT / "build" / "cuda_check"


@dataclass
class Usage:
    registers: int = 0
    shared: int = 0
    """bytes, static"""
    spills: int = 0
    """bytes stored and loaded"""
    code: int = 0
    """bytes of machine code; an SM's cache holds 128 KB"""


SAID = {"registers": "registers", "shared": "bytes of shared memory", "code": "bytes of machine code"}
"""What a budget limits."""


def version_of(nvcc: str) -> str:
    """13.0.88"""
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"V(\d+(\.\d+)+)", text)
    return match.group(1) if match else text


# Machine code of these is made of the same PTX: no source of ours asks for the architecture.
PTX_OF = {"86": "80", "89": "80"}


def hash_of(source: Path, headers: str) -> str:
    return hashlib.sha256(f"code\0{headers}\0{source.read_text()}".encode()).hexdigest()[:16]


def measure(nvcc: str, source: Path, architectures: list[str], headers: str) -> dict[str, dict[str, Usage]]:
    """Architecture -> kernel -> usage; exits with the compiler's output where it fails."""
    usage: dict[str, dict[str, Usage]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for architecture in architectures:
            file = MEASURED / f"{source.stem}-{architecture}-{hash_of(source, headers)}.txt"
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                partial = file.with_suffix(f".{os.getpid()}")
                partial.write_text(compile_one(nvcc, source, architecture, Path(scratch)))
                partial.replace(file)
            usage[architecture] = parse(file.read_text())
    return usage


def compile_one(nvcc: str, source: Path, architecture: str, scratch: Path) -> str:
    """What ptxas reports, and behind it the lines of `code_of`."""
    virtual = PTX_OF.get(architecture, architecture)
    ptx = scratch / f"{virtual}.ptx"
    includes = [f"-I{ROOT / 'csrc' / 'include'}", f"-I{SOURCES}"]
    cubin = scratch / f"{architecture}.cubin"
    commands = [[nvcc, f"-arch=sm_{architecture}", "-cubin", "-Xptxas", "-v", str(ptx), "-o", str(cubin)]]
    if not ptx.exists():
        front = [nvcc, "-O3", "-std=c++17", f"-arch=compute_{virtual}", "-ptx", *includes, str(source)]
        commands.insert(0, [*front, "-o", str(ptx)])
    for command in commands:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            sys.exit(f"{source.name} does not compile for sm_{architecture}:\n{result.stderr}")
    return f"{result.stderr}\n{code_of(cubin)}"


def code_of(cubin: Path) -> str:
    """Lines "code NAME BYTES" of the kernels: those sections of the ELF file that hold instructions."""
    elf = cubin.read_bytes()
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, names_at = struct.unpack_from("<HHH", elf, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", elf, table + i * size) for i in range(count)]
    names = sections[names_at][4]
    lines = []
    for name_at, _, _, _, _, length in sections:
        name = elf[names + name_at : elf.index(b"\0", names + name_at)].decode()
        if name.startswith(".text."):
            lines.append(f"code {name.removeprefix('.text.')} {length}")
    return "\n".join(lines)


def parse(text: str) -> dict[str, Usage]:
    """The report of `compile_one`: the most that any instance of a name uses."""
    kernels: dict[str, Usage] = {}
    usage = Usage()
    for line in text.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            name = short_name(match.group(1))
            if name in kernels:
                sys.exit(f"cuda-check: two kernels are called {name}")
            usage = kernels[name] = Usage()
        elif match := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            usage.spills = max(usage.spills, int(match.group(1)) + int(match.group(2)))
        elif match := re.search(r"Used (\d+) registers", line):
            usage.registers = max(usage.registers, int(match.group(1)))
            shared = re.search(r"(\d+) bytes smem", line)
            usage.shared = max(usage.shared, int(shared.group(1)) if shared else 0)
        elif match := re.match(r"code (\w+) (\d+)", line):
            kernels[short_name(match.group(1))].code = int(match.group(2))
    return kernels


def short_name(mangled: str) -> str:
    """unmask_kernel<BFloat16, sampling> or kv_write_kernel<Float32, 4> of a mangled name."""
    # Namespaces and then its own name, each behind its length. One has no name but a hash, of any digits.
    name, rest = mangled, re.sub("^_ZN?", "", mangled)
    while length := re.match(r"\d+", rest):
        end = length.end() + int(length.group())
        name, rest = rest[length.end() : end], rest[end:]
    parts = [t for t in ("BFloat16", "Float32", "Float16", "Float64") if f"{len(t)}{t}" in mangled]
    parts += ["sampling"] if "Lb1E" in mangled else []
    parts += re.findall(r"Li(\d+)E", mangled)
    return f"{name}<{', '.join(parts)}>" if parts else name


def measure_all(
    nvcc: str, sources: list[Path], architectures: list[str], headers: str
) -> dict[str, dict[str, Usage]]:
    """Usage by "source: kernel" and by architecture."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        measured = list(pool.map(lambda source: measure(nvcc, source, architectures, headers), sources))
    usage: dict[str, dict[str, Usage]] = {}
    for source, by_architecture in zip(sources, measured, strict=True):
        for architecture, got in by_architecture.items():
            for kernel, used in got.items():
                usage.setdefault(f"{source.stem}: {kernel}", {})[architecture] = used
    return usage


def show(usage: dict[str, dict[str, Usage]], architectures: list[str]) -> None:
    print(f"{'kernel':60}" + "".join(f"{'sm_' + a:>23}" for a in architectures))
    print(f"{'':60}" + f"{'regs  smem spill   code':>23}" * len(architectures))
    for kernel, by_architecture in sorted(usage.items()):
        cells = [by_architecture[a] for a in architectures]
        print(
            f"{kernel:60}" + "".join(f"{u.registers:>5}{u.shared:>6}{u.spills:>5}{u.code:>7}" for u in cells)
        )


def faults_of(usage: dict[str, dict[str, Usage]], budgets: dict[str, Any] | None) -> list[str]:
    """What spills, and what is beyond its budget; without budgets, what spills."""
    faults = []
    for kernel, by_architecture in sorted(usage.items()):
        for architecture, used in by_architecture.items():
            where = f"{kernel} on sm_{architecture}"
            if used.spills:
                faults.append(f"{where} spills {used.spills} bytes")
            if budgets is None:
                continue
            allowed = budgets.get(kernel, {}).get(architecture)
            if allowed is None:
                faults.append(f"{where} has no budget (tools/cuda_check.py --update)")
            else:
                faults += [
                    f"{where} uses {value} {SAID[what]}, budget {allowed[what]}"
                    for what in SAID
                    if (value := getattr(used, what)) > allowed[what]
                ]
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--update", action="store_true", help="rewrite the budget file")
    parser.add_argument("--all", action="store_true", help="compile what has not changed too")
    parser.add_argument(
        "--if-available", action="store_true", help="where there is no nvcc, say so and succeed"
    )
    options = parser.parse_args()
    nvcc = toolchain.find_nvcc()
    if nvcc is None:
        message = "cuda-check: no nvcc (set CUDA_HOME or PATH): the CUDA kernels were NOT compiled"
        sys.exit(None if options.if_available and print(message) is None else message)

    version = version_of(nvcc)
    architectures = toolchain.default_architectures(toolchain.known_architectures(nvcc))
    headers = "\0".join([version, *(p.read_text() for p in sorted((ROOT / "csrc").rglob("*.*h")))])
    made_with = {"nvcc": version, "architectures": [], "sources": {}, "kernels": {}}
    if BUDGETS.exists():
        made_with = json.loads(BUDGETS.read_text())
    sources = sorted(SOURCES.glob("*.cu"), key=lambda source: source.name != "unmask.cu")  # the longest first
    hashes = {source.stem: hash_of(source, headers) for source in sources}
    same = made_with["architectures"] == architectures and not (options.all or options.update)
    changed = [s for s in sources if not same or made_with["sources"].get(s.stem) != hashes[s.stem]]
    usage = measure_all(nvcc, changed, architectures, headers)
    show(usage, architectures)
    faults = faults_of(usage, None if options.update else made_with["kernels"])
    if options.update:
        table = {
            kernel: {
                a: {k: v for k, v in asdict(u).items() if k != "spills"} for a, u in by_architecture.items()
            }
            for kernel, by_architecture in sorted(usage.items())
        }
        content = {"nvcc": version, "architectures": architectures, "sources": hashes, "kernels": table}
        BUDGETS.write_text(json.dumps(content, indent=1) + "\n")
    if faults and (options.update or made_with["nvcc"] == version):
        sys.exit("cuda-check: " + "\n            ".join(faults))
    if faults:
        print("cuda-check: " + "\n            ".join(faults))
        print(f"cuda-check: not held against nvcc {version}: the budgets are those of {made_with['nvcc']}")
        return
    print(f"cuda-check: {len(usage)} kernels x {len(architectures)} architectures within budget, no spills")
    if len(changed) < len(sources):
        print(
            f"cuda-check: {len(sources) - len(changed)} of {len(sources)} sources are as they were measured"
        )


if __name__ == "__main__":
    main()
