"""Compile every CUDA kernel for the architectures that nvcc knows, without a GPU, and hold it to its budget.

Prints registers, shared memory, spills and the bytes of machine code per kernel; fails on a spill, or where a
kernel uses more than csrc/cuda/budgets.json allows. Another nvcc than the one that the file names allots
registers otherwise: it is told what exceeds them, and only a kernel that does not compile is a fault.

For the kernels in csrc/cuda/loops.json also a loop on sm_90a: the instructions of a turn, and the fewest from
a load to the first use, neither of which may become worse. The file names the loop by what it does, "work"
and "least" (see `sass.loop_of`), and says how many "elements" a turn takes, for each thread unless "of" says
otherwise. This needs nvdisasm, from the CUDA toolkit or the package nvidia-cuda-nvdisasm; without it loops
are left out.

`--update` rewrites both files.

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
import shutil
import struct
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sass
import toolchain

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "csrc" / "cuda"
BUDGETS = SOURCES / "budgets.json"
LOOPS = SOURCES / "loops.json"
LOOPS_OF = "90a"
"""The architecture whose loops are looked at."""
MEASURED = ROOT / "build" / "cuda_check"


FLAGS = {
    **dict.fromkeys(("row_stats_kernel", "unmask_kernel", "accept_kernel"), "sampling"),
    **dict.fromkeys(("block_attention_plain_kernel", "block_attention_tensor_kernel"), "restricted"),
    **dict.fromkeys(("kv_write_kernel", "product_kernel"), "norms"),
}
"""What a kernel does where its flag is true."""


@dataclass
class Usage:
    registers: int = 0
    shared: int = 0
    """bytes, static"""
    spills: int = 0
    """bytes stored and loaded"""
    code: int = 0
    """bytes of machine code; an SM's cache holds 128 KB"""

    def kept(self) -> dict[str, int]:
        """Its entry in the budgets."""
        return {what: getattr(self, what) for what in SAID}


SAID = {"registers": "registers", "shared": "bytes of shared memory", "code": "bytes of machine code"}
"""Field of `Usage` that a budget limits -> its words."""


def version_of(nvcc: str) -> str:
    """13.0.88"""
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"V(\d+(\.\d+)+)", text)
    return release.group(1) if release else text


# Machine code of these is made of the same PTX: no source of ours asks for the architecture.
PTX_OF = {"86": "80", "89": "80"}


Table = dict[str, dict[str, Any]]
"""Kernel -> its entry in loops.json."""


def hash_of(source: Path, headers: str, table: Table) -> str:
    """A hash of all that the numbers of a source depend on. headers: their text, behind nvcc's version;
    table: the loops that are looked for in it."""
    named = [f"{kernel} {entry['work']} {entry['least']}" for kernel, entry in table.items()]
    made_of = "\0".join(["loops", headers, *named, source.read_text()])
    return hashlib.sha256(made_of.encode()).hexdigest()[:16]


def find_nvdisasm(nvcc: str) -> str | None:
    """Beside nvcc, on PATH, or of the package nvidia-cuda-nvdisasm in this Python's environment."""
    packages = Path(sysconfig.get_path("purelib")) / "nvidia"
    candidates = [Path(nvcc).resolve().parent / "nvdisasm", "nvdisasm", *packages.glob("*/bin/nvdisasm")]
    return next((path for c in candidates if (path := shutil.which(c))), None)


def measure(
    nvcc: str, nvdisasm: str | None, source: Path, architectures: list[str], headers: str, table: Table
) -> dict[str, str]:
    """Architecture -> the report of `compile_one`; exits with the compiler's output where it fails."""
    reports = {}
    with tempfile.TemporaryDirectory() as scratch:
        for architecture in architectures:
            reads = nvdisasm if table and architecture == LOOPS_OF else None
            name = f"{source.stem}-{architecture}-{hash_of(source, headers, table)}"
            file = MEASURED / f"{name}{'-loops' if reads else ''}.txt"
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                report = compile_one(nvcc, source, architecture, Path(scratch))
                if reads:
                    report += loops_of(Path(scratch) / f"{architecture}.cubin", reads, table)
                partial = file.with_suffix(f".{os.getpid()}")
                partial.write_text(report)
                partial.replace(file)
            reports[architecture] = file.read_text()
    return reports


def compile_one(nvcc: str, source: Path, architecture: str, scratch: Path) -> str:
    """The report of ptxas, and behind it the lines of `code_of`."""
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
    return f"{result.stderr}\n{code_of(cubin)}\n"


def code_of(cubin: Path) -> str:
    """Lines "code NAME BYTES" of the kernels, the sections of the ELF file that hold instructions."""
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


def loops_of(cubin: Path, nvdisasm: str, table: Table) -> str:
    """Lines "loop NAME INSTRUCTIONS DISTANCE" of the kernels in `table` that have such a loop."""
    code = toolchain.output_of(nvdisasm, "--print-code", str(cubin))
    by_name = {short_name(name): kernel for name, kernel in sass.kernels(code).items()}
    lines = []
    for of_source, entry in table.items():
        name = of_source.partition(": ")[2]
        loop = sass.loop_of(by_name[name], entry["work"], entry["least"]) if name in by_name else None
        if loop is not None:
            lines.append(f"loop {name}: {loop.instructions} {loop.distance}\n")
    return "".join(lines)


def parse_loops(text: str) -> dict[str, sass.Loop]:
    """Kernel -> loop, of a report with the lines of `loops_of`."""
    lines = re.findall(r"^loop (.+): (\d+) (\w+)$", text, re.MULTILINE)
    return {name: sass.Loop(int(n), None if d == "None" else int(d)) for name, n, d in lines}


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
    parts = [
        t for t in ("BFloat16", "Float32", "Float16", "Float64", "EightBits") if f"{len(t)}{t}" in mangled
    ]
    parts += [FLAGS[name]] if "Lb1E" in mangled else []
    parts += re.findall(r"Li(\d+)E", mangled)
    return f"{name}<{', '.join(parts)}>" if parts else name


def measure_all(
    nvcc: str,
    nvdisasm: str | None,
    sources: list[Path],
    architectures: list[str],
    headers: str,
    tables: dict[str, Table],
) -> tuple[dict[str, dict[str, Usage]], dict[str, sass.Loop | None]]:
    """Usage by "source: kernel" and by architecture, and the loops of `tables`, by source; None: a kernel has
    no such loop."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        measured = list(
            pool.map(lambda s: measure(nvcc, nvdisasm, s, architectures, headers, tables[s.stem]), sources)
        )
    usage: dict[str, dict[str, Usage]] = {}
    loops: dict[str, sass.Loop | None] = {}
    for source, reports in zip(sources, measured, strict=True):
        for architecture, report in reports.items():
            for kernel, used in parse(report).items():
                usage.setdefault(f"{source.stem}: {kernel}", {})[architecture] = used
        if nvdisasm is not None and LOOPS_OF in reports:
            of_source = parse_loops(reports[LOOPS_OF])
            loops |= {kernel: of_source.get(kernel.partition(": ")[2]) for kernel in tables[source.stem]}
    return usage, loops


def show(usage: dict[str, dict[str, Usage]], architectures: list[str]) -> None:
    print(f"{'kernel':60}" + "".join(f"{'sm_' + a:>23}" for a in architectures))
    print(f"{'':60}" + f"{'regs  smem spill   code':>23}" * len(architectures))
    for kernel, of in sorted(usage.items()):
        cells = [of[architecture] for architecture in architectures]
        print(
            f"{kernel:60}" + "".join(f"{u.registers:>5}{u.shared:>6}{u.spills:>5}{u.code:>7}" for u in cells)
        )


def show_loops(loops: dict[str, sass.Loop | None], table: Table) -> None:
    if loops:
        print(f"\n{f'loop on sm_{LOOPS_OF}':75} instructions  elements  each  load to use")
    for kernel, loop in sorted(loops.items()):
        if loop is not None:
            elements = table[kernel]["elements"]
            each = f"{loop.instructions / elements:.1f}"
            print(f"{kernel:75}{loop.instructions:>13}{elements:>10}{each:>6}{loop.distance!s:>13}")


def faults_of(usage: dict[str, dict[str, Usage]], budgets: dict[str, Any]) -> list[str]:
    """Sentences on the kernels that spill, or use more than `budgets` allow. usage: kernel -> architecture ->
    usage."""
    faults = []
    for kernel, by_architecture in sorted(usage.items()):
        for architecture, used in by_architecture.items():
            allowed = budgets.get(kernel, {}).get(architecture)
            where = f"{kernel} on sm_{architecture}"
            if used.spills:
                faults.append(f"{where} spills {used.spills} bytes")
            if allowed is None:
                faults.append(f"{where} has no budget (tools/cuda_check.py --update)")
                continue
            for what, value in used.kept().items():
                if value > allowed[what]:
                    faults.append(f"{where} uses {value} {SAID[what]}, budget {allowed[what]}")
    return faults


def loop_faults(loops: dict[str, sass.Loop | None], table: Table) -> list[str]:
    """Sentences on loops that are not there, or longer than in `table`, or whose loads are used earlier."""
    faults = []
    for kernel, loop in loops.items():
        where, allowed = f"the loop of {kernel} on sm_{LOOPS_OF}", table[kernel]
        if loop is None:
            faults.append(f"{kernel} on sm_{LOOPS_OF} has no loop with {allowed['least']} {allowed['work']}")
            continue
        if "instructions" not in allowed:
            faults.append(f"{where} has no budget (tools/cuda_check.py --update)")
            continue
        most, least = allowed["instructions"], allowed["distance"]
        if loop.instructions > most:
            faults.append(f"{where} takes {loop.instructions} instructions, budget {most}")
        if least is not None and (loop.distance is None or loop.distance < least):
            faults.append(f"{where} uses what it loads after {loop.distance} instructions, budget {least}")
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--update", action="store_true", help="rewrite both files")
    parser.add_argument("--all", action="store_true", help="compile what has not changed too")
    parser.add_argument(
        "--if-available", action="store_true", help="where there is no nvcc, say so and succeed"
    )
    options = parser.parse_args()
    nvcc = toolchain.find_nvcc()
    if nvcc is None:
        message = "cuda-check: no nvcc (set CUDA_HOME or PATH): the CUDA kernels were NOT compiled"
        if not options.if_available:
            sys.exit(message)
        print(message)
        return

    version = version_of(nvcc)
    architectures = toolchain.default_architectures(toolchain.known_architectures(nvcc))
    # Of the directories that sources include from: no other header changes their machine code.
    included = [p for name in ("include", "cuda") for p in sorted((ROOT / "csrc" / name).rglob("*.*h"))]
    headers = "\0".join([version, *(p.read_text() for p in included)])
    made_with = {"nvcc": version, "architectures": [], "sources": {}, "kernels": {}}
    if BUDGETS.exists():
        made_with = json.loads(BUDGETS.read_text())
    table: Table = json.loads(LOOPS.read_text())
    nvdisasm = find_nvdisasm(nvcc)
    if options.update and nvdisasm is None:
        sys.exit("cuda-check: --update needs nvdisasm: pip install nvidia-cuda-nvdisasm")
    sources = sorted(SOURCES.glob("*.cu"), key=lambda source: source.name != "unmask.cu")  # the longest first
    tables = {
        s.stem: {k: entry for k, entry in table.items() if k.startswith(f"{s.stem}: ")} for s in sources
    }
    hashes = {source.stem: hash_of(source, headers, tables[source.stem]) for source in sources}
    same = made_with["architectures"] == architectures and not (options.all or options.update)
    changed = [s for s in sources if not same or made_with["sources"].get(s.stem) != hashes[s.stem]]
    usage, loops = measure_all(nvcc, nvdisasm, changed, architectures, headers, tables)
    show(usage, architectures)
    show_loops(loops, table)
    if changed and nvdisasm is None:
        print("cuda-check: no nvdisasm (pip install nvidia-cuda-nvdisasm): loops were NOT looked at")
    if options.update:
        for kernel, loop in loops.items():
            table[kernel] |= {} if loop is None else loop._asdict()
        kept = {kernel: {a: u.kept() for a, u in of.items()} for kernel, of in sorted(usage.items())}
        made_with = {"nvcc": version, "architectures": architectures, "sources": hashes, "kernels": kept}
        BUDGETS.write_text(json.dumps(made_with, indent=1) + "\n")
        lines = (f" {json.dumps(kernel)}: {json.dumps(entry)}" for kernel, entry in sorted(table.items()))
        LOOPS.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    faults = faults_of(usage, made_with["kernels"]) + loop_faults(loops, table)
    if faults and made_with["nvcc"] == version:
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
