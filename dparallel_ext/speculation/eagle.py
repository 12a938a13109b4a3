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

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._C import draft_trees
from ..cache import AttentionMetadata, KVCache, Span
from ..decoding.sequence_settings import grouped
from ..models import Llama, Model, Qwen3, own_precision, rope
from ..models.attention import PagedAttention
from ..models.config import ModelConfig, config_ids
from ..models.fields import LAYERS, NO, VOCABULARY, WIDTH, Field, check_supported, read
from ..models.modules import Attend, Block, RMSNorm, Stream, norm_of_sum, shapes_only
from ..ops import row_topk
from ..packed import Packing, bits_of, floats_of, unpack
from .blocks import Chains, TrainedBlockDrafter
from .checkpoint import DraftCheckpoint, Origin, check_target
from .draft import Draft
from .drafter import EMBEDDING, DraftKey, Lane, Observation, RecordedSession, check_layers

KIND = "eagle3"
MOST = 8
"""The most guesses of a draft, unless the file says how many were trained."""
_LAYER = "model.layers.{}."
_FAMILIES: dict[Any, type[Model]] = {"llama": Llama, "qwen3": Qwen3}
"""The layers that a drafter may have, by `model_type`."""
_FORM = "speculators_model_type"
_TAPS = "eagle_aux_hidden_state_layer_ids"
_DEPTHS = dict.fromkeys(("num_depths", "para_depths"), Field(int, None, most=511))
_MASKS = ("pard_token", "ptd_token_id", "mask_token_id")
_WITHOUT = dict.fromkeys(("norm_before_fc", "fc_norm", "use_aux_norm", "norm_output"), False)
"""Options of some later drafters (EAGLE-3.1)."""


MARKS = (_FORM, "draft_vocab_size")
"""Keys of config.json that published drafters of these kinds have, some one, some the other."""


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
        form = config.get(_FORM)
        if form not in (None, "eagle3", "peagle"):
            raise ValueError(f"config: {_FORM}={form!r:.80} is not supported, only 'eagle3' and 'peagle'")
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


class EagleDrafter(TrainedBlockDrafter[EagleModel]):
    """A drafter of the kinds EAGLE-3 and P-EAGLE, see above. `load` reads one.

    Args:
        model: in evaluation mode and without gradients from now on.
        source: names the drafter in errors.
    """

    model_class = EagleModel
    options: EagleOptions

    def __repr__(self) -> str:
        kind = "EAGLE-3" if self.options.mask_id is None else "P-EAGLE"
        return f"{type(self).__name__}({kind}, most={self.most})"

    def check(self, model: Model) -> None:
        """Raise ValueError for a model of another vocabulary or width, or without a tapped layer."""
        sizes = {"vocabulary": self.options.shape.embedding_size, "width": self.options.target_width}
        check_target(self.source, Origin(), model, **sizes)
        self.options.taps_of(model.shape.layers)

    def check_trees(self) -> None:
        if self.options.mask_id is None:
            raise ValueError(f"drafter: {self.source} is EAGLE-3, expected P-EAGLE for trees")

    def session(self, model: Model, kv_cache: KVCache, lanes: int, *, graphs: bool = True) -> RecordedSession:
        return _Session(self.fused(model), self.drafting, model, kv_cache, lanes, graphs)


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


class _Session(RecordedSession):
    """Keeps features under the block table of the target's cache, and keys and values of pairs by lane.

    Args:
        layers: the drafter's weights.
        drafting: makes drafts of the guesses.
    """

    def __init__(
        self, layers: EagleModel, drafting: Chains, model: Model, kv_cache: KVCache, lanes: int, graphs: bool
    ) -> None:
        self._layers, self._options, self._drafts = layers, layers.options, drafting
        super().__init__(layers, model, graphs)
        self.taps = self._options.taps_of(model.shape.layers)
        s, length = self._options.shape, kv_cache.length
        zeros = functools.partial(torch.zeros, dtype=model.dtype, device=model.device)
        self._table, self._page_size = kv_cache.block_table, kv_cache.page_size
        self._nowhere = kv_cache.slots.shape[2] * self._page_size
        """The row of `features` for tokens without a slot; the mask's is behind it."""
        self.features = zeros((self._nowhere + 2, s.width))
        slots = zeros((s.layers, 2, lanes, s.kv_heads, length, s.head_dim))
        table = rope.table(length, s.head_dim, s.rope_theta, s.rope_scaling, model.device)
        self.kv_cache = KVCache(slots, table)
        self._computed = [0] * lanes
        """For each lane, the pairs of known tokens whose keys and values are there."""
        self.size = self.features.nbytes + slots.nbytes
        self.begin()

    def begin(self) -> None:
        if self._layers.mask_hidden is not None:
            self.features[-1] = self._layers.fc(self._layers.mask_hidden)

    def reset(self, lane: int) -> None:
        super().reset(lane)
        self._computed[lane] = 0

    def observe(self, seen: Observation) -> None:
        slots = seen.metadata.slot_mapping
        self._write(slots, self._layers.fc(torch.cat(seen.taps, -1)))

    def moved(self, source: Tensor, target: Tensor) -> None:
        self._write(target.flatten(), self.features[source.flatten().clamp(min=0)])

    def _write(self, slots: Tensor, features: Tensor) -> None:
        self.features.index_copy_(0, slots.masked_fill(slots < 0, self._nowhere), features)

    def propose(self, lanes: Sequence[Lane], sizes: Sequence[int]) -> list[Draft]:
        # A text of one token has no feature yet, and so no pair.
        sizes = [size if len(lane.tokens) > 1 else 0 for lane, size in zip(lanes, sizes, strict=True)]
        counts = [min(size, self._options.block - 1) for size in sizes]
        going = [(lane, count) for lane, count in zip(lanes, counts, strict=True) if count]
        guesses, scores = self._guesses(*zip(*going, strict=True)) if going else ([], [])
        trees = draft_trees(scores, self._drafts.width, counts, sizes)
        return [self._drafts.draft(tree, guesses) for tree in trees]

    def _guesses(self, lanes: Sequence[Lane], counts: Sequence[int]) -> tuple[list[int], list[float]]:
        """The tokens of each lane's `counts` rows, `width` of each, and their log-probabilities."""
        mask_id = self._options.mask_id
        packing, (numbers, groups) = Packing(), grouped(lane.sampling.greedy for lane in lanes)
        spans: list[Span] = []
        ids: list[int] = []
        rows: list[int] = []
        positions: list[int] = []  # of features; the mask's has none
        source: list[int] = []
        for lane, count in zip(lanes, counts, strict=True):
            known = len(lane.tokens) - 1
            # The last pair is computed already where a pass has raised, but the draft needs its row.
            start = min(self._computed[lane.lane], known - 1)
            masks = 0 if mask_id is None else count - 1
            spans.append(Span(lane.lane, start, known + masks, known + masks))
            ids += [*lane.tokens[start + 1 :].tolist(), *[mask_id or 0] * masks]
            rows += [lane.lane] * (known - start + masks)
            positions += [*range(start, known), *[-1] * masks]
            source += range(len(ids) - 1 - masks, len(ids))
        at, size = torch.tensor(positions, device="cpu"), self._page_size
        slots = self._table[rows, at // size] * size + at % size
        padded, *bounds = self.kv_cache.put(packing, spans, self._pad_to)
        about = len(packing.shapes)
        packing.padded(ids, 0, padded)
        packing.padded(slots.masked_fill_(at < 0, self._nowhere + 1).tolist(), 0, padded)
        end = self._put_sources(packing, source)
        if mask_id is None:
            packing.padded(numbers, -1, end)
            order = self._put_steps(packing, lanes, counts, numbers, end, bounds)
        else:
            repeated = [number for number, count in zip(numbers, counts, strict=True) for _ in range(count)]
            packing.padded(repeated, -1, end)
            order = list(range(len(source)))
        best = self._run_pass(packing, (about, *bounds), groups)
        for lane in lanes:
            self._computed[lane.lane] = len(lane.tokens) - 1
        tokens, bits = best.cpu()[:, order].flatten(1)
        return tokens.tolist(), floats_of(bits).tolist()

    def _put_steps(
        self,
        packing: Packing,
        lanes: Sequence[Lane],
        counts: Sequence[int],
        groups: Sequence[int],
        end: int,
        bounds: list[int],
    ) -> list[int]:
        """Pack EAGLE-3's passes behind the first, each over a pair of the lanes that have a guess to go, and
        add their `max_q_len` and `max_kv_len` to `bounds`.

        groups: the number of each lane's. end: rows of the result of the first pass. Returns the row of each
        guess, lane by lane.
        """
        rows = [[row] for row in range(len(lanes))]
        going = list(range(len(lanes)))
        for step in range(1, max(counts)):
            before, going = going, [i for i in going if counts[i] > step]
            at = [len(lanes[i].tokens) - 2 + step for i in going]
            spans = [Span(lanes[i].lane, pair, pair + 1, pair + 1) for i, pair in zip(going, at, strict=True)]
            padded, *bound = self.kv_cache.put(packing, spans, self._pad_to)
            bounds += bound
            packing.padded([before.index(i) for i in going], 0, padded)
            packing.padded([groups[i] for i in going], -1, padded)
            for row, i in enumerate(going, end):
                rows[i].append(row)
            end += padded
        return [row for of_lane in rows for row in of_lane]

    def _compute(self, key: DraftKey, inputs: Tensor) -> Tensor:
        """(2, M, width) int64: the guesses of each row that is read, pass after pass, and the bits of their
        log-probabilities in float32, as in `blocks`."""
        tensors, layers, results = unpack(inputs, key.shapes), self._layers, []
        about, *all_bounds = key.numbers  # `about`: the number of tensors of a pass's metadata
        embed = self.model.embed if layers.embed_tokens is None else layers.embed_tokens
        targets = layers.d2t + torch.arange(len(layers.d2t), device=inputs.device)
        suppressed = key.suppressed(self.model.shape.embedding_size)
        never = {number: out[targets] for number, out in suppressed.items()}
        ids = stream = inputs
        for step, bounds in enumerate(zip(all_bounds[::2], all_bounds[1::2], strict=True)):
            metadata = AttentionMetadata(*bounds, *tensors[:about], causal=True)
            if step:
                keep, group, *tensors = tensors[about:]
                ids, feature = ids[keep, 0], stream[keep]
            else:
                ids, place, source, group, *tensors = tensors[about:]
                feature = self.features[place]
            with own_precision(self.model, self.model.device):
                stream, y = layers.rows(embed(ids), feature, PagedAttention(self.kv_cache, metadata))
                if not step:
                    stream, y = stream[source], y[source]
                logits = layers.lm_head(y)
            for number, tokens in never.items():
                logits.masked_fill_((group == number)[:, None] & tokens, -torch.inf)
            best = row_topk(logits, self._drafts.width, check=False)
            ids = targets[best.token.clamp(min=0)]  # a row without a choice has none behind it either
            results.append(torch.stack((ids, bits_of(best.logprob))))
        return torch.cat(results, 1)
