"""The command line, `dparallel`: decode, demo, evaluate, serve, train, trajectories, filter, distill, ..."""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Callable
from typing import Annotated

# Read when torch is imported: waiting threads sleep. Spinning, they would take time from working threads if
# there are more threads than free cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

try:
    import rich  # noqa: F401
    import typer
except ModuleNotFoundError as error:
    raise SystemExit(
        f'error: no {error.name}; pip install "dparallel-ext[cli]" installs what `dparallel` needs'
    ) from None

import dparallel_ext as dx

from . import decode, measure, serve, train

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)


def show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dparallel {dx.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=show_version, is_eager=True, help="print the version and exit"),
    ] = False,
) -> None:
    """Decode language models many tokens at a time.

    `dparallel demo` shows the models that ship at work.

    `dparallel serve` opens a page to watch them at http://127.0.0.1:8000, and an API like OpenAI's.

    `dparallel decode --model path/to/LLaDA-8B-Instruct "..."` decodes with a checkpoint of yours.
    """


DECODE, MEASURE, TRAIN = "Decode and serve", "Look and measure", "Train"
"""Groups of commands in the help."""
COMMANDS: tuple[tuple[str, str, Callable[..., None]], ...] = (
    ("info", MEASURE, measure.info),
    ("decode", DECODE, decode.decode),
    ("demo", MEASURE, measure.demo),
    ("evaluate", MEASURE, measure.evaluate),
    ("tune", MEASURE, measure.tune),
    ("serve", DECODE, serve.serve),
    ("train", TRAIN, train.train),
    ("trajectories", TRAIN, train.answer),
    ("filter", TRAIN, train.learn_filter),
    ("drafter", TRAIN, train.drafter),
    ("distill", TRAIN, train.distill),
    ("merge", TRAIN, train.merge),
)
"""Each command's name, group and function, in the order of the help."""
for name, group, function in COMMANDS:
    app.command(name, rich_help_panel=group)(function)


def main() -> None:
    warnings.formatwarning = one_line
    # As standard error: what an encoding lacks (LC_ALL=C) does not end a command in the midst of its answer.
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app()
    except BrokenPipeError:
        raise
    except OSError as error:  # of the output, since commands say what else fails
        typer.echo(f"error: output: {error.strerror or error}", err=True)
        sys.stdout = None  # which would be flushed at the end
        raise SystemExit(2) from None


def one_line(message: Warning | str, category: type[Warning], *place: object, **_: object) -> str:
    """A warning as the commands print their own, without the place in the code that found it."""
    return f"warning: {' '.join(str(message).split())}\n"
