"""A command's words when it cannot go on: bad input, an interruption, too little memory; in one line."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path

import torch
import typer

OUT_OF_MEMORY = "DefaultCPUAllocator: can't allocate memory"
"""Torch's words in a RuntimeError; without memory on a GPU it raises an error of another class."""


@contextmanager
def plain_errors(extra: str = "cli", progress: Callable[[], str] | None = None) -> Iterator[None]:
    """A context that reports bad input, a file that cannot be read or written, too little memory, or a
    missing package of `extra` in one line. Ctrl-C ends it with status 130 and, where there is `progress`,
    with the line that it makes of what the run has saved."""
    try:
        yield
    except KeyboardInterrupt as error:
        traceback.clear_frames(error.__traceback__)  # as below
        if progress is not None and os.environ.get("RANK", "0") == "0":
            typer.echo("\n" * sys.stderr.isatty() + f"interrupted: {progress()}", err=True)
        raise typer.Exit(130) from None
    except BrokenPipeError:  # the reader of our output has closed it, which is no error
        raise
    except (ValueError, OSError, ImportError, MemoryError, RuntimeError) as error:
        message = str(error)
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or OUT_OF_MEMORY in message:
            reason = f" ({message.splitlines()[0]:.200})" if message else ""
            message = f"not enough memory{reason}; shorter texts and smaller batches take less"
        elif isinstance(error, RuntimeError):  # a fault, whose place is wanted
            raise
        traceback.clear_frames(error.__traceback__)  # so that progress bars end now, not below the line
        # Python names the module; transformers raises this error too, with a sentence as the name.
        if isinstance(error, ModuleNotFoundError) and (error.name or "").replace(".", "_").isidentifier():
            extras = ",".join(dict.fromkeys(("cli", extra_with(str(error.name), extra))))
            message = (
                f'no {error.name}; pip install "dparallel-ext[{extras}]" installs what this command needs'
            )
        elif isinstance(error, OSError) and error.strerror:
            message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        typer.echo(f"error: {' '.join(message.split())}", err=True)
        raise typer.Exit(2) from error


def extra_with(package: str, default: str) -> str:
    """The extra that installs a package: `default` where it does, or where none is known to."""
    with suppress(metadata.PackageNotFoundError):
        lines = metadata.requires("dparallel-ext") or ()
        named = (re.match(r"([\w.-]+).*extra == .([\w-]+)", line) for line in lines)
        extras = [
            found[2]
            for found in named
            if found and found[1].replace("-", "_").lower() == package.partition(".")[0]
        ]
        return default if default in extras or not extras else extras[0]
    return default


def goes_on(out: Path, saved_progress: Callable[[Path], str | None]) -> Callable[[], str]:
    """A line for `plain_errors`: the part that an interrupted run has saved, and how it goes on."""

    def line() -> str:
        if (part := saved_progress(out)) is None:
            return f"{out} keeps nothing yet; the same command begins anew"
        return f"{out} keeps {part}; the same command goes on from there"

    return line


def begins_anew(out: Path) -> Callable[[], str]:
    """A line for `plain_errors` of a command that writes a file at its end alone."""
    return lambda: f"{out} is as it was; the same command begins anew"
