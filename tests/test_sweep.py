"""Measurements of several models and policies, and which of an earlier run are not made again."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from dparallel import configs, evaluate, problems, registry, results
from dparallel import sweep as sweeping
from dparallel.toy import tasks
from test_evaluate import SPREAD

import dparallel_ext as dx
from dparallel_ext.rules import ONE


def test_policies_are_checked_before_anything_is_decoded():
    with pytest.raises(ValueError, match="policy"):
        next(iter(sweeping.sweep(["builtin:teacher"], ["entropy:0.5", "nonsense"])))
    with pytest.raises(ValueError, match="policy"):  # a row without a rule
        next(iter(sweeping.sweep(["builtin:teacher"], [{"cache": "dual"}])))
    rule: Any = dx.rules.Credit()
    with pytest.raises(ValueError, match=r"policy: expected a text.*Credit.*rules\.KINDS"):
        next(iter(sweeping.sweep(["builtin:teacher"], [rule])))
    with pytest.raises(ValueError, match=r"policy: expected a text.*Credit.*rules\.KINDS"):
        evaluate.evaluate("builtin:teacher", rule)


@pytest.mark.parametrize(
    ("policies", "settings", "said"),
    [
        (["one"], {"drafters": ["plain", "nowhere"]}, "drafter: expected a Drafter, a name"),
        (["one"], {"drafters": ["plain", "builtin:teacher/"]}, "drafter: no directory builtin:teacher/"),
        (["one"], {"drafters": ["plain", "jump_forward"]}, "drafter: jump_forward drafts along the form"),
        (["one"], {"drafters": ["plain", "self"]}, "drafter: "),
        (["one", {"rule": "one", "cache": "block"}], {}, 'cache: expected "none", "prefix" or "dual"'),
        (["one", {"rule": "credit", "draft_size": 3}], {}, "draft_size: goes with policy rows alone"),
        (["one", "edit+confidence:0.9"], {}, "rule: Edit decides without a policy row"),
        (
            ["one", {"rule": "one", "active_blocks": 2}],
            {},
            "active_blocks: several need a threshold or a rule",
        ),
        (["one", {"verifier": "nowhere"}], {}, "verifier: 'nowhere' is neither one of"),
        (["one"], {"chat": True}, "chat: the checkpoint 'builtin:teacher' has no chat template"),
    ],
)
def test_what_does_not_fit_a_model_is_named_before_anything_is_measured(
    policies: list[Any], settings: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
):
    """Of every model: the last may be hours behind the first."""
    measured = list[str]()
    for name in ("evaluate", "evaluate_drafter", "evaluate_adaptive"):
        monkeypatch.setattr(sweeping, name, lambda model, *_, **__: measured.append(model))
    models = ["builtin:teacher", "builtin:causal"]
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(said)):
        list(sweeping.sweep(models, policies, problems=1, **settings))
    assert not measured


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


def test_a_mask_token_is_of_no_autoregressive_model():
    how: dict[str, Any] = {"problems": 1, "drafters": ["plain"], "loading": registry.Loading(mask_id=5)}
    (row,) = sweeping.sweep(["builtin:causal"], [], **how)
    assert row["mask_id"] is None
    assert [*sweeping.sweep(["builtin:causal"], [], [row], **how)] == [row]


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
    policies = [ONE, {"rule": "one", "draft_size": 4}]
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
    (for_all,) = sweeping.sweep(["builtin:student"], [ONE], problems=2, draft_size=4, batch=1)
    for name in ("nfe_mean", "canvases_mean"):
        assert for_all[name] == guessed[name]
    names = ["builtin:student", "builtin:causal"]
    first, *_ = sweeping.sweep(names, [ONE], problems=1, draft_size=4, drafters=["plain"])
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
