"""A longer task, for several active blocks: four problems in one sequence, each followed by 64 tokens to
fill.

python -m dparallel.toy.several_answers OUT

Finetunes the teacher on it (300 steps, eight minutes on one core), writes the checkpoint to OUT, and decodes
held-out problems with one block open and with several.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import dparallel_ext as dx

from .. import files, registry
from ..training import loop
from . import tasks, train

SLOT = tasks.GEN_LENGTH
COUNTS = (2, 3, 4)
"""Problems of a training sequence."""
SETTINGS = ({"active_blocks": 1}, {"active_blocks": 4}, {"active_blocks": 8, "open_at": 0.0})


def finetune(model: Any, directory: Path, steps: int = 300, problems: int = 48) -> Any:
    """Train a copy by LLaDA's objective with a share of masks for each problem, so that later ones may be
    decoded first. An interrupted run in the directory is resumed. problems: of a step."""
    tuned = copy.deepcopy(model).requires_grad_()
    settings = train.ToySettings(
        steps=steps, batch=problems, muon_lr=1e-3, adam_lr=5e-4, warmup=20, decay=0.5, ema=0.95
    )

    def loss_of(step: int) -> torch.Tensor:
        count = COUNTS[step % len(COUNTS)]
        # Each place in the sequences has problems of one length.
        of_place = train.ToySettings(batch=problems // count)
        parts = [train.batch_of(of_place, step * max(COUNTS) + place) for place in range(count)]
        ids = torch.cat([part for part, _ in parts], 1)
        return train.masked_diffusion_loss(tuned, ids, [length for _, length in parts], step)

    loop.run(
        directory,
        tuned,
        [p for p in tuned.blocks.parameters() if p.ndim == 2],
        loss_of,
        settings,
        asdict(settings),
        save_every=100,
        report_every=20,
        described="finetune",
        progress=True,
    )
    some = itertools.islice(tasks.problems("train"), 64)
    longest = max(len(problem.prompt.split()) for problem in some)
    tuned.config["max_sequence_length"] = max(COUNTS) * (longest + SLOT)  # beyond the teacher's
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
    if not (Path(out) / "config.json").exists():  # the last file of a checkpoint
        model, _ = registry.load("builtin:teacher", dtype=torch.float32)
        with files.run_directory(out) as directory:
            tuned = finetune(model, directory, steps)
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
