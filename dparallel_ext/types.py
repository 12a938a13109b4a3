"""The outputs of the ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

NO_ERROR = 2**63 - 1
"""The value in the error outputs of ops that stands for none."""


class RowStats(NamedTuple):
    """Statistics of rows of logits, each field shaped like the rows.

    They are of softmax(logits) over every id that is not suppressed. For rows that `unmask_` or `accept` did
    not read, the ids are -1 and the numbers NaN. Admissible ids are those that are neither suppressed nor the
    mask token.
    """

    token: Tensor
    """int64: argmax over admissible ids, ties to the lowest id."""
    top1: Tensor
    """float32: the largest admissible logit."""
    top2: Tensor
    """float32: the second largest admissible logit, -inf if there is none."""
    lse: Tensor
    """float32: log-sum-exp of the logits, the mask token's included."""
    confidence: Tensor
    """float32: probability of `sample`, the token that would be committed."""
    margin: Tensor
    """float32: p1 - p2, the probabilities of the two largest admissible logits."""
    entropy: Tensor
    """float32: the entropy of softmax(logits), in nats."""
    sample: Tensor
    """int64: the token to commit: `token` at temperature 0 (or below 1e-5), else a Gumbel-max sample."""
    sample_logprob: Tensor
    """float32: the log-probability (nats) that `sample` was drawn with: log softmax(logits / T)[sample] over
    the ids that may be drawn, so without the mask token and the ids that top_p and top_k leave out. At
    temperature 0 it is log softmax(logits)[token], the log of `confidence`."""
    max_logit: Tensor | None = None
    """float32: the largest logit, the mask token's included. This and `log_sum` may be None in statistics
    that no op has made."""
    log_sum: Tensor | None = None
    """float32: log of the sum of exp(z - max_logit), that is `lse` - `max_logit` without the rounding of
    large logits, so that statistics of parts of a vocabulary can be merged, see `ops.merge_row_stats`."""
    logits: Tensor | None = None
    """(..., K) float32: the logits at the `ids` of `row_stats`, admissible or not; +inf as the largest
    float32. None without `ids`."""

    @property
    def mean_logit(self) -> Tensor:
        """float32: the mean of the logits under their softmax, `lse` - `entropy`."""
        if self.max_logit is None or self.log_sum is None:
            return self.lse - self.entropy
        return self.max_logit - (self.entropy - self.log_sum)

    def map(self, change: Callable[[Tensor], Tensor]) -> RowStats:
        """The statistics with `change` applied to each field, `logits` (..., K) included."""
        return RowStats(*(None if values is None else change(values) for values in self))  # type: ignore[arg-type]


class RowTopK(NamedTuple):
    """The k most probable tokens of rows of logits, in descending order."""

    token: Tensor
    """(..., k) int64: ids; -1 where the row has fewer admissible ids."""
    logprob: Tensor
    """(..., k) float32: log softmax(logits)[token], over the mask token too; -inf where `token` is -1."""


class UnmaskOutput(NamedTuple):
    """The commits of `unmask_`; tensors on the device, without synchronisation."""

    committed: Tensor
    """(W,) int64: positions committed in each window."""
    remaining: Tensor
    """(W,) int64: masks left in the window."""
    done: Tensor
    """() bool: no window has a mask left."""
    stats: RowStats
    """Statistics of the rows read: fields (B, L), or (N,) with `positions`."""
    error: Tensor
    """(W,) int64: the error that kept a window from committing, see `ops.errors`; 2**63 - 1 if
    none."""


class CommitOutput(NamedTuple):
    """The state of windows after `commit_`; tensors on the device, without synchronisation."""

    remaining: Tensor
    """(W,) int64: masks left in the window."""
    first: Tensor
    """(W,) int64: the column of the first mask; where there is none, the window's end (at most L)."""
    changed: Tensor
    """(W,) int64: tokens of the window that this call changed."""


class AcceptOutput(NamedTuple):
    """The tokens that each lane of a verify pass emits; tensors on the device, without synchronisation.

    D is the `max_q_len` of `accept`. From index `count` on, `path` and `tokens` are -1.
    """

    count: Tensor  # type: ignore[assignment]  # in place of tuple's method
    """(B,) int64: the number of tokens that the lane emits, the accepted ones of its draft and one more; 0 if
    it has no row or no room, or failed."""
    path: Tensor
    """(B, D) int64: the rows that emit the tokens, counted from the lane's first row. The first is 0, the
    root; the lane keeps the keys and values of these rows."""
    tokens: Tensor
    """(B, D) int64: the tokens: `tokens[b, i]` is the model's choice at row `path[b, i]`."""
    ended: Tensor
    """(B,) bool: the last token is one of the lane's `eos_ids`."""
    stats: RowStats
    """Statistics of the rows, fields (N,): the choice of row r is `stats.sample[r]`."""
    error: Tensor
    """(B,) int64: the error that kept a lane from emitting, see `ops.errors`; 2**63 - 1 if none."""


class CertaintyForcingLossOutput(NamedTuple):
    """The output of `certainty_forcing_loss`; the per-row fields have the shape of `labels`.

    Rows that are not active are 0 and False. `loss`, `nll` and `entropy` carry gradients.
    """

    loss: Tensor
    """() float32 (float64 for float64 logits)."""
    nll: Tensor
    """float32: -log softmax(z / ce_temperature)[label]."""
    entropy: Tensor
    """float32: the entropy of softmax(z / temperature), in nats."""
    correct: Tensor
    """bool: whether the argmax (ties to the lowest id) is the label."""
