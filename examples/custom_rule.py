"""A rule of one's own: commit what the model predicted twice in a row, if it is sure enough of it.

python examples/custom_rule.py
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from dparallel import registry
from dparallel.toy import tasks

import dparallel_ext as dx
from dparallel_ext.rules import Decision, Rule, Where


@dataclass(frozen=True)
class Steady(Rule):
    """Commits a position whose prediction is that of the pass before, with at least this confidence."""

    confidence: float = 0.5

    def new_state(self, lanes, columns, device):
        return (torch.zeros((lanes, columns), dtype=torch.int64, device=device),)  # prediction + 1

    def decide(self, stats: dx.RowStats, where: Where, state) -> Decision:
        (before,) = state
        same = where.recall(before) == stats.token + 1
        where.remember(before, stats.token + 1)
        return Decision(where.masked & same & (stats.confidence >= self.confidence))


def main(problems: int = 50) -> dict[str, tuple[int, float]]:
    """Right answers and mean passes of a few rules on the teacher."""
    model, tokenizer = registry.load("builtin:teacher")
    asked = [problem for problem, _ in zip(tasks.problems("held_out"), range(problems), strict=False)]
    prompts = [tokenizer.encode(problem.prompt).ids for problem in asked]
    found = {}
    for rule in ("confidence:0.9", "credit+confidence:0.9", Steady()):
        out = dx.decode(model, prompts, gen_length=64, rule=rule, eos_id=model.eos_id)
        texts = [
            tokenizer.decode(response[:kept].tolist())
            for response, kept in zip(out.responses, out.kept.tolist(), strict=True)
        ]
        right = sum(tasks.is_correct(*pair) for pair in zip(asked, texts, strict=True))
        found[str(rule)] = right, float(out.nfe.double().mean())
        print(f"{rule!s:<24} {right} of {problems} right, {found[str(rule)][1]:.1f} passes")

    with dx.Engine(model, lanes=8) as engine:  # requests with rules of their own, in the same passes
        handles = [engine.submit(prompt, gen_length=64, rule=Steady()) for prompt in prompts[:8]]
        print(f"in an engine: {sum(handle.result().nfe for handle in handles) / 8:.1f} passes")
    return found


if __name__ == "__main__":
    main()
