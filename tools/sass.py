"""Reads machine code as nvdisasm prints it, for the cost of a turn of a kernel's loop."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field
from typing import NamedTuple


class Instruction(NamedTuple):
    name: str
    """LDG.E.128"""
    operands: list[str]
    target: str | None
    """The label of a branch."""

    @property
    def kind(self) -> str:
        """LDG"""
        return self.name.partition(".")[0]


@dataclass
class Kernel:
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    """Label -> index of the instruction behind it."""


class Loop(NamedTuple):
    instructions: int
    """Of a turn, if no branch within it is taken."""
    distance: int | None
    """The fewest instructions between a load and the first that reads what it loaded. Loads of global memory
    count alone where there are any; None: nothing is loaded into registers."""


_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_LABEL = re.compile(r"(\.L\w+):")
_SECTION = re.compile(r"\s*\.section\s+\.text\.(\w+)")
_REGISTER = re.compile(r"(?<![\w.])R(\d+)((?:\.\w+)*)")
_WIDTHS = {"64": 2, "128": 4}
_ENDS = ("BRA", "BRX", "EXIT", "RET")
_GLOBAL, _SHARED = ("LDG", "LD"), ("LDS", "LDSM")
_WITHOUT_RESULT = ("ST", "STG", "STS", "STL", "RED", "LDGSTS", *_ENDS)
_MULTIPLIED = {1: 4, 2: 2, 3: 4}
"""The registers of HMMA's operands: 16 x 16, 16 x 8, and the sums of 16 x 8."""


def kernels(text: str) -> dict[str, Kernel]:
    """Mangled name -> code, of `nvdisasm --print-code`."""
    by_name: dict[str, Kernel] = {}
    kernel = Kernel()
    for line in text.splitlines():
        if section := _SECTION.match(line):
            kernel = by_name[section[1]] = Kernel()
        elif label := _LABEL.match(line):
            kernel.labels[label[1]] = len(kernel.code)
        elif instruction := _INSTRUCTION.match(line):
            name, rest = instruction.groups()
            target = re.search(r"`\((\.L\w+)\)", rest)
            operands = [operand for part in rest.split(",") if (operand := part.strip())]
            kernel.code.append(Instruction(name, operands, target[1] if target else None))
    return by_name


def innermost(kernel: Kernel) -> list[tuple[int, int]]:
    """[first, last] instruction of each loop that holds no other; the last one is the branch back."""
    ends: dict[int, int] = {}
    for at, instruction in enumerate(kernel.code):
        first = kernel.labels.get(instruction.target or "", at + 1)
        if instruction.kind == "BRA" and first <= at:
            ends[first] = max(at, ends.get(first, 0))
    loops = list(ends.items())
    return [
        (first, last)
        for first, last in loops
        if not any(first <= a and b <= last and (a, b) != (first, last) for a, b in loops)
    ]


def straight(kernel: Kernel) -> list[tuple[int, int]]:
    """[first, last] instruction of each stretch without a branch or a label, such as an unrolled loop."""
    starts = {0, *kernel.labels.values()}
    starts |= {at + 1 for at, instruction in enumerate(kernel.code) if instruction.kind in _ENDS}
    ordered = sorted(starts | {len(kernel.code)})
    return [(first, end - 1) for first, end in itertools.pairwise(ordered)]


def loop_of(kernel: Kernel, work: str, least: int) -> Loop | None:
    """The shortest loop with at least so many instructions whose name begins with `work`; where there is
    none, the shortest stretch of straight code, which is an unrolled loop."""
    for turns, again in ((innermost(kernel), True), (straight(kernel), False)):
        candidates = [kernel.code[first : last + 1] for first, last in turns]
        candidates = [turn for turn in candidates if sum(i.name.startswith(work) for i in turn) >= least]
        if candidates:
            turn = min(candidates, key=len)
            return Loop(len(turn), distance(turn, again))
    return None


def distance(turn: list[Instruction], again: bool) -> int | None:
    """`Loop.distance`; again: the turn follows itself."""
    of_global = [at for at, instruction in enumerate(turn) if instruction.kind in _GLOBAL]
    loads = of_global or [at for at, instruction in enumerate(turn) if instruction.kind in _SHARED]
    distances = []
    for load in loads:
        registers = written(turn[load])
        after = turn[load + 1 :] + (turn[:load] if again else [])
        distances += [n for n, instruction in enumerate(after) if registers & read(instruction)][:1]
    return min(distances, default=None)


def written(load: Instruction) -> set[int]:
    """The registers that a load writes."""
    register = _REGISTER.match(load.operands[0])
    if register is None:
        return set()  # RZ
    suffixes = load.name.split(".")
    if load.kind == "LDSM":
        width = int(suffixes[-1]) if suffixes[-1].isdigit() else 1
    else:
        width = next((_WIDTHS[s] for s in suffixes if s in _WIDTHS), 1)
    return set(range(int(register[1]), int(register[1]) + width))


def read(instruction: Instruction) -> set[int]:
    """The registers that an instruction reads."""
    stores = instruction.kind in _WITHOUT_RESULT
    registers = set()
    for place, operand in enumerate(instruction.operands):
        if place == 0 and not stores:
            continue
        # An address has its own width, data that are stored have the instruction's.
        suffixed = instruction.name if stores and "[" not in operand else ""
        for register, own in _REGISTER.findall(operand):
            width = next((_WIDTHS[s] for s in f"{own}.{suffixed}".split(".") if s in _WIDTHS), 1)
            if instruction.kind == "HMMA":
                width = _MULTIPLIED[place]
            registers |= set(range(int(register), int(register) + width))
    return registers
