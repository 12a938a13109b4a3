"""The house: imports point one way and in no circle, and no private name is used across modules."""

import ast
import functools
import importlib
import subprocess
import sys
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGES = {
    "dparallel_ext": ROOT / "dparallel_ext",
    "dparallel": ROOT / "python" / "dparallel",
    "benchmarks": ROOT / "benchmarks",
    "tests": ROOT / "tests",
}
ABOVE = {"dparallel_ext": (), "dparallel": ("dparallel_ext",), "benchmarks": ("dparallel_ext", "dparallel")}
"""The packages of ours that each may import, itself aside."""
LAYERS = (
    ("types", "arguments", "automaton", "policies", "reference"),
    ("masks", "model_store", "packed", "backends", "whole_files"),
    ("ops",),
    ("cache",),
    ("models", "rules"),
    ("decoding",),
    ("compat", "diffusion_gemma", "speculation"),
    ("engine",),
)
"""The parts of dparallel_ext, from the ground floor up: each imports its own layer and those below."""


def name_of(package: str, file: Path) -> str:
    parts = file.relative_to(PACKAGES[package].parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


FILES = {name_of(p, file): file for p, home in PACKAGES.items() for file in sorted(home.glob("**/*.py"))}


@functools.cache
def trees() -> dict[str, ast.Module]:
    """What each of FILES says."""
    return {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in FILES.items()}


@functools.cache
def nodes() -> dict[str, list[ast.AST]]:
    """All nodes of `trees`: to walk through them takes longer than what is asked of them."""
    return {name: [*ast.walk(tree)] for name, tree in trees().items()}


def imported(module: str, nodes: Iterable[ast.AST]) -> Iterator[tuple[str, int]]:
    """(the absolute name of what is imported, line) of a module's import statements."""
    package = module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((f"{source}.{alias.name}", node.lineno) for alias in node.names)


def when_imported(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported."""
    for node in ast.iter_child_nodes(tree):
        is_typing = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if not is_typing and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield node
            yield from when_imported(node)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name not in ("_", "_C")


def test_imports_point_one_way():
    for package, allowed in ABOVE.items():
        known = {package, *allowed}
        for module in (name for name in FILES if name.partition(".")[0] == package):
            for name, line in imported(module, nodes()[module]):
                top = name.partition(".")[0]
                assert top in known or top not in PACKAGES, f"{module}:{line} imports {name}"
                compiled = top == "dparallel_ext" and "_C" in name.split(".")
                assert not compiled or package == "dparallel_ext", f"{module}:{line} imports {name}"


def test_inside_dparallel_ext_imports_point_down():
    layer = {part: number for number, parts in enumerate(LAYERS) for part in parts}
    for module in FILES:
        part = module.removeprefix("dparallel_ext.").partition(".")[0]
        if part not in layer:
            assert module == "dparallel_ext" or not module.startswith("dparallel_ext."), f"{module}: no layer"
            continue
        for name, line in imported(module, nodes()[module]):
            above = layer.get(name.removeprefix("dparallel_ext.").partition(".")[0], -1)
            fits = not name.startswith("dparallel_ext.") or above <= layer[part]
            assert fits, f"{module}:{line} imports {name}"


def test_nothing_imports_the_command_line():
    """It is on top: what it shares with programs and scripts is in modules below."""
    for module in (name for name in FILES if name.startswith(("dparallel.", "benchmarks."))):
        if not module.startswith(("dparallel.cli", "dparallel.__main__")):
            for name, line in imported(module, nodes()[module]):
                assert not name.startswith("dparallel.cli"), f"{module}:{line} imports {name}"


def test_no_modules_import_each_other():
    graph: dict[str, set[str]] = {}
    for module in FILES:
        names = {name for name, _ in imported(module, when_imported(trees()[module]))}
        names = {name for name in names if "_C" not in name.split(".")}
        graph[module] = {name if name in FILES else name.rpartition(".")[0] for name in names} & FILES.keys()
        assert module not in graph[module], f"{module} imports itself"
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other: {' <- '.join(error.args[1])}")


def private_names(nodes: Iterable[ast.AST]) -> set[str]:
    """The private names that a module defines: functions, classes, variables and fields."""
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and getattr(node.value, "id", None) in ("self", "cls"):
            found.add(node.attr)
    return {name for name in found if is_private(name)}


def used(node: ast.AST) -> str | None:
    """The name of an attribute: of x.name, or of setattr(x, "name", ...)."""
    if isinstance(node, ast.Call):
        called = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if called.endswith(("getattr", "setattr", "delattr")):
            return next((arg.value for arg in node.args[1:2] if isinstance(arg, ast.Constant)), None)
    return node.attr if isinstance(node, ast.Attribute) else None


def test_private_names_stay_in_their_module():
    names = {module: private_names(every) for module, every in nodes().items()}
    everywhere = set().union(*names.values())
    wrong = []
    for module, every in nodes().items():
        for name, line in imported(module, every):
            last = name.rpartition(".")[2]
            if name.partition(".")[0] in PACKAGES and is_private(last):
                wrong.append(f"{module}:{line} imports {name}")
        foreign = everywhere - names[module]
        for node in every:
            if used(node) in foreign:
                wrong.append(f"{module}:{node.lineno} uses {ast.unparse(node)}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(("old", "new"), [("trainer", "training.trainer"), ("proof", "toy.study")])
def test_a_module_that_moved_says_where_to(old: str, new: str):
    for statement in (f"dparallel.{old}", f"dparallel.{old}.anything"):
        with pytest.raises(ImportError, match=f"dparallel.{old} is dparallel.{new} now"):
            importlib.import_module(statement)
    importlib.import_module(f"dparallel.{new}")
    ran = subprocess.run([sys.executable, "-m", f"dparallel.{old}"], capture_output=True, text=True)
    assert ran.returncode == 1
    assert f"dparallel.{old} is dparallel.{new} now" in ran.stderr


def test_decoding_imports_no_compiler():
    """torch._dynamo takes as long to import as torch; sympy and transformers are as unneeded."""
    program = """
import sys
import dparallel_ext as dx
from dparallel import registry
model, tokenizer = registry.load()
dx.decode(model, [tokenizer.encode("7 + 5 =").ids], gen_length=32)
print({"torch._dynamo", "sympy", "transformers"} & set(sys.modules))
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.stdout == "set()\n", ran.stderr
