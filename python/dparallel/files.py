"""Reads text, JSON and tables with errors that name the line, and writes files that appear whole or not at
all."""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from dparallel_ext.models.files import check_text, is_there
from dparallel_ext.whole_files import PARTIAL as PARTIAL
from dparallel_ext.whole_files import directory as directory
from dparallel_ext.whole_files import full_disk_named as full_disk_named
from dparallel_ext.whole_files import possible as possible
from dparallel_ext.whole_files import replacing
from dparallel_ext.whole_files import writable as writable

# --- reading ------------------------------------------------------------------------------------


def read_text(argument: str, file: str | Path) -> str:
    """The text of a UTF-8 file, its newlines as they are, without a byte order mark; of *.gz unpacked.

    Raises FileNotFoundError, or ValueError naming the argument and what is wrong with the file.
    """
    try:
        content = Path(file).read_bytes()
        if Path(file).suffix.lower() == ".gz":
            content = gzip.decompress(content)
        return content.decode("utf-8-sig")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{argument}: no file {file}") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{argument}: {file} is not UTF-8 text: byte {error.start}, {error.reason}"
        ) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{argument}: {file} is not a readable gzip file: {error}") from error
    except OSError as error:
        raise ValueError(f"{argument}: {file}: {error.strerror}") from error


def numbered_lines(text: str) -> Iterator[tuple[int, str]]:
    """(number from 1, line) of each line that is not blank. Only a newline ends a line: strings of JSON may
    hold U+2028 and other characters at which `str.splitlines` cuts."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line.removesuffix("\r")


def json_object(argument: str, file: str | Path) -> dict[str, Any]:
    """The object in a JSON file. Raises FileNotFoundError, and ValueError naming the argument."""
    return _object_in(f"{argument}: {file}:1", read_text(argument, file))


def json_list(argument: str, file: str | Path) -> list[Any]:
    """The list in a JSON file. Raises ValueError naming the argument."""
    content = _json(f"{argument}: {file}", read_text(argument, file))
    if not isinstance(content, list):
        raise ValueError(f"{argument}: {file} holds a {type(content).__name__}, expected a list")
    return content


def _json(place: str, text: str) -> Any:
    try:
        content = json.loads(text)
        check_text(text, content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not JSON: {error}") from error
    return content


def _object_in(place: str, text: str) -> dict[str, Any]:
    return _object(place, _json(place, text))


def _object(place: str, content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ValueError(f"{place} holds a {type(content).__name__}, expected an object")
    return content


ROWS = "JSON Lines (an object a line) or a JSON list of objects, also as *.gz, or *.parquet"


def rows(
    argument: str, file: str | Path, columns: list[str] | None = None, *, text_field: str | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line or row from 1, its content) of a file of `ROWS`. Raises FileNotFoundError, and ValueError naming
    the argument.

    `columns`: the columns to read of Parquet; default: all. `text_field`: a line that does not begin with {,
    or a text in the list, is the text of this field; default: it is an error.
    """
    if Path(file).suffix.lower() == ".parquet":
        yield from enumerate(_table(argument, file, columns), 1)
        return
    content = read_text(argument, file)
    try:
        if re.match(r'\s*\[\s*[{"\]]', content):
            listed = enumerate(_json(f"{argument}: {file}", content), 1)
            objects = [
                (n, {text_field: each})
                if text_field is not None and isinstance(each, str)
                else (n, _object(f"{argument}: {file}:{n}", each))
                for n, each in listed
            ]
        else:
            objects = [
                (n, {text_field: line})
                if text_field is not None and not line.lstrip().startswith("{")
                else (n, _object_in(f"{argument}: {file}:{n}", line))
                for n, line in numbered_lines(content)
            ]
    except ValueError as error:
        raise ValueError(f"{error}; expected {ROWS}") from error
    yield from objects


def _table(argument: str, file: str | Path, columns: list[str] | None) -> list[dict[str, Any]]:
    import pyarrow.parquet

    try:
        table: list[dict[str, Any]] = pyarrow.parquet.read_table(file, columns=columns).to_pylist()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{argument}: no file {file}") from error
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{argument}: {file} is not a readable Parquet file: {error}") from error
    return table


# --- writing ------------------------------------------------------------------------------------


def write_text(file: str | Path, text: str) -> None:
    """Write a text whole or not at all, in UTF-8; make the directory if need be."""
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(file: str | Path, content: Any) -> None:
    """Write JSON whole or not at all."""
    write_text(file, json.dumps(content, indent=1) + "\n")


@contextmanager
def run_directory(out: str | Path, folders: str = "") -> Iterator[Path]:
    """A context with the directory `out` of a run, which is made if need be, and `locked`.

    folders: see `locked`. If the block raises, directories that were made and are still empty are removed,
    unless the run has several processes. Raises ValueError as `directory` and `locked`.
    """
    path = possible("out", out)
    made = [each for each in (path, *path.parents) if not each.exists()]  # the innermost first
    directory("out", path)
    try:
        with locked(path, folders):
            yield path
    except BaseException:
        if os.environ.get("WORLD_SIZE", "1") == "1":
            with suppress(OSError):  # not empty
                for each in made:
                    each.rmdir()
        raise


@contextmanager
def locked(path: Path, folders: str = "") -> Iterator[None]:
    """A context in which a run's directory, its argument `out`, is locked by it. Raises ValueError if another
    run has it.

    The lock ends with the process, however that ends. Of several processes of a run, the first holds it.
    Files that a killed run had half-written (see `replacing`) are removed, unless this run has several
    processes; also those in the run's own `folders` in the directory, a pattern of their names.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"out: another run is writing to {path}; wait for its end, or give this one a "
                "directory of its own"
            ) from error
        except OSError:
            pass  # the file system has no locks
        else:
            if os.environ.get("WORLD_SIZE", "1") == "1":
                for folder in (path, *(path.glob(folders) if folders else ())):
                    for partial in folder.glob(f"*{PARTIAL}"):
                        partial.unlink(missing_ok=True)
        yield
    finally:
        os.close(descriptor)


def apart(out: Path, checkpoint: Path) -> None:
    """Raise ValueError if a run would write over the checkpoint that it reads."""
    if out.resolve() == checkpoint.resolve():
        raise ValueError(f"out: expected another directory than the model's, got {out}")


# --- files beside a checkpoint's weights --------------------------------------------------------

COMPANIONS = (
    "*token*.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "*.jinja",
    "*processor_config.json",
    "generation_config.json",
    "*.py",
    "LICENSE*",
    "NOTICE*",
)
"""The files of a checkpoint that a model made from it needs too: tokenizer, templates, remote code. Weights
are the new model's own, and other files (results, model card, log) describe the old one."""


class Companions:
    """Copies a checkpoint's `COMPANIONS`; stands in for Trainer's tokenizer.

    Raises FileNotFoundError for a file that is a link to nowhere, before anything is copied.
    """

    model_input_names = ("input_ids",)  # where Trainer looks for a row's length

    def __init__(self, source: Path) -> None:
        self.source = source
        self.files = [
            file
            for file in (*source.iterdir(), *source.glob("additional_chat_templates/*"))
            if file.suffix != PARTIAL and any(fnmatch(file.name, pattern) for pattern in COMPANIONS)
            if is_there(file)
        ]

    def save_pretrained(self, directory: str | Path, **_: Any) -> None:
        for file in self.files:
            copy = Path(directory) / file.relative_to(self.source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            with replacing(copy) as partial:
                partial.write_bytes(file.read_bytes())
