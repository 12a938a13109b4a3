"""What the command line refuses and warns of, each in a line."""

from __future__ import annotations

import errno
import importlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer
from dparallel import cli, live, plots, registry
from dparallel.cli import app
from dparallel.console import plain_errors
from dparallel.toy import demo, study
from rich.console import Console
from test_cli import PROMPT, RECIPES, run
from typer.testing import CliRunner

HERE = str(Path(__file__).parent)


NUMBERS: dict[tuple[str, ...], dict[str, tuple[object, ...]]] = {
    ("decode", "x", "--model", "builtin:student"): {
        "gen-length": (-1,),
        "block-length": (-1, 0),
        "temperature": (-0.1, "nan", "inf"),
        "top-p": (-0.1, 1.1, "nan", "inf"),
        "top-k": (-1,),
        "seed": (2**63, -(2**63) - 1),
        "mask-id": (-1, 10**20),
        "policy": (
            "confidence:nan",
            "entropy:-1",
            "margin:inf",
            "quota:0",
            "quota:1.5",
            "factor:nan",
            "steps:0",
        ),
    },
    ("demo",): {"problems": (-1, 0, 10**20)},
    ("evaluate",): {
        "problems": (-1, 0, 10**20),
        "batch": (-1, 0, 10**20),
        "block-length": (-1, 0),
        "mask-id": (-1, 10**20),
        "policy": ("steps:-1", "entropy_bound:nan"),
    },
    ("train", "out"): {
        **dict.fromkeys(("steps", "batch", "width", "layers", "heads", "mlp-width", "save-every"), (-1, 0)),
        "evaluate": (-1,),
        "seed": (-1, 10**20),
    },
    ("trajectories", "out", "--data", "builtin:3"): {
        "gen-length": (-1, 0),
        "block-length": (-1, 0),
        "shard": (-1, 0),
        "batch": (-1, 0),
        "mask-id": (-1, 10**20),
        "data": ("builtin:-1", "builtin:0", f"builtin:{10**20}", "builtin:x"),
        "policy": ("confidence:inf", "steps:0"),
    },
    ("distill", str(RECIPES / "builtin.yaml"), "--dry-run"): {"processes": (-1, 0)},
    ("filter", "out", "--answers", "nowhere"): {
        **dict.fromkeys(("steps", "batch", "hidden"), (-1, 0, 10**20)),
        **dict.fromkeys(("tau", "held-out", "lr"), (0, 1, "nan")),
        "seed": (-1, 10**20),
    },
    ("drafter", "builtin:causal", "out"): {
        **dict.fromkeys(("steps", "batch", "anchors", "layers", "gen-length", "save-every"), (-1, 0, 10**20)),
        "block": (-1, 1, 10**20),
        "evaluate": (-1, 10**20),
        "seed": (-1, 10**20),
        "mask-id": (-1, 10**20),
        "taps": ("x", "1,"),
        "temperature": (-1, "nan"),
        **dict.fromkeys(("kind", "loss"), ("x",)),
    },
}
"""Numbers outside their meaning, by command and option; those of `serve` are in test_serve."""


@pytest.mark.parametrize("command", NUMBERS, ids=lambda command: command[0])
def test_numbers_outside_their_meaning_are_named(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    for option, values in NUMBERS[command].items():
        for value in values:
            text = run(*command, f"--{option}", value, code=2)
            assert text.startswith(f"error: {option.replace('-', '_')}: expected"), (option, value, text)
            assert text.count("\n") == 1
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("decode",), "prompt: expected one"),
        (("decode", "x", "--policy", "entropy"), "policy: expected"),
        (("decode", "x", "--model", "nowhere"), "model: 'nowhere' is neither"),
        (("decode", "x\udcff"), "prompt: expected text in utf-8, got 'x\\udcff'"),
        (("decode", "x", "--suffix", "\udcff"), "suffix: expected text in utf-8, got '\\udcff'"),
        (("decode", "x", "--cache", "all"), "cache: expected one of"),
        (
            ("decode", "x", "--cache", "block"),
            'cache: expected "none", "prefix" or "dual", since LLaDA is not',
        ),
        (("decode", "x", "--gen-length", "-1"), "gen_length: expected a whole number >= 0, got -1"),
        (("decode", "x", "--infill"), "prompt: expected a mask token, [MASK]"),
        (("decode", "x", "--suffix", "y", "--gen-length", "0"), "gen_length: expected a whole number >= 1"),
        (("decode", "x", "--device", "gpu"), "device: expected cpu, cuda or cuda:N, got 'gpu'"),
        (("decode", "x", "--device", "meta"), "device: expected cpu, cuda or cuda:N, got 'meta'"),
        (("decode", "x", "--dtype", "int8"), "dtype: expected auto, float32, bfloat16, float16, got 'int8'"),
        (
            ("evaluate", "--dtype", "float64"),
            "dtype: expected auto, float32, bfloat16, float16, got 'float64'",
        ),
        (("trajectories", "out", "--data", "builtin:3", "--dtype", ""), "dtype: expected auto, float32, bf"),
        (("drafter", "builtin:causal", "out", "--dtype", "f16"), "dtype: expected auto, float32, bf"),
        (("decode", "x", "--device", "cpu:1"), "device: expected cpu, cuda or cuda:N, got 'cpu:1'"),
        (("decode", "x", "--model", "builtin:causal", "--drafter", ""), "drafter: expected a Drafter"),
        *(
            (
                (*command, "--model", "builtin:causal", "--drafter", "jump_forward"),
                "drafter: jump_forward drafts",
            )
            for command in (("decode", "x"), ("evaluate", "--problems", "1"), ("tune", "out.json"))
        ),
        (
            ("decode", "x", "--model", "builtin:causal", "--draft-size", "4"),
            "draft_size: belongs to --drafter",
        ),
        (("serve", "--model", "builtin:causal", "--draft-size", "4"), "draft_size: belongs to --drafter"),
        (
            ("demo", "--model", "builtin:student", "--model", "nowhere"),
            "model: 'nowhere' is neither",
        ),
        (("trajectories", "out", "--data", "builtin:3", "--gen-length", "0"), "gen_length: expected"),
        (("decode", "x", "--temperature", "-1"), "temperature: expected"),
        (("decode", "x", "--top-p", "2"), "top_p: expected"),
        (("decode", "x", "--top-k", "-1"), "top_k: expected"),
        (("decode", "--file", "nowhere.txt"), "nowhere.txt"),
        (("evaluate", "--problems", "0"), "problems: expected"),
        (("evaluate", "--policy", "x"), "policy: expected"),
        (("trajectories", "out", "--data", "nowhere.jsonl"), "data: no file"),
        (("trajectories", "out", "--data", "builtin:3", "--checker", "x"), "checker: expected"),
        (("trajectories", "out", "--data", "builtin:3", "--checker", ""), "checker: expected"),
        (("filter", "out", "--answers", "nowhere"), "answers: expected the directory of a run"),
        (("filter", ".", "--answers", "nowhere"), "out: . is a directory"),
        (("drafter", "nowhere", "out"), "target: 'nowhere' is neither"),
        (("drafter", "builtin:teacher", "out"), "target: LLaDA is a diffusion model"),
        (("distill", "nowhere.yaml"), "recipe: no file"),
        (("distill", str(RECIPES / "builtin.yaml")), "answers, out: both"),
        (("merge", "nowhere", "out"), "adapter: no adapter_config.json"),
        (("decode", "x", "--policy", "confidence:90"), "threshold: expected a number >= 0 and <= 1"),
        (("decode", "x", "--policy", "confidence:-3"), "threshold: expected a number >= 0 and <= 1"),
        (("decode", "x", "--gen-length", "1000"), "1001 tokens, but builtin:teacher was trained on 256"),
        (("decode", "x", "--gen-length", "20000"), "but builtin:teacher was trained on 256"),
        (("decode", "x", "--seed", str(2**63)), "seed: expected an integer"),
        (("decode", "--file", HERE), f"file: {HERE}: Is a directory"),
        (("decode", "x", "--batch", "0"), "batch: expected a whole number >= 1"),
        (("decode", "--file", "/usr/bin/env"), "file: /usr/bin/env is not UTF-8 text"),
        (("evaluate", "--json", "x", "--plot", "./x"), "plot: expected another file than --json's, got x"),
        (("evaluate", "--drafter", "ngram"), "drafter: builtin:teacher is a diffusion model"),
        (("evaluate", "--model", "builtin:causal", "--policy", "one"), "policy: belongs to masked diffusion"),
        (
            ("evaluate", "--report", "--problems", "1"),
            "report: builtin:teacher is a diffusion model, which takes none",
        ),
        (
            ("tune", "out.json", "--draft-size", "3", "--problems", "1"),
            "draft_size: is tuned for an autoregressive model, and builtin:teacher is a diffusion model",
        ),
        (
            ("tune", "out.json", "--model", "builtin:causal", "--tolerance", "2", "--problems", "1"),
            "tolerance: belongs to masked diffusion",
        ),
        (("evaluate", "--batch", "0"), "batch: expected a whole number >= 1"),
        (("evaluate", "--plot", HERE), "plot: "),
        (
            ("evaluate", "--problems", 1, "--plot", "x.pdf"),
            "plot: is a PNG, so expected a name with .png, got x.pdf",
        ),
        (("evaluate", "--plot", f"{__file__}/x.png"), f"plot: {__file__} is not a directory"),
        (("evaluate", "--json", "/proc/nowhere/x.json"), "json: /proc cannot be written to"),
        (("demo", "--out", __file__), f"out: {__file__} is not a directory"),
        (("demo", "--problems", "-1"), "problems: expected a whole number >= 1"),
        (("train", __file__), f"out: {__file__} is not a directory"),
        (("train", "out", "--seed", str(10**30)), "seed: expected a whole number <= 1099511627775"),
        (("train", "out", "--heads", "5"), "heads: expected a divisor of width 192"),
        (("trajectories", __file__, "--data", "builtin:3"), f"out: {__file__} is not a directory"),
        (("distill", HERE), f"recipe: {HERE}: Is a directory"),
        (("distill", str(RECIPES / "builtin.yaml"), "--dry-run", "--processes", "0"), "processes: expected"),
        (("merge", "nowhere", f"{__file__}/out"), "out: "),
    ],
)
def test_bad_input_is_one_line(
    args: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    text = run(*args, code=2)
    assert said in text
    assert text.startswith("error: ")
    assert text.count("\n") == 1
    assert not list(tmp_path.iterdir())  # nor is anything left behind


def test_what_the_tokenizer_does_not_know_and_an_empty_response_are_said():
    result = CliRunner().invoke(app, ["decode", "hello there sam", "--json"])
    assert json.loads(result.stdout)["response"] == ""
    assert "builtin:teacher has no token for 'hello', 'there' of the prompt" in result.stderr
    assert "the response is empty" in result.stderr
    result = CliRunner().invoke(app, ["decode", PROMPT, PROMPT, "--suffix", "hello sam"])
    assert result.stderr.count("builtin:teacher has no token for 'hello' of the suffix") == 1
    assert "warning" not in CliRunner().invoke(app, ["decode", PROMPT]).stderr


def test_a_prompt_that_names_a_file_is_warned_of(tmp_path: Path):
    (tmp_path / "p.txt").write_text(PROMPT)
    result = CliRunner().invoke(app, ["decode", str(tmp_path / "p.txt"), "--gen-length", "1"])
    assert f"'{tmp_path / 'p.txt'}' names a file; --file decodes its prompts" in result.stderr
    assert " in 1 pass, " in result.stderr


def test_missing_packages_and_output_that_nobody_reads(monkeypatch: pytest.MonkeyPatch):
    def raising(error: Exception) -> Callable[..., None]:
        def run(*_: object, **__: object) -> None:
            raise error

        return run

    missing = ModuleNotFoundError("No module named 'peft'", name="peft")
    monkeypatch.setattr("dparallel.training.adapters.merge", raising(missing))
    assert run("merge", "a", "b", code=2) == (
        'error: no peft; pip install "dparallel-ext[cli,train]" installs what this command needs\n'
    )
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pyarrow", None)
        said = run("decode", "--file", "prompts.parquet", code=2)  # of another extra than the command's own
        assert 'pip install "dparallel-ext[cli,train]" installs' in said
    other = (
        ImportError("You need bitsandbytes"),
        ModuleNotFoundError("You need 'deepspeed>=1'", name="You need"),
    )
    for error in other:  # an optional package of another library's, which says how to install it
        monkeypatch.setattr("dparallel.training.adapters.merge", raising(error))
        assert run("merge", "a", "b", code=2) == f"error: {error}\n"
    with pytest.raises(BrokenPipeError), plain_errors():
        raise BrokenPipeError
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.delitem(sys.modules, "dparallel.cli")
    with pytest.raises(SystemExit, match=r'error: no typer; pip install "dparallel-ext\[cli\]"'):
        importlib.import_module("dparallel.cli")


class Full(io.BytesIO):
    """A disk without room."""

    def write(self, data: object, /) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_output_that_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A full disk is one line; what the encoding lacks is written as Python writes it."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    for args in (["info"], ["--help"]):
        monkeypatch.setattr(sys, "argv", ["dparallel", *args])
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(Full(), "utf-8"))
        with pytest.raises(SystemExit, match="2"):
            cli.main()
        assert capsys.readouterr().err == "error: output: No space left on device\n"
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii"))
    monkeypatch.setattr(
        sys, "argv", ["dparallel", "decode", "--stream", "--model", "builtin:student", PROMPT]
    )
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    sys.stdout.flush()
    assert live.HIDDEN.encode("ascii", "backslashreplace") in written.getvalue()


def test_the_demo_of_a_model_that_no_drafter_is_made_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "response_by_pass", lambda *_, **__: None)
    demo.run([registry.VERIFIER], problems=1, out=tmp_path, console=Console(file=io.StringIO()))
    rows = json.loads((tmp_path / "table.json").read_text())
    assert [row["policy"] for row in rows] == ["plain", "ngram"]


def test_a_warning_is_one_line_without_its_place(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setattr(sys, "argv", ["dparallel", "--version"])
    with pytest.raises(SystemExit):
        cli.main()
    said = warnings.formatwarning("gen_length: 600\n positions", UserWarning, "complete.py", 59)
    assert said == "warning: gen_length: 600 positions\n"


def test_ctrl_c_says_what_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    runs = ("trajectories.generate", "drafters.run", "distill.run", "filter.run", "adapters.merge")
    for name in ("toy.train.train", "toy.study.run", "sweep.sweep", *(f"training.{each}" for each in runs)):
        monkeypatch.setattr(f"dparallel.{name}", interrupted)
    out = tmp_path / "out"
    recipe = ("distill", RECIPES / "builtin.yaml", "--answers", "x", "--out", out)
    commands = (
        ("train", out),
        ("trajectories", out, "--data", "builtin:2"),
        ("drafter", "builtin:causal", out),
        recipe,
    )
    nothing = f"interrupted: {out} keeps nothing yet; the same command begins anew\n"
    assert [run(*command, code=130) for command in commands] == [nothing] * 4
    with pytest.raises(typer.Exit):
        study.main(out)
    assert capsys.readouterr().err == nothing
    assert run("merge", "adapter", out, code=130) == "interrupted: the same command begins anew\n"
    out.mkdir()
    for number in (1, 2):
        (out / f"answers-0000{number}.safetensors").touch()
        (out / f"part-0000{number}.parquet").touch()
    (out / "part-00003.parquet.77.partial").touch()

    def keeps(part: str, *command: object) -> None:
        said = run(*command, code=130)
        assert said == f"interrupted: {out} keeps {part}; the same command goes on from there\n"

    keeps("2 files of answers", "drafter", "builtin:causal", out)
    keeps("2 shards", "trajectories", out, "--data", "builtin:2")
    torch.save({"step": 500}, out / "state.pt")
    keeps("step 500", "drafter", "builtin:causal", out)
    keeps("step 500", "train", out)
    for step, saved in ((20, 20), (30, 0)):  # the saving of the latter was interrupted
        (out / f"checkpoint-{step}").mkdir()
        (out / f"checkpoint-{step}" / "trainer_state.json").write_text(f'{{"global_step": {saved}}}')
    keeps("checkpoint-20", *recipe)
    (out / "state.pt").write_bytes(b"cut off")
    keeps("2 files of answers", "drafter", "builtin:causal", out)

    file = tmp_path / "file"
    anew = f"interrupted: {file} is as it was; the same command begins anew\n"
    assert run("filter", file, "--answers", out, code=130) == anew
    assert "--json FILE" in run("evaluate", code=130)
    kept = f"{file} keeps the measurements that are complete; --resume goes on behind them"
    assert run("evaluate", "--json", file, code=130) == f"interrupted: {kept}\n"
    monkeypatch.setenv("RANK", "1")
    assert run("train", out, code=130) == ""


def test_ctrl_c_while_torch_is_imported_ends_quietly(tmp_path: Path):
    # In place of torch: it catches what the signal raises, as parts of an import may.
    (tmp_path / "torch.py").write_text(
        "import time\n"
        "print('importing', flush=True)\n"
        "try:\n    time.sleep(60)\n"
        "except BaseException:\n    pass\n"
    )
    search = os.pathsep.join([str(tmp_path), *sys.path])
    process = subprocess.Popen(
        [sys.executable, "-m", "dparallel", "info"],
        env={**os.environ, "PYTHONPATH": search},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background ignores it
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == 130


def test_a_refused_run_does_not_stand_in_the_way_of_the_next(tmp_path: Path):
    data = ("--data", "builtin:2", "--policy", "entropy:2")
    causal = ("--model", "builtin:causal")
    for wrong in (("--cache", "block"), ("--gen-length", "300"), ("--policy", "steps:3"), causal):
        text = run("trajectories", tmp_path / "out", *data, *wrong, code=2)
        assert wrong != causal or text.startswith("error: model: Qwen3 is autoregressive")
        assert not (tmp_path / "out").exists()
    run("trajectories", tmp_path / "out", *data)
    assert (tmp_path / "out" / "settings.json").exists()


def test_results_of_an_earlier_run(tmp_path: Path):
    """They are read with all that is shown of them, and have no passes for a page."""
    found, page = tmp_path / "found.json", tmp_path / "page.html"
    command = ("evaluate", "--problems", "1", "--policy", "quota:32", "--json", found)
    run(*command)
    said = CliRunner().invoke(app, [*map(str, command), "--resume", "--html", str(page)])
    assert said.stderr == f"warning: html: every row is of an earlier run, so {page} is not written\n"
    assert said.exit_code == 0
    assert not page.exists()
    (row,) = json.loads(found.read_text())
    of_old = {name: value for name, value in row.items() if name != "nfe_mean"}
    for other, lacks in ((of_old, "one without nfe_mean"), ({}, "one without accuracy"), ([], "a list")):
        found.write_text(json.dumps([row, other]))
        expected = f"entry 2: expected a result of `evaluate`, got {lacks}"
        assert expected in run(*command, "--resume", code=2)


def test_a_run_that_keeps_no_answer_is_an_error(tmp_path: Path):
    file, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    file.write_text(json.dumps({"prompt": PROMPT, "answer": "100"}) + "\n")
    for _ in range(2):  # its shards are whole: the same command answers nothing again
        said = run("trajectories", out, "--data", file, "--policy", "quota:32", code=2)
        kept = f"checker: hashes keeps none of the 1 answers in {out}; --checker none keeps all"
        assert said.splitlines()[-1] == f"error: {kept}"
        assert [each.name for each in sorted(out.iterdir())] == ["part-00000.parquet", "settings.json"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), ""),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"), " (CUDA out of memory.)"),
        (None, r" \(\[enforce fail .*can't allocate memory: you tried to allocate \d+ bytes.*\)"),
    ],
)
def test_too_little_memory_is_one_line(
    error: Exception | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(*_: object, **__: object) -> None:
        if error is not None:
            raise error
        torch.empty(2**60, dtype=torch.int8)

    monkeypatch.setattr("dparallel.registry.Loading.load", decode)
    pattern = reason if error is None else re.escape(reason)
    said = run("decode", "x", code=2)
    assert re.fullmatch(f"error: not enough memory{pattern}; shorter texts .* take less\n", said), said
    error = RuntimeError("a fault")
    with pytest.raises(RuntimeError, match="a fault"), plain_errors():
        raise error


def test_an_error_stands_below_the_progress_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "refusing.py").write_text("def no(answer, response):\n    raise RuntimeError\n")
    monkeypatch.syspath_prepend(tmp_path)
    refused = ("--data", "builtin:2", "--model", "builtin:student", "--checker", "refusing:no")
    said = run("trajectories", tmp_path / "out", *refused, code=2)
    assert "2 [" in said  # the bar
    assert said.splitlines()[-1].startswith("error: checker: refusing:no raised RuntimeError()")


def test_a_gpu_that_is_not_there_is_named():
    assert "device: 'cuda' needs an NVIDIA GPU" in run("decode", "x", "--device", "cuda", code=2)


@pytest.mark.parametrize("line", ["{", '{"text": "x"}', '{"prompt": 3}', "[1]{"])
def test_a_bad_line_is_named(tmp_path: Path, line: str):
    file = tmp_path / "prompts.jsonl"
    file.write_text(f"{PROMPT}\n{line}\n")
    if line.startswith("{"):
        assert "prompts.jsonl:2" in run("decode", "--file", file, code=2)
    else:
        run("decode", "--file", file)  # a line that is no JSON object is a prompt
