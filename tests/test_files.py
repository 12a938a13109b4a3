"""Files: what is read is named where it is wrong, what is written appears whole, one run has a directory."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gzip
import json
import os
import re
import threading
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
import torch
from conftest import full_disk, golden
from dparallel import files
from dparallel.toy import train
from dparallel.training import distill
from drafters import exits
from tokenizers import Tokenizer

import dparallel_ext as dx
from dparallel_ext.models.files import replace_model
from dparallel_ext.whole_files import in_turn


def test_a_newline_alone_ends_a_line(tmp_path: Path):
    file = tmp_path / "p.jsonl"
    rows = [{"a": "one\u2028two"}, {"a": "three\x85four\x0c"}]
    content = "\ufeff" + "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows) + "\n \n"
    file.write_bytes(content.encode())
    assert list(files.rows("data", file)) == [(1, rows[0]), (2, rows[1])]


def test_what_cannot_be_read_is_named(tmp_path: Path):
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"data: .*latin is not UTF-8 text: byte 3"):
        files.read_text("data", tmp_path / "latin")
    with pytest.raises(ValueError, match=r"data: .* directory"):
        files.read_text("data", tmp_path)
    with pytest.raises(FileNotFoundError, match="data: no file"):
        files.read_text("data", tmp_path / "nowhere")
    (tmp_path / "broken.gz").write_bytes(gzip.compress(b"{}" * 99)[:-9])
    (tmp_path / "none.gz").write_bytes(b"{}")
    for name in ("broken.gz", "none.gz"):
        with pytest.raises(ValueError, match=rf"data: .*{name} is not a readable gzip file: "):
            files.read_text("data", tmp_path / name)


def test_what_cannot_be_written_is_named_and_leaves_nothing(tmp_path: Path):
    taken = tmp_path / "file"
    taken.write_text("x")
    for path in (taken, taken / "below"):
        with pytest.raises(ValueError, match=r"out: .*file is not a directory"):
            files.directory("out", path)
    with pytest.raises(ValueError, match=r"out: /proc.* cannot be written to"):
        files.directory("out", "/proc/nowhere/x")
    with pytest.raises(ValueError, match=r"plot: .* is a directory, expected a file"):
        files.writable("plot", tmp_path)
    assert files.writable("plot", tmp_path / "new" / "a.png") == tmp_path / "new" / "a.png"
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(taken)  # as /dev/stdout is one
    for name, kind in (("fifo", "a pipe or a device"), ("link", "a link")):
        with pytest.raises(ValueError, match=f"json: .*{name} is {kind}, expected a file"):
            files.writable("json", tmp_path / name)
        (tmp_path / name).unlink()
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("path", "said"),
    [
        *((path, re.escape(f"got {path!r}")) for path in (None, 5, "", b"x", "a\0")),
        ("{}/file", "file is not a directory"),
        ("{}/file/below", "file is not a directory"),
        ("/proc/nowhere", "/proc cannot be written to: "),
        ("{}/" + "a" * 300, "cannot be made: File name too long"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_no_model_and_no_drafter_is_saved_at_a_senseless_path(path: Any, said: str, tmp_path: Path):
    """Nor read, and nothing is written anywhere, such as into the current directory."""
    (tmp_path / "file").write_text("x")
    path = path.format(tmp_path) if isinstance(path, str) else path
    model, drafter = golden.model("llada_tiny_a"), exits()
    with contextlib.chdir(tmp_path):
        for write in (dx.models.save, lambda model, path: drafter.save(path)):
            with pytest.raises(ValueError, match=f"^path: .*{said}"):
                write(model, path)
        for read in (dx.models.load, dx.speculation.load):
            with pytest.raises(
                (FileNotFoundError, ValueError), match=r"^path: (expected|no directory|no file) "
            ):
                read(path)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_drafter_is_saved_in_a_dtype_that_is_read(tmp_path: Path):
    with pytest.raises(ValueError, match=r"dtype: expected float32, bfloat16 or float16, got torch\.float64"):
        exits().save(tmp_path, torch.float64)


def test_a_file_appears_whole_with_ordinary_permissions_or_not_at_all(tmp_path: Path):
    before = os.umask(0o027)
    try:
        files.write_json(tmp_path / "new" / "a.json", {"a": 1})
        dx.models.save(golden.model("llada_tiny_a"), tmp_path / "model")
    finally:
        os.umask(before)
    for file in ("new/a.json", "model/config.json", "model/model.safetensors"):
        assert (tmp_path / file).stat().st_mode & 0o777 == 0o640, file
    with pytest.raises(OSError, match="half"), files.replacing(tmp_path / "new" / "a.json") as partial:  # noqa: PT012
        partial.write_text("half")
        raise OSError("half-written")
    assert json.loads((tmp_path / "new" / "a.json").read_text()) == {"a": 1}
    assert os.listdir(tmp_path / "new") == ["a.json"]


def test_two_writers_of_one_file_have_each_a_partial_file_of_its_own(tmp_path: Path):
    """As threads and processes that save at once have."""
    file = tmp_path / "a.json"
    with files.replacing(file) as first:
        first.write_text("first")
        with files.replacing(file) as second:
            second.write_text("second")
            assert first.read_text() == "first"
        assert file.read_text() == "second"
    assert file.read_text() == "first"
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_full_disk_is_said(tmp_path: Path):
    """By every writer, with the file's name; what was there is as it was, and nothing half-written stays."""
    model, drafter = golden.model("llada_tiny_a"), exits()
    dx.models.save(model, tmp_path)
    drafter.save(tmp_path / "drafter")
    state = tmp_path / "state.pt"
    torch.save({"step": 3}, state)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "tokenizer.json").write_text("x" * 100_000)
    tokenizer = Tokenizer(tokenizers.models.WordLevel({f"word {i}": i for i in range(9999)}))
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}

    def saved(write: Callable[[Path], Any]) -> Callable[[Path], None]:
        def write_whole(file: Path) -> None:
            with files.replacing(file) as partial:
                write(partial)

        return write_whole

    table = pyarrow.table({"prompt": [os.urandom(50_000).hex()]})
    writers: list[tuple[Path, str, Callable[[Path], Any]]] = [
        (tmp_path / "model.safetensors", "is the disk full", lambda _: dx.models.save(model, tmp_path)),
        (tmp_path / "drafter/model.safetensors", "too large", lambda file: drafter.save(file.parent)),
        (state, "is the disk full", saved(lambda file: torch.save(torch.zeros(100_000), file))),
        (state, "is the disk full", saved(lambda file: tokenizer.save(str(file)))),
        (state, "too large", saved(lambda file: pyarrow.parquet.write_table(table, file))),
        (tmp_path / "config.json", "too large", lambda file: files.write_text(file, "x" * 100_000)),
        (
            tmp_path / "tokenizer.json",
            "too large",
            lambda file: files.Companions(theirs).save_pretrained(file.parent),
        ),
    ]
    for file, said, write in writers:
        with full_disk(1_500), pytest.raises(OSError, match=said) as raised:
            write(file)
        assert str(raised.value.filename) == str(file)
        assert raised.value.errno
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    with pytest.raises(KeyError), files.full_disk_named(tmp_path):
        raise KeyError("another error stays what it is")
    with pytest.raises(OSError, match="No space left") as raised, files.full_disk_named(tmp_path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert raised.value.filename == str(tmp_path)


def test_two_runs_in_one_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with files.locked(tmp_path):
        with (
            pytest.raises(ValueError, match=r"out: another run is writing to"),
            files.locked(tmp_path),
        ):
            pass
        with pytest.raises(ValueError, match="another run"):
            train.train(tmp_path, train.ToySettings(steps=1), progress=False)
        with pytest.raises(ValueError, match="another run"):
            distill.run(distill.Recipe("builtin:teacher", {}), tmp_path, tmp_path)
        monkeypatch.setenv("RANK", "1")
        with files.locked(tmp_path):  # another process of the same run
            pass
    monkeypatch.delenv("RANK")
    (tmp_path / "state.pt.7.partial").write_text("of a run that was killed")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with files.locked(tmp_path):  # it may be the other process's
        assert [file.name for file in tmp_path.iterdir()] == ["state.pt.7.partial"]
    monkeypatch.delenv("WORLD_SIZE")
    for folder in ("checkpoint-3", "another-run"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json.7.partial").write_text("of a run that was killed")
    with files.locked(tmp_path, "checkpoint-*"):
        assert [file.parent.name for file in tmp_path.rglob("*.partial")] == ["another-run"]


def test_a_state_that_is_none_is_named(tmp_path: Path):
    partial = {"settings": {}, "model": {}, "optimizers": []}
    for content in (b"", b"PK\x03\x04 half a state", {"step": 3}, partial):
        state = tmp_path / "state.pt"
        state.write_bytes(content) if isinstance(content, bytes) else torch.save(content, state)
        with pytest.raises(ValueError, match=r"out: .*state\.pt is not the state of a run"):
            train.train(tmp_path, train.ToySettings(steps=1), progress=False)


def test_saves_into_one_directory_wait_for_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread's save, begun when one has put its weights there and not yet its config."""
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    others: list[threading.Thread] = []
    replace, lock, ended_or_waits = os.replace, fcntl.flock, threading.Event()

    def save(name: str) -> None:
        replace_model(tmp_path, {"name": name}, lambda file: file.write_text(name))
        ended_or_waits.set()

    def replacing_config(source: Any, target: Any) -> None:
        if Path(target) == config and not others:
            others.append(threading.Thread(target=save, args=("second",)))
            others[0].start()
            assert ended_or_waits.wait(60)
        replace(source, target)

    def locking(descriptor: int, how: int) -> None:
        if others:
            ended_or_waits.set()
        lock(descriptor, how)

    monkeypatch.setattr(os, "replace", replacing_config)
    monkeypatch.setattr(fcntl, "flock", locking)
    opened = os.listdir("/proc/self/fd") if os.path.exists("/proc/self/fd") else []
    save("first")
    others[0].join()
    assert len(opened) == (len(os.listdir("/proc/self/fd")) if opened else 0)
    assert json.loads(config.read_text())["name"] == weights.read_text() == "second"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_weights_are_never_beside_another_models_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, beside = os.replace, list[bool]()

    def replacing(source: Any, target: Any) -> None:
        if Path(target).name == "model.safetensors":
            beside.append((tmp_path / "config.json").exists())
        replace(source, target)

    monkeypatch.setattr(os, "replace", replacing)
    for name in ("first", "first", "second"):
        replace_model(tmp_path, {"name": name}, lambda file: file.write_text("weights"))
    assert beside == [False, True, False]


def test_on_a_file_system_without_locks_nobody_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    replace_model(tmp_path, {}, lambda file: file.write_text("weights"))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_lines_end_with_a_newline_of_either_kind() -> None:
    assert [*files.numbered_lines("a\r\n \nb\u2028c\r\n")] == [(1, "a"), (3, "b\u2028c")]


def test_a_turn_is_one_process_s_own(tmp_path: Path) -> None:
    """Processes that read, think and write count right in a directory; a killed one's turn is over."""
    count, file = tmp_path / "count", tmp_path / "turn"
    count.write_text("0")

    def add() -> None:
        for _ in range(20):
            with in_turn(file):
                number = int(count.read_text())
                time.sleep(0.002)
                count.write_text(str(number + 1))

    file.touch()  # as a killed process leaves it
    running = [get_context("fork").Process(target=add) for _ in range(3)]
    for process in running:
        process.start()
    for process in running:
        process.join(120)
    assert [process.exitcode for process in running] == [0, 0, 0]
    assert count.read_text() == "60"
    assert not file.exists()


def test_a_checkpoint_counts_once_it_is_saved_to_its_end(tmp_path: Path):
    """Every state in which a kill can leave the newest: files in the order in which they are written."""
    assert distill.last_checkpoint(tmp_path) is None
    written = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        for name in written:
            content = json.dumps({"global_step": step}) if name.endswith(".json") else "x" * 10
            (tmp_path / f"checkpoint-{step}" / name).write_text(content)
    (tmp_path / "checkpoint-best").mkdir()
    whole, newest = str(tmp_path / "checkpoint-2"), tmp_path / "checkpoint-10"
    assert distill.last_checkpoint(tmp_path) == str(newest)
    for name in reversed(written):
        file = newest / name
        file.write_text(file.read_text()[:5])
        assert distill.last_checkpoint(tmp_path) == whole
        file.unlink()
        assert distill.last_checkpoint(tmp_path) == whole


def test_what_is_said_of_a_checkpoint_is_not_said_of_the_next(tmp_path: Path):
    """Of another model: its accuracy, its card, its training; the tokenizer and the code come along."""
    source, out = tmp_path / "source", tmp_path / "out"
    for directory in (source, out):
        directory.mkdir()
    along = ["added_tokens.json", "chat_template.jinja", "configuration_llada.py", "generation_config.json",
             "merges.txt", "special_tokens_map.json", "tokenizer.json", "tokenizer.model",
             "tokenizer_config.json", "vocab.json"]  # fmt: skip
    left = ["LICENSE.12ab.partial", "vocab.json.12ab.partial", "README.md", "all_results.json",
            "config.json", "held_out.json", "model.safetensors",
            "model.safetensors.index.json", "optimizer.pt", "pytorch_model.bin", "training.json",
            "trainer_state.json", "training_args.bin"]  # fmt: skip
    for name in along + left:
        (source / name).write_text("x")
    (source / "README.md").unlink()
    (source / "README.md").symlink_to("nowhere")  # nobody copies it
    files.Companions(source).save_pretrained(out)
    assert sorted(os.listdir(out)) == sorted(along)
    (source / "vocab.json").unlink()
    (source / "vocab.json").symlink_to("nowhere")
    with pytest.raises(FileNotFoundError, match=r"vocab\.json is a link to nowhere, which is not there"):
        files.Companions(source)


def test_the_models_that_ship_are_loaded_by_the_registry():
    with pytest.raises(
        FileNotFoundError, match=r"builtin:student; dparallel\.registry\.load loads the models that ship"
    ):
        dx.models.load("builtin:student")
