"""The published decoders' functions: their signatures, their tokens and their count of passes.

They follow LLaDA's, Fast-dLLM's and dParallel's `generate.py` and Dream's `generation_utils.py`. `decode`
commits the same tokens, in fewer passes where a cache is used: the published loops, and so these functions,
run a second pass over a block even if its first pass has completed it.

What differs: the mask token is never decoded, ties go to the lowest position and token, statistics are in
float32 (LLaDA's in float64, Dream's in the dtype of the logits), and at a temperature above 0 samples follow
the same distribution by Gumbel noise of our own, keyed by one number of torch's generator.
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
