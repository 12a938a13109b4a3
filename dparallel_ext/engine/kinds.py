"""The parts of an engine that depend on how it decodes: a masked diffusion model by blocks, an autoregressive
model, or a masked diffusion model with a verifier."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..arguments import shown
from ..cache import KVCache
from ..decoding import batch as diffusion
from ..decoding import self_speculation
from ..decoding.config import DecodeConfig
from ..decoding.decode import masked_columns
from ..decoding.schedule import is_block_causal
from ..decoding.self_speculation import check_draft, states_to_guess
from ..decoding.sequence import OpenBlock, SequenceState
from ..decoding.sequence_settings import SequenceSettings
from ..decoding.settings import check_model, check_settings, make_settings, mask_of
from ..models import Model, traits
from ..speculation import AdaptiveBatch, CausalBatch, Drafter, adaptive, drafter_of
from ..speculation.sequence import CausalSequence, OpenRegion
from ..speculation.speculate import causal_model, check_causal, sizer_of, with_checked_ends


@dataclass(frozen=True)
class RequestPlan:
    """A request, checked, as `ModelKind.admit` takes it."""

    prompt: Tensor
    """(P,) int64 on the CPU."""
    gen_length: int
    length: int
    """Positions of prompt and response."""
    reusable: int
    """Positions, from 0 on, whose keys and values may come from other requests."""
    settings: SequenceSettings
    masked: Sequence[int] = ()
    """Columns of the prompt that are filled too."""

    @property
    def asked(self) -> int:
        """Response tokens requested; a block-causal model fills its last block beyond them."""
        return len(self.masked) + self.gen_length


Region = OpenBlock | OpenRegion
"""Columns [start, end) of a sequence."""
AnySequence = SequenceState | CausalSequence
"""A sequence in a batch's lane."""
AnyBatch = diffusion.Batch | CausalBatch
"""Sequences in lanes, and the passes over them."""


class ModelKind(ABC):
    """The parts of an engine that its kind of model decides."""

    config: DecodeConfig
    """The config of requests that come without one; the engine's own fields hold the values in force."""
    cache: str | None = None
    mask_id: int | None = None
    """Cache mode and mask token; None where decoding goes from left to right."""
    models: tuple[Model, ...]
    """The models that read a request's tokens."""
    page_unit = 1
    """The size of shared pages is a multiple of it, in positions."""
    unshared: str | None = None
    """Why requests cannot share pages; None: they can."""

    @abstractmethod
    def check(self, fields: Mapping[str, Any]) -> None:
        """Raise ValueError for a field of a config that the model has no use for."""

    @abstractmethod
    def settings(self, config: DecodeConfig) -> SequenceSettings:
        """The settings of one sequence. Raises ValueError naming the field that does not fit the engine."""

    @abstractmethod
    def length(self, prompt: int, gen_length: int) -> int:
        """Positions that a request needs."""

    @abstractmethod
    def plan(self, ids: Tensor, gen_length: int, config: DecodeConfig) -> RequestPlan:
        """The plan of a request. Raises ValueError naming the argument that does not fit the model."""

    def new_cache(self, pages: int, page_size: int, block_table: Tensor) -> KVCache:
        """The cache of a batch, with `pages` pages for requests; block_table: (lanes, P) int64."""
        return self.models[0].new_cache(pages, page_size, block_table)

    @abstractmethod
    def make_batch(self, lanes: int, width: int, kv_cache: KVCache) -> AnyBatch: ...

    @abstractmethod
    def admit(self, batch: Any, lane: int, plan: RequestPlan, num_cached: int) -> AnySequence:
        """Begin a sequence in a lane of the batch that `make_batch` has made."""

    @abstractmethod
    def draft_columns(self, sequence: Any, opened: Sequence[Region]) -> tuple[int, int]:
        """Columns [start, end) of a `DraftEvent` after a pass, in front of which `opened` were open."""


class Diffusion(ModelKind):
    """Masked diffusion: blocks of masks, and a rule that decides which of them a pass fills."""

    mask_id: int

    def __init__(self, model: Model, config: DecodeConfig, draft_size: int | None) -> None:
        self._model, block_causal = model, traits(model).block_length is not None
        self.models = (model,)
        self._resolved = check_model(config, model, "block" if block_causal else "dual")
        self.cache, self._schedule, self.mask_id = self._resolved
        self._draft_size = states_to_guess(draft_size, self._schedule)
        self.config = config.replace(**self._resolved.fields)
        self.page_unit = self._schedule.block_length if self._schedule.aligned else 1
        if not self._schedule.shared:
            blocks = f"blocks of {type(model).__name__} that count from the end of each prompt"
            self.unshared = blocks if self.cache == "block" else f"cache {self.cache!r}"

    def check(self, fields: Mapping[str, Any]) -> None:
        """A diffusion model uses every field."""

    def settings(self, config: DecodeConfig) -> SequenceSettings:
        (settings,) = make_settings(config, self._model, self._resolved.cache, 1)
        check_settings(self._model, [settings], self._resolved)
        if self._draft_size:
            check_draft([settings], self._schedule)
        return settings

    def length(self, prompt: int, gen_length: int) -> int:
        return self._schedule.length(prompt, gen_length)

    def plan(self, ids: Tensor, gen_length: int, config: DecodeConfig) -> RequestPlan:
        settings, schedule = self.settings(config), self._schedule
        masked = masked_columns(ids, self.mask_id) if config.infill else []
        layout = schedule.lay_out(len(ids), gen_length, settings.steps, masked)
        # Pages with masks are not final. With shifted logits the position before the first mask predicts it,
        # so it is computed in any case.
        known = layout.columns[0] if layout.columns else len(ids)
        reusable = max(0, known - int(schedule.shift or schedule.onward))
        return RequestPlan(ids, gen_length, layout.length, reusable, settings, masked)

    def new_cache(self, pages: int, page_size: int, block_table: Tensor) -> KVCache:
        size = self._draft_size
        return self_speculation.new_cache(self._model, self._schedule, size, pages, page_size, block_table)

    def make_batch(self, lanes: int, width: int, kv_cache: KVCache) -> diffusion.Batch:
        return self_speculation.batch_class(self._draft_size)(
            self._model,
            lanes,
            width,
            self._schedule,
            self.mask_id,
            pad_id=self.mask_id,
            device=self._model.device,
            batch_invariant=self.config.batch_invariant,
            graphs=self.config.graphs,
            kv_cache=kv_cache,
        )

    def admit(self, batch: diffusion.Batch, lane: int, plan: RequestPlan, num_cached: int) -> SequenceState:
        prompt = plan.prompt.to(batch.tokens.device)
        return batch.admit(
            lane, prompt, plan.gen_length, plan.settings, masked=plan.masked, num_cached=num_cached
        )

    def draft_columns(self, sequence: SequenceState, opened: Sequence[Region]) -> tuple[int, int]:
        """The columns of the blocks that were open."""
        return opened[0].start, opened[-1].end


class LeftToRight(ModelKind):
    """Tokens from left to right, as many a pass as are verified."""

    _model: Model
    _mask_id: int | None = None

    def length(self, prompt: int, gen_length: int) -> int:
        return prompt + gen_length

    def settings(self, config: DecodeConfig) -> SequenceSettings:
        (settings,) = make_settings(
            with_checked_ends(self._model, config, self._mask_id), self._model, "none", 1
        )
        return settings

    def plan(self, ids: Tensor, gen_length: int, config: DecodeConfig) -> RequestPlan:
        if not len(ids):
            raise ValueError("prompt: expected at least one token, got none")
        # The last token's row predicts the next token, so it is computed in any case.
        length, reusable = self.length(len(ids), gen_length), len(ids) - 1
        return RequestPlan(ids, gen_length, length, reusable, self.settings(config))

    def admit(self, batch: CausalBatch, lane: int, plan: RequestPlan, num_cached: int) -> CausalSequence:
        return batch.admit(lane, plan.prompt, plan.gen_length, plan.settings, num_cached=num_cached)

    def draft_columns(self, sequence: CausalSequence, opened: Sequence[Region]) -> tuple[int, int]:
        """The columns of the pass's new tokens."""
        return opened[0].start, sequence.known


class Autoregressive(LeftToRight):
    """Autoregressive models: a token a pass, or several if a drafter guesses them."""

    def __init__(
        self, model: Model, config: DecodeConfig, drafter: Drafter | str | Path | None, draft_size: int | None
    ) -> None:
        check_causal(vars(config))
        self._model, self.config = causal_model(model), config
        self.models = (self._model,)
        self._drafter = drafter_of(drafter, self._model.device, self._model.dtype)
        if self._drafter is not None:
            self._drafter.check(model)
        self._sizer = sizer_of(self._drafter, draft_size)

    def check(self, fields: Mapping[str, Any]) -> None:
        check_causal(fields)

    def make_batch(self, lanes: int, width: int, kv_cache: KVCache) -> CausalBatch:
        return CausalBatch(
            self._model,
            lanes,
            width,
            drafter=self._drafter,
            sizer=self._sizer,
            batch_invariant=self.config.batch_invariant,
            graphs=self.config.graphs,
            kv_cache=kv_cache,
        )


class Adaptive(LeftToRight):
    """A masked diffusion model, as far as a verifier agrees, see `speculation.adaptive`.

    The verifier's keys and values have memory of their own, for every lane.
    """

    unshared = "a verifier"
    _mask_id: int

    def __init__(self, model: Model, config: DecodeConfig, verifier: Any, **options: Any) -> None:
        adaptive.check_adaptive(vars(config))
        self._options = adaptive.checked_options(**options)
        self._model, self.config = adaptive.diffusion_model(model), config
        self._mask_id = mask_of(self._model, config.mask_id)
        self._verifier = adaptive.verifier_of(verifier, self._model)
        self.models = (self._model, self._verifier)

    def check(self, fields: Mapping[str, Any]) -> None:
        adaptive.check_adaptive(fields)

    def settings(self, config: DecodeConfig) -> SequenceSettings:
        settings = super().settings(config)
        adaptive.check_known(self._verifier, [], settings.eos_ids)
        return settings

    def plan(self, ids: Tensor, gen_length: int, config: DecodeConfig) -> RequestPlan:
        plan = super().plan(ids, gen_length, config)
        adaptive.check_known(self._verifier, [ids], ())
        return plan

    def make_batch(self, lanes: int, width: int, kv_cache: KVCache) -> AdaptiveBatch:
        return AdaptiveBatch(
            self._model,
            lanes,
            width,
            verifier=self._verifier,
            mask_id=self._mask_id,
            batch_invariant=self.config.batch_invariant,
            graphs=self.config.graphs,
            kv_cache=kv_cache,
            **self._options,
        )


def kind_of(
    model: Model,
    config: DecodeConfig,
    *,
    drafter: Drafter | str | Path | None,
    draft_size: int | None,
    verifier: Any,
    **options: Any,
) -> ModelKind:
    """The kind of an engine. options: mixture, window and lookahead; None: not given.

    Raises ValueError naming the argument that does not fit the model.
    """
    name, model_traits = type(model).__name__, traits(model)
    causal = model_traits.causal and not is_block_causal(model_traits, config.cache or "none")
    if causal:
        why = f"belongs to diffusion models, and {name} is autoregressive"
        foreign = [("verifier", verifier, why), *((option, value, why) for option, value in options.items())]
    else:
        foreign = [("drafter", drafter, f"belongs to autoregressive models, and {name} is a diffusion model")]
        if verifier is None:
            why = "belongs to a verifier, and there is none"
            foreign += [(option, value, why) for option, value in options.items()]
        else:
            foreign.append(("draft_size", draft_size, "does not go with a verifier"))
    for argument, value, why in foreign:
        if value is not None:
            raise ValueError(f"{argument}: {why}, so expected None, got {shown(value)}")
    if causal:
        return Autoregressive(model, config, drafter, draft_size)
    if verifier is None:
        return Diffusion(model, config, draft_size)
    return Adaptive(model, config, verifier, **options)
