"""Drafters with weights: DFlash and ParallelSpec, trained on what the target itself answers.

The target answers the training prompts (greedy, many at once); the answers are kept as ids. A step takes some
of them, computes the target's streams for them, and lays blocks behind them, each at a random place of the
answer, packed under one mask: a block sees the context in front of its root, and itself. Each row behind the
root learns the token at its own position by cross entropy. Rows count by what they are worth, since a draft
ends at its first wrong token (`weights`).

Muon on the matrices, AdamW on the rest, and an exponential average of the weights is what is written.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import dparallel_ext as dx
from dparallel_ext import models
from dparallel_ext.arguments import whole
from dparallel_ext.models import files as checkpoints
from dparallel_ext.models import rope
from dparallel_ext.speculation import BlockDrafter, DraftModel
from dparallel_ext.speculation.dflash import CAUSAL, EMBEDDING, Layout, check_taps, default_taps
from dparallel_ext.speculation.speculate import causal_model, check_prompts

from .. import files, registry
from ..text import Template, prompt_encoder
from ..toy import tasks
from ..toy.train import MOST_SEEDS
from . import loop
from .filter import hold_out
from .trajectories import Prompt, read_prompts

KINDS = {"dflash": {"layers": 3, "block": 16}, "parallelspec": {"layers": 1, "block": 7}}
"""Layers and rows of a block, the root among them, where no numbers are given."""
DECAY = ((8, 4.0), (10, 5.0), (16, 7.0))
"""DFlash's: of blocks up to so many rows, the rows in which a row's weight falls to 1 / e."""
SHARD = 512
"""Answers in a file: what a run that is stopped loses at most."""
LOSSES = ("d-pace", "exp")


@dataclass(frozen=True)
class Settings:
    """What a drafter is and is trained by; with the same settings and answers it comes out the same."""

    kind: str = "dflash"
    steps: int = 2000
    batch: int = 16
    """Answers in a step."""
    anchors: int = 16
    """Blocks behind each, as far as there are places for them."""
    layers: int | None = None
    block: int | None = None
    taps: tuple[int, ...] | None = None
    """Layers of the target; None: of DFlash all of a small target, of a large one as published; of
    ParallelSpec the embedding and the last."""
    mlp_width: int | None = None
    """None: the target's."""
    mask_id: int | None = None
    """None: the mask token of the target's tokenizer."""
    loss: str = "d-pace"
    gen_length: int = 256
    """Of the answers at most."""
    temperature: float = 0.0
    """Of the answers: what is decoded at a higher one goes ways that the likeliest answers never went."""
    muon_lr: float = 3e-3
    adam_lr: float = 2e-3
    weight_decay: float = 0.01
    warmup: int = 100
    decay: float = 0.4
    """Share of the steps, at the end, over which the learning rates fall to zero."""
    ema: float = 0.995
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind: expected one of {list(KINDS)}, got {self.kind!r}")
        if self.loss not in LOSSES:
            raise ValueError(f"loss: expected one of {LOSSES}, got {self.loss!r}")
        for name in ("steps", "batch", "anchors", "warmup", "gen_length"):
            whole(name, getattr(self, name), 1)
        for name, least in (("layers", 1), ("block", 2), ("mlp_width", 1), ("mask_id", 0)):
            if getattr(self, name) is not None:
                whole(name, getattr(self, name), least)
        for name in ("muon_lr", "adam_lr", "ema"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a number between 0 and 1, got {getattr(self, name)}")
        for name in ("weight_decay", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a number from 0 to 1, got {getattr(self, name)}")
        if not 0 <= self.temperature <= 100:
            raise ValueError(f"temperature: expected a number from 0 to 100, got {self.temperature}")
        if not 0 <= whole("seed", self.seed, 0) < MOST_SEEDS:
            raise ValueError(f"seed: expected a whole number >= 0 and < {MOST_SEEDS}, got {self.seed}")


def run(
    target: str,
    out: str | Path,
    data: str = "builtin:4000",
    settings: Settings | None = None,
    *,
    prompt_field: str = "prompt",
    answer_field: str | None = None,
    evaluate: int = 500,
    save_every: int = 250,
    answer_batch: int = 128,
    chat: bool | None = None,
    device: str | None = None,
    loaded: tuple[Any, Any] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train a drafter for `target`, or go on where a run in `out` was stopped.

    `out` receives config.json and model.safetensors (bfloat16: the drafter, `speculate(drafter=out)`),
    training.json (the report) and, for a run that goes on, answers-NNNNN.safetensors and state.pt, every
    `save_every` steps. A resumed run continues exactly as if it had not been stopped; only `steps` may
    change.

    Args:
        target: an autoregressive model as `registry.load` names it.
        data: prompts, see `trajectories.read_prompts`.
        evaluate: prompts that it is judged by and does not learn from: held-out problems of the built-in
            task, or so many of the file's.
        answer_batch: sequences that answer at once.
        chat: see `registry.template_of`.
        loaded: (model, tokenizer), instead of loading the target; then without chat template, unless `chat`.

    Returns the report: settings, target, answers, parameters, bytes, seconds, loss (a curve), and held_out,
    see `judge`.

    Raises ValueError and FileNotFoundError, by name; a run that is refused writes nothing.
    """
    settings = settings or Settings()
    for name, value, least in (("evaluate", evaluate, 0), ("save_every", save_every, 1)):
        whole(name, value, least)
    whole("answer_batch", answer_batch, 1)
    template = registry.template_of(target, chat) if chat or loaded is None else None
    model, tokenizer = loaded or registry.load(target, device=device)
    model = causal_model(model)
    encode = prompt_encoder(tokenizer, template)
    mask_id = _mask_id(settings.mask_id, target, model, loaded is None)
    config = config_of(model, settings, mask_id, _name_of(template))
    Layout.of(config)
    learned, judged = _prompts(data, prompt_field, answer_field, encode, evaluate)
    check_prompts(model, [*learned, *judged], dx.DecodeConfig())
    directory = files.directory("out", out)
    with files.locked("out", directory), files.full_disk_named(directory):
        answers = _answers(directory, model, learned, settings, answer_batch, progress)
        drafter, report = _train(directory, model, answers, config, settings, save_every, progress)
        drafter.save(directory)
        report |= {"target": target, "data": data, "answers": len(answers)}
        report["bytes"] = (directory / "model.safetensors").stat().st_size
        if judged:
            report["held_out"] = judge(model, drafter, judged, settings.gen_length, answer_batch)
        files.write_json(directory / "training.json", report)
    return report


def _mask_id(given: int | None, target: str, model: models.Model, of_tokenizer: bool) -> int:
    """The id of the masks in a block. Raises ValueError where there is none to be found."""
    found = model.mask_id if given is None else given
    if found is None and of_tokenizer:
        found = checkpoints.mask_token_id(registry.directory_of(target))
    if found is None:
        raise ValueError(
            f"mask_id: {target} has no mask token; name an id that its text does not use, below "
            f"{model.shape.embedding_size}"
        )
    if found >= model.shape.embedding_size:
        raise ValueError(
            f"mask_id: expected one of the model's {model.shape.embedding_size} token ids, got {found}"
        )
    return found


def _name_of(template: Template | None) -> str | None:
    """A hash of what a chat template makes of an empty message; None where there is none."""
    if template is None:
        return None
    return hashlib.sha256(template([{"role": "user", "content": ""}]).encode()).hexdigest()[:16]


def config_of(
    model: models.Model, settings: Settings, mask_id: int, template: str | None = None
) -> dict[str, Any]:
    """config.json of a drafter for `model`, in the layout of the published ones.

    Raises ValueError naming the setting that does not fit the model.
    """
    s, default = model.shape, KINDS[settings.kind]
    layers, taps = settings.layers or default["layers"], settings.taps
    if taps is None and CAUSAL[settings.kind]:
        taps = (EMBEDDING, s.layers - 1)
    elif taps is None:
        taps = tuple(range(s.layers)) if s.layers <= 5 else default_taps(s.layers, 5)
    check_taps("taps", taps, s.layers)
    keys = ("rope_scaling", "rope_parameters") if s.rope_scaling is not None else ()
    scaling = {key: model.config[key] for key in keys if key in model.config}
    return {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "attention_bias": False,
        "block_size": settings.block or default["block"],
        "dflash_config": {"mask_token_id": mask_id, "target_layer_ids": list(taps)},
        "head_dim": s.head_dim,
        "hidden_act": "silu",
        "hidden_size": s.width,
        "intermediate_size": settings.mlp_width or s.mlp_width,
        "max_position_embeddings": models.max_positions(model),
        "num_attention_heads": s.heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": s.kv_heads,
        "num_target_layers": s.layers,
        "rms_norm_eps": s.eps,
        "rope_theta": s.rope_theta,
        "tie_word_embeddings": False,
        "vocab_size": s.embedding_size,
        **scaling,
        "dparallel": {"kind": settings.kind, "target": models.fingerprint(model), "template": template},
    }


# --- answers --------------------------------------------------------------------------------------


def _prompts(
    data: str, prompt_field: str, answer_field: str | None, encode: Callable[[str], list[int]], held: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Token ids of the prompts to learn from, and of those to be judged by."""

    def ids(prompts: Sequence[Prompt]) -> list[Tensor]:
        return [torch.tensor(encode(prompt.text), dtype=torch.int64) for prompt in prompts]

    found = ids(read_prompts(data, prompt_field, answer_field or prompt_field))
    if data.startswith("builtin:"):
        stream = itertools.islice(tasks.problems("held_out"), held)
        return found, ids([Prompt(p.prompt, str(p.answer)) for p in stream])
    if not held:
        return found, []
    apart = hold_out(found, held / max(1, len(found))).tolist()
    return (
        [prompt for prompt, out in zip(found, apart, strict=True) if not out],
        [prompt for prompt, out in zip(found, apart, strict=True) if out],
    )


Answer = tuple[Tensor, int]
"""Prompt and response (T,) int64, the end token with them, and the prompt's length."""


def _answers(
    directory: Path,
    model: models.Model,
    prompts: list[Tensor],
    settings: Settings,
    batch: int,
    progress: bool,
) -> list[Answer]:
    """The target's answers, those that are in the directory as they are there; too short ones left out."""
    said: dict[str, Any] = {"target": models.fingerprint(model), "gen_length": settings.gen_length}
    if settings.temperature:
        said |= {"temperature": settings.temperature, "seed": settings.seed}
    parts = [prompts[first : first + SHARD] for first in range(0, len(prompts), SHARD)]
    bar = loop.progress_bar(progress, len(prompts), "answers", "prompt")
    found: list[Answer] = []
    for number, part in enumerate(parts):
        file = directory / f"answers-{number:05d}.safetensors"
        digest = hashlib.sha256(b"".join(ids.numpy().tobytes() for ids in part)).hexdigest()
        content = json.dumps({**said, "prompts": [len(part), digest]})
        answers = _read_answers(file, content)
        if answers is None:
            answers = [
                answer
                for first in range(0, len(part), batch)
                for answer in answer_all(model, part[first : first + batch], settings, number * SHARD + first)
            ]
            tensors = {
                "ids": torch.cat([ids for ids, _ in answers]).int(),
                "prompt": torch.tensor([length for _, length in answers]),
                "length": torch.tensor([len(ids) for ids, _ in answers]),
            }
            with files.replacing(file) as partial:
                partial.write_bytes(safetensors.torch.save(tensors, {"of": content}))
        found += [(ids, length) for ids, length in answers if len(ids) - length >= 2]
        if bar is not None:
            bar.update(len(part))
    if bar is not None:
        bar.close()
    if not found:
        raise ValueError("data: the target's answers have fewer than two tokens, and nothing can be learned")
    return found


def answer_all(
    model: models.Model, prompts: Sequence[Tensor], settings: Settings, first: int = 0
) -> list[Answer]:
    """The target's own texts, up to and with the end token; first: the number of the first prompt."""
    out = dx.speculate(
        model,
        list(prompts),
        gen_length=settings.gen_length,
        temperature=settings.temperature,
        seed=[settings.seed * 1_000_003 + first + i for i in range(len(prompts))],
    )
    ends = [len(prompt) + int(n) for prompt, n in zip(prompts, out.generated, strict=True)]
    return [
        (row[:end].cpu(), len(prompt)) for row, end, prompt in zip(out.sequences, ends, prompts, strict=True)
    ]


def _read_answers(file: Path, content: str) -> list[Answer] | None:
    """What a file holds; None where it is not there. Raises ValueError for one of another run."""
    if not file.exists():
        return None
    try:
        with safe_open(file, framework="pt") as opened:
            said = (opened.metadata() or {}).get("of")
            ids, prompt, length = (opened.get_tensor(name) for name in ("ids", "prompt", "length"))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"out: {file} is not a readable file of answers: {error}") from error
    if said != content:
        raise ValueError(f"out: {file} holds answers of another run: {said}, expected {content}")
    return list(zip(ids.long().split(length.tolist()), prompt.tolist(), strict=True))


# --- training -------------------------------------------------------------------------------------


def _train(
    directory: Path,
    target: models.Model,
    answers: list[Answer],
    config: dict[str, Any],
    settings: Settings,
    save_every: int,
    progress: bool,
) -> tuple[BlockDrafter, dict[str, Any]]:
    device = target.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = DraftModel(config)
        initialise(model)
    model.to(device).train()
    own = json.loads(json.dumps({**asdict(settings), "config": config, "answers": len(answers)}))
    seconds, curve = loop.run(
        directory,
        model,
        [p for p in model.parameters() if p.ndim == 2],
        lambda step: loss_of(model, target, answers, settings, step),
        settings,
        own,
        save_every=save_every,
        report_every=50,
        described=settings.kind,
        progress=progress,
    )
    report = {
        "settings": own,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(seconds),
        "loss": curve,
    }
    return BlockDrafter(model, str(directory)), report


def initialise(model: DraftModel) -> None:
    """Normal weights of variance 1 / fan_in, the residual branches' last matrices smaller."""
    for name, p in model.named_parameters():
        if p.ndim == 2:
            last = name.endswith(("o_proj.weight", "down_proj.weight"))
            scale = (2 * model.layout.shape.layers) ** -0.5 if last else 1.0
            nn.init.normal_(p, std=scale * p.shape[1] ** -0.5)


@dataclass(frozen=True)
class Packed:
    """Answers and the blocks behind them: B sequences, A blocks of N rows each."""

    ids: Tensor
    """(B, L) int64, filled up with any token."""
    rows: Tensor
    """(B, A N) int64: tokens of the blocks' rows, roots and masks."""
    positions: Tensor
    """(B, A N) int64"""
    visible: Tensor
    """(B, A N, L + A N) bool: what a row sees, of the context and of the rows."""
    labels: Tensor
    """(B, A, N - 1) int64: the token at the position of each row behind the root; -1 where there is none."""


def pack_blocks(
    answers: Sequence[Answer], layout: Layout, anchors: int, generator: torch.Generator
) -> Packed:
    """Blocks at up to `anchors` random places of each answer, so that root and next token are its tokens."""
    block = layout.block
    ids = pad_sequence([each for each, _ in answers], batch_first=True)
    prompts = torch.tensor([length for _, length in answers])[:, None]
    ends = torch.tensor([len(each) for each, _ in answers])[:, None]
    at = torch.arange(ids.shape[1])
    # Random numbers in order: the first `anchors` places among those that may be.
    key = torch.rand(ids.shape, generator=generator).masked_fill((at < prompts) | (at > ends - 2), 2.0)
    key, place = key.sort(1)
    key, place = key[:, :anchors], place[:, :anchors]
    used = int((key < 2).any(0).sum())  # of the answer with the most places
    place, there = place[:, :used], (key < 2)[:, :used]
    place = torch.where(there, place, prompts)  # a block that is not there has no labels
    count, size = ids.shape[0], used * block
    offset = torch.arange(block)
    positions = place[..., None] + offset  # (B, A, N)
    token = ids.gather(1, positions.flatten(1).clamp(max=ids.shape[1] - 1)).view(count, used, block)
    labels = token.masked_fill((positions >= ends[..., None]) | ~there[..., None], -1)[..., 1:]
    rows = torch.where(offset == 0, token, layout.mask_id)
    row = torch.arange(size)
    own = row[:, None] // block == row // block
    if CAUSAL[layout.kind]:
        own &= row[:, None] >= row
    context = at < place.repeat_interleave(block, 1)[..., None]  # (B, A N, L)
    visible = torch.cat((context, own.expand(count, -1, -1)), -1)
    return Packed(ids, rows.flatten(1), positions.flatten(1), visible, labels)


def loss_of(
    model: DraftModel, target: models.Model, answers: Sequence[Answer], settings: Settings, step: int
) -> Tensor:
    """Of a step. It depends on the seed and the step alone, so that a resumed run sees what it would have."""
    said, device = model.layout, target.device
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    some = torch.randint(len(answers), (settings.batch,), generator=generator).tolist()
    batch = pack_blocks([answers[i] for i in some], said, settings.anchors, generator)
    taps = models.Taps(said.taps)
    labels = batch.labels.to(device)
    asked = labels >= 0
    s = said.shape
    # On a CPU, even one with products of bfloat16, its many small operations are faster in float32.
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu"):
        with torch.no_grad():
            target.hidden(batch.ids.to(device), taps=taps)
            x = target.embed(batch.rows.to(device)).float()
            length = batch.ids.shape[1] + said.block  # no block reaches further
            cos, sin = rope.table(length, s.head_dim, s.rope_theta, s.rope_scaling, device)
        feature = model.feature([taps[each].float() for each in said.taps])
        visible, positions = batch.visible.to(device), batch.positions.to(device)
        y = model(x, positions, feature, visible, cos, sin)
        y = y.unflatten(1, (-1, said.block))[:, :, 1:][asked]
        logits = target.head(y.to(target.dtype))
    logits = logits.float()
    logits[:, said.mask_id] = -torch.inf  # it is never drafted
    nll = torch.zeros(labels.shape, device=device)
    nll[asked] = F.cross_entropy(logits, labels[asked], reduction="none")
    weight = weights(nll.detach(), asked, settings.loss)
    return (nll * weight).sum() / weight.sum()


def weights(nll: Tensor, asked: Tensor, loss: str) -> Tensor:
    """(..., N - 1): how much each row counts, 0 where it is not asked.

    "exp": exp(-(k - 1) / g) of row k, as DFlash. "d-pace" (arXiv 2605.18810): with s = q / 2 + 1 / 2 of the
    label's probability q, the sum over j >= k of s_1 ... s_j: what a draft's length gains by row k. Both go
    by what the row says now, and no gradient goes through them.
    """
    if loss == "exp":
        size = nll.shape[-1] + 1
        fall = next((g for rows, g in DECAY if size <= rows), DECAY[-1][1])
        weight = torch.exp(-torch.arange(size - 1, device=nll.device) / fall).expand_as(nll)
    else:
        reach = (0.5 * torch.exp(-nll) + 0.5).cumprod(-1) * asked
        weight = reach.flip(-1).cumsum(-1).flip(-1)
    return weight * asked


# --- what it is worth -----------------------------------------------------------------------------


def judge(
    target: models.Model, drafter: BlockDrafter, prompts: Sequence[Tensor], gen_length: int, batch: int = 128
) -> dict[str, Any]:
    """Decoding of prompts with the whole block drafted in every pass, to the end token.

    prompts; tokens (an answer's mean, the end token among them); passes (an answer's mean, with that over the
    prompt); tau: tokens of a pass that has a draft, the model's own among them; tokens_per_pass: of all
    passes; accepted: of each depth of a draft, as far as there was room for it, the share of drafts that were
    right up to it.
    """
    tokens = passes = drafts = 0
    depth = torch.zeros(2, drafter.most, dtype=torch.int64)
    for first in range(0, len(prompts), batch):
        part = list(prompts[first : first + batch])
        out = dx.speculate(target, part, gen_length=gen_length, drafter=drafter, draft_size=drafter.most)
        tokens += int(out.generated.sum())
        passes += int(out.nfe.sum())
        drafts += int(out.draft_nfe.sum())
        for row, counts in zip(depth, (out.drafted, out.accepted), strict=True):
            row[: len(counts)] += counts
    gained = int(depth[1].sum())
    return {
        "prompts": len(prompts),
        "tokens": tokens / len(prompts),
        "passes": passes / len(prompts),
        "tau": 1 + gained / max(1, drafts),
        "tokens_per_pass": tokens / max(1, passes),
        "accepted": [round(float(share), 4) for share in depth[1] / depth[0].clamp(min=1)],
    }


def lines(report: dict[str, Any]) -> Iterator[str]:
    """A report as text."""
    yield f"{report['settings']['kind']}: {report['parameters']:,} parameters, {report['bytes']:,} bytes"
    yield f"learned from {report['answers']} answers in {report['seconds']} s"
    held = report.get("held_out")
    if held is not None:
        yield (
            f"{held['prompts']} held out: {held['tau']:.2f} tokens a pass with a draft, "
            f"{held['tokens_per_pass']:.2f} with that over the prompt ({held['tokens']:.1f} tokens in "
            f"{held['passes']:.2f} passes)"
        )
        yield "accepted by depth: " + " ".join(f"{share:.0%}" for share in held["accepted"])
