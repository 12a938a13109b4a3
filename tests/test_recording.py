"""Recordings of decodes: `decode --html`, `evaluate --html`. Their looks: serving/test_page_in_browser.py."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dparallel import registry
from dparallel.cli import app
from dparallel.toy import tasks
from typer.testing import CliRunner

import dparallel_ext as dx

PROBLEMS = list(itertools.islice(tasks.problems("held_out", 0), 4))
PROMPTS = [problem.prompt for problem in PROBLEMS]
TEACHER, CAUSAL = "builtin:teacher", "builtin:causal"


def recorded(tmp_path: Path, *args: str) -> tuple[list[dict[str, Any]], list[str]]:
    """The problems of the file that a command writes, and the lines that it prints."""
    file = tmp_path / "new" / "page.html"
    done = CliRunner().invoke(app, [*args, "--html", str(file)])
    assert done.exit_code == 0, done.output
    data = file.read_text().split('<script id="data" type="application/json">')[1].partition("</script>")[0]
    return json.loads(data)["recording"]["problems"], done.stdout.splitlines()


def test_decodes_together(tmp_path: Path) -> None:
    """Each answer is what is printed, and of each token the pass and the log-probability are `decode`'s."""
    (tmp_path / "prompts").write_text("\n".join(PROMPTS[:2]))
    problems, said = recorded(tmp_path, "decode", "--file", str(tmp_path / "prompts"), "--batch", "2")
    model, tokenizer = registry.load(TEACHER)
    ids = [tokenizer.encode(prompt).ids for prompt in PROMPTS[:2]]
    out = dx.decode(model, ids, gen_length=64, rule="entropy:0.5", eos_id=1, record=True)
    assert out.trajectory is not None
    assert [problem["prompt"] for problem in problems] == PROMPTS[:2]
    for i, (problem, line) in enumerate(zip(problems, said, strict=True)):
        (answer,) = problem["tracks"]
        assert (answer["model"], answer["how"], answer["kind"]) == (TEACHER, "entropy:0.5", "diffusion")
        assert (answer["kept"], answer["passes"]) == (int(out.kept[i]), int(out.nfe[i]))
        assert (answer["length"], answer["seconds"]) == (64, None)  # nobody knows one's share of the time
        (event,) = answer["events"]
        assert "".join(event["tokens"][: answer["kept"]]) == line
        assert event["passes"] == out.trajectory.step[i].tolist()
        known = [value for value in event["logprobs"] if value is not None]
        expected = out.trajectory.logprob[i]
        torch.testing.assert_close(torch.tensor(known), expected[~expected.isnan()], rtol=0, atol=1e-4)


def test_what_is_filled_stands_among_what_was_given(tmp_path: Path) -> None:
    text = "sam has [MASK] cups now . first sam gets 3 cups . [MASK] [MASK]"
    ((problem,), (said,)) = recorded(tmp_path, "decode", text, "--infill")
    (answer,) = problem["tracks"]
    given, filled = answer["events"]
    assert "".join(a or b for a, b in zip(given["tokens"], filled["tokens"], strict=True)) == said
    words = ["" if token is None else token.strip() for token in given["tokens"]]
    assert words == [word if word != "[MASK]" else "" for word in text.split()]
    assert (given["pass"], filled["pass"], answer["kept"]) == (0, answer["passes"], None)
    assert [step is None for step in filled["passes"]] == [token is None for token in filled["tokens"]]
    assert answer["seconds"] > 0
    # In front of a suffix the response alone is shown.
    ((problem,), _) = recorded(tmp_path, "decode", PROMPTS[0], "--suffix", "####", "--gen-length", "12")
    (answer,) = problem["tracks"]
    assert [len(event["tokens"]) for event in answer["events"]] == [12]


@pytest.mark.parametrize("drafter", [None, "builtin:dflash"])
def test_passes_of_an_autoregressive_model(tmp_path: Path, drafter: str | None) -> None:
    """One event each, with what was accepted and refused."""
    options = ["--drafter", drafter, "--draft-size", "7"] if drafter else []
    ((problem,), (said,)) = recorded(tmp_path, "decode", PROMPTS[0], "--model", CAUSAL, *options)
    (answer,) = problem["tracks"]
    events = answer["events"]
    assert [event["pass"] for event in events] == list(range(1, answer["passes"] + 1))
    tokens = [token for event in events for token in event["tokens"]]
    assert "".join(tokens[: answer["kept"]]) == said
    assert [event["start"] for event in events] == [
        0,
        *itertools.accumulate(len(event["tokens"]) for event in events[:-1]),
    ]
    for event in events[:-1]:
        assert len(event["tokens"]) == len(event["logprobs"]) == event["accepted"] + 1
        assert event["drafted"] == event["accepted"] + len(event["refused"])
    assert any(event["refused"] for event in events) == (drafter is not None)


def test_evaluations_stand_side_by_side(tmp_path: Path) -> None:
    """Of the first problems each model and rule has its answer, and whether that is right."""
    models = ["--model", TEACHER, "--model", CAUSAL, "--drafter", "plain", "--drafter", "ngram"]
    rules = ["--policy", "one", "--policy", "entropy:0.5"]
    problems, lines = recorded(tmp_path, "evaluate", *models, *rules, "--problems", "4", "--batch", "2")
    assert sorted(problem["prompt"] for problem in problems) == sorted(PROMPTS[:3])
    for problem in problems:
        answers = problem["tracks"]
        assert [(one["model"], one["how"]) for one in answers] == [
            (TEACHER, "one"),
            (TEACHER, "entropy:0.5"),
            (CAUSAL, "a token a pass"),
            (CAUSAL, "ngram guesses ahead"),
        ]
        (asked,) = (one for one in PROBLEMS if one.prompt == problem["prompt"])
        for one in answers:
            text = "".join(itertools.chain.from_iterable(event["tokens"] for event in one["events"]))
            assert one["note"] == (
                "right" if tasks.is_correct(asked, text) else f"wrong, it is {asked.answer}"
            )
        assert answers[0]["passes"] == 64 > answers[1]["passes"]
        assert answers[2]["passes"] >= answers[3]["passes"]
    assert len(lines) == 5


def test_where_no_file_can_be_nothing_is_decoded(tmp_path: Path) -> None:
    for command in (["decode", "x"], ["evaluate"]):
        done = CliRunner().invoke(app, [*command, "--html", str(tmp_path)])
        assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert done.stderr == f"error: html: {tmp_path} is a directory, expected a file\n"
