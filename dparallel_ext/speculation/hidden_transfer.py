"""Hidden Transfer: riders that begin at a middle layer (arXiv 2404.12022; its successor FIRP, 2410.20488).

After layer t - 1, a trained matrix for each distance j turns the stream of a node's row into a pseudo hidden
state, which from layer t on is a row like any other, at the node's position + j. In earlier layers the rider
has no row, and no keys and values. A rider sees what its node sees, the node, and the riders before it (the
paper does not say which rows see which).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..models.fields import Field, read
from .riders import RiderModel


class HiddenTransfer(RiderModel):
    """The weights of Hidden Transfer: `maps` (most, width, width), used in front of layer `layer`."""

    KIND = "hidden_transfer"

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self.layer = read(config, {"layer": Field(int)})["layer"]
        if self.layer >= self.target_layers:
            raise ValueError(f"config: layer={self.layer}, expected one of [1, {self.target_layers})")
        self.maps = nn.Parameter(torch.zeros(self.most, self.width, self.width))

    def embed(self, nodes: Tensor, numbers: Tensor) -> Tensor:
        # All maps of all rows, though each row keeps one alone: for few rows, reading the maps takes the
        # time.
        every = torch.einsum("...w,kvw->...kv", nodes, self.maps)
        number = numbers[..., None, None].expand(*numbers.shape, 1, self.width)
        return every.gather(-2, number).squeeze(-2)
