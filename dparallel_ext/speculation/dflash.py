"""Drafters that guess a whole block in one pass: DFlash, and ParallelSpec.

Sources: DFlash, arXiv 2602.06036; ParallelSpec, arXiv 2410.05589, in the form that can be trained, PARD's
group mask, arXiv 2504.18583.

    feature   of each known token: RMSNorm(fc(streams of the target behind the tapped layers))
    context   keys and values of the feature, in each draft layer by its own k_proj, k_norm and v_proj; they
              are all that is kept, at the token's own slot, in pages like those of the target's cache
    block     rows [root, mask, mask, ...] at the positions from the root's on, through layers in Qwen3's
              layout between the target's embedding and the target's head. Each sees the context of all
              positions in front of the root, and of the block every row (DFlash) or the rows up to itself
              (ParallelSpec)
    draft     each mask row's argmax: the token at the row's own position (a tree of more: `ddtree`)

The root's own feature is not known yet: the pass that verifies the draft computes it. A block's keys and
values lie behind the context, where the next pass writes that of the tokens it computes.

Both kinds are one module. DFlash taps some layers and has a few of its own; ParallelSpec has one, and its
context is made of the token's embedding (tap -1) and the last layer's stream.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..cache import AttentionMetadata, KVCache
from ..models import Model, Qwen3, fused_weights, rope
from ..models.attention import PagedAttention
from ..models.config import ModelConfig, config_ids
from ..models.fields import LAYERS, NO, Field, check_supported, read
from ..models.modules import Block, RMSNorm, Stream, attention, norm_of_sum, rotate, shapes_only
from ..ops import kv_move, kv_write
from .blocks import BlockSession, TrainedBlockDrafter
from .checkpoint import DraftCheckpoint, Origin, check_target
from .drafter import EMBEDDING, Observation, RecordedSession, check_layers

CAUSAL = {"dflash": False, "parallelspec": True}
"""The kinds of drafters: whether a row of the block sees only the rows in front of it, unless the config says
that it does."""
_LAYER = "model.layers.{}."
_NAMES = {
    ours: theirs.removeprefix(_LAYER) for ours, theirs in Qwen3.NAMES.items() if theirs.startswith(_LAYER)
}
BLOCK = Field(int, None, least=2, most=512)
_SUPPORTED = {"fc_layernorm": False, "input_embedding_scale": 1}


class DFlashOptions(NamedTuple):
    """The options in a drafter's config.json."""

    shape: ModelConfig
    kind: str
    taps: tuple[int, ...]
    """Layers of the target, ascending, counted from 0."""
    block: int
    """Rows of a block, the root among them."""
    causal: bool
    """Whether a row of the block sees only the rows in front of it."""
    mask_id: int
    target_layers: int
    origin: Origin

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> DFlashOptions:
        """Read the content of a config.json, ours or one of the published (z-lab's DFlash).

        Raises ValueError naming the key that is missing, or whose value is not supported.
        """
        # Whether they are causal, these layers say for themselves.
        shape = Qwen3.shape_of({key: value for key, value in config.items() if key != "is_causal"})
        causal = read(config, {"is_causal": NO})["is_causal"]
        check_supported(config, _SUPPORTED)
        origin = Origin.of(config)
        kind = origin.kind or "dflash"
        if kind not in CAUSAL:
            raise ValueError(f"config: kind={kind!r:.80}, expected one of {list(CAUSAL)}")
        layers = read(config, {"num_target_layers": LAYERS})["num_target_layers"]
        inner = read(config, {"dflash_config": Field(dict)})["dflash_config"]
        check_supported(inner, _SUPPORTED)
        sizes = [read(of, {"block_size": BLOCK})["block_size"] for of in (inner, config)]
        block = next((size for size in sizes if size is not None), None)
        if block is None:
            raise ValueError("config: 'block_size' is missing")
        masks = config_ids(inner, "mask_token_id", shape.embedding_size)
        if len(masks) != 1:
            raise ValueError("config: dflash_config: 'mask_token_id' is missing")
        if (taps := inner.get("target_layer_ids")) is None:  # a drafter guesses badly from other layers
            raise ValueError("config: dflash_config: 'target_layer_ids' is missing")
        check_layers("config: dflash_config: target_layer_ids", taps, EMBEDDING, layers)
        causal = causal or CAUSAL[kind]
        return cls(shape, kind, tuple(taps), block, causal, masks[0], layers, origin)


def default_taps(target_layers: int, count: int) -> tuple[int, ...]:
    """The target's layers to tap in training, spread as DFlash does: from the second to the third from the
    end."""
    if count == 1:
        return (target_layers // 2,)
    return tuple(round(1 + i * (target_layers - 4) / (count - 1)) for i in range(count))


class DFlashModel(nn.Module):
    """The weights, named as in the published checkpoints; embedding and head are the target's.

    Raises ValueError naming the config key that is missing, or whose value is not supported.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = dict(config)
        self.options = DFlashOptions.of(config)
        s = self.options.shape
        self.layers = nn.ModuleList(Block(s, _NAMES) for _ in range(s.layers))
        self.norm = RMSNorm(s)
        self.fc = nn.Linear(len(self.options.taps) * s.width, s.width, bias=False)
        self.hidden_norm = RMSNorm(s)

    def feature(self, taps: Sequence[Tensor]) -> Tensor:
        """(..., width) of the target's streams (..., width), one behind each tapped layer."""
        return self.hidden_norm(self.fc(torch.cat(tuple(taps), -1)))

    def context(self, layer: int, feature: Tensor) -> tuple[Tensor, Tensor]:
        """Keys before RoPE and values (..., kv_heads, head_dim) of features (..., width)."""
        block: Any = self.layers[layer]
        k, v = (
            t.unflatten(-1, (-1, self.options.shape.head_dim))
            for t in fused_weights.project(feature, (block.k, block.v))
        )
        return block.k_norm(k), v

    def rows(self, x: Tensor, attention: PagedAttention) -> Tensor:
        """Hidden states (M, width) after the final norm, of packed embedded rows x (M, width)."""
        stream = Stream(x)
        for layer, block in enumerate(self.layers):
            stream = block.run(stream, attention.layer(layer))  # type: ignore[operator]
        return norm_of_sum(self.norm, stream)[1]

    def forward(
        self, x: Tensor, positions: Tensor, feature: Tensor, visible: Tensor, cos: Tensor, sin: Tensor
    ) -> Tensor:
        """For training: hidden states (B, M, width) after the final norm, of blocks behind whole sequences.

        Args:
            x: (B, M, width), embedded rows of any blocks.
            positions: (B, M) int64, theirs.
            feature: (B, L, width), the sequences' features; positions are counted from 0.
            visible: (B, M, L + M) bool, the columns of the context, and then the rows, that each row sees.
            cos, sin: (at least the positions, head_dim / 2), see `rope_table`.
        """
        length = feature.shape[1]
        of_rows = [t[positions][:, :, None] for t in (cos, sin)]  # (B, M, 1, head_dim / 2)
        of_context = [t[:length, None] for t in (cos, sin)]  # (L, 1, head_dim / 2)
        for layer, block in enumerate(self.layers):
            known = self.context(layer, feature)

            def attend(q: Tensor, k: Tensor, v: Tensor, known: tuple[Tensor, Tensor] = known) -> Tensor:
                k = torch.cat((rotate(known[0], *of_context), rotate(k, *of_rows)), 1).to(v.dtype)
                q, v = rotate(q, *of_rows).to(v.dtype), torch.cat((known[1], v), 1)
                return attention(q, k, v, visible[:, None])

            x = block(x, attend)
        return self.norm(x)


class DFlashDrafter(TrainedBlockDrafter[DFlashModel]):
    """A drafter of one block a pass, see above. `load` reads one; `dparallel drafter` trains one.

    Args:
        model: the weights, such as `load(path).model`; in evaluation mode and without gradients from now on.
        source: names the drafter in errors.
    """

    model_class = DFlashModel
    options: DFlashOptions

    def __repr__(self) -> str:
        options = self.options
        return f"{type(self).__name__}({options.kind}, block={options.block}, taps={list(options.taps)})"

    def check(self, model: Model) -> None:
        """Raise ValueError for a model of another vocabulary, other sizes or other weights."""
        options, s = self.options, self.options.shape
        sizes = {"vocabulary": s.embedding_size, "width": s.width, "layers": options.target_layers}
        check_target(self.source, options.origin, model, **sizes)

    def session(self, model: Model, kv_cache: KVCache, lanes: int, *, graphs: bool = True) -> RecordedSession:
        return _Session(self, model, kv_cache, graphs)


def drafter_of_blocks(checkpoint: DraftCheckpoint) -> DFlashDrafter:
    """The drafter in a file of weights. Raises ValueError for a config key or tensors that do not fit."""
    with shapes_only():
        model = DFlashModel(checkpoint.config)
    checkpoint.fill(model)
    return DFlashDrafter(model, checkpoint.source)


class _Session(BlockSession):
    """Keeps the context of a batch's lanes, under the block table of the target's cache."""

    def __init__(self, drafter: DFlashDrafter, model: Model, kv_cache: KVCache, graphs: bool) -> None:
        self._layers, options = drafter.fused(model), drafter.options
        s, pages, size = options.shape, kv_cache.slots.shape[2], kv_cache.page_size
        slots = torch.zeros(
            (s.layers, 2, pages, s.kv_heads, size, s.head_dim), dtype=model.dtype, device=model.device
        )
        table = rope.table(kv_cache.length, s.head_dim, s.rope_theta, s.rope_scaling, model.device)
        super().__init__(
            self._layers,
            model,
            KVCache(slots, table, kv_cache.block_table),
            block=options.block,
            mask_id=options.mask_id,
            causal=options.causal,
            drafting=drafter.drafting,
            graphs=graphs,
        )
        self.taps, self.size = options.taps, slots.nbytes

    def observe(self, seen: Observation) -> None:
        feature = self._layers.feature(seen.taps)
        cos, sin = self.kv_cache.rope
        for layer in range(len(self._layers.layers)):
            k, v = self._layers.context(layer, feature)
            kv_write(
                torch.empty_like(k),  # queries, of which there are none
                k,
                v,
                *self.kv_cache.layer(layer),
                positions=seen.metadata.positions,
                slot_mapping=seen.metadata.slot_mapping,
                cos=cos,
                sin=sin,
            )

    def moved(self, source: Tensor, target: Tensor) -> None:
        kv_move(self.kv_cache.slots, source, target)

    def hidden(self, ids: Tensor, metadata: AttentionMetadata) -> Tensor:
        return self._layers.rows(self.model.embed(ids), PagedAttention(self.kv_cache, metadata))
