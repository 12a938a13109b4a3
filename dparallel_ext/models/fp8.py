"""Linear layers whose weights are kept in 8 bits: half the memory of 16, and half of it to read a pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..ops import fp8_linear, quantize_fp8


class Fp8Linear(nn.Module):
    """Stands in the place of an nn.Linear, its weight quantised; computes, and is not trained."""

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
        self.register_buffer("scale", scale.clone())  # by the last kernel: not the one that writes the weight
        self.register_parameter("bias", linear.bias)
        self.training = linear.training

    def forward(self, x: Tensor) -> Tensor:
        return fp8_linear(x, self.weight, self.scale, self.bias, constant=True)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Fp8Linear:
        """Moves with the model, but another dtype is for the bias alone."""
        quantised = {name: self._buffers.pop(name) for name in ("weight", "scale")}
        super()._apply(fn, recurse)
        for name, buffer in quantised.items():
            assert buffer is not None
            moved = fn(torch.empty_like(buffer, dtype=torch.float32))
            self._buffers[name] = buffer.to(moved.device)
        return self
