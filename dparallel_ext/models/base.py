"""One transformer for every family: RMSNorm, RoPE, grouped-query attention, SwiGLU.

A family is data: how its config.json reads (`ModelConfig`), and its checkpoint's names of modules (`NAMES`).
Torch, and all that works on the names of modules and parameters (adapters, sharders, optimizers), knows the
modules by the checkpoint's names; the code here calls them by short names, the same in every family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import model_store
from ..arguments import check_tensor, described, warn
from ..cache import AttentionMetadata, KVCache, Span, block_causal_spans, known_first, runs_joined
from . import experts, fields, fused_weights, rope
from .attention import PagedAttention
from .config import BlockRouting, Config, ModelConfig, Output, config_ids, penalty_in
from .fp8 import Fp8Linear
from .hugging_face import HuggingFaceInterface
from .modules import DROPOUT, Block, RMSNorm, Stream, Taps, all_modules, attention, norm_of_sum, rotate


class Model(HuggingFaceInterface):
    """A language model: of masked diffusion, or autoregressive if the family is `causal`.

    A position sees all others; in a block-causal family, the positions up to its block's end; in a causal
    family, the positions up to itself; in a family with a `window`, as `Traits` says. A call with input_ids
    (B, L) int64 returns an object with `.logits` (B, L, V), raw, as the Hugging Face model of the same
    checkpoint does (V: rows of the embedding). `hidden` and `head` are its two halves; `step` is `hidden` for
    decoding: it computes chosen positions against a cache. A model made from a config.json's content has
    fresh weights, initialised as torch does; `load` and `wrap` read weights.

    Raises ValueError naming the config key that is missing or not supported.
    """

    NAMES: ClassVar[Mapping[str, str]]
    """Our name of a module -> the checkpoint's; `{}` stands for the layer."""
    published_mask_id: ClassVar[int | None] = None
    """The mask token of this family's released checkpoints, used if a config names none."""
    DEFAULTS: ClassVar[Mapping[str, Any]] = {}
    """The published config class's values of keys that a config.json may lack, where `read_config` would take
    another."""
    mask_key: ClassVar[str] = "mask_token_id"
    """The key of a config.json under which the published code looks for the mask token."""
    shift: ClassVar[bool] = False
    causal: ClassVar[bool] = False
    strict: ClassVar[frozenset[str]] = frozenset()
    sub_block_length: ClassVar[int | None] = None
    block_causal_too: ClassVar[bool] = False
    aligned_blocks: ClassVar[bool] = True
    whole_blocks: ClassVar[bool] = True
    onward: ClassVar[bool] = False
    window: int | None = None
    prompt_block: bool = False
    """The family's traits, see `Traits`; a config may say the last two otherwise."""
    block_length: int | None
    """Block-causal families: the length of the blocks, counted from position 0 in a call. Else None."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        layer = next(name.partition("{}.")[0] for name in self.NAMES.values() if "{}" in name)
        outside_blocks = {ours: theirs for ours, theirs in self.NAMES.items() if "{}" not in theirs}
        super().__init__({**outside_blocks, "blocks": layer.removesuffix(".")})
        self.config = Config(config)
        s = self.shape = self.shape_of(config)
        self.vocab_size, self.block_length = s.vocab_size, s.block_length
        self.window, self.prompt_block = s.window or type(self).window, s.prompt_block
        published = self.released_mask_id(s.embedding_size)
        if config.get(self.mask_key) is not None:
            self.config["mask_token_id"] = config[self.mask_key]
        elif config.get("mask_token_id") is None and published is not None:
            self.config["mask_token_id"] = published
        self.mask_id = next(iter(config_ids(self.config, "mask_token_id", s.embedding_size)), None)
        self.end_at(config_ids(self.config, "eos_token_id", s.embedding_size))
        self.repetition_penalty = penalty_in(config)
        self.embed = nn.Embedding(s.embedding_size, s.width)
        names = {o: t.removeprefix(layer + "{}.") for o, t in self.NAMES.items() if "{}" in t}
        sparse = frozenset() if s.experts is None else s.experts.layers
        self.blocks = nn.ModuleList(Block(s, names, layer in sparse) for layer in range(s.layers))
        self.norm = RMSNorm(s)
        self.lm_head = nn.Linear(s.width, s.embedding_size, bias=s.head_bias and not s.tied)
        self.tie()
        self._rope: tuple[Tensor, Tensor] | None = None
        self.register_state_dict_post_hook(_without_tied_head)
        self.register_load_state_dict_pre_hook(_with_tied_head)

    def end_at(self, ids: Iterable[int]) -> None:
        """Set `eos_ids`, each id once, and `eos_id`.

        The mask token, which a diffusion model never decodes, is no end, whatever a checkpoint says.
        """
        ends = [end for end in dict.fromkeys(ids) if self.causal or end != self.mask_id]
        self.eos_ids, self.eos_id = tuple(ends), next(iter(ends), None)

    @staticmethod
    def read_config(config: Mapping[str, Any]) -> ModelConfig:
        raise NotImplementedError

    @classmethod
    def shape_of(cls, config: Mapping[str, Any]) -> ModelConfig:
        """The transformer's sizes and options in a config.json. Raises ValueError as `Model` does."""
        if cls.causal:  # transformers reads the key, though its classes do not name it
            fields.check_supported(config, {"is_causal": True})
        try:
            shape = cls.read_config({**cls.DEFAULTS, **config})
        except KeyError as error:
            raise ValueError(f"config: {error} is missing") from error
        config_ids(config, "eos_token_id", shape.embedding_size)
        return replace(shape, **fields.read(config, {"prompt_block": fields.NO}))

    @classmethod
    def released_mask_id(cls, rows: int | None) -> int | None:
        """The published mask token, if the vocabulary may be that of the releases: the id is among its last.

        rows: rows of the embedding; None: not known.
        """
        published = cls.published_mask_id
        return published if published is None or rows is None or 0 < rows - published <= 512 else None

    def train(self, mode: bool = True) -> Model:
        dropped = {key: self.config[key] for key in DROPOUT if self.config.get(key)}
        if mode and dropped:
            warn(f"config: {dropped} is ignored, since this model has no dropout")
        if mode:
            model_store.drop(self)
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Model:
        model_store.drop(self)
        super()._apply(fn, recurse)
        return self

    def tie(self) -> None:
        """Make the head's weight the embedding's, if the config ties them."""
        if self.shape.tied:
            self.lm_head.weight = self.embed.weight

    @classmethod
    def checkpoint_name(cls, name: str) -> str:
        """The checkpoint's name of the module that is called, say, "blocks.0.q" or "norm" here."""
        ours, layer, *_ = (*reversed(name.removeprefix("blocks.").split(".")), "")
        return cls.NAMES[ours].format(layer)

    @property
    def sharded(self) -> bool:
        """Whether parameters are DTensors, as FSDP2 and its like make them."""
        return any(hasattr(parameter, "placements") for parameter in self.parameters())

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.weight.dtype

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **neutral: Any) -> Output:
        """The logits, see `Model`. attention_mask: see `hidden`.

        neutral: arguments that PEFT passes to every model, such as `labels`, all None or False.

        Raises TypeError or ValueError naming the argument that does not fit.
        """
        for name, value in neutral.items():
            if value is not None and value is not False and name != "return_dict":
                raise ValueError(f"{name}: this model computes logits of input_ids alone, so expected None")
        return Output(self.head(self.hidden(input_ids, attention_mask=attention_mask)))

    def hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        taps: Taps | None = None,
    ) -> Tensor:
        """Hidden states (B, L, width) after the final norm, of whole sequences input_ids (B, L) int64 or
        int32.

        attention_mask: (B, L) bool or whole numbers; 0 marks padding, on either side, which no position sees.
        Positions count from the first column, padding included, since rotary embeddings depend only on
        distances. taps: takes the residual streams (B, L, width) of its layers.

        Raises TypeError or ValueError for ids of a wrong type, shape or (on the CPU, where a check needs no
        synchronisation) range, and for a mask of another shape or dtype.
        """
        x = self._embed(input_ids, 2)
        s, visible = self.shape, self._visible(input_ids, attention_mask)
        triangle = self.causal and visible is None
        rope_dtype = torch.promote_types(x.dtype, torch.float32) if s.rope_in_float32 else x.dtype
        cos, sin = (t[: x.shape[1], None].to(rope_dtype) for t in self._rope_of(x.shape[1]))

        query_scale = self._query_scale_of(x.shape[1])

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k = (rotate(t.to(rope_dtype), cos, sin).to(v.dtype) for t in (q, k))
            if query_scale is not None:
                q = q * query_scale[:, None, None].to(q.dtype)
            return attention(q, k, v, visible, causal=triangle)

        checkpointing = self.checkpointing if self.training else None
        if checkpointing and checkpointing["use_reentrant"] and torch.is_grad_enabled():
            # A reentrant checkpoint has a gradient only if an input requires one; under adapters none does.
            x = x if x.requires_grad else x.detach().requires_grad_()
        if taps is not None:
            taps.take(-1, Stream(x))
        together = self._together(input_ids, attention_mask)
        for layer, block in enumerate(self.blocks):
            if checkpointing is not None:
                x = checkpoint(block, x, attend, *together, **checkpointing)
            else:
                x = block(x, attend, *together)
            if taps is not None:
                taps.take(layer, Stream(x))
        return self.norm(x)

    def step(
        self,
        input_ids: Tensor,
        kv_cache: KVCache,
        metadata: AttentionMetadata,
        *,
        taps: Taps | None = None,
    ) -> Tensor:
        """Hidden states (N, width) after the final norm, of the packed tokens input_ids (N,) of `metadata`.

        Writes their keys and values to the cache in place and attends through it, so call it under
        `torch.no_grad` or `inference_mode`. For a pass over some of the layers there are its three parts:
        `embedded`, `run_layers`, `final_norm`.

        taps: takes the residual streams (N, width) of its layers.

        Raises TypeError or ValueError as `hidden` does.
        """
        stream = self.embedded(input_ids)
        if len(input_ids) != len(metadata.positions):
            raise ValueError(
                f"input_ids: expected ({len(metadata.positions)},), got {tuple(input_ids.shape)}"
            )
        return self.final_norm(self.run_layers(stream, kv_cache, metadata, taps=taps))

    def embedded(self, input_ids: Tensor) -> Stream:
        """The first layer's input for input_ids (N,). Raises TypeError or ValueError as `hidden` does."""
        return Stream(self._embed(input_ids, 1))

    def run_layers(
        self,
        stream: Stream,
        kv_cache: KVCache,
        metadata: AttentionMetadata,
        start: int = 0,
        stop: int | None = None,
        *,
        taps: Taps | None = None,
    ) -> Stream:
        """The residual stream (N, width) after layers [start, stop), of the stream before layer `start`.

        Writes only these layers' keys and values. stop: None: through the last layer.
        """
        attention = PagedAttention(kv_cache, metadata)
        if taps is not None and start == 0:
            taps.take(-1, stream)
        together: tuple[Tensor, ...] = ()
        if (size := self.routed_together) is not None:
            real = metadata.slot_mapping >= 0
            together = (experts.together_in(metadata.rows, metadata.positions, real, size),)
        for layer, block in list(enumerate(self.blocks))[start:stop]:
            attend = attention.layer(layer)
            if fused_weights.is_unmodified(block, Block):
                stream = block.run(stream, attend, *together)
            else:
                stream = Stream(block(stream.sum, attend, *together))
            if taps is not None:
                taps.take(layer, stream)
        return stream

    def final_norm(self, stream: Stream) -> Tensor:
        """The input (N, width) of `head`, of the stream after the last layer."""
        return norm_of_sum(self.norm, stream)[1]

    def spans(self, row: int, start: int, end: int, length: int) -> list[Span]:
        """The spans of positions [start, end) of sequence `row`, which has `length` positions, as in a call.

        A block-causal model has `block_causal_spans`. A causal model has one span that sees [0, end), whose
        positions see up to themselves.
        """
        if self.block_length is not None:
            return block_causal_spans(row, start, end, length, self.block_length)
        return [Span(row, start, end, end if self.causal else length)] if start < end else []

    def groups(self) -> Iterator[list[nn.Parameter]]:
        """The groups of parameters of every layer, see `Block.groups`."""
        for block in self.blocks:
            if isinstance(block, Block):
                yield from block.groups()

    def fuse(self) -> Model:
        """Fuse q, k and v, and gate and up, of each layer: their weights become adjacent slices of one
        storage, and `step` computes one matrix product for each group.

        Names, values and parameter objects stay, and no weight is held twice. `load` fuses on a GPU; on a CPU
        the file stays mapped. `to` keeps the fusion. `train` undoes it, since some trainers save slices of
        one storage as if they were one tensor. A copy of the model is not fused.
        """
        for group in self.groups():
            fused_weights.join(group)
        return self

    def quantize(self) -> Model:
        """Quantise the layers' weights in place to 8 bits (e4m3, a float32 scale for each row), for decoding.

        They take half the memory, and a pass over few tokens reads half as much; embedding, head and norms
        stay, and so do the dtypes of the arithmetic. Weights are quantised layer by layer, on their device:
        `models.load(path).quantize().to("cuda")` never has them in 16 bits on the GPU. A quantised model
        cannot be trained, written by `models.save`, or turned back; pickle, `copy.deepcopy` and `torch.save`
        keep it as it is.

        Raises ValueError, with the model unchanged, if a layer has an adapter, a hook or a mixture of
        experts, or a weight is not finite.
        """
        blocks = [block for block in self.blocks if isinstance(block, Block)]
        for block in blocks:
            block.check_quantizable()
        for block in blocks:
            block.quantize()
        return self.eval()

    @property
    def quantized(self) -> bool:
        return any(isinstance(module, Fp8Linear) for module in self.modules())

    def addresses(self) -> Sequence[int] | None:
        """The addresses of all weights; None if the model has been modified by hooks, adapters, other modules
        or other methods, so that passes cannot be recorded.
        """
        known = {
            Block, RMSNorm, nn.Linear, Fp8Linear, nn.Embedding, nn.ModuleList, nn.Module, type(self),
            experts.Router, experts.Experts, experts.SharedExpert,
        }  # fmt: skip
        parts = {"hidden", "step", "embedded", "run_layers", "final_norm", "head"}
        if not parts.isdisjoint(vars(self)):
            return None
        modules = all_modules(self)
        kinds = [type(module) for module in modules]
        if not known.issuperset(kinds) or not all(map(fused_weights.is_unmodified, modules, kinds)):
            return None
        tensors: list[Tensor | None] = []
        for module in modules:
            for held in (vars(module)["_parameters"], vars(module)["_buffers"]):
                if held:
                    tensors += held.values()
        return [tensor.data_ptr() for tensor in tensors if tensor is not None]

    @property
    def waits(self) -> bool:
        """Whether passes wait for the device, so that they cannot be recorded: see `experts.waits`."""
        sizes = self.shape.experts
        return sizes is not None and bool(sizes.layers) and experts.waits(sizes, self.embed.weight)

    @property
    def routed_together(self) -> int | None:
        """The length of the blocks, from position 0 on, whose tokens choose among the same experts; None:
        each token chooses for itself."""
        routing = self.shape.experts and self.shape.experts.routing
        return routing.block if isinstance(routing, BlockRouting) else None

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., width)."""
        # On a GPU `linear` was not compared with torch's product at a head's width.
        logits = fused_weights.apply(self.lm_head, hidden) if hidden.is_cpu else self.lm_head(hidden)
        return logits if self.shape.logit_scale == 1.0 else logits * self.shape.logit_scale

    def new_cache(
        self, pages: int, page_size: int, block_table: Tensor | None = None, *, kept: bool = True
    ) -> KVCache:
        """An empty cache of `pages` pages of `page_size` slots, in the model's dtype and on its device.

        block_table: (B, P) int64 on the CPU, see `KVCache`; default: a page for each sequence. kept: False:
        keys and values need not outlive a pass, so all layers share the slots.
        """
        s, page_size = self.shape, max(1, page_size)
        shape = (s.layers if kept else 1, 2, pages, s.kv_heads, page_size, s.head_dim)
        length = page_size * (1 if block_table is None else block_table.shape[1])
        slots = torch.zeros(shape, dtype=self.dtype, device=self.device)
        return KVCache(slots, self._rope_of(length), block_table, self._query_scale_of(length))

    def _rope_of(self, length: int) -> tuple[Tensor, Tensor]:
        """cos, sin (at least length, R / 2) float32, of the R dimensions of a head that are rotated."""
        table = self._rope  # not read again below: another thread may set a shorter table
        if table is None or len(table[0]) < length or table[0].device != self.device:
            rows = max(64, 2 ** (length - 1).bit_length()) if length else 64
            # A table made in inference mode could not be used by a later training pass.
            with torch.inference_mode(False), torch.no_grad():
                s = self.shape
                width = s.rotary_dim or s.head_dim
                table = rope.table(rows, width, s.rope_theta, s.rope_scaling, self.device)
            self._rope = table
        return table

    def _query_scale_of(self, length: int) -> Tensor | None:
        """(length,) float32 as `rope.QueryScaling.table`."""
        scaling = self.shape.query_scaling
        return None if scaling is None else scaling.table(length, self.device)

    def _together(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, ...]:
        """The argument (B * L,) of the `Router`, if tokens are routed by blocks."""
        if (size := self.routed_together) is None:
            return ()
        row, position = (torch.arange(n, device=input_ids.device) for n in input_ids.shape)
        row, position = torch.broadcast_tensors(row[:, None], position)
        real = torch.ones_like(row, dtype=torch.bool)
        if attention_mask is not None:
            real = attention_mask.to(input_ids.device, torch.bool)
        return (experts.together_in(row.flatten(), position.flatten(), real.flatten(), size),)

    def _visible(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor | None:
        """The mask of attention, (B or 1, 1, 1 or L, L) bool; None: none is needed."""
        earlier, position = None, torch.arange(input_ids.shape[1], device=input_ids.device)
        if self.block_length is not None:
            block = position // self.block_length
            earlier = (block[:, None] >= block)[None, None]
        if self.window is not None:
            known = input_ids != (-1 if self.mask_id is None else self.mask_id)
            upto = position[:, None] >= position
            earlier = known_first(known[:, :, None], known[:, None], upto)[:, None]
            if self.shift:
                earlier = runs_joined(~known)[:, None]
        if attention_mask is None:
            return earlier  # None for a causal model too: attention has an option for it
        check_tensor("attention_mask", attention_mask)
        if attention_mask.shape != input_ids.shape or attention_mask.is_floating_point():
            raise ValueError(
                f"attention_mask: expected bool or whole numbers {tuple(input_ids.shape)} as input_ids, "
                f"got {described(attention_mask)}"
            )
        visible = attention_mask.to(input_ids.device, torch.bool)
        on_cpu = visible.device.type == "cpu" and not torch.compiler.is_compiling()
        if on_cpu and visible.numel() and not bool((seen := visible.any(1)).all()):
            row = int(seen.int().argmin())
            raise ValueError(
                f"attention_mask: expected a visible position in every row, got none in row {row}"
            )
        visible = visible[:, None, None]
        if self.causal:
            earlier = position[:, None] >= position
        seen = visible if earlier is None else visible & earlier
        # Padding in front of a sequence sees itself, since some kernels give NaN to a row that sees nothing.
        return seen | (position[:, None] == position) if self.causal or self.window is not None else seen

    def _embed(self, input_ids: Tensor, ndim: int) -> Tensor:
        """Embeddings (B, L, width) or (N, width). Raises TypeError or ValueError as `hidden` does."""
        check_tensor("input_ids", input_ids)
        if input_ids.ndim != ndim or input_ids.dtype not in (torch.int64, torch.int32):
            wanted = "(B, L)" if ndim == 2 else "(N,)"
            raise ValueError(f"input_ids: expected int64 {wanted}, got {described(input_ids)}")
        # torch's own embedding refuses ids out of range; a user's may take -1 from its end.
        table = self.embed
        if (
            not fused_weights.is_unmodified(table, nn.Embedding)
            or len(table.weight) != self.shape.embedding_size
        ):
            self._check_range(input_ids)
        try:
            x: Tensor = self.embed(input_ids)
        except IndexError:
            self._check_range(input_ids)
            raise
        return x

    def _check_range(self, input_ids: Tensor) -> None:
        """Raise ValueError for an id out of range on the CPU, where a check needs no synchronisation."""
        on_cpu = input_ids.device.type == "cpu" and not torch.compiler.is_compiling()
        if on_cpu and input_ids.numel():
            size, (low, high) = self.shape.embedding_size, map(int, input_ids.aminmax())
            if low < 0 or high >= size:
                worst = low if low < 0 else high
                raise ValueError(f"input_ids: expected ids in [0, {size}), got {worst}")


def _without_tied_head(model: Model, state: MutableMapping[str, Any], prefix: str, _metadata: object) -> None:
    """Leave a tied head out of the state dict, as published checkpoints do; shards are gathered with it."""
    embed, head = (f"{prefix}{model.checkpoint_name(name)}.weight" for name in ("embed", "lm_head"))
    if model.shape.tied and embed in state and not model.sharded:
        state.pop(head, None)


def _with_tied_head(model: Model, state: MutableMapping[str, Any], prefix: str, *_unused: object) -> None:
    embed, head = (f"{prefix}{model.checkpoint_name(name)}.weight" for name in ("embed", "lm_head"))
    if model.shape.tied and embed in state:
        state[head] = state[embed]
