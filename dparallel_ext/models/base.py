"""One transformer for every family: RMSNorm, RoPE, grouped-query attention, SwiGLU.

A family is data: how its config.json reads (`ModelConfig`), and what its checkpoint calls a module (`NAMES`).
Torch, and all that works on the names of modules and parameters (adapters, sharders, optimizers), knows the
modules by the checkpoint's names; the code here calls them by short names, the same in every family.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import kept
from ..cache import AttentionMetadata, KVCache, Span
from . import fused_weights, rope
from .attention import PagedAttention
from .config import Config, ModelConfig, Output, token_ids
from .fp8 import Fp8Linear
from .modules import DROPOUT, Block, Named, RMSNorm, Stream, Taps, all_modules, norm_of_sum, rotate


class Model(Named):
    """A language model: of masked diffusion, or autoregressive where the family is `causal`.

    Every position sees every other; or, where the family is block-causal, those up to the end of its own
    block; or, where it is causal, those up to itself. Called on input_ids (B, L) int64 it returns an object
    with `.logits` (B, L, V), raw, as the Hugging Face model of the same checkpoint does (V: rows of the
    embedding). `hidden` and `head` are its two halves; `step` is `hidden` for decoding, of chosen positions
    and against a cache. Built from a config.json's content, it has fresh weights to train, initialised as
    torch does; `load` and `wrap` fill it with given ones.

    Raises ValueError naming the config key that is missing or asks for what is not implemented.
    """

    NAMES: ClassVar[Mapping[str, str]]
    """Our name of a module -> the checkpoint's; `{}` stands for the layer."""
    shift: ClassVar[bool] = False
    """The logits for position p are produced at position max(p - 1, 0)."""
    causal: ClassVar[bool] = False
    """Position p sees the positions up to p, and its logits are for position p + 1."""
    strict: ClassVar[frozenset[str]] = frozenset()
    """The selectors by which this family's published decoder commits beyond the threshold, not at it."""
    sub_block_length: ClassVar[int | None] = None
    """The part of a block that this family's published decoder fills at a time; None: all of it."""
    published_mask_id: ClassVar[int | None] = None
    """The mask of this family's released checkpoints, which counts where a config names none."""
    block_length: int | None
    """Block-causal families: the length of the blocks, counted from position 0. Else None."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        layer = next(name.partition("{}.")[0] for name in self.NAMES.values() if "{}" in name)
        whole = {ours: theirs for ours, theirs in self.NAMES.items() if "{}" not in theirs}
        super().__init__({**whole, "blocks": layer.removesuffix(".")})
        self.config = Config(config)
        s = self.shape = self.shape_of(config)
        self.vocab_size, self.block_length = s.vocab_size, s.block_length
        published = self.released_mask_id(s.embedding_size)
        if config.get("mask_token_id") is None and published is not None:
            self.config["mask_token_id"] = published
        self.mask_id = next(iter(token_ids(self.config, "mask_token_id", s.embedding_size)), None)
        self.eos_ids = token_ids(self.config, "eos_token_id", s.embedding_size)
        self.eos_id = next(iter(self.eos_ids), None)
        self.embed = nn.Embedding(s.embedding_size, s.width)
        names = {o: t.removeprefix(layer + "{}.") for o, t in self.NAMES.items() if "{}" in t}
        self.blocks = nn.ModuleList(Block(s, names) for _ in range(s.layers))
        self.norm = RMSNorm(s)
        self.lm_head = nn.Linear(s.width, s.embedding_size, bias=s.head_bias and not s.tied)
        self.tie()
        self.checkpointing: dict[str, Any] | None = None
        self._rope: tuple[Tensor, Tensor] | None = None
        self.register_state_dict_post_hook(_without_tied_head)
        self.register_load_state_dict_pre_hook(_with_tied_head)

    @staticmethod
    def read_config(config: Mapping[str, Any]) -> ModelConfig:
        raise NotImplementedError

    @classmethod
    def shape_of(cls, config: Mapping[str, Any]) -> ModelConfig:
        """What the config.json says of the transformer. Raises ValueError as `Model` does."""
        try:
            shape = cls.read_config(config)
        except KeyError as error:
            raise ValueError(f"config: {error} is missing") from error
        token_ids(config, "eos_token_id", shape.embedding_size)
        return shape

    @classmethod
    def released_mask_id(cls, rows: int | None) -> int | None:
        """The published mask, where the vocabulary may be that of the releases: the id is among its last.

        rows: of the embedding; None: not known.
        """
        published = cls.published_mask_id
        return published if published is None or rows is None or 0 < rows - published <= 512 else None

    def train(self, mode: bool = True) -> Model:
        dropped = {key: self.config[key] for key in DROPOUT if self.config.get(key)}
        if mode and dropped:
            warnings.warn(f"config: {dropped} is not followed: there is no dropout here", stacklevel=2)
        if mode:
            kept.drop(self)
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Model:
        kept.drop(self)
        super()._apply(fn, recurse)
        return self

    def tie(self) -> None:
        """Let the head be the embedding, where the config says so."""
        if self.shape.tied:
            self.lm_head.weight = self.embed.weight

    @classmethod
    def checkpoint_name(cls, name: str) -> str:
        """The checkpoint's name of the module that is called "blocks.0.q" or "norm" here."""
        ours, layer, *_ = (*reversed(name.removeprefix("blocks.").split(".")), "")
        return cls.NAMES[ours].format(layer)

    @property
    def sharded(self) -> bool:
        """Whether FSDP2 or the like has made DTensors of the parameters."""
        return any(hasattr(parameter, "placements") for parameter in self.parameters())

    def get_input_embeddings(self) -> nn.Module:
        """By this name transformers and PEFT find the embedding, and by the next one the head."""
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def prepare_inputs_for_generation(self, input_ids: Tensor, **_: Any) -> dict[str, Tensor]:
        """PEFT keeps this of a model for causal language modelling; `dparallel_ext.decode` generates."""
        return {"input_ids": input_ids}

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.weight.dtype

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **neutral: Any) -> Output:
        """neutral: what PEFT passes on to every model, `labels` or `output_attentions`; None, or False."""
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
        """Hidden states (B, L, width) after the final norm, of whole sequences input_ids (B, L).

        attention_mask (B, L), bool or whole numbers, is 0 where a position is padding, on either side, that
        none shall see. Positions are counted from the first column, padding or not: rotary embeddings tell
        only how far apart two are. taps: the streams (B, L, width) that are wanted too.

        Raises TypeError or ValueError for ids of a wrong type, shape or (on the CPU, where looking
        costs no synchronisation) range.
        """
        self._check(input_ids, 2)
        s, visible = self.shape, self._visible(input_ids, attention_mask)
        triangle = self.causal and visible is None
        x = self.embed(input_ids)
        rope_dtype = torch.promote_types(x.dtype, torch.float32) if s.rope_in_float32 else x.dtype
        cos, sin = (t[: x.shape[1], None].to(rope_dtype) for t in self._rope_of(x.shape[1]))

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k = (rotate(t.to(rope_dtype), cos, sin).to(v.dtype) for t in (q, k))
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            grouped = s.kv_heads != s.heads
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=visible, is_causal=triangle, enable_gqa=grouped
            )
            return y.transpose(1, 2)

        checkpointing = self.checkpointing if self.training else None
        if checkpointing and checkpointing["use_reentrant"] and torch.is_grad_enabled():
            # Such a checkpoint yields no gradient unless an input wants one; under adapters none does.
            x = x if x.requires_grad else x.detach().requires_grad_()
        if taps is not None:
            taps.take(-1, Stream(x))
        for layer, block in enumerate(self.blocks):
            if checkpointing is not None:
                x = checkpoint(block, x, attend, **checkpointing)
            else:
                x = block(x, attend)
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

        Their keys and values are written to the cache in place, and attention reads it, so it belongs under
        `torch.no_grad` or `inference_mode`. A pass that stops on its way, or begins there, is made of the
        three parts of this one: `embedded`, `run_layers`, `final_norm`.

        taps: the streams (N, width) that are wanted too.

        Raises TypeError or ValueError as `hidden` does.
        """
        stream = self.embedded(input_ids)
        if len(input_ids) != len(metadata.positions):
            raise ValueError(
                f"input_ids: expected ({len(metadata.positions)},), got {tuple(input_ids.shape)}"
            )
        return self.final_norm(self.run_layers(stream, kv_cache, metadata, taps=taps))

    def embedded(self, input_ids: Tensor) -> Stream:
        """What the first layer gets for input_ids (N,). Raises TypeError or ValueError as `hidden` does."""
        self._check(input_ids, 1)
        return Stream(self.embed(input_ids))

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
        """The stream of the packed tokens of `metadata` behind layers [start, stop), from the one before.

        Only these layers' keys and values are written. stop: None, the last layer.
        """
        attention = PagedAttention(kv_cache, metadata)
        if taps is not None and start == 0:
            taps.take(-1, stream)
        for layer in range(start, len(self.blocks) if stop is None else stop):
            block, attend = self.blocks[layer], attention.layer(layer)
            if fused_weights.is_unmodified(block, Block):
                stream = block.layers(stream, attend)
            else:
                stream = Stream(block(stream.sum, attend))
            if taps is not None:
                taps.take(layer, stream)
        return stream

    def final_norm(self, stream: Stream) -> Tensor:
        """(N, width) of what `head` makes logits."""
        return norm_of_sum(self.norm, stream)[1]

    def spans(
        self, row: int, start: int, end: int, length: int, block_length: int | None = None
    ) -> list[Span]:
        """Positions [start, end) of sequence `row`, which has `length`, with what each may see.

        Block-causal models see by blocks of `block_length`, by default their own. Of a causal model it is one
        span that sees [0, end), whose positions see up to themselves.
        """
        if self.causal:
            return [Span(row, start, end, end)] if start < end else []
        if self.block_length is None:
            return [Span(row, start, end, length)] if start < end else []
        size = block_length or self.block_length
        cuts = [start, *range((start // size + 1) * size, end, size), end]
        return [
            Span(row, a, b, min((a // size + 1) * size, length)) for a, b in itertools.pairwise(cuts) if a < b
        ]

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        """Keep only each layer's input in training and compute the rest again, as transformers' models do.

        The keywords are those of `torch.utils.checkpoint.checkpoint`.
        """
        self.checkpointing = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}

    def gradient_checkpointing_disable(self) -> None:
        self.checkpointing = None

    @property
    def is_gradient_checkpointing(self) -> bool:
        return self.checkpointing is not None

    def enable_input_require_grads(self) -> None:
        """Does nothing: `hidden` lets the layers' input require a gradient where a checkpoint needs it."""

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """The same by the name that transformers 5 calls; every layer, without offloading."""
        if every_n_layers != 1 or offload:
            raise ValueError(
                "activation_checkpointing: expected every_n_layers=1 and offload=False, "
                f"got {every_n_layers} and {offload}"
            )
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs)

    def groups(self) -> Iterator[list[nn.Parameter]]:
        """Those of every layer, see `Block.groups`."""
        for block in self.blocks:
            if isinstance(block, Block):
                yield from block.groups()

    def fuse(self) -> Model:
        """Lay q, k and v, and gate and up, of each layer side by side: `step` then multiplies once by them.

        No name, value or parameter object changes, and no weight is held twice. `load` does this on a GPU
        (on a CPU the file stays mapped). `to` keeps it; `train` undoes it, since some that save a model in
        training take slices of one storage for copies of one tensor; a copy of the model is without it until
        it is asked again.
        """
        for group in self.groups():
            fused_weights.join(group)
        return self

    def quantize(self) -> Model:
        """Keep the layers' weights in 8 bits (e4m3, a float32 scale for each of their rows), to decode with.

        Half the memory, and a pass over few tokens reads half as much; embedding, head and norms stay as
        they are, and so does the arithmetic. In place, layer by layer, where the weights lie:
        `models.load(path).quantize().to("cuda")` never has them in 16 bits on the GPU. It cannot be trained,
        saved, or undone.

        Raises ValueError where an adapter or a hook stands among the layers, or a weight is not finite; the
        model is then as it was.
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
        """Where the weights lie; None where calling the model does more than the code here says: hooks,
        adapters, modules or methods in the place of its own.
        """
        own = {
            Block, RMSNorm, nn.Linear, Fp8Linear, nn.Embedding, nn.ModuleList, nn.Module, type(self)
        }  # fmt: skip
        parts = {"hidden", "step", "embedded", "run_layers", "final_norm", "head"}
        if not parts.isdisjoint(vars(self)):
            return None
        modules = all_modules(self)
        kinds = [type(module) for module in modules]
        if not own.issuperset(kinds) or not all(map(fused_weights.is_unmodified, modules, kinds)):
            return None
        tensors: list[Tensor | None] = []
        for module in modules:
            for held in (vars(module)["_parameters"], vars(module)["_buffers"]):
                if held:
                    tensors += held.values()
        return [tensor.data_ptr() for tensor in tensors if tensor is not None]

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., width)."""
        logits = self.lm_head(hidden)
        return logits if self.shape.logit_scale == 1.0 else logits * self.shape.logit_scale

    def new_cache(
        self, pages: int, page_size: int, block_table: Tensor | None = None, *, kept: bool = True
    ) -> KVCache:
        """An empty cache of so many pages of slots; not `kept`: for one pass alone.

        block_table: (B, P) int64 on the CPU, see `KVCache`; default: a page for each sequence.
        """
        s, page_size = self.shape, max(1, page_size)
        shape = (s.layers if kept else 1, 2, pages, s.kv_heads, page_size, s.head_dim)
        rope = self._rope_of(page_size * (1 if block_table is None else block_table.shape[1]))
        return KVCache(torch.zeros(shape, dtype=self.dtype, device=self.device), rope, block_table)

    def _rope_of(self, length: int) -> tuple[Tensor, Tensor]:
        """cos, sin (at least length, head_dim / 2) float32."""
        if self._rope is None or len(self._rope[0]) < length or self._rope[0].device != self.device:
            rows = max(64, 2 ** (length - 1).bit_length()) if length else 64
            # An inference tensor, kept, would break a later training pass.
            with torch.inference_mode(False), torch.no_grad():
                s = self.shape
                self._rope = rope.table(rows, s.head_dim, s.rope_theta, s.rope_scaling, self.device)
        return self._rope

    def _visible(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor | None:
        """What attention takes for a mask, (B or 1, 1, 1 or L, L) bool, or None."""
        earlier, position = None, torch.arange(input_ids.shape[1], device=input_ids.device)
        if self.block_length is not None:
            block = position // self.block_length
            earlier = (block[:, None] >= block)[None, None]
        if attention_mask is None:
            return earlier  # None of a causal model too: attention needs no mask to leave out what is later
        if attention_mask.shape != input_ids.shape or attention_mask.is_floating_point():
            raise ValueError(
                f"attention_mask: expected bool or whole numbers {tuple(input_ids.shape)} as input_ids, "
                f"got {attention_mask.dtype} {tuple(attention_mask.shape)}"
            )
        visible = attention_mask.to(torch.bool)
        on_cpu = visible.device.type == "cpu" and not torch.compiler.is_compiling()
        if on_cpu and visible.numel() and not bool(visible.any(1).all()):
            raise ValueError("attention_mask: expected a visible position in every row")
        visible = visible[:, None, None]
        if self.causal:
            # Padding in front of a sequence sees itself: for a row that sees nothing some kernels give NaN.
            return visible & (position[:, None] >= position) | (position[:, None] == position)
        return visible if earlier is None else visible & earlier

    def _check(self, input_ids: Tensor, ndim: int) -> None:
        if not isinstance(input_ids, Tensor):
            raise TypeError(f"input_ids: expected a tensor, got {type(input_ids).__name__}")
        if input_ids.ndim != ndim or input_ids.dtype not in (torch.int64, torch.int32):
            wanted = "(B, L)" if ndim == 2 else "(N,)"
            raise ValueError(
                f"input_ids: expected int64 {wanted}, got {input_ids.dtype} {tuple(input_ids.shape)}"
            )
        on_cpu = input_ids.device.type == "cpu" and not torch.compiler.is_compiling()
        if on_cpu and input_ids.numel():
            low, high = (int(x) for x in input_ids.aminmax())
            if low < 0 or high >= self.shape.embedding_size:
                worst = low if low < 0 else high
                raise ValueError(f"input_ids: expected ids in [0, {self.shape.embedding_size}), got {worst}")


def _without_tied_head(model: Model, state: MutableMapping[str, Any], prefix: str, _metadata: object) -> None:
    """Published checkpoints do not repeat a tied head; torch's gathering of shards wants every name."""
    embed, head = (f"{prefix}{model.checkpoint_name(name)}.weight" for name in ("embed", "lm_head"))
    if model.shape.tied and embed in state and not model.sharded:
        state.pop(head, None)


def _with_tied_head(model: Model, state: MutableMapping[str, Any], prefix: str, *_unused: object) -> None:
    embed, head = (f"{prefix}{model.checkpoint_name(name)}.weight" for name in ("embed", "lm_head"))
    if model.shape.tied and embed in state:
        state[head] = state[embed]
