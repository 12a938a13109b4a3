"""I-DLM (introspective diffusion language models, arXiv 2604.11035; 8B, 32B)."""

from __future__ import annotations

from .qwen import Qwen3


class IDLM(Qwen3):
    """Qwen3's layers, autoregressive, and trained to guess ahead at masks behind the text: `speculate` with
    `drafter="strided"` (`speculation.StridedDrafter`).

    A checkpoint names SDAR as its model_type, and is known by `use_regular_causal` in its config.json. One
    without this key is read as SDAR: add the key, or name "idlm" as model_type.
    """

    published_mask_id = 151669
