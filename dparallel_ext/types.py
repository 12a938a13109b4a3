"""What the ops return."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class RowStats(NamedTuple):
    """Statistics of rows of logits, each field shaped like the rows asked for.

    All are of softmax(logits) over every id that is not suppressed. Where `unmask_` or `accept` did not
    read a row, the ids are -1 and the numbers NaN.
    """

    token: Tensor
    """int64: argmax over admissible ids (never the mask token), ties to the lowest id."""
    top1: Tensor
    """float32: the largest admissible logit."""
    top2: Tensor
    """float32: the second largest admissible logit, -inf if there is none."""
    lse: Tensor
    """float32: log-sum-exp; the mask token keeps its share."""
    confidence: Tensor
    """float32: probability of `sample`, the token that would be committed."""
    margin: Tensor
    """float32: p1 - p2, of the two largest admissible logits."""
    entropy: Tensor
    """float32: in nats."""
    sample: Tensor
    """int64: the token to commit: `token` at temperature 0 (or below 1e-5), else a Gumbel-max sample."""
    sample_logprob: Tensor
    """float32: log of the probability that `sample` was drawn with: log softmax(logits / T)[sample] over the
    ids that may be drawn, so without the mask token and what top_p and top_k leave out. At temperature 0
    log softmax(logits)[token], the log of `confidence`."""
    max_logit: Tensor | None = None
    """float32: the largest logit of all, the mask token's too. None in statistics that somebody made by hand,
    as the next."""
    log_sum: Tensor | None = None
    """float32: log of the sum of exp(z - max_logit): `lse` - `max_logit` without the rounding of large
    logits, so that statistics of parts of a vocabulary merge, see `ops.merge_row_stats`."""
    logits: Tensor | None = None
    """(..., K) float32: the logits of the K ids that `row_stats` was asked for, whether they may be chosen or
    not; +inf as the largest float32. None where it was asked for none."""

    @property
    def mean_logit(self) -> Tensor:
        """float32: the mean of the logits under their softmax, `lse` - `entropy`."""
        if self.max_logit is None or self.log_sum is None:
            return self.lse - self.entropy
        return self.max_logit - (self.entropy - self.log_sum)

    def map(self, change: Callable[[Tensor], Tensor]) -> RowStats:
        """What `change` makes of each field; `logits` (..., K) too, where there are any."""
        return RowStats(*(None if values is None else change(values) for values in self))  # type: ignore[arg-type]


class RowTopK(NamedTuple):
    """The k best tokens of rows of logits, in descending order; shaped like the rows asked for, and k."""

    token: Tensor
    """(..., k) int64: ids; -1 where the row has fewer that may be chosen."""
    logprob: Tensor
    """(..., k) float32: log softmax(logits)[token], in which the mask token keeps its share; or -inf."""


class UnmaskOutput(NamedTuple):
    """What one `unmask_` step did; device tensors, nothing was synchronised."""

    committed: Tensor
    """(W,) int64: positions committed, by window."""
    remaining: Tensor
    """(W,) int64: masks left in the window."""
    done: Tensor
    """() bool: no window has a mask left."""
    stats: RowStats
    """Statistics of the rows read: fields (B, L), or (N,) where `positions` were given."""
    error: Tensor
    """(W,) int64: what kept each window from committing, see `ops.explain`; 2**63 - 1 where nothing did."""


class CommitOutput(NamedTuple):
    """What windows hold after `commit_`; device tensors, nothing was synchronised."""

    remaining: Tensor
    """(W,) int64: masks left in the window."""
    first: Tensor
    """(W,) int64: the column of the first of them; where there is none, the window's end (at most L)."""
    changed: Tensor
    """(W,) int64: tokens of the window that this call made others than they were."""


class AcceptOutput(NamedTuple):
    """What each lane of a verify pass emits; device tensors, nothing was synchronised.

    D is the `max_q_len` of `accept`. Behind `count`, `path` and `tokens` are -1.
    """

    count: Tensor  # type: ignore[assignment]  # in place of tuple's method
    """(B,) int64: the tokens that the lane emits, those of its draft that are accepted and one more; 0 where
    it has no row or no room, or failed."""
    path: Tensor
    """(B, D) int64: the rows that emit them, counted from the lane's first row, which is 0. The first is the
    root; the keys and values of these rows are what the lane keeps."""
    tokens: Tensor
    """(B, D) int64: the tokens, each the choice of the row of `path` in its place."""
    ended: Tensor
    """(B,) bool: the last of them is one of the lane's `eos_ids`."""
    stats: RowStats
    """Statistics of the rows, fields (N,): the choice of row r is `stats.sample[r]`."""
    error: Tensor
    """(B,) int64: what kept each lane from emitting, see `ops.explain`; 2**63 - 1 where nothing did."""
