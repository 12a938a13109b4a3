"""An autoregressive model, several tokens a pass: its text is the same whoever drafts.

python examples/speculate.py
"""

from __future__ import annotations

from dparallel import registry
from dparallel.toy import tasks

import dparallel_ext as dx


def main(problems: int = 50) -> dict[str, tuple[int, float]]:
    """Of each drafter: answers whose text is that of plain decoding, and tokens a pass of the model."""
    model, tokenizer = registry.load("builtin:causal")
    asked = [problem for problem, _ in zip(tasks.problems("held_out"), range(problems), strict=False)]
    prompts = [tokenizer.encode(problem.prompt).ids for problem in asked]
    plain = dx.speculate(model, prompts, gen_length=64)
    found = {}
    for drafter in ("ngram", "builtin:parallelspec", "builtin:dflash", "builtin:student"):
        out = dx.speculate(model, prompts, gen_length=64, drafter=drafter, draft_size=15)
        same = sum(int((a == b).all()) for a, b in zip(out.responses, plain.responses, strict=True))
        found[drafter] = same, int(out.generated.sum()) / int(out.nfe.sum())
        print(f"{drafter:<22} {same} of {problems} texts the same, {found[drafter][1]:.2f} tokens a pass")
    return found


if __name__ == "__main__":
    main()
