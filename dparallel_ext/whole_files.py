"""Files that appear whole or not at all, and checks, before long work, that they can be written."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .arguments import shown


def as_path(argument: str, path: Any, expected: str = "a path") -> Path:
    """`path` as a Path. Raises ValueError for what is no path, and for an empty text, which `Path` takes for
    the current directory."""
    if not isinstance(path, str | os.PathLike) or not os.fspath(path) or "\0" in str(path):
        raise ValueError(f"{argument}: expected {expected}, got {shown(path)}")
    return Path(path)


def possible(argument: str, path: str | Path) -> Path:
    """Check that a directory can be written to or made, without making it. Raises ValueError."""
    path = as_path(argument, path)
    there = next(parent for parent in (path, *path.absolute().parents) if os.path.lexists(parent))
    if not there.is_dir():
        raise ValueError(f"{argument}: {there} is not a directory")
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise ValueError(f"{argument}: {there} cannot be written to: {error.strerror}") from error
    return path


def directory(argument: str, path: str | Path) -> Path:
    """A directory that can be written to; it is made if need be. Raises ValueError."""
    path = possible(argument, path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{argument}: {path} cannot be made: {error.strerror}") from error
    return path


def writable(argument: str, file: str | Path) -> Path:
    """Check, before long work, that a file can be written. Raises ValueError, also for a link, a pipe or a
    device such as /dev/stdout, since `replacing` would put a file in its place."""
    file = as_path(argument, file)
    possible(argument, file.parent)
    if os.path.lexists(file) and (file.is_symlink() or not file.is_file()):
        kind = "a directory" if file.is_dir() else "a link" if file.is_symlink() else "a pipe or a device"
        raise ValueError(f"{argument}: {file} is {kind}, expected a file")
    return file


WRITE_FAILED = (
    *("unexpected pos", "PytorchStreamWriter failed", "iostream error"),
    *("os error 28", "os error 27", "os error 122"),
)
"""Parts of torch's and safetensors' errors when the disk (or a quota) is full."""


@contextmanager
def full_disk_named(path: str | Path) -> Iterator[None]:
    """A context that turns torch's and safetensors' errors of a full disk into an OSError that says so, and
    gives an OSError without a file's name this one."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
    except Exception as error:
        if not any(text in str(error) for text in WRITE_FAILED):
            raise
        reason = str(error).splitlines()[0]
        raise OSError(
            errno.ENOSPC, f"a file could not be written; is the disk full? ({reason})", str(path)
        ) from error


PARTIAL = ".partial"
"""The end of the name of a file that is being written, or that a killed process left."""


@contextmanager
def replacing(file: str | Path) -> Iterator[Path]:
    """A context with a path to write to, which then replaces `file`, or is removed if the block raises.

    The path is this call's own, so that of several threads, processes or machines that write `file` at once
    the last to end has its content there. The content is on the disk before it gets the name of `file`.
    Errors of a full disk are OSErrors with the name of `file`.
    """
    file = Path(file)
    partial = file.with_name(f"{file.name}.{secrets.token_hex(4)}{PARTIAL}")
    with full_disk_named(file):
        try:
            yield partial
            flush(partial)
            os.replace(partial, file)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


@contextmanager
def in_turn(file: Path) -> Iterator[None]:
    """A context for one thread of one process at a time, of all that name this file; the file exists for as
    long. On a file system without locks nobody waits."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            break
        except BaseException:
            os.close(descriptor)
            raise
        with contextlib.suppress(FileNotFoundError):  # whoever was in front has removed it
            if os.path.samestat(os.fstat(descriptor), os.stat(file)):
                break
        os.close(descriptor)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(descriptor)


def flush(file: Path) -> None:
    """Wait until the content of a file is on the disk. Raises OSError if the disk is full."""
    with file.open("rb") as written:
        os.fsync(written.fileno())
