"""Decoding a masked diffusion language model: from prompts to tokens, many a pass."""

from .decode import DecodeOutput, decode
from .workspace import Trajectory

__all__ = ["DecodeOutput", "Trajectory", "decode"]
