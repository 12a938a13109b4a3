"""One pass of adaptive parallel decoding, of the diffusion model and the verifier, see `adaptive`.

The batch decides what to draft. From there on everything runs on the device, and the draft goes to the
verifier without the host, so that on a GPU a pass can be recorded and replayed.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..cache import AttentionMetadata, KVCache, PadTo, Span
from ..decoding.padding import recorded_rows, row_padding
from ..decoding.sequence_settings import SamplingGroup, grouped
from ..models import Model, own_precision, traits
from ..ops.row_stats import read_rows
from ..packed import Packing, bits_of, unpack
from ..types import NO_ERROR
from .drafter import DraftKey, RecordedSession
from .sequence import UNKNOWN


class AdaptiveWork(NamedTuple):
    """The work of a pass on one sequence. Columns are positions of the sequence."""

    lane: int
    known: Sequence[int]
    """The known tokens, from the first on."""
    columns: range
    """The columns to draft, which are the next."""
    start: int
    """The first position that the diffusion model computes."""
    num_cached: int
    """Positions whose keys and values the verifier has."""
    sampling: SamplingGroup
    key: tuple[int, int]
    """Seed and sequence number."""

    @property
    def needs_verifier(self) -> bool:
        """Whether there is anything to verify."""
        return len(self.columns) > 1


@dataclass(frozen=True)
class VerifierDrafter:
    """The `Drafter` of an `AdaptiveBatch`: all that its recorded passes depend on beside the model,
    so that a batch can go on with the session of an earlier batch whose `VerifierDrafter` is equal."""

    verifier: weakref.ref[Model]
    """The batch keeps it alive; a workspace for the next batch does not."""
    dtype: torch.dtype
    """Of the verifier's cache."""
    mask_id: int
    mixture: float
    most = 0

    def check(self, model: Model) -> None:
        """Do nothing: `adaptive_decode` checks the verifier."""

    def session(self, model: Model, kv_cache: KVCache, lanes: int, *, graphs: bool = True) -> AdaptiveSession:
        return AdaptiveSession(self, model, kv_cache, lanes, graphs)


class AdaptiveSession(RecordedSession):
    """Runs the passes of an `AdaptiveBatch`, each of both models; the verifier's cache is its own."""

    def __init__(
        self, of: VerifierDrafter, model: Model, kv_cache: KVCache, lanes: int, graphs: bool
    ) -> None:
        super().__init__(None, model, graphs)
        self._verifier, self.mixture, self._mask = of.verifier, of.mixture, of.mask_id
        self.kv_cache, self.verifier_cache = kv_cache, self.verifier.new_cache(lanes, kv_cache.length)
        self.size = self.verifier_cache.slots.nbytes
        self.shared = min(model.shape.embedding_size, self.verifier.shape.embedding_size)
        """The number of ids, from 0, that both models have."""
        # The verifier never has more rows than the model.
        self._recorded_rows = min(self._recorded_rows, recorded_rows(self.verifier))
        self._pad_verifier_to = row_padding(self.verifier)

    @property
    def verifier(self) -> Model:
        verifier = self._verifier()
        assert verifier is not None  # the batch keeps it
        return verifier

    def addresses(self) -> Sequence[int] | None:
        return self.verifier.addresses()

    def judge(self, work: Sequence[AdaptiveWork]) -> Tensor:
        """Run a pass over some sequences, which changes nothing but keys and values.

        Returns (3, n) or, if any is verified, (5, n) int64 on the CPU, for the n columns of all work: the
        drafted tokens and their error codes, the bits of their log-probabilities in float32, and the choices
        by both models' logits and their error codes. Error code `UNKNOWN`: none.
        """
        packing = Packing()
        places = [(lane_work, column) for lane_work in work for column in lane_work.columns]
        masks = [[self._mask] * len(lane_work.columns) for lane_work in work]
        starts = [lane_work.start for lane_work in work]
        longest = self._put(packing, self.model, self.kv_cache, self._pad_to, work, starts, masks)
        if any(lane_work.needs_verifier for lane_work in work):
            # Place i of the draft stands for its token, which the host does not know, as ~i.
            draft = iter(range(len(places)))
            unknown = [[~next(draft) for _ in lane_work.columns] for lane_work in work]
            starts = [
                lane_work.num_cached if lane_work.needs_verifier else len(lane_work.known)
                for lane_work in work
            ]
            caches = self.verifier_cache, self._pad_verifier_to
            longest += self._put(packing, self.verifier, *caches, work, starts, unknown)
        keys = [number for lane_work, column in places for number in (*lane_work.key, column)]
        packing.padded(keys, 0, self._padded(len(places)), 3)
        numbers, groups = grouped(lane_work.sampling for lane_work, _ in places)
        for group in range(len(groups)):
            at = [place for place, number in enumerate(numbers) if number == group]
            packing.padded(at, at[0], self._padded(len(at)))
        return self._run_pass(packing, longest, groups)[:, : len(places)].cpu()

    def _padded(self, count: int) -> int:
        """The number that a number of places is padded to: no more than either model has rows of logits."""
        pads = self._pad_to, self._pad_verifier_to
        return min(count if pad_to is None else pad_to(count) for pad_to in pads)

    def _put(
        self,
        packing: Packing,
        model: Model,
        kv_cache: KVCache,
        pad_to: PadTo,
        work: Sequence[AdaptiveWork],
        starts: Sequence[int],
        drafts: Sequence[Sequence[int]],
    ) -> tuple[int, ...]:
        """Pack the inputs of `_logits`: the metadata of a model's pass, the ids of its rows, and the row of
        each place; return the metadata's `max_q_len` and `max_kv_len`.

        starts: the first position of each lane that is computed; behind the known tokens none is, and nobody
        reads the logits. drafts: the ids in the columns of each lane.
        """
        causal, back = traits(model).causal, int(traits(model).shift or traits(model).causal)
        spans: list[Span] = []
        ids: list[int] = []
        source: list[int] = []
        for lane_work, start, draft in zip(work, starts, drafts, strict=True):
            # The last token's logits are not needed.
            end = lane_work.columns.stop - int(causal)
            spans += model.spans(lane_work.lane, start, end, end)
            source += (max(0, column - back - start + len(ids)) for column in lane_work.columns)
            ids += [*lane_work.known[start:], *draft][: end - start]
        rows, *longest = kv_cache.put(packing, spans, pad_to)
        packing.padded(ids, 0, rows)
        packing.padded(source, 0, len(source) if pad_to is None else pad_to(len(source)))
        return tuple(longest)

    def _compute(self, key: DraftKey, inputs: Tensor) -> Tensor:
        tensors, longest = unpack(inputs, key.shapes), key.numbers
        of_models, (keys, *groups) = tensors[: -1 - len(key.groups)], tensors[-1 - len(key.groups) :]
        each = 2 * len(of_models) // len(longest)
        *about_tokens, ids, source = of_models[:each]
        logits = self._logits(self.model, self.kv_cache, longest[:2], about_tokens, ids, source)[: len(keys)]
        draft, logprob = self._choose(logits, keys, key.groups, groups)
        results = [draft, bits_of(logprob)[None]]
        if of_models[each:]:
            *about_tokens, ids, source = of_models[each:]
            # A bad row has no choice; its error is raised if the host comes to it.
            ids = torch.where(ids < 0, draft[0].clamp(min=0)[~ids.clamp(max=-1)], ids)
            other = self._logits(self.verifier, self.verifier_cache, longest[2:], about_tokens, ids, source)
            mixed = torch.lerp(other[: len(keys)].float(), logits.float(), self.mixture)
            results.append(self._choose(mixed, keys, key.groups, groups)[0])
        return torch.cat(results)

    def _logits(
        self,
        model: Model,
        kv_cache: KVCache,
        longest: Sequence[int],
        about_tokens: Sequence[Tensor],
        ids: Tensor,
        source: Tensor,
    ) -> Tensor:
        """(M, shared): a model's logits of the rows `source` (M,) of its pass."""
        max_q_len, max_kv_len = longest
        metadata = AttentionMetadata(max_q_len, max_kv_len, *about_tokens, causal=traits(model).causal)
        with own_precision(model, model.device):
            x = model.step(ids, kv_cache, metadata)
            return model.head(x[source])[:, : self.shared]

    def _choose(
        self, logits: Tensor, keys: Tensor, groups: Sequence[SamplingGroup], places: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Choices by the logits (count, shared) of places.

        keys: (count, 3) seed, sequence number and column, which key the samples' noise. places: the places of
        each group, the first of them perhaps several times.

        Returns (2, count) int64, tokens and error codes, and log-probabilities (count,) float32.
        """
        chosen = torch.full((2, len(logits)), UNKNOWN, device=logits.device)
        logprob = torch.full((len(logits),), torch.nan, device=logits.device)
        for group, at in zip(groups, places, strict=True):
            seed, sequence, position = keys[at].unbind(1)
            stats, error = read_rows(
                logits,
                rows=at,
                mask_id=self._mask if self._mask < self.shared else None,
                **group.arguments,
                seed=seed,
                sequence=sequence,
                position=position,
            )
            chosen[:, at] = torch.stack((stats.sample, torch.where(error == NO_ERROR, UNKNOWN, error % 4)))
            logprob[at] = stats.sample_logprob
        return chosen, logprob
