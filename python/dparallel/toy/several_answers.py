"""A longer task, for several active blocks: four problems in one sequence, each followed by 64 tokens to
fill.

python -m dparallel.toy.several_answers OUT

Finetunes the teacher on it (300 steps, eight minutes on one core), writes the checkpoint to OUT, and decodes
held-out problems with one block open and with several.
"""

from __future__ import annotations

import argparse
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import dparallel_ext as dx
from dparallel_ext import backends

from .. import registry
from ..training import loop
from . import tasks, train

SLOT = tasks.GEN_LENGTH
COUNTS = (2, 3, 4)
"""Problems of a training sequence."""
SETTINGS = ({"active_blocks": 1}, {"active_blocks": 4}, {"active_blocks": 8, "open_at": 0.0})


class ProblemStream:
    """Training problems, drawn by the length of their prompts, so that sequences of a batch have one
    layout."""

    def __init__(self, tokenizer: Any, eos_id: int, seed: int) -> None:
        self.tokenizer, self.eos_id = tokenizer, eos_id
        self.stream = tasks.problems("train", seed)
        self.kept: dict[int, list[list[int]]] = defaultdict(list)
        self.random = random.Random(seed)
        for _ in range(64):
            self.read()

    def read(self) -> None:
        problem = next(self.stream)
        prompt, answer = (self.tokenizer.encode(text).ids for text in (problem.prompt, problem.response))
        self.kept[len(prompt)].append([*prompt, *answer, *[self.eos_id] * (SLOT - len(answer))])

    def batch(self, count: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (size, L) int64 of `count` problems each, and (L,) int64: each column's slot, -1 in
        prompts."""
        lengths = [self.random.choice(sorted(self.kept)) for _ in range(count)]
        rows = []
        for _ in range(size):
            row: list[int] = []
            for length in lengths:
                while not self.kept[length]:
                    self.read()
                row += self.kept[length].pop()
            rows.append(row)
        slots = [slot for i, length in enumerate(lengths) for slot in [-1] * length + [i] * SLOT]
        return torch.tensor(rows), torch.tensor(slots)


def finetune(model: Any, tokenizer: Any, steps: int = 300, problems: int = 48, seed: int = 0) -> Any:
    """Train by LLaDA's objective with a share of masks for each slot, so that later slots may be decoded
    first."""
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    optimizers = loop.make_optimizers(model, matrices, train.ToySettings(muon_lr=1e-3, adam_lr=5e-4))
    data = ProblemStream(tokenizer, model.eos_id, seed + 7)
    generator = torch.Generator().manual_seed(seed)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.95)
    )
    for step in range(steps):
        count = data.random.choice(COUNTS)
        size = problems // count
        tokens, slots = data.batch(count, size)
        every = torch.randperm(size * count, generator=generator) + torch.rand(
            size * count, generator=generator
        )
        share = (every / (size * count)).clamp(min=1e-2).view(size, count)
        share = torch.where(slots >= 0, share[:, slots.clamp(min=0)], 0.0)  # (size, L)
        masked = torch.rand(tokens.shape, generator=generator) < share
        with torch.autocast("cpu", torch.bfloat16, enabled=backends.fast_bfloat16()):
            logits = model.head(model.hidden(tokens.masked_fill(masked, model.mask_id))[masked])
        nll = F.cross_entropy(logits.float(), tokens[masked], reduction="none")
        loss = (nll / share[masked]).sum() / (size * count * SLOT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        loop.set_rates(optimizers, loop.learning_rate(step, steps=steps, warmup=20, decay=0.5))
        for optimizer, _ in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        average.update_parameters(model)
        if (step + 1) % 20 == 0:
            print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)
    tuned: Any = average.module
    tuned.config["max_sequence_length"] = max(COUNTS) * (max(data.kept) + SLOT)  # beyond the teacher's
    return tuned


def measure(
    model: Any, tokenizer: Any, config: dx.DecodeConfig, sequences: int = 100, count: int = max(COUNTS)
) -> tuple[int, int, int, int]:
    """(right answers, problems, passes, tokens in front of EOS) of held-out problems."""
    stream, right, passes, kept = tasks.problems("held_out", seed=2), 0, 0, 0
    for start in range(0, sequences, 10):
        asked = [[next(stream) for _ in range(count)] for _ in range(min(10, sequences - start))]
        prompts = [
            [id for p in group for id in [*tokenizer.encode(p.prompt).ids, *[model.mask_id] * SLOT]]
            for group in asked
        ]
        out = dx.decode(model, prompts, config, gen_length=0, infill=True)
        for group, response in zip(asked, out.responses, strict=True):
            for problem, answer in zip(group, response.split(SLOT), strict=True):
                right += tasks.is_correct(problem, tokenizer.decode(answer.tolist()))
                kept += int((answer == model.eos_id).cumsum(0).eq(0).sum())
        passes += int(out.nfe.sum())
    return right, sequences * count, passes, kept


def main(out: str, steps: int = 300, sequences: int = 100) -> None:
    directory = Path(out)
    if not (directory / "config.json").exists():  # the last file of a checkpoint
        model, tokenizer = registry.load("builtin:teacher", dtype=torch.float32)
        tuned = finetune(model.requires_grad_(), tokenizer, steps)
        directory.mkdir(parents=True, exist_ok=True)
        train.save_tokenizer(directory)
        dx.models.save(tuned, directory, dtype=torch.bfloat16)
    model, tokenizer = registry.load(out, dtype=torch.float32)
    for rule in ("entropy:0.2", "entropy:0.3"):
        for fields in SETTINGS:
            config = dx.DecodeConfig(rule=rule, cache="dual", **fields)
            right, problems, passes, kept = measure(model, tokenizer, config, sequences)
            print(
                f"{rule} {fields}: {right / problems:.1%} of {problems} right, "
                f"{passes / sequences:.1f} passes, {kept / passes:.2f} tokens a pass",
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", help="the directory to write the model into")
    main(parser.parse_args().out)
