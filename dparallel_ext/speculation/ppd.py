"""Prompt tokens: riders with embeddings of their own (PPD, parallel prompt decoding, arXiv 2405.18628).

The j-th rider of a node is a token outside the vocabulary, at the node's position + j, with a trained
embedding. There are no other weights: 576 numbers for three riders of a model of width 192. Each rider has
one embedding (the paper's EPT = 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .riders import RiderModel


class PromptTokens(RiderModel):
    """The weights of PPD: `prompt` (most, width), the embeddings of a node's riders by their distance."""

    KIND = "ppd"

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self.prompt = nn.Parameter(torch.zeros(self.most, self.width))

    def embed(self, nodes: Tensor, numbers: Tensor) -> Tensor:
        return F.embedding(numbers, self.prompt)
