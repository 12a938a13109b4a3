"""A diffusion model's answer to a problem, by a rule of your choice.

python examples/decode.py [RULE], such as entropy:0.3, confidence:0.9, credit+confidence:0.9, one
"""

import sys

from dparallel import registry

import dparallel_ext as dx

PROBLEM = (
    "sam has 4 cups now . first sam grows 3 times . finally sam sells 8 cups . how many cups does sam have ?"
)


def main(rule: str = "entropy:0.5") -> None:
    for name in ("builtin:teacher", "builtin:student"):
        # Or dx.models.load("path/to/LLaDA-8B-Instruct", device="cuda"), without a tokenizer.
        model, tokenizer = registry.load(name)
        ids = tokenizer.encode(PROBLEM).ids
        out = dx.decode(model, [ids], gen_length=64, rule=rule, eos_id=model.eos_ids)
        text = tokenizer.decode(out.responses[0][: out.kept[0]].tolist())
        print(f"{name}, {rule}, {int(out.nfe[0])} passes: {text}")


if __name__ == "__main__":
    main(*sys.argv[1:])
