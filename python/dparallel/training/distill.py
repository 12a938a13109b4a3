"""Runs a recipe: certainty forcing of a model on its own right answers."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

import dparallel_ext as dx
from dparallel_ext import backends
from dparallel_ext.arguments import is_number, warn, whole
from dparallel_ext.models import Model
from dparallel_ext.models.config import ModelConfig
from dparallel_ext.models.modules import shapes_only
from dparallel_ext.ops.head import CHUNK_BYTES

from .. import files, registry, tokenizer
from ..problems import read_prompts
from . import adapters, saving, trajectories


@dataclass(frozen=True)
class Recipe:
    """The content of a recipe's YAML file."""

    model: str
    """"builtin:NAME", a checkpoint directory, or ORG/NAME of the Hugging Face Hub."""
    training: dict[str, Any]
    """Fields of `trainer.CertaintyForcingArguments`."""
    data: str = ""
    """The source of prompts, see `problems.read_prompts`."""
    trajectories: dict[str, Any] = field(default_factory=dict)
    """Fields of `trajectories.TrajectorySettings`."""
    collator: dict[str, Any] = field(default_factory=dict)
    """Fields of `trajectories.Collator`: total_length or response_length."""
    lora: dict[str, Any] | None = None
    """Fields of `peft.LoraConfig`, target_modules by the checkpoint's names or ours; None: train all
    weights."""
    architecture: dict[str, Any] | None = None
    """The model's config.json, for a dry run without the checkpoint."""
    examples: int | None = None
    """The number of answers, for a dry run without the trajectories."""
    mask_id: int | None = None
    """The mask token's id; None: the checkpoint's own."""


SECTIONS: dict[str, set[str] | None] = {
    "training": None,  # `arguments` checks them
    "trajectories": {f.name for f in fields(trajectories.TrajectorySettings)},
    "collator": {f.name for f in fields(trajectories.Collator)} - {"eos_id", "ends", "block_length"},
    "lora": None,
    "architecture": None,
}
"""The mappings in a recipe -> their keys, or None if they are checked elsewhere."""


def read(file: str | Path, **changes: Any) -> Recipe:
    """The recipe in a YAML file; `changes` replace its fields, those of `training` one by one. With another
    `model` the recipe's `architecture`, which is its own model's, goes.

    Raises FileNotFoundError, or ValueError naming the key that is unknown or missing.
    """
    import yaml

    try:
        content = yaml.safe_load(files.read_text("recipe", file))
        _check_plain(f"recipe: {file}", content)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"recipe: {file} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"recipe: {file} holds a {type(content).__name__}, expected a mapping")
    known = {f.name for f in fields(Recipe)}
    unknown, missing = sorted(set(content) - known), sorted({"model", "training"} - set(content))
    if unknown or missing:
        raise ValueError(f"recipe: {file}: unknown {unknown}, missing {missing}; known are {sorted(known)}")
    for name, keys in SECTIONS.items():
        section = content.get(name)
        if name in content and section is None and name not in ("lora", "architecture"):
            section = content[name] = {}  # YAML's value for a key with nothing, or comments alone, below it
        if section is not None and not isinstance(section, dict):
            raise ValueError(f"recipe: {file}: expected a mapping for {name!r}, got {section!r}")
        if keys and (other := sorted(set(section or {}) - keys)):
            raise ValueError(f"recipe: {file}: {name} has unknown {other}; known are {sorted(keys)}")
    for name in ("model", "data"):
        if not isinstance(content.get(name, ""), str):
            raise ValueError(f"recipe: {file}: expected a text for {name!r}, got {content[name]!r:.80}")
    for name in ("examples", "mask_id"):
        if content.get(name) is not None:
            whole(f"recipe: {file}: {name}", content[name], 0)
    if "model" in changes:
        content["architecture"] = None
    training = {**content.pop("training"), **changes.pop("training", {})}
    return Recipe(**{**content, **changes, "training": training})


def _check_plain(place: str, value: Any) -> None:
    """Raise ValueError for a key or a value that JSON does not have, since training.json holds the recipe."""
    if isinstance(value, dict):
        for key, each in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{place}: expected a text as a key, so in quotes, got {key!r:.80}")
            _check_plain(f"{place}: {key}", each)
    elif isinstance(value, list):
        for each in value:
            _check_plain(place, each)
    elif not isinstance(value, str | int | float | None):
        raise ValueError(f"{place}: expected a number or a text, so in quotes, got {value!r:.80}")


def arguments(recipe: Recipe, out: str | Path) -> Any:
    """The recipe's `CertaintyForcingArguments`. Raises ValueError naming a setting that does not exist."""
    from .trainer import CertaintyForcingArguments

    known = {f.name for f in fields(CertaintyForcingArguments)}
    training = {**recipe.training}
    for names in RENAMED:
        here = next(name for name in names if name in known)
        for name in names:
            if name in training:
                training.setdefault(here, training.pop(name))
    unknown = sorted(set(training) - known)
    if unknown:
        raise ValueError(f"training: no setting {unknown} in transformers.TrainingArguments or among ours")
    for name in DECIDED_HERE:
        if training.get(name):
            raise ValueError(f"training: expected no {name}: `distill` writes and resumes in its `out`")
    for f in fields(CertaintyForcingArguments):
        if f.name in training:
            _check_number(f.name, training[f.name], set(re.findall(r"\w+", str(f.type))))
    defaults = {"report_to": [], "use_cpu": not torch.cuda.is_available()}
    training = {**defaults, **training}
    if training["use_cpu"] and not backends.fast_bfloat16():
        training["bf16"] = False  # the same training in float32, five times faster or more
    with _named():
        return CertaintyForcingArguments(output_dir=str(out), **training)


@contextlib.contextmanager
def _named() -> Iterator[None]:
    """A context in which errors of transformers and torch that name no argument name the recipe's section."""
    try:
        yield
    except ValueError as error:
        if re.match(r"\w+(, \w+)*: ", str(error)):
            raise
        raise ValueError(f"training: {error}") from error


RENAMED = (
    ("activation_checkpointing", "gradient_checkpointing"),
    ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"),
)
"""Names of one setting in versions of transformers, the newest first; a recipe may have any of them."""
DECIDED_HERE = ("output_dir", "resume_from_checkpoint", "push_to_hub", "save_only_model", "ignore_data_skip")
"""The settings of `training` that a recipe does not have. Without the optimizer, or with an epoch's rows once
more, a run that goes on would become another run."""


def _check_number(name: str, value: Any, kinds: set[str]) -> None:
    """Raise ValueError unless the value fits the words of its field's type, if these are of numbers alone."""
    if not kinds & {"int", "float"} or kinds - {"class", "int", "float", "None", "Optional", "typing"}:
        return
    if value is None and kinds & {"None", "Optional"}:
        return
    integral = "float" not in kinds
    if not is_number(value) or isinstance(value, bool) or (integral and not isinstance(value, int)):
        hint = " (in YAML 2e-5 is a text, and 2.0e-5 a number)" if isinstance(value, str) else ""
        kind = "a whole number" if integral else "a number"
        raise ValueError(f"training: expected {kind} for {name}, got {value!r:.80}{hint}")


def last_checkpoint(directory: Path) -> str | None:
    """The newest checkpoint that was saved completely.

    transformers writes trainer_state.json last, so in a checkpoint whose saving was interrupted it is missing
    or half-written.
    """
    numbers = {path: path.name.removeprefix("checkpoint-") for path in directory.glob("checkpoint-*")}
    steps = {path: int(number) for path, number in numbers.items() if number.isdecimal()}
    for path in sorted(steps, key=steps.__getitem__, reverse=True):
        try:
            state = json.loads((path / "trainer_state.json").read_text())
            if state["global_step"] == steps[path]:
                return str(path)
        except (OSError, ValueError, TypeError, KeyError):
            continue
    return None


def saved_progress(directory: Path) -> str | None:
    """The name of the last checkpoint; None if there is none."""
    checkpoint = last_checkpoint(directory)
    return None if checkpoint is None else Path(checkpoint).name


RECORD = "recipe.json"
MAY_CHANGE = (
    *("max_steps", "num_train_epochs", "per_device_*", "gradient_*", "activation_*", "dataloader_*"),
    *("ddp_*", "torch_compile*", "use_cpu", "logging_*", "log_*", "save_*", "eval_*"),
    *("report_to", "run_name", "disable_tqdm"),
)
"""The settings of `training` that may differ in a resumed run: its length, its layout on machines (of as many
sequences a step), and what it writes."""
SEQUENCES = "sequences per step"
"""The key of a record for the product of micro-batch, accumulation and processes."""


def identity(recipe: Recipe, answers: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a run can be resumed with alone; `answers`: the settings of the trajectories."""
    kept = {key: v for key, v in recipe.training.items() if not any(fnmatch(key, p) for p in MAY_CHANGE)}
    of_recipe = {name: getattr(recipe, name) for name in ("model", "mask_id", "lora", "collator")}
    of_training = {f"training.{key}": v for key, v in kept.items()}
    return dict(json.loads(json.dumps({**of_recipe, **of_training, "trajectories": dict(answers)})))


def _sequences(args: Any, processes: int) -> int:
    return int(args.per_device_train_batch_size * args.gradient_accumulation_steps * processes)


def _check_record(directory: Path, content: dict[str, Any]) -> None:
    """Raise ValueError if the checkpoints in the directory are of a run with other settings."""
    file = directory / RECORD
    if not file.exists():  # checkpoints of an earlier version
        return
    # A record of an earlier version lacks the sequences.
    before = {SEQUENCES: content[SEQUENCES], **files.json_object("out", file)}
    keys = sorted({*before, *content})
    other = {key: before.get(key) for key in keys if before.get(key) != content.get(key)}
    if other:
        raise ValueError(
            f"out: {directory} holds checkpoints of a run with other settings: {other}; give this run a "
            "directory of its own"
        )


def mismatch(recipe: Recipe, answers: Mapping[str, Any]) -> str | None:
    """A sentence, if the trajectories with these settings were answered by another model or mask token."""
    asked, trained = str(answers.get("model")), recipe.model
    with contextlib.suppress(OSError, ValueError):  # a name that is no path of this machine
        if Path(asked).resolve() == Path(trained).resolve():
            asked = trained
    masks = answers.get("mask_id"), recipe.mask_id
    if asked == trained and masks[0] == masks[1]:
        return None
    of_answers, of_recipe = ("" if mask is None else f" with mask_id {mask}" for mask in masks)
    return (
        f"answers: they are those of {asked!r}{of_answers}, and the model that learns them is "
        f"{trained!r}{of_recipe}; certainty forcing is meant for a model's own answers"
    )


def run(
    recipe: Recipe,
    answers: str | Path,
    out: str | Path,
    *,
    progress: bool = True,
) -> Path:
    """Train on the trajectories in `answers`, or resume from the last checkpoint in `out`.

    `out` receives the student in the checkpoint's own layout and in bfloat16 (with LoRA: the adapter, for
    `merge`), the base's tokenizer files, training.json (recipe, seconds and the log), and recipe.json, the
    settings that a run can be resumed with alone (all but `MAY_CHANGE`). A checkpoint whose saving was
    interrupted is ignored.

    Raises ValueError if `out` holds checkpoints of a run with other settings or of more steps, or another run
    is writing there; OSError if the disk is full.
    """
    with files.run_directory(out, "checkpoint-*") as directory, files.full_disk_named(directory):
        return _run(recipe, answers, directory, progress)


def _run(recipe: Recipe, answers: str | Path, directory: Path, progress: bool) -> Path:
    from .trainer import CertaintyForcingTrainer

    args = arguments(recipe, directory)
    args.disable_tqdm |= not progress
    source = registry.directory_of(recipe.model)
    files.apart(directory, source)
    loaded_tokenizer = tokenizer.load(source)
    rows = _rows(recipe, answers, loaded_tokenizer)
    checkpoint = last_checkpoint(directory)
    settings = identity(recipe, rows.settings) | {SEQUENCES: _sequences(args, args.world_size)}
    if checkpoint is not None:
        _check_record(directory, settings)
    with registry.naming("model", "path"):
        companions = files.Companions(source)
    model: Any = _load_model(recipe, source, loaded_tokenizer, args.device)
    collator = trajectories.Collator(
        model.eos_id, ends=model.eos_ids, block_length=model.block_length, **recipe.collator
    )
    dx.models.warn_beyond(model, *_longest(collator, rows))
    if recipe.lora is not None:
        torch.manual_seed(args.seed)
        model = adapters.with_lora(model, recipe.lora, str(source))
    try:
        with _named():
            trainer = CertaintyForcingTrainer(
                model=model,
                args=args,
                train_dataset=rows,
                data_collator=collator,
                processing_class=companions,
            )
    except RuntimeError as error:
        if "installed" not in str(error):  # else the package that `report_to` names is not
            raise
        raise ValueError(f"training: report_to: {error}") from error
    saving.check_deepspeed(trainer)
    if not progress:
        from transformers import PrinterCallback

        trainer.remove_callback(PrinterCallback)
    if checkpoint is None and trainer.is_world_process_zero():
        files.write_json(directory / RECORD, settings)
    with _named():
        result = trainer.train(resume_from_checkpoint=checkpoint)
    if (done := trainer.state.global_step) > (most := trainer.state.max_steps):
        raise ValueError(
            f"max_steps, num_train_epochs: {directory} holds checkpoints of a run of {done} steps, expected "
            f"at least as many, got {most}"
        )
    saving.save_model(trainer, model, companions, directory)
    if trainer.is_world_process_zero():
        report = {"recipe": vars(recipe), "trajectories": rows.settings, "answers": len(rows)}
        report |= {"seconds": round(result.metrics["train_runtime"]), "log": trainer.state.log_history}
        files.write_json(directory / "training.json", report)
    finish(trainer)
    return directory


def _load_model(recipe: Recipe, source: Path, model_tokenizer: Any, device: torch.device) -> Model:
    """The model to train, in a dtype for training. Raises ValueError for a model without an end token."""
    # Adapters are trained beside 16-bit weights where those are fast; trained weights need 32 bits.
    narrow = recipe.lora is not None and backends.fast_bfloat16(device)
    with registry.naming("model", "path"):
        dtype = torch.bfloat16 if narrow else torch.float32
        model = dx.models.load(source, dtype=dtype, mask_id=recipe.mask_id)
    # The tokenizer's, too, by which `trajectories` judged the answers.
    registry.end_as_tokenizer(model, source, model_tokenizer)
    if model.eos_id is None:
        raise ValueError(
            f"model: expected an end token of {source}, as eos_token_id in config.json or eos_token in "
            "tokenizer_config.json, got none"
        )
    return model


def _rows(recipe: Recipe, answers: str | Path, model_tokenizer: Any) -> trajectories.Trajectories:
    """The answers to train on. model_tokenizer: the model's tokenizer.

    Raises ValueError if there is no answer, or if they do not fit the recipe.
    """
    rows = trajectories.Trajectories(answers)
    if not len(rows):
        raise ValueError(f"answers: {answers} holds no right answer")
    rows.check_tokenizer(recipe.model, model_tokenizer)
    if other := mismatch(recipe, rows.settings):
        warn(other)
    total = trajectories.Collator(0, **recipe.collator).total_length
    if total is not None and all(prompt >= total for _, prompt, _ in rows.bounds):
        raise ValueError(f"total_length: expected more tokens than the shortest prompt has, got {total}")
    return rows


def _longest(collator: trajectories.Collator, rows: trajectories.Trajectories) -> tuple[int, str]:
    """The most positions of a collated row, and the name of the setting or data that decides about them."""
    if collator.total_length is not None:
        return collator.total_length, "total_length"
    if collator.response_length is not None:
        return max(prompt for _, prompt, _ in rows.bounds) + collator.response_length, "response_length"
    return max(length for *_, length in rows.bounds), "answers"


def finish(trainer: Any) -> None:
    """End the process group, if there is one: its threads may abort the interpreter when it ends."""
    if trainer.args.world_size < 2:
        return
    # DistributedDataParallel holds the group too, but must not be the last: it would join the group's threads
    # and keep Python's lock, for which a thread that drops the last collective's tensors may wait for ever.
    group = torch.distributed.group.WORLD
    trainer.accelerator.free_memory()  # DeepSpeed asks for its rank here, so while the group is there
    trainer.model_wrapped = trainer.model
    gc.collect()
    trainer.accelerator.end_training()
    del group


# --- dry run ------------------------------------------------------------------------------------


def plan(recipe: Recipe, *, processes: int = 1, answers: str | Path | None = None) -> dict[str, Any]:
    """Steps and bytes per process of a recipe, computed without allocating weights.

    answers: the directory that `trajectories` wrote, whose right answers count; None: the recipe's
        `examples`, or the prompts of its `data` if that is built in.

    Weights, gradients and optimizer state are exact, for data parallelism without sharding (AdamW, two
    float32 moments). Activations are estimated: the tensors that autograd keeps of each layer; with gradient
    checkpointing the layers' inputs and one layer's tensors.
    """
    whole("processes", processes, 1)
    config = recipe.architecture
    if config is None:
        config, _ = dx.models.config_of(registry.directory_of(recipe.model))
    family = dx.models.family_of(config)
    if family is None:
        raise ValueError(
            f"architecture: model_type {config.get('model_type')!r} is none of {list(dx.models.FAMILIES)}"
        )
    with shapes_only():
        model: Any = family(config)
    shape = model.shape
    total = sum(p.numel() for p in model.parameters())
    if recipe.lora is not None:
        model = adapters.with_lora(model, recipe.lora, recipe.model)
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    else:
        trainable = total
    args = arguments(recipe, "unused")
    micro, accumulated = args.per_device_train_batch_size, args.gradient_accumulation_steps
    batch = _sequences(args, processes)
    examples = recipe.examples if answers is None else len(trajectories.Trajectories(answers))
    if examples is None:
        examples = len(read_prompts(recipe.data)) if recipe.data.startswith("builtin:") else None
    if args.max_steps > 0:
        steps: int | None = args.max_steps
    else:
        steps = None if examples is None else math.ceil(-(-examples // batch) * args.num_train_epochs)
    collator = trajectories.Collator(0, **recipe.collator)
    gen = whole("gen_length", trajectories.TrajectorySettings(**recipe.trajectories).gen_length, 1)
    tokens = collator.total_length or 128 + (collator.response_length or gen)
    rows = 2 * micro * tokens  # both views
    checkpointed = any(getattr(args, name, False) for name in RENAMED[0])
    passes = 3 + checkpointed + (accumulated > 1)  # backward counts as two
    sizes = {
        "weights": 2 * total + 4 * trainable if recipe.lora else 4 * total,
        "gradients": 4 * trainable,
        "optimizer": 8 * trainable,
        **_of_rows(shape, rows, checkpointed),
    }
    return {
        "parameters": total,
        "trainable": trainable,
        "processes": processes,
        SEQUENCES: batch,
        "tokens per sequence": tokens,
        "answers": examples,
        "steps": steps,
        "forward equivalents per micro-batch": passes,
        "bytes per process": {**sizes, "total": sum(sizes.values())},
    }


def _of_rows(shape: ModelConfig, rows: int, checkpointed: bool) -> dict[str, int]:
    """The bytes that `rows` tokens of a micro-batch take."""
    # Kept of a layer: the inputs of two norms in float32; in 16 bits their outputs, q, k, v and attention's
    # output, and the three tensors of the MLP.
    kv = shape.kv_heads * shape.head_dim
    layer = rows * (2 * 4 * shape.width + 2 * (6 * shape.width + 2 * kv + 4 * shape.mlp_width))
    inputs = rows * 2 * shape.width
    row = 2 * shape.embedding_size
    chunk = min(rows, CHUNK_BYTES["cuda"] // row) * row
    return {
        "activations (estimate)": shape.layers * inputs + layer if checkpointed else shape.layers * layer,
        "loss": 2 * chunk + rows * 2 * shape.width,
    }
