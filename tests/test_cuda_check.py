"""What tools/cuda_check.py makes of machine code: the loop of a kernel, and that a worse one is noticed."""

from __future__ import annotations

import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import cuda_check
import sass

NAME = "_ZN3sumI8BFloat16Li8EEEvPf"
CODE = f"""
	.section	.text.{NAME},"ax",@progbits
{NAME}:
.text.{NAME}:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0090*/               @P0 BRA `(.L_x_1) ;
.L_x_2:
        /*00d0*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*00e0*/                   IADD3 R0, R0, 0x80, RZ ;
        /*00f0*/                   ISETP.GE.AND P0, PT, R0, UR6, PT ;
        /*0100*/                   IADD3 R2, P1, R2, 0x800, RZ ;
        /*0110*/                   IADD3.X R3, RZ, R3, RZ, P1, !PT ;
        /*0120*/                   FMUL R7, R6, -R7 ;
        /*0130*/                   FFMA R4, R4, R5, R7 ;
        /*0140*/                   FADD R11, R4, R11 ;
        /*0150*/              @!P0 BRA `(.L_x_2) ;
.L_x_1:
        /*0170*/                   STG.E desc[UR4][R8.64], R11 ;
        /*0180*/                   EXIT ;
.L_x_3:
        /*0190*/                   BRA `(.L_x_3);
        /*01a0*/                   NOP;
"""
"""As nvdisasm prints it."""


def loop(code: str, work: str = "FFMA", least: int = 1) -> sass.Loop | None:
    return sass.loop_of(sass.kernels(code)[NAME], work, least)


def without(line: str) -> str:
    (found,) = (given for given in CODE.splitlines(keepends=True) if line in given)
    return CODE.replace(found, "")


def moved(line: str, behind: str) -> str:
    """The code with one line behind another."""
    (found,) = (given for given in CODE.splitlines(keepends=True) if line in given)
    (place,) = (given for given in CODE.splitlines(keepends=True) if behind in given)
    return CODE.replace(found, "").replace(place, place + found)


def test_a_loop_and_its_loads() -> None:
    assert loop(CODE) == (9, 4)
    assert loop(CODE, "LDG.E.128") == (9, 4)
    assert loop(CODE, "FFMA", 2) is None
    assert loop(moved("FMUL", behind="LDG.E")) == (9, 0)
    # Used in the next turn, or, of an unrolled loop, not at all.
    assert loop(moved("LDG.E", behind="FADD")) == (9, 5)
    assert loop(without("@!P0 BRA")) == (8, 4)
    assert loop(moved("LDG.E", behind="FADD").replace("@!P0 BRA `(.L_x_2)", "NOP")) == (9, None)


@pytest.mark.parametrize(
    ("load", "use", "reads"),
    [
        ("LDS.128 R4, [R30]", "FADD R9, R8, R3", False),
        ("LDS.128 R4, [R30]", "FADD R9, R8, |R7|", True),
        ("LDS.64 R4, [R30]", "FADD R9, R8, -R6", False),
        ("LDS R4, [R30]", "IMAD.WIDE R8, R9, 0x2, R4.reuse", True),
        ("LDS R7, [R30]", "STG.E desc[UR4][R6.64+0x8], R20", True),
        ("LDS R5, [R30]", "LDS R9, [UR5]", False),
        ("LDS R7, [R30]", "STS.64 [R20], R6", True),
        ("LDS R7, [R30]", "STS [R20], R6", False),
        ("LDS R4, [R30]", "MOV R4, R20", False),
        ("LDSM.16.M88.2 R2, [R30]", "HMMA.16816.F32.BF16 R12, R0, R20, R12", True),  # R0 ... R3
        ("LDSM.16.M88.4 R4, [R30]", "HMMA.16816.F32.BF16 R12, R0, R20, R12", False),
        ("LDSM.16.M88.4 R18, [R30]", "HMMA.16816.F32.BF16 R12, R0, R20, R12", True),
    ],
)
def test_what_reads_a_register(load: str, use: str, reads: bool) -> None:
    def instruction(text: str) -> sass.Instruction:
        name, _, operands = text.partition(" ")
        return sass.Instruction(name, operands.split(", "), None)

    turn = [instruction(text) for text in (load, "NOP", use)]
    of_global = instruction("LDG.E R40, desc[UR4][R50.64]")
    assert sass.distance(turn, again=False) == (1 if reads else None)
    assert sass.distance([*turn, of_global, instruction("MOV R1, R40")], again=False) == 0


LONGER = ("FADD R11, R4, R11", "FADD R11, R4, R11 ;\n        /*0145*/    NOP ")


def test_of_two_loops_the_inner_one_counts_and_of_equals_the_shortest() -> None:
    outer = CODE.replace("        /*0170*/", "        /*0160*/    @!P2 BRA `(.L_x_0) ;\n        /*0170*/")
    outer = outer.replace("        /*0090*/", ".L_x_0:\n        /*0090*/")
    assert loop(outer) == (9, 4)
    body = CODE.partition(".L_x_2:\n")[2].partition(".L_x_1:")[0].replace("L_x_2", "L_x_9")
    longer = body.replace(*LONGER)
    for first, second in ((body, longer), (longer, body)):
        second = second.replace("L_x_9", "L_x_8")
        both = f"{CODE.partition('.L_x_2:')[0]}.L_x_9:\n{first}.L_x_8:\n{second}.L_x_1:\n"
        assert loop(both) == (9, 4)


def test_a_worse_loop_is_a_fault() -> None:
    name = "sum: sum<BFloat16, 8>"
    entry = {"work": "FFMA", "least": 1, "elements": 4, "of": "numbers"}
    assert cuda_check.short_name(NAME) == name.partition(": ")[2]

    def faults(found: sass.Loop | None, **held: int | None) -> list[str]:
        return cuda_check.loop_faults({name: found}, {name: {**entry, **held}})

    held = {"instructions": 9, "distance": 4}
    assert faults(loop(CODE), **held) == []
    assert faults(loop(without("IADD3 R0")), **held) == [
        f"the loop of {name} on sm_90a uses what it loads after 3 instructions, budget 4"
    ]
    assert faults(loop(CODE.replace(*LONGER)), **held) == [
        f"the loop of {name} on sm_90a takes 10 instructions, budget 9"
    ]
    assert faults(sass.Loop(9, None), **held)
    assert faults(sass.Loop(9, 0), instructions=9, distance=None) == []
    assert faults(None, **held) == [f"{name} on sm_90a has no loop with 1 FFMA"]
    assert "has no budget" in faults(loop(CODE))[0]


def test_a_report_says_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_check.toolchain, "output_of", lambda *command: CODE)
    table = {
        "sum: sum<BFloat16, 8>": {"work": "FFMA", "least": 1},
        "sum: other": {"work": "FFMA", "least": 1},
        "sum: sum<Float32, 4>": {"work": "FFMA", "least": 1},
    }
    report = cuda_check.loops_of(cuda_check.ROOT, "nvdisasm", table)
    assert cuda_check.parse_loops(f"ptxas info\n{report}") == {"sum<BFloat16, 8>": sass.Loop(9, 4)}


def test_every_loop_in_the_table_has_its_numbers() -> None:
    table = cuda_check.json.loads(cuda_check.LOOPS.read_text())
    budgets = cuda_check.json.loads(cuda_check.BUDGETS.read_text())
    assert table
    for kernel, entry in table.items():
        assert kernel in budgets["kernels"]
        assert entry["instructions"] >= entry["least"]
        assert entry["elements"] > 0
