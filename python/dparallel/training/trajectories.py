"""Collects a model's own right answers, to train it on: prompts in, shards of checked answers out.

Certainty forcing learns from the model's own text (dParallel, arXiv 2509.26488): the model answers the
training prompts, a checker keeps the right answers, and each is written with the order in which its tokens
were committed. Prompts are cut into shards; a shard's file appears whole or not at all, so an interrupted run
is resumed with the missing shards, and any number of processes divide them by number.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

import dparallel_ext as dx
from dparallel_ext.arguments import check_fields, one_of, token_ids, warn, whole

from .. import files, registry
from ..checkers import checker_of, without_number
from ..configs import POLICY, parse_policy
from ..evaluate import kept_of
from ..problems import Prompt, digest_of
from ..text import Encoder, Template
from ..toy import tasks

SETTINGS = "settings.json"
FORMATS = ("parquet", "jsonl")


@dataclass(frozen=True)
class TrajectorySettings:
    """The settings of a run; it can be resumed only with the same."""

    model: str = registry.DEFAULT
    """"builtin:NAME", a checkpoint directory, or ORG/NAME of the Hugging Face Hub."""
    policy: str = POLICY
    """The text of a rule or a policy, see `rules.parse`."""
    gen_length: int = tasks.GEN_LENGTH
    """Tokens of an answer."""
    block_length: int | None = None
    """None: `Traits.default_block_length`; settings.json has the number."""
    cache: str = "none"
    """See `DecodeConfig`."""
    checker: str = "hashes"
    """"hashes", "last_number", "boxed", "none" (every answer is right) or "package.module:function", which
    says of (reference, response) whether it is right."""
    shard: int = 500
    """Prompts per shard."""
    format: str = "parquet"
    """"parquet" or "jsonl"."""
    chat: bool | None = None
    """Whether to put prompts into the checkpoint's chat template; None: if it has one."""
    mask_id: int | None = None
    """None: the checkpoint's own."""
    dtype: str = "auto"
    """"float32", "bfloat16", "float16", or "auto", see `registry.load`."""

    @property
    def config(self) -> dx.DecodeConfig:
        """The config of decoding. Raises ValueError naming the setting that does not fit."""
        return dx.DecodeConfig(
            rule=self.policy,
            gen_length=self.gen_length,
            block_length=self.block_length,
            cache=self.cache,
            record=True,
        )


# --- answers ------------------------------------------------------------------------------------


def generate(
    out: str | Path,
    prompts: list[Prompt],
    settings: TrajectorySettings | None = None,
    *,
    batch: int = 100,
    device: str | None = None,
    loaded: tuple[Any, Any] | None = None,
    progress: bool = True,
) -> Path:
    """Answer `prompts` and write the right answers to `out`, or resume an interrupted run there.

    `out` receives settings.json, and part-NNNNN files in the `format` of the settings. Their rows: index (of
    the prompt), prompt, prompt_ids, response, response_ids, step (the pass that committed each token, from
    1), confidence (its probability then), nfe (passes). A shard without a right answer has no rows. Responses
    are judged up to their end token, and kept whole.

    Under `torchrun` or `accelerate launch`, process r of n (RANK of WORLD_SIZE) takes the shards r, r + n,
    ..., and the device is cuda:LOCAL_RANK if there is a GPU. The number of processes may change between runs.
    A damaged shard is answered again.

    Args:
        batch: sequences decoded at once; those of like prompt lengths go together.
        loaded: (model, tokenizer), in place of loading settings.model; then the chat template of
            settings.model is applied only if `settings.chat` is true.

    Raises:
        ValueError: if `out` holds a run with other settings or prompts, or another run is writing there; and
            as `decode`. A run that is refused leaves nothing behind.
        ModuleNotFoundError: if `format` is "parquet" and pyarrow is not installed.
    """
    settings = settings or TrajectorySettings()
    for name, value in (("shard", settings.shard), ("batch", batch)):
        whole(name, value, 1)
    if one_of("format", settings.format, FORMATS) == "parquet":
        importlib.import_module("pyarrow.parquet")  # a missing package fails before anything is decoded
    parse_policy(settings.policy)
    registry.dtype_of(settings.dtype)
    checker_of(settings.checker)
    if other := without_number(settings.checker, (prompt.answer for prompt in prompts)):
        warn(other)
    if settings.block_length is None:
        traits = registry.traits_of(settings.model) if loaded is None else dx.models.traits(loaded[0])
        settings = replace(settings, block_length=traits.default_block_length)
    wanted = settings.chat or loaded is None
    template = registry.template_of(settings.model, settings.chat) if wanted else None
    settings = replace(settings, chat=template is not None)
    _ = settings.config  # which names a setting that does not fit
    with files.run_directory(out) as directory:
        _generate(directory, prompts, settings, template, batch, device, loaded, progress)
    return directory


def _generate(
    directory: Path,
    prompts: list[Prompt],
    settings: TrajectorySettings,
    template: Template | None,
    batch: int,
    device: str | None,
    loaded: tuple[Any, Any] | None,
    progress: bool,
) -> None:
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    # Of settings.json, which identifies the run.
    content = {**asdict(settings), "prompts": len(prompts), "prompts_sha256": digest_of(prompts)}
    _check(directory, content)
    shards = [prompts[first : first + settings.shard] for first in range(0, len(prompts), settings.shard)]
    mine = range(rank, len(shards), world)
    missing = [i for i in mine if not _is_whole(directory, i, settings)]
    if not missing:
        _claim(directory, content)
        return
    for number in missing:  # files of a run that was killed
        for partial in directory.glob(_shard(directory, number, settings.format).name + f"*{files.PARTIAL}"):
            partial.unlink(missing_ok=True)
    if device is None and torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    loading = registry.Loading(device, registry.dtype_of(settings.dtype), mask_id=settings.mask_id)
    model, tokenizer = loaded or loading.load(settings.model)
    model = dx.models.for_decoding(model)
    dx.models.check_diffusion(model)
    encode = registry.encoder_of(settings.model, model, tokenizer, template, settings.gen_length)
    config, checker = settings.config, checker_of(settings.checker)
    total, left = (sum(len(shards[i]) for i in some) for some in (mine, missing))
    name = "trajectories" if world == 1 else f"trajectories {rank}/{world}"
    bar = tqdm(
        total=total, desc=name, unit="prompt", initial=total - left, position=rank, disable=not progress
    )
    kept = seen = 0
    for number in missing:
        first, part = number * settings.shard, shards[number]
        rows: list[dict[str, Any]] = []
        for answered in _answer(model, tokenizer, encode, part, config, batch):
            for at, row, judged in answered:
                index = first + at
                try:
                    right = checker(part[at].answer, judged)
                except ValueError as error:
                    raise ValueError(
                        f"{error}, of prompt {index}; the same command goes on with its shard"
                    ) from error
                if right:
                    rows.append({"index": index, **row})
            seen += len(answered)
            bar.update(len(answered))
            bar.set_postfix(kept=f"{(kept + len(rows)) / seen:.1%}")
        kept += len(rows)
        rows.sort(key=lambda row: row["index"])
        _claim(directory, content)  # now that nothing was refused
        _write(_shard(directory, number, settings.format), rows, settings)
    bar.close()


def _answer(
    model: Any,
    tokenizer: Any,
    encode: Encoder,
    prompts: list[Prompt],
    config: dx.DecodeConfig,
    batch: int,
) -> Iterator[list[tuple[int, dict[str, Any], str]]]:
    """Answer prompts batch by batch, prompts of like lengths together; yield [(index in prompts, row,
    response up to its end)] of each batch."""
    asked = [(at, encode(prompt.text)) for at, prompt in enumerate(prompts)]
    asked.sort(key=lambda each: len(each[1]))
    for first in range(0, len(asked), batch):
        part = asked[first : first + batch]
        out = dx.decode(model, [ids for _, ids in part], config)
        assert out.trajectory is not None
        responses = [response.tolist() for response in out.responses]
        texts = tokenizer.decode_batch(responses)
        ends = getattr(model, "eos_ids", ())
        judged = tokenizer.decode_batch([response[: kept_of(response, ends)] for response in responses])
        steps, sure = out.trajectory.step.tolist(), out.trajectory.confidence.tolist()
        yield [
            (
                at,
                {
                    "prompt": prompts[at].shown,
                    "prompt_ids": ids,
                    "response": texts[i],
                    "response_ids": responses[i],
                    "step": steps[i][: len(responses[i])],
                    "confidence": sure[i][: len(responses[i])],
                    "nfe": int(out.nfe[i]),
                },
                judged[i],
            )
            for i, (at, ids) in enumerate(part)
        ]


def saved_progress(directory: Path) -> str | None:
    """The whole shards of the run in a directory, in words; None if there is none."""
    count = sum(len([*directory.glob(f"part-*.{format}")]) for format in FORMATS)
    return f"{count} shard{'s' * (count > 1)}" if count else None


def _shard(directory: Path, number: int, format: str) -> Path:
    return directory / f"part-{number:05d}.{format}"


def _claim(directory: Path, content: dict[str, Any]) -> None:
    """Write settings.json, or check that the existing one is the same."""
    _check(directory, content)
    if not (directory / SETTINGS).exists():
        files.write_json(directory / SETTINGS, content)


def _check(directory: Path, content: dict[str, Any]) -> None:
    """Raise ValueError if the directory holds a run with other settings."""
    file = directory / SETTINGS
    if not file.exists():
        return
    # Defaults for runs of versions without these settings.
    older = {"chat": False, "mask_id": None, "dtype": "auto"}
    of_directory = older | files.json_object("out", file)
    other = {key: of_directory.get(key) for key in content if of_directory.get(key) != content[key]}
    if other:
        raise ValueError(f"out: {directory} holds a run with other settings: {other}")


def _is_whole(directory: Path, number: int, settings: TrajectorySettings) -> bool:
    """Whether the shard exists, can be read to the end, and has rows of its own prompts alone."""
    file = _shard(directory, number, settings.format)
    if not file.exists():
        return False
    own = range(number * settings.shard, (number + 1) * settings.shard)
    try:
        return all(row["index"] in own for row in _rows_of_shard(file, ["index"]))
    except (ValueError, KeyError):
        return False


def _rows_of_shard(file: Path, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a shard. Raises ValueError if it is damaged. `columns`: the columns to read of Parquet."""
    if file.suffix == ".jsonl" and not file.read_bytes().endswith(b"\n"):
        raise ValueError(f"answers: {file} is empty or cut off")
    for _, row in files.rows("answers", file, columns):
        yield row


def _write(file: Path, rows: list[dict[str, Any]], settings: TrajectorySettings) -> None:
    if settings.format == "jsonl":
        # Without rows the file is an empty line, so that an empty file is a damaged one.
        files.write_text(file, "".join(json.dumps(row) + "\n" for row in rows) or "\n")
        return
    import pyarrow
    import pyarrow.parquet

    ids, text = pyarrow.list_(pyarrow.int32()), pyarrow.string()
    schema = pyarrow.schema(
        {
            "index": pyarrow.int64(),
            "prompt": text,
            "prompt_ids": ids,
            "response": text,
            "response_ids": ids,
            "step": ids,
            "confidence": pyarrow.list_(pyarrow.float32()),
            "nfe": pyarrow.int32(),
        },
        metadata={"settings": json.dumps(asdict(settings))},
    )
    with files.replacing(file) as partial:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), partial)


# --- reading them -------------------------------------------------------------------------------


class Trajectories(Dataset[dict[str, Any]]):
    """The answers of a finished run, for training.

    Item i: input_ids (T,) int64, prompt and response; prompt_length; step (T - prompt_length,) int64; index.

    Raises FileNotFoundError if there is no run, ValueError if shards are missing or damaged, or its settings.
    """

    def __init__(self, directory: str | Path) -> None:
        directory = Path(directory)
        if not (directory / SETTINGS).is_file():
            raise FileNotFoundError(
                "answers: expected the directory of a run of `dparallel trajectories`, got "
                f"{directory} without {SETTINGS}"
            )
        self.settings = files.json_object("answers", directory / SETTINGS)
        try:
            numbers = range(-(-whole("prompts", self.settings["prompts"], 0) // self.settings["shard"]))
            shards = [_shard(directory, i, self.settings["format"]) for i in numbers]
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise ValueError(f"answers: {directory / SETTINGS} is not that of a run: {error!r}") from error
        missing = [file.name for file in shards if not file.exists()]
        if missing:
            raise ValueError(
                f"answers: {directory} is not finished: {len(missing)} of {len(shards)} shards are "
                f"missing ({missing[0]}, ...); run `dparallel trajectories` again"
            )
        # Flat buffers: a hundred thousand answers as Python lists would take gigabytes.
        ids: list[Tensor] = []
        steps: list[Tensor] = []
        self.bounds: list[tuple[int, int, int]] = []  # start, prompt's length, whole length
        self.samples: list[tuple[list[int], str]] = []  # tokens and text of the first responses
        at = 0
        for file, row in ((shard, row) for shard in shards for row in _rows_of_shard(shard)):
            try:
                sequence = torch.tensor(row["prompt_ids"] + row["response_ids"], dtype=torch.int32)
                step = torch.tensor(row["step"], dtype=torch.int32)
                if (sequence.ndim, step.shape) != (1, (len(row["response_ids"]),)):
                    raise ValueError("expected as many steps as response_ids")
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                raise ValueError(f"answers: {file} is damaged: {error!r}") from error
            ids.append(sequence)
            steps.append(step)
            if len(self.samples) < 16 and isinstance(row.get("response"), str):
                self.samples.append((row["response_ids"], row["response"]))
            self.bounds.append((at, len(row["prompt_ids"]), len(sequence)))
            at += len(sequence)
        self.ids = torch.cat(ids) if ids else torch.zeros(0, dtype=torch.int32)
        self.steps = torch.cat(steps) if steps else torch.zeros(0, dtype=torch.int32)
        lengths = [end - prompt for _, prompt, end in self.bounds]
        self.step_starts = [0, *itertools.accumulate(lengths)]

    def check_tokenizer(self, model: str, tokenizer: Any) -> None:
        """Raise ValueError if the tokens of the first responses are another text for this model."""
        for ids, text in self.samples:
            if (read := tokenizer.decode(ids)) != text:
                raise ValueError(
                    f"answers: their tokens are those of {self.settings.get('model')!r}, and {model!r} has "
                    f"others: it reads {read!r:.80} where the answer is {text!r:.80}"
                )

    def __len__(self) -> int:
        return len(self.bounds)

    def __getitem__(self, i: int) -> dict[str, Any]:
        i = range(len(self))[i]  # a negative number counts from the end
        start, prompt, length = self.bounds[i]
        return {
            "input_ids": self.ids[start : start + length].long(),
            "prompt_length": prompt,
            "step": self.steps[self.step_starts[i] : self.step_starts[i + 1]].long(),
            "index": i,
        }


@dataclass(frozen=True)
class Collator:
    """Rows of `Trajectories`, or others with their input_ids, prompt_length and index, as a batch, padded on
    the right. A row's input_ids are a list, an array or a tensor of any integers.

    As published, responses are lengthened with EOS, which is learned, or cut: to `total_length` tokens with
    the prompt (LLaDA: 384) or to `response_length` without it (Dream: 256). Rows that still are shorter than
    others get padding that no position sees.

    ends, block_length: of a block-causal model, which is decoded block by block and stops. A row ends with
    the block (from column 0 on) that holds its response's first token of `ends`, and in that block EOS
    follows: tokens that such a model wrote behind its end are no text to learn. A bidirectional model sees
    its whole response, fills it with EOS itself, and has no `block_length` here.

    Raises ValueError for both lengths, or one below 1; called, for a row without these fields.
    """

    eos_id: int
    total_length: int | None = None
    response_length: int | None = None
    ends: tuple[int, ...] = ()
    block_length: int | None = None

    def __post_init__(self) -> None:
        check_fields(self, ("total_length", "response_length"), whole, 1)
        if self.total_length is not None and self.response_length is not None:
            raise ValueError(
                f"total_length, response_length: expected one of them, got {self.total_length} and "
                f"{self.response_length}"
            )

    def __call__(self, rows: Iterable[dict[str, Any]]) -> dict[str, Tensor]:
        """input_ids (B, T), prompt_lengths, lengths and index (B,), all int64."""
        sequences, prompts, index = [], [], []
        for row in rows:
            if missing := [name for name in ("input_ids", "prompt_length", "index") if name not in row]:
                raise ValueError(f"rows: expected the field {missing[0]!r} in each, got {sorted(row)}")
            ids = token_ids("input_ids", row["input_ids"])
            prompt = whole("prompt_length", row["prompt_length"], 0, len(ids))
            ids = self._ended(ids, prompt)
            target = len(ids)
            if self.total_length is not None:
                target = self.total_length
            elif self.response_length is not None:
                target = prompt + self.response_length
            ids = torch.nn.functional.pad(ids[:target], (0, max(0, target - len(ids))), value=self.eos_id)
            sequences.append(ids)
            prompts.append(min(prompt, target))
            index.append(row["index"])
        return {
            "input_ids": torch.nn.utils.rnn.pad_sequence(sequences, True, self.eos_id),
            "prompt_lengths": torch.tensor(prompts),
            "lengths": torch.tensor([len(ids) for ids in sequences]),
            "index": torch.tensor(index),
        }

    def _ended(self, ids: Tensor, prompt: int) -> Tensor:
        """The ids (T,) of a row, up to the end of the block that holds its end token."""
        if self.block_length is None:
            return ids
        kept = prompt + kept_of(ids[prompt:].tolist(), self.ends) + 1  # with the end
        whole_blocks = -(-kept // self.block_length) * self.block_length
        return ids[:whole_blocks].masked_fill(torch.arange(len(ids[:whole_blocks])) >= kept, self.eos_id)
