"""Adaptive parallel decoding of a diffusion model (APD, arXiv 2506.00413): left to right, as many tokens a
pass as a small autoregressive model goes along with. The text is neither model's own: this is lossy.

    draft     a pass of the diffusion model over the last known tokens and the next M masks: its own choice x
              of each, by logits z_D
    verify    a pass of the verifier, which is autoregressive, over the drafted tokens: z_AR at each
    accept    x_1 in any case, and x_j while it is the choice by R z_D + (1 - R) z_AR, raw logits both
    commit    the accepted tokens; the others are masks again

Above temperature 0 draft and choice share their noise, keyed by seed, sequence and position, as the paper
says. (The published code compares with the argmax there.) M bounds what the diffusion model sees of the
canvas: its texts end where the canvas does, so a short one costs accuracy.

Keys and values of the diffusion model outlive a pass. The tokens that the last pass has committed, which it
saw as masks, are computed again, and W - 1 tokens in front of them; those further left stay as they were
computed, although what stands behind them has changed since.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import arguments
from ..cache import KVCache, Span
from ..decoding.config import DEFAULTS, DecodeConfig, DecodeKeywords, configured, names_fields
from ..decoding.decode import DecodeOutput, Prompts, progress_bar
from ..decoding.fields import plain
from ..decoding.runner import row_padding
from ..decoding.settings import check_mask, make_settings
from ..models import Model, check_diffusion, for_decoding, own_precision, traits, warn_beyond
from ..ops.errors import NO_ERROR, Cell, explain
from ..ops.row_stats import read_rows
from ..types import RowStats
from .batch import UNKNOWN, CausalBatch
from .sequence import CausalSequence, Verified
from .speculate import OF_DIFFUSION, check_prompts, decoded, end_ids, run


@dataclass
class AdaptiveOutput(DecodeOutput):
    """What `adaptive_decode` returns, as `decode`: `nfe` and `forwards` count the model's passes alone."""

    verifier_nfe: Tensor = field(kw_only=True)
    """(B,) int64: passes of the verifier that each sequence was in."""
    verifier_forwards: int = field(kw_only=True)
    """Passes of the verifier that the call ran."""
    drafted: Tensor = field(kw_only=True)
    """(D,) int64: passes, over all sequences, that drafted 1, 2, ..., D tokens beyond the first."""
    accepted: Tensor = field(kw_only=True)
    """(D,) int64: of these, the passes that committed as many."""
    passes: list[list[Verified]] | None = field(default=None, repr=False)
    """With `record`: what each pass of each sequence has made of its draft, the first token not counted."""


@names_fields
def adaptive_decode(
    model: Any,
    prompt: Prompts,
    config: DecodeConfig | None = None,
    *,
    verifier: Any,
    mixture: float = 0.5,
    window: int | None = None,
    lookahead: int | None = None,
    attention_mask: Any = None,
    streamer: Any = None,
    progress: bool = False,
    **keywords: Unpack[DecodeKeywords],
) -> AdaptiveOutput:
    """Decode up to `gen_length` tokens after each prompt with a diffusion model, left to right, as many a
    pass as a small autoregressive model goes along with (APD, arXiv 2506.00413), see `adaptive`.

    Lossy: the text is that of no model alone. Each pass commits at least the first token, unverified.

    Args:
        model: a masked diffusion model of ours (`dparallel_ext.models`).
        prompt: see `decode`; each has at least one token.
        config: how the prompts are decoded; default: `DecodeConfig()`. What is about blocks, rules and caches
            belongs to `decode`; `logprobs` too, for no single model has drawn the text.
        verifier: an autoregressive model of ours on the same device, whose token ids mean what the model's
            do. Its vocabulary may be of another size: only ids that both have are decoded.
        mixture: R, the diffusion model's share of the logits that judge a draft, from 0 to 1. At 1 all that
            is drafted is committed; at 0 what the verifier would have chosen.
        window: W, at least 1, see `adaptive`. None: everything is computed again, nothing is ever stale.
        lookahead: M, at least 1: masks that a pass sees, and the most tokens that it commits. None: all.
        attention_mask: see `decode`.
        streamer: an object with `put` and `end`, as transformers' streamers. Batch size 1.
        progress: a tqdm bar of tokens.
        keywords: fields of `DecodeConfig`. `eos_id`: None is the model's own end tokens; a number stands
            instead of them, and -1 for none. `graphs` has no effect: passes are not recorded.

    Returns:
        AdaptiveOutput. Each sequence goes on at its own pace; one that has ended is in no pass, and what
        follows its end is filled with the end token.

    Raises:
        ValueError: naming the argument that does not fit; or naming sequence and position where the logits
            hold NaN or leave no token to choose.
        TypeError: for a keyword that is no field.
    """
    config = configured("adaptive_decode", config, keywords)
    check_fields(vars(config))
    check_numbers(mixture, window, lookahead)
    with torch.inference_mode():
        prompts = arguments.prompts(prompt, attention_mask)
        size = len(prompts)
        model = diffusion_model(model)
        mask = model.mask_id if config.mask_id is None else config.mask_id
        if mask is None:
            raise ValueError("mask_id: the model's config has no mask_token_id, so give one")
        check_prompts(model, prompts, config)
        eos_ids = end_ids(model, config)
        verifier = verifier_of(verifier, model, prompts, eos_ids)
        counts = arguments.numbers("gen_length", config.gen_length, size, 0)
        settings = make_settings(config, traits(model), "none", size)
        if streamer is not None and size != 1:
            raise ValueError(f"streamer: expected a batch of 1, got {size}")
        width = max((len(ids) + count for ids, count in zip(prompts, counts, strict=True)), default=0)
        for each in (model, verifier):
            warn_beyond(each, "gen_length", width)
        batch = AdaptiveBatch(
            model,
            size,
            width,
            verifier=verifier,
            mixture=float(mixture),
            window=width + 1 if window is None else int(window),
            lookahead=width + 1 if lookahead is None else int(lookahead),
            mask_id=check_mask(model, mask),
            pad_id=eos_ids[0] if eos_ids else mask,
            batch_invariant=config.batch_invariant,
        )
        for lane, (ids, count, own) in enumerate(zip(prompts, counts, settings, strict=True)):
            batch.admit(lane, ids.cpu(), count, own, eos_ids=eos_ids)
        run(batch, streamer, progress_bar(progress, sum(counts), "adaptive_decode"))
    found = decoded(batch, prompts[0].device if prompts else torch.device("cpu"), config)
    return AdaptiveOutput(
        **found,
        verifier_nfe=found["nfe"].new_tensor(batch.verified),
        verifier_forwards=batch.verifier_forwards,
        drafted=torch.tensor(batch.counts.drafted, dtype=torch.int64),
        accepted=torch.tensor(batch.counts.accepted, dtype=torch.int64),
        passes=[row.passes for row in batch.rows] if config.record else None,
    )


def check_fields(fields: Mapping[str, Any]) -> None:
    """Raise ValueError for a field of `DecodeConfig` that says what is decided otherwise here."""
    for name in (*OF_DIFFUSION, "logprobs"):
        value = plain(fields[name])
        if name != "mask_id" and value != DEFAULTS[name]:
            raise ValueError(
                f"{name}: adaptive_decode goes left to right, as far as its verifier agrees, and takes none, "
                f"got {arguments.shown(value)}"
            )


def check_numbers(mixture: float = 0.5, window: int | None = None, lookahead: int | None = None) -> None:
    """Raise ValueError naming the argument of `adaptive_decode` that does not fit."""
    if arguments.number("mixture", mixture) > 1:
        raise ValueError(f"mixture: expected a number from 0 to 1, got {mixture:g}")
    for name, value in (("window", window), ("lookahead", lookahead)):
        if value is not None:
            arguments.whole(name, value, 1)


def diffusion_model(model: Any) -> Model:
    """One of ours, of masked diffusion. Raises ValueError for another."""
    check_diffusion(model)
    found = for_decoding(model)
    if not isinstance(found, Model):
        raise ValueError(
            "model: expected a masked diffusion model of dparallel_ext.models (models.load, or models.wrap "
            f"for a loaded Hugging Face model), got {type(found).__name__}"
        )
    return found


def verifier_of(given: Any, model: Model, prompts: Sequence[Tensor], eos_ids: Sequence[int]) -> Model:
    """The verifier. Raises ValueError where it is none, or has no id for what it is to read."""
    found = for_decoding(given) if callable(given) else given
    if not isinstance(found, Model) or not found.causal:
        raise ValueError(
            "verifier: expected an autoregressive model of dparallel_ext.models, got "
            f"{arguments.shown(given) if isinstance(given, str) else type(found).__name__}"
        )
    if found.device != model.device:
        raise ValueError(f"verifier: expected on {model.device} as the model, got {found.device}")
    known = found.shape.embedding_size
    worst = max((int(ids.max()) for ids in prompts), default=0)
    if worst >= known:
        raise ValueError(f"verifier: it has {known} token ids, and the prompt holds {worst}")
    for eos in eos_ids:
        if eos >= known:
            raise ValueError(f"verifier: it has {known} token ids, and the end token is {eos}")
    return found


class AdaptiveBatch(CausalBatch):
    """Sequences of a diffusion model in lanes, each with its own place in them.

    A sequence's `num_cached` is about the verifier's keys and values. For the arguments see
    `adaptive_decode`; window and lookahead are numbers.
    """

    def __init__(
        self,
        model: Model,
        lanes: int,
        width: int,
        *,
        verifier: Model,
        mixture: float,
        window: int,
        lookahead: int,
        mask_id: int,
        pad_id: int,
        batch_invariant: bool,
    ) -> None:
        super().__init__(model, lanes, width, pad_id=pad_id, batch_invariant=batch_invariant, graphs=False)
        self.verifier, self.mixture, self.mask_id = verifier, mixture, mask_id
        self.window, self.lookahead = window, lookahead
        self.shared = min(model.shape.embedding_size, verifier.shape.embedding_size)
        """Ids that both models have, from 0."""
        self.verifier_cache = verifier.new_cache(lanes, width)
        self.verified = [0] * lanes
        """Of each lane: passes of the verifier."""
        self.verifier_forwards = 0

    def step(self, lanes: Sequence[int] | None = None) -> list[int]:
        """Draft and verify once for every sequence that is not done (of `lanes`); returns these."""
        live = self.live if lanes is None else [b for b in self.live if b in lanes]
        for group in [[b] for b in live] if self.batch_invariant else [live] * bool(live):
            self._pass({b: self.rows[b] for b in group})
        return live

    def _pass(self, rows: Mapping[int, CausalSequence]) -> None:
        device = self.model.device
        drafts = {b: range(row.known, min(row.known + self.lookahead, row.length)) for b, row in rows.items()}
        starts = {
            b: max(0, row.known - row.accepted - self.window) if row.nfe else 0 for b, row in rows.items()
        }
        places = [(b, column, *rows[b].settings.key) for b, own in drafts.items() for column in own]
        lane, column, *key = torch.tensor(places).T.to(device)  # (n,) each, of the n drafted tokens
        canvas = self.tokens.masked_fill(self.tokens == UNKNOWN, self.mask_id).to(device)
        logits = self._logits(self.model, self.kv_cache, canvas, drafts, starts)  # (n, shared)
        own = next(iter(rows.values()))
        stats, error = self._choose(logits, own, key, column)
        results = torch.full((4, len(places)), UNKNOWN, device=device)  # tokens and errors, of both
        results[0], results[1] = stats.sample, error
        asked = {b: own for b, own in drafts.items() if len(own) > 1}
        if asked:
            canvas[lane, column] = stats.sample.clamp(min=0)
            judged = torch.tensor([i for i, place in enumerate(places) if place[0] in asked], device=device)
            starts = {b: rows[b].num_cached for b in asked}
            other = self._logits(self.verifier, self.verifier_cache, canvas, asked, starts)
            mixed = torch.lerp(other.float(), logits[judged].float(), self.mixture)
            choice, error = self._choose(mixed, own, [k[judged] for k in key], column[judged])
            results[2, judged], results[3, judged] = choice.sample, error
            self.verifier_forwards += 1
        self.forwards += 1
        found = results.T.tolist()  # waits for the device
        recorded = any(row.settings.record for row in rows.values())
        logprobs = stats.sample_logprob.tolist() if recorded else []
        first, taken = 0, dict[int, int]()
        for b, columns in drafts.items():
            taken[b] = self._agreed(b, columns, found[first : first + len(columns)])
            first += len(columns)
        first = 0
        for b, columns in drafts.items():
            tokens, count = [row[0] for row in found[first : first + len(columns)]], taken[b]
            self.verified[b] += b in asked
            if len(tokens) > 1:
                self.counts.add(len(tokens) - 1, count - 1)
            rows[b].judged(Verified(len(tokens) - 1, count - 1, tuple(tokens[count:])))
            self.commit(b, tokens[:count], logprobs[first : first + count])
            first += len(columns)

    def _logits(
        self,
        model: Model,
        kv_cache: KVCache,
        canvas: Tensor,
        asked: Mapping[int, range],
        starts: Mapping[int, int],
    ) -> Tensor:
        """(n, shared): a model's logits for the columns `asked` of some lanes, computed from `starts` on."""
        device, pad_to, back = model.device, row_padding(model), int(model.shift or model.causal)
        spans: list[Span] = []
        source: list[int] = []
        offset = 0
        for b, columns in asked.items():
            start, end = starts[b], columns.stop - int(model.causal)  # the last token predicts nothing asked
            spans += model.spans(b, start, end, end)
            source += (column - back - start + offset for column in columns)
            offset += end - start
        metadata = kv_cache.metadata(spans, pad_to, causal=model.causal).to(device)
        at = torch.tensor(source, device=device)
        if pad_to is not None:
            at = F.pad(at, (0, pad_to(len(at)) - len(at)))
        with own_precision(model, device):
            x = model.step(canvas[metadata.rows, metadata.positions], kv_cache, metadata)
            return model.head(x[at])[: len(source), : self.shared]

    def _choose(
        self, logits: Tensor, row: CausalSequence, key: Sequence[Tensor], column: Tensor
    ) -> tuple[RowStats, Tensor]:
        """Of each row of logits the best token or a sample, by the noise of its column; and errors, (n,)."""
        seed, sequence = key
        suppress = row.suppress if row.suppress is None else row.suppress[row.suppress < self.shared]
        stats, error = read_rows(
            logits,
            mask_id=self.mask_id if self.mask_id < self.shared else None,
            suppress=suppress,
            temperature=row.settings.temperature,
            top_p=row.settings.top_p,
            top_k=row.settings.top_k,
            seed=seed,
            sequence=sequence,
            position=column,
        )
        return stats, torch.where(error == NO_ERROR, UNKNOWN, error % 4)

    def _agreed(self, b: int, columns: range, found: Sequence[Sequence[int]]) -> int:
        """How many tokens of a draft are committed. found: of each draft and error, choice and error.

        Raises ValueError for a bad row that is come to.
        """
        width = self.tokens.shape[1]
        for number, (column, (token, bad, choice, bad_choice)) in enumerate(zip(columns, found, strict=True)):
            errors = (bad, bad_choice) if number else (bad,)
            for error in errors:
                if error != UNKNOWN:
                    explain(4 * (b * width + column) + error, Cell(width))
            if number and token != choice:
                return number
        return len(columns)
