"""Adaptive parallel decoding of a diffusion model (APD, arXiv 2506.00413): left to right, as many tokens a
pass as a small autoregressive model accepts. It is lossy: the text is neither model's own.

    draft     a pass of the diffusion model over the last known tokens and the next M masks gives logits z_D
              and its choice x at each mask
    verify    a pass of the verifier, an autoregressive model, over the drafted tokens gives logits z_AR
    accept    x_1 in any case, then x_j as long as it is the choice by R z_D + (1 - R) z_AR
    commit    the accepted tokens; the others are masks again

Above temperature 0 draft and choice share their noise, keyed by seed, sequence and position, as in the paper
(the published code compares with the argmax). M bounds the canvas that the diffusion model sees: its texts
end where the canvas does, so a short canvas costs accuracy.

The diffusion model's keys and values are cached. A pass computes again the tokens that the last pass has
committed, which it saw as masks, and W - 1 tokens in front of them; tokens further left keep their keys and
values, although the text behind them has changed since.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import arguments
from ..cache import KVCache, Span
from ..decoding.config import DecodeConfig, DecodeKeywords, configured, names_fields
from ..decoding.decode import DecodeOutput, Prompts, progress_bar
from ..decoding.padding import row_padding
from ..decoding.sequence import grouped
from ..decoding.settings import make_settings, mask_of
from ..models import Model, check_diffusion, native, own_precision, traits, warn_beyond
from ..models import load as load_model
from ..ops.errors import Cell, explain
from ..ops.row_stats import read_rows
from ..types import NO_ERROR
from .batch import CausalBatch
from .loading import NAMED
from .sequence import UNKNOWN, CausalSequence, Verified
from .speculate import OF_DIFFUSION, check_prompts, check_unset, decoded, end_ids, run


@dataclass
class AdaptiveOutput(DecodeOutput):
    """The output of `adaptive_decode`, as `decode`'s; `nfe` and `forwards` count the diffusion model's
    passes."""

    verifier_nfe: Tensor = field(kw_only=True)
    """(B,) int64: passes of the verifier over each sequence."""
    verifier_forwards: int = field(kw_only=True)
    """Passes of the verifier that the call ran."""
    drafted: Tensor = field(kw_only=True)
    """(D,) int64: passes, over all sequences, that drafted 1, 2, ..., D tokens beyond the first."""
    accepted: Tensor = field(kw_only=True)
    """(D,) int64: how many of these passes committed the token at this depth."""
    passes: list[list[Verified]] | None = field(default=None, repr=False)
    """With `record`, for each sequence and pass the drafted, accepted and refused tokens, without the
    first."""


@names_fields
def adaptive_decode(
    model: Any,
    prompt: Prompts,
    config: DecodeConfig | None = None,
    *,
    verifier: Any,
    mixture: float | None = None,
    window: int | None = None,
    lookahead: int | None = None,
    attention_mask: Any = None,
    streamer: Any = None,
    progress: bool = False,
    **keywords: Unpack[DecodeKeywords],
) -> AdaptiveOutput:
    """Decode up to `gen_length` tokens after each prompt with a diffusion model, left to right, as many
    tokens a pass as a small autoregressive model accepts (APD, arXiv 2506.00413), see `adaptive`.

    Lossy: the text is neither model's own. Each pass commits at least the first token, unverified.

    Args:
        model: a masked diffusion model of `dparallel_ext.models`.
        prompt: see `decode`; each has at least one token.
        config: how the prompts are decoded; default: `DecodeConfig()`. Fields about blocks, rules and caches
            belong to `decode` alone, and so does `logprobs`, since no single model draws the text.
        verifier: an autoregressive model of `dparallel_ext.models` on the same device, with the same token
            ids; or the path or name of one, as "builtin:verifier" (`dparallel.registry`). Its vocabulary may
            have another size: only ids that both models have are decoded.
        mixture: R, the diffusion model's share of the logits that judge a draft, from 0 to 1; None: 0.5. At 1
            every drafted token is committed; at 0 those that the verifier would have chosen.
        window: W, at least 1, see `adaptive`. None: every pass computes everything, so no key is stale.
        lookahead: M, at least 1: masks that a pass sees, and the most tokens that it commits. None: all.
        attention_mask: see `decode`.
        streamer: an object with `put` and `end`, as transformers' streamers. Needs a batch of one prompt.
        progress: show a tqdm bar of tokens.
        keywords: fields of `DecodeConfig`; they replace the config's. `eos_id`: None: the model's own end
            tokens; a number replaces them; -1: none. `graphs` has no effect: passes are not recorded.

    Returns:
        AdaptiveOutput. Each sequence goes on at its own pace; one that has ended is in no pass, and is filled
        with the end token.

    Raises:
        ValueError: naming the argument that does not fit; or, if the logits hold NaN or leave no token to
            choose, naming sequence and position.
        TypeError: for a keyword that is no field.
    """
    check_fields(keywords)  # before a rule's text is read: there is none that would do
    config = configured("adaptive_decode", config, keywords)
    check_fields(vars(config))
    numbers = checked_numbers(mixture, window, lookahead)
    with torch.inference_mode():
        prompts = arguments.prompts(prompt, attention_mask)
        size = len(prompts)
        model = diffusion_model(model)
        mask = mask_of(model, config.mask_id)
        check_prompts(model, prompts)
        eos_ids = end_ids(model, config, mask)
        verifier = verifier_of(verifier, model)
        check_known(verifier, prompts, eos_ids)
        counts = arguments.numbers("gen_length", config.gen_length, size, 0)
        settings = make_settings(config, model, "none", size)
        arguments.check_streamer(streamer, size)
        width = max((len(ids) + count for ids, count in zip(prompts, counts, strict=True)), default=0)
        for each in (model, verifier):
            warn_beyond(each, "gen_length", width)
        batch = AdaptiveBatch(
            model,
            size,
            width,
            verifier=verifier,
            mask_id=mask,
            pad_id=eos_ids[0] if eos_ids else mask,
            batch_invariant=config.batch_invariant,
            **numbers,
        )
        for lane, (ids, count, setting) in enumerate(zip(prompts, counts, settings, strict=True)):
            batch.admit(lane, ids.cpu(), count, setting, eos_ids=eos_ids)
        run(batch, streamer, progress_bar(progress, sum(counts), "adaptive_decode"))
    device = prompts[0].device if prompts else torch.device("cpu")
    fields = decoded(batch, device, config, "draft_nfe")
    return AdaptiveOutput(
        verifier_nfe=fields.pop("draft_nfe"), verifier_forwards=batch.draft_forwards, **fields
    )


def check_fields(fields: Mapping[str, Any]) -> None:
    """Raise ValueError for a field of `DecodeConfig` that does not apply to decoding with a verifier."""
    names = {*OF_DIFFUSION, "automaton", "logprobs"} - {"mask_id"}
    why = "with a verifier decoding goes left to right, as far as it agrees, and takes none"
    check_unset(fields, sorted(names), why)


def checked_numbers(
    mixture: float | None = None, window: int | None = None, lookahead: int | None = None
) -> dict[str, Any]:
    """The numbers of an `AdaptiveBatch`, by name; mixture None: 0.5. Raises ValueError naming the one that
    does not fit."""
    share = 0.5 if mixture is None else arguments.number("mixture", mixture, 0, 1)
    sizes = {
        name: None if value is None else arguments.whole(name, value, 1)
        for name, value in (("window", window), ("lookahead", lookahead))
    }
    return {"mixture": share, **sizes}


def diffusion_model(model: Any) -> Model:
    """`model` without wrappers. Raises ValueError unless it is a native masked diffusion model."""
    check_diffusion(model)
    return native(model, expected="a masked diffusion model")


def verifier_of(value: Any, model: Model) -> Model:
    """The verifier, an autoregressive model on the device of `model`; of a name or path it is loaded there,
    in the dtype of `model`. Raises ValueError for anything else."""
    if isinstance(value, (str, Path)):
        try:
            named = NAMED.get(str(value), value)
            path = named if isinstance(named, Path) else value  # not a drafter
            value = load_model(path, device=model.device, dtype=model.dtype)
        except (FileNotFoundError, ValueError) as error:
            raise ValueError(f"verifier: {str(error).removeprefix('path: ')}") from error
    verifier = native(value, "verifier", "an autoregressive model's path, or one")
    if not traits(verifier).causal:
        raise ValueError(
            "verifier: expected an autoregressive model of dparallel_ext.models, or the path of one, got "
            f"{type(verifier).__name__}"
        )
    if verifier.device != model.device:
        raise ValueError(f"verifier: expected on {model.device} as the model, got {verifier.device}")
    return verifier


def check_known(verifier: Model, prompts: Sequence[Tensor], eos_ids: Sequence[int]) -> None:
    """Raise ValueError for an id that the verifier does not have and would read."""
    known = verifier.shape.embedding_size
    worst = max((int(ids.max()) for ids in prompts), default=0)
    if worst >= known:
        raise ValueError(f"verifier: it has {known} token ids, and the prompt holds {worst}")
    for eos in eos_ids:
        if eos >= known:
            raise ValueError(f"verifier: it has {known} token ids, and the end token is {eos}")


@dataclass
class Judged:
    """What a pass found for one sequence."""

    tokens: list[int]
    """The drafted tokens."""
    logprobs: list[float]
    """Their log-probabilities, if the sequence is recorded."""
    taken: int
    """How many of the tokens, from the first on, are committed."""
    verified: bool
    """Whether the verifier was asked."""


class AdaptiveBatch(CausalBatch):
    """A batch of sequences that are decoded with a verifier; for the arguments see `adaptive_decode`.

    A sequence's `num_cached` counts the verifier's keys and values, and its `draft_nfe` the verifier's passes
    over it; `draft_forwards` counts those that were run.
    """

    def __init__(
        self,
        model: Model,
        lanes: int,
        width: int,
        *,
        verifier: Model,
        mask_id: int,
        mixture: float,
        window: int | None,
        lookahead: int | None,
        pad_id: int = UNKNOWN,
        batch_invariant: bool = False,
        kv_cache: KVCache | None = None,
    ) -> None:
        super().__init__(
            model,
            lanes,
            width,
            pad_id=pad_id,
            batch_invariant=batch_invariant,
            graphs=False,
            kv_cache=kv_cache,
        )
        self.verifier, self.mixture, self._mask = verifier, mixture, mask_id
        self.window = width if window is None else window
        self.lookahead = width if lookahead is None else lookahead
        self.shared = min(model.shape.embedding_size, verifier.shape.embedding_size)
        """The number of ids, from 0, that both models have."""
        self.verifier_cache = verifier.new_cache(lanes, width)

    def _run(self, live: Sequence[int]) -> Mapping[int, Judged]:
        judged: dict[int, Judged] = {}
        for group in [[b] for b in live] if self.batch_invariant else [live]:
            judged |= self._judge({b: self.rows[b] for b in group})
        return judged

    def _advance(self, b: int, result: Judged) -> None:
        row, drafted = self.rows[b], len(result.tokens) - 1
        row.draft_nfe += result.verified
        count = self.commit(b, result.tokens[: result.taken], result.logprobs[: result.taken])
        if drafted:
            self.counts.add(drafted, count - 1)
        row.judged(Verified(drafted, count - 1, tuple(result.tokens[count:])))

    def _judge(self, rows: Mapping[int, CausalSequence]) -> dict[int, Judged]:
        """Run a pass over some sequences, which changes nothing but keys and values."""
        device = self.model.device
        drafts = {b: range(row.known, min(row.known + self.lookahead, row.length)) for b, row in rows.items()}
        starts = {
            b: max(0, row.known - row.accepted - self.window) if row.nfe else 0 for b, row in rows.items()
        }
        places = [(b, column) for b, columns in drafts.items() for column in columns]
        lane, column = torch.tensor(places, device="cpu").T.to(device)  # (n,) each, of n drafted tokens
        canvas = self.tokens.masked_fill(self.tokens == UNKNOWN, self._mask).to(device)
        logits = self._logits(self.model, self.kv_cache, canvas, drafts, starts)  # (n, shared)
        draft, logprob = self._choose(logits, places)
        choice = torch.full_like(draft, UNKNOWN)
        to_verify = {b: columns for b, columns in drafts.items() if len(columns) > 1}
        if to_verify:
            canvas[lane, column] = draft[0].clamp(min=0)
            at = [i for i, place in enumerate(places) if place[0] in to_verify]
            judged = torch.tensor(at, device=device)
            starts = {b: rows[b].num_cached for b in to_verify}
            other = self._logits(self.verifier, self.verifier_cache, canvas, to_verify, starts)
            mixed = torch.lerp(other.float(), logits[judged].float(), self.mixture)
            choice[:, judged], _ = self._choose(mixed, [places[i] for i in at])
            self.draft_forwards += 1
        self.forwards += 1
        by_place = torch.cat((draft, choice)).T.tolist()  # waits for the device
        recorded = any(row.settings.record for row in rows.values())
        logprobs = logprob.tolist() if recorded else []
        results, first = {}, 0
        for b, columns in drafts.items():
            last = first + len(columns)
            taken = self._agreed(b, columns, by_place[first:last])
            tokens = [row[0] for row in by_place[first:last]]
            results[b] = Judged(tokens, logprobs[first:last], taken, b in to_verify)
            first = last
        return results

    def _logits(
        self,
        model: Model,
        kv_cache: KVCache,
        canvas: Tensor,
        columns_of: Mapping[int, range],
        starts: Mapping[int, int],
    ) -> Tensor:
        """(n, shared): a model's logits for columns of some lanes, computed from `starts` on."""
        device, pad_to, of_model = model.device, row_padding(model), traits(model)
        back = int(of_model.shift or of_model.causal)
        spans: list[Span] = []
        source: list[int] = []
        offset = 0
        for b, columns in columns_of.items():
            # The last token's logits are not needed.
            start, end = starts[b], columns.stop - int(of_model.causal)
            spans += model.spans(b, start, end, end)
            source += (column - back - start + offset for column in columns)
            offset += end - start
        metadata = kv_cache.metadata(spans, pad_to, causal=of_model.causal).to(device)
        at = torch.tensor(source, device=device)
        if pad_to is not None:
            at = F.pad(at, (0, pad_to(len(at)) - len(at)))
        with own_precision(model, device):
            x = model.step(canvas[metadata.rows, metadata.positions], kv_cache, metadata)
            return model.head(x[at])[: len(source), : self.shared]

    def _choose(self, logits: Tensor, places: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Choices by the logits (n, shared) at places (lane, column), whose noise samples use.

        Returns (2, n) int64, tokens and error codes, and their log-probabilities (n,) float32.
        """
        device = logits.device
        keys = [(*self.rows[b].settings.key, column) for b, column in places]
        seed, sequence, position = torch.tensor(keys, device="cpu").T.to(device)
        numbers, groups = grouped(self.rows[b].sampling for b, _ in places)
        chosen = torch.full((2, len(places)), UNKNOWN, device=device)
        logprob = torch.full((len(places),), torch.nan, device=device)
        for number, group in enumerate(groups):
            at = torch.tensor([place for place, of in enumerate(numbers) if of == number], device=device)
            suppress = (
                group.suppress if group.suppress is None else group.suppress[group.suppress < self.shared]
            )
            stats, error = read_rows(
                logits,
                rows=at,
                mask_id=self._mask if self._mask < self.shared else None,
                **group._replace(suppress=suppress).arguments,
                seed=seed[at],
                sequence=sequence[at],
                position=position[at],
            )
            chosen[:, at] = torch.stack((stats.sample, torch.where(error == NO_ERROR, UNKNOWN, error % 4)))
            logprob[at] = stats.sample_logprob
        return chosen, logprob

    def _agreed(self, b: int, columns: range, results: Sequence[Sequence[int]]) -> int:
        """How many tokens of a draft are committed. results: for each column token, error, choice, its error.

        Raises ValueError for the first bad row among the committed tokens or right behind them.
        """
        width = self.tokens.shape[1]
        for number, (column, (token, bad, choice, bad_choice)) in enumerate(
            zip(columns, results, strict=True)
        ):
            errors = (bad, bad_choice) if number else (bad,)
            for error in errors:
                if error != UNKNOWN:
                    explain(4 * (b * width + column) + error, Cell(width))
            if number and token != choice:
                return number
        return len(columns)
