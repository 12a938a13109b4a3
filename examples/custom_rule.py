"""A rule of one's own: commit what the model predicted twice in a row, if it is sure enough of it.

python examples/custom_rule.py
"""

from dataclasses import dataclass
from itertools import islice

import torch
from dparallel import registry
from dparallel.toy import tasks

import dparallel_ext as dx
from dparallel_ext.rules import Decision, Rule


@dataclass(frozen=True)
class Steady(Rule):
    confidence: float = 0.5

    def new_state(self, lanes, columns, device):
        return (torch.zeros((lanes, columns), dtype=torch.int64, device=device),)  # prediction + 1

    def decide(self, stats, where, state) -> Decision:
        same = where.recall(state[0]) == stats.token + 1
        where.remember(state[0], stats.token + 1)
        return Decision(where.masked & same & (stats.confidence >= self.confidence))


def main(problems: int = 50) -> None:
    model, tokenizer = registry.load("builtin:teacher")
    prompts = [tokenizer.encode(p.prompt).ids for p in islice(tasks.problems("held_out"), problems)]
    for rule in ("confidence:0.9", "credit+confidence:0.9", Steady()):
        out = dx.decode(model, prompts, gen_length=64, rule=rule, eos_id=model.eos_ids)
        print(f"{rule!s:<24} {out.nfe.double().mean():.1f} passes")


if __name__ == "__main__":
    main()
