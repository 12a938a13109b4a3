"""AdaDecode: the model's own first layers draft, and the verify pass goes on where they stopped.

Source: AdaDecode, arXiv 2506.03700.

    head      after l layers: logits = lm_head(norm(T h)), with h the stream there, norm and lm_head the
              model's, and T a matrix (width, width), trained by KL towards the whole model's distribution
    draft     a token runs through layers [0, l). If max p > gamma, the next token is drafted, and runs too
    queue     the streams after layer l of all tokens that have run so far
    verify    once a head is not sure, or the draft has the requested length, or ends the text, the queue runs
              through layers [l, L) in one pass, and the model's choices there are compared with the draft

The draft writes keys and values of layers [0, l) into the model's own cache, and the verify pass those of
[l, L), so each layer computes each row once. A token that replaces a refused one overwrites its keys. With
several heads, a token that one head is not sure of goes on to the next head, with the tokens before it that
have not been there yet; the first sure head wins.

It differs from the paper in two ways. The model's norm is between T and the head (the paper has
lm_head(T h)), so that with T the identity a head starts out reading the stream as the model reads its last
one, and it learns more. And the model's own choices are compared (sample matching) in place of rejection
sampling, so the text is that of plain decoding at every temperature. Above 0, a head draws with the model's
noise at the same position, so where the two distributions are close, the choices mostly agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..arguments import instance, number, whole
from ..cache import AttentionMetadata, KVCache, Span
from ..decoding.sequence_settings import grouped
from ..models import Model, Stream, own_precision
from ..models.fields import LAYERS, VOCABULARY, WIDTH, Field, read
from ..models.modules import shapes_only
from ..ops import row_stats
from ..packed import Packing, unpack
from .checkpoint import DraftCheckpoint, Origin, check_target, write_checkpoint
from .draft import Draft
from .drafter import DraftKey, Lane, Placed, RecordedSession, check_layers

KIND = "adadecode"
_KEY = "adadecode_config"
_GAMMA = Field(float, 0.85, least=0, most=1)
_MOST = Field(int, 16, most=512)


class AdaDecodeOptions(NamedTuple):
    """The content of a drafter's config.json."""

    width: int
    vocabulary: int
    target_layers: int
    layers: tuple[int, ...]
    """The numbers of layers after which there are heads, ascending."""
    gamma: float
    most: int
    origin: Origin

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> AdaDecodeOptions:
        """Raises ValueError naming the key that is missing or does not fit."""
        sizes = read(config, {"hidden_size": WIDTH, "vocab_size": VOCABULARY, "num_target_layers": LAYERS})
        inner = read(read(config, {_KEY: Field(dict)})[_KEY], {"gamma": _GAMMA, "most": _MOST}, _KEY)
        layers = config[_KEY].get("exit_layers")
        check_layers(f"config: {_KEY}: exit_layers", layers, 1, sizes["num_target_layers"])
        return cls(
            width=sizes["hidden_size"],
            vocabulary=sizes["vocab_size"],
            target_layers=sizes["num_target_layers"],
            layers=tuple(layers),
            gamma=inner["gamma"],
            most=inner["most"],
            origin=Origin.of(config),
        )

    @property
    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        return {
            "architectures": ["AdaDecode"],
            "hidden_size": self.width,
            "vocab_size": self.vocabulary,
            "num_target_layers": self.target_layers,
            _KEY: {"exit_layers": list(self.layers), "gamma": self.gamma, "most": self.most},
            **self.origin.ours,
        }


class ExitHeads(nn.Module):
    """The matrices T, initialised to the identity."""

    def __init__(self, options: AdaDecodeOptions) -> None:
        super().__init__()
        self.options = options
        self.maps = nn.ModuleList(nn.Linear(options.width, options.width, bias=False) for _ in options.layers)
        for each in self.maps:
            nn.init.eye_(each.weight)  # type: ignore[arg-type]

    def forward(self, index: int, stream: Tensor, target: Model) -> Tensor:
        """Logits (..., V) of head `index`, for streams (..., width) after its layers, in the maps' dtype."""
        return target.head(target.norm(self.maps[index](stream).to(target.dtype)))


class AdaDecode:
    """A drafter of a model's own first layers, see above. `load` reads one; `dparallel drafter` trains one.

    Args:
        heads: are put into evaluation mode, without gradients.
        gamma: the probability above which a head's best token is drafted. None: the file's value.
        most: the most tokens of a draft. None: the file's value.
        source: names the drafter in errors.
    """

    def __init__(
        self,
        heads: ExitHeads,
        *,
        gamma: float | None = None,
        most: int | None = None,
        source: str = "drafter",
    ) -> None:
        instance("heads", heads, ExitHeads)
        options = heads.options
        gamma = options.gamma if gamma is None else number("gamma", gamma, 0, 1)
        self.most = options.most if most is None else whole("most", most, 1)
        self.heads, self.source = heads.eval().requires_grad_(False), source
        self.options = options._replace(gamma=gamma, most=self.most)
        self.on = Placed(self.heads)

    def __repr__(self) -> str:
        options = self.options
        return f"AdaDecode(layers={list(options.layers)}, gamma={options.gamma:g}, most={options.most})"

    def check(self, model: Model) -> None:
        """Raise ValueError for a model of another vocabulary, other sizes or other weights."""
        options = self.options
        sizes = {"vocabulary": options.vocabulary, "width": options.width, "layers": options.target_layers}
        check_target(self.source, options.origin, model, **sizes)

    def session(self, model: Model, kv_cache: KVCache, lanes: int, *, graphs: bool = True) -> _Session:
        heads = self.on(model.device, model.dtype)
        return _Session(self.options, heads, model, kv_cache, lanes, graphs)

    def save(self, path: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
        """Write the drafter, see `checkpoint.write_checkpoint`."""
        write_checkpoint(path, self.options.config, self.heads.state_dict(), dtype)


def drafter_of_heads(checkpoint: DraftCheckpoint) -> AdaDecode:
    """The drafter in a file. Raises ValueError naming the config key, or missing, extra and misshapen
    tensors."""
    with shapes_only():
        heads = ExitHeads(AdaDecodeOptions.of(checkpoint.config))
    checkpoint.fill(heads)
    return AdaDecode(heads, source=checkpoint.source)


@dataclass
class _Queue:
    """The rows of a lane: the root and its draft so far."""

    lane: Lane
    most: int
    computed: list[int]
    """For each head: rows, from the root on, that have run through the layers before it."""
    tokens: list[int] = field(default_factory=list)
    """Drafted tokens."""
    layers: int = 0
    """Layers run for the draft, one after the other."""
    ended: bool = False
    """Whether a head predicted an end token, which only the model may emit."""

    @property
    def full(self) -> bool:
        """Whether the draft is complete, so that no head drafts any more."""
        return self.ended or len(self.tokens) == self.most


class _Session(RecordedSession):
    """The queues of a batch's lanes. They are empty between passes of the model."""

    def __init__(
        self,
        options: AdaDecodeOptions,
        heads: ExitHeads,
        model: Model,
        kv_cache: KVCache,
        lanes: int,
        graphs: bool,
    ) -> None:
        super().__init__(heads, model, graphs)
        self._options, self._heads, self._kv_cache = options, heads, kv_cache
        self._rows = options.most + 1
        """Rows of a lane in the buffer of streams; positions count modulo it."""
        # One more row, for padding rows of a pass.
        size = lanes * self._rows + 1, options.width
        self._streams = torch.zeros(size, dtype=model.dtype, device=model.device)
        self.size = self._streams.nbytes

    def streams(self, metadata: AttentionMetadata) -> Stream:
        return Stream(self._streams[self._places(metadata)])

    def _places(self, metadata: AttentionMetadata) -> Tensor:
        """(N,) int64: the packed tokens' rows in the buffer of streams."""
        place = metadata.rows * self._rows + metadata.positions % self._rows
        return place.masked_fill(metadata.slot_mapping < 0, len(self._streams) - 1)

    def propose(self, lanes: Sequence[Lane], sizes: Sequence[int]) -> list[Draft]:
        heads = range(len(self._options.layers))
        queues = [_Queue(lane, most, [0 for _ in heads]) for lane, most in zip(lanes, sizes, strict=True)]
        running = queues
        while running:
            asked, sure = running, list[_Queue]()
            for head in heads:
                guesses = self._run(head, asked)
                unsure = []
                for queue, guess in zip(asked, guesses, strict=True):
                    if guess in queue.lane.eos_ids:
                        queue.ended = True
                    if guess is None or queue.ended:
                        unsure.append(queue)
                    else:
                        queue.tokens.append(guess)
                        sure.append(queue)
                if not (asked := unsure):
                    break
            running = sure
        start = self._options.layers[-1]
        return [Draft(tuple(queue.tokens), start=start, layers=queue.layers) for queue in queues]

    def _run(self, head: int, queues: Sequence[_Queue]) -> list[int | None]:
        """Run the rows that have not run through a head's layers yet; return each queue's next token by its
        last row, or None if the head is not sure or the queue is full."""
        spans: list[Span] = []
        ids: list[int] = []
        source: list[int] = []
        keys: list[int] = []
        layers = self._options.layers
        numbers, groups = grouped(queue.lane.sampling for queue in queues if not queue.full)
        for queue in queues:
            lane, done, rows = queue.lane, queue.computed[head], len(queue.tokens) + 1
            root = len(lane.tokens) - 1
            spans.append(Span(lane.lane, root + done, root + rows, root + rows))
            ids += [int(lane.tokens[-1]), *queue.tokens][done:]
            if not queue.full:
                source.append(len(ids) - 1)
                keys += (*lane.key, root + rows)
            queue.computed[head] = rows
            queue.layers += layers[head] - (layers[head - 1] if head else 0)
        packing = Packing()
        tokens, max_q_len, max_kv_len = self._kv_cache.put(packing, spans, self._pad_to)
        packing.padded(ids, 0, tokens)
        read = self._put_sources(packing, source)
        packing.padded(keys, 0, read, 3)
        packing.padded(numbers, 0, read)
        result = self._run_pass(packing, (max_q_len, max_kv_len, head), groups)
        guesses = iter(result.tolist())  # waits for the device
        return [None if queue.full or (guess := next(guesses)) < 0 else guess for queue in queues]

    def _compute(self, key: DraftKey, inputs: Tensor) -> Tensor:
        """(M,) int64: the token drafted at each row that is read, -1 where the head is not sure."""
        *about_tokens, ids, source, keys, group = unpack(inputs, key.shapes)
        max_q_len, max_kv_len, head = key.numbers
        metadata = AttentionMetadata(max_q_len, max_kv_len, *about_tokens, causal=True)
        places, layers = self._places(metadata), self._options.layers
        with own_precision(self.model, self.model.device):
            stream = self.streams(metadata) if head else self.model.embedded(ids)
            first = layers[head - 1] if head else 0
            stream = self.model.run_layers(stream, self._kv_cache, metadata, first, layers[head])
            x = stream.sum
            self._streams[places] = x
            # If all queues are full, no row is read.
            logits = self._heads(head, x[source], self.model) if key.groups else x[:0]
        token = torch.full_like(source, -1)
        for of_group, sampling in enumerate(key.groups):
            seed, sequence, position = keys.unbind(1)
            stats = row_stats(
                logits,
                **sampling.arguments,
                seed=seed,
                sequence=sequence,
                position=position,
                check=False,
            )
            sure = (stats.top1 - stats.lse).exp() > self._options.gamma  # false for a row with NaN
            token = torch.where(sure & (group == of_group), stats.sample, token)
        return token
