"""Linear layers with weights of 8 bits: half the memory of 16 bits, and half the bytes to read in a pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import fp8_linear, quantize_fp8


class Fp8Linear(nn.Module):
    """Stands in for an nn.Linear, with a quantised weight, for inference alone."""

    weight: Tensor
    """(out, in) float8_e4m3fn"""
    scale: Tensor
    """(out,) float32"""
    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = quantize_fp8(linear.weight)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.clone())  # so the last kernel launched does not write the weight
        self.register_parameter("bias", linear.bias)
        self.training = linear.training

    def forward(self, x: Tensor) -> Tensor:
        return fp8_linear(x, self.weight, self.scale, self.bias, constant=True)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copy: the weight as bytes, since torch cannot read 8-bit floats from a pickle."""
        buffers = {**self._buffers, "weight": self.weight.view(torch.uint8)}
        return {**vars(self), "_buffers": buffers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.weight = self.weight.view(torch.float8_e4m3fn)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Fp8Linear:
        """Move with the model; a change of dtype applies to the bias alone."""
        device = fn(self.scale.new_empty(0)).device
        quantised = {name: self._buffers.pop(name) for name in ("weight", "scale")}
        try:
            super()._apply(fn, recurse)
            quantised = {name: buffer.to(device) for name, buffer in quantised.items() if buffer is not None}
        finally:
            self._buffers |= quantised
        return self
