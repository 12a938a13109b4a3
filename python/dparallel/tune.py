"""Measures a model's passes on this device, and chooses the settings with the most tokens per second.

    autoregressive   measures, for each size of draft, L, the seconds of a pass, D, the seconds of drafting,
                     and tau, the tokens of a pass; chooses argmax tau / (L + D) (PPD, arXiv 2405.18628)
    diffusion        measures passes, tokens and seconds for each policy, block length, number of active
                     blocks and cache; chooses the fastest whose answers are within the tolerance of the best

`dparallel tune` writes the choice into a file for `--config` of the other commands, see `configs`.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch

import dparallel_ext as dx
from dparallel_ext import models, speculation
from dparallel_ext.arguments import check_fields, number, whole
from dparallel_ext.decoding.config import with_ends
from dparallel_ext.decoding.settings import make_settings
from dparallel_ext.models import Model
from dparallel_ext.speculation.drafter import PredictsAcceptance
from dparallel_ext.speculation.speculate import causal_model, check_prompts

from . import registry, text
from .complete import complete
from .configs import TUNED, check_row, parse_policy
from .problems import read_prompts
from .toy import tasks

SIZES = (0, 1, 3, 7, 15, 23, 31, 47, 63)
"""Rows of drafts; with the root's row they are 1, 2, 4, 8, 16, 24, 32, 48, 64."""
GRID: dict[str, tuple[Any, ...]] = {
    "rule": ("confidence:0.9", "entropy:0.3", "entropy:0.5", "entropy:0.7"),
    "block_length": (16, 32),
    "active_blocks": (1, 2),
    "cache": ("none",),
}
"""Values to try for a diffusion model, see also `own_choices`."""
CHOSEN = ("drafter", "draft_size", *GRID)
"""Fields of a row that are settings."""
TOLERANCE = 1.0
"""Percentage points, see `TuneSettings.tolerance`."""
JUDGED = ("right", "same")
"""Shares that a diffusion model's rows are judged by: right answers, or texts equal to the reference's."""

Row = dict[str, Any]
"""Settings and measurements, as in the file."""


@dataclass(frozen=True)
class TuneSettings:
    """The settings of a measurement. Raises ValueError naming the number that does not fit."""

    model: str
    prompts: Path | None = None
    """A prompt a line, or see `problems.read_prompts`; None: held-out problems of the built-in task."""
    problems: int = 16
    """The most prompts."""
    gen_length: int | None = None
    """None: the model's default, see `registry.gen_length`."""
    batch: int = 1
    repeats: int = 3
    """Measured runs, after one to warm up; the median counts."""
    context: int | None = None
    """For an autoregressive model: the length to which prompts are filled up by others. None: as they are."""
    tolerance: float = TOLERANCE
    """For a diffusion model: percentage points that the choice may lose against the best row."""
    loading: registry.Loading = field(default_factory=registry.Loading)
    chat: bool | None = None
    prompt_field: str = "prompt"

    def __post_init__(self) -> None:
        check_fields(self, ("problems", "batch", "repeats"), whole, 1)
        check_fields(self, ("tolerance",), number)
        check_fields(self, ("gen_length",), whole, 2)
        check_fields(self, ("context",), whole, 1)


class Work(NamedTuple):
    """A loaded model and its prompts."""

    model: Model
    tokenizer: Any
    template: text.Template | None
    texts: list[str | list[text.Message]]
    problems: list[tasks.Problem] | None
    """The problems of `texts`, if they are the built-in task's."""
    config: dx.DecodeConfig


def load(settings: TuneSettings) -> Work:
    """Load model and prompts. Raises ValueError and FileNotFoundError, naming the argument."""
    problems = None
    if settings.prompts is None:
        problems = [*itertools.islice(tasks.problems("held_out"), settings.problems)]
        texts: list[str | list[text.Message]] = [problem.prompt for problem in problems]
    else:
        read = read_prompts(settings.prompts, settings.prompt_field, None, argument="prompts")
        texts = [prompt.text for prompt in read[: settings.problems]]
    name, length = settings.model, settings.gen_length
    template = registry.template_of(name, settings.chat)
    model, tokenizer = settings.loading.load(name)
    config = dx.DecodeConfig(gen_length=registry.gen_length(name) if length is None else length)
    config = with_ends(config, model.eos_ids)
    return Work(model, tokenizer, template, texts, problems, config)


def median_seconds(runs: Sequence[Sequence[float]]) -> float:
    """The sum over parts of the median over runs; runs: the seconds of the same parts in each run."""
    return sum(statistics.median(part) for part in zip(*runs, strict=False))


def rounded(value: float) -> float:
    """`value` rounded to six digits; an int stays an int."""
    return value if isinstance(value, int) else float(f"{value:.6g}")


# --- autoregressive models ------------------------------------------------------------------------


class Stopwatch(speculation.Fixed):
    """A sizer with a fixed number of nodes that sums up the seconds of drafting."""

    seconds = 0.0

    @contextmanager
    def drafting(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - began


class Filler(speculation.DraftSession):
    """Stands in for a drafter if there is none: its drafts have the requested size, and token 0
    everywhere."""

    most = SIZES[-1]

    def check(self, model: Model) -> None:
        """Do nothing: it goes with every model."""

    def session(self, *_: Any, **__: Any) -> speculation.DraftSession:
        return self

    def propose(self, lanes: Sequence[speculation.Lane], sizes: Sequence[int]) -> list[speculation.Draft]:
        return [speculation.Draft((0,) * size) for size in sizes]


class MeasuredPass(NamedTuple):
    """A measured pass over roots and drafts, until its result is on the host; not over prompts."""

    seconds: float
    """Seconds of drafting, the pass, and the host's work before and after it."""
    drafting: float
    lanes: int
    tokens: int


def curve(
    runs: Mapping[int, Sequence[Sequence[MeasuredPass]]], expected: Callable[[int], float] | None = None
) -> list[Row]:
    """A row for each size, from the passes of every run over the same texts.

    expected: of a drafter that predicts a pass's tokens for each size, see `drafter.PredictsAcceptance`. Its
    predictions, less one, are scaled by one factor for all sizes, to fit the tokens of these passes.
    """
    lanes = {size: sum(each.lanes for each in passes[0]) for size, passes in runs.items()}
    tokens = {size: sum(each.tokens for each in passes[0]) for size, passes in runs.items()}
    if not all(lanes.values()):
        raise ValueError("prompts: each response ends with its first token, expected longer ones")
    tau = {size: tokens[size] / lanes[size] for size in runs}
    if expected is not None:
        promised = sum(lanes[size] * (expected(size) - 1) for size in runs)
        worth = (sum(tokens.values()) - sum(lanes.values())) / promised if promised else 1.0
        tau = {size: 1 + worth * (expected(size) - 1) for size in runs}
    rows = []
    for size, passes in runs.items():
        seconds = median_seconds([[each.seconds for each in run] for run in passes])
        drafting = median_seconds([[each.drafting for each in run] for run in passes])
        each = 1e3 / len(passes[0])
        row = {"draft_size": size, "pass_ms": each * (seconds - drafting), "draft_ms": each * drafting}
        row |= {"tokens_per_forward": tau[size], "tokens_per_second": tau[size] * lanes[size] / seconds}
        rows.append({name: rounded(value) for name, value in row.items()})
    return rows


def sizes_of(most: int, asked: Iterable[int] | None) -> list[int]:
    """The sizes to measure, ascending. Raises ValueError for a size above `most`."""
    if asked:
        return sorted({whole("draft_size", size, 0, most) for size in asked})
    return sorted({*(size for size in SIZES if size < most), most})


def measure_drafts(
    settings: TuneSettings, drafter: str | None, sizes: Iterable[int] | None, report: Callable[[str], None]
) -> tuple[Work, list[Row]]:
    """Measure a row for each size of draft; without a drafter rows have only `pass_ms`, of meaningless
    drafts."""
    loading = settings.loading
    device, dtype = models.device_of(loading.device), loading.dtype_for(settings.model)
    loaded = registry.load_drafter(drafter, device, dtype)
    asked = sizes_of(Filler.most if loaded is None else loaded.most, sizes)
    work = load(settings)
    model = causal_model(work.model)
    if loaded is not None:
        loaded.check(model)
    encode = text.prompt_encoder(work.tokenizer, work.template)
    prompts = [torch.tensor(ids) for ids in lengthened([*map(encode, work.texts)], settings.context)]
    check_prompts(model, prompts)
    length = whole("gen_length", work.config.gen_length, 2)
    positions = max(map(len, prompts)) + length + asked[-1]  # so that the last drafts have room too
    registry.check_positions(settings.model, model, positions)
    sizer = Stopwatch(0)
    batch = speculation.CausalBatch(model, settings.batch, positions, drafter=loaded or Filler(), sizer=sizer)
    # One batch for all, as in an engine. A size's runs follow each other at once, so that the passes that the
    # first records are replayed in the others before recordings of other sizes replace them.
    timed: dict[int, list[list[MeasuredPass]]] = {}
    for sizer.nodes in asked:
        runs = [[*_passes(batch, sizer, prompts, length, work.config)] for _ in range(1 + settings.repeats)]
        timed[sizer.nodes] = runs[1:]
        report(f"draft_size {sizer.nodes}: {len(runs[0])} passes, {1 + settings.repeats} times")
    rows = curve(timed, loaded.expected if isinstance(loaded, PredictsAcceptance) else None)
    if loaded is None:
        return work, [{name: row[name] for name in ("draft_size", "pass_ms")} for row in rows]
    return work, [{"drafter": drafter, **row} for row in rows]


def lengthened(prompts: list[list[int]], context: int | None) -> list[list[int]]:
    """Each prompt with the others put before it, repeatedly, until it has `context` tokens."""
    lengthened_ids = []
    for at, ids in enumerate(prompts):
        others = [*itertools.chain(*prompts[at + 1 :], *prompts[: at + 1])]
        count = max(0, (context or 0) - len(ids))
        lengthened_ids.append([*itertools.islice(itertools.cycle(others), count), *ids])
    return lengthened_ids


def _passes(
    batch: speculation.CausalBatch,
    sizer: Stopwatch,
    prompts: Sequence[torch.Tensor],
    gen_length: int,
    config: dx.DecodeConfig,
) -> Iterator[MeasuredPass]:
    """Decode all prompts, as many at a time as there are lanes; yield the measured passes."""
    lanes, model = len(batch.sequences), batch.model
    for at in range(0, len(prompts), lanes):
        part = prompts[at : at + lanes]
        settings = make_settings(config, model, "none", len(part))
        for lane, (ids, setting) in enumerate(zip(part, settings, strict=True)):
            batch.admit(lane, ids, batch.tokens.shape[1] - len(ids), setting)
        while live := batch.live:
            sequences = [batch.sequences[lane] for lane in live]
            prefills, known = (
                any(sequence.prefills for sequence in sequences),
                sum(sequence.known for sequence in sequences),
            )
            began, drafting = time.perf_counter(), sizer.seconds
            with torch.inference_mode():
                batch.step()  # returns when the result is on the host
            seconds = time.perf_counter() - began
            if not prefills:
                tokens = sum(sequence.known for sequence in sequences) - known
                yield MeasuredPass(seconds, sizer.seconds - drafting, len(live), tokens)
            for lane, sequence in zip(live, sequences, strict=True):
                if sequence.decoded >= gen_length:
                    batch.release(lane)


# --- diffusion models -----------------------------------------------------------------------------


def measure_policies(
    settings: TuneSettings, grid: Mapping[str, Any], report: Callable[[str], None]
) -> tuple[Work, list[Row]]:
    """Measure a row for each combination of the grid's values; grid: values for the names in `GRID`, None for
    the default. A combination that the model refuses is left out; raises ValueError if it refuses all."""
    choices = GRID | own_choices(settings.model)
    choices |= {name: values for name, values in grid.items() if values}
    asked = [dict(zip(choices, each, strict=True)) for each in itertools.product(*choices.values())]
    for row in asked:
        parse_policy(row["rule"])
        check_row(row)
    work = load(settings)
    models.check_diffusion(work.model, decoding=True)
    rows, answers = list[Row](), list[list[str]]()
    refused: ValueError | None = None
    for row in asked:
        try:
            measured, responses = _measured(settings, work, row)
        except ValueError as error:
            refused = error
            report(f"left out: {settings_text(row)}: {error}")
            continue
        report(f"{settings_text(row)}: {measured['tokens_per_second']:.1f} tokens a second")
        rows.append({**row, **measured})
        answers.append(responses)
    if refused is not None and not rows:
        raise refused
    judge(rows, answers, work.problems)
    return work, rows


def own_choices(name: str) -> dict[str, tuple[Any, ...]]:
    """The values in place of `GRID`'s for a model that fills masks in one cache mode alone, or by blocks of
    its own, by its config.json."""
    traits = registry.traits_of(name)
    if traits.window is not None:
        return {"block_length": (traits.window,), "active_blocks": (1,), "cache": ("window",)}
    if traits.onward:
        return {"cache": ("block",)}
    own = traits.block_length  # of a block-causal model
    return {} if own is None else {"block_length": (own,), "cache": ("block",)}


def _measured(settings: TuneSettings, work: Work, row: Row) -> tuple[Row, list[str]]:
    """Measure decoding with a row's settings; return passes and rates, and the responses."""
    fields = {name: value for name, value in row.items() if name != "rule"}
    config = work.config.with_rule(row["rule"], **fields)
    parts = [work.texts[at : at + settings.batch] for at in range(0, len(work.texts), settings.batch)]
    runs: list[list[float]] = []
    for _ in range(1 + settings.repeats):
        responses: list[Row] = []
        seconds = []
        for part in parts:
            began = time.perf_counter()
            responses += complete(
                settings.model, work.model, work.tokenizer, part, config, template=work.template
            )
            seconds.append(time.perf_counter() - began)
        runs.append(seconds)
    tokens, passes = (sum(each[name] for each in responses) for name in ("tokens", "forwards"))
    measured = {
        "passes": rounded(passes / len(responses)),
        "tokens_per_forward": rounded(tokens / passes),
        "tokens_per_second": rounded(tokens / median_seconds(runs[1:])),
    }
    return measured, [each["response"] for each in responses]


def judge(
    rows: Sequence[Row], answers: Sequence[Sequence[str]], problems: Sequence[tasks.Problem] | None
) -> None:
    """Give each row its share of right answers, or, if there are none or they are not known, of texts equal
    to those of the row with the most passes."""
    if problems is not None:
        right = [sum(map(tasks.is_correct, problems, responses)) / len(problems) for responses in answers]
        if any(right):
            for row, share in zip(rows, right, strict=True):
                row["right"] = rounded(share)
            return
    reference = answers[max(range(len(rows)), key=lambda at: rows[at]["passes"])]
    for row, responses in zip(rows, answers, strict=True):
        same = sum(a == b for a, b in zip(responses, reference, strict=True))
        row["same"] = rounded(same / len(reference))


# --- the choice -----------------------------------------------------------------------------------


def choose(rows: Sequence[Row], tolerance: float = TOLERANCE) -> Row | None:
    """The row with the most tokens per second, among those whose share of right answers or same texts is at
    most `tolerance` points below the best; the first of equal rows. None if only passes were timed."""
    judged = next((name for name in JUDGED if name in rows[0]), None)
    if judged is not None:
        least = max(row[judged] for row in rows) - tolerance / 100 - 1e-9
        rows = [row for row in rows if row[judged] >= least]
    return max(rows, key=lambda row: row["tokens_per_second"]) if "tokens_per_second" in rows[0] else None


def content(settings: TuneSettings, work: Work, rows: Sequence[Row], chosen: Row | None) -> Row:
    """The content of the file; a mask token that was asked for is in it, as the choice is for it."""
    mask_id = settings.loading.mask_id
    return {
        **({} if mask_id is None else {"mask_id": mask_id}),
        **{name: chosen[name] for name in CHOSEN if chosen is not None and name in chosen},
        TUNED: {
            "model": settings.model,
            "fingerprint": models.fingerprint(work.model),
            "device": registry.device_name(work.model.device),
            **registry.weights_of(work.model),
            "torch": torch.__version__,
            "dparallel_ext": dx.__version__,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "prompts": len(work.texts),
            "gen_length": work.config.gen_length,
            "context": settings.context,
            "batch": settings.batch,
            "curve": list(rows),
        },
    }


def settings_text(row: Row) -> str:
    """A row's settings in words, unique in a table."""
    if "draft_size" in row:
        return str(row["draft_size"])
    return f"{row['rule']} blocks {row['block_length']} x {row['active_blocks']} {row['cache']}"


COLUMNS = {
    "draft_ms": ("draft ms", "9.3f"),
    "pass_ms": ("pass ms", "9.3f"),
    "passes": ("passes", "7.1f"),
    "right": ("right", "7.1%"),
    "same": ("same", "7.1%"),
    "tokens_per_forward": ("tok/pass", "8.2f"),
    "tokens_per_second": ("tok/s", "9.1f"),
}
"""Field of a row -> heading and format of its column."""
BAR = 30


def chart(rows: Sequence[Row], chosen: Row | None) -> Iterator[str]:
    """The rows as lines, with bars of tokens per second, or of the passes' time if only that was measured."""
    columns = [name for name in COLUMNS if name in rows[0]]
    shown = "tokens_per_second" if "tokens_per_second" in rows[0] else "pass_ms"
    first = "draft_size" if "draft_size" in rows[0] else "policy"
    width = max(len(first), *(len(settings_text(row)) for row in rows))
    heads = [f"{COLUMNS[name][0]:>{COLUMNS[name][1].split('.')[0]}}" for name in columns]
    yield " ".join([f"{first:<{width}}", *heads])
    most = max(row[shown] for row in rows)
    for row in rows:
        cells = [f"{row[name]:{COLUMNS[name][1]}}" for name in columns]
        bar = "#" * (round(BAR * row[shown] / most) if most else 0)
        yield " ".join(
            [f"{settings_text(row):<{width}}", *cells, bar + (" <- chosen" if row is chosen else "")]
        )
