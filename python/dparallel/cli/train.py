"""The commands that train: train, trajectories, filter, drafter, distill, merge."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from dparallel_ext.arguments import whole

from .. import registry, results
from ..checkers import compares
from ..configs import POLICY
from ..console import begins_anew, goes_on, plain_errors
from ..problems import read_prompts
from .common import (
    CHECKER,
    DATA_HELP,
    POLICY_HELP,
    AnswerFieldOption,
    BlockLengthOption,
    ChatOption,
    CheckerOption,
    DeviceOption,
    DtypeOption,
    GenLengthOption,
    MaskOption,
    ModelOption,
    PromptFieldOption,
)


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
    """Train the built-in model from scratch (76 minutes on two cores; with --causal 56)."""
    from ..toy.train import ToySettings
    from ..toy.train import train as run
    from ..training import loop

    with plain_errors(progress=goes_on(out, loop.saved_progress)):
        sizes = {"batch": batch, "width": width, "layers": layers, "heads": heads, "mlp_width": mlp_width}
        fields: dict[str, Any] = {**sizes, "seed": seed, "causal": causal}
        shipped = {"steps": 1500} if causal else {}
        settings = ToySettings(**fields | (shipped if steps is None else {"steps": steps}))
        run(out, settings, save_every=save_every, evaluate=evaluate)
        if evaluate:
            measured = json.loads((out / "training.json").read_text())["held_out"]
            typer.echo(results.HEADING)
            typer.echo(results.result_line(measured))


def answer(
    out: Annotated[Path, typer.Argument(help="the shards' directory; an interrupted run in it is resumed")],
    data: Annotated[str, typer.Option(help=f"builtin:N[:SEED], or {DATA_HELP} with prompt and answer")],
    model: ModelOption = registry.DEFAULT,
    policy: Annotated[str, typer.Option(help=POLICY_HELP)] = POLICY,
    gen_length: GenLengthOption = None,
    block_length: BlockLengthOption = None,
    cache: Annotated[str, typer.Option(help="none, prefix, dual, or block (block-causal)")] = "none",
    checker: CheckerOption = None,
    format: Annotated[str, typer.Option(help="parquet or jsonl")] = "parquet",
    shard: Annotated[int, typer.Option(help="prompts per file")] = 500,
    batch: Annotated[int, typer.Option(help="sequences decoded at once")] = 100,
    prompt_field: PromptFieldOption = "prompt",
    answer_field: AnswerFieldOption = "answer",
    mask_id: MaskOption = None,
    chat: ChatOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
) -> None:
    """Let a model answer training prompts; `distill` trains on its right answers.

    Under torchrun or accelerate launch each process takes its share.
    """
    from ..training import trajectories

    with plain_errors("train", goes_on(out, trajectories.saved_progress)):
        checker = CHECKER if checker is None else checker
        length = registry.gen_length(model) if gen_length is None else whole("gen_length", gen_length, 1)
        if block_length is not None:
            whole("block_length", block_length, 1)
        settings = trajectories.TrajectorySettings(
            model, policy, length, block_length, cache, checker, shard, format, chat, mask_id, dtype
        )
        prompts = read_prompts(data, prompt_field, answer_field if compares(checker) else None)
        trajectories.generate(out, prompts, settings, batch=batch, device=device)
        if os.environ.get("WORLD_SIZE", "1") == "1":  # else other processes may still be answering
            if not (kept := len(trajectories.Trajectories(out))):
                raise ValueError(
                    f"checker: {checker} keeps none of the {len(prompts)} answers in {out}; --checker none "
                    "keeps all"
                )
            typer.echo(f"{out}: {kept} of {len(prompts)} answers kept, by the checker {checker}")


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
    device: DeviceOption = None,
) -> None:
    """Train a filter that judges which predictions of a block are right (for the rule `learned`, Learn2PD).

    The model decodes the prompts once more, and each pass's predictions are compared with its answers.
    """
    from ..training import filter as filtering

    with plain_errors("train", begins_anew(out)):
        whole("batch", batch, 1)
        settings = filtering.FilterSettings(tau, steps, lr, hidden, held_out, seed)
        report = filtering.run(answers, out, settings, model=model, batch=batch, device=device)
        for text in filtering.report_lines(report):
            typer.echo(text)


def _numbers(name: str, text: str | None) -> tuple[int, ...] | None:
    """The numbers in a text like "1,9,17". Raises ValueError for any other text."""
    try:
        return None if text is None else tuple(int(each) for each in text.split(","))
    except ValueError as error:
        raise ValueError(f'{name}: expected numbers as "1,9,17", got {text!r:.80}') from error


def drafter(
    target: Annotated[str, typer.Argument(help="an autoregressive model: builtin:NAME, a directory, ...")],
    out: Annotated[Path, typer.Argument(help="the drafter's directory; an interrupted run in it is resumed")],
    kind: Annotated[
        str, typer.Option(help="dflash, parallelspec, ppd, hidden_transfer, strided or adadecode")
    ] = "dflash",
    data: Annotated[
        str | None,
        typer.Option(
            help=f"builtin:N[:SEED], or {DATA_HELP} with prompts; default for models that ship: builtin:4000"
        ),
    ] = None,
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
        typer.Option(help="for ppd, hidden_transfer and strided: tokens to guess beyond the next; default 3"),
    ] = None,
    soften: Annotated[
        float | None,
        typer.Option(
            help="for ppd, hidden_transfer and strided: divides their logits in the loss; default 3, 1 and 1"
        ),
    ] = None,
    layer: Annotated[
        int | None,
        typer.Option(help="for hidden_transfer: the layer before which riders join; default: the middle one"),
    ] = None,
    rank: Annotated[int | None, typer.Option(help="for strided: of the adapter; default 128")] = None,
    target_modules: Annotated[
        str | None,
        typer.Option(
            help='for strided: the layers to adapt, as "q_proj,v_proj"; default: all of attention and MLPs'
        ),
    ] = None,
    loss: Annotated[
        str | None, typer.Option(help="for dflash and parallelspec: d-pace (default) or exp")
    ] = None,
    gen_length: GenLengthOption = None,
    temperature: Annotated[float, typer.Option(help="temperature of the answers to train on")] = 0.0,
    seed: int = 0,
    save_every: Annotated[int, typer.Option(help="steps from one saved state to the next")] = 250,
    evaluate: Annotated[int, typer.Option(help="prompts held out to test the drafter with")] = 500,
    prompt_field: Annotated[str, typer.Option(help="the field of --data that holds the prompt")] = "prompt",
    mask_id: MaskOption = None,
    chat: ChatOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
) -> None:
    """Train a drafter for `speculate` on a model's own answers.

    The kinds are DFlash, ParallelSpec, prompt tokens (PPD), Hidden Transfer, adapters of masks (I-DLM's
    R-ISD), and AdaDecode's heads.
    """
    from ..training import drafters

    with plain_errors("train", goes_on(out, drafters.saved_progress)):
        with registry.naming("target", "model"):
            length = registry.gen_length(target) if gen_length is None else gen_length
        fields = {
            **{"steps": steps, "batch": batch, "anchors": anchors, "temperature": temperature, "seed": seed},
            **{"layers": layers, "block": block, "taps": _numbers("taps", taps)},
            **{"exits": _numbers("exits", exits), "gamma": gamma, "most": most},
            **{"riders": riders, "soften": soften, "layer": layer, "rank": rank},
            "target_modules": None if target_modules is None else (*target_modules.split(","),),
            **{"mask_id": mask_id, "loss": loss, "dtype": dtype, "gen_length": length},
        }
        settings = drafters.settings_of(kind, **{k: v for k, v in fields.items() if v is not None})
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
        for text in drafters.report_lines(report):
            typer.echo(text)


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
    from ..training import distill as distilling

    with plain_errors("train", None if out is None else goes_on(out, distilling.saved_progress)):
        changes = {"model": model, "mask_id": mask_id}
        loaded = distilling.read(recipe, **{k: value for k, value in changes.items() if value is not None})
        if dry_run:
            show_plan(distilling.plan(loaded, processes=processes, answers=answers))
            return
        if answers is None or out is None:
            raise ValueError("answers, out: both are needed, unless with --dry-run")
        distilling.run(loaded, answers, out)
        if os.environ.get("RANK", "0") == "0":
            adapter = f"{out}: an adapter; `dparallel merge {out} STUDENT` adds it to its base"
            typer.echo(checkpoint_line(out) if loaded.lora is None else adapter)


def checkpoint_line(out: Path) -> str:
    return f"{out}: a checkpoint; `dparallel evaluate --model {out} --data FILE` measures it"


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


def merge(
    adapter: Annotated[Path, typer.Argument(help="a LoRA adapter's directory")],
    out: Annotated[Path, typer.Argument(help="the merged checkpoint's directory")],
    model: Annotated[
        str | None, typer.Option(help="the base model; default: the one that the adapter names")
    ] = None,
    mask_id: MaskOption = None,
) -> None:
    """Merge a LoRA adapter into its base, as a plain checkpoint in the base's own layout."""
    from ..training import adapters

    with plain_errors("train", lambda: "the same command begins anew"):
        adapters.merge(adapter, out, model=model, mask_id=mask_id)
        typer.echo(checkpoint_line(out))
