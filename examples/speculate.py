"""An autoregressive model, several tokens a pass: its text is the same whoever drafts.

python examples/speculate.py
"""

from itertools import islice

from dparallel import registry
from dparallel.toy import tasks

import dparallel_ext as dx


def main(problems: int = 50) -> None:
    model, tokenizer = registry.load("builtin:causal")
    prompts = [tokenizer.encode(p.prompt).ids for p in islice(tasks.problems("held_out"), problems)]
    plain = dx.speculate(model, prompts, gen_length=64)
    for drafter in (
        "ngram",
        "builtin:parallelspec",
        "builtin:adadecode",
        "builtin:dflash",
        "builtin:student",
    ):
        out = dx.speculate(model, prompts, gen_length=64, drafter=drafter, draft_size=15)
        same = sum(a.equal(b) for a, b in zip(out.responses, plain.responses, strict=True))
        tokens = int(out.generated.sum()) / int(out.nfe.sum())
        print(f"{drafter:<22} {same} of {problems} texts the same, {tokens:.2f} tokens a pass")
        assert same == problems


if __name__ == "__main__":
    main()
