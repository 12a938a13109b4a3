"""Hidden Transfer: riders that are born at a middle layer (arXiv 2404.12022; its successor FIRP, 2410.20488).

Behind layer t - 1 a trained matrix for each distance turns the stream of a node's row into a pseudo hidden
state for that distance, which from layer t on is a row like any other, at the node's position + j. Below it
there is nothing of it: no row is computed there, and no keys and values exist. A rider sees what its node
sees, the node, and the riders in front of it (the paper does not say which it lets see which).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..models.fields import Field, read
from .riders import Birth


class HiddenTransfer(Birth):
    KIND = "hidden_transfer"

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self.layer = read(config, {"layer": Field(int)})["layer"]
        if self.layer >= self.target_layers:
            raise ValueError(f"config: layer={self.layer}, expected one of [1, {self.target_layers})")
        self.maps = nn.Parameter(torch.zeros(self.most, self.width, self.width))

    def born(self, nodes: Tensor, numbers: Tensor) -> Tensor:
        # Each map of each row, of which one is kept: few rows, whose time is that of reading the maps.
        every = torch.einsum("...w,kvw->...kv", nodes, self.maps)
        number = numbers[..., None, None].expand(*numbers.shape, 1, self.width)
        return every.gather(-2, number).squeeze(-2)
