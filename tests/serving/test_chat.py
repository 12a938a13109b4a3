"""Commands on a checkpoint in Dream's layout, with the files that Dream's have: tokenizer, mask, template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import test_tokenizer
import torch
from dparallel import evaluate, registry
from dparallel.cli import app
from dparallel.problems import Prompt
from dparallel.serving import runner
from dparallel.toy import tasks
from dparallel.training import adapters, trajectories
from typer.testing import CliRunner

from dparallel_ext import models

ROWS = test_tokenizer.BASE + len(test_tokenizer.ADDED)
MASK = ROWS - 1
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\\n' }}"
)
CONFIG = {
    "model_type": "Dream",
    "vocab_size": ROWS,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "eos_token_id": test_tokenizer.BASE,
}


@pytest.fixture(scope="module")
def instruct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without a mask in config.json: added_tokens.json has it."""
    directory = tmp_path_factory.mktemp("instruct")
    torch.manual_seed(3)
    models.save(models.Dream(CONFIG), directory)
    test_tokenizer.write(directory, tokenizer_class="DreamTokenizer", chat_template=TEMPLATE)
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools[0] }}")
    return directory


def run(*args: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert result.exit_code == code, result.output
    return result.output if code else result.stdout


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The ids of every prompt that is decoded, and the mask that they are decoded with."""
    import dparallel_ext as dx

    seen: list[Any] = []
    decode = dx.decode

    def watched(model: Any, ids: Any, config: Any = None, **settings: Any) -> Any:
        seen.extend([torch.as_tensor(one).tolist(), model.mask_id] for one in ids)
        return decode(model, ids, config, **settings)

    monkeypatch.setattr(dx, "decode", watched)
    return seen


def ids_of(instruct: Path, text: str, chat: bool) -> list[int]:
    said = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" if chat else text
    return list(registry.load(str(instruct))[1].encode(said).ids)


@pytest.mark.parametrize(("flag", "chat"), [((), True), (("--chat",), True), (("--no-chat",), False)])
def test_every_command_goes_by_the_template(
    instruct: Path, tmp_path: Path, prompts: list[Any], flag: tuple[str, ...], chat: bool
) -> None:
    text, own = "What's 2 + 2?", ("--model", instruct, *flag)
    row = json.loads(run("decode", text, *own, "--gen-length", 8, "--block-length", 8, "--json"))
    assert row["prompt"] == text
    assert prompts == [[ids_of(instruct, text, chat), MASK]]
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"prompt": text, "answer": "4"}))
    sizes = ("--gen-length", 8, "--block-length", 8, "--checker", "none", "--format", "jsonl")
    run("trajectories", tmp_path / "out", "--data", data, *own, *sizes)
    row = json.loads((tmp_path / "out" / "part-00000.jsonl").read_text())
    assert (row["prompt"], row["prompt_ids"]) == (text, ids_of(instruct, text, chat))
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["chat"] is chat
    assert prompts.pop() == [ids_of(instruct, text, chat), MASK]
    run("evaluate", *own, "--problems", 1, "--policy", "quota:32", "--json", tmp_path / "rows.json")
    problem = next(iter(tasks.problems("held_out", 0)))
    assert prompts.pop() == [ids_of(instruct, problem.prompt, chat), MASK]
    assert json.loads((tmp_path / "rows.json").read_text())[0]["chat"] is chat


def test_chats_of_a_file_are_decoded_and_tuned_with(
    instruct: Path, tmp_path: Path, prompts: list[Any]
) -> None:
    asked = [{"role": "user", "content": "What's 2 + 2?"}]
    file, own = tmp_path / "chats.json", ("--prompt-field", "messages", "--model", instruct)
    file.write_text(json.dumps([{"messages": [*asked, {"role": "assistant", "content": "4"}]}], indent=1))
    expected = [ids_of(instruct, "What's 2 + 2?", True), MASK]
    sizes = ("--gen-length", 8, "--block-length", 8)
    page = tmp_path / "page.html"
    row = json.loads(run("decode", "--file", file, *own, *sizes, "--json", "--html", page))
    assert row["prompt"] == asked
    assert prompts == [expected]
    assert "What's 2 + 2?" in page.read_text()
    once = ("--repeats", 1, "--policy", "one", "--active-blocks", 1)
    run("tune", tmp_path / "tuned.json", "--prompts", file, *own, *sizes, *once)
    assert prompts == [expected] * 3
    said = run("decode", "--file", file, *own, "--no-chat", code=2)
    assert "prompt: expected a text, since no chat template is used" in said


def test_the_models_that_ship_have_no_template(tmp_path: Path) -> None:
    assert registry.template_of("builtin:student") is None
    for command in (
        ("decode", "sam"),
        ("evaluate", "--problems", 1),
        ("trajectories", tmp_path / "out", "--data", "builtin:1"),
    ):
        said = run(*command, "--model", "builtin:student", "--chat", code=2)
        assert "chat: the checkpoint 'builtin:student' has no chat template" in said
    assert not (tmp_path / "out").exists()


def test_a_mask_of_ones_own(
    instruct: Path, tmp_path: Path, prompts: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--mask-id` reaches the model in every command that loads one."""
    own = ("--model", instruct, "--mask-id", 7)
    run("decode", "x", *own, "--gen-length", 8)
    run("evaluate", *own, "--problems", 1, "--policy", "quota:32")
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"prompt": "x", "answer": "4"}))
    run("trajectories", tmp_path / "out", "--data", data, *own, "--gen-length", 8, "--checker", "none")
    assert [mask for _, mask in prompts] == [7, 7, 7]
    assert "mask_id: expected an id below" in run("decode", "x", "--mask-id", ROWS, *own[:2], code=2)

    class Reached(Exception):
        """The engine is as far as this test goes."""

    def engine(model: models.Model, config: Any = None, **_: Any) -> None:
        assert model.mask_id == 7
        raise Reached

    monkeypatch.setattr(runner, "Engine", engine)
    result = CliRunner().invoke(app, ["serve", "--port", "0", *map(str, own)])
    assert isinstance(result.exception, Reached), result.output


def test_distill_and_merge_with_a_mask(instruct: Path, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(json.dumps({"prompt": "x", "answer": "4"}))
    sizes = ("--gen-length", 8, "--block-length", 8, "--checker", "none")
    run("trajectories", tmp_path / "a", "--data", tmp_path / "data.jsonl", "--model", instruct, *sizes)
    recipe = tmp_path / "recipe.yaml"
    training = "{max_steps: 1, per_device_train_batch_size: 1, disable_tqdm: true, save_strategy: 'no'}"
    recipe.write_text(f"model: {instruct}\ntraining: {training}\n")
    answers = ("--answers", tmp_path / "a")
    run("distill", recipe, *answers, "--out", tmp_path / "student", "--mask-id", 7)
    student = registry.load(str(tmp_path / "student"))[0]
    assert student.mask_id == student.config["mask_token_id"] == 7
    adapted = adapters.with_lora(models.load(instruct), {"r": 2}, str(instruct))
    adapted.save_pretrained(tmp_path / "adapter")
    run("merge", tmp_path / "adapter", tmp_path / "merged", "--mask-id", 7)
    merged, found = registry.load(str(tmp_path / "merged"))
    assert (merged.mask_id, found.token_to_id("<|mask|>")) == (7, MASK)
    template = registry.template_of(str(tmp_path / "merged"))
    assert template is not None
    assert template([], tools=["hammer"]) == "hammer"


def test_a_run_from_before_goes_on_without_the_template(instruct: Path, tmp_path: Path) -> None:
    prompts = [Prompt("x", "4")]
    settings = trajectories.TrajectorySettings(
        str(instruct), "quota:8", 8, 8, checker="none", format="jsonl", chat=False
    )
    trajectories.generate(tmp_path, prompts, settings, progress=False)
    file = tmp_path / "settings.json"
    older = {k: v for k, v in json.loads(file.read_text()).items() if k not in ("chat", "mask_id")}
    file.write_text(json.dumps(older))
    trajectories.generate(tmp_path, prompts, settings, progress=False)
    with pytest.raises(ValueError, match=r"run with other settings: \{'chat': False\}"):
        trajectories.generate(
            tmp_path,
            prompts,
            trajectories.TrajectorySettings(**{**vars(settings), "chat": None}),
            progress=False,
        )


def test_what_is_loaded_is_asked_as_it_is(instruct: Path) -> None:
    loaded = registry.load(str(instruct))
    for chat, used in ((None, False), (True, True)):
        row = evaluate.evaluate(str(instruct), "quota:32", problems=1, loaded=loaded, chat=chat)
        assert row["chat"] is used
    assert evaluate.evaluate("no checkpoint", "quota:32", problems=1, loaded=loaded)["chat"] is False
    student, causal = (registry.load(f"builtin:{name}") for name in ("student", "causal"))
    rows = (
        evaluate.evaluate_adaptive("no checkpoint", registry.VERIFIER, problems=1, loaded=student),
        evaluate.evaluate_drafter("no checkpoint", None, problems=1, loaded=causal),
    )
    assert [row["chat"] for row in rows] == [False, False]
