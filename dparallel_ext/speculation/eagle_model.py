"""The weights of drafters of the kinds EAGLE-3 and P-EAGLE, and the options in their files; see `eagle`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..models import Llama, Model, Qwen3
from ..models.attention import PagedAttention
from ..models.config import ModelConfig, config_ids
from ..models.fields import LAYERS, NO, VOCABULARY, WIDTH, Field, check_supported, read
from ..models.modules import Attend, Block, RMSNorm, Stream, norm_of_sum
from .drafter import EMBEDDING, check_layers

MOST = 8
"""The most guesses of a draft, unless the file says how many were trained."""
_LAYER = "model.layers.{}."
_FAMILIES: dict[Any, type[Model]] = {"llama": Llama, "qwen3": Qwen3}
"""The layers that a drafter may have, by `model_type`."""
FORM = "speculators_model_type"
_TAPS = "eagle_aux_hidden_state_layer_ids"
_DEPTHS = dict.fromkeys(("num_depths", "para_depths"), Field(int, None, most=511))
_MASKS = ("pard_token", "ptd_token_id", "mask_token_id")
_WITHOUT = dict.fromkeys(("norm_before_fc", "fc_norm", "use_aux_norm", "norm_output"), False)
"""Options of some later drafters (EAGLE-3.1)."""


class EagleOptions(NamedTuple):
    """The options in a drafter's config.json and in the names of its tensors."""

    shape: ModelConfig
    """Of the drafter, with the target's vocabulary."""
    vocabulary: int
    """Tokens that it can guess."""
    taps: tuple[int, ...] | None
    """Layers of the target, ascending, counted from 0; None: those of `taps_of`."""
    block: int
    """The most guesses of a draft, and the root."""
    mask_id: int | None
    """P-EAGLE's mask token; None: the drafter is EAGLE-3."""
    target_width: int
    embeds: bool
    """Whether it has an embedding of its own."""
    norm_before_residual: bool
    """Whether the first layer adds to the feature's norm, and not to the feature."""

    @classmethod
    def of(cls, config: Mapping[str, Any], names: Collection[str] = ()) -> EagleOptions:
        """Read the content of a config.json in a published form: flat (SafeAILab, SpecForge, ModelOpt, NeMo),
        or with a key for the layers (speculators). names: of the tensors.

        Raises ValueError naming the key that is missing, or whose value is not supported.
        """
        form = config.get(FORM)
        if form not in (None, "eagle3", "peagle"):
            raise ValueError(f"config: {FORM}={form!r:.80} is not supported, only 'eagle3' and 'peagle'")
        key = "transformer_layer_config"
        inner = config if form is None else read(config, {key: Field(dict)})[key]
        family = inner.get("model_type", "llama")
        if not isinstance(family, str) or family not in _FAMILIES:
            raise ValueError(f"config: model_type={family!r:.80} is not supported, only {list(_FAMILIES)}")
        shape = _FAMILIES[family].shape_of(inner)
        fields = {
            # vLLM and speculators have different defaults for the latter's files, which do name it.
            "norm_before_residual": NO if form is None else Field(bool),
            "draft_vocab_size": replace(VOCABULARY, default=shape.embedding_size),
            "target_hidden_size": replace(WIDTH, default=shape.width),
            "parallel_drafting": NO,
            "eagle_config": Field(dict, {}),
            **_DEPTHS,
        }
        c = read(config, fields)
        check_supported(config, _WITHOUT)
        check_supported(c["eagle_config"], {"use_aux_hidden_state": True})
        masks = [token for name in _MASKS for token in config_ids(config, name, shape.embedding_size)]
        parallel = "mask_hidden" in names or form == "peagle" or bool(c["parallel_drafting"])
        if parallel and len(set(masks)) != 1:
            raise ValueError(
                f"config: expected the mask's id as one of {', '.join(_MASKS)}, got {masks or 'none'}"
            )
        depths = {c[name] for name in _DEPTHS} - {None}
        if len(depths) > 1:
            raise ValueError(f"config: expected {' and '.join(_DEPTHS)} alike, got {sorted(depths)}")
        return cls(
            shape=shape,
            vocabulary=c["draft_vocab_size"],
            taps=_taps(config, c["eagle_config"]),
            block=1 + max(depths, default=MOST),
            mask_id=masks[0] if parallel else None,
            target_width=c["target_hidden_size"],
            embeds="embed_tokens.weight" in names or c["target_hidden_size"] != shape.width,
            norm_before_residual=bool(c["norm_before_residual"]),
        )

    def taps_of(self, target_layers: int) -> tuple[int, ...]:
        """The target's layers to tap. Raises ValueError for a target that does not have them."""
        taps = self.taps
        if taps is None:  # named by their outputs; the published codes count the inputs 2, n // 2 and n - 3
            taps = 1, target_layers // 2 - 1, target_layers - 4
        check_layers(f"drafter: {_TAPS}", taps, EMBEDDING, target_layers)
        return taps


def _taps(config: Mapping[str, Any], inner: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The tapped layers that a config.json names. One number means two layers: at the top, where vLLM and
    speculators have their key, the layer whose input is tapped, and 0 is the embedding; in `eagle_config`,
    where SpecForge and ModelOpt have theirs (SGLang adds 1), the layer whose output is."""
    for where, of, shift in (("", config, 1), ("eagle_config: ", inner, 0)):
        ids = of.get(_TAPS)
        if ids is not None and ids != []:
            check_layers(f"config: {where}{_TAPS}", ids, EMBEDDING + shift, int(LAYERS.most))
            return tuple(id_ - shift for id_ in ids)
    return None


class FirstLayer(Block):
    """A layer of pairs: its queries, keys and values are of twice its width."""

    def __init__(self, shape: ModelConfig, names: Mapping[str, str], norm_before_residual: bool) -> None:
        super().__init__(shape, {**names, "hidden_norm": "hidden_norm"})
        s, self.norm_before_residual = shape, norm_before_residual
        self.hidden_norm = RMSNorm(s)
        self.q = nn.Linear(2 * s.width, s.heads * s.head_dim, bias=s.qkv_bias)
        self.k = nn.Linear(2 * s.width, s.kv_heads * s.head_dim, bias=s.qkv_bias)
        self.v = nn.Linear(2 * s.width, s.kv_heads * s.head_dim, bias=s.qkv_bias)

    def pairs(self, embedded: Tensor, feature: Tensor, attend: Attend) -> Stream:
        """The stream after the layer, of embeddings and features (..., width)."""
        normed = self.hidden_norm(feature)
        y = torch.cat((self.norm1(embedded), normed), -1)
        return self.run_normed(normed if self.norm_before_residual else feature, y, attend)


class EagleModel(nn.Module):
    """The weights, named as in the published checkpoints, with layers.0 for `midlayer`."""

    d2t: Tensor
    """(vocabulary,) int64: what to add to a token of its own vocabulary for the target's."""

    def __init__(self, config: Mapping[str, Any], options: EagleOptions) -> None:
        super().__init__()
        self.config, self.options, s = dict(config), options, options.shape
        of = (Qwen3 if s.qk_norm else Llama).NAMES
        names = {ours: name.removeprefix(_LAYER) for ours, name in of.items() if name.startswith(_LAYER)}
        first: list[Block] = [FirstLayer(s, names, options.norm_before_residual)]
        self.layers = nn.ModuleList(first + [Block(s, names) for _ in range(s.layers - 1)])
        taps = 3 if options.taps is None else len(options.taps)
        self.fc = nn.Linear(taps * options.target_width, s.width, bias=False)
        self.norm = RMSNorm(s)
        self.lm_head = nn.Linear(s.width, options.vocabulary, bias=False)
        self.embed_tokens = nn.Embedding(s.embedding_size, s.width) if options.embeds else None
        masked = options.mask_id is not None
        self.mask_hidden = nn.Parameter(torch.zeros(self.fc.in_features)) if masked else None
        self.register_buffer("d2t", torch.zeros(options.vocabulary, dtype=torch.int64))

    def rows(self, embedded: Tensor, feature: Tensor, attention: PagedAttention) -> tuple[Tensor, Tensor]:
        """The output of the layers and its norm (N, width), of packed pairs (N, width)."""
        layers: Any = self.layers
        stream = layers[0].pairs(embedded, feature, attention.layer(0))
        for number, block in enumerate(layers[1:], 1):
            stream = block.run(stream, attention.layer(number))
        return norm_of_sum(self.norm, stream)
