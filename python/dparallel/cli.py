"""The command line, `dparallel`: decode, demo, evaluate, serve, train, trajectories, filter, distill, ..."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

# Read when torch is imported: waiting threads sleep. Spinning, they would take time from working threads if
# there are more threads than free cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

import dparallel_ext as dx
from dparallel_ext import rules
from dparallel_ext.arguments import whole

from . import files, registry
from .configs import (
    POLICY,
    causal_config_of,
    config_of,
    policy_in,
    read_fields,
    take_drafter,
    take_mask,
    take_tuned,
    with_ends,
)
from .evaluate import ONE, PLAIN
from .tune import GRID, SIZES

try:
    import typer
    from rich.console import Console
except ModuleNotFoundError as error:
    raise SystemExit(
        f'error: no {error.name}; pip install ".[cli]" installs what `dparallel` needs'
    ) from None

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
DECODE, LOOK, TRAIN = "Decode and serve", "Look and measure", "Train"
"""Groups of commands in the help."""
ModelOption = Annotated[
    str, typer.Option(help="builtin:NAME, a checkpoint directory, or ORG/NAME of the Hugging Face Hub")
]
MaskOption = Annotated[int | None, typer.Option(help="the mask token's id; default: the checkpoint's own")]
ChatOption = Annotated[
    bool | None,
    typer.Option(
        "--chat/--no-chat",
        help="put prompts into the checkpoint's chat template; default: if it has one (built-in: none)",
    ),
]
Fp8Option = Annotated[bool, typer.Option("--fp8", help="keep the layers' weights in 8 bits")]
POLICIES = rules.describe()
PolicyOption = Annotated[str | None, typer.Option(help=f"default: the config's, else {POLICY}; {POLICIES}")]
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        help="a JSON file of DecodeConfig's fields, or one that `dparallel tune` wrote; options override it"
    ),
]
DRAFTERS = (
    "for an autoregressive model: ngram, ngram:N, the path of a drafter or model, tree: before a drafter of "
    "blocks (DFlash, ParallelSpec); for builtin:causal also "
    "builtin:dflash, builtin:parallelspec, builtin:adadecode, builtin:ppd, builtin:hidden_transfer, "
    "builtin:student; default: none"
)
DrafterOption = Annotated[str | None, typer.Option(help=DRAFTERS)]
DraftSizeOption = Annotated[
    int | None, typer.Option(help="tokens of a draft; default: the fastest number, as measured")
]
GuessesOption = Annotated[
    int | None,
    typer.Option(
        help="tokens of a draft; default: the fastest number, as measured. For diffusion models with a "
        "policy one, steps:N or quota:K: guesses of self-speculation; default: none"
    ),
]
EVALUATED = (ONE, "confidence:0.9", "entropy:0.5")


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


@contextmanager
def plain_errors(extra: str = "cli") -> Iterator[None]:
    """A context that reports bad input, a file that cannot be read or written, or a missing package of
    `extra` in one line."""
    try:
        yield
    except BrokenPipeError:  # the reader of our output has closed it, which is no error
        raise
    except (ValueError, OSError, ModuleNotFoundError) as error:
        said = str(error)
        if isinstance(error, ModuleNotFoundError):
            extras = ",".join(dict.fromkeys(("cli", extra)))
            said = f'no {error.name}; pip install ".[{extras}]" installs what this command needs'
        elif isinstance(error, OSError) and error.strerror:
            said = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        typer.echo(f"error: {' '.join(said.split())}", err=True)
        raise typer.Exit(2) from error


def at_least(name: str, value: int, least: int) -> None:
    """Raise ValueError naming the option unless `value` is at least `least` and fits 64 bits."""
    if not least <= value <= sys.maxsize:
        most = f" and <= {sys.maxsize}" if value > least else ""
        raise ValueError(f"{name}: expected a whole number >= {least}{most}, got {value}")


def check_kind(model: str, causal: bool, **given: Any) -> None:
    """Raise ValueError for an option that is given (not None) and belongs to another kind of model."""
    for name, value in given.items():
        of_causal = name in ("drafter", "draft_size", "context")
        if value is None or of_causal == causal:
            continue
        if causal:
            raise ValueError(f"{name}: belongs to masked diffusion; {model} is autoregressive")
        raise ValueError(f"{name}: {model} is a diffusion model, which takes none")


def read_config(
    file: Path | None,
    models: list[str],
    device: str | None,
    mask_id: int | None,
    drafters: list[str] | None,
    draft_size: int | None,
) -> tuple[dict[str, Any], int | None, list[str] | None, int | None]:
    """The file's fields of `DecodeConfig`; and mask, drafters and draft size, from the options or the
    file."""
    content = read_fields(file)
    mask_id = take_mask(content, mask_id)
    if warning := take_tuned(content, file, models, device, mask_id):
        typer.echo(f"warning: {warning}", err=True)
    return content, mask_id, *take_drafter(content, drafters, draft_size)


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
        "builtin_dtype": "bfloat16" if registry.fast_bfloat16() else "float32 (no fast bfloat16 products)",
    }


@app.command(rich_help_panel=LOOK)
def info(as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False) -> None:
    """Versions, backends, architectures compiled, the SIMD level in use, GPUs."""
    found = report()
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    from rich.table import Table

    table = Table(show_header=False)
    for key, value in found.items():
        text = ", ".join(value) or "none" if isinstance(value, list) else str(value)
        table.add_row(key.replace("_", " "), text)
    Console().print(table)
    if found["gpus"] and "cuda" not in found["backends"]:
        typer.echo(f"warning: tensors on a GPU will be refused: {found['cuda_reason']}", err=True)


@app.command(rich_help_panel=DECODE)
def decode(
    prompt: Annotated[list[str] | None, typer.Argument(help="prompts")] = None,
    file: Annotated[
        Path | None, typer.Option(help="a text file of a prompt a line, or JSONL with 'prompt'")
    ] = None,
    batch: Annotated[Path | None, typer.Option(help="as --file, with all prompts decoded together")] = None,
    model: ModelOption = registry.DEFAULT,
    config: ConfigOption = None,
    policy: PolicyOption = None,
    gen_length: Annotated[
        int | None, typer.Option(help="tokens; default 64 built-in, 256 else; with --infill 0")
    ] = None,
    infill: Annotated[
        bool,
        typer.Option(
            "--infill", help="fill the prompt's mask tokens too; print prompt and response; implies --no-chat"
        ),
    ] = False,
    suffix: Annotated[
        str | None,
        typer.Option(help="text after the response, which fills the gap before it; implies --no-chat"),
    ] = None,
    block_length: Annotated[int | None, typer.Option(help="default: the model's own, else 32")] = None,
    cache: Annotated[
        str | None, typer.Option(help="none (default), prefix, dual, or block (block-causal)")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="0 (default), or below 1e-5: greedy")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="nucleus sampling: from the ids that have this probability")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="sample from this many ids, the most probable; 0: all")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="seed of the samples; default: random")] = None,
    drafter: DrafterOption = None,
    draft_size: GuessesOption = None,
    verifier: Annotated[
        str | None,
        typer.Option(
            help="an autoregressive model with the same tokens, such as builtin:verifier: the diffusion "
            "model decodes left to right, as far as it agrees (APD, lossy)"
        ),
    ] = None,
    mixture: Annotated[
        float | None, typer.Option(help="with --verifier, the diffusion model's share; default 0.5")
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(help="with --verifier, known tokens that a pass computes again; default: all"),
    ] = None,
    lookahead: Annotated[
        int | None, typer.Option(help="with --verifier, masks that a pass sees; default: all")
    ] = None,
    mask_id: MaskOption = None,
    chat: ChatOption = None,
    device: str | None = None,
    fp8: Fp8Option = False,
    stream: Annotated[bool, typer.Option("--stream", help="show the unmasking")] = False,
    html: Annotated[
        Path | None, typer.Option(help="write a page of one file here, to look through the passes")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="a JSON object a line")] = False,
) -> None:
    """Decode prompts with the built-in model or a checkpoint."""
    from .complete import complete, complete_adaptive, complete_causal
    from .live import LiveText
    from .recording import Recording
    from .text import endings

    with plain_errors():
        if html is not None:
            files.writable("html", html)
        calls = [[text] for text in prompt or []]
        if file is not None:
            calls += [[text] for text in files.prompts("file", file)]
        if batch is not None:
            if stream:
                raise ValueError("stream: not together with --batch")
            calls.append(files.prompts("batch", batch))
        if not any(calls):
            raise ValueError("prompt: expected one, as an argument or with --file or --batch")
        content, mask_id, drafters, draft_size = read_config(
            config, [model], device, mask_id, [drafter] if drafter else None, draft_size
        )
        drafter = drafters[0] if drafters else None
        infill = infill or bool(content.get("infill"))
        content.setdefault("gen_length", 0 if infill and not suffix else registry.gen_length(model))
        causal = registry.is_causal(model)
        check_kind(model, causal, drafter=drafter, suffix=suffix or None, policy=policy, verifier=verifier)
        numbers = {"mixture": mixture, "window": window, "lookahead": lookahead}
        numbers = {key: value for key, value in numbers.items() if value is not None}
        others = {"policy": policy, "suffix": suffix or None, "draft_size": draft_size}
        for key, value in others.items() if verifier else numbers.items():
            if value is not None:
                raise ValueError(
                    f"{key}: {'not together with' if verifier else 'belongs to'} --verifier, got {value!r}"
                )
        asked = (causal_config_of if causal or verifier else config_of)(
            content,
            policy,
            gen_length=gen_length,
            infill=infill,
            block_length=block_length,
            cache=cache,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
        )
        if asked.seed is None:
            torch.seed()  # else every process would draw the same samples
        # A text with gaps is no chat message, so it gets a template only with --chat.
        template = registry.template_of(model, False if chat is None and (infill or suffix) else chat)
        loaded, tokenizer = registry.load(model, device=device, fp8=fp8, mask_id=mask_id)
        asked = with_ends(asked, endings(registry.directory_of(model), tokenizer))
        recording = None if html is None else Recording("dparallel decode")
        for texts in calls:
            onward = causal or verifier is not None
            live = LiveText(Console(), tokenizer, loaded.mask_id, 0.1, causal=onward) if stream else None
            shared: dict[str, Any] = {"template": template, "live": live, "recording": recording}
            given = model, loaded, tokenizer, texts, asked
            if causal:
                found = complete_causal(*given, drafter=drafter, draft_size=draft_size, **shared)
            elif verifier is not None:
                found = complete_adaptive(*given, verifier=verifier, numbers=numbers, **shared)
            else:
                found = complete(*given, suffix=suffix, draft_size=draft_size, **shared)
            for row in found:
                if unknown := registry.unknown_words(tokenizer, row["prompt"]):
                    words = ", ".join(map(repr, dict.fromkeys(unknown)))
                    known = "; it knows the words of its task alone" if model.startswith("builtin:") else ""
                    typer.echo(f"warning: {model} has no token for {words} of the prompt{known}", err=True)
                show_response(row, as_json)
        if html is not None and recording is not None:
            files.write_text(html, recording.html())


def show_response(row: dict[str, Any], as_json: bool) -> None:
    shown = row.get("text", row["response"])
    if not shown.strip():
        typer.echo("warning: the response is empty", err=True)
    kept, passes = row["tokens"], row["forwards"]
    rate = kept / passes if passes else 0.0
    if as_json:
        typer.echo(json.dumps({**row, "tokens_per_forward": rate}))
    else:
        typer.echo(shown)
        typer.echo(f"{kept} tokens in {passes} passes, {rate:.1f} a pass", err=True)


@app.command(rich_help_panel=LOOK)
def demo(
    model: Annotated[
        list[str] | None, typer.Option(help="repeatable; default: all that ship, except the verifier")
    ] = None,
    problems: int = 50,
    out: Annotated[Path, typer.Option(help="directory of table.json and the pictures")] = Path("out/demo"),
) -> None:
    """Watch each model decode a problem, then see a table of policies, and pictures."""
    from .toy import demo as show

    with plain_errors():
        at_least("problems", problems, 1)
        files.possible("out", out)
        show.run(model, problems=problems, out=out)


@app.command(rich_help_panel=LOOK)
def evaluate(
    model: Annotated[list[str], typer.Option(help="repeatable")] = [registry.DEFAULT],  # noqa: B006
    config: ConfigOption = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help=f"repeatable; default: --rows, else the config's, else {', '.join(EVALUATED)}; {POLICIES}"
        ),
    ] = None,
    rows: Annotated[
        Path | None,
        typer.Option(
            help="a JSON list of policies with other fields of DecodeConfig, such as recipes/rules.json, "
            "or of verifiers, such as recipes/adaptive.json"
        ),
    ] = None,
    problems: int = 500,
    batch: int = 100,
    block_length: Annotated[int | None, typer.Option(help="default: the model's own, else 32")] = None,
    cache: Annotated[str | None, typer.Option(help="none (default), prefix, dual or block")] = None,
    mask_id: MaskOption = None,
    chat: ChatOption = None,
    device: str | None = None,
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
    draft_size: GuessesOption = None,
    report: Annotated[
        bool, typer.Option("--report", help="show how many drafted tokens were accepted, by position")
    ] = False,
) -> None:
    """Measure accuracy, passes, tokens per pass and time on held-out problems, for models and policies."""
    from . import evaluate as measuring
    from . import plots
    from .recording import Recording

    with plain_errors():
        at_least("problems", problems, 1)
        at_least("batch", batch, 1)
        for name, file in (("json", json_file), ("markdown", markdown), ("plot", plot), ("html", html)):
            if file is not None:
                files.writable(name, file)
        if plot is not None:
            plots.load_pyplot()
        if resume and json_file is None:
            raise ValueError("resume: goes on with the results in a file, so expected --json")
        for name in model:
            registry.directory_of(name)
        content, mask_id, drafter, draft_size = read_config(
            config, model, device, mask_id, drafter, draft_size
        )
        policies: list[str | measuring.Fields] = [*(policy or [])]
        if rows is not None:
            policies += measuring.read_rows(rows)
        elif not policy:
            policies += [own] if (own := policy_in(content)) else EVALUATED
        known = measuring.read_results(json_file) if resume and json_file and json_file.exists() else []
        results: list[dict[str, Any]] = []
        recording = None if html is None else Recording("dparallel evaluate")
        for row in measuring.sweep(
            model,
            policies,
            known,
            config=config_of(content, ONE),
            problems=problems,
            batch=batch,
            block_length=block_length,
            cache=cache,
            mask_id=mask_id,
            chat=chat,
            device=device,
            fp8=fp8,
            drafters=drafter or (measuring.PLAIN, "ngram"),
            draft_size=draft_size,
            recording=recording,
        ):
            if not results:  # after the first measurement: an error before it is one line alone
                typer.echo(measuring.HEADING)
            results.append(row)
            typer.echo(measuring.line(row))
            if report and row.get("drafted"):
                typer.echo(measuring.report(row))
            if json_file is not None:
                files.write_json(json_file, results + [old for old in known if old not in results])
        if markdown is not None:
            files.write_text(markdown, measuring.table(results))
        if plot is not None:
            plots.accuracy_against_passes(results, plot)
        if html is not None and recording is not None:
            files.write_text(html, recording.html())


@app.command(rich_help_panel=LOOK)
def tune(
    out: Annotated[Path, typer.Argument(help="a file for the measurements and the choice, for --config")],
    model: ModelOption = registry.DEFAULT,
    drafter: DrafterOption = None,
    draft_size: Annotated[
        list[int] | None,
        typer.Option(help=f"rows of a draft; repeatable; default: {', '.join(map(str, SIZES))}"),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help=f"for a diffusion model; repeatable; default: {', '.join(GRID['rule'])}; {POLICIES}"
        ),
    ] = None,
    block_length: Annotated[
        list[int] | None, typer.Option(help="repeatable; default: 16 and 32, or a block-causal model's own")
    ] = None,
    active_blocks: Annotated[
        list[int] | None, typer.Option(help="blocks filled at once; repeatable; default: 1 and 2")
    ] = None,
    cache: Annotated[
        list[str] | None, typer.Option(help="repeatable; default: none, or block for a block-causal model")
    ] = None,
    tolerance: Annotated[
        float, typer.Option(help="percentage points of right (or same) answers that the choice may lose")
    ] = 1.0,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="a text file of a prompt a line, or JSONL with 'prompt'; default: held-out built-in problems"
        ),
    ] = None,
    problems: Annotated[int, typer.Option(help="the most prompts to decode")] = 16,
    gen_length: Annotated[int | None, typer.Option(help="tokens; default 64 built-in, 256 else")] = None,
    context: Annotated[
        int | None,
        typer.Option(help="for an autoregressive model: lengthen prompts to this many tokens, by others"),
    ] = None,
    batch: Annotated[int, typer.Option(help="prompts decoded together")] = 1,
    repeats: Annotated[int, typer.Option(help="runs to take medians of, after one to warm up")] = 3,
    mask_id: MaskOption = None,
    chat: ChatOption = None,
    device: str | None = None,
    fp8: Fp8Option = False,
) -> None:
    """Measure passes on this device, and choose the settings with the most tokens per second.

    For an autoregressive model this is the size of drafts; for a diffusion model the policy, block length,
    active blocks and cache. `--config OUT` of decode, evaluate and serve uses the choice.
    """
    from . import tune as tuning

    with plain_errors():
        files.writable("out", out)
        causal = registry.is_causal(model)
        options: dict[str, Any] = {"drafter": drafter, "draft_size": draft_size, "context": context}
        options |= {"policy": policy, "block_length": block_length, "active_blocks": active_blocks}
        options |= {"cache": cache, "mask_id": mask_id}
        check_kind(model, causal, **{name: None if each == [] else each for name, each in options.items()})
        settings = tuning.Settings(
            *(model, prompts, problems, gen_length, batch, repeats, context),
            *(tolerance, device, fp8, mask_id, chat),
        )

        def say(text: str) -> None:
            typer.echo(text, err=True)

        if causal:
            work, rows = tuning.measure_drafts(settings, drafter, draft_size, say)
        else:
            grid = {"rule": policy, "block_length": block_length, "active_blocks": active_blocks}
            work, rows = tuning.measure_policies(settings, {**grid, "cache": cache}, say)
        chosen = tuning.choose(rows, settings.tolerance)
        for line in tuning.chart(rows, chosen):
            typer.echo(line)
        files.write_json(out, tuning.content(settings, work, rows, chosen))


@app.command(rich_help_panel=DECODE)
def serve(
    model: Annotated[
        list[str],
        typer.Option(
            help="builtin:NAME, a checkpoint directory, or ORG/NAME of the Hugging Face Hub; repeatable: "
            "requests choose a model by its name"
        ),
    ] = [registry.DEFAULT],  # noqa: B006
    host: Annotated[
        str, typer.Option(help="address to listen on; 127.0.0.1: for this machine alone")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any free port")] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            help="a file of keys, one a line (# begins a comment); a request needs one of them, or of those "
            "in the environment's DPARALLEL_API_KEY"
        ),
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(help="a key; other users of this machine can read it in ps")
    ] = None,
    name: Annotated[
        list[str] | None,
        typer.Option(
            help="the model's name in requests, one for each model, in their order; default: --model, with "
            "+DRAFTER if there are several drafters"
        ),
    ] = None,
    config: ConfigOption = None,
    policy: PolicyOption = None,
    cache: Annotated[
        str | None, typer.Option(help="none, prefix, dual or block; default: the engine's")
    ] = None,
    block_length: Annotated[int | None, typer.Option(help="default: the model's own, else 32")] = None,
    batch_invariant: Annotated[
        bool, typer.Option("--batch-invariant", help="give each sequence passes of its own")
    ] = False,
    drafter: Annotated[
        list[str] | None,
        typer.Option(help=f"{DRAFTERS}; repeatable: serve the model once with each; plain: without one"),
    ] = None,
    draft_size: DraftSizeOption = None,
    lanes: Annotated[int, typer.Option(help="requests decoded together by each model")] = 16,
    max_waiting: Annotated[int, typer.Option(help="the most requests that wait; others get 429")] = 1024,
    max_length: Annotated[
        int | None, typer.Option(help="tokens of prompt and response; default: the model's, at most 2048")
    ] = None,
    max_choices: Annotated[
        int, typer.Option(help="the most responses of a request: its prompts times n")
    ] = 64,
    max_body: Annotated[int, typer.Option(help="the most bytes of a request")] = 2**20,
    max_connections: Annotated[
        int | None,
        typer.Option(help="the most open connections; default: by ulimit -n, at most 4096"),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="let web pages of this origin send requests; *: any; repeatable; default: none"),
    ] = None,
    grace: Annotated[
        float, typer.Option(help="seconds for running requests to finish when the server ends")
    ] = 30.0,
    mask_id: MaskOption = None,
    device: str | None = None,
    fp8: Fp8Option = False,
    page: Annotated[
        bool, typer.Option("--page/--no-page", help="serve at / a page to watch decoding; it needs no key")
    ] = True,
    log_level: Annotated[str, typer.Option(help="info (logs every request), warning or error")] = "info",
) -> None:
    """Run an OpenAI-compatible server, with a page to watch decoding at /.

    It has /v1/chat/completions, /v1/completions, /v1/models, /health and /metrics.
    """
    with plain_errors("serve"):
        from .serving import runner, settings

        keys = settings.find_keys(api_key, api_key_file)
        content, mask_id, drafter, draft_size = read_config(
            config, model, device, mask_id, drafter, draft_size
        )
        of_diffusion = {"policy": policy, "cache": cache, "block_length": block_length, "mask_id": mask_id}
        of_causal = {"drafter": drafter or None, "draft_size": draft_size}
        causal = {each: registry.is_causal(each) for each in model}
        for each in model:  # if there are both kinds, each model takes the options of its kind
            others = {} if len(set(causal.values())) > 1 else {**of_diffusion, **of_causal}
            check_kind(each, causal[each], **others)
        found = []
        for each in model:
            fields = {"gen_length": registry.gen_length(each), **content}
            shared: dict[str, Any] = {"batch_invariant": batch_invariant or None}
            if causal[each]:
                asked = causal_config_of(fields, None, **shared)
                several = len(drafter or ()) > 1
                for guessing in drafter or (PLAIN,):
                    own = None if guessing == PLAIN else guessing
                    called = f"{each}+{guessing}" if several and own else each
                    found.append(runner.Model(called, each, asked, drafter=own, draft_size=draft_size))
            else:
                asked = config_of(fields, policy, cache=cache, block_length=block_length, **shared)
                found.append(runner.Model(each, each, asked, mask_id=mask_id))
        if name and len(name) != len(found):
            called = ", ".join(one.name for one in found)
            raise ValueError(f"name: expected one for each of {called}, got {len(name)}")
        found = [
            replace(one, name=own) for one, own in zip(found, name or [f.name for f in found], strict=True)
        ]
        runner.run(
            found,
            host=host,
            port=port,
            device=device,
            fp8=fp8,
            log_level=log_level,
            lanes=lanes,
            max_waiting=max_waiting,
            keys=keys,
            page=page,
            max_length=max_length,
            max_choices=max_choices,
            max_body=max_body,
            max_connections=max_connections,
            cors_origins=tuple(cors_origin or ()),
            grace=grace,
        )


@app.command(rich_help_panel=TRAIN)
def train(
    out: Annotated[Path, typer.Argument(help="the run's directory; an interrupted run in it is resumed")],
    steps: Annotated[int | None, typer.Option(help="default: the shipped model's")] = None,
    seed: int = 0,
    batch: int = 64,
    width: int = 192,
    layers: int = 4,
    heads: int = 6,
    mlp_width: int = 512,
    save_every: int = 500,
    evaluate: Annotated[int, typer.Option(help="held-out problems to check at the end; 0: none")] = 2000,
    causal: Annotated[
        bool, typer.Option("--causal", help="train the autoregressive built-in model instead")
    ] = False,
) -> None:
    """Train the built-in model from scratch (75 minutes on two cores; with --causal 20)."""
    from .toy.train import Settings
    from .toy.train import train as run

    with plain_errors():
        sizes = {"batch": batch, "width": width, "layers": layers, "heads": heads, "mlp_width": mlp_width}
        given: dict[str, Any] = {**sizes, "seed": seed, "causal": causal}
        shipped = {"steps": 1500} if causal else {}
        settings = Settings(**given | (shipped if steps is None else {"steps": steps}))
        run(out, settings, save_every=save_every, evaluate=evaluate)


@app.command("trajectories", rich_help_panel=TRAIN)
def answer(
    out: Annotated[Path, typer.Argument(help="the shards' directory; an interrupted run in it is resumed")],
    data: Annotated[str, typer.Option(help="builtin:N, or JSONL or Parquet with prompt and answer")],
    model: ModelOption = registry.DEFAULT,
    policy: Annotated[str, typer.Option(help=POLICIES)] = POLICY,
    gen_length: Annotated[int | None, typer.Option(help="tokens; default 64 built-in, 256 else")] = None,
    block_length: Annotated[int | None, typer.Option(help="default: the model's own, else 32")] = None,
    cache: Annotated[str, typer.Option(help="none, prefix or dual")] = "none",
    checker: Annotated[
        str, typer.Option(help="hashes, last_number, boxed, none or package.module:function")
    ] = "hashes",
    format: Annotated[str, typer.Option(help="parquet or jsonl")] = "parquet",
    shard: Annotated[int, typer.Option(help="prompts per file")] = 500,
    batch: Annotated[int, typer.Option(help="sequences decoded at once")] = 100,
    prompt_field: str = "prompt",
    answer_field: str = "answer",
    mask_id: MaskOption = None,
    chat: ChatOption = None,
    device: str | None = None,
) -> None:
    """Let a model answer training prompts; `distill` trains on its right answers.

    Under torchrun or accelerate launch each process takes its share.
    """
    from .training import trajectories

    with plain_errors("train"):
        length = registry.gen_length(model) if gen_length is None else whole("gen_length", gen_length, 1)
        if block_length is not None:
            at_least("block_length", block_length, 1)
        settings = trajectories.Settings(
            model, policy, length, block_length, cache, checker, shard, format, chat, mask_id
        )
        prompts = trajectories.read_prompts(data, prompt_field, answer_field)
        trajectories.generate(out, prompts, settings, batch=batch, device=device)


@app.command("filter", rich_help_panel=TRAIN)
def learn_filter(
    out: Annotated[Path, typer.Argument(help="the filter's file, for --policy learned:FILE")],
    answers: Annotated[
        Path, typer.Option(help="the directory that `trajectories` wrote, with any --checker, also none")
    ],
    model: Annotated[str | None, typer.Option(help="default: the model that answered")] = None,
    tau: Annotated[
        float, typer.Option(help="the probability to commit above; learned:FILE,TAU sets another")
    ] = 0.95,
    steps: Annotated[int, typer.Option(help="steps of AdamW, each over all passes")] = 3000,
    lr: float = 3e-3,
    hidden: Annotated[
        int | None, typer.Option(help="units of the hidden layer; default: a block's tokens")
    ] = None,
    held_out: Annotated[float, typer.Option(help="share of the prompts to test it with")] = 0.1,
    seed: int = 0,
    batch: Annotated[int, typer.Option(help="sequences decoded at once")] = 100,
    device: str | None = None,
) -> None:
    """Train a filter that judges which predictions of a block are right (for the rule `learned`, Learn2PD).

    The model decodes the prompts once more, and each pass's predictions are compared with its answers.
    """
    from .training import filter as filtering

    with plain_errors("train"):
        at_least("batch", batch, 1)
        settings = filtering.Settings(tau, steps, lr, hidden, held_out, seed)
        report = filtering.run(answers, out, settings, model=model, batch=batch, device=device)
        for text in filtering.lines(report):
            typer.echo(text)


def _numbers(name: str, text: str | None) -> tuple[int, ...] | None:
    """The numbers in a text like "1,9,17". Raises ValueError for any other text."""
    try:
        return None if text is None else tuple(int(each) for each in text.split(","))
    except ValueError as error:
        raise ValueError(f'{name}: expected numbers as "1,9,17", got {text!r:.80}') from error


@app.command(rich_help_panel=TRAIN)
def drafter(
    target: Annotated[str, typer.Argument(help="an autoregressive model: builtin:NAME, a directory, ...")],
    out: Annotated[Path, typer.Argument(help="the drafter's directory; an interrupted run in it is resumed")],
    kind: Annotated[
        str, typer.Option(help="dflash, parallelspec, ppd, hidden_transfer or adadecode")
    ] = "dflash",
    data: Annotated[
        str, typer.Option(help="builtin:N[:SEED], or a JSONL or Parquet file with prompts")
    ] = "builtin:4000",
    steps: Annotated[
        int | None, typer.Option(help="default, as for the numbers below: the kind's own")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="answers in a step")] = None,
    anchors: Annotated[
        int | None, typer.Option(help="positions of each answer that a step trains at")
    ] = None,
    layers: Annotated[
        int | None, typer.Option(help="for dflash (default 3) and parallelspec (default 1)")
    ] = None,
    block: Annotated[
        int | None,
        typer.Option(
            help="rows, including the last known token's; default 16 for dflash, 7 for parallelspec"
        ),
    ] = None,
    taps: Annotated[
        str | None, typer.Option(help='layers of the target to read, such as "1,9,17"; -1: the embedding')
    ] = None,
    exits: Annotated[
        str | None,
        typer.Option(
            help='for adadecode: the layers after which heads draft, as "8,16,24"; default: quarters'
        ),
    ] = None,
    gamma: Annotated[
        float | None,
        typer.Option(help="for adadecode: the probability above which a head drafts; default 0.85"),
    ] = None,
    most: Annotated[
        int | None, typer.Option(help="for adadecode: the most tokens of a draft; default 16")
    ] = None,
    riders: Annotated[
        int | None,
        typer.Option(help="for ppd and hidden_transfer: tokens to guess beyond the next; default 3"),
    ] = None,
    soften: Annotated[
        float | None,
        typer.Option(help="for ppd and hidden_transfer: divides their logits in the loss; default 3 and 1"),
    ] = None,
    layer: Annotated[
        int | None,
        typer.Option(help="for hidden_transfer: the layer before which riders join; default: the middle one"),
    ] = None,
    loss: Annotated[
        str | None, typer.Option(help="for dflash and parallelspec: d-pace (default) or exp")
    ] = None,
    gen_length: Annotated[int | None, typer.Option(help="tokens; default 64 built-in, 256 else")] = None,
    temperature: Annotated[float, typer.Option(help="temperature of the answers to train on")] = 0.0,
    seed: int = 0,
    save_every: Annotated[int, typer.Option(help="steps from one saved state to the next")] = 250,
    evaluate: Annotated[int, typer.Option(help="prompts held out to test the drafter with")] = 500,
    prompt_field: str = "prompt",
    mask_id: MaskOption = None,
    chat: ChatOption = None,
    device: str | None = None,
) -> None:
    """Train a drafter for `speculate` on a model's own answers.

    The kinds are DFlash, ParallelSpec, prompt tokens (PPD), Hidden Transfer, and AdaDecode's heads.
    """
    from .training import drafters

    with plain_errors("train"):
        given = {
            **{"steps": steps, "batch": batch, "anchors": anchors, "temperature": temperature, "seed": seed},
            **{"layers": layers, "block": block, "taps": _numbers("taps", taps)},
            **{"exits": _numbers("exits", exits), "gamma": gamma, "most": most},
            **{"riders": riders, "soften": soften, "layer": layer},
            **{"mask_id": mask_id, "loss": loss},
            "gen_length": registry.gen_length(target) if gen_length is None else gen_length,
        }
        settings = drafters.settings_of(kind, **{k: v for k, v in given.items() if v is not None})
        report = drafters.run(
            target,
            out,
            data,
            settings,
            prompt_field=prompt_field,
            evaluate=evaluate,
            save_every=save_every,
            chat=chat,
            device=device,
        )
        for text in drafters.lines(report):
            typer.echo(text)


@app.command(rich_help_panel=TRAIN)
def distill(
    recipe: Annotated[Path, typer.Argument(help="a YAML file, such as recipes/builtin.yaml")],
    answers: Annotated[Path | None, typer.Option(help="the directory that `trajectories` wrote")] = None,
    out: Annotated[
        Path | None, typer.Option(help="the student's directory; an interrupted run in it is resumed")
    ] = None,
    model: Annotated[str | None, typer.Option(help="a model in place of the recipe's")] = None,
    mask_id: MaskOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print steps and memory; no weights")] = False,
    processes: Annotated[int, typer.Option(help="number of processes to plan for, with --dry-run")] = 1,
) -> None:
    """Train a student by certainty forcing, as a recipe says.

    torchrun or accelerate launch run it in several processes.
    """
    from .training import distill as distilling

    with plain_errors("train"):
        changes = {"model": model, "mask_id": mask_id}
        found = distilling.read(recipe, **{key: one for key, one in changes.items() if one is not None})
        if dry_run:
            show_plan(distilling.plan(found, processes=processes))
            return
        if answers is None or out is None:
            raise ValueError("answers, out: both are needed, unless with --dry-run")
        distilling.run(found, answers, out)


def show_plan(plan: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(show_header=False)
    for key, value in plan.items():
        if isinstance(value, dict):
            for name, size in value.items():
                table.add_row(f"{name}, GiB per process", f"{size / 2**30:.2f}")
        else:
            table.add_row(key, "unknown" if value is None else f"{value:,}")
    Console().print(table)


@app.command(rich_help_panel=TRAIN)
def merge(
    adapter: Annotated[Path, typer.Argument(help="a LoRA adapter's directory")],
    out: Annotated[Path, typer.Argument(help="the merged checkpoint's directory")],
    model: Annotated[
        str | None, typer.Option(help="the base model; default: the one that the adapter names")
    ] = None,
    mask_id: MaskOption = None,
) -> None:
    """Merge a LoRA adapter into its base, as a plain checkpoint in the base's own layout."""
    from .training import distill as distilling

    with plain_errors("train"):
        distilling.merge(adapter, out, model=model, mask_id=mask_id)


def main() -> None:
    app()
