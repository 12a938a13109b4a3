"""A model's own right answers, to train it on: prompts in, shards of checked answers out.

Certainty forcing learns from what the model itself says (dParallel, arXiv 2509.26488): it answers the
training prompts, a checker keeps what is right, and each answer is kept with the order in which its tokens
were committed. The prompts are cut into shards; a shard's file appears whole or not at all, so a run that was
killed goes on with the shards that are not there, and any number of processes share them out by number.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

import dparallel_ext as dx

from . import registry, tasks
from .evaluate import parse_policy
from .text import prompt_encoder

SETTINGS = "settings.json"
FORMATS = ("parquet", "jsonl")


@dataclass(frozen=True)
class Prompt:
    """A training prompt as text, and the reference that the checker compares with."""

    text: str
    answer: str


@dataclass(frozen=True)
class Settings:
    """What the answers of a run are; a run goes on only with the same."""

    model: str = registry.DEFAULT
    policy: str = "entropy:0.5"
    """"one", "steps:N" (the fixed schedule) or SELECTOR:THRESHOLD."""
    gen_length: int = tasks.GEN_LENGTH
    block_length: int | None = None
    """None: the model's own, if it is block-causal, else 32; settings.json has the number."""
    cache: str = "none"
    checker: str = "hashes"
    shard: int = 500
    """Prompts per shard."""
    format: str = "parquet"
    chat: bool | None = None
    """Whether prompts go by the checkpoint's chat template; None: where it has one."""
    mask_id: int | None = None
    """None: the checkpoint's own."""


# --- checkers -----------------------------------------------------------------------------------


def hashes(answer: str, response: str) -> bool:
    """The number after #### (GSM8K's own form) is the reference's, or the reference itself."""
    found = re.search(r"####\s*(-?[\d,.]*\d)", response)
    return found is not None and _number(found[1]) == _number(_after_hashes(answer))


def last_number(answer: str, response: str) -> bool:
    """The last number of the response is the reference's (GSM8K as usually scored)."""
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", response)
    return bool(found) and _number(found[-1]) == _number(_after_hashes(answer))


def boxed(answer: str, response: str) -> bool:
    r"""The last \boxed{...} is the reference's, or the reference itself, spaces aside (MATH)."""
    found = _boxed(response)
    expected = _boxed(answer) or answer
    return found is not None and found.replace(" ", "") == expected.replace(" ", "")


def anything(answer: str, response: str) -> bool:
    """Every answer is kept."""
    return True


Checker = Callable[[str, str], bool]
"""(the reference, the response as text) -> whether it is right."""
CHECKERS: dict[str, Checker] = {
    "hashes": hashes,
    "last_number": last_number,
    "boxed": boxed,
    "none": anything,
}


def checker_of(name: str) -> Checker:
    """One of CHECKERS, or "package.module:function". Raises ValueError."""
    if name in CHECKERS:
        return CHECKERS[name]
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"checker: expected one of {list(CHECKERS)} or package.module:function, got {name!r} ({error})"
        ) from error
    if not callable(found):
        raise ValueError(f"checker: {name!r} is not a function")
    return found


def _after_hashes(answer: str) -> str:
    return answer.rpartition("####")[2].strip()


def _number(text: str) -> float | str:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return text.strip()


def _boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len("\\boxed")
    for i in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[begin + 1 : i]
    return None


# --- prompts ------------------------------------------------------------------------------------


def read_prompts(source: str, prompt_field: str = "prompt", answer_field: str = "answer") -> list[Prompt]:
    """Prompts of a JSONL or Parquet file, or of "builtin:N[:SEED]", N training problems of `tasks`.

    Raises ValueError naming the line and the field that is missing, FileNotFoundError.
    """
    if source.startswith("builtin:"):
        try:
            count, seed = (int(part) for part in [*source.split(":"), "77"][1:3])
        except ValueError as error:
            raise ValueError(f"data: expected builtin:N or builtin:N:SEED, got {source!r}") from error
        stream = itertools.islice(tasks.problems("train", seed=seed), count)
        return [Prompt(p.prompt, str(p.answer)) for p in stream]
    file = Path(source)
    if not file.is_file():
        raise FileNotFoundError(f"data: no file {file}")
    found = []
    for number, row in enumerate(_rows_of(file), 1):
        for field in (prompt_field, answer_field):
            if field not in row:
                raise ValueError(f"data: {file}:{number} has no field {field!r}, only {sorted(row)}")
        found.append(Prompt(str(row[prompt_field]), str(row[answer_field])))
    return found


def _rows_of(file: Path) -> Iterator[dict[str, Any]]:
    if file.suffix == ".parquet":
        import pyarrow.parquet

        yield from pyarrow.parquet.read_table(file).to_pylist()
        return
    for number, line in enumerate(file.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"data: {file}:{number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"data: {file}:{number} holds a {type(row).__name__}, expected an object")
        yield row


# --- answers ------------------------------------------------------------------------------------


def generate(
    out: str | Path,
    prompts: list[Prompt],
    settings: Settings | None = None,
    *,
    batch: int = 100,
    device: str | None = None,
    loaded: tuple[Any, Any] | None = None,
    progress: bool = True,
) -> Path:
    """Answer `prompts` and write the right answers to `out`, or go on where a run there was stopped.

    `out` receives settings.json, and part-NNNNN files in the `format` of the settings. Their rows: index (of
    the prompt), prompt, prompt_ids, response, response_ids, step (the pass that committed each token, from
    1), confidence (its probability then), nfe (passes). A shard without a right answer has no rows.

    Under `torchrun` or `accelerate launch`, process r of n takes the shards r, r + n, ...: RANK and
    WORLD_SIZE say which, and the device is cuda:LOCAL_RANK where there is a GPU. The number of
    processes may change between runs.

    Args:
        batch: sequences decoded at once; those of one prompt length go together.
        loaded: (model, tokenizer), instead of loading settings.model; then `settings.chat` must be true for
            the chat template of settings.model to be applied.

    Raises:
        ValueError: where `out` holds a run of other settings or prompts; and as `decode`.
    """
    settings = settings or Settings()
    for name, value in (("shard", settings.shard), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{name}: expected a whole number >= 1, got {value}")
    if settings.format not in FORMATS:
        raise ValueError(f"format: expected one of {FORMATS}, got {settings.format!r}")
    policy, checker = parse_policy(settings.policy), checker_of(settings.checker)
    if settings.block_length is None:
        own = (
            dx.models.traits(loaded[0]).block_length or 32
            if loaded
            else registry.block_length(settings.model)
        )
        settings = replace(settings, block_length=own)
    wanted = settings.chat or loaded is None
    template = registry.template_of(settings.model, settings.chat) if wanted else None
    settings = replace(settings, chat=template is not None)
    directory = Path(out)
    directory.mkdir(parents=True, exist_ok=True)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    _claim(directory, settings, prompts, rank)
    shards = range(-(-len(prompts) // settings.shard))
    mine = [i for i in shards if i % world == rank]
    missing = [i for i in mine if not _shard(directory, i, settings.format).exists()]
    if not missing:
        return directory
    if device is None and torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    model, tokenizer = loaded or registry.load(settings.model, device=device, mask_id=settings.mask_id)
    encode = prompt_encoder(tokenizer, template)
    model = dx.models.for_decoding(model)
    bar = None
    if progress:
        from tqdm import tqdm

        total = sum(len(prompts[i * settings.shard : (i + 1) * settings.shard]) for i in mine)
        left = sum(len(prompts[i * settings.shard : (i + 1) * settings.shard]) for i in missing)
        name = "trajectories" if world == 1 else f"trajectories {rank}/{world}"
        bar = tqdm(total=total, initial=total - left, desc=name, unit="prompt", position=rank)
    kept = seen = 0
    for number in missing:
        first = number * settings.shard
        rows: list[dict[str, Any]] = []
        part = prompts[first : first + settings.shard]
        for answered in _answer(model, tokenizer, encode, part, settings, policy, batch):
            for at, row in answered:
                if checker(part[at].answer, row["response"]):
                    rows.append({"index": first + at, **row})
            seen += len(answered)
            if bar is not None:
                bar.update(len(answered))
                bar.set_postfix(right=f"{(kept + len(rows)) / seen:.1%}")
        kept += len(rows)
        rows.sort(key=lambda row: row["index"])
        _write(_shard(directory, number, settings.format), rows, settings)
    if bar is not None:
        bar.close()
    return directory


def _answer(
    model: Any,
    tokenizer: Any,
    encode: Callable[[str], list[int]],
    prompts: list[Prompt],
    settings: Settings,
    policy: dict[str, Any],
    batch: int,
) -> Iterator[list[tuple[int, dict[str, Any]]]]:
    """[(place in prompts, row)] of each batch."""
    groups: dict[int, list[tuple[int, list[int]]]] = {}
    for at, prompt in enumerate(prompts):
        ids = encode(prompt.text)
        groups.setdefault(len(ids), []).append((at, ids))
    for length, group in groups.items():
        for start in range(0, len(group), batch):
            part = group[start : start + batch]
            out = dx.decode(
                model,
                torch.tensor([ids for _, ids in part], dtype=torch.int64, device=model.device),
                gen_length=settings.gen_length,
                block_length=settings.block_length,
                cache=settings.cache,
                record=True,
                **policy,
            )
            assert out.trajectory is not None
            responses = out.sequences[:, length:].tolist()
            texts = tokenizer.decode_batch(responses)
            steps, sure = out.trajectory.step.tolist(), out.trajectory.confidence.tolist()
            yield [
                (
                    at,
                    {
                        "prompt": prompts[at].text,
                        "prompt_ids": ids,
                        "response": texts[i],
                        "response_ids": responses[i],
                        "step": steps[i],
                        "confidence": sure[i],
                        "nfe": int(out.nfe[i]),
                    },
                )
                for i, (at, ids) in enumerate(part)
            ]


def _shard(directory: Path, number: int, format: str) -> Path:
    return directory / f"part-{number:05d}.{format}"


def _claim(directory: Path, settings: Settings, prompts: list[Prompt], rank: int) -> None:
    """Write settings.json, or make sure that what is there is the same."""
    digest = hashlib.sha256(json.dumps([asdict(p) for p in prompts]).encode()).hexdigest()
    content = {**asdict(settings), "prompts": len(prompts), "prompts_sha256": digest}
    file = directory / SETTINGS
    if file.exists():
        older = {"chat": False, "mask_id": None}  # of a run from before there were these settings
        found = older | json.loads(file.read_text())
        other = {key: found.get(key) for key in content if found.get(key) != content[key]}
        if other:
            raise ValueError(f"out: {directory} holds a run with other settings: {other}")
        return
    partial = file.with_name(f"{file.name}.{rank}.partial")  # every process may write it: they are equal
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, file)


def _write(file: Path, rows: list[dict[str, Any]], settings: Settings) -> None:
    partial = file.with_name(file.name + ".partial")
    if settings.format == "jsonl":
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
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
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), partial)
    os.replace(partial, file)


# --- reading them -------------------------------------------------------------------------------


class Trajectories(Dataset[dict[str, Any]]):
    """The answers of a finished run, for training.

    Item i: input_ids (T,) int64, prompt and response; prompt_length; step (T - prompt_length,) int64; index.

    Raises FileNotFoundError where there is no run, ValueError where shards are missing.
    """

    def __init__(self, directory: str | Path) -> None:
        directory = Path(directory)
        if not (directory / SETTINGS).is_file():
            raise FileNotFoundError(f"trajectories: no {SETTINGS} in {directory}")
        self.settings: dict[str, Any] = json.loads((directory / SETTINGS).read_text())
        shards = range(-(-self.settings["prompts"] // self.settings["shard"]))
        files = [_shard(directory, i, self.settings["format"]) for i in shards]
        missing = [f.name for f in files if not f.exists()]
        if missing:
            raise ValueError(
                f"trajectories: {directory} is not finished: {len(missing)} of {len(files)} shards are "
                f"missing ({missing[0]}, ...); run `dparallel trajectories` again"
            )
        # One flat buffer each: a hundred thousand answers as Python lists would be gigabytes.
        ids: list[Tensor] = []
        steps: list[Tensor] = []
        self.bounds: list[tuple[int, int, int]] = []  # start, prompt's length, whole length
        at = 0
        for row in itertools.chain.from_iterable(_rows_of(file) for file in files):
            whole = torch.tensor(row["prompt_ids"] + row["response_ids"], dtype=torch.int32)
            ids.append(whole)
            steps.append(torch.tensor(row["step"], dtype=torch.int32))
            self.bounds.append((at, len(row["prompt_ids"]), len(whole)))
            at += len(whole)
        self.ids = torch.cat(ids) if ids else torch.zeros(0, dtype=torch.int32)
        self.steps = torch.cat(steps) if steps else torch.zeros(0, dtype=torch.int32)
        lengths = [whole - prompt for _, prompt, whole in self.bounds]
        self.step_starts = [0, *itertools.accumulate(lengths)]

    def __len__(self) -> int:
        return len(self.bounds)

    def __getitem__(self, i: int) -> dict[str, Any]:
        start, prompt, whole = self.bounds[i]
        return {
            "input_ids": self.ids[start : start + whole].long(),
            "prompt_length": prompt,
            "step": self.steps[self.step_starts[i] : self.step_starts[i + 1]].long(),
            "index": i,
        }


@dataclass(frozen=True)
class Collator:
    """Rows of `Trajectories` as a batch, padded on the right.

    As published, responses are lengthened with EOS, which is learned, or cut: to `total_length` tokens with
    the prompt (LLaDA: 384) or to `response_length` without it (Dream: 256). What length still
    differs is padding that no position sees.
    """

    eos_id: int
    total_length: int | None = None
    response_length: int | None = None

    def __call__(self, rows: Iterable[dict[str, Any]]) -> dict[str, Tensor]:
        """input_ids (B, T), prompt_lengths, lengths and index (B,), all int64."""
        sequences, prompts, index = [], [], []
        for row in rows:
            ids, prompt = row["input_ids"], row["prompt_length"]
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
