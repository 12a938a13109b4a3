"""Prompts of different lengths in one call, each with a length, a rule and a seed of its own.

python examples/ragged_batch.py
"""

from itertools import islice

from dparallel import registry
from dparallel.toy import tasks

import dparallel_ext as dx


def main() -> None:
    model, tokenizer = registry.load("builtin:teacher")
    prompts = [tokenizer.encode(p.prompt).ids for p in islice(tasks.problems("held_out"), 4)]
    config = dx.DecodeConfig(
        gen_length=[64, 32, 64, 48],
        selector=["entropy", "confidence", "entropy", "margin"],
        threshold=[0.5, 0.9, 0.3, 0.8],
        temperature=0.2,
        seed=[1, 2, 3, 4],
        eos_id=model.eos_ids,
    )
    out = dx.decode(model, prompts, config)
    for ids, response, kept, passes in zip(prompts, out.responses, out.kept, out.nfe, strict=True):
        print(
            f"{len(ids)} + {len(response)} tokens, {int(passes)} passes:",
            tokenizer.decode(response[:kept].tolist()),
        )


if __name__ == "__main__":
    main()
