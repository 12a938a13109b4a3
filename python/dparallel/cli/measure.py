"""The commands that measure models, or show them and the build: info, demo, evaluate, tune."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

import dparallel_ext as dx
from dparallel_ext import backends
from dparallel_ext.arguments import whole

from .. import files, registry
from .. import sweep as sweeping
from ..configs import Fields, config_without_policy, policy_in, read_rows
from ..console import begins_anew, plain_errors
from ..problems import Problems, from_file, held_out
from ..tune import GRID, SIZES, TOLERANCE
from .common import (
    CHECKER,
    DATA_HELP,
    GEN_LENGTH_HELP,
    POLICY_HELP,
    AnswerFieldOption,
    BlockLengthOption,
    ChatOption,
    CheckerOption,
    ConfigOption,
    DeviceOption,
    DrafterOption,
    DtypeOption,
    Fp8Option,
    GenLengthOption,
    MaskOption,
    ModelOption,
    PromptFieldOption,
    check_kind,
    read_config,
)


def report() -> dict[str, Any]:
    """The build, and this machine's devices."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "dparallel_ext": dx.__version__,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        **dx.build_info(),
        "simd": dx.simd_level(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "builtin_models": registry.builtins(),
        "builtin_dtype": "bfloat16" if backends.fast_bfloat16() else "float32 (no fast bfloat16 products)",
    }


def info(as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False) -> None:
    """Versions, backends, architectures compiled, the SIMD level in use, GPUs."""
    facts = report()
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
        return
    from rich.table import Table

    table = Table(show_header=False)
    for key, value in facts.items():
        text = ", ".join(value) or "none" if isinstance(value, list) else str(value)
        table.add_row(key.replace("_", "-" if key == "dparallel_ext" else " "), text)
    Console().print(table)
    if facts["gpus"] and "cuda" not in facts["backends"]:
        typer.echo(f"warning: tensors on a GPU will be refused: {facts['cuda_reason']}", err=True)


def demo(
    model: Annotated[
        list[str] | None, typer.Option(help="repeatable; default: all that ship, except the verifier")
    ] = None,
    problems: int = 50,
    out: Annotated[Path, typer.Option(help="directory of table.json and the pictures")] = Path("out/demo"),
) -> None:
    """Watch each model decode a problem, then see a table of policies, and pictures."""
    from ..toy import demo as show

    with plain_errors():
        whole("problems", problems, 1)
        files.possible("out", out)
        show.run(model, problems=problems, out=out)


def evaluate(
    model: Annotated[list[str], typer.Option(help="repeatable")] = [registry.DEFAULT],  # noqa: B006
    config: ConfigOption = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="repeatable; default: --rows, else the config's, else "
            f"{', '.join(sweeping.POLICIES)}; {POLICY_HELP}"
        ),
    ] = None,
    rows: Annotated[
        Path | None,
        typer.Option(
            help="a JSON list of policies with other fields of DecodeConfig, such as recipes/rules.json, "
            "or of verifiers, such as recipes/adaptive.json"
        ),
    ] = None,
    problems: Annotated[
        int | None, typer.Option(help="the first so many; default: 500 of the built-in task, all of --data")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help=f"{DATA_HELP} with prompt and answer; default: held-out built-in problems"),
    ] = None,
    checker: CheckerOption = None,
    prompt_field: PromptFieldOption = "prompt",
    answer_field: AnswerFieldOption = "answer",
    gen_length: Annotated[int | None, typer.Option(help=f"with --data, {GEN_LENGTH_HELP}")] = None,
    batch: int = 100,
    block_length: BlockLengthOption = None,
    cache: Annotated[
        str | None,
        typer.Option(help="none (default), prefix, dual, block, or window (WeDLM's, SDLM's default)"),
    ] = None,
    mask_id: MaskOption = None,
    chat: ChatOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    fp8: Fp8Option = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the results here")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="skip measurements that the file of --json has already")
    ] = False,
    markdown: Annotated[Path | None, typer.Option(help="write the results here as a table")] = None,
    plot: Annotated[Path | None, typer.Option(help="a PNG of accuracy against passes")] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            help="write a page with the first problems' passes here, models and policies side by side"
        ),
    ] = None,
    drafter: Annotated[
        list[str] | None,
        typer.Option(help="for autoregressive models; repeatable; default: plain, ngram"),
    ] = None,
    draft_size: Annotated[
        int | None,
        typer.Option(
            help="the most tokens of a draft; default: the drafter's own most. For diffusion models with a "
            "policy row, as one or entropy:0.5: guesses of self-speculation; default: none"
        ),
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="show how many drafted tokens were accepted, by position")
    ] = False,
) -> None:
    """Measure accuracy, passes, tokens per pass and time on problems: of the built-in task, or of a file.

    lm-evaluation-harness measures its tasks with its model `dparallel` (see docs/command_line.md).
    """
    from .. import plots
    from .. import results as reporting
    from ..recording import Recording

    with plain_errors(progress=functools.partial(kept_measurements, json_file)):
        if problems is not None:
            whole("problems", problems, 1)
        whole("batch", batch, 1)
        loading = registry.Loading(device, registry.dtype_of(dtype), fp8, mask_id)
        content, loading, drafter, draft_size = read_config(config, model, loading, drafter, draft_size)
        causal = {registry.is_causal(name, cache or content.get("cache")) for name in model}
        length_of_file = content.pop("gen_length", None)
        gen_length = length_of_file if gen_length is None else gen_length
        problem_set = problems_of(data, checker, problems, gen_length, prompt_field, answer_field)
        check_written(json=json_file, markdown=markdown, plot=plot, html=html)
        if plot is not None:
            if plot.suffix not in ("", ".png"):
                raise ValueError(f"plot: is a PNG, so expected a name with .png, got {plot}")
            plots.load_pyplot()
        if resume and json_file is None:
            raise ValueError("resume: goes on with the results in a file, so expected --json")
        if len(causal) == 1:  # if there are both kinds, each model takes the options of its kind
            of_diffusion = {
                "policy": policy or None,
                "rows": rows,
                "block_length": block_length,
                "cache": cache,
                "mask_id": loading.mask_id,
            }
            of_drafters = {"drafter": drafter or None, "report": report or None}
            check_kind(model[0], True in causal, **of_drafters, **of_diffusion)
        policies = policies_of(policy or [], rows, content if False in causal else {})
        known = reporting.read_results(json_file) if resume and json_file and json_file.exists() else []
        if data is None:
            say_what_is_asked("data", model)
        results: list[dict[str, Any]] = []
        recording = None if html is None else Recording("dparallel evaluate")
        for row in sweeping.sweep(
            model,
            policies,
            known,
            config=config_without_policy(content, block_length=block_length, cache=cache),
            problems=problem_set,
            batch=batch,
            chat=chat,
            loading=loading,
            drafters=drafter or sweeping.DRAFTERS,
            draft_size=draft_size,
            recording=recording,
        ):
            if not results:  # after the first measurement: an error before it is one line alone
                typer.echo(reporting.HEADING)
            results.append(row)
            typer.echo(reporting.result_line(row))
            if report and row.get("drafted"):
                typer.echo(reporting.acceptance_text(row))
            if json_file is not None:
                files.write_json(json_file, results + [old for old in known if old not in results])
        write_reports(results, recording, markdown=markdown, plot=plot, html=html)


def kept_measurements(json_file: Path | None) -> str:
    """A line for `plain_errors`: what an interrupted `evaluate` has kept."""
    if json_file is None:
        return "nothing is kept; with --json FILE measurements are, and --resume goes on behind them"
    return f"{json_file} keeps the measurements that are complete; --resume goes on behind them"


def policies_of(policy: list[str], rows: Path | None, content: Fields) -> list[str | Fields]:
    """The rows of the table: the options', else that of the config file's `content`, else `POLICIES`."""
    if rows is not None:
        return [*policy, *read_rows(rows)]
    if policy:
        return [*policy]
    of_file = policy_in(content)
    return [of_file] if of_file else [*sweeping.POLICIES]


def write_reports(
    results: list[dict[str, Any]],
    recording: Any,
    *,
    markdown: Path | None,
    plot: Path | None,
    html: Path | None,
) -> None:
    """Write the table, the picture and the recording, each if it has a file."""
    from .. import plots
    from .. import results as reporting

    if markdown is not None:
        files.write_text(markdown, reporting.table(results))
    if plot is not None:
        plots.accuracy_against_passes(results, plot)
    if html is not None and recording is not None:
        if recording.problems:
            files.write_text(html, recording.html())
        else:
            typer.echo(f"warning: html: every row is of an earlier run, so {html} is not written", err=True)


def problems_of(
    data: str | None,
    checker: str | None,
    count: int | None,
    gen_length: int | None,
    prompt_field: str,
    answer_field: str,
) -> Problems:
    """The problems of a file, or of the built-in task. Raises ValueError naming the option that does not
    fit."""
    if data is None:
        for option, value in (("checker", checker), ("gen_length", gen_length)):
            if value is not None:
                raise ValueError(f"{option}: belongs to --data, got {value!r}")
        return held_out(500 if count is None else count)
    fields = {"prompt_field": prompt_field, "answer_field": answer_field}
    checker = CHECKER if checker is None else checker
    return from_file(data, checker, count=count, gen_length=gen_length, **fields)


def check_written(**file_of: Path | None) -> None:
    """Raise ValueError for a file that cannot be written, and for a file that two options name."""
    option_of: dict[Path, str] = {}
    for option, file in file_of.items():
        if file is not None:
            files.writable(option, file)
            if (other := option_of.setdefault(file.absolute(), option)) != option:
                raise ValueError(f"{option}: expected another file than --{other}'s, got {file}")


def say_what_is_asked(option: str, models: list[str]) -> None:
    """Say that models which do not ship are asked the built-in task's problems, for lack of an option."""
    if own := [name for name in models if not name.startswith("builtin:")]:
        typer.echo(
            f"note: no --{option}, so {', '.join(own)} is asked problems of the built-in task", err=True
        )


def tune(
    out: Annotated[Path, typer.Argument(help="a file for the measurements and the choice, for --config")],
    model: ModelOption = registry.DEFAULT,
    drafter: DrafterOption = None,
    draft_size: Annotated[
        list[int] | None,
        typer.Option(
            help="for an autoregressive model: tokens of a draft; repeatable; default: "
            f"{', '.join(map(str, SIZES))}"
        ),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help=f"for a diffusion model; repeatable; default: {', '.join(GRID['rule'])}; {POLICY_HELP}"
        ),
    ] = None,
    block_length: Annotated[
        list[int] | None, typer.Option(help="repeatable; default: 16 and 32, or a block-causal model's own")
    ] = None,
    active_blocks: Annotated[
        list[int] | None, typer.Option(help="blocks filled at once; repeatable; default: 1 and 2")
    ] = None,
    cache: Annotated[
        list[str] | None, typer.Option(help="repeatable; default: none, or the model's own (block, window)")
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="for a diffusion model: percentage points of right (or same) answers that the choice may "
            f"lose; default: {TOLERANCE:g}"
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help=f"a text file of a prompt a line, or {DATA_HELP}; default: held-out built-in problems"
        ),
    ] = None,
    prompt_field: PromptFieldOption = "prompt",
    problems: Annotated[int, typer.Option(help="the most prompts to decode")] = 16,
    gen_length: GenLengthOption = None,
    context: Annotated[
        int | None,
        typer.Option(help="for an autoregressive model: lengthen prompts to this many tokens, by others"),
    ] = None,
    batch: Annotated[int, typer.Option(help="prompts decoded together")] = 1,
    repeats: Annotated[int, typer.Option(help="runs to take medians of, after one to warm up")] = 3,
    mask_id: MaskOption = None,
    chat: ChatOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    fp8: Fp8Option = False,
) -> None:
    """Measure passes on this device, and choose the settings with the most tokens per second.

    For an autoregressive model this is the size of its --drafter's drafts (without one, passes are timed and
    nothing is chosen); for a diffusion model the policy, block length, active blocks and cache.
    `--config OUT` of decode, evaluate and serve uses the choice.
    """
    from .. import tune as tuning

    with plain_errors(progress=begins_anew(out)):
        files.writable("out", out)
        causal = registry.is_causal(model, "block" if cache and "block" in cache else None)
        options: dict[str, Any] = {"drafter": drafter, "draft_size": draft_size, "context": context}
        options |= {"policy": policy, "block_length": block_length, "active_blocks": active_blocks}
        options |= {"cache": cache, "mask_id": mask_id, "tolerance": tolerance}
        check_kind(model, causal, **{name: None if each == [] else each for name, each in options.items()})
        settings = tuning.TuneSettings(
            model,
            prompts=prompts,
            problems=problems,
            gen_length=gen_length,
            batch=batch,
            repeats=repeats,
            context=context,
            tolerance=TOLERANCE if tolerance is None else tolerance,
            loading=registry.Loading(device, registry.dtype_of(dtype), fp8, mask_id),
            chat=chat,
            prompt_field=prompt_field,
        )
        if prompts is None:
            say_what_is_asked("prompts", [model])

        progress = functools.partial(typer.echo, err=True)
        if causal:
            work, rows = tuning.measure_drafts(settings, drafter, draft_size, progress)
        else:
            grid = {"rule": policy, "block_length": block_length, "active_blocks": active_blocks}
            work, rows = tuning.measure_policies(settings, {**grid, "cache": cache}, progress)
        chosen = tuning.choose(rows, settings.tolerance)
        for line in tuning.chart(rows, chosen):
            typer.echo(line)
        files.write_json(out, tuning.content(settings, work, rows, chosen))
        if chosen is None:
            typer.echo(
                f"nothing is chosen: {out} has the times of passes alone; their tokens depend on the "
                "drafter, and none is given (--drafter ngram, say)"
            )
