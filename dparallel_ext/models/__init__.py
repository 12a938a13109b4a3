"""Native models that read published checkpoints as they are."""

from ..backends import device_of
from ..cache import KVCache
from .a2d import A2DLlama, A2DQwen2, A2DQwen3
from .base import Model
from .checkpoint import as_stored, config_of, load, save, wrap
from .config import Output, Traits
from .dream import Dream
from .families import FAMILIES, family_of
from .fast_dllm import FastDLLM
from .files import locate
from .fingerprints import fingerprint
from .idlm import IDLM
from .illada import ILLaDA
from .llada import LLaDA, LLaDAMoE
from .llada2 import LLaDA2
from .llama import Llama
from .mistral import Ministral3, Mistral
from .modules import Stream, Taps, mixed_embeddings, soft_embeddings
from .nemotron import NemotronDiffusion
from .qwen import Qwen2, Qwen3, Qwen3MoE
from .rnd1 import RND1
from .sdar import SDAR, DreamReasoner, SDARMoE
from .sdlm import SDLM
from .stable_diffcoder import StableDiffCoder
from .traits import check_diffusion, max_positions, stored_traits, traits, warn_beyond
from .wedlm import WeDLM
from .wrappers import (
    check_call,
    for_decoding,
    ids_device,
    logits_of,
    native,
    own_precision,
    unwrap,
    warn_of_dropout,
)

__all__ = [
    "FAMILIES",
    "IDLM",
    "RND1",
    "SDAR",
    "SDLM",
    "A2DLlama",
    "A2DQwen2",
    "A2DQwen3",
    "Dream",
    "DreamReasoner",
    "FastDLLM",
    "ILLaDA",
    "KVCache",
    "LLaDA",
    "LLaDA2",
    "LLaDAMoE",
    "Llama",
    "Ministral3",
    "Mistral",
    "Model",
    "NemotronDiffusion",
    "Output",
    "Qwen2",
    "Qwen3",
    "Qwen3MoE",
    "SDARMoE",
    "StableDiffCoder",
    "Stream",
    "Taps",
    "Traits",
    "WeDLM",
    "as_stored",
    "check_call",
    "check_diffusion",
    "config_of",
    "device_of",
    "family_of",
    "fingerprint",
    "for_decoding",
    "ids_device",
    "load",
    "locate",
    "logits_of",
    "max_positions",
    "mixed_embeddings",
    "native",
    "own_precision",
    "save",
    "soft_embeddings",
    "stored_traits",
    "traits",
    "unwrap",
    "warn_beyond",
    "warn_of_dropout",
    "wrap",
]
