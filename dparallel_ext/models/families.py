"""The families, by the `model_type` of a config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import multimodal
from .a2d import A2DLlama, A2DQwen2, A2DQwen3
from .base import Model
from .dream import Dream
from .fast_dllm import FastDLLM
from .idlm import IDLM
from .illada import ILLaDA
from .llada import LLaDA, LLaDAMoE
from .llada2 import LLaDA2
from .llama import Llama
from .mistral import Ministral3, Mistral
from .nemotron import NemotronDiffusion
from .qwen import Qwen2, Qwen3, Qwen3MoE
from .rnd1 import RND1
from .sdar import SDAR, DreamReasoner, SDARMoE
from .sdlm import SDLM
from .stable_diffcoder import StableDiffCoder, is_published_so
from .wedlm import WeDLM

DECISIVE = (
    *("model_type", "num_experts", "use_regular_causal", "text_mask_token_id", "text_config", "auto_map"),
    "block_size",
)
"""The keys of a config.json by which its family is known."""
FAMILIES: dict[str, type[Model]] = {
    "llada": LLaDA,
    "lladamoe": LLaDAMoE,
    "llada2_moe": LLaDA2,
    "illada": ILLaDA,
    "Dream": Dream,
    "dream_reasoner": DreamReasoner,
    "sdar": SDAR,
    "sdar_moe": SDARMoE,
    "rnd1": RND1,
    "Fast_dLLM_Qwen": FastDLLM,
    "wedlm": WeDLM,
    "sdlm": SDLM,
    "stable_diffcoder": StableDiffCoder,
    "a2d-llama": A2DLlama,
    "a2d-qwen2": A2DQwen2,
    "a2d-qwen3": A2DQwen3,
    "llama": Llama,
    "mistral": Mistral,
    "ministral3": Ministral3,
    "idlm": IDLM,
    "nemotron_labs_diffusion": NemotronDiffusion,
    "qwen2": Qwen2,
    "qwen3": Qwen3,
    "qwen3_moe": Qwen3MoE,
}
"""config.json's model_type -> the family that reads it, see `family_of`."""

_OF_TRANSFORMERS = ("llama", "mistral", "ministral3", "qwen2", "qwen3", "qwen3_moe")


def own_code(config: Mapping[str, Any]) -> str | None:
    """The class of a checkpoint's own code that makes its model, where the family's is transformers' own:
    what is read may be another model, such as a diffusion model in an autoregressive model's layers."""
    name, code = config.get("model_type"), config.get("auto_map")
    if (
        name not in _OF_TRANSFORMERS
        or family_of(config) is not FAMILIES[name]
        or not isinstance(code, Mapping)
    ):
        return None
    return next((str(code[key]) for key in ("AutoModelForCausalLM", "AutoModel") if code.get(key)), None)


def family_of(config: Mapping[str, Any]) -> type[Model] | None:
    """The family of `FAMILIES` that reads a config.json."""
    name = config.get("model_type")
    if name in multimodal.TYPES:
        text = config.get("text_config")  # of a loaded model an object
        name = text.get("model_type") if isinstance(text, Mapping) else getattr(text, "model_type", None)
    if name == "llada" and config.get("num_experts"):
        name = "lladamoe"  # which LLaDA-MoE is called by some, and published under LLaDA's name
    if name == "sdar" and config.get("use_regular_causal"):
        name = "idlm"  # which is published under SDAR's name
    if name == "qwen2" and config.get("text_mask_token_id") is not None:
        name = "sdlm"  # which is published under Qwen2's name
    if name == "Dream" and config.get("block_size"):
        name = "dream_reasoner"  # which is published under Dream's name
    if name == "llama" and is_published_so(config):
        name = "stable_diffcoder"  # which is published under Llama's name
    return FAMILIES.get(name) if isinstance(name, str) else None


def family_in(config: Mapping[str, Any], source: str) -> type[Model]:
    """The same. Raises ValueError naming `source`, where the config.json comes from, if there is none."""
    family = family_of(config)
    if family is None:
        raise ValueError(f"{source}: model_type {config.get('model_type')!r} is none of {list(FAMILIES)}")
    return family
