"""Trains drafters that guess a block in a pass: DFlash and ParallelSpec.

A step packs blocks behind the target's answers, each for a random place, under one mask: a block sees the
context in front of its root, and itself. Each row after the root learns the token at its own position by
cross entropy. Rows have `weights`, since a draft ends at its first wrong token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dparallel_ext import models
from dparallel_ext.arguments import check_fields, one_of, whole
from dparallel_ext.models import rope
from dparallel_ext.models.fields import LAYERS, MLP_WIDTH, VOCABULARY
from dparallel_ext.speculation import DFlashDrafter, DFlashModel
from dparallel_ext.speculation.checkpoint import Origin
from dparallel_ext.speculation.dflash import BLOCK, CAUSAL, DFlashOptions, default_taps
from dparallel_ext.speculation.drafter import EMBEDDING, check_layers

from .common import Answer, DrafterSettings, Target, Trainee, drawn, places_of

KINDS = {"dflash": {"layers": 3, "block": 16}, "parallelspec": {"layers": 1, "block": 7}}
"""Default layers, and rows of a block, the root included."""
DECAY = ((8, 4.0), (10, 5.0), (16, 7.0))
"""DFlash's (rows of a block up to, rows in which the weight falls to 1 / e)."""
LOSSES = ("d-pace", "exp")


@dataclass(frozen=True)
class BlockSettings(DrafterSettings):
    KINDS = tuple(KINDS)
    kind: str = "dflash"
    layers: int | None = None
    block: int | None = None
    taps: tuple[int, ...] | None = None
    """Layers of the target to read; None: for DFlash all of a small target, those published of a large one;
    for ParallelSpec the embedding and the last."""
    mlp_width: int | None = None
    """None: the target's width."""
    mask_id: int | None = None
    """None: the mask token of the target's tokenizer."""
    loss: str = "d-pace"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("loss", self.loss, LOSSES)
        for name, least, most in (
            ("layers", 1, LAYERS.most),
            ("block", 2, BLOCK.most),
            ("mlp_width", 1, MLP_WIDTH.most),
            ("mask_id", 0, VOCABULARY.most),
        ):
            check_fields(self, (name,), whole, least, int(most))


class BlockTrainee(Trainee):
    SETTINGS = BlockSettings
    module: DFlashModel

    def __init__(self, target: Target, settings: BlockSettings) -> None:
        self._target, self._settings = target.model, settings
        mask_id = target.mask_id(settings.mask_id)
        self.config = block_config(target.model, settings, mask_id, target.origin(settings.kind))
        self._mask_id = DFlashOptions.of(self.config).mask_id

    def build(self) -> DFlashModel:
        model = DFlashModel(self.config)
        initialise(model)
        return model

    def learnable(self, answers: list[Answer]) -> list[Answer]:
        """Answers up to their first mask token: it is never drafted, so the loss of a row that is to learn it
        would be infinite, and the rows behind it are never accepted."""
        cut = []
        for ids, length in answers:
            masks = (ids[length:] == self._mask_id).nonzero()
            count = int(masks[0]) if len(masks) else len(ids) - length
            if count >= 2:
                cut.append((ids[: length + count], length))
        if not cut:
            raise ValueError(
                f"mask_id: expected an id that the target's answers do not have, got {self._mask_id}, which "
                "all of them have among their first two tokens"
            )
        return cut

    def loss_of(self, answers: Sequence[Answer], step: int) -> Tensor:
        return loss_of(self.module, self._target, answers, self._settings, step)

    def drafter(self, source: str, measured: Sequence[Answer]) -> DFlashDrafter:
        return DFlashDrafter(self.module, source)


def block_config(
    model: models.Model, settings: BlockSettings, mask_id: int, origin: Origin
) -> dict[str, Any]:
    """The config.json of a drafter for `model`, in the layout of the published drafters.

    Raises ValueError naming the setting that does not fit the model.
    """
    s, default = model.shape, KINDS[settings.kind]
    layers, taps = settings.layers or default["layers"], settings.taps
    if taps is None and CAUSAL[settings.kind]:
        taps = (EMBEDDING, s.layers - 1)
    elif taps is None:
        taps = tuple(range(s.layers)) if s.layers <= 5 else default_taps(s.layers, 5)
    check_layers("taps", taps, EMBEDDING, s.layers)
    keys = ("rope_scaling", "rope_parameters") if s.rope_scaling is not None else ()
    scaling = {key: model.config[key] for key in keys if key in model.config}
    return {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "attention_bias": False,
        "block_size": settings.block or default["block"],
        "dflash_config": {"mask_token_id": mask_id, "target_layer_ids": list(taps)},
        "head_dim": s.head_dim,
        "hidden_act": "silu",
        "hidden_size": s.width,
        "intermediate_size": settings.mlp_width or s.mlp_width,
        "max_position_embeddings": models.max_positions(model),
        "num_attention_heads": s.heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": s.kv_heads,
        "num_target_layers": s.layers,
        "rms_norm_eps": s.eps,
        "rope_theta": s.rope_theta,
        "tie_word_embeddings": False,
        "vocab_size": s.embedding_size,
        **scaling,
        **origin.ours,
    }


def initialise(model: DFlashModel) -> None:
    """Initialise by normal weights of variance 1 / fan_in, smaller for the last matrices of residual
    branches."""
    for name, p in model.named_parameters():
        if p.ndim == 2:
            last = name.endswith(("o_proj.weight", "down_proj.weight"))
            scale = (2 * model.options.shape.layers) ** -0.5 if last else 1.0
            nn.init.normal_(p, std=scale * p.shape[1] ** -0.5)


@dataclass(frozen=True)
class Packed:
    """Answers and the blocks behind them: B sequences, A blocks of N rows each."""

    ids: Tensor
    """(B, L) int64, padded with arbitrary tokens."""
    rows: Tensor
    """(B, A N) int64: tokens of the blocks' rows, roots and masks."""
    positions: Tensor
    """(B, A N) int64: positions of the blocks' rows."""
    visible: Tensor
    """(B, A N, L + A N) bool: the columns of the context, and the rows, that a row sees."""
    labels: Tensor
    """(B, A, N - 1) int64: the token at the position of each row after the root; -1 if there is none."""


def pack_blocks(
    answers: Sequence[Answer], options: DFlashOptions, anchors: int, generator: torch.Generator
) -> Packed:
    """Blocks at up to `anchors` random places of each answer, whose root and next token are in the
    response."""
    block = options.block
    ids, prompts, ends, place, there = places_of(answers, anchors, generator, before=0, ahead=1)
    place = torch.where(there, place, prompts)  # a missing block has no labels
    count, used = place.shape
    offset = torch.arange(block)
    positions = place[..., None] + offset  # (B, A, N)
    token = ids.gather(1, positions.flatten(1).clamp(max=ids.shape[1] - 1)).view(count, used, block)
    labels = token.masked_fill((positions >= ends[..., None]) | ~there[..., None], -1)[..., 1:]
    rows = torch.where(offset == 0, token, options.mask_id)
    row = torch.arange(used * block)
    same_block = row[:, None] // block == row // block
    if CAUSAL[options.kind]:
        same_block &= row[:, None] >= row
    context = torch.arange(ids.shape[1]) < place.repeat_interleave(block, 1)[..., None]  # (B, A N, L)
    visible = torch.cat((context, same_block.expand(count, -1, -1)), -1)
    return Packed(ids, rows.flatten(1), positions.flatten(1), visible, labels)


def loss_of(
    model: DFlashModel, target: models.Model, answers: Sequence[Answer], settings: BlockSettings, step: int
) -> Tensor:
    options, device = model.options, target.device
    some, generator = drawn(answers, settings, step)
    batch = pack_blocks(some, options, settings.anchors, generator)
    taps = models.Taps(options.taps)
    labels = batch.labels.to(device)
    asked = labels >= 0
    s = options.shape
    # On a CPU, even one with products of bfloat16, its many small operations are faster in float32.
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu"):
        with torch.no_grad():
            target.hidden(batch.ids.to(device), taps=taps)
            x = target.embed(batch.rows.to(device)).float()
            length = batch.ids.shape[1] + options.block  # the positions that blocks can reach
            cos, sin = rope.table(length, s.head_dim, s.rope_theta, s.rope_scaling, device)
        feature = model.feature([taps[each].float() for each in options.taps])
        visible, positions = batch.visible.to(device), batch.positions.to(device)
        y = model(x, positions, feature, visible, cos, sin)
        y = y.unflatten(1, (-1, options.block))[:, :, 1:][asked]
        logits = target.head(y.to(target.dtype))
    logits = logits.float()
    logits[:, options.mask_id] = -torch.inf  # it is never drafted
    nll = torch.zeros(labels.shape, device=device)
    nll[asked] = F.cross_entropy(logits, labels[asked], reduction="none")
    weight = weights(nll.detach(), asked, settings.loss)
    return (nll * weight).sum() / weight.sum()


def weights(nll: Tensor, asked: Tensor, loss: str) -> Tensor:
    """(..., N - 1): the weight of each row, 0 for rows without a label.

    "exp": exp(-(k - 1) / g) for row k, as in DFlash. "d-pace" (arXiv 2605.18810): with s = q / 2 + 1 / 2 of
    the label's current probability q, the sum over j >= k of s_1 ... s_j, by which row k lengthens a draft.
    No gradient passes through the weights.
    """
    if loss == "exp":
        size = nll.shape[-1] + 1
        fall = next((g for rows, g in DECAY if size <= rows), DECAY[-1][1])
        weight = torch.exp(-torch.arange(size - 1, device=nll.device) / fall).expand_as(nll)
    else:
        reach = (0.5 * torch.exp(-nll) + 0.5).cumprod(-1) * asked
        weight = reach.flip(-1).cumsum(-1).flip(-1)
    return weight * asked
