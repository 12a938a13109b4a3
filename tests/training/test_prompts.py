"""Prompts and checkers of trajectories: files, chats, verdicts."""

from __future__ import annotations

import gzip
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from dparallel import checkers, registry
from dparallel.problems import Prompt, from_file, read_prompts
from dparallel.text import prompt_encoder
from dparallel.training import trajectories
from dparallel.training.trajectories import Trajectories
from test_trajectories import SMALL


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return registry.load()


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return read_prompts("builtin:14")


@pytest.mark.parametrize(
    ("checker", "answer", "response", "right"),
    [
        ("hashes", "7", "so 3 + 4 = 7 #### 7", True),
        ("hashes", "words #### 1,200", "#### 1200 [EOS]", True),
        ("hashes", "7", "it is 7", False),
        ("hashes", "7", "#### 8", False),
        ("hashes", "-3", "#### -3.0", True),
        ("hashes", "3", "####", False),
        ("last_number", "work #### 18", "she makes 9 * 2 = $18.", True),
        ("last_number", "#### 1,200", "about 1200.0", True),
        ("last_number", "18", "18 or 19", False),
        ("last_number", "18", "none", False),
        ("boxed", r"\boxed{\frac{1}{2}}", r"thus \boxed{ \frac{1}{2} }", True),
        ("boxed", "4", r"\boxed{3}, no, \boxed{4}", True),
        ("boxed", "4", r"\boxed{4", False),
        ("boxed", "4", "4", False),
        ("none", "4", "anything", True),
        ("operator:eq", "a", "a", True),
    ],
)
def test_checkers(checker: str, answer: str, response: str, right: bool):
    assert checkers.checker_of(checker)(answer, response) is right


@pytest.mark.parametrize("checker", ["hashes", "last_number"])
def test_references_without_a_number_are_told(checker: str, tmp_path: Path):
    """No response is right there: an accuracy of 0 % without a word said that of the model."""
    asked = ["12", "words #### 1,200", "He has 12 cups.", "x + 2"]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": "how many?", "answer": each}) + "\n" for each in asked))
    said = f"checker: {checker} compares .* 2 of 4 answers are none, such as 'He has 12 cups.'"
    with pytest.warns(UserWarning, match=said):
        problems = from_file(file, checker)
    settings = trajectories.TrajectorySettings(checker=checker, block_length=0)
    with pytest.warns(UserWarning, match=said), pytest.raises(ValueError, match="block_length"):
        trajectories.generate(tmp_path / "out", [*problems.prompts], settings)
    for other, count in ((checker, 2), ("boxed", None), ("none", None), ("operator:eq", None)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            from_file(file, other, count=count)


@pytest.mark.parametrize("name", ["", "nope", "no.module:f", "operator:nope", "math:pi"])
def test_a_checker_that_is_none_is_named(name: str):
    with pytest.raises(ValueError, match="checker"):
        checkers.checker_of(name)


def test_a_checkers_module_that_raises_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(tmp_path)
    for name, content in (("cut", "def f(:"), ("raising", "1 / 0"), ("leaving", "raise SystemExit(0)")):
        (tmp_path / f"{name}_checker.py").write_text(content)
        with pytest.raises(ValueError, match=rf"checker: expected one of .*, got '{name}_checker:f' \("):
            checkers.checker_of(f"{name}_checker:f")


@pytest.mark.parametrize("verdict", [True, 1, 0.0, torch.tensor(True), torch.tensor(0.0)])
def test_a_verdict_of_another_type_that_is_true_or_false(verdict: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checkers, "judge", lambda answer, response: verdict, raising=False)
    assert checkers.checker_of("dparallel.checkers:judge")("7", "7") is bool(verdict)


@pytest.mark.parametrize("verdict", [float("nan"), 0.5, torch.tensor(0.5), torch.ones(1, device="meta")[0]])
def test_a_verdict_that_is_neither_is_named(verdict: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checkers, "judge", lambda answer, response: verdict, raising=False)
    with pytest.raises(ValueError, match=r"checker: .*dparallel.checkers:judge"):
        checkers.checker_of("dparallel.checkers:judge")("7", "7")


def test_a_checker_that_exits_is_named(monkeypatch: pytest.MonkeyPatch):
    def leave(answer: str, response: str) -> bool:
        raise SystemExit(0)

    monkeypatch.setattr(checkers, "leave", leave, raising=False)
    with pytest.raises(ValueError, match=r"checker: dparallel.checkers:leave raised SystemExit"):
        checkers.checker_of("dparallel.checkers:leave")("7", "7")


@pytest.mark.parametrize(
    ("checker", "said"),
    [
        (
            "operator:truediv",
            r"checker: operator:truediv raised TypeError.* for the answer .* response '.*, of prompt \d+;",
        ),
        ("builtins:print", "checker: expected True or False from builtins:print, got None"),
        ("builtins:max", "checker: expected True or False from builtins:max, got '"),
    ],
)
def test_a_checker_that_fails_is_named(
    checker: str, said: str, prompts: list[Prompt], loaded: Any, tmp_path: Path
):
    settings = replace(SMALL, checker=checker)
    with pytest.raises(ValueError, match=said):
        trajectories.generate(tmp_path, prompts[:2], settings, loaded=loaded, progress=False)


def test_prompts_of_odd_files(tmp_path: Path):
    """Newlines and a byte order mark of Windows are read; what holds no prompts is told why."""
    lines = [json.dumps({"prompt": text, "answer": 10**30}) for text in ("a é 🎈", "a é 🎈")]
    for content in ("\ufeff" + "\r\n".join(lines), "\n\n" + "\n \n".join(lines)):
        (tmp_path / "p.jsonl").write_bytes(content.encode())
        assert read_prompts(str(tmp_path / "p.jsonl")) == [Prompt("a é 🎈", str(10**30))] * 2
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a"], "answer": [1]}), tmp_path / "P.PARQUET")
    assert read_prompts(str(tmp_path / "P.PARQUET")) == [Prompt("a", "1")]
    pyarrow.parquet.write_table(pyarrow.table({"prompt": [["a"]], "answer": [1]}), tmp_path / "l.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"prompt": [], "answer": []}), tmp_path / "none.parquet")
    (tmp_path / "none.jsonl").write_text("\n")
    listed = json.dumps([{"prompt": "a", "answer": 1}] * 2, indent=1).encode()
    (tmp_path / "list.json").write_bytes(listed)
    (tmp_path / "list.json.gz").write_bytes(gzip.compress(listed))
    (tmp_path / "lines.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    for name in ("list.json", "list.json.gz"):
        assert read_prompts(tmp_path / name) == [Prompt("a", "1")] * 2
    assert read_prompts(tmp_path / "lines.jsonl.gz") == read_prompts(tmp_path / "p.jsonl")
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "texts.json").write_text('[{"prompt": "a", "answer": 1}, "b"]')
    (tmp_path / "half.json").write_bytes(listed[:-1])
    for text in ('["a", "b"]', '\n[\n "a",\n {"prompt": "b"}\n]'):
        (tmp_path / "plain.json").write_text(text)
        assert read_prompts(tmp_path / "plain.json", answer_field=None) == [Prompt("a", ""), Prompt("b", "")]
    for name, said in (
        ("empty.json", "holds no prompts"),
        ("texts.json:2", "holds a str, expected an object; expected JSON Lines"),
        ("plain.json:1", "holds a str, expected an object; expected JSON Lines"),
        ("half.json", "is not JSON: .*; expected JSON Lines"),
        ("l.parquet", "expected str or a list of messages in 'prompt', got \\['a'\\]"),
        ("none.parquet", "holds no prompts"),
        ("none.jsonl", "holds no prompts"),
    ):
        with pytest.raises(ValueError, match=f"data: .*{name}.* {said}"):
            read_prompts(str(tmp_path / name.partition(":")[0]))
    for path, reason in ((tmp_path, "Is a directory"), ("a" * 300, "File name too long")):
        with pytest.raises(ValueError, match=f"data: .*: {reason}"):
            read_prompts(path)
    for name in ("nowhere.jsonl", "nowhere.parquet"):
        with pytest.raises(FileNotFoundError, match=f"data: no file {name}"):
            read_prompts(name)
    with pytest.raises(ValueError, match="data: expected builtin:N or builtin:N:SEED, got 'builtin:1:2:3'"):
        read_prompts("builtin:1:2:3")


@pytest.mark.parametrize("sharegpt", [False, True])
@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_prompts_that_are_chats(form: str, sharegpt: bool, tmp_path: Path):
    """What stands in front of the assistant's last message is asked, and that message is the answer."""
    system, user = {"role": "system", "content": "be brief"}, {"role": "user", "content": "a é"}
    reply = {"role": "assistant", "content": "7"}
    chats = [[system, user, reply], [user, reply, user, reply], [user]]
    file = tmp_path / f"p.{form}"
    speakers = {"system": "system", "user": "human", "assistant": "gpt"}

    def write(chats: list[Any]) -> None:
        if sharegpt:
            chats = [[{"from": speakers[m["role"]], "value": m["content"]} for m in chat] for chat in chats]
        if form == "jsonl":
            file.write_text("".join(json.dumps({"messages": chat, "answer": "8"}) + "\n" for chat in chats))
        else:
            rows = [{"messages": [{"name": None, **each} for each in chat], "answer": "8"} for chat in chats]
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)

    write(chats)
    asked = [[system, user], [user, reply, user], [user]]
    assert read_prompts(str(file), "messages") == [Prompt(chat, "8") for chat in asked]
    assert read_prompts(str(file), "messages", None) == [Prompt(chat, "") for chat in asked]
    with pytest.raises(ValueError, match=rf"{file.name}:3: expected a text of the assistant at the end"):
        read_prompts(str(file), "messages", "messages")
    with pytest.raises(ValueError, match=r":1 has no field 'prompt', only .*--prompt-field names"):
        read_prompts(str(file))
    write(chats[:2])
    expected = [Prompt(chat, "7") for chat in asked[:2]]
    assert read_prompts(str(file), "messages", "messages") == expected
    assert json.loads(expected[0].shown) == [system, user]
    write([[reply]])
    with pytest.raises(ValueError, match=r":1: expected a message of another than the assistant"):
        read_prompts(str(file), "messages")
    tokenizer = registry.load()[1]
    encode = prompt_encoder(tokenizer, lambda messages: " ".join(each["content"] for each in messages))
    turn = {"role": "user", "content": "sam has 4 cups"}
    assert encode([turn]) == encode("sam has 4 cups") == tokenizer.encode("sam has 4 cups").ids
    with pytest.raises(ValueError, match="prompt: expected a text, since no chat template is used"):
        prompt_encoder(tokenizer, None)([turn])


def test_prompts_of_files(tmp_path: Path):
    lines = [{"question": "a", "answer": 1}, {"question": "b", "answer": "2"}]
    file = tmp_path / "p.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    expected = [Prompt("a", "1"), Prompt("b", "2")]
    assert read_prompts(str(file), "question") == expected
    table = pyarrow.table({"question": ["a", "b"], "answer": ["1", "2"]})
    pyarrow.parquet.write_table(table, tmp_path / "p.parquet")
    assert read_prompts(str(tmp_path / "p.parquet"), "question") == expected
    with pytest.raises(ValueError, match=r"p.jsonl:1 has no field 'prompt', only \['answer', 'question'\]"):
        read_prompts(str(file))
    file.write_text('{"prompt": "a", "answer": 1}\n{')
    with pytest.raises(ValueError, match=r"p.jsonl:2 is not JSON"):
        read_prompts(str(file))
    file.write_text("3")
    with pytest.raises(ValueError, match=r"p.jsonl:1 holds a int"):
        read_prompts(str(file))
    for prompt in (None, ["a"], 3):
        file.write_text(json.dumps({"prompt": "a\u2028b", "answer": 1}, ensure_ascii=False) + "\n")
        assert read_prompts(str(file)) == [Prompt("a\u2028b", "1")]
        with file.open("a") as more:
            more.write(json.dumps({"prompt": prompt, "answer": 1}) + "\n")
        with pytest.raises(
            ValueError, match=r"p.jsonl:2: expected str or a list .*'prompt', got (None|\[|3)"
        ):
            read_prompts(str(file))
    file.write_text('{"prompt": "a", "answer": null}')
    with pytest.raises(
        ValueError, match=r"p.jsonl:1: expected str or int or float or .* in 'answer', got None"
    ):
        read_prompts(str(file))
    for line, said in (
        ('{"prompt": "a", "answer": true}', "in 'answer', got True"),
        ('{"prompt": "\\ud800", "answer": 1}', "is not JSON: .*surrogates not allowed"),
        ("[" * 100_000, "is not JSON"),
    ):
        file.write_text(line)
        with pytest.raises(ValueError, match=rf"p.jsonl:1:? .*{said}"):
            read_prompts(str(file))
    for bad in ("builtin:", "builtin:x"):
        with pytest.raises(ValueError, match="builtin:N"):
            read_prompts(bad)
    with pytest.raises(FileNotFoundError, match=r"without settings.json"):
        Trajectories(tmp_path)
    for name, bad_settings in (("shard", replace(SMALL, shard=0)), ("format", replace(SMALL, format="csv"))):
        with pytest.raises(ValueError, match=name):
            trajectories.generate(tmp_path / "x", expected, bad_settings)
