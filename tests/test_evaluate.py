"""Evaluation, its table, its files and pictures."""

from __future__ import annotations

import functools
import io
import itertools
import json
import shutil
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import golden
from dparallel import configs, evaluate, files, problems, registry, results
from dparallel import sweep as sweeping
from dparallel.configs import parse_policy
from dparallel.toy import several_answers, tasks

import dparallel_ext as dx
from dparallel_ext.rules import ONE


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return registry.load()


def test_a_terminal_shows_how_many_problems_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    for terminal in (True, False):
        shown = io.StringIO()
        monkeypatch.setattr(shown, "isatty", lambda terminal=terminal: terminal)
        monkeypatch.setattr(sys, "stderr", shown)
        evaluate.evaluate("builtin:student", "quota:32", problems=3, batch=2)
        assert ("builtin:student:   0%" in shown.getvalue()) == terminal
        assert bool(shown.getvalue()) == terminal


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
    row = evaluate.evaluate("builtin:teacher", ONE, problems=2, loaded=loaded)
    assert row["nfe_mean"] == tasks.GEN_LENGTH
    assert row["padded_tokens_per_forward"] == 1.0 > row["tokens_per_forward"]


def test_a_block_causal_models_own_blocks_are_the_default(loaded: tuple[Any, Any]):
    sdar = golden.home / "sdar_tiny_a"
    assert registry.traits_of(str(sdar)).default_block_length == 8
    assert registry.traits_of("builtin:teacher").default_block_length == 32
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


def test_json_is_written_whole(tmp_path: Path):
    file = tmp_path / "new" / "rows.json"
    files.write_json(file, [{"a": 1}])
    with pytest.raises(TypeError):
        files.write_json(file, [{"a": object()}])
    assert json.loads(file.read_text()) == [{"a": 1}]
    assert list(file.parent.iterdir()) == [file]


def test_several_answers_in_small(tmp_path: Path):
    model, tokenizer = registry.load("builtin:student", dtype=torch.float32)
    before = model.lm_head.weight.clone()
    tuned = several_answers.finetune(model, tmp_path, steps=1, problems=4)
    assert (tuned.lm_head.weight != before).any()
    config = dx.DecodeConfig(rule="confidence:0.2", active_blocks=4, cache="dual")
    assert model.config["max_sequence_length"] == 256
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # its sequences have more positions than the teacher's
        right, problems, passes, kept = several_answers.measure(tuned, tokenizer, config, sequences=1)
    assert problems == 4 >= right
    assert 0 < passes <= kept <= 256


def test_a_result_of_an_old_version_has_a_line():
    """What it lacks is blank, and the columns stay."""
    rows = results.read_results(Path(__file__).parents[1] / "docs" / "rules.json")
    older, newer = ([row for row in rows if ("nfe_to_eos" in row) == new] for new in (False, True))
    assert older
    assert newer
    for row in (older[0], newer[0]):
        assert results.result_line(row).index(row["model"]) == results.HEADING.index("model")


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
    kinds = ["rule" if row["policy"] == ONE else "verifier" for row in rows]
    assert asked == [{kind: row["policy"], **row["config"]} for kind, row in zip(kinds, rows, strict=True)]


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
    if kind == "verifier":  # an end counts as a token of its pass, but not as one of the text
        ends = (found["padded_tokens_per_forward"] - found["tokens_per_forward"]) * found["nfe_mean"]
        assert 0.5 < ends <= 1 + 1e-6
    elif kind == "drafter":
        assert found["accepted_per_draft"] == sum(found["accepted"]) / found["drafted"][0]
        assert found["layers"] == pytest.approx(1 / found["tokens_per_forward"])
        assert sum(found["drafted"]) > found["drafted"][0]


def test_a_response_is_judged_to_its_end(own: Path):
    """What follows the end token is no text; `count` takes the first problems."""
    seen: list[str] = []

    def right(answer: str, response: str) -> bool:
        seen.append(response)
        return answer in response

    model, tokenizer = registry.load("builtin:student")
    asked = replace(
        problems.from_file(str(own), prompt_field="question", count=5, gen_length=64), checker=right
    )
    answers: list[evaluate.Answer] = []
    row = evaluate.evaluate("x", "entropy:0.5", problems=asked, loaded=(model, tokenizer), answers=answers)
    texts = [tokenizer.decode(each.tokens[: each.tokens.index(model.eos_id)]) for each in answers]
    assert sorted(seen) == sorted(texts)
    assert (row["problems"], len(answers)) == (5, 5)
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
    stream = itertools.islice(tasks.problems("held_out"), 5)
    assert lengths == [len(tokenizer.encode(p.prompt).ids) for p in stream] != sorted(lengths)


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
    # The third answer fills its last block beyond the tokens that were asked for.
    assert row["padded_tokens_per_forward"] == pytest.approx(3 * 21 / int(out.nfe.sum()))
    assert row["tokens_per_forward"] == pytest.approx((11 + 21 + 21) / int(out.nfe.sum()))
