"""The command line, on the model that ships and on a checkpoint directory."""

from __future__ import annotations

import io
import itertools
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from dparallel import live, registry, results
from dparallel.cli import app
from dparallel.toy import demo, tasks, train
from rich.console import Console
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from typer.testing import CliRunner

import dparallel_ext as dx
from dparallel_ext import policies

PROMPT = (
    "sam has 4 cups now . first sam grows 3 times . finally sam sells 8 cups . how many cups does sam have ?"
)


RECIPES = ROOT / "recipes"


def run(*args: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.output if code else result.stdout


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("checkpoint")
    settings = replace(train.ToySettings(), steps=1, batch=2, width=32, layers=1, heads=2, mlp_width=32)
    return train.train(out, settings, progress=False, evaluate=0)


def test_info():
    found = json.loads(run("info", "--json"))
    assert found["simd"] in ("avx512", "avx2", "portable")
    assert "builtin:teacher" in found["builtin_models"]
    assert "cpu" in found["backends"]
    table = run("info")
    assert "simd" in table
    assert "dparallel-ext" in table


def test_a_file_of_the_config(tmp_path: Path) -> None:
    """Its fields stand for options, which stand instead of them where they are given."""
    file = tmp_path / "config.json"

    def decoded(content: dict[str, Any], *options: object) -> dict[str, Any]:
        file.write_text(json.dumps(content))
        return json.loads(run("decode", PROMPT, "--json", "--config", file, *options))

    plain = json.loads(run("decode", PROMPT, "--json"))
    assert decoded({}) == decoded({"rule": "entropy:0.5"}) == plain
    options = ("--policy", "confidence:0.8", "--block-length", 16, "--cache", "dual", "--gen-length", 32)
    expected = json.loads(run("decode", PROMPT, "--json", *options))
    assert expected["forwards"] != plain["forwards"]
    content = {"threshold": 0.8, "selector": "confidence", "block_length": 16, "cache": "dual"}
    assert decoded({**content, "gen_length": 32}) == expected
    assert decoded({"steps": 4, "block_length": 8, "gen_length": 64}, *options) == expected
    for wrong, message in (
        ("[1]", "holds a list, expected an object"),
        ('{"stop": 5}', "stop: expected sequences of token ids, got the number 5"),
        ('{"gen_len": 5}', "Did you mean 'gen_length'?"),
        ("{", "is not JSON"),
    ):
        file.write_text(wrong)
        found = CliRunner().invoke(app, ["decode", "x", "--config", str(file)])
        assert (found.exit_code, found.stderr.count("\n")) == (2, 1)
        assert found.stderr.startswith(f"error: config: {file}")
        assert message in found.stderr
    assert f"config: no file {tmp_path / 'no'}" in run("decode", "x", "--config", tmp_path / "no", code=2)


def test_decode_a_prompt():
    row = json.loads(run("decode", PROMPT, "--json"))
    assert tasks.extract_answer(row["response"]) == 4
    assert row["forwards"] < 64
    assert row["tokens"] == len(row["response"].split())
    assert row["tokens_per_forward"] == pytest.approx(row["tokens"] / row["forwards"])
    assert "#### 4" in run("decode", PROMPT)


def test_decode_stops_at_the_end_as_the_server_does():
    """Blocks behind it are not computed, and its tokens not counted; with --gen-length 0 there is nothing."""
    args = ("decode", PROMPT, "--block-length", 4, "--policy", "one", "--json")
    row = json.loads(run(*args))
    assert row["tokens"] < row["forwards"] < 64  # EOS stands in the last block that was decoded
    assert row["forwards"] - row["tokens"] <= 4
    nothing = {"prompt": PROMPT, "response": "", "tokens": 0, "forwards": 0, "tokens_per_forward": 0.0}
    assert json.loads(run(*args, "--gen-length", 0)) == nothing
    assert json.loads(run("decode", "", "--gen-length", 4, "--json"))["forwards"] > 0


def test_decode_between_two_texts(tmp_path: Path):
    model, tokenizer = registry.load(registry.directory_of("builtin:student"))
    answer = json.loads(run("decode", PROMPT, "--model", "builtin:student", "--json"))["response"].split()
    text = " ".join([PROMPT, *answer[:4], *["[MASK]"] * 6, *answer[10:]])
    row = json.loads(run("decode", text, "--infill", "--model", "builtin:student", "--json"))
    ids = tokenizer.encode(text).ids
    out = dx.decode(model, ids, gen_length=0, infill=True, threshold=0.5)
    assert row["text"] == tokenizer.decode(out.sequences[0].tolist())
    assert row["response"] == tokenizer.decode(out.responses[0].tolist())
    assert (row["tokens"], row["forwards"]) == (6, int(out.nfe))
    suffix = ("--suffix", " ".join(answer[10:]), "--gen-length", 6, "--model", "builtin:student")
    between = json.loads(run("decode", " ".join([PROMPT, *answer[:4]]), *suffix, "--json"))
    assert between["response"] == row["response"]
    assert row["text"] in run("decode", text, "--infill", "--model", "builtin:student")
    chatty = tmp_path / "chatty"
    shutil.copytree(registry.directory_of("builtin:student"), chatty)
    (chatty / "chat_template.jinja").write_text("sam has {{ messages[0].content }} cups .")
    args = ("decode", text, "--infill", "--model", chatty, "--json")  # a text with gaps is no message
    assert json.loads(run(*args))["text"] == row["text"]
    assert json.loads(run(*args, "--chat"))["text"].startswith("sam has sam has")


def test_decode_streams():
    text = run("decode", PROMPT, "--stream")
    assert "pass  1" in text
    assert "####" in text
    apart = CliRunner().invoke(app, ["decode", PROMPT, "--stream", "--json"])
    assert json.loads(apart.stdout)["response"]  # JSON alone
    assert "pass  1" in apart.stderr


def test_streams_tokens_that_the_tokenizer_lacks() -> None:
    """Checkpoints have more rows than tokens, and tokens are shown as text, not as a vocabulary spells
    them."""
    known = Tokenizer(BPE(vocab={"\u0120yes": 0, "<mask>": 1}, merges=[]))
    known.decoder = decoders.ByteLevel()
    console = Console(file=io.StringIO())
    shown = live.LiveText(console, known, 1, 0.0)
    shown.put(torch.tensor([0]))  # the prompt
    shown.put_draft(torch.tensor([0, 0, 1, 7]))
    assert console.file.getvalue() == f"pass  1   yes yes {live.HIDDEN}\n"


def test_decode_a_ragged_batch(tmp_path: Path):
    """Together as one by one, in order; the last call may have fewer prompts."""
    file = tmp_path / "prompts.jsonl"
    problems = [p for _, p in zip(range(5), tasks.problems("held_out", seed=4), strict=False)]
    assert len({len(p.prompt.split()) for p in problems}) > 1
    file.write_text("".join(json.dumps({"prompt": p.prompt}) + "\n" for p in problems))
    together, apart, pairs = (
        run("decode", "--file", file, "--json", "--batch", n).splitlines() for n in (5, 1, 2)
    )
    responses = [[json.loads(line)["response"] for line in lines] for lines in (together, apart, pairs)]
    assert responses[0] == responses[1] == responses[2]
    right = [
        tasks.is_correct(p, json.loads(line)["response"]) for p, line in zip(problems, together, strict=True)
    ]
    assert sum(right) >= 4
    assert "not together with --batch" in run("decode", "--file", file, "--batch", 2, "--stream", code=2)


def test_decode_a_file_of_lines_and_json(tmp_path: Path):
    file = tmp_path / "prompts.jsonl"
    file.write_text(f"{PROMPT}\n\n{json.dumps({'prompt': PROMPT})}\n")
    first, second = (json.loads(line) for line in run("decode", "--file", file, "--json").splitlines())
    assert first == second


def test_decode_samples(checkpoint: Path):
    args = ("decode", PROMPT, "--model", checkpoint, "--gen-length", 16, "--json")

    def sampled(*more: object) -> str:
        return json.loads(run(*args, "--temperature", 3, *more))["response"]

    assert sampled("--seed", 1, "--top-p", 0.9) == sampled("--seed", 1, "--top-p", 0.9)
    assert sampled("--top-k", 1) == json.loads(run(*args))["response"]
    assert len({sampled() for _ in range(3)}) > 1


@pytest.mark.parametrize("model", ["builtin:student", "builtin:causal"])
def test_samples_of_a_file_do_not_depend_on_the_batch(model: str, tmp_path: Path):
    """Prompts that are alike have samples of their own."""
    file = tmp_path / "prompts.txt"
    file.write_text(f"{PROMPT}\n" * 3)
    args = ("--model", model, "--temperature", 3, "--seed", 5, "--gen-length", 8, "--json")
    alone, together = (run("decode", "--file", file, "--batch", size, *args) for size in (1, 3))
    assert alone == together
    first, *others = (json.loads(line)["response"] for line in alone.splitlines())
    assert json.loads(run("decode", PROMPT, *args))["response"] == first
    assert first not in others


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_decode_with_a_checkpoint_directory(checkpoint: Path, cache: str):
    args = ("--gen-length", 16, "--block-length", 8, "--policy", "quota:2", "--cache", cache)
    row = json.loads(run("decode", PROMPT, "--model", checkpoint, *args, "--json"))
    assert row["forwards"] == 8


@pytest.mark.parametrize("command", ["decode", "evaluate", "serve", "trajectories", "tune"])
def test_help_names_every_rule_and_its_parameter(command: str):
    assert run(command, "-h") == run(command, "--help")
    text = " ".join(run(command, "--help").replace("│", " ").split())
    for name, rule in policies.RULES.items():
        assert f"{name}:{rule.parameter} ({rule.commits})" in text


def test_the_default_length_leaves_room_for_the_prompt(tmp_path: Path):
    """The built-in models have 256 positions, a copy of one too."""
    student = registry.directory_of("builtin:student")
    shutil.copytree(student, tmp_path / "student")
    assert registry.gen_length("builtin:student") == 64
    assert registry.gen_length(str(tmp_path / "student")) == 128
    config = json.loads((student / "config.json").read_text())
    for positions, expected in ((4096, 256), (1, 1)):
        changed = {**config, "max_sequence_length": positions}
        (tmp_path / "student" / "config.json").write_text(json.dumps(changed))
        assert registry.gen_length(str(tmp_path / "student")) == expected
    result = CliRunner().invoke(app, ["decode", PROMPT, "--model", str(student)])
    assert (result.exit_code, "warning" in result.stderr) == (0, False)


def test_evaluate_writes_json_and_a_plot(tmp_path: Path):
    json_file, plot = tmp_path / "rows.json", tmp_path / "rows.png"
    policies = ("--policy", "confidence:0.9", "--policy", "entropy:0.5")
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"cache": "dual", "block_length": 16, "steps": 4}))
    text = run(
        "evaluate", "--config", config, "--problems", 4, *policies, "--json", json_file, "--plot", plot
    )
    rows = json.loads(json_file.read_text())
    assert [row["policy"] for row in rows] == ["confidence:0.9", "entropy:0.5"]
    assert all(row["problems"] == 4 for row in rows)
    assert all((row["cache"], row["block_length"]) == ("dual", 16) for row in rows)
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "accuracy" in text
    assert not any(row["fp8"] for row in rows)


def test_evaluate_takes_each_field_of_a_config_or_names_it(tmp_path: Path) -> None:
    config, file, data = tmp_path / "config.json", tmp_path / "rows.json", tmp_path / "data.jsonl"
    data.write_text(json.dumps({"prompt": PROMPT, "answer": 4}) + "\n")

    def measure(model: str, content: dict[str, Any], *options: Any, code: int = 0) -> Any:
        config.write_text(json.dumps(content))
        asked = ("--model", model, "--problems", 1, "--config", config, "--json", file, *options)
        said = run("evaluate", *asked, code=code)
        return said if code else json.loads(file.read_text())[0]

    causal, student = "builtin:causal", "builtin:student"
    row = measure(causal, {"temperature": 1.0, "seed": 3}, "--drafter", "plain")
    assert row["config"] == {"temperature": 1.0, "seed": 3}
    assert measure(causal, {"gen_length": 7}, "--drafter", "plain", "--data", data)["nfe_mean"] <= 7
    assert measure(student, {"gen_length": 7}, "--data", data)["gen_length"] == 7
    assert measure(student, {"gen_length": 7}, "--data", data, "--gen-length", 9)["gen_length"] == 9
    for model, content, options, message in (
        (causal, {"threshold": 0.5}, (), "threshold: belongs to masked diffusion"),
        (causal, {"cache": "dual"}, (), "cache: belongs to masked diffusion"),
        (causal, {"mask_id": 3}, (), "mask_id: belongs to masked diffusion"),
        (causal, {}, ("--mask-id", 3), "mask_id: belongs to masked diffusion"),
        (causal, {"gen_length": 7}, (), "gen_length: belongs to --data, got 7"),
        (student, {"logprobs": True}, (), "logprobs: expected False"),
        (student, {"threshold": 0.5, "max_commit": 2}, (), "config: expected a rule that a text names"),
    ):
        assert f"error: {message}" in measure(model, content, *options, code=2)


@pytest.mark.slow
def test_weights_in_8_bits(tmp_path: Path):
    answer = json.loads(run("decode", PROMPT, "--model", "builtin:student", "--fp8", "--json"))["response"]
    assert tasks.extract_answer(answer) == 4
    json_file = tmp_path / "rows.json"
    run("evaluate", "--problems", 20, "--policy", "entropy:0.3", "--fp8", "--json", json_file)
    (row,) = json.loads(json_file.read_text())
    assert row["fp8"]
    assert row["accuracy"] >= 0.8


def test_prompts_need_no_answers_where_nothing_compares(tmp_path: Path) -> None:
    own = tmp_path / "prompts.jsonl"
    own.write_text(f"{json.dumps({'prompt': PROMPT})}\n" * 2)
    shared = ("--data", own, "--gen-length", 8, "--policy", "quota:8")
    answers = ("trajectories", tmp_path / "answers", *shared)
    for command in (answers, ("evaluate", *shared)):
        assert "has no field 'answer'" in run(*command, code=2)
    said = run(*answers, "--checker", "none", "--format", "jsonl")
    assert "2 of 2 answers kept, by the checker none" in said
    own.write_text(f"{PROMPT}\n" * 3)  # a line of text
    assert "100.0%" in run("evaluate", *shared, "--checker", "none")


def test_all_that_is_loaded_is_in_the_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The verifier of a model too; and once more for `filter`, which reads the dtype from the answers."""
    loaded: list[torch.dtype] = []

    def load(*args: Any, **keywords: Any) -> Any:
        model, tokenizer = real(*args, **keywords)
        loaded.append(model.dtype)
        return model, tokenizer

    real = registry.load
    monkeypatch.setattr(registry, "load", load)
    run("decode", PROMPT, "--verifier", registry.VERIFIER, "--dtype", "float16", "--gen-length", 4)
    assert loaded == [torch.float16] * 2
    answers = ("trajectories", tmp_path / "answers", "--data", "builtin:2", "--policy", "quota:32")
    run(*answers, "--checker", "none", "--format", "jsonl", "--dtype", "float16")
    run("filter", tmp_path / "filter", "--answers", tmp_path / "answers", "--steps", 1, "--held-out", 0.5)
    assert loaded == [torch.float16] * 4
    options = (*answers, "--checker", "none", "--format", "jsonl")
    assert "other settings: {'dtype': 'float16'}" in run(*options, code=2)
    file = tmp_path / "answers" / "settings.json"
    older = {key: value for key, value in json.loads(file.read_text()).items() if key != "dtype"}
    file.write_text(json.dumps(older))
    run(*options)
    assert "other settings: {'dtype': 'auto'}" in run(*options, "--dtype", "float16", code=2)


def test_train_and_evaluate_what_was_trained(tmp_path: Path):
    size = ("--batch", 2, "--width", 32, "--layers", 1, "--heads", 2, "--mlp-width", 32)
    said = run("train", tmp_path / "run", "--steps", 2, *size, "--evaluate", 2)
    assert results.HEADING in said
    assert said.splitlines()[-1].endswith(f"{'run':<15} one")
    assert json.loads((tmp_path / "run" / "training.json").read_text())["held_out"]["problems"] == 2
    run("evaluate", "--model", tmp_path / "run", "--problems", 2, "--policy", "entropy:0.5")
    assert "other settings" in run("train", tmp_path / "run", "--seed", 1, *size, code=2)
    assert "holds a run of 2 steps" in run("train", tmp_path / "run", "--steps", 1, *size, code=2)


@pytest.mark.slow
def test_demo(tmp_path: Path):
    text = run("demo", "--problems", 3, "--out", tmp_path)
    rows = json.loads((tmp_path / "table.json").read_text())
    drafters = [("builtin:causal", drafter) for drafter in demo.DRAFTERS]
    policies = itertools.product(
        ("builtin:student", "builtin:teacher"), ("one", "confidence:0.9", "entropy:0.5")
    )
    asked = [*drafters, *policies]
    assert [(row["model"], row["policy"]) for row in rows] == asked
    for name in ("causal", "student", "teacher"):
        assert (tmp_path / f"response-{name}.png").read_bytes().startswith(b"\x89PNG")
    assert text.count("(right)") == 3
    assert "without a draft" in text
    assert demo.LEGEND.split()[:8] == text.split()[text.split().index(live.HIDDEN) :][:8]
    lines = text[text.index(results.HEADING) :].splitlines()
    assert [tuple(line.split()[-2:]) for line in lines[1 : 1 + len(asked)]] == asked


def test_a_diffusion_model_guesses_what_the_next_passes_commit() -> None:
    given = ("decode", PROMPT, "--json", "--policy", "one")
    plain, guessed = (json.loads(run(*given, *more)) for more in ((), ("--draft-size", 4)))
    assert guessed["response"] == plain["response"]
    assert guessed["forwards"] <= plain["forwards"] * 2 / 3
    refused = run("decode", PROMPT, "--policy", "credit", "--draft-size", 4, code=2)
    assert "draft_size: goes with policy rows alone" in refused
    assert "'one' or 'entropy:0.5'" in refused


def test_an_autoregressive_model_with_and_without_a_drafter(tmp_path: Path) -> None:
    model = ("--model", "builtin:causal")
    plain = json.loads(run("decode", PROMPT, "--json", *model))
    assert tasks.extract_answer(plain["response"]) == 4
    assert plain["drafts"] == 0
    for name in ("ngram", "recycling", "dflash", "parallelspec", "ppd", "hidden_transfer", "student"):
        drafter = name if name in ("ngram", "recycling") else f"builtin:{name}"
        found = json.loads(run("decode", PROMPT, "--json", *model, "--drafter", drafter, "--draft-size", 6))
        assert found["response"] == plain["response"]
        assert 0 < found["drafts"] < found["forwards"] <= plain["forwards"]
    assert "pass" in run("decode", PROMPT, *model, "--stream", "--drafter", "builtin:dflash")
    table, file = tmp_path / "table.md", tmp_path / "rows.json"
    options = ("--problems", 12, "--json", file, "--markdown", table, "--report", "--resume")
    text = run("evaluate", *model, "--drafter", "plain", "--drafter", "builtin:dflash", *options)
    assert "texts equal to plain decoding's: 12 of 12" in text
    assert "| causal | `builtin:dflash` | 12 |" in table.read_text()
    known = file.read_text()
    run("evaluate", *model, "--drafter", "plain", "--drafter", "builtin:dflash", *options)
    assert file.read_text() == known  # nothing was measured again
    for wrong, message in (
        ((*model, "--policy", "one"), "policy: "),
        ((*model, "--suffix", "x"), "suffix: "),
        (
            (*model, "--drafter", "medusa"),
            "drafter: expected a Drafter, a name (ngram, recycling, jump_forward, ",
        ),
        ((*model, "--cache", "dual"), "cache: belongs to masked diffusion"),
        ((*model, "--mask-id", 3), "mask_id: belongs to masked diffusion"),
        (("--drafter", "ngram"), "drafter: "),
    ):
        found = CliRunner().invoke(app, ["decode", PROMPT, *map(str, wrong)])
        assert (found.exit_code, found.stderr.count("\n")) == (2, 1), found.stderr
        assert found.stderr.startswith(f"error: {message}"), found.stderr


def test_a_diffusion_model_and_a_verifier(tmp_path: Path) -> None:
    verifier, page = ("--verifier", registry.VERIFIER), tmp_path / "page.html"
    found = json.loads(run("decode", PROMPT, "--json", *verifier, "--mixture", 0.6, "--html", page))
    assert tasks.extract_answer(found["response"]) == 4
    assert 0 < found["verifications"] <= found["forwards"] < 10 < found["tokens"]
    assert "mixture 0.6" in page.read_text()
    more = json.loads(run("decode", PROMPT, "--json", *verifier, "--window", 4, "--lookahead", 3))
    assert more["forwards"] >= more["tokens"] / 3
    assert "pass" in run("decode", PROMPT, "--stream", *verifier)
    counts = CliRunner().invoke(app, ["decode", PROMPT, *verifier]).stderr
    assert re.fullmatch(r"\d+ tokens in \d passes and \d of the verifier, .* a pass\n", counts)
    rows, table, file = (tmp_path / name for name in ("rows.json", "table.md", "results.json"))
    rows.write_text(json.dumps([{"rule": "entropy:0.5"}, {"verifier": registry.VERIFIER, "mixture": 0.7}]))
    options = ("--rows", rows, "--problems", 8, "--json", file, "--markdown", table, "--resume")
    assert "builtin:verifier, mixture 0.7" in run("evaluate", *options)
    lines = table.read_text().splitlines()
    assert lines[0].endswith("| verifier's passes |")
    assert lines[2].endswith("|  |")
    assert "| `builtin:verifier`, mixture 0.7 | 8 |" in lines[3]
    known = json.loads(file.read_text())
    run("evaluate", *options)
    assert json.loads(file.read_text()) == known  # nothing was measured again
    assert known[1]["accuracy"] == 1.0
    assert 0 < known[1]["verifier_mean"] <= known[1]["nfe_mean"] < 8
    for wrong, message in (
        ((*verifier, "--policy", "one"), "policy: not together with --verifier, got 'one'"),
        ((*verifier, "--draft-size", 3), "draft_size: not together with --verifier, got 3"),
        (("--window", 3), "window: belongs to --verifier, got 3"),
        ((*verifier, "--cache", "dual"), "cache: with a verifier decoding goes left to right"),
        ((*verifier, "--mixture", 2), "mixture: expected a number from 0 to 1, got 2"),
        ((*verifier, "--model", "builtin:causal"), "verifier: belongs to masked diffusion"),
        (("--verifier", "builtin:teacher"), "verifier: expected an autoregressive model"),
        (("--verifier", "nobody"), "verifier: 'nobody' is neither"),
    ):
        refused = CliRunner().invoke(app, ["decode", PROMPT, *map(str, wrong)])
        assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1), refused.stderr
        assert refused.stderr.startswith(f"error: {message}"), refused.stderr


@pytest.mark.slow
@pytest.mark.filterwarnings("error:The PEFT config's `base_model_name_or_path`")
def test_trajectories_distill_and_merge(tmp_path: Path):
    answers = ("trajectories", tmp_path / "answers", "--data", "builtin:20", "--policy", "entropy_bound:0.1")
    said = run(*answers)
    assert re.search(r"answers: \d+ of 20 answers kept, by the checker hashes", said)
    assert run(*answers).splitlines()[-1] == said.splitlines()[-1]  # nothing is left to answer
    recipe = tmp_path / "recipe.yaml"
    training = "{max_steps: 1, per_device_train_batch_size: 2, disable_tqdm: true, save_strategy: 'no'}"
    recipe.write_text(f"model: builtin:teacher\nlora: {{r: 2}}\ntraining: {training}\n")
    said = run("distill", recipe, "--answers", tmp_path / "answers", "--out", tmp_path / "adapter")
    assert f"`dparallel merge {tmp_path / 'adapter'} STUDENT`" in said
    assert "merged: a checkpoint; " in run("merge", tmp_path / "adapter", tmp_path / "merged")
    row = json.loads(run("decode", PROMPT, "--model", tmp_path / "merged", "--gen-length", 64, "--json"))
    assert tasks.extract_answer(row["response"]) == 4


def test_a_dry_run_prints_steps_and_memory():
    """What `plan` counts, here of a small model."""
    text = run("distill", RECIPES / "builtin.yaml", "--dry-run", "--processes", 8)
    for count in ("1,848,768", "256", "400", "6,000"):  # parameters, sequences a step, steps, answers
        assert count in text
    assert "GiB per process" in text


def test_a_checkpoint_that_is_asked_the_builtin_task_is_told(tmp_path: Path) -> None:
    """Its accuracy there says nothing of a checkpoint that was not trained on it."""
    mine = str(tmp_path / "mine")
    shutil.copytree(registry.directory_of("builtin:causal"), mine)
    few = ("--problems", "2", "--drafter", "plain")
    asked = CliRunner().invoke(app, ["evaluate", "--model", mine, "--model", "builtin:causal", *few])
    assert asked.exit_code == 0, asked.stderr
    assert f"note: no --data, so {mine} is asked problems of the built-in task" in asked.stderr
    assert "note" not in CliRunner().invoke(app, ["evaluate", "--model", "builtin:causal", *few]).stderr


def test_evaluate_with_problems_of_ones_own(tmp_path: Path) -> None:
    file, found = tmp_path / "p.jsonl", tmp_path / "found.json"
    rows = [
        {"q": problem.prompt, "a": problem.answer}
        for problem in itertools.islice(tasks.problems("held_out"), 3)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = ("--data", file, "--prompt-field", "q", "--answer-field", "a", "--policy", "quota:32")
    said = run("evaluate", "--model", "builtin:student", *own, "--json", found, "--gen-length", 64)
    (row,) = json.loads(found.read_text())
    assert (row["problems"], row["data"], row["checker"], row["nfe_mean"]) == (3, str(file), "hashes", 2)
    assert f"{row['accuracy']:.1%}" in said
    for options, message in (
        (("--checker", "boxed"), "checker: belongs to --data, got 'boxed'"),
        (("--gen-length", 3), "gen_length: belongs to --data, got 3"),
        (("--data", file), "data: .*p.jsonl:1 has no field 'prompt', only"),
        ((*own, "--checker", "x"), "checker: expected one of"),
        ((*own, "--gen-length", 0), "gen_length: expected a whole number >= 1, got 0"),
        ((*own, "--problems", 0), "problems: expected a whole number >= 1, got 0"),
        (("--data", "nowhere"), "data: no file nowhere"),
    ):
        done = CliRunner().invoke(app, ["evaluate", *map(str, options)])
        assert (done.exit_code, done.stderr.count("\n")) == (2, 1), done.output
        assert re.search(message, done.stderr), done.stderr
