"""README, docs and examples run as they stand.

Two things stand in for what no test has: a path such as path/to/Qwen3-8B is that of a model that ships, and
without a GPU "cuda" is "cpu". Blocks of a page run in order, in one namespace. Commands are parsed, not run.
"""

from __future__ import annotations

import functools
import inspect
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import griffe
import pytest
import torch
import typer
from conftest import ROOT
from dparallel import cli, registry
from server_here import serving

import dparallel_ext as dx

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
STAND_INS = {"LLaDA-8B-Instruct": "builtin:teacher", "Qwen3-8B": "builtin:causal"}
KEY = "a key of the file"


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def named(pages: list[Path], language: str) -> list[Any]:
    return [pytest.param(p, id=str(p.relative_to(ROOT))) for p in pages if blocks(p, language)]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "path" / "to").mkdir(parents=True)
    for name, builtin in STAND_INS.items():
        (tmp_path / "path" / "to" / name).symlink_to(registry.directory_of(builtin))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", named(PAGES, "python"))
def test_code_runs(page: Path, here: Path) -> None:
    names: dict[str, Any] = {"__name__": page.stem}
    code = "\n".join(blocks(page, "python"))
    if not torch.cuda.is_available():
        code = code.replace('device="cuda"', 'device="cpu"')
    # Without this file's annotations as strings, which a page's dataclasses would look up in a module.
    compiled = functools.partial(compile, filename=page.name, mode="exec", dont_inherit=True)
    if "http://127.0.0.1:8000" in code:
        path = "path/to/LLaDA-8B-Instruct"
        with serving(registry.load("builtin:teacher"), name=path, keys=(KEY,), max_length=512) as running:
            exec(compiled(code.replace("http://127.0.0.1:8000", running.url)), names)
    else:
        exec(compiled(code), names)


@pytest.mark.parametrize("page", named(PAGES, "bash"))
def test_commands_are_there(page: Path) -> None:
    """Each `dparallel` command with options that it has and values of their types, each `make` target."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    program = typer.main.get_command(cli.app)
    looked = 0
    for line in "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["make"]:
            assert {word for word in words[1:] if "=" not in word} <= targets, line
        elif words[:1] == ["dparallel"]:
            context = program.make_context("dparallel", [words[1]])
            command = program.get_command(context, words[1])  # type: ignore[attr-defined]
            assert command is not None, line
            command.make_context(words[1], words[2:], parent=context)  # raises for what it does not know
        elif words:
            assert words[0] in ("pip", "lm_eval", "python"), line
        looked += bool(words)
    assert looked


def test_links_of_the_readme_lead_somewhere() -> None:
    """Those of the docs are looked at by `make docs`."""
    for file in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md"):
        links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", file.read_text())
        assert links
        for link in links:
            if not link.startswith("http"):
                assert (file.parent / link).exists(), f"{file.name}: {link}"


def test_errors_of_the_troubleshooting_are_said() -> None:
    """Each text there is one that the code says, "..." being what it fills in."""
    sources = [*ROOT.glob("dparallel_ext/**/*.py"), *ROOT.glob("python/**/*.py"), *ROOT.glob("tools/*.py")]
    said = " ".join(re.sub(r'"\s*\n\s*f?"', "", file.read_text()) for file in sources)
    texts = re.findall(r"^\*\*.*?`\.?\*\*", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    quoted = [quote for text in texts for quote in re.findall(r"`([^`]+)`", text)]
    assert len(quoted) > 12
    for quote in quoted:
        assert all(piece.strip() in said for piece in quote.split("...")), quote


EXAMPLES: dict[str, list[Any]] = {
    "custom_rule": [4],
    "decode": [],
    "kernels": [],
    "ragged_batch": [],
    "serve_and_ask": [],
    "speculate": [4],
    "train_a_student": [Path("out"), 8, 1],
    "wrap_transformers": [],
}
"""What its `main` is given, so that it takes a second or so."""


def test_every_example_is_run() -> None:
    found = {file.stem: file for file in (ROOT / "examples").glob("*.py")}
    assert set(found) == set(EXAMPLES)
    for file in found.values():
        assert len(file.read_text().splitlines()) < 40, file.name


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_examples_run(
    name: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = ROOT / "examples" / f"{name}.py"
    assert 'if __name__ == "__main__":\n    main(' in file.read_text()
    module = type(sys)(name)
    monkeypatch.setitem(sys.modules, name, module)  # where dataclasses look for the names of annotations
    vars(module).update(runpy.run_path(str(file), run_name=name))
    # Commands of the example run here, where torch and transformers are imported already.
    monkeypatch.setattr("subprocess.run", lambda words, check: cli.app(words[3:], standalone_mode=False))
    inspect.signature(vars(module)["main"]).bind()  # it runs as it stands, without arguments
    vars(module)["main"](*EXAMPLES[name])
    assert capsys.readouterr().out


def test_the_reference_has_every_public_name_once() -> None:
    """And what it shows under a name is the function, not the module of that name."""
    loader = griffe.GriffeLoader(search_paths=[ROOT, ROOT / "python"])
    for package in ("dparallel_ext", "dparallel"):
        loader.load(package)
    loader.resolve_aliases()

    def target(name: str) -> griffe.Object | griffe.Alias:
        found = loader.modules_collection[name]
        return found.final_target if found.is_alias else found

    pages = "\n".join(page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md"))
    shown = [target(name) for name in re.findall(r"^::: (\S+)", pages, re.MULTILINE)]
    paths = [each.path for each in shown]
    assert len(paths) == len(set(paths))
    modules = {each.path for each in shown if each.is_module}
    of_ext = {f"dparallel_ext.{name}" for name in ("compat", "diffusion_gemma", "policies")}
    assert modules == {*of_ext, "dparallel.likelihood", "dparallel.training.trainer"}
    for name in dx.__all__:
        public = getattr(dx, name)
        if not inspect.ismodule(public) and name not in ("build_info", "simd_level"):  # index.md has these
            assert f"{public.__module__}.{name}" in paths, name


def test_environment_variables_are_documented() -> None:
    files = [*ROOT.glob("dparallel_ext/**/*.py"), *ROOT.glob("python/**/*.py"), *ROOT.glob("tools/*.py")]
    files += [ROOT / "setup.py", *ROOT.glob("csrc/**/*.cpp")]
    read = r'(?:getenv\(|environ\.get\(|environ\[|^[A-Z_]+ = )"(DPARALLEL_\w+)"'
    names = {name for file in files for name in re.findall(read, file.read_text(), re.MULTILINE)}
    assert names == {"DPARALLEL_API_KEY", "DPARALLEL_CUDA", "DPARALLEL_SIMD"}
    text = "".join(page.read_text() for page in PAGES)
    assert all(name in text for name in names)
