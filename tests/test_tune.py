"""`dparallel tune`: what is measured, what is chosen, the file and who reads it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from dparallel import cli, registry, tune
from dparallel.serving import runner
from dparallel.toy import tasks
from dparallel.tune import MeasuredPass
from typer.testing import CliRunner

from dparallel_ext import speculation
from dparallel_ext.speculation import trees

PROMPT = (
    "sam has 4 cups now . first sam grows 3 times . finally sam sells 8 cups . how many cups does sam have ?"
)
RANKS = ((0.6, 0.1, 0.05), (0.5, 0.1, 0.05), (0.4, 0.1, 0.05))
DRAFTED = ("--model", "builtin:causal", "--drafter", "builtin:dflash")
SMALL = ("--problems", 2, "--repeats", 1, "--gen-length", 12)


def run(*args: object, code: int = 0) -> tuple[str, str]:
    result = CliRunner().invoke(cli.app, [str(a) for a in args])
    assert result.exit_code == code, result.output
    return result.stdout, result.stderr


def of_seconds(
    seconds: Callable[[int], float], tokens: Callable[[int], float], drafting: float = 0.0
) -> dict[int, list[list[MeasuredPass]]]:
    """Three runs of ten passes over two sequences; a pass of the second took long for another reason."""
    runs: dict[int, list[list[MeasuredPass]]] = {}
    for size in tune.SIZES:
        one = MeasuredPass(seconds(size) + drafting, drafting, 2, 2 * tokens(size))
        runs[size] = [[one] * 10, [one._replace(seconds=9.0), *[one] * 9], [one] * 10]
    return runs


def expected(size: int) -> float:
    return trees.plan(RANKS, size).tokens


@pytest.mark.parametrize(("slope", "best"), [(0.0, 63), (0.002, 47), (0.02, 7), (1.0, 0)])
def test_the_size_is_the_best_by_ranks_and_seconds(slope: float, best: int) -> None:
    def seconds(size: int) -> float:
        return 1 + slope * (1 + size)

    # Half as many tokens of drafts are accepted here as the ranks say.
    runs = of_seconds(seconds, lambda size: 1 + 0.5 * (expected(size) - 1))
    rows = tune.curve(runs, expected)
    found = tune.choose(rows)
    assert found is not None
    worth = {size: (1 + 0.5 * (expected(size) - 1)) / seconds(size) for size in tune.SIZES}
    assert found["draft_size"] == best == max(worth, key=worth.__getitem__)
    for size, row in zip(tune.SIZES, rows, strict=True):
        assert row["pass_ms"] == pytest.approx(1e3 * seconds(size))
        assert row["tokens_per_forward"] == pytest.approx(1 + 0.5 * (expected(size) - 1), rel=1e-5)
        assert row["tokens_per_second"] == pytest.approx(
            2 * row["tokens_per_forward"] / seconds(size), rel=1e-3
        )


def test_a_draft_costs_what_it_takes() -> None:
    """Without ranks the tokens are those that the passes brought."""

    def tokens(size: int) -> float:
        return 1 + size / 7 if size < 7 else 2

    cheap = tune.choose(tune.curve(of_seconds(lambda size: 1.0, tokens)))
    assert cheap is not None
    assert (cheap["draft_size"], cheap["tokens_per_forward"]) == (7, 2)
    dear = tune.curve(of_seconds(lambda size: 1.0, tokens, drafting=0.5))
    assert [row["draft_ms"] for row in dear] == [500.0] * len(dear)
    assert dear[3]["tokens_per_second"] == pytest.approx(2 * 2 / 1.5, rel=1e-3)
    with pytest.raises(ValueError, match="prompts: each response ends with its first token"):
        tune.curve({0: [[]]})


def test_the_fastest_that_answers_as_well() -> None:
    rows = [
        {"right": right, "tokens_per_second": speed}
        for right, speed in ((0.99, 10.0), (0.98, 30.0), (0.98, 30.0), (0.95, 50.0))
    ]
    for tolerance, best in ((0.0, 0), (0.9, 0), (1.0, 1), (3.9, 1), (4.0, 3), (100.0, 3)):
        assert tune.choose(rows, tolerance) is rows[best]
    assert tune.choose([{"draft_size": 0, "pass_ms": 1.0}]) is None


def test_answers_are_right_or_those_of_the_most_passes() -> None:
    problems = [*itertools.islice(tasks.problems("held_out"), 2)]
    right = [problem.response for problem in problems]

    def judged(answers: Sequence[Sequence[str]], known: bool = True) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = [{"passes": 4}, {"passes": 9}, {"passes": 9}]
        tune.judge(rows, answers, problems if known else None)
        return [{k: v for k, v in row.items() if k != "passes"} for row in rows]

    answers = [["x", right[1]], right, ["y", "z"]]
    assert judged(answers) == [{"right": 0.5}, {"right": 1.0}, {"right": 0.0}]
    assert judged(answers, known=False) == [{"same": 0.5}, {"same": 1.0}, {"same": 0.0}]
    assert judged([["x", "z"], ["y", "z"], ["x", "z"]]) == [{"same": 0.5}, {"same": 1.0}, {"same": 0.5}]


def test_a_context_is_other_prompts_in_front() -> None:
    prompts = [[1, 2, 3], [4]]
    assert tune.lengthened(prompts, None) == tune.lengthened(prompts, 1) == prompts
    assert tune.lengthened(prompts, 6) == [[4, 1, 2, 1, 2, 3], [1, 2, 3, 4, 1, 4]]
    assert tune.lengthened([[7]], 3) == [[7, 7, 7]]


def test_every_pass_has_the_rows_that_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the last token of a text too, which leaves a draft no room otherwise."""
    seen: list[int] = []

    def propose(self: Any, lanes: Any, sizes: Sequence[int]) -> Any:
        seen.extend(sizes)
        return real(self, lanes, sizes)

    real = tune.Filler.propose
    monkeypatch.setattr(tune.Filler, "propose", propose)
    settings = tune.TuneSettings("builtin:causal", problems=3, repeats=1, gen_length=6, context=50, batch=2)
    _, rows = tune.measure_drafts(settings, None, [0, 7, 31], lambda text: None)
    assert [set(row) for row in rows] == [{"draft_size", "pass_ms"}] * 3
    assert set(seen) == {7, 31}
    assert seen.count(7) == seen.count(31) == 2 * 3 * 5  # runs, prompts, tokens behind the first


def test_without_a_drafter_it_says_that_nothing_is_chosen(tmp_path: Path) -> None:
    file = tmp_path / "passes.json"
    text, _ = run("tune", file, "--model", "builtin:causal", *SMALL, "--draft-size", 0, "--draft-size", 3)
    assert text.splitlines()[-1].startswith(f"nothing is chosen: {file} has the times of passes alone; ")
    assert text.endswith("none is given (--drafter ngram, say)\n")
    assert json.loads(file.read_text()).keys() == {"tuned"}
    text, _ = run("tune", file, *DRAFTED, *SMALL, "--draft-size", 3)
    assert "nothing is chosen" not in text
    assert "chosen" in text


def test_tokens_of_riders_go_by_their_ranks() -> None:
    settings = tune.TuneSettings("builtin:causal", problems=2, repeats=1, gen_length=12)
    _, rows = tune.measure_drafts(settings, "builtin:ppd", [0, 3, 15], lambda text: None)
    promised = speculation.load(registry.DRAFTERS["builtin:ppd"]).expected
    none, few, many = (row["tokens_per_forward"] - 1 for row in rows)
    assert none == 0 < few < many
    assert many / few == pytest.approx((promised(15) - 1) / (promised(3) - 1), rel=1e-4)


@pytest.fixture(scope="module")
def drafted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tuned") / "drafted.json"
    text, said = run("tune", file, *DRAFTED, *SMALL, "--draft-size", 3, "--draft-size", 9, "--batch", 2)
    content = json.loads(file.read_text())
    tuned = content["tuned"]
    assert [row["draft_size"] for row in tuned["curve"]] == [3, 9]
    assert tuned["curve"][1]["tokens_per_forward"] > 5
    assert all(row["draft_ms"] > 0 < row["pass_ms"] for row in tuned["curve"])
    best = max(tuned["curve"], key=lambda row: row["tokens_per_second"])
    assert (content["drafter"], content["draft_size"]) == ("builtin:dflash", best["draft_size"])
    assert (tuned["model"], tuned["batch"], tuned["gen_length"]) == ("builtin:causal", 2, 12)
    assert tuned["device"] == registry.device_name()
    lines = text.splitlines()
    assert [line.split()[0] for line in lines] == ["draft_size", "3", "9"]
    assert text.count("<- chosen") == 1
    assert max(line.count("#") for line in lines) == tune.BAR
    assert [line.split(":")[0] for line in said.splitlines()] == ["draft_size 3", "draft_size 9"]
    return file


@pytest.fixture
def fixed(drafted: Path, tmp_path: Path) -> Path:
    """The same, with the size that fits the test, whatever is the fastest here."""
    file = tmp_path / "fixed.json"
    file.write_text(json.dumps({**json.loads(drafted.read_text()), "draft_size": 3}))
    return file


def test_a_choice_of_a_drafter_is_used(fixed: Path, tmp_path: Path) -> None:
    def decoded(*options: object) -> dict[str, Any]:
        text, said = run("decode", PROMPT, "--json", "--model", "builtin:causal", *options)
        assert "warning" not in said
        return json.loads(text)

    plain, three = decoded(), decoded("--drafter", "builtin:dflash", "--draft-size", 3)
    assert decoded("--config", fixed) == decoded("--config", fixed, "--drafter", "builtin:dflash") == three
    assert plain["forwards"] > three["forwards"] > 3
    wide = decoded("--config", fixed, "--draft-size", 15)
    assert wide == decoded("--drafter", "builtin:dflash", "--draft-size", 15)
    assert wide["forwards"] < three["forwards"]
    other = decoded("--config", fixed, "--drafter", "ngram", "--draft-size", 2)
    assert other == decoded("--drafter", "ngram", "--draft-size", 2)
    out = tmp_path / "rows.json"
    run("evaluate", "--model", "builtin:causal", "--config", fixed, "--problems", 2, "--json", out)
    (row,) = json.loads(out.read_text())
    assert (row["policy"], row["config"]) == ("builtin:dflash", {"draft_size": 3})


def test_a_server_takes_the_choice(fixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[runner.Served] = []
    monkeypatch.setattr(runner, "run", lambda models, *_, **__: served.extend(models))
    run("serve", "--model", "builtin:causal", "--config", fixed)
    # The size was measured for the file's own drafter.
    run("serve", "--model", "builtin:causal", "--config", fixed, "--drafter", "ngram", "--drafter", "plain")
    assert [(one.drafter, one.draft_size) for one in served] == [
        ("builtin:dflash", 3),
        ("ngram", None),
        (None, None),
    ]


def test_a_file_is_for_one_model_and_one_device(fixed: Path, tmp_path: Path) -> None:
    _, said = run("decode", PROMPT, "--model", "builtin:teacher", "--config", fixed, code=2)
    assert said == (
        f"error: config: {fixed} was tuned for builtin:causal, and builtin:teacher is another model; "
        "`dparallel tune` makes a file for it\n"
    )
    for command in (("evaluate", "--problems", 1), ("serve",)):
        models = ("--model", "builtin:causal", "--model", "builtin:student")
        _, said = run(*command, *models, "--config", fixed, code=2)
        assert "builtin:student is another model" in said
    copied = tmp_path / "elsewhere"
    copied.symlink_to(registry.directory_of("builtin:causal"))
    content = json.loads(fixed.read_text())
    content["tuned"]["device"] = "a GPU"
    fixed.write_text(json.dumps(content))
    given = ("decode", PROMPT, "--model", copied, "--config", fixed, "--gen-length", 2)
    dtype, here = content["tuned"]["dtype"], registry.device_name()
    _, said = run(*given, "--dtype", dtype)
    assert f"warning: config: {fixed} was tuned on a GPU, and this is {here}\n" in said
    _, said = run(*given, "--dtype", "float16", "--fp8")
    weights = f"in {dtype}, and this is float16; with fp8 False, and this is True\n"
    assert f"warning: config: {fixed} was tuned on a GPU, and this is {here}; {weights}" in said
    content["tuned"]["device"] = here
    for older in ({"dtype": "float16", "fp8": True}, {}):  # older files name no dtype
        content["tuned"] = {k: v for k, v in content["tuned"].items() if k not in ("dtype", "fp8")} | older
        fixed.write_text(json.dumps(content))
        assert "warning" not in run(*given, "--dtype", "float16", "--fp8")[1]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"tuned": 5}, "tuned: expected what `dparallel tune` writes"),
        ({"tuned": {"model": "x"}}, "tuned: expected what `dparallel tune` writes"),
        ({"drafter": 5}, "drafter: expected a text or null, got 5"),
        ({"draft_size": -1}, "draft_size: expected a whole number >= 0, got -1"),
        ({"draft_sizes": 1}, "draft_sizes"),
    ],
)
def test_a_file_that_is_none_is_named(content: dict[str, Any], said: str, tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    file.write_text(json.dumps(content))
    _, error = run("decode", PROMPT, "--model", "builtin:causal", "--config", file, code=2)
    assert error.startswith(f"error: config: {file}: ")
    assert said in error


def test_a_diffusion_model(tmp_path: Path) -> None:
    file, out = tmp_path / "tuned.json", tmp_path / "rows.json"
    policies = ("--policy", "one", "--policy", "entropy:0.5", "--model", "builtin:student")
    sizes = ("--block-length", 8, "--active-blocks", 1, "--active-blocks", 2)
    text, said = run("tune", file, *policies, *SMALL, *sizes, "--tolerance", 100)
    content = json.loads(file.read_text())
    curve = content.pop("tuned")["curve"]
    assert [(row["rule"], row["active_blocks"]) for row in curve] == [
        ("one", 1), ("entropy:0.5", 1), ("entropy:0.5", 2)
    ]  # fmt: skip
    assert "left out: one blocks 8 x 2 none: active_blocks: several need a threshold" in said
    assert curve[0]["passes"] == 12 > curve[1]["passes"]
    fastest = max(curve, key=lambda row: row["tokens_per_second"])
    assert content == {name: fastest[name] for name in tune.GRID}
    assert len(text.splitlines()) == 4
    # Of another model of the same sizes it is not.
    assert "another model" in run("decode", PROMPT, "--config", file, code=2)[1]
    given = ("evaluate", "--model", "builtin:student", "--config", file, "--problems", 2, "--json", out)
    run(*given)
    (row,) = json.loads(out.read_text())
    assert row["policy"] == fastest["rule"]
    assert row["config"]["block_length"] == 8
    run(*given, "--policy", "margin:0.5")
    assert [row["policy"] for row in json.loads(out.read_text())] == ["margin:0.5"]


def test_prompts_of_a_file_are_compared_with_the_most_passes(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": PROMPT}) + "\n" + PROMPT.replace("4", "5") + "\n")
    given = ("--prompts", prompts, "--policy", "one", "--policy", "confidence:0", "--active-blocks", 1)
    given = (*given, "--block-length", 12, "--dtype", "float16", "--mask-id", 200)
    text, _ = run("tune", tmp_path / "tuned.json", *SMALL, *given)
    content = json.loads((tmp_path / "tuned.json").read_text())
    assert (content["tuned"]["dtype"], content["tuned"]["fp8"]) == ("float16", False)
    assert content["mask_id"] == 200  # for which the choice is
    slow, fast = content["tuned"]["curve"]
    assert (slow["same"], slow["passes"], fast["passes"]) == (1.0, 12, 1)
    assert fast["same"] < 1
    assert content["rule"] == "one"  # the other has other texts
    assert "same" in text.splitlines()[0]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--drafter", "ngram"), "drafter: builtin:teacher is a diffusion model"),
        (("--context", 9), "context: builtin:teacher is a diffusion model"),
        ((*DRAFTED, "--policy", "one"), "policy: belongs to masked diffusion"),
        ((*DRAFTED, "--cache", "dual"), "cache: belongs to masked diffusion"),
        ((*DRAFTED, "--draft-size", 99), "draft_size: expected a whole number <= 15, got 99"),
        ((*DRAFTED, "--context", 500), "was trained on 256"),
        ((*DRAFTED[:3], "medusa"), "drafter: expected a Drafter, a name"),
        (("--model", "nowhere"), "model: 'nowhere'"),
        (("--prompts", "nowhere"), "prompts: no file nowhere"),
        (("--prompts", "/dev/null"), "prompts: /dev/null holds no prompts"),
        (("--policy", "x"), "policy: expected"),
        (("--tolerance", "nan"), "tolerance: expected a finite number >= 0, got nan"),
        (("--gen-length", 1), "gen_length: expected a whole number >= 2, got 1"),
        (("--cache", "block"), "cache: expected"),
        (("--block-length", 0), "block_length: expected a whole number >= 1, got 0"),
        (("--active-blocks", 0), "active_blocks: expected"),
        (("--problems", 0), "problems: expected a whole number >= 1, got 0"),
        (("--batch", 0), "batch: expected a whole number >= 1, got 0"),
        (("--repeats", 0), "repeats: expected a whole number >= 1, got 0"),
        (("--device", "gpu"), "device: expected cpu"),
        (("--dtype", "half"), "dtype: expected auto, float32, bfloat16, float16, got 'half'"),
    ],
)
def test_bad_input_is_named(
    args: tuple[object, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _, error = run("tune", "out.json", *args, code=2)
    assert said in error
    assert error.splitlines()[-1].startswith("error: ")
    assert not list(tmp_path.iterdir())
    assert "is a directory, expected a file" in run("tune", tmp_path, *args, code=2)[1]


@pytest.mark.parametrize("at", ["choose", "content"])
def test_a_run_that_is_interrupted_leaves_the_file_as_it_was(
    at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, at, interrupted)
    file = tmp_path / "tuned.json"
    _, said = run("tune", file, *DRAFTED, *SMALL, "--draft-size", 3, code=130)
    assert said.endswith(f"interrupted: {file} is as it was; the same command begins anew\n")
    assert not list(tmp_path.iterdir())
    file.write_text("as it was")
    run("tune", file, *DRAFTED, *SMALL, "--draft-size", 3, code=130)
    assert [each.read_text() for each in tmp_path.iterdir()] == ["as it was"]
