"""The published decoders' functions: their signatures, their tokens and their count of passes.

They follow LLaDA's, Fast-dLLM's and dParallel's `generate.py` and Dream's `generation_utils.py`. `decode`
commits the same tokens, in fewer passes where a cache is used: the published loops, and so these functions,
run a second pass over a block even if its first pass has completed it. (Newer versions of Fast-dLLM do not,
and with a `factor`, which an older loop could not end with, no second pass is run here either.)

What differs: the mask token is never decoded, ties go to the lowest position and token, statistics are in
float32 (LLaDA's in float64, Dream's in the dtype of the logits), and at a temperature above 0 samples follow
the same distribution by Gumbel noise of our own, keyed by one number of torch's generator.

A block ends with its last mask, as in Fast-dLLM's and dParallel's loops. LLaDA's own loop, which returns no
count, runs all its steps, of which more than there are masks change nothing. If the prompt's own masks take
the places of a fixed schedule, a block goes on at its pace until it is complete; there LLaDA's loop leaves
masks, and the others end in an IndexError. A sequence is decoded as it is alone: in the published batches the
prompt's masks are filled for as long as any sequence has masks in its block.
"""

from .dream import ALGORITHMS, DreamOutput, diffusion_generate
from .llada import MASK_ID, generate, generate_with_dual_cache, generate_with_prefix_cache

__all__ = [
    "ALGORITHMS",
    "MASK_ID",
    "DreamOutput",
    "diffusion_generate",
    "generate",
    "generate_with_dual_cache",
    "generate_with_prefix_cache",
]
