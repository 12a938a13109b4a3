"""Penalties of the tokens that a text already has: what a verify pass changes in its logits."""

from __future__ import annotations

import math
from array import array

import torch
from torch import Tensor

from ..decoding.sequence_settings import NO_PENALTIES, Penalties
from ..ops.row_stats import LARGEST
from ..packed import Packing
from .draft import Draft

TENSORS = 5
"""How many tensors `PenalizedRows.put` makes and `penalized` takes."""


class PenalizedRows:
    """The rows of a pass whose choices are penalized, and the tokens in front of each: the known ones of its
    sequence, and the guesses on the way to it."""

    def __init__(self) -> None:
        self._texts: list[array[int]] = []
        self._prompts: list[int] = []
        self._rows: dict[int, tuple[int, tuple[int, ...], Penalties]] = {}
        """Row -> the number of its text, the guesses behind it up to the row, and the penalties."""

    def __bool__(self) -> bool:
        return bool(self._rows)

    def add(self, first: int, text: array[int], prompt: int, draft: Draft, penalties: Penalties) -> None:
        """Add a sequence, whose verified rows begin at row `first`.

        text: its known tokens, of which the first `prompt` are the prompt.
        """
        paths: list[tuple[int, ...]] = [()]
        for node, parent in zip(draft.tokens, draft.verified_rows[1:], strict=True):
            paths.append((*paths[parent], node))
        for row, path in enumerate(paths, first):
            self._rows[row] = len(self._texts), path, penalties
        self._texts.append(text)
        self._prompts.append(prompt)

    def put(self, packing: Packing, padded: int) -> None:
        """Pack the tensors of `penalized`; `padded` is M with padding. Few sizes occur, so that passes can be
        recorded."""
        rows = [self._rows.get(row, (0, (), NO_PENALTIES)) for row in range(padded)]
        longest = 1 << (max(map(len, self._texts)) - 1).bit_length()
        depth = 1 << (max(len(path) for _, path, _ in rows)).bit_length()
        for text in self._texts:
            packing.filled(text, text[0], longest)
        packing.close(len(self._texts), longest)
        packing.add([*self._prompts, *map(len, self._texts)])
        packing.close(2, len(self._texts))
        packing.add([text for text, _, _ in rows])
        packing.close(padded)
        for _, path, _ in rows:
            packing.filled(path, -1, depth)
        packing.close(padded, depth)
        packing.floats([number for _, _, penalties in rows for number in penalties])
        packing.close(-(-3 * padded // 2))


def penalized(
    logits: Tensor, texts: Tensor, edges: Tensor, text: Tensor, guessed: Tensor, numbers: Tensor
) -> Tensor:
    """Logits (M, V) float32 after the penalties: the repetition penalty of CTRL (arXiv 1909.05858), as in
    transformers, of all tokens in front, and OpenAI's presence and frequency penalties of the response's.

    Args:
        texts: (P, T) int64, filled up with tokens of the same text.
        edges: (2, P) int64: where the response begins, and where the known tokens end.
        text: (M,) int64: each row's text.
        guessed: (M, D) int64: the guesses behind it up to the row; -1: none.
        numbers: float32 in int64: each row's `Penalties`.
    """
    repetition, presence, frequency = numbers.view(torch.float32)[: 3 * len(text)].view(-1, 3, 1).unbind(1)
    column = torch.arange(texts.shape[1], device=texts.device)
    of_response = (column >= edges[0][:, None]) & (column < edges[1][:, None])
    none = torch.zeros(len(texts), logits.shape[1], dtype=torch.int32, device=texts.device)
    counts = none.scatter_add(1, texts, of_response.to(torch.int32))
    # An id may come several times: each time it gets the same logit.
    known = texts[text]
    ids = torch.cat((known, torch.where(guessed >= 0, guessed, known[:, :1])), 1)
    count = counts[text[:, None], ids]
    for guess in guessed.unbind(1):
        count += ids == guess[:, None]
    z = logits.gather(1, ids).float()
    lowered = torch.where(z > 0, z / repetition, z * repetition) - frequency * count - presence * (count > 0)
    lowered = torch.where(z > -math.inf, lowered.clamp(-LARGEST, LARGEST), z)
    return logits.float().scatter(1, ids, lowered)
