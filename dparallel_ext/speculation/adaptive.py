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

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor

from .. import arguments
from ..cache import KVCache
from ..decoding.config import PENALTIES, DecodeConfig, DecodeKeywords, configured, names_fields
from ..decoding.decode import DecodeOutput, Prompts, output_fields, run
from ..decoding.sequence_settings import SequenceSettings
from ..decoding.settings import make_settings, mask_of
from ..models import Model, check_diffusion, native, traits, warn_beyond
from ..models import load as load_model
from ..ops.errors import Cell, explain
from ..packed import floats_of
from .adaptive_passes import AdaptiveSession, AdaptiveWork, VerifierDrafter
from .batch import CausalBatch
from .loading import NAMED
from .sequence import UNKNOWN, CausalSequence, Verified
from .speculate import DIFFUSION_FIELDS, check_prompts, check_unset, verified_fields, with_checked_ends


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
            every drafted token is committed; at 0 the tokens that the verifier would have chosen.
        window: W, at least 1, see `adaptive`. None: every pass computes everything, so no key is stale.
        lookahead: M, at least 1: masks that a pass sees, and the most tokens that it commits. None: all.
        attention_mask: see `decode`.
        streamer: an object with `put` and `end`, as transformers' streamers. Needs a batch of one prompt.
        progress: show a tqdm bar of tokens.
        keywords: fields of `DecodeConfig`; they replace the config's. `eos_id`: None: the model's own end
            tokens; one or several replace them; -1: none.

    Returns:
        AdaptiveOutput. Each sequence goes on at its own pace; a sequence that has ended is in no pass, and is
        filled with the end token.

    Raises:
        ValueError: naming the argument that does not fit; or, if the logits hold NaN or leave no token to
            choose, naming sequence and position.
        TypeError: for a keyword that is no field.
    """
    check_adaptive(keywords)  # before a rule's text is read: there is none that would do
    config = configured("adaptive_decode", config, keywords)
    check_adaptive(vars(config))
    options = checked_options(mixture, window, lookahead)
    with torch.inference_mode():
        prompts = arguments.prompts(prompt, attention_mask)
        device = prompts[0].device if prompts else torch.device("cpu")
        prompts = arguments.moved(prompts, torch.device("cpu"))
        size = len(prompts)
        model = diffusion_model(model)
        mask = mask_of(model, config.mask_id)
        check_prompts(model, prompts)
        config = with_checked_ends(model, config, mask)
        named = isinstance(verifier, (str, Path))
        verifier = verifier_of(verifier, model)
        check_known(verifier, prompts, config.eos_ids)
        counts = arguments.per_sequence("gen_length", config.gen_length, size, 0)
        settings = make_settings(config, model, "none", size)
        arguments.check_streamer(streamer, size)
        width = max((len(ids) + count for ids, count in zip(prompts, counts, strict=True)), default=0)
        for each in (model, verifier):
            warn_beyond(each, width)
        batch = AdaptiveBatch(
            model,
            size,
            width,
            verifier=verifier,
            mask_id=mask,
            pad_id=next(iter(config.eos_ids), mask),
            batch_invariant=config.batch_invariant,
            graphs=config.graphs,
            **options,
        )
        for lane, request in enumerate(zip(prompts, counts, settings, strict=True)):
            batch.admit(lane, *request)
        run(batch, streamer, progress, "adaptive_decode")
        if not named:  # else the next call reads another
            batch.keep()
    verifier_nfe = [sequence.draft_nfe for sequence in batch.sequences]
    return AdaptiveOutput(
        **output_fields(batch, size, device, config, verifier_nfe=verifier_nfe),
        **verified_fields(batch, config),
        verifier_forwards=batch.draft_forwards,
    )


def check_adaptive(fields: Mapping[str, Any]) -> None:
    """Raise ValueError for a field of `DecodeConfig` that does not apply to decoding with a verifier."""
    names = {*DIFFUSION_FIELDS, *PENALTIES, "automaton", "logprobs"} - {"mask_id"}
    why = "with a verifier decoding goes left to right, as far as it agrees, and takes none"
    check_unset(fields, sorted(names), why)


def checked_options(
    mixture: float | None = None, window: int | None = None, lookahead: int | None = None
) -> dict[str, Any]:
    """The options of an `AdaptiveBatch`, by name; mixture None: 0.5. Raises ValueError naming the option that
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
    """The verified draft of one sequence."""

    tokens: list[int]
    """The drafted tokens."""
    logprobs: list[float]
    """Their log-probabilities."""
    taken: int
    """How many of the tokens, from the first on, are committed."""
    verified: bool
    """Whether the verifier was asked."""


class AdaptiveBatch(CausalBatch):
    """A batch of sequences that are decoded with a verifier; for the arguments see `adaptive_decode`.

    A sequence's `num_cached` counts the verifier's keys and values, and its `draft_nfe` the verifier's passes
    over it; `draft_forwards` counts the verifier's passes that were run.
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
        graphs: bool = True,
        kv_cache: KVCache | None = None,
    ) -> None:
        super().__init__(
            model,
            lanes,
            width,
            drafter=VerifierDrafter(weakref.ref(verifier), verifier.dtype, mask_id, mixture),
            pad_id=pad_id,
            batch_invariant=batch_invariant,
            graphs=graphs,
            kv_cache=kv_cache,
        )
        self.verifier, self.mixture = verifier, mixture
        self.window = width if window is None else window
        self.lookahead = width if lookahead is None else lookahead
        assert isinstance(self._session, AdaptiveSession)
        self._passes = self._session

    def admit(
        self, lane: int, prompt: Tensor, gen_length: int, settings: SequenceSettings, **more: Any
    ) -> CausalSequence:
        if settings.suppress is not None:  # of the ids that both models have
            known = settings.suppress[settings.suppress < self._passes.shared]
            settings = replace(settings, suppress=known)
        return super().admit(lane, prompt, gen_length, settings, **more)

    def _run(self, live: Sequence[int]) -> Mapping[int, Judged]:
        judged: dict[int, Judged] = {}
        for group in [[b] for b in live] if self.batch_invariant else [live]:
            judged |= self._judge([self._work(b) for b in group])
        return judged

    def _advance(self, b: int, result: Judged) -> None:
        sequence, drafted = self.sequences[b], len(result.tokens) - 1
        sequence.draft_nfe += result.verified
        count = self.commit(b, result.tokens[: result.taken], result.logprobs[: result.taken])
        if drafted:
            self.counts.add(drafted, count - 1)
        sequence.judged(Verified(drafted, count - 1, tuple(result.tokens[count:])))

    def _work(self, b: int) -> AdaptiveWork:
        sequence, first = self.sequences[b], b * self.tokens.shape[1]
        return AdaptiveWork(
            b,
            self._ids[first : first + sequence.known],
            range(sequence.known, min(sequence.known + self.lookahead, sequence.length)),
            max(0, sequence.known - sequence.accepted - self.window) if sequence.nfe else 0,
            sequence.num_cached,
            sequence.sampling,
            sequence.settings.key,
        )

    def _judge(self, work: Sequence[AdaptiveWork]) -> dict[int, Judged]:
        """Run a pass over some sequences, which changes nothing but keys and values."""
        judged = self._passes.judge(work)  # waits for the device
        self.forwards += 1
        self.draft_forwards += any(lane_work.needs_verifier for lane_work in work)
        logprobs = floats_of(judged[2]).tolist()
        by_place = judged.T.tolist()
        results, first = {}, 0
        for lane_work in work:
            last = first + len(lane_work.columns)
            taken = self._agreed(lane_work, by_place[first:last])
            tokens = [row[0] for row in by_place[first:last]]
            results[lane_work.lane] = Judged(tokens, logprobs[first:last], taken, lane_work.needs_verifier)
            first = last
        return results

    def _agreed(self, lane_work: AdaptiveWork, results: Sequence[Sequence[int]]) -> int:
        """How many tokens of a draft are committed. results: of `judge`, for each column.

        Raises ValueError for the first bad row among the committed tokens or right behind them.
        """
        width = self.tokens.shape[1]
        for number, (column, (token, bad, _, *choice)) in enumerate(
            zip(lane_work.columns, results, strict=True)
        ):
            for error in (bad, *choice[1:]) if number else (bad,):
                if error != UNKNOWN:
                    explain(4 * (lane_work.lane * width + column) + error, Cell(width))
            if number and token != choice[0]:
                return number
        return len(lane_work.columns)
