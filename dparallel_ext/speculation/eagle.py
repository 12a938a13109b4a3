"""Drafters by the target's features and the embedding of the next token: EAGLE-3 and P-EAGLE, as published.

Sources: EAGLE-3, arXiv 2503.01840; P-EAGLE, arXiv 2602.01469. Files are read, and nothing here trains them.

    feature   of each token t: fc(streams of the target behind the tapped layers)
    pair      a row at position t: the embedding of token t + 1, and the feature of t
    layers    the first makes queries, keys and values of [norm(embedding), hidden_norm(feature)], and adds to
              the feature; the others are Llama's or Qwen3's. norm and lm_head follow, whose token i is the
              target's i + d2t[i]
    EAGLE-3   guesses token after token: the next pair is the guess, and the output of the layers before norm
    P-EAGLE   guesses in one pass: the next pairs are the mask's embedding and fc(mask_hidden), and each sees
              those in front of it

A feature depends on the text up to its token, and is kept in pages like those of the target's cache, which
sequences share. A pair depends on the token behind it too, where their texts may part: so each lane has keys
and values of pairs of its own, which the first draft computes for the whole text, later ones for new tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..cache import KVCache
from ..models import Model
from ..models.modules import shapes_only
from .blocks import TrainedBlockDrafter
from .checkpoint import DraftCheckpoint, Origin, check_target
from .drafter import RecordedSession
from .eagle_model import FORM, EagleModel, EagleOptions
from .eagle_passes import EagleSession
from .eagle_trees import EagleTreeSession

KIND = "eagle3"
MARKS = (FORM, "draft_vocab_size")
"""Keys of config.json that published drafters of these kinds have, some one, some the other."""


class EagleDrafter(TrainedBlockDrafter[EagleModel]):
    """A drafter of the kinds EAGLE-3 and P-EAGLE, see above. `load` reads one.

    Args:
        model: in evaluation mode and without gradients from now on.
        source: names the drafter in errors.
    """

    model_class = EagleModel
    options: EagleOptions

    def __init__(self, model: EagleModel, source: str = "drafter") -> None:
        super().__init__(model, source)
        self.guesses = min(self.guesses, self.options.vocabulary)

    def __repr__(self) -> str:
        kind = "EAGLE-3" if self.options.mask_id is None else "P-EAGLE"
        return f"{type(self).__name__}({kind}, most={self.most})"

    def check(self, model: Model) -> None:
        """Raise ValueError for a model of another vocabulary or width, or without a tapped layer."""
        sizes = {"vocabulary": self.options.shape.embedding_size, "width": self.options.target_width}
        check_target(self.source, Origin(), model, **sizes)
        self.options.taps_of(model.shape.layers)

    def session(self, model: Model, kv_cache: KVCache, lanes: int, *, graphs: bool = True) -> RecordedSession:
        grows = self.options.mask_id is None and self.drafting.width > 1
        kind = EagleTreeSession if grows else EagleSession
        return kind(self.fused(model), self.drafting, model, kv_cache, lanes, graphs)


def drafter_of_eagle(checkpoint: DraftCheckpoint) -> EagleDrafter:
    """The drafter in a published file. Raises ValueError for a config key or tensors that do not fit."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in checkpoint.tensors.items():
        ours = name.removeprefix("model.").replace("midlayer.", "layers.0.", 1)
        if ours in tensors:
            raise ValueError(f"{checkpoint.source}: {name}: expected {ours} once, got it by two names")
        if ours != "t2d":  # which says the same as d2t
            tensors[ours] = tensor
    options = EagleOptions.of(checkpoint.config, tensors)
    with shapes_only():
        model = EagleModel(checkpoint.config, options)
    if "mask_hidden" in tensors:
        tensors["mask_hidden"] = tensors["mask_hidden"].flatten()  # (1, n) and (1, 1, n) are published
    if (d2t := tensors.get("d2t")) is not None and d2t.dtype in (torch.int16, torch.int32):
        tensors["d2t"] = d2t.to(torch.int64)
    elif options.vocabulary == options.shape.embedding_size:
        tensors.setdefault("d2t", torch.zeros(options.vocabulary, dtype=torch.int64, device="cpu"))
    checkpoint._replace(tensors=tensors).fill(model)
    ids = model.d2t + torch.arange(options.vocabulary, device="cpu")
    if not 0 <= int(ids.min()) <= int(ids.max()) < options.shape.embedding_size:
        raise ValueError(
            f"{checkpoint.source}: d2t: expected the target's ids below {options.shape.embedding_size}, got "
            f"{int(ids.min())} to {int(ids.max())}"
        )
    return EagleDrafter(model, checkpoint.source)
