"""Trains a filter for the rule `learned`, which judges which predictions are right (Learn2PD, arXiv
2509.25188).

An oracle knows the model's answer y from slow decoding (`dparallel trajectories`), and decodes the prompt
once more: each pass commits every masked position whose prediction equals y's token; if there is none, it
fills the block with y. For each pass the oracle records the confidences of the block's columns and which
predictions were right, and the filter learns to predict the latter from the former. Prompts are held out
whole to test it, since passes over one prompt are much alike.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import dparallel_ext as dx
from dparallel_ext.arguments import check_fields, whole
from dparallel_ext.rules import Decision, Rule, Where
from dparallel_ext.rules.learned import by_place

from .. import files, registry
from .loop import check_between
from .trajectories import SETTINGS, Trajectories

TAUS = (0.5, 0.7, 0.8, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99)
"""Thresholds to test a filter at, besides its own."""


@dataclass(frozen=True)
class FilterSettings:
    """The settings of a filter's training; the same settings and answers give the same filter."""

    tau: float = 0.95
    """The rule's default threshold."""
    steps: int = 3000
    lr: float = 3e-3
    hidden: int | None = None
    """Units of the hidden layer; None: as many as a block has tokens, as published."""
    held_out: float = 0.1
    """Share of the prompts to test with."""
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self, ("steps", "hidden"), whole, 1)
        check_fields(self, ("seed",), whole, 0)
        check_between(self, ("tau", "held_out", "lr"))


class Records(NamedTuple):
    """The oracle's records of R passes over blocks of N columns."""

    prompt: Tensor
    """(R,) int64: the number of the answer."""
    confidence: Tensor
    """(R, N) float32, 1.0 where the pass computed no logits."""
    right: Tensor
    """(R, N) bool: whether the prediction equals y's token; False without a prediction."""
    read: Tensor
    """(R, N) bool: whether there is a prediction."""
    masked: Tensor
    """(R, N) bool: whether the column held a mask that the pass could fill. A pass may fill less than its
    block: Dream's first pass over a block with cache "prefix" or "dual", and sub-blocks."""

    def of(self, chosen: Tensor) -> Records:
        """The records of the passes that are `chosen` (R,) bool."""
        return Records(*(field[chosen] for field in self))


class Oracle(Rule):
    """Commits the predictions that equal the answers (B, L), one for each lane, and records its passes."""

    reads = "block"
    recorded = False
    greedy = True

    def __init__(self, answers: Tensor, block_length: int) -> None:
        self.answers, self.block_length = answers, block_length
        self.passes: list[Records] = []

    def new_state(self, lanes: int, columns: int, device: torch.device) -> tuple[Tensor, ...]:
        return (F.pad(self.answers, (0, columns - self.answers.shape[1])).to(device),)

    def reset(self, state: tuple[Tensor, ...], lane: int) -> None:
        pass

    def decide(self, stats: dx.RowStats, where: Where, state: tuple[Tensor, ...]) -> Decision:
        answer = where.recall(state[0])
        right, seen = stats.token == answer, torch.ones_like(where.read)
        fields = ((stats.confidence, 1.0), (right, False), (seen, False), (where.masked, False))
        of_block = (by_place(field, where, self.block_length, blank) for field, blank in fields)
        live = where.masked.any(1)
        self.passes.append(Records(*(field[live].cpu() for field in (where.lane, *of_block))))
        known = where.masked & right
        stuck = ~known.any(1, keepdim=True)
        return Decision(known | (where.masked & stuck), answer)


def record(
    model: Any,
    answers: Sequence[tuple[Tensor, int]],
    *,
    block_length: int,
    cache: str = "none",
    mask_id: int | None = None,
    batch: int = 100,
    progress: bool = True,
) -> tuple[Records, float]:
    """The oracle's records over answers, each (prompt and response (T,) int64, the prompt's length), and its
    mean number of passes for an answer.

    Raises ValueError for no answers, and for an answer that ends within a block of a block-causal model.
    """
    if not answers:
        raise ValueError("answers: expected at least one, got none")
    if dx.models.traits(model).block_length is not None:
        for number, (ids, _) in enumerate(answers):
            if len(ids) % block_length:  # decoding goes on to the end of the block, where y has no token
                raise ValueError(
                    f"answers: expected a multiple of block_length {block_length} tokens, prompts included, "
                    f"since the model is block-causal, got {len(ids)} in answer {number}"
                )
    bar = tqdm(total=len(answers), desc="oracle", unit="prompt", disable=not progress)
    notes, passes = [], 0
    for first in range(0, len(answers), batch):
        part = answers[first : first + batch]
        padded = nn.utils.rnn.pad_sequence([ids for ids, _ in part], batch_first=True)
        oracle = Oracle(padded, block_length)
        out = dx.decode(
            model,
            [ids[:length] for ids, length in part],
            gen_length=[len(ids) - length for ids, length in part],
            block_length=block_length,
            cache=cache,
            mask_id=mask_id,
            rule=oracle,
        )
        notes += [seen._replace(prompt=seen.prompt + first) for seen in oracle.passes]
        passes += int(out.nfe.sum())
        bar.update(len(part))
    bar.close()
    return Records(*(torch.cat(field) for field in zip(*notes, strict=True))), passes / len(answers)


def hold_out(prompts: Sequence[Tensor], share: float) -> Tensor:
    """(n,) bool: which of n prompts are held out, about `share` of them; equal prompts go together.

    They are chosen by a hash, so that the order does not matter.
    """
    keys = [hashlib.sha256(prompt.numpy().tobytes()).digest() for prompt in prompts]
    ranked = sorted(set(keys))
    held = {*ranked[: round(share * len(ranked))]}
    if not 0 < len(held) < len(ranked):
        raise ValueError(
            f"held_out: expected a share that leaves prompts on both sides, got {share} of {len(ranked)}"
        )
    return torch.tensor([key in held for key in keys])


def train(
    records: Records, held: Tensor, settings: FilterSettings, *, progress: bool = True
) -> tuple[nn.Sequential, dict[str, Any]]:
    """A filter trained on the passes over prompts that are not `held` (n,) bool, and a report.

    As published: binary cross entropy over all columns, and AdamW with all passes in every step. Committed
    columns count too, although the filter's output there has no effect: without them the teacher's filter was
    worse (95.4 % right in 8.7 passes, not 97.6 %).
    """
    held_out = held[records.prompt]  # (R,)
    learned, judged = records.of(~held_out), records.of(held_out)
    size = records.confidence.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        hidden = settings.hidden or size
        net = nn.Sequential(nn.Linear(size, hidden), nn.ReLU(), nn.Linear(hidden, size))
    optimizer = torch.optim.AdamW(net.parameters(), settings.lr)
    bar = tqdm(range(settings.steps), desc="filter", unit="step", disable=not progress)
    for step in bar:
        loss = _loss(net, learned)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 99:
            bar.set_postfix(loss=f"{loss.item():.4f}")
    with torch.no_grad():
        report: dict[str, Any] = {
            "passes": [len(learned.prompt), len(judged.prompt)],
            "prompts": [int((~held).sum()), int(held.sum())],
            "loss": [float(_loss(net, learned)), float(_loss(net, judged))],
            "held_out": [judge(net, judged, tau) for tau in sorted({*TAUS, settings.tau})],
        }
    return net.eval().requires_grad_(False), report


def _loss(net: nn.Module, records: Records) -> Tensor:
    losses = F.binary_cross_entropy_with_logits(
        net(records.confidence), records.right.float(), reduction="none"
    )
    return losses[records.read].mean()


def judge(net: nn.Module, records: Records, tau: float) -> dict[str, float]:
    """The shares of masked columns that a filter accepts: of right predictions, and of wrong ones."""
    accepted = net(records.confidence).sigmoid() > tau
    right, wrong = records.masked & records.right, records.masked & ~records.right
    return {
        "tau": tau,
        "accepted": _share(accepted, right),
        "false_positive_rate": _share(accepted, wrong),
    }


def _share(accepted: Tensor, among: Tensor) -> float:
    return int((accepted & among).sum()) / max(1, int(among.sum()))


def run(
    answers: str | Path,
    out: str | Path,
    settings: FilterSettings | None = None,
    *,
    model: str | None = None,
    batch: int = 100,
    device: str | None = None,
    loaded: tuple[Any, Any] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train a filter on the answers that `trajectories.generate` wrote, and write it to the file `out`.

    Args:
        model: default: the model that answered.
        batch: sequences decoded at once.
        loaded: (model, tokenizer), in place of loading the model.

    Returns the report, which is also in the file's metadata: passes, prompts and loss, each for training and
    test; held_out (for each tau the shares of right and wrong predictions that are accepted), and
    oracle_passes of an answer.

    Raises ValueError and FileNotFoundError as `Trajectories` and `registry.load`.
    """
    settings = settings or FilterSettings()
    whole("batch", batch, 1)
    out = files.writable("out", out)
    data = Trajectories(answers)
    if not len(data):
        raise ValueError(f"answers: {answers} holds no right answer; `trajectories --checker none` keeps all")
    content = data.settings | ({} if model is None else {"model": model})
    for key, kind in (("model", str), ("cache", str), ("block_length", int)):
        if not isinstance(value := content.get(key), kind):
            raise ValueError(
                f"answers: expected {key} of type {kind.__name__} in {answers}/{SETTINGS}, got {value!r:.80}"
            )
    rows = [(row["input_ids"], row["prompt_length"]) for row in map(data.__getitem__, range(len(data)))]
    held = hold_out([ids[:length] for ids, length in rows], settings.held_out)
    mask_id = content.get("mask_id")
    loading = registry.Loading(device, registry.dtype_of(content.get("dtype")), mask_id=mask_id)
    teacher, tokenizer = loaded or loading.load(content["model"])
    data.check_tokenizer(content["model"], tokenizer)
    teacher = dx.models.for_decoding(teacher)
    records, passes = record(
        teacher,
        rows,
        block_length=content["block_length"],
        cache=content["cache"],
        mask_id=mask_id,
        batch=batch,
        progress=progress,
    )
    net, report = train(records, held, settings, progress=progress)
    report = {"oracle_passes": passes, **report}
    metadata = {
        "tau": str(settings.tau),
        "model": dx.models.fingerprint(teacher) or "",
        "settings": json.dumps(asdict(settings)),
        "answers": json.dumps(content),
        "report": json.dumps(report),
    }
    files.directory("out", out.parent)
    with files.replacing(out) as partial:
        partial.write_bytes(safetensors.torch.save(net.state_dict(), metadata))
    return report


def report_lines(report: dict[str, Any]) -> Iterator[str]:
    (learned, judged), (prompts, held_out) = report["passes"], report["prompts"]
    yield f"oracle: {report['oracle_passes']:.1f} passes an answer"
    yield f"trained on {learned} passes over {prompts} prompts, tested on {judged} over {held_out}"
    yield f"{'tau':>5} {'right':>8} {'wrong':>8}  (accepted, of the masked columns)"
    for row in report["held_out"]:
        yield f"{row['tau']:>5g} {row['accepted']:>8.1%} {row['false_positive_rate']:>8.2%}"
