"""Decoding a masked diffusion language model: from prompts to tokens, many a pass."""

from .config import OF_ENGINE, DecodeConfig, DecodeKeywords
from .decode import DecodeOutput, decode
from .workspace import Trajectory

__all__ = ["OF_ENGINE", "DecodeConfig", "DecodeKeywords", "DecodeOutput", "Trajectory", "decode"]
