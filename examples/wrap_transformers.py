"""A model that transformers has loaded: its weights are shared, its tokens stay, passes become fewer.

python examples/wrap_transformers.py [DIRECTORY of a Llama, Qwen2 or Qwen3]
It needs the extra `hf`: pip install "dparallel-ext[cli,hf]"
"""

import sys

import torch
from dparallel import registry
from transformers import AutoModelForCausalLM

import dparallel_ext as dx


def main(directory: str = str(registry.directory_of("builtin:causal"))) -> None:
    hf_model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ids = torch.tensor([[7, 8, 9, 7, 8, 9, 7, 8]])
    theirs = hf_model.generate(ids, max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0)

    model = dx.models.wrap(hf_model)
    ours = dx.speculate(model, ids, gen_length=32, eos_id=-1, drafter="ngram", draft_size=8)
    assert ours.sequences[0].equal(theirs[0])
    print(f"the same 32 tokens in {int(ours.nfe[0])} passes")


if __name__ == "__main__":
    main(*sys.argv[1:])
