"""Decoding a masked diffusion language model: from prompts to tokens, many a pass."""

from .config import ENGINE_FIELDS, DecodeConfig, DecodeKeywords
from .decode import DecodeOutput, decode
from .workspace import Trajectory

__all__ = ["ENGINE_FIELDS", "DecodeConfig", "DecodeKeywords", "DecodeOutput", "Trajectory", "decode"]
