"""Evaluation, its table, its files and pictures."""

from __future__ import annotations

import functools
import itertools
import json
import shutil
import time
import timeit
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from conftest import golden
from dparallel import configs, evaluate, files, plots, problems, registry, results
from dparallel import sweep as sweeping
from dparallel.configs import parse_policy
from dparallel.toy import several_answers, tasks

import dparallel_ext as dx
from dparallel_ext import backends


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return registry.load()


@pytest.mark.slow
def test_evaluate_agrees_with_decoding_one_by_one(loaded: tuple[Any, Any]):
    model, tokenizer = loaded
    row = evaluate.evaluate("builtin:teacher", "entropy:0.5", problems=12, batch=5, loaded=loaded)
    right = passes = kept = 0
    for problem in itertools.islice(tasks.problems("held_out"), 12):
        prompt = torch.tensor([tokenizer.encode(problem.prompt).ids])
        out = dx.decode(model, prompt, gen_length=64, threshold=0.5, selector="entropy")
        right += tasks.is_correct(problem, tokenizer.decode(out.sequences[0, prompt.shape[1] :].tolist()))
        passes += out.forwards
        kept += [*out.responses[0].tolist(), model.eos_id].index(model.eos_id)
    assert row["accuracy"] == right / 12
    assert row["nfe_mean"] == pytest.approx(passes / 12)
    assert row["tokens_per_forward"] == pytest.approx(kept / passes)
    assert row["padded_tokens_per_forward"] == pytest.approx(64 * 12 / passes)
    assert row["block_length"] == 32
    assert row["seconds"] > 0


def test_samples_are_those_of_a_problem_whatever_its_batch(loaded: tuple[Any, Any]):
    config = dx.DecodeConfig(temperature=1.0, seed=3)
    found: list[list[evaluate.Answer]] = [[], []]
    for answers, batch in zip(found, (2, 6), strict=True):
        evaluate.evaluate(
            "builtin:teacher",
            "quota:16",
            problems=6,
            config=config,
            batch=batch,
            loaded=loaded,
            answers=answers,
        )
    assert found[0] == found[1]
    rows = [
        evaluate.evaluate_adaptive(
            "builtin:teacher", registry.VERIFIER, config=config, problems=6, batch=batch, loaded=loaded
        )
        for batch in (2, 6)
    ]
    assert rows[0] | {"seconds": 0} == rows[1] | {"seconds": 0}


def test_one_token_a_pass_is_gen_length_passes(loaded: tuple[Any, Any]):
    row = evaluate.evaluate("builtin:teacher", evaluate.ONE, problems=2, loaded=loaded)
    assert row["nfe_mean"] == tasks.GEN_LENGTH
    assert row["padded_tokens_per_forward"] == 1.0 > row["tokens_per_forward"]


def test_a_block_causal_models_own_blocks_are_the_default(loaded: tuple[Any, Any]):
    sdar = golden.home / "sdar_tiny_a"
    assert registry.block_length(str(sdar)) == 8
    assert registry.block_length("builtin:teacher") == 32
    given = (dx.models.load(sdar), loaded[1])
    rows = [
        evaluate.evaluate(
            "sdar", "quota:8", problems=1, loaded=given, config=dx.DecodeConfig(block_length=size)
        )
        for size in (None, 8, 4)
    ]
    assert [row["block_length"] for row in rows] == [8, 8, 4]
    passes = [row["nfe_mean"] for row in rows]
    assert passes[0] == passes[1] != passes[2]


@pytest.mark.parametrize(
    "text", ["", "entropy", "entropy:", "entropy:x", "speed:1", "quota:0.5", "entropy:nan"]
)
def test_a_policy_that_is_none_is_named(text: str):
    with pytest.raises(ValueError, match=r"policy: expected"):
        parse_policy(text)


def test_policies_are_checked_before_anything_is_decoded():
    with pytest.raises(ValueError, match="policy"):
        next(iter(sweeping.sweep(["builtin:teacher"], ["entropy:0.5", "nonsense"])))


SPREAD = {"rule": "entropy:0.5", "block_length": 8, "active_blocks": 3, "open_at": 0.0}


def test_a_row_may_set_other_fields_of_the_config(loaded: tuple[Any, Any]):
    model, tokenizer = loaded
    config = dx.DecodeConfig(cache="dual")
    row = next(iter(sweeping.sweep(["builtin:teacher"], [SPREAD], problems=3, config=config)))
    passes = 0
    for problem in itertools.islice(tasks.problems("held_out"), 3):
        ids = [tokenizer.encode(problem.prompt).ids]
        passes += dx.decode(model, ids, dx.DecodeConfig(**SPREAD, gen_length=64, cache="dual")).forwards
    assert row["nfe_mean"] == pytest.approx(passes / 3)
    assert (row["policy"], row["block_length"], row["cache"]) == ("entropy:0.5", 8, "dual")
    assert row["config"] == {"block_length": 8, "cache": "dual", "active_blocks": 3, "open_at": 0.0}


@pytest.mark.parametrize("fields", [{}, {"active_blocks": 3}, {"rule": "edit:0.9,0.9"}], ids=str)
def test_passes_to_eos_are_those_of_decoding_to_it(fields: dict[str, Any]):
    model, tokenizer = registry.load("builtin:student")
    problems = itertools.islice(tasks.problems("held_out"), 6)
    prompts = [tokenizer.encode(problem.prompt).ids for problem in problems]
    config = dx.DecodeConfig(gen_length=64, block_length=8).replace(**{"rule": "entropy:0.5", **fields})
    whole, ended = (
        dx.decode(model, prompts, config, record=True),
        dx.decode(model, prompts, config, eos_id=model.eos_id),
    )
    assert (whole.nfe > ended.nfe).all()
    ends = torch.stack(whole.responses) == model.eos_id
    found = evaluate.passes_to_eos(whole.trajectory.step, whole.nfe, ends, 8)
    assert found.tolist() == ended.nfe.tolist()


def test_results_of_an_earlier_run_are_not_measured_again(monkeypatch: pytest.MonkeyPatch):
    measured = []

    def once(
        name: str, policy: str, *, config: dx.DecodeConfig, problems: problems.Problems, **rest: Any
    ) -> dict[str, Any]:
        measured.append(policy)
        row = measure(name, policy, config=config, problems=0, **rest)
        return row | problems.description

    measure = evaluate.evaluate
    monkeypatch.setattr(sweeping, "evaluate", once)

    def sweep(known: list[dict[str, Any]], problems: int = 5) -> list[dict[str, Any]]:
        return list(sweeping.sweep(["builtin:student"], ["one", SPREAD], known, problems=problems))

    rows = sweep([])
    assert measured == ["one", "entropy:0.5"]
    assert sweep(rows) == rows
    assert sweep(rows[1:]) == rows
    assert measured == ["one", "entropy:0.5", "one"]
    sweep(rows, problems=6)
    assert len(measured) == 5


def test_a_result_in_another_dtype_is_another():
    """And is measured again. Results of older versions name no dtype; they were loaded as they are stored."""
    name = str(registry.directory_of("builtin:student"))

    def sweep(known: list[dict[str, Any]], dtype: torch.dtype | None = None) -> dict[str, Any]:
        loading = registry.Loading(dtype=dtype)
        (row,) = sweeping.sweep([name], ["quota:32"], known, problems=1, loading=loading)
        return row

    stored = sweep([])
    wide = sweep([stored], torch.float32)
    assert (stored["dtype"], wide["dtype"]) == ("bfloat16", "float32")
    for dtype, row in ((None, stored), (torch.bfloat16, stored), (torch.float32, wide)):
        assert sweep([stored, wide], dtype) is row
    older = {key: value for key, value in stored.items() if key != "dtype"}
    assert sweep([older]) is older
    assert sweep([older], torch.bfloat16)["dtype"] == "bfloat16"


def test_a_result_with_another_mask_token_or_on_another_device_is_another():
    """A mask that is named is that of the checkpoint, if it is the same."""
    name = "builtin:student"
    own = registry.load(name)[0].mask_id

    def sweep(known: list[dict[str, Any]], **how: Any) -> dict[str, Any]:
        (row,) = sweeping.sweep([name], ["quota:32"], known, problems=1, loading=registry.Loading(**how))
        return row

    stored = sweep([])
    assert (stored["mask_id"], stored["device"]) == (own, "cpu")
    for how in ({}, {"mask_id": own}, {"device": "cpu"}, {"device": "cpu:0"}):
        assert sweep([stored], **how) is stored
    other = sweep([stored], mask_id=own - 1)
    assert other["mask_id"] == own - 1
    for known in ([stored, other], [other, stored]):
        assert sweep(known) is stored
        assert sweep(known, mask_id=own - 1) is other
    assert sweep([stored | {"device": "cuda"}])["device"] == "cpu"
    older = {key: value for key, value in stored.items() if key not in ("device", "mask_id")}
    assert sweep([older]) is older
    assert sweep([older], mask_id=own - 1)["mask_id"] == own - 1
    assert sweep([older], device="cpu") is not older


def test_a_dtype_and_weights_in_8_bits():
    """The dtype is then that of all other weights, and of the arithmetic."""
    loading = registry.Loading(dtype=torch.float16, fp8=True)
    given: dict[str, Any] = {"drafters": ["plain"], "problems": 1, "loading": loading}
    rows = [*sweeping.sweep(["builtin:causal", "builtin:student"], ["quota:32"], **given)]
    assert [(row["dtype"], row["fp8"]) for row in rows] == [("float16", True)] * 2
    narrow, wide = (
        registry.load("builtin:student", dtype=dtype, fp8=True)[0].state_dict()
        for dtype in (torch.bfloat16, torch.float32)
    )
    for name, tensor in narrow.items():
        kept = tensor.dtype == torch.float8_e4m3fn
        assert wide[name].dtype == (tensor.dtype if kept else torch.float32)
        assert torch.equal(wide[name].float(), tensor.float())


def test_a_model_that_drafts_is_in_the_models_dtype(monkeypatch: pytest.MonkeyPatch):
    made: list[torch.dtype] = []

    def noted(model: dx.models.Model) -> dx.speculation.ModelDrafter:
        made.append(model.dtype)
        return dx.speculation.ModelDrafter(model)

    monkeypatch.setattr("dparallel_ext.speculation.loading.ModelDrafter", noted)
    model, _ = registry.load("builtin:causal", dtype=torch.float16)
    dx.speculate(model, [[5, 6]], gen_length=2, drafter="builtin:student")
    dx.Engine(model, drafter="builtin:student", lanes=1, max_length=32).close()
    loading = registry.Loading(dtype=torch.float16)
    evaluate.evaluate_drafter("builtin:causal", "builtin:student", problems=1, loading=loading)
    assert made == [torch.float16] * 3


def test_guesses_of_self_speculation_are_a_row_beside():
    """And not of the policies, where --draft-size is for the drafters of an autoregressive model."""
    policies = [evaluate.ONE, {"rule": "one", "draft_size": 4}]
    plain, guessed = sweeping.sweep(["builtin:student"], policies, problems=2)
    assert "canvases_mean" not in plain
    assert "same_texts" not in plain
    assert guessed["config"] == {"draft_size": 4}
    assert guessed["same_texts"] == 2
    assert [*sweeping.sweep(["builtin:student"], policies, [plain], problems=2)][1]["same_texts"] == 2
    assert guessed["nfe_mean"] < 45 < plain["nfe_mean"] < guessed["canvases_mean"] <= 5 * guessed["nfe_mean"]
    assert guessed["nfe_to_eos"] < plain["nfe_to_eos"]
    assert guessed["accuracy"] == plain["accuracy"]
    table = results.table([plain, guessed]).splitlines()
    assert table[0].endswith("canvases | texts as without | seconds |")
    assert table[2].endswith(f"| 64.00 |  | {plain['seconds']:.1f} |")
    assert table[3].endswith(f"| {guessed['canvases_mean']:.2f} | 2 | {guessed['seconds']:.1f} |")
    (for_all,) = sweeping.sweep(["builtin:student"], [evaluate.ONE], problems=2, draft_size=4)
    assert for_all["nfe_mean"] == guessed["nfe_mean"]
    names = ["builtin:student", "builtin:causal"]
    first, *_ = sweeping.sweep(names, [evaluate.ONE], problems=1, draft_size=4, drafters=["plain"])
    assert first["config"] == {}
    assert first["nfe_mean"] == tasks.GEN_LENGTH


def test_plain_decoding_has_no_size_of_a_draft() -> None:
    """One row of it serves drafts of every size."""

    def sweep(known: list[dict[str, Any]], size: int) -> list[dict[str, Any]]:
        names, drafters = ["builtin:causal"], ["plain", "ngram"]
        return [*sweeping.sweep(names, [], known, drafters=drafters, draft_size=size, problems=2)]

    plain, guessed = sweep([], 4)
    assert (plain["config"], guessed["config"]) == ({}, {"draft_size": 4})
    again, other = sweep([plain, guessed], 8)
    assert again is plain
    assert other["config"] == {"draft_size": 8}
    assert other["same_texts"] == 2


def test_each_model_of_a_sweep_has_a_template_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the models before it have one or not."""
    asked: list[bool] = []

    def chatted(name: str, policy: str, *, chat: bool, **settings: Any) -> dict[str, Any]:
        asked.append(chat)
        return {}

    def template_of(name: str, chat: bool | None = None) -> str | None:
        return name if name == "builtin:student" and chat is not False else None

    monkeypatch.setattr(sweeping, "evaluate", chatted)
    monkeypatch.setattr(registry, "template_of", template_of)
    names = ["builtin:teacher", "builtin:student", "builtin:teacher"]
    list(sweeping.sweep(names, ["one"], problems=1))
    assert asked == [False, True, False]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "rows: .* is not JSON"),
        ("{}", "rows: .* holds a dict, expected a list"),
        ("[]", "holds an empty list"),
        ('["entropy:0.5"]', "entry 1: expected an object with a \"rule\".*, got 'entropy:0.5'"),
        (
            '[{"rule": "one"}, {"rule": "one", "gen_length": 3}]',
            "entry 2: expected fields of .* got 'gen_length'",
        ),
        ('[{"rule": "one", "active_blocks": 0}]', "entry 1: active_blocks: expected"),
        ('[{"rule": "nonsense"}]', "entry 1: rule: expected"),
        ('[{"rule": "one", "draft_size": -1}]', "entry 1: draft_size: expected a whole number >= 0, got -1"),
        ('[{"verifier": 3}]', 'entry 1: expected an object with a "rule", or a "verifier"'),
        ('[{"verifier": "builtin:verifier", "mixture": 2}]', "entry 1: mixture: expected a number"),
        ('[{"verifier": "builtin:verifier", "window": 0}]', "entry 1: window: expected a whole number >= 1"),
        ('[{"verifier": "builtin:verifier", "rule": "one"}]', "entry 1: expected fields of .* got 'rule'"),
    ],
)
def test_a_file_of_rows_that_is_none_is_named(content: str, said: str, tmp_path: Path):
    file = tmp_path / "rows.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=said):
        configs.read_rows(file)


def test_texts_are_compared_with_those_of_an_earlier_run_too():
    given: dict[str, Any] = {"drafters": ["plain", "ngram"], "problems": 2}
    plain, drafted = sweeping.sweep(["builtin:causal"], [], **given)
    assert drafted["same_texts"] == 2
    _, again = sweeping.sweep(["builtin:causal"], [], [plain], **given)
    assert (again["same_texts"], again["gaps"]) == (2, [])


def test_a_verifier_of_other_tokens_is_named():
    class Tokens(NamedTuple):
        words: dict[str, int]

        def get_vocab(self) -> dict[str, int]:
            return self.words

    model, tokenizer = registry.load("builtin:student")
    words = tokenizer.get_vocab()
    assert registry.load_verifier(registry.VERIFIER, model, tokenizer).causal
    names = {at: word for word, at in words.items()}
    swapped = {**words, names[7]: 8, names[8]: 7}
    with pytest.raises(ValueError, match=f"verifier: token 7 of builtin:verifier is '{names[7]}', and the"):
        registry.load_verifier(registry.VERIFIER, model, Tokens(swapped))
    for dtype in (torch.float32, torch.bfloat16):
        assert registry.load_verifier(registry.VERIFIER, model.to(dtype), tokenizer).dtype == dtype
    beyond = {**words, "more": len(words)}  # which the verifier does not have
    assert registry.load_verifier(registry.VERIFIER, model, Tokens(beyond)).causal


def test_models_are_found_by_name_or_path(tmp_path: Path):
    assert {registry.DEFAULT, registry.VERIFIER} <= {*registry.builtins()}
    assert registry.directory_of("builtin:teacher") == registry.directory_of(
        str(registry.BUILTIN / "teacher")
    )
    with pytest.raises(FileNotFoundError, match=r"model: 'builtin:nobody' .*builtin:teacher"):
        registry.load("builtin:nobody")
    with pytest.raises(FileNotFoundError, match="model: "):
        registry.load(str(tmp_path))


def test_bfloat16_is_fast_where_a_clock_says_so():
    """It takes half of float32's time or less with instructions for it, and five times or more without."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.ones(256, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
        # Of the processor: what else runs here does not count.
        timer = timeit.Timer(lambda x=x, w=weight: F.linear(x, w), timer=time.process_time)
        seconds[dtype] = min(timer.repeat(number=4, repeat=7))
    assert backends.fast_bfloat16("cpu") == (seconds[torch.bfloat16] < 2 * seconds[torch.float32])


def test_models_that_ship_are_in_the_dtype_that_is_fast(monkeypatch: pytest.MonkeyPatch):
    """A CPU without bfloat16 products would take longer; a dtype that is given is obeyed."""
    for fast, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(backends, "fast_bfloat16", lambda device=None, fast=fast: fast)
        assert registry.load("builtin:student")[0].dtype == dtype
    assert registry.load("builtin:student", dtype=torch.bfloat16)[0].dtype == torch.bfloat16
    directory = str(registry.directory_of("builtin:student"))
    assert registry.load(directory)[0].dtype == torch.bfloat16  # a checkpoint of one's own is as it is


def test_json_is_written_whole(tmp_path: Path):
    file = tmp_path / "new" / "rows.json"
    files.write_json(file, [{"a": 1}])
    with pytest.raises(TypeError):
        files.write_json(file, [{"a": object()}])
    assert json.loads(file.read_text()) == [{"a": 1}]
    assert list(file.parent.iterdir()) == [file]


def test_pictures_are_drawn(tmp_path: Path):
    base = {"problems": 5, "gen_length": 64}
    rows = [
        {**base, "model": "m", "policy": "one", "threshold": None, "nfe_mean": 64.0, "accuracy": 1.0},
        {**base, "model": "m", "policy": "entropy:0.5", "threshold": 0.5, "nfe_mean": 9.0, "accuracy": 0.8},
    ]
    plots.accuracy_against_passes(rows, tmp_path / "a.png")
    plots.response_by_pass(["a", "b", "·"] * 9, [1, 2, 3] * 9, tmp_path / "b.png", title="t")
    plots.response_by_pass([], [], tmp_path / "c.png")
    for name in ("a.png", "b.png", "c.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_no_two_labels_of_the_curves_overlap():
    rows = [
        {**row, "model": name}
        for name in ("teacher", "student")
        for row in json.loads((registry.BUILTIN / name / "held_out.json").read_text())
    ]
    (axes,) = plots.draw_accuracy(rows).axes
    boxes = [plots.text_box(text) for text in axes.texts]
    assert len(boxes) == sum(row["threshold"] is not None for row in rows) > 12
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    assert all(axes.bbox.contains(*box.min) and axes.bbox.contains(*box.max) for box in boxes)


def test_the_legend_hides_no_point_and_drafters_are_points_with_names():
    docs = Path(__file__).parents[1] / "docs"
    for name in ("rules", "speculation"):
        figure = plots.draw_accuracy(json.loads((docs / f"{name}.json").read_text()))
        for axes in figure.axes:
            legend = axes.get_legend().get_window_extent()
            points = [p for each in axes.containers for p in each[0].get_xydata()]
            assert not any(legend.contains(*axes.transData.transform(point)) for point in points)
    (drafters,) = [each for each in axes.containers if each.get_label() == "builtin:causal, by drafter"]
    assert drafters[0].get_linestyle() == "None"
    assert {"plain", "ngram", "dflash", "student"} <= {text.get_text() for text in axes.texts}


def test_several_answers_in_small():
    model, tokenizer = registry.load("builtin:student", dtype=torch.float32)
    before = model.lm_head.weight.clone()
    tuned = several_answers.finetune(model.requires_grad_(), tokenizer, steps=1, problems=4)
    assert (tuned.lm_head.weight != before).any()
    config = dx.DecodeConfig(rule="confidence:0.2", active_blocks=4, cache="dual")
    assert model.config["max_sequence_length"] == 256
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # its sequences have more positions than the teacher's
        right, problems, passes, kept = several_answers.measure(tuned, tokenizer, config, sequences=1)
    assert problems == 4 >= right
    assert 0 < passes <= kept <= 256


def test_many_rules_have_a_panel_for_each_model():
    base = {"problems": 5, "gen_length": 64, "nfe_mean": 9.0, "accuracy": 0.9}
    names = [
        "one",
        "entropy:0.5",
        "credit+frechet:0.25",
        "edit:0.9,0.9",
        "margin:0.5",
        "sched:14,8+entropy:0.5",
    ]
    rows = [{**base, "model": m, "policy": name} for m in "ab" for name in names]
    rows.append({**base, "model": "a", "policy": "entropy:0.5", "config": {"active_blocks": 2}})
    figure = plots.draw_accuracy(rows)
    assert [len(axes.get_legend().get_texts()) for axes in figure.axes] == [7, 6]
    said = {text.get_text() for text in figure.axes[0].texts}
    assert said == {"0.5", "0.25", "0.9,0.9", "14,8+0.5"}


def test_a_result_of_an_old_version_has_a_line():
    """What it lacks is blank, and the columns stay."""
    rows = results.read_results(Path(__file__).parents[1] / "docs" / "rules.json")
    older, newer = ([row for row in rows if ("nfe_to_eos" in row) == new] for new in (False, True))
    assert older
    assert newer
    for row in (older[0], newer[0]):
        assert results.line(row).index(row["model"]) == results.HEADING.index("model")


def test_the_results_of_the_docs_are_those_of_the_recipes():
    docs = Path(__file__).parent.parent / "docs"
    rows = json.loads((docs / "rules.json").read_text())
    measured = {(row["policy"], json.dumps(row["config"])) for row in rows}
    asked = configs.read_rows(docs.parent / "recipes" / "rules.json")
    assert {row["model"] for row in rows} == {"builtin:teacher", "builtin:student"}
    assert {
        (row["rule"], json.dumps({k: v for k, v in row.items() if k != "rule"})) for row in asked
    } == measured
    rows = json.loads((docs / "apd.json").read_text())
    asked = configs.read_rows(docs.parent / "recipes" / "adaptive.json")
    kinds = ["rule" if row["policy"] == evaluate.ONE else "verifier" for row in rows]
    assert asked == [{kind: row["policy"], **row["config"]} for kind, row in zip(kinds, rows, strict=True)]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not JSON"),
        ('{"model_type": ["llada"]}', r"config\.json: model_type \['llada'\] is none of"),
        ('{"model_type": "llada", "n_heads": 2}', r"config\.json: '\w+' is missing"),
    ],
)
def test_a_config_that_names_no_model_is_an_error_by_name(content: str, said: str, tmp_path: Path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=said):
        registry.block_length(str(tmp_path))


# --- problems of one's own ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in task's problems in a file, with prompts of several lengths."""
    file = tmp_path_factory.mktemp("data") / "problems.jsonl"
    stream = itertools.islice(tasks.problems("held_out"), 12)
    rows = [{"question": p.prompt, "answer": f"so it is #### {p.answer}"} for p in stream]
    assert len({len(row["question"].split()) for row in rows}) > 1
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("kind", ["policy", "verifier", "drafter"])
def test_own_problems_are_measured_as_the_built_in_ones(kind: str, own: Path):
    """The same problems: the same passes and right answers, though of like lengths together."""
    asked = problems.from_file(str(own), prompt_field="question", gen_length=64)
    measured = []
    for given in (12, asked):
        if kind == "policy":
            row = evaluate.evaluate("builtin:student", "entropy:0.5", problems=given, batch=5)
        elif kind == "verifier":
            row = evaluate.evaluate_adaptive("builtin:student", registry.VERIFIER, problems=given, batch=5)
        else:
            row = evaluate.evaluate_drafter("builtin:causal", "ngram", problems=given, batch=5, draft_size=3)
        measured.append(row)
    built_in, found = measured
    for name in (
        "accuracy",
        "nfe_mean",
        "nfe_to_eos",
        "tokens_per_forward",
        "problems",
        "gen_length",
        "chat",
    ):
        assert found[name] == built_in[name], name
    assert found["accuracy"] > 0.5
    assert (found["data"], found["checker"], built_in["seed"]) == (str(own), "hashes", 0)
    assert "data" not in built_in
    assert "seed" not in found


def test_a_response_is_judged_to_its_end(own: Path):
    """What follows the end token is no text; `count` takes the first problems."""
    seen: list[str] = []

    def right(answer: str, response: str) -> bool:
        seen.append(response)
        return answer in response

    model, tokenizer = registry.load("builtin:student")
    asked = replace(
        problems.from_file(str(own), prompt_field="question", count=3, gen_length=64), checker=right
    )
    answers: list[evaluate.Answer] = []
    row = evaluate.evaluate("x", "entropy:0.5", problems=asked, loaded=(model, tokenizer), answers=answers)
    texts = [tokenizer.decode(each.tokens[: each.tokens.index(model.eos_id)]) for each in answers]
    assert sorted(seen) == sorted(texts)
    assert (row["problems"], len(answers)) == (3, 3)
    seen.clear()
    stop = [[answers[0].tokens[4]]]
    evaluate.evaluate(
        "x", "quota:32", config=dx.DecodeConfig(stop=stop), problems=asked, loaded=(model, tokenizer)
    )
    asked_ids = [each.prompt for each in answers]
    out = dx.decode(model, asked_ids, rule="quota:32", gen_length=64, stop=stop)
    ends = [
        evaluate.kept_of(response[:kept].tolist(), model.eos_ids)
        for response, kept in zip(out.responses, out.kept.tolist(), strict=True)
    ]
    assert max(ends) <= 64 > min(out.kept.tolist())
    pairs = zip(out.responses, ends, strict=True)
    assert sorted(seen) == sorted(tokenizer.decode(response[:end].tolist()) for response, end in pairs)
    lengths = [len(each.prompt) for each in answers]
    stream = itertools.islice(tasks.problems("held_out"), 3)
    assert lengths == [len(tokenizer.encode(p.prompt).ids) for p in stream]


def test_a_checker_that_fails_is_named(own: Path):
    for checker, said in (
        ("operator:truediv", "checker: operator:truediv raised TypeError.* for the answer 'so it is"),
        ("builtins:print", "checker: expected True or False from builtins:print, got None"),
    ):
        asked = problems.from_file(str(own), checker, prompt_field="question", count=1, gen_length=64)
        with pytest.raises(ValueError, match=said):
            evaluate.evaluate("builtin:student", "quota:32", problems=asked)


@pytest.mark.parametrize("model", ["builtin:student", "builtin:causal"])
def test_a_prompt_beyond_the_positions_of_a_model_that_ships_is_named(model: str, tmp_path: Path):
    """As `dparallel decode` names it."""
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "3 + 4 = " * 100, "answer": 7}))
    asked = problems.from_file(str(tmp_path / "p.jsonl"), gen_length=8)
    calls = [functools.partial(evaluate.evaluate_drafter, model, None)]
    if model == "builtin:student":
        calls = [
            functools.partial(evaluate.evaluate, model, "quota:32"),
            functools.partial(evaluate.evaluate_adaptive, model, registry.VERIFIER),
        ]
    for call in calls:
        with pytest.raises(ValueError, match=rf"gen_length: .* 408 tokens, but {model} was trained on 256"):
            call(problems=asked)


def test_the_fields_of_a_config_count_for_autoregressive_models():
    """Samples are those of a problem, whatever its batch; results, and what is known of them, name the
    fields."""
    config = dx.DecodeConfig(temperature=1.0, seed=3, top_p=0.99, suppress=[5])
    how: dict[str, Any] = {"problems": 4, "config": config, "drafters": ["plain", "builtin:student"]}
    rows = [*sweeping.sweep(["builtin:causal"], [], batch=3, **how)]
    greedy = evaluate.evaluate_drafter("builtin:causal", None, problems=4)
    assert rows[0]["config"] == {"temperature": 1.0, "top_p": 0.99, "suppress": [5], "seed": 3}
    assert rows[0]["nfe_mean"] != greedy["nfe_mean"]
    assert (rows[-1]["same_texts"], "gaps" in rows[-1]) == (4, False)
    alone = evaluate.evaluate_drafter("builtin:causal", None, problems=4, config=config, batch=1)
    assert alone["nfe_mean"] == rows[0]["nfe_mean"]
    assert [*sweeping.sweep(["builtin:causal"], [], rows, **how)] == rows
    again = sweeping.sweep(["builtin:causal"], [], rows, **how | {"config": config.replace(seed=4)})
    assert next(iter(again)) not in rows


def test_fields_without_an_effect_are_named():
    calls = [
        functools.partial(evaluate.evaluate, "builtin:student", "quota:32"),
        functools.partial(evaluate.evaluate_adaptive, "builtin:student", registry.VERIFIER),
        functools.partial(evaluate.evaluate_drafter, "builtin:causal", None),
    ]
    for call in calls:
        for field, value in (("gen_length", 8), ("record", True), ("logprobs", True)):
            with pytest.raises(ValueError, match=f"{field}: expected .*, since a measurement sets it itself"):
                call(problems=1, config=dx.DecodeConfig(**{field: value}))
    config = dx.DecodeConfig(refresh=2, cache="dual", temperature=1.0, seed=0)
    with pytest.raises(ValueError, match="cache: belongs to masked diffusion"):
        calls[-1](problems=1, config=config)
    with pytest.raises(ValueError, match="cache: belongs to masked diffusion"):
        next(iter(sweeping.sweep(["builtin:causal"], [], config=config)))
    both = sweeping.sweep(
        ["builtin:causal", "builtin:student"], ["quota:32"], problems=1, config=config, drafters=["plain"]
    )
    assert [[*row["config"]] for row in both] == [
        ["temperature", "seed"],
        ["cache", "refresh", "temperature", "seed"],
    ]


def test_a_drafter_without_a_name_is_refused():
    """Its result would be no JSON; a name of one's own is one."""
    drafter = dx.speculation.NGram()
    with pytest.raises(ValueError, match=r"drafter: expected a name, .* got NGram"):
        evaluate.evaluate_drafter("builtin:causal", drafter, problems=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"drafter: expected a name, .* got NGram"):
        next(iter(sweeping.sweep(["builtin:causal"], [], drafters=[drafter])))  # type: ignore[list-item]


def test_what_does_not_fit_a_file_of_problems_is_named(own: Path):
    for arguments, message in (
        ({"data": None}, "data: expected a file or builtin:N, got None"),
        ({"data": ""}, "data: expected .*, got ''"),
        ({"checker": 3}, "checker: expected one of .*, got 3"),
        ({"count": -1}, "count: expected a whole number >= 1, got -1"),
        ({"count": 1.5}, "count: expected a whole number >= 1, got 1.5"),
        ({"gen_length": "x"}, "gen_length: expected a whole number >= 1, got 'x'"),
    ):
        with pytest.raises(ValueError, match=message):
            problems.from_file(**{"data": own, "prompt_field": "question", **arguments})
    with pytest.raises(ValueError, match=r"seed: expected a whole number .*, got 'x'"):
        problems.held_out(3, "x")  # type: ignore[arg-type]


def test_results_of_other_problems_are_measured_anew(own: Path, tmp_path: Path):
    """Those of another file, or of the same file with another content."""
    other = own.with_name("other.jsonl")
    other.write_text(own.read_text())
    own = Path(shutil.copy(own, tmp_path))

    def sweep(known: Any, file: Path | None, **how: Any) -> Any:
        how = {"gen_length": 64, "prompt_field": "question", **how}
        asked = 12 if file is None else problems.from_file(str(file), **how)
        (row,) = sweeping.sweep(["builtin:student"], ["quota:32"], known, problems=asked)
        return row

    known = [sweep([], None), sweep([], own), sweep([], own, checker="last_number")]
    assert sweep(known, own) is known[1]
    assert sweep(known, own, checker="last_number") is known[2]
    assert sweep(known, None) is known[0]
    for file, how in ((other, {}), (own, {"gen_length": 32}), (own, {"count": 11})):
        assert sweep(known, file, **how) not in known
    own.write_text(own.read_text().replace("#### ", "#### 1"))
    assert sweep(known, own) not in known


def test_passes_to_the_end_of_a_block_causal_model(tmp_path: Path, loaded: tuple[Any, Any]):
    """Its blocks count from the first position of the prompt, so a response begins within one."""
    model = golden.model("sdar_tiny_a")
    prompts = [loaded[1].encode("cups " * n).ids for n in (11, 3, 16)]
    out = dx.decode(model, prompts, gen_length=21, record=True)
    model.eos_id = int(out.responses[0][11])
    model.eos_ids = (model.eos_id,)
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps({"prompt": "cups " * n, "answer": 1}) + "\n" for n in (11, 3, 16)))
    asked = problems.from_file(str(file), "none", gen_length=21)
    row = evaluate.evaluate("sdar", "one", problems=asked, loaded=(model, loaded[1]), batch=3)
    assert (model.block_length, len(prompts[0]) + 11) == (8, 22)  # of the block from 16 to 23
    assert out.trajectory is not None
    assert all(model.eos_id not in response.tolist() for response in out.responses[1:])
    first = max(out.trajectory.step[0, : 24 - 11].tolist())
    assert row["nfe_to_eos"] == pytest.approx((first + int(out.nfe[1:].sum())) / 3)
    assert row["nfe_to_eos"] < row["nfe_mean"]
