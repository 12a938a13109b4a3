"""Prompt tokens: riders with embeddings of their own (PPD, parallel prompt decoding, arXiv 2405.18628).

The j-th rider behind a node is a trained token, whose id would lie behind the vocabulary, at the node's
position + j. Its embedding is all that there is: for three riders of a model of width 192, 576 numbers. One
embedding for each (the paper's EPT = 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .riders import Birth


class PromptTokens(Birth):
    KIND = "ppd"

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self.prompt = nn.Parameter(torch.zeros(self.most, self.width))

    def born(self, nodes: Tensor, numbers: Tensor) -> Tensor:
        return F.embedding(numbers, self.prompt)
