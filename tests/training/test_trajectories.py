"""Trajectories: what is kept, shards that survive a kill, processes that share them, reading them back."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from conftest import golden
from dparallel import files, registry
from dparallel.cli import app
from dparallel.problems import Prompt, read_prompts
from dparallel.toy import tasks
from dparallel.training import trajectories
from dparallel.training.trajectories import Collator, Trajectories, TrajectorySettings
from typer.testing import CliRunner

import dparallel_ext as dx

DPARALLEL = str(Path(sys.executable).with_name("dparallel"))
SMALL = TrajectorySettings(policy="entropy_bound:0.1", shard=3)


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return registry.load()


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return read_prompts("builtin:14")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, prompts: list[Prompt], loaded: Any) -> Path:
    out = tmp_path_factory.mktemp("whole")
    return trajectories.generate(out, prompts, SMALL, loaded=loaded, progress=False)


def rows_of(directory: Path) -> list[dict[str, Any]]:
    files = sorted(directory.glob("part-*.parquet"))
    return [row for file in files for row in pyarrow.parquet.read_table(file).to_pylist()]


@pytest.mark.slow
def test_rows_are_the_model_s_right_answers_and_their_order(prompts: list[Prompt], tmp_path: Path):
    """In float32: products in 16 bits may depend on what else is in the batch."""
    model, tokenizer = loaded = registry.load(dtype=torch.float32)
    trajectories.generate(tmp_path, prompts, SMALL, loaded=loaded, progress=False)
    rows = {row["index"]: row for row in rows_of(tmp_path)}
    assert 9 < len(rows) <= 14
    for index, prompt in enumerate(prompts):
        ids = torch.tensor([tokenizer.encode(prompt.text).ids])
        out = dx.decode(
            model, ids, gen_length=64, threshold=0.1, selector="entropy_bound", record=True
        )  # fmt: skip
        response = out.sequences[0, ids.shape[1] :].tolist()
        text = tokenizer.decode(response)
        right = tasks.extract_answer(text) == int(prompt.answer)
        assert right == (index in rows)
        if right:
            row = rows[index]
            assert (row["prompt"], row["response"]) == (prompt.text, text)
            assert (row["prompt_ids"], row["response_ids"]) == (ids[0].tolist(), response)
            assert row["nfe"] == out.forwards
            assert row["step"] == out.trajectory.step[0].tolist()
            assert min(row["step"]) == 1
            assert max(row["step"]) == row["nfe"]
            torch.testing.assert_close(torch.tensor(row["confidence"]), out.trajectory.confidence[0])


def test_a_response_is_judged_to_its_end_and_kept_whole(
    prompts: list[Prompt], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model, tokenizer = registry.load()
    model.eos_ids = (tokenizer.token_to_id("."), *model.eos_ids)
    judged: list[str] = []
    monkeypatch.setattr(trajectories, "checker_of", lambda _: lambda _, response: not judged.append(response))
    trajectories.generate(tmp_path, prompts[:4], SMALL, loaded=(model, tokenizer), progress=False)
    rows = rows_of(tmp_path)
    assert sorted(judged) == sorted(row["response"].partition(" .")[0] for row in rows)
    assert all(" . " in row["response"] for row in rows)


def test_the_settings_are_in_the_directory_and_in_every_parquet_file(whole: Path):
    found = json.loads((whole / "settings.json").read_text())
    assert found["policy"] == "entropy_bound:0.1"
    assert found["prompts"] == 14
    metadata = pyarrow.parquet.read_schema(whole / "part-00000.parquet").metadata
    assert json.loads(metadata[b"settings"])["model"] == "builtin:teacher"


@pytest.mark.slow
def test_jsonl_holds_the_same(whole: Path, prompts: list[Prompt], loaded: Any, tmp_path: Path):
    settings = replace(SMALL, format="jsonl")
    trajectories.generate(tmp_path, prompts, settings, loaded=loaded, progress=False)
    files = sorted(tmp_path.glob("part-*.jsonl"))
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    same_rows(rows, rows_of(whole))
    one, other = Trajectories(tmp_path), Trajectories(whole)
    assert torch.equal(one.ids, other.ids)


def same_rows(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """Of the same settings. The last bits of a probability depend on the process: on how many threads it has,
    and in float32 on where its memory lies."""
    for one, other in zip(ours, theirs, strict=True):
        assert {**one, "confidence": 0} == {**other, "confidence": 0}
        assert one["confidence"] == pytest.approx(other["confidence"], rel=1e-5)


def command(out: Path) -> list[str]:
    return [DPARALLEL, "trajectories", str(out), "--data", "builtin:14", "--policy", "entropy_bound:0.1",
            "--shard", "3"]  # fmt: skip


KILLED = """
import os, signal, sys
shards = []

def audit(event, arguments):
    if event == "os.rename" and str(arguments[1]).endswith(".parquet"):
        if len(shards) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        shards.append(arguments[1])

sys.addaudithook(audit)
from dparallel.__main__ import main
main()
"""
"""The command line, killed before the third of its shards gets its name."""


@pytest.mark.slow
def test_a_killed_run_goes_on_and_loses_and_doubles_nothing(whole: Path, tmp_path: Path):
    killed = subprocess.run([sys.executable, "-c", KILLED, *command(tmp_path)[1:]], stderr=subprocess.DEVNULL)
    assert killed.returncode == -signal.SIGKILL
    assert list(tmp_path.glob("part-00002.parquet.*.partial"))
    done = {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("part-*.parquet")}
    assert sorted(done) == ["part-00000.parquet", "part-00001.parquet"]
    with pytest.raises(ValueError, match="not finished: 3 of 5 shards are missing"):
        Trajectories(tmp_path)
    (tmp_path / "part-00004.parquet.partial").write_text("half a shard")
    assert CliRunner().invoke(app, command(tmp_path)[1:]).exit_code == 0
    same_rows(rows_of(tmp_path), rows_of(whole))
    assert all((tmp_path / name).stat().st_mtime_ns == at for name, at in done.items())
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.slow
def test_several_processes_each_do_their_share(whole: Path, tmp_path: Path):
    """Under accelerate, which starts them by torchrun; test_distill has torchrun itself."""
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--no_python"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launch, *command(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "trajectories 0/2" in done.stderr
    assert "trajectories 1/2" in done.stderr
    same_rows(rows_of(tmp_path), rows_of(whole))


@pytest.mark.slow
def test_shares_do_not_depend_on_how_many_processes_there_were_before(
    whole: Path, prompts: list[Prompt], loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "1")
    trajectories.generate(tmp_path, prompts, SMALL, loaded=loaded, progress=False)
    assert [f.name for f in sorted(tmp_path.glob("part*"))] == ["part-00001.parquet", "part-00004.parquet"]
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("RANK")
    trajectories.generate(tmp_path, prompts, SMALL, loaded=loaded, progress=False)
    same_rows(rows_of(tmp_path), rows_of(whole))


def test_a_run_of_other_settings_or_prompts_is_refused(whole: Path, prompts: list[Prompt], loaded: Any):
    with pytest.raises(ValueError, match=r"other settings: \{'policy': 'entropy_bound:0.1'\}"):
        trajectories.generate(whole, prompts, replace(SMALL, policy="one"), loaded=loaded)
    with pytest.raises(ValueError, match="prompts"):
        trajectories.generate(whole, prompts[:-1], SMALL, loaded=loaded)


def test_a_run_of_an_older_version_goes_on(
    whole: Path, prompts: list[Prompt], loaded: Any, tmp_path: Path
) -> None:
    """Which had no chat template, mask token or dtype to choose; here no shard is missing."""
    settings = json.loads((whole / "settings.json").read_text())
    for name in ("chat", "mask_id", "dtype"):
        del settings[name]
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    trajectories.generate(tmp_path, prompts, SMALL, loaded=loaded, progress=False)
    with pytest.raises(ValueError, match=r"other settings: \{'mask_id': None\}"):
        trajectories.generate(tmp_path, prompts, replace(SMALL, mask_id=3), loaded=loaded)


def test_answers_of_several_lengths(loaded: Any, tmp_path: Path) -> None:
    """A block-causal model fills its last block: how far depends on the prompt."""
    model, tokenizer = golden.model("sdar_tiny_a"), loaded[1]
    asked = [Prompt("cups " * count, "") for count in (3, 6, 5)]
    settings = TrajectorySettings(policy="quota:4", gen_length=8, checker="none")
    trajectories.generate(tmp_path, asked, settings, loaded=(model, tokenizer), progress=False)
    rows = rows_of(tmp_path)
    assert [len(row["response_ids"]) for row in rows] == [13, 10, 11]
    for row in rows:
        assert len(row["step"]) == len(row["confidence"]) == len(row["response_ids"])
        assert min(row["step"]) == 1
        assert max(row["step"]) == row["nfe"]
    read = Trajectories(tmp_path)
    assert read.settings["block_length"] == 8  # the model's own
    assert [len(row["step"]) for row in read] == [13, 10, 11]
    assert str(read[-1]) == str(read[2])


@pytest.mark.slow
@pytest.mark.parametrize("format", ["parquet", "jsonl"])
def test_shards_are_looked_at_when_a_run_goes_on(
    format: str, prompts: list[Prompt], loaded: Any, tmp_path: Path
):
    """One that is cut off, empty, or holds the rows of another is answered again, and no other."""
    settings = replace(SMALL, format=format, gen_length=32)
    whole = trajectories.generate(tmp_path, prompts, settings, loaded=loaded, progress=False)
    shards = [tmp_path / f"part-{i:05d}.{format}" for i in range(5)]
    before = [shard.read_bytes() for shard in shards]
    shards[0].write_bytes(before[0][:-9])
    shards[1].write_bytes(b"")
    shards[2].write_bytes(before[3])
    if format == "jsonl":
        shards[3].write_text('{"index": "first"}\n')
        with pytest.raises(ValueError, match=r"part-00000.jsonl is empty or cut off"):
            Trajectories(whole)
    else:
        with pytest.raises(ValueError, match=r"part-00000.parquet is not a readable Parquet file"):
            Trajectories(whole)
    kept = shards[4].stat().st_mtime_ns
    trajectories.generate(tmp_path, prompts, settings, loaded=loaded, progress=False)
    assert [shard.read_bytes() for shard in shards] == before
    assert shards[4].stat().st_mtime_ns == kept


def test_another_run_in_the_directory_is_named(prompts: list[Prompt], loaded: Any, tmp_path: Path):
    with files.locked(tmp_path), pytest.raises(ValueError, match="out: another run is writing to"):
        trajectories.generate(tmp_path, prompts, SMALL, loaded=loaded)
    assert not list(tmp_path.iterdir())


def test_no_prompt_and_no_right_answer(loaded: Any, tmp_path: Path):
    empty = trajectories.generate(tmp_path / "a", [], SMALL, loaded=loaded, progress=False)
    assert len(Trajectories(empty)) == 0
    wrong = [Prompt(p.text, "-1") for p in read_prompts("builtin:3")]
    for name, settings in (("b", SMALL), ("c", replace(SMALL, format="jsonl"))):
        none = trajectories.generate(tmp_path / name, wrong, settings, loaded=loaded, progress=False)
        assert len(Trajectories(none)) == 0


def test_a_missing_package_is_named_before_anything_is_decoded(
    prompts: list[Prompt], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match="pyarrow"):
        trajectories.generate(tmp_path / "out", prompts, replace(SMALL, model="not/loaded"))
    assert not (tmp_path / "out").exists()


def test_damaged_rows_and_settings_are_named(tmp_path: Path):
    settings = {"prompts": 1, "shard": 1, "format": "jsonl"}
    shard = tmp_path / "part-00000.jsonl"
    row = {"prompt_ids": [1], "response_ids": [2, 3], "step": [1, 1]}
    for changed in ({"step": [1]}, {"prompt_ids": None}, {"response_ids": ["x", "y"]}, {"step": [2**40, 1]}):
        files.write_json(tmp_path / "settings.json", settings)
        files.write_text(shard, json.dumps(row) + "\n")
        assert len(Trajectories(tmp_path)) == 1
        files.write_text(shard, json.dumps({**row, **changed}) + "\n")
        with pytest.raises(ValueError, match=r"answers: .*part-00000.jsonl is damaged"):
            Trajectories(tmp_path)
    for content, said in (("{", "is not JSON"), ("{}", "is not that of a run: .*'prompts'")):
        files.write_text(tmp_path / "settings.json", content)
        with pytest.raises(ValueError, match=rf"answers: .*settings.json.* {said}"):
            Trajectories(tmp_path)


def test_items(whole: Path):
    data, rows = Trajectories(whole), rows_of(whole)
    assert len(data) == len(rows)
    for i, row in enumerate(rows):
        item = data[i]
        assert item["input_ids"].tolist() == row["prompt_ids"] + row["response_ids"]
        assert item["step"].tolist() == row["step"]
        assert (item["prompt_length"], item["index"]) == (len(row["prompt_ids"]), i)


def test_collator_pads_with_eos_as_published_or_out_of_sight():
    rows = [
        {"input_ids": torch.arange(10, 15), "prompt_length": 2, "index": 7},
        {"input_ids": torch.arange(20, 28), "prompt_length": 4, "index": 9},
    ]
    plain = Collator(1)(rows)
    assert plain["input_ids"].tolist() == [[10, 11, 12, 13, 14, 1, 1, 1], list(range(20, 28))]
    assert plain["lengths"].tolist() == [5, 8]
    assert plain["prompt_lengths"].tolist() == [2, 4]
    assert plain["index"].tolist() == [7, 9]
    total = Collator(1, total_length=6)(rows)
    assert total["input_ids"].tolist() == [[10, 11, 12, 13, 14, 1], [20, 21, 22, 23, 24, 25]]
    assert total["lengths"].tolist() == [6, 6]
    response = Collator(1, response_length=5)(rows)
    assert response["input_ids"].tolist() == [
        [10, 11, 12, 13, 14, 1, 1, 1, 1],
        [20, 21, 22, 23, 24, 25, 26, 27, 1],
    ]
    assert response["lengths"].tolist() == [7, 9]
    assert Collator(1, total_length=3)(rows)["prompt_lengths"].tolist() == [2, 3]


@pytest.mark.parametrize(
    ("ids", "kept"),
    [
        ([5, 5, 6, 7, 1, 8, 9, 6, 6], [5, 5, 6, 7, 1, 1, 1, 1]),  # the end is the first token of a block
        ([5, 5, 6, 2, 7, 8, 9, 6], [5, 5, 6, 2]),
        ([5, 1, 2, 8, 9], [5, 1, 2, 1]),  # an end in the prompt is none
        ([5, 5, 6, 7, 8], [5, 5, 6, 7, 8]),
        ([5, 5], [5, 5]),
    ],
)
def test_what_a_block_causal_model_wrote_behind_its_end_is_not_learned(ids: list[int], kept: list[int]):
    row = {"input_ids": ids, "prompt_length": 2, "index": 0}
    of_blocks = Collator(1, ends=(1, 2), block_length=4)
    batch = of_blocks([row])
    assert batch["input_ids"].tolist() == [kept]
    assert batch["lengths"].tolist() == [len(kept)]
    padded = replace(of_blocks, total_length=10)([row])["input_ids"][0].tolist()
    assert padded == kept + [1] * (10 - len(kept))
    assert Collator(1, ends=(1, 2))([row])["input_ids"].tolist() == [ids]  # sees all of its response


def test_a_prompt_beyond_the_positions_of_a_model_that_ships_is_named(tmp_path: Path):
    settings, out = replace(SMALL, model="builtin:student", gen_length=8), tmp_path / "deep" / "out"
    with pytest.raises(
        ValueError, match=r"gen_length: .* 408 tokens, but builtin:student was trained on 256"
    ):
        trajectories.generate(out, [Prompt("3 + 4 = " * 100, "7")], settings, progress=False)
    assert not list(tmp_path.iterdir())


def test_chats_are_answered_and_judged(tmp_path: Path):
    """By the same tokens as their texts; the files hold the messages as JSON."""
    model = tmp_path / "model"
    shutil.copytree(registry.directory_of("builtin:teacher"), model)
    (model / "chat_template.jinja").write_text("{{ messages[-1].content }}")
    texts = read_prompts("builtin:6")
    chats = [Prompt([{"role": "user", "content": p.text}], p.answer) for p in texts]
    settings = replace(SMALL, model=str(model))
    rows = {}
    for name, prompts in (("texts", texts), ("chats", chats)):
        trajectories.generate(tmp_path / name, prompts, settings, progress=False)
        shards = sorted((tmp_path / name).glob("part-*"))
        rows[name] = [row for shard in shards for row in pyarrow.parquet.read_table(shard).to_pylist()]
    assert len(rows["chats"]) == len(rows["texts"]) > 3
    for chat, text in zip(rows["chats"], rows["texts"], strict=True):
        assert json.loads(chat["prompt"]) == chats[chat["index"]].text
        assert {**chat, "prompt": text["prompt"]} == text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"settings": replace(SMALL, shard=2.5)}, "shard: expected a whole number >= 1, got 2.5"),
        ({"batch": True}, "batch: expected a whole number >= 1, got True"),
        ({"batch": "9"}, "batch: expected a whole number >= 1, got '9'"),
    ],
)
def test_sizes_that_are_no_whole_numbers_are_named(changes: dict[str, Any], said: str, tmp_path: Path):
    with pytest.raises(ValueError, match=said):
        trajectories.generate(tmp_path / "out", [], **changes)
    assert not (tmp_path / "out").exists()
